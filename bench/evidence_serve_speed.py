"""What serving costs over a bare loop, and what it gains by letting requests share calls.

Both sides of a comparison run on the same machine in turns, so that what disturbs it disturbs both.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from pathlib import Path
from typing import Any

from intaglio.bench.evidence_serve import emoji, rounded
from intaglio.bench.serve_load import ANSWERED, Bare, Served, ask, by_clients, served
from intaglio.bench.statistics import as_json, compared, summary
from intaglio.profiles.errors import ToolError

BACKENDS = ("openvino", "onnxruntime")
THREADS = os.cpu_count() or 1
PAIRS, SIDE, STEPS = 40, 256, 20  # pictures a side of the comparison with the bare loop
CLIENTS = (1, 2, 4, 8)
PICTURES, SHORT = 4, 8  # of a cell of the comparison of queues at least, and their steps
SMALL = 128  # pixels along a side of those
ROUNDS = 9  # of the whole comparison, in turns


def measure() -> dict[str, Any]:
    """Both comparisons."""
    with emoji({"*": "int8"}, "onnx", "openvino") as artifact:
        return {
            "threads": THREADS,
            "overhead": overhead(artifact),
            "batching": {backend: batching(artifact, backend) for backend in BACKENDS},
        }


def request(number: int, side: int, steps: int) -> dict[str, Any]:
    """Parameters of `Pipeline.request`; every prompt is new, so that no cache of embeddings helps."""
    return {
        "prompt": f"red heart {number}", "seed": number, "width": side, "height": side, "num_inference_steps": steps,
    }  # fmt: skip


def body(number: int, side: int, steps: int) -> dict[str, Any]:
    """The same for the server."""
    return {"prompt": f"red heart {number}", "seed": number, "size": f"{side}x{side}", "num_inference_steps": steps}


async def seconds_of(server: Served, number: int, side: int, steps: int) -> float:
    """Of one picture, from asking to its last byte.

    Raises:
        ToolError: there was none.
    """
    reply = await ask(server.address, body(number, side, steps))
    if reply.status != ANSWERED:
        raise ToolError(f"the server answered {reply.status}")
    return reply.seconds


def overhead(artifact: Path) -> dict[str, Any]:
    """A picture from the server over the same picture from a loop without one, which makes no file of it either."""
    backend = BACKENDS[0]
    times: dict[str, list[float]] = {"bare": [], "server": []}
    flags = ("--backend", backend, "--threads", str(THREADS))
    with served(artifact, *flags) as server, Bare(artifact, backend, THREADS) as loop:

        def once(side: str, number: int, steps: int) -> float:
            if side == "bare":
                return loop(request(number, SIDE, steps))
            return asyncio.run(seconds_of(server, number, SIDE, steps))

        for side in times:
            once(side, 0, 2)  # the first one is slower
        for pair in range(PAIRS):
            for side in sorted(times, reverse=bool(pair % 2)):
                times[side].append(once(side, 1 + pair, STEPS))
    paired = [served / bare for served, bare in zip(times["server"], times["bare"], strict=True)]
    return {
        "backend": backend,
        "size": f"{SIDE}x{SIDE}",
        "steps": STEPS,
        "pairs": PAIRS,
        "seconds": {side: as_json(summary(values)) for side, values in times.items()},
        "ratio": as_json(compared(times["bare"], times["server"])),
        "paired": as_json(summary(paired)),  # the median of the pairs' ratios, and its interval
    }


def batching(artifact: Path, backend: str) -> dict[str, Any]:
    """Pictures a second by the number of clients: of a server that lets them share calls, and of one that does not."""
    flags = ("--backend", backend, "--threads", str(THREADS))
    found: dict[str, dict[int, list[float]]] = {side: {n: [] for n in CLIENTS} for side in ("together", "alone")}
    with (
        served(artifact, *flags, "--concurrency", str(max(CLIENTS))) as together,
        served(artifact, *flags, "--concurrency", "1") as alone,
    ):
        servers = {"together": together, "alone": alone}
        for server in servers.values():
            asyncio.run(by_clients(server.address, max(CLIENTS), max(CLIENTS), lambda k: body(k, SMALL, SHORT)))
        for turn in range(ROUNDS):
            for clients in CLIENTS:
                for side in sorted(servers, reverse=bool(turn % 2)):
                    found[side][clients].append(rate(servers[side], clients, turn))
    gains = {n: [a / b for a, b in zip(found["together"][n], found["alone"][n], strict=True)] for n in CLIENTS}
    return {
        "size": f"{SMALL}x{SMALL}",
        "steps": SHORT,
        "pictures_per_second": {
            side: {str(n): rounded(statistics.median(v)) for n, v in rows.items()} for side, rows in found.items()
        },
        "gain": {str(n): as_json(summary(gains[n])) for n in CLIENTS},  # the median of the rounds' ratios, its interval
    }


def rate(server: Served, clients: int, turn: int) -> float:
    """Pictures a second.

    Raises:
        ToolError: a request failed.
    """
    count = max(PICTURES, 2 * clients)
    replies, seconds = asyncio.run(
        by_clients(server.address, clients, count, lambda k: body(1000 * turn + 100 * clients + k, SMALL, SHORT))
    )
    if any(reply.status != ANSWERED for reply in replies):
        raise ToolError("the server refused a request")
    return count / seconds
