"""DDIM, the deterministic sampler (eta = 0) of Song, Meng and Ermon, arXiv:2010.02502, equation 12."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.schedulers import (
    TO_CLEAN,
    TO_NOISE,
    Array,
    Draw,
    SchedulerConfig,
    Settings,
    alphas_cumprod,
    spaced_timesteps,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DDIMSettings(Settings):
    """Defaults of diffusers' DDIMScheduler."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prediction_type": tuple(TO_CLEAN), "thresholding": (False,)}

    timestep_spacing: str = "leading"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    rescale_betas_zero_snr: bool = False


def alphas_at(bars: Array, timesteps: NDArray[np.int64], prediction_type: str) -> Array:
    """alpha_bar of each timestep, float32 [n].

    Raises:
        Unsupported: a timestep is beyond the training steps, or has no signal left where the model predicts noise:
            x_0 = (x - sigma noise) / alpha then divides by zero, in diffusers too.
    """
    if timesteps.min() < 0 or timesteps.max() >= len(bars):
        message = (
            f"these steps and steps_offset reach timesteps {timesteps.min()} to {timesteps.max()}; the model has "
            f"0 to {len(bars) - 1}: use fewer steps"
        )
        raise Unsupported(message)
    found: Array = bars[timesteps]
    if prediction_type == "epsilon" and found.min() == 0:
        message = "noise prediction has no solution at zero signal: rescale_betas_zero_snr needs v_prediction here"
        raise Unsupported(message)
    return found


def alphas_before(bars: Array, timesteps: NDArray[np.int64], *, final_one: bool) -> Array:
    """alpha_bar of the timesteps stepped to, float32 [n]; a negative one is the end: 1, or the lowest of the table."""
    final = np.float32(1) if final_one else bars[0]
    return np.where(timesteps >= 0, bars[np.maximum(timesteps, 0)], final)


class DDIM:
    """One request's DDIM; see `Scheduler` for the methods and their arrays.

    Raises:
        UsageError: the number of steps is out of range.
        Unsupported: a configured value cannot be honoured, or the first step would divide by zero.
    """

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        self._settings = s = config.settings(DDIMSettings)
        timesteps = spaced_timesteps(s, num_inference_steps).round().astype(np.int64)
        bars = alphas_cumprod(s, zero_snr=s.rescale_betas_zero_snr)
        before = timesteps - s.num_train_timesteps // num_inference_steps
        self._alphas = alphas_at(bars, timesteps, s.prediction_type)
        self._alphas_before = alphas_before(bars, before, final_one=s.set_alpha_to_one)
        self.timesteps: Array = timesteps.astype(np.float32)
        self.init_noise_sigma = 1.0

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """`sample` itself."""
        return sample

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """See `NoiseAdder`."""
        bar = self._alphas[index]
        noised: Array = np.sqrt(bar) * clean + np.sqrt(1 - bar) * noise
        return noised

    def clean(self, model_output: Array, index: int, sample: Array) -> Array:
        """See `CleanEstimator`."""
        s, bar = self._settings, self._alphas[index]
        clean = TO_CLEAN[s.prediction_type](sample, model_output, np.sqrt(bar), np.sqrt(1 - bar))
        return clean.clip(-s.clip_sample_range, s.clip_sample_range) if s.clip_sample else clean

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """One deterministic step; `draw` is not called."""
        bar, bar_before = self._alphas[index], self._alphas_before[index]
        clean = self.clean(model_output, index, sample)
        # The noise is taken from before the clipping, as diffusers does without use_clipped_model_output.
        noise = TO_NOISE[self._settings.prediction_type](sample, model_output, np.sqrt(bar), np.sqrt(1 - bar))
        stepped: Array = np.sqrt(bar_before) * clean + np.sqrt(1 - bar_before) * noise
        return stepped
