"""``intaglio loadgen``: an artifact, or a server, under MLPerf's LoadGen in one of its four scenarios."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.bench.loadgen import Subject
from intaglio.bench.loadgen_http import CLIENTS, Server, subject_of_server
from intaglio.bench.scenarios import SCENARIOS, measure, read_rules
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need
from intaglio.profiles.staging import writing
from intaglio.runtimes.sampling import Request
from intaglio.runtimes.serve_keys import read_keys

if TYPE_CHECKING:
    from intaglio.runtimes.pipeline import Pipeline

REPORT = "loadgen.json"
BATCH = 8  # samples that one call takes at most: a query of multi_stream
TICK = 0.2  # seconds between two changes of the line on stderr
LOCAL = {"backend": "onnxruntime", "device": "cpu", "threads": 0}  # options of an artifact in this process
REMOTE = ("clients", "model", "api_key_file")  # of a server


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
    parser.add_argument("artifact", type=Path, nargs="?", metavar="ARTIFACT", help="folder made by intaglio build")
    parser.add_argument("--url", metavar="URL", help="or a server that speaks OpenAI's images: http://HOST:PORT")
    parser.add_argument("--scenario", required=True, metavar="S", help=", ".join(SCENARIOS))
    parser.add_argument("--profile", default="short", metavar="P", help="short (default), or mlperf: its rules of SDXL")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=NUMBER", help="change a rule; repeatable")
    parser.add_argument("--backend", metavar="B", help="default onnxruntime")
    parser.add_argument("--device", help="the backend's device name (default cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; 0, the default: the backend's choice")
    parser.add_argument("--clients", type=int, metavar="N", help=f"of --url: requests at once (default {CLIENTS})")
    parser.add_argument("--model", metavar="NAME", help="of --url: which of its models (default: its first)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="of --url: its first key is sent")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A subject, and what a report says of it: which ``artifact`` it is, and how it ``ran``."""

    subject: Subject
    artifact: Mapping[str, Any]
    ran: Mapping[str, Any]


@contextmanager
def local(args: argparse.Namespace) -> Iterator[Measured]:
    """An artifact in this process.

    Raises:
        ToolError: it cannot be loaded, or not be run so.
    """
    from intaglio.runtimes.pipeline import load

    given = {name: getattr(args, name) for name in LOCAL if getattr(args, name) is not None}
    ran: dict[str, Any] = {**LOCAL, **given}
    with closing(load(args.artifact, **ran)) as pipeline:
        made = pipeline.artifact.manifest
        yield Measured(
            subject=subject_of(pipeline, steps=args.steps, seed=args.seed),
            artifact={"name": made.name, "family": made.family, "digest": made.digest},
            ran={**ran, "seed": args.seed, "steps": args.steps or made.settings["num_inference_steps"]},
        )


@contextmanager
def remote(args: argparse.Namespace) -> Iterator[Measured]:
    """A server.

    Raises:
        ToolError: it does not answer, or has no such model.
    """
    clients = CLIENTS if args.clients is None else args.clients
    if clients < 1:
        raise UsageError(f"--clients {clients} is not allowed: 1 or more")
    extra = {"model": args.model, "num_inference_steps": args.steps}
    given = {name: value for name, value in extra.items() if value is not None}
    key = None if args.api_key_file is None else next(iter(read_keys(args.api_key_file)))
    server = Server(args.url, key, given)
    found = server.model(args.model)
    facts = found.get("intaglio") or {}  # what a server of ours says of its artifact
    yield Measured(
        subject=subject_of_server(server, clients=clients, seed=args.seed),
        artifact={"name": found["id"], "family": facts.get("family"), "digest": facts.get("digest")},
        ran={"url": args.url, "clients": clients, "seed": args.seed, "steps": args.steps, "server": facts},
    )


def place_of(args: argparse.Namespace) -> Callable[[argparse.Namespace], AbstractContextManager[Measured]]:
    """`local` or `remote`, whichever was asked for.

    Raises:
        UsageError: both or neither, or an option of the other one.
    """
    if (args.artifact is None) == (args.url is None):
        raise UsageError("intaglio loadgen wants one of ARTIFACT, a folder made by intaglio build, and --url URL")
    for name in REMOTE if args.url is None else LOCAL:
        if getattr(args, name) is not None:
            word = "--url URL" if args.url is None else "ARTIFACT"
            raise UsageError(f"--{name.replace('_', '-')} is an option of {word}, which is not given")
    return local if args.url is None else remote


def run_scenario(args: argparse.Namespace) -> int:
    """Run one scenario and print its metric; 0 if LoadGen calls the run VALID and its clock agrees with ours, else 1.

    Raises:
        ToolError: a value is not allowed, LoadGen is not installed, or the pipeline or server fails, see `measure`.
    """
    from intaglio.bench.machine import fingerprint

    place = place_of(args)
    rules, prompts = read_rules(args.profile, args.scenario, args.set), read_prompts(args.prompts)
    rules.check_prompts(len(prompts))
    if args.target_qps is not None and not 0 < args.target_qps < math.inf:
        raise UsageError(f"--target-qps {args.target_qps} is not allowed: a number above 0")
    if args.output is not None and args.output.exists():
        raise UsageError(f"{args.output} exists; choose another name")
    need("mlperf_loadgen", extra="bench")
    with place(args) as found, output_folder(args.output) as folder:
        with progress(args.scenario) as tell:
            report = measure(
                args.scenario, rules, prompts, found.subject, folder, target_qps=args.target_qps, tell=tell
            )
        report |= {"artifact": dict(found.artifact), "ran": dict(found.ran), "machine": fingerprint()}
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
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
