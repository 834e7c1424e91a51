"""``intaglio loadgen``: an artifact under MLPerf's LoadGen in one of its four scenarios."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.bench.loadgen import Subject
from intaglio.bench.scenarios import SCENARIOS, measure, read_rules
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need
from intaglio.profiles.staging import writing
from intaglio.runtimes.sampling import Request

if TYPE_CHECKING:
    from intaglio.runtimes.pipeline import Pipeline

REPORT = "loadgen.json"
BATCH = 8  # samples that one call takes at most: a query of multi_stream
TICK = 0.2  # seconds between two changes of the line on stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest(Request):
    """A request whose pictures have seeds of their own rather than consecutive ones."""

    own: tuple[int, ...]

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return list(self.own)


def subject_of(pipeline: Pipeline, *, steps: int | None = None, seed: int = 0) -> Subject:
    """What LoadGen measures of a loaded artifact: sample k has the seed ``seed + k``, alone and in a batch.

    Raises:
        UsageError: not even one picture can be made with these steps and this seed.
    """

    def request(numbers: Sequence[int], prompts: Sequence[str]) -> SampleRequest:
        checked = pipeline.request(prompts, seed=seed, num_inference_steps=steps)
        own = tuple(seed + n for n in numbers)
        return SampleRequest(**{f.name: getattr(checked, f.name) for f in dataclasses.fields(checked)}, own=own)

    def make(numbers: Sequence[int], prompts: Sequence[str]) -> Sequence[Any]:
        events = pipeline.sampler.stream(pipeline.engines, request(numbers, prompts))
        while True:
            try:
                next(events)
            except StopIteration as stop:
                images: Sequence[Any] = stop.value.images
                return images

    request([0], [""])
    for batch in range(BATCH, 1, -1):
        try:
            request(range(batch), [""] * batch)
        except UsageError:
            continue
        return Subject(make=make, batch=batch)
    return Subject(make=make)


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The prompts of a file, one a line; the demo's where there is none.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or has an empty line.
    """
    if file is None:
        from intaglio.bench.demo import PROMPTS

        return PROMPTS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"--prompts {file} cannot be read ({reason}); one prompt a line, in UTF-8") from error
    empty = [n for n, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        raise UsageError(f"--prompts {file} has an empty line, {empty[0] if empty else 1}; one prompt a line")
    return tuple(lines)


def configure_scenario(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio loadgen``."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder made by intaglio build")
    parser.add_argument("--scenario", required=True, metavar="S", help=", ".join(SCENARIOS))
    parser.add_argument("--profile", default="short", metavar="P", help="short (default), or mlperf: its rules of SDXL")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=NUMBER", help="change a rule; repeatable")
    parser.add_argument("--backend", default="onnxruntime", metavar="B", help="default onnxruntime")
    parser.add_argument("--device", default="cpu", help="the backend's device name (default cpu)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: the backend's choice")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line; default: the demo's")
    parser.add_argument(
        "--target-qps", type=float, metavar="Q", help="queries a second; default: from warm-up pictures"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the artifact's own")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="sample k has the seed S + k (default 0)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help=f"new folder for {REPORT} and LoadGen's logs")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


@contextmanager
def progress(scenario: str) -> Iterator[Callable[[int], None]]:
    """A line on stderr with the samples done; nothing where stderr is not a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(f"{scenario}: warming up") as status:
        start = last = time.perf_counter()

        def tell(done: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last > TICK:
                status.update(f"{scenario}: {done} samples, {now - start:.0f} s")
                last = now

        yield tell


@contextmanager
def output_folder(target: Path | None) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well, or a temporary one.

    Raises:
        UsageError: `target` exists or cannot be written.
    """
    if target is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    with writing(target) as folder:
        yield folder


def run_scenario(args: argparse.Namespace) -> int:
    """Run one scenario and print its metric; 0 if LoadGen calls the run VALID and its clock agrees with ours, else 1.

    Raises:
        ToolError: a value is not allowed, LoadGen is not installed, or the pipeline fails, see `measure`.
    """
    from intaglio.bench.machine import fingerprint
    from intaglio.runtimes.pipeline import load

    rules, prompts = read_rules(args.profile, args.scenario, args.set), read_prompts(args.prompts)
    rules.check_prompts(len(prompts))
    if args.target_qps is not None and not 0 < args.target_qps < math.inf:
        raise UsageError(f"--target-qps {args.target_qps} is not allowed: a number above 0")
    if args.output is not None and args.output.exists():
        raise UsageError(f"{args.output} exists; choose another name")
    need("mlperf_loadgen", extra="bench")
    pipeline = load(args.artifact, backend=args.backend, device=args.device, threads=args.threads)
    try:
        subject = subject_of(pipeline, steps=args.steps, seed=args.seed)
        with output_folder(args.output) as folder:
            with progress(args.scenario) as tell:
                report = measure(args.scenario, rules, prompts, subject, folder, target_qps=args.target_qps, tell=tell)
            made = pipeline.artifact.manifest
            report["artifact"] = {"name": made.name, "family": made.family, "digest": made.digest}
            steps = args.steps or made.settings["num_inference_steps"]
            report["ran"] = {key: getattr(args, key) for key in ("backend", "device", "threads", "seed")}
            report["ran"]["steps"] = steps
            report["machine"] = fingerprint()
            text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            (folder / REPORT).write_text(text, encoding="utf-8")
    finally:
        pipeline.close()
    print(text if args.json else table(report), end="")
    return verdict(report)


def table(report: Mapping[str, Any]) -> str:
    """The report in four lines for a person."""
    metric, check = report["metric"], report["cross_check"]
    return (
        f"{report['scenario']}, {report['profile']}: {'VALID' if report['valid'] else 'INVALID'}\n"
        f"{metric['name']}: {metric['value']:.4g}{' s' if metric['unit'] == 's' else ''}\n"
        f"mean latency: {check['loadgen_mean_s']:.4g} s of {report['latency_s']['n']} samples by LoadGen's clock, "
        f"{check['ours_mean_s']:.4g} s by ours\n"
        f"{report['note']}\n"
    )


def verdict(report: Mapping[str, Any]) -> int:
    """The exit code; where it is 1 a line on stderr says why."""
    if not report["valid"]:
        say(f"INVALID: {report['why']}")
        return 1
    if not report["cross_check"]["agree"]:
        ours, theirs = report["cross_check"]["ours_mean_s"], report["cross_check"]["loadgen_mean_s"]
        say(f"LoadGen's mean latency {theirs:.4g} s is not the {ours:.4g} s measured here; repeat on an idle machine")
        return 1
    return 0


LOADGEN = Verb(configure_scenario, run_scenario)
