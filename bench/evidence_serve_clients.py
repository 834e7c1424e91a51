"""The server under two load generators that are not ours: MLPerf's LoadGen through HTTP, and AIPerf.

AIPerf is in an environment of its own, made once in the cache folder: what it requires is not what this package does.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.bench.demo import PROMPTS
from intaglio.bench.evidence_serve import BACKEND, STEPS, emoji, rounded, small
from intaglio.bench.loadgen_http import Server, subject_of_server
from intaglio.bench.peers import execute, place_of
from intaglio.bench.scenarios import measure as measure_scenario
from intaglio.bench.scenarios import read_rules
from intaglio.bench.serve_load import ANSWERED, Served, by_clients, served
from intaglio.profiles.errors import ToolError
from intaglio.profiles.staging import writing

AIPERF = "aiperf==0.13.0"
CLIENTS, REQUESTS, THREADS = 4, 200, 1
SIZE = "128x128"
LATENCY, SECONDS = 3000, 60  # of LoadGen's server scenario: milliseconds that 99 of 100 may take, and its length
QUERIES = 500  # or more: LoadGen's early stopping wants 459 at the 99th percentile
# Pictures a second over those of one client after the other; only shared calls keep up with more than 1.
SHARES = {"half": 0.5, "busy": 1.1}
NEAR = 0.95  # of such a share that a run has to have asked for at least: what one client gets differs before and after
ALONE, TRIES = 40, 4  # pictures of that one client, before and after; runs until LoadGen finds one valid
# AIPerf's runs: further words of its command.
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "stream": ("--streaming", "--extra-inputs", "partial_images:2"),
    "hang up": ("--request-cancellation-rate", "50", "--request-cancellation-delay", "0.05"),
}


def measure() -> dict[str, Any]:
    """Both of them, with the embedded checkpoint in int8."""
    python = environment()
    flags = ("--backend", BACKEND, "--threads", str(THREADS), "--queue", "256")
    with emoji({"*": "int8"}, "openvino") as artifact, served(artifact, *flags) as server:
        asyncio.run(by_clients(server.address, CLIENTS, 4 * CLIENTS, small))
        return {
            "backend": BACKEND,
            "size": SIZE,
            "steps": STEPS,
            "loadgen": loadgen(server),
            "aiperf": {name: aiperf(python, server, artifact, words) for name, words in RUNS.items()},
        }


def url_of(server: Served) -> str:
    """As clients take it."""
    return f"http://{server.address[0]}:{server.address[1]}"


def loadgen(server: Served) -> dict[str, Any]:
    """LoadGen's server scenario at half of the pictures a second that one client gets, and at more than all of them.

    On a machine that becomes slower within a minute, or stands still, a run asks for more than the server can do; on
    one that becomes faster for less than it was to. It is repeated, and what was tried before is in ``before``.
    """
    return {name: until_valid(server, share) for name, share in SHARES.items()}


def until_valid(server: Served, share: float) -> dict[str, Any]:
    """Runs at `share` of what one client got just before it, until one is valid and did ask for so much."""
    tried: list[dict[str, Any]] = []
    while len(tried) < TRIES and not (tried and tried[-1]["valid"] and tried[-1]["of_one_by_one"] >= NEAR * share):
        rates = [rate(server, 1, ALONE)]
        run = scenario(server, share * rates[0])
        rates.append(rate(server, 1, ALONE))
        tried.append({**run, "of_one_by_one": rounded(share * rates[0] / (sum(rates) / len(rates)))})
    return {**tried[-1], "before": tried[:-1]}


def scenario(server: Served, target_qps: float) -> dict[str, Any]:
    """One run of LoadGen."""
    changes = (f"min_duration={SECONDS * 1000}", f"target_latency={LATENCY}", "target_latency_percentile=99")
    rules = read_rules("short", "server", (*changes, f"min_query_count={QUERIES}"))
    subject = subject_of_server(Server(url_of(server), None, {"num_inference_steps": STEPS, "size": SIZE}), seed=0)
    with tempfile.TemporaryDirectory(prefix="intaglio-loadgen-") as folder:
        report = measure_scenario("server", rules, PROMPTS, subject, Path(folder), target_qps=target_qps)
    return {
        "valid": report["valid"],
        "why": report["why"],
        "metric": report["metric"]["name"],
        "queries_per_second": rounded(report["metric"]["value"]),
        "samples": report["latency_s"]["n"],
        "p50": rounded(report["latency_s"]["median"]),
        "p90": rounded(report["latency_s"]["p90"]),
        "most": rounded(report["latency_s"]["most"]),
        "clocks_agree": report["cross_check"]["agree"],
    }


def environment() -> str:
    """The interpreter of AIPerf's environment, which is made whole or not at all.

    Raises:
        ToolError: it cannot be made.
    """
    target = place_of(AIPERF.replace("==", "-"))
    if not target.exists():
        with writing(target) as folder:
            execute([sys.executable, "-m", "venv", str(folder)])
            execute([str(folder / "bin/python"), "-m", "pip", "install", "-q", AIPERF])
    return str(target / "bin/python")


def aiperf(python: str, server: Served, artifact: Path, words: Sequence[str]) -> dict[str, Any]:
    """One run of AIPerf, between two of our own client that asks for the same; what is left in the server after it.

    Raises:
        ToolError: AIPerf failed.
    """
    ours = [rate(server)]
    before = server.statuses()
    with tempfile.TemporaryDirectory(prefix="intaglio-aiperf-") as name:
        folder = Path(name)
        lines = (json.dumps({"text": small(k)["prompt"]}) for k in range(REQUESTS))
        (folder / "inputs.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = [
            python, "-m", "aiperf", "profile", "--model", server_model(server), "--url", url_of(server),
            "--endpoint-type", "image_generation", "--tokenizer", str(artifact / "tokenizer"),
            "--input-file", "inputs.jsonl", "--custom-dataset-type", "single_turn", "--concurrency", str(CLIENTS),
            "--request-count", str(REQUESTS), "--extra-inputs", f"num_inference_steps:{STEPS}",
            "--extra-inputs", f"size:{SIZE}", "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics",
            "--artifact-dir", "artifacts", *words,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolError(
                f"aiperf failed ({done.returncode}): {' '.join((done.stdout + done.stderr).split())[-300:]}"
            )
        report = json.loads((folder / "artifacts/profile_export_aiperf.json").read_text(encoding="utf-8"))
        records = (folder / "artifacts/profile_export.jsonl").read_text(encoding="utf-8").splitlines()
    left = settled(server)
    statuses = {status: count - before.get(status, 0) for status, count in server.statuses().items()}
    ours.append(rate(server))
    return {
        "version": report["aiperf_version"],
        "requests": len(records),
        "pictures": int(report["request_count"]["avg"]),
        "errors": dict(errors(records)),
        "cancelled": sum(bool(json.loads(line)["metadata"].get("was_cancelled")) for line in records),
        "statuses": {status: count for status, count in statuses.items() if count},
        "per_second": rounded(report["request_throughput"]["avg"]),
        "of_our_client": rounded(report["request_throughput"]["avg"] / (sum(ours) / len(ours))),
        "p50": rounded(report["request_latency"]["p50"] / 1e3),
        "p99": rounded(report["request_latency"]["p99"] / 1e3),
        "left": left,
    }


def errors(records: Sequence[str]) -> Mapping[str, int]:
    """AIPerf's errors by their kind; a request that it hung up itself is none."""
    found: dict[str, int] = {}
    for line in records:
        record = json.loads(line)
        if record.get("error") and not record["metadata"].get("was_cancelled"):
            kind = str(record["error"].get("type") or record["error"].get("code"))
            found[kind] = found.get(kind, 0) + 1
    return found


def rate(server: Served, clients: int = CLIENTS, count: int = REQUESTS // 2) -> float:
    """Pictures a second that our own client gets, as so many at once.

    Raises:
        ToolError: a request failed.
    """
    replies, seconds = asyncio.run(by_clients(server.address, clients, count, small))
    if any(reply.status != ANSWERED for reply in replies):
        raise ToolError("the server refused a request")
    return len(replies) / seconds


def server_model(server: Served) -> str:
    """The name of what is served."""
    return str(Server(url_of(server)).model(None)["id"])


def settled(server: Served) -> dict[str, float]:
    """What waits and what runs, a second after the last client left."""
    time.sleep(1.0)
    with urllib.request.urlopen(f"{url_of(server)}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {"intaglio_queue_depth": 0.0, "intaglio_running": 0.0}
    for line in lines:
        name = line.split("{")[0].split(" ")[0]
        if name in found:
            found[name] += float(line.rpartition(" ")[2])
    return found
