"""Sample a prompt from given noise and keep what comparisons need: picture, latents of every step, component calls."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.certificate import IDENTICAL, Comparison, Prompt
from intaglio.profiles.errors import NumericsError
from intaglio.runtimes.engine import Engine, EngineOptions
from intaglio.runtimes.fidelity import WINDOW, psnr, relative_l2, ssim
from intaglio.runtimes.host_memory import available_bytes
from intaglio.runtimes.noise import Noise, batch_randn
from intaglio.runtimes.pipeline import Pipeline
from intaglio.runtimes.probe import as_samples, memory_of, waves
from intaglio.runtimes.sampling import Request, Result

DEVICES = {"tensorrt": "cuda:0"}  # the CPU elsewhere
FLOAT_BYTES, ROOM = 4, 1.25  # every weight as float32, and a quarter more for activations


@dataclass(frozen=True, slots=True)
class Call:
    """What a component was fed at a place (``text``, ``step 3``, ``decode``), and what it answered."""

    component: str
    place: str
    feeds: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


@dataclass(slots=True)
class Trajectory:
    """One prompt's run: uint8 [H, W, 3], final latents and those after each step float32 [1, C, h, w], kept calls."""

    image: np.ndarray
    latents: np.ndarray
    steps: list[np.ndarray]
    calls: list[Call] = field(default_factory=list)


class Watch:
    """An artifact's engines (see `loop.Components`) that remember their calls where `wanted` says so."""

    def __init__(self, pipeline: Pipeline, *, keep: bool) -> None:
        self.engines, self.denoiser, self.keep = pipeline.engines, pipeline.sampler.denoiser, keep
        self.calls: list[Call] = []
        self.step, self.total = 0, 0  # the evaluation that comes next, and of how many; 0: not known yet

    def __getitem__(self, name: str) -> Engine:
        """The engine of a component, watched."""
        return Watched(self.engines[name], name, self) if self.keep else self.engines[name]

    def release(self, *names: str) -> None:
        """Pass it on."""
        self.engines.release(*names)

    def note(self, name: str, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Keep a call, the denoiser's at the first, the middle and the last step."""
        place = "text" if not self.total else "decode"
        if name == self.denoiser:
            if self.step not in (0, self.total // 2, self.total - 1):
                return
            place = f"step {self.step}"
        self.calls.append(Call(name, place, dict(feeds), outputs))


class Watched:
    """One engine of a `Watch`."""

    def __init__(self, engine: Engine, name: str, watch: Watch) -> None:
        self.engine, self.name, self.watch = engine, name, watch

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        outputs = self.engine.run(feeds)
        self.watch.note(self.name, feeds, outputs)
        return outputs

    def memory(self) -> dict[str, int | None]:
        """Not said."""
        return memory_of(self)

    def close(self) -> None:
        """Leave that to the pipeline."""


def weight_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes of each component with every weight as float32."""
    return {name: record.parameters * FLOAT_BYTES for name, record in artifact.manifest.components.items()}


def fits_whole(artifact: Artifact) -> bool:
    """Whether all components can stay loaded; where not, each is loaded while it is needed."""
    available = available_bytes()
    return available is None or sum(weight_bytes(artifact).values()) * ROOM <= available


def lack_of_memory(artifact: Artifact) -> str | None:
    """Why not even one component after the other fits in float32; ``None`` where it does."""
    available = available_bytes()
    name, largest = max(weight_bytes(artifact).items(), key=lambda row: row[1])
    if available is None or largest * ROOM <= available:
        return None
    return f"{name} takes about {largest * ROOM / 2**30:.1f} GiB in float32, {available / 2**30:.1f} GiB are available"


@contextlib.contextmanager
def opened(artifact: Artifact, backend: str) -> Iterator[Pipeline]:
    """A pipeline whose engines are loaded once where memory allows, and given back at the end."""
    pipeline = Pipeline(artifact, backend, EngineOptions(device=DEVICES.get(backend, "cpu")), residency="low")
    pipeline.engines.keep = fits_whole(artifact)
    try:
        yield pipeline
    finally:
        pipeline.close()


def request_of(pipeline: Pipeline, prompt: Prompt, steps: int | None, noise: np.ndarray | None = None) -> Request:
    """The artifact's own size and settings.

    Samplers that draw noise at every step take it from the seed behind the prompt's: its own gives the first noise.
    """
    size = pipeline.sampler.size(())
    images = (waves(*size),) if pipeline.sampler.needs_images else ()
    return pipeline.request(prompt.text, seed=prompt.seed + 1, images=images, num_inference_steps=steps, latents=noise)


def initial_noise(pipeline: Pipeline, prompt: Prompt) -> np.ndarray:
    """The noise a prompt starts from, float32 [1, C, h, w]."""
    shape = pipeline.sampler.latent_shape(request_of(pipeline, prompt, None))
    return batch_randn([Noise(prompt.seed)], shape)


def digest_of(noise: np.ndarray) -> str:
    """sha256 of the values as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(noise, "<f4").tobytes()).hexdigest()


def trajectory(
    pipeline: Pipeline,
    request: Request,
    *,
    keep: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Trajectory:
    """Run one request; with `keep` the calls of its components too, and of those that only pictures or latents feed.

    Raises:
        NumericsError: a component returned NaN, infinity, or a picture without content.
    """
    watch, steps = Watch(pipeline, keep=keep), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cut prompt is cut everywhere
        events = pipeline.sampler.stream(watch, request)
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                result: Result = stop.value
                break
            watch.step, watch.total = event.index + 1, event.total
            note(f"step {event.index + 1} of {event.total}")
            steps.append(event.latents)
    if keep:
        feed_others(watch, pipeline, result)
    return Trajectory(np.asarray(result.images[0].convert("RGB")), result.latents, steps, watch.calls)


def feed_others(watch: Watch, pipeline: Pipeline, result: Result) -> None:
    """Feed what the loop did not: the VAE encoder the picture, a tiny VAE the latents."""
    called = {call.component for call in watch.calls}
    others = {"vae_encoder": ("sample", as_samples(result)), "vae_preview": ("latent_sample", result.latents)}
    for name, (feed, values) in others.items():
        if name in pipeline.artifact.manifest.components and name not in called:
            watch[name].run({feed: values})
            watch.release(name)


def component_errors(
    pipeline: Pipeline, references: Mapping[str, Sequence[Trajectory]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Relative L2 of every component's outputs on each reference's feeds: reference, component, place to error.

    Raises:
        NumericsError: an error is not a finite number.
    """
    calls = [(name, call) for name, runs in references.items() for run in runs for call in run.calls]
    errors: dict[str, dict[str, dict[str, float]]] = {name: {} for name in references}
    for component in pipeline.artifact.manifest.components:
        for name, call in calls:
            if call.component != component:
                continue
            outputs = pipeline.engines[component].run(call.feeds)
            error = max(relative_l2(outputs[key], value) for key, value in call.outputs.items())
            if not np.isfinite(error):
                raise NumericsError(f"{component} on {pipeline.backend} differs by {error} from {name} at {call.place}")
            places = errors[name].setdefault(component, {})
            places[call.place] = rounded(max(error, places.get(call.place, 0.0)))
        pipeline.engines.release(component)
    return errors


def compare(
    runs: Sequence[Trajectory], reference: Sequence[Trajectory], components: dict[str, dict[str, float]]
) -> Comparison:
    """Pictures, latents and drift of runs against those of a reference, prompt by prompt."""
    pairs = list(zip(runs, reference, strict=True))
    return Comparison(
        psnr=tuple(decibels(a.image, b.image) for a, b in pairs),
        ssim=tuple(similarity(a.image, b.image) for a, b in pairs),
        latents=tuple(rounded(relative_l2(a.latents, b.latents)) for a, b in pairs),
        drift=tuple(tuple(rounded(relative_l2(x, y)) for x, y in zip(a.steps, b.steps, strict=True)) for a, b in pairs),
        components=components,
    )


def decibels(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB, `IDENTICAL` at most."""
    return round(min(psnr(image, reference), IDENTICAL), 2)


def similarity(image: np.ndarray, reference: np.ndarray) -> float | None:
    """SSIM; ``None`` for a picture smaller than its window."""
    return round(ssim(image, reference), 4) if min(image.shape[:2]) >= WINDOW else None


def rounded(value: float) -> float:
    """Four digits: the others differ from run to run."""
    return float(f"{value:.3e}")
