"""``intaglio demo``: the embedded checkpoint, unquantized and int8, on every backend, with the report."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import tempfile
from pathlib import Path

from intaglio.bench.cases import default_backends
from intaglio.bench.cli import progress, told
from intaglio.bench.journal import Journal, plan_of
from intaglio.bench.matrix import matrix
from intaglio.bench.report import CSV, HTML, JSON, MARKDOWN, table, to_json, write
from intaglio.bench.run import run_matrix
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import installed

PROMPTS = ("red heart", "红心", "cat face", "pizza", "rocket", "向日葵")
PRECISIONS = {"fp32": {}, "int8": {"*": "int8"}}  # folder -> quant
TARGETS = {"onnx": ("onnx",), "openvino": ("openvino",), "tensorrt": ("tensorrt", "tensorrt_rtx_bindings")}
ARTIFACTS = "artifacts"
# One thread: the model is so small that two hardly help, and on a busy machine torch's threads wait for each other,
# which would flatter us. Measured on two shared cores: torch 2.4 s an image with two threads, 0.07 s with one.
THREADS = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio demo``."""
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    parser.add_argument("--checkpoint", default="emoji", metavar="C", help="default: the embedded emoji")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the artifact's own")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured images a case (default 5)")
    parser.add_argument("--threads", type=int, default=THREADS, metavar="N", help="CPU threads (default 1); 0: all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of noise and interleaving (default 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")


def check_output(folder: Path) -> None:
    """Refuse a folder that is not an earlier demo's.

    Raises:
        UsageError: it is a file, or holds something else.
    """
    known = folder.is_dir() and (not any(folder.iterdir()) or (folder / JSON).exists() or (folder / ARTIFACTS).exists())
    if folder.exists() and not known:
        message = f"{folder} exists and is not a demo's; choose another folder with -o"
        raise UsageError(message)


def targets() -> tuple[str, ...]:
    """The targets that can be built here; those left out are said with the pip line."""
    found = tuple(t for t, modules in TARGETS.items() if any(installed(m) for m in modules))
    for name in TARGETS.keys() - set(found):
        say(f"target {name} is left out, it is not installed; run: pip install 'intaglio[{name}]'")
    return found


def build_all(checkpoint: str, folder: Path) -> dict[str, Artifact]:
    """Build every precision under `folder`; artifacts by their path.

    Raises:
        ToolError: see `intaglio.exporters.build.build`.
    """
    from intaglio.exporters.build import build

    chosen = targets()
    built = {}
    for name, quant in PRECISIONS.items():
        say(f"building {checkpoint} as {name} for {', '.join(chosen)}")
        artifact = build(checkpoint, folder / name, targets=chosen, quant=quant, options={}, force=True)
        built[str(artifact.folder)] = artifact
    return built


def publish(made: Path, folder: Path) -> None:
    """Move a finished report into the demo's folder, the pictures first and the page last."""
    images, old = folder / "images", made / "old-images"
    if images.exists():
        os.replace(images, old)
    os.replace(made / "images", images)
    for name in (JSON, MARKDOWN, CSV, HTML):
        os.replace(made / name, folder / name)


def command_line(args: argparse.Namespace) -> str:
    """The command with every value that decides a figure, and no folder's place."""
    words = ["intaglio", "demo", "--checkpoint", Path(args.checkpoint).name]
    for key in ("steps", "rounds", "threads", "seed"):
        if getattr(args, key) is not None:
            words += [f"--{key}", str(getattr(args, key))]
    return shlex.join(words)


def run(args: argparse.Namespace) -> int:
    """Build, measure, write, print the table; 1 if a case failed, else 0.

    Raises:
        ToolError: a build failed, or nothing could be measured.
    """
    check_output(args.output)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{args.output} cannot be written ({error.strerror}); choose another folder with -o"
        raise UsageError(message) from error
    artifacts = build_all(args.checkpoint, args.output / ARTIFACTS)
    cases = matrix(
        list(artifacts.values()),
        default_backends(),
        prompts=PROMPTS,
        steps=args.steps,
        seed=args.seed,
        threads=args.threads,
        rounds=args.rounds,
        checkpoint=args.checkpoint,
    )
    temporary = Path(tempfile.mkdtemp(prefix=".report.", suffix=".tmp", dir=args.output))
    try:
        journal = Journal(temporary)
        journal.write("plan", **plan_of(cases, {key: a.manifest.digest for key, a in artifacts.items()}, args.seed))
        with progress() as tell:
            report = run_matrix(cases, artifacts, journal, command=command_line(args), seed=args.seed, tell=tell)
        write(report, temporary)
        publish(temporary, args.output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(to_json(report) if args.json else table(report), end="" if args.json else "\n")
    say(f"written: {args.output / HTML}")
    return told(report)


DEMO = Verb(configure, run)
