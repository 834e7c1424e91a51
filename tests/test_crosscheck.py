"""Our timings agree with those of the vendors' own tools; what those tools print is read right or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from intaglio.bench import benchmark_app, evidence
from intaglio.bench.evidence_crosscheck import APP, FIXED, LOOP, OURS, SIDES, Settings, order, summed
from intaglio.profiles.errors import ToolError

TOLERANCES = {("openvino", APP): 0.05, ("onnxruntime", LOOP): 0.03}  # |ratio of medians - 1|
REST = 0.05  # of a call of our OpenVINO engine: what benchmark_app does not time

# benchmark_app 2026.4.1 on the embedded UNet with the arguments of `words`.
LOG = """[Step 7/11] Loading the model to the device
[ INFO ] Compile model took 869.47 ms
[ INFO ] Start of compilation memory usage: Peak 459888 KB
[Step 8/11] Querying optimal runtime parameters
[ INFO ] Model:
[ INFO ]   NETWORK_NAME: onnx_Frontend_IR
[ INFO ]   NUM_STREAMS: 1
[ INFO ]   INFERENCE_NUM_THREADS: 1
[ INFO ]   INFERENCE_PRECISION_HINT: <Type: 'float32'>
[ INFO ]   EXECUTION_MODE_HINT: ExecutionMode.PERFORMANCE
[ INFO ]   RUNTIME_REQUIREMENTS: meta=1.0;ov=2026.4.1;isa=Intel AVX10.1
[Step 9/11] Creating infer requests and preparing input tensors
[Step 10/11] Measuring performance (Start inference synchronously, limits: 60 iterations)
[ INFO ] Benchmarking in full mode (inputs filling are included in measurement loop).
[ INFO ] First inference took 212.42 ms
[ INFO ]    Median:        19.12 ms
"""
REPORT = """{"cmd_options": {"-d": "CPU", "-api": "sync", "-niter": "60"}, "configuration_setup": {"topology": "Model1",
"target device": "CPU", "API": "sync", "inference_only": false, "number of iterations": "60", "duration (ms)": "0"},
"execution_results": {"read model time (ms)": "112.90", "compile model time (ms)": "869.47",
"first inference time (ms)":
"212.42", "total execution time (ms)": "1184.92", "total number of iterations": "60", "latency (ms)": "19.12",
"avg latency": "19.46", "min latency": "16.85", "max latency": "34.22", "throughput": "50.64"}}"""
FAILED = """{"cmd_options": {"-d": "CPU"}, "execution_results": {"read model time (ms)": "66.90",
"error": "Numpy array shape mismatch. File sample.npy has shape: (2, 16, 8, 8), expected: [2, 16, 16, 16]"}}"""


@pytest.fixture(scope="module")
def figures():
    state = evidence.status()["crosscheck"]
    if state != "fresh":
        pytest.skip(f"evidence 'crosscheck' is {state}; run: make evidence crosscheck")
    return json.loads((evidence.ROOT / evidence.FOLDER / "crosscheck.json").read_text(encoding="utf-8"))["figures"]


@pytest.fixture(scope="module")
def rows(figures):
    return {(row["backend"], row["threads"]): row for row in figures["rows"]}


def test_the_check_was_run_in_full(figures, rows):
    whole = Settings()
    assert set(rows) == {(backend, threads) for backend in SIDES for threads in whole.threads}
    assert (figures["rounds"], figures["calls"], figures["warmup"]) == (whole.rounds, whole.calls, whole.warmup)
    assert min(whole.rounds.values()) >= 6
    assert whole.calls >= 50
    for (backend, _), row in rows.items():
        assert set(row["seconds"]) == set(SIDES[backend])
        assert all(len(values) == whole.rounds[backend] for values in row["seconds"].values())


@pytest.mark.parametrize("threads", Settings().threads)
@pytest.mark.parametrize(("backend", "other"), TOLERANCES)
def test_our_seconds_are_those_of_the_vendors_tool(rows, backend, other, threads):
    row = rows[backend, threads]
    ratio = np.median(row["seconds"][OURS]) / np.median(row["seconds"][other])
    assert row["ratios"][other]["ratio"] == pytest.approx(ratio, rel=1e-4)
    assert abs(ratio - 1) <= TOLERANCES[backend, other]


@pytest.mark.parametrize("threads", Settings().threads)
def test_both_sides_computed_the_same(rows, threads):
    assert rows["onnxruntime", threads]["same_bits"]
    assert rows["onnxruntime", threads]["options"]["intra_op_num_threads"] == threads
    properties = rows["openvino", threads]["properties"]
    assert properties["INFERENCE_NUM_THREADS"] == str(threads)
    assert properties["NUM_STREAMS"] == "1"
    assert "float32" in properties["INFERENCE_PRECISION_HINT"]


@pytest.mark.parametrize("threads", Settings().threads)
def test_what_our_engine_adds_to_an_inference_is_small(rows, threads):
    parts = rows["openvino", threads]["excess"]
    assert 0 < parts["check_feeds"] < parts["rest"] <= REST * parts["run"]


def test_sides_take_turns_forwards_and_backwards():
    assert order("abc", 3) == list("abccbaabc")
    assert order(tuple(SIDES["onnxruntime"]), 2) == [OURS, LOOP, LOOP, OURS]


def test_ratios_are_ours_over_theirs():
    made = summed({OURS: [2.0, 2.2, 2.0, 2.1, 9.0], APP: [1.0, 1.0, 1.1, 1.0, 1.0], FIXED: [4.2] * 5})
    assert made["median"] == {OURS: 2.1, APP: 1.0, FIXED: 4.2}
    assert set(made["ratios"]) == {APP, FIXED}
    assert made["ratios"][APP]["ratio"] == 2.1
    assert made["ratios"][FIXED]["ratio"] == 0.5
    assert made["ratios"][APP]["low"] <= 2.1 <= made["ratios"][APP]["high"]


def test_the_tool_is_told_our_shapes_arrays_and_calls():
    feeds = {"sample": np.zeros((2, 16, 8, 8), np.float32), "timestep": np.zeros(2, np.float32)}
    run = benchmark_app.Run(graph=Path("a.xml"), feeds=feeds, calls=60, settings={}, fixed=False)
    made = benchmark_app.words(run, Path("/here"))
    asked = dict(zip(made[::2], made[1::2], strict=False))
    assert asked["-m"] == "a.xml"
    assert (asked["-api"], asked["-niter"]) == ("sync", "60")
    assert asked["-data_shape"] == "sample[2,16,8,8],timestep[2]"
    assert asked["-layout"] == "sample[...],timestep[...]"
    assert asked["-i"] == f"sample:{Path('/here/sample')}.npy,timestep:{Path('/here/timestep')}.npy"
    assert "-shape" not in made


def test_the_median_is_read_from_the_report():
    assert benchmark_app.seconds(json.loads(REPORT), 60) == pytest.approx(0.01912)


@pytest.mark.parametrize(
    ("text", "calls", "message"),
    [
        (REPORT, 50, "made 60 iterations instead of 50"),
        (FAILED, 60, "benchmark_app failed: Numpy array shape mismatch"),
    ],
)
def test_a_report_of_something_else_is_refused(text, calls, message):
    with pytest.raises(ToolError, match=message):
        benchmark_app.seconds(json.loads(text), calls)


def test_properties_are_read_from_the_log():
    assert benchmark_app.properties(LOG) == {
        "NETWORK_NAME": "onnx_Frontend_IR",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": "1",
        "INFERENCE_PRECISION_HINT": "<Type: 'float32'>",
        "EXECUTION_MODE_HINT": "ExecutionMode.PERFORMANCE",
        "RUNTIME_REQUIREMENTS": "meta=1.0;ov=2026.4.1;isa=Intel AVX10.1",
    }


@pytest.mark.parametrize("log", ["", LOG.replace("Model:", "Network:"), LOG.replace("[ INFO ]   ", "[ INFO ] ")])
def test_a_log_without_properties_is_refused(log):
    with pytest.raises(ToolError, match="did not print the properties"):
        benchmark_app.properties(log)


def test_a_tool_that_fails_is_an_error_with_its_last_words(tmp_path):
    pytest.importorskip("openvino.tools.benchmark")
    feeds = {"x": np.zeros((1, 2), np.float32)}
    run = benchmark_app.Run(graph=tmp_path / "none.xml", feeds=feeds, calls=1, settings={}, fixed=True)
    with pytest.raises(ToolError, match=r"benchmark_app failed: .*none\.xml"):
        benchmark_app.run_app(run, tmp_path)


def test_the_tool_times_a_graph(tmp_path):
    ov = pytest.importorskip("openvino")
    x = ov.opset13.parameter([-1, 2], np.float32, name="x")
    ov.save_model(ov.Model([ov.opset13.exp(x)], [x], "small"), tmp_path / "small.xml")
    settings = {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY"}
    feeds = {"x": np.zeros((3, 2), np.float32)}
    run = benchmark_app.Run(graph=tmp_path / "small.xml", feeds=feeds, calls=5, settings=settings, fixed=False)
    seconds, properties = benchmark_app.run_app(run, tmp_path)
    assert 0 <= seconds < 1
    assert properties["INFERENCE_NUM_THREADS"] == "1"
    assert properties["NETWORK_NAME"]
