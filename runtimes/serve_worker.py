"""One artifact in a process of its own, serving requests together: ``python -m intaglio.runtimes.serve_worker``.

Messages (see `intaglio.runtimes.serve_wire`) come on stdin and leave on stdout; what libraries print goes to stderr.
The first is ``load``; then ``run``, ``cancel``, ``finish``, ``preview`` of a request by its ``id``, and ``stop``, which
ends the process when the last request has ended. It also ends when stdin does, which is when the server has died.

Events: ``loaded`` or ``failed``; ``seen`` (a request is looked at from here on), ``step``, ``preview`` (a PNG),
``done`` (the pictures) or ``error`` of a request; ``pulse`` after rounds that were not told of
otherwise and once a second when there is nothing to do, ``call`` within a round that lasts longer: to hear something is
what the watchdog waits for.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from intaglio.profiles.registry import resolve
from intaglio.runtimes.batching import Batcher, Outcome
from intaglio.runtimes.embedding_cache import EmbeddingCache
from intaglio.runtimes.picture_files import picture_bytes
from intaglio.runtimes.previews import DECODERS, PREVIEW
from intaglio.runtimes.serve_errors import without_paths
from intaglio.runtimes.serve_faults import Faults, ending, said
from intaglio.runtimes.serve_wire import packed, read

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.runtimes.sampling import StepEvent

LOADER = "intaglio.runtimes.pipeline:load"
PULSE_SECONDS, BUSY_SECONDS = 1.0, 0.25  # between pulses: at rest, and while events of requests say as much
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Worker:
    """What runs in the process: one pipeline, its batcher, and the requests' own wishes.

    Attributes:
        wishes: by request, what ``run`` said beside the request itself.
        noted: by request, the warnings it gave.
    """

    def __init__(self, out: Any) -> None:
        self.out, self.lock = out, threading.Lock()
        self.inbox: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]]] = queue.SimpleQueue()
        self.encoder = ThreadPoolExecutor(1, "pictures")  # a PNG takes a while, in which the next step can run
        self.pipeline: Any = None
        self.batcher: Batcher | None = None
        self.wishes: dict[str, dict[str, Any]] = {}
        self.noted: dict[str, list[str]] = {}
        self.stopping, self.folder = False, ""
        self.told, self.pulsed = 0, 0.0  # events so far; when the last pulse was
        self.spoke, self.quiet = 0.0, PULSE_SECONDS  # when the last event was; seconds after which another is due
        self.faults = Faults()

    def tell(self, event: str, blobs: Sequence[bytes] = (), **fields: Any) -> None:
        """Send an event."""
        data = packed({"event": event, **fields}, blobs)
        with self.lock:
            self.out.write(data)
            self.out.flush()
        self.told, self.spoke = self.told + 1, time.monotonic()

    def load(self, message: Mapping[str, Any]) -> None:
        """Load the artifact; ``facts`` are what the server wants to know of it."""
        start, self.folder = time.perf_counter(), message["folder"]
        self.quiet = min(PULSE_SECONDS, message["quiet"])
        options = dict(message["options"])
        try:
            self.pipeline = resolve(message.get("loader") or LOADER)(message["folder"], **options)
            cache = EmbeddingCache(limit=message["cache_bytes"])
            self.batcher = Batcher(self.pipeline, rows=message.get("rows"), cache=cache, between=self.between)
            if PREVIEW in self.pipeline.artifact.manifest.components:
                self.pipeline.engines[PREVIEW]  # loads it: later the folder may be another build
        except Exception as error:
            kind, text = said(error)
            if kind == "internal":
                self.print_error(error)
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            elif kind != "memory":
                text = " ".join(str(error).split())  # for who started the server, who may know the folder
            self.tell("failed", kind=kind, message=text)
            raise SystemExit(1) from error
        digest = self.pipeline.artifact.manifest.digest
        self.tell("loaded", seconds=time.perf_counter() - start, pid=os.getpid(), digest=digest, rows=self.batcher.rows)

    def run(self, message: Mapping[str, Any]) -> None:
        """Begin a request."""
        assert self.batcher is not None
        ident = message["id"]
        self.tell("seen", id=ident)
        self.wishes[ident] = {**message, "previews": set(message.get("previews", ()))}
        try:
            request = self.pipeline.request(message["prompt"], **message["parameters"])
            self.batcher.add(ident, request, lambda event: self.stepped(ident, event))
        except Exception as error:
            self.ended(Outcome(ident, None, error))

    def stepped(self, ident: str, event: StepEvent) -> None:
        """Tell of a step, and show what it sees where that is wanted."""
        self.faults.step()
        wish = self.wishes[ident]
        self.tell("step", id=ident, index=event.index, total=event.total, seconds=event.seconds)
        if event.index in wish["previews"] or wish.pop("preview", False):
            small = PREVIEW in self.pipeline.artifact.manifest.components
            try:
                picture = event.preview(PREVIEW if small else DECODERS[0])[0]
            except Exception as error:  # early latents may decode to nothing; the picture itself still comes
                self.print_error(error)
                return
            form, compression = wish["form"], wish["compression"]
            self.encoder.submit(self.send_preview, ident, event.index, picture, form, compression)

    def send_preview(self, ident: str, index: int, picture: Image, form: str, compression: int) -> None:
        """Encode a preview and send it."""
        try:
            self.tell("preview", [picture_bytes(picture, form, compression, {})], id=ident, index=index)
        except Exception as error:  # the picture itself may still come
            self.print_error(error)

    def ended(self, outcome: Outcome) -> str:
        """Send a request's result or error; the kind of the error."""
        wish = self.wishes.pop(outcome.ident)
        notes = self.noted.pop(outcome.ident, [])
        if outcome.error is None:
            self.encoder.submit(self.send_done, outcome, wish, notes)
            return ""
        return self.send_error(outcome.ident, outcome.error, notes)

    def send_error(self, ident: str, error: Exception, notes: list[str]) -> str:
        """Send why there is no picture; the kind of the error."""
        kind, text = said(error, self.folder)
        if kind == "internal":
            self.print_error(error)
        self.tell("error", id=ident, kind=kind, message=text, warnings=notes)
        return kind

    def send_done(self, outcome: Outcome, wish: Mapping[str, Any], notes: list[str]) -> None:
        """Encode the pictures and send them. Nobody sees what is raised here: all of it is answered as an error."""
        try:
            result = outcome.result
            assert result is not None
            texts = {k: t + ending(result.parameters) for k, t in wish["texts"].items()}
            blobs = [picture_bytes(i, wish["form"], wish["compression"], texts) for i in result.images]
            parameters = {k: v for k, v in result.parameters.items() if k not in ("prompt", "negative_prompt")}
            self.tell(
                "done", blobs, id=outcome.ident, seconds=result.seconds, parameters=parameters, warnings=notes,
                size=list(result.images[0].size),
            )  # fmt: skip
        except Exception as error:
            self.send_error(outcome.ident, error, notes)

    def print_error(self, error: BaseException) -> None:
        """The traceback of a defect, for the log: its frames, and of its message nothing, which may quote a prompt."""
        frames = "".join(traceback.format_tb(error.__traceback__))
        print(f"{frames}{type(error).__name__}", file=sys.stderr, flush=True)

    def cancel(self, message: Mapping[str, Any]) -> None:
        """Drop a request."""
        assert self.batcher is not None
        self.batcher.cancel(message["id"])
        self.wishes.pop(message["id"], None)
        self.noted.pop(message["id"], None)
        if not len(self.batcher):
            self.pulse()

    def finish(self, message: Mapping[str, Any]) -> None:
        """End a request after its next step."""
        assert self.batcher is not None
        self.batcher.finish(message["id"])

    def preview(self, message: Mapping[str, Any]) -> None:
        """Show the next step of a request."""
        if message["id"] in self.wishes:
            self.wishes[message["id"]]["preview"] = True

    def stop(self, message: Mapping[str, Any]) -> None:
        """End when the last request has ended."""
        self.stopping = True

    def note(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        """In the place of `warnings.showwarning`: a request's warnings go to its client, never to the log."""
        current = self.batcher.current if self.batcher is not None else None
        if current is not None and not issubclass(category, DeprecationWarning):
            self.noted.setdefault(current, []).append(without_paths(str(message), self.folder))

    def serve(self) -> None:
        """Rounds of the batcher, messages between them."""
        while not (self.stopping and not self.wishes):
            busy = self.batcher is not None and len(self.batcher) > 0
            try:
                message = self.inbox.get(block=not busy, timeout=self.quiet)
            except queue.Empty:
                self.advance()
                continue
            do = message[0]["do"]
            {"load": self.load, "run": self.run, "cancel": self.cancel, "finish": self.finish, "preview": self.preview,
             "stop": self.stop}[do](message[0])  # fmt: skip
        self.encoder.shutdown(wait=True)

    def advance(self) -> None:
        """One round, and a pulse, which a round may lack that was told of otherwise: each wakes the server.

        Raises:
            SystemExit: the engines are past help; what is under way is lost with them.
        """
        if self.batcher is None:
            return
        told = self.told
        for outcome in self.batcher.advance() if len(self.batcher) else ():
            self.faults.failed(self.ended(outcome))
        if self.faults.hopeless:
            print(f"{self.faults.count} requests in a row failed in an engine: the worker ends", file=sys.stderr)
            self.encoder.shutdown(wait=True)
            raise SystemExit(1)
        if self.told == told or not len(self.batcher) or time.monotonic() - self.pulsed > BUSY_SECONDS:
            self.pulse()

    def between(self) -> None:
        """A call is over, of perhaps several in this round, in which the server would hear nothing."""
        if time.monotonic() - self.spoke > self.quiet:
            self.tell("call")

    def pulse(self) -> None:
        """Tell what the batcher has done so far."""
        assert self.batcher is not None
        self.pulsed = time.monotonic()
        cache = self.batcher.cache
        facts = {"calls": self.batcher.calls, "rows": self.batcher.rows_run, "running": len(self.batcher)}
        self.tell("pulse", (), **facts, cache_hits=cache.hits, cache_misses=cache.misses, cache_bytes=cache.held)

    def listen(self) -> None:
        """Put what comes on stdin into the inbox, until the server is gone, and with it whoever waited.

        The process ends then, though it be amid a call that takes long or does not return.
        """
        try:
            while (message := read(sys.stdin.buffer)) is not None:
                self.inbox.put(message)
        finally:
            os._exit(1)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent's thread ends, though it hang or be stopped (prctl(2))."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux; elsewhere the end of stdin has to do
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Serve until told to stop."""
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to all of a service; the server says when to end
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    worker = Worker(out)
    warnings.simplefilter("always")
    warnings.showwarning = worker.note  # type: ignore[assignment]
    threading.Thread(target=worker.listen, daemon=True).start()
    code = 1
    try:
        worker.serve()
        code = 0
    except SystemExit:
        pass  # who raised it has said why
    except BaseException as error:
        worker.print_error(error)
    os._exit(code)  # the thread that reads stdin cannot be ended


if __name__ == "__main__":
    sys.exit(main())
