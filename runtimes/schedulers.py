"""The table of schedulers, how one is made, and the noise-schedule arithmetic they are built from.

A scheduler belongs to one request: it is made for a number of steps, keeps what its method remembers between steps,
and is thrown away. Everything is NumPy. Single precision is used, operation by operation, wherever diffusers uses it:
1 - alpha_bar at small t cancels four digits, so a double-precision table would be better and yet differ from the one
that the checkpoint's reference pictures were made with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from intaglio.profiles.errors import ArtifactError, Unsupported, UsageError
from intaglio.profiles.registry import pick, resolve
from intaglio.runtimes.scheduler_config import CommonSettings
from intaglio.runtimes.scheduler_config import SchedulerConfig as SchedulerConfig

Array = NDArray[np.float32]
Draw = Callable[[], Array]

# Command-line name -> "module:Class".
SCHEDULERS: dict[str, str] = {
    "ddim": "intaglio.runtimes.scheduler_ddim:DDIM",
    "pndm": "intaglio.runtimes.scheduler_pndm:PNDM",
    "euler": "intaglio.runtimes.scheduler_euler:Euler",
    "euler_a": "intaglio.runtimes.scheduler_euler_ancestral:EulerAncestral",
    "dpmpp_2m": "intaglio.runtimes.scheduler_dpmpp_2m:DPMpp2M",
    "dpmpp_2m_karras": "intaglio.runtimes.scheduler_dpmpp_2m:DPMpp2M",
    "unipc": "intaglio.runtimes.scheduler_unipc:UniPC",
    "lcm": "intaglio.runtimes.scheduler_lcm:LCM",
    "flow_match_euler": "intaglio.runtimes.scheduler_flow_match_euler:FlowMatchEuler",
}
# `SchedulerConfig.process` of the checkpoint -> the schedulers that sample it.
PROCESSES: dict[str, tuple[str, ...]] = {
    "diffusion": tuple(name for name in SCHEDULERS if name != "flow_match_euler"),
    "flow": ("flow_match_euler", "dpmpp_2m", "unipc"),
}
# Names that are another scheduler with some of its configuration set.
PRESETS: dict[str, dict[str, Any]] = {"dpmpp_2m_karras": {"use_karras_sigmas": True}}
# `_class_name` of a checkpoint's scheduler_config.json -> our name: the default scheduler of that checkpoint.
DIFFUSERS_CLASSES: dict[str, str] = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler",
}


class Scheduler(Protocol):
    """What a sampling loop needs. The latents are float32, of any shape."""

    #: float32 [n]: what is fed to the denoiser at each evaluation; n may exceed the number of steps asked for.
    timesteps: Array
    #: Standard deviation of the starting latents: multiply standard normal noise by it.
    init_noise_sigma: float

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """The latents as the denoiser wants them at evaluation `index`."""

    def step(self, model_output: Array, index: int, sample: Array, draw: Draw) -> Array:
        """The latents after evaluation `index`; indices are given in order from 0.

        Args:
            model_output: what the denoiser returned, guidance included; same shape as `sample`.
            index: position in `timesteps`.
            sample: the latents before `scale_model_input`.
            draw: gives the next standard normal noise of the shape of `sample`; called only by the methods that
                add noise, exactly when diffusers would draw.
        """


@runtime_checkable
class NoiseAdder(Protocol):
    """A scheduler that can start from clean latents, at any evaluation; further ones begin without a past."""

    def add_noise(self, clean: Array, noise: Array, index: int) -> Array:
        """`clean` with standard normal `noise` as it would be before evaluation `index`; float32 of their shape."""


@runtime_checkable
class CleanEstimator(Protocol):
    """A scheduler that says what it takes the clean latents for, for previews."""

    def clean(self, model_output: Array, index: int, sample: Array) -> Array:
        """The clean latents as seen from evaluation `index`; arguments as for `Scheduler.step`, nothing is changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(CommonSettings):
    """What the schedulers of diffusion models share: the noise schedule of the training, and the spacing of steps."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        self.refuse_others({"beta_schedule": tuple(BETAS), "timestep_spacing": tuple(SPACINGS), **self.ALLOWED})
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            message = f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} training steps"
            raise ArtifactError(message)


def make_scheduler(
    name: str | None,
    config: SchedulerConfig,
    num_inference_steps: int,
    *,
    sigmas: NDArray[np.floating[Any]] | None = None,
    mu: float | None = None,
) -> Scheduler:
    """A new scheduler for one request.

    Args:
        name: a key of `SCHEDULERS`, or None for the checkpoint's own.
        config: the checkpoint's configuration.
        num_inference_steps: from 1 to the number of training steps (`original_inference_steps` for LCM).
        sigmas: noise levels before shifting, descending, float [num_inference_steps]; for flow checkpoints only, and
            used by ``flow_match_euler`` alone: multistep solvers lay out their own, as in diffusers' FLUX pipelines.
        mu: how far to shift the noise levels; for flow checkpoints only, and used where their configuration says
            ``use_dynamic_shifting``.

    Raises:
        UsageError: the name is unknown or the number of steps is out of range.
        Unsupported: the configuration cannot be honoured by this scheduler, or has no finite result with it.
        TypeError: `sigmas` or `mu` for a checkpoint that is not a flow.
        ValueError: `sigmas` of another length than the steps, or no `mu` where it is needed.
    """
    chosen = name if name is not None else default_name(config)
    factory = resolve(pick(SCHEDULERS, chosen, "scheduler"))
    fitting = PROCESSES[config.process]
    if chosen not in fitting:
        message = (
            f"scheduler {chosen!r} cannot sample this {config.process} checkpoint ({config.class_name}, "
            f"prediction_type={config.values.get('prediction_type')}); those that can: {', '.join(fitting)}"
        )
        raise Unsupported(message)
    if sigmas is not None and len(sigmas) != num_inference_steps:
        message = f"{len(sigmas)} sigmas for {num_inference_steps} steps"
        raise ValueError(message)
    if config.process == "flow":
        made: Scheduler = factory(config.as_flow(), num_inference_steps, sigmas=sigmas, mu=mu)
        return made
    if sigmas is not None or mu is not None:
        message = f"scheduler {chosen!r} takes neither sigmas nor mu"
        raise TypeError(message)
    plain: Scheduler = factory(config.replace(**PRESETS.get(chosen, {})), num_inference_steps)
    return plain


def default_name(config: SchedulerConfig) -> str:
    """Our name of the scheduler that the checkpoint was saved with.

    Raises:
        Unsupported: there is no equivalent here.
    """
    if config.class_name in DIFFUSERS_CLASSES:
        return DIFFUSERS_CLASSES[config.class_name]
    fitting = ", ".join(PROCESSES[config.process])
    message = f"the checkpoint's scheduler {config.class_name} is not supported; choose one of {fitting}"
    raise Unsupported(message)


def check_steps(steps: int, limit: int) -> None:
    """Refuse a number of steps outside of 1 to `limit` with a UsageError."""
    if not 1 <= steps <= limit:
        message = f"{steps} steps asked for; allowed: 1 to {limit}"
        raise UsageError(message)


def linspace32(start: float, end: float, count: int) -> Array:
    """torch.linspace in single precision: from both ends towards the middle, one rounding per value."""
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    # Products of two 24-bit numbers are exact in double precision: this is the fused multiply-add of torch's kernel.
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count, dtype=np.float64)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


def _cosine_betas(s: Settings) -> Array:
    """Nichol and Dhariwal, arXiv:2102.09672, section 3.2, betas capped at 0.999."""

    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    n = s.num_train_timesteps
    return np.array([min(1 - bar((i + 1) / n) / bar(i / n), 0.999) for i in range(n)], np.float32)


BETAS: dict[str, Callable[[Settings], Array]] = {
    "linear": lambda s: linspace32(s.beta_start, s.beta_end, s.num_train_timesteps),
    "scaled_linear": lambda s: np.square(linspace32(s.beta_start**0.5, s.beta_end**0.5, s.num_train_timesteps)),
    "squaredcos_cap_v2": _cosine_betas,
}


def _cumulative(alphas: Array) -> Array:
    # torch accumulates products of single-precision numbers in double precision.
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def alphas_cumprod(s: Settings, *, zero_snr: bool = False) -> Array:
    """alpha_bar, float32 [num_train_timesteps]; with `zero_snr` rescaled by algorithm 1 of arXiv:2305.08891."""
    betas = BETAS[s.beta_schedule](s) if s.trained_betas is None else np.array(s.trained_betas, np.float32)
    bars = _cumulative(np.float32(1) - betas)
    if not zero_snr:
        return bars
    root = np.sqrt(bars)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bars = np.square(root)
    # Through betas and back, as the reference does: the round trip changes the last digit of 1 - alpha_bar.
    betas = np.float32(1) - np.concatenate([bars[:1], bars[1:] / bars[:-1]])
    return _cumulative(np.float32(1) - betas)


# (first timestep + 1, training steps, points, points left out at the low end) -> descending float64 [points].
SPACINGS: dict[str, Callable[[int, int, int, int], NDArray[np.float64]]] = {
    "linspace": lambda top, train, n, drop: np.linspace(0, top - 1, n + drop)[::-1][:n],
    "leading": lambda top, train, n, drop: (np.arange(n + drop) * (top // (n + drop)))[::-1][:n].astype(np.float64),
    # At 61 steps and some other counts arange overshoots and gives a last value of -1, which diffusers keeps; cut it.
    "trailing": lambda top, train, n, drop: (np.arange(top, 0, -train / n).round() - 1)[:n],
}


def spaced_timesteps(s: Settings, steps: int, *, top: int | None = None, drop: int = 0) -> NDArray[np.float64]:
    """Descending timesteps, float64 [steps], not rounded: table 2 of arXiv:2305.08891.

    Args:
        s: gives the spacing and the offset.
        steps: how many.
        top: one more than the highest timestep; the number of training steps where not given.
        drop: how many further points to lay out at the low end and leave out.
    """
    check_steps(steps, s.num_train_timesteps)
    train = s.num_train_timesteps
    offset = s.steps_offset if s.timestep_spacing == "leading" else 0
    return SPACINGS[s.timestep_spacing](train if top is None else top, train, steps, drop) + offset


# The clean latents from the model output, given alpha and sigma of x_t = alpha x_0 + sigma noise.
TO_CLEAN: dict[str, Callable[[Array, Array, np.float32, np.float32], Array]] = {
    "epsilon": lambda x, output, alpha, sigma: np.divide(x - sigma * output, alpha),
    "v_prediction": lambda x, output, alpha, sigma: alpha * x - sigma * output,
    "sample": lambda x, output, alpha, sigma: output,
}
# The noise in the latents, likewise.
TO_NOISE: dict[str, Callable[[Array, Array, np.float32, np.float32], Array]] = {
    "epsilon": lambda x, output, alpha, sigma: output,
    "v_prediction": lambda x, output, alpha, sigma: alpha * output + sigma * x,
    "sample": lambda x, output, alpha, sigma: np.divide(x - alpha * output, sigma),
}
