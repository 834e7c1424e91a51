"""A server in a process of its own, for tests."""

from __future__ import annotations

import collections
import contextlib
import re
import subprocess
import sys
import threading
import time

LINE = re.compile(r"intaglio serves .* on (http://\S+)")
START_SECONDS = 120


class Serving:
    """`url`, `process` and `log`, the lines of stderr so far."""

    def __init__(self, artifacts, flags):
        command = [sys.executable, "-m", "intaglio", "serve", *map(str, artifacts), "--port", "0", *map(str, flags)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log, self.url, self.found = collections.deque(maxlen=10_000), None, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self.found.wait(START_SECONDS) or self.url is None:
            self.process.kill()
            raise RuntimeError("\n".join(self.log))

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if match := LINE.search(line):
                self.url = match[1]
                self.found.set()
        self.found.set()

    def wait_for(self, pattern, seconds=30):
        """Block until a line of the log matches."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(re.search(pattern, line) for line in list(self.log)):
                return
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} is not in the log:\n" + "\n".join(self.log))

    def stop(self, seconds=30):
        """SIGTERM, and the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.stderr.close()


@contextlib.contextmanager
def serving(*artifacts, flags=("--backend", "openvino", "--threads", "1")):
    """Serve artifacts (folders or NAME=FOLDER) on a free port."""
    server = Serving(artifacts, flags)
    try:
        yield server
    finally:
        server.stop()
