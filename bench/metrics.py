"""The metrics of a picture against its reference, as one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.bench import ms_ssim, ssimulacra2
from intaglio.profiles.registry import need, pick, resolve
from intaglio.runtimes.fidelity import WINDOW, pair

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of METRICS.

    Attributes:
        path: ``module:function`` of (picture judged, reference), both uint8 [H, W, 3], giving a float.
        higher_is_better: the direction.
        unit: ``dB``, or empty for a pure number.
        text: what it sees, for the report.
        smallest: shortest side in pixels that it is defined for.
    """

    path: str
    higher_is_better: bool
    unit: str
    text: str
    smallest: int = 1


METRICS = {
    "psnr": Metric(
        path="intaglio.runtimes.fidelity:psnr",
        higher_is_better=True,
        unit="dB",
        text="pixel error; identical is infinite",
    ),
    "ssim": Metric(
        path="intaglio.runtimes.fidelity:ssim",
        higher_is_better=True,
        unit="",
        text="local structure; identical is 1",
        smallest=WINDOW,
    ),
    "ms_ssim": Metric(
        path="intaglio.bench.ms_ssim:ms_ssim",
        higher_is_better=True,
        unit="",
        text="structure at five scales; identical is 1",
        smallest=ms_ssim.SMALLEST,
    ),
    "ssimulacra2": Metric(
        path="intaglio.bench.ssimulacra2:ssimulacra2",
        higher_is_better=True,
        unit="",
        text="visible loss and artifacts at six scales; identical is 100, lossless to the eye 90",
        smallest=ssimulacra2.SMALLEST,
    ),
    "flip": Metric(
        path="intaglio.bench.metrics:flip", higher_is_better=False, unit="", text="visible difference; identical is 0"
    ),
}


def flip_error(image: np.ndarray, reference: np.ndarray, *, magma: bool) -> tuple[np.ndarray, float]:
    """The FLIP error map and its mean in 0..1, at the default 67 pixels per degree.

    The map is float32 [H, W, 3] in 0..1: magma colours with `magma`, else the error itself. Source: Andersson et al.,
    FLIP: A Difference Evaluator for Alternating Images, HPG 2020; NVIDIA's flip-evaluator computes it.

    Raises:
        MissingDependency: flip-evaluator is not installed.
        UsageError: the pictures cannot be compared.
    """
    flip_evaluator = need("flip_evaluator", extra="bench")
    a, b = (np.ascontiguousarray(x / 255, dtype=np.float32) for x in pair(image, reference))
    # parameters is spelled out because the package's default is one dict shared by all calls
    error, mean, _ = flip_evaluator.evaluate(b, a, "LDR", applyMagma=magma, parameters={})
    return np.asarray(error), float(mean)


def flip(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean FLIP, 0 for identical pictures. Errors as `flip_error`."""
    return flip_error(image, reference, magma=False)[1]


def flip_map(image: np.ndarray, reference: np.ndarray) -> Image.Image:
    """The FLIP heat map in magma colours: black where the eye sees no difference. Errors as `flip_error`."""
    from PIL import Image

    error, _ = flip_error(image, reference, magma=True)
    return Image.fromarray(np.rint(np.clip(error, 0, 1) * 255).astype(np.uint8))


def need_metrics() -> None:
    """Import what the metrics need before hours are spent on pictures.

    Raises:
        MissingDependency: with the pip line.
    """
    for package in ("flip_evaluator", "ssimulacra2", "scipy.ndimage"):
        need(package, extra="bench")


def measure(image: np.ndarray, reference: np.ndarray, names: Sequence[str] = tuple(METRICS)) -> dict[str, Any]:
    """Metrics of a picture, by name, ``identical``, and ``reasons``: why a metric is None, by its name.

    JSON has no infinity, so a PSNR of identical pictures is ``None`` and ``identical`` is true; it needs no reason.

    Raises:
        UsageError: an unknown metric, or pictures that cannot be compared.
        MissingDependency: a metric's package is not installed.
    """
    height, width = pair(image, reference)[0].shape[:2]
    identical = bool(np.array_equal(image, reference))
    result: dict[str, Any] = {"identical": identical, "reasons": {}}
    for name in names:
        metric, result[name] = pick(METRICS, name, "metric"), None
        if min(height, width) < metric.smallest:
            result["reasons"][name] = (
                f"needs {metric.smallest}x{metric.smallest} pixels or more, found {width}x{height}"
            )
            continue
        value = float(resolve(metric.path)(image, reference))
        if math.isfinite(value):
            result[name] = value
        elif not identical:
            result["reasons"][name] = f"is {value}"
    return result


def worst(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst value of each metric over the prompts, as `measure` gives them; ``identical`` only if all are.

    A missing PSNR of an identical picture is the best possible, so it counts only if every picture is identical.
    """
    result: dict[str, Any] = {"identical": bool(rows) and all(r["identical"] for r in rows)}
    for name, metric in METRICS.items():
        values = [r[name] for r in rows if r[name] is not None]
        result[name] = (min if metric.higher_is_better else max)(values) if values else None
    latents = [r["latents_relative_l2"] for r in rows if r.get("latents_relative_l2") is not None]
    result["latents_relative_l2"] = max(latents) if latents else None
    return result
