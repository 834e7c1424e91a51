"""``--max-memory``: kept, refused where it cannot be kept, and without any effect on what is built."""

from __future__ import annotations

import json

import pytest
import tiny_flux
from partial import build_only

from intaglio.exporters import memory
from intaglio.exporters.memory import GIB, MIB, compare_limit, stage_bytes, weights_of
from intaglio.exporters.plan import make_plan
from intaglio.profiles.errors import UsageError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_flux.flux(tmp_path_factory.mktemp("memory") / "flux")


def test_a_limit_changes_how_a_build_works_and_not_what_it_makes(checkpoint, tmp_path, monkeypatch):
    free = build_only(
        checkpoint, tmp_path / "free", "transformer", quant={"transformer": "int4"}, targets=("openvino",)
    )
    monkeypatch.setattr(memory, "compare_limit", lambda plan: 1000)
    monkeypatch.setattr("intaglio.exporters.build.compare_limit", lambda plan: 1000)
    kept = build_only(
        checkpoint,
        tmp_path / "kept",
        "transformer",
        quant={"transformer": "int4"},
        targets=("openvino",),
        max_memory="4GiB",
    )
    assert kept.manifest.digest == free.manifest.digest
    logs = [json.loads((a.folder / "build.json").read_text()) for a in (free, kept)]
    assert [log["max_memory"] for log in logs] == [None, 4 * GIB]
    assert set(logs[0]["parity_relative_l2"]["transformer"]) == {"onnxruntime", "openvino"}
    assert set(logs[1]["parity_relative_l2"]["transformer"]) == {"onnxruntime"}
    remark = "transformer on openvino was not compared with torch: it does not fit in memory whole"
    assert [remark in log["remarks"] for log in logs] == [False, True]
    for log in logs:
        assert log["private_peak_bytes"] == max(stage["private_peak_bytes"] for stage in log["stages"])
        assert 100 * MIB < log["private_peak_bytes"] < 8 * GIB


def test_a_limit_that_no_build_can_keep_is_refused_before_it_starts(checkpoint, tmp_path):
    with pytest.raises(UsageError) as refusal:
        build_only(checkpoint, tmp_path / "art", "transformer", max_memory="300MiB")
    text = str(refusal.value)
    assert "--max-memory 0.29GiB is not enough for the stage '" in text
    least = int(text.rpartition("give --max-memory ")[2].removesuffix("MiB or more"))
    assert make_plan(checkpoint, max_memory=f"{least}MiB").memory == least * MIB
    with pytest.raises(UsageError):
        make_plan(checkpoint, max_memory=f"{least - 100}MiB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["", "0", "-1GiB", "2 gigs", "lots"])
def test_a_limit_that_is_no_size_is_refused(size, checkpoint):
    with pytest.raises(UsageError, match=r"--max-memory=.* is not allowed: a size such as 4GiB"):
        make_plan(checkpoint, max_memory=size)


def test_what_runs_whole_is_planned_whole(checkpoint):
    plan = make_plan(checkpoint, max_memory="4GiB")
    sizes = {c.name: weights_of(plan, c) for c in plan.components}
    assert sum(sizes["transformer"]) > max(sizes["transformer"]) > 0
    half = make_plan(checkpoint, max_memory="4GiB", dtype=("onnx=fp16",))
    assert set(stage_bytes(half)) - set(stage_bytes(plan)) == {
        f"{c.name}: audit float16 ranges" for c in half.components if half.dtypes["onnx"][c.name] == "float16"
    }
    assert compare_limit(plan) < 4 * GIB


def test_without_room_for_pictures_there_is_no_certificate_and_the_log_says_so(checkpoint, monkeypatch):
    assert make_plan(checkpoint, max_memory="4GiB").certificate is not None
    monkeypatch.setattr("intaglio.exporters.plan.WHOLE", 1e6)
    plan = make_plan(checkpoint, max_memory="4GiB", quant={"transformer": "w8a8"})
    assert plan.certificate is None
    assert any("no certificate" in remark and "transformer" in remark for remark in plan.remarks)
    assert plan.calibration.memory == GIB
