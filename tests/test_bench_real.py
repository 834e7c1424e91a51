"""The harness on real backends and a real (tiny) artifact: every figure that the report promises is there."""

from __future__ import annotations

import json
import math


def test_bench_measures_speed_memory_and_fidelity_of_real_backends(
    tiny_artifact, tiny_artifact_int8, tmp_path, intaglio
):
    out = tmp_path / "report"
    arguments = ["--steps", "2", "--rounds", "3", "--threads", "1", "--prompt", "a red cat", "--prompt", "红"]
    backends = ["--backend", "torch", "--backend", "onnxruntime", "--backend", "openvino"]
    code, stdout, stderr = intaglio(
        "bench", tiny_artifact.folder, tiny_artifact_int8.folder, "-o", out, *arguments, *backends
    )
    assert code == 0, stderr
    report = json.loads((out / "report.json").read_text())
    rows = {row["label"]: row for row in report["cases"]}
    assert set(rows) == {f"{a}/{b}" for a in ("fp32", "int8") for b in ("torch", "onnxruntime", "openvino")}
    for label, row in rows.items():
        assert row["status"] == "ok", row["error"]
        assert label in (out / "report.md").read_text()
        assert row["load_s"] > 0 and row["first_image_s"] > 0
        assert row["image_s"]["n"] == 3 and row["image_s"]["min"] <= row["image_s"]["median"] <= row["image_s"]["max"]
        assert row["step_s"]["median"] > 0
        assert row["memory"]["peak_bytes"] > 20e6
        assert row["vram"]["process_bytes"] is None and "GPU" in json.dumps(row["vram"])
    assert rows["fp32/torch"]["worst"]["identical"]
    assert rows["fp32/openvino"]["worst"]["psnr"] is None or rows["fp32/openvino"]["worst"]["psnr"] > 50
    # One set of codes: what int8 loses is the same on every backend.
    lost = [rows[f"int8/{b}"]["worst"]["psnr"] for b in ("torch", "onnxruntime", "openvino")]
    assert max(lost) - min(lost) < 1.0
    assert rows["int8/onnxruntime"]["artifact_bytes"] < rows["fp32/onnxruntime"]["artifact_bytes"]
    assert all(math.isfinite(row["speedup"]["median"]) for row in rows.values())
    assert (out / "report.html").stat().st_size > 10_000
    assert "onnxruntime" in stdout
