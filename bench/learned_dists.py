"""DISTS: Ding, Ma, Wang, Simoncelli, Image Quality Assessment: Unifying Structure and Texture Similarity, 2020."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.bench.learned import LearnedMetric
from intaglio.bench.learned_backbones import BACKBONES, features, shapes_of, take
from intaglio.bench.learned_pictures import Resize, standardized, tensor
from intaglio.profiles.registry import need

BACKBONE = BACKBONES["vgg"]
CHANNELS = (3, *BACKBONE.channels)  # the picture itself counts as the first layer
C1 = C2 = 1e-6  # the paper's constants of equations 5 and 6
TINY = 1e-12  # below the root of the pooling
HANN = (0.25, 0.5, 0.25)  # a Hann window of five without its zeros, of sum 1


@dataclass(frozen=True)
class Options:
    """Keys of the table: the resize rule. The authors shrink larger pictures with ``short 256 bilinear``.

    Raises:
        UsageError: the rule is unknown.
    """

    resize: str = "none"

    def __post_init__(self) -> None:
        """Refuse an unknown rule while its place in the file is known."""
        Resize(self.resize)


def l2_pool(x: Any) -> Any:
    """Root of the Hann-weighted mean square at stride 2, [B, C, H, W] to half of each side: section III-A."""
    torch = need("torch", extra="export")
    line = x.new_tensor(HANN)
    window = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
    pooled = torch.nn.functional.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1])
    return (pooled + TINY).sqrt()


class Dists(LearnedMetric):
    """One less the weighted similarity of the features' means and of their structure; 0 for identical pictures.

    Equation 7 of the paper: VGG16 with L2 pooling; ``features.*`` as torchvision names them, ``alpha`` and ``beta``
    [1, 1475, 1, 1] as the authors' weights have them.
    """

    Options: ClassVar[type[Any]] = Options
    higher_is_better: ClassVar[bool] = False

    def load(self) -> None:
        """Read the backbone and the two rows of weights."""
        self.resize = Resize(self.options.resize)
        rows = {name: (1, sum(CHANNELS), 1, 1) for name in ("alpha", "beta")}
        state = take(self.files.tensors(), shapes_of(BACKBONE) | rows, self.files.where)
        total = state["alpha"].sum() + state["beta"].sum()
        self.alpha, self.beta = ((state.pop(name) / total).split(CHANNELS, dim=1) for name in rows)
        self.state = state

    @property
    def extractor(self) -> str:
        """The network."""
        return "vgg, L2 pooling"

    @property
    def resize_rule(self) -> str:
        """The resize rule."""
        return str(self.resize)

    def _measure(self, image: np.ndarray, reference: np.ndarray, prompt: str | None) -> float:
        torch = need("torch", extra="export")
        with torch.inference_mode():
            x = torch.cat([tensor(self.resize(image)), tensor(self.resize(reference))])
            found = [x, *features(BACKBONE, self.state, standardized(x), l2_pool)]
            similarity = sum(map(self._similarity, found, self.alpha, self.beta))
            return 1 - float(similarity)

    @staticmethod
    def _similarity(values: Any, alpha: Any, beta: Any) -> float:
        """Equations 5 and 6 of one layer [2, C, h, w], weighted and summed over the channels."""
        mean = values.mean((2, 3), keepdim=True)
        centred = values - mean
        variance = centred.square().mean((2, 3), keepdim=True)
        covariance = (centred[:1] * centred[1:]).mean((2, 3), keepdim=True)
        texture = (2 * mean[:1] * mean[1:] + C1) / (mean.square().sum(0, keepdim=True) + C1)
        structure = (2 * covariance + C2) / (variance.sum(0, keepdim=True) + C2)
        return float((alpha * texture + beta * structure).sum())
