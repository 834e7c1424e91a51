"""The figures on file of formats on a transformer hold what the project promises of them."""

from __future__ import annotations

import json

import pytest

from intaglio.bench.evidence import FOLDER, ROOT
from intaglio.bench.evidence_mmdit import ROWS

FILE = ROOT / FOLDER / "mmdit.json"
OPENVINO_OF_TORCH = 2.2  # w8a8 over torch eager in fp32
OPENVINO_OF_DYNAMIC = 1.2  # w8a8 over int8 with dynamic-per-token activations
ONNXRUNTIME_OF_FP32 = 1.8  # w8a8 over its own fp32
# Peak memory of load and run, of the same backend's fp32.
MEMORY = {
    ("openvino", "int4"): 0.30,
    ("openvino", "int8"): 0.40,
    ("onnxruntime", "int4"): 0.50,
    ("onnxruntime", "int8"): 0.70,
}
WEIGHTS, MACS = 0.95, 0.90
ERRORS = {"none": 1e-4, "int8": 3e-2, "w8a8": 5e-2, "int4": 0.25, "nf4": 0.25}  # relative L2 to torch in fp32


@pytest.fixture(scope="module")
def rows():
    if not FILE.exists():
        pytest.skip("evidence 'mmdit' is missing; run: make evidence mmdit")
    found = json.loads(FILE.read_text(encoding="utf-8"))["figures"]["rows"]
    return {(r["backend"], r["format"], r["activations"]): r for r in found}


def test_every_row_is_there(rows):
    assert set(rows) == {(r.backend, r.format, r.activations) for r in ROWS}


def test_static_int8_is_as_fast_as_promised(rows):
    static = rows["openvino", "w8a8", "static"]["speed_of_torch"]
    assert static >= OPENVINO_OF_TORCH
    assert static / rows["openvino", "int8", "dynamic-per-token"]["speed_of_torch"] >= OPENVINO_OF_DYNAMIC
    assert rows["onnxruntime", "w8a8", "static"]["speed_of_own_fp32"] >= ONNXRUNTIME_OF_FP32


def test_memory_follows_the_format(rows):
    for (backend, name), limit in MEMORY.items():
        assert rows[backend, name, "exact"]["peak_of_own_fp32"] <= limit, (backend, name)


def test_nearly_all_weights_are_in_the_format_and_errors_are_stated(rows):
    for (_, name, _), row in rows.items():
        assert row["relative_l2"] <= ERRORS[name]
        if name in ("int8", "int4", "nf4"):
            assert row["coverage_weights"] >= WEIGHTS
        if name == "w8a8":
            assert row["coverage_macs"] >= MACS
