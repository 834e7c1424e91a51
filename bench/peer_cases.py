"""Rows of other tools (`intaglio.bench.peers`) for a benchmark: the same pictures, from the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from intaglio.bench.cases import Case, unquantized
from intaglio.bench.peers import EXPORTS, PEERS, prepare, python_of
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import pick

NAME = "peer"  # what the report has in the place of an artifact


def peer_cases(
    names: Sequence[str],
    cases: Sequence[Case],
    artifacts: Mapping[str, Artifact],
    checkpoint: str,
    tell: Callable[[str], None] = lambda _: None,
    *,
    dry: bool = False,
) -> list[Case]:
    """A case of each peer for every picture and number of threads that is measured on a CPU.

    Args:
        names: of PEERS.
        cases: ours; the first unquantized artifact among them says what a peer is asked for.
        artifacts: by `Case.artifact`.
        checkpoint: the folder that the peers load or export; empty means by the artifact's manifest.
        tell: called before an export, which may take minutes and is no part of what is timed.
        dry: name the cases alone; nothing is exported.

    Raises:
        UsageError: no such peer, one that is not installed, no unquantized artifact.
        CheckpointError: the artifact's checkpoint is not there.
        ToolError: an export failed.
    """
    for name in names:
        pick(PEERS, name, "peer")
    own = [c for c in cases if unquantized(artifacts[c.artifact])]
    if not own:
        raise UsageError("--peer needs an artifact that is not quantized beside it, as what it is compared with")
    folder = checkpoint_folder(checkpoint, artifacts[own[0].artifact])
    found = []
    for name in names:
        python = python_of(name)
        made: Mapping[str, Any] = {"folder": "", "bytes": 0}
        if not dry:
            tell(f"{name}: export")
            made = prepare(name, folder)
        row = PEERS[name]
        weights = EXPORTS[row.export].options.get("weights", "fp32") if row.export else "fp32"
        settings = {"export": str(made["folder"])} if row.export else {}
        seen: set[tuple[object, ...]] = set()
        for case in own:
            key = (case.picture, case.threads)
            if case.device != "cpu" or key in seen:
                continue
            seen.add(key)
            extra = case.label.partition(" ")[2]
            found.append(
                replace(
                    case,
                    name=NAME,
                    label=f"{NAME}/{name}{' ' + extra if extra else ''}",
                    backend=name,
                    loader=row.loader,
                    python="" if not row.environment else python,
                    settings=settings,
                    checkpoint=str(folder),
                    precision=weights,
                    note=row.note,
                    bytes=int(made["bytes"]) or sum(p.stat().st_size for p in folder.rglob("*.safetensors")),
                )
            )
    return found


def checkpoint_folder(checkpoint: str, artifact: Artifact) -> Path:
    """Where the artifact's own checkpoint lies; its files are compared with the digest that the artifact has of them.

    Raises:
        CheckpointError: it cannot be found, or it is another one.
        UsageError: it is a single file, which the peers do not read.
    """
    from intaglio.exporters.checkpoint_index import find_checkpoint

    found = Path(find_checkpoint(artifact.manifest.provenance, checkpoint).location)
    if not found.is_dir():
        raise UsageError(f"the checkpoint {found.name} is a single file; --peer needs a folder in diffusers' layout")
    return found
