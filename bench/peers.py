"""Other tools that the benchmark measures beside us, each in a virtual environment of its own, pinned.

``python -m intaglio.bench.peers list | make NAME... | prepare NAME... --checkpoint DIR``. A worker runs with the
environment's interpreter (`python_of`) and the peer's loader; `PEERS` says what each is told and what it cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import intaglio
from intaglio.profiles.cache import cache_folder
from intaglio.profiles.errors import ToolError, UsageError
from intaglio.profiles.registry import pick, resolve
from intaglio.profiles.staging import writing

RECORD, PREPARED = "peer.json", "prepared.json"
EXPORT_VERSION = 2  # of how exports are made; raised whenever that changes, so that no older one is taken for it
COMMAND = "python -m intaglio.bench.peers"
TORCH = "torch==2.13.0"  # a constraint of every environment: a plain newer torch brings gigabytes of CUDA
Run = Callable[[Sequence[str]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One row of ENVIRONMENTS: what is installed, what is taken away again, and what must then import."""

    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


ENVIRONMENTS: Mapping[str, Environment] = {
    "optimum-intel": Environment(
        requirements=(
            *("optimum-intel==2.2.0", "optimum==2.3.0", "nncf==3.4.0", "openvino==2026.4.1"),
            *("openvino-tokenizers==2026.4.1.0", "diffusers==0.39.0", "transformers==5.5.4", "sentencepiece==0.2.3"),
            *(TORCH, "numpy==2.4.6", "pillow==13.0.0", "safetensors==0.8.0"),
        ),
        without=("torchvision",),  # PyPI's is built for another torch than a CPU's, and importing it fails
        modules=("optimum.intel", "openvino_tokenizers", "nncf"),
    ),
    "openvino-genai": Environment(
        requirements=(
            *("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"),
            *("numpy==2.4.6", "pillow==13.0.0"),
        ),
        modules=("openvino_genai",),
    ),
    "optimum-onnx": Environment(
        requirements=(
            *("optimum-onnx==0.1.0", "optimum==2.1.0", "onnxruntime==1.31.1", "onnx==1.23.2", "diffusers==0.39.0"),
            *("transformers==4.57.6", "sentencepiece==0.2.3", TORCH, "numpy==2.4.6", "pillow==13.0.0"),
        ),
        modules=("optimum.onnxruntime",),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One row of EXPORTS: what a tool must make of a checkpoint before it loads it, in an environment."""

    environment: str
    function: str
    options: Mapping[str, str] = field(default_factory=dict)


INTEL = "intaglio.bench.peer_optimum_intel:prepare"
EXPORTS: Mapping[str, Export] = {
    "openvino-fp32": Export(environment="optimum-intel", function=INTEL, options={"weights": "fp32"}),
    "openvino-int8": Export(environment="optimum-intel", function=INTEL, options={"weights": "int8"}),
    "openvino-int4": Export(environment="optimum-intel", function=INTEL, options={"weights": "int4"}),
    "onnx-fp32": Export(environment="optimum-onnx", function="intaglio.bench.peer_optimum_onnx:prepare"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One row of PEERS.

    Attributes:
        loader: of `intaglio.bench.cases.Case`; the peer's name is its backend.
        environment: of ENVIRONMENTS; empty for this interpreter.
        export: of EXPORTS; empty where the tool loads the checkpoint.
        families: those that were tried.
        options: what tells this row from others of the same loader.
        note: for the report: precision, caches, what the tool cannot be told.
    """

    loader: str
    environment: str
    families: tuple[str, ...]
    note: str
    export: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


FAMILIES = ("sd", "sdxl", "sd3", "flux")
OPENVINO = "float32 asked for (INFERENCE_PRECISION_HINT), one stream, no compilation cache"
NNCF = f"{OPENVINO}; weights by NNCF without data, activations as OpenVINO's defaults quantize them"
GENAI = (
    f"{OPENVINO}; what it computes in cannot be asked; pixels are cut, not rounded, to bytes (51 dB by itself); other "
    "pictures by its own arithmetic for SDXL unless square, FLUX.1-dev, and prompts that are cut off"
)
PEERS: Mapping[str, Peer] = {
    "diffusers": Peer(
        loader="intaglio.bench.peer_diffusers:load",
        environment="",
        families=FAMILIES,
        note="eager, float32, no cache; a safety checker is left out",
    ),
    "diffusers-compile": Peer(
        loader="intaglio.bench.peer_diffusers:load",
        environment="",
        families=FAMILIES,
        options={"compile": "true"},
        note="torch.compile of the denoiser and the VAE's decoder, float32; compiles within the first picture of a "
        "size, or takes what an earlier process left in inductor's cache",
    ),
    "optimum-intel": Peer(
        loader="intaglio.bench.peer_optimum_intel:load",
        environment="optimum-intel",
        families=FAMILIES,
        export="openvino-fp32",
        note=f"{OPENVINO}, checked after compilation; exported without weight compression",
    ),
    "optimum-intel-int8": Peer(
        loader="intaglio.bench.peer_optimum_intel:load",
        environment="optimum-intel",
        families=FAMILIES,
        export="openvino-int8",
        note=NNCF,
    ),
    "optimum-intel-int4": Peer(
        loader="intaglio.bench.peer_optimum_intel:load",
        environment="optimum-intel",
        families=FAMILIES,
        export="openvino-int4",
        note=f"{NNCF}; matrices in 4 bits, convolutions in 8",
    ),
    "openvino-genai": Peer(
        loader="intaglio.bench.peer_openvino_genai:load",
        environment="openvino-genai",
        families=FAMILIES,
        export="openvino-fp32",
        note=f"{GENAI}; TaylorSeer, which it switches on for SD3 and FLUX, is off",
    ),
    "openvino-genai-taylorseer": Peer(
        loader="intaglio.bench.peer_openvino_genai:load",
        environment="openvino-genai",
        families=("sd3", "flux"),
        export="openvino-fp32",
        options={"taylorseer": "true"},
        note=f"{GENAI}; TaylorSeer, by its defaults, predicts some steps of longer runs instead of computing them",
    ),
    "optimum-onnx": Peer(
        loader="intaglio.bench.peer_optimum_onnx:load",
        environment="optimum-onnx",
        families=FAMILIES,
        export="onnx-fp32",
        note="ONNX Runtime, float32, all graph optimizations; exported without slimming",
    ),
}


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
