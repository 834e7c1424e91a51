"""A graph from the cache is the graph that would be traced, and whatever a trace depends on is part of its key."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from partial import build_only

from intaglio.exporters import graph_cache
from intaglio.exporters.graph_cache import cached, graph_key, graphs_folder
from intaglio.profiles.spec import Range, TensorSpec

BATCH = Range(min=1, opt=2, max=4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return graphs_folder()


@pytest.fixture
def component():
    from intaglio.exporters.component import Component

    tensor = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    return Component(
        name="unet", source="unet", model=dict, reference=dict, wrap=dict, inputs=(tensor,), outputs=(tensor,)
    )


def module(width=4, scale=1.0):
    import torch

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = torch.nn.Linear(width, width), scale
            self.register_buffer("table", torch.arange(width, dtype=torch.float32), persistent=False)

        def forward(self, x):
            return self.linear(x) * self.scale + self.table

    return Scaled()


def closed_over(number):
    """A wrapper as the families define them, whose forward pass reads a variable around it."""
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = module()

        def forward(self, x):
            return self.model(x) * number

    return Wrapper()


def graph(width=4):
    import numpy as np
    import onnx_ir as ir

    weight = ir.tensor(np.ones((width, width), np.float32), name="weight")
    value = ir.Value(name="weight", const_value=weight, shape=weight.shape, type=ir.TensorType(weight.dtype))
    x = ir.Value(name="x", shape=ir.Shape(("batch", width)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, value])
    made = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 23})
    return ir.Model(made, ir_version=10)


def test_a_build_from_the_cache_is_the_build_without_it(tiny_checkpoint, tmp_path, cache):
    made = [build_only(tiny_checkpoint, tmp_path / name, "text_encoder") for name in ("traced", "cached")]
    assert made[0].manifest.files == made[1].manifest.files
    assert [stage["traced"] for a in made for stage in stages(a) if "traced" in stage] == [True, False]
    (file,) = cache.iterdir()
    assert os.fsencode(tmp_path) not in file.read_bytes()
    assert b"site-packages" not in file.read_bytes()


def stages(artifact):
    import json

    return json.loads((artifact.folder / "build.json").read_text())["stages"]


def test_a_graph_is_traced_once_and_comes_without_weights(cache):
    traced = []
    for _ in range(2):
        model = cached("key", ["weight"], lambda: traced.append(1) or graph())
        assert model.graph.initializers["weight"].const_value.location == "unbound"
        assert tuple(model.graph.initializers["weight"].const_value.shape) == (4, 4)
    assert len(traced) == 1
    assert model.meta[graph_cache.FROM_CACHE]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:80] + b"!" + b[81:], lambda b: b""]
)
def test_a_damaged_file_is_traced_again_and_mended(cache, damage):
    cached("key", ["weight"], graph)
    file = cache / "key"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert not cached("key", ["weight"], graph).meta[graph_cache.FROM_CACHE]
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not cached("key", ["weight"], graph).meta[graph_cache.FROM_CACHE]


def test_the_graphs_unused_for_longest_go(cache, monkeypatch):
    cached("a", ["weight"], graph)
    size = (cache / "a").stat().st_size
    monkeypatch.setattr(graph_cache, "LIMIT_BYTES", 2 * size)
    cached("b", ["weight"], graph)
    for number, name in enumerate("ab"):
        os.utime(cache / name, (1e9 - number, 1e9 - number))  # b is the older one
    cached("c", ["weight"], graph)
    assert {path.name for path in cache.iterdir()} == {"a", "c"}


def test_the_key_is_that_of_everything_a_trace_depends_on(component, monkeypatch):
    shapes, config = {"batch": BATCH}, {"width": 4}
    spec = dataclasses.replace(component.inputs[0], shape=("batch", 8))
    keys = {
        "as it is": graph_key(component, module(), config, shapes),
        "a plain attribute": graph_key(component, module(scale=2.0), config, shapes),
        "a width": graph_key(component, module(width=5), config, shapes),
        "the configuration": graph_key(component, module(), {"width": 5}, shapes),
        "an axis": graph_key(component, module(), config, {"batch": dataclasses.replace(BATCH, max=8)}),
        "an input": graph_key(dataclasses.replace(component, inputs=(spec,)), module(), config, shapes),
        "a name": graph_key(dataclasses.replace(component, name="other"), module(), config, shapes),
    }
    changed = module()
    changed.table += 1
    keys["a buffer"] = graph_key(component, changed, config, shapes)
    hooked = module()
    hooked.processor = type("Processor", (), {"__init__": lambda self: setattr(self, "heads", 2)})()
    keys["an object's attribute"] = graph_key(component, hooked, config, shapes)
    hooked.processor.heads = 3
    keys["that attribute"] = graph_key(component, hooked, config, shapes)
    keys["what the wrapper closed over"], keys["another value of that"] = (
        graph_key(component, closed_over(number), config, shapes) for number in (1, 2)
    )
    assert len(set(keys.values())) == len(keys)
    assert graph_key(component, module(), config, shapes) == keys["as it is"]
    monkeypatch.setattr(graph_cache, "tools", lambda: ("torch 0",))
    assert graph_key(component, module(), config, shapes) != keys["as it is"]


KEY_CODE = """
import sys
from pathlib import Path
from accelerate import init_empty_weights
from intaglio.exporters.graph_cache import graph_key
from intaglio.exporters.plan import make_plan
plan = make_plan(Path(sys.argv[1]))
for component in plan.components:
    config = plan.checkpoint.config(component.source)
    with init_empty_weights(include_buffers=False):
        module = component.wrap(component.model(config))
    print(component.name, graph_key(component, module, config, plan.shapes))
"""


def test_a_key_is_the_same_in_another_process(tiny_checkpoint):
    keys = [
        subprocess.run(
            [sys.executable, "-c", KEY_CODE, tiny_checkpoint],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert len(keys[0]) == 8
    assert keys[0] == keys[1]


def test_other_weights_have_the_same_key(component):
    import torch

    torch.manual_seed(1)
    first = graph_key(component, module(), {}, {"batch": BATCH})
    torch.manual_seed(2)
    assert graph_key(component, module(), {}, {"batch": BATCH}) == first
