"""The verb ``serve``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import UsageError
from intaglio.profiles.family import parse_assignments
from intaglio.profiles.registry import need
from intaglio.profiles.sizes import parse_bytes
from intaglio.runtimes.cli import split_settings

if TYPE_CHECKING:
    from intaglio.runtimes.serve_guard import Guard
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_model import ModelSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEEP_ALIVE = 15  # seconds an idle connection stays open
REQUEST_LINE = 4096  # bytes
GOODBYE = 5  # seconds for the answers to what was given up at the end
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio serve``."""
    add_models(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--api-key-file", metavar="FILE", help="a key a line, or NAME:KEY; each client needs one")
    parser.add_argument("--no-key", action="store_true", help="serve others than this machine without a key")
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a name in Host beside --host's; repeatable"
    )
    parser.add_argument("--drain", type=float, default=60, metavar="S", help="seconds for what is under way at the end")
    parser.add_argument("--telemetry", action="store_true", help="send spans to OTEL_EXPORTER_OTLP_ENDPOINT")
    parser.add_argument("--telemetry-prompts", action="store_true", help="with the prompts in them")
    parser.add_argument("--log", default="info", choices=("debug", "info", "warning", "error"))


def add_models(parser: argparse.ArgumentParser) -> None:
    """What the server and batches have in common: artifacts, how they run, and how much may be asked."""
    parser.add_argument("artifact", nargs="+", metavar="[NAME=]ARTIFACT", help="the first one is the default model")
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime, openvino, tensorrt or torch")
    parser.add_argument("--device", default="cpu", help="the backend's name: cpu, cuda:0, GPU, NPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the backend's choice")
    parser.add_argument("--checkpoint", default="", help="for --backend torch: where the checkpoint lies")
    parser.add_argument("--concurrency", type=int, default=4, metavar="N", help="pictures at once, of an artifact")
    parser.add_argument("--rows", type=int, metavar="N", help="of one denoiser call; the largest batch")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="pictures that may wait")
    parser.add_argument("--deadline", type=float, default=300, metavar="S", help="seconds from arrival to the picture")
    parser.add_argument("--watchdog", type=float, default=300, metavar="S", help="seconds a worker may say nothing")
    parser.add_argument(
        "--memory", metavar="SIZE", help="all workers together, for example 8GiB; the least recently used is unloaded"
    )
    parser.add_argument("--cache", default="512MiB", metavar="SIZE", help="of prompt embeddings, an artifact")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=N", help="pixels, steps, pictures, …")
    parser.add_argument("--set", action="append", default=[], metavar="BACKEND.KEY=VALUE")


def models_of(args: argparse.Namespace) -> list[ModelSettings]:
    """The artifacts of the command line.

    Raises:
        UsageError: a name or number that is not allowed.
    """
    from intaglio.runtimes.serve_model import ModelSettings

    settings, others = split_settings(args.backend, args.set)
    if others:
        raise UsageError(f"--set {next(iter(others))} is a request's, not the server's; allowed: {args.backend}.KEY")
    for name in ("concurrency", "queue", "deadline", "watchdog"):
        if not 0 < getattr(args, name) < math.inf:
            raise UsageError(f"--{name} {getattr(args, name)} is not allowed: above 0")
    found = []
    for text in args.artifact:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        chosen = name if equals else path.resolve().name
        if not chosen or not chosen.isprintable() or "/" in chosen:
            raise UsageError(f"{chosen!r} is no name for a model; write NAME={path}")
        found.append(
            ModelSettings(
                name=chosen, folder=path.absolute(), backend=args.backend, device=args.device, threads=args.threads,
                checkpoint=args.checkpoint, settings=settings, concurrency=args.concurrency, rows=args.rows,
                cache_bytes=parse_bytes(args.cache, "--cache"), watchdog=args.watchdog,
            )
        )  # fmt: skip
    return found


def hub_of(args: argparse.Namespace) -> Hub:
    """The hub of the command line."""
    from intaglio.runtimes.serve_hub import Hub, HubSettings

    memory = parse_bytes(args.memory, "--memory") if args.memory else 0
    return Hub(models_of(args), HubSettings(queue=args.queue, deadline=args.deadline, memory=memory))


def watch(hub: Hub, args: argparse.Namespace) -> None:
    """Send spans, where that is asked for.

    Raises:
        UsageError: prompts without spans, or nowhere to send them to.
    """
    if args.telemetry_prompts and not args.telemetry:
        raise UsageError("--telemetry-prompts needs --telemetry")
    if args.telemetry:
        from intaglio.runtimes.serve_traces import trace

        trace(hub, prompts=args.telemetry_prompts)


def hosts_of(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """The names that ``Host`` may have."""
    from intaglio.runtimes.serve_guard import LOCAL

    shown = f"[{host}]" if ":" in host else host
    return (*LOCAL, shown, *allowed)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UsageError: an option that is not allowed; other machines could ask without a key.
    """
    need("fastapi", extra="serve")
    uvicorn = need("uvicorn", extra="serve")
    from intaglio.runtimes.serve_app import make_app
    from intaglio.runtimes.serve_connection import connection_class
    from intaglio.runtimes.serve_keys import Keys
    from intaglio.runtimes.serve_limits import Limits

    if not 0 <= args.drain < math.inf:
        raise UsageError(f"--drain {args.drain} is not allowed: 0 or more seconds")
    keys, limits = Keys(args.api_key_file), Limits(parse_assignments(args.limit))
    if args.host not in LOOPBACK and not keys and not args.no_key:
        raise UsageError(
            f"--host {args.host} lets other machines ask; add --api-key-file FILE, or --no-key if everybody may"
        )
    logging.basicConfig(level=args.log.upper(), stream=sys.stderr, format=LOG_FORMAT)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)  # who is served when is ours to say
    hub = hub_of(args)
    process = Announced(hub, args.drain)
    watch(hub, args)
    app = make_app(hub, keys=keys, hosts=hosts_of(args.host, args.allowed_host), limits=limits, begun=process.begun)
    config = uvicorn.Config(
        app, host=args.host, port=args.port, log_config=None, access_log=False, server_header=False, lifespan="on",
        h11_max_incomplete_event_size=limits["header_bytes"] + REQUEST_LINE, timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(args.drain) + GOODBYE, ws="none", loop="asyncio",
        http=connection_class(limits, app.first_error),  # h11, not what happens to be installed: it bounds headers
        proxy_headers=False,  # a client could call itself another one
    )  # fmt: skip
    return process.serve(config, app)


class Announced:
    """uvicorn's server, which says where it serves as soon as it does, and why it cannot."""

    def __init__(self, hub: Hub, drain: float) -> None:
        self.hub, self.drain = hub, drain
        self.server: Any = None
        self.failure: Exception | None = None

    def serve(self, config: Any, app: Guard) -> int:
        """Until SIGTERM or Ctrl-C, after what is under way then; 1 where it cannot listen.

        Raises:
            ToolError: an artifact cannot be loaded.
        """
        uvicorn, hub, drain = need("uvicorn", extra="serve"), self.hub, self.drain

        class Server(uvicorn.Server):  # type: ignore[name-defined]
            def handle_exit(self, sig: int, frame: Any) -> None:
                hub.draining = True  # ``/ready`` says no, to those that still are connected
                super().handle_exit(sig, frame)

            async def shutdown(self, sockets: Any = None) -> None:
                asyncio.get_running_loop().call_later(drain, hub.fail_all)  # an answer, not a broken connection
                await super().shutdown(sockets)

        self.server = server = Server(config)
        app.connections = lambda: len(server.server_state.connections)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended well
            self.server.run()
        if self.failure is not None:
            raise self.failure
        return 0 if self.server.started else 1

    def begun(self, failure: Exception | None) -> None:
        """Workers are loaded, or cannot be."""
        self.failure = failure
        if failure is not None:
            self.server.should_exit = True
            return
        if not self.server.started:  # it does not listen yet
            asyncio.get_running_loop().call_later(0.01, self.begun, None)
            return
        for server in self.server.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                say(f"intaglio serves {', '.join(self.hub.models)} on http://{shown}:{port}")


SERVE = Verb(configure, run)
