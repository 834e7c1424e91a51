"""``intaglio plan`` says what `build` would do, with its labels and refusals, and builds nothing."""

from __future__ import annotations

import json

from intaglio.exporters.plan import make_plan


def test_the_plan_names_components_formats_and_what_is_not_faster(tiny_checkpoint, intaglio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("plan", str(tiny_checkpoint), "--target", "openvino", "--quant", "unet=int8,vae_decoder=w8a8")
    code, out, err = intaglio(*arguments)
    assert code == 0
    plan = make_plan(tiny_checkpoint, targets=["openvino"], quant={"unet": "int8", "vae_decoder": "w8a8"})
    for component in plan.components:
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [component.name])
        assert plan.recipe[component.name].format in line.split()
    assert "int8 Conv on openvino: smaller, not faster" in err
    assert "calibration: 8 prompts; certificate: 2 prompts" in out
    code, out, _ = intaglio(*arguments, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["components"]["unet"]["parameters"] > 100_000
    assert facts["components"]["vae_decoder"]["activations"] == "static"
    assert facts["peak_bytes"] == max(max(row["stage_bytes"].values()) for row in facts["components"].values())
    assert list(tmp_path.iterdir()) == []


def test_what_build_refuses_is_refused(tiny_checkpoint, intaglio):
    for words, said in (
        (("--quant", "unet=int3"), "int3"),
        (("--max-memory", "100MiB"), "--max-memory"),
        (("--target", "coreml"), "coreml"),
        (("--set", "nothing=1"), "nothing"),
    ):
        code, out, err = intaglio("plan", str(tiny_checkpoint), *words)
        assert (code, out) == (2, "")
        assert said in err
        assert len(err.splitlines()) == 1
