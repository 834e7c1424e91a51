"""``intaglio bench``."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from intaglio.bench.cases import default_backends, matrix
from intaglio.bench.report import HTML, check_target, report_folder, table, to_json, write
from intaglio.bench.run import run_matrix
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import Unsupported, UsageError

PROMPTS = ("red heart", "红心", "cat face", "rocket")


def size_of(text: str) -> tuple[int, int]:
    """``512x768`` as (width, height).

    Raises:
        UsageError: it is neither that nor positive.
    """
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text)
    if match is None:
        message = f"--size {text!r} is not WIDTHxHEIGHT, such as 512x512"
        raise UsageError(message)
    return int(match[1]), int(match[2])


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio bench``."""
    parser.add_argument("artifact", nargs="+", type=Path, metavar="ARTIFACT", help="folders made by intaglio build")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--backend", action="append", metavar="B", help="repeatable; default: every one installed")
    parser.add_argument("--device", default="cpu", help="the backend's device name (default cpu)")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the artifact's own")
    parser.add_argument("--size", metavar="WxH", help="pixels; default: the artifact's own")
    parser.add_argument("--scheduler", metavar="S", help="default: the artifact's own")
    parser.add_argument("--prompt", action="append", metavar="P", help="repeatable; default: four of the demo's")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured images a case (default 5)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: the backend's choice")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of noise and interleaving (default 0)")
    parser.add_argument("--checkpoint", default="", metavar="C", help="where the torch backend finds the checkpoint")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds one answer may take (900)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    parser.add_argument("--force", action="store_true", help="replace an earlier report")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being measured; nothing where stderr is not a terminal."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text.replace("[", "\\["))


def command_line(args: argparse.Namespace, names: Sequence[str]) -> str:
    """The command without the folders' places, which may hold the names of people."""
    words = ["intaglio", "bench", *names, "-o", args.output.name]
    for key in ("backend", "prompt"):
        words += [w for value in getattr(args, key) or () for w in (f"--{key}", value)]
    for key in ("device", "steps", "size", "scheduler", "rounds", "threads", "seed"):
        if getattr(args, key) is not None:
            words += [f"--{key}", str(getattr(args, key))]
    if args.checkpoint:
        words += ["--checkpoint", Path(args.checkpoint).name]
    return shlex.join(words)


def choose_backends(asked: Sequence[str] | None) -> tuple[str, ...]:
    """The backends asked for, or every installed one.

    Raises:
        Unsupported: TensorRT was asked for and there is no GPU.
    """
    from intaglio.bench.memory import gpus

    if asked and "tensorrt" in asked and gpus()[1]:
        message = (
            f"backend tensorrt cannot run here: {gpus()[1]}; leave it out, its plans are still listed with their sizes"
        )
        raise Unsupported(message)
    return tuple(asked) if asked else default_backends()


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print the table; 1 if a case failed, else 0.

    Raises:
        ToolError: see `run_matrix`, `report_folder` and `matrix`.
    """
    check_target(args.output, force=args.force)
    backends = choose_backends(args.backend)
    artifacts = {str(a.folder): a for a in (Artifact.open(path) for path in args.artifact)}
    cases = matrix(
        list(artifacts.values()),
        backends,
        prompts=args.prompt or PROMPTS,
        size=size_of(args.size) if args.size else None,
        steps=args.steps,
        seed=args.seed,
        scheduler=args.scheduler,
        threads=args.threads,
        device=args.device,
        repeats=args.rounds,
        checkpoint=args.checkpoint,
    )
    command = command_line(args, [p.name for p in args.artifact])
    with report_folder(args.output, force=args.force) as folder:
        with progress() as tell:
            report = run_matrix(
                cases, artifacts, folder, command=command, seed=args.seed, timeout=args.timeout, tell=tell
            )
        write(report, folder)
    print(to_json(report) if args.json else table(report), end="" if args.json else "\n")
    say(f"written: {args.output / HTML}")
    failed = [c for c in report["cases"] if c["status"] == "error"]
    for case in failed:
        say(f"{case['label']}: {case['error']}")
    return 1 if failed else 0


BENCH = Verb(configure, run)
