"""The verb ``batch``: a file of requests in OpenAI's Batch format, made in one go, pictures and results in a folder.

``DIR/<custom_id>.png`` (with ``n`` above 1 ``<custom_id>-0.png``, …) and ``DIR/results.jsonl``, in OpenAI's form and in
the requests' order; a picture's ``url`` there is its file's name. While the batch runs, ``DIR/results.partial.jsonl``
has what is done: a run that was ended goes on from there, and failed lines are tried again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import ToolError, UsageError
from intaglio.profiles.family import parse_assignments
from intaglio.profiles.registry import need
from intaglio.runtimes import ray_batch
from intaglio.runtimes.serve_cli import add_models, hub_of

if TYPE_CHECKING:
    from intaglio.runtimes.batch import Batch
    from intaglio.runtimes.batch_file import RequestFile
    from intaglio.runtimes.batch_folder import Folder
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_limits import Limits

DEADLINE = 86_400.0  # seconds a line may take: nobody waits for it
REFRESH = 0.25  # seconds between looks at the progress
MOST_FAILURES = 3  # starts of a worker that failed, after which it is not waited for
INTERRUPTED = 130


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio batch``."""
    parser.add_argument("requests", metavar="REQUESTS.jsonl", help='lines of {"custom_id": …, "body": {"prompt": …}}')
    add_models(parser)
    parser.set_defaults(deadline=DEADLINE)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="new, empty, or of an earlier run")
    parser.add_argument("--force", action="store_true", help="write into DIR whatever it has; make all lines anew")
    ray_batch.configure(parser)
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the lines that are not done; 1 where some failed.

    Raises:
        UsageError: the file, the folder or an option is not allowed.
        ToolError: an artifact cannot be loaded.
    """
    need("fastapi", extra="serve")
    from intaglio.runtimes.batch_folder import Folder
    from intaglio.runtimes.serve_limits import Limits

    pool = ray_batch.pool_of(args)
    start, limits = time.monotonic(), Limits(parse_assignments(args.limit))
    requests = read_requests(Path(args.requests), limits)
    hub = hub_of(args)
    with contextlib.closing(requests), Folder(Path(args.output), requests, hub, force=args.force) as folder:
        kept = len(folder.done)
        try:
            if pool is None:
                asyncio.run(make(hub, limits, requests, folder))
            else:
                ray_batch.make_on_ray(args, pool, requests, folder)
        except (KeyboardInterrupt, asyncio.CancelledError):
            count = f"{len(folder.done)} of {len(requests.lines)}"
            say(f"intaglio: interrupted; {count} lines are done, run it again to go on")
            return INTERRUPTED
        folder.finish()
    facts = {
        "results": str(folder.results), "lines": len(requests.lines), "kept": kept, "made": len(folder.done) - kept,
        "failed": len(folder.failed), "pictures": folder.pictures, "steps": hub.tally.steps,
        "seconds": time.monotonic() - start,
    }  # fmt: skip
    print(json.dumps(facts, indent=1) if args.json else folder.results)
    if folder.failed:
        say(f"{len(folder.failed)} of {len(requests.lines)} lines failed; {folder.results} says why")
    return 1 if folder.failed else 0


def read_requests(path: Path, limits: Limits) -> RequestFile:
    """The file of requests.

    Raises:
        UsageError: it cannot be read, is too long, or a line is no request; the first one is named.
    """
    from intaglio.runtimes.batch_file import RequestFile
    from intaglio.runtimes.serve_errors import ServeError

    try:
        limits.check("batch_bytes", path.stat().st_size, str(path))
        requests = RequestFile(path, limits)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); name a file of JSON lines") from error
    except ServeError as error:
        raise UsageError(f"{error.message}; allow more bytes with --limit batch_bytes=N") from error
    if requests.faults:
        fault, others = requests.faults[0], len(requests.faults) - 1
        place = f"{path}, line {fault.line}" if fault.line is not None else str(path)
        raise UsageError(f"{place}: {fault.message}{f' (and {others} faults more)' if others else ''}")
    return requests


async def make(hub: Hub, limits: Limits, requests: RequestFile, folder: Folder) -> None:
    """Load what is needed, make the lines, and end the workers.

    Raises:
        ToolError: a worker cannot be started.
        CancelledError: by SIGINT or SIGTERM.
    """
    from intaglio.runtimes.batch import Batch, Places
    from intaglio.runtimes.serve_room import Room

    todo = folder.todo()
    if not todo:
        return
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not in a main thread
            loop.add_signal_handler(number, task.cancel)
    at_once = sum(model.settings.concurrency for model in hub.models.values())
    room, places = Room(hub, limits), Places(at_once)
    batch = Batch(room, places, requests, todo, ident=folder.ident, deliver=folder.deliver)
    try:
        await hub.start()
        await shown(hub, batch, folder)
    finally:
        await hub.close(0 if task.cancelling() else 5)


async def shown(hub: Hub, batch: Batch, folder: Folder) -> None:
    """Run the batch under a progress bar on stderr.

    Raises:
        ToolError: an artifact's worker dies and cannot be started again.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    running = asyncio.create_task(batch.run())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("batch", total=len(folder.requests.lines))
            while not running.done():
                under_way = sum(ticket.progress for ticket in hub.tickets.values())
                progress.update(bar, completed=int(folder.over + under_way), description=folder.said())
                refuse_hopeless(hub)
                await asyncio.wait({running}, timeout=REFRESH)
            progress.update(bar, completed=folder.over, description=folder.said())
        await running
    finally:
        running.cancel()
        with contextlib.suppress(BaseException):
            await running


def refuse_hopeless(hub: Hub) -> None:
    """End a batch that would wait for a worker for ever.

    Raises:
        ToolError: an artifact cannot be loaded any more.
    """
    for model in hub.models.values():
        if model.process is None and not model.unloaded and model.failures >= MOST_FAILURES:
            raise ToolError(
                f"{model.name} could not be loaded {model.failures} times; what is done is kept, run it again"
            )


BATCH = Verb(configure, run)
