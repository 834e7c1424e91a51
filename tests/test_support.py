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


def test_the_figures_on_file_hold_the_tolerances_and_every_plan_was_built():
    import tiny
    from families import BACKENDS, COMPONENT, DECODE, LATENTS, PICTURE

    cases = json.loads((support_page.ROOT / support_page.FOLDER / "families.json").read_text())["figures"]
    assert set(cases) == set(tiny.CASES)
    for name, case in cases.items():
        assert max(e for errors in case["components"].values() for e in errors.values()) <= COMPONENT, name
        assert case["disturbed_1e-6_psnr"] >= 80, name
        assert all(plan.startswith("built for") for plan in case["tensorrt"].values()) and len(case["tensorrt"]) == 2
        for backend in BACKENDS:
            for figures in case[backend].values():
                assert figures["latents"] <= LATENTS and figures["decode"] <= DECODE, name
                assert figures["psnr"] is None or figures["psnr"] >= PICTURE, name
