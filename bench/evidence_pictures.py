"""Our pictures against diffusers' own pipeline on the embedded checkpoint: every scheduler, backend and format."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.exporters.build import build
from intaglio.exporters.checkpoint import embedded_folder
from intaglio.runtimes.fidelity import psnr
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.schedulers import SCHEDULERS

PROMPTS = ("red heart", "红心", "pizza")
SIZES = ((128, 128), (160, 96))
STEPS, GUIDANCE, SEED = 12, 2.5, 5
BACKENDS = ("onnxruntime", "openvino")
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def reference_pipeline() -> Any:
    """Diffusers' own pipeline on the embedded checkpoint, float32, silent."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        embedded_folder("emoji"), torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_image(pipeline: Any, scheduler: str, prompt: str, size: tuple[int, int], **options: Any) -> np.ndarray:
    """One picture uint8 [H, W, 3] of diffusers with the scheduler of our name."""
    import diffusers
    import torch

    kept = pipeline.scheduler
    name, extra = DIFFUSERS[scheduler]
    pipeline.scheduler = getattr(diffusers, name).from_config(kept.config, **extra)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **options}
    try:
        made = pipeline(
            prompt, width=size[0], height=size[1], generator=torch.Generator("cpu").manual_seed(SEED), **arguments
        )
    finally:
        pipeline.scheduler = kept
    return np.asarray(made.images[0])


def measure() -> dict[str, Any]:
    """Lowest PSNR in dB per format, backend and scheduler, over prompts and sizes; ``null`` where not comparable."""
    reference, wanted = reference_pipeline(), {}
    # `emoji` has a DDIM configuration without skip_prk_steps: diffusers' PNDM takes Runge-Kutta steps, ours refuses.
    usable = [s for s in SCHEDULERS if s in DIFFUSERS and s != "pndm"]
    for scheduler in usable:
        for prompt in PROMPTS:
            for size in SIZES:
                wanted[scheduler, prompt, size] = reference_image(reference, scheduler, prompt, size)
    figures: dict[str, Any] = {"prompts": list(PROMPTS), "sizes": [list(s) for s in SIZES], "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        for name, quant in (("fp32", {}), ("int8", {"*": "int8"})):
            artifact = build("emoji", Path(folder) / name, targets=("openvino",), quant=quant)
            for backend in BACKENDS:
                figures[f"{name} {backend}"] = lowest(load(artifact, backend=backend), wanted)
    return figures


def lowest(pipeline: Any, wanted: dict[tuple[str, str, tuple[int, int]], np.ndarray]) -> dict[str, float | None]:
    """Lowest PSNR per scheduler, in dB; ``null`` when every picture is identical."""
    worst: dict[str, float] = {}
    for (scheduler, prompt, (width, height)), image in wanted.items():
        made = pipeline(
            prompt,
            seed=SEED,
            width=width,
            height=height,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            scheduler=scheduler,
        )
        value = psnr(np.asarray(made.images[0]), image)
        worst[scheduler] = min(worst.get(scheduler, float("inf")), value)
    return {k: round(v, 2) if np.isfinite(v) else None for k, v in worst.items()}
