"""Euler's method on the probability-flow equation in sigma: Karras et al., arXiv:2206.00364, algorithm 1, no churn.

Here the latents are x_0 + sigma noise, and the denoiser sees them divided by sqrt(sigma^2 + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from intaglio.runtimes.schedulers import Array, Draw, SchedulerConfig, Settings, alphas_cumprod, spaced_timesteps

# diffusers replaces the zero of a zero-SNR table by this, the smallest half-precision number, so that sigma is finite.
ZERO_SNR_ALPHA = np.float32(2.0**-24)
KARRAS_RHO = 7.0
FINAL_SIGMAS = ("zero", "sigma_min")


@dataclass(frozen=True, slots=True, kw_only=True)
class EulerSettings(Settings):
    """Defaults of diffusers' EulerDiscreteScheduler."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "final_sigmas_type": FINAL_SIGMAS,
    }

    interpolation_type: str = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"


def finite_alphas(s: Settings, *, zero_snr: bool) -> Array:
    """alpha_bar, float32 [num_train_timesteps], none of them zero."""
    bars = alphas_cumprod(s, zero_snr=zero_snr)
    if zero_snr:
        bars[-1] = ZERO_SNR_ALPHA
    return bars


def sigma_table(bars: Array) -> Array:
    """The sigma of each training step, sqrt((1 - alpha_bar) / alpha_bar), float32."""
    table: Array = np.sqrt((1 - bars) / bars)
    return table


def karras_sigmas(low: float, high: float, steps: int) -> NDArray[np.float64]:
    """Descending sigmas, float64 [steps]: equation 5 of arXiv:2206.00364 with rho = 7."""
    first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    spaced: NDArray[np.float64] = (first + np.linspace(0, 1, steps) * (last - first)) ** KARRAS_RHO
    return spaced


def sigma_to_timestep(sigmas: NDArray[np.float64], table: Array) -> NDArray[np.float64]:
    """The fractional training step of each sigma, by interpolating log sigma; float64 [n]."""
    logs = np.log(table)
    wanted = np.log(np.maximum(sigmas, 1e-10))
    # A zero-SNR table need not ascend at its end, so searchsorted would not do: the last entry below counts.
    below = wanted[None, :] >= logs[:, None]
    low = np.where(below.any(axis=0), len(logs) - 1 - below[::-1].argmax(axis=0), 0).clip(max=len(logs) - 2)
    weight = ((logs[low] - wanted) / (logs[low] - logs[low + 1])).clip(0, 1)
    found: NDArray[np.float64] = (1 - weight) * low + weight * (low + 1)
    return found


# The clean latents, given sigma of x = x_0 + sigma noise; the network's own input is scaled by 1 / sqrt(sigma^2 + 1).
SIGMA_TO_CLEAN: dict[str, Callable[[Array, Array, np.float32], Array]] = {
    "epsilon": lambda x, output, sigma: x - sigma * output,
    "v_prediction": lambda x, output, sigma: output * (-sigma / np.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1),
    "sample": lambda x, output, sigma: output,
}


class SigmaSampler:
    """What the Euler methods share: sigmas, float32 [n + 1], the scaling of the input, and the derivative."""

    def __init__(self, s: Settings, timesteps: NDArray[np.float64], sigmas: NDArray[np.float64]) -> None:
        self._prediction_type = s.prediction_type
        self.timesteps: Array = timesteps.astype(np.float32)
        self.sigmas: Array = sigmas.astype(np.float32)
        high = self.sigmas.max()
        # With "leading" the first timestep is not the noisiest, so the latents begin with the signal's variance too.
        self.init_noise_sigma = float(np.sqrt(high**2 + 1) if s.timestep_spacing == "leading" else high)

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """`sample` divided by sqrt(sigma^2 + 1)."""
        scaled: Array = sample / np.sqrt(self.sigmas[index] ** 2 + 1)
        return scaled

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """See `NoiseAdder`."""
        noised: Array = clean + noise * self.sigmas[index]
        return noised

    def clean(self, model_output: Array, index: int, sample: Array) -> Array:
        """See `CleanEstimator`."""
        return SIGMA_TO_CLEAN[self._prediction_type](sample, model_output, self.sigmas[index])

    def _move(self, model_output: Array, sample: Array, index: int, sigma_to: np.float32) -> Array:
        """Follow the derivative at `index` to the noise level `sigma_to`."""
        sigma, clean = self.sigmas[index], self.clean(model_output, index, sample)
        moved: Array = sample + (sample - clean) / sigma * (sigma_to - sigma)
        return moved


class Euler(SigmaSampler):
    """One request's Euler method; see `Scheduler` for the methods and their arrays.

    Raises:
        UsageError: the number of steps is out of range.
        Unsupported: a configured value cannot be honoured.
    """

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        s = config.settings(EulerSettings)
        table = sigma_table(finite_alphas(s, zero_snr=s.rescale_betas_zero_snr))
        # Interpolated at single-precision timesteps, as the reference does; "linspace" ones are fractional.
        timesteps = spaced_timesteps(s, num_inference_steps).astype(np.float32).astype(np.float64)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if s.use_karras_sigmas:
            low = sigmas[-1] if s.sigma_min is None else s.sigma_min
            high = sigmas[0] if s.sigma_max is None else s.sigma_max
            sigmas = karras_sigmas(float(low), float(high), num_inference_steps)
            timesteps = sigma_to_timestep(sigmas, table)
        last = table[0] if s.final_sigmas_type == "sigma_min" else 0.0
        super().__init__(s, timesteps, np.append(sigmas, last))

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """One step to the next sigma; `draw` is not called."""
        return self._move(model_output, sample, index, self.sigmas[index + 1])
