"""PLMS, the linear multistep form of PNDM: Liu et al., arXiv:2202.09778; the default of Stable Diffusion 1.x.

The Runge-Kutta start of the paper is left out, as in every Stable Diffusion checkpoint (skip_prk_steps): the second
evaluation repeats the first step with the mean of two outputs, so n steps (n > 1) take n + 1 evaluations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.runtimes.scheduler_ddim import alphas_at, alphas_before
from intaglio.runtimes.schedulers import (
    TO_NOISE,
    Array,
    Draw,
    SchedulerConfig,
    Settings,
    alphas_cumprod,
    spaced_timesteps,
)

# Adams-Bashforth weights, newest output first, by the number of outputs known.
WEIGHTS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PNDMSettings(Settings):
    """Defaults of diffusers' PNDMScheduler."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": ("epsilon", "v_prediction"),
        "skip_prk_steps": (True,),
    }

    timestep_spacing: str = "leading"
    set_alpha_to_one: bool = False
    skip_prk_steps: bool = False


class PNDM:
    """One request's PLMS; see `Scheduler` for the methods and their arrays.

    Raises:
        UsageError: the number of steps is out of range.
        Unsupported: a configured value cannot be honoured (`sample` prediction, the Runge-Kutta start).
    """

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        self._settings = s = config.settings(PNDMSettings)
        base = spaced_timesteps(s, num_inference_steps).round().astype(np.int64)
        stride = s.num_train_timesteps // num_inference_steps
        timesteps = np.concatenate([base[:2], base[1:]])
        current, before = timesteps.copy(), timesteps - stride
        # The repeated evaluation redoes the first step, this time from one stride above.
        before[1:2], current[1:2] = timesteps[1:2], timesteps[1:2] + stride
        bars = alphas_cumprod(s)
        self._alphas = alphas_at(bars, current, s.prediction_type)
        self._alphas_before = alphas_before(bars, before, final_one=s.set_alpha_to_one)
        self._outputs: deque[Array] = deque(maxlen=len(WEIGHTS))
        self._first: Array | None = None
        self.timesteps: Array = timesteps.astype(np.float32)
        self.init_noise_sigma = 1.0

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """`sample` itself."""
        return sample

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """One step of the highest order known; `draw` is not called."""
        if index == 1 and self._first is not None:
            model_output, sample = (model_output + self._outputs[0]) * np.float32(0.5), self._first
            self._first = None
        else:
            self._first = sample if index == 0 else None
            self._outputs.appendleft(model_output)
            weights = WEIGHTS[len(self._outputs)]
            model_output = np.sum([w * o for w, o in zip(weights, self._outputs, strict=True)], axis=0)
        return self._transfer(model_output, index, sample)

    def _transfer(self, model_output: Array, index: int, sample: Array) -> Array:
        """Equation 9 of the paper."""
        bar, before = self._alphas[index], self._alphas_before[index]
        noise = TO_NOISE[self._settings.prediction_type](sample, model_output, np.sqrt(bar), np.sqrt(1 - bar))
        scale = bar * np.sqrt(1 - before) + np.sqrt(bar * (1 - bar) * before)
        moved: Array = np.sqrt(before / bar) * sample - (before - bar) * noise / scale
        return moved
