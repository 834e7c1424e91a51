"""Artifacts that cannot rot: builds killed at every change of the file system, resumed, replaced, verified.

Builds are of a tiny random checkpoint, in children of a process that has imported everything (``tests/rot.py``).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from intaglio.bench.evidence import ROOT
from intaglio.profiles.artifact import BUILD_LOG, SUMS, Artifact, read_sums, seal, whole
from intaglio.profiles.errors import ToolError
from intaglio.profiles.manifest import MANIFEST, read_manifest
from intaglio.profiles.verified import record_file
from intaglio.runtimes.engine import EngineOptions
from intaglio.runtimes.pipeline import Pipeline

TARGETS = ["onnx", "openvino"]
COMPONENT = "text_encoder"  # the fastest to build
COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
RANDOM_KILLS = 60  # at random times, besides one at every change of the file system
GENERATIONS, REPLACEMENTS = 1000, 20
LARGE_BYTES, ROUNDS = 200_000_000, 7
PROMPT = "a red heart"
REQUEST: dict[str, Any] = {"num_inference_steps": 1, "width": 64, "height": 64, "seed": 3}
# Replaces an artifact by one, then the other, of two: a line on stdin each time, with the seconds to wait before.
REPLACER = """
import itertools, shutil, sys, time
from pathlib import Path
from intaglio.profiles.staging import CONTENT, claim
target, *sources = map(Path, sys.argv[1:])
for line, source in zip(sys.stdin, itertools.cycle(sources)):
    time.sleep(float(line))
    with claim(target, force=True) as held:
        shutil.copytree(source, held.start() / CONTENT, dirs_exist_ok=True)
    print("replaced", flush=True)
"""


def measure() -> dict[str, Any]:
    """Kills and their outcomes, resumed builds, generations under replacement, and the cost of verification."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny, rot = importlib.import_module("tiny"), importlib.import_module("rot")
    with tempfile.TemporaryDirectory() as name, own_cache(Path(name) / "cache"):
        folder = Path(name)
        checkpoint = tiny.stable_diffusion(folder / "checkpoint")
        with contextlib.closing(rot.Nursery(checkpoint, COMPONENT)) as nursery:
            kills = killed_builds(nursery, folder / "kills")
        with contextlib.closing(rot.Nursery(checkpoint, *COMPONENTS)) as nursery:
            resumed = resumed_builds(nursery, folder / "resumed")
            pair = [folder / "pair" / name for name in ("a", "b")]
            for place, quant in zip(pair, ({}, {"*": "int8"}), strict=True):
                built(nursery, place, targets=["onnx"], quant=quant)
        return {
            "kills": kills,
            "resumed": resumed,
            "hot_swap": hot_swap(pair[0], pair[1], folder / "swap"),
            "verification": verification(pair[0], folder / "large"),
        }


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Graphs, verified files and known checkpoints of these builds are nobody else's."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def built(nursery: Any, target: Path, **options: Any) -> Any:
    """An undisturbed build, or one that ends what was killed.

    Raises:
        RuntimeError: it failed.
    """
    target.parent.mkdir(exist_ok=True)
    done = nursery.build(target, **{"targets": TARGETS, **options})
    if done.code != 0:
        raise RuntimeError(f"a build of {target} ended with {done.code}: {done.error}")
    return done


def digest(target: Path) -> str:
    """The manifest digest of a verified artifact."""
    artifact = Artifact.open(target, verify=False)
    artifact.verify()
    return artifact.manifest.digest


def killed_builds(nursery: Any, folder: Path) -> dict[str, Any]:
    """Kill builds at every change of the file system and at random times, with and without an artifact to replace."""
    built(nursery, folder / "old", targets=["onnx"])
    built(nursery, folder / "new")
    names = {digest(folder / "old"): "old", digest(folder / "new"): "complete"}
    plans: list[tuple[bool, dict[str, float]]] = []
    for replacing in (False, True):
        target = fresh(folder / "work", folder / "old" if replacing else None)
        done = built(nursery, target, force=True)
        plans += [(replacing, {"at": k + 1}) for k in range(done.points)]
        rng = random.Random(replacing)
        plans += [(replacing, {"after": rng.uniform(0, done.seconds)}) for _ in range(RANDOM_KILLS // 2)]
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in ("at", "after")}
    wrong, resumed = [], 0
    for replacing, plan in track(plans, "kills", console=Console(stderr=True)):
        target = fresh(folder / "work", folder / "old" if replacing else None)
        died = nursery.build(target, targets=TARGETS, force=True, **plan)
        state = state_of(target, names)
        counts[next(iter(plan))][f"{state}, {'killed' if died.code < 0 else 'was over'}"] += 1
        after = nursery.build(target, targets=TARGETS, force=True)
        final, left = state_of(target, names), sorted(p.name for p in target.parent.iterdir())
        allowed = ("old", "complete") if replacing else ("absent", "complete")
        if state not in allowed or died.code > 0 or after.code or final != "complete" or left != [target.name]:
            wrong.append({**plan, "replacing": replacing, "state": state, "after": after.error, "left": left})
            continue
        stages = json.loads((target / BUILD_LOG).read_text())["stages"]
        resumed += any(row.get("resumed") for row in stages)
    return {
        "at_each_change": dict(sorted(counts["at"].items())),
        "at_random_times": dict(sorted(counts["after"].items())),
        "kills": sum(n for rows in counts.values() for state, n in rows.items() if state.endswith("killed")),
        "next_run_resumed": resumed,
        "wrong": wrong,
    }


def fresh(folder: Path, source: Path | None) -> Path:
    """A target in an empty folder: absent, or a copy of `source`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if source is not None:
        shutil.copytree(source, folder / "artifact")
    return folder / "artifact"


def state_of(target: Path, names: dict[str, str]) -> str:
    """``absent``, ``old`` or ``complete``, or what is wrong."""
    if not os.path.lexists(target):
        return "absent"
    try:
        return names.get(digest(target), "another artifact")
    except ToolError as error:
        return f"broken: {error}"


def resumed_builds(nursery: Any, folder: Path) -> list[dict[str, Any]]:
    """Kill a build of all components within each of them in turn, and let the next one end it."""
    built(nursery, folder / "undisturbed")
    wanted, rows = digest(folder / "undisturbed"), []
    for number, component in enumerate(COMPONENTS):
        target = folder / f"killed-{component}"
        died = nursery.build(target, at=f"{component}/config.json", targets=TARGETS)
        after = built(nursery, target)
        stages = json.loads((target / BUILD_LOG).read_text())["stages"]
        taken = list(dict.fromkeys(row["stage"].partition(":")[0] for row in stages if row.get("resumed")))
        rows.append(
            {
                "killed_in": component,
                "signal": -died.code,
                "finished": list(COMPONENTS[:number]),
                "resumed": taken,
                "same_digest": digest(target) == wanted,
                "seconds": after.seconds,
            }
        )
    return rows


def hot_swap(first: Path, second: Path, folder: Path) -> dict[str, Any]:
    """Generate again and again from one path, opened each time, while another process replaces what is there."""
    target = folder / "artifact"
    shutil.copytree(first, target)
    places = {"a": first, "b": second, "mixed": mixed(first, second, folder)}
    pictures = {name: picture(path) for name, path in places.items()}
    if len(set(pictures.values())) != len(pictures):
        raise RuntimeError("the pictures of the two artifacts and of a mixture do not differ, and would prove nothing")
    names = {found: name for name, found in pictures.items()}
    command = [sys.executable, "-c", REPLACER, str(target), str(second), str(first)]
    made: collections.Counter[str] = collections.Counter()
    failed: list[str] = []
    opened, rng, start = 0, random.Random(0), time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as replacer:
        assert replacer.stdin is not None and replacer.stdout is not None

        def load(artifact: Artifact) -> Pipeline:
            nonlocal opened
            opened += 1
            return one_thread(artifact)

        for number in track(range(GENERATIONS), "generations", console=Console(stderr=True)):
            if number % (GENERATIONS // REPLACEMENTS) == 1:
                replacer.stdin.write(f"{rng.uniform(0, 0.5)}\n")
                replacer.stdin.flush()
            try:
                made[names.get(picture(target, load), "another picture")] += 1
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
        replacer.stdin.close()
        replaced = replacer.stdout.read().count("replaced")
    return {
        "generations": GENERATIONS,
        "replacements": replaced,
        "pictures": dict(made),
        "failed": failed,
        "opened_again": opened - GENERATIONS,
        "left": sorted(p.name for p in target.parent.iterdir() if p.name.startswith(".")),
        "seconds": round(time.monotonic() - start, 1),
    }


def one_thread(artifact: Artifact) -> Pipeline:
    """On one thread, so that the same weights give the same bits."""
    return Pipeline(artifact, "onnxruntime", EngineOptions(threads=1))


def picture(folder: Path, load: Callable[[Artifact], Pipeline] = one_thread) -> str:
    """The sha256 of the pixels of PROMPT at REQUEST."""
    with contextlib.closing(whole(folder, load, discard=Pipeline.close)) as pipeline:
        return hashlib.sha256(np.asarray(pipeline(PROMPT, **REQUEST).images[0]).tobytes()).hexdigest()


def mixed(first: Path, second: Path, folder: Path) -> Path:
    """An artifact of one build's UNet and another's other components, sealed as if it were one."""
    place = Path(shutil.copytree(first, folder / "mixed"))
    shutil.rmtree(place / "unet")
    shutil.copytree(second / "unet", place / "unet")
    return resealed(place)


def resealed(folder: Path) -> Path:
    """A changed artifact with new digests."""
    manifest = Artifact.open(folder, verify=False).manifest
    for name in (MANIFEST, BUILD_LOG, SUMS):
        (folder / name).unlink()
    seal(folder, dataclasses.replace(manifest, files={}), {})
    return folder


def verification(source: Path, folder: Path) -> dict[str, Any]:
    """Seconds of verifying and of opening an artifact of 200 MB against hashing its files and nothing else.

    Opening also reads the manifest, which takes as long for 20 GB. Best of ROUNDS in turn.
    """
    shutil.copytree(source, folder)
    (folder / "large.bin").write_bytes(np.random.default_rng(0).bytes(LARGE_BYTES))
    resealed(folder)
    time.sleep(2.5)  # younger files are not remembered
    artifact = Artifact.open(folder, verify=False)
    calls: dict[str, Callable[[], Any]] = {
        "hashing": lambda: hash_all(folder),
        "verify": artifact.verify,
        "open_again": lambda: Artifact.open(folder),
        "read_manifest": lambda: read_manifest(folder),
        "open": lambda: Artifact.open(folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if name == "open":
                record_file().unlink()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "seconds": {name: round(value, 4) for name, value in best.items()},
        "verify_of_hashing": round(best["verify"] / best["hashing"], 3),
        "open_of_hashing": round(best["open"] / best["hashing"], 3),
    }


def hash_all(folder: Path) -> None:
    """sha256 of every listed file."""
    for name in read_sums(folder):
        with (folder / name).open("rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
