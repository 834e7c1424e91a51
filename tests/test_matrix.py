"""What a benchmark runs, from a file and flags."""

import itertools

import pytest
from fake_bench import artifact_at

from intaglio.bench import cli
from intaglio.bench.matrix import AXES, Matrix, exclusion, matrix, read_file, read_values, show, with_flags
from intaglio.profiles.errors import UsageError

VALUES = {  # two allowed and two refused texts of every axis
    "artifact": (("fp32", "int8"), ("", " ")),
    "backend": (("torch", "openvino:shapes=fixed"), ("", "openvino:shapes", ":a=b")),
    "device": (("cpu", "cuda:1"), ("", " ")),
    "threads": (("0", "4"), ("-1", "two")),
    "size": (("64x64", "512X768"), ("64", "0x64")),
    "batch": (("1", "8"), ("0", "1.5")),
    "steps": (("1", "50"), ("0", "many")),
    "scheduler": (("euler", "unipc"), ("", " ")),
    "guidance_scale": (("1", "7.5"), ("strong", "")),
}
FILE = """
artifacts = ["fp32", "int8"]
prompts = ["red heart"]
rounds = 3
grid = ["steps", "scheduler"]
[axes]
backend = ["torch", "onnxruntime"]
steps = [4, 8]
scheduler = ["euler", "unipc"]
[[exclude]]
backend = "torch"
artifact = "int8"
"""


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_reads_its_values_and_refuses_others(axis):
    good, bad = VALUES[axis]
    found = read_values(axis, [",".join(good)])
    assert found == read_values(axis, good)
    assert len(found) == 2
    assert all(show(axis, value) for value in found)
    for text in bad:
        with pytest.raises(UsageError, match="is not allowed"):
            read_values(axis, [text])
    with pytest.raises(UsageError, match="twice"):
        read_values(axis, [good[0], good[0]])


def test_a_file_is_axes_multiplied_less_what_is_excluded(tmp_path):
    artifacts = [artifact_at(tmp_path / name) for name in ("fp32", "int8")]
    (tmp_path / "m.toml").write_text(FILE, encoding="utf-8")
    folders, said = read_file(tmp_path / "m.toml")
    assert folders == [tmp_path / "fp32", tmp_path / "int8"]
    cases = with_flags(said, {}).cases(artifacts)
    kept = [
        (a, b) for a, b in itertools.product(("fp32", "int8"), ("torch", "onnxruntime")) if (a, b) != ("int8", "torch")
    ]
    wanted = [(a, b, n, s) for a, b in kept for n in (4, 8) for s in ("euler", "unipc")]
    assert [(c.name, c.backend, c.steps, c.scheduler) for c in cases] == wanted
    assert cases[0].label == "fp32/torch steps=4 scheduler=euler"
    assert len({c.label for c in cases}) == len(cases)
    assert {c.prompts for c in cases} == {("red heart",)}
    assert {c.repeats for c in cases} == {3}
    assert len({c.picture for c in cases}) == 4, "a reference of its own for every schedule and number of steps"


def test_a_flag_replaces_what_the_file_says(tmp_path):
    artifact = artifact_at(tmp_path / "fp32")
    (tmp_path / "m.toml").write_text(FILE.replace('[[exclude]]\nbackend = "torch"\nartifact = "int8"\n', ""))
    _, said = read_file(tmp_path / "m.toml")
    chosen = with_flags(said, {"rounds": 7, "grid": (), "axes": {"steps": (2,), "backend": None}})
    cases = chosen.cases([artifact])
    assert {c.steps for c in cases} == {2}
    assert {c.backend for c in cases} == {"torch", "onnxruntime"}
    assert {c.repeats for c in cases} == {7}


WRONG = {
    'color = "red"': r"'color' is unknown; allowed: .*artifacts",
    "[axes]\nstep = [4]": "axis 'step' is unknown; allowed: backend",
    "[axes]\nsteps = [0]": "--steps 0 is not allowed: a whole number, 1 or more",
    "[axes]\nsteps = [4, 4]": "--steps has 4 twice",
    "rounds = true": "rounds is True; it must be a int",
    "prompts = [3]": "prompts has 3; every entry is a text",
    "[[exclude]]\ncolor = 1": "is not a table of axes",
    "rounds = ": "is not TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_one_line(tmp_path, text):
    (tmp_path / "m.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=WRONG[text]):
        read_file(tmp_path / "m.toml")


def test_what_would_show_nothing_is_refused(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    axes = {"backend": ("torch",), "steps": (4, 8)}

    def refused(match, **more):
        with pytest.raises(UsageError, match=match):
            Matrix(axes=axes, **more).cases([artifact])

    refused("--exclude backend=openvino fits no case", exclude=(exclusion("backend=openvino"),))
    refused("every case is excluded", exclude=(exclusion("backend=torch"),))
    refused("--grid size has a single value, own", grid=("size",))
    refused("one to 3 different axes", grid=("steps", "steps"))
    refused("unknown axis 'colour'", grid=("colour",))
    refused("--isolation 'none' is not allowed", isolation="none")
    for text in ("steps", "steps=0", "colour=red"):
        with pytest.raises(UsageError):
            exclusion(text)


def test_flags_and_file_meet_in_the_verb(tmp_path, capsys):
    import argparse

    for name in ("fp32", "int8"):
        artifact_at(tmp_path / name)
    (tmp_path / "m.toml").write_text(FILE, encoding="utf-8")
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    args = ["--matrix", str(tmp_path / "m.toml"), "-o", str(tmp_path / "r"), "--dry-run", "--steps", "4,6"]
    assert cli.run(parser.parse_args(args)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 + 1
    assert lines[0].startswith("fp32/torch steps=4 scheduler=euler")
    assert lines[-1].startswith("12 cases; of 12 no earlier report")
    assert not (tmp_path / "r").exists()
    with pytest.raises(UsageError, match="no artifact was given"):
        cli.run(parser.parse_args(["-o", str(tmp_path / "r")]))
    with pytest.raises(UsageError, match="METRIC=NUMBER"):
        cli.run(parser.parse_args([*args, "--limit", "psnr=high"]))


def test_several_artifacts_of_one_name_are_told_apart(tmp_path):
    cases = matrix([artifact_at(tmp_path / "x/m"), artifact_at(tmp_path / "y/m")], ("torch",))
    assert [c.label for c in cases] == ["x-m/torch", "y-m/torch"]
