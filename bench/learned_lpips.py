"""LPIPS: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.bench.learned import LearnedMetric
from intaglio.bench.learned_backbones import BACKBONES, features, shapes_of, take
from intaglio.bench.learned_pictures import Resize, standardized, tensor
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need, pick

# Of pictures in -1..1, as the authors' code has them: ImageNet's of 0..1, rounded.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-10  # added to a feature's length before dividing by it, as the authors' code does


@dataclass(frozen=True)
class Options:
    """Keys of the table: the network and the resize rule.

    Raises:
        UsageError: one of them is unknown.
    """

    net: str
    resize: str = "none"

    def __post_init__(self) -> None:
        """Refuse what is unknown while its place in the file is known."""
        pick(BACKBONES, self.net, "net")
        Resize(self.resize)


class Lpips(LearnedMetric):
    """Distance of unit-length features, weighted per channel, summed over five layers; 0 for identical pictures.

    Equation 1 of the paper at version 0.1 of the authors' weights: ``features.*`` as torchvision names them and
    ``lin{k}.model.1.weight`` [1, C, 1, 1] as the lpips package does.
    """

    Options: ClassVar[type[Any]] = Options
    higher_is_better: ClassVar[bool] = False

    def load(self) -> None:
        """Read backbone and heads."""
        self.backbone = BACKBONES[self.options.net]
        self.resize = Resize(self.options.resize)
        heads = {f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate(self.backbone.channels)}
        self.state = take(self.files.tensors(), shapes_of(self.backbone) | heads, self.files.where)

    @property
    def extractor(self) -> str:
        """The network."""
        return str(self.options.net)

    @property
    def resize_rule(self) -> str:
        """The resize rule."""
        return str(self.resize)

    def _measure(self, image: np.ndarray, reference: np.ndarray, prompt: str | None) -> float:
        torch = need("torch", extra="export")
        a, b = self.resize(image), self.resize(reference)
        least = self.backbone.smallest
        if min(a.shape[:2]) < least:
            raise UsageError(f"{self.key} needs {least}x{least} pixels or more, found {a.shape[1]}x{a.shape[0]}")
        with torch.inference_mode():
            x = torch.cat([tensor(a), tensor(b)]) * 2 - 1
            found = features(self.backbone, self.state, standardized(x, SHIFT, SCALE))
            total = 0.0
            for k, values in enumerate(found):
                unit = values / (values.square().sum(1, keepdim=True).sqrt() + TINY)
                difference = (unit[:1] - unit[1:]).square() * self.state[f"lin{k}.model.1.weight"]
                total += difference.sum(1).mean().item()
        return total
