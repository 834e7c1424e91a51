"""The folder of a batch: pictures and results, each whole, and what an earlier run has done already."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from intaglio.profiles.errors import UsageError
from intaglio.profiles.staging import lock, sync
from intaglio.runtimes.batch import Made, checked, result_line, written
from intaglio.runtimes.batch_file import Line, RequestFile
from intaglio.runtimes.serve_errors import ServeError
from intaglio.runtimes.serve_hub import Hub
from intaglio.runtimes.serve_openai import answer_of, error_body, in_base64

RESULTS, PARTIAL = "results.jsonl", "results.partial.jsonl"
SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
Place = tuple[int, int]  # of a result in the journal: its first byte, and bytes


class Folder:
    """Where a batch goes; used with ``with``, which keeps other runs out.

    Attributes:
        done: by ``custom_id``, where in the journal the results of lines that succeeded are, an earlier run's too.
        failed: the same of lines that did not.
        pictures: that this run has made.

    Raises:
        UsageError: two lines would write one file, or the folder has something else.
    """

    def __init__(self, path: Path, requests: RequestFile, hub: Hub, *, force: bool) -> None:
        self.path, self.requests, self.hub, self.force = path, requests, hub, force
        self.results, self.partial = path / RESULTS, path / PARTIAL
        self.done: dict[str, Place] = {}
        self.failed: dict[str, Place] = {}
        self.pictures = 0
        self.model_of: dict[str, str] = {}  # of a line, what is to be loaded for it
        self.names = self.plan()
        self.lock = threading.Lock()
        self.descriptor = self.journal = -1

    def plan(self) -> dict[str, list[str]]:
        """By ``custom_id``, the files of a line's pictures; none where its body is no request.

        Raises:
            UsageError: an id is no name for a file, or two lines have one file.
        """
        names: dict[str, list[str]] = {}
        owner: dict[str, str] = {}
        for line in self.requests.lines:
            ident = line.custom_id
            if not SAFE_ID.fullmatch(ident):
                raise UsageError(
                    f"line {line.number}: custom_id {ident!r} names no file; allowed: letters, digits, _ . - "
                    "(not first), at most 200"
                )
            body = self.requests.body(line)
            self.model_of[ident] = str(body.get("model") or "")
            try:
                request = checked(body, 0)
            except ServeError:
                names[ident] = []
                continue
            count, form = request.n or 1, request.output_format or "png"
            if count > self.requests.limits["pictures"]:  # its own error, when it is made
                names[ident] = []
                continue
            stems = [ident] if count == 1 else [f"{ident}-{k}" for k in range(count)]
            names[ident] = [f"{stem}.{form}" for stem in stems]
            for name in names[ident]:
                other = owner.setdefault(name.casefold(), ident)  # some file systems know no case
                if other != ident:
                    raise UsageError(f"the lines {other!r} and {ident!r} would both write {name}; rename one of them")
        return names

    def ident(self, line: Line, body: Mapping[str, Any]) -> str:
        """What a line's result depends on, as a digest: the request, the artifact, and what runs it."""
        try:
            model = self.hub.model(body.get("model"))
            settings = (model.reader.artifact.manifest.digest, model.settings.backend, model.settings.device)
        except (ServeError, TypeError):
            settings = ("", "", "")
        text = json.dumps([line.custom_id, body, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def todo(self) -> list[Line]:
        """Lines that are not done, those of a model together: it is loaded once."""
        left = [line for line in self.requests.lines if line.custom_id not in self.done]
        return sorted(left, key=lambda line: self.model_of[line.custom_id])

    @property
    def over(self) -> int:
        """Lines that are done or failed."""
        return len(self.done) + len(self.failed)

    def said(self) -> str:
        """The progress bar's words."""
        return f"batch, {len(self.failed)} failed" if self.failed else "batch"

    def __enter__(self) -> Folder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UsageError(f"-o {self.path} is no folder that can be written ({error.strerror})") from error
        try:
            self.begin()
        except BaseException:
            self.close()
            raise
        return self

    def begin(self) -> None:
        """Find what is done, and begin a journal with it.

        Raises:
            UsageError: the folder is another batch's, or nobody's.
        """
        if not lock(self.descriptor):
            raise UsageError(f"another batch writes into {self.path}; wait for it or choose another folder")
        others, temporary = [entry.name for entry in os.scandir(self.path)], temporary_of(self.partial)
        if not self.force and others and not {RESULTS, PARTIAL, temporary.name} & set(others):
            raise UsageError(f"-o {self.path} has other files ({min(others)}); choose another folder or add --force")
        for name in others:
            if name.startswith(".") and name.endswith(".tmp"):
                (self.path / name).unlink()
        self.journal = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        if not self.force:
            self.recall()
        os.replace(temporary, self.partial)
        sync(self.path)

    def recall(self) -> None:
        """Take what an earlier run has done; failed lines are made again.

        Raises:
            UsageError: it was another batch.
        """
        idents = {line.custom_id: self.ident(line, self.requests.body(line)) for line in self.requests.lines}
        for custom_id, ident, raw in (*entries(self.results), *entries(self.partial)):
            if ident != idents.get(custom_id):
                raise UsageError(
                    f"{self.path} has {custom_id!r} of another request, artifact or backend; choose another folder, "
                    "or add --force to make everything anew"
                )
            files = self.names[custom_id]
            if files and all((self.path / name).is_file() for name in files):
                self.done[custom_id] = self.note(raw)

    def note(self, raw: bytes) -> Place:
        """Append a line to the journal, whole or not at all."""
        with self.lock:
            place = os.lseek(self.journal, 0, os.SEEK_END)
            try:
                rest = memoryview(raw)
                while rest:
                    rest = rest[os.write(self.journal, rest) :]
                os.fsync(self.journal)
            except BaseException:
                os.ftruncate(self.journal, place)
                raise
        return place, len(raw)

    async def deliver(self, made: Made) -> None:
        """Write a line's pictures, then its result."""
        await asyncio.to_thread(self.write, made)

    def write(self, made: Made) -> None:
        """The same, while the event loop goes on."""
        custom_id = made.line.custom_id
        if made.error is not None:
            entry = result_line(made, error_body(made.error, made.ident))
        else:
            assert made.ticket is not None
            assert made.request is not None
            names = self.names[custom_id]
            for name, picture in zip(names, made.pictures, strict=True):
                whole(self.path / name, [picture.data])
            both = "response_format" in made.request.model_fields_set and made.request.response_format == "b64_json"
            contents = [
                {"url": name, **(in_base64(picture) if both else {})}
                for name, picture in zip(names, made.pictures, strict=True)
            ]
            entry = result_line(made, answer_of(made.ticket, list(made.pictures), contents))
        place = self.note(written(entry))
        (self.done if made.error is None else self.failed)[custom_id] = place
        self.pictures += len(made.pictures)

    def finish(self) -> None:
        """Give the results their name, in the order of the requests."""
        places = {**self.failed, **self.done}
        found = (places[line.custom_id] for line in self.requests.lines)
        whole(self.results, (os.pread(self.journal, size, place) for place, size in found))
        self.partial.unlink()

    def close(self) -> None:
        """Let others have the folder."""
        for descriptor in (self.journal, self.descriptor):
            if descriptor >= 0:
                os.close(descriptor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def entries(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Results that are pictures: ``custom_id``, request, line. A last line that was not written to its end is none.

    Raises:
        UsageError: the file is something else.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                entry = json.loads(raw)
                custom_id, status = entry["custom_id"], entry["response"]["status_code"]
                ident = entry["response"]["request_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path}, line {number}, is no result of a batch; choose another folder") from error
            if status == 200:
                yield custom_id, ident, raw


def temporary_of(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = temporary_of(path)
    with temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)
