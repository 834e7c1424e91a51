"""``intaglio quantize-search``: the cheapest format of every layer whose picture stays within a budget."""

from __future__ import annotations

import argparse
import collections
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intaglio.bench.cli import progress
from intaglio.bench.machine import fingerprint
from intaglio.bench.report import check_target, report_folder, write_atomic
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.profiles.recipe import Recipe, to_toml
from intaglio.profiles.registry import pick, suggestion

JSON, HTML = "search.json", "search.html"
FORMATS = "int4,w8a8,int8"
PICTURES, CALIBRATION = 4, 8  # prompts whose pictures are compared; prompts that calibrate, as in a build
SCHEMA_VERSION = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio quantize-search``."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder made by intaglio build, not quantized")
    parser.add_argument(
        "--budget",
        action="append",
        required=True,
        metavar="K=V",
        help="psnr=DB or ssim=S that the worst picture must reach, against the unquantized one; repeatable",
    )
    parser.add_argument("--target", required=True, metavar="T", help="whose engine makes the pictures: onnx, openvino")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: NAME-search in this folder")
    parser.add_argument("--component", metavar="C", help="default: the one that runs every step")
    parser.add_argument("--formats", default=FORMATS, metavar="F,F", help=f"formats to choose from ({FORMATS})")
    parser.add_argument("--keep", action="append", metavar="P", help="pattern of weights to leave alone; repeatable")
    parser.add_argument("--objective", default="size", metavar="O", help="size (default) or speed")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line; default: our own set")
    parser.add_argument("--count", type=int, metavar="N", help=f"prompts whose pictures are compared ({PICTURES})")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the artifact's own")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture's noise (default 0)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: the engine's choice")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")


def settings_of(args: argparse.Namespace, artifact: Artifact) -> Any:
    """The arguments as `Settings`, checked against the artifact and this machine.

    Raises:
        UsageError: a value is wrong, the artifact is quantized, or lacks the component or the target.
        Unsupported: the target cannot carry a format, or its engine cannot run here.
    """
    from intaglio.exporters.derive import check_unquantized
    from intaglio.exporters.survey import Settings
    from intaglio.quantize.feeds import CalibrationSet, read_prompts

    check_unquantized(artifact)
    component = component_of(artifact, args.component)
    check_engine(artifact, component, args.target)
    formats = formats_of(args.formats, args.target)
    for name, value, least in (("count", args.count, 1), ("steps", args.steps, 1), ("seed", args.seed, 0)):
        if value is not None and value < least:
            raise UsageError(f"--{name} {value} is not allowed: a whole number, {least} or more")
    everything = read_prompts(args.prompts, None if args.prompts else max(args.count or 0, CALIBRATION))
    count = min(PICTURES, len(everything)) if args.count is None else args.count
    if count > len(everything):
        raise UsageError(
            f"--count {count} is not allowed: {args.prompts or 'our own set'} has {len(everything)} prompts"
        )
    return Settings(
        component=component,
        target=args.target,
        formats=formats,
        prompts=everything[:count],
        calibration=CalibrationSet(prompts=everything[:CALIBRATION], steps=args.steps),
        steps=args.steps,
        seed=args.seed,
        keep=tuple(args.keep or ()),
        threads=args.threads,
    )


def component_of(artifact: Artifact, asked: str | None) -> str:
    """The component to quantize: the one asked for, or the denoiser.

    Raises:
        UsageError: there is none of this name, or it takes no part in pictures from text.
    """
    from intaglio.profiles.registry import resolve
    from intaglio.runtimes.pipeline import SAMPLERS

    sampler = resolve(pick(SAMPLERS, artifact.manifest.family, "family"))(artifact)
    allowed = tuple(c for c in sampler.components if c in artifact.manifest.components)
    if asked is not None and asked not in allowed:
        there = "takes no part in pictures from text" if asked in artifact.manifest.components else "is not there"
        raise UsageError(f"--component {asked!r} {there}; allowed: {', '.join(allowed)}.{suggestion(asked, allowed)}")
    return asked or str(sampler.denoiser)


def check_engine(artifact: Artifact, component: str, target: str) -> None:
    """Refuse a target that was not built or cannot run here.

    Raises:
        UsageError: it is unknown, or the artifact was built without it.
        Unsupported: it is TensorRT and there is no GPU.
    """
    from intaglio.bench.memory import gpus
    from intaglio.exporters.plan import RUNTIME_OF

    pick(RUNTIME_OF, target, "target")
    if target == "tensorrt" and gpus()[1]:
        raise Unsupported(f"--target tensorrt cannot run here: {gpus()[1]}; search with --target openvino or onnx")
    built = artifact.manifest.components[component].targets
    if target not in built:
        raise UsageError(
            f"{artifact.folder} was built for {', '.join(built)}, not for {target}; "
            f"run: intaglio build CHECKPOINT --target {target}"
        )


def formats_of(text: str, target: str) -> tuple[str, ...]:
    """The formats to choose from.

    Raises:
        UsageError: one is unknown, or there is none but ``none``.
        Unsupported: the target cannot carry one.
    """
    from intaglio.exporters.plan import RUNTIME_OF
    from intaglio.quantize.formats import check_formats

    names = tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip() not in ("", "none")))
    if not names:
        raise UsageError(f"--formats {text!r} names no format; such as --formats {FORMATS}")
    for remark in check_formats(names, (RUNTIME_OF[target],)):
        say(remark)
    return names


def run_search(
    artifact: Artifact,
    settings: Any,
    budget: Mapping[str, float],
    objective: str,
    folder: Path,
    note: Callable[..., None],
) -> tuple[dict[str, Any], Recipe]:
    """Measure, search, and return the report and the recipe; `folder` holds candidates while it runs.

    Raises:
        Unmet: no plan stays within the budget.
    """
    from intaglio.exporters.candidates import Workshop
    from intaglio.exporters.search import search
    from intaglio.exporters.survey import Survey, timed
    from intaglio.quantize.decode import codes_digest

    survey = Survey(artifact, settings, folder, note)
    shop = Workshop(survey, survey.groups(), note)
    try:
        plans = {shop.uniform(name): name for name in reversed(settings.formats)}
        points = [shop.verify(plan, name, "uniform") for plan, name in reversed(plans.items())]
        if objective == "speed":
            seconds = {p.name: 1 / p.speed for p in points if p.speed} | {"none": 1.0}
            seconds |= {name: 1.0 for name in settings.formats if name not in seconds}
            shop.groups = timed(shop.groups, survey.statistics.macs, seconds)
        found = search(shop.groups, shop.verify, budget, objective=objective, usable=shop.usable, before=points)
        report = gather(artifact, settings, budget, objective, shop, found)
        report["facts"]["codes_sha256"] = codes_digest(shop.derive(found.chosen.plan, folder / "chosen"), survey.name)
        facts = {k: str(v) for k, v in report["facts"].items()}
        return report, Recipe(
            name=report["name"], component={survey.name: shop.recipe(found.chosen.plan)}, budget=facts
        )
    finally:
        shop.close()


def gather(
    artifact: Artifact, settings: Any, budget: Mapping[str, float], objective: str, shop: Any, found: Any
) -> dict[str, Any]:
    """Everything the table, the page and a program need, as plain data."""
    from intaglio.exporters.budget import front
    from intaglio.exporters.search import formats_of as formats_in

    flat, best = {p.name for p in front(found.points, speed=False)}, {p.name for p in front(found.points)}
    rows = []
    for point in found.points:
        counts = collections.Counter(formats_in(shop.groups, point.plan).values())
        marks = {"chosen": point is found.chosen, "front": point.name in best, "size_front": point.name in flat}
        rows.append({**point.to_json(), "formats": dict(counts.most_common()), **marks})
    layers = [
        {
            "members": list(group.members),
            "format": list(group.levels[index].formats),
            "bytes": group.levels[index].bytes,
            "errors": {v.request: round(v.error**0.5, 9) for v in group.levels},
        }
        for group, index in zip(shop.groups, found.chosen.plan, strict=True)
    ]
    asked = ", ".join(f"{key}={limit:g}" for key, limit in budget.items())
    steps = settings.steps or artifact.manifest.settings["num_inference_steps"]
    chosen = next(row for row in rows if row["chosen"])
    facts = {
        "asked": asked,
        "reached": f"psnr={reached(chosen)} (median {reached(chosen, '_median')}), ssim={chosen['ssim']:.4f}",
        "bytes": f"{found.chosen.bytes} of {shop.unquantized_bytes}",
        "speed": "not measured" if found.chosen.speed is None else f"{found.chosen.speed:.2f} of the unquantized",
        "objective": objective,
        "target": settings.target,
        "pictures": f"{len(settings.prompts)} prompts, {steps} steps, seeds from {settings.seed}",
        "artifact": artifact.manifest.digest,
        **{f"calibration_{k}": v for k, v in settings.calibration.to_json().items() if v is not None},
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "name": re.sub(r"[^\w.=-]+", "-", f"{artifact.manifest.name}-{settings.target}-{asked}").replace("=", ""),
        "component": settings.component,
        "budget": dict(budget),
        "unquantized_bytes": shop.unquantized_bytes,
        "prompts": list(settings.prompts),
        "facts": facts,
        "points": rows,
        "layers": layers,
        "machine": fingerprint(),
    }


def reached(row: Mapping[str, Any], kind: str = "") -> str:
    """A PSNR of a point as text."""
    value = row[f"psnr{kind}"]
    return "identical" if value is None else f"{value:.1f}"


COLUMNS = ("plan", "MB", "smaller", "x speed", "PSNR worst", "median", "SSIM worst", "", "weights")


def cells(row: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """One point as text, a cell a column."""
    mark = "chosen" if row["chosen"] else "on the front" if row["front"] else ""
    size = [f"{row['bytes'] / 1e6:.2f}", f"{report['unquantized_bytes'] / row['bytes']:.2f}x"]
    counts = ", ".join(f"{n} {name}" for name, n in row["formats"].items())
    if row["note"]:
        return [row["name"], *size, "–", "–", "–", "–", "no picture", counts]
    speed = "–" if row["speed"] is None else f"{row['speed']:.2f}"
    return [row["name"], *size, speed, reached(row), reached(row, "_median"), f"{row['ssim']:.4f}", mark, counts]


def ordered(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points by size, the largest first."""
    return sorted(report["points"], key=lambda row: (-row["bytes"], row["psnr"] is not None and -row["psnr"]))


def table(report: Mapping[str, Any]) -> str:
    """The points in aligned plain text."""
    plain = ["unquantized", f"{report['unquantized_bytes'] / 1e6:.2f}", "1.00x", "1.00", "–", "–", "–", "", ""]
    rows = [list(COLUMNS), plain, *(cells(row, report) for row in ordered(report))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = (0, len(COLUMNS) - 2, len(COLUMNS) - 1)
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def build_command(args: argparse.Namespace, report: Mapping[str, Any], target: Path) -> str:
    """How the recipe becomes an artifact, with the search's own calibration."""
    words = ["intaglio", "build", "CHECKPOINT", "-o", report["name"], "--target", args.target]
    words += ["--profile", str(target / f"recipe.{report['name']}.toml")]
    if args.prompts:
        count = min(CALIBRATION, report["facts"]["calibration_prompts"])
        words += ["--set", f"calibration.prompts={args.prompts}", "--set", f"calibration.count={count}"]
    if args.steps:
        words += ["--set", f"calibration.steps={args.steps}"]
    return shlex.join(words)


def run(args: argparse.Namespace) -> int:
    """Search, write the folder, print the table.

    Raises:
        ToolError: see `settings_of`, `run_search` and `report_folder`.
    """
    from intaglio.bench.search_html import page
    from intaglio.exporters.budget import parse_budget
    from intaglio.exporters.search import OBJECTIVES

    budget = parse_budget(args.budget)
    if args.objective not in OBJECTIVES:
        raise UsageError(f"--objective {args.objective!r} is unknown; allowed: {', '.join(OBJECTIVES)}")
    target = args.output or Path(f"{args.artifact.resolve().name}-search")
    check_target(target, force=False)
    artifact = Artifact.open(args.artifact)
    settings = settings_of(args, artifact)
    with report_folder(target, force=False) as folder:
        with progress() as note, tempfile.TemporaryDirectory(dir=folder) as scratch:
            report, recipe = run_search(artifact, settings, budget, args.objective, Path(scratch), note)
        report["command"] = build_command(args, report, target)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(folder / JSON, text)
        write_atomic(folder / HTML, page(report))
        write_atomic(folder / f"recipe.{report['name']}.toml", to_toml(recipe))
    print(text if args.json else table(report), end="" if args.json else "\n")
    warn(report)
    say(f"written: {target / HTML}")
    say(f"build it: {report['command']}")
    return 0


def warn(report: Mapping[str, Any]) -> None:
    """Say what a reader would not expect."""
    chosen = next(row for row in report["points"] if row["chosen"])
    if report["facts"]["objective"] == "speed" and (chosen["speed"] or 0) <= 1:
        say("nothing within the budget is faster than the unquantized component here; this is the fastest that is")
    for row in report["points"]:
        if row["note"]:
            say(f"{row['name']}: {row['note']}")


QUANTIZE_SEARCH = Verb(configure, run)
