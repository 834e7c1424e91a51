"""Multistep consistency sampling for latent consistency models: Luo et al., arXiv:2310.04378, algorithm 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.scheduler_ddim import alphas_at
from intaglio.runtimes.schedulers import (
    TO_CLEAN,
    Array,
    Draw,
    SchedulerConfig,
    Settings,
    alphas_cumprod,
    check_steps,
)

# Standard deviation of the data in the boundary condition, section 3 of the paper.
SIGMA_DATA = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LCMSettings(Settings):
    """Defaults of diffusers' LCMScheduler, which are those of Stable Diffusion and unlike the other classes'."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prediction_type": tuple(TO_CLEAN), "thresholding": (False,)}

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    timestep_spacing: str = "leading"
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False


class LCM:
    """One request's LCM sampler; see `Scheduler` for the methods and their arrays.

    The timesteps come from the distillation's own schedule: `timestep_spacing` and `steps_offset` play no part.

    Raises:
        UsageError: more steps than the model was distilled with (`original_inference_steps`), or fewer than one.
        Unsupported: a configured value cannot be honoured, or the first step would divide by zero.
    """

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        self._settings = s = config.settings(LCMSettings)
        original = s.original_inference_steps
        if not 1 <= original <= s.num_train_timesteps:
            message = f"original_inference_steps={original} must be from 1 to {s.num_train_timesteps}"
            raise Unsupported(message)
        check_steps(num_inference_steps, original)
        distilled = np.arange(original, 0, -1) * (s.num_train_timesteps // original) - 1
        chosen = np.floor(np.linspace(0, original, num_inference_steps, endpoint=False)).astype(np.int64)
        timesteps = distilled[chosen]
        bars = alphas_cumprod(s, zero_snr=s.rescale_betas_zero_snr)
        self._alphas = alphas_at(bars, timesteps, s.prediction_type)
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
        """See `CleanEstimator`; with the boundary condition of arXiv:2310.04378, section 3."""
        s, bar = self._settings, self._alphas[index]
        clean = TO_CLEAN[s.prediction_type](sample, model_output, np.sqrt(bar), np.sqrt(1 - bar))
        if s.clip_sample:
            clean = clean.clip(-s.clip_sample_range, s.clip_sample_range)
        scaled = self.timesteps[index] * np.float32(s.timestep_scaling)
        total = scaled**2 + SIGMA_DATA**2
        denoised: Array = scaled / np.sqrt(total) * clean + SIGMA_DATA**2 / total * sample
        return denoised

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """Jump to the clean latents, then noise them for the next timestep: `draw` is called but for the last."""
        denoised = self.clean(model_output, index, sample)
        if index == len(self.timesteps) - 1:
            return denoised
        after = self._alphas[index + 1]
        noised: Array = np.sqrt(after) * denoised + np.sqrt(1 - after) * draw()
        return noised
