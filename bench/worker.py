"""One case in a process of its own: ``python -m intaglio.bench.worker``, and the parent's end of the pipe.

One JSON line a request on stdin, one JSON line an answer on stdout; what libraries print goes to stderr. A request is
``{"do": ..., ...}``, a method of `Worker` by its name; an answer is ``{"ok": {...}}`` or ``{"error": "one line"}``. The
worker computes only between a request and its answer, so that the parent can interleave many of them.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from intaglio.bench.cases import Case

TAIL = 12  # lines of stderr quoted when a worker dies
REQUESTS = ("watch", "load", "run", "image", "record", "replay", "memory")


class WorkerError(RuntimeError):
    """A worker died, hung or refused; the message says which, with what it last wrote."""


class Client:
    """The parent's end: starts the process, sends requests, blocks for answers.

    Args:
        case: what the worker is to measure.
        timeout: seconds any answer may take.
    """

    def __init__(self, case: Case, *, timeout: float) -> None:
        self.case, self.timeout = case, timeout
        self.process = subprocess.Popen(
            [case.python or sys.executable, "-m", "intaglio.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self.answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.readers = [threading.Thread(target=f, daemon=True) for f in (self._read_answers, self._read_stderr)]
        for reader in self.readers:
            reader.start()

    def _read_answers(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)  # end of file: the worker is gone

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        self.tail.extend(line.rstrip() for line in self.process.stderr if line.strip())

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send one request and block for its answer.

        Raises:
            WorkerError: the worker answered with an error, died, or took longer than the timeout (it is then killed).
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=self.timeout)
        except OSError:  # the pipe is broken: the worker died between two requests
            line = None
        except queue.Empty:
            self.close(patience=0)
            message = f"{do}: no answer within {self.timeout:g} s, the worker was ended{self._last_words()}"
            raise WorkerError(message) from None
        if line is None:
            code = self._wait()
            message = f"{do}: the worker died ({describe_exit(code)}){self._last_words()}"
            raise WorkerError(message)
        answer = json.loads(line)
        if "error" in answer:
            message = f"{do}: {answer['error']}"
            raise WorkerError(message)
        return dict(answer["ok"])

    def _wait(self) -> int:
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _last_words(self) -> str:
        self.readers[1].join(timeout=5)
        return f"; last on stderr: {' | '.join(self.tail)}" if self.tail else "; it wrote nothing to stderr"

    def close(self, *, patience: float = 5.0) -> None:
        """End the worker: its stdin ends, and if that takes longer than `patience` seconds it is killed."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # a half-sent request to a dead worker
            self.process.stdin.close()
        try:
            self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for reader in self.readers:
            reader.join(timeout=5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def describe_exit(code: int) -> str:
    """``exit code 3`` or ``signal 11``; 9 is what Linux's out-of-memory killer sends."""
    if code >= 0:
        return f"exit code {code}"
    return f"signal {-code}{', perhaps out of memory' if code == -9 else ''}"


class Worker:
    """The worker's end: one pipeline and what was measured on it."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.pipe: Any = None
        self.probe: Any = None
        self.energy: Any = None
        self.watcher: Any = None

    def watch(self) -> dict[str, Any]:
        """Sample memory from now on, for `memory`; a worker that is watched is not one to time."""
        from intaglio.bench.memory import Watcher

        self.watcher = Watcher().start()
        return {}

    def load(self, case: dict[str, Any]) -> dict[str, Any]:
        """Load the pipeline; ``seconds`` includes importing the backend, as every first use does.

        ``compile_s``: of these in the backend's own compiler, by component; None where it does not say.
        """
        from intaglio.bench.energy import Energy
        from intaglio.bench.memory import VramProbe
        from intaglio.profiles.registry import resolve

        size = case["size"]
        self.case = Case(**{**case, "prompts": tuple(case["prompts"]), "size": tuple(size) if size else None})
        self.probe = VramProbe(self.case.device)
        self.energy = Energy(self.case.device)
        start = time.perf_counter()
        self.pipe = resolve(self.case.loader)(
            self.case.artifact,
            backend=self.case.backend,
            device=self.case.device,
            threads=self.case.threads,
            checkpoint=self.case.checkpoint,
            settings=self.case.settings or None,
            verify=False,  # the parent hashed every file once: a digest is no part of loading
        )
        seconds = time.perf_counter() - start
        if self.watcher is not None:
            self.watcher.mark("loaded")
        return {"seconds": seconds, "pid": os.getpid(), "compile_s": getattr(self.pipe, "compile_seconds", None)}

    def _generate(self, prompt: int, each: Callable[[Any], None] = lambda event: None) -> tuple[Any, dict[str, Any]]:
        assert self.case is not None
        width, height = self.case.size or (None, None)
        chosen: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": self.case.steps}
        chosen |= {"scheduler": self.case.scheduler, "guidance_scale": self.case.guidance_scale}
        if self.case.batch > 1:
            chosen["count"] = self.case.batch
        self.energy.start()
        busy, start = time.process_time(), time.perf_counter()
        stream = self.pipe.stream(self.case.prompts[prompt], seed=self.case.seed, **chosen)
        steps: list[float] = []
        while True:
            try:
                event = next(stream)
            except StopIteration as end:
                result = end.value
                break
            steps.append(float(event.seconds))
            each(event)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        energy = self.energy.stop()
        pictures = [image.tobytes() for image in result.images]
        digest = hashlib.sha256(b"".join([result.latents.tobytes(), *pictures])).hexdigest()
        stages = {k: float(v) for k, v in result.seconds.items()}
        timing = {"seconds": seconds, "steps": steps, "stages": stages, "digest": digest}
        return result, {**timing, "cpu_s": busy, "energy": energy}

    def run(self, prompt: int) -> dict[str, Any]:
        """One prompt: ``seconds`` to the picture, of the processor ``cpu_s``, ``steps``, ``stages``, ``digest``."""
        return self._generate(prompt)[1]

    def image(self, prompt: int, folder: str, stem: str) -> dict[str, Any]:
        """One prompt, its first picture written as ``stem.png`` with its latents as ``stem.npy`` (float32).

        ``stem.npy`` [steps, ...] holds them after every step, the last ones are the final.
        """
        import numpy as np

        drift: list[np.ndarray] = []
        result, timing = self._generate(prompt, lambda event: drift.append(np.array(event.latents, dtype=np.float32)))
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{stem}.png"
        result.images[0].convert("RGB").save(path)
        latents = np.stack(drift) if drift else np.asarray(result.latents, dtype=np.float32)[None]
        np.save(path.with_suffix(".npy"), latents, allow_pickle=False)
        parameters = json.loads(json.dumps(result.parameters, default=str))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {**timing, "size": list(result.images[0].size), "parameters": parameters, "sha256": digest}

    def record(self, prompt: int, folder: str) -> dict[str, Any]:
        """Keep what the components are fed and answer for one prompt; see `intaglio.bench.watching`."""
        from intaglio.bench.watching import Keeper, picture_of, through

        if not hasattr(self.pipe, "engines"):
            return {"calls": None, "reason": "its components cannot be reached"}
        Path(folder).mkdir(parents=True, exist_ok=True)
        keeper = Keeper(Path(folder))

        def advance(event: Any) -> None:
            keeper.now = event.index + 1

        with through(self.pipe, keeper.run):
            result, _ = self._generate(prompt, advance)
        keeper.close(picture_of(result))
        return {"calls": len(keeper.calls), "reason": ""}

    def replay(self, prompt: int, folder: str) -> dict[str, Any]:
        """The errors of this case's components on what another one kept, and of its loop on the other's answers."""
        from intaglio.bench.watching import played, replayed

        if not hasattr(self.pipe, "engines"):
            return {"calls": None, "loop": None, "reason": "its components cannot be reached"}
        loop = played(self.pipe, Path(folder), lambda: self._generate(prompt)[0])
        return {"calls": replayed(self.pipe, Path(folder)), "loop": loop, "reason": ""}

    def memory(self) -> dict[str, Any]:
        """Host and device memory since `watch`, and what the engines say they hold.

        Raises:
            UsageError: `watch` was not called first.
        """
        from intaglio.profiles.errors import UsageError

        if self.watcher is None:
            raise UsageError("memory is of a worker that is watched from the start")
        self.watcher.mark("pictured")
        return {"host": self.watcher.stop(), "vram": self.probe.read(), "engines": self.pipe.memory()}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request. What a ToolError says is for the user; anything else also leaves its traceback on stderr."""
        from intaglio.profiles.errors import ToolError

        do = request.pop("do")
        try:
            method: Callable[..., dict[str, Any]] = getattr(self, REQUESTS[REQUESTS.index(do)])
            return {"ok": method(**request)}
        except ToolError as error:
            return {"error": " ".join(str(error).split())}
        except Exception as error:
            import traceback

            traceback.print_exc()
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def private_stdout() -> IO[str]:
    """The protocol's own copy of stdout; from here on everything that prints, C libraries too, prints to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return channel


def main() -> int:
    """Answer requests until stdin ends, which it also does when the parent dies."""
    channel = private_stdout()
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line)), allow_nan=False), file=channel, flush=True)
    return 0


def to_json(case: Case) -> dict[str, Any]:
    """The case as the ``load`` request carries it."""
    return asdict(case)


if __name__ == "__main__":
    sys.exit(main())
