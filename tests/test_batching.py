"""Continuous batching: a picture is the same alone and in any company, and costs its share of the calls."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

import intaglio
from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.runtimes.batching import Batcher
from intaglio.runtimes.embedding_cache import EmbeddingCache
from intaglio.runtimes.evaluation import Evaluation, batches, evaluate
from intaglio.runtimes.fidelity import relative_l2

# Relative L2 of final latents, in a batch against alone. Measured: 0 in float32, 7.4e-7 with int8 weights.
TOLERANCES = {"fp32": 1e-5, "int8": 1e-3}
BACKENDS = ("onnxruntime", "openvino")
PROMPTS = ("red heart", "cat face", "pizza", "a green apple", "star", "sun", "猫脸", "")
SCHEDULERS = (None, "euler", "euler_a", "dpmpp_2m", "unipc", "lcm", "ddim", "euler")


@pytest.fixture(scope="module")
def pipelines(tiny_artifact, tiny_artifact_int8):
    made = {
        (form, backend): intaglio.load(artifact, backend=backend)
        for form, artifact in (("fp32", tiny_artifact), ("int8", tiny_artifact_int8))
        for backend in BACKENDS
    }
    yield made
    for pipeline in made.values():
        pipeline.close()


def strangers(pipeline, count):
    """Requests that have nothing in common but the size: prompts, seeds, steps, schedulers, guidance."""
    return {
        str(k): pipeline.request(
            PROMPTS[k],
            seed=k,
            width=64,
            height=64,
            num_inference_steps=3 + k % 3,
            scheduler=SCHEDULERS[k],
            guidance_scale=(7.5, 1.0, 3.0)[k % 3],
            **({"negative_prompt": "blue"} if k % 3 == 2 else {}),
        )
        for k in range(count)
    }


def run(batcher, requests, joins=None, cancels=()):
    """Latents by name. `joins`: the round each joins at; `cancels`: (name, steps it has then)."""
    joins, left, found, steps = joins or dict.fromkeys(requests, 0), dict(requests), {}, dict.fromkeys(requests, 0)
    for rounds in itertools.count():
        for name in [n for n in left if joins[n] <= rounds]:

            def each(event, name=name):
                steps[name] += 1

            batcher.add(name, left.pop(name), each)
        for name, at in cancels:
            if steps.get(name) == at and name not in left:
                batcher.cancel(name)
        for outcome in batcher.advance():
            found[outcome.ident] = outcome.result.latents if outcome.error is None else outcome.error
        if not left and not len(batcher):
            return found
    return None


def alone(pipeline, requests):
    return {name: run(Batcher(pipeline), {name: request})[name] for name, request in requests.items()}


@pytest.mark.parametrize(("form", "backend"), itertools.product(TOLERANCES, BACKENDS))
def test_a_picture_is_the_same_in_every_company(pipelines, form, backend):
    """One to eight strangers, joining in any order at any step, some of them cancelled."""
    pipeline = pipelines[form, backend]
    requests = strangers(pipeline, 8)
    expected = alone(pipeline, requests)
    draw = random.Random(0)
    for count in range(1, 9):
        chosen = draw.sample(sorted(requests), count)
        joins = {name: draw.randrange(5) for name in chosen}
        cancelled = draw.sample(chosen, count // 3)
        found = run(Batcher(pipeline), {n: requests[n] for n in chosen}, joins, [(n, 1) for n in cancelled])
        assert found.keys() == set(chosen) - set(cancelled)
        for name, latents in found.items():
            assert relative_l2(latents, expected[name]) <= TOLERANCES[form], (count, joins, name)


def test_alone_in_the_batcher_is_the_plain_pipeline(pipelines):
    pipeline = pipelines["fp32", "onnxruntime"]
    requests = strangers(pipeline, 3)
    for name, latents in alone(pipeline, requests).items():
        *_, last = pipeline.sampler.stream(pipeline.engines, requests[name])
        assert relative_l2(latents, last.latents) <= TOLERANCES["fp32"]


def test_requests_share_calls_though_they_stand_at_different_steps(pipelines):
    pipeline = pipelines["fp32", "onnxruntime"]
    requests = {str(k): pipeline.request(PROMPTS[k], seed=k, num_inference_steps=4) for k in range(4)}
    batcher = Batcher(pipeline)
    run(batcher, requests, joins={str(k): k for k in range(4)})
    assert batcher.calls == 4 + 3  # the last one joins three rounds late
    assert batcher.rows_run == 4 * 4 * 2  # guidance: two rows a picture


def test_a_call_has_no_more_rows_than_allowed(pipelines):
    pipeline = pipelines["fp32", "onnxruntime"]
    requests = {str(k): pipeline.request(PROMPTS[k], seed=k, num_inference_steps=2) for k in range(4)}
    batcher = Batcher(pipeline, rows=4)
    found = run(batcher, requests)
    assert batcher.calls == 2 * 2
    expected = alone(pipeline, requests)
    assert all(relative_l2(found[n], expected[n]) <= TOLERANCES["fp32"] for n in requests)
    with pytest.raises(UsageError, match="1000 rows are not allowed: 1 to"):
        Batcher(pipeline, rows=1000)


def test_other_sizes_run_beside_in_calls_of_their_own(pipelines):
    pipeline = pipelines["fp32", "onnxruntime"]
    sizes = {"wide": (96, 64), "high": (64, 96), "wide too": (96, 64)}
    requests = {
        name: pipeline.request("star", seed=2, width=w, height=h, num_inference_steps=2)
        for name, (w, h) in sizes.items()
    }
    batcher = Batcher(pipeline)
    found = run(batcher, requests)
    assert batcher.calls == 2 * 2
    expected = alone(pipeline, requests)
    assert all(relative_l2(found[n], expected[n]) <= TOLERANCES["fp32"] for n in requests)


def test_a_request_that_fails_fails_alone(pipelines, monkeypatch):
    """NaN in one row is that request's; the others' pictures are what they are without it."""
    pipeline = pipelines["fp32", "onnxruntime"]
    requests = {str(k): pipeline.request(PROMPTS[k], seed=k, num_inference_steps=3) for k in range(3)}
    expected = alone(pipeline, requests)
    true = pipeline.sampler.model_feeds

    def poisoned(request, sample, timestep, branch):
        feeds = true(request, sample, timestep, branch)
        return {**feeds, "sample": feeds["sample"] * np.float32(np.nan)} if request.seed == 1 else feeds

    monkeypatch.setattr(pipeline.sampler, "model_feeds", poisoned)
    found = run(Batcher(pipeline), requests)
    assert isinstance(found["1"], NumericsError)
    assert all(relative_l2(found[n], expected[n]) <= TOLERANCES["fp32"] for n in ("0", "2"))


def test_a_call_that_fails_is_made_again_for_each_alone(pipelines, monkeypatch):
    """Too little memory for all together need not be too little for each."""
    pipeline = pipelines["fp32", "onnxruntime"]
    engine = pipeline.engines["unet"]
    true, sizes = engine.run, []

    def short(feeds):
        sizes.append(len(feeds["sample"]))
        if len(feeds["sample"]) > 2:
            raise MemoryError
        return true(feeds)

    requests = {str(k): pipeline.request(PROMPTS[k], seed=k, num_inference_steps=2) for k in range(3)}
    expected = alone(pipeline, requests)
    monkeypatch.setattr(engine, "run", short)
    found = run(Batcher(pipeline), requests)
    assert sizes == [6, 2, 2, 2] * 2
    assert all(relative_l2(found[n], expected[n]) <= TOLERANCES["fp32"] for n in requests)


def test_an_embedding_is_made_once_and_the_negative_one_too(pipelines, monkeypatch):
    pipeline = pipelines["fp32", "onnxruntime"]
    engine = pipeline.engines["text_encoder"]
    true, rows = engine.run, []

    def counted(feeds):
        rows.append(len(feeds["input_ids"]))
        return true(feeds)

    monkeypatch.setattr(engine, "run", counted)
    batcher = Batcher(pipeline)
    requests = {
        str(k): pipeline.request(PROMPTS[k % 2], seed=k, num_inference_steps=1, negative_prompt="blue")
        for k in range(6)
    }
    run(batcher, requests)
    assert rows == [1, 1, 1]  # two prompts, one negative
    assert (batcher.cache.hits, batcher.cache.misses) == (9, 3)


def test_the_cache_of_embeddings_keeps_to_its_bytes(pipelines):
    pipeline = pipelines["fp32", "onnxruntime"]
    cache = EmbeddingCache(limit=0)
    run(Batcher(pipeline, cache=cache), strangers(pipeline, 2))
    assert (cache.held, len(cache.rows)) == (0, 0)
    row = {"x": np.zeros(10, np.float32)}
    cache = EmbeddingCache(limit=100)
    for key in (b"a", b"b", b"a", b"c"):
        if cache.get(key) is None:
            cache.put(key, row)
    assert list(cache.rows) == [b"a", b"c"]  # b was used longest ago
    assert cache.held == 80


def test_a_request_can_end_early_with_the_picture_so_far(pipelines):
    pipeline = pipelines["fp32", "onnxruntime"]
    request = pipeline.request("star", seed=1, num_inference_steps=20)
    batcher, steps = Batcher(pipeline), []
    batcher.add("a", request, steps.append)
    batcher.advance()
    assert batcher.finish("a")
    (outcome,) = batcher.advance()
    assert outcome.result.images[0].size == (request.width, request.height)
    assert outcome.result.parameters["stopped_after_steps"] == len(steps) == 2
    stream = pipeline.stream("star", seed=1, num_inference_steps=20)
    next(stream)
    next(stream)
    with pytest.raises(StopIteration) as end:
        stream.send(True)
    assert relative_l2(outcome.result.latents, end.value.value.latents) <= TOLERANCES["fp32"]


def test_a_name_is_of_one_request_at_a_time(pipelines):
    pipeline = pipelines["fp32", "onnxruntime"]
    batcher, request = Batcher(pipeline), strangers(pipeline, 1)["0"]
    batcher.add("a", request)
    with pytest.raises(UsageError, match="'a' is under way"):
        batcher.add("a", request)
    assert batcher.cancel("a")
    assert not batcher.cancel("a")
    batcher.add("a", request)


def test_branches_stay_together_where_they_fit(pipelines):
    record = pipelines["fp32", "onnxruntime"].artifact.manifest.components["unet"]

    def feeds(rows, tokens=77):
        return {
            "sample": np.zeros((rows, 4, 8, 8), np.float32),
            "timestep": np.zeros(rows, np.float32),
            "encoder_hidden_states": np.zeros((rows, tokens, 32), np.float32),
        }

    guided = Evaluation(feeds=(feeds(1), feeds(1)))
    assert batches([guided] * 3, record, 4) == [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1)]]
    assert batches([guided, Evaluation(feeds=(feeds(1, 154),)), guided], record, 8) == [
        [(0, 0), (0, 1), (2, 0), (2, 1)],
        [(1, 0)],
    ]

    class Engine:
        calls = 0

        def run(self, given):
            Engine.calls += 1
            return {record.outputs[0].name: given["sample"]}

    assert len(evaluate(Engine(), record, guided)) == 2
    assert Engine.calls == 1
    evaluate(Engine(), record, Evaluation(feeds=(feeds(1), feeds(1)), together=False))
    assert Engine.calls == 3
