"""The schedulers of diffusion models against diffusers, over whole trajectories, in which errors would feed back."""

import importlib
import warnings

import diffusers
import numpy as np
import pytest
import torch

from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.noise import Noise
from intaglio.runtimes.schedulers import DIFFUSERS_CLASSES, PRESETS, PROCESSES, SchedulerConfig, make_scheduler

# Largest difference from diffusers in any latents of a trajectory, relative to the largest value of those latents.
TOLERANCE = 1e-5  # measured: 2.3e-6 (euler_a), 1.6e-6 (unipc), 1.5e-6 (dpmpp_2m_karras), 0 (ddim, euler, lcm)
NAMES = PROCESSES["diffusion"]
STEPS = (1, 2, 4, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")
SHAPE = (2, 4, 6, 6)
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
REFERENCE = {ours: theirs for theirs, ours in DIFFUSERS_CLASSES.items()} | {
    "dpmpp_2m_karras": "DPMSolverMultistepScheduler"
}


@pytest.fixture(autouse=True)
def rounded_square_roots(monkeypatch):
    """torch's square root (MKL's) is an ulp off in 577 of 100000 values, and in others on another processor.

    Zero-SNR rescaling carries that into a sigma of 4096, and what follows cancels three digits of it: 1.1e-3 on an AMD
    EPYC, 1.5e-4 on an Intel Xeon. IEEE 754 allows one result, which NumPy has; with it diffusers is one reference.
    """
    power = torch.Tensor.__pow__

    def root(x):
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))

    monkeypatch.setattr(torch, "sqrt", root)
    monkeypatch.setattr(torch.Tensor, "sqrt", root)
    monkeypatch.setattr(torch.Tensor, "__pow__", lambda x, to: root(x) if to == 0.5 else power(x, to))


def make(name, config, steps):
    return make_scheduler(name, SchedulerConfig.from_dict(config), steps)


def reference(name, config, steps):
    """The diffusers scheduler with the same configuration, switched to as its users do."""
    kind = getattr(diffusers, REFERENCE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = kind.from_config({**config, **PRESETS.get(name, {})})
        made.set_timesteps(steps)
    return made


def denoise(sample, timestep):
    """A smooth stand-in for a network, computed once in double precision so that only schedulers can differ."""
    x = sample.astype(np.float64)
    return (0.6 * x + 0.4 * np.sin(2 * x + float(timestep) / 150)).astype(np.float32)


def our_trajectory(made, draw):
    sample = draw() * np.float32(made.init_noise_sigma)
    latents, inputs = [sample], []
    for i, t in enumerate(made.timesteps):
        inputs.append(made.scale_model_input(sample, i))
        sample = made.step(denoise(inputs[-1], t), i, sample, draw)
        latents.append(sample)
    return latents, inputs


def their_trajectory(made, draw, monkeypatch):
    module = importlib.import_module(type(made).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(draw()), raising=False)
    sample = torch.from_numpy(draw()) * made.init_noise_sigma
    latents, inputs = [sample.numpy()], []
    for t in made.timesteps:
        scaled = made.scale_model_input(sample, t)
        inputs.append(scaled.numpy())
        sample = made.step(torch.from_numpy(denoise(inputs[-1], t)), t, sample).prev_sample
        latents.append(sample.numpy())
    return latents, inputs


def worst(ours, theirs):
    """Largest difference of two lists of arrays, each pair relative to its own largest value."""
    # NumPy's max, because Python's would step over a NaN.
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(ours, theirs, strict=True)]))


def compare(name, config, steps, monkeypatch):
    """Run both and return the largest relative difference of timesteps, starting sigma, inputs, latents and draws."""
    ours, theirs = make(name, config, steps), reference(name, config, steps)
    mine, yours = Noise(7), Noise(7)
    a_latents, a_inputs = our_trajectory(ours, lambda: mine.randn(SHAPE))
    b_latents, b_inputs = their_trajectory(theirs, lambda: yours.randn(SHAPE), monkeypatch)
    assert all(x.dtype == np.float32 and x.shape == SHAPE for x in a_latents + a_inputs)
    return {
        "timesteps": worst([ours.timesteps], [theirs.timesteps.numpy().astype(np.float32)]),
        "sigma": worst([np.array(ours.init_noise_sigma)], [np.array(float(theirs.init_noise_sigma))]),
        "inputs": worst(a_inputs, b_inputs),
        "latents": worst(a_latents, b_latents),
        "draws": worst([mine.randn((4,))], [yours.randn((4,))]),
    }


def assert_near(found, tolerance, steps):
    # Not max(): a NaN must fail.
    assert all(value <= tolerance for value in found.values()), (steps, found)


def assert_finite(name, config, steps):
    noise = Noise(7)
    latents, _ = our_trajectory(make(name, config, steps), lambda: noise.randn(SHAPE))
    assert all(np.isfinite(x).all() for x in latents)


def excluded(name, config, steps):
    """Why diffusers itself has no usable result here, or None. Ours refuses these."""
    prediction, spacing = config["prediction_type"], config["timestep_spacing"]
    if prediction == "sample" and name in {"pndm", "euler_a"}:
        return "diffusers raises: sample prediction is not implemented"
    reaches_the_end = spacing == "trailing" or (spacing == "linspace" and steps > 1)
    if config["rescale_betas_zero_snr"] and prediction == "epsilon":
        return (name == "lcm" or (name == "ddim" and reaches_the_end)) and "diffusers divides by an alpha of zero"
    return None


def has_a_result(name, config, steps, monkeypatch):
    """Whether diffusers returns finite latents."""
    noise = Noise(7)
    try:
        with np.errstate(invalid="ignore"):  # the stand-in's sine of infinity
            latents, _ = their_trajectory(reference(name, config, steps), lambda: noise.randn(SHAPE), monkeypatch)
    except (ValueError, NotImplementedError):
        return False
    return np.isfinite(latents[-1]).all()


def falls_off(name, config, steps):
    """Karras levels of a zero-SNR table round to timestep 999 twice: diffusers starts at the second, and runs out."""
    return name == "dpmpp_2m_karras" and config["rescale_betas_zero_snr"] and steps == 50


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero_snr"])
def test_trajectories_equal_diffusers(name, prediction, spacing, zero_snr, monkeypatch):
    config = {**SD15, "prediction_type": prediction, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero_snr}
    for steps in STEPS:
        if excluded(name, config, steps):
            with pytest.raises(Unsupported):
                make(name, config, steps)
            assert not has_a_result(name, config, steps, monkeypatch)
        elif falls_off(name, config, steps):
            with pytest.raises(IndexError):
                compare(name, config, steps, monkeypatch)
            assert_finite(name, config, steps)
        else:
            assert_near(compare(name, config, steps, monkeypatch), TOLERANCE, steps)


OPTIONS = [
    *((name, {"beta_schedule": "linear"}) for name in NAMES),
    *((name, {"beta_schedule": "squaredcos_cap_v2"}) for name in NAMES if name not in {"euler_a", "dpmpp_2m_karras"}),
    *((name, {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()}) for name in NAMES),
    *((name, {"num_train_timesteps": 500, "steps_offset": 0}) for name in NAMES),
    ("ddim", {"set_alpha_to_one": True}),
    ("ddim", {"clip_sample": True, "clip_sample_range": 0.7}),
    ("pndm", {"set_alpha_to_one": True}),
    ("euler", {"use_karras_sigmas": True}),
    ("euler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0, "timestep_spacing": "trailing"}),
    ("euler", {"use_karras_sigmas": True, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("euler", {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("dpmpp_2m", {"solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"solver_type": "bh2", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"solver_order": 1}),
    ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("dpmpp_2m", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}),
    ("dpmpp_2m_karras", {"sigma_min": 0.05, "sigma_max": 12.0}),
    ("dpmpp_2m_karras", {"final_sigmas_type": "sigma_min"}),
    ("unipc", {"solver_order": 1}),
    ("unipc", {"solver_order": 3}),
    ("unipc", {"solver_type": "heun", "disable_corrector": [0, 2]}),
    ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("unipc", {"final_sigmas_type": "sigma_min", "predict_x0": False}),
    ("unipc", {"final_sigmas_type": "sigma_min", "predict_x0": False, "prediction_type": "v_prediction"}),
    ("unipc", {"use_karras_sigmas": True}),
    ("lcm", {"original_inference_steps": 100, "timestep_scaling": 5.0}),
    ("lcm", {"clip_sample": True, "clip_sample_range": 0.7}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda x: x if isinstance(x, str) else ",".join(x))
def test_options_equal_diffusers(name, options, monkeypatch):
    for steps in STEPS:
        assert_near(compare(name, {**SD15, **options}, steps, monkeypatch), TOLERANCE, steps)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_configuration_means_the_defaults_of_the_diffusers_class(name, monkeypatch):
    config = {"skip_prk_steps": True} if name == "pndm" else {}
    assert_near(compare(name, config, 10, monkeypatch), TOLERANCE, 10)


@pytest.mark.parametrize("name", [name for name in NAMES if "karras" not in name and name != "lcm"])
def test_trailing_spacing_stays_on_the_models_timesteps(name):
    """At 61 steps a rounding error makes diffusers append timestep -1, which is noise again; ours is cut."""
    made = make(name, {**SD15, "timestep_spacing": "trailing"}, 61)
    assert made.timesteps.min() == 15
    assert len(made.timesteps) == (62 if name == "pndm" else 61)


# Without a reference: diffusers gives NaN (infinity times zero; the root of a negative rounding error at sigma 20000)
# or an IndexError (the first timestep comes twice).
ONLY_FINITE = [
    ("unipc", {"solver_type": "bh1"}),
    ("unipc", {"lower_order_final": False}),
    ("euler_a", {"beta_schedule": "squaredcos_cap_v2"}),
    ("dpmpp_2m_karras", {"beta_schedule": "squaredcos_cap_v2"}),
]


@pytest.mark.parametrize(("name", "options"), ONLY_FINITE, ids=str)
def test_finite_where_diffusers_has_no_result(name, options):
    for steps in STEPS:
        assert_finite(name, {**SD15, **options}, steps)


@pytest.mark.parametrize("name", NAMES)
def test_two_requests_do_not_share_state(name):
    noise = Noise(3)
    draws = [noise.randn(SHAPE) for _ in range(10)]
    alone, _ = our_trajectory(make(name, SD15, 5), iter(draws).__next__)
    pair = [make(name, SD15, 5), make(name, SD15, 5)]
    feeds = [iter(draws), iter(draws)]
    samples = [next(feed) * np.float32(made.init_noise_sigma) for feed, made in zip(feeds, pair, strict=True)]
    for i, t in enumerate(pair[0].timesteps):
        for k in (0, 1):
            output = denoise(pair[k].scale_model_input(samples[k], i), t)
            samples[k] = pair[k].step(output, i, samples[k], feeds[k].__next__)
    assert np.array_equal(samples[0], alone[-1])
    assert np.array_equal(samples[1], alone[-1])
