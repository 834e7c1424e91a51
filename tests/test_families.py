"""Every family, end to end: its components against torch, its pictures against diffusers' own pipeline, in float32.

The cases are in ``tests/tiny_X.py``. Every tolerance has its measured value beside it; the power tests show that the
tolerances catch the mistakes one makes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from cases import HEIGHT, WIDTH
from families import (
    BACKENDS,
    COMPONENT,
    LATENTS,
    PROMPT,
    PROMPTS,
    SEED,
    STEPS,
    Run,
    by_artifact,
    core_cases,
    passes,
)

from intaglio.exporters.cast import HALVES, cast_to_contract
from intaglio.exporters.component import FAMILIES
from intaglio.exporters.store import GRAPH
from intaglio.profiles.errors import UsageError
from intaglio.profiles.family import load_family
from intaglio.runtimes.batching import Batcher
from intaglio.runtimes.fidelity import relative_l2

NORMS = ("Pow", "ReduceMean", "Sqrt", "Reciprocal", "LayerNormalization", "RMSNormalization", "GroupNormalization")
BESIDE = 1e-5  # relative L2 of final latents, alone against in a batch; measured 0 on both backends
GOLDEN = Path(__file__).parent / "golden/tensor_names.json"


def pytest_generate_tests(metafunc):
    if "run" in metafunc.fixturenames:
        names = tiny.CASES if metafunc.config.getoption("--all-cases") else core_cases()
        metafunc.parametrize("run", by_artifact(names), indirect=True, scope="module")


@pytest.fixture(scope="module")
def run(request, built_case):
    return Run(tiny.CASES[request.param], built_case(request.param))


def test_every_family_has_a_case():
    assert {case.family for case in tiny.CASES.values()} == set(FAMILIES) == set(tiny.CHECKPOINTS)


def test_components_equal_torch_at_two_untraced_shapes(run):
    parity = run.built.parity()
    assert set(parity) == set(run.built.artifact.manifest.components)
    for component, errors in parity.items():
        assert set(errors) == set(BACKENDS), component
        assert max(errors.values()) <= COMPONENT, component


def test_tensor_names_are_those_other_tools_expect(run, pytestconfig):
    """Pinned: optimum's exports have these names."""
    family = run.case.family
    found = {
        name: {"inputs": [s.name for s in record.inputs], "outputs": [s.name for s in record.outputs]}
        for name, record in run.built.artifact.manifest.components.items()
    }
    golden = json.loads(GOLDEN.read_text())
    if run.case is not next(c for c in tiny.CASES.values() if c.family == family):
        return  # variants of a family differ in optional inputs
    if pytestconfig.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps({**golden, family: found}, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())[family]


def test_norms_stay_in_float32_under_the_contracts(run):
    """A norm that torch decomposes is whole in float32: a narrow x * rsqrt(...) scales whole tokens wrongly."""
    contracts = load_family(run.case.family).contract
    for name in run.built.artifact.manifest.components:
        contract = contracts[name]
        if contract.dtype == "float32":
            continue
        model = ir.load(run.built.artifact.component(name) / GRAPH)
        cast_to_contract(model, contract.dtype, contract)
        for node in model.graph:
            if node.op_type in NORMS or any(i is not None and feeds_norm(i) for i in node.inputs):
                floats = [v.dtype for v in node.outputs if v.dtype in HALVES]
                assert not floats, f"{name}: {node.op_type} {node.name}"


def feeds_norm(value):
    producer = value.producer()
    return producer is not None and producer.op_type in ("Reciprocal", "Sqrt") and value.dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("prompt", [PROMPT, PROMPTS], ids=["alone", "batch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_decode_and_picture_equal_diffusers(run, backend, prompt):
    found = run.figures(run.built.pipeline(backend), prompt)
    assert passes(found), found


def test_a_picture_beside_strangers_is_the_picture_alone(run):
    """Two strangers join at later steps, so that no two are at the same one; all share every call they can."""
    pipeline = run.built.pipeline("openvino")

    def request(prompt, seed):
        chosen = {**run.case.request, "num_inference_steps": STEPS, "seed": seed, "width": WIDTH, "height": HEIGHT}
        return pipeline.request(prompt, **chosen)

    strangers = (PROMPT.replace("cat", "dog"), PROMPT.replace("red", "tan"))  # as long, so that Qwen-Image's share
    requests = [request(PROMPT, SEED), *(request(text, seed) for seed, text in enumerate(strangers))]
    alone = [latents_of(Batcher(pipeline), {"only": r}, 0)["only"] for r in requests]
    batcher = Batcher(pipeline)
    beside = latents_of(batcher, dict(enumerate(requests)), 1)
    assert max(relative_l2(beside[k], alone[k]) for k in beside) <= BESIDE
    assert batcher.calls == batcher.rounds, "some calls were not shared"


def latents_of(batcher, requests, wait):
    """Final latents by name; a request joins `wait` rounds after the one before."""
    found, todo = {}, list(requests.items())
    while todo or len(batcher):
        if todo and (wait == 0 or batcher.rounds >= wait * len(requests) - wait * len(todo)):
            batcher.add(str(todo[0][0]), todo.pop(0)[1])
        for outcome in batcher.advance():
            assert outcome.error is None, outcome.error
            found[outcome.ident] = outcome.result.latents
    return {name: found[str(name)] for name in requests}


def guidance_plus_5_percent(run, pipeline, monkeypatch):
    return {"guidance_scale": 1.05 * run.case.request["guidance_scale"]}


def negative_dropped(run, pipeline, monkeypatch):
    return {"negative_prompt": None}


def vae_scale_plus_2_percent(run, pipeline, monkeypatch):
    true = pipeline.sampler.unscale
    monkeypatch.setattr(pipeline.sampler, "unscale", lambda latents: true(latents) * np.float32(1.02))
    return {}


def vae_shift(run, pipeline, monkeypatch):
    true = pipeline.sampler.unscale
    monkeypatch.setattr(pipeline.sampler, "unscale", lambda latents: true(latents) + np.float32(0.05))
    return {}


def timestep_off_by_one(run, pipeline, monkeypatch):
    true = pipeline.sampler.model_feeds

    def shifted(request, sample, timestep, branch):
        return true(request, sample, np.float32(timestep - 1), branch)

    monkeypatch.setattr(pipeline.sampler, "model_feeds", shifted)
    return {}


def default_shift(run, pipeline, monkeypatch):
    config = pipeline.sampler.scheduler_config
    values = {"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "shift_terminal": None, "use_dynamic_shifting": False}
    monkeypatch.setattr(pipeline.sampler, "scheduler_config", config.replace(**values))
    return {}


def swapped_encoders(run, pipeline, monkeypatch):
    loaded = pipeline.engines.loaded
    one, two = sorted(n for n in loaded if n.startswith("text_encoder"))[:2]
    monkeypatch.setitem(loaded, one, loaded[two])
    monkeypatch.setitem(loaded, two, loaded[one])
    return {}


def has_two_encoders(run):
    return {"text_encoder", "text_encoder_2"} <= run.built.artifact.manifest.components.keys()


def wrong_padding(run, pipeline, monkeypatch):
    for tokenizer in tokenizers(pipeline):
        monkeypatch.setattr(tokenizer, "pad", 5 if tokenizer.pad != 5 else 6)
    return {}


def tokenizers(pipeline):
    from intaglio.runtimes.text import PromptTokenizer

    values = list(vars(pipeline.sampler).values())
    values += [t for v in values if isinstance(v, dict) for t in v.values()]
    return [v for v in values if isinstance(v, PromptTokenizer)]


MISTAKES = {
    "guidance +5 %": (guidance_plus_5_percent, lambda run: run.case.request.get("guidance_scale", 0) > 1),
    "negative dropped": (negative_dropped, lambda run: run.case.request.get("negative_prompt")),
    "VAE scale +2 %": (vae_scale_plus_2_percent, lambda run: True),
    "VAE shift": (vae_shift, lambda run: True),
    "timestep off by one": (timestep_off_by_one, lambda run: True),
    "default shift": (default_shift, lambda run: "FlowMatch" in type(run.built.theirs.scheduler).__name__),
    "swapped encoders": (swapped_encoders, has_two_encoders),
    "wrong padding": (wrong_padding, lambda run: not run.case.drops_padding),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tolerances_catch(run, monkeypatch, mistake):
    make, applies = MISTAKES[mistake]
    if not applies(run):
        return  # this case has no guidance, no second encoder, …
    pipeline = run.built.pipeline("onnxruntime")
    try:
        changes = make(run, pipeline, monkeypatch)
        found = run.figures(pipeline, PROMPT, **changes)
    except (UsageError, KeyError):  # an encoder of another width or with other outputs does not even fit
        return
    assert not passes(found), found


def test_the_tolerances_catch_the_other_prompts_embedding(run, monkeypatch):
    pipeline = run.built.pipeline("onnxruntime")
    result = run.ask(pipeline, PROMPTS[::-1])
    assert relative_l2(result.latents, run.answer(PROMPTS).latents) > LATENTS
