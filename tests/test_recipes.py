"""Recipes: what is asked for, what each layer takes, and what cannot be done."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from intaglio.exporters.cli import parse_quant
from intaglio.exporters.quantization import layers_of
from intaglio.exporters.recipes import component_recipes, needs_feeds, remarks
from intaglio.profiles.errors import ProfileError, Unsupported, UsageError
from intaglio.profiles.family import Contract
from intaglio.profiles.recipe import ComponentRecipe, Recipe, load_recipe, to_toml
from intaglio.quantize.formats import FORMATS, OPS, SUPPORT, TARGETS, check_formats, format_for
from intaglio.quantize.layers import SMALLEST, Layer, Rules, assign, check_share, coverage

COMPONENTS = ("text_encoder", "transformer", "vae_decoder")
CONTRACTS = {
    "text_encoder": Contract(static_activations=False),
    "transformer": Contract(),
    "vae_decoder": Contract(),
}
CODED = [name for name, row in FORMATS.items() if row.codec]


def recipes(quant, profile=None, **options):
    values = {key.replace("__", "."): value for key, value in options.items()}
    return component_recipes(quant, profile, values, COMPONENTS, CONTRACTS)


def formats(found):
    return {name: recipe.format for name, recipe in found.items()}


# --- files and the command line -------------------------------------------------------------------------------------

FULL = Recipe(
    name="mixed",
    component={
        "transformer": ComponentRecipe(
            format="w8a8",
            activations="static",
            method="awq",
            range="percentile",
            smoothquant=0.5,
            rank=16,
            layers={"*.attn.to_[qk].weight": "int8", 'odd "name"': "none"},
        ),
        "*": ComponentRecipe(format="int8"),
    },
    budget={"psnr": "30", "found": "31.2"},
)


def test_a_recipe_survives_its_file(tmp_path):
    file = tmp_path / "recipe.mixed.toml"
    file.write_text(to_toml(FULL), encoding="utf-8")
    assert load_recipe(file) == FULL
    assert to_toml(load_recipe(file)) == to_toml(FULL)


WRONG_FILES = {
    "component.x.fromat = 'int8'": "fromat",
    "quant = 'int8'": "quant",
    "[component.x]\nrank = 'many'": "rank",
    "[component.x]\nrank = -1": "rank -1 is not allowed: 0 to 1024",
    "[component.x]\nrank = 1025": "rank 1025 is not allowed: 0 to 1024",
    "[component.x]\nsmoothquant = 1.5": "smoothquant 1.5 is not allowed: 0 to 1, or -1",
    "[component.x]\nsmoothquant = -0.5": "smoothquant -0.5 is not allowed",
    "[component.x]\nactivations = 'dynamic'": "activations 'dynamic' is not allowed: exact, dynamic-per-token, static",
    "[component.x]\nmethod = 'gptq'": "method 'gptq' is not allowed: rtn, mse, awq",
    "[component.x]\nrange = 'max'": "range 'max' is not allowed: absmax, percentile, mse",
    "[component": "is not TOML",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_recipe_file_is_refused_by_name(text, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert WRONG_FILES[text] in message
    assert str(file) in message
    assert "\n" not in message


def test_a_recipe_file_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match=r"nowhere.toml cannot be read .*--profile takes"):
        load_recipe(tmp_path / "nowhere.toml")


def test_the_command_line_names_components():
    assert parse_quant(["transformer=w8a8,text_encoder=int8,vae_decoder=none"]) == {
        "transformer": "w8a8",
        "text_encoder": "int8",
        "vae_decoder": "none",
    }
    assert parse_quant(["int8", "transformer=int4, vae_decoder=none"]) == {
        "*": "int8",
        "transformer": "int4",
        "vae_decoder": "none",
    }


def test_the_command_line_goes_over_the_file(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(FULL), encoding="utf-8")
    plain = recipes({}, file)
    assert formats(plain) == {"text_encoder": "int8", "transformer": "w8a8", "vae_decoder": "int8"}
    assert plain["transformer"] == FULL.component["transformer"]
    changed = recipes({"transformer": "int4"}, file, quantize__transformer__activations="exact")
    assert formats(changed) == {"text_encoder": "int8", "transformer": "int4", "vae_decoder": "int8"}
    assert changed["transformer"].layers == {}, "exceptions from w8a8 say nothing about int4"
    assert (changed["transformer"].rank, changed["transformer"].method) == (16, "awq")
    same = recipes({"transformer": "w8a8", "*": "none"}, file)
    assert same["transformer"].layers == FULL.component["transformer"].layers
    assert formats(same) == {"text_encoder": "none", "transformer": "w8a8", "vae_decoder": "none"}


def test_settings_go_over_the_file_for_all_and_for_one():
    found = recipes(
        {"*": "int4"}, quantize__method="rtn", quantize__transformer__method="awq", quantize__transformer__rank="32"
    )
    assert {name: (r.method, r.rank) for name, r in found.items()} == {
        "text_encoder": ("rtn", 0),
        "transformer": ("awq", 32),
        "vae_decoder": ("rtn", 0),
    }


WRONG_SETTINGS = {
    ("quantize.mehtod", "awq"): r"--set quantize.mehtod is unknown; allowed: quantize.\[COMPONENT.\]\{activations,",
    ("quantize.unet.method", "awq"): "components: text_encoder, transformer, vae_decoder",
    ("quantize.transformer.extra.method", "awq"): "is unknown",
    ("quantize.rank", "many"): "--set quantize.rank=many is not a number",
    ("quantize.rank", "2.5"): "--set quantize.rank=2.5 is not a number",
    ("quantize.smoothquant", "a"): "--set quantize.smoothquant=a is not a number",
    ("quantize.smoothquant", "nan"): "smoothquant nan is not allowed",
    ("quantize.smoothquant", "2"): "smoothquant 2 is not allowed: 0 to 1, or -1",
    ("quantize.rank", "-4"): "rank -4 is not allowed: 0 to 1024",
    ("quantize.method", "best"): "method 'best' is not allowed: rtn, mse, awq",
    ("quantize.activations", "static"): "activations 'static' do not go with int4; allowed: exact, dynamic-per-token",
}


@pytest.mark.parametrize("key, value", WRONG_SETTINGS)
def test_wrong_settings_are_refused(key, value):
    with pytest.raises((UsageError, ProfileError), match=WRONG_SETTINGS[key, value]):
        component_recipes({"*": "int4"}, None, {key: value}, COMPONENTS, CONTRACTS)


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"'int3'.*Did you mean 'int[48]'"):
        recipes({"*": "int3"})
    with pytest.raises(UsageError, match=r"--quant names the component 'transfomer'.*Did you mean 'transformer'"):
        recipes({"transfomer": "int8"})
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(Recipe(component={"unet": ComponentRecipe(format="int8")})))
    with pytest.raises(UsageError, match=r"recipe.toml names the component 'unet'; allowed: text_encoder"):
        recipes({}, file)
    layers = {"*": "int9"}
    file.write_text(to_toml(Recipe(component={"transformer": ComponentRecipe(format="int8", layers=layers)})))
    with pytest.raises(UsageError, match=r"'int9'.*allowed"):
        recipes({}, file)


def test_activations_follow_the_format_and_may_not_contradict_it():
    found = recipes({"*": "w8a8"})
    assert {name: r.activations for name, r in found.items()} == {
        "text_encoder": "exact",
        "transformer": "static",
        "vae_decoder": "static",
    }
    (note,) = remarks(found, CONTRACTS)
    assert note.startswith("text_encoder: w8a8 means int8 here")
    assert remarks(recipes({"*": "int8"}), CONTRACTS) == []
    assert recipes({"*": "int8"}, quantize__activations="dynamic-per-token")["transformer"].activations == (
        "dynamic-per-token"
    )
    for name in ("exact", "dynamic-per-token"):
        with pytest.raises(
            UsageError, match=rf"transformer: activations '{name}' do not go with w8a8; allowed: static"
        ):
            recipes({"transformer": "w8a8"}, quantize__transformer__activations=name)


def test_what_is_calibrated():
    assert {name for name in CODED if needs_feeds(ComponentRecipe(format=name))} == {"w8a8", "fp8"}
    assert needs_feeds(ComponentRecipe(format="int4", method="awq"))
    assert needs_feeds(ComponentRecipe(format="nf4", rank=8))
    assert needs_feeds(ComponentRecipe(format="none", layers={"*": "w8a8"}))
    assert not needs_feeds(ComponentRecipe(format="int8", method="awq"))
    assert not needs_feeds(ComponentRecipe(format="none", rank=8))


# --- the format of each layer ---------------------------------------------------------------------------------------


def layer(parameter, op="MatMul", shape=(128, 64)):
    """A layer without a graph."""
    node = ir.node(op, [])
    value = node.outputs[0]
    return Layer(node=node, op=op, weight=value, source=value, parameter=parameter, shape=shape, pointwise=False)


LAYERS = [
    layer("blocks.0.attn.to_q.weight"),
    layer("blocks.0.ff.0.weight", shape=(96, 64)),
    layer("blocks.0.ff.2.weight", shape=(100, 64)),
    layer("norm_out.linear.weight"),
    layer("proj_out.weight"),
    layer("tiny.weight", shape=(63, 65)),
    layer("embed.weight", "Gather", (1000, 64)),
    layer("conv.weight", "Conv", (64, 64, 3, 3)),
]
RULES = Rules(keep=("proj_out.*",), int8=("norm_out.*",))
BY_FORMAT = {  # attention, 96 channels, 100 channels, floor, convolution
    "int8": ("int8", "int8", "int8", "int8", "int8"),
    "w8a8": ("w8a8", "w8a8", "w8a8", "int8", "w8a8"),
    "int4": ("int4", "int4-32", "int8", "int8", "int8"),
    "int4-32": ("int4-32", "int4-32", "int8", "int8", "int8"),
    "int4-128": ("int4-128", "int4-32", "int8", "int8", "int8"),
    "nf4": ("nf4", "nf4", "nf4", "int8", "int8"),
    "nf4-double": ("nf4-double", "nf4-double", "nf4-double", "int8", "int8"),
    "fp8": ("fp8", "fp8", "fp8", "int8", "int8"),
    "fp8-weight-only": ("fp8-weight-only", "fp8-weight-only", "fp8-weight-only", "fp8-weight-only", "int8"),
}


@pytest.mark.parametrize("name", CODED)
def test_every_format_falls_back_by_operator_shape_and_rule(name):
    choices = assign(LAYERS, ComponentRecipe(format=name), RULES)
    found = [choices[LAYERS[i].parameter].format for i in (0, 1, 2, 3, 7)]
    assert tuple(found) == BY_FORMAT[name]
    kept = {p: c.reason for p, c in choices.items() if c.format == "none"}
    assert kept == {
        "proj_out.weight": "the family keeps it high",
        "tiny.weight": "too small",
        "embed.weight": "embeddings stay high",
    }
    assert choices["norm_out.linear.weight"].covered, "a floor of the family counts"
    assert choices["blocks.0.ff.0.weight"].covered
    assert choices["blocks.0.ff.2.weight"].covered == (not name.startswith("int4")), "8 bits are not 4"
    assert not choices["proj_out.weight"].covered


def test_an_attention_layer_of_64_channels():
    assert format_for("int4-128", "MatMul", 64) == "int4"
    assert format_for("nf4", "MatMul", 64) == "nf4"
    assert format_for("w8a8", "Gather") == "int8"


def test_patterns_go_over_the_familys_rules_and_the_last_one_decides():
    wanted = {"*": "int8", "proj_out.*": "int4", "embed.*": "int4", "tiny.*": "int8", "blocks.*.to_q.*": "none"}
    choices = assign(LAYERS, ComponentRecipe(format="int4", layers=wanted), RULES)
    assert {p: c.format for p, c in choices.items()} == {
        "blocks.0.attn.to_q.weight": "none",
        "blocks.0.ff.0.weight": "int8",
        "blocks.0.ff.2.weight": "int8",
        "norm_out.linear.weight": "int8",
        "proj_out.weight": "int4",
        "tiny.weight": "int8",
        "embed.weight": "int8",
        "conv.weight": "int8",
    }
    assert choices["blocks.0.attn.to_q.weight"].reason == "the recipe"


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UsageError, match=r"'blocks.\*.to_x.weight' matches none of 8 weights; they are named like"):
        assign(LAYERS, ComponentRecipe(format="int8", layers={"blocks.*.to_x.weight": "int4"}), RULES)


def test_where_static_activations_are_ruled_out():
    rules = dataclasses.replace(RULES, static=False)
    for name, weight_only in (("w8a8", "int8"), ("fp8", "fp8-weight-only")):
        choices = assign(LAYERS, ComponentRecipe(format=name), rules)
        assert choices["blocks.0.attn.to_q.weight"].format == weight_only
        assert choices["blocks.0.attn.to_q.weight"].covered


def test_coverage_counts_bytes_and_multiplications():
    recipe = ComponentRecipe(format="int4", layers={"blocks.0.attn.*": "none"})
    choices = assign(LAYERS, recipe, RULES)
    # 128 x 64 of the recipe and of the family stay high, 100 x 64 takes int8; the floor and blocks of 32 count.
    matmul = {la.parameter: la.elements for la in LAYERS if la.op == "MatMul" and la.elements >= SMALLEST}
    floor, conv = matmul["norm_out.linear.weight"] + matmul["blocks.0.ff.0.weight"], LAYERS[7].elements
    macs = {la.parameter: 1 for la in LAYERS}
    found = coverage(LAYERS, choices, macs)
    assert found.weights == round(floor / sum(matmul.values()), 6)
    assert found.all_weights == round((floor + conv) / (sum(matmul.values()) + conv), 6)
    assert found.macs == round(3 / 6, 6)
    assert found.exceptions == {
        "blocks.0.attn.to_q.weight": "none: the recipe",
        "blocks.0.ff.0.weight": "int4-32: 96 input channels",
        "blocks.0.ff.2.weight": "int8: 100 input channels",
        "norm_out.linear.weight": "int8: the family's floor",
        "proj_out.weight": "none: the family keeps it high",
        "embed.weight": "none: embeddings stay high",
    }
    assert coverage(LAYERS, choices).macs is None
    assert coverage(LAYERS[:1], assign(LAYERS[:1], ComponentRecipe(format="int8"), RULES)).weights == 1


def test_a_format_that_reaches_next_to_nothing_is_refused(tiny_artifact):
    from intaglio.exporters.store import GRAPH

    folder = tiny_artifact.component("unet")
    model, layers = ir.load(folder / GRAPH), layers_of(folder)
    small = min((la for la in layers if la.op == "MatMul"), key=lambda la: la.elements)
    choices = assign(layers, ComponentRecipe(format="none", layers={small.parameter: "int8"}), Rules())
    with pytest.raises(UsageError, match=r"unet: the format would apply to \d\.\d% .*under 5%; use unet=none"):
        check_share("unet", model, layers, choices)
    check_share("unet", model, layers, assign(layers, ComponentRecipe(format="int8"), Rules()))


def test_layers_of_a_graph_are_its_matrices_tables_and_convolutions(tiny_artifact):
    ops = {name: {la.op for la in layers_of(tiny_artifact.component(name))} for name in ("unet", "text_encoder")}
    assert ops == {"unet": {"MatMul", "Conv"}, "text_encoder": {"MatMul", "Gather"}}
    rows = {la.parameter: la for la in layers_of(tiny_artifact.component("unet"))}
    projection = rows["mid_block.attentions.0.proj_in.weight"]
    assert (projection.op, projection.node.op_type, projection.pointwise) == ("MatMul", "Conv", True)
    assert projection.read().shape == projection.shape[1::-1]
    assert np.isfinite(projection.read()).all()


# --- the table of support -------------------------------------------------------------------------------------------


def test_every_format_is_described_for_every_operator_it_lands_on_and_every_target():
    for name in CODED:
        for op in OPS:
            for target in TARGETS:
                assert SUPPORT[format_for(name, op), op, target].reason
    assert {key[0] for key in SUPPORT} == set(CODED)
    assert {row.how for row in SUPPORT.values()} <= {"native", "lowered", "stored-only", "unsupported"}


def test_slow_pairs_are_named():
    notes = check_formats({"none", "int4"}, ("onnxruntime",))
    assert notes
    assert all(note.startswith("int4: ") and "smaller, not faster (" in note for note in notes)
    assert any("int8 Conv on onnxruntime" in note for note in notes), "what an int4 recipe makes of convolutions"
    assert any("speed not measured" in note for note in check_formats({"int8"}, ("tensorrt",)))
    assert check_formats({"none"}, TARGETS) == []


def test_a_pair_that_does_not_work_is_refused_with_the_nearest_that_does(monkeypatch):
    rows = {**SUPPORT}
    rows["nf4", "MatMul", "tensorrt"] = dataclasses.replace(
        rows["nf4", "MatMul", "tensorrt"], how="unsupported", reason="no such plan"
    )
    rows["nf4-double", "MatMul", "tensorrt"] = rows["nf4", "MatMul", "tensorrt"]
    del rows["int8", "Conv", "openvino"]
    monkeypatch.setattr("intaglio.quantize.formats.SUPPORT", rows)
    with pytest.raises(Unsupported, match=r"tensorrt does not carry nf4 in MatMul: no such plan; .* there is int4"):
        check_formats({"nf4"}, ("onnxruntime", "tensorrt"))
    with pytest.raises(Unsupported, match=r"openvino does not carry int8 in Conv: not in the table; .* there is w8a8"):
        check_formats({"int4"}, ("openvino",))
    assert check_formats({"nf4"}, ("onnxruntime",))
    with pytest.raises(UsageError, match="int9"):
        check_formats({"int9"}, ("onnxruntime",))
