"""What loaders of other tools share: the request, our noise, and their steps as our events. NumPy only."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.bench.peer_table import PEERS, Peer
from intaglio.bench.peers import COMMAND, PREPARED, export_folder
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.profiles.registry import pick
from intaglio.runtimes.noise import Noise, batch_randn
from intaglio.runtimes.sampling import Clock, Result, StepEvent

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A complete request: what was not said is the artifact's own. Picture k has the seed ``seed + k``."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str | None
    count: int
    shape: tuple[int, int, int, int]

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return [self.seed + k for k in range(self.count)]

    def noises(self) -> list[Noise]:
        """A stream of noise a picture, from its beginning."""
        return [Noise(seed) for seed in self.seeds]

    def noise(self) -> np.ndarray:
        """The noise our own loop starts from, float32 `shape`."""
        return batch_randn(self.noises(), self.shape)


@dataclass(slots=True, kw_only=True)
class Made:
    """What a tool made: latents [pictures, C, h, w] after every step, its timestep and seconds; pictures; stages."""

    images: list[Image] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)


class PeerPipeline(ABC):
    """Another tool's pipeline with the methods of ours that a worker calls.

    The tools call back after a step and do not wait; their steps are handed on as events once the picture is there, so
    that nothing of ours runs between them.

    Attributes:
        compile_seconds: by component, where the tool compiles while it loads and lets it be told apart.
    """

    compile_seconds: Mapping[str, float] | None = None

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest

    @abstractmethod
    def generate(self, asked: Asked) -> Made:
        """Make the pictures."""

    @abstractmethod
    def close(self) -> None:
        """Drop everything."""

    def memory(self) -> dict[str, Any]:
        """What the tool says it holds: nothing; measure the process."""
        return {}

    def ask(
        self,
        prompt: str,
        *,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        guidance_scale: float | None = None,
        count: int = 1,
    ) -> Asked:
        """The request, completed from the artifact as ours is."""
        shapes, settings = self.manifest.shapes, self.manifest.settings
        width = shapes["width"].opt if width is None else width
        height = shapes["height"].opt if height is None else height
        factor = settings["vae_scale_factor"]
        return Asked(
            prompt=prompt,
            seed=seed,
            width=width,
            height=height,
            steps=settings["num_inference_steps"] if num_inference_steps is None else num_inference_steps,
            guidance_scale=float(settings["guidance_scale"] if guidance_scale is None else guidance_scale),
            scheduler=scheduler,
            count=count,
            shape=(count, settings["latent_channels"], height // factor, width // factor),
        )

    def stream(self, prompt: str, **said: Any) -> Generator[StepEvent, None, Result]:
        """See `intaglio.runtimes.pipeline.Pipeline.stream`; `said` as for `ask`."""
        asked = self.ask(prompt, **said)
        made = self.generate(asked)
        steps = zip(made.latents, made.timesteps, made.seconds, strict=True)
        for index, (latents, timestep, seconds) in enumerate(steps):
            yield StepEvent(index=index, total=len(made.latents), timestep=timestep, latents=latents, seconds=seconds)
        parameters = {
            "prompt": prompt,
            "num_inference_steps": asked.steps,
            "guidance_scale": asked.guidance_scale,
            "scheduler": asked.scheduler or "own",
            "seed": asked.seed,
            "width": asked.width,
            "height": asked.height,
        }
        return Result(
            images=made.images,
            latents=made.latents[-1],
            seeds=asked.seeds,
            seconds=made.clock.seconds,
            parameters=parameters,
        )


class Watch:
    """Times calls into a tool's parts by replacing methods; the first call of a denoiser begins the first step."""

    def __init__(self) -> None:
        self.made, self.before = Made(), 0.0

    def start(self) -> Made:
        """Forget what was; the next step begins with the denoiser's next call."""
        self.made, self.before = Made(), 0.0
        return self.made

    def wrap(self, owner: Any, method: str, stage: str) -> None:
        """Time ``owner.method`` as `stage`."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if stage == "denoiser" and not self.before:
                self.before = time.perf_counter()
            with self.made.clock.stage(stage):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def step(self, latents: np.ndarray, timestep: float) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.made.latents.append(latents)
        self.made.timesteps.append(timestep)
        self.made.seconds.append(now - self.before)
        self.before = now


def opened(
    artifact: str | Path, backend: str, settings: Mapping[str, str] | None
) -> tuple[Artifact, Peer, dict[str, str]]:
    """The artifact, the peer's row and the settings of a loader's call.

    Raises:
        UsageError: a setting other than ``export``, a folder to load in place of the peer's own export.
        Unsupported: the peer was not tried with the family.
    """
    row, told = pick(PEERS, backend, "peer"), dict(settings or {})
    for key in told:
        if key != "export" or not row.export:
            raise UsageError(
                f"the peer {backend} has no setting {key!r}; allowed: {'export' if row.export else 'none'}"
            )
    found = Artifact.open(artifact, verify=False)  # it says what is asked for; none of its weights are read
    family = found.manifest.family
    added = [kind for kind in ("loras", "embeddings") if found.manifest.provenance.get(kind)]
    if added and "export" not in told:
        raise Unsupported(
            f"the peer {backend} loads the checkpoint alone; {artifact} was built with {', '.join(added)}"
        )
    if family not in row.families:
        raise Unsupported(f"the peer {backend} does not run the family {family!r}; it runs {', '.join(row.families)}")
    return found, row, told


def exported(backend: str, checkpoint: str, told: Mapping[str, str]) -> Path:
    """The folder that a tool loads: the one told, or what `intaglio.bench.peers` had it make of the checkpoint.

    Raises:
        UsageError: there is none; with the command that makes it.
    """
    if told.get("export"):
        return Path(told["export"])
    if not checkpoint:
        raise UsageError(f"the peer {backend} needs the checkpoint; add --checkpoint DIR")
    folder = export_folder(backend, Path(checkpoint))
    if not (folder / PREPARED).exists():
        raise UsageError(
            f"{backend} has no export of {checkpoint}; run: {COMMAND} prepare {backend} --checkpoint {checkpoint}"
        )
    return folder


def need_cpu(backend: str, device: str) -> None:
    """Refuse another device.

    Raises:
        Unsupported: it is not ``cpu``.
    """
    if device != "cpu":
        raise Unsupported(f"the peer {backend} is measured on the CPU, not on {device!r}; add --device cpu")
