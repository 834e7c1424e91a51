"""The support page says what the tables say, and calls nothing verified that was not run."""

from __future__ import annotations

import json

from intaglio.bench import support_page


def test_the_page_is_the_tables():
    assert support_page.PAGE.read_text(encoding="utf-8") == support_page.page()


def test_tensorrt_is_unverified_until_a_run_on_a_gpu_is_on_file(tmp_path):
    assert "unverified" in support_page.verification("tensorrt", tmp_path)
    file = tmp_path / support_page.FOLDER / f"{support_page.GPU_RUN}.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"figures": {"image_s": 1.0}}))
    assert support_page.verification("tensorrt", tmp_path).startswith("verified on the GPU")
    assert support_page.verification("openvino", tmp_path) == "verified on CPU"
