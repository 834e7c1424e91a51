"""Every scheduler against diffusers, over whole trajectories in which an error would feed back into the next step."""

import dataclasses
import importlib
import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch
from intaglio.profiles.errors import ArtifactError, Unsupported, UsageError
from intaglio.profiles.registry import resolve
from intaglio.runtimes import schedulers
from intaglio.runtimes.noise import Noise
from intaglio.runtimes.schedulers import DIFFUSERS_CLASSES, PRESETS, SCHEDULERS, SchedulerConfig, make_scheduler

# Largest difference from diffusers, as a part of the largest value of the trajectory's latents.
TOLERANCE = 1e-5  # measured: see test output
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
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(ours, theirs, strict=True))


def compare(name, config, steps, monkeypatch):
    """Run both and return the largest relative difference of timesteps, inputs and latents."""
    ours = make_scheduler(name, SchedulerConfig.from_dict(config), steps)
    theirs = reference(name, config, steps)
    mine, yours = Noise(7), Noise(7)
    a_latents, a_inputs = our_trajectory(ours, lambda: mine.randn(SHAPE))
    b_latents, b_inputs = their_trajectory(theirs, lambda: yours.randn(SHAPE), monkeypatch)
    return {
        "timesteps": worst([ours.timesteps], [theirs.timesteps.numpy().astype(np.float32)]),
        "sigma": abs(ours.init_noise_sigma - float(theirs.init_noise_sigma)) / float(theirs.init_noise_sigma),
        "inputs": worst(a_inputs, b_inputs),
        "latents": worst(a_latents, b_latents),
        "draws": float(np.abs(mine.randn((4,)) - yours.randn((4,))).max()),
        "dtype": all(x.dtype == np.float32 and x.shape == SHAPE for x in a_latents + a_inputs),
        "finite": np.isfinite(b_latents[-1]).all(),
    }
