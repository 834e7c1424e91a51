"""A checkpoint's scheduler_config.json: which keys it may have, and the settings of one scheduler made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from intaglio.profiles.errors import ArtifactError, Unsupported
from intaglio.profiles.registry import suggestion

S = TypeVar("S", bound="CommonSettings")

# Every key that a diffusers scheduler of these families writes, by the JSON type of its value.
KEYS: dict[str, tuple[type, ...]] = {
    key: kinds
    for kinds, keys in {
        (int,): "num_train_timesteps steps_offset solver_order original_inference_steps base_image_seq_len "
        "max_image_seq_len",
        (bool,): "clip_sample set_alpha_to_one thresholding rescale_betas_zero_snr skip_prk_steps use_karras_sigmas "
        "use_exponential_sigmas use_beta_sigmas use_lu_lambdas use_flow_sigmas use_dynamic_shifting "
        "lower_order_final euler_at_final predict_x0 invert_sigmas stochastic_sampling",
        (int, float): "beta_start beta_end clip_sample_range dynamic_thresholding_ratio sample_max_value sigma_min "
        "sigma_max flow_shift lambda_min_clipped timestep_scaling shift_terminal shift base_shift max_shift",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonSettings:
    """A scheduler's configuration, complete. Each subclass has the defaults of the diffusers class it follows."""

    #: Values this toolchain honours, for the keys where it does not honour them all.
    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        self.refuse_others(self.ALLOWED)

    def refuse_others(self, checks: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise Unsupported where the value of a key of `checks` is not among those listed there."""
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

    @property
    def process(self) -> str:
        """``flow`` where the network was trained to predict a flow's velocity, or ``diffusion``."""
        flow = self.values.get("prediction_type") == "flow_prediction" or self._is_flow_match
        return "flow" if flow else "diffusion"

    @property
    def _is_flow_match(self) -> bool:
        return (self.class_name or "").startswith("FlowMatch")

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

    def as_flow(self) -> SchedulerConfig:
        """A copy that every flow scheduler reads alike, whichever of them the checkpoint was saved with.

        The Euler class calls the timestep shift ``shift`` and has no key for what the network predicts; the multistep
        classes call it ``flow_shift``. In diffusers the user sets these by hand when switching the scheduler.
        """
        names = ("shift", "flow_shift") if self._is_flow_match else ("flow_shift", "shift")
        shift = next((self.values[name] for name in names if name in self.values), 1.0)
        says = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if self._is_flow_match else {}
        return self.replace(**{"shift": shift, "flow_shift": shift, **says})

    def settings(self, kind: type[S]) -> S:
        """The values `kind` has a field for, over its defaults; the others belong to other schedulers.

        Raises:
            Unsupported: a value cannot be honoured.
            ArtifactError: a list has the wrong length.
        """
        names = {field.name for field in dataclasses.fields(kind)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.values.items()
        }
        return kind(**{key: value for key, value in given.items() if key in names})


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
