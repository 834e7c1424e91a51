"""What a worker tells of a request: always an end, and something in between that shows that it lives."""

from __future__ import annotations

import io
import time

import pytest
import serve_stub
from PIL import Image

from intaglio.profiles.errors import NumericsError, ToolError, UsageError
from intaglio.runtimes.batching import Batcher, Outcome
from intaglio.runtimes.sampling import Parameter, Result, StepEvent
from intaglio.runtimes.serve_faults import said
from intaglio.runtimes.serve_wire import read
from intaglio.runtimes.serve_worker import Worker

WISH = {"form": "png", "compression": 90, "texts": {}, "previews": set()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = serve_stub.hollow(tmp_path_factory.mktemp("worker") / "one")
    return serve_stub.load(folder, settings={"seconds": "0"}, backend="null")


@pytest.fixture
def worker(pipeline):
    worker = Worker(io.BytesIO())
    worker.pipeline, worker.batcher = pipeline, Batcher(pipeline)
    return worker


def told(worker):
    """The events so far."""
    worker.encoder.shutdown(wait=True)
    worker.out.seek(0)
    return [header for header, _ in iter(lambda: read(worker.out), None)]


def test_a_picture_that_cannot_be_sent_is_answered_as_an_error(worker):
    """Nobody sees what a thread raises: the request would wait until its deadline, and its place with it."""
    result = Result(
        images=[Image.new("RGB", (8, 8))], latents=None, seeds=[0], seconds={}, parameters={"x": float("inf")}
    )
    worker.wishes["one"] = dict(WISH)
    worker.ended(Outcome("one", result, None))
    (event,) = told(worker)
    assert (event["event"], event["id"], event["kind"]) == ("error", "one", "internal")


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", float("nan")])
@pytest.mark.parametrize("minimum", [None, 0.0])
def test_a_number_that_is_not_finite_is_refused_however_it_is_written(text, minimum):
    parameter = Parameter(kind=float, default=1.0, help="bytes", minimum=minimum)
    with pytest.raises(UsageError, match=r"vae_memory .* is not a finite number"):
        parameter.read("vae_memory", text)


def test_a_preview_that_cannot_be_made_costs_the_picture_nothing(worker, capsys):
    def nothing(decoder):
        raise NumericsError("image 0 has a single colour")

    worker.wishes["one"] = {**WISH, "previews": {0, 1}}
    for index in range(2):
        worker.stepped("one", StepEvent(index=index, total=4, timestep=1, latents=None, seconds=0.1, preview=nothing))
    assert [event["event"] for event in told(worker)] == ["step", "step"]
    assert "NumericsError" in capsys.readouterr().err


def test_the_server_hears_of_every_part_of_a_long_round(worker, pipeline, monkeypatch):
    """Pictures of several sizes need a call each: one round can take longer than the watchdog waits for a word."""
    true, sizes = pipeline.engines["unet"].run, ((64, 64), (96, 64), (64, 96))
    monkeypatch.setattr(pipeline.engines["unet"], "run", lambda feeds: time.sleep(0.02) or true(feeds))
    worker.quiet = 0.01
    worker.batcher = Batcher(pipeline, between=worker.between)
    for width, height in sizes:
        request = pipeline.request("heart", seed=1, width=width, height=height, num_inference_steps=2)
        worker.batcher.add(f"{width}x{height}", request)
    worker.batcher.advance()
    assert [event["event"] for event in told(worker)].count("call") >= len(sizes)


MEMORY = (
    "cuMemAlloc_v2 failed on cuda:0: out of memory",
    "cuMemAlloc_v2 failed on cuda:0: CUDA_ERROR_OUT_OF_MEMORY",
    "TensorRT refuses unet: Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)",
)


@pytest.mark.parametrize("text", MEMORY)
def test_a_device_that_has_no_memory_left_is_not_a_broken_engine(text):
    """503, to be tried again with fewer pixels, not 500; and the worker stays."""
    kind, words = said(ToolError(text))
    assert kind == "memory"
    assert "not enough memory" in words
    assert said(ToolError("TensorRT refuses unet: an illegal memory access"))[0] == "engine"


def test_a_client_whose_request_fails_again_and_again_does_not_end_others(worker):
    for _ in range(5):
        worker.faults.failed("internal")
        worker.faults.failed("engine")
        assert not worker.faults.hopeless
        worker.faults.step()
