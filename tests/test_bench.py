"""The benchmark with a pipeline that draws circles: real workers, real pipes, no model."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from fake_bench import LOADER, artifact_at, cases_of, fast_workers, journal_of, measured

from intaglio.bench import assemble, cli, demo, matrix, report, run
from intaglio.bench.cases import Case, names_of, precision_of
from intaglio.bench.worker import Client, WorkerError, describe_exit, to_json
from intaglio.profiles.errors import ToolError, Unsupported, UsageError

pytest.importorskip("flip_evaluator")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Workers are found and need not settle."""
    fast_workers(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run over an unquantized and an int8 artifact with TensorRT plans."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setattr(run, "SETTLE", 0.0)
        patch.setattr(assemble, "gpus", lambda: ([], "no NVIDIA GPU"))
        base = tmp_path_factory.mktemp("bench")
        artifacts = (
            artifact_at(base / "fp32"),
            artifact_at(
                base / "int8",
                format_="int8",
                engines=("unet/a.sm89.engine", "unet/b.sm89.engine", "unet/a.sm120.engine"),
            ),
        )
        result = measured(base, *artifacts, parts=run.PARTS)
        report.write(result, base / ".out.partial")
        return base / ".out.partial", result


def test_every_case_and_every_plan_has_a_row(finished):
    _, result = finished
    labels = [c["label"] for c in result["cases"]]
    assert labels == [
        *(f"{a}/{b}" for a in ("fp32", "int8") for b in ("torch", "onnxruntime", "openvino")),
        "int8/tensorrt sm89",
        "int8/tensorrt sm120",
    ]
    plans = result["cases"][-2]
    assert plans["artifact_bytes"] == 2000
    assert plans["error"] == "built, not run: no NVIDIA GPU"
    assert all(c["status"] == "ok" for c in result["cases"][:6])


def test_the_reference_is_torch_on_the_unquantized_artifact(finished):
    _, result = finished
    assert result["reference"]["label"] == "fp32/torch"
    first = result["cases"][0]
    assert first["worst"]["identical"] is True
    assert first["worst"]["psnr"] is None
    assert first["speedup"]["median"] == 1.0


def test_figures_are_medians_with_range_and_count(finished):
    _, result = finished
    for case in result["cases"][:6]:
        image = case["image_s"]
        assert image["n"] == len(image["values"]) == 3
        assert image["min"] <= image["median"] <= image["max"]
        assert case["step_s"]["n"] == 6
        assert case["repeatable"] is True
        assert case["load_s"] > 0
        assert case["memory"]["peak_bytes"] is None or case["memory"]["peak_bytes"] > 1e6
        assert case["vram"]["process_bytes"] is None
        assert case["vram"]["reason"]
    assert result["cases"][2]["speedup"]["median"] > 1.2
    assert not any("p9" in key for case in result["cases"] for key in case)


def test_fidelity_is_per_prompt_and_worst(finished):
    folder, result = finished
    openvino = result["cases"][2]
    values = [p["psnr"] for p in openvino["prompts"]]
    assert openvino["worst"]["psnr"] == min(values)
    assert 30 < min(values) < 45
    assert openvino["worst"]["latents_relative_l2"] > 0
    assert all((folder / p["heat"]).exists() for p in openvino["prompts"])
    assert result["cases"][1]["worst"]["identical"] is True


def test_json_round_trips_and_has_no_infinity(finished):
    folder, result = finished
    text = (folder / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(result))
    assert "Infinity" not in text
    with pytest.raises(ValueError, match="JSON"):
        report.to_json({"x": float("inf")})


def test_nothing_in_the_report_names_a_place(finished):
    folder, _ = finished
    for name in ("report.json", "report.md", "report.html"):
        assert str(folder.parent) not in (folder / name).read_text(encoding="utf-8")


def test_the_page_is_self_contained_and_escaped(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{0,20})""", page)
    pictures = [s for s in sources if s.startswith("data:image/")]
    assert len(pictures) == 7, "two of the reference, of OpenVINO and of its heat maps, and a black one: each once"
    assert all(s.startswith("#p") for s in sources if s not in pictures)
    assert "http:" not in page
    assert "https:" not in page
    assert page.count("<script") == 1, "the sliders'"
    assert "url(" not in page
    assert "<b>&</b>" not in page
    assert "&lt;b&gt;" in page
    assert page.count('aria-label="FLIP heat map, ') == 10 + 4, "every judged picture's, and again the worst ones'"
    assert "interleaved" in page


def test_the_page_is_regenerated_byte_by_byte(finished):
    from intaglio.bench.report_html import page

    folder, _ = finished
    again = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert page(again, folder) == (folder / "report.html").read_text(encoding="utf-8")
    assert report.markdown(again) == (folder / "report.md").read_text(encoding="utf-8")


def test_the_table_has_a_line_a_row(finished):
    _, result = finished
    lines = report.table(result).splitlines()
    assert len(lines) == 1 + len(result["cases"])
    assert "x torch" in lines[0]
    assert lines[1].split()[:3] == ["fp32", "torch", "fp32"]
    assert "identical" in lines[1]
    assert lines[-1].endswith("built, not run: no NVIDIA GPU")


def test_a_large_picture_is_shown_scaled_down(tmp_path):
    from PIL import Image

    from intaglio.bench.report_html import data_uri

    Image.new("RGB", (1024, 512), "red").save(tmp_path / "a.png")
    assert data_uri(tmp_path / "a.png").startswith("data:image/webp")


def test_the_order_is_seeded_and_changes_from_round_to_round():
    labels = list("abcdef")
    orders = [run.order_of(labels, turn, 7) for turn in range(8)]
    assert orders == [run.order_of(labels, turn, 7) for turn in range(8)]
    assert all(sorted(o) == labels for o in orders)
    assert len({tuple(o) for o in orders}) > 4
    assert orders[:2] == [list("bedacf"), list("cdfbea")]


def test_rounds_are_interleaved_in_the_reported_order(tmp_path):
    said = []
    artifact = artifact_at(tmp_path / "a")
    cases = cases_of(artifact, backends=("torch", "openvino"))
    journal = journal_of(tmp_path / "out", cases, [artifact])
    table = {str(artifact.folder): artifact}
    result = run.run_matrix(cases, table, journal, command="", parts=(), tell=said.append)
    rounds = [re.match(r"round (\d+) of 3: (.*)", s).groups() for s in said if s.startswith("round")]
    assert rounds == [(str(i + 1), label) for i, order in enumerate(result["orders"]) for label in order["order"]]


def test_a_crash_is_that_cases_error_with_its_last_words(tmp_path):
    result = measured(tmp_path, artifact_at(tmp_path / "a"), settings=("a/openvino", {"crash": "5"}))
    row = result["cases"][2]
    assert row["status"] == "error"
    assert "run: the worker died (exit code 3)" in row["error"]
    assert "Segmentation fault, said the library" in row["error"]
    assert [c["status"] for c in result["cases"][:2]] == ["ok", "ok"]
    assert "Segmentation" in report.table(result)
    report.write(result, tmp_path / ".out.partial")


def test_a_hang_is_an_error_after_the_timeout(tmp_path):
    start = time.monotonic()
    artifact = artifact_at(tmp_path / "a")
    result = measured(tmp_path, artifact, settings=("a/openvino", {"hang": "4"}), timeout=4.0)
    assert time.monotonic() - start < 40
    assert "no answer within 4 s" in result["cases"][2]["error"]
    assert result["cases"][1]["image_s"]["n"] == 3


def test_a_refusal_is_one_line_and_leaves_the_others_alone(tmp_path):
    result = measured(tmp_path, artifact_at(tmp_path / "a"), settings=("a/torch", {"refuse": "1"}))
    assert result["cases"][0]["error"] == "run: steps 0 is not allowed"
    assert "the first case that runs, because a/torch failed" in result["reference"]["why"]
    assert result["reference"]["label"] == "a/onnxruntime"
    assert result["cases"][1]["speedup"]["median"] == 1.0


def test_without_any_measured_case_there_is_no_report(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    bad = Case(artifact=str(artifact.folder), label="a/broken", backend="broken", prompts=("x",), loader=LOADER)
    with pytest.raises(ToolError, match="backend broken is not there"):
        run.run_matrix(
            [bad],
            {str(artifact.folder): artifact},
            journal_of(tmp_path / "out", [bad], [artifact]),
            command="",
        )


def test_no_worker_outlives_the_benchmark(tmp_path):
    import psutil

    measured(tmp_path, artifact_at(tmp_path / "a"), backends=("torch",), rounds=1)
    lines = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    assert not [line for line in lines if "intaglio.bench.worker" in line]


def test_a_worker_that_died_between_requests_is_an_error():
    case = Case(artifact="x", label="x", backend="torch", prompts=("x",), loader=LOADER)
    client = Client(case, timeout=30)
    client.ask("load", case=to_json(case))
    client.process.kill()
    client.process.wait()
    with pytest.raises(WorkerError, match="signal 9, perhaps out of memory"):
        client.ask("run", prompt=0)
    client.close()
    assert describe_exit(3) == "exit code 3"


def test_matrix_refuses_what_would_measure_nothing(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    for bad in (
        {"backends": ()},
        {"backends": ("torch", "torch")},
        {"backends": ("onyxruntime",)},
        {"backends": ("torch",), "rounds": 0},
    ):
        with pytest.raises(UsageError):
            cases_of(artifact, **bad)


def test_names_and_precision(tmp_path):
    one, two, three = (artifact_at(tmp_path / p) for p in ("x/model", "y/model", "z"))
    assert names_of([one, two, three]) == ["x-model", "y-model", "z"]
    assert names_of([one, one]) == ["x-model-1", "x-model-2"]
    assert precision_of(one) == "fp32"
    assert precision_of(one, "tensorrt") in ("fp32", "fp16")
    assert precision_of(artifact_at(tmp_path / "q", format_="int8")) == "int8"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "report.md"
    report.write_atomic(target, "old")
    with pytest.raises(UnicodeEncodeError):
        report.write_atomic(target, "new \ud800")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


def test_a_report_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "rep"
    with pytest.raises(RuntimeError), report.report_folder(target, force=False) as folder:
        (folder / "report.json").write_text("{}")
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    with report.report_folder(target, force=False) as folder:
        (folder / "report.json").write_text("1")
    with pytest.raises(UsageError, match="--force"), report.report_folder(target, force=False):
        pass
    with report.report_folder(target, force=True) as folder:
        (folder / "report.json").write_text("2")
    assert (target / "report.json").read_text() == "2"
    assert [p.name for p in target.parent.iterdir()] == ["rep"]


def test_force_does_not_replace_what_is_not_a_report(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UsageError, match="not a report"):
        report.check_target(tmp_path, force=True)
    with pytest.raises(UsageError, match="not a demo"):
        demo.check_output(tmp_path)


def bench(monkeypatch, *arguments):
    import argparse

    parser = argparse.ArgumentParser()
    cli.configure(parser)
    monkeypatch.setattr(cli, "with_flags", lambda said, flags: matrix.with_flags({**said, "loader": LOADER}, flags))
    return cli.run(parser.parse_args([str(a) for a in arguments]))


def test_the_verb_writes_the_report_and_prints_the_table(tmp_path, monkeypatch, capsys):
    artifact_at(tmp_path / "a")
    options = ("--quick", "--backend", "torch,onnxruntime", "--rounds", 2, "--size", "48x64", "--prompt", "red")
    assert bench(monkeypatch, tmp_path / "a", "-o", tmp_path / "rep", *options) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].startswith("artifact")
    assert "report.html" in captured.err
    data = json.loads((tmp_path / "rep/report.json").read_text(encoding="utf-8"))
    assert data["cases"][0]["prompts"][0]["size"] == [48, 64]
    assert data["command"].startswith("intaglio bench a -o rep --prompt red --backend torch,onnxruntime")
    with pytest.raises(UsageError, match="--force"):
        bench(monkeypatch, tmp_path / "a", "-o", tmp_path / "rep")
    assert bench(monkeypatch, tmp_path / "a", "-o", tmp_path / "rep", *options, "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == 2


def test_a_wrong_value_is_refused_before_any_work(tmp_path, monkeypatch):
    artifact_at(tmp_path / "a")
    for options in (("--size", "64"), ("--backend", "onnx"), ("--rounds", 0)):
        with pytest.raises(UsageError):
            bench(monkeypatch, tmp_path / "a", "-o", tmp_path / "rep", *options)
    assert not (tmp_path / "rep").exists()


def test_tensorrt_without_a_gpu_is_one_line(monkeypatch):
    import intaglio.bench.memory as memory

    monkeypatch.setattr(memory, "gpus", lambda: ([], "no NVIDIA GPU"))
    with pytest.raises(Unsupported, match="no NVIDIA GPU"):
        cli.choose_backends(["tensorrt"])


def test_the_demo_builds_both_precisions_and_publishes(tmp_path, monkeypatch, capsys):
    import argparse

    def build_all(checkpoint, folder):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        found = [artifact_at(folder / "fp32"), artifact_at(folder / "int8", format_="int8")]
        return {str(a.folder): a for a in found}

    monkeypatch.setattr(demo, "build_all", build_all)
    monkeypatch.setattr(demo, "default_backends", lambda: ("torch", "onnxruntime"))
    monkeypatch.setattr(demo, "matrix", lambda *a, **k: matrix.matrix(*a, **k, loader=LOADER))
    parser = argparse.ArgumentParser()
    demo.configure(parser)
    args = parser.parse_args(["-o", str(tmp_path / "demo"), "--rounds", "1"])
    for _ in range(2):  # a second demo replaces the first one's report
        assert demo.run(args) == 0
        names = sorted(p.name for p in (tmp_path / "demo").iterdir())
        assert names == ["artifacts", "images", "report.csv", "report.html", "report.json", "report.md"]
    command = json.loads((tmp_path / "demo/report.json").read_text(encoding="utf-8"))["command"]
    assert command == "intaglio demo --checkpoint emoji --rounds 1 --threads 1 --seed 0"
    assert "向日葵" in (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert "int8" in capsys.readouterr().out


def test_a_busy_machine_and_an_unsteady_case_are_said(finished):
    import copy

    result = copy.deepcopy(finished[1])
    result["load_average"]["start"] = 3.0
    slow = result["cases"][0]
    slow["image_s"].update(min=0.2, max=3.6)
    slow.update(unsteady=True, speedup_of_fastest=1.7)
    text = " ".join(report.notes(result))
    assert "The machine was busy" in text
    assert "fp32/torch is unsteady: its slowest image took 18.00 times its fastest" in text
    assert "the ratio is 1.70" in text


def test_spread_of_a_few_has_their_range_for_an_interval_and_no_percentile():
    found = assemble.spread([3.0, 1.0, 2.0])
    extremes = {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3, "mad": 1.0, "iqr": 1.0, "interval": [1.0, 3.0]}
    assert found == extremes | {"percentiles": {}, "steady": False, "values": [3.0, 1.0, 2.0]}
    assert assemble.spread(range(1, 60))["percentiles"].keys() == {"p90", "p95"}
    assert assemble.spread([]) is None
