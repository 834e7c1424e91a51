"""Builds that are killed: one process imports everything and forks a child for each build, which takes a second.

Points at which a child can be killed are whatever changes the file system below its target's folder: a file opened for
writing, each write, fsync, mkdir, rename, exchange, chmod, unlink, rmdir. A write that is killed has written half.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
CHANGES = ("os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "os.truncate")  # audit events


@dataclass(frozen=True)
class Attempt:
    """How a build ended: ``code`` is 0, minus the signal that ended it, or 1 with the error's class and text.

    `points` is how many changes it made to the file system, or at which of them it was killed.
    """

    code: int
    points: int
    seconds: float
    error: str


class Nursery:
    """A process that forks builds of some components of one checkpoint; see `build`."""

    def __init__(self, checkpoint, *components, **environment):
        command = [sys.executable, HERE, checkpoint, *components]
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def build(self, target, *, at=None, after=None, **options):
        """Build to `target`; `options` are those of ``build``.

        The child is killed before its change number `at`, or the first one of a path that ends like `at`, or `after`
        so many seconds.
        """
        request = {"target": str(target), "at": at, "after": after, "options": options}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Attempt(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def law(target, *allowed):
    """The manifest digest of what is at `target`, ``None`` where nothing is; anything else is an error."""
    from intaglio.profiles.artifact import Artifact

    if not os.path.lexists(target):
        found = None
    else:
        artifact = Artifact.open(target, verify=False)
        artifact.verify()
        found = artifact.manifest.digest
    assert found in allowed, f"{target} is {found}, allowed: {allowed}"
    return found


# --- in the nursery -------------------------------------------------------------------------------------------------


class Points:
    """Counts changes of the file system below `folder`, and dies at one of them."""

    def __init__(self, folder, at):
        self.folder, self.at = f"{folder}{os.sep}", at
        self.count = mmap.mmap(-1, 8)  # shared with the process that forked this one

    def value(self):
        return int.from_bytes(self.count[:8], "little")

    def below(self, path):
        return not isinstance(path, int) and os.fsdecode(path).startswith(self.folder)

    def passed(self, path="", last_words=lambda: None):
        number = self.value() + 1
        self.count[:8] = number.to_bytes(8, "little")
        if number == self.at or (isinstance(self.at, str) and str(path).endswith(self.at)):
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        from intaglio.profiles import staging

        def hook(event, arguments):
            writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and self.below(arguments[0])
            if writing or event in CHANGES:
                self.passed(arguments[0])

        sys.addaudithook(hook)
        builtins.open = io.open = self.opening(io.open)
        fsync, exchange = os.fsync, staging.exchange

        def counted_fsync(descriptor):
            self.passed()
            fsync(descriptor)

        def counted_exchange(first, second):
            self.passed()
            done = exchange(first, second)
            self.passed()
            return done

        os.fsync, staging.exchange = counted_fsync, counted_exchange

    def opening(self, real):
        def opened(file, mode="r", *rest, **options):
            stream = real(file, mode, *rest, **options)
            if set(mode) & set("wax+") and self.below(file):
                write = stream.write

                def counted(data):
                    self.passed(file, lambda: (write(data[: len(data) // 2]), stream.flush()))
                    return write(data)

                with contextlib.suppress(AttributeError):  # unbuffered files refuse
                    stream.write = counted
            return stream

        return opened


def child(points, request, checkpoint, components, report):
    """Build and leave; never returns."""
    from partial import build_only

    code = 0
    try:
        points.install()
        build_only(Path(checkpoint), Path(request["target"]), *components, **request["options"])
    except BaseException as error:
        code = 1
        os.write(report, f"{type(error).__name__}: {error}".encode())
    else:
        os.write(report, json.dumps(sorted(sys.modules)).encode())
    os._exit(code)


def serve(checkpoint, components):
    """One build for each line on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(HERE.parent))
    import partial  # noqa: F401

    import intaglio.exporters.build  # noqa: F401
    from intaglio.exporters import graph_cache, resume

    for module in (graph_cache, resume):
        module.tools()  # of the code that was imported, though its files be edited meanwhile
    for line in sys.stdin:
        request, start = json.loads(line), time.monotonic()
        points = Points(Path(request["target"]).parent, request["at"])
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(points, request, checkpoint, components, writing)
        os.close(writing)
        if request["after"] is not None:
            time.sleep(request["after"])
            os.kill(pid, signal.SIGKILL)  # a child that is over waits to be waited for
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            known(json.loads(said))
        seconds = round(time.monotonic() - start, 3)
        error = said if code == 1 else ""
        answers.write(json.dumps({"code": code, "points": points.value(), "seconds": seconds, "error": error}) + "\n")
        answers.flush()


def known(modules):
    """Import what a build imported, so that the next child finds it."""
    for name in modules:
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
