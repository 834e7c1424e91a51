"""Compute dtypes: what ``--dtype`` may ask for, what contracts keep, and what float16 would overflow."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from partial import QUICK

from intaglio.exporters.build import build
from intaglio.exporters.cast import cast_to_contract
from intaglio.exporters.component import FAMILIES
from intaglio.exporters.dtypes import compute_dtypes, parse_dtypes
from intaglio.exporters.range_audit import LIMIT, Audit, AuditEngine, Peak, Place
from intaglio.profiles.errors import NumericsError, Unsupported, UsageError
from intaglio.profiles.family import Contract, load_family

TARGETS = ("onnx", "openvino", "tensorrt")
CONTRACTS = {
    "transformer": Contract(dtype="bfloat16", allowed=("bfloat16", "float32"), source="bf16 range"),
    "vae_decoder": Contract(dtype="float32", allowed=("float32",), source="overflows"),
    "text_encoder": Contract(dtype="float16"),
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], {}),
        (["fp16"], dict.fromkeys(TARGETS, "float16")),
        (["tensorrt=bf16"], {"tensorrt": "bfloat16"}),
        (["fp32,tensorrt=fp16"], {"onnx": "float32", "openvino": "float32", "tensorrt": "float16"}),
    ],
)
def test_dtypes_are_read_for_all_targets_or_one(values, expected):
    assert parse_dtypes(values, TARGETS) == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["half"], "unknown dtype 'half'; allowed: bf16, fp16, fp32"),
        (["cuda=fp16"], "names 'cuda', which is not built; allowed: onnx, openvino, tensorrt"),
        (["fp16", "fp32"], "says again"),
        (["onnx=fp16", "onnx=fp32"], "says again"),
    ],
)
def test_wrong_dtypes_are_one_line_with_what_is_allowed(values, words):
    with pytest.raises(UsageError) as caught:
        parse_dtypes(values, TARGETS)
    assert words in str(caught.value)


def test_tensorrt_takes_the_contracts_dtype_and_the_others_float32():
    dtypes, remarks = compute_dtypes(CONTRACTS, TARGETS, {})
    assert dtypes["onnx"] == dtypes["openvino"] == dict.fromkeys(CONTRACTS, "float32")
    assert dtypes["tensorrt"] == {"transformer": "bfloat16", "vae_decoder": "float32", "text_encoder": "float16"}
    assert not remarks


def test_what_a_contract_does_not_allow_is_said_and_refused_for_the_denoiser():
    dtypes, remarks = compute_dtypes(CONTRACTS, ("tensorrt",), {"tensorrt": "bfloat16"})
    assert dtypes["tensorrt"] == {"transformer": "bfloat16", "vae_decoder": "float32", "text_encoder": "bfloat16"}
    assert remarks == ["vae_decoder stays in fp32, not bf16 on tensorrt: overflows"]
    with pytest.raises(
        Unsupported, match=r"transformer cannot compute in fp16 on tensorrt; allowed: bf16, fp32 \(bf16"
    ):
        compute_dtypes(CONTRACTS, ("tensorrt",), {"tensorrt": "float16"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_contract_gives_its_source(family):
    for component, contract in load_family(family).contract.items():
        assert contract.source, component
        assert "float32" in contract.allowed


def test_float32_parameters_are_islands_in_plain_and_stored_weights(tiny_artifact):
    graph = ir.load(tiny_artifact.component("vae_decoder") / "model.onnx")
    cast_to_contract(graph, "float16", Contract(dtype="float16", float32_parameters=("decoder.conv_in.*",)))
    convolutions = {n.inputs[1].name: n.outputs[0].dtype for n in graph.graph if n.op_type == "Conv"}
    islands = {name for name, dtype in convolutions.items() if dtype == ir.DataType.FLOAT}
    assert islands == {"decoder.conv_in.weight"} and len(convolutions) > 10


def scaled(checkpoint, file, key, factor):
    from safetensors.numpy import load_file, save_file

    path = checkpoint / file
    weights = load_file(path)
    weights[key] = weights[key] * np.float32(factor)
    save_file(weights, path)


def few_steps(checkpoint):
    (checkpoint / "sampling_defaults.json").write_text('{"num_inference_steps": 2}')


def only_decoder(monkeypatch):
    """Build text encoder and UNet too, for the pictures, but leave the VAE encoder out: it is not what overflows."""
    import dataclasses

    import intaglio.exporters.build as module

    plan = module.make_plan

    def without(*args, **options):
        made = plan(*args, **options)
        return dataclasses.replace(made, components=tuple(c for c in made.components if c.name != "vae_encoder"))

    monkeypatch.setattr(module, "make_plan", without)


def test_a_vae_that_overflows_float16_fails_the_build_by_name(tiny_checkpoint, copy_artifact, tmp_path, monkeypatch):
    only_decoder(monkeypatch)
    checkpoint = copy_artifact(tiny_checkpoint, "loud")
    few_steps(checkpoint)
    scaled(checkpoint, "vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight", 3e3)
    with pytest.raises(NumericsError) as caught:
        build(checkpoint, tmp_path / "built", dtype=["fp16"], options=QUICK)
    message = str(caught.value)
    assert message.startswith("vae_decoder: ") and "(after decoder.conv_in" in message
    assert "at step" in message and "--dtype bf16" in message and "\n" not in message
    assert not (tmp_path / "built").exists()


def test_t5_overflows_float16_in_wo_and_the_contracts_islands_hold_it(built_case, copy_artifact, tmp_path, monkeypatch):
    import dataclasses

    import intaglio.exporters.build as module

    checkpoint = copy_artifact(built_case("flux dev").checkpoint, "t5")
    scaled(checkpoint, "text_encoder_2/model.safetensors", "encoder.block.0.layer.1.DenseReluDense.wo.weight", 1e7)
    plan, name = module.make_plan, "text_encoder_2"

    def alone(*args, **options):
        made = plan(*args, **options)
        return dataclasses.replace(made, components=tuple(c for c in made.components if c.name == name))

    monkeypatch.setattr(module, "make_plan", alone)
    artifact = build(checkpoint, tmp_path / "built", options=QUICK)
    contract = load_family("flux").contract[name]

    def audit(contract):
        engine = AuditEngine(artifact, name, contract, Place(prompt="a cat"))
        engine.run({"input_ids": np.arange(2, 34)[None]})
        return Audit({name: engine.peaks})

    audit(contract).check()
    with pytest.raises(NumericsError, match=r"text_encoder_2: .*DenseReluDense\.wo\.weight\) reaches .* of 'a cat'"):
        audit(dataclasses.replace(contract, float32_ops=(), float32_parameters=())).check()


def test_in_range_peaks_are_kept_in_the_build_log_and_the_variant_lies_beside(
    tiny_checkpoint, copy_artifact, tmp_path, monkeypatch
):
    only_decoder(monkeypatch)
    checkpoint = copy_artifact(tiny_checkpoint, "quiet")
    few_steps(checkpoint)
    artifact = build(checkpoint, tmp_path / "built", dtype=["onnx=fp16"], options=QUICK)
    peaks = json.loads((artifact.folder / "build.json").read_text())["float16_peaks"]
    assert set(peaks) == set(artifact.manifest.components)
    assert all(0 < value < LIMIT for rows in peaks.values() for value in rows.values())
    assert set(artifact.manifest.dtypes["onnx"].values()) == {"float16"}
    assert not list(artifact.folder.rglob("*audit*"))
    unet = artifact.folder / "unet"
    whole = sum(t.nbytes for t in artifact.manifest.components["unet"].tensors.values())
    assert whole * 0.45 < (unet / "model.float16.onnx.data").stat().st_size < whole * 0.6


def test_the_first_tensor_that_leaves_the_range_is_named_and_not_a_number_counts():
    peaks = {"unet": {"c": Peak(1.0, 0, "x"), "b": Peak(float("nan"), 3, "y"), "a": Peak(4e4, 2, "x")}}
    with pytest.raises(NumericsError, match=r"unet: b reaches nan at step 3 of 'y'.*\(2 such tensors\)"):
        Audit(peaks).check()
    Audit({"unet": {"c": Peak(LIMIT)}}).check()


def test_a_checkpoint_may_tighten_or_loosen_its_familys_contract(built_case, copy_artifact, tiny_checkpoint):
    from intaglio.exporters.plan import make_plan

    def configured(folder, part, **changes):
        file = folder / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    fixed = configured(copy_artifact(built_case("sdxl").checkpoint, "fixed"), "vae", force_upcast=False)
    for folder, dtype in ((built_case("sdxl").checkpoint, "float32"), (fixed, "float16")):
        plan = make_plan(folder, dtype=["fp16"])
        assert plan.dtypes["onnx"]["vae_decoder"] == dtype
        assert any("vae_decoder stays in fp32" in remark for remark in plan.remarks) == (dtype == "float32")
    loud = configured(copy_artifact(tiny_checkpoint, "sd21"), "unet", upcast_attention=True)
    assert "Attention" in make_plan(loud).contract("unet").float32_ops
    assert "Attention" not in make_plan(tiny_checkpoint).contract("unet").float32_ops
