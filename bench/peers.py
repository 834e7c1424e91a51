"""Other tools that the benchmark measures beside us, each in a virtual environment of its own, pinned.

``python -m intaglio.bench.peers list | make NAME... | prepare NAME... --checkpoint DIR``. A worker runs with the
environment's interpreter (`python_of`) and the peer's loader; `intaglio.bench.peer_table` says what each is told.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import intaglio
from intaglio.bench.peer_table import ENVIRONMENTS as ENVIRONMENTS
from intaglio.bench.peer_table import EXPORTS as EXPORTS
from intaglio.bench.peer_table import PEERS as PEERS
from intaglio.bench.peer_table import TORCH as TORCH
from intaglio.profiles.cache import cache_folder
from intaglio.profiles.errors import ToolError, UsageError
from intaglio.profiles.registry import pick, resolve
from intaglio.profiles.staging import writing

RECORD, PREPARED = "peer.json", "prepared.json"
EXPORT_VERSION = 2  # of how exports are made; raised whenever that changes, so that no older one is taken for it
COMMAND = "python -m intaglio.bench.peers"
Run = Callable[[Sequence[str]], str]


def place_of(environment: str, into: Path | None = None) -> Path:
    """Where an environment lies."""
    return (into or cache_folder() / "peers") / environment


def execute(command: Sequence[str]) -> str:
    """Run a command; returns its stdout.

    Raises:
        ToolError: it failed; with its last line.
    """
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ToolError(f"{' '.join(command[:4])} … failed ({done.returncode}): {lines[-1] if lines else 'no message'}")
    return done.stdout


def make(name: str, into: Path | None = None, *, run: Run = execute) -> Path:
    """Make the environment of a peer, whole or not at all; one that is there and of this table is left alone.

    Raises:
        UsageError: there is no such peer, or something else lies there.
        ToolError: a command failed.
    """
    environment = pick(PEERS, name, "peer").environment
    if not environment:
        raise UsageError(f"{name} runs in this interpreter; run: pip install 'intaglio[export]'")
    row, target = ENVIRONMENTS[environment], place_of(environment, into)
    if _made_of(target) == list(row.requirements):
        return target
    if target.exists():
        raise UsageError(f"{target} is not {name} of this version; remove it, then run: {COMMAND} make {name}")
    with writing(target) as folder:
        # Scripts in bin name the folder they were made in; only bin/python is used, which does not.
        run([sys.executable, "-m", "venv", str(folder)])
        python, constraints = str(folder / "bin/python"), folder / "constraints.txt"
        constraints.write_text("".join(f"{line}\n" for line in dict.fromkeys((TORCH, *row.requirements))))
        run([python, "-m", "pip", "install", "-q", "-c", str(constraints), *row.requirements])
        if row.without:
            run([python, "-m", "pip", "uninstall", "-q", "-y", *row.without])
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "intaglio").symlink_to(Path(intaglio.__file__).resolve().parent)
        run([python, "-c", f"import {', '.join(('intaglio.bench.worker', *row.modules))}"])
        frozen = run([python, "-m", "pip", "freeze"]).splitlines()
        record = {"requirements": list(row.requirements), "installed": frozen}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return target


def _made_of(folder: Path) -> list[str] | None:
    try:
        return list(json.loads((folder / RECORD).read_text(encoding="utf-8"))["requirements"])
    except (OSError, ValueError, KeyError):
        return None


def python_of(name: str, into: Path | None = None) -> str:
    """The interpreter of a peer.

    Raises:
        UsageError: it is not there, or of other versions; with the command that makes it.
    """
    environment = pick(PEERS, name, "peer").environment
    if not environment:
        return sys.executable
    folder = place_of(environment, into)
    found = _made_of(folder)
    if found is None or not (folder / "bin/python").exists():
        raise UsageError(f"the peer {name} is not installed; run: {COMMAND} make {name}")
    if found != list(ENVIRONMENTS[environment].requirements):
        raise UsageError(f"{folder} has other versions than {name}; remove it, then run: {COMMAND} make {name}")
    return str(folder / "bin/python")


def export_folder(name: str, checkpoint: Path, into: Path | None = None) -> Path:
    """Where what a peer's tool makes of a checkpoint lies; another one where a file of the checkpoint changes."""
    row = pick(PEERS, name, "peer")
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    facts = [(p.relative_to(checkpoint).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    pins = ENVIRONMENTS[EXPORTS[row.export].environment].requirements
    key = hashlib.sha256(json.dumps([EXPORT_VERSION, str(checkpoint.resolve()), facts, pins]).encode()).hexdigest()[:16]
    return (into or cache_folder() / "peer-exports") / f"{row.export}-{key}"


def prepare(name: str, checkpoint: Path, into: Path | None = None, *, run: Run = execute) -> dict[str, Any]:
    """Let a peer's tool export a checkpoint, once; returns its folder, and the seconds and bytes it took.

    Raises:
        UsageError: the environment that exports is not installed.
        ToolError: the export failed.
    """
    export = pick(PEERS, name, "peer").export
    if not export:
        return {"folder": str(checkpoint), "seconds": 0.0, "bytes": 0}
    folder = export_folder(name, checkpoint, into)
    if not (folder / PREPARED).exists():
        maker = next(n for n, p in PEERS.items() if p.environment == EXPORTS[export].environment)
        run([python_of(maker), "-m", "intaglio.bench.peers", "export", export, str(checkpoint), str(folder)])
    return {"folder": str(folder), **json.loads((folder / PREPARED).read_text(encoding="utf-8"))}


def export(name: str, checkpoint: Path, folder: Path) -> None:
    """The same in the environment that exports; `folder` appears whole or not at all."""
    row = pick(EXPORTS, name, "export")
    start = time.perf_counter()
    with writing(folder) as content:
        facts = resolve(row.function)(checkpoint, content, **row.options)
        size = sum(p.stat().st_size for p in content.rglob("*") if p.is_file())
        record = {"export": name, "seconds": round(time.perf_counter() - start, 3), "bytes": size, **facts}
        (content / PREPARED).write_text(json.dumps(record) + "\n", encoding="utf-8")


def listing(into: Path | None = None) -> list[str]:
    """One line a peer: whether it is there, and what it is told."""
    lines = []
    for name, peer in PEERS.items():
        try:
            state = python_of(name, into)
        except UsageError as error:
            state = str(error)
        lines.append(f"{name}: {state}\n    {', '.join(peer.families)}; {peer.note}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("list", "make", "prepare"):
        sub = verbs.add_parser(verb)
        if verb != "list":
            sub.add_argument("names", nargs="+", metavar="NAME")
        if verb == "prepare":
            sub.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
        sub.add_argument("--into", type=Path, metavar="DIR", help="default: this user's cache")
    sub = verbs.add_parser("export")  # what `prepare` runs in the environment that exports
    sub.add_argument("names", nargs=1)
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    try:
        for name in getattr(args, "names", ()):
            if args.verb == "make":
                print(make(name, args.into))
            elif args.verb == "prepare":
                print(json.dumps({"peer": name, **prepare(name, args.checkpoint, args.into)}))
            else:
                export(name, args.checkpoint, args.folder)
        if args.verb == "list":
            print("\n".join(listing(args.into)))
    except ToolError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
