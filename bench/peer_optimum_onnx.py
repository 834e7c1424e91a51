"""optimum-onnx: a checkpoint exported to ONNX by it, run by diffusers' loop on ONNX Runtime. Of its own environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.bench.peer_checkpoint import readable
from intaglio.bench.peer_common import exported, need_cpu, opened
from intaglio.bench.peer_diffusers import DiffusersPipeline


def prepare(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Export a checkpoint into `folder`; there is nothing to say of it."""
    from optimum.exporters.onnx import main_export

    with readable(checkpoint) as place:
        main_export(
            model_name_or_path=str(place),
            output=folder,
            task="text-to-image",
            library_name="diffusers",
            do_validation=False,
            local_files_only=True,
        )
    return {}


def load(
    artifact: str | Path,
    *,
    backend: str,
    device: str = "cpu",
    threads: int = 0,
    checkpoint: str = "",
    settings: Mapping[str, str] | None = None,
    verify: bool = True,
) -> DiffusersPipeline:
    """ORTDiffusionPipeline on the export of a checkpoint; arguments as of `intaglio.load`.

    Raises:
        UsageError: there is no export.
        Unsupported: another device than the CPU.
    """
    import onnxruntime
    from optimum.onnxruntime import ORTDiffusionPipeline

    need_cpu(backend, device)
    found, _, told = opened(artifact, backend, settings)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    pipe = ORTDiffusionPipeline.from_pretrained(
        str(exported(backend, checkpoint, told)),
        export=False,
        provider="CPUExecutionProvider",
        session_options=options,
        local_files_only=True,
    )
    return DiffusersPipeline(found, pipe)
