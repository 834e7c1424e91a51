"""Tiny random checkpoints, one builder a family: the whole way runs on a CPU with nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny_flux
import tiny_flux2
import tiny_qwen_image
import tiny_sd
import tiny_sd3
import tiny_sdxl
from cases import Case
from tiny_sd import stable_diffusion

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sd": stable_diffusion,
    "flux": tiny_flux.flux,
    "flux2": tiny_flux2.klein,
    "sd3": tiny_sd3.medium,
    "qwen_image": tiny_qwen_image.qwen_image,
    "sdxl": tiny_sdxl.base,
}
CASES: dict[str, Case] = {
    **tiny_sd.CASES,
    **tiny_flux.CASES,
    **tiny_flux2.CASES,
    **tiny_sd3.CASES,
    **tiny_qwen_image.CASES,
    **tiny_sdxl.CASES,
}
