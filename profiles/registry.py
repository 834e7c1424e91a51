"""Look-ups in the tables of strings that name engines, families, schedulers and formats."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from intaglio.profiles.errors import MissingDependency, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import ModuleType

T = TypeVar("T")


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry `name` of `table`.

    Raises:
        UsageError: there is none; the message lists what exists and the nearest name.
    """
    if name in table:
        return table[name]
    message = f"unknown {what} {name!r}; allowed: {', '.join(sorted(table))}.{suggestion(name, table)}"
    raise UsageError(message)


def resolve(path: str) -> Any:
    """Import ``"package.module:Name"`` and return the object."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def need(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependency: it is not installed; the message is the pip line.
    """
    if module.partition(".")[0] == "openvino":  # which tells Google Analytics of every import where it finds this
        sys.modules.setdefault("openvino_telemetry", cast("ModuleType", None))
    if module.partition(".")[0] == "onnxruntime":  # since 1.29 reports to Microsoft from Linux, too, from its import on
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        message = f"{module} is not installed; run: pip install 'intaglio[{extra}]'"
        raise MissingDependency(message) from error
