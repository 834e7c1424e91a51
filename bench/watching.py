"""What the components of one case are fed and answer, kept on disk, and asked of another case: errors without drift.

A later step's picture differs because earlier steps differed. `replayed` gives every component of the judged case the
very input that the reference's had, so that its error is its own. `played` is the other half: the judged case's loop
runs on the reference's answers, so that what it does around the components (tokens, schedule, guidance, scaling,
pictures) is compared to the last bit, whatever the components' precision.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.fidelity import relative_l2

INDEX = "calls.json"
Run = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Answer = Callable[[str, Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(slots=True)
class Watched:
    """A loaded engine whose calls go through a function; everything else is the engine's own."""

    name: str
    engine: Any
    through: Run

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        return self.through(self.name, feeds)

    def memory(self) -> dict[str, int | None]:
        """See `Engine.memory`."""
        found: dict[str, int | None] = self.engine.memory()
        return found

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()


@contextmanager
def through(pipeline: Any, run: Answer) -> Iterator[None]:
    """The pipeline's loaded engines, each call handed to ``run(name, engine, feeds)``."""
    loaded = pipeline.engines.loaded

    def bound(engine: Any) -> Run:
        return lambda name, feeds: run(name, engine, feeds)

    loaded.update({name: Watched(name, engine, bound(engine)) for name, engine in list(loaded.items())})
    try:
        yield
    finally:
        for name, engine in loaded.items():
            loaded[name] = engine.engine if isinstance(engine, Watched) else engine


@dataclass(slots=True)
class Keeper:
    """Writes every call into a folder, equal arrays once, in a file named by its digest.

    Attributes:
        now: index of the denoiser's step under way; the text encoders run in the first, the decoder after the last.
    """

    folder: Path
    now: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, engine: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine and keep the call."""
        outputs: dict[str, np.ndarray] = engine.run(feeds)
        kept = {"feeds": self._store(feeds), "outputs": self._store(outputs)}
        self.calls.append({"component": name, "step": self.now, **kept})
        return outputs

    def _store(self, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
        found = {}
        for name, value in arrays.items():
            array = np.ascontiguousarray(value)
            facts = f"{array.dtype.str}{array.shape}".encode()
            found[name] = hashlib.sha256(facts + array.tobytes()).hexdigest()[:32]
            path = self.folder / f"{found[name]}.npy"
            if not path.exists():
                np.save(path, array, allow_pickle=False)
        return found

    def close(self, picture: np.ndarray) -> None:
        """Write the index and the picture uint8 [H, W, 3]."""
        np.save(self.folder / "picture.npy", picture, allow_pickle=False)
        (self.folder / INDEX).write_text(json.dumps(self.calls), encoding="utf-8")


def kept(folder: Path) -> list[dict[str, Any]]:
    """The calls in their order."""
    found: list[dict[str, Any]] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return found


def arrays_of(folder: Path, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Kept arrays by name."""
    return {name: np.load(folder / f"{digest}.npy", allow_pickle=False) for name, digest in names.items()}


def judged_steps(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls worth repeating: the first of each component at the first, middle and last step that has one."""
    chosen = []
    for component in dict.fromkeys(c["component"] for c in calls):
        own = [c for c in calls if c["component"] == component]
        steps = sorted({c["step"] for c in own})
        wanted = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))
        chosen += [next(c for c in own if c["step"] == step) for step in wanted]
    return chosen


def replayed(pipeline: Any, folder: Path) -> list[dict[str, Any]]:
    """The largest relative L2 over the outputs of `judged_steps`, from this pipeline's components.

    Returns:
        ``{"component", "step", "relative_l2", "reason"}`` a call; None with a reason where it cannot be compared.
    """
    found = []
    for call in judged_steps(kept(folder)):
        row = {"component": call["component"], "step": call["step"], "relative_l2": None, "reason": ""}
        wanted = arrays_of(folder, call["outputs"])
        try:
            outputs = pipeline.engines[call["component"]].run(arrays_of(folder, call["feeds"]))
            errors = [relative_l2(outputs[k].astype(np.float32), v.astype(np.float32)) for k, v in wanted.items()]
        except (KeyError, UsageError) as problem:
            row["reason"] = f"its {call['component']} is another component: {problem}"
        else:
            worst = max(errors)
            row.update(
                {"relative_l2": float(f"{worst:.6g}")} if math.isfinite(worst) else {"reason": "NaN or infinity"}
            )
        found.append(row)
    return found


class Strayed(Exception):
    """The judged loop asks for what the reference's did not."""


@dataclass(slots=True)
class Player:
    """Answers a loop with the reference's outputs, call by call, and compares what it asks.

    Attributes:
        worst: largest relative L2 of a feed so far, and where.
    """

    folder: Path
    calls: list[dict[str, Any]]
    worst: float = 0.0
    where: str = ""
    done: int = 0

    def run(self, name: str, engine: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The kept outputs of the call that this should be.

        Raises:
            Strayed: it is another component, there is no further call, or a feed has another name or shape.
        """
        if self.done >= len(self.calls):
            raise Strayed(f"{name} is called once more than the reference called anything")
        call = self.calls[self.done]
        where = f"{call['component']} at step {call['step']}"
        if name != call["component"]:
            raise Strayed(f"{name} is called where the reference called {where}")
        wanted = arrays_of(self.folder, call["feeds"])
        if {k: np.shape(v) for k, v in feeds.items()} != {k: v.shape for k, v in wanted.items()}:
            raise Strayed(f"{where} gets inputs of other names or shapes than the reference's")
        for key, value in wanted.items():
            error = relative_l2(np.asarray(feeds[key], np.float64), value.astype(np.float64))
            if not error <= self.worst:
                self.worst, self.where = error, f"{key} of {where}"
        self.done += 1
        return arrays_of(self.folder, call["outputs"])


def played(pipeline: Any, folder: Path, sample: Callable[[], Any]) -> dict[str, Any]:
    """Run the pipeline's loop on the reference's answers.

    Args:
        pipeline: whose loop is judged.
        folder: of a `Keeper`.
        sample: makes one `Result` with the pipeline.

    Returns:
        ``inputs`` (largest relative L2 of anything a component is fed; None where the loop strayed) ``where``,
        ``pixels`` (largest difference of the picture, in 1/255) and ``strayed``: empty, or what went another way.
    """
    player = Player(folder, kept(folder))
    try:
        with through(pipeline, player.run):
            result = sample()
    except Strayed as problem:
        return {"inputs": None, "where": "", "pixels": None, "strayed": str(problem)}
    found = {"inputs": player.worst if math.isfinite(player.worst) else None, "where": player.where, "strayed": ""}
    if player.done < len(player.calls):
        left = player.calls[player.done]
        found["strayed"] = f"{left['component']} at step {left['step']} is never called"
    picture, wanted = picture_of(result), np.load(folder / "picture.npy", allow_pickle=False)
    if picture.shape != wanted.shape:
        return {**found, "pixels": None, "strayed": f"the picture is {picture.shape}, the reference's {wanted.shape}"}
    return {**found, "pixels": int(np.abs(picture.astype(np.int16) - wanted.astype(np.int16)).max())}


def picture_of(result: Any) -> np.ndarray:
    """The first picture, uint8 [H, W, 3]."""
    return np.asarray(result.images[0].convert("RGB"))
