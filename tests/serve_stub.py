"""A server's insides for tests: an artifact without weights, a worker that does harm when asked to, and a hub to drive.

`load` has the signature of `intaglio.load`; a worker finds it as ``ModelSettings.loader``, `LOADER`. It makes pictures
with the ``null`` backend, whose numbers depend on the request and the build alone. A prompt's first word may be one of
ACTS, which happens at the request's second step.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path

import intaglio
from intaglio.profiles.artifact import seal
from intaglio.profiles.manifest import SCHEMA_VERSION, Manifest
from intaglio.profiles.spec import ComponentRecord, Range, TensorSpec
from intaglio.runtimes.evaluation import Evaluation

LOADER = "serve_stub:load"
HERE = Path(__file__).parent
EMOJI = HERE.parent / "profiles/emoji"
STATES, CHANNELS = 160, 16
SECRET = "/canary/of-a-defect"
FEEDS = {
    "text_encoder": ([("input_ids", "int64", "batch tokens")], [("last_hidden_state", f"batch tokens {STATES}")]),
    "unet": (
        [
            ("sample", "float32", f"batch {CHANNELS} height/16 width/16"),
            ("timestep", "float32", "batch"),
            ("encoder_hidden_states", "float32", f"batch context_tokens {STATES}"),
        ],
        [("out_sample", f"batch {CHANNELS} height/16 width/16")],
    ),
    "vae_decoder": (
        [("latent_sample", "float32", f"batch {CHANNELS} height/16 width/16")],
        [("sample", "batch 3 height width")],
    ),
}


def shape(text):
    return tuple(int(word) if word.isdigit() else word for word in text.split())


def hollow(folder, *, scaling_factor=1.0, ballast=0):
    """An artifact of the family ``sd`` with the embedded checkpoint's tokenizer and nothing to compute with.

    Builds of another `scaling_factor` make other pictures; `ballast` bytes make it larger.
    """
    folder = Path(folder)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(EMOJI / name, folder / name)
    (folder / "vae_decoder").mkdir()
    shutil.copy(EMOJI / "vae/config.json", folder / "vae_decoder")
    (folder / "ballast").write_bytes(bytes(ballast))
    components = {
        name: ComponentRecord(
            source=name,
            inputs=tuple(TensorSpec(name=n, dtype=d, shape=shape(s)) for n, d, s in inputs),
            outputs=tuple(TensorSpec(name=n, dtype="float32", shape=shape(s)) for n, s in outputs),
            parameters=0, format="none", targets=("onnx",), tensors={}, weights={},
        )
        for name, (inputs, outputs) in FEEDS.items()
    }  # fmt: skip
    pixels = Range(min=64, opt=64, max=4096, multiple=16)
    tokens = Range(min=8, opt=24, max=24)
    settings = {
        "guidance_scale": 2.0, "latent_channels": CHANNELS, "num_inference_steps": 4, "scaling_factor": scaling_factor,
        "unet_in_channels": CHANNELS, "vae_scale_factor": 16,
    }  # fmt: skip
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, family="sd", name="hollow", components=components,
        shapes={"batch": Range(min=1, opt=2, max=16), "height": pixels, "width": pixels, "tokens": tokens,
                "context_tokens": Range(min=8, opt=24, max=96)},
        settings=settings, recipe={}, contract={}, dtypes={}, licence=None, provenance={}, engines={}, files={},
    )  # fmt: skip
    seal(folder, manifest, {})
    return folder


class Slow:
    """A denoiser that takes its time, and has no memory for rows of a negative timestep."""

    def __init__(self, engine, seconds):
        self.engine, self.seconds = engine, seconds

    def run(self, feeds):
        time.sleep(self.seconds)
        if (feeds["timestep"] < 0).any():
            raise RuntimeError("std::bad_alloc")
        return self.engine.run(feeds)

    def memory(self):
        return {}

    def close(self):
        pass


def no_memory(wanted):
    raise MemoryError


def defect(wanted):
    raise KeyError(f"{SECRET} of a defect")


def starved(wanted):
    return dataclasses.replace(wanted, feeds=tuple({**f, "timestep": f["timestep"] * 0 - 1} for f in wanted.feeds))


ACTS = {
    "abort": lambda wanted: os.abort(),
    "hang": lambda wanted: time.sleep(3600),
    "memory": no_memory,
    "starved": starved,
    "defect": defect,
}


def haunted(work, prompt):
    """A request's work (see `Sampler.work`) with its act; ``broken`` fails at once."""
    answer, count, act = None, 0, ACTS.get(prompt.split(" ")[0])
    if prompt == "broken":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    while True:
        try:
            wanted = work.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(wanted, Evaluation):
            count += 1
            wanted = act(wanted) if act is not None and count == 2 else wanted
        answer = yield wanted


def load(folder, *, settings, backend, **options):
    """See `intaglio.load`; ``settings["seconds"]`` is what a call of the denoiser takes."""
    if (Path(folder) / "ballast").read_bytes()[:6] == b"broken":
        raise RuntimeError(f"{folder} is broken")
    pipe = intaglio.load(folder, backend="null", **options)
    pipe.engines.loaded["unet"] = Slow(pipe.engines["unet"], float(settings.get("seconds", 0.002)))
    inner = pipe.sampler.work
    pipe.sampler.work = lambda engines, request: haunted(inner(engines, request), request.prompts[0])
    return pipe


@contextlib.asynccontextmanager
async def started(*folders, seconds=0.002, hub=None, **model):
    """A hub whose workers run; `hub` are HubSettings' arguments, `model` ModelSettings'."""
    from intaglio.runtimes.serve_hub import Hub, HubSettings
    from intaglio.runtimes.serve_model import ModelSettings

    settings = {"seconds": str(seconds)}
    models = [
        ModelSettings(name=Path(f).name, folder=Path(f), backend="null", loader=LOADER, settings=settings, **model)
        for f in folders
    ]
    made = Hub(models, HubSettings(**(hub or {})))
    await made.start()
    try:
        yield made
    finally:
        await made.close(1)


class Worker:
    """A worker without a process: it holds `size` bytes, and does nothing until told how a picture ended."""

    def __init__(self, size=0):
        self.size, self.alive, self.warm, self.expected, self.pid = size, True, True, False, None
        self.receivers, self.pulse = {}, {}
        self.facts, self.gone = {"seconds": 0.0}, asyncio.Event()
        self.gone.set()  # it leaves as soon as it may

    def held(self):
        return self.size

    def run(self, ident, message, receiver):
        self.receivers[ident] = receiver

    def cancel(self, ident):
        self.receivers.pop(ident, None)

    async def stop(self, patience):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.gone.wait(), patience)

    async def kill(self):
        pass


@contextlib.asynccontextmanager
async def imagined(*folders, size=100, loaded=None, hub=None, **model):
    """A started hub of such workers, of which the first `loaded` are there; on disk each artifact is `size` bytes."""
    from intaglio.runtimes.serve_hub import Hub, HubSettings
    from intaglio.runtimes.serve_model import ModelSettings

    models = [ModelSettings(name=Path(f).name, folder=Path(f), backend="null", **model) for f in folders]
    made = Hub(models, HubSettings(**(hub or {})))

    def prepare(one):
        async def start():
            await asyncio.sleep(0)
            return Worker(size), one.reader, size

        async def look():
            pass

        one.estimate, one._started, one.look = size, start, look

    for number, one in enumerate(made.models.values()):
        prepare(one)
        if loaded is None or number < loaded:
            await one.load()
    made.started = True
    try:
        yield made
    finally:
        await made.close(0)


def order(prompt="heart", *, steps=4, seed=0, **rest):
    """An order of small pictures."""
    from intaglio.runtimes.serve_ticket import Order

    own = {"seed": seed, "num_inference_steps": steps, "guidance_scale": 2.0, **rest.pop("parameters", {})}
    return Order(prompt=prompt, parameters=own, **rest)


async def until(condition, seconds=20):
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.005)


async def ending(ticket):
    """A ticket's pictures as bytes, or the error's class and status."""
    from intaglio.runtimes.serve_errors import ServeError

    try:
        return [picture.data for picture in await ticket.result()]
    except ServeError as error:
        return error


class Live:
    """A hub in a thread of its own, so that tests share its workers: ``live.run(coroutine)``."""

    def __init__(self, *folders, **settings):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.context = started(*folders, **settings)
        self.hub = self.run(self.context.__aenter__())

    def run(self, work, seconds=60):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def stop(self):
        self.run(self.context.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)


def findable():
    """Let worker processes find this module."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
