"""Limits on metrics: a metric that is enforced and has no value has failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from intaglio.bench.metrics import METRICS
from intaglio.profiles.registry import pick


def enforce(
    values: Mapping[str, Any], limits: Mapping[str, float], learned: Mapping[str, bool] | None = None
) -> list[str]:
    """What failed, one line each; empty where every limit is kept.

    A PSNR that is None because the pictures are identical is infinite and keeps every limit. Any other None, NaN or
    absent value is a failure, with the reason where `values` has one.

    Args:
        values: as `measure` gives them: numbers or None by name, ``identical``, ``reasons``.
        limits: the worst value allowed, by name of a row of METRICS or of `learned`.
        learned: further metrics: name to whether higher is better.

    Raises:
        UsageError: a limit on an unknown metric.
    """
    directions = {name: metric.higher_is_better for name, metric in METRICS.items()} | dict(learned or {})
    failures = []
    for name, limit in limits.items():
        higher, value = pick(directions, name, "metric"), values.get(name)
        if value is None and name == "psnr" and values.get("identical"):
            value = math.inf
        if value is None or math.isnan(value):
            reason = (values.get("reasons") or {}).get(name) or "it was not measured"
            failures.append(f"{name} has no value ({reason}), allowed: {limit:g} or {'more' if higher else 'less'}")
        elif not (value >= limit if higher else value <= limit):
            failures.append(f"{name} {value:.6g}, allowed: {limit:g} or {'more' if higher else 'less'}")
    return failures
