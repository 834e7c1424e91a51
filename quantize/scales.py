"""From statistics to scales: smoothing, AWQ factors and static ranges for the inputs of a graph's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.quantize import awq, smoothquant
from intaglio.quantize.formats import FORMATS, codec
from intaglio.quantize.layers import Choice, Layer
from intaglio.quantize.ranges import activation_scale
from intaglio.quantize.statistics import InputStatistics, Statistics
from intaglio.quantize.weight import BadWeight, InputScales

LEVELS = {"INT8": 127, "FLOAT8E4M3FN": 448}


def needs_statistics(recipe: ComponentRecipe, choices: Mapping[str, Choice]) -> tuple[str, ...]:
    """Parameters whose inputs must be watched: static formats, AWQ's 4-bit ones, those with a low-rank branch."""

    def needs(name: str) -> bool:
        row = FORMATS[name]
        four = row.codec is not None and row.bits < FORMATS["int8"].bits
        return (
            row.static
            or (four and recipe.method == "awq")
            or (recipe.rank > 0 and row.codec is not None and row.low_rank)
        )

    return tuple(parameter for parameter, choice in choices.items() if needs(choice.format))


def input_scales(
    layers: Sequence[Layer],
    choices: Mapping[str, Choice],
    statistics: Statistics,
    recipe: ComponentRecipe,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, InputScales]:
    """The scales of every watched layer; layers that share an input and a kind of format share them.

    Deterministic: the same statistics give the same bits.
    """
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        if layer.parameter in statistics.tensor:
            row = FORMATS[choices[layer.parameter].format]
            kind = row.activations or row.storage
            groups.setdefault((statistics.tensor[layer.parameter], f"{kind} {layer.op}"), []).append(layer)
    found: dict[str, InputScales] = {}
    for (tensor, _), members in groups.items():
        note(members[0].parameter)
        name = choices[members[0].parameter].format
        made = _group(members, name, statistics.inputs[tensor], recipe)
        found.update(dict.fromkeys((layer.parameter for layer in members), made))
    return found


def _group(members: Sequence[Layer], name: str, met: InputStatistics, recipe: ComponentRecipe) -> InputScales:
    row, samples = FORMATS[name], met.samples
    try:
        factor = _smoothing(members, name, met, recipe) if smoothed(members[0]) else None
    except UsageError:
        raise
    except ValueError as error:  # a codec met NaN or infinity
        raise BadWeight(members[0].parameter, str(error)) from error
    peak, square = met.peak, met.mean_square
    if factor is not None:
        peak, samples, square = peak / factor, samples / factor, square / factor**2
    scale = None
    if row.static:
        scale = activation_scale(samples, peak, method=recipe.range, levels=LEVELS[row.activations])
    return InputScales(smooth=factor, activation=scale, importance=square)


def _smoothing(members: Sequence[Layer], name: str, met: InputStatistics, recipe: ComponentRecipe) -> np.ndarray | None:
    """What the weights' rows are multiplied with; ``None`` where nothing is gained.

    SmoothQuant is for int8 activations: fp8's step grows with the value, so that outliers cost little there. A
    convolution is as many products as its kernel has taps, and its input channels are scaled in the same way.
    """
    row = FORMATS[name]
    if row.activations == "INT8" and recipe.smoothquant != 0:
        weights = [by_inputs(layer.read()) for layer in members]
        alpha: float | None = recipe.smoothquant
        if recipe.smoothquant < 0:
            alpha, _, _ = smoothquant.best_alpha(met.samples, met.peak, weights, method=recipe.range)
        return None if alpha is None else smoothquant.smoothing(met.peak, smoothquant.weight_peaks(weights), alpha)
    if recipe.method == "awq" and not row.static and members[0].op == "MatMul":
        factor, before, after = awq.search([layer.read() for layer in members], met.samples, codec(name, "mse"))
        return factor if after < before else None
    return None


def smoothed(layer: Layer) -> bool:
    """Whether the input channels of a layer can be scaled: they are those of its weight, which grouped ones are not."""
    return layer.op == "MatMul" or (layer.op == "Conv" and layer.node.attributes.get_int("group", 1) == 1)


def by_inputs(weight: np.ndarray) -> np.ndarray:
    """A weight [K, N] as it is, one of a convolution [M, C, kh, kw] as [C, M * kh * kw]."""
    return weight if weight.ndim == 2 else np.ascontiguousarray(weight.swapaxes(0, 1).reshape(weight.shape[1], -1))
