"""Certificates: figures that are small where a build is faithful, failures where it is not, pictures made again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from intaglio.exporters import certificate_run
from intaglio.exporters.certificate import CERTIFICATE_OPTIONS, certificate_settings
from intaglio.exporters.certificate_run import make_certificate
from intaglio.exporters.derive import derive
from intaglio.exporters.dtypes import NAMES
from intaglio.profiles.artifact import BUILD_LOG, SUMS, Artifact, format_sums, read_sums, seal, sha256
from intaglio.profiles.certificate import (
    ARRAYS,
    FILE,
    FOLDER,
    IDENTICAL,
    Limits,
    Overrides,
    allowed,
    load_rules,
    read_certificate,
)
from intaglio.profiles.errors import ArtifactError, MissingDependency, NumericsError, ParityError, UsageError
from intaglio.profiles.manifest import MANIFEST
from intaglio.profiles.recipe import ACTIVATIONS, ComponentRecipe
from intaglio.quantize.formats import FORMATS
from intaglio.runtimes import trajectory
from intaglio.runtimes.verify import repeat

STEPS, PROMPTS = 3, 2
BACKENDS = ["onnxruntime", "openvino"]
EXACT = 2e-5  # relative L2 of float32 graphs to torch; measured 3e-6
INT8 = ComponentRecipe(format="int8", activations="exact")


def asked(artifact, draft=None, **options):
    return make_certificate(artifact, draft, **{"prompts": PROMPTS, "steps": STEPS, **options})


def quantized(source, folder, *names, targets=("onnx",)):
    """An artifact with these components in int8, for these targets alone, and a draft that may be added to."""
    draft = Artifact(folder=shutil.copytree(source.folder, folder / "draft"), manifest=source.manifest)
    made = derive(source, folder / "int8", dict.fromkeys(names, INT8), {}, targets=targets)
    components = {n: dataclasses.replace(c, targets=targets) for n, c in made.manifest.components.items()}
    return Artifact(folder=made.folder, manifest=dataclasses.replace(made.manifest, components=components)), draft


@pytest.fixture
def without_torch(monkeypatch):
    """The unquantized graphs are the only reference: enough to see a fault, and three seconds less."""
    monkeypatch.setattr(certificate_run.Work, "run_torch", lambda self: None)


def sealed(artifact, certificate):
    for name in (MANIFEST, BUILD_LOG, SUMS):
        (artifact.folder / name).unlink()
    return Artifact(folder=artifact.folder, manifest=seal(artifact.folder, artifact.manifest, {}, certificate))


@pytest.fixture(scope="module")
def certified(tiny_artifact, tmp_path_factory):
    """A tiny artifact with an int8 UNet and its certificate, sealed."""
    artifact, draft = quantized(
        tiny_artifact, tmp_path_factory.mktemp("certified"), "unet", targets=("onnx", "openvino")
    )
    return sealed(artifact, asked(artifact, draft))


@pytest.fixture
def copied(certified, copy_artifact):
    """A copy that may be damaged."""
    return Artifact(folder=copy_artifact(certified), manifest=certified.manifest)


def resum(folder):
    """Bring ``SHA256SUMS`` up to date, as someone who edits on purpose would."""
    (folder / SUMS).write_bytes(format_sums({n: sha256(folder / n) for n in read_sums(folder)}).encode())


def test_every_format_dtype_and_arithmetic_has_limits_with_a_source():
    rules = load_rules()
    assert rules.formats.keys() == FORMATS.keys()
    assert set(NAMES.values()) == rules.dtypes.keys()
    assert set(ACTIVATIONS) == rules.activations.keys()
    for row in (*rules.formats.values(), *rules.dtypes.values(), *rules.activations.values()):
        assert isinstance(row, Limits)
        assert row.source
        assert 0 < row.error < 1 < row.psnr  # an error of 1 is no resemblance at all
    assert all(row.repeat < IDENTICAL for row in rules.activations.values())


def test_the_prompts_are_in_two_languages_and_each_has_its_own_noise():
    prompts = load_rules().prompts
    assert len({p.text for p in prompts}) == len({p.seed for p in prompts}) == len(prompts) >= PROMPTS
    assert any(p.text.isascii() for p in prompts[:PROMPTS])
    assert any(not p.text.isascii() for p in prompts[:PROMPTS])


def test_an_unquantized_artifact_is_as_good_as_torch(tiny_artifact, copy_artifact):
    artifact = Artifact(folder=copy_artifact(tiny_artifact), manifest=tiny_artifact.manifest)
    found = asked(artifact)
    assert (found.reference, found.waived, found.skipped) == ("torch", (), {})
    assert list(found.backends) == BACKENDS
    for record in found.backends.values():
        assert record.version
        assert list(record.against) == ["torch"]
        figures = record.against["torch"]
        assert set(figures.components) == set(artifact.manifest.components)
        assert list(figures.components["unet"]) == ["step 0", "step 1", "step 2"]
        assert max(error for places in figures.components.values() for error in places.values()) < EXACT
        assert min(figures.psnr) > record.allowed.psnr


def test_an_int8_component_is_seen_and_the_others_are_the_same(certified):
    found = read_certificate(certified.folder, certified.manifest)
    assert found.manifest == certified.manifest.digest
    assert found.settings["num_inference_steps"] == STEPS
    for record in found.backends.values():
        assert list(record.against) == ["torch", "unquantized"]
        for figures in record.against.values():
            assert [len(rows) for rows in figures.drift] == [STEPS] * PROMPTS
            assert all(rows[-1] == last for rows, last in zip(figures.drift, figures.latents, strict=True))
            assert 1e-3 < max(figures.components["unet"].values()) < record.allowed.components["unet"]  # measured 1e-2
        assert record.against["unquantized"].components["vae_decoder"] == {"decode": 0.0}
        assert record.against["unquantized"].components["text_encoder"] == {"text": 0.0}
        assert record.allowed.components["vae_decoder"] == load_rules().formats["none"].error


def test_component_errors_do_not_accumulate(tiny_artifact, tmp_path, without_torch):
    """With int8 text the UNet is still measured on the reference's conditioning, though its pictures drift."""
    artifact, draft = quantized(tiny_artifact, tmp_path, "text_encoder")
    for record in asked(artifact, draft).backends.values():
        figures = record.against["unquantized"]
        assert set(figures.components["unet"].values()) == {0.0}
        assert figures.components["text_encoder"]["text"] > 1e-3  # measured 5e-3
        assert min(figures.latents) > 0


def rewired(change):
    """Put an operator behind the first output of a graph: `change` gives its type, attributes and constant inputs."""

    def edit(path):
        model = ir.load(path)
        old = model.graph.outputs[0]
        kind, attributes, constants = change(old)
        inputs = [ir.Value(name=f"fault.{k}", const_value=ir.tensor(c)) for k, c in enumerate(constants)]
        for value in inputs:
            model.graph.register_initializer(value)
        node = ir.node(kind, [old, *inputs], attributes)
        node.outputs[0].shape, node.outputs[0].type = old.shape, old.type
        node.outputs[0].name, old.name = old.name, f"{old.name}.sound"
        model.graph.append(node)
        model.graph.outputs[0] = node.outputs[0]
        ir.save(model, path)

    return edit


FAULTS = {
    "channels swapped": ("vae_decoder", rewired(lambda _: ("Gather", {"axis": 1}, [np.array([2, 1, 0])]))),
    "scaled twice": ("unet", rewired(lambda _: ("Mul", {}, [np.float32(0.18215)]))),
    "tokens reversed": ("text_encoder", rewired(lambda _: ("Gather", {"axis": 1}, [np.arange(16)[::-1].copy()]))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_export_misses_its_limits(fault, tiny_artifact, tmp_path, without_torch):
    component, damage = FAULTS[fault]
    artifact, draft = quantized(tiny_artifact, tmp_path, "unet")
    for file in artifact.component(component).glob("model.*onnx"):
        damage(file)
    waived = asked(artifact, draft, prompts=1, steps=2, accept=True).waived
    assert re.fullmatch(rf"{component} on onnxruntime differs from .* by \d\.\de[-+]\d\d \(.*\), allowed .*", waived[0])
    assert all(component in text for text in waived)


TOO_STRICT = {
    "error": (1e-9, r"unet on \w+ differs from .* by \d\.\de-\d\d \(step \d\), allowed 1\.0e-09( \(\d+ more\))?"),
    "psnr": (150.0, r"picture 0 on \w+: PSNR [\d.]+ dB against .*, 150 needed; nearest to its limit is unet.*"),
}


@pytest.mark.parametrize("key", TOO_STRICT)
def test_a_miss_fails_with_component_figures_and_the_ways_out(key, tiny_artifact, tmp_path, without_torch):
    limit, words = TOO_STRICT[key]
    artifact, draft = quantized(tiny_artifact, tmp_path, "unet")
    way = rf"; choose another --quant unet=FORMAT, or .* --set certificate.{key}=NUMBER, or .* --accept-fidelity"
    with pytest.raises(ParityError, match=f"^certificate: {words}{way}$"):
        asked(artifact, draft, prompts=1, steps=1, limits=Overrides(**{key: limit}))
    assert not (artifact.folder / FOLDER).exists()


def test_nan_cannot_be_accepted(tiny_artifact, tmp_path, without_torch):
    artifact, draft = quantized(tiny_artifact, tmp_path, "unet")
    for file in artifact.component("unet").glob("model.*onnx"):
        rewired(lambda _: ("Mul", {}, [np.float32(np.nan)]))(file)
    with pytest.raises(NumericsError, match=r"unet returned .* NaN"):
        asked(artifact, draft, prompts=1, accept=True)


def test_references_that_do_not_fit_are_skipped_with_the_reason(tiny_artifact, tmp_path, monkeypatch):
    artifact, draft = quantized(tiny_artifact, tmp_path, "unet")
    monkeypatch.setattr(trajectory, "available_bytes", lambda: 1000)
    found = asked(artifact, draft, prompts=1)
    assert found.reference is None
    assert all("GiB" in found.skipped[name] for name in ("torch", "unquantized onnxruntime"))
    assert found.skipped["onnxruntime"] == "it ran, and there was nothing to compare it with"
    (row,) = repeat(sealed(artifact, found))
    assert (row.backend, row.reference, row.failed) == ("onnxruntime", None, False)
    assert row.own > 60  # measured: identical


def test_the_loosest_row_decides_pictures_and_each_component_its_own_error(certified):
    rules = load_rules()
    found = allowed(rules, certified.manifest, ("text_encoder", "unet"), {"unet": "bfloat16"})
    assert found.psnr == min(rules.formats["int8"].psnr, rules.dtypes["bfloat16"].psnr)
    assert found.components["unet"] == rules.dtypes["bfloat16"].error
    assert found.components["text_encoder"] == rules.formats["none"].error
    assert found.repeat == rules.activations["exact"].repeat


# What is asked for.


def test_settings_are_read():
    assert certificate_settings({}).prompts == PROMPTS
    assert certificate_settings({"certificate.prompts": "0"}) is None
    found = certificate_settings({"certificate.prompts": "3", "certificate.steps": "4", "certificate.psnr": "12.5"})
    assert (found.prompts, found.steps, found.limits) == (3, 4, Overrides(psnr=12.5))


@pytest.mark.parametrize("key", CERTIFICATE_OPTIONS)
@pytest.mark.parametrize("value", ["-1", "many", "nan", ""])
def test_wrong_settings_are_refused(key, value):
    with pytest.raises(UsageError, match=rf"--set {key}={value} is not allowed: a (whole )?number, \d"):
        certificate_settings({key: value})


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(UsageError, match="0 to 8"):
        certificate_settings({"certificate.prompts": "9"})


# On disk.


def test_the_certificate_is_in_the_sums_and_not_in_the_manifest(certified, copied):
    names = {f"{FOLDER}/{FILE}", f"{FOLDER}/{ARRAYS}"}
    names |= {f"{FOLDER}/{n}/{k}.png" for n in ("reference", *BACKENDS) for k in range(PROMPTS)}
    assert names <= read_sums(certified.folder).keys()
    assert not [name for name in certified.manifest.files if name.startswith(FOLDER)]
    certified.verify()
    (copied.folder / FOLDER / "reference/0.png").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"reference/0\.png was altered"):
        copied.verify()


def test_another_manifests_certificate_is_refused(copied):
    manifest = dataclasses.replace(copied.manifest, name="another")
    with pytest.raises(ArtifactError, match="belongs to the manifest"):
        repeat(Artifact(folder=copied.folder, manifest=manifest))


def test_other_noise_is_refused(copied):
    path = copied.folder / FOLDER / ARRAYS
    arrays = dict(np.load(path))
    arrays["noise-1"][0, 0, 0, 0] += 1
    np.savez(path, **arrays)
    with pytest.raises(ArtifactError, match=r"noise-1 is not the certificate's"):
        repeat(copied)


def test_the_noise_is_that_of_the_seed(certified):
    import torch

    found = read_certificate(certified.folder, certified.manifest)
    with np.load(certified.folder / FOLDER / ARRAYS) as arrays:
        for k, prompt in enumerate(found.prompts):
            shape = arrays[f"noise-{k}"].shape
            wanted = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(prompt.seed)).numpy()
            np.testing.assert_allclose(arrays[f"noise-{k}"], wanted, atol=2e-6)  # as tests/test_noise.py


# ``intaglio verify --images``.


def test_pictures_are_made_again_without_torch(certified):
    """In a process that has neither torch nor diffusers nor onnx, as where only runtimes are installed."""
    code = f"""
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnx_ir"):
    sys.modules[name] = None
from intaglio.__main__ import main
sys.exit(main(["verify", {str(certified.folder)!r}, "--images", "--json"]))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["images"]
    assert [(r["backend"], r["prompt"], r["verdict"]) for r in rows] == [
        (backend, k, "ok") for backend in BACKENDS for k in range(PROMPTS)
    ]
    assert all(row["own"] > 60 and row["latents"] < EXACT for row in rows)  # measured: identical


def test_one_backend_alone(certified, intaglio):
    code, out, _ = intaglio("verify", certified.folder, "--images", "--backend", "openvino")
    assert code == 0
    assert "onnxruntime" not in out
    assert out.splitlines()[-1].startswith("reference: torch ")
    assert out.count(" ok") == PROMPTS


@pytest.mark.parametrize(("picture", "reason"), [("reference", "reference"), ("openvino", "its own picture")])
def test_pictures_that_differ_are_exit_1_with_one_line(picture, reason, copied, intaglio):
    file = copied.folder / FOLDER / picture / "1.png"
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    resum(copied.folder)
    code, out, err = intaglio("verify", copied.folder, "--images", "--backend", "openvino")
    assert code == 1
    assert out.count(" ok") == PROMPTS - 1
    assert reason in err.splitlines()[-1]


def test_what_was_waived_need_only_come_out_the_same(copied):
    path = copied.folder / FOLDER / FILE
    data = json.loads(path.read_text())
    for record in data["backends"].values():
        record["allowed"]["psnr"] = 150.0
    path.write_text(json.dumps({**data, "waived": []}))
    assert all(row.failed for row in repeat(copied))
    path.write_text(json.dumps({**data, "waived": ["unet on openvino differs"]}))
    assert {(row.verdict, row.failed) for row in repeat(copied)} == {("waived", False)}


def test_verify_says_what_it_cannot_do(certified, tiny_artifact, intaglio, monkeypatch):
    code, _, err = intaglio("verify", tiny_artifact.folder, "--images")
    assert (code, "has no certificate" in err, "build the artifact again" in err) == (2, True, True)
    code, _, err = intaglio("verify", certified.folder, "--backend", "openvino")
    assert (code, "add --images" in err) == (2, True)
    code, _, err = intaglio("verify", certified.folder, "--images", "--backend", "openvin")
    assert (code, "Did you mean 'openvino'?" in err) == (2, True)
    monkeypatch.setattr("intaglio.runtimes.certificate.installed", lambda module: False)
    with pytest.raises(MissingDependency, match=r"onnxruntime skipped: not installed.*; openvino"):
        repeat(certified)
    with pytest.raises(MissingDependency, match=r"pip install 'intaglio\[openvino\]'"):
        repeat(certified, ["openvino"])


def test_a_build_makes_its_certificate(tiny_checkpoint, tmp_path):
    """With a limit nothing can keep, and accepted: it is waived, said, and sealed; the draft is gone."""
    from intaglio.exporters.build import build

    options = {"certificate.prompts": "1", "certificate.steps": "2", "certificate.psnr": "150"}
    artifact = build(tiny_checkpoint, tmp_path / "art", quant={"unet": "int8"}, options=options, accept_fidelity=True)
    found = read_certificate(artifact.folder, Artifact.open(artifact.folder).manifest)
    assert list(found.backends["onnxruntime"].against) == ["torch", "unquantized"]
    assert "--set certificate.psnr=150" in found.backends["onnxruntime"].allowed.rows
    log = json.loads((artifact.folder / BUILD_LOG).read_text())
    assert found.waived
    assert {f"certificate: waived by --accept-fidelity: {text}" for text in found.waived} <= set(log["remarks"])
    assert "certificate" in [row["stage"] for row in log["stages"]]
    assert not (artifact.folder / "draft").exists()
