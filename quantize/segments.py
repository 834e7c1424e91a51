"""Run a component's graph on ONNX Runtime in consecutive segments, one loaded at a time: for weights beyond memory.

Segments are sub-graphs in memory that read ``model.onnx.data`` by offset where it lies; no file is written. ONNX
Runtime runs them unoptimized and in the order of the graph, so that wherever the graph is cut the results are the same
bits, and a weight that is stored in half precision or as codes is float32 only while it is multiplied with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.profiles.registry import need
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers
from intaglio.runtimes.engine_onnxruntime import GRAPH, PROVIDERS, activations, graph_path

LOG_ERRORS = 3
SYMBOL, UNKNOWN = 64, 1 << 20  # elements that stand for a dimension, or for a shape, that is not known
EARLIEST = 0.5  # a segment is cut where it holds at least this share of the limit


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a graph.

    Attributes:
        nodes: in order, what makes its weights included; such nodes may be in several segments.
        inputs: values from before: graph inputs and what earlier segments made.
        outputs: values that later segments read, and graph outputs.
        weight_bytes: of its initializers as they are stored.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    weight_bytes: int


def cut(model: ir.Model, limit: int | None = None) -> list[Segment]:
    """Consecutive segments with at most `limit` bytes of weights each; ``None``: one segment.

    Between the first cut that half fills a segment and the last one that the limit allows, the one where the fewest
    values cross is taken. A single operator with more weights than the limit is a segment of its own.

    Raises:
        Unsupported: the graph has nodes with sub-graphs.
    """
    live, made_of = split_constants(model)
    weights = [cone_weights(node, made_of) for node in live]
    if limit is None or not live:
        bounds = [0, len(live)]
    else:
        bounds, widths = [0], crossing(model, live)
        while bounds[-1] < len(live):
            bounds.append(next_cut(bounds[-1], weights, widths, limit))
    return [segment(model, live[a:b], live[b:], weights[a:b], made_of) for a, b in itertools.pairwise(bounds)]


def split_constants(model: ir.Model) -> tuple[list[ir.Node], dict[ir.Value, ir.Node]]:
    """Nodes that depend on the graph's inputs, in order; and what the others make, such as a weight's Cast, by value.

    Raises:
        Unsupported: a node has a sub-graph, whose captured values nobody lists.
    """
    live: list[ir.Node] = []
    constant: dict[ir.Value, ir.Node] = {}
    for node in model.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise Unsupported(f"{node.op_type} {node.name} has a sub-graph; such a graph cannot be run in segments")
        if all(v is None or v.is_initializer() or v in constant for v in node.inputs):
            constant.update(dict.fromkeys(node.outputs, node))
        else:
            live.append(node)
    return live, constant


def cone_weights(node: ir.Node, made_of: Mapping[ir.Value, ir.Node]) -> dict[ir.Value, int]:
    """The initializers behind a node and their bytes; 0 for a table it looks rows up in, of which few are read."""
    found: dict[ir.Value, int] = {}
    todo = [(node, value) for value in node.inputs]
    while todo:
        reader, value = todo.pop()
        if value is not None and value in made_of:
            todo += [(made_of[value], v) for v in made_of[value].inputs]
        elif value is not None and value.const_value is not None:
            table = reader.op_type == "Gather" and reader.inputs[0] is value
            found[value] = 0 if table else max(found.get(value, 0), int(value.const_value.nbytes))
    return found


def crossing(model: ir.Model, live: Sequence[ir.Node]) -> list[int]:
    """About how many elements cross each place between nodes (in front of node 0, of node 1, …); inputs do not."""
    place = {node: i for i, node in enumerate(live)}
    steps = [0] * (len(live) + 1)
    for i, node in enumerate(live):
        for value in node.outputs:
            readers = [place[use.node] for use in value.uses() if use.node in place]
            if readers and max(readers) > i:
                steps[i + 1] += elements(value)
                steps[max(readers) + 1] -= elements(value)
    return list(itertools.accumulate(steps))


def elements(value: ir.Value) -> int:
    """Elements of a value, guessed where dimensions are symbols."""
    if value.shape is None:
        return UNKNOWN
    return math.prod(d if isinstance(d, int) else SYMBOL for d in value.shape)


def next_cut(start: int, weights: Sequence[Mapping[ir.Value, int]], widths: Sequence[int], limit: int) -> int:
    """Where the segment that begins at node `start` ends."""
    held: dict[ir.Value, int] = {}
    places: list[int] = []
    for end in range(start, len(weights)):
        new = {**held, **weights[end]}
        if sum(new.values()) > limit and end > start:
            return min(places or [end], key=lambda place: (widths[place], -place))
        held = new
        if sum(held.values()) >= EARLIEST * limit:
            places.append(end + 1)
    return len(weights)


def segment(
    model: ir.Model,
    own: Sequence[ir.Node],
    later: Sequence[ir.Node],
    weights: Iterable[Mapping[ir.Value, int]],
    made_of: Mapping[ir.Value, ir.Node],
) -> Segment:
    """The segment of the nodes `own`, whose outputs the nodes `later` read; a weight is made where it is first used."""
    needed = {v for node in later for v in node.inputs} | set(model.graph.outputs)
    inside = {v for node in own for v in node.outputs}
    inputs: dict[ir.Value, None] = {}
    nodes: dict[ir.Node, None] = {}
    for node in own:
        for value in node.inputs:
            if value is not None and value in made_of:
                nodes.update(dict.fromkeys(makers(value, made_of)))
            elif value is not None and not value.is_initializer() and value not in inside:
                inputs[value] = None
        nodes[node] = None
    outputs = tuple(v for node in own for v in node.outputs if v in needed)
    held: dict[ir.Value, int] = {}
    for row in weights:
        held.update(row)
    return Segment(tuple(nodes), tuple(inputs), outputs, sum(held.values()))


def makers(value: ir.Value, made_of: Mapping[ir.Value, ir.Node]) -> list[ir.Node]:
    """The nodes that make a constant value, in order."""
    node = made_of[value]
    before = [n for v in node.inputs if v is not None and v in made_of for n in makers(v, made_of)]
    return [*before, node]


def late_casts(model: ir.Model) -> None:
    """Look rows of a half-precision table up before they are cast, not the whole table: the same values."""
    for node in list(model.graph):
        cast = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
        if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None or not cast.inputs[0].is_initializer():
            continue
        out, table = node.outputs[0], cast.inputs[0]
        rows = ir.node("Gather", [table, node.inputs[1]], dict(node.attributes))
        made = ir.node("Cast", rows.outputs, dict(cast.attributes))
        rows.outputs[0].name, made.outputs[0].name = f"{out.name}.stored", out.name
        made.outputs[0].shape, made.outputs[0].type = out.shape, out.type
        rows.outputs[0].dtype = table.dtype
        model.graph.insert_before(node, [rows, made])
        out.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def serialized(model: ir.Model, part: Segment) -> bytes:
    """A segment as a model of its own."""
    made = {v for node in part.nodes for v in node.outputs}
    read = {v: None for node in part.nodes for v in node.inputs if v is not None and v not in made}
    graph = ir.GraphView(
        part.inputs,
        part.outputs,
        nodes=part.nodes,
        initializers=[v for v in read if v.const_value is not None],
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    )
    view: Any = graph
    return bytes(ir.to_proto(ir.Model(view, ir_version=model.ir_version)).SerializeToString())


def open_session(data: bytes, folder: Path, threads: int = 0) -> Any:
    """A serialized graph on ONNX Runtime's CPU provider, its weights in `folder`.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    ort = need("onnxruntime", extra="onnxruntime")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = LOG_ERRORS
    settings.enable_mem_pattern = False
    settings.enable_cpu_mem_arena = False
    # In the order of the graph: by default what needs no input comes first, which is every weight's Cast.
    settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(data, settings, providers=[PROVIDERS["cpu"]])


class SegmentedEngine:
    """An engine on the CPU that holds the weights of one segment at a time; every run loads all of them in turn.

    Args:
        limit: bytes of weights of a segment.
        folder: where to read the component instead, such as its int8 draft.

    Raises:
        UsageError: another device, or a setting.
        Unsupported: activations that the recipe leaves to an optimizing engine.
    """

    def __init__(
        self, artifact: Artifact, component: str, options: EngineOptions, limit: int, *, folder: Path | None = None
    ) -> None:
        refuse_leftovers("onnxruntime", options.settings, ())
        if options.device != "cpu":
            raise UsageError(f"device {options.device!r} is not allowed: segments run on the cpu")
        self.record = artifact.manifest.components[component]
        if folder is None and activations(self.record) == "dynamic-per-token":
            raise Unsupported(f"{component} has dynamic activations, which segments do not compute; run it whole")
        path = graph_path(artifact, component, PROVIDERS["cpu"]) if folder is None else folder / GRAPH
        model = ir.load(path)
        late_casts(model)
        self.model, self.folder, self.threads = model, path.parent, options.threads
        self.parts = cut(model, limit)
        self.graphs: list[bytes] = []  # those that were run before

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        wanted = [s.name for s in self.record.outputs]
        values = check_feeds(self.record, feeds)
        for index, part in enumerate(self.parts):
            if index == len(self.graphs):
                self.graphs.append(serialized(self.model, part))
            values |= run_once(open_session(self.graphs[index], self.folder, self.threads), part, values)
            needed = {*wanted, *(str(v.name) for later in self.parts[index + 1 :] for v in later.inputs)}
            values = {name: value for name, value in values.items() if name in needed}
        return {name: values[name] for name in wanted}

    def memory(self) -> dict[str, int | None]:
        """Bytes of the largest segment's weights as they are stored."""
        return {"weight_bytes": max((part.weight_bytes for part in self.parts), default=0)}

    def close(self) -> None:
        """Drop the graph."""
        self.parts, self.graphs = [], []


def run_once(session: Any, part: Segment, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of a segment by name, of those `values` that it takes; remembers their types, which graphs may lack.

    A later segment must say what type its inputs have, so that it is serialized after those before it were run.
    """
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {i.name: values[i.name] for i in session.get_inputs()})
    results = dict(zip(names, found, strict=True))
    for value in part.outputs:
        array = results[str(value.name)]
        value.dtype = ir.DataType.from_numpy(array.dtype)
        if array.ndim == 1 and array.dtype == np.int64:  # the length of a vector of sizes, which Resize insists on
            value.shape = ir.Shape(array.shape)
    return results
