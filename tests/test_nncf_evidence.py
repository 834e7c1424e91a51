"""NNCF beside ours: that the layers are the same ones, and what the check found."""

from __future__ import annotations

import json

import numpy as np
import pytest

from intaglio.bench.evidence import FOLDER, ROOT, status
from intaglio.bench.evidence_nncf import MODES, OURS, THEIRS, layers_of_ir, plan_of
from intaglio.quantize.formats import FORMATS

NO_WORSE = 1.05  # our denoiser's median error over NNCF's at the same layers; measured 1.02 in int8, 1.03 in int4


@pytest.fixture
def ir_file(tmp_path):
    """A weight in f16, one in codes with scale and zero point, an embedding, and a constant that is no weight."""
    ov = pytest.importorskip("openvino")
    op = ov.opset13
    x = op.parameter([-1, 4], np.float32, name="x")
    half = op.constant(np.ones((4, 6), np.float16), name="first.weight")
    first = op.matmul(x, op.convert(half, np.float32), False, False, name="first")
    codes = op.convert(op.constant(np.ones((6, 8), np.int8), name="second.codes"), np.float32)
    zero = op.constant(np.ones((1, 8), np.float32), name="second.zero")
    scale = op.constant(np.ones((1, 8), np.float32), name="second.scale")
    second = op.matmul(first, op.multiply(op.subtract(codes, zero), scale), False, False, name="second")
    biased = op.add(second, op.constant(np.ones((1, 8), np.float32), name="bias"))
    ov.save_model(ov.Model([biased], [x], "two"), tmp_path / "two.xml", compress_to_fp16=False)
    return tmp_path / "two.xml"


def test_a_layer_is_its_largest_constant_and_what_it_is_stored_in(ir_file):
    assert layers_of_ir(ir_file) == {"first": ("first.weight", "f16"), "second": ("second.codes", "i8")}


def test_the_plan_names_exactly_our_layers(tiny_artifact, tiny_artifact_int8, tmp_path):
    plan, chosen = plan_of(tiny_artifact, tiny_artifact_int8, "unet", tmp_path / "out.xml")
    weights = tiny_artifact_int8.manifest.components["unet"].weights
    quantized = [name for name, record in weights.items() if record.format == "int8"]
    assert len(chosen) == len(quantized) > 20
    assert [(p["mode"], p["group_size"]) for p in plan["passes"]] == [("int8_sym", None)]
    assert set(plan["passes"][0]["names"]) == set(chosen) < set(plan["layers"])


def test_every_integer_format_of_ours_has_a_mode():
    found = {name for name, row in FORMATS.items() if row.storage in ("INT8", "INT4") and not row.activations}
    assert found - {"none"} == set(MODES)


def test_the_evidence_compares_the_same_layers():
    if status()["nncf"] != "fresh":
        pytest.skip(f"evidence 'nncf' is {status()['nncf']}; run: make evidence nncf")
    figures = json.loads((ROOT / FOLDER / "nncf.json").read_text(encoding="utf-8"))["figures"]
    for form in OURS:
        for component in figures["layers"][form].values():
            assert component["as_ours"] == component["layers"]
            assert not component["otherwise"]
            assert not component["beyond"]
    rows = {row["format"]: row for row in figures["rows"] if row["backend"] == "openvino"}
    for form in OURS:
        ours, theirs = rows[form]["denoiser_error"], rows[THEIRS + form]["denoiser_error"]
        assert ours["median"] <= NO_WORSE * theirs["median"], form
        assert ours["worst"] <= NO_WORSE * theirs["worst"], form
        assert rows[form]["denoiser_bytes"] <= 1.02 * rows[THEIRS + form]["denoiser_bytes"], form
