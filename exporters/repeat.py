"""Trace four of many equal blocks and repeat the second: a transformer of 57 blocks is traced like one of 8.

Blocks are equal if their parts, plain attributes and parameter shapes are. Of the four that are traced the second and
the third must have the same graph, and what the third reads of the second is what each copy reads of the one before
it. The first and the last may differ: values are first made in the one, and not needed behind the other. Where that
does not hold, or a value from inside is read elsewhere, nothing is repeated and every block is traced.
"""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from intaglio.exporters.graph_cache import described, digest_of

if TYPE_CHECKING:
    import torch

SCOPES = "pkg.torch.onnx.name_scopes"  # torch's note on a node: the modules it was traced in, outermost first
KEPT = 4  # of a run: the first, the one that is repeated, the one behind it, the last


class NotRepeatable(Exception):
    """Blocks that look equal have different graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Equal blocks in a row.

    Attributes:
        path: the list they are in, as the traced module names it.
        first, count: place of the first in that list, and how many.
        place: of the first in the shortened list.
    """

    path: str
    first: int
    count: int
    place: int

    @property
    def kept(self) -> list[int]:
        """Places of those that are traced, in the whole list."""
        return [
            self.first + i for i in ((0, 1, self.count - 2, self.count - 1) if self.count > KEPT else range(self.count))
        ]


def find_runs(module: torch.nn.Module, paths: Sequence[str]) -> list[Run]:
    """Runs of equal blocks in the lists of modules `paths`, in order; every block is in one."""
    runs = []
    for path in paths:
        keys = [fingerprint(block) for block in module.get_submodule(path)]
        first = place = 0
        for _, group in itertools.groupby(keys):
            count = len(list(group))
            run = Run(path=path, first=first, count=count, place=place)
            runs.append(run)
            first, place = first + count, place + len(run.kept)
    return runs


def fingerprint(block: torch.nn.Module) -> str:
    """All that a block's graph may depend on but its number."""
    parts = [[name, described(part)] for name, part in block.named_modules()]
    for _, facts in parts:
        if isinstance(facts, list):
            facts[1].pop("layer_idx", None)  # transformers' caches count with it; none is exported
    shapes = [[name, tuple(p.shape)] for name, p in block.named_parameters()]
    buffers = [[name, None if b.is_meta else digest_of(b.numpy())] for name, b in block.named_buffers()]
    return json.dumps([parts, shapes, buffers], sort_keys=True, default=str)


def shorten(module: torch.nn.Module, runs: Sequence[Run]) -> dict[str, torch.nn.ModuleList]:
    """Leave the kept blocks of every run in the lists, in place; returns the whole lists by path."""
    import torch

    whole: dict[str, Any] = {}
    for path, group in itertools.groupby(runs, key=lambda run: run.path):
        blocks: Any = module.get_submodule(path)
        whole[path] = blocks
        put(module, path, torch.nn.ModuleList([blocks[i] for run in group for i in run.kept]))
    return whole


def put(module: torch.nn.Module, path: str, blocks: torch.nn.ModuleList) -> None:
    """Set a submodule."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, blocks)


def expand(model: ir.Model, runs: Sequence[Run]) -> None:
    """Turn the graph of a shortened module into that of the whole one, in place.

    Raises:
        NotRepeatable: a run's blocks differ; the graph is then of no use.
    """
    rename_initializers(model, runs)
    for run in runs:
        if run.count > KEPT:
            repeat(model, run)
    model.graph.sort()


def rename_initializers(model: ir.Model, runs: Sequence[Run]) -> None:
    """From places in the shortened lists to places in the whole ones."""
    numbers = {
        f"{run.path}.{run.place + i}.": f"{run.path}.{number}." for run in runs for i, number in enumerate(run.kept)
    }
    values = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in values:
        for old, new in numbers.items():
            if str(value.name).startswith(old):
                value.name = new + str(value.name).removeprefix(old)
                break
        model.graph.register_initializer(value)


def repeat(model: ir.Model, run: Run) -> None:
    """Put copies of a run's second block between it and the third."""
    second, third = (block_nodes(model, f"{run.path}.{run.place + i}") for i in (1, 2))
    names = [f"{run.path}.{number}." for number in run.kept]
    carried = compare(model, second, third, names)
    made = {v for node in second for v in node.outputs}
    parameters = [v for node in second for v in node.inputs if v is not None and str(v.name).startswith(names[1])]
    image: dict[ir.Value, ir.Value] = {v: v for v in made}
    for number in range(run.first + 2, run.first + run.count - 2):
        new = {value: image[source] for value, source in carried.items()}
        for value in parameters:
            if value not in new:
                name = f"{run.path}.{number}." + str(value.name).removeprefix(names[1])
                new[value] = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
                model.graph.register_initializer(new[value])
        for node in second:
            model.graph.insert_before(third[0], copied(node, new, number))
        image = {v: new[v] for v in made}
    for node in third:
        for index, value in enumerate(node.inputs):
            if value in made:
                node.replace_input_with(index, image[value])


def block_nodes(model: ir.Model, scope: str) -> list[ir.Node]:
    """The nodes that were traced in a module, in order."""
    return [node for node in model.graph if scope in ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))]


def compare(
    model: ir.Model, second: Sequence[ir.Node], third: Sequence[ir.Node], names: Sequence[str]
) -> dict[ir.Value, ir.Value]:
    """What the second block reads of the first, as what the third reads of the second.

    Raises:
        NotRepeatable: they are not the same graph on other parameters, or others read what the second makes.
    """
    image: dict[ir.Value, ir.Value] = {}
    carried: dict[ir.Value, ir.Value] = {}
    if [signature(node) for node in second] != [signature(node) for node in third]:
        raise NotRepeatable(names[1])
    inside = {v for node in second for v in node.outputs}
    for mine, theirs in zip(second, third, strict=True):
        for value, other in zip(mine.inputs, theirs.inputs, strict=True):
            if value is None or value in inside:
                same = other is (None if value is None else image.get(value))
            elif str(value.name).startswith(names[1]):
                same = other is not None and other.name == names[2] + str(value.name).removeprefix(names[1])
            elif other in inside:
                assert other is not None
                same = carried.setdefault(value, other) is other
            else:
                same = other is value
            if not same:
                raise NotRepeatable(f"{mine.name} and {theirs.name}")
        image.update(zip(mine.outputs, theirs.outputs, strict=True))
    readers = {*second, *third}
    if any(use.node not in readers for v in inside for use in v.uses()) or inside & set(model.graph.outputs):
        raise NotRepeatable(f"{names[1]} is read elsewhere")
    return carried


def signature(node: ir.Node) -> tuple[Any, ...]:
    """What a node does, without what it does it to."""
    attributes = sorted((name, _plain(value)) for name, value in node.attributes.items())
    return (node.domain, node.op_type, node.overload, len(node.inputs), len(node.outputs), tuple(attributes))


def _plain(attribute: ir.Attr) -> str:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        message = f"{attribute.name} is a graph"
        raise NotRepeatable(message)
    value: Any = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return f"{value.dtype} {tuple(value.shape)} {value.numpy().tobytes()!r}"
    return f"{attribute.type} {value}"


def copied(node: ir.Node, values: dict[ir.Value, ir.Value], number: int) -> ir.Node:
    """A node on other inputs; its outputs are added to `values`."""
    made = ir.Node(
        node.domain,
        node.op_type,
        [values.get(v, v) if v is not None else None for v in node.inputs],
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{node.name}@{number}",
    )
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}@{number}", old.shape, old.type
        values[old] = new
    return made
