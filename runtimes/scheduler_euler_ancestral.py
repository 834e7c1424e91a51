"""Ancestral sampling with Euler steps: each step goes below the next noise level and noise brings it back up.

The split of the next level into a deterministic and a random part is that of k-diffusion (Crowson), which follows the
posterior variance of DDPM in the variables of Karras et al., arXiv:2206.00364.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.runtimes.scheduler_euler import SigmaSampler, finite_alphas, sigma_table
from intaglio.runtimes.schedulers import Array, Draw, SchedulerConfig, Settings, spaced_timesteps


@dataclass(frozen=True, slots=True, kw_only=True)
class EulerAncestralSettings(Settings):
    """Defaults of diffusers' EulerAncestralDiscreteScheduler."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prediction_type": ("epsilon", "v_prediction")}

    rescale_betas_zero_snr: bool = False


class EulerAncestral(SigmaSampler):
    """One request's ancestral Euler method; see `Scheduler` for the methods and their arrays.

    Raises:
        UsageError: the number of steps is out of range.
        Unsupported: a configured value cannot be honoured (`sample` prediction).
    """

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        s = config.settings(EulerAncestralSettings)
        table = sigma_table(finite_alphas(s, zero_snr=s.rescale_betas_zero_snr))
        timesteps = spaced_timesteps(s, num_inference_steps).astype(np.float32).astype(np.float64)
        super().__init__(s, timesteps, np.append(np.interp(timesteps, np.arange(len(table)), table), 0.0))

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """One step; `draw` is called once, in the last step too, where its noise is multiplied by zero."""
        here, there = self.sigmas[index], self.sigmas[index + 1]
        up = np.sqrt(there**2 * (here**2 - there**2) / here**2)
        # From thousands to below 1 this difference is a rounding error, and may be negative: NaN in diffusers.
        down = np.sqrt(np.maximum(there**2 - up**2, 0))
        moved: Array = self._move(model_output, sample, index, down) + draw() * up
        return moved
