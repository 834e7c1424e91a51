"""Schedulers of flow-matching models against diffusers over whole trajectories, and the shifts of its pipelines."""

import importlib
import warnings

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift as flux_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift as qwen_shift
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift as sd3_shift
from test_schedulers import REFERENCE, SD15, denoise, our_trajectory, worst

from intaglio.profiles.errors import ArtifactError, Unsupported, UsageError
from intaglio.runtimes.noise import Noise
from intaglio.runtimes.scheduler_flow_match_euler import (
    FlowMatchSettings,
    beta_quantile,
    calculate_shift,
    empirical_mu,
)
from intaglio.runtimes.schedulers import PROCESSES, SchedulerConfig, make_scheduler

# Largest difference from diffusers relative to the largest value: of timesteps and sigmas, and of the latents.
LEVELS = 1e-6  # measured: 0
EULER = 1e-6  # measured: 0
MULTISTEP = 1e-5  # measured: 1.3e-6 (unipc), 6.7e-7 (dpmpp_2m)
QUANTILE = 1e-12  # measured: 6.1e-16, absolute
STEPS = (1, 2, 4, 8, 28, 50)
SHAPES = {"picture": (2, 4, 6, 6), "packed": (1, 9, 16), "video": (1, 4, 3, 6, 6)}
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.36.0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
DYNAMIC = {**FLOW, "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
MULTISTEPS = [name for name in PROCESSES["flow"] if name != "flow_match_euler"]


def make(name, config, steps, **levels):
    return make_scheduler(name, SchedulerConfig.from_dict(config), steps, **levels)


def reference(name, config, steps, sigmas=None, mu=None):
    """The diffusers scheduler with the same configuration, switched to and called as its pipelines and users do."""
    switched = {}
    if name != "flow_match_euler":
        switched = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers, REFERENCE[name]).from_config({**config, **switched})
    extra = {} if mu is None else {"mu": mu}
    if sigmas is not None:
        extra["sigmas"] = sigmas
    made.set_timesteps(num_inference_steps=steps, **extra)
    made.set_begin_index(0)
    return made


def their_trajectory(made, draw, monkeypatch):
    module = importlib.import_module(type(made).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(draw()), raising=False)
    sample = torch.from_numpy(draw())
    latents = [sample.numpy()]
    for t in made.timesteps:
        sample = made.step(torch.from_numpy(denoise(sample.numpy(), t)), t, sample).prev_sample
        latents.append(sample.numpy())
    return latents


def compare(name, config, steps, monkeypatch, shape=SHAPES["picture"], **levels):
    """Run both and return the largest relative difference of levels, latents and draws."""
    ours, theirs = make(name, config, steps, **levels), reference(name, config, steps, **levels)
    mine, yours = Noise(7), Noise(7)
    a_latents, inputs = our_trajectory(ours, lambda: mine.randn(shape))
    b_latents = their_trajectory(theirs, lambda: yours.randn(shape), monkeypatch)
    assert all(x.dtype == np.float32 and x.shape == shape for x in a_latents)
    assert all(x is y for x, y in zip(inputs, a_latents[:-1], strict=True))
    assert ours.timesteps.dtype == np.float32
    assert ours.timesteps.shape == (steps,)
    assert ours.init_noise_sigma == 1
    found = {
        "timesteps": worst([ours.timesteps], [theirs.timesteps.numpy().astype(np.float32)]),
        "latents": worst(a_latents, b_latents),
        "draws": worst([mine.randn((4,))], [yours.randn((4,))]),
    }
    if name == "flow_match_euler":
        assert ours.sigmas.dtype == np.float32
        found["sigmas"] = worst([ours.sigmas], [theirs.sigmas.numpy()])
    return found


def assert_near(found, steps, latents=EULER):
    # Not max(): a NaN must fail.
    tolerances = {"timesteps": LEVELS, "sigmas": LEVELS, "latents": latents, "draws": 0}
    assert all(value <= tolerances[key] for key, value in found.items()), (steps, found)


def even(steps):
    """The levels that the FLUX and Qwen-Image pipelines pass."""
    return np.linspace(1, 1 / steps, steps)


SPACINGS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]


@pytest.mark.parametrize("spacing", SPACINGS, ids=lambda x: next(iter(x), "even"))
@pytest.mark.parametrize("given", [False, True], ids=["own_sigmas", "given_sigmas"])
@pytest.mark.parametrize("shift", [1, 1.0, 3.0, 3.1])
def test_static_shift_equals_diffusers(shift, given, spacing, monkeypatch):
    for steps in STEPS:
        levels = {"sigmas": even(steps)} if given else {}
        config = {**FLOW, "shift": shift, **spacing}
        assert_near(compare("flow_match_euler", config, steps, monkeypatch, **levels), steps)


@pytest.mark.parametrize("spacing", SPACINGS, ids=lambda x: next(iter(x), "even"))
@pytest.mark.parametrize("given", [False, True], ids=["own_sigmas", "given_sigmas"])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.5, 1.15, 2.0])
def test_dynamic_shift_equals_diffusers(mu, kind, given, spacing, monkeypatch):
    for steps in STEPS:
        levels = {"sigmas": even(steps)} if given else {}
        config = {**DYNAMIC, "time_shift_type": kind, **spacing}
        assert_near(compare("flow_match_euler", config, steps, monkeypatch, mu=mu, **levels), steps)


OPTIONS = [
    {"invert_sigmas": True},
    {"stochastic_sampling": True},
    {"stochastic_sampling": True, "invert_sigmas": True},
    {"num_train_timesteps": 500},
    {"shift_terminal": 0.0},
    {"shift_terminal": None},
]


@pytest.mark.parametrize("base", [FLOW, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: ",".join(x))
def test_options_equal_diffusers(options, base, monkeypatch):
    mu = {"mu": 1.15} if base is DYNAMIC else {}
    for steps in STEPS:
        assert_near(compare("flow_match_euler", {**base, **options}, steps, monkeypatch, **mu), steps)


@pytest.mark.parametrize("spacing", SPACINGS, ids=lambda x: next(iter(x), "even"))
@pytest.mark.parametrize("base", [FLOW, DYNAMIC], ids=["static", "dynamic"])
def test_a_terminal_level_equals_diffusers_and_a_single_step_is_refused(base, spacing, monkeypatch):
    config = {**base, "shift_terminal": 0.02, **spacing}
    levels = {"mu": 0.9} if base is DYNAMIC else {}
    for steps in STEPS[1:]:
        sigmas = even(steps)
        assert_near(compare("flow_match_euler", config, steps, monkeypatch, sigmas=sigmas, **levels), steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        assert np.isnan(reference("flow_match_euler", {**base, "shift_terminal": 0.02}, 1, **levels).sigmas[0])
    with pytest.raises(Unsupported, match=r"shift_terminal=0\.02 needs more than 1 step"):
        make("flow_match_euler", config, 1, **levels)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_latents_of_any_rank(shape, monkeypatch):
    for extra in ({}, {"stochastic_sampling": True}):
        assert_near(compare("flow_match_euler", {**FLOW, **extra}, 4, monkeypatch, shape=shape), 4)


def test_half_precision_outputs_are_upcast():
    made, theirs = make("flow_match_euler", FLOW, 4), reference("flow_match_euler", FLOW, 4)
    sample, output = np.float32([1 / 3, 1000.1]), np.float16([0.1, 3])
    stepped = made.step(output, 0, sample, lambda: sample)
    wanted = theirs.step(torch.from_numpy(output.astype(np.float32)), theirs.timesteps[0], torch.from_numpy(sample))
    assert stepped.dtype == np.float32
    assert worst([stepped], [wanted.prev_sample.numpy()]) <= EULER


def test_mu_without_dynamic_shifting_has_no_effect_as_in_the_pipelines(monkeypatch):
    """FLUX.1-schnell is given one."""
    config = {**FLOW, "shift": 1.0}
    assert_near(compare("flow_match_euler", config, 4, monkeypatch, mu=1.15, sigmas=even(4)), 4)


def test_an_empty_configuration_means_the_defaults_of_the_diffusers_class(monkeypatch):
    config = {"_class_name": FLOW["_class_name"]}
    assert_near(compare("flow_match_euler", config, 10, monkeypatch), 10)


# Multistep solvers.


@pytest.mark.parametrize("name", MULTISTEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2])
def test_multistep_solvers_equal_diffusers(name, shift, order, monkeypatch):
    for steps in STEPS:
        config = {**FLOW, "shift": shift, "solver_order": order}
        assert_near(compare(name, config, steps, monkeypatch), steps, MULTISTEP)


@pytest.mark.parametrize("name", MULTISTEPS)
@pytest.mark.parametrize("mu", [0.5, 1.15, 2.0])
def test_multistep_solvers_with_mu_equal_diffusers(name, mu, monkeypatch):
    for steps in STEPS:
        assert_near(compare(name, DYNAMIC, steps, monkeypatch, mu=mu), steps, MULTISTEP)


MULTISTEP_OPTIONS = [
    ("unipc", {"solver_order": 3}),
    ("unipc", {"shift_terminal": 0.02}),
    ("unipc", {"solver_type": "heun", "disable_corrector": [0, 2]}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize(("name", "options"), MULTISTEP_OPTIONS, ids=str)
def test_multistep_options_equal_diffusers(name, options, monkeypatch):
    for steps in STEPS[1:]:
        assert_near(compare(name, {**FLOW, **options}, steps, monkeypatch), steps, MULTISTEP)


def test_a_linear_shift_is_left_to_unipc(monkeypatch):
    config = {**DYNAMIC, "time_shift_type": "linear"}
    assert_near(compare("unipc", config, 8, monkeypatch, mu=2.0), 8, MULTISTEP)
    with pytest.raises(Unsupported, match="time_shift_type"):
        make("dpmpp_2m", config, 8, mu=2.0)


@pytest.mark.parametrize("name", PROCESSES["flow"])
@pytest.mark.parametrize("saved", MULTISTEPS)
def test_a_flow_checkpoint_saved_with_a_multistep_solver(name, saved):
    """Sana is: its shift has another name, and means the same to every scheduler."""
    config = {"_class_name": REFERENCE[saved], "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    made, same = make(name, {**config, "flow_shift": 3.0}, 5), make(name, FLOW, 5)
    assert np.array_equal(made.timesteps, same.timesteps)
    assert type(make(None, config, 5)) is type(make(saved, FLOW, 5))


# Which checkpoints, which arguments.


@pytest.mark.parametrize("name", [name for name in PROCESSES["diffusion"] if name not in PROCESSES["flow"]])
def test_a_flow_checkpoint_is_not_sampled_by_a_diffusion_scheduler(name):
    allowed = ", ".join(PROCESSES["flow"])
    with pytest.raises(Unsupported, match=rf"'{name}' .*FlowMatchEulerDiscreteScheduler.*those that can: {allowed}$"):
        make(name, FLOW, 4, sigmas=even(4), mu=1.0)


@pytest.mark.parametrize("config", [SD15, {}, {**SD15, "prediction_type": "v_prediction"}], ids=["sd", "bare", "v"])
def test_a_diffusion_checkpoint_is_not_sampled_by_flow_match_euler(config):
    with pytest.raises(Unsupported, match=r"'flow_match_euler' .*diffusion checkpoint.*ddim, pndm"):
        make("flow_match_euler", config, 4)


def test_another_flow_scheduler_of_diffusers_is_named_with_those_that_fit():
    config = {**FLOW, "_class_name": "FlowMatchHeunDiscreteScheduler"}
    with pytest.raises(Unsupported, match=r"FlowMatchHeunDiscreteScheduler .*choose one of flow_match_euler, dpmpp_2m"):
        make(None, config, 4)
    assert make("flow_match_euler", config, 4).sigmas[1] == make(None, FLOW, 4).sigmas[1]


@pytest.mark.parametrize("levels", [{"sigmas": even(4)}, {"mu": 1.0}], ids=["sigmas", "mu"])
@pytest.mark.parametrize("name", PROCESSES["diffusion"])
def test_diffusion_schedulers_take_no_levels(name, levels):
    with pytest.raises(TypeError, match=name):
        make(name, SD15, 4, **levels)


@pytest.mark.parametrize("name", PROCESSES["flow"])
def test_levels_that_do_not_go_with_the_request(name):
    with pytest.raises(ValueError, match="3 sigmas for 4 steps"):
        make(name, FLOW, 4, sigmas=even(3))
    with pytest.raises(ValueError, match="needs mu"):
        make(name, DYNAMIC, 4)


@pytest.mark.parametrize("name", PROCESSES["flow"])
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_number_of_steps_out_of_range(name, steps):
    with pytest.raises(UsageError, match=rf"^{steps} steps .* 1 to 1000$"):
        make(name, FLOW, steps)


REFUSED = [
    ("flow_match_euler", {"time_shift_type": "quadratic"}, "time_shift_type"),
    ("flow_match_euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas"),
    ("flow_match_euler", {"shift": 0.0}, "noise levels from nan"),
    ("flow_match_euler", {"shift": -2.0}, "noise levels from"),
    ("flow_match_euler", {"shift_terminal": 1.5}, "noise levels from .* to 1.5"),
    ("unipc", {"shift": -2.0}, "noise levels from"),
    ("unipc", {"shift_terminal": -0.5}, r"noise levels from -0\.5"),
    ("dpmpp_2m", {"shift": -2.0}, "noise levels from"),
    ("unipc", {"invert_sigmas": True}, "invert_sigmas"),
    ("unipc", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
    ("dpmpp_2m", {"stochastic_sampling": True}, "stochastic_sampling"),
    ("dpmpp_2m", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ("dpmpp_2m", {"use_beta_sigmas": True}, "use_beta_sigmas"),
]


@pytest.mark.parametrize(("name", "options", "named"), REFUSED, ids=str)
def test_a_value_that_cannot_be_honoured_is_refused(name, options, named):
    with pytest.raises(Unsupported, match=named) as caught:
        make(name, {**FLOW, **options}, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"shift": "3"}, {"invert_sigmas": 1}, {"base_image_seq_len": 2.5}], ids=str)
def test_configuration_errors_name_the_key(options):
    with pytest.raises(ArtifactError, match=next(iter(options))):
        make(None, {**FLOW, **options}, 4)


# Mathematics.


def test_beta_quantile_equals_scipy():
    p = np.concatenate([1 - np.linspace(0, 1, 1000), [1e-12, 1e-6, 0.5, 1 - 1e-9]])
    assert np.abs(beta_quantile(p) - scipy.stats.beta.ppf(p, 0.6, 0.6)).max() <= QUANTILE


@pytest.mark.parametrize("theirs", [flux_shift, sd3_shift, qwen_shift], ids=["flux", "sd3", "qwen"])
def test_calculate_shift_equals_the_pipelines(theirs):
    s = SchedulerConfig.from_dict(DYNAMIC).settings(FlowMatchSettings)
    configured = (s.base_image_seq_len, s.max_image_seq_len, s.base_shift, s.max_shift)
    for length in (64, 256, 1024, 4096, 8100):
        assert calculate_shift(length) == pytest.approx(theirs(length), rel=1e-12)
        assert calculate_shift(length, *configured) == pytest.approx(theirs(length), rel=1e-12)
        qwen = (256, 8192, 0.5, 0.9)
        assert calculate_shift(length, *qwen) == pytest.approx(theirs(length, *qwen), rel=1e-12)


@pytest.mark.parametrize("length", [64, 1024, 4096, 4300, 4301, 8100])
@pytest.mark.parametrize("steps", [1, 4, 28, 50, 200])
def test_empirical_mu_equals_the_flux2_pipeline(length, steps):
    assert empirical_mu(length, steps) == pytest.approx(compute_empirical_mu(length, steps), rel=1e-12)
