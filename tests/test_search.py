"""The search for the cheapest formats within a budget: its logic against brute force, its parts against real graphs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest

from intaglio.exporters.budget import Point, front, met, parse_budget
from intaglio.exporters.candidates import Workshop
from intaglio.exporters.derive import contract_of, derive
from intaglio.exporters.quantization import calibrate_component
from intaglio.exporters.recipes import component_recipes
from intaglio.exporters.search import Group, Level, Unmet, bisect, chain, cost_of, error_of, hull, search
from intaglio.exporters.survey import Settings, Survey, timed
from intaglio.profiles.errors import UsageError
from intaglio.profiles.recipe import Recipe, load_recipe, to_toml
from intaglio.quantize.decode import codes_digest, quantized_weights
from intaglio.quantize.feeds import CalibrationSet
from intaglio.runtimes.engine import load_engine
from intaglio.runtimes.fidelity import relative_l2

# The bytes of what the search finds by those of the best plan there is, over 40 random problems of 6 groups.
WORST_FACTOR, MEAN_FACTOR = 1.1, 1.01  # measured 1.028 and 1.0014
# A group's error by the probe against the same group quantized in a real graph, relative; measured 5.4e-5.
SAME_ERROR = 1e-3
PROMPTS = ("red heart", "cat face")
CALIBRATION = CalibrationSet(prompts=PROMPTS, steps=2, records=2)


def problem(seed, groups=7):
    """Random groups of three levels: fewer bytes, more error."""
    rng = random.Random(seed)
    found = []
    for number in range(groups):
        size, error = rng.randint(1, 60) * 1000, 10 ** rng.uniform(-7, -4)
        sizes = ("int4", 0.56, 1.0), ("int8", 1.02, rng.uniform(0.002, 0.3)), ("none", 4.0, 0.0)
        levels = [
            Level(request=name, formats=(name,), bytes=int(size * s), cost=size * s, error=error * e)
            for name, s, e in sizes
        ]
        found.append(Group(members=(f"layer.{number}.weight",), levels=tuple(levels)))
    return found


def judge(groups, *, noise=0.0, seed=0):
    """A stand-in for pictures: PSNR by the predicted error, with noise of its own for every plan."""

    def verify(plan):
        error = error_of(groups, plan)
        wobble = random.Random(f"{seed}{plan}").uniform(-noise, noise)
        value = -10 * math.log10(error) - 20 + wobble if error else math.inf
        size = sum(g.levels[i].bytes for g, i in zip(groups, plan, strict=True))
        return point(name=str(plan), plan=plan, bytes=size, psnr=value)

    return verify


def point(**values):
    plain = {"name": "x", "kind": "search", "plan": (), "bytes": 1, "speed": 1.0, "psnr": 30.0}
    figures = {"psnr_median": 30.0, "ssim": 0.9, "ssim_median": 0.9, "predicted": 0.0}
    return Point(**{**plain, **figures, **values})


# --- the logic ------------------------------------------------------------------------------------------------------


def test_what_is_found_holds_and_costs_little_more_than_the_best_there_is():
    factors = []
    for seed in range(40):
        groups = problem(seed, groups=6)
        verify, budget = judge(groups), {"psnr": random.Random(seed).uniform(22, 45)}
        plans = itertools.product(*(range(len(g.levels)) for g in groups))
        best = min(p.bytes for p in map(verify, plans) if met(p, budget))
        found = search(groups, verify, budget)
        assert met(found.chosen, budget)
        factors.append(found.chosen.bytes / best)
    assert min(factors) >= 1
    assert max(factors) < WORST_FACTOR, max(factors)
    assert np.mean(factors) < MEAN_FACTOR, np.mean(factors)


def test_a_tighter_budget_never_costs_less_and_few_pictures_are_made():
    groups, sizes = problem(3, groups=40), []
    for limit in range(20, 50, 3):
        found = search(groups, judge(groups), {"psnr": limit}, attempts=0)
        sizes.append(found.chosen.bytes)
        assert len(found.points) <= 3 + math.log2(len(chain(groups)))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("seed", range(5))
def test_pictures_decide_where_the_prediction_is_wrong(seed):
    groups = problem(seed, groups=12)
    found = search(groups, judge(groups, noise=4, seed=seed), {"psnr": 33})
    assert found.chosen.psnr >= 33
    assert found.chosen.bytes == min(p.bytes for p in found.points if p.psnr >= 33)


def test_steps_down_after_the_bisection_save_bytes():
    plain = [search(problem(s), judge(problem(s)), {"psnr": 33}, attempts=0).chosen.bytes for s in range(20)]
    better = [search(problem(s), judge(problem(s)), {"psnr": 33}).chosen.bytes for s in range(20)]
    assert all(b <= p for p, b in zip(plain, better, strict=True))
    assert sum(better) < sum(plain)


def test_an_unreachable_budget_names_the_best_there_is():
    groups = [dataclasses.replace(g, levels=g.levels[:2]) for g in problem(1)]
    top = judge(groups)((1,) * 7)
    with pytest.raises(Unmet, match=rf"psnr=60 cannot be met .* best reachable is psnr={top.psnr:.4g}"):
        search(groups, judge(groups), {"psnr": 60})


def test_a_plan_that_makes_no_picture_does_not_hold():
    groups = problem(1)
    with pytest.raises(Unmet, match=r"no plan made a picture \(NaN\)"):
        search(groups, lambda plan: point(plan=plan, note="NaN"), {"psnr": 1}, usable=lambda plan: 2 not in plan)


def test_the_chain_goes_from_the_cheapest_to_the_most_accurate_by_ever_worse_ratios():
    groups = problem(5, groups=30)
    plans = chain(groups)
    costs, errors = [cost_of(groups, p) for p in plans], [error_of(groups, p) for p in plans]
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert all(sum(a != b for a, b in zip(p, q, strict=True)) == 1 for p, q in itertools.pairwise(plans))
    ratios = [(e - f) / (d - c) for (c, e), (d, f) in itertools.pairwise(zip(costs, errors, strict=True))]
    assert all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(ratios))


def test_a_level_that_costs_more_and_errs_more_is_never_taken():
    rows = [("int8", 10, 2.0), ("w8a8", 11, 5.0), ("int4", 5, 4.0), ("other", 8, 3.9), ("none", 40, 0.0)]
    levels = [Level(request=n, formats=(n,), bytes=b, cost=b, error=e) for n, b, e in rows]
    assert [levels[i].request for i in hull(levels)] == ["int4", "int8", "none"]


@pytest.mark.parametrize("last", [0, 1, 2, 7, 100])
def test_bisection_finds_the_first_that_holds(last):
    for border in {0, 1, last // 2, last} & set(range(last + 1)):
        assert bisect(last, lambda k, border=border: k >= border) == border


def test_speed_counts_products_by_the_seconds_their_format_took():
    groups = timed(
        problem(2, groups=2), {"layer.0.weight": 10, "layer.1.weight": 4}, {"int4": 2, "int8": 0.5, "none": 1}
    )
    assert [[v.cost for v in g.levels] for g in groups] == [[20, 5, 10], [8, 2, 4]]
    assert chain(groups)[0] == (1, 1), "int8 is the fastest, int4 slower than none"


def test_the_front_is_what_nothing_beats():
    small, large = point(name="small", bytes=1, psnr=30.0), point(name="large", bytes=5, psnr=40.0)
    fast, worse = point(name="fast", bytes=5, psnr=35.0, speed=1.5), point(name="worse", bytes=6, psnr=29.0, speed=1.01)
    broken = point(name="broken", bytes=0, note="NaN")
    points = [worse, small, large, fast, broken]
    assert [p.name for p in front(points)] == ["small", "large", "fast"]
    assert [p.name for p in front(points, speed=False)] == ["small", "large"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("psrn=30", "unknown; allowed: psnr, ssim. Did you mean 'psnr'?"),
        ("psnr", "decibels"),
        ("psnr=good", "decibels"),
        ("psnr=nan", "decibels"),
        ("psnr=-3", "decibels"),
        ("ssim=1.5", "0 to 1"),
        ("psnr=30,psnr=31", "twice"),
        ("", "unknown"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(text, words):
    with pytest.raises(UsageError, match="--budget") as error:
        parse_budget([text])
    assert words in str(error.value)


def test_budgets_add_up():
    assert parse_budget(["psnr=30", "ssim=0.9"]) == parse_budget(["psnr=30, ssim=0.9"]) == {"psnr": 30, "ssim": 0.9}
    assert met(point(psnr=31.0, ssim=0.95), {"psnr": 30, "ssim": 0.9})
    assert not met(point(psnr=31.0, ssim=0.85), {"psnr": 30, "ssim": 0.9})


# --- on real graphs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tiny_artifact, tmp_path_factory):
    """A workshop of the tiny UNet on ONNX Runtime with all three formats measured."""
    settings = Settings(
        component="unet",
        target="onnx",
        formats=("int4", "w8a8", "int8"),
        prompts=PROMPTS[:1],
        calibration=CALIBRATION,
        steps=2,
    )
    survey = Survey(tiny_artifact, settings, tmp_path_factory.mktemp("scratch"))
    made = Workshop(survey, survey.groups())
    yield made
    made.close()


def mixed(shop):
    """A plan that takes every level of some group."""
    return tuple(number % len(group.levels) for number, group in enumerate(shop.groups))


def test_layers_with_the_same_input_are_one_group(shop):
    members = [set(g.members) for g in shop.groups]
    qkv = next(m for m in members if any("attn1.to_q" in p for p in m))
    assert {p.rsplit(".", 2)[1] for p in qkv} == {"to_q", "to_k", "to_v"}
    assert sum(map(len, members)) == len(set().union(*members))
    assert all(g.levels[-1].error == 0 and g.levels[-1].request == "none" for g in shop.groups)
    assert all(v.error > 0 for g in shop.groups for v in g.levels[:-1])


@pytest.mark.parametrize("request_", ["int4", "w8a8"])
def test_the_probe_sees_what_the_real_graph_computes(shop, tmp_path, request_):
    """One group quantized and everything else left alone, derived and run by the engine."""
    feeds = shop.survey.judged_feeds()
    sizes = [
        sum(v.bytes for v in g.levels) if {request_, "none"} <= {v.request for v in g.levels} else 0
        for g in shop.groups
    ]
    number = int(np.argmax(sizes))
    group = shop.groups[number]
    level = next(i for i, v in enumerate(group.levels) if v.request == request_)
    plan = tuple(level if i == number else len(g.levels) - 1 for i, g in enumerate(shop.groups))
    truth, engine = (
        load_engine("onnxruntime", shop.source, "unet"),
        load_engine("onnxruntime", shop.derive(plan, tmp_path), "unet"),
    )
    (out,) = (s.name for s in shop.source.manifest.components["unet"].outputs)
    errors = [relative_l2(engine.run(f)[out], truth.run(f)[out]) ** 2 for f in feeds]
    assert group.levels[level].error == pytest.approx(np.mean(errors), rel=SAME_ERROR)


def test_a_build_with_the_recipe_has_the_codes_of_the_search(shop, tmp_path):
    plan = mixed(shop)
    (tmp_path / "recipe.x.toml").write_text(
        to_toml(Recipe(name="x", component={"unet": shop.recipe(plan)})), encoding="utf-8"
    )
    source, contract = shop.source, contract_of(shop.source, "unet")
    contracts = {name: contract_of(source, name) for name in source.manifest.components}
    recipe = component_recipes({}, tmp_path / "recipe.x.toml", {}, tuple(contracts), contracts)["unet"]
    calibrated = calibrate_component(source, "unet", recipe, contract, shop.survey.feeds, lambda text: None)
    built, found = (
        derive(source, tmp_path / "built", {"unet": recipe}, {"unet": calibrated}),
        shop.derive(plan, tmp_path / "found"),
    )
    formats = {w.parameter: w.binding.format for w in quantized_weights(built, "unet")}
    assert {"int8", "w8a8"} <= set(formats.values())
    assert codes_digest(built, "unet") == codes_digest(found, "unet")
    scales = [{w.parameter: w.activation for w in quantized_weights(a, "unet")} for a in (built, found)]
    assert scales[0] == scales[1]
    assert any(scales[0].values()), "some inputs are static"


def test_a_uniform_recipe_has_no_exceptions(shop):
    for name in shop.settings.formats:
        recipe = shop.recipe(shop.uniform(name))
        assert (recipe.format, recipe.layers) == (name, {})


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return file


def command(artifact, prompts, *more, budget="psnr=25", target="onnx"):
    small = ("--prompts", prompts, "--count", 1, "--steps", 1)
    return ("quantize-search", artifact.folder, "--budget", budget, "--target", target, *small, *more)


def test_the_command_writes_a_recipe_a_page_and_a_report(tiny_artifact, intaglio, prompts, tmp_path):
    before = sorted(tiny_artifact.folder.rglob("*"))
    folder = tmp_path / "out"
    code, out, err = intaglio(*command(tiny_artifact, prompts, "-o", folder, "--formats", "int4,int8", "--json"))
    assert code == 0, err
    report = json.loads(out)
    assert json.loads((folder / "search.json").read_text(encoding="utf-8")) == report
    (file,) = folder.glob("recipe.*.toml")
    assert sorted(p.name for p in folder.iterdir()) == sorted(["search.html", "search.json", file.name])
    recipe = load_recipe(file)
    assert recipe.budget["asked"] == "psnr=25"
    (chosen,) = (row for row in report["points"] if row["chosen"])
    assert chosen["identical"] or chosen["psnr"] >= 25
    assert {"int4", "int8"} <= {row["name"] for row in report["points"] if row["kind"] == "uniform"}
    assert chosen["bytes"] <= next(row["bytes"] for row in report["points"] if row["name"] == "int8")
    page = (folder / "search.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", ""), "the page needs nothing else"
    assert file.name in err
    assert sorted(tiny_artifact.folder.rglob("*")) == before, "the artifact was left as it was"
    code, _, err = intaglio(*command(tiny_artifact, prompts, "-o", folder))
    assert code == 2
    assert "exists" in err


def test_an_unreachable_budget_is_one_line_and_writes_nothing(tiny_artifact, intaglio, prompts, tmp_path, monkeypatch):
    # With a few layers quantized the tiny picture may be identical, so that no budget would be out of reach.
    monkeypatch.setattr("intaglio.exporters.candidates.psnr", lambda picture, truth: 12.0)
    arguments = command(tiny_artifact, prompts, "-o", tmp_path / "out", "--formats", "int8", budget="psnr=30")
    code, out, err = intaglio(*arguments)
    assert (code, out) == (2, "")
    assert "the best reachable is psnr=12 (" in err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("--component", "unett"),
            "'unett' is not there; allowed: text_encoder, unet, vae_decoder. Did you mean 'unet'?",
        ),
        (("--component", "vae_encoder"), "takes no part in pictures from text"),
        (("--formats", "int5"), "unknown format 'int5'"),
        (("--formats", "none"), "names no format"),
        (("--keep", "nothing.like.this*"), "'nothing.like.this*' matches none of"),
        (("--objective", "beauty"), "allowed: size, speed"),
        (("--count", 3), "--count 3 is not allowed"),
        (("--steps", 0), "--steps 0 is not allowed: a whole number, 1 or more"),
        (("--prompts", "/nowhere"), "cannot be read"),
    ],
)
def test_bad_input_is_one_line(tiny_artifact, intaglio, prompts, tmp_path, more, words):
    code, out, err = intaglio(*command(tiny_artifact, prompts, *more, "-o", tmp_path / "out"))
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]


def test_an_empty_prompt_file_is_refused(tiny_artifact, intaglio, tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n", encoding="utf-8")
    code, _, err = intaglio(*command(tiny_artifact, tmp_path / "empty.txt", "-o", tmp_path / "out"))
    assert code == 2
    assert "has no prompt" in err


def test_a_quantized_artifact_and_a_target_that_was_not_built_are_refused(
    tiny_artifact, without_openvino, copy_artifact, reseal, intaglio, prompts, tmp_path
):
    code, _, err = intaglio(
        *command(without := dataclasses.replace(tiny_artifact, folder=without_openvino), prompts, target="openvino")
    )
    assert code == 2
    assert f"{without.folder} was built for onnx, not for openvino" in err
    code, _, err = intaglio(*command(tiny_artifact, prompts, target="tensorflow"))
    assert code == 2
    assert "unknown target 'tensorflow'" in err
    unet = dataclasses.replace(tiny_artifact.manifest.components["unet"], format="int8", quantization=quantization())
    manifest = dataclasses.replace(
        tiny_artifact.manifest, components={**tiny_artifact.manifest.components, "unet": unet}
    )
    folder = reseal(copy_artifact(tiny_artifact, "quantized"), manifest)
    code, _, err = intaglio(*command(dataclasses.replace(tiny_artifact, folder=folder), prompts))
    assert code == 2
    assert "codes are not quantized twice" in err


def quantization():
    from intaglio.profiles.spec import Coverage, Quantization

    return Quantization(activations="exact", recipe={}, coverage=Coverage(weights=1.0, all_weights=1.0))


def test_tensorrt_without_a_gpu_is_refused_with_the_reason(tiny_artifact, intaglio, prompts, monkeypatch):
    monkeypatch.setattr("intaglio.bench.memory.gpus", lambda: ([], "no NVIDIA GPU"))
    code, _, err = intaglio(*command(tiny_artifact, prompts, target="tensorrt"))
    assert code == 2
    assert "--target tensorrt cannot run here: no NVIDIA GPU" in err
