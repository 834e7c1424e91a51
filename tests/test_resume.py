"""A build that was killed goes on where it was, and makes what it would have made."""

from __future__ import annotations

import dataclasses
import json
import signal
import zipfile

import numpy as np
import pytest
from partial import QUICK
from rot import Nursery, law

from intaglio.exporters.plan import make_plan
from intaglio.exporters.quantization import DRAFT, FEEDS, Calibrated
from intaglio.exporters.resume import CALIBRATED, NOTES, Work, build_key, packed, unpacked
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.spec import ComponentRecord, TensorSpec
from intaglio.profiles.staging import CONTENT
from intaglio.quantize.weight import InputScales

FIRST, SECOND = "text_encoder", "vae_decoder"
TARGETS = ["onnx", "openvino"]
MIDWAY = f"{SECOND}/config.json"  # the first component is finished, the second is not
TENSOR = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
RECORD = ComponentRecord(
    source="unet",
    inputs=(TENSOR,),
    outputs=(TENSOR,),
    parameters=4,
    format="none",
    targets=("onnx",),
    tensors={},
    weights={},
)


@pytest.fixture(scope="module")
def nursery(tiny_checkpoint):
    started = Nursery(tiny_checkpoint, FIRST, SECOND)
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """The digest of a build that nothing happened to, and its log."""
    folder = tmp_path_factory.mktemp("undisturbed") / "artifact"
    done = nursery.build(folder, targets=TARGETS)
    assert done.code == 0, done.error
    return Artifact.open(folder).manifest.digest, json.loads((folder / "build.json").read_text())


def staging(folder):
    (found,) = folder.glob(".artifact.*.building")
    return found


def kill_midway(nursery, target, **options):
    killed = nursery.build(target, at=MIDWAY, targets=TARGETS, **options)
    assert killed.code == -signal.SIGKILL
    return staging(target.parent)


def finish(nursery, target, digest, **options):
    """Build to the end; which components were taken up."""
    done = nursery.build(target, **{"targets": TARGETS, **options})
    assert done.code == 0, done.error
    if digest:
        law(target, digest)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    log = json.loads((target / "build.json").read_text())
    return {row["stage"].partition(":")[0] for row in log["stages"] if row.get("resumed")}


def test_a_finished_component_is_not_made_again(nursery, undisturbed, tmp_path):
    left = kill_midway(nursery, tmp_path / "artifact")
    before = {p.name: p.stat().st_ino for p in (left / CONTENT / FIRST).iterdir()}
    assert finish(nursery, tmp_path / "artifact", undisturbed[0]) == {FIRST}
    after = {p.name: p.stat().st_ino for p in (tmp_path / "artifact" / FIRST).iterdir()}
    assert after == before, "the very files of the build that was killed"


def test_the_log_says_so_and_nothing_else_of_the_artifact_does(nursery, undisturbed, tmp_path):
    kill_midway(nursery, tmp_path / "artifact")
    finish(nursery, tmp_path / "artifact", undisturbed[0])
    log = json.loads((tmp_path / "artifact/build.json").read_text())
    assert [row["stage"] for row in log["stages"]] == [row["stage"] for row in undisturbed[1]["stages"]]
    assert log["parity_relative_l2"] == undisturbed[1]["parity_relative_l2"], "what was taken up is compared too"
    assert not any(row.get("resumed") for row in undisturbed[1]["stages"])
    assert not [p for p in (tmp_path / "artifact").rglob("*") if NOTES in p.parts or DRAFT in p.parts]


def test_a_build_killed_again_and_again_ends_the_same(nursery, undisturbed, tmp_path):
    for at in (f"{FIRST}/model.onnx", MIDWAY, "SHA256SUMS"):
        assert nursery.build(tmp_path / "artifact", at=at, targets=TARGETS).code == -signal.SIGKILL
    assert finish(nursery, tmp_path / "artifact", undisturbed[0]) == {FIRST, SECOND}


def edit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a file altered": lambda left: edit(left / CONTENT / FIRST / "model.onnx.data"),
    "a file missing": lambda left: (left / CONTENT / FIRST / "config.json").unlink(),
    "the note cut": lambda left: (left / NOTES / f"{CONTENT}.{FIRST}.json").write_text("{"),
    "the note of another schema": lambda left: (left / NOTES / f"{CONTENT}.{FIRST}.json").write_text('{"size": 1}'),
    "no notes": lambda left: (left / NOTES / f"{CONTENT}.{FIRST}.json").unlink(),
    "a file too many": lambda left: (left / CONTENT / FIRST / "extra").write_text(""),
    "strange files": lambda left: (left / CONTENT / "strange").write_text(""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_as_it_was_finished_is_made_again(name, nursery, undisturbed, tmp_path):
    DAMAGE[name](kill_midway(nursery, tmp_path / "artifact"))
    expected = {FIRST} if name in ("a file too many", "strange files") else set()
    assert finish(nursery, tmp_path / "artifact", undisturbed[0]) == expected


def test_another_build_takes_nothing_up(nursery, tmp_path):
    kill_midway(nursery, tmp_path / "artifact")
    assert finish(nursery, tmp_path / "artifact", None, targets=["onnx"]) == set()


# --- the key --------------------------------------------------------------------------------------------------------


def key_of(checkpoint, sources=None, **options):
    plan = make_plan(checkpoint, **{**options, "options": {**QUICK, **options.get("options", {})}})
    return build_key(plan, sources or {"unet/config.json": "0" * 64})


OTHERS = {
    "target": {"targets": ("openvino",)},
    "format": {"quant": {"unet": "int8"}},
    "recipe": {"quant": {"unet": "int8"}, "options": {"quantize.unet.activations": "exact"}},
    "dtype": {"targets": ("openvino",), "dtype": ["openvino=fp16"]},
    "option": {"options": {"audit.steps": "3"}},
    "weights": {"sources": {"unet/config.json": "1" * 64}},
    "file": {"sources": {"unet/other.json": "0" * 64}},
}


def test_whatever_decides_the_result_is_part_of_the_key(tiny_checkpoint):
    first = key_of(tiny_checkpoint)
    assert first == key_of(tiny_checkpoint)
    others = {}
    for name, options in OTHERS.items():
        others[name] = key_of(tiny_checkpoint, **options)
    assert len({first, *others.values()}) == 1 + len(OTHERS), others
    assert all(len(key) == 16 for key in others.values())


def test_code_and_tools_are_part_of_the_key(tiny_checkpoint, monkeypatch):
    from intaglio.exporters import resume

    first, found = key_of(tiny_checkpoint), resume.tools()
    for number in range(len(found)):
        changed = (*found[:number], "other", *found[number + 1 :])
        monkeypatch.setattr(resume, "tools", lambda changed=changed: changed)
        assert key_of(tiny_checkpoint) != first, found[number]


# --- drafts and calibration -----------------------------------------------------------------------------------------


def calibrated(feeds="f" * 64):
    rng = np.random.default_rng(0)
    scales = {
        "a.weight": InputScales(smooth=rng.random(5, np.float32), activation=0.1 + 0.2, importance=rng.random(5)),
        "b.weight": InputScales(activation=np.float32(0.3)),
    }
    facts = {"feeds_sha256": feeds, "ran_on": "whole", "prompts": 3}
    return Calibrated(scales=scales, macs={"a.weight": 1 << 40}, facts=facts, segments=(3, 4))


def test_calibration_reads_back_as_it_was():
    made = calibrated()
    (found,) = unpacked(packed({"unet": made})).values()
    assert (found.macs, found.facts, found.segments) == (made.macs, made.facts, made.segments)
    assert list(found.scales) == list(made.scales)
    for layer, scales in made.scales.items():
        for field in dataclasses.fields(scales):
            ours, theirs = getattr(found.scales[layer], field.name), getattr(scales, field.name)
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert np.asarray(ours).dtype in (np.asarray(theirs).dtype, np.float64)
                np.testing.assert_array_equal(ours, theirs)
    assert packed({"unet": found}) == packed({"unet": made}), "once and twice are the same bytes"


@pytest.fixture
def worked(tmp_path):
    """A staging folder with a draft, a component, feeds and calibration, all finished."""
    work = Work(tmp_path, ["unet"])
    for place in (work.draft, work.content):
        (place / "unet").mkdir()
        (place / "unet/model.onnx").write_bytes(b"graph")
    work.note_drafted("unet", RECORD)
    work.note_built("unet", RECORD, {"unet/plan": {"sm": "sm89"}})
    with zipfile.ZipFile(work.draft / FEEDS, "w") as file:
        file.writestr("x", b"feeds" * 100)
    work.note_calibrated({"unet": calibrated()})
    return tmp_path


def test_drafts_feeds_and_calibration_are_taken_up(worked):
    (worked / DRAFT / "tokenizer").mkdir()
    (worked / CONTENT / "manifest.json").write_text("{}")
    (worked / "other").write_text("")
    work = Work(worked, ["unet"])
    assert work.drafted("unet").record == work.built("unet").record == RECORD
    assert work.built("unet").engines == {"unet/plan": {"sm": "sm89"}}
    assert work.calibrated()["unet"].segments == (3, 4)
    assert sorted(p.name for p in worked.iterdir()) == sorted([DRAFT, CONTENT, NOTES])
    assert sorted(p.name for p in (worked / DRAFT).iterdir()) == [FEEDS, "unet"]
    assert [p.name for p in (worked / CONTENT).iterdir()] == ["unet"]


@pytest.mark.parametrize("name", [f"{DRAFT}/{FEEDS}", f"{NOTES}/{CALIBRATED}"])
def test_a_damaged_zip_is_made_again(name, worked):
    edit(worked / name)
    work = Work(worked, ["unet"])
    assert not (worked / name).exists()
    assert (work.calibrated() is None) == name.endswith(CALIBRATED)


def test_feeds_of_another_file_calibrate_again(worked, tmp_path):
    other = tmp_path.parent / "other-feeds.zip"
    other.write_bytes(b"feeds")
    assert Work(worked, ["unet"], other).calibrated() is None
    assert Work(worked, ["unet"]).calibrated() is not None


def test_a_component_that_is_not_built_now_is_removed(worked):
    work = Work(worked, ["vae_decoder"])
    assert work.built("unet") is None
    assert not list((worked / CONTENT).iterdir())
