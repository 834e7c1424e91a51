"""Builds with ``--lora``: codes, what the manifest says of them, and how much is read and held at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc

import numpy as np
import pytest
from lora_cases import (
    KOHYA,
    PEFT,
    dotted,
    flat,
    folder_of,
    lora_of,
    loras_of,
    parts_of,
    pipeline_of,
    written,
)
from partial import QUICK, build_only

from intaglio.exporters import build as build_module
from intaglio.exporters.weights import Parameter, read_header
from intaglio.profiles.manifest import MANIFEST

KEPT = 16_384  # bytes of Python's own objects; measured 300
COPIES = 3  # of a weight and its factors at a time: both as float32, the product; measured 1.3 where they are large


def exact(tensors):
    """The same with factors whose products and sums float32 holds exactly, in whatever order they are added."""
    rng = np.random.default_rng(3)
    values = {k: rng.integers(-4, 5, v.shape).astype(np.float32) / 64 for k, v in tensors.items()}
    return {k: v if k.endswith(".alpha") else values[k] for k, v in tensors.items()}


def test_codes_are_those_of_the_checkpoint_that_diffusers_fused(tmp_path):
    """LoRAs come before quantization: int4 matrices and int8 convolutions of a whole UNet, to the bit."""
    folder = folder_of("sd")
    layers = parts_of(folder)["unet"]
    made = {
        "one": lora_of(layers, dotted("unet."), *PEFT),
        "two": lora_of(layers, flat("lora_unet_"), *KOHYA[:2], seed=1),
    }
    files = [written(tmp_path, exact(tensors), f"{name}.safetensors") for name, tensors in made.items()]
    pipe = pipeline_of(folder)
    for name, file in zip(made, files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(list(made), [0.5, -2.0])
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    options = {"targets": ("onnx",), "quant": {"unet": "int4"}}
    ours = build_only(folder, tmp_path / "ours", "unet", loras=[f"{files[0]}:0.5", f"{files[1]}:-2"], **options)
    theirs = build_only(tmp_path / "fused", tmp_path / "theirs", "unet", **options)
    stated = json.loads((ours.folder / MANIFEST).read_text())["components"]["unet"]
    formats = [weight["format"] for weight in stated["weights"].values()]
    assert min(sum(f.startswith(kind) for f in formats) for kind in ("int4", "int8")) > 10
    assert data(ours) == data(theirs)
    assert stated == json.loads((theirs.folder / MANIFEST).read_text())["components"]["unet"]


def data(artifact):
    """The component's files and their bytes; codes and scales are in ``model.onnx.data``."""
    files = {p.name: p.read_bytes() for p in artifact.component("unet").iterdir()}
    assert len(files["model.onnx.data"]) > 500_000
    return files


def test_the_manifest_says_which_loras_and_how_strong(intaglio, monkeypatch, tmp_path):
    """By the command line, of the text encoder alone; another file of that name is another manifest."""
    plan = build_module.make_plan

    def text_encoder(*args, **more):
        made = plan(*args, **more)
        return dataclasses.replace(made, components=tuple(c for c in made.components if c.name == "text_encoder"))

    monkeypatch.setattr(build_module, "make_plan", text_encoder)
    layers = parts_of(folder_of("sd"))["text_encoder"]
    tensors = lora_of(layers, flat("lora_te_text_model_"), *KOHYA)
    first = written(tmp_path, tensors, "first.safetensors")
    changed = {k: v * np.float32(1.5) if "lora_up" in k else v for k, v in tensors.items()}
    (tmp_path / "again").mkdir()
    again = written(tmp_path / "again", changed, "first.safetensors")
    second = written(tmp_path, lora_of(layers, dotted("text_encoder."), *PEFT, seed=4), "second.safetensors")
    manifests = {}
    for case, given in {
        "both": (f"{first}:0.5", second),
        "changed": (f"{again}:0.5", second),
    }.items():
        words = [word for lora in given for word in ("--lora", lora)]
        words += [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
        code, _, err = intaglio("build", folder_of("sd"), "-o", tmp_path / case, "--target", "onnx", *words)
        assert code == 0, err
        manifests[case] = (tmp_path / case / MANIFEST).read_bytes()
    stated = json.loads(manifests["both"])["provenance"]["loras"]
    assert stated == [
        {"file": "first.safetensors", "sha256": hashlib.sha256(first.read_bytes()).hexdigest(), "weight": 0.5},
        {"file": "second.safetensors", "sha256": hashlib.sha256(second.read_bytes()).hexdigest(), "weight": 1.0},
    ]
    assert json.loads(manifests["changed"])["provenance"]["loras"][0]["sha256"] != stated[0]["sha256"]
    assert len({hashlib.sha256(m).hexdigest() for m in manifests.values()}) == 2


def test_reading_one_weight_reads_its_own_factors_alone(monkeypatch, tmp_path):
    folder = folder_of("flux")
    files = [
        (
            written(tmp_path, lora_of(parts_of(folder)["transformer"], dotted(""), *KOHYA, seed=i), f"{i}.safetensors"),
            1.0,
        )
        for i in range(2)
    ]
    sources, loras = loras_of(folder, files)
    fused, keys = loras.apply("transformer", sources["transformer"]), []
    read = Parameter.read
    monkeypatch.setattr(Parameter, "read", lambda self: (keys.append((self.file.name, self.key)), read(self))[1])
    for name in loras.deltas["transformer"]:
        keys.clear()
        fused[name].read()
        layer = name.removesuffix(".weight")
        factors = [(f"{i}.safetensors", layer + end) for i in range(2) for end in KOHYA[:2]]
        assert sorted(keys) == sorted([(sources["transformer"][name].file.name, name), *factors])


def test_fusing_holds_one_layers_factors_and_not_the_files(tmp_path):
    """Of a LoRA as large as the model, the smallest layer costs what it weighs, and nothing stays."""
    folder, rank = folder_of("sd"), 32
    rng, layers = np.random.default_rng(0), parts_of(folder)["unet"]
    tensors = {}
    for layer, shape in layers.items():
        kernel = (1,) * (len(shape) - 2)
        tensors[f"unet.{layer}.lora_A.weight"] = rng.standard_normal((rank, *shape[1:])).astype(np.float32)
        tensors[f"unet.{layer}.lora_B.weight"] = rng.standard_normal((shape[0], rank, *kernel)).astype(np.float32)
    path = written(tmp_path, tensors)
    sources, loras = loras_of(folder, [(path, 1.0)])
    fused = loras.apply("unet", sources["unet"])
    whole = sum(4 * np.prod(shape) for _, shape in read_header(path).values())
    for layer in ("conv_out", "mid_block.attentions.0.proj_in", "up_blocks.0.resnets.0.conv1"):
        name = f"{layer}.weight"
        own = sum(tensors[f"unet.{layer}.lora_{ab}.weight"].nbytes for ab in "AB")
        fused[name].read()  # what NumPy and safetensors keep for themselves
        tracemalloc.start()
        value = fused[name].read()
        stays, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(layer, value.nbytes, own, stays, peak, whole)
        assert stays <= value.nbytes + KEPT
        assert peak <= COPIES * (value.nbytes + own) + KEPT
        assert peak < whole / 3
        del value


@pytest.mark.parametrize("family", ["sd", "qwen_image"])
def test_finding_out_what_a_lora_means_reads_one_weight(family, monkeypatch, tmp_path):
    part = "unet" if family == "sd" else "transformer"
    path = written(tmp_path, lora_of(parts_of(folder_of(family))[part], dotted(f"{part}."), *PEFT))
    keys, read = [], Parameter.read
    monkeypatch.setattr(Parameter, "read", lambda self: (keys.append(self.key), read(self))[1])
    loras_of(folder_of(family), [(path, 1.0)])
    assert len(keys) == 3  # one of the checkpoint's, and its factors
