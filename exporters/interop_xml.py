"""Edits of an OpenVINO IR's ``openvino_model.xml`` that leave the weights in ``openvino_model.bin`` as they are.

The format is OpenVINO's "IR operation sets" document: ``layers`` of numbered layers with ports, ``edges`` between them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from intaglio.profiles.errors import ArtifactError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element, ElementTree

Tree: TypeAlias = "ElementTree[Any]"  # typeshed's parameter says whether there is a root; there is


def layers_of(tree: Tree, kind: str) -> Iterator[Element]:
    """Layers of one type, in their order."""
    return (layer for layer in part(tree, "layers") if layer.get("type") == kind)


def part(tree: Tree, name: str) -> Element:
    """``layers`` or ``edges``.

    Raises:
        ArtifactError: the file has none.
    """
    found = tree.find(name)
    if found is None:
        raise ArtifactError(f"an openvino_model.xml has no {name}; build the artifact again")
    return found


def int64_input(tree: Tree, name: str) -> None:
    """Let an input take int64, followed by a Convert to what it took before.

    Raises:
        ArtifactError: there is no such input.
    """
    layer = next((p for p in layers_of(tree, "Parameter") if p.get("name") == name), None)
    data, port = (None, None) if layer is None else (layer.find("data"), layer.find("output/port"))
    if layer is None or data is None or port is None:
        raise ArtifactError(f"an openvino_model.xml has no input {name!r}; build the artifact again")
    layers, edges = part(tree, "layers"), part(tree, "edges")
    number = str(1 + max(int(other.get("id", 0)) for other in layers))
    convert = copy.deepcopy(layer)
    convert.attrib.update(id=number, name=f"{name}.float", type="Convert")
    convert.find("data").attrib = {"destination_type": data.get("element_type", "")}  # type: ignore[union-attr]
    taken = copy.deepcopy(port)
    for element in (taken, convert.find("output/port")):
        element.attrib.pop("names", None)  # type: ignore[union-attr]
    convert.find("output/port").set("id", "1")  # type: ignore[union-attr]
    taken.set("precision", "I64")
    inputs = copy.deepcopy(layer.find("output"))
    assert inputs is not None
    inputs.tag = "input"
    for child in list(inputs):
        inputs.remove(child)
    inputs.append(taken)
    convert.insert(list(convert).index(convert.find("output")), inputs)  # type: ignore[arg-type]
    data.set("element_type", "i64")
    port.set("precision", "I64")
    for edge in edges:
        if edge.get("from-layer") == layer.get("id"):
            edge.attrib.update({"from-layer": number, "from-port": "1"})
    layers.insert(list(layers).index(layer) + 1, convert)
    edge = copy.deepcopy(edges[0])
    edge.attrib = {"from-layer": layer.get("id", ""), "from-port": port.get("id", "0")}
    edge.attrib |= {"to-layer": number, "to-port": taken.get("id", "0")}
    edges.append(edge)


def result_first(tree: Tree, name: str) -> None:
    """Make the output `name` the first one; the others keep their order.

    Raises:
        ArtifactError: there is no such output.
    """
    layers = part(tree, "layers")
    results = list(layers_of(tree, "Result"))
    wanted = next((r for r in results if name in r.get("output_names", "").split(",")), None)
    if wanted is None:
        raise ArtifactError(f"an openvino_model.xml has no output {name!r}; build the artifact again")
    place = list(layers).index(results[0])
    layers.remove(wanted)
    layers.insert(place, wanted)
