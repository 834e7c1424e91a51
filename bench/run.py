"""Run a matrix of cases so that the machine's moods hit all of them alike, and gather one plain report.

Every case lives in its own worker. Workers load one after another and stay, idle, until the end; then each round asks
every worker for one image of the same prompt, in an order drawn anew from the seed. A speed-up is the median over
rounds of (reference seconds / case seconds) *within* a round, so slow minutes of a shared machine cancel.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.bench.cases import Case, backend_bytes, precision_of, support_labels, unquantized
from intaglio.bench.machine import fingerprint, load_average
from intaglio.bench.memory import available_bytes, gpus
from intaglio.bench.metrics import judge, need_metrics
from intaglio.bench.statistics import as_json, summary
from intaglio.bench.worker import Client, WorkerError, to_json
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError

SCHEMA_VERSION = 1
SETTLE = 0.3  # seconds; thread pools of torch (OpenMP) and OpenVINO (TBB) spin up to 0.2 s after their last work
UNSTEADY = 1.25  # slowest over fastest; the bound SGLang's diffusion CI sets for a baseline (PERFORMANCE.md)
Tell = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Seat:
    """A case, its worker while that lives, and what was measured so far."""

    case: Case
    row: dict[str, Any]
    worker: Client | None = None
    images: dict[int, float] = field(default_factory=dict)  # round -> seconds
    steps: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    digests: dict[int, set[str]] = field(default_factory=dict)  # prompt -> digests seen

    def ask(self, do: str, **fields: Any) -> dict[str, Any] | None:
        """One request, or None if the worker is gone; a failure ends the worker and is the row's ``error``."""
        if self.worker is None:
            return None
        try:
            return self.worker.ask(do, **fields)
        except WorkerError as error:
            self.row.update(status="error", error=str(error).replace(str(Path.home()), "~"))
            self.worker.close()
            self.worker = None
            return None

    def close(self) -> None:
        """End the worker if it lives."""
        if self.worker is not None:
            self.worker.close()

    def remember(self, prompt: int, answer: Mapping[str, Any]) -> None:
        """Note the digest of an image, for ``repeatable``."""
        self.digests.setdefault(prompt, set()).add(answer["digest"])


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """What the values say (`intaglio.bench.statistics`), and the values themselves; None without values."""
    if not values:
        return None
    rounded = [float(f"{v:.6g}") for v in values]
    found = as_json(summary(rounded))
    return {
        "median": found["median"],
        "min": min(rounded),
        "max": max(rounded),
        "n": len(rounded),
        "mad": found["mad"],
        "iqr": found["iqr"],
        "interval": [found["low"], found["high"]],
        "percentiles": found["percentiles"],
        "values": rounded,
    }


def order_of(labels: Sequence[str], turn: int, seed: int) -> list[str]:
    """The order of the cases in round `turn`: a permutation drawn from the seed, the same on every machine."""
    shuffled = list(labels)
    random.Random(f"{seed}/{turn}").shuffle(shuffled)
    return shuffled


def reference_of(cases: Sequence[Case], artifacts: Mapping[str, Artifact]) -> tuple[int, str]:
    """Index of the reference case and the sentence that says why it is one."""
    for index, case in enumerate(cases):
        if case.backend == "torch" and unquantized(artifacts[case.artifact]):
            return index, f"{case.label}: the torch backend on an unquantized artifact"
    return 0, f"{cases[0].label}: the first case, because none is torch on an unquantized artifact"


def new_row(case: Case, artifact: Artifact) -> dict[str, Any]:
    """A row of the report before anything was measured. `artifact_bytes` are the files it reads."""
    return {
        "label": case.label,
        "artifact": case.label.rpartition("/")[0],
        "manifest_digest": artifact.manifest.digest,
        "backend": case.backend,
        "precision": precision_of(artifact, case.backend),
        "labels": support_labels(artifact, case.backend),
        "device": case.device,
        "threads": case.threads,
        "artifact_bytes": backend_bytes(artifact, case.backend),
        "status": "ok",
        "error": "",
    }


def engine_rows(
    artifacts: Mapping[str, Artifact], names: Mapping[str, str], cases: Sequence[Case]
) -> list[dict[str, Any]]:
    """A row per TensorRT compute capability that was built and is not measured here, with its plans' bytes and why."""
    measured = {c.artifact for c in cases if c.backend == "tensorrt"}
    reason = gpus()[1] or "add --backend tensorrt to run it on this machine's GPU"
    rows = []
    for key, artifact in artifacts.items():
        sizes: dict[str, int] = {}
        for name, engine in artifact.manifest.engines.items() if key not in measured else ():
            sm = str(engine["sm"]).lower().removeprefix("sm")
            sizes[sm] = sizes.get(sm, 0) + artifact.size_bytes(name)
        rows += [
            {
                "label": f"{names[key]}/tensorrt sm{sm}",
                "artifact": names[key],
                "manifest_digest": artifact.manifest.digest,
                "backend": f"tensorrt sm{sm}",
                "precision": precision_of(artifact, "tensorrt"),
                "artifact_bytes": size,
                "status": "not run",
                "error": f"built, not run: {reason}",
            }
            for sm, size in sorted(sizes.items(), key=lambda item: (len(item[0]), item[0]))
        ]
    return rows


def prepare(seat: Seat, folder: Path, timeout: float, tell: Tell) -> None:
    """Start and load one worker, take its cold first image, save one picture per prompt, warm up, read the VRAM."""
    case = seat.case
    tell(f"{case.label}: load")
    seat.worker = Client(case, timeout=timeout)
    loaded = seat.ask("load", case=to_json(case))
    seat.row["load_s"] = loaded["seconds"] if loaded else None
    tell(f"{case.label}: first image")
    first = seat.ask("run", prompt=0)
    seat.row["first_image_s"] = first["seconds"] if first else None
    where = Path("images") / case.label.replace("/", "-").replace(" ", "-")
    seat.row["prompts"] = []
    for index, prompt in enumerate(case.prompts):
        tell(f"{case.label}: picture {index + 1} of {len(case.prompts)}")
        made = seat.ask("image", prompt=index, folder=str(folder / where), stem=str(index))
        if made is None:
            return
        seat.remember(index, made)
        picture = {
            "prompt": prompt,
            "seed": case.seed,
            "image": f"{where.as_posix()}/{index}.png",
            "size": made["size"],
        }
        seat.row["prompts"].append(picture)
        seat.row["parameters"] = made["parameters"]
    for _ in range(case.warmup - len(case.prompts)):
        seat.ask("run", prompt=0)
    memory = seat.ask("memory")
    seat.row["vram"] = memory["vram"] if memory else None


def measure_rounds(seats: Sequence[Seat], seed: int, tell: Tell) -> list[list[str]]:
    """The interleaved rounds; returns the orders that were used."""
    by_label = {s.case.label: s for s in seats}
    rounds = max(s.case.repeats for s in seats)
    orders = [order_of(list(by_label), turn, seed) for turn in range(rounds)]
    for turn, order in enumerate(orders):
        for label in order:
            seat = by_label[label]
            if seat.worker is None or turn >= seat.case.repeats:
                continue
            tell(f"round {turn + 1} of {rounds}: {label}")
            time.sleep(SETTLE)
            answer = seat.ask("run", prompt=seat.case.prompt(turn))
            if answer is None:
                continue
            seat.images[turn] = answer["seconds"]
            seat.steps += answer["steps"]
            seat.remember(seat.case.prompt(turn), answer)
            for stage, seconds in answer["stages"].items():
                seat.stages.setdefault(stage, []).append(seconds)
    return orders


def finish(seat: Seat, reference: Seat) -> None:
    """Turn what a seat measured into its row: memory, statistics, speed-up."""
    memory = seat.ask("memory")
    seat.row["memory"] = memory["host"] if memory else None
    seat.row["engine_memory"] = memory["engines"] if memory else None
    seat.row["image_s"] = spread(list(seat.images.values()))
    seat.row["step_s"] = spread(seat.steps)
    seat.row["stage_s"] = {k: statistics.median(v) for k, v in seat.stages.items()}
    seat.row["repeatable"] = all(len(d) == 1 for d in seat.digests.values()) if seat.digests else None
    pairs = [reference.images[turn] / seconds for turn, seconds in seat.images.items() if turn in reference.images]
    seat.row["speedup"] = spread(pairs)
    both = seat.images and reference.images
    seat.row["speedup_of_fastest"] = min(reference.images.values()) / min(seat.images.values()) if both else None
    image = seat.row["image_s"]
    seat.row["unsteady"] = bool(image and image["max"] > UNSTEADY * image["min"])


def run_matrix(
    cases: Sequence[Case],
    artifacts: Mapping[str, Artifact],
    folder: Path,
    *,
    command: str,
    seed: int = 0,
    timeout: float = 900.0,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Measure every case and return the report; pictures, latents and heat maps go under ``folder/images``.

    Args:
        cases: at least one; labels unique.
        artifacts: opened (and verified) artifacts by `Case.artifact`; those without a case still give TensorRT rows.
        folder: exists.
        command: what the user typed, for the report.
        seed: of the interleaving.
        timeout: seconds one answer of a worker may take; loading a large model on a small machine needs many.
        tell: called with a short text before each piece of work.

    Raises:
        MissingDependency: a metric's package is not installed.
        ToolError: no case could be measured; the message is the first case's.
    """
    need_metrics()
    names = {c.artifact: c.label.rpartition("/")[0] for c in cases}
    chosen, why = reference_of(cases, artifacts)
    seats = [Seat(case=c, row=new_row(c, artifacts[c.artifact])) for c in cases]
    loads = [load_average()]
    with contextlib.ExitStack() as stack:
        for seat in seats:
            stack.callback(seat.close)
            prepare(seat, folder, timeout, tell)
        if not any(s.worker for s in seats):
            message = f"no case could be measured; {seats[0].case.label}: {seats[0].row['error']}"
            raise ToolError(message)
        if seats[chosen].worker is None:
            failed = seats[chosen].case.label
            chosen = next(i for i, s in enumerate(seats) if s.worker)
            why = f"{seats[chosen].case.label}: the first case that runs, because {failed} failed"
        free = available_bytes()
        orders = measure_rounds(seats, seed, tell)
        for seat in seats:
            finish(seat, seats[chosen])
    tell("fidelity")
    reference = seats[chosen].row
    for seat in seats:
        judge(seat.row, reference, folder)
    loads.append(load_average())
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": fingerprint(),
        "load_average": {"start": loads[0], "end": loads[1]},
        "available_bytes_while_measuring": free,
        "reference": {"label": reference["label"], "backend": reference["backend"], "why": why},
        "settings": settings_of(cases[0], seed),
        "orders": orders,
        "cases": [s.row for s in seats] + engine_rows(artifacts, names, cases),
    }


def settings_of(case: Case, seed: int) -> dict[str, Any]:
    """What all cases share."""
    return {
        "prompts": list(case.prompts),
        "seed": case.seed,
        "interleaving_seed": seed,
        "size": list(case.size) if case.size else None,
        "steps": case.steps,
        "scheduler": case.scheduler,
        "rounds": case.repeats,
        "warmup": case.warmup,
        "threads": case.threads,
    }
