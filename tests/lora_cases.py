"""LoRAs of random factors in every layout of names, and what diffusers and we make of them."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file

from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.lora_files import parse_lora, read_loras
from intaglio.exporters.lora_names import ORIGINAL, Catalogue

RANK = 3
ALPHA = 2.0


@functools.cache
def folder_of(family):
    """A family's tiny checkpoint, once a session; tests that change files change a copy."""
    return tiny.CHECKPOINTS[family](Path(os.environ["INTAGLIO_TEST_CACHE"]) / "lora" / family)


@functools.cache
def pipeline_class(folder):
    import diffusers

    return getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])


def pipeline_of(folder, **options):
    return pipeline_class(folder).from_pretrained(folder, **options)


def layers_of(model):
    """Every linear layer and convolution: its path and its weight's shape."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, kinds)}


def factors(shape, rank, rng):
    """Random up and down for a weight, large enough to matter."""
    up = rng.standard_normal((shape[0], rank, *(1,) * (len(shape) - 2))) * 0.3
    down = rng.standard_normal((rank, *shape[1:])) * 0.3
    return up.astype(np.float32), down.astype(np.float32)


def lora_of(layers, name, down, up, alpha=None, *, seed=0, steps=3):
    """A LoRA of random factors for `layers`: how a layer, the factors and alpha are called is what is told.

    Ranks vary, and alphas among `steps` values: diffusers 0.42.1 forgets those of attention layers in kohya's files
    that differ from the most frequent one (it warns of "alpha_pattern keys" that match nothing).
    """
    rng, tensors = np.random.default_rng(seed), {}
    for i, (layer, shape) in enumerate(layers.items()):
        called = name(layer)
        if called is None:
            continue
        tensors[called + up], tensors[called + down] = factors(shape, RANK + i % 2, rng)
        if alpha:
            tensors[called + alpha] = np.array(ALPHA + i % steps, np.float32)
    return tensors


def flat(prefix):
    return lambda layer: prefix + layer.replace(".", "_")


def dotted(prefix):
    return lambda layer: prefix + layer


def attention(prefix, inner):
    """diffusers' attention processors: their four matrices alone."""

    def name(layer):
        match = re.search(r"(.*attn\d?)\.(to_out\.0|out_proj|to_[qkv]|[qkv]_proj)$", layer)
        if match is None:
            return None
        kind = "out" if "out" in match[2] else re.sub("to_|_proj", "", match[2])
        return f"{prefix}{match[1]}{inner}.to_{kind}_lora"

    return name


def compvis(layers):
    """Names of CompVis' UNet; diffusers maps them back."""
    catalogue = Catalogue({f"{n}.weight": s for n, s in layers.items()})
    return lambda layer: flat("lora_unet_")(catalogue._compvis(layer)) if catalogue._compvis(layer) else None


def original(prefix, layers, *, separator, only=lambda name: True):
    """Names of a transformer's original code, of rows that mean one layer or several; shapes are those fused."""
    wide, names = {}, {}
    for pattern, targets in ORIGINAL:
        for n in range(3):
            inside = [t.format(n=n) for t in targets]
            if all(t in layers for t in inside) and only(pattern) and inside[0] not in names.values():
                called = pattern.format(n=n)
                wide[called] = (sum(layers[t][0] for t in inside), *layers[inside[0]][1:])
                names[called] = inside[0]
    return wide, (lambda layer: prefix + layer.replace(".", separator))


PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")


@functools.cache
def parts_of(folder):
    """Layers of every component of a checkpoint."""
    return {n: layers_of(m) for n, m in pipeline_of(folder).components.items() if hasattr(m, "named_modules")}


def fused_by_diffusers(folder, files, **options):
    """Every weight of every component after `load_lora_weights` and `fuse_lora`, as float32."""
    pipe = pipeline_of(folder, **options)
    names = [f"lora{i}" for i in range(len(files))]
    for name, (path, _) in zip(names, files, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    if len(files) > 1:
        pipe.set_adapters(names, [weight for _, weight in files])
    components = [c for c in pipe._lora_loadable_modules if getattr(pipe, c, None) is not None]
    pipe.fuse_lora(components=components, lora_scale=files[0][1] if len(files) == 1 else 1.0)
    return {c: plain(getattr(pipe, c).state_dict()) for c in components}


def plain(state):
    return {k.replace(".base_layer", ""): v.float().numpy() for k, v in state.items() if ".lora_" not in k}


def loras_of(folder, files):
    """The checkpoint's weights and the LoRAs on them, by component folder."""
    checkpoint = open_checkpoint(folder)
    sources = {p.name: checkpoint.weights(p.name) for p in sorted(folder.iterdir()) if any(p.glob("*.safetensors*"))}
    loras = read_loras([parse_lora(f"{path}:{weight}") for path, weight in files], sources)
    return sources, loras


def relative(ours, theirs):
    """L2 of the difference by L2 of theirs."""
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)


def distances(folder, files):
    """Largest relative distance of our fused weights from diffusers', and the number of weights that changed."""
    theirs = fused_by_diffusers(folder, files)
    sources, loras = loras_of(folder, files)
    largest, changed = 0.0, 0
    for part, state in theirs.items():
        for name, fused in loras.apply(part, sources[part]).items():
            today = name if name in state else name.removeprefix("text_model.")
            if today not in state:
                continue
            ours = fused.read().astype(np.float32)
            stored = sources[part][name].read().astype(np.float32)
            changed += not np.array_equal(stored, state[today])
            largest = max(largest, relative(ours, state[today]))
    return largest, changed


def written(tmp_path, tensors, name="lora.safetensors", **metadata):
    save_file(tensors, tmp_path / name, metadata=metadata or None)
    return tmp_path / name
