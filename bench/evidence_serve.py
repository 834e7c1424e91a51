"""The server under more load than it can take, over a thousand pictures, and against generated requests.

All of it with the embedded checkpoint, and the server as ``intaglio serve`` starts it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.bench.serve_load import ANSWERED, Held, Reply, Served, Watch, ask, at_rate, by_clients, served
from intaglio.profiles.errors import ToolError
from intaglio.profiles.registry import need

BACKEND, THREADS, CONCURRENCY = "openvino", 1, 4
TIMES, SECONDS = 10, 60  # more requests than capacity, and for how long
QUEUE, PLACES = 64, 24  # pictures that may wait, and the deadline in pictures at capacity
STEPS = 4
SOAK, WARM = 1000, 200  # pictures, and after how many of them nothing may grow any more
CASES, EXAMPLES, SEEDS = 10_000, 40, 50  # of schemathesis: in all, of an operation in a run, runs at most
ERROR_CHARACTERS = 1000  # of a run's errors of schemathesis' own that are kept
FUZZ_LIMITS = {"steps": 4, "pixels": 128 * 128, "pictures": 2}
# No schema says which sizes and schedulers an artifact has: such a value is 400 and the line names what is allowed.
FUZZ_CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "413", "429"]
"""
FUZZ_NAMES = """
[parameters]
"path.name" = "emoji"
"""  # in every other run: the names that are made up are nobody's


@contextlib.contextmanager
def emoji(quant: Mapping[str, str], *targets: str) -> Iterator[Path]:
    """An artifact of the embedded checkpoint, for as long as it is needed."""
    from intaglio.exporters.build import build

    with tempfile.TemporaryDirectory(prefix="intaglio-serve-") as name:
        folder = Path(name) / "emoji"
        build("emoji", folder, targets=targets, quant=dict(quant), options={"certificate.prompts": "0"})
        yield folder


def small(k: int) -> dict[str, Any]:
    """A request for a small picture; every one has its own prompt, as strangers' have."""
    return {"prompt": f"red heart {k}", "seed": k, "num_inference_steps": STEPS, "size": "128x128"}


def measure() -> dict[str, Any]:
    """Ten times as many requests as there is capacity for, for a minute."""
    flags = ("--backend", BACKEND, "--threads", str(THREADS), "--concurrency", str(CONCURRENCY), "--queue", str(QUEUE))
    cache = ("--cache", "1MiB")  # every prompt is new: with the default it would fill for hours
    with emoji({"*": "int8"}, "openvino") as artifact, served(artifact, *flags, *cache) as server:
        return overload(server)


def overload(server: Served) -> dict[str, Any]:
    """What became of the requests, and of the memory."""
    asyncio.run(by_clients(server.address, CONCURRENCY, 4 * CONCURRENCY, small))  # what is first is slower
    replies, seconds = asyncio.run(by_clients(server.address, CONCURRENCY, 12 * CONCURRENCY, small))
    capacity = sum(reply.status == ANSWERED for reply in replies) / seconds
    deadline = PLACES / capacity
    with Watch(server) as watch:
        headers = {"X-Deadline-Seconds": f"{deadline:.3f}"}
        found = asyncio.run(at_rate(server.address, TIMES * capacity, SECONDS, small, headers))
    accepted = [reply for reply in found if reply.status not in (0, 429)]
    return {
        "backend": BACKEND,
        "capacity": rounded(capacity),
        "times": TIMES,
        "seconds": SECONDS,
        "deadline": rounded(deadline),
        "requests": len(found),
        "unanswered": sum(reply.status == 0 for reply in found),
        "statuses": counted(found),
        "pictures_over_capacity": rounded(sum(r.status == ANSWERED for r in found) / seconds_of(found) / capacity),
        "p50": rounded(percentile(accepted, 50)),
        "p99": rounded(percentile(accepted, 99)),
        "refused_p99": rounded(percentile([reply for reply in found if reply.status == 429], 99)),
        "late": rounded(sum(reply.status == 504 for reply in accepted) / len(accepted)),
        "late_by_tenths": [counted(tenth).get("504", 0) for tenth in tenths(found)],
        "growth": {role: growth(samples) for role, samples in watch.samples.items()},
    }


def counted(replies: Sequence[Reply]) -> dict[str, int]:
    """How many have which status."""
    return dict(sorted(collections.Counter(str(reply.status) for reply in replies).items()))


def tenths(replies: Sequence[Reply]) -> list[Sequence[Reply]]:
    """They are in the order of asking: ten parts of the time."""
    return [replies[k * len(replies) // 10 : (k + 1) * len(replies) // 10] for k in range(10)]


def seconds_of(replies: Sequence[Reply]) -> float:
    """How long the load lasted with its last answers: SECONDS and the slowest one."""
    return SECONDS + max((reply.seconds for reply in replies[-PLACES:]), default=0.0)


def percentile(replies: Sequence[Reply], percent: float) -> float:
    """Of the replies' seconds, the smallest that so many are not above."""
    ordered = sorted(reply.seconds for reply in replies)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan


def growth(samples: Sequence[Held]) -> dict[str, Any]:
    """What was held at the end over what was held when a fifth of the time was over: medians of a tenth each."""
    tenth = max(1, len(samples) // 10)
    first, last = samples[2 * tenth : 3 * tenth] or samples[:1], samples[-tenth:]
    early, late = (statistics.median(sample.memory for sample in part) for part in (first, last))
    return {
        "memory": rounded(late / early),
        "mebibytes": [rounded(early / 2**20), rounded(late / 2**20)],
        "descriptors": [min(s.descriptors for s in first), min(s.descriptors for s in last)],
        "threads": [max(s.threads for s in first), max(s.threads for s in last)],
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def measure_soak() -> dict[str, Any]:
    """A thousand pictures among requests that are wrong and clients that hang up."""
    flags = ("--backend", BACKEND, "--threads", str(THREADS), "--cache", "1MiB")
    with emoji({"*": "int8"}, "openvino") as artifact, served(artifact, *flags) as server:
        asyncio.run(soak(server, WARM, 0))
        with Watch(server) as watch:
            replies = asyncio.run(soak(server, SOAK, WARM))
            asyncio.run(asyncio.sleep(2.0))
        return {
            "backend": BACKEND,
            "pictures": replies["200"],
            "statuses": replies,
            "growth": {role: growth(samples) for role, samples in watch.samples.items()},
        }


async def soak(server: Served, count: int, first: int) -> dict[str, int]:
    """Four clients until there are `count` pictures; how many answers had which status."""
    statuses: collections.Counter[str] = collections.Counter()
    number = first

    async def client() -> None:
        nonlocal number
        while statuses["200"] < count:
            k, number = number, number + 1
            size = ("80x80", "96x80", "128x128")[k % 3]
            body: dict[str, Any] = {**small(k), "num_inference_steps": 1 + k % 3, "size": size}
            if k % 10 == 3:
                body["scheduler"] = "none of them"
            if k % 10 == 7:
                body.update(stream=True, partial_images=1)
            reply = await ask(server.address, body, stay=0.05 if k % 10 == 9 else 600)
            statuses[str(reply.status)] += 1

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return dict(sorted(statuses.items()))


def measure_fuzz() -> dict[str, Any]:
    """schemathesis, with all of its checks, against the OpenAPI document of a server whose engines cost nothing."""
    need("schemathesis", extra="dev")
    flags = [word for name, value in FUZZ_LIMITS.items() for word in ("--limit", f"{name}={value}")]
    totals: collections.Counter[str] = collections.Counter()
    errors: list[str] = []
    with emoji({}, "onnx") as artifact, served(artifact, "--backend", "null", "--queue", "256", *flags) as server:
        seeds = 0
        while totals["cases"] < CASES and seeds < SEEDS:
            seeds += 1
            report = fuzz(server, seeds)
            totals["cases"] += report["test_cases"]["generated"]
            totals["operations"] = report["operations"]["tested"]
            if report["errors"]:
                errors.append(f"seed {seeds}: {report['said'][:ERROR_CHARACTERS]}")
            totals.update({f"failed: {found['title']}": found["count"] for found in report["failures"]})
        statuses = server.statuses()
        alive = server.process.poll() is None
    failures = {name: count for name, count in totals.items() if name.startswith("failed: ")}
    return {
        "cases": totals["cases"],
        "operations": totals["operations"],
        "runs": seeds,
        "failures": failures,
        "errors": errors,
        "statuses": statuses,
        "server_errors": {status: count for status, count in statuses.items() if status.startswith("5")},
        "alive": alive,
    }


def fuzz(server: Served, seed: int) -> dict[str, Any]:
    """One run; schemathesis' own report, and as ``said`` what it printed of its own errors.

    By one thread: Python 3.11 counts the depth of its parser for all of them (CPython issue 106905), so that Hypothesis
    fails now and then where there are two.

    Raises:
        ToolError: it made none.
    """
    with tempfile.TemporaryDirectory(prefix="intaglio-fuzz-") as name:
        config, report = Path(name) / "schemathesis.toml", Path(name) / "report.json"
        config.write_text(FUZZ_CONFIG + (FUZZ_NAMES if seed % 2 else ""))
        url = f"http://{server.address[0]}:{server.address[1]}/openapi.json"
        command = [
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", url, "--checks", "all",
            "--max-examples", str(EXAMPLES), "--workers", "1", "--seed", str(seed), "--continue-on-failure",
            "--no-shrink", "--generation-database", "none", "--report", "json", "--report-json-path", str(report),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
        if not report.exists():
            raise ToolError(f"schemathesis made no report: {' '.join((done.stdout + done.stderr).split())[-300:]}")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return {**found, "said": " ".join(done.stdout.partition(" ERRORS ")[2].split())}
