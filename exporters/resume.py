"""What a killed build finished, taken up by the next one: components whose files are still the ones it wrote.

A build works in a staging folder named after a key over all that decides its result. Beside the unfinished artifact
and the draft lie notes, one for each finished component: its record, its engines and the digests of its files. Notes
are no part of the artifact.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters import additions
from intaglio.exporters.quantization import DRAFT, FEEDS, Calibrated
from intaglio.exporters.tools import tools
from intaglio.profiles.artifact import sha256
from intaglio.profiles.errors import ToolError
from intaglio.profiles.spec import ComponentRecord
from intaglio.profiles.staging import CONTENT, remove
from intaglio.profiles.strict import from_dict, to_dict
from intaglio.quantize.weight import InputScales

if TYPE_CHECKING:
    from intaglio.exporters.plan import Plan

NOTES, CALIBRATED = "finished", "calibrated.zip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A component that was finished: what the manifest says of it, and its engines by path in the artifact."""

    record: ComponentRecord
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def build_key(plan: Plan, sources: Mapping[str, str]) -> str:
    """16 hexadecimal digits over the checkpoint's files, all that was asked for, the tools and this package's code."""
    facts = {
        "sources": sources,
        "name": plan.checkpoint.name,
        "additions": additions.provenance(plan.checkpoint),
        "components": [[c.name, c.source, to_dict(c.inputs), to_dict(c.outputs)] for c in plan.components],
        "contract": {c.name: to_dict(plan.contract(c.name)) for c in plan.components},
        "shapes": to_dict(plan.shapes),
        "targets": plan.targets,
        "recipe": to_dict(plan.recipe),
        "calibration": to_dict(plan.calibration),
        "certificate": to_dict(plan.certificate),
        "options": to_dict(plan.options),
        "dtypes": to_dict(plan.dtypes),
        "tools": tools(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Work:
    """The staging folder of a build; on opening, all goes that an earlier build with the same key left unfinished.

    Args:
        folder: of `intaglio.profiles.staging.Claim.start`.
        components: names of the build's components.
        feeds: a file of recorded feeds outside of the folder; what was calibrated on another one counts as unfinished.

    Attributes:
        content: the unfinished artifact.
        draft: the unquantized graphs.
    """

    def __init__(self, folder: Path, components: Sequence[str], feeds: Path | None = None) -> None:
        self.content, self.draft, self._notes = folder / CONTENT, folder / DRAFT, folder / NOTES
        self._feeds = sha256(feeds) if feeds is not None and feeds.is_file() else None
        places = {DRAFT: self.draft, CONTENT: self.content}
        found = {
            (stage, name): self._read(stage, place / name) for stage, place in places.items() for name in components
        }
        self._done = {key: done for key, done in found.items() if done is not None}
        kept = {self._note(*key) for key in self._done} | {places[stage] / name for stage, name in self._done}
        kept |= {p for p in (self.draft / FEEDS, self._notes / CALIBRATED) if _is_whole(p)}
        for place in (*places.values(), self._notes):
            for path in place.iterdir() if place.is_dir() else ():
                if path not in kept:
                    remove(path)
        for path in folder.iterdir():
            if path not in (self.content, self.draft, self._notes) or not path.is_dir():
                remove(path)
        for place in (*places.values(), self._notes):
            place.mkdir(exist_ok=True)

    def drafted(self, component: str) -> Done | None:
        """The component's unquantized graph, if it was finished."""
        return self._done.get((DRAFT, component))

    def built(self, component: str) -> Done | None:
        """The component, quantized and lowered for every target, if it was finished."""
        return self._done.get((CONTENT, component))

    def note_drafted(self, component: str, record: ComponentRecord) -> None:
        """The component's unquantized graph is finished."""
        self._finish(DRAFT, self.draft / component, record, {})

    def note_built(self, component: str, record: ComponentRecord, engines: Mapping[str, dict[str, Any]]) -> None:
        """The component is finished."""
        self._finish(CONTENT, self.content / component, record, engines)

    def calibrated(self) -> dict[str, Calibrated] | None:
        """What calibration found, if it was finished."""
        try:
            found = unpacked((self._notes / CALIBRATED).read_bytes())
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None
        return found if all(self._on_these_feeds(made.facts) for made in found.values()) else None

    def note_calibrated(self, calibrated: Mapping[str, Calibrated]) -> dict[str, Calibrated]:
        """Calibration is finished; returns what the next build would read, which is what this one goes on with."""
        data = packed(calibrated)
        _write(self._notes / CALIBRATED, data)
        return unpacked(data)

    def _on_these_feeds(self, facts: Mapping[str, Any]) -> bool:
        return self._feeds is None or facts.get("feeds_sha256", self._feeds) == self._feeds

    def _note(self, stage: str, component: str) -> Path:
        return self._notes / f"{stage}.{component}.json"

    def _read(self, stage: str, place: Path) -> Done | None:
        note = self._note(stage, place.name)
        try:
            done = from_dict(Done, json.loads(note.read_bytes()), str(note))
            present = digests(place)
        except (OSError, ValueError, ToolError, RecursionError):
            return None
        calibration = done.record.quantization.calibration if done.record.quantization else {}
        if any(present.get(name) != digest for name, digest in done.files.items()) or not self._on_these_feeds(
            calibration
        ):
            return None
        for name in present.keys() - done.files.keys():  # the certificate lowers the draft's graphs, too
            remove(place / name)
        return done

    def _finish(self, stage: str, place: Path, record: ComponentRecord, engines: Mapping[str, dict[str, Any]]) -> None:
        done = Done(record=record, engines=dict(engines), files=digests(place))
        _write(self._note(stage, place.name), json.dumps(to_dict(done)).encode())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if not p.is_dir()}


def packed(calibrated: Mapping[str, Calibrated]) -> bytes:
    """Scales, counts and facts by component as a zip of arrays and an index; the zip has checksums."""
    stream, number = io.BytesIO(), 0
    index: dict[str, Any] = {}
    with zipfile.ZipFile(stream, "w") as file:
        for component, made in calibrated.items():
            rows: dict[str, dict[str, Any]] = {}
            for layer, scales in made.scales.items():
                rows[layer] = row = {"activation": None if scales.activation is None else float(scales.activation)}
                for key, values in (("smooth", scales.smooth), ("importance", scales.importance)):
                    row[key] = None
                    if values is not None:
                        with file.open(f"{number}.npy", "w") as entry:
                            np.lib.format.write_array(entry, values, allow_pickle=False)
                        row[key], number = number, number + 1
            index[component] = [rows, {k: int(n) for k, n in made.macs.items()}, made.facts, list(made.segments)]
        file.writestr("index.json", json.dumps(index))
    return stream.getvalue()


def unpacked(data: bytes) -> dict[str, Calibrated]:
    """The inverse of `packed`.

    Raises:
        ValueError, KeyError, TypeError, BadZipFile: it is something else.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as file:

        def array(number: int | None) -> np.ndarray | None:
            if number is None:
                return None
            found: np.ndarray = np.lib.format.read_array(io.BytesIO(file.read(f"{number}.npy")), allow_pickle=False)
            return found

        return {
            component: Calibrated(
                scales={
                    layer: InputScales(
                        smooth=array(row["smooth"]), activation=row["activation"], importance=array(row["importance"])
                    )
                    for layer, row in rows.items()
                },
                macs=macs,
                facts=facts,
                segments=tuple(segments),
            )
            for component, (rows, macs, facts, segments) in json.loads(file.read("index.json")).items()
        }


def _is_whole(path: Path) -> bool:
    """Whether a zip is there with every checksum right."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
