"""The verb ``batch``: a file of requests to a folder of pictures and results, which a killed run goes on with."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from batches import ENGINE, SAME, URL, apart, body, line, lines, pixels, results_of
from PIL import Image

from intaglio.runtimes.pipeline import load


@pytest.fixture
def batch(intaglio, tmp_path, tiny_artifact):
    """A function: run the verb on a text; returns the exit code, its summary or stderr, and the folder."""

    def call(text, *flags, folder="out", artifacts=(f"tiny={tiny_artifact.folder}",)):
        (tmp_path / "requests.jsonl").write_text(text)
        arguments = [tmp_path / "requests.jsonl", *artifacts, *ENGINE, "-o", tmp_path / folder, "--json", *flags]
        code, out, err = intaglio("batch", *arguments)
        return code, json.loads(out) if out else err, tmp_path / folder

    return call


def test_pictures_and_results_of_good_and_bad_lines(batch, tiny_artifact):
    method = {"custom_id": "with-method", "method": "POST", "url": URL, "body": body(seed=5, output_format="webp")}
    text = lines(
        ("one", body(seed=7)),
        ("several", body(seed=8, n=2, response_format="b64_json")),
        ("steps", body(num_inference_steps=999)),
        ("field", body(style="vivid")),
        ("model", body(model="tinny")),
        ("size", body(size="13x13")),
        ("stream", body(stream=True)),
        ("no-prompt", {}),
    )
    code, summary, folder = batch(text + "\n" + json.dumps(method))
    assert code == 1
    counts = {"lines": 9, "kept": 0, "made": 3, "failed": 6, "pictures": 4}
    assert counts.items() <= summary.items()
    assert summary["steps"] == 8
    assert summary["results"] == str(folder / "results.jsonl")
    names = {"one.png", "several-0.png", "several-1.png", "with-method.webp", "results.jsonl"}
    assert {path.name for path in folder.iterdir()} == names

    text = (folder / "results.jsonl").read_text()
    results = results_of(text)
    assert [json.loads(line)["custom_id"] for line in text.splitlines()] == [
        "one", "several", "steps", "field", "model", "size", "stream", "no-prompt", "with-method",
    ]  # fmt: skip
    named = {"steps": "num_inference_steps", "field": "style", "model": "model", "size": "size", "stream": "stream"}
    for ident, param in {**named, "no-prompt": "prompt"}.items():
        response = results[ident]["response"]
        assert response["status_code"] == (404 if ident == "model" else 400)
        assert response["body"]["error"]["param"] == param
        assert param in response["body"]["error"]["message"]
    data = results["several"]["response"]["body"]["data"]
    assert [entry["url"] for entry in data] == ["several-0.png", "several-1.png"]
    assert [entry["seed"] for entry in data] == [8, 9]
    assert [base64.b64decode(e["b64_json"]) for e in data] == [(folder / e["url"]).read_bytes() for e in data]

    pipeline = load(tiny_artifact.folder, backend="openvino", threads=1)
    for name, seed in {"one.png": 7, "several-0.png": 8, "several-1.png": 9}.items():
        image = pipeline("a red cat", num_inference_steps=2, seed=seed).images[0]
        made = (folder / name).read_bytes()
        assert float(np.abs(pixels(made) - np.asarray(image, dtype=np.float64)).max()) <= SAME
        with Image.open(folder / name) as image:
            assert f"Seed: {seed}" in image.text["parameters"]
    pipeline.close()


def test_what_failed_is_made_again_and_nothing_else(batch, monkeypatch):
    import intaglio.runtimes.batch_cli as module

    hubs, hub_of = [], module.hub_of
    monkeypatch.setattr(module, "hub_of", lambda args: hubs.append(hub_of(args)) or hubs[-1])
    text = lines(*((f"good-{k}", body(seed=k, num_inference_steps=5)) for k in range(6)))
    text += lines(("bad", body(num_inference_steps=20, seed=1)))
    code, summary, folder = batch(text, "--limit", "steps=10")
    assert (code, summary["made"], summary["failed"], summary["steps"]) == (1, 6, 1, 30)
    (model,) = hubs[0].models.values()
    assert 0 < model.past["calls"] < summary["steps"] * 0.6, "lines do not share calls of the denoiser"

    before = (folder / "good-0.png").stat().st_mtime_ns
    (folder / "good-1.png").unlink()
    text += lines(("more", body(seed=2)))
    code, summary, _ = batch(text)
    assert (code, summary["kept"], summary["made"], summary["failed"]) == (0, 5, 3, 0)
    assert (folder / "good-0.png").stat().st_mtime_ns == before
    assert len(list(folder.glob("*.png"))) == 8
    code, summary, _ = batch(text)
    assert (code, summary["kept"], summary["made"], summary["pictures"]) == (0, 8, 0, 0)

    held = (folder / "more.png").read_bytes()
    for other in (lines(("more", body(seed=3))), lines(("another", body(seed=2)))):
        code, err, _ = batch(other)
        assert code == 2
        assert "of another request" in err
    assert (folder / "more.png").read_bytes() == held
    code, summary, _ = batch(lines(("more", body(seed=3))), "--force")
    assert (code, summary["kept"], summary["made"]) == (0, 0, 1)
    assert (folder / "more.png").read_bytes() != held


FILES = {
    "empty": ("\n\n", "has no requests"),
    "no JSON": (line() + "{oh\n", "line 2: not a JSON object"),
    "a list": ("[]\n", "line 1: not a JSON object"),
    "deep": ("[" * 100_000 + "\n", "line 1: not a JSON object"),
    "NaN": ('{"custom_id": "x", "body": {"guidance_scale": NaN}}\n', "line 1: not a JSON object"),
    "no id": ('{"body": {}}\n', "custom_id"),
    "empty id": (line(custom_id=""), "custom_id"),
    "twice": (line() + line(custom_id="y") + line(), "line 3: custom_id 'x' is line 1's too"),
    "another route": (line(url="/v1/chat/completions"), "url"),
    "another method": (line(method="GET"), "method"),
    "another key": (line(priority=1), "priority"),
    "no body": (line(body=None), "body"),
    "long": (line(body=body(prompt="x" * 2**20)), "bytes of the line"),
    "folder above": (line(custom_id="../x"), "names no file"),
    "absolute": (line(custom_id="/tmp/x"), "names no file"),
    "hidden": (line(custom_id=".x"), "names no file"),
    "option": (line(custom_id="-x"), "names no file"),
    "control": (line(custom_id="a\u0000b"), "names no file"),
    "long id": (line(custom_id="x" * 201), "names no file"),
    "one file": (line(custom_id="a", body=body(n=2)) + line(custom_id="a-1"), "would both write a-1.png"),
    "one file but for case": (line(custom_id="A") + line(custom_id="a"), "would both write"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_refused_before_anything_is_made(refused, tmp_path, tiny_artifact, case):
    text, words = FILES[case]
    (tmp_path / "requests.jsonl").write_text(text)
    refused("batch", tmp_path / "requests.jsonl", tiny_artifact.folder, "-o", tmp_path / "out", words=(words,))


def test_a_folder_with_other_files_is_refused(refused, tmp_path, tiny_artifact):
    (tmp_path / "requests.jsonl").write_text(line())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("x")
    command = ("batch", tmp_path / "requests.jsonl", tiny_artifact.folder, "-o", tmp_path / "out")
    refused(*command, words=("letter.txt", "--force"))
    refused(*command, "--limit", "batch_bytes=5", words=("--limit batch_bytes",))
    refused("batch", tmp_path / "none.jsonl", *command[2:], words=("none.jsonl", "No such file"))


def started(tmp_path, artifact, folder, *flags):
    """The verb in a process of its own."""
    command = [sys.executable, "-m", "intaglio", "batch", tmp_path / "requests.jsonl", artifact, *ENGINE]
    return subprocess.Popen(
        [*command, "-o", tmp_path / folder, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(process, journal, count):
    end = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def without_times(text):
    for entry in (found := results_of(text)).values():
        entry["response"]["body"].pop("created", None)
    return found


def test_a_killed_run_goes_on_where_it_was_and_ends_like_one_that_was_not(batch, tmp_path, tiny_artifact):
    entries = [(f"line-{k}", body(num_inference_steps=30, n=1 + k % 2)) for k in range(6)]
    entries.insert(1, ("wrong", body(size="1x1")))
    (tmp_path / "requests.jsonl").write_text(lines(*entries))
    process, folder = started(tmp_path, tiny_artifact.folder, "out", "--concurrency", "1"), tmp_path / "out"
    wait_for_lines(process, folder / "results.partial.jsonl", 3)
    process.send_signal(signal.SIGSTOP)  # or it may end before the second one has begun
    second = started(tmp_path, tiny_artifact.folder, "out")
    assert "another batch writes into" in second.communicate()[1]
    assert second.returncode == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    journal = folder / "results.partial.jsonl"
    assert not (folder / "results.jsonl").exists()
    done = {
        name: (folder / name).stat().st_mtime_ns
        for entry in results_of("".join(journal.read_text().splitlines(keepends=True))).values()
        for name in (picture["url"] for picture in entry["response"]["body"].get("data", ()))
    }
    assert 2 <= len(done) < 9
    with journal.open("a") as file:
        file.write('{"id": "batch_req_0", "custo')  # as a write that was cut off leaves it
    (folder / ".line-5-0.png.tmp").write_bytes(b"half a picture")

    artifacts = (tiny_artifact.folder,)
    code, summary, _ = batch(lines(*entries), artifacts=artifacts)
    assert (code, summary["lines"], summary["failed"]) == (1, 7, 1)
    assert summary["kept"] >= 2
    assert summary["kept"] + summary["made"] == 6
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done
    _, _, whole = batch(lines(*entries), folder="whole", artifacts=artifacts)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert len({path.read_bytes() for path in whole.glob("*.png")}) == 9  # seeds that are drawn are not one
    for path in whole.glob("*.png"):
        assert apart(path.read_bytes(), (folder / path.name).read_bytes()) <= SAME
    first, second = (without_times((place / "results.jsonl").read_text()) for place in (folder, whole))
    assert first == second


def test_a_worker_that_dies_costs_no_line_and_ctrl_c_keeps_what_is_done(tmp_path, tiny_artifact):
    import psutil

    entries = [(f"line-{k}", body(num_inference_steps=40, seed=k)) for k in range(8)]
    (tmp_path / "requests.jsonl").write_text(lines(*entries))
    process, folder = started(tmp_path, tiny_artifact.folder, "out", "--json"), tmp_path / "out"
    wait_for_lines(process, folder / "results.partial.jsonl", 1)
    for child in psutil.Process(process.pid).children():
        child.kill()
    wait_for_lines(process, folder / "results.partial.jsonl", 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "of 8 lines are done, run it again" in err
    assert "Traceback" not in err
    process = started(tmp_path, tiny_artifact.folder, "out", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "100%" in err
    assert json.loads(out)["kept"] >= 3
    assert len(list(folder.glob("*.png"))) == 8
