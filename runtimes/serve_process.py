"""A worker process as the server sees it: started, watched, spoken to, ended; see `intaglio.runtimes.serve_worker`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.private_memory import held_bytes
from intaglio.runtimes.serve_wire import WireError, packed, receive

LOG = logging.getLogger("intaglio.serve")
Receiver = Callable[[dict[str, Any], list[bytes]], None]
GONE = "the worker process died; the request can be sent again"
HUNG = "the worker process did not answer and was ended; the request can be sent again"
LAST_WORDS = 2.0  # seconds for what a dead process left in the pipe, which a child of its own may hold open


class LoadFailed(ToolError):
    """A worker could not load its artifact; the message is its own."""


class Process:
    """One worker process.

    Attributes:
        receivers: by request, what is told of its events; a worker that dies sends each an ``error`` of kind ``lost``,
            or ``unseen`` where the worker had not even looked at the request.
        seen: the requests that the worker has looked at.
        pulse: the last ``pulse`` event.
        facts: those of ``loaded``.
        warm: whether it has made a picture.
    """

    def __init__(
        self, *, watchdog: float, ended: Callable[[Process], None], pulsed: Callable[[bool], None] = lambda busy: None
    ) -> None:
        self.watchdog, self.ended, self.pulsed = watchdog, ended, pulsed
        self.receivers: dict[str, Receiver] = {}
        self.seen: set[str] = set()
        self.pulse: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.alive = self.expected = self.warm = False
        self.reason = GONE
        self.child: asyncio.subprocess.Process | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.loading: asyncio.Future[dict[str, Any]] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self.child.pid if self.child is not None else None

    def held(self) -> int | None:
        """Bytes it holds, mapped files included; of one that has just died the kernel says nothing."""
        found = held_bytes(self.pid) if self.pid is not None else None
        return sum(found) or None if found is not None else None

    async def start(self, load: Mapping[str, Any], patience: float | None = None) -> dict[str, Any]:
        """Start it and let it load, for `patience` seconds; what it says of what it loaded.

        Raises:
            LoadFailed: it could not, died over it, or took longer.
        """
        self.loading = asyncio.get_running_loop().create_future()
        self.child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "intaglio.runtimes.serve_worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**20,
            start_new_session=True,  # Ctrl-C is for the server, which lets the workers end what they began
        )  # fmt: skip
        self.tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]
        self.send({"do": "load", "quiet": self.watchdog / 4, **load})
        try:
            self.facts = await asyncio.wait_for(self.loading, patience)
        except TimeoutError:
            await self.kill()
            raise LoadFailed(f"the worker did not load its artifact within {patience:g} s") from None
        except BaseException:
            await self.kill()
            raise
        if self.child.returncode is not None:  # right after it had loaded
            raise LoadFailed(f"the worker died (exit code {self.child.returncode})")
        self.alive = True
        return self.facts

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; one to a dead worker is dropped, its death is told to all receivers."""
        assert self.child is not None
        assert self.child.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self.child.stdin.write(packed(dict(message)))

    def run(self, ident: str, message: Mapping[str, Any], receiver: Receiver) -> None:
        """Begin a request."""
        self.receivers[ident] = receiver
        self.send({"do": "run", "id": ident, **message})

    def cancel(self, ident: str) -> None:
        """Drop a request; nothing more is heard of it."""
        self.seen.discard(ident)
        if self.receivers.pop(ident, None) is not None:
            self.send({"do": "cancel", "id": ident})

    async def _listen(self) -> None:
        assert self.child is not None
        assert self.child.stdout is not None
        try:
            while (message := await receive(self.child.stdout)) is not None:
                self.heard = time.monotonic()
                try:
                    self._heard(*message)
                except Exception as error:  # of one message: the others are still heard
                    log_defect("a worker's message", error)
        except WireError as error:
            log_defect("a worker's message", error)
        finally:
            await self._over()

    def _heard(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        event = header.pop("event")
        if event == "pulse":
            self.pulse = header
            self.pulsed(header["running"] > 0)
        elif event == "call":
            pass  # that it was said is all it says
        elif event in ("loaded", "failed"):
            assert self.loading is not None
            if not self.loading.done():
                failed = event == "failed"
                self.loading.set_exception(LoadFailed(header["message"])) if failed else self.loading.set_result(header)
        elif header["id"] in self.receivers:
            receiver = self.receivers[header["id"]]
            if event == "seen":
                self.seen.add(header["id"])
                return
            if event in ("done", "error"):
                del self.receivers[header["id"]]
                self.seen.discard(header["id"])
                self.warm = self.warm or event == "done"
            receiver({"event": event, **header}, blobs)

    async def _watch(self) -> None:
        """Kill a worker that says nothing for too long, and stop listening to one that is dead.

        One at rest pulses too. Were it watched only while it has requests, one that hangs would be found only by
        requests whose deadline is later than that.
        """
        assert self.child is not None
        silent = 0
        while self.child.returncode is None:
            await asyncio.sleep(min(1.0, self.watchdog / 4))
            late = self.alive and time.monotonic() - self.heard > self.watchdog
            silent = silent + 1 if late else 0
            if silent > 1:  # not at once: it may be this process that did not run, and what was said waits in the pipe
                self.reason = HUNG
                self.kill_group()
        await asyncio.sleep(LAST_WORDS)
        self.tasks[0].cancel()

    def kill_group(self) -> None:
        """End the process and its children, which are a group of their own."""
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)

    async def _over(self) -> None:
        """The process has closed its end."""
        assert self.child is not None
        self.alive = False
        self.kill_group()  # it may have closed its end without dying
        code = await self.child.wait()
        if self.loading is not None and not self.loading.done():
            self.loading.set_exception(LoadFailed(f"the worker died while loading (exit code {code})"))
        receivers, self.receivers = self.receivers, {}
        self.tasks[1].cancel()
        try:
            self.ended(self)  # first: what is told below may begin others
        finally:
            for ident, receiver in receivers.items():
                kind = "lost" if ident in self.seen else "unseen"
                receiver({"event": "error", "id": ident, "kind": kind, "message": self.reason}, [])

    async def stop(self, patience: float) -> None:
        """Let it end what it began, for `patience` seconds; then kill it."""
        self.expected = True
        self.send({"do": "stop"})
        if self.tasks:
            await asyncio.wait(self.tasks[:1], timeout=patience)
        await self.kill()

    async def kill(self) -> None:
        """End it now."""
        self.expected = True
        self.kill_group()
        if self.tasks:
            await asyncio.wait(self.tasks[:1])


def log_defect(what: str, error: BaseException) -> None:
    """A defect's frames and class, for the log; not its message, which may quote a request."""
    LOG.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
