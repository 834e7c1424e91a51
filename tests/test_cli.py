"""What the command line prints, where, and what a picture remembers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import intaglio as package
from intaglio.__main__ import VERBS
from intaglio.profiles import cli as doctor_cli

GOLDEN = Path(__file__).parent / "golden/help.txt"
# Image k of a batch against the same seed alone, in steps of 255: the batch changes the order of float32 sums.
BATCH_TOLERANCE = 1


def helps(intaglio):
    """``intaglio --help`` and every verb's, as one text."""
    pages = []
    for arguments in [["--help"], *([verb, "--help"] for verb in VERBS)]:
        code, out, err = intaglio(*arguments)
        assert (code, err) == (0, "")
        # Python 3.13 and newer write "-o, --output X" for "-o X, --output X".
        out = re.sub(r"(-\w) (\S+), (--[\w-]+ \2)", r"\1, \3", out)
        pages.append(f"$ intaglio {' '.join(arguments)}\n{out}")
    return "\n".join(pages)


def test_help_is_the_golden_file(intaglio, request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    text = helps(intaglio)
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "if this is meant: pytest tests/test_cli.py --update-golden"


def test_help_by_other_ways(intaglio):
    wanted = intaglio("--help")
    assert intaglio("-h") == intaglio("help") == intaglio() == wanted
    assert all(verb in wanted[1] for verb in VERBS)


def test_version(intaglio):
    assert intaglio("--version") == (0, f"{package.__version__}\n", "")


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("generat", "Did you mean 'generate'?"),
        ("Build", "Did you mean 'build'?"),
        ("--versoin", ""),
        ("frobnicate", ""),
    ],
)
def test_unknown_verb(verb, hint, intaglio):
    code, out, err = intaglio(verb)
    assert (code, out) == (2, "")
    assert err.rstrip().endswith(hint or ".")
    assert err == f"intaglio: unknown verb {verb!r}; allowed: {', '.join(VERBS)}.{' ' + hint if hint else ''}\n"


# --- results on stdout, progress on stderr --------------------------------------------------------------------------


def test_build_prints_json_on_stdout_and_progress_on_stderr(cli_build):
    assert cli_build.returncode == 0, cli_build.stderr
    result = json.loads(cli_build.stdout)
    assert result["artifact"] == str(cli_build.folder)
    assert set(result["parity_relative_l2"]) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    for errors in result["parity_relative_l2"].values():
        assert set(errors) == {"onnxruntime", "openvino"}
        assert all(0 <= error < 1e-4 for error in errors.values())
    assert (
        result["bytes"]
        == sum(p.stat().st_size for p in cli_build.folder.rglob("*") if p.is_file())
        - (cli_build.folder / "SHA256SUMS").stat().st_size
    )
    assert result["seconds"] > 0
    assert re.search(r"(\d+)/\1\b", cli_build.stderr), "the bar ends full"
    assert "Traceback" not in cli_build.stderr


def test_build_with_force_replaced_what_was_there(cli_build):
    assert not (cli_build.folder / "leftover.txt").exists()
    assert [p.name for p in cli_build.folder.parent.iterdir()] == [cli_build.folder.name]


def test_build_log_has_seconds_and_peak_memory_per_stage(cli_build):
    log = json.loads((cli_build.folder / "build.json").read_text())
    names = [stage["stage"] for stage in log["stages"]]
    for component in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        assert {f"{component}: capture", f"{component}: openvino", f"{component}: compare with torch"} <= set(names)
    assert all(stage["seconds"] >= 0 for stage in log["stages"])
    if sys.platform == "linux":
        assert all(stage["peak_bytes"] > 10_000_000 for stage in log["stages"])


def test_generate_prints_the_file_on_stdout_and_progress_on_stderr(tiny_artifact, tmp_path):
    """In a process of its own, as a shell sees it; Chinese prompt, stdout piped."""
    output = tmp_path / "心.png"
    command = [sys.executable, "-m", "intaglio", "generate", str(tiny_artifact.folder), "红心", "-o", str(output)]
    result = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, check=False, encoding="utf-8")
    assert (result.returncode, result.stdout) == (0, f"{output}\n"), result.stderr
    assert "100%" in result.stderr
    assert Image.open(output).size == (64, 64)
    assert Image.open(output).text["parameters"].startswith("红心\n")


def test_json_of_generate(tiny_artifact, intaglio, tmp_path):
    command = ("generate", tiny_artifact.folder, "cat", "-o", tmp_path / "x.png", "--steps", 2, "--count", 2)
    code, out, _ = intaglio(*command, "--seed", 2**40, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["files"] == [str(tmp_path / f"x-{k}.png") for k in (0, 1)]
    assert result["seeds"] == [2**40, 2**40 + 1]
    assert {"text_encoder", "denoiser", "vae_decoder"} <= set(result["seconds"])
    assert all(seconds >= 0 for seconds in result["seconds"].values())


def test_inspect(tiny_artifact, intaglio):
    code, out, err = intaglio("inspect", tiny_artifact.folder, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["digest"] == tiny_artifact.manifest.digest
    assert facts["components"]["unet"]["inputs"]["timestep"] == ["float32", "batch"]
    assert facts["components"]["unet"]["targets"] == ["onnx", "openvino"]
    assert facts["shapes"]["width"] == {"min": 64, "opt": 64, "max": 1024, "multiple": 8}
    code, out, err = intaglio("inspect", tiny_artifact.folder)
    assert (code, err) == (0, "")
    for line in (*facts["components"], *facts["shapes"], facts["digest"][:16]):
        assert line in out


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor(intaglio):
    code, out, err = intaglio("doctor", "--json")
    facts = json.loads(out)
    assert (code, err, facts["problems"]) == (0, "", [])
    assert facts["backends"]["onnxruntime"] == facts["backends"]["torch"] == "ready"
    assert facts["packages"]["torch"]
    code, out, _ = intaglio("doctor")
    assert code == 0
    assert re.search(r"openvino +ready", out)


def test_doctor_reports_two_onnxruntimes(intaglio, monkeypatch):
    monkeypatch.setattr(doctor_cli, "package_version", lambda name: "1.23.0")
    code, out, _ = intaglio("doctor")
    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("problem: "))
    assert "onnxruntime and onnxruntime-gpu are both installed" in line
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in line
    code, out, _ = intaglio("doctor", "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 1


def test_doctor_says_how_to_get_what_is_missing(intaglio, monkeypatch):
    for module in ("openvino", "torch"):
        monkeypatch.setitem(sys.modules, module, None)
    code, out, _ = intaglio("doctor", "--json")
    backends = json.loads(out)["backends"]
    assert code == 0
    assert backends["openvino"] == "missing; run: pip install 'intaglio[openvino]'"
    assert backends["torch"] == "missing; run: pip install 'intaglio[export]'"


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tiny_artifact, intaglio, tmp_path):
    """A function: generate with these arguments, return what it wrote."""

    def make(*arguments, name="x"):
        command = ("generate", tiny_artifact.folder, "red heart", "-o", tmp_path / f"{name}.png", "--steps", 3)
        code, out, err = intaglio(*command, *arguments)
        assert code == 0, err
        return [Image.open(line) for line in out.splitlines()]

    return make


def test_a_picture_remembers_how_it_was_made(picture, tiny_artifact):
    arguments = (
        "--seed",
        7,
        "--size",
        "72x64",
        "--scheduler",
        "euler_a",
        "--guidance",
        3.5,
        "--negative-prompt",
        "blue 月",
    )
    (image,) = picture(*arguments)
    assert image.size == (72, 64)
    assert image.text["parameters"] == (
        "red heart\nNegative prompt: blue 月\n"
        "Steps: 3, Sampler: Euler a, CFG scale: 3.5, Seed: 7, Size: 72x64, "
        f"Model hash: {tiny_artifact.manifest.digest[:10]}, Model: tiny, Version: intaglio"
    )
    facts = json.loads(image.text["intaglio"])
    assert facts.pop("artifact") == tiny_artifact.manifest.digest
    assert facts.pop("backend") == "onnxruntime"
    assert set(facts.pop("recipe").values()) == {"none"}

    again = package.load(tiny_artifact.folder)(facts.pop("prompt"), **facts).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(image)), "the JSON is all it takes to make it again"
    facts["seed"] += 1
    other = package.load(tiny_artifact.folder)("red heart", **facts).images[0]
    assert not np.array_equal(np.asarray(other), np.asarray(image))


def test_without_a_negative_prompt_the_line_does_not_speak_of_one(picture):
    assert "Negative" not in picture()[0].text["parameters"]


def test_image_k_of_a_count_is_seed_plus_k_alone(picture):
    first, second = picture("--count", 2, "--seed", 41)
    (alone,) = picture("--seed", 42, name="alone")
    assert json.loads(second.text["intaglio"]) == json.loads(alone.text["intaglio"])
    pixels = [np.asarray(image).astype(int) for image in (first, second, alone)]
    assert np.abs(pixels[1] - pixels[2]).max() <= BATCH_TOLERANCE
    assert np.abs(pixels[0] - pixels[2]).max() > BATCH_TOLERANCE


def test_the_same_seed_gives_the_same_file(picture):
    first, second = picture("--seed", 3), picture("--seed", 3, "--force")
    assert Path(first[0].filename) == Path(second[0].filename)
    assert np.array_equal(np.asarray(first[0]), np.asarray(second[0]))


def test_backends_are_recorded_and_agree(picture):
    images = {b: picture("--backend", b, name=b)[0] for b in ("onnxruntime", "openvino", "torch")}
    for backend, image in images.items():
        assert json.loads(image.text["intaglio"])["backend"] == backend
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(images["torch"]).astype(int))
        assert difference.max() <= 2, backend
