"""The command line: a table of verbs, each imported only when it is called."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from typing import NoReturn

from intaglio import __version__
from intaglio.profiles.errors import ToolError, UsageError
from intaglio.profiles.registry import resolve, suggestion

VERBS = {
    "build": ("intaglio.exporters.cli:BUILD", "turn a checkpoint into an artifact"),
    "plan": ("intaglio.exporters.plan_cli:PLAN", "show what a build would do, take and warn of, building nothing"),
    "convert": ("intaglio.exporters.convert:CONVERT", "turn a pickled checkpoint into safetensors, running none of it"),
    "generate": ("intaglio.runtimes.cli:GENERATE", "make pictures from an artifact"),
    "serve": ("intaglio.runtimes.serve_cli:SERVE", "serve artifacts to OpenAI, webui, Hugging Face and Triton clients"),
    "batch": ("intaglio.runtimes.batch_cli:BATCH", "make a file of requests in OpenAI's Batch format; resumable"),
    "export-for": ("intaglio.exporters.interop_cli:EXPORT_FOR", "arrange an artifact as another tool's folder"),
    "bench": ("intaglio.bench.cli:BENCH", "compare speed, memory and fidelity of artifacts and backends"),
    "report": ("intaglio.bench.report_cli:REPORT", "make a report's pages again from its JSON, or a model card"),
    "loadgen": ("intaglio.bench.loadgen_cli:LOADGEN", "measure an artifact in one of MLPerf's scenarios, by LoadGen"),
    "compare": ("intaglio.bench.compare:COMPARE", "compare two reports of bench; exit 1 where something became slower"),
    "inspect": (
        "intaglio.exporters.cli:INSPECT",
        "show what an artifact is: components, formats, sizes, ranges, engines",
    ),
    "quantize-search": (
        "intaglio.bench.search:QUANTIZE_SEARCH",
        "find the cheapest format of every layer whose picture stays within a budget",
    ),
    "verify": (
        "intaglio.runtimes.verify:VERIFY",
        "check an artifact: every file by its digest, its signature, its pictures by making them",
    ),
    "sign": ("intaglio.profiles.cli:SIGN", "sign an artifact with a key, in OpenSSF's model-signing format"),
    "cache": ("intaglio.exporters.cache_cli:CACHE", "list, shrink or check what builds keep to be taken again"),
    "doctor": ("intaglio.profiles.cli:DOCTOR", "show what is installed and what is wrong with it"),
    "demo": ("intaglio.bench.demo:DEMO", "build the embedded model, run it on every backend, write a report"),
}

# What the file system refuses is the user's to solve; any other OSError is a defect of ours.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG)


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as our one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UsageError: always.
        """
        text = f"{message}; run: {self.prog} --help"
        raise UsageError(text)


def usage() -> str:
    """The text of ``intaglio --help``."""
    lines = [f"intaglio {__version__}: one diffusion checkpoint, one artifact, the same picture on every backend.", ""]
    lines += ["usage: intaglio VERB [ARGUMENTS]", ""]
    lines += [f"  {name:<15} {text}" for name, (_, text) in VERBS.items()]
    return "\n".join([*lines, "", "intaglio VERB --help shows the arguments of a verb."])


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, or 2 for an error the user can solve."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0]
    if name not in VERBS:
        print(
            f"intaglio: unknown verb {name!r}; allowed: {', '.join(VERBS)}.{suggestion(name, VERBS)}", file=sys.stderr
        )
        return 2
    path, text = VERBS[name]
    # A terminated build cleans up like an interrupted one.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        verb = resolve(path)
        parser = Parser(prog=f"intaglio {name}", description=text, allow_abbrev=False)
        verb.configure(parser)
        return int(verb.run(parser.parse_args(arguments[1:])))
    except ToolError as error:
        print(f"intaglio: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno not in REFUSALS:
            raise
        print(f"intaglio: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("intaglio: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
