"""A run of MLPerf's LoadGen over something that makes pictures, and what its logs say.

LoadGen runs in a process of its own, ``python -m intaglio.bench.loadgen``: a C++ loop that nothing can stop, not even
an error or Ctrl-C, until its ten minutes are over; here it is killed. It also keeps its timing thread away from
ours. The two speak lines of JSON::

    to LoadGen     {"task": …} once, then {"complete": [id, …]}
    from LoadGen   {"issue": [[id, sample], …], "at": nanoseconds}, at the end {"done": true}

Both clocks are ``time.perf_counter_ns``, which on Linux, macOS and Windows counts from one point for all processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from intaglio.profiles.errors import ToolError
from intaglio.profiles.registry import need

SUMMARY, DETAIL = "mlperf_log_summary.txt", "mlperf_log_detail.txt"
BESIDES = ("mlperf_log_accuracy.json", "mlperf_log_trace.json")  # LoadGen makes them always; empty in these runs
MARK = ":::MLLOG "
NO_AUDIT = "no-audit.config"  # LoadGen takes rules from an audit.config in the working folder unless told another name
TAIL = 2000  # characters of the stderr of a LoadGen that died

Maker = Callable[[Sequence[int], Sequence[str]], Sequence[Any]]


class LoadgenError(ToolError):
    """LoadGen stopped, or did not do what it was told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured, LoadGen's "system under test".

    Attributes:
        make: sample numbers and their prompts to as many pictures, in order.
        batch: samples that one call of `make` takes at most.
        clients: calls of `make` that are under way at once at most; above 1 they are made in threads.
    """

    make: Maker
    batch: int = 1
    clients: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What LoadGen is told.

    Attributes:
        scenario: LoadGen's name of it, ``SingleStream``.
        settings: attributes of its ``TestSettings``.
        samples: how many prompts there are.
    """

    scenario: str
    settings: Mapping[str, float]
    samples: int


def play(
    task: Task, prompts: Sequence[str], subject: Subject, folder: Path, tell: Callable[[int], None] = lambda done: None
) -> list[float]:
    """Answer LoadGen's queries in the order of their arrival until it has enough; its logs are then in `folder`.

    Args:
        task: `samples` is the number of `prompts`.
        prompts: by sample number.
        subject: makes the pictures, in this thread where it has one client.
        folder: exists.
        tell: is given the number of samples done.

    Returns:
        The latency of every sample in seconds, from its being issued to its picture.

    Raises:
        LoadgenError: it died or was not given a picture for every prompt. What `subject` raises passes through.
    """
    latencies: list[float] = []
    lock = threading.Lock()
    with loadgen_process(task, folder) as (arrivals, answer):

        def make(part: Sequence[tuple[int, int]], at: int) -> bool:
            numbers = [sample for _, sample in part]
            pictures = subject.make(numbers, [prompts[n] for n in numbers])
            if len(pictures) != len(part):
                raise LoadgenError(f"{len(part)} prompts gave {len(pictures)} pictures; there must be one for each")
            with lock:
                latencies.extend([(time.perf_counter_ns() - at) / 1e9] * len(part))
                heard = answer([identifier for identifier, _ in part])
                tell(len(latencies))
            return heard

        call = make if subject.clients == 1 else in_threads(make, subject.clients, arrivals)
        while (message := arrivals.get()) is not None and "done" not in message:
            if "error" in message:
                raise message["error"]
            issued, at = message["issue"], message["at"]
            for start in range(0, len(issued), subject.batch):
                if not call(issued[start : start + subject.batch], at):
                    break
    if message is None:
        raise LoadgenError("LoadGen's process ended before its run did")
    for name in BESIDES:
        (folder / name).unlink(missing_ok=True)
    return latencies


Arrivals = queue.SimpleQueue[dict[str, Any] | None]


def in_threads(make: Callable[..., bool], count: int, arrivals: Arrivals) -> Callable[..., bool]:
    """`make` by so many threads, which take the calls in their order; what it raises arrives as ``error``.

    They end with the process: one that waits for a server's answer must not keep anybody from leaving.
    """
    calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                make(*calls.get())
        except BaseException as error:
            arrivals.put({"error": error})

    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()

    def call(*arguments: Any) -> bool:
        calls.put(arguments)
        return True

    return call


@contextlib.contextmanager
def loadgen_process(task: Task, folder: Path) -> Iterator[tuple[Arrivals, Callable[[list[int]], bool]]]:
    """LoadGen's process for a while: a queue of what it says, and how to complete samples, False where it is gone.

    Raises:
        LoadgenError: it ended badly.
    """
    arrivals: Arrivals = queue.SimpleQueue()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "intaglio.bench.loadgen"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        )
        incoming, outgoing = process.stdout, process.stdin
        assert incoming is not None and outgoing is not None
        listener = threading.Thread(target=listen, args=(incoming, arrivals), daemon=True)
        listener.start()

        def send(message: Mapping[str, Any]) -> bool:
            try:
                print(json.dumps(message), file=outgoing, flush=True)
            except OSError:
                return False  # it is gone: the queue ends, and the block with the reason
            return True

        try:
            told = {"scenario": task.scenario, "settings": dict(task.settings), "samples": task.samples}
            send({"task": {**told, "folder": str(folder)}})
            yield arrivals, lambda identifiers: send({"complete": identifiers})
            if process.wait() != 0:
                errors.seek(0)
                said = " ".join(errors.read().decode("utf-8", "replace")[-TAIL:].split())
                raise LoadgenError(f"LoadGen's process ended with {process.returncode}: {said or 'no message'}")
        finally:
            process.kill()
            process.wait()
            listener.join()
            incoming.close()
            with contextlib.suppress(OSError):  # what it was still to read is of no use
                outgoing.close()


def listen(incoming: IO[str], arrivals: Arrivals) -> None:
    """Put what LoadGen says in the queue, None when it stops."""
    for line in incoming:
        arrivals.put(json.loads(line))
    arrivals.put(None)


# LoadGen's process.


def private_stdout() -> IO[str]:
    """The protocol's own copy of stdout; from here on everything that prints, LoadGen too, prints to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return channel


def main() -> None:
    """Run the one task that stdin holds; ends when it is done, or when stdin does, which means the parent died."""
    channel = private_stdout()
    task = json.loads(sys.stdin.readline())["task"]
    loadgen = need("mlperf_loadgen", extra="bench")
    settings, logs = loadgen.TestSettings(), loadgen.LogSettings()
    settings.scenario = getattr(loadgen.TestScenario, task["scenario"])
    settings.mode = loadgen.TestMode.PerformanceOnly
    for name, value in task["settings"].items():
        setattr(settings, name, value)
    logs.log_output.outdir, logs.enable_trace = task["folder"], False

    def issue(samples: Sequence[Any]) -> None:
        at = time.perf_counter_ns()
        print(json.dumps({"issue": [[s.id, s.index] for s in samples], "at": at}), file=channel, flush=True)

    def complete() -> None:
        for line in sys.stdin:
            done = [loadgen.QuerySampleResponse(identifier, 0, 0) for identifier in json.loads(line)["complete"]]
            loadgen.QuerySamplesComplete(done)
        os._exit(1)

    threading.Thread(target=complete, daemon=True).start()
    subject = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(task["samples"], task["samples"], lambda numbers: None, lambda numbers: None)
    loadgen.StartTestWithLogSettings(subject, library, settings, logs, str(Path(task["folder"]) / NO_AUDIT))
    print(json.dumps({"done": True}), file=channel, flush=True)
    os._exit(0)  # the thread above waits for stdin, where the interpreter's own end would stumble over it


# LoadGen's logs.


@dataclass(frozen=True, slots=True)
class Logs:
    """What a finished run wrote: its summary by names, its detail log by keys with the values in order.

    Messages that LoadGen marks as errors are under the key ``errors``.
    """

    names: Mapping[str, str]
    keys: Mapping[str, list[Any]]

    def summary(self, ending: str) -> str:
        """The summary's value whose name ends like this.

        Raises:
            LoadgenError: there is none, or more than one.
        """
        found = [value for name, value in self.names.items() if name.endswith(ending)]
        if len(found) != 1:
            raise LoadgenError(f"{SUMMARY} has {len(found)} lines of {ending!r}, not one; the run did not finish")
        return found[0]

    def detail(self, key: str) -> Any:
        """The detail log's value.

        Raises:
            LoadgenError: it has none.
        """
        if key not in self.keys:
            raise LoadgenError(f"{DETAIL} has no {key}; the run did not finish")
        return self.keys[key][0]

    @property
    def valid(self) -> bool:
        """LoadGen's verdict."""
        return self.summary("Result is") == "VALID"

    @property
    def why(self) -> str:
        """LoadGen's reasons against the run, on one line; empty where it is valid."""
        reasons = [] if self.valid else [*self.keys["errors"], *self.keys.get("result_invalid_reason", [])]
        if not self.valid and not self.detail("early_stopping_met"):
            reasons.append(f"too few queries for early stopping: {self.detail('early_stopping_result')}")
        return " ".join("; ".join(str(r) for r in reasons if str(r).strip()).split())

    def figures(self) -> dict[str, Any]:
        """LoadGen's version, results and errors, as the detail log has them."""
        wanted = {k: v[0] for k, v in self.keys.items() if k.startswith(("loadgen_version", "result_", "early_stop"))}
        return {**wanted, "errors": self.keys["errors"]}


def read_logs(folder: Path) -> Logs:
    """The two logs of a finished run.

    Raises:
        LoadgenError: one is missing, or a line of the detail log is not as MLCommons' own parser wants it: the mark,
            then JSON.
    """
    try:
        summary, detail = ((folder / name).read_text(encoding="utf-8") for name in (SUMMARY, DETAIL))
    except OSError as error:
        raise LoadgenError(f"LoadGen left no {error.filename} ({error.strerror})") from error
    names: dict[str, str] = {}
    for line in summary.splitlines():
        match = re.fullmatch(r"\s*(\S.*?)\s*:\s*(\S.*?)\s*", line)
        if match:
            names.setdefault(match[1], match[2])
    keys: dict[str, list[Any]] = {"errors": []}
    for number, line in enumerate(detail.splitlines(), 1):
        try:
            record = json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else {}
            keys.setdefault(record["key"], []).append(record["value"])
            if record["metadata"]["is_error"]:
                keys["errors"].append(record["value"])
        except (ValueError, KeyError) as error:
            raise LoadgenError(f"{DETAIL}, line {number}, is no record of LoadGen: {line[:80]!r}") from error
    return Logs(names, keys)


if __name__ == "__main__":
    main()
