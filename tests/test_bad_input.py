"""What users get wrong: one line on stderr that names the value and the way out, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import types
from pathlib import Path

import pytest

from intaglio.profiles.errors import ToolError

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


# --- checkpoints ----------------------------------------------------------------------------------------------------


def edit_json(path, **changes):
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}), encoding="utf-8")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def as_pickle(folder):
    (folder / UNET).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")


def wrong_header(path):
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 1 << 40)
    path.write_bytes(data)


def lose_shard(folder):
    (folder / UNET).unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))


DAMAGE = {  # what happens to a copy of the tiny checkpoint, and what the message must hold
    "safetensors missing": (lambda c: (c / UNET).unlink(), [UNET, "missing", "incomplete"]),
    "safetensors truncated": (lambda c: cut(c / UNET, -1), [UNET, "truncated", "fetch it again"]),
    "safetensors empty": (lambda c: cut(c / TEXT, 0), [TEXT, "truncated"]),
    "safetensors with a huge header": (lambda c: wrong_header(c / UNET), [UNET, "not a safetensors file"]),
    "safetensors shard missing": (lose_shard, ["model-00001-of-00002.safetensors", "missing"]),
    "component only as a pickle": (as_pickle, ["diffusion_pytorch_model.bin", "pickle", "safetensors"]),
    "config.json missing": (lambda c: (c / "unet/config.json").unlink(), ["unet/config.json", "missing"]),
    "config.json not JSON": (lambda c: cut(c / "vae/config.json", 20), ["vae/config.json", "cannot be read"]),
    "config.json a list": (lambda c: (c / "vae/config.json").write_text("[]"), ["vae/config.json", "JSON object"]),
    "config.json lacks a key": (
        lambda c: edit_json(c / "unet/config.json", cross_attention_dim=...),
        ["unet/config.json", "cross_attention_dim"],
    ),
    "config.json of a wider model": (
        lambda c: edit_json(c / "text_encoder/config.json", intermediate_size=80),
        [TEXT, "has shape", "config.json implies"],
    ),
    "config.json of a deeper model": (
        lambda c: edit_json(c / "text_encoder/config.json", num_hidden_layers=3),
        [TEXT, "does not fit its config.json", "16 parameters missing", "encoder.layers.2"],
    ),
    "config.json of a shallower model": (
        lambda c: edit_json(c / "text_encoder/config.json", num_hidden_layers=1),
        [TEXT, "does not fit its config.json", "unknown"],
    ),
    "config.json contradicts itself": (
        lambda c: edit_json(c / "text_encoder/config.json", num_attention_heads=5),
        ["text_encoder/config.json does not describe a model", "not a multiple", "5"],
    ),
    "model_index.json missing": (lambda c: (c / "model_index.json").unlink(), ["no model_index.json", "diffusers"]),
    "model_index.json without a class": (
        lambda c: edit_json(c / "model_index.json", _class_name=...),
        ["model_index.json", "_class_name"],
    ),
    "unknown class": (
        lambda c: edit_json(c / "model_index.json", _class_name="FluxKontextPipeline"),
        ["FluxKontextPipeline", "not supported", "allowed:", "StableDiffusionPipeline"],
    ),
    "class with a typo": (
        lambda c: edit_json(c / "model_index.json", _class_name="StableDifusionPipeline"),
        ["Did you mean 'StableDiffusionPipeline'?"],
    ),
    "text encoder of another class": (
        lambda c: edit_json(c / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        ["T5EncoderModel", "CLIPTextModel"],
    ),
    "UNet with inputs we do not feed": (
        lambda c: edit_json(c / "unet/config.json", addition_embed_type="text_time"),
        ["addition_embed_type", "text_time"],
    ),
    "tokenizer missing": (
        lambda c: [p.unlink() for p in (c / "tokenizer").iterdir()],
        ["tokenizer", "missing"],
    ),
    "scheduler configuration missing": (
        lambda c: (c / "scheduler/scheduler_config.json").unlink(),
        ["scheduler/scheduler_config.json", "missing"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint(name, tiny_checkpoint, copy_artifact, refused, tmp_path):
    damage, words = DAMAGE[name]
    checkpoint = copy_artifact(tiny_checkpoint, "checkpoint")
    damage(checkpoint)
    refused("build", checkpoint, "-o", tmp_path / "artifact", words=words)


NOT_CHECKPOINTS = {
    "emojy": ["emojy is not a folder", "allowed: a diffusers pipeline folder or emoji", "Did you mean 'emoji'?"],
    "nowhere": ["nowhere is not a folder", "allowed"],
    "model.ckpt": ["model.ckpt is a pickle (.ckpt)", "convert it to safetensors"],
    "model.pt": ["model.pt is a pickle (.pt)", "convert it to safetensors"],
    "model.bin": ["model.bin is a pickle (.bin)", "convert it to safetensors"],
    "model.safetensors": ["model.safetensors is"],
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_not_a_checkpoint(name, exists, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / name).write_bytes(b"\x80\x02.")
    refused("build", name, "-o", "artifact", words=NOT_CHECKPOINTS[name])


# --- arguments of build ---------------------------------------------------------------------------------------------

BUILD_ARGUMENTS = {
    ("--target", "openvno"): ["'openvno'", "allowed: onnx, openvino, tensorrt", "Did you mean 'openvino'?"],
    ("--target", ""): ["unknown target ''", "allowed"],
    ("--quant", "int9"): ["'int9'", "allowed: fp8, fp8-weight-only, int4", "Did you mean 'int8'?"],
    ("--quant", "unett=int8"): ["'unett'", "allowed: text_encoder, unet, vae_encoder", "Did you mean 'unet'?"],
    ("--quant", "unet="): ["'unet='", "[COMPONENT=]FORMAT", "for example"],
    ("--quant", "=int8"): ["'=int8'", "[COMPONENT=]FORMAT", "for example"],
    ("--quant", ""): ["''", "[COMPONENT=]FORMAT", "for example"],
    ("--set", "tensorrt"): ["'tensorrt'", "KEY=VALUE"],
    ("--set", "tensorrt.sm=sm89"): ["tensorrt.sm", "is unknown here", "allowed: audit.steps"],
    ("--set", "openvino.speed=1"): ["openvino.speed", "is unknown here", "allowed"],
    ("--taget", "openvino"): ["--taget", "intaglio build --help"],
    ("--target",): ["--target", "expected one argument"],
}


@pytest.mark.parametrize("arguments", BUILD_ARGUMENTS, ids=" ".join)
def test_wrong_argument_of_build(arguments, tiny_checkpoint, refused, tmp_path):
    refused("build", tiny_checkpoint, "-o", tmp_path / "artifact", *arguments, words=BUILD_ARGUMENTS[arguments])


def test_forgotten_output(tiny_checkpoint, refused):
    refused("build", tiny_checkpoint, words=["-o/--output", "intaglio build --help"])


@pytest.mark.parametrize("module", ["onnx_ir", "torch", "diffusers"])
def test_build_without_the_export_packages(module, tiny_checkpoint, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    words = [f"{module} is not installed", "pip install 'intaglio[export]'"]
    refused("build", tiny_checkpoint, "-o", tmp_path / "artifact", words=words)


def test_build_for_a_target_that_is_not_installed(tiny_checkpoint, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    words = ["openvino is not installed", "pip install 'intaglio[openvino]'"]
    refused("build", tiny_checkpoint, "-o", tmp_path / "artifact", "--target", "openvino", words=words)


# --- where build writes ---------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written(tiny_checkpoint, refused, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file/artifact", tmp_path / "file/deep/artifact", Path("/proc/intaglio/artifact")):
        refused("build", tiny_checkpoint, "-o", output, words=[str(output), "cannot be written", "choose another"])


@pytest.mark.parametrize("output", [".", "..", "/", "a" * 300])
def test_output_without_a_usable_name(output, tiny_checkpoint, refused, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    refused("build", tiny_checkpoint, "-o", output, "--force", words=[output])


def test_existing_output_needs_force(tiny_checkpoint, refused, tmp_path):
    for name in ("folder", "folder/inner"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "folder/inner", "file"):
        refused("build", tiny_checkpoint, "-o", tmp_path / name, words=[name, "exists", "--force"])


def test_force_replaces_artifacts_only(tiny_checkpoint, refused, tmp_path):
    (tmp_path / "home").mkdir()
    for name in ("home/thesis.txt", "file"):
        (tmp_path / name).write_text("mine")
    for name in ("home", "file"):
        output = tmp_path / name
        refused("build", tiny_checkpoint, "-o", output, "--force", words=[name, "is not an artifact", "another name"])


MIDWAY = {  # what a stage raises, the exit code, and the message
    "refusal": (ToolError("the compiler\nrefuses the graph"), 2, "intaglio: the compiler refuses the graph\n"),
    "full disk": (OSError(28, "No space left on device", "unet"), 2, "intaglio: unet: No space left on device\n"),
    "Ctrl+C": (KeyboardInterrupt(), 130, "intaglio: interrupted; nothing was written\n"),
    "defect": (RuntimeError("a defect of ours"), None, ""),
}


@pytest.mark.parametrize("name", MIDWAY)
def test_a_build_that_fails_midway_leaves_the_old_artifact(
    name, tiny_checkpoint, tiny_artifact, copy_artifact, intaglio, tmp_path, monkeypatch
):
    from intaglio.exporters import build
    from intaglio.profiles.artifact import Artifact

    error, code, message = MIDWAY[name]

    def fail(plan, component, folder, *rest):
        (folder / component.name).mkdir()
        (folder / component.name / "model.onnx").write_bytes(b"half")
        raise error

    monkeypatch.setattr(build, "build_component", fail)
    old = copy_artifact(tiny_artifact)
    command = ("build", tiny_checkpoint, "-o", old, "--force")
    if code is None:  # keeps its traceback
        with pytest.raises(RuntimeError, match="a defect of ours"):
            intaglio(*command)
    else:
        assert intaglio(*command) == (code, "", message)
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    assert Artifact.open(old).manifest.digest == tiny_artifact.manifest.digest


# --- arguments of generate ------------------------------------------------------------------------------------------

GENERATE_ARGUMENTS = {
    ("--size", "100x64"): ["width 100", "64 to 1024 in steps of 8", "the nearest is"],
    ("--size", "64x99"): ["height 99", "64 to 1024 in steps of 8", "the nearest is 96"],
    ("--size", "4096x64"): ["width 4096", "the nearest is 1024"],
    ("--size", "64x8"): ["height 8", "the nearest is 64"],
    ("--size", "0x0"): ["width 0", "the nearest is 64"],
    ("--size", "64"): ["'64'", "WIDTHxHEIGHT", "for example"],
    ("--size", "64x"): ["'64x'", "WIDTHxHEIGHT"],
    ("--size", "64x64x64"): ["'64x64x64'", "WIDTHxHEIGHT"],
    ("--size=-64x64",): ["'-64x64'", "WIDTHxHEIGHT"],
    ("--size", "widexhigh"): ["'widexhigh'", "WIDTHxHEIGHT"],
    ("--steps", "0"): ["steps 0", "1 or more"],
    ("--steps=-3",): ["steps -3", "1 or more"],
    ("--steps", "1001"): ["1001 steps", "1 to 1000"],
    ("--steps", "many"): ["--steps", "'many'", "intaglio generate --help"],
    ("--count", "0"): ["count 0", "1 or more"],
    ("--count=-1",): ["count -1", "1 or more"],
    ("--count", "9"): ["9 pictures", "batch of 18", "allows 16", "fewer"],
    ("--count", "17", "--guidance", "1"): ["17 pictures", "allows 16"],
    ("--seed=-1",): ["seed -1", "0 to 2**64 - 1"],
    ("--seed", str(2**64)): [str(2**64), "0 to 2**64 - 1"],
    ("--guidance", "nan"): ["guidance nan", "finite"],
    ("--guidance", "inf"): ["guidance inf", "finite"],
    ("--scheduler", "dpm"): ["'dpm'", "allowed: ddim, dpmpp_2m", "unipc"],
    ("--scheduler", "eular"): ["'eular'", "Did you mean 'euler'?"],
    ("--backend", "openvno"): ["'openvno'", "allowed: null, onnxruntime, openvino", "Did you mean 'openvino'?"],
    ("--backend", "onnxruntime", "--device", "gpu"): ["'gpu'", "allowed: cpu, cuda, cuda:N"],
    ("--backend", "onnxruntime", "--device", "cuda:x"): ["'cuda:x'", "allowed: cpu, cuda, cuda:N"],
    ("--backend", "openvino", "--device", "XPU"): ["'XPU'", "allowed: CPU"],
    ("--backend", "torch", "--device", "gpu"): ["'gpu'", "cpu"],
    ("--backend", "onnxruntime", "--threads", "-2"): ["threads -2", "0 or more"],
    ("--set", "speed"): ["'speed'", "KEY=VALUE"],
    ("--set", "null.speed=1"): ["null.speed", "is unknown; allowed: none"],
    ("--set", "openvino.speed=1"): ["openvino.speed", "--backend null", "null.KEY"],
    ("--setps", "3"): ["--setps", "intaglio generate --help"],
}


@pytest.mark.parametrize("arguments", GENERATE_ARGUMENTS, ids=" ".join)
def test_wrong_argument_of_generate(arguments, tiny_artifact, refused, tmp_path):
    command = ["generate", tiny_artifact.folder, "red heart", "-o", tmp_path / "x.png", "--steps", 2]
    backend = () if "--backend" in arguments else ("--backend", "null")
    refused(*command, *backend, *arguments, words=GENERATE_ARGUMENTS[arguments])


def test_a_prompt_that_is_not_text(tiny_artifact, refused, tmp_path):
    """What Python makes of bytes on the command line that are not UTF-8."""
    output = tmp_path / "x.png"
    for prompt in ({"prompt": "caf\udce9"}, {"prompt": "cafe", "negative": "caf\udce9"}):
        arguments = [prompt["prompt"], "--negative-prompt", prompt.get("negative", "")]
        refused("generate", tiny_artifact.folder, *arguments, "-o", output, "--backend", "null", words=["UTF-8"])


def test_where_pictures_cannot_go(tiny_artifact, refused, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    rows = {
        tmp_path / "x.jpg": ["x.jpg", ".png"],
        tmp_path / "x": ["is not a .png name"],
        tmp_path / "nowhere/x.png": ["nowhere", "not a folder that can be written", "create it"],
        tmp_path / "file/x.png": ["file", "not a folder that can be written"],
        Path("/proc/x.png"): ["/proc", "not a folder that can be written"],
        tmp_path / "folder.png": ["folder.png", "is a folder"],
        tmp_path / f"{'a' * 300}.png": ["aaa.png", "name too long"],
    }
    for output, words in rows.items():
        command = ("generate", tiny_artifact.folder, "cat", "-o", output, "--backend", "null", "--force", "--steps", 1)
        refused(*command, words=words)


def test_existing_pictures_need_force(tiny_artifact, refused, intaglio, tmp_path):
    for name in ("x.png", "y-1.png"):
        (tmp_path / name).write_text("mine")
    command = ("generate", tiny_artifact.folder, "cat", "--backend", "null", "--steps", 1, "-o")
    refused(*command, tmp_path / "x.png", words=["x.png exists", "--force"])
    refused(*command, tmp_path / "y.png", "--count", 2, words=["y-1.png exists", "--force"])
    assert intaglio(*command, tmp_path / "x.png", "--force")[0] == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tiny_artifact, intaglio, tmp_path, monkeypatch):
    from PIL.Image import Image

    def full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    (tmp_path / "x.png").write_text("mine")
    monkeypatch.setattr(Image, "save", full)
    command = ("generate", tiny_artifact.folder, "cat", "--backend", "null", "--steps", 1, "--force")
    code, out, err = intaglio(*command, "-o", tmp_path / "x.png")
    last = err.splitlines()[-1]  # below the bar: the steps were done
    assert (code, out, last.split(";")[0]) == (
        2,
        "",
        f"intaglio: {tmp_path / 'x.png'} cannot be written (No space left on device)",
    )
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.png", "mine")]


# --- backends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_backend_that_is_not_installed(backend, tiny_artifact, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, backend, None)
    words = [f"{backend} is not installed", f"pip install 'intaglio[{backend}]'"]
    refused("generate", tiny_artifact.folder, "cat", "-o", tmp_path / "x.png", "--backend", backend, words=words)


def test_cuda_on_the_cpu_wheel(tiny_artifact, refused, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    words = ["'cuda'", "CUDAExecutionProvider", "CPUExecutionProvider", "pip install 'intaglio[cuda]'"]
    refused("generate", tiny_artifact.folder, "cat", "-o", tmp_path / "x.png", "--device", "cuda", words=words)


def test_cuda_without_a_gpu_in_torch(tiny_artifact, refused, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ("generate", tiny_artifact.folder, "cat", "-o", tmp_path / "x.png", "--backend", "torch")
    refused(*command, "--device", "cuda", words=["'cuda'", "no CUDA GPU", "--device cpu"])


def test_openvino_on_an_artifact_built_without_it(without_openvino, refused, tmp_path):
    words = ["openvino_model.xml is missing", "--target openvino"]
    refused("generate", without_openvino, "cat", "-o", tmp_path / "x.png", "--backend", "openvino", words=words)


@pytest.fixture
def tensorrt_plans(tiny_artifact, copy_artifact, reseal, monkeypatch):
    """Plans built here for SM 8.9 and 12.0 that hold nothing, and an installed API and driver that could load them."""
    from intaglio.profiles.trust import remember_engines
    from intaglio.runtimes import engine_tensorrt

    monkeypatch.setattr(engine_tensorrt, "installed_apis", lambda: ("tensorrt-rtx",))
    monkeypatch.setattr(engine_tensorrt, "load_api", lambda name: types.SimpleNamespace(__version__="9.9.9"))
    monkeypatch.setattr(engine_tensorrt, "check_driver", lambda: None)
    folder = copy_artifact(tiny_artifact, "plans")
    engines = {}
    for sm in ("sm89", "sm120"):
        name = f"text_encoder/tensorrt/model.{sm}.engine"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"plan")
        engines[name] = {"sm": sm, "api": "tensorrt-rtx", "version": "1.7.1"}
    assert remember_engines(folder, engines) == []
    return reseal(folder, dataclasses.replace(tiny_artifact.manifest, engines=engines))


def test_plans_for_another_gpu(tensorrt_plans, refused, tmp_path, monkeypatch):
    from intaglio.runtimes import engine_tensorrt

    monkeypatch.setattr(engine_tensorrt, "capability_of_gpu", lambda index: "sm86")
    words = ["text_encoder", "this GPU's sm86", "only for sm89, sm120", "--target tensorrt --set tensorrt.sm=sm86"]
    refused("generate", tensorrt_plans, "cat", "-o", tmp_path / "x.png", "--backend", "tensorrt", words=words)


def test_plans_of_another_release(tensorrt_plans, refused, tmp_path, monkeypatch):
    from intaglio.runtimes import engine_tensorrt

    monkeypatch.setattr(engine_tensorrt, "capability_of_gpu", lambda index: "sm120")
    words = ["model.sm120.engine", "1.7.1", "9.9.9 is installed", "pip install tensorrt_rtx_cu13_libs==1.7.1"]
    refused("generate", tensorrt_plans, "cat", "-o", tmp_path / "x.png", "--backend", "tensorrt", words=words)


def test_tensorrt_without_a_gpu(tensorrt_plans, refused, tmp_path, monkeypatch):
    from intaglio.runtimes import tensorrt_api

    monkeypatch.setattr(tensorrt_api, "DRIVER", "libcuda-of-no-machine.so.1")
    words = ["no NVIDIA GPU", "libcuda-of-no-machine.so.1 is not found"]
    refused("generate", tensorrt_plans, "cat", "-o", tmp_path / "x.png", "--backend", "tensorrt", words=words)


def test_tensorrt_on_a_device_it_does_not_have(tensorrt_plans, refused, tmp_path):
    command = ("generate", tensorrt_plans, "cat", "-o", tmp_path / "x.png", "--backend", "tensorrt")
    refused(*command, "--device", "dla", words=["'dla'", "allowed: cuda, cuda:N"])


def test_tensorrt_on_an_artifact_built_without_it(tiny_artifact, refused, tmp_path, monkeypatch):
    from intaglio.runtimes import engine_tensorrt

    monkeypatch.setattr(engine_tensorrt, "installed_apis", lambda: ("tensorrt-rtx",))
    monkeypatch.setattr(engine_tensorrt, "capability_of_gpu", lambda index: "sm89")
    command = ("generate", tiny_artifact.folder, "cat", "-o", tmp_path / "x.png", "--backend", "tensorrt")
    refused(*command, words=["text_encoder has no TensorRT plan", "--target tensorrt"])


def test_tensorrt_that_is_not_installed(tiny_artifact, refused, tmp_path, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    words = ["is not installed", "pip install 'intaglio[tensorrt]'"]
    refused("generate", tiny_artifact.folder, "cat", "-o", tmp_path / "x.png", "--backend", "tensorrt", words=words)


def test_torch_backend_and_a_checkpoint_that_moved_or_changed(
    tiny_artifact, tiny_checkpoint, copy_artifact, refused, tmp_path, tmp_path_factory, monkeypatch
):
    digest = tiny_artifact.manifest.provenance["digest"]
    command = ("generate", tiny_artifact.folder, "cat", "-o", tmp_path / "x.png", "--backend", "torch", "--steps", 1)
    changed = copy_artifact(tiny_checkpoint, "changed")
    edit_json(changed / "scheduler/scheduler_config.json", beta_end=0.013)
    cache = tmp_path_factory.mktemp("cache")
    index = cache / "intaglio/checkpoints.json"
    index.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    hint = ["needs the checkpoint 'tiny'", "--checkpoint FOLDER"]
    refused(*command, words=hint)
    for text in ("not JSON", "[]", json.dumps({digest: str(tmp_path / "gone")})):
        index.write_text(text)
        refused(*command, words=hint)
    index.write_text(json.dumps({digest: str(changed)}))
    refused(*command, words=[str(changed), "changed since", "--checkpoint FOLDER"])
    refused(*command, "--checkpoint", changed, words=[str(changed), "is not the checkpoint"])
    refused(*command, "--checkpoint", tmp_path / "gone", words=[str(tmp_path / "gone"), "is not a folder"])


# --- artifacts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "inspect", "verify"])
def test_not_an_artifact(verb, refused, tmp_path):
    (tmp_path / "folder").mkdir()
    rest = ("cat", "-o", tmp_path / "x.png") if verb == "generate" else ()
    refused(verb, tmp_path / "nowhere", *rest, words=["nowhere", "is not a folder", "intaglio build CHECKPOINT -o"])
    refused(verb, tmp_path / "folder", *rest, words=["folder is not an artifact", "intaglio build CHECKPOINT -o"])


@pytest.mark.parametrize("verb", ["generate", "inspect", "verify"])
def test_a_flipped_byte(verb, tiny_artifact, copy_artifact, refused, tmp_path):
    folder = copy_artifact(tiny_artifact)
    file = folder / "unet/model.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    rest = ("cat", "-o", tmp_path / "x.png") if verb == "generate" else ()
    refused(verb, folder, *rest, words=["unet/model.onnx.data", "altered", "build the artifact again"])


# --- what is no error -----------------------------------------------------------------------------------------------


def test_a_prompt_over_the_limit_is_cut_with_a_warning(tiny_artifact, intaglio, tmp_path):
    output = tmp_path / "x.png"
    command = ("generate", tiny_artifact.folder, "red cat " * 9 + "zebra", "-o", output, "--backend", "null")
    code, out, err = intaglio(*command, "--steps", 1)
    assert (code, out) == (0, f"{output}\n")
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "takes 16" in warnings[0]
    assert "zebra'" in warnings[0], "the end of what was cut is shown"
    assert output.exists()
