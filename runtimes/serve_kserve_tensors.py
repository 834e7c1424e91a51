"""Requests and answers of the Open Inference Protocol, version 2: tensors as JSON, or as bytes behind the JSON.

The second is Triton's binary tensor data extension: ``Inference-Header-Content-Length`` says where the JSON ends, and
each tensor's ``binary_data_size`` how many of the bytes behind it are its own, in the tensors' order.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intaglio.runtimes.serve_body import check_names
from intaglio.runtimes.serve_errors import BadRequest
from intaglio.runtimes.serve_room import as_json
from intaglio.runtimes.serve_ticket import Picture

STRICT = ConfigDict(extra="forbid", strict=True)
NUMBERS = {"INT64": "<q", "FP32": "<f"}  # datatype -> struct's code of one value
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "FP32": "TYPE_FP32", "UINT8": "TYPE_UINT8"}
SEEDS = 2**63  # that INT64 has, from 0 on
MOST_JSON_NUMBERS = 2**22  # of an answer's tensor; more need its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One tensor that a model takes or gives; -1 is any size. `field` is a `Wish`'s, `minimum` of a number."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    field: str = ""
    optional: bool = True
    minimum: int | None = None


ONE = (1,)
INPUTS = (
    Spec(name="prompt", datatype="BYTES", shape=ONE, field="prompt", optional=False),
    Spec(name="negative_prompt", datatype="BYTES", shape=ONE, field="negative_prompt"),
    Spec(name="num_images_per_prompt", datatype="INT64", shape=ONE, field="count", minimum=1),
    Spec(name="num_inference_steps", datatype="INT64", shape=ONE, field="num_inference_steps", minimum=1),
    Spec(name="guidance_scale", datatype="FP32", shape=ONE, field="guidance_scale"),
    Spec(name="seed", datatype="INT64", shape=ONE, field="seed", minimum=0),
    Spec(name="width", datatype="INT64", shape=ONE, field="width", minimum=1),
    Spec(name="height", datatype="INT64", shape=ONE, field="height", minimum=1),
    Spec(name="scheduler", datatype="BYTES", shape=ONE, field="scheduler"),
)
OUTPUTS = (
    Spec(name="image", datatype="UINT8", shape=(-1, -1, -1, 3)),
    Spec(name="seed", datatype="INT64", shape=(-1,)),
)


class InputParameters(BaseModel):
    """Of one input."""

    model_config = STRICT

    binary_data_size: int | None = Field(None, ge=0, description="bytes behind the JSON, in the place of `data`")


class InputTensor(BaseModel):
    """One input."""

    model_config = STRICT

    name: str = Field(max_length=100)
    datatype: str = Field(max_length=100)
    shape: list[int] = Field(max_length=8)
    parameters: InputParameters | None = None
    data: list[Any] | None = None


class OutputParameters(BaseModel):
    """Of one output."""

    model_config = STRICT

    binary_data: bool | None = Field(None, description="bytes behind the JSON rather than `data`")


class RequestedOutput(BaseModel):
    """One output that is wanted."""

    model_config = STRICT

    name: str = Field(max_length=100)
    parameters: OutputParameters | None = None


class RequestParameters(BaseModel):
    """Of the whole request."""

    model_config = STRICT

    binary_data_output: bool | None = Field(None, description="`binary_data` of outputs that do not say it")


class InferRequest(BaseModel):
    """The JSON of ``infer``. What is not here is refused by name."""

    model_config = STRICT

    id: str | None = Field(None, max_length=200)
    inputs: list[InputTensor] = Field(max_length=100)
    outputs: list[RequestedOutput] | None = Field(None, max_length=100, description="all where not given")
    parameters: RequestParameters | None = None


def parsed(body: bytes, header_length: str | None) -> tuple[InferRequest, bytes]:
    """The JSON of a body, and the bytes behind it.

    Raises:
        BadRequest: the length is no number, or more than there is; a name is there twice.
        RequestValidationError: the JSON is wrong.
    """
    end = len(body)
    if header_length is not None:
        digits = header_length.isascii() and header_length.isdecimal() and len(header_length) < 20
        end = int(header_length) if digits else -1
        if not 0 <= end <= len(body):
            name = "Inference-Header-Content-Length"
            raise BadRequest(f"{name}: 0 to the body's {len(body)} bytes are allowed", param=name)
    check_names(body[:end])
    try:
        return InferRequest.model_validate_json(body[:end]), body[end:]
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(found) from None


def values_of(request: InferRequest, rest: bytes) -> dict[str, Any]:
    """The inputs' values by the fields of a `Wish`.

    Raises:
        BadRequest: an input is unknown, missing, twice there, or not as the model's metadata have it.
    """
    specs = {spec.name: spec for spec in INPUTS}
    found: dict[str, Any] = {}
    for tensor in request.inputs:
        if tensor.name not in specs:
            raise BadRequest(f"input {tensor.name!r} is unknown; allowed: {', '.join(specs)}", param=tensor.name)
        spec = specs[tensor.name]
        if spec.field in found:
            raise BadRequest(f"input {spec.name!r} is there twice", param=spec.name)
        size = tensor.parameters.binary_data_size if tensor.parameters else None
        raw, rest = (None, rest) if size is None else (rest[:size], rest[size:])
        if size is not None and len(raw or b"") < size:
            raise BadRequest(f"input {spec.name!r}: binary_data_size is more than the body has", param=spec.name)
        found[spec.field] = value_of(spec, tensor, raw)
    if rest:
        raise BadRequest(f"{len(rest)} bytes behind the JSON belong to no input; see binary_data_size")
    for spec in INPUTS:
        if spec.field not in found and not spec.optional:
            raise BadRequest(f"input {spec.name!r} is missing", param=spec.name)
    return found


def value_of(spec: Spec, tensor: InputTensor, raw: bytes | None) -> Any:
    """The one value of an input.

    Raises:
        BadRequest: it is of another datatype or shape, or not allowed.
    """

    def refuse(why: str) -> BadRequest:
        return BadRequest(f"input {spec.name!r}: {why}", param=spec.name)

    if tensor.datatype != spec.datatype:
        raise refuse(f"datatype {tensor.datatype!r} is not allowed: {spec.datatype}")
    if tuple(tensor.shape) != spec.shape:
        raise refuse(f"shape {tensor.shape} is not allowed: {list(spec.shape)}")
    if (raw is None) == (tensor.data is None):
        raise refuse("either data or binary_data_size is needed, and not both")
    value = from_bytes(spec.datatype, raw) if raw is not None else from_json(spec.datatype, tensor.data or [])
    if value is None:
        kind = "text in UTF-8" if spec.datatype == "BYTES" else f"finite {spec.datatype}"
        raise refuse(f"its data are not one {kind}")
    if spec.minimum is not None and value < spec.minimum:
        raise refuse(f"{value} is not allowed: {spec.minimum} or more")
    return value


def from_bytes(datatype: str, raw: bytes) -> Any:
    """One value of a tensor's bytes, ``None`` where they are something else."""
    try:
        if datatype != "BYTES":
            (value,) = struct.unpack(NUMBERS[datatype], raw)
            return value if math.isfinite(value) else None
        (length,) = struct.unpack("<I", raw[:4])
        return raw[4:].decode() if len(raw) == 4 + length else None
    except (struct.error, UnicodeDecodeError):
        return None


def from_json(datatype: str, data: Sequence[Any]) -> Any:
    """One value of a tensor's ``data``, ``None`` where they are something else."""
    value = data[0] if len(data) == 1 else None
    if datatype == "BYTES":
        return value if isinstance(value, str) else None
    kinds = (int, float) if datatype == "FP32" else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return None
    try:
        return from_bytes(datatype, struct.pack(NUMBERS[datatype], value))  # as it would be in bytes
    except (struct.error, OverflowError):
        return None


def wanted(request: InferRequest) -> dict[str, bool]:
    """The outputs that are wanted, and whether as bytes.

    Raises:
        BadRequest: one is unknown or twice there.
    """
    usual = bool(request.parameters and request.parameters.binary_data_output)
    names = [spec.name for spec in OUTPUTS]
    found: dict[str, bool] = {}
    for output in request.outputs or [RequestedOutput(name=name, parameters=None) for name in names]:
        if output.name not in names:
            raise BadRequest(f"output {output.name!r} is unknown; allowed: {', '.join(names)}", param=output.name)
        if output.name in found:
            raise BadRequest(f"output {output.name!r} is there twice", param=output.name)
        said = output.parameters.binary_data if output.parameters else None
        found[output.name] = usual if said is None else said
    return found


def check_json(outputs: Mapping[str, bool], numbers: int) -> None:
    """Refuse pictures of so many numbers as JSON.

    Raises:
        BadRequest: they would be more than MOST_JSON_NUMBERS.
    """
    if not outputs.get("image", True) and numbers > MOST_JSON_NUMBERS:
        message = f"output 'image': {numbers} numbers are more than the {MOST_JSON_NUMBERS} that JSON may have; set "
        raise BadRequest(message + "binary_data", param="image")


def check_seeds(outputs: Mapping[str, bool], seed: int, count: int) -> None:
    """Refuse pictures whose last seed its tensor has no room for.

    Raises:
        BadRequest: it is 2^63 or more.
    """
    if "seed" in outputs and seed + count > SEEDS:
        message = f"input 'seed': {seed} is not allowed for {count} pictures: their last seed is at most 2**63 - 1"
        raise BadRequest(message, param="seed")


def pixels_of(picture: Picture) -> bytes:
    """A picture as uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(picture.data)) as image:
        return image.convert("RGB").tobytes()


def answer(
    facts: Mapping[str, Any], pictures: Sequence[Picture], outputs: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """The body of an answer, and where its JSON ends; ``None`` where there is nothing behind it."""
    width, height = pictures[0].size
    tensors: dict[str, tuple[list[int], bytes]] = {}
    if "image" in outputs:
        tensors["image"] = [len(pictures), height, width, 3], b"".join(map(pixels_of, pictures))
    if "seed" in outputs:
        tensors["seed"] = [len(pictures)], struct.pack(f"<{len(pictures)}q", *(p.seed for p in pictures))
    datatypes = {spec.name: spec.datatype for spec in OUTPUTS}
    shown, tail = [], b""
    for name, binary in outputs.items():
        shape, data = tensors[name]
        record: dict[str, Any] = {"name": name, "datatype": datatypes[name], "shape": shape}
        if binary:
            record["parameters"], tail = {"binary_data_size": len(data)}, tail + data
        else:
            record["data"] = list(data) if name == "image" else [p.seed for p in pictures]
        shown.append(record)
    head = as_json({**facts, "outputs": shown}).encode()
    return head + tail, len(head) if any(outputs.values()) else None
