"""From the journal of a run to its report: plain data, every figure with its samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.bench.cases import Case, backend_bytes, precision_of, support_labels, unquantized
from intaglio.bench.fidelity import against, heat_map, limits_of, rounded, verdict
from intaglio.bench.journal import Event, Journal
from intaglio.bench.matrix import AXES, show
from intaglio.bench.memory import gpus
from intaglio.bench.statistics import as_json, summary
from intaglio.profiles.artifact import Artifact

if TYPE_CHECKING:
    from intaglio.bench.learned import LearnedMetric

SCHEMA_VERSION = 2
UNSTEADY = 1.25  # slowest over fastest; the bound SGLang's diffusion CI sets for a baseline (PERFORMANCE.md)
Row = dict[str, Any]


def spread(values: Sequence[float]) -> Row | None:
    """What the values say (`intaglio.bench.statistics`), and the values themselves; None without values."""
    if not values:
        return None
    kept = [float(f"{v:.6g}") for v in values]
    found = as_json(summary(kept))
    return {
        "median": found["median"],
        "min": min(kept),
        "max": max(kept),
        "n": len(kept),
        "mad": found["mad"],
        "iqr": found["iqr"],
        "interval": [found["low"], found["high"]],
        "percentiles": found["percentiles"],
        "steady": found["steady"],
        "values": kept,
    }


def timed(journal: Journal, label: str) -> dict[int, Event]:
    """The timed pictures of a case by round; of a round measured again, the later ones."""
    return {e["turn"]: e for e in journal.of("timed", case=label)}


def new_row(case: Case, artifact: Artifact) -> Row:
    """A row of the report before anything was measured. `artifact_bytes` are the files it reads."""
    return {
        "label": case.label,
        "artifact": case.name or case.label.rpartition("/")[0],
        "manifest_digest": artifact.manifest.digest,
        "backend": case.backend,
        "precision": case.precision or precision_of(artifact, case.backend),
        "labels": [f"{case.label}: {case.note}"] if case.note else support_labels(artifact, case.backend),
        "settings": {} if case.precision else dict(case.settings),
        "device": case.device,
        "threads": case.threads,
        "size": list(case.size) if case.size else None,
        "batch": case.batch,
        "steps": case.steps,
        "scheduler": case.scheduler,
        "guidance_scale": case.guidance_scale,
        "artifact_bytes": backend_bytes(artifact, case.backend) if case.bytes is None else case.bytes,
        "status": "ok",
        "error": "",
    }


def measured_row(case: Case, artifact: Artifact, journal: Journal) -> Row:
    """What the journal has of one case, without comparisons."""
    row = new_row(case, artifact)
    runs = timed(journal, case.label)
    opened = journal.of("opened", case=case.label)
    errors = journal.of("error", case=case.label)
    # a failure beside the rounds (components, memory) is one, too, until another sitting has mended it
    if errors and (errors[-1]["sitting"] == journal.sitting or not set(runs) >= set(range(case.repeats))):
        row.update(status="error", error=errors[-1]["error"])
    row["load_s"] = rounded(statistics.median(e["load_s"] for e in opened)) if opened else None
    row["loads_s"] = [rounded(e["load_s"]) for e in opened]
    row["compile_s"] = opened[-1]["compile_s"] if opened else None
    row["first_image_s"] = rounded(opened[0]["first_image_s"]) if opened else None
    row["warmup_s"] = [rounded(s) for e in opened for s in e["warmup_s"]]
    row["image_s"] = spread([runs[t]["seconds"] for t in sorted(runs)])
    row["step_s"] = spread([s for t in sorted(runs) for s in runs[t]["steps"]])
    stages = dict.fromkeys(s for e in runs.values() for s in e["stages"])
    row["stage_s"] = {s: spread([e["stages"].get(s, 0.0) for e in runs.values()]) for s in stages}
    shares = [sum(e["stages"].values()) / e["seconds"] for e in runs.values() if stages]
    row["stages_of_whole"] = rounded(statistics.median(shares)) if shares else None
    row["cpu_s"] = spread([e["cpu_s"] for e in runs.values()])
    row["energy"] = energy_of(list(runs.values()), case.batch)
    row["unsteady"] = bool(row["image_s"] and row["image_s"]["max"] > UNSTEADY * row["image_s"]["min"])
    pictures = {e["prompt"]: e for e in journal.of("picture", case=case.label)}
    row["prompts"] = [
        {"prompt": e["text"], "seed": case.seed, "image": e["image"], "sha256": e["sha256"], "size": e["size"]}
        for _, e in sorted(pictures.items())
    ]
    row["parameters"] = pictures[max(pictures)]["parameters"] if pictures else None
    digests: dict[int, set[str]] = {}
    for event in [*pictures.values(), *runs.values()]:
        digests.setdefault(event["prompt"], set()).add(event["digest"])
    row["repeatable"] = all(len(d) == 1 for d in digests.values()) if digests else None
    memory = journal.of("memory", case=case.label)
    row["memory"] = memory[-1]["host"] if memory else None
    row["vram"] = memory[-1]["vram"] if memory else None
    row["engine_memory"] = memory[-1]["engines"] if memory else None
    found = journal.of("components", case=case.label)
    row["components"] = found[-1]["calls"] if found else None
    row["loop"] = found[-1]["loop"] if found else None
    row["components_reason"] = found[-1]["reason"] if found else "not measured"
    return row


def energy_of(runs: Sequence[Event], batch: int) -> Row:
    """Joules of one prompt and pictures a kilowatt-hour, or the reason why there are none."""
    known = [e["energy"]["joules"] for e in runs if e["energy"]["joules"] is not None]
    if not runs or len(known) < len(runs):
        reason = next((e["energy"]["reason"] for e in runs if e["energy"]["reason"]), "nothing was timed")
        return {"joules": None, "pictures_per_kwh": None, "source": None, "reason": reason}
    joules = spread(known)
    assert joules is not None
    each = rounded(3.6e6 * batch / joules["median"]) if joules["median"] else None
    return {"joules": joules, "pictures_per_kwh": each, "source": runs[0]["energy"]["source"], "reason": ""}


def compared_rows(rows: Sequence[Row], reference: Row, journal: Journal, learned: Mapping[str, LearnedMetric]) -> None:
    """Speed and pictures of a group's rows against its reference, into them."""
    folder = journal.folder
    base = timed(journal, reference["label"])
    images = [p["image"] for p in reference["prompts"]]
    for row in rows:
        runs = timed(journal, row["label"])
        # a round that two sittings share is no pair: the machine may have been another one's in between
        pairs = [
            base[t]["seconds"] / runs[t]["seconds"]
            for t in sorted(runs)
            if t in base and base[t]["sitting"] == runs[t]["sitting"]
        ]
        row["speedup"] = spread(pairs)
        both = bool(runs and base)
        row["speedup_of_fastest"] = (
            rounded(min(e["seconds"] for e in base.values()) / min(e["seconds"] for e in runs.values()))
            if both
            else None
        )
        row["reference"] = reference["label"]
        texts = [p["prompt"] for p in row["prompts"]]
        found = against([p["image"] for p in row["prompts"]], images, folder, texts, learned)
        for picture, figures in zip(row["prompts"], found["prompts"], strict=False):
            picture.update(figures)
        if row is not reference:
            for picture, truth in zip(row["prompts"] if found["prompts"] else (), images, strict=False):
                picture["heat"] = heat_map(picture["image"], truth, folder)
        row["worst"], row["drift"], row["fidelity_reason"] = found["worst"], found["drift"], found["reason"]
        row["same_backend"] = same_backend(row, rows, folder)


def same_backend(row: Row, rows: Sequence[Row], folder: Path) -> Row | None:
    """A quantized row against the unquantized graph of its backend; None where there is none, or it is that itself."""

    def place(row: Row) -> tuple[Any, ...]:
        return (row["backend"], row["device"], row["threads"], row["settings"])

    for other in rows:
        if other is row or place(other) != place(row) or not other["unquantized"] or not other["prompts"]:
            continue
        figures = against([p["image"] for p in row["prompts"]], [p["image"] for p in other["prompts"]], folder)
        return {"label": other["label"], **{k: figures[k] for k in ("worst", "drift", "reason")}}
    return None


def noise_of(journal: Journal, reference: Row) -> list[Row]:
    """How far the reference is from itself, by what was changed."""
    images = [p["image"] for p in reference["prompts"]]
    found = []
    for event in journal.of("noise", case=reference["label"]):
        if event["reason"]:
            found.append({"what": event["what"], "worst": None, "drift": [], "reason": event["reason"]})
            continue
        figures = against(event["images"], images, journal.folder)
        found.append({"what": event["what"], **{k: figures[k] for k in ("worst", "drift", "reason")}})
    return found


def engine_rows(artifacts: Mapping[str, Artifact], names: Mapping[str, str], cases: Sequence[Case]) -> list[Row]:
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


def assemble(
    journal: Journal,
    cases: Sequence[Case],
    artifacts: Mapping[str, Artifact],
    *,
    seed: int,
    isolation: str,
    grid: Sequence[str],
    limits: Mapping[str, float] | None = None,
    learned: Mapping[str, LearnedMetric] | None = None,
) -> Row:
    """The report. Heat maps are written beside the pictures; nothing else is.

    Args:
        journal: of the run, ended.
        cases: of the plan.
        artifacts: by `Case.artifact`.
        seed: of the matrix.
        isolation: of the matrix.
        grid: of the matrix.
        limits: of `intaglio.bench.fidelity.verdict`.
        learned: further metrics of pictures, by key.
    """
    by_label = {c.label: c for c in cases}
    rows = {c.label: measured_row(c, artifacts[c.artifact], journal) for c in cases}
    for label, row in rows.items():
        row["unquantized"] = not by_label[label].precision and unquantized(artifacts[by_label[label].artifact])
    groups = []
    for event in {tuple(e["labels"]): e for e in journal.of("group")}.values():
        members = [rows[label] for label in event["labels"]]
        reference, why = rows[event["reference"]], event["why"]
        if not reference["image_s"]:
            failed = reference["label"]
            reference = next((r for r in members if r["image_s"]), reference)
            why = f"{reference['label']}: the first case that runs, because {failed} failed"
        compared_rows(members, reference, journal, learned or {})
        first = by_label[reference["label"]]
        picture = {a: show(a, getattr(first, a)) for a in ("size", "batch", "steps", "scheduler", "guidance_scale")}
        groups.append(
            {
                "picture": picture,
                "labels": event["labels"],
                "reference": reference["label"],
                "why": why,
                "noise_floor": noise_of(journal, reference),
            }
        )
    directions = {key: metric.higher_is_better for key, metric in (learned or {}).items()}
    for label, row in rows.items():
        if row["status"] == "ok":
            case = by_label[label]
            own = limits_of(artifacts[case.artifact], case.backend)
            row["verdict"] = verdict(row, own, limits or {}, directions)
    sittings, ends = journal.of("sitting"), journal.of("end")
    names = {c.artifact: c.name or c.label.rpartition("/")[0] for c in cases if not c.precision}
    reference = rows[groups[0]["reference"]]
    swept = {a: list(dict.fromkeys(show(a, axis_value(c, a)) for c in cases)) for a in AXES}
    return {
        "schema_version": SCHEMA_VERSION,
        "command": sittings[0]["command"],
        "created": sittings[0]["created"],
        "machine": sittings[-1]["machine"],
        "load_average": {"start": sittings[0]["load_average"], "end": ends[-1]["load_average"] if ends else None},
        "available_bytes_while_measuring": sittings[-1]["available_bytes"],
        "sittings": len(sittings),
        "seconds": rounded(sum(e["seconds"] for e in ends)),
        "parent_cpu_s": rounded(sum(e["parent_cpu_s"] for e in ends)),
        "reference": {"label": reference["label"], "backend": reference["backend"], "why": groups[0]["why"]},
        "settings": settings_of(cases[0], seed, isolation),
        "limits": dict(limits or {}),
        "learned": {key: metric.name for key, metric in (learned or {}).items()},
        "artifacts": {names[key]: facts_of(artifacts[key]) for key in names},
        "axes": {a: values for a, values in swept.items() if len(values) > 1},
        "grid": list(grid),
        "orders": [{"turn": e["turn"], "order": e["order"]} for e in journal.of("round")],
        "groups": groups,
        "cases": [*rows.values(), *engine_rows(artifacts, names, cases)],
    }


def facts_of(artifact: Artifact) -> Row:
    """Which artifact it was, in words that a reader of the report can check."""
    manifest = artifact.manifest
    licence = manifest.licence
    return {
        "name": manifest.name,
        "family": manifest.family,
        "manifest_digest": manifest.digest,
        "licence": licence if isinstance(licence, str) else None,
        "recipe": dict(manifest.recipe),
    }


def axis_value(case: Case, axis: str) -> Any:
    """A case's value of an axis."""
    return case.name if axis == "artifact" else getattr(case, axis)


def settings_of(case: Case, seed: int, isolation: str) -> Row:
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
        "isolation": isolation,
    }
