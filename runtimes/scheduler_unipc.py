"""UniPC: the predictor-corrector of Zhao et al., arXiv:2302.04867, algorithms 5 to 8, in its B(h) forms."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.scheduler_dpmpp_2m import (
    MULTISTEP_ALLOWED,
    MULTISTEP_TO_CLEAN,
    Levels,
    MultistepSettings,
    check_distinct,
    flow_shifted,
    karras_levels,
)
from intaglio.runtimes.scheduler_euler import finite_alphas, sigma_table
from intaglio.runtimes.scheduler_flow_match_euler import Sigmas, check_levels, stretch
from intaglio.runtimes.schedulers import TO_NOISE, Array, Draw, SchedulerConfig, spaced_timesteps

# The first level of a flow is kept this far below 1, where lambda would be infinite.
FLOW_TOP_MARGIN = 1e-6
# B(h) by solver_type; the last three are DPM-Solver's values, which diffusers takes for bh2.
B_OF_H: dict[str, Callable[[np.float32], np.float32]] = {
    "bh1": lambda h: h,
    "bh2": np.expm1,
    "midpoint": np.expm1,
    "heun": np.expm1,
    "logrho": np.expm1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UniPCSettings(MultistepSettings):
    """Defaults of diffusers' UniPCMultistepScheduler."""

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **MULTISTEP_ALLOWED,
        "solver_order": (1, 2, 3),
        "solver_type": tuple(B_OF_H),
        "solver_p": (None,),
    }

    solver_type: str = "bh2"
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        MultistepSettings.__post_init__(self)
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            message = f"scheduler shift_terminal={self.shift_terminal} is not supported without use_flow_sigmas"
            raise Unsupported(message)


def flow_levels(s: UniPCSettings, steps: int, mu: float | None) -> NDArray[np.float64]:
    """The descending sigmas of a flow, float64 [steps]."""
    sigmas = flow_shifted(s, np.linspace(1, 1 / s.num_train_timesteps, steps + 1)[:-1], mu)
    if s.shift_terminal:
        sigmas = stretch(sigmas, s.shift_terminal).astype(np.float64)
        check_levels(sigmas)
    if abs(sigmas[0] - 1) < FLOW_TOP_MARGIN:
        sigmas[0] -= FLOW_TOP_MARGIN
    return sigmas


class UniPC:
    """One request's UniPC; see `Scheduler` for the methods and their arrays.

    Of a flow it lays out its own levels, for which `sigmas` are not used; `mu` is, as in `FlowMatchEuler`.

    Raises:
        UsageError: the number of steps is out of range.
        Unsupported: a configured value cannot be honoured, noise levels repeat, or the last step has no limit.
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
        self._settings = s = config.settings(UniPCSettings)
        if not s.predict_x0 and s.final_sigmas_type == "zero":
            message = "UniPC with predict_x0=false has no last step to zero noise: set final_sigmas_type='sigma_min'"
            raise Unsupported(message)
        table = sigma_table(finite_alphas(s, zero_snr=s.rescale_betas_zero_snr))
        timesteps = spaced_timesteps(s, num_inference_steps, drop=1).round()
        levels, last = np.interp(timesteps, np.arange(len(table)), table), np.float64(table[0])
        if s.use_karras_sigmas:
            timesteps, levels = karras_levels(s, table, num_inference_steps)
            timesteps, last = timesteps.round(), levels[-1]
        if s.use_flow_sigmas:
            levels = flow_levels(s, num_inference_steps, mu)
            timesteps, last = np.trunc(levels * s.num_train_timesteps), levels[-1]
        levels = np.append(levels, last if s.final_sigmas_type == "sigma_min" else 0.0)
        check_distinct(levels)
        self._levels = Levels.of(levels, flow=s.use_flow_sigmas)
        self._outputs: deque[Array] = deque(maxlen=s.solver_order)  # newest first
        self._corrected: Array | None = None
        self._order = 0
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
        """Correct the sample that the last step predicted, then predict the next; `draw` is not called."""
        s, v = self._settings, self._levels
        convert = MULTISTEP_TO_CLEAN if s.predict_x0 else TO_NOISE
        output = convert[s.prediction_type](sample, model_output, v.alpha[index], v.sigma[index])
        if self._corrected is not None and index - 1 not in s.disable_corrector:
            sample = self._update(index - 1, self._corrected, self._order, output)
        self._outputs.appendleft(output)
        left = len(self.timesteps) - index
        self._order = min(s.solver_order, left if s.lower_order_final else s.solver_order, len(self._outputs))
        self._corrected = sample
        return self._update(index, sample, self._order, None)

    def _update(self, start: int, sample: Array, order: int, reached: Array | None) -> Array:
        """From level `start` to the next: the predictor, or the corrector where the output `reached` there is known."""
        v, newest = self._levels, self._outputs[0]
        if v.sigma[start + 1] == 0:
            # The limit of every order and of either B(h); evaluating it would multiply infinity by zero.
            return newest
        gap = v.lam[start + 1] - v.lam[start]
        ratios = [(v.lam[start - i] - v.lam[start]) / gap for i in range(1, order)]
        slopes = [(self._outputs[i] - newest) / ratio for i, ratio in enumerate(ratios, 1)]
        if reached is not None:
            slopes.append(reached - newest)
        h = -gap if self._settings.predict_x0 else gap
        along, scale = (v.sigma, v.alpha) if self._settings.predict_x0 else (v.alpha, v.sigma)
        moved: Array = along[start + 1] / along[start] * sample - scale[start + 1] * np.expm1(h) * newest
        if not slopes:
            return moved
        weights = self._weights(np.array([*ratios, 1.0], np.float32), h, len(slopes))
        step = scale[start + 1] * B_OF_H[self._settings.solver_type](h)
        for weight, slope in zip(weights, slopes, strict=True):
            moved = moved - step * weight * slope
        return moved

    def _weights(self, ratios: Array, h: np.float32, count: int) -> Array:
        """Coefficients of the differences, float32 [count]: equation 11, in closed form for a single difference."""
        if count == 1:
            return np.array([0.5], np.float32)
        b, phi = [], np.expm1(h) / h - 1
        for i in range(1, count + 1):
            b.append(phi * math.factorial(i) / B_OF_H[self._settings.solver_type](h))
            phi = phi / h - np.float32(1 / math.factorial(i + 1))
        powers = np.stack([ratios[:count] ** i for i in range(count)])
        weights: Array = np.linalg.solve(powers, np.array(b, np.float32))
        return weights
