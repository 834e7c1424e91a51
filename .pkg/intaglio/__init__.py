"""Intaglio: one checkpoint, one artifact, the same picture on ONNX Runtime, OpenVINO, TensorRT and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intaglio.runtimes.pipeline import Pipeline, load

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `Pipeline` are imported at first use, so that ``import intaglio`` stays free."""
    if name in ("load", "Pipeline"):
        import intaglio.runtimes.pipeline as module

        return getattr(module, name)
    message = f"module 'intaglio' has no attribute {name!r}"
    raise AttributeError(message)
