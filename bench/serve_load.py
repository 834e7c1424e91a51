"""A server in a process of its own, clients that ask it faster than it can answer, and what its processes hold."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.private_memory import OWN, tree

LINE = re.compile(r"intaglio serves .* on http://([\d.]+):(\d+)")
START_SECONDS = 300.0
PICTURES = "/v1/images/generations"
ANSWERED = 200


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its status (0: the connection ended without one), and seconds from asking to its last byte."""

    status: int
    seconds: float


class Served:
    """A server that ``intaglio serve`` started; ``address`` is (host, port), ``log`` its last lines on stderr."""

    def __init__(self, artifact: Path, flags: Sequence[str]) -> None:
        command = [sys.executable, "-m", "intaglio", "serve", str(artifact), "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: collections.deque[str] = collections.deque(maxlen=200_000)
        self.address, self.found = ("", 0), threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self.found.wait(START_SECONDS) or not self.address[1]:
            self.process.kill()
            raise ToolError("the server did not start: " + " | ".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if match := LINE.search(line):
                self.address = (match[1], int(match[2]))
                self.found.set()
        self.found.set()

    def statuses(self) -> dict[str, int]:
        """How often its log says it answered with which status."""
        found = (re.search(r" [0-9a-f]{32} [A-Z]+ .* (\d{3}|-) \d+\.\d+ s$", line) for line in list(self.log))
        return dict(sorted(collections.Counter(match[1] for match in found if match).items()))

    def stop(self) -> int:
        """End it; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@contextlib.contextmanager
def served(artifact: Path, *flags: str) -> Iterator[Served]:
    """Serve an artifact on a free port."""
    server = Served(artifact, flags)
    try:
        yield server
    finally:
        server.stop()


async def ask(
    address: tuple[str, int], body: Mapping[str, Any], headers: Mapping[str, str] | None = None, *, stay: float = 600
) -> Reply:
    """Ask for pictures; hang up after `stay` seconds."""
    start = time.perf_counter()
    text = json.dumps(body).encode()
    whole = {
        "Host": f"{address[0]}:{address[1]}", "Content-Type": "application/json", "Content-Length": str(len(text)),
        "Connection": "close", **(headers or {}),
    }  # fmt: skip
    head = "".join(f"{name}: {value}\r\n" for name, value in whole.items())
    status = 0
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(stay):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(f"POST {PICTURES} HTTP/1.1\r\n{head}\r\n".encode() + text)
                answer = await reader.read(12)
                while await reader.read(2**16):
                    pass
                status = int(answer[9:12]) if len(answer) == 12 else 0
            finally:
                writer.close()
    return Reply(status, time.perf_counter() - start)


Body = Callable[[int], Mapping[str, Any]]


async def at_rate(
    address: tuple[str, int], rate: float, seconds: float, body: Body, headers: Mapping[str, str] | None = None
) -> list[Reply]:
    """Ask `rate` times a second, whether there are answers or not."""
    start, tasks = time.perf_counter(), []
    for k in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, start + k / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(address, body(k), headers)))
    return list(await asyncio.gather(*tasks))


async def by_clients(address: tuple[str, int], clients: int, count: int, body: Body) -> tuple[list[Reply], float]:
    """`clients` that ask one after the other until `count` were asked together; the replies, and seconds of it all."""
    numbers = iter(range(count))

    async def client() -> list[Reply]:
        return [await ask(address, body(k)) for k in numbers]

    start = time.perf_counter()
    found = await asyncio.gather(*(client() for _ in range(clients)))
    return [reply for replies in found for reply in replies], time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds: bytes of its own (not of mapped files), open descriptors, threads."""

    memory: int
    descriptors: int
    threads: int


def held(pid: int) -> Held | None:
    """Of one process without its children; ``None`` where it is gone."""
    place = Path(f"/proc/{pid}")
    try:
        rows = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        descriptors = len(list((place / "fd").iterdir()))
    except OSError:
        return None
    memory = sum(int(rows[name].split()[0]) * 1024 for name in OWN if name in rows)
    return Held(memory, descriptors, int(rows["Threads"]))


class Watch:
    """Samples of a server and of its worker, taken every `interval` seconds: ``server`` and ``worker``."""

    def __init__(self, server: Served, interval: float = 0.5) -> None:
        self.server, self.interval = server, interval
        self.samples: dict[str, list[Held]] = {"server": [], "worker": []}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(self.interval):
            self.sample()

    def sample(self) -> None:
        """Look now."""
        for place in tree(self.server.process.pid):
            pid = int(place.name)
            found = held(pid)
            if found is not None:
                self.samples["server" if pid == self.server.process.pid else "worker"].append(found)


def bare(artifact: str, backend: str, threads: str) -> None:
    """The bare loop in a process of its own: requests as JSON on stdin, seconds of each on stdout."""
    import intaglio

    pipe = intaglio.load(artifact, backend=backend, threads=int(threads))
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        pipe(request.pop("prompt"), **request)
        print(time.perf_counter() - start, flush=True)


class Bare:
    """`bare` as a context: called with a request it gives the seconds."""

    def __init__(self, artifact: Path, backend: str, threads: int) -> None:
        command = [sys.executable, "-m", "intaglio.bench.serve_load", str(artifact), backend, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def __call__(self, request: Mapping[str, Any]) -> float:
        """Make one picture.

        Raises:
            ToolError: the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ToolError("the bare loop ended before its time")
        return float(line)


if __name__ == "__main__":
    bare(*sys.argv[1:])
