"""OpenVINO GenAI: optimum-intel's export of a checkpoint, run by its C++ loop. Its environment has no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.bench.peer_common import Asked, Made, PeerPipeline, exported, need_cpu, opened
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.engine_openvino import compile_settings
from intaglio.runtimes.noise import Noise, batch_randn

SCHEDULERS = {
    "ddim": "DDIM",
    "pndm": "PNDM",
    "euler": "EULER_DISCRETE",
    "euler_a": "EULER_ANCESTRAL_DISCRETE",
    "lcm": "LCM",
    "flow_match_euler": "FLOW_MATCH_EULER_DISCRETE",
}
MICROSECONDS, MILLISECONDS = 1e-6, 1e-3


class GenAiPipeline(PeerPipeline):
    """A Text2ImagePipeline of `folder`.

    Latents between the steps are those its callback is given: what the schedulers of Euler and LCM take for the clean
    picture, so they are comparable after the last step alone.
    """

    def __init__(self, artifact: Artifact, folder: Path, options: Mapping[str, str], *, taylorseer: bool) -> None:
        import openvino_genai

        super().__init__(artifact)
        self.pipe = openvino_genai.Text2ImagePipeline(str(folder))
        self.config = folder / "scheduler/scheduler_config.json"
        self.scheduler: str | None = None
        chosen = self.pipe.get_generation_config()
        if not taylorseer:
            chosen.taylorseer_config = None
        elif chosen.taylorseer_config is None:
            raise Unsupported(f"OpenVINO GenAI has no TaylorSeer for the family {artifact.manifest.family!r}")
        self.pipe.set_generation_config(chosen)
        start = time.perf_counter()
        self.pipe.compile("CPU", **options)
        self.compile_seconds = {"all": time.perf_counter() - start}

    def generate(self, asked: Asked) -> Made:
        """See `PeerPipeline.generate`."""
        from PIL import Image

        self._schedule(asked.scheduler)
        made = Made()

        def after(index: int, total: int, latents: Any) -> bool:
            made.latents.append(self.unpacked(np.array(latents.data, dtype=np.float32), asked))
            made.timesteps.append(float("nan"))  # it does not say
            return False

        result = self.pipe.generate(
            asked.prompt,
            width=asked.width,
            height=asked.height,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            num_images_per_prompt=asked.count,
            generator=generator_of(asked.noises()),
            callback=after,
        )
        # Its tensor is a view of a buffer that the next picture overwrites.
        made.images = [Image.fromarray(picture) for picture in np.array(result.data)]
        self._measured(made, result)
        return made

    def _measured(self, made: Made, result: Any) -> None:
        """Its own figures: the callback runs in a thread of its own, after the fact."""
        metrics = self.pipe.get_performance_metrics()
        raw = metrics.raw_metrics
        made.seconds = [float(us) * MICROSECONDS for us in raw.iteration_durations]
        inferences = [*raw.unet_inference_durations, *raw.transformer_inference_durations]
        made.clock.seconds["denoiser"] = sum(float(us) for us in inferences) * MICROSECONDS
        for name, ms in metrics.get_text_encoder_infer_duration().items():
            made.clock.seconds[name.replace("text_encode_", "text_encoder_")] = float(ms) * MILLISECONDS
        made.clock.seconds["vae_decoder"] = float(metrics.get_vae_decoder_infer_duration()) * MILLISECONDS

    def _schedule(self, name: str | None) -> None:
        """Use another scheduler with the checkpoint's configuration.

        Raises:
            Unsupported: GenAI has none of this name.
        """
        import openvino_genai

        if name == self.scheduler:
            return
        if name is not None and name not in SCHEDULERS:
            raise Unsupported(f"OpenVINO GenAI has no scheduler {name!r}; it has {', '.join(SCHEDULERS)}")
        kind = getattr(openvino_genai.Scheduler.Type, SCHEDULERS[name] if name else "AUTO")
        self.pipe.set_scheduler(openvino_genai.Scheduler.from_config(str(self.config), kind))
        self.scheduler = name

    def unpacked(self, latents: np.ndarray, asked: Asked) -> np.ndarray:
        """What its callback is given, as [B, C, h, w]."""
        if latents.ndim == len(asked.shape):
            return latents
        b, c, h, w = asked.shape
        return latents.reshape(b, h // 2, w // 2, c, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    def close(self) -> None:
        """Drop the pipeline."""
        self.pipe = None


def generator_of(noises: Sequence[Noise]) -> Any:
    """A GenAI generator that draws our noise, a stream a picture."""
    import openvino
    import openvino_genai

    class Ours(openvino_genai.Generator):
        def __init__(self) -> None:
            super().__init__()

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(batch_randn(noises, tuple(shape)))

        def next(self) -> float:
            return float(noises[0].randn((1,))[0])

        def seed(self, new_seed: int) -> None:
            raise NotImplementedError

    return Ours()


def load(
    artifact: str | Path,
    *,
    backend: str,
    device: str = "cpu",
    threads: int = 0,
    checkpoint: str = "",
    settings: Mapping[str, str] | None = None,
    verify: bool = True,
) -> GenAiPipeline:
    """Text2ImagePipeline on the export of a checkpoint; arguments as of `intaglio.load`.

    Raises:
        UsageError: there is no export.
        Unsupported: another device than the CPU.
    """
    need_cpu(backend, device)
    found, row, told = opened(artifact, backend, settings)
    folder = exported(backend, checkpoint, told)
    options = compile_settings("CPU", threads, "f32", None)
    return GenAiPipeline(found, folder, options, taylorseer=bool(row.options.get("taylorseer")))
