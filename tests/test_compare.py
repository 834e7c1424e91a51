"""``intaglio compare``: like with like, exit 1 on what became slower."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

ROWS = ("art/onnxruntime", "art/openvino")


def report(scale=1.0, seed=0, n=30):
    rng = np.random.default_rng(seed)
    cases = [
        {
            "label": label,
            "status": "ok",
            "precision": "fp32",
            "device": "cpu",
            "threads": 1,
            "parameters": {"guidance_scale": 2.5},
            "image_s": {"values": list(scale * (0.4 + 0.008 * rng.standard_normal(n)))},
        }
        for label in ROWS
    ]
    settings = {"prompts": ["cat"], "seed": 0, "size": None, "steps": 4, "scheduler": None, "threads": 1, "warmup": 1}
    return {
        "schema_version": 2,
        "settings": settings,
        "machine": {"cpu": {"model": "X", "cores": 2}, "memory_gib": 24, "gpus": []},
        "cases": cases,
    }


@pytest.fixture
def compare(tmp_path, intaglio):
    def call(old, new, *words):
        for name, facts in (("old", old), ("new", new)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "report.json").write_text(json.dumps(facts))
        return intaglio("compare", tmp_path / "old", tmp_path / "new", *words)

    return call


def test_what_became_slower_is_exit_1_unless_accepted(compare):
    assert compare(report(), report(seed=1))[0] == 0
    code, out, _ = compare(report(), report(1.05, seed=1))
    assert code == 1
    assert out.count("regressed") == len(ROWS)
    code, out, _ = compare(report(), report(1.05, seed=1), "--max-regress", "10%")
    assert (code, out.count("slower, accepted")) == (0, len(ROWS))
    code, out, _ = compare(report(), report(0.9, seed=1))
    assert (code, out.count("faster")) == (0, len(ROWS))
    one = report(seed=1)
    one["cases"][1] = report(1.2, seed=1)["cases"][1]
    code, out, _ = compare(report(), one, "--max-regress", "0.05", "--json")
    assert code == 1
    facts = json.loads(out)
    assert [facts["rows"][label]["regressed"] for label in ROWS] == [False, True]
    assert facts["rows"][ROWS[1]]["ratio"] == pytest.approx(1.2, rel=0.02)


CHANGES = {
    "steps: 4 and 8": lambda r: r["settings"].update(steps=8),
    "size: null and [512, 512]": lambda r: r["settings"].update(size=[512, 512]),
    "seed: 0 and 1": lambda r: r["settings"].update(seed=1),
    "machine cpu:": lambda r: r["machine"].update(cpu={"model": "Y", "cores": 2}),
    "machine gpus:": lambda r: r["machine"].update(gpus=[{"name": "H200"}]),
    'art/openvino precision: "fp32" and "int8"': lambda r: r["cases"][1].update(precision="int8"),
    "art/openvino parameters:": lambda r: r["cases"][1].update(parameters={"guidance_scale": 7.5}),
}


@pytest.mark.parametrize("said", CHANGES)
def test_unlike_runs_are_refused_with_what_differs(said, compare):
    other = copy.deepcopy(report(seed=1))
    CHANGES[said](other)
    code, out, err = compare(report(), other)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "--force" in err
    code, out, err = compare(report(), other, "--force")
    assert code == 0
    assert said in err
    assert ROWS[1] in out


def test_bad_input(compare, intaglio, tmp_path):
    assert "a share such as 5%" in compare(report(), report(), "--max-regress", "-1")[2]
    assert "needs --rounds 5 or more" in compare(report(), report(n=4))[2]
    other = report()
    for row in other["cases"]:
        row["label"] += " again"
    assert "no row is in both reports" in compare(report(), other)[2]
    assert "cannot be read" in intaglio("compare", tmp_path / "nowhere", tmp_path / "old")[2]
    (tmp_path / "old/report.json").write_text("[]")
    assert "is not a report of intaglio bench" in intaglio("compare", tmp_path / "old", tmp_path / "new")[2]
