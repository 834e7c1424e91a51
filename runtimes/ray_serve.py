"""Artifacts on Ray Serve: ``serve run intaglio.runtimes.ray_serve:app artifact=ART backend=openvino``, or from YAML.

A replica is what ``intaglio serve`` is: a queue, continuous batching, the same protocols, and a worker process for each
artifact. Ray Serve places replicas, spreads requests over them, adds and removes them, and starts one again that died.
Requests that find every replica full are refused with 429 and ``Retry-After`` by Ray's proxy, those that find one
replica's own queue full by that replica, in the protocol's own words.

Ray speaks pickle between its own processes, and whoever reaches its ports can run code: they belong on a private
network (docs/deploy.md). Nothing here opens a port or unpickles anything itself.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from intaglio.profiles.errors import UsageError
from intaglio.profiles.family import parse_assignments
from intaglio.profiles.registry import need
from intaglio.profiles.sizes import parse_bytes
from intaglio.runtimes import serve_cli
from intaglio.runtimes.ray_asgi import under_ray

NAME = "intaglio"  # of the deployment
RETRY_SECONDS = 2  # which a client is asked to wait where every replica is full
HEALTH_SECONDS = 5.0  # between Ray's looks at a replica
LOAD_SECONDS = 1800.0  # that a replica may take until its artifacts are loaded
# That a worker may take to be started again before the replica is given up: so many times its first start, at least.
PATIENCE, PATIENCE_SECONDS = 3.0, 30.0
ONE_PROCESS = ("batches",)  # protocols whose later requests must reach the replica that took the first one
LOGGER = "intaglio.serve"
FLAGS = ("no_key", "telemetry", "telemetry_prompts")  # that have no value on a command line


class Words(argparse.ArgumentParser):
    """A parser of words that are no command line: it raises where others print and exit."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}; arguments are those of intaglio serve, without --host, --port and --log")


def parser() -> argparse.ArgumentParser:
    """Arguments: those of ``intaglio serve`` but for its socket, and how many replicas of what."""
    words = Words(prog="intaglio on Ray Serve", add_help=False, allow_abbrev=False)
    serve_cli.add_models(words)
    words.add_argument("--api-key-file", help="on every node")
    words.add_argument("--no-key", action="store_true", help="everybody who reaches Ray's proxy may ask")
    words.add_argument("--allowed-host", action="append", default=[], help="a name in Host, or *")
    words.add_argument("--drain", type=float, default=60, help="seconds for what is under way when a replica ends")
    words.add_argument("--telemetry", action="store_true", help="send spans to OTEL_EXPORTER_OTLP_ENDPOINT")
    words.add_argument("--telemetry-prompts", action="store_true", help="with the prompts in them")
    words.add_argument("--replicas", type=int, default=1, help="at least")
    words.add_argument("--max-replicas", type=int, help="at most; as many as --replicas where not given")
    words.add_argument("--num-cpus", type=float, default=1, help="of a replica")
    words.add_argument("--num-gpus", type=float, default=0, help="of a replica; it sees those alone")
    return words


def words_of(given: Mapping[str, Any]) -> list[str]:
    """``key=value`` arguments, or YAML's, as a command line."""
    words: list[str] = []
    for key, value in given.items():
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if key == "artifact":
            words += map(str, values)
            continue
        flag = f"--{key.replace('_', '-')}"
        if key in FLAGS:
            if str(value).lower() not in ("true", "false", "1", "0"):
                raise UsageError(f"{key}={value} is not allowed: true or false")
            words += [flag] * (str(value).lower() in ("true", "1"))
            continue
        for one in values:
            words.append(f"{flag}={one}")
    return words


def read(given: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments, complete.

    Raises:
        UsageError: one is unknown or not allowed; anybody could ask and nobody said so.
    """
    if not given.get("artifact"):
        raise UsageError("artifact=FOLDER is missing; artifact=NAME=FOLDER gives it another name")
    args = parser().parse_args(words_of(given))
    most = args.replicas if args.max_replicas is None else args.max_replicas
    if not 1 <= args.replicas <= most:
        raise UsageError(f"replicas={args.replicas}, max_replicas={most} is not allowed: 1 <= replicas <= max_replicas")
    if args.num_cpus < 0 or args.num_gpus < 0:
        raise UsageError(f"num_cpus={args.num_cpus}, num_gpus={args.num_gpus} is not allowed: 0 or more")
    if not args.api_key_file and not args.no_key:  # where Ray's proxy listens is Ray's to decide
        raise UsageError(
            "everybody who reaches Ray's proxy could ask; add api_key_file=FILE, or no_key=true if they may"
        )
    if not 0 <= args.drain < math.inf:
        raise UsageError(f"drain={args.drain} is not allowed: 0 or more seconds")
    check_as_serve(args)
    args.max_replicas = most
    return args


def check_as_serve(args: argparse.Namespace) -> None:
    """What a replica would find wrong, before Ray makes any and gives its whole traceback.

    Raises:
        UsageError: a value is not allowed, or does nothing on Ray.
    """
    from intaglio.runtimes.serve_limits import Limits

    limits = parse_assignments(args.limit)
    if "connections" in limits:
        raise UsageError("limit=connections=N is not allowed: Ray's proxy holds the connections; limit those before it")
    Limits(limits)
    names = [model.name for model in serve_cli.models_of(args)]
    if len(set(names)) < len(names):
        raise UsageError(f"two artifacts are called {max(names, key=names.count)!r}; name them: NAME=FOLDER")
    if args.memory:
        parse_bytes(args.memory, "--memory")
    if args.telemetry_prompts and not args.telemetry:
        raise UsageError("telemetry_prompts needs telemetry")


def log_requests() -> None:
    """A line a request on stderr, as ``intaglio serve`` has it: Ray gives the loggers of others no handler."""
    logger, handler = logging.getLogger(LOGGER), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(serve_cli.LOG_FORMAT))
    logger.handlers, logger.propagate = [handler], False  # once, whatever Ray does with the root's
    logger.setLevel(logging.INFO)


class Replica:
    """One replica: a hub and its workers, in the process that Ray gives it."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        log_requests()
        self.args = read(given)
        self.hub = serve_cli.hub_of(self.args)
        serve_cli.watch(self.hub, self.args)
        self.loaded = asyncio.Event()
        self.failure: Exception | None = None
        self.start = time.monotonic()
        self.patience = PATIENCE_SECONDS
        self.unready: float | None = None  # since when

    def begun(self, failure: Exception | None) -> None:
        """Artifacts are loaded, or cannot be."""
        self.failure = failure
        self.patience = max(PATIENCE_SECONDS, PATIENCE * (time.monotonic() - self.start))
        self.loaded.set()

    def __serve_build_asgi_app__(self) -> Any:
        """The same application as ``intaglio serve``'s; Ray asks for it after ``__init__`` and runs its lifespan."""
        from intaglio.runtimes.serve_app import make_app
        from intaglio.runtimes.serve_keys import Keys
        from intaglio.runtimes.serve_limits import Limits

        keys, limits = Keys(self.args.api_key_file), Limits(parse_assignments(self.args.limit))
        hosts = serve_cli.hosts_of("localhost", self.args.allowed_host)
        without = ONE_PROCESS if self.args.max_replicas > 1 else ()
        return under_ray(make_app(self.hub, keys=keys, hosts=hosts, limits=limits, begun=self.begun, without=without))

    async def check_health(self) -> None:
        """Ray asks this before a replica gets requests, and again and again; three failures replace the replica.

        Raises:
            ToolError: an artifact cannot be loaded.
            RuntimeError: a worker that died has not come back.
        """
        await asyncio.wait_for(self.loaded.wait(), LOAD_SECONDS)
        if self.failure is not None:
            raise self.failure
        now = time.monotonic()
        self.unready = None if self.hub.ready else self.unready or now
        if self.unready is not None and now - self.unready > self.patience:
            raise RuntimeError(f"a worker that died has not come back for {now - self.unready:.0f} s")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What Ray Serve is told of the deployment."""
    room = args.concurrency + args.queue  # of a replica: what is under way, and what waits there
    found: dict[str, Any] = {
        "name": NAME,
        "max_ongoing_requests": room,
        # Of every proxy. Ray counts those it is about to hand over, too: with fewer it refuses bursts it has room for.
        "max_queued_requests": room * args.max_replicas,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_SECONDS},
        "ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": args.drain,
        "logging_config": {"enable_access_log": False},  # the replica's own log says the same, with our ids
    }
    if args.max_replicas == args.replicas:
        return {**found, "num_replicas": args.replicas}
    scaling = {
        "min_replicas": args.replicas,
        "max_replicas": args.max_replicas,
        "target_ongoing_requests": float(args.concurrency),
    }
    return {**found, "autoscaling_config": scaling}


def refused(line: str) -> Exception:
    """A `UsageError` that is click's, too: ``serve run`` prints those as one line, and of others the traceback."""
    click = need("click", extra="ray")

    class Refused(UsageError, click.ClickException):  # type: ignore[name-defined]
        def __init__(self) -> None:
            click.ClickException.__init__(self, line)

    return Refused()


def app(given: Mapping[str, Any]) -> Any:
    """Ray Serve's application; arguments are ``intaglio serve``'s, ``artifact`` a folder or NAME=FOLDER, or several.

    Raises:
        UsageError: one is unknown or not allowed.
        MissingDependency: Ray is not installed.
    """
    serve = need("ray.serve", extra="ray")
    try:
        args = read(given)
    except UsageError as error:
        raise refused(str(error)) from None
    return serve.deployment(**options(args))(serve.ingress()(Replica)).bind(dict(given))
