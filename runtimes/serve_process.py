"""A worker process as the server sees it: started, watched, spoken to, ended; see `intaglio.runtimes.serve_worker`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.serve_wire import WireError, packed, receive

Receiver = Callable[[dict[str, Any], list[bytes]], None]
GONE = "the worker process died; the request can be sent again"
HUNG = "the worker process did not answer and was ended; the request can be sent again"


class LoadFailed(ToolError):
    """A worker could not load its artifact; the message is its own."""


class Process:
    """One worker process.

    Attributes:
        receivers: by request, what is told of its events; a worker that dies sends each an ``error`` of kind ``lost``.
        pulse: the last ``pulse`` event.
        facts: those of ``loaded``.
    """

    def __init__(
        self, *, watchdog: float, ended: Callable[[Process], None], pulsed: Callable[[bool], None] = lambda busy: None
    ) -> None:
        self.watchdog, self.ended, self.pulsed = watchdog, ended, pulsed
        self.receivers: dict[str, Receiver] = {}
        self.pulse: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.alive, self.expected = False, False
        self.reason = GONE
        self.child: asyncio.subprocess.Process | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.loading: asyncio.Future[dict[str, Any]] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self.child.pid if self.child is not None else None

    async def start(self, load: Mapping[str, Any]) -> dict[str, Any]:
        """Start it and let it load; what it says of what it loaded.

        Raises:
            LoadFailed: it could not, or died over it.
        """
        self.loading = asyncio.get_running_loop().create_future()
        self.child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "intaglio.runtimes.serve_worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**20,
            start_new_session=True,  # Ctrl-C is for the server, which lets the workers end what they began
        )  # fmt: skip
        self.tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]
        self.send({"do": "load", **load})
        try:
            self.facts = await self.loading
        except BaseException:
            await self.kill()
            raise
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
        if len(self.receivers) == 1:
            self.heard = time.monotonic()  # nothing was expected of it until now
        self.send({"do": "run", "id": ident, **message})

    def cancel(self, ident: str) -> None:
        """Drop a request; nothing more is heard of it."""
        if self.receivers.pop(ident, None) is not None:
            self.send({"do": "cancel", "id": ident})

    async def _listen(self) -> None:
        assert self.child is not None
        assert self.child.stdout is not None
        try:
            while (message := await receive(self.child.stdout)) is not None:
                self.heard = time.monotonic()
                self._heard(*message)
        except WireError:
            self.reason = GONE
        await self._over()

    def _heard(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        event = header.pop("event")
        if event == "pulse":
            self.pulse = header
            self.pulsed(header["running"] > 0)
        elif event in ("loaded", "failed"):
            assert self.loading is not None
            if not self.loading.done():
                failed = event == "failed"
                self.loading.set_exception(LoadFailed(header["message"])) if failed else self.loading.set_result(header)
        elif header["id"] in self.receivers:
            receiver = self.receivers[header["id"]]
            if event in ("done", "error"):
                del self.receivers[header["id"]]
            receiver({"event": event, **header}, blobs)

    async def _watch(self) -> None:
        """Kill a worker that has requests and says nothing for too long."""
        while True:
            await asyncio.sleep(min(1.0, self.watchdog / 4))
            if self.receivers and time.monotonic() - self.heard > self.watchdog:
                self.reason = HUNG
                self.signal(signal.SIGKILL)
                return

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child.pid, number)

    async def _over(self) -> None:
        """The process has closed its end."""
        assert self.child is not None
        self.alive = False
        self.signal(signal.SIGKILL)  # it may have closed its end without dying
        await self.child.wait()
        if self.loading is not None and not self.loading.done():
            self.loading.set_exception(LoadFailed(f"the worker died while loading (exit code {self.child.returncode})"))
        receivers, self.receivers = self.receivers, {}
        for ident, receiver in receivers.items():
            receiver({"event": "error", "id": ident, "kind": "lost", "message": self.reason}, [])
        self.tasks[1].cancel()
        self.ended(self)

    async def stop(self, patience: float) -> None:
        """Let it end what it began, for `patience` seconds; then kill it."""
        self.expected = True
        self.send({"do": "stop"})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.tasks[0]), patience)
            return
        await self.kill()

    async def kill(self) -> None:
        """End it now."""
        self.expected = True
        self.signal(signal.SIGKILL)
        if self.tasks:
            await self.tasks[0]
