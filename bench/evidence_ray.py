"""Ray on this machine: two replicas under load, one of them killed, and a batch that equals the one made without Ray.

``python -m intaglio.bench.evidence_ray serve|batch ARTIFACT`` prints one part's figures as JSON.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.profiles.registry import need
from intaglio.runtimes.private_memory import tree
from intaglio.runtimes.ray_batch import Pool, prepare
from intaglio.runtimes.ray_serve import NAME, app

BACKEND = "openvino"
REPLICAS, CONCURRENCY, QUEUE = 2, 2, 4
CLIENTS, EACH, STEPS = 6, 8, 12  # of the load over which a replica is killed
FLOOD = 4  # times what all replicas hold, at once
GUEST = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); assert ray.get(ray.put(1)) == 1"
LINES = 12
SECONDS = 120.0  # that anything may take
PATH, BODY = "/v1/images/generations", {"prompt": "red heart", "seed": 3, "num_inference_steps": STEPS}
BATCH = [sys.executable, "-m", "intaglio", "batch"]


@dataclass(slots=True)
class Load:
    """Clients that ask one after the other; `answers` are (begun, ended, status, Retry-After, digest)."""

    port: int
    answers: list[tuple[float, float, int, str | None, str]] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def ask(self) -> None:
        """One request, one answer."""
        connection, begun = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS), time.monotonic()
        connection.request("POST", PATH, json.dumps(BODY), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        content = json.loads(data)["data"][0]["b64_json"] if answer.status == 200 else ""
        digest = hashlib.sha256(content.encode()).hexdigest() if content else ""
        wait = answer.getheader("Retry-After")
        self.answers.append((begun, time.monotonic(), answer.status, wait, digest))
        connection.close()

    def begin(self, clients: int, each: int) -> Load:
        """`clients` at once, each with `each` requests."""

        def run() -> None:
            for _ in range(each):
                self.ask()

        self.threads = [threading.Thread(target=run) for _ in range(clients)]
        for thread in self.threads:
            thread.start()
        return self

    def end(self) -> Load:
        """Wait for all of them."""
        for thread in self.threads:
            thread.join()
        return self

    def statuses(self) -> dict[str, int]:
        """Status -> answers."""
        return {str(status): count for status, count in sorted(Counter(a[2] for a in self.answers).items())}


def processes(word: str, below: int | str = "self") -> list[int]:
    """Processes below one whose command line has a word."""
    found = []
    for place in tree(os.getpid() if below == "self" else below)[1:]:
        try:
            if word in (place / "cmdline").read_text():
                found.append(int(place.name))
        except OSError:  # it ended
            continue
    return found


def until(condition: Callable[[], bool]) -> float:
    """Wait until something holds; the seconds.

    Raises:
        TimeoutError: it does not.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > SECONDS:
            raise TimeoutError
        time.sleep(0.05)
    return time.monotonic() - start


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serving(artifact: str) -> dict[str, Any]:
    """Two replicas: more than they hold, and one that is killed under load."""
    prepare(Pool())
    ray, serve = need("ray", extra="ray"), need("ray.serve", extra="ray")
    here = ray.init(num_cpus=REPLICAS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    port, start = free_port(), time.monotonic()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    given = {"artifact": artifact, "backend": BACKEND, "threads": 1, "replicas": REPLICAS, "no_key": True}
    serve.run(app({**given, "concurrency": CONCURRENCY, "queue": QUEUE}))
    ready = time.monotonic() - start

    def running() -> int:
        states: Counter[str] = Counter()
        for found in serve.status().applications.values():
            states.update({str(state): count for state, count in found.deployments[NAME].replica_states.items()})
        return sum(count for state, count in states.items() if state.endswith("RUNNING"))

    try:
        full = Load(port).begin(FLOOD * REPLICAS * (CONCURRENCY + QUEUE), 1).end()
        load = Load(port).begin(CLIENTS, EACH)
        until(lambda: len(load.answers) >= CLIENTS)
        replica = processes("ServeReplica")[0]
        (worker,) = processes("serve_worker", replica)
        killed = time.monotonic()
        os.kill(replica, signal.SIGKILL)
        until(lambda: running() < REPLICAS)
        until(lambda: running() == REPLICAS)
        back = time.monotonic() - killed
        load.end()
        after = Load(port).begin(CLIENTS, 1).end()
        failed = [answer for answer in load.answers if answer[2] != 200]
        return {
            "replicas": REPLICAS,
            "held_by_a_replica": CONCURRENCY + QUEUE,
            "ready_seconds": ready,
            "dashboard": bool(ray._private.worker.global_worker.node.webui_url),
            "full": full.statuses(),
            "retry_after": sorted({a[3] or "none" for a in full.answers if a[2] == 429}),
            "killed": load.statuses(),
            "asked": CLIENTS * EACH,
            "failed_that_began_after_the_kill": sum(answer[0] > killed for answer in failed),
            "longest_failure_seconds": max((a[1] - max(a[0], killed) for a in failed), default=0.0),
            "back_seconds": back,
            "orphans": int(Path(f"/proc/{worker}").exists()),
            "after": after.statuses(),
            "let_in": {name: let_in(here.address_info["gcs_address"], name) for name in ("friend", "stranger")},
            "different_pictures": len({a[4] for part in (full, load, after) for a in part.answers if a[4]}),
        }
    finally:
        serve.shutdown()
        ray.shutdown()


def let_in(address: str, name: str) -> bool:
    """Whether Ray lets somebody in: a friend with the token, or a stranger without."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = dict(os.environ) if name == "friend" else known
    command = [sys.executable, "-c", GUEST, address]
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=SECONDS).returncode == 0


def batch(artifact: str) -> dict[str, Any]:
    """The same file of requests with Ray and without: every file, byte for byte, and every result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [
            {"custom_id": f"line{k}", "body": {"prompt": "red heart", "num_inference_steps": 2}} for k in range(LINES)
        ]
        lines[1]["body"] = {"prompt": "red heart", "num_inference_steps": 2, "n": 2}
        lines[2]["body"] = {"prompt": "red heart", "size": "1x1"}
        (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        facts = {"plain": run_batch(folder, "plain", artifact)}
        facts["ray"] = run_batch(folder, "ray", artifact, "--ray", "--ray-replicas", str(REPLICAS))
        for index in (0, 3):
            (folder / "ray" / f"line{index}.png").unlink()
        facts["resumed"] = run_batch(folder, "ray", artifact)
        files = [{p.name: p.read_bytes() for p in (folder / n).glob("*.png")} for n in ("plain", "ray")]
        found = [results(folder / n / "results.jsonl") for n in ("plain", "ray")]
        return {
            "lines": LINES,
            "pictures": len(files[0]),
            "same_pictures": files[0] == files[1],
            "same_results": found[0] == found[1],
            "in_order": [entry["custom_id"] for entry in found[1]] == [line["custom_id"] for line in lines],
            "made": {name: [f["made"], f["kept"], f["failed"]] for name, f in facts.items()},
            "seconds": {name: f["seconds"] for name, f in facts.items()},
        }


def run_batch(folder: Path, name: str, artifact: str, *flags: str) -> dict[str, Any]:
    """``intaglio batch`` into a folder; what it printed."""
    words = [str(folder / "requests.jsonl"), f"model={artifact}", "--backend", BACKEND, "--threads", "1"]
    command = [*BATCH, *words, "--json", "-o", str(folder / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode != 1:  # one line is wrong on purpose
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def results(path: Path) -> list[dict[str, Any]]:
    """The results of a batch, without when they were made."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in found:
        entry["response"]["body"].pop("created", None)
    return found


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {"serve": serving, "batch": batch}


def part(name: str, artifact: str) -> dict[str, Any]:
    """One part in a process of its own: Ray does not leave the one it was in as it was."""
    command = [sys.executable, "-m", __spec__.name, name, artifact]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * SECONDS)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure() -> dict[str, Any]:
    """Both parts with the embedded checkpoint."""
    from intaglio.exporters.build import build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "emoji"
        build("emoji", folder, targets=("onnx", "openvino"))
        return {name: part(name, str(folder)) for name in PARTS}


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](sys.argv[2])))
