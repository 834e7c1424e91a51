"""The table of schedulers, the configuration they share, and the noise-schedule arithmetic they are built from.

A scheduler belongs to one request: it is made for a number of steps, keeps what its method remembers between steps,
and is thrown away. Everything is NumPy. Single precision is used, operation by operation, wherever diffusers uses it:
1 - alpha_bar at small t cancels four digits, so a double-precision table would be better and yet differ from the one
that the checkpoint's reference pictures were made with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from intaglio.profiles.errors import ArtifactError, Unsupported, UsageError
from intaglio.profiles.registry import pick, resolve, suggestion

Array = NDArray[np.float32]
Draw = Callable[[], Array]
S = TypeVar("S", bound="Settings")

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
}
# Every key that a diffusers scheduler of the Stable Diffusion family writes, by the JSON type of its value.
KEYS: dict[str, tuple[type, ...]] = {
    key: kinds
    for kinds, keys in {
        (int,): "num_train_timesteps steps_offset solver_order original_inference_steps",
        (bool,): "clip_sample set_alpha_to_one thresholding rescale_betas_zero_snr skip_prk_steps use_karras_sigmas "
        "use_exponential_sigmas use_beta_sigmas use_lu_lambdas use_flow_sigmas use_dynamic_shifting "
        "lower_order_final euler_at_final predict_x0",
        (int, float): "beta_start beta_end clip_sample_range dynamic_thresholding_ratio sample_max_value sigma_min "
        "sigma_max flow_shift lambda_min_clipped timestep_scaling shift_terminal",
        (str,): "beta_schedule prediction_type timestep_spacing interpolation_type timestep_type final_sigmas_type "
        "algorithm_type solver_type time_shift_type variance_type",
        (list, tuple): "trained_betas disable_corrector",
        (object,): "solver_p",
    }.items()
    for key in keys.split()
}
# JSON null means "not set" for these; for another key diffusers would read it as false, so it is refused.
NULLABLE = {"trained_betas", "sigma_min", "sigma_max", "variance_type", "solver_p", "shift_terminal"} | {
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
}


class Scheduler(Protocol):
    """What a sampling loop needs. The latents are float32 [batch, channels, height, width]."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A scheduler's configuration, complete. Each subclass has the defaults of the diffusers class it follows."""

    #: Values this toolchain honours, for the keys where it does not honour them all.
    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        checks = {"beta_schedule": tuple(BETAS), "timestep_spacing": tuple(SPACINGS), **self.ALLOWED}
        for key, allowed in checks.items():
            value = getattr(self, key)
            if value not in allowed:
                message = f"scheduler {key}={value!r} is not supported; supported: {', '.join(map(repr, allowed))}"
                raise Unsupported(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """A checkpoint's scheduler/scheduler_config.json, checked; what it leaves out is decided by the scheduler made."""

    class_name: str | None = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """Read the JSON object of a diffusers scheduler.

        Raises:
            ArtifactError: a key is unknown, or its value has the wrong type.
        """
        # diffusers lists here the keys that it filled in by itself, and drops them when the scheduler is switched.
        filled = set(config.get("_use_default_values", ()))
        public = {key: value for key, value in config.items() if not key.startswith("_") and key not in filled}
        for key, value in public.items():
            _check_key(key, value)
        values = {key: value for key, value in public.items() if value is not None}
        return cls(class_name=config.get("_class_name"), values=values)

    def replace(self, **values: Any) -> SchedulerConfig:
        """A copy with some keys set, checked as `from_dict` does."""
        return self.from_dict({**self.values, **values, "_class_name": self.class_name})

    def settings(self, kind: type[S]) -> S:
        """The values `kind` has a field for, over its defaults; the others belong to other schedulers.

        Raises:
            Unsupported: a value cannot be honoured.
            ArtifactError: `trained_betas` has not one number per training step.
        """
        names = {field.name for field in dataclasses.fields(kind)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.values.items()
        }
        made = kind(**{key: value for key, value in given.items() if key in names})
        if made.trained_betas is not None and len(made.trained_betas) != made.num_train_timesteps:
            message = f"{len(made.trained_betas)} trained_betas for {made.num_train_timesteps} training steps"
            raise ArtifactError(message)
        return made


def _check_key(key: str, value: Any) -> None:
    if key not in KEYS:
        message = f"scheduler_config.json has an unknown key {key!r}.{suggestion(key, KEYS)}"
        raise ArtifactError(message)
    kinds = KEYS[key]
    numeric = int in kinds
    if (value is None and key in NULLABLE) or (isinstance(value, kinds) and not (numeric and isinstance(value, bool))):
        return
    expected = " or ".join(kind.__name__ for kind in kinds)
    message = f"scheduler_config.json: {key} must be {expected}, not {value!r}"
    raise ArtifactError(message)


def make_scheduler(name: str | None, config: SchedulerConfig, num_inference_steps: int) -> Scheduler:
    """A new scheduler for one request.

    Args:
        name: a key of `SCHEDULERS`, or None for the checkpoint's own.
        config: the checkpoint's configuration.
        num_inference_steps: from 1 to the number of training steps (`original_inference_steps` for LCM).

    Raises:
        UsageError: the name is unknown or the number of steps is out of range.
        Unsupported: the configuration cannot be honoured by this scheduler, or has no finite result with it.
    """
    chosen = name if name is not None else default_name(config)
    factory = resolve(pick(SCHEDULERS, chosen, "scheduler"))
    made: Scheduler = factory(config.replace(**PRESETS.get(chosen, {})), num_inference_steps)
    return made


def default_name(config: SchedulerConfig) -> str:
    """Our name of the scheduler that the checkpoint was saved with.

    Raises:
        Unsupported: there is no equivalent here.
    """
    if config.class_name in DIFFUSERS_CLASSES:
        return DIFFUSERS_CLASSES[config.class_name]
    message = f"the checkpoint's scheduler {config.class_name} is not supported; choose one of {', '.join(SCHEDULERS)}"
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
