"""LoRAs fused into a checkpoint's weights at build time: ``W + weight * alpha / rank * up @ down``.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685). A DoRA gives every
output a norm of its own besides: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation"
(https://arxiv.org/abs/2402.09353), equation 5. A fused parameter is computed when it is read, one at a time: in
float32, all LoRAs in the order they were given, and then rounded once to the dtype that the checkpoint stores it in
(float32 stays float32). diffusers' ``fuse_lora`` does the same arithmetic in the dtype of the loaded pipeline.
`intaglio.exporters.lora_files` reads the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters.lora_names import Piece
from intaglio.exporters.weights import Parameter, Weights
from intaglio.profiles.errors import NumericsError

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.component import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA as the user gave it: the file, how strongly it counts, and the file's sha256."""

    path: Path
    weight: float
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one LoRA adds to one parameter.

    Attributes:
        up, down: factors [out, rank] and [rank, in], with kernels behind where the layer is a convolution.
        mid: LoCon's kernel between them [rank, rank, kH, kW], if there is one.
        scale: the LoRA's weight times alpha over rank.
        piece: which rows of the product are added to which parameter.
        magnitude: a DoRA's norms, one for each row of the product in whatever shape, if it is one.
    """

    up: Parameter
    down: Parameter
    mid: Parameter | None
    scale: float
    piece: Piece
    magnitude: Parameter | None = None

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """The difference, float32, in the parameter's `shape`."""
        first, last = self.piece.rows
        up, down = (p.read().astype(np.float32, copy=False) for p in (self.up, self.down))
        up, down = up.reshape(len(up), -1)[first:last], down.reshape(len(down), -1)
        if self.mid is not None:
            kernel = self.mid.read().astype(np.float32, copy=False)
            down = np.einsum("rskl,si->rikl", kernel, down).reshape(len(kernel), -1)
        product = (up @ down).reshape(shape)
        product *= np.float32(self.scale)
        return self._in_order(product)

    def added_to(self, total: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """The parameter with this LoRA, float32.

        PEFT takes a DoRA's norms, ``||W + difference||`` of each row, from the weights before any LoRA, and the
        LoRA's weight counts in the difference alone, not in the magnitude (``peft/tuners/lora/variants.py``).

        Args:
            total: the parameter with the LoRAs before this one; written to.
            stored: the parameter without any.
        """
        difference = self.read(stored.shape)
        total += difference
        if self.magnitude is None:
            return total
        first, last = self.piece.rows
        magnitude = self._in_order(self.magnitude.read().astype(np.float32, copy=False).reshape(-1)[first:last])
        difference += stored
        with np.errstate(divide="ignore", invalid="ignore"):  # rows of zeros: `FusedParameter.fuse` looks
            factors = magnitude / np.linalg.norm(difference.reshape(len(difference), -1), axis=1)
            total *= factors.reshape(-1, *(1,) * (total.ndim - 1))
        return total

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate(np.split(rows, 2)[::-1]) if self.piece.swapped else rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedParameter(Parameter):
    """A parameter of the checkpoint with LoRAs added to it whenever it is read."""

    deltas: tuple[Delta, ...]

    def fuse(self, stored: np.ndarray) -> np.ndarray:
        """The fused tensor in the checkpoint's dtype, from the stored one in any.

        Raises:
            NumericsError: it has values that this dtype does not.
        """
        rounded = self._rounded(stored)
        if not np.isfinite(rounded.astype(np.float32, copy=False)).all():
            raise NumericsError(f"{self.key} with its LoRAs is not finite in {self.dtype}; give them a smaller weight")
        return rounded

    def read(self) -> np.ndarray:
        """See `Parameter.read`."""
        return self.fuse(Parameter.read(self))

    def changes(self) -> bool:
        """Whether any value is another one than without the LoRAs, in the checkpoint's dtype."""
        stored = Parameter.read(self)
        return not np.array_equal(self._rounded(stored), stored)

    def _rounded(self, stored: np.ndarray) -> np.ndarray:
        original = stored.astype(np.float32)
        total = original.copy() if any(d.magnitude is not None for d in self.deltas) else original
        for delta in self.deltas:
            total = delta.added_to(total, original)
        with np.errstate(over="ignore"):
            return total.astype(_numpy_dtype(self.dtype), copy=False)


def _numpy_dtype(name: str) -> Any:
    import ml_dtypes

    return {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[name]


Deltas = Mapping[str, tuple[Delta, ...]]  # parameter name to what is added, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Loras:
    """LoRAs that fit a checkpoint: what they add, by component folder and parameter name."""

    files: tuple[LoraFile, ...] = ()
    deltas: Mapping[str, Deltas] = field(default_factory=dict)

    def apply(self, part: str, weights: Weights) -> Weights:
        """The component's weights with every LoRA fused; nothing is read."""
        return apply_loras(weights, self.deltas.get(part, {}))

    def provenance(self) -> list[dict[str, Any]]:
        """Name, digest and weight of each file, in order."""
        return [{"file": f.path.name, "sha256": f.digest, "weight": f.weight} for f in self.files]


def apply_loras(weights: Weights, deltas: Deltas) -> Weights:
    """The same parameters, those that `deltas` names fused when they are read."""
    if not deltas:
        return weights
    entries = {**weights, **{name: fused_parameter(weights[name], added) for name, added in deltas.items()}}
    fused = Weights.of(weights.files[0], entries)
    fused.files = weights.files
    return fused


def fused_parameter(p: Parameter, deltas: tuple[Delta, ...]) -> FusedParameter:
    """`p` with `deltas` added to it whenever it is read."""
    return FusedParameter(file=p.file, key=p.key, dtype=p.dtype, shape=p.shape, view=p.view, deltas=deltas)


def fuse_module(module: torch.nn.Module, component: Component, weights: Weights) -> None:
    """Fuse the same LoRAs into a reference that a library loaded: its own weights, not our reading of them.

    Args:
        module: wrapped, in float32.
        component: what it is.
        weights: of `Loras.apply`.
    """
    import torch

    parameters = dict(module.named_parameters())
    for name, fused in weights.renamed(component.rename).items():
        if isinstance(fused, FusedParameter) and not re.search(component.ignore, name):
            target = parameters[component.prefix + name]
            value = fused.fuse(target.detach().cpu().numpy().reshape(fused.shape))
            with torch.no_grad():
                target.copy_(torch.from_numpy(value.astype(np.float32)).reshape(target.shape))
