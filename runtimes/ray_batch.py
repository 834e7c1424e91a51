"""``intaglio batch --ray``: the lines of a file of requests on Ray Data, a pool of actors with a hub each.

A line is made by what makes it without Ray (`intaglio.runtimes.batch`), from the same seed; the folder, its journal and
the order of its results are the plain batch's, too, so that a batch may be begun with Ray and ended without. Ray makes
the lines of an actor that died again on another one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from intaglio.profiles.errors import ToolError, UsageError
from intaglio.profiles.family import parse_assignments
from intaglio.profiles.registry import need
from intaglio.runtimes.ray_frames import frame_of, made_of
from intaglio.runtimes.serve_cli import add_models, hub_of

if TYPE_CHECKING:
    from intaglio.runtimes.batch import Made
    from intaglio.runtimes.batch_file import Line, RequestFile
    from intaglio.runtimes.batch_folder import Folder

LOCAL = "local"
LINES_OF_TASK = 4  # times an actor's concurrency: what it works on at once, and what is made again where it dies
# Ray reports its use to its makers where nobody says no.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
REACH_SECONDS = 10.0  # that a cluster may take to answer at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Where actors run.

    Attributes:
        address: of a Ray cluster, ``auto`` for the one this machine is in; ``local``: started here, for this batch.
        replicas: actors; each loads the artifacts.
        num_cpus, num_gpus: of an actor, as Ray counts them.
    """

    address: str = LOCAL
    replicas: int = 1
    num_cpus: float = 1
    num_gpus: float = 0


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments for ``intaglio batch``."""
    parser.add_argument("--ray", nargs="?", const=LOCAL, metavar="ADDRESS", help="on Ray Data: here, or on a cluster")
    parser.add_argument("--ray-replicas", type=int, metavar="N", help="actors, each with the artifacts; 1")
    parser.add_argument("--ray-cpus", type=float, metavar="N", help="of an actor; 1")
    parser.add_argument("--ray-gpus", type=float, metavar="N", help="of an actor, which sees those alone; 0")


def pool_of(args: argparse.Namespace) -> Pool | None:
    """The pool of the command line; ``None`` without ``--ray``.

    Raises:
        UsageError: a number that is not allowed, or one without ``--ray``.
        MissingDependency: Ray Data is not installed.
    """
    given = {"replicas": args.ray_replicas, "cpus": args.ray_cpus, "gpus": args.ray_gpus}
    for name, value in given.items():
        least = 1 if name == "replicas" else 0
        if value is not None and args.ray is None:
            raise UsageError(f"--ray-{name} {value:g} is of --ray; add it")
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"--ray-{name} {value:g} is not allowed: {least} or more")
    if args.ray is None:
        return None
    found = {"replicas": given["replicas"], "num_cpus": given["cpus"], "num_gpus": given["gpus"]}
    pool = Pool(address=args.ray, **{name: value for name, value in found.items() if value is not None})
    prepare(pool)
    for module in ("ray", "pandas", "pyarrow"):
        need(module, extra="ray")
    return pool


def make_on_ray(args: argparse.Namespace, pool: Pool, requests: RequestFile, folder: Folder) -> None:
    """`batch_cli.make` on Ray: make the lines that are not done.

    Raises:
        UsageError: Ray has no room for that many actors.
        ToolError: Ray failed, or an artifact cannot be loaded.
    """
    todo = folder.todo()
    if todo:
        for made in run_on_ray(requests, todo, models_of(args), ident=folder.ident, pool=pool):
            folder.write(made)
            folder.hub.tally.steps += sum(int(p.parameters["num_inference_steps"]) for p in made.pictures)


def models_of(args: argparse.Namespace) -> dict[str, Any]:
    """What an actor is told of the command line; folders are absolute, since it is at home elsewhere."""
    known = argparse.ArgumentParser()
    add_models(known)
    facts = {name: getattr(args, name) for name in vars(known.parse_args(["artifact"]))}
    named = [(text.partition("=")[0], text.partition("=")[2]) if "=" in text else ("", text) for text in args.artifact]
    facts["artifact"] = [f"{name or Path(path).resolve().name}={Path(path).absolute()}" for name, path in named]
    return facts


def run_on_ray(
    file: RequestFile,
    lines: Sequence[Line],
    models: Mapping[str, Any],
    *,
    ident: Callable[[Line, dict[str, Any]], str],
    pool: Pool,
) -> Iterator[Made]:
    """What becomes of lines, as it comes; in no order.

    Args:
        file: of the requests.
        lines: those of it that are wanted.
        models: as `models_of` gives them.
        ident: of a line with its body, by which its result is known.
        pool: where they are made.

    Raises:
        UsageError: Ray has no room for that many actors.
        ToolError: Ray failed, or an artifact cannot be loaded.
        MissingDependency: Ray is not installed.
    """
    prepare(pool)  # where `pool_of` did not
    ray, data = need("ray", extra="ray"), need("ray.data", extra="ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    numbers = {line.number: line for line in lines}
    per_task = max(1, min(LINES_OF_TASK * models["concurrency"], math.ceil(len(lines) / pool.replicas)))
    started = begin(ray, pool)
    try:
        data.DataContext.get_current().enable_progress_bars = False
        rows = [{"number": line.number, "line": json.dumps([line.custom_id, file.body(line)])} for line in lines]
        found = data.from_items(rows, override_num_blocks=math.ceil(len(rows) / per_task)).map_batches(
            Maker,
            fn_constructor_args=(dict(models),),
            batch_size=per_task,
            compute=data.ActorPoolStrategy(size=pool.replicas),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
        for row in found.iter_rows():
            line = numbers[row["number"]]
            body = file.body(line)
            yield made_of(line, ident(line, body), body, row["frame"])
    except ray.exceptions.RayError as error:
        raise ToolError(f"Ray could not make the batch: {cause(error)}; what is done is kept, run it again") from error
    finally:
        if started:
            ray.shutdown()


def prepare(pool: Pool) -> None:
    """What Ray reads from the environment when it is imported.

    A Ray that is started here listens on all addresses of this machine whatever it is told; with a token that nobody
    knows it lets nobody in.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if pool.address == LOCAL and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def begin(ray: Any, pool: Pool) -> bool:
    """Connect to Ray; whether it was started for this.

    Raises:
        UsageError: it has no room for that many actors.
        ToolError: there is no such cluster, or it does not let us in.
    """
    started = not ray.is_initialized()
    if started:
        flags = {"include_dashboard": False} if pool.address == LOCAL else {}
        try:
            reach(pool.address)
            # Named even where it is started here: else Ray joins whatever RAY_ADDRESS or this machine has.
            ray.init(address=pool.address, log_to_driver=False, logging_level="ERROR", **flags)
        except Exception as error:  # of many kinds, Ray's own among them
            what = "Ray cannot be started here" if pool.address == LOCAL else f"no Ray at {pool.address!r}"
            why = cause(error).rstrip(".")
            raise ToolError(f"{what}: {why}; --ray without an address starts one for this batch") from error
    room = room_of(ray.nodes(), pool)
    if room < pool.replicas:
        if started:
            ray.shutdown()
        each = f"{pool.num_cpus:g} CPU and {pool.num_gpus:g} GPU"
        raise UsageError(f"{pool.replicas} actors of {each} are more than the {room} that Ray's nodes have room for")
    return started


def reach(address: str) -> None:
    """Try HOST:PORT, which Ray itself tries for ever.

    Raises:
        OSError: nobody listens there.
    """
    if match := re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((match[1], int(match[2])), REACH_SECONDS).close()


def room_of(nodes: Sequence[Mapping[str, Any]], pool: Pool) -> int:
    """How many actors fit at once where nothing else runs; one is never spread over two nodes."""
    wanted = [(kind, each) for kind, each in (("CPU", pool.num_cpus), ("GPU", pool.num_gpus)) if each]
    found = 0
    for node in nodes:
        if node["Alive"]:
            fits = [int(node["Resources"].get(kind, 0) / each + 1e-9) for kind, each in wanted]
            found += min(fits, default=pool.replicas)
    return found


def cause(error: BaseException) -> str:
    """The last line of what went wrong: Ray's messages have whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class Maker:
    """An actor's work: a hub with its worker processes, in an event loop of its own thread."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        from intaglio.runtimes.serve_limits import Limits
        from intaglio.runtimes.serve_room import Room

        args = argparse.Namespace(**models)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="hub", daemon=True).start()
        self.hub = self.within(self.started(args))
        self.at_once = sum(model.settings.concurrency for model in self.hub.models.values())
        self.room = Room(self.hub, Limits(parse_assignments(args.limit)))

    def within(self, work: Any) -> Any:
        """Run something in the loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def started(self, args: argparse.Namespace) -> Any:
        """A hub whose workers are loaded."""
        hub = hub_of(args)
        await hub.start()
        return hub

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Make some lines."""
        frames = self.within(self.made(batch))
        return {"number": list(frames), "frame": list(frames.values())}

    async def made(self, rows: Mapping[str, Any]) -> dict[int, bytes]:
        """Number of a line -> what became of it.

        Raises:
            ToolError: an artifact's worker died and cannot be started again.
        """
        from intaglio.runtimes.batch import Batch, Places
        from intaglio.runtimes.batch_cli import REFRESH, refuse_hopeless
        from intaglio.runtimes.batch_file import Line

        bodies, lines = {}, []
        for number, text in zip(rows["number"], rows["line"], strict=True):
            custom_id, bodies[int(number)] = json.loads(text)
            lines.append(Line(int(number), custom_id, 0, 0))
        frames: dict[int, bytes] = {}

        async def deliver(made: Made) -> None:
            frames[made.line.number] = frame_of(made)

        file = cast("RequestFile", SimpleNamespace(body=lambda line: bodies[line.number]))
        batch = Batch(self.room, Places(self.at_once), file, lines, ident=lambda line, body: "", deliver=deliver)
        running = asyncio.create_task(batch.run())
        try:
            while not running.done():
                refuse_hopeless(self.hub)
                await asyncio.wait({running}, timeout=REFRESH)
            await running
        finally:
            running.cancel()
            with contextlib.suppress(BaseException):  # it is told already, or what ended this is
                await running
        return frames
