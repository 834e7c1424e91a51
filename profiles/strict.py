"""Strict reading of plain data (JSON, TOML) into frozen dataclasses: unknown keys and wrong types are errors.

JSON that somebody else wrote is read by `parse_json`, which takes nothing that later code would trip over.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from intaglio.profiles.errors import ProfileError, ToolError
from intaglio.profiles.registry import suggestion

T = TypeVar("T")
DEEPEST = 64  # arrays and objects within each other; the deepest configuration of a known checkpoint has 6
LARGEST = 32 << 20  # bytes; the index of 100,000 shards' tensors has 10 MB


def from_dict(cls: type[T], data: Any, where: str, *, error: type[ToolError] = ProfileError) -> T:
    """Build the dataclass `cls` from a mapping, recursively.

    Args:
        cls: a dataclass whose annotations are plain types, tuples, mappings and other dataclasses.
        data: what json or tomllib returned.
        where: file and key path, for messages.
        error: class to raise.

    Raises:
        ToolError: an unknown key, a missing required key, a value of another type, or one the dataclass refuses.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where}: expected a table, found {data!r}")
    hints = _hints(typing.cast("Hashable", cls))
    fields = {f.name: f for f in dataclasses.fields(typing.cast("Any", cls))}
    for key in data:
        if key not in fields:
            raise error(f"{where}: unknown key {key!r}; allowed: {', '.join(sorted(fields))}.{suggestion(key, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise error(f"{where}: key {name!r} is missing")
    values = {k: _convert(hints[k], v, f"{where}: {k}", error) for k, v in data.items()}
    try:
        return cls(**values)
    except ToolError as refusal:
        raise error(f"{where}: {refusal}") from refusal


def _convert(hint: Any, value: Any, where: str, error: type[ToolError]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where, error)
    if origin is tuple and isinstance(value, list | tuple):
        inner = args[0]
        return tuple(_convert(inner, v, f"{where}[{i}]", error) for i, v in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {k: _convert(args[1], v, f"{where}.{k}", error) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where, error=error)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise error(f"{where}: expected {wanted}, found {value!r}")


def _convert_union(args: tuple[Any, ...], value: Any, where: str, error: type[ToolError]) -> Any:
    for option in args:
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(option, value, where, error)
        except ToolError:
            continue
    raise error(f"{where}: {value!r} is none of {', '.join(getattr(a, '__name__', str(a)) for a in args)}")


def to_dict(value: Any) -> Any:
    """The inverse of `from_dict`: dataclasses to dicts, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


@functools.cache
def _hints(cls: Hashable) -> dict[str, Any]:
    """Types of a dataclass's fields; resolving their names takes longer than reading a row."""
    return typing.get_type_hints(cls)


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, finite numbers, `DEEPEST` levels and `LARGEST` bytes at most.

    Raises:
        ValueError: it is something else; the text says what.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data)} bytes, allowed: {LARGEST}")
    deep = f"it is nested deeper than {DEEPEST} levels"
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise ValueError(deep) from None
    if any(level > DEEPEST for level, _, _ in members(found)):
        raise ValueError(deep)
    return found


def members(data: Any) -> Iterator[tuple[int, str | None, Any]]:
    """Level, key and value of everything inside of JSON data, the data itself first; an array's items have no key."""
    todo: list[tuple[int, str | None, Any]] = [(0, None, data)]
    while todo:
        level, key, value = todo.pop()
        yield level, key, value
        if isinstance(value, dict):
            todo += [(level + 1, k, v) for k, v in value.items()]
        elif isinstance(value, list):
            todo += [(level + 1, None, v) for v in value]


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is larger than any float")
    return value
