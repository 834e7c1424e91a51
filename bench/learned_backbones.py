"""AlexNet and VGG16 up to their last convolution, in plain torch, by torchvision's names of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need

OTHERS = "classifier."  # of the same state dicts; no metric reads it


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution with bias: channels in and out, kernel, stride, padding."""

    before: int
    after: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """A max pooling: window and stride."""

    window: int
    stride: int = 2


RELU = "relu"
Layer = Conv | Pool | str


@dataclass(frozen=True, slots=True)
class Backbone:
    """Layers at torchvision's indices of ``features``, and which of their outputs are the features.

    Attributes:
        layers: in order; the index is the one in the weights' names.
        taps: indices of the layers whose output is kept.
        smallest: shortest side in pixels that leaves one feature at the last tap.
    """

    layers: tuple[Layer, ...]
    taps: tuple[int, ...]
    smallest: int

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tap."""
        convs = [[x.after for x in self.layers[:tap] if isinstance(x, Conv)] for tap in self.taps]
        return tuple(found[-1] for found in convs)


def _vgg16() -> tuple[Layer, ...]:
    layers: list[Layer] = []
    before = 3
    for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [Conv(before, channels), RELU]
            before = channels
        layers.append(Pool(2))
    return tuple(layers)


BACKBONES = {
    # Krizhevsky, One weird trick for parallelizing convolutional neural networks, 2014
    "alex": Backbone(
        layers=(
            *(Conv(3, 64, 11, 4, 2), RELU, Pool(3)),
            *(Conv(64, 192, 5, 1, 2), RELU, Pool(3)),
            *(Conv(192, 384), RELU, Conv(384, 256), RELU, Conv(256, 256), RELU),
        ),
        taps=(1, 4, 7, 9, 11),
        smallest=31,
    ),
    # Simonyan, Zisserman, Very Deep Convolutional Networks, ICLR 2015, configuration D
    "vgg": Backbone(layers=_vgg16(), taps=(3, 8, 15, 22, 29), smallest=16),
}


def take(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """The tensors of these names and shapes, and no others but ``classifier.*``.

    Raises:
        UsageError: a tensor is missing, of another shape, or unknown.
    """
    unknown = sorted(name for name in state if name not in shapes and not name.startswith(OTHERS))
    if unknown:
        raise UsageError(f"{where}: unknown tensor {unknown[0]}; allowed: {', '.join(list(shapes)[:3])} and so on")
    for name, shape in shapes.items():
        found = tuple(state[name].shape) if name in state else None
        if found != shape:
            message = "is missing" if found is None else f"has shape {found}"
            raise UsageError(f"{where}: tensor {name} {message}; wanted: {shape}")
    return {name: state[name] for name in shapes}


def shapes_of(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, up to the last tap."""
    result: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(backbone.layers):
        if isinstance(layer, Conv):
            result[f"features.{index}.weight"] = (layer.after, layer.before, layer.kernel, layer.kernel)
            result[f"features.{index}.bias"] = (layer.after,)
    return result


def features(
    backbone: Backbone, state: Mapping[str, Any], x: Any, pool: Callable[[Any], Any] | None = None
) -> list[Any]:
    """The outputs at the taps of a standardized batch [B, 3, H, W]: [B, C, h, w] each.

    Args:
        backbone: a row of BACKBONES.
        state: its weights.
        x: float32.
        pool: in the place of every max pooling.
    """
    functional = need("torch.nn.functional", extra="export")
    found = []
    for index, layer in enumerate(backbone.layers[: backbone.taps[-1] + 1]):
        if isinstance(layer, Conv):
            weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
            x = functional.conv2d(x, weight, bias, stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, Pool):
            x = pool(x) if pool else functional.max_pool2d(x, layer.window, layer.stride)
        else:
            x = functional.relu(x)
        if index in backbone.taps:
            found.append(x)
    return found
