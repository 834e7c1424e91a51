"""``intaglio bench`` and ``intaglio report``."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intaglio.bench.cases import default_backends
from intaglio.bench.matrix import AXES, Matrix, exclusion, read_file, read_values, with_flags
from intaglio.bench.metrics import METRICS
from intaglio.bench.report import HTML, check_target, table, to_json, write
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.profiles.registry import pick

METAVARS = {"backend": "B", "size": "WxH", "scheduler": "S", "device": "D"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio bench``."""
    parser.add_argument("artifact", nargs="*", type=Path, metavar="ARTIFACT", help="folders made by intaglio build")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--matrix", type=Path, metavar="FILE", help="TOML file of what to run; flags replace its parts")
    for axis, facts in AXES.items():
        if axis != "artifact":
            parser.add_argument(
                f"--{axis.replace('_', '-')}",
                action="append",
                metavar=METAVARS.get(axis, "N"),
                help=f"{facts.help}; repeat or separate by commas for several",
            )
    parser.add_argument("--peer", action="append", metavar="T", help="another tool beside ours; repeatable")
    parser.add_argument("--exclude", action="append", metavar="A=V,…", help="leave out cases with these axis values")
    parser.add_argument("--grid", metavar="X[,Y[,Z]]", help="axes to show as a grid of pictures")
    parser.add_argument("--prompt", action="append", metavar="P", help="repeatable; default: four of the demo's")
    parser.add_argument("--rounds", type=int, metavar="N", help="measured images a case (default 5)")
    parser.add_argument("--warmup", type=int, metavar="N", help="images before the first round (default 1)")
    parser.add_argument("--seed", type=int, metavar="S", help="of noise and interleaving (default 0)")
    parser.add_argument("--isolation", metavar="I", help="shared (default): a process a case; fresh: one a round")
    parser.add_argument("--quick", action="store_true", help="speed and pictures alone: no memory, components, floor")
    parser.add_argument("--limit", action="append", metavar="M=V", help="a metric's limit in place of the format's own")
    parser.add_argument("--metrics-dir", type=Path, metavar="DIR", help="learned metrics with their weights")
    parser.add_argument("--checkpoint", metavar="C", help="where the torch backend finds the checkpoint")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds one answer may take (900)")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and how long they will take")
    parser.add_argument("--known", action="append", type=Path, metavar="R", help="earlier reports for --dry-run")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument("--submit-format", metavar="NAME", help="also file the report under bench/results by machine")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    parser.add_argument("--force", action="store_true", help="replace an earlier report or an unfinished run")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being measured; nothing where stderr is not a terminal."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text.replace("[", "\\["))


def command_line(args: argparse.Namespace, names: Sequence[str]) -> str:
    """The command without the folders' places, which may hold the names of people."""
    words = ["intaglio", "bench", *names, "-o", args.output.name]
    if args.matrix:
        words += ["--matrix", args.matrix.name]
    for key in ("peer", "prompt", "exclude", "limit", *(a for a in AXES if a != "artifact")):
        flag = f"--{key.replace('_', '-')}"
        words += [w for value in getattr(args, key) or () for w in (flag, str(value))]
    for key in ("grid", "rounds", "warmup", "seed", "isolation"):
        if getattr(args, key) is not None:
            words += [f"--{key}", str(getattr(args, key))]
    if args.quick:
        words.append("--quick")
    if args.metrics_dir:
        words += ["--metrics-dir", args.metrics_dir.name]
    if args.checkpoint:
        words += ["--checkpoint", Path(args.checkpoint).name]
    return shlex.join(words)


def choose_backends(asked: Sequence[str] | None) -> tuple[str, ...]:
    """The backends asked for, or every installed one.

    Raises:
        Unsupported: TensorRT was asked for and there is no GPU.
        UsageError: there is no such backend.
    """
    from intaglio.bench.memory import gpus
    from intaglio.runtimes.engine import ENGINES

    plain = [name.partition(":")[0] for name in asked or ()]
    for name in plain:
        pick(ENGINES, name, "backend")
    if "tensorrt" in plain and gpus()[1]:
        message = (
            f"backend tensorrt cannot run here: {gpus()[1]}; leave it out, its plans are still listed with their sizes"
        )
        raise Unsupported(message)
    return tuple(asked) if asked else default_backends()


def read_matrix(args: argparse.Namespace) -> tuple[list[Path], Matrix]:
    """Artifacts and matrix of the file and the flags.

    Raises:
        UsageError: a value is not allowed, or there is no artifact.
    """
    folders, said = read_file(args.matrix) if args.matrix else ([], {})
    axes: dict[str, Any] = {}
    for axis in AXES:
        if axis != "artifact" and getattr(args, axis) is not None:
            axes[axis] = read_values(axis, getattr(args, axis))
    axes["backend"] = choose_backends(axes.get("backend") or said.get("axes", {}).get("backend"))
    flags = {
        "axes": axes,
        "exclude": tuple(exclusion(text) for text in args.exclude) if args.exclude else None,
        "grid": tuple(args.grid.split(",")) if args.grid else None,
        "prompts": tuple(args.prompt) if args.prompt else None,
        **{name: getattr(args, name) for name in ("rounds", "warmup", "seed", "isolation", "checkpoint")},
    }
    chosen = args.artifact or folders
    if not chosen:
        raise UsageError("no artifact was given; name folders made by intaglio build, or artifacts in --matrix")
    return list(chosen), with_flags(said, flags)


def read_limits(texts: Sequence[str] | None, learned: Mapping[str, Any]) -> dict[str, float]:
    """``--limit psnr=30`` as numbers by metric.

    Raises:
        UsageError: it is not that, or no such metric exists.
    """
    found = {}
    for text in texts or ():
        name, equal, value = text.partition("=")
        pick({**METRICS, **learned}, name, "metric")
        try:
            found[name] = float(value)
        except ValueError:
            equal = ""
        if not equal:
            raise UsageError(f"--limit {text!r} is not METRIC=NUMBER, such as psnr=30")
    return found


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print the table; 1 if a case failed or exceeds its limits, else 0.

    Raises:
        ToolError: see `run_matrix`, `begin` and `Matrix.cases`.
    """
    from intaglio.bench.database import FOLDER, submit
    from intaglio.bench.estimate import known_rows, listing
    from intaglio.bench.journal import begin, plan_of, publishing
    from intaglio.bench.learned import load_metrics
    from intaglio.bench.peer_cases import peer_cases
    from intaglio.bench.run import PARTS, run_matrix

    learned = load_metrics(args.metrics_dir) if args.metrics_dir else {}
    limits = read_limits(args.limit, learned)
    folders, matrix = read_matrix(args)
    if not args.dry_run and not args.resume:
        check_target(args.output, force=args.force)
    artifacts = {str(a.folder): a for a in (Artifact.open(path) for path in folders)}
    cases = matrix.cases(list(artifacts.values()))
    if args.peer:
        cases += peer_cases(args.peer, cases, artifacts, args.checkpoint or "", say, dry=args.dry_run)
    if args.dry_run:
        print(listing(cases, artifacts, known_rows([args.output, *(args.known or ())])))
        return 0
    plan = plan_of(cases, {key: a.manifest.digest for key, a in artifacts.items()}, matrix.seed)
    journal = begin(args.output, plan, resume=args.resume, force=args.force)
    with progress() as tell, publishing(journal, args.output) as folder:
        report = run_matrix(
            cases,
            artifacts,
            journal,
            command=command_line(args, [p.name for p in folders]),
            seed=matrix.seed,
            timeout=args.timeout,
            isolation=matrix.isolation,
            parts=() if args.quick else PARTS,
            grid=matrix.grid,
            limits=limits,
            learned=learned,
            tell=tell,
        )
        write(report, folder)
    print(to_json(report) if args.json else table(report), end="" if args.json else "\n")
    say(f"written: {args.output / HTML}")
    if args.submit_format:
        say(f"filed: {submit(json.loads(to_json(report)), args.submit_format, FOLDER)}")
    return told(report)


def told(report: dict[str, Any]) -> int:
    """Say which cases failed or exceed their limits; 1 if any does, else 0."""
    bad = 0
    for case in report["cases"]:
        reasons = [case["error"]] if case["status"] == "error" else (case.get("verdict") or {}).get("exceeded", [])
        for reason in reasons:
            say(f"{case['label']}: {reason}")
        bad += bool(reasons)
    return 1 if bad else 0


BENCH = Verb(configure, run)
