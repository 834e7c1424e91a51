"""diffusers, eager or with torch.compile; and what optimum's pipelines, diffusers' own loops, share with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.bench.peer_common import Asked, Made, PeerPipeline, Watch, opened
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import Unsupported
from intaglio.profiles.registry import need, pick
from intaglio.runtimes.schedulers import DIFFUSERS_CLASSES, PRESETS, PROCESSES, SchedulerConfig

CLASSES = {ours: theirs for theirs, ours in DIFFUSERS_CLASSES.items()}
CLASSES |= dict.fromkeys(PRESETS, "DPMSolverMultistepScheduler")
DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class DiffusersPipeline(PeerPipeline):
    """A pipeline object with the call of diffusers' pipelines.

    Args:
        artifact: says what is asked for where a request does not.
        pipe: the pipeline, with its components.
    """

    def __init__(self, artifact: Artifact, pipe: Any) -> None:
        super().__init__(artifact)
        self.pipe = pipe
        self.own_scheduler = pipe.scheduler
        self.watch = Watch()
        pipe.set_progress_bar_config(disable=True)
        for name in (*DENOISERS, *ENCODERS):
            if getattr(pipe, name, None) is not None:
                self.watch.wrap(getattr(pipe, name), "forward", "denoiser" if name in DENOISERS else name)
        self.watch.wrap(pipe.vae, "decode", "vae_decoder")

    def generate(self, asked: Asked) -> Made:
        """See `PeerPipeline.generate`."""
        import torch

        made = self.watch.start()
        self.pipe.scheduler = self.scheduler(asked.scheduler)
        generators = [torch.Generator().manual_seed(seed) for seed in asked.seeds]
        for generator in generators:  # ancestral noise goes on where the starting noise ends
            torch.randn((1, *asked.shape[1:]), generator=generator)

        def after(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            self.watch.step(self.unpacked(values["latents"].float().cpu().numpy(), asked), float(timestep))
            return values

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated ways in which the pipelines call each other
            made.images = self.pipe(
                prompt=asked.prompt,
                width=asked.width,
                height=asked.height,
                num_inference_steps=asked.steps,
                guidance_scale=asked.guidance_scale,
                num_images_per_prompt=asked.count,
                generator=generators,
                latents=torch.from_numpy(self.packed(asked.noise())).to(self.pipe.device),
                callback_on_step_end=after,
            ).images
        return made

    def scheduler(self, name: str | None) -> Any:
        """The checkpoint's own scheduler, or the class of this name with the checkpoint's configuration.

        Raises:
            Unsupported: ours of this name cannot sample the checkpoint, or does with a configuration of its own.
        """
        import diffusers

        if name is None:
            return self.own_scheduler
        kind = pick(CLASSES, name, "scheduler")
        config = dict(self.own_scheduler.config)
        process = SchedulerConfig.from_dict({**config, "_class_name": type(self.own_scheduler).__name__}).process
        if name not in PROCESSES[process] or (process == "flow" and name != "flow_match_euler"):
            raise Unsupported(f"scheduler {name!r} is not compared on a {process} checkpoint; leave it out")
        return getattr(diffusers, kind).from_config(self.own_scheduler.config, **PRESETS.get(name, {}))

    def packed(self, noise: np.ndarray) -> np.ndarray:
        """Noise [B, C, h, w] as the family's pipeline takes latents: FLUX as patches [B, h/2 w/2, 4C]."""
        if self.manifest.family != "flux":
            return noise
        b, c, h, w = noise.shape
        patches = noise.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
        return np.ascontiguousarray(patches.reshape(b, h * w // 4, 4 * c))

    def unpacked(self, latents: np.ndarray, asked: Asked) -> np.ndarray:
        """What the pipeline calls latents, as [B, C, h, w]: a copy."""
        if self.manifest.family != "flux":
            return latents.copy()
        b, c, h, w = asked.shape
        return latents.reshape(b, h // 2, w // 2, c, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    def close(self) -> None:
        """Drop the pipeline."""
        self.pipe = None


def load(
    artifact: str | Path,
    *,
    backend: str,
    device: str = "cpu",
    threads: int = 0,
    checkpoint: str = "",
    settings: Mapping[str, str] | None = None,
    verify: bool = True,
) -> DiffusersPipeline:
    """A pipeline of diffusers on the checkpoint that an artifact was built from; arguments as of `intaglio.load`.

    Raises:
        CheckpointError: the checkpoint cannot be found.
        MissingDependency: diffusers or torch is not installed.
    """
    from intaglio.exporters.checkpoint_index import find_checkpoint
    from intaglio.exporters.engine_torch import torch_device

    torch, diffusers = need("torch", extra="export"), need("diffusers", extra="export")
    found, row, _ = opened(artifact, backend, settings)
    if threads:
        torch.set_num_threads(threads)
    folder = find_checkpoint(found.manifest.provenance, checkpoint).folder
    place = torch_device(device)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent(folder)).to(place)
    if row.options.get("compile"):
        for name in DENOISERS:
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).forward = torch.compile(getattr(pipe, name).forward)
        pipe.vae.decoder.forward = torch.compile(pipe.vae.decoder.forward)
    return DiffusersPipeline(found, pipe)


def absent(folder: Path) -> dict[str, None]:
    """Parts a checkpoint goes without, which diffusers wants named; a safety checker is no part of what is compared."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    missing: dict[str, None] = dict.fromkeys(part for part, kind in index.items() if kind == [None, None])
    return {**missing, **({"safety_checker": None} if "safety_checker" in index else {})}
