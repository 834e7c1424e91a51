"""The ``null`` engine: right shapes and dtypes, cheap deterministic numbers. For tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.spec import split_axis
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers


class NullEngine:
    """Outputs are smooth functions of the feeds' means, different along every axis."""

    def __init__(self, artifact: Artifact, component: str, options: EngineOptions) -> None:
        refuse_leftovers("null", options.settings, ())
        self.record = artifact.manifest.components[component]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        arrays = check_feeds(self.record, feeds)
        axes: dict[str, int] = {}
        for spec in self.record.inputs:
            for size, dim in zip(arrays[spec.name].shape, spec.shape, strict=True):
                if isinstance(dim, str):
                    axis, divisor = split_axis(dim)
                    axes.setdefault(axis, size * divisor)
        outputs = {}
        batched = [arrays[s.name] for s in self.record.inputs if s.shape[0] == "batch"]
        for spec in self.record.outputs:
            shape = spec.sizes(axes)
            rows = [sum(float(np.mean(a[k])) for a in batched) for k in range(shape[0])]
            ramp = np.cos(np.arange(int(np.prod(shape[1:])), dtype=np.float64)).reshape(shape[1:])
            outputs[spec.name] = np.stack([np.sin(row + ramp) for row in rows]).astype(spec.dtype)
        return outputs

    def memory(self) -> dict[str, int | None]:
        """Nothing is held."""
        return {"weight_bytes": 0}

    def close(self) -> None:
        """Nothing to give back."""
