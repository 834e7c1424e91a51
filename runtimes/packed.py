"""Transformers that read latents as tokens, patches of 2 x 2: FLUX.1, FLUX.2, Qwen-Image. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio.runtimes.evaluation import Feeds
from intaglio.runtimes.loop import Branch, Sampler
from intaglio.runtimes.sampling import Request
from intaglio.runtimes.scheduler_flow_match_euler import line_shift

PATCH = 2  # latents along one side of a token
TIMESTEPS = np.float32(1000)


class PackedSampler(Sampler):
    """A sampler whose denoiser takes ``hidden_states`` [B, tokens, C] and a ``timestep`` from 1 to 0."""

    @property
    def token_side(self) -> int:
        """Pixels along one side of an image token."""
        return PATCH * int(self.settings["vae_scale_factor"])

    def grid(self, request: Request) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return request.height // self.token_side, request.width // self.token_side

    def pack(self, latents: np.ndarray) -> np.ndarray:
        """Latents of the loop as tokens."""
        return pack(latents)

    def unpack(self, request: Request, tokens: np.ndarray) -> np.ndarray:
        """`pack` backwards."""
        return unpack(tokens, *self.grid(request))

    def model_feeds(self, request: Request, sample: np.ndarray, timestep: np.float32, branch: Branch) -> Feeds:
        """See `Sampler.model_feeds`."""
        times = np.full(len(sample), np.float32(timestep) / TIMESTEPS, np.float32)
        return {"hidden_states": self.pack(sample), "timestep": times}

    def prediction(self, request: Request, output: np.ndarray) -> np.ndarray:
        """See `Sampler.prediction`."""
        return self.unpack(request, output)

    def shift(self, image_tokens: int, steps: int) -> float:
        """How far noise levels are shifted, as ``mu``; tokens of the picture alone."""
        return line_shift(self.scheduler_config, image_tokens)

    def schedule(self, request: Request) -> dict[str, Any]:
        """See `Sampler.schedule`: evenly spaced sigmas, shifted by the number of image tokens."""
        steps, (rows, columns) = request.num_inference_steps, self.grid(request)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": self.shift(rows * columns, steps)}


def pack(latents: np.ndarray) -> np.ndarray:
    """Latents [B, C, h, w] as tokens [B, h/2 * w/2, 4C]: each a patch of 2 x 2, channel by channel."""
    return flatten(patchify(latents))


def unpack(tokens: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`pack` backwards: tokens [B, rows * columns, 4C] as latents [B, C, 2 rows, 2 columns]."""
    return unpatchify(unflatten(tokens, rows, columns))


def flatten(latents: np.ndarray) -> np.ndarray:
    """Latents [B, C, h, w] as tokens [B, h * w, C]."""
    batch, channels = latents.shape[:2]
    return np.ascontiguousarray(latents.reshape(batch, channels, -1).transpose(0, 2, 1))


def unflatten(tokens: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`flatten` backwards: tokens [B, rows * columns, C] as latents [B, C, rows, columns]."""
    return np.ascontiguousarray(tokens.transpose(0, 2, 1)).reshape(len(tokens), -1, rows, columns)


def patchify(latents: np.ndarray) -> np.ndarray:
    """Latents [B, C, h, w] as [B, 4C, h/2, w/2]: the four of a patch are channels, channel by channel."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, 4 * channels, height // 2, width // 2)


def unpatchify(latents: np.ndarray) -> np.ndarray:
    """`patchify` backwards: [B, 4C, h, w] as [B, C, 2h, 2w]."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels // 4, 2, 2, height, width).transpose(0, 1, 4, 2, 5, 3)
    return patches.reshape(batch, channels // 4, 2 * height, 2 * width)
