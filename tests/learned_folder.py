"""A folder of learned metrics with seeded random weights: every kind, real networks, nothing to download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_tokenizers

from intaglio.bench.learned import FILE
from intaglio.bench.learned_backbones import BACKBONES, shapes_of
from intaglio.bench.learned_dists import CHANNELS

FEATURES = 8  # of the tiny extractor
SHORT, SIDE = 40, 32  # the tiny CLIP's shorter side after resizing, and its crop


def trunk(net: str) -> dict[str, np.ndarray]:
    """He-normal weights of a backbone, in the order of their sorted names, from one seed."""
    rng, shapes = np.random.default_rng(1), shapes_of(BACKBONES[net])
    result = {}
    for name in sorted(shapes):
        shape = shapes[name]
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 50
        result[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / fan) ** 0.5)
    return result


def heads(net: str) -> dict[str, np.ndarray]:
    """LPIPS' weights of the channels, 0 to 1."""
    rng = np.random.default_rng(2)
    channels = BACKBONES[net].channels
    return {f"lin{k}.model.1.weight": rng.random((1, c, 1, 1), dtype=np.float32) for k, c in enumerate(channels)}


def rows() -> dict[str, np.ndarray]:
    """DISTS' alpha and beta, 0 to 1."""
    rng = np.random.default_rng(3)
    return {name: rng.random((1, sum(CHANNELS), 1, 1), dtype=np.float32) for name in ("alpha", "beta")}


def extractor(kind: str = "uint8") -> bytes:
    """An ONNX network: pictures [B, 3, H, W] to [B, 8], a convolution with ReLU and its mean over the picture."""
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = extractor_weights()
    element = TensorProto.UINT8 if kind == "uint8" else TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["float", "weight", "bias"], ["conv"], strides=[2, 2]),
            helper.make_node("Relu", ["conv"], ["relu"]),
            helper.make_node("GlobalAveragePool", ["relu"], ["features"]),
        ],
        "extractor",
        [helper.make_tensor_value_info("image", element, ["B", 3, "H", "W"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", FEATURES, 1, 1])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())


def extractor_weights() -> tuple[np.ndarray, np.ndarray]:
    """Weight [8, 3, 5, 5] and bias [8] of the extractor's convolution."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((FEATURES, 3, 5, 5)).astype(np.float32) / 255
    return weight, rng.standard_normal(FEATURES).astype(np.float32)


def clip(folder: Path, *, vision_only: bool = False) -> Any:
    """A tiny random CLIP with its processor and tokenizer, saved by transformers; returns the model."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

    tokenizer = tiny_tokenizers.clip_tokenizer(folder, 77)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "projection_dim": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": SIDE, "patch_size": 8, "projection_dim": 16}
    config = CLIPConfig(text_config={**small, **text}, vision_config={**small, **vision}, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(config.vision_config) if vision_only else CLIPModel(config)
        for parameter in model.parameters():  # the usual 0.02 leaves all pictures with nearly the same embedding
            torch.nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.0, 0.2)
    model.eval().save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SHORT}, crop_size=crop).save_pretrained(folder)
    return model


def toml(folder: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write ``metrics.toml``; `files` is names whose digests are taken, or a table to be written as it is."""
    lines = []
    for key, table in tables.items():
        lines.append(f"[{key}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in table.items() if name != "files"]
        files = table.get("files", ())
        if not isinstance(files, Mapping):
            files = {name: f"sha256:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in files}
        lines += [f"[{key}.files]", *(f'"{name}" = "{digest}"' for name, digest in files.items())]
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


VISION = ["clip/config.json", "clip/preprocessor_config.json", "clip/model.safetensors"]
TABLES: dict[str, dict[str, Any]] = {
    "lpips": {"kind": "lpips", "net": "alex", "files": ["alexnet.safetensors", "alex_heads.safetensors"]},
    "lpips_vgg": {"kind": "lpips", "net": "vgg", "files": ["vgg16.safetensors", "vgg_heads.safetensors"]},
    "dists": {"kind": "dists", "files": ["vgg16.safetensors", "dists.safetensors"]},
    "clip": {"kind": "clip_image", "files": VISION},
    "clip_text": {"kind": "clip_score", "files": [*VISION, "clip/tokenizer.json"]},
    "fid": {
        "kind": "fid",
        "extractor": "tiny-conv",
        "input": "uint8",
        "resize": "square 24 bicubic",
        "minimum": 16,
        "batch": 5,
        "files": ["extractor.onnx"],
    },
}


def everything(folder: Path) -> Path:
    """All kinds; TABLES says which files are whose."""
    from safetensors.numpy import save_file

    save_file({**trunk("alex"), "classifier.1.weight": np.zeros((4, 4), np.float32)}, folder / "alexnet.safetensors")
    save_file(trunk("vgg"), folder / "vgg16.safetensors")
    save_file(heads("alex"), folder / "alex_heads.safetensors")
    save_file(heads("vgg"), folder / "vgg_heads.safetensors")
    save_file(rows(), folder / "dists.safetensors")
    (folder / "extractor.onnx").write_bytes(extractor())
    clip(folder / "clip")
    return toml(folder, TABLES)
