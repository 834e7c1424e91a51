"""A transformer whose equal blocks were traced once has the graph of one that was traced whole."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import tiny

from intaglio.exporters import capture
from intaglio.exporters.plan import make_plan
from intaglio.exporters.repeat import NotRepeatable, compare, find_runs, shorten

# Family's case, component, configuration with enough blocks to repeat, and how many of them are traced.
CASES = {
    "flux single": ("flux dev", "transformer", {"num_layers": 1, "num_single_layers": 5}, 5),
    "flux": ("flux dev", "transformer", {"num_layers": 6, "num_single_layers": 5}, 8),
    "t5": ("flux dev", "text_encoder_2", {"num_layers": 7}, 5),
    "sd3": ("sd3", "transformer", {"num_layers": 6, "dual_attention_layers": [0, 1, 2, 3, 4]}, 5),
    "flux2": ("flux2-klein", "transformer", {"num_layers": 5, "num_single_layers": 6}, 8),
    "qwen_image": ("qwen_image", "transformer", {"num_layers": 6}, 4),
}
FIRST = ("t5",)  # half a minute for the others; their blocks are those of every build of a large checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A component of a tiny checkpoint, its untrained module in another configuration, and the axes."""
    from accelerate import init_empty_weights

    plans = {}

    def make(name):
        case, part, config, _ = CASES[name]
        if case not in plans:
            folder = tmp_path_factory.mktemp("repeat") / "checkpoint"
            plans[case] = make_plan(tiny.CASES[case].checkpoint(folder))
        plan = plans[case]
        component = next(c for c in plan.components if c.name == part)
        with init_empty_weights(include_buffers=False):
            module = component.wrap(component.model({**plan.checkpoint.config(component.source), **config}))
        return component, module.to("meta").eval(), plan.shapes

    return make


def digest(value, known):
    """Of all that a value of a graph is computed from: operators, attributes, constants, names of parameters."""
    if value is None:
        return "none"
    if value not in known:
        node = value.producer()
        if node is None:
            text = str(value.name)
        else:
            facts = [f"{k} {plain(a)}" for k, a in sorted(node.attributes.items())]
            inputs = [digest(v, known) for v in node.inputs]
            text = " ".join([node.domain, node.op_type, node.overload, str(value.index()), *facts, *inputs])
        known[value] = hashlib.sha256(text.encode()).hexdigest()
    return known[value]


def plain(attribute):
    numpy = getattr(attribute.value, "numpy", None)
    return f"{numpy().dtype}{numpy().tolist()}" if numpy else str(attribute.value)


def graph_digests(model):
    known = {}
    for node in model.graph:  # in order, so that nothing recurses deeply
        for value in node.outputs:
            digest(value, known)
    return [digest(value, known) for value in model.graph.outputs]


@pytest.mark.parametrize("name", CASES)
def test_repeated_blocks_are_the_graph_of_all_blocks(name, made, request):
    if name not in FIRST and not request.config.getoption("--all-cases"):
        pytest.skip("run with --all-cases")
    component, module, shapes = made(name)
    whole = capture.export(dataclasses.replace(component, repeats=()), module, shapes)
    names = set(dict(module.named_parameters()))
    traced = []

    def count(component, module, shapes):
        traced.append(sum(len(module.get_submodule(component.prefix + path)) for path in component.repeats))
        return original(component, module, shapes)

    original = capture.traced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "traced", count)
        short = capture.export(component, module, shapes)
    assert traced == [CASES[name][3]]
    assert graph_digests(short) == graph_digests(whole)
    assert set(short.graph.initializers) == set(whole.graph.initializers)
    assert len(list(short.graph)) == len(list(whole.graph))
    assert set(dict(module.named_parameters())) == names, "the module is whole again"


def read_second():
    """Six equal blocks, and a sum that reads the second."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(6)])

        def forward(self, x):
            kept = []
            for block in self.blocks:
                x = block(x)
                kept.append(x)
            return x + kept[1]

    return Model().to("meta").eval()


def test_blocks_that_are_read_from_outside_are_all_traced():
    from intaglio.exporters.component import Component
    from intaglio.profiles.spec import Range, TensorSpec

    tensor = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    module = read_second()
    component = Component(
        name="unet",
        source="unet",
        model=dict,
        reference=dict,
        wrap=dict,
        prefix="",
        repeats=("blocks",),
        inputs=(tensor,),
        outputs=(dataclasses.replace(tensor, name="y"),),
    )
    model = capture.export(component, module, {"batch": Range(min=1, opt=2, max=4)})
    assert sum(node.op_type in ("MatMul", "Gemm") for node in model.graph) == len(module.blocks)
    weights = {name for name in model.graph.initializers if name.endswith("weight")}
    assert weights == {f"blocks.{number}.weight" for number in range(6)}


def test_runs_are_of_equal_blocks(made):
    component, module, _ = made("sd3")
    runs = find_runs(module, [component.prefix + path for path in component.repeats])
    assert [(run.first, run.count, run.place) for run in runs] == [(0, 5, 0), (5, 1, 4)]
    assert [run.kept for run in runs] == [[0, 1, 3, 4], [5]]
    whole = shorten(module, runs)
    (path,) = whole
    assert [b.state_dict().keys() for b in module.get_submodule(path)] == [
        whole[path][i].state_dict().keys() for run in runs for i in run.kept
    ]


def test_a_block_with_another_attribute_is_not_equal(made):
    component, module, _ = made("qwen_image")
    path = component.prefix + component.repeats[0]
    module.get_submodule(path)[2].eps = 0.5
    assert [run.count for run in find_runs(module, [path])] == [2, 1, 3]


def test_different_graphs_are_refused():
    import onnx_ir as ir

    def chain(operator):
        x = ir.Value(name="x")
        nodes = [ir.node("Relu", [x]), ir.node(operator, [ir.Value(name="y")])]
        return ir.Model(ir.Graph([x], nodes[1].outputs, nodes=nodes, opset_imports={"": 23}), ir_version=10), nodes

    model, nodes = chain("Tanh")
    with pytest.raises(NotRepeatable):
        compare(model, nodes[:1], nodes[1:], ["b.0.", "b.1.", "b.2.", "b.3."])
