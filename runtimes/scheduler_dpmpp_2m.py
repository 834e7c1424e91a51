"""DPM-Solver++(2M): the second-order multistep solver of Lu et al., arXiv:2211.01095, algorithm 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.scheduler_euler import (
    FINAL_SIGMAS,
    finite_alphas,
    karras_sigmas,
    sigma_table,
    sigma_to_timestep,
)
from intaglio.runtimes.scheduler_flow_match_euler import (
    NO_MU,
    TIME_SHIFTS,
    Sigmas,
    check_levels,
    shift_sigmas,
    time_shift,
)
from intaglio.runtimes.schedulers import TO_CLEAN, Array, Draw, SchedulerConfig, Settings, spaced_timesteps

ToClean = Callable[[Array, Array, np.float32, np.float32], Array]
# `lower_order_final` of diffusers applies below this number of steps.
FEW_STEPS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class MultistepSettings(Settings):
    """What diffusers' DPMSolverMultistepScheduler and UniPCMultistepScheduler have in common."""

    solver_order: int = 2
    thresholding: bool = False
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    # DPM-Solver's signature lacks these two, yet diffusers reads them there too when the file of another has them.
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    # Of the Euler class, which these have no equivalent for: left out by diffusers, refused here.
    invert_sigmas: bool = False
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        flow = self.prediction_type == "flow_prediction"
        if flow != self.use_flow_sigmas:
            message = (
                f"scheduler use_flow_sigmas={self.use_flow_sigmas} does not go with prediction_type="
                f"{self.prediction_type!r}: "
                "a flow needs use_flow_sigmas and prediction_type='flow_prediction', another model neither"
            )
            raise Unsupported(message)
        for key in ("use_karras_sigmas",) if flow else ("use_dynamic_shifting",):
            if getattr(self, key):
                message = f"scheduler {key} is not supported {'with' if flow else 'without'} use_flow_sigmas"
                raise Unsupported(message)


# The clean latents from the output, as `TO_CLEAN`; of a flow it is the velocity.
MULTISTEP_TO_CLEAN: dict[str, ToClean] = {
    **TO_CLEAN,
    "flow_prediction": lambda x, output, alpha, sigma: x - sigma * output,
}
MULTISTEP_ALLOWED: dict[str, tuple[Any, ...]] = {
    "prediction_type": tuple(MULTISTEP_TO_CLEAN),
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "time_shift_type": tuple(TIME_SHIFTS),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "final_sigmas_type": FINAL_SIGMAS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DPMSettings(MultistepSettings):
    """Defaults of diffusers' DPMSolverMultistepScheduler."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **MULTISTEP_ALLOWED,
        "solver_order": (1, 2),
        "time_shift_type": ("exponential",),
        # Values of other solvers (deis; logrho, bh1, bh2) are taken by diffusers for the first of each row.
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
        "use_lu_lambdas": (False,),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    }

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None


@dataclass(frozen=True, slots=True)
class Levels:
    """The noise levels passed through: alpha, sigma and lambda = log(alpha / sigma), each float32 [n + 1]."""

    alpha: Array
    sigma: Array
    lam: Array

    @classmethod
    def of(cls, sigmas: NDArray[np.float64], *, flow: bool) -> Levels:
        """From the ratios sigma / alpha, or of a flow from sigma = 1 - alpha; the last may be zero."""
        given: Array = sigmas.astype(np.float32)
        alpha: Array = np.float32(1) - given if flow else np.reciprocal(np.sqrt(given**2 + 1))
        sigma: Array = given if flow else given * alpha
        with np.errstate(divide="ignore"):  # lambda is infinite where no noise is left, and exp(-lambda) is zero
            return cls(alpha, sigma, np.log(alpha) - np.log(sigma))


def check_distinct(sigmas: NDArray[np.float64]) -> None:
    """Refuse noise levels that repeat: a multistep method divides by the distance between them."""
    single = sigmas.astype(np.float32)
    if (single[1:] >= single[:-1]).any():
        message = (
            "this combination of steps, timestep_spacing, karras sigmas and final_sigmas_type visits a noise level "
            "twice, where a multistep solver divides by zero: use fewer steps or final_sigmas_type='zero'"
        )
        raise Unsupported(message)


def karras_levels(s: MultistepSettings, table: Array, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Timesteps, fractional, and sigmas between the ends of the whole table, both float64 [steps]."""
    low = table[0] if s.sigma_min is None else s.sigma_min
    high = table[-1] if s.sigma_max is None else s.sigma_max
    sigmas = karras_sigmas(float(low), float(high), steps)
    return sigma_to_timestep(sigmas, table), sigmas


def flow_shifted(s: MultistepSettings, sigmas: NDArray[np.float64], mu: float | None) -> NDArray[np.float64]:
    """Flow levels moved by `mu` with ``use_dynamic_shifting``, else by ``flow_shift``; float64 as they came.

    Raises:
        Unsupported: they end outside of 0 to 1.
        ValueError: there is no `mu` and one is needed.
    """
    if not s.use_dynamic_shifting:
        shifted = shift_sigmas(sigmas, s.flow_shift).astype(np.float64)
    elif mu is None:
        raise ValueError(NO_MU)
    else:
        shifted = time_shift(sigmas, mu, s.time_shift_type).astype(np.float64)
    check_levels(shifted)
    return shifted


class DPMpp2M:
    """One request's DPM-Solver++(2M); see `Scheduler` for the methods and their arrays.

    Of a flow it lays out its own levels, for which `sigmas` are not used; `mu` is, as in `FlowMatchEuler`.

    Raises:
        UsageError: the number of steps is out of range.
        Unsupported: a configured value cannot be honoured, or noise levels repeat.
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
        self._settings = s = config.settings(DPMSettings)
        bars = finite_alphas(s, zero_snr=s.rescale_betas_zero_snr)
        table = sigma_table(bars)
        lam = np.log(np.sqrt(bars)) - np.log(np.sqrt(1 - bars))
        top = s.num_train_timesteps - int(np.searchsorted(lam[::-1], np.float32(s.lambda_min_clipped)))
        timesteps = spaced_timesteps(s, num_inference_steps, top=top, drop=1).round()
        levels = np.interp(timesteps, np.arange(len(table)), table)
        if s.use_karras_sigmas:
            timesteps, levels = karras_levels(s, table, num_inference_steps)
            timesteps = np.trunc(timesteps) if s.beta_schedule == "squaredcos_cap_v2" else timesteps.round()
        if s.use_flow_sigmas:
            even = 1 - np.linspace(1, 1 / s.num_train_timesteps, num_inference_steps + 1)
            levels = flow_shifted(s, even[:0:-1], mu)
            timesteps = np.trunc(levels * s.num_train_timesteps)
        check_distinct(levels)
        levels = np.append(levels, table[0] if s.final_sigmas_type == "sigma_min" else 0.0)
        if s.solver_type == "heun" or s.use_flow_sigmas:
            check_distinct(levels)
        self._levels = Levels.of(levels, flow=s.use_flow_sigmas)
        self._previous: Array | None = None
        self.timesteps: Array = timesteps.astype(np.float32)
        self.init_noise_sigma = 1.0

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """`sample` itself."""
        return sample

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """See `NoiseAdder`."""
        noised: Array = self._levels.alpha[index] * clean + self._levels.sigma[index] * noise
        return noised

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """One step; `draw` is not called."""
        v = self._levels
        to_clean = MULTISTEP_TO_CLEAN[self._settings.prediction_type]
        clean = to_clean(sample, model_output, v.alpha[index], v.sigma[index])
        previous, self._previous = self._previous, clean
        h = v.lam[index + 1] - v.lam[index]
        decay = np.exp(-h) - 1
        stepped: Array = v.sigma[index + 1] / v.sigma[index] * sample - v.alpha[index + 1] * decay * clean
        if previous is None or self._first_order(index):
            return stepped
        slope = h / (v.lam[index] - v.lam[index - 1]) * (clean - previous)
        weight = decay / h + 1 if self._settings.solver_type == "heun" else -decay / 2
        corrected: Array = stepped + v.alpha[index + 1] * weight * slope
        return corrected

    def _first_order(self, index: int) -> bool:
        s, n = self._settings, len(self.timesteps)
        at_end = s.euler_at_final or (s.lower_order_final and n < FEW_STEPS) or s.final_sigmas_type == "zero"
        return s.solver_order == 1 or (index == n - 1 and at_end)
