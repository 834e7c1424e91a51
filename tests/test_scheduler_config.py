"""What a scheduler_config.json may say, and what is refused, with the key and the value in one line."""

import dataclasses
import importlib
import inspect

import diffusers
import pytest
from test_schedulers import REFERENCE, SD15, make

from intaglio.profiles.errors import ArtifactError, Unsupported, UsageError
from intaglio.profiles.registry import resolve
from intaglio.runtimes import scheduler_config
from intaglio.runtimes.scheduler_config import CommonSettings
from intaglio.runtimes.schedulers import DIFFUSERS_CLASSES, PROCESSES, SCHEDULERS, SchedulerConfig

# Read by diffusers only together with a value that is refused here: thresholding.
WITHOUT_EFFECT = {"dynamic_thresholding_ratio", "sample_max_value"}
# LCM never steps to the end of the table, so that diffusers' value is never used.
NEVER_READ = {"lcm": {"set_alpha_to_one"}}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_key_of_diffusers_is_ignored_and_defaults_agree(name):
    module = importlib.import_module(SCHEDULERS[name].partition(":")[0])
    kinds = [x for x in vars(module).values() if inspect.isclass(x) and x.__module__ == module.__name__]
    kind = [x for x in kinds if issubclass(x, CommonSettings)][-1]
    ours = {field.name: field.default for field in dataclasses.fields(kind)}
    parameters = inspect.signature(getattr(diffusers, REFERENCE[name]).__init__).parameters
    theirs = {key: tuple(p.default) if p.default == [] else p.default for key, p in parameters.items() if key != "self"}
    assert set(theirs) - set(ours) <= WITHOUT_EFFECT | NEVER_READ.get(name, set())
    assert {k: v for k, v in ours.items() if k in theirs} == {k: v for k, v in theirs.items() if k in ours}
    assert set(theirs) <= set(scheduler_config.KEYS)


@pytest.mark.parametrize(("theirs", "name"), DIFFUSERS_CLASSES.items())
def test_the_checkpoints_own_scheduler_is_the_default(theirs, name):
    assert type(make(None, {**SD15, "_class_name": theirs}, 4)) is resolve(SCHEDULERS[name])


def test_a_scheduler_without_equivalent_is_named():
    with pytest.raises(Unsupported, match=r"HeunDiscreteScheduler.*euler_a"):
        make(None, {"_class_name": "HeunDiscreteScheduler"}, 4)


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(UsageError, match="Did you mean 'dpmpp_2m_karras'"):
        make("dpmpp_2m_karas", SD15, 4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_number_of_steps_out_of_range(name, steps):
    with pytest.raises(UsageError, match=rf"^{steps} steps .* 1 to \d+$"):
        make(name, {**SD15, "_class_name": REFERENCE[name]}, steps)


def test_lcm_allows_no_more_steps_than_it_was_distilled_with():
    with pytest.raises(UsageError, match="1 to 50"):
        make("lcm", SD15, 51)


REFUSED = [
    ("ddim", {"thresholding": True}),
    ("ddim", {"prediction_type": "flow_prediction"}),
    ("ddim", {"beta_schedule": "sigmoid"}),
    ("pndm", {"skip_prk_steps": False}),
    ("euler", {"interpolation_type": "log_linear"}),
    ("euler", {"timestep_type": "continuous"}),
    ("euler", {"use_exponential_sigmas": True}),
    ("euler_a", {"timestep_spacing": "other"}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_2m", {"solver_order": 3}),
    ("dpmpp_2m", {"use_lu_lambdas": True}),
    ("dpmpp_2m", {"variance_type": "learned_range"}),
    ("unipc", {"use_flow_sigmas": True}),
    ("dpmpp_2m", {"use_flow_sigmas": True}),
    ("dpmpp_2m", {"use_flow_sigmas": False, "prediction_type": "flow_prediction"}),
    ("unipc", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True}),
    ("unipc", {"use_dynamic_shifting": True}),
    ("unipc", {"shift_terminal": 0.02}),
    ("unipc", {"use_beta_sigmas": True}),
    ("unipc", {"predict_x0": False}),
    ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("lcm", {"thresholding": True}),
    ("lcm", {"original_inference_steps": 2000}),
]


@pytest.mark.parametrize(("name", "options"), REFUSED, ids=str)
def test_a_value_that_cannot_be_honoured_is_refused(name, options):
    with pytest.raises(Unsupported) as caught:
        make(name, {**SD15, **options}, 10)
    assert list(options)[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in PROCESSES["diffusion"] if name != "lcm"])
def test_keys_of_other_schedulers_are_left_alone(name):
    make(name, {**SD15, "original_inference_steps": 2000}, 10)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"beta_strat": 0.1}, "beta_strat.*beta_start"),
        ({"steps_offset": "1"}, "steps_offset"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"clip_sample": None}, "clip_sample"),
        ({"beta_end": [1]}, "beta_end"),
    ],
)
def test_configuration_errors_name_the_key(config, named):
    with pytest.raises(ArtifactError, match=named):
        SchedulerConfig.from_dict(config)


def test_trained_betas_of_the_wrong_length():
    with pytest.raises(ArtifactError, match="trained_betas"):
        make("ddim", {**SD15, "trained_betas": [0.1, 0.2]}, 2)


def test_values_that_diffusers_filled_in_by_itself_are_not_the_checkpoints():
    assert SchedulerConfig.from_dict({"steps_offset": 1, "_use_default_values": ["steps_offset"]}).values == {}


@pytest.mark.parametrize(("name", "steps"), [("dpmpp_2m", 1000), ("unipc", 1000), ("ddim", 1000)])
def test_as_many_steps_as_training_is_refused_where_levels_run_out(name, steps):
    with pytest.raises(Unsupported, match="fewer steps"):
        make(name, SD15, steps)
