"""Long checks: ``make evidence [NAME]`` runs them and keeps their figures in ``bench/results/evidence/NAME.json``.

Each file holds the commit, the command, the machine class, the digests of the sources it speaks of, and the figures. It
is stale when one of those sources changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.exporters.component import FAMILIES
from intaglio.profiles.errors import ToolError
from intaglio.profiles.registry import pick, resolve

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("bench/results/evidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A long check: the function that measures (``"module:name"``), and glob patterns of the files it speaks of."""

    run: str
    sources: tuple[str, ...]
    about: str


LOOP = ("runtimes/sd.py", "runtimes/loop.py", "runtimes/schedule*.py", "runtimes/noise.py", "runtimes/text.py")
FAMILY_SOURCES = (
    *(f"{room}/{name}*.py" for name in FAMILIES for room in ("exporters", "runtimes")),
    *("exporters/parts.py", "exporters/passes.py", "runtimes/loop.py", "runtimes/scheduler_flow_match_euler.py"),
    *("tests/tiny*.py", "tests/cases.py", "tests/families.py"),
)
LARGE_SOURCES = (
    *(f"exporters/{n}.py" for n in ("capture", "repeat", "store", "streamed", "parity", "mapped_tensors")),
    *(f"quantize/{n}.py" for n in ("int4", "int8", "arrays", "tensors", "segments", "decode")),
)
SERVE_SOURCES = (
    *(f"runtimes/{n}.py" for n in ("batching", "evaluation", "embedding_cache", "picture_files", "serve_admission")),
    *(f"runtimes/serve_{n}.py" for n in ("app", "body", "connection", "faults", "guard", "hub", "keys", "memory")),
    *(f"runtimes/serve_{n}.py" for n in ("model", "openai", "pace", "process", "queue", "reader", "room", "swap")),
    *(f"runtimes/serve_{n}.py" for n in ("ticket", "wire", "worker")),
    *("bench/evidence_serve.py", "bench/serve_load.py"),
)
CHECKS = {
    "emoji": Check(
        run="intaglio.bench.evidence_emoji:measure",
        sources=("profiles/emoji/**/*.safetensors", "profiles/emoji/names.json", "bench/retrieval.py"),
        about="retrieval of 200 names in English and in Chinese from the embedded checkpoint",
    ),
    "families": Check(
        run="intaglio.bench.evidence_families:measure",
        sources=FAMILY_SOURCES,
        about="every case of every family against diffusers: components, latents, decode, picture; TensorRT plans",
    ),
    "pictures": Check(
        run="intaglio.bench.evidence_pictures:measure",
        sources=("profiles/emoji/**/*.safetensors", *LOOP, "exporters/passes.py", "quantize/int8.py"),
        about="PSNR against diffusers: every scheduler, two sizes, English and Chinese, each backend and format",
    ),
    "large": Check(
        run="intaglio.bench.evidence_large:measure",
        sources=LARGE_SOURCES,
        about="FLUX.1-dev's transformer in int4 for ONNX Runtime and OpenVINO, built in 2 GiB (takes 40 GB of disk)",
    ),
    "larger": Check(
        run="intaglio.bench.evidence_large:measure_larger",
        sources=LARGE_SOURCES,
        about="Qwen-Image's transformer in int4 for ONNX Runtime, built in 2 GiB (takes 54 GB of disk)",
    ),
    "formats": Check(
        run="intaglio.bench.evidence_formats:measure",
        sources=(
            *("quantize/*.py", "exporters/lower_o*.py", "exporters/onnxruntime_*.py"),
            *("exporters/openvino_passes.py", "runtimes/engine_o*.py", "profiles/family.sd.toml"),
            "profiles/emoji/**/*.safetensors",
        ),
        about="every number format on every CPU backend: size, seconds, memory, fidelity, retrieval, coverage",
    ),
    "exceptions": Check(
        run="intaglio.bench.evidence_exceptions:measure",
        sources=(
            "quantize/*.py",
            "profiles/family.sd.toml",
            "profiles/emoji/**/*.safetensors",
            "bench/evidence_exc*.py",
        ),
        about="what each layer that stays high buys in dB of the picture, on the embedded checkpoint",
    ),
    "mmdit": Check(
        run="intaglio.bench.evidence_mmdit:measure",
        sources=(
            *("quantize/*.py", "exporters/lower_o*.py", "exporters/onnxruntime_*.py"),
            *(
                "exporters/openvino_passes.py",
                "runtimes/engine_o*.py",
                "profiles/family.sd3.toml",
                "bench/evidence_mmdit.py",
            ),
        ),
        about="formats on a random MMDiT of 330 M parameters: speed of torch and of fp32, memory, error",
    ),
    "rot": Check(
        run="intaglio.bench.evidence_rot:measure",
        sources=(
            *("profiles/artifact.py", "profiles/staging.py", "profiles/verified.py"),
            *("exporters/resume.py", "exporters/build.py"),
        ),
        about="builds killed at every change of the file system, and resumed; artifacts replaced in use; verification",
    ),
    "faults": Check(
        run="intaglio.bench.evidence_faults:measure",
        sources=(
            *(f"bench/{n}.py" for n in ("faults", "evidence_faults", "fidelity", "watching", "metrics", "run")),
            *("profiles/certificate.toml", "runtimes/loop.py", "runtimes/sd.py"),
        ),
        about="faults that exports have had, put in on purpose: all found at default limits, none in sound runs",
    ),
    "crosscheck": Check(
        run="intaglio.bench.evidence_crosscheck:measure",
        sources=(
            *(f"bench/{n}.py" for n in ("evidence_crosscheck", "benchmark_app", "plain_onnxruntime", "worker")),
            *("bench/formats_cells.py", "runtimes/engine.py", "runtimes/engine_o*.py"),
            "profiles/emoji/**/*.safetensors",
        ),
        about="the denoiser's seconds by our worker, by OpenVINO's benchmark_app and by a bare ONNX Runtime loop",
    ),
    "nncf": Check(
        run="intaglio.bench.evidence_nncf:measure",
        sources=(
            *("bench/evidence_nncf.py", "bench/peer_nncf.py", "bench/formats_cells.py", "bench/evidence_formats.py"),
            *("quantize/*.py", "exporters/lower_openvino.py", "exporters/openvino_passes.py"),
            *("runtimes/engine_openvino.py", "profiles/family.sd.toml", "profiles/emoji/**/*.safetensors"),
        ),
        about="NNCF's int8 and int4 beside ours at the same layers of the same graph: size, seconds, error, fidelity",
    ),
    "ray": Check(
        run="intaglio.bench.evidence_ray:measure",
        sources=("runtimes/ray_*.py", "bench/evidence_ray.py", "runtimes/batch*.py", "runtimes/serve_hub.py"),
        about="Ray: two replicas under load, one of them killed; a batch that equals the one made without Ray",
    ),
    "serve": Check(
        run="intaglio.bench.evidence_serve:measure",
        sources=SERVE_SOURCES,
        about="ten times the server's capacity for a minute: deadlines, statuses, memory",
    ),
    "serve_soak": Check(
        run="intaglio.bench.evidence_serve:measure_soak",
        sources=SERVE_SOURCES,
        about="a thousand pictures among wrong requests and clients that hang up: memory, descriptors, threads",
    ),
    "serve_fuzz": Check(
        run="intaglio.bench.evidence_serve:measure_fuzz",
        sources=("runtimes/serve_*.py", "bench/evidence_serve.py"),
        about="schemathesis with all of its checks, ten thousand cases: no 5xx",
    ),
    "serve_speed": Check(
        run="intaglio.bench.evidence_serve_speed:measure",
        sources=(*SERVE_SOURCES, "bench/evidence_serve_speed.py", "runtimes/loop.py", "runtimes/engine_o*.py"),
        about="a served picture over a bare loop's; pictures a second by clients, with shared calls and without",
    ),
    "serve_clients": Check(
        run="intaglio.bench.evidence_serve_clients:measure",
        sources=(*SERVE_SOURCES, "bench/evidence_serve_clients.py", "bench/loadgen*.py"),
        about="LoadGen's server scenario through HTTP, and AIPerf: validity, errors, rates beside our own client's",
    ),
    "fresh_clone": Check(
        run="intaglio.bench.evidence_fresh_clone:measure",
        sources=("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"),
        about="git clone, make demo and make test in a new folder with a new environment, in minutes",
    ),
}


def source_digest(check: Check, root: Path = ROOT) -> str:
    """sha256 over the names and contents of a check's sources."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in check.sources for p in root.glob(pattern) if p.is_file()}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def status(root: Path = ROOT) -> dict[str, str]:
    """``fresh``, ``stale`` or ``missing`` per check."""
    states = {}
    for name, check in CHECKS.items():
        file = root / FOLDER / f"{name}.json"
        if not file.exists():
            states[name] = "missing"
            continue
        recorded = json.loads(file.read_text())["sources_sha256"]
        states[name] = "fresh" if recorded == source_digest(check, root) else "stale"
    return states


def machine_class() -> dict[str, Any]:
    """What the figures were measured on, without names."""
    from intaglio.bench.machine import fingerprint

    return fingerprint()


def record(name: str) -> Path:
    """Run one check and write its file."""
    check = pick(CHECKS, name, "check")
    measure: Callable[[], dict[str, Any]] = resolve(check.run)
    digest = source_digest(check)
    figures = measure()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    facts = {
        "name": name,
        "about": check.about,
        "command": f"make evidence {name}",
        "commit": commit.stdout.strip() or None,
        "machine": machine_class(),
        "sources_sha256": digest,
        "figures": figures,
    }
    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.json"
    temporary.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / f"{name}.json")
    return folder / f"{name}.json"


def main(argv: list[str] | None = None) -> int:
    """``python -m intaglio.bench.evidence [NAME…]``; without a name, those that are missing or stale."""
    parser = argparse.ArgumentParser(prog="intaglio.bench.evidence", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(CHECKS))
    parser.add_argument("--status", action="store_true", help="only say which are fresh, stale or missing")
    args = parser.parse_args(argv)
    states = status()
    if args.status:
        print("\n".join(f"{name:<12} {state}" for name, state in states.items()))
        return 0
    try:
        for name in args.names or [n for n, state in states.items() if state != "fresh"]:
            print(record(name))
    except ToolError as error:
        print(f"intaglio: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
