"""One case's pictures against another's, from the same noise, and whether its formats allow the differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.bench.enforce import enforce
from intaglio.bench.metrics import flip_map, measure, worst
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.certificate import Allowed, allowed, load_rules
from intaglio.profiles.errors import UsageError
from intaglio.runtimes.certificate import TARGETS, allowed_on
from intaglio.runtimes.fidelity import relative_l2

if TYPE_CHECKING:
    from intaglio.bench.learned import LearnedMetric

LOOP = 1e-6  # relative L2 of what a loop feeds its components, given the reference's answers; measured 0.0
DIGITS = 6
Row = dict[str, Any]


def rounded(value: float | None) -> float | None:
    """A figure as the report carries it; None where it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def against(
    images: Sequence[str],
    reference: Sequence[str],
    folder: Path,
    prompts: Sequence[str] = (),
    learned: Mapping[str, LearnedMetric] | None = None,
) -> Row:
    """Pictures judged against the reference's, prompt by prompt.

    Args:
        images: paths under `folder`, in the order of the prompts; the latents of every step lie beside each as
            ``.npy`` [steps, pictures, C, h, w].
        reference: likewise.
        folder: of the run.
        prompts: their texts, for learned metrics that read them.
        learned: further metrics (`intaglio.bench.learned`), by key.

    Returns:
        ``prompts``: metrics and ``latents_relative_l2`` of each; ``worst`` of them; ``drift``: relative L2 of the
        latents after each step, of the first prompt; ``reason``: empty, or why there is nothing to say.
    """
    found: Row = {"prompts": [], "worst": None, "drift": [], "reason": ""}
    if not images or len(images) != len(reference):
        found["reason"] = "there is no picture to compare"
        return found
    for index, (mine, theirs) in enumerate(zip(images, reference, strict=True)):
        paths = [folder / mine, folder / theirs]
        try:
            image, truth = (read_picture(p) for p in paths)
            row = measure(image, truth)
            row |= learned_values(learned or {}, image, truth, prompts[index] if prompts else None)
            latents = [np.load(p.with_suffix(".npy"), allow_pickle=False) for p in paths]
            row["latents_relative_l2"] = rounded(relative_l2(*(steps[-1] for steps in latents)))
            if index == 0 and len(latents[0]) == len(latents[1]):
                found["drift"] = [rounded(relative_l2(a, b)) for a, b in zip(*latents, strict=True)]
        except UsageError as problem:
            found.update(prompts=[], drift=[], reason=str(problem))
            return found
        found["prompts"].append({k: rounded(v) if isinstance(v, float) else v for k, v in row.items()})
    found["worst"] = worst_of(found["prompts"], learned or {})
    for key, metric in (learned or {}).items():
        if metric.of_sets:
            sides = [[read_picture(folder / name) for name in side] for side in (images, reference)]
            try:
                found["worst"][key] = rounded(metric.measure_sets(*sides))
            except UsageError as problem:
                found["worst"][key], found["worst"]["reasons"][key] = None, str(problem)
    return found


def learned_values(
    learned: Mapping[str, LearnedMetric], image: np.ndarray, reference: np.ndarray, prompt: str | None
) -> Row:
    """The learned metrics of one pair, by key."""
    pairs = {key: metric for key, metric in learned.items() if not metric.of_sets}
    return {k: m.measure(image, reference, prompt if m.needs_prompt else None) for k, m in pairs.items()}


def worst_of(rows: Sequence[Row], learned: Mapping[str, LearnedMetric]) -> Row:
    """The worst value of each metric over the prompts, and the reasons of those that have none."""
    found = worst(rows)
    for key, metric in learned.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        found[key] = (min if metric.higher_is_better else max)(values) if values else None
    found["reasons"] = {name: reason for row in rows for name, reason in row["reasons"].items()}
    return found


def heat_map(mine: str, reference: str, folder: Path) -> str:
    """Write the FLIP map of a picture beside it; its path under `folder`."""
    path = mine.replace(".png", ".flip.png")
    if not (folder / path).exists():
        flip_map(*(read_picture(folder / p) for p in (mine, reference))).save(folder / path)
    return path


def limits_of(artifact: Artifact, backend: str) -> Allowed | None:
    """What the artifact's formats allow on a backend, the rules of its certificate; None for a fake or foreign one."""
    components = tuple(artifact.manifest.components)
    if not components or backend not in (*TARGETS, "torch"):
        return None
    if backend == "torch":  # in float32, on the decoded weights
        return allowed(load_rules(), artifact.manifest, components, {})
    return allowed_on(load_rules(), artifact, backend, components)


def verdict(
    row: Row, limits: Allowed | None, chosen: Mapping[str, float], learned: Mapping[str, bool] | None = None
) -> Row:
    """Whether a measured row is within its limits.

    Args:
        row: with ``worst``, ``components``, ``loop``.
        limits: of its formats.
        chosen: limits the user gave instead, by metric; one without a value is exceeded.
        learned: further metrics: key to whether higher is better.

    Returns:
        ``passed`` (None where nothing could be judged) and ``exceeded``: a sentence each.
    """
    figures = row.get("worst") or {}
    own = {"psnr": limits.psnr, "ssim": limits.ssim} if limits else {}
    # a picture too small for a metric is not at fault; a limit that the user gave wants its value
    known = {n: v for n, v in own.items() if figures.get(n) is not None or figures.get("identical")}
    wanted = {**known, **chosen} if figures else dict(chosen)
    exceeded = enforce(figures, wanted, learned)
    judged = len(wanted)
    for call in row.get("components") or ():
        most = limits.components.get(call["component"]) if limits else None
        if call["reason"]:
            exceeded.append(call["reason"])
        elif most is not None and call["relative_l2"] is not None:
            judged += 1
            if call["relative_l2"] > most:
                at = f"{call['component']} at step {call['step']}"
                exceeded.append(f"{at} differs by {call['relative_l2']:.2e}, allowed {most:g}")
    loop = row.get("loop")
    if loop:
        judged += 1
        exceeded += loop_faults(loop)
    return {"passed": not exceeded if judged or exceeded else None, "exceeded": exceeded}


def loop_faults(loop: Mapping[str, Any]) -> list[str]:
    """What a loop did otherwise than the reference's, on the reference's answers."""
    if loop["strayed"]:
        return [f"the loop went another way: {loop['strayed']}"]
    found = []
    if loop["inputs"] is None or loop["inputs"] > LOOP:
        size = "NaN or infinity" if loop["inputs"] is None else f"{loop['inputs']:.2e}"
        found.append(f"the loop feeds {loop['where']} something else: {size}, allowed {LOOP:g}")
    if loop["pixels"]:
        found.append(f"the same decoded latents become another picture, by up to {loop['pixels']}/255")
    return found
