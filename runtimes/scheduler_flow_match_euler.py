"""Euler's method for flow matching: Lipman et al., arXiv:2210.02747; Esser et al. (SD3), arXiv:2403.03206.

The latents are x = (1 - sigma) x_0 + sigma noise, sigma goes from 1 to 0, and the network predicts the velocity
dx/dsigma = noise - x_0. Noise levels are laid out evenly, shifted towards noise for larger pictures, then optionally
stretched and spaced anew, in the order and the precision of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.scheduler_config import CommonSettings
from intaglio.runtimes.scheduler_euler import karras_sigmas
from intaglio.runtimes.schedulers import Array, Draw, SchedulerConfig, check_steps

Sigmas = NDArray[np.floating[Any]]

NO_MU = "use_dynamic_shifting needs mu: the pipeline computes it from the size of the picture"
# Both parameters of the beta distribution of `beta_sigmas`.
BETA_SHAPE = 0.6
# The series of `beta_quantile` is read at x <= 1/2, where its terms at least halve: beyond double precision.
BETA_TERMS = 60
# How far above 1 the single-precision arithmetic of the reference may end.
ROUNDING = 1e-6
# Lines through (sequence length, mu) for 10 and for 200 steps, slope and offset, and the length above which the number
# of steps no longer counts: the FLUX.2 reference, github.com/black-forest-labs/flux2, src/flux2/sampling.py.
MU_AT_10_STEPS = (8.73809524e-05, 1.89833333)
MU_AT_200_STEPS = (0.00016927, 0.45666666)
MU_LONG_SEQUENCE = 4300


def calculate_shift(
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The mu of Stable Diffusion 3.5, FLUX.1 and Qwen-Image: linear in the number of image tokens.

    The line goes through (`base_seq_len`, `base_shift`) and (`max_seq_len`, `max_shift`), the configuration's
    ``base_image_seq_len`` and so on: ``get_lin_function`` of github.com/black-forest-labs/flux, src/flux/sampling.py.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return image_seq_len * slope + (base_shift - slope * base_seq_len)


def line_shift(config: SchedulerConfig, image_tokens: int) -> float:
    """`calculate_shift` on the line that a checkpoint's scheduler configuration draws, or diffusers' where it has none.

    Raises:
        Unsupported: a configured value cannot be honoured.
    """
    s = config.settings(FlowMatchSettings)
    lengths, shifts = (s.base_image_seq_len, s.max_image_seq_len), (s.base_shift, s.max_shift)
    return calculate_shift(image_tokens, *lengths, *shifts)


def empirical_mu(image_seq_len: int, num_steps: int) -> float:
    """The mu of FLUX.2: linear in the number of steps between the two lines fitted for 10 and for 200 steps."""
    at_10, at_200 = (slope * image_seq_len + offset for slope, offset in (MU_AT_10_STEPS, MU_AT_200_STEPS))
    if image_seq_len > MU_LONG_SEQUENCE:
        return at_200
    per_step = (at_200 - at_10) / 190
    return per_step * num_steps + (at_200 - 200 * per_step)


def shift_sigmas(sigmas: Sigmas, shift: float) -> Sigmas:
    """`sigmas` moved towards noise by a factor `shift` in sigma / (1 - sigma): equation 23 of arXiv:2403.03206."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a shift of 0; see `check_levels`
        shifted: Sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return shifted


# `time_shift_type` -> the factor in sigma / (1 - sigma), given mu.
TIME_SHIFTS: dict[str, Callable[[float], float]] = {"exponential": math.exp, "linear": lambda mu: mu}


def time_shift(sigmas: Sigmas, mu: float, kind: str) -> Sigmas:
    """`sigmas` shifted by the factor that `kind`, a key of `TIME_SHIFTS`, makes of `mu`."""
    factor = TIME_SHIFTS[kind](float(mu))
    with np.errstate(divide="ignore", invalid="ignore"):  # a level of 0 stays 0
        shifted: Sigmas = factor / (factor + (1 / sigmas - 1))
    return shifted


def stretch(sigmas: Sigmas, terminal: float) -> Sigmas:
    """`sigmas` stretched about 1 so that the last is `terminal`; as LTX-Video and Qwen-Image do.

    Raises:
        Unsupported: the last level is 1 already, as with a single step: nothing is left to stretch.
    """
    rest = 1 - sigmas
    if rest[-1] == 0:
        message = f"shift_terminal={terminal} needs more than {len(sigmas)} step: the only noise level is pure noise"
        raise Unsupported(message)
    with np.errstate(divide="ignore"):  # a terminal level of 1
        stretched: Sigmas = 1 - rest / (rest[-1] / (1 - terminal))
    return stretched


def beta_quantile(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the beta distribution with both parameters `BETA_SHAPE` has accumulated `p`; float64, any shape.

    Found by bisection of the incomplete beta function, whose series (https://dlmf.nist.gov/8.17.E7 and 15.2.E1) has
    positive terms only, x^a sum_k (1 - b)_k / k! x^k / (a + k). The distribution is symmetric, so that the lower half
    is enough.
    """
    ratio, terms = 1.0, []
    for k in range(BETA_TERMS):
        terms.append(ratio / (BETA_SHAPE + k))
        ratio *= (1 - BETA_SHAPE + k) / (k + 1)
    whole = math.gamma(BETA_SHAPE) ** 2 / math.gamma(2 * BETA_SHAPE)
    wanted = np.minimum(p, 1 - p) * whole
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(BETA_TERMS):
        middle = (low + high) / 2
        above = middle**BETA_SHAPE * np.polyval(terms[::-1], middle) > wanted
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.where(p > 0.5, 1 - low, low)


def exponential_sigmas(low: float, high: float, steps: int) -> NDArray[np.float64]:
    """Descending sigmas evenly spaced in their logarithm, float64 [steps]."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a lowest level of 0; see `check_levels`
        spaced: NDArray[np.float64] = np.exp(np.linspace(np.log(high), np.log(low), steps))
    return spaced


def beta_sigmas(low: float, high: float, steps: int) -> NDArray[np.float64]:
    """Descending sigmas at the quantiles of a beta distribution, dense at both ends: arXiv:2407.12173, float64."""
    return low + beta_quantile(1 - np.linspace(0, 1, steps)) * (high - low)


def check_levels(sigmas: Sigmas) -> None:
    """Refuse, with Unsupported, levels that are not between 0 and 1: negative shifts, logarithms of 0 and the like."""
    if not ((sigmas >= 0) & (sigmas <= 1 + ROUNDING)).all():
        message = (
            f"shift, shift_terminal and mu lead to noise levels from {sigmas.min()} to {sigmas.max()}; "
            "those of a flow are 0 to 1: correct scheduler_config.json"
        )
        raise Unsupported(message)


# Configuration key -> how the levels between the lowest and the highest are spaced anew; at most one may be set.
RESPACED: dict[str, Callable[[float, float, int], NDArray[np.float64]]] = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowMatchSettings(CommonSettings):
    """Defaults of diffusers' FlowMatchEulerDiscreteScheduler; the four after `use_dynamic_shifting` are for its mu."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"time_shift_type": tuple(TIME_SHIFTS)}

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        self.refuse_others(self.ALLOWED)
        chosen = [key for key in RESPACED if getattr(self, key)]
        if len(chosen) > 1:
            message = f"scheduler {' and '.join(chosen)} cannot both be true: they are two spacings of the same levels"
            raise Unsupported(message)


def even_sigmas(s: FlowMatchSettings, steps: int) -> NDArray[np.float64]:
    """The levels to shift where the pipeline gives none: evenly between the ends of the training, float64 [steps].

    With a static shift the ends are shifted already, in single precision, so that the lowest is shifted twice.
    """
    ends: Sigmas = np.array([1, 1 / s.num_train_timesteps], np.float32)
    if not s.use_dynamic_shifting:
        ends = shift_sigmas(ends, s.shift)
    return np.linspace(float(ends[0]), float(ends[1]), steps)


class FlowMatchEuler:
    """One request's Euler method; see `Scheduler` for the methods and their arrays.

    `timesteps` is float32 [n] in training steps (0 to 1000), `sigmas` float32 [n + 1] with the level reached at the
    end, `init_noise_sigma` 1.

    Args:
        config: the checkpoint's.
        num_inference_steps: how many levels.
        sigmas: the levels before shifting; evenly spaced ones where not given.
        mu: see `TIME_SHIFTS`; read with ``use_dynamic_shifting`` only, as FLUX.1-schnell is given one without.

    Raises:
        UsageError: the number of steps is out of range.
        Unsupported: a configured value cannot be honoured, or leads to levels outside of 0 to 1.
        ValueError: ``use_dynamic_shifting`` without `mu`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        num_inference_steps: int,
        *,
        sigmas: Sigmas | None = None,
        mu: float | None = None,
    ) -> None:
        self._settings = s = config.settings(FlowMatchSettings)
        check_steps(num_inference_steps, s.num_train_timesteps)
        given: Sigmas = even_sigmas(s, num_inference_steps) if sigmas is None else np.asarray(sigmas, np.float32)
        levels = self._laid_out(given, mu).astype(np.float32)
        check_levels(levels)
        if s.invert_sigmas:
            levels = np.float32(1) - levels
        self.timesteps: Array = levels * np.float32(s.num_train_timesteps)
        self.sigmas: Array = np.append(levels, np.float32(s.invert_sigmas))
        self.init_noise_sigma = 1.0

    def _laid_out(self, sigmas: Sigmas, mu: float | None) -> Sigmas:
        """`sigmas` shifted, stretched and spaced anew."""
        s = self._settings
        if not s.use_dynamic_shifting:
            sigmas = shift_sigmas(sigmas, s.shift)
        elif mu is None:
            raise ValueError(NO_MU)
        else:
            sigmas = time_shift(sigmas, mu, s.time_shift_type)
        if s.shift_terminal:
            sigmas = stretch(sigmas, s.shift_terminal)
        for key, space in RESPACED.items():
            if getattr(s, key):
                sigmas = space(float(sigmas[-1]), float(sigmas[0]), len(sigmas))
        return sigmas

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """`sample` itself."""
        return sample

    def clean(self, model_output: Array, index: int, sample: Array) -> Array:
        """See `CleanEstimator`: along the velocity to the last level."""
        sample, velocity = sample.astype(np.float32, copy=False), model_output.astype(np.float32, copy=False)
        moved: Array = sample + (self.sigmas[-1] - self.sigmas[index]) * velocity
        return moved

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """Along the velocity to the next level; with ``stochastic_sampling`` to the clean latents and noised again."""
        sample, velocity = sample.astype(np.float32, copy=False), model_output.astype(np.float32, copy=False)
        here, after = self.sigmas[index], self.sigmas[index + 1]
        if not self._settings.stochastic_sampling:
            moved: Array = sample + (after - here) * velocity
            return moved
        clean = sample - here * velocity
        noised: Array = (np.float32(1) - after) * clean + after * draw()
        return noised
