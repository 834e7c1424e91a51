"""What a benchmark runs: axes multiplied with each other, less what is excluded; from a TOML file, flags, or both."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.bench.cases import LOADER, Case, names_of
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import pick, suggestion

PROMPTS = ("red heart", "红心", "cat face", "rocket")
ROUNDS, WARMUP, MOST_GRID = 5, 1, 3


def size_of(value: Any) -> tuple[int, int]:
    """``512x768`` as (width, height).

    Raises:
        ValueError: it is neither that nor positive.
    """
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", str(value))
    if match is None:
        raise ValueError(value)
    return int(match[1]), int(match[2])


def whole(least: int) -> Callable[[Any], int]:
    """A reader of whole numbers from `least` on."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or int(value) != float(value) or int(value) < least:
            raise ValueError(value)
        return int(value)

    return read


def name_of(value: Any) -> str:
    """A name that is not empty.

    Raises:
        ValueError: it is no text, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(value)
    return value.strip()


def backend_of(value: Any) -> str:
    """A backend's name, with settings of its own behind a colon: ``openvino:shapes=fixed``.

    Raises:
        ValueError: it is no text, empty, or a setting is not KEY=VALUE.
    """
    name, _, _ = name_of(value).partition(":")
    if not name or (":" in str(value) and not backend_settings(value)):
        raise ValueError(value)
    return str(value).strip()


def backend_settings(value: str) -> dict[str, str]:
    """The settings of such a text, separated by semicolons.

    Raises:
        ValueError: one is not KEY=VALUE.
    """
    found = {}
    for part in filter(None, value.strip().partition(":")[2].split(";")):
        key, equal, text = part.partition("=")
        if not (key and equal and text):
            raise ValueError(value)
        found[key] = text
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One row of AXES.

    Attributes:
        read: a value of the file or the text of a flag; a ValueError where it is not allowed.
        allowed: what is, in words.
        help: of the flag.
        default: what every case has where nothing is said.
    """

    read: Callable[[Any], Any]
    allowed: str
    help: str
    default: Any = None


AXES: Mapping[str, Axis] = {
    "artifact": Axis(read=name_of, allowed="the name of an artifact", help="by folder name"),
    "backend": Axis(
        read=backend_of,
        allowed="the name of a backend, such as openvino, or with settings: openvino:shapes=fixed",
        help="default: every one installed",
    ),
    "device": Axis(
        read=name_of, allowed="a device name", help="the backend's device name (default cpu)", default="cpu"
    ),
    "threads": Axis(
        read=whole(0), allowed="a whole number, 0 or more", help="CPU threads; 0: the backend's choice", default=0
    ),
    "size": Axis(read=size_of, allowed="WIDTHxHEIGHT, such as 512x512", help="WxH pixels; default: the artifact's own"),
    "batch": Axis(
        read=whole(1), allowed="a whole number, 1 or more", help="pictures of a prompt at once (default 1)", default=1
    ),
    "steps": Axis(
        read=whole(1), allowed="a whole number, 1 or more", help="sampling steps; default: the artifact's own"
    ),
    "scheduler": Axis(read=name_of, allowed="the name of a scheduler", help="default: the artifact's own"),
    "guidance_scale": Axis(read=float, allowed="a number", help="default: the artifact's own"),
}


def read_value(axis: str, value: Any) -> Any:
    """One value of an axis.

    Raises:
        UsageError: it is not allowed.
    """
    try:
        return AXES[axis].read(value)
    except (TypeError, ValueError, OverflowError):
        flag = f"--{axis.replace('_', '-')}"
        raise UsageError(f"{flag} {value!r} is not allowed: {AXES[axis].allowed}") from None


def read_values(axis: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """The values of an axis, each once; a text may hold several with commas between them.

    Raises:
        UsageError: one is not allowed or there twice, or there is none.
    """
    words = [w for v in values for w in (v.split(",") if isinstance(v, str) else [v])]
    found = tuple(read_value(axis, w) for w in words)
    twice = next((v for i, v in enumerate(found) if v in found[:i]), None)
    if twice is not None or not found:
        what = f"has {show(axis, twice)} twice" if found else "is empty"
        raise UsageError(f"--{axis.replace('_', '-')} {what}; every value once, at least one")
    return found


def show(axis: str, value: Any) -> str:
    """A value as people write it."""
    if value is None:
        return "own"
    return f"{value[0]}x{value[1]}" if axis == "size" else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Everything a run is told.

    Attributes:
        axes: values by the names of AXES, without ``artifact``; an axis that is not there has its default alone.
        exclude: tables of axis values; a case that has all values of one is left out.
        grid: up to three axes that are shown as a grid of pictures: across, down, one grid each.
        seed: of the noise and the order of the cases.
        isolation: ``shared``: a case's process stays loaded, idle, until its group is measured; ``fresh``: every round
            loads it anew.
    """

    axes: Mapping[str, tuple[Any, ...]]
    prompts: tuple[str, ...] = PROMPTS
    exclude: tuple[Mapping[str, Any], ...] = ()
    grid: tuple[str, ...] = ()
    seed: int = 0
    rounds: int = ROUNDS
    warmup: int = WARMUP
    checkpoint: str = ""
    loader: str = LOADER
    isolation: str = "shared"
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what would show nothing.

        Raises:
            UsageError: a grid of axes that are not swept, of too many, or of one twice; an unknown isolation.
        """
        if self.isolation not in ("shared", "fresh"):
            raise UsageError(f"--isolation {self.isolation!r} is not allowed: shared, fresh")
        if len(self.grid) > MOST_GRID or len(set(self.grid)) < len(self.grid):
            raise UsageError(f"--grid {','.join(self.grid)} is not allowed: one to {MOST_GRID} different axes")
        for axis in self.grid:
            pick(AXES, axis, "axis")

    def cases(self, artifacts: Sequence[Artifact]) -> list[Case]:
        """Every case, artifacts outermost.

        Raises:
            UsageError: no artifact or backend; an exclusion or grid that fits no case; nothing is left.
        """
        if not artifacts or not self.axes.get("backend"):
            raise UsageError("a benchmark needs at least one artifact and one backend")
        names = names_of(artifacts)
        values = {a: self.axes.get(a) or (x.default,) for a, x in AXES.items()} | {"artifact": tuple(names)}
        several = [a for a in values if len(values[a]) > 1 and a not in ("artifact", "backend")]
        for axis in self.grid:
            if len(values[axis]) < 2:
                raise UsageError(
                    f"--grid {axis} has a single value, {show(axis, values[axis][0])}; give it two or more"
                )
        found, used = [], set()
        folders = dict(zip(names, artifacts, strict=True))
        for combination in itertools.product(*values.values()):
            chosen = dict(zip(values, combination, strict=True))
            fitting = [i for i, rule in enumerate(self.exclude) if all(chosen[a] == v for a, v in rule.items())]
            used.update(fitting)
            if not fitting:
                found.append(self._case(chosen, folders[chosen["artifact"]], several))
        for index, rule in enumerate(self.exclude):
            if index not in used:
                text = ",".join(f"{a}={show(a, v)}" for a, v in rule.items())
                raise UsageError(f"--exclude {text} fits no case; leave it out or name values of the axes")
        if not found:
            raise UsageError("every case is excluded; leave out an --exclude")
        return found

    def _case(self, chosen: Mapping[str, Any], artifact: Artifact, several: Sequence[str]) -> Case:
        extra = "".join(f" {a}={show(a, chosen[a])}" for a in several)
        backend, device = chosen["backend"].partition(":")[0], chosen["device"]
        return Case(
            artifact=str(Path(artifact.folder)),
            name=chosen["artifact"],
            backend=backend,
            label=f"{chosen['artifact']}/{chosen['backend']}{extra}",
            prompts=self.prompts,
            seed=self.seed,
            repeats=self.rounds,
            warmup=self.warmup,
            checkpoint=self.checkpoint if backend == "torch" else "",
            loader=self.loader,
            settings={**self.settings, **backend_settings(chosen["backend"])},
            device="cuda:0" if (backend, device) == ("tensorrt", "cpu") else device,
            **{a: chosen[a] for a in AXES if a not in ("artifact", "backend", "device")},
        )


def exclusion(text: str) -> dict[str, Any]:
    """``backend=torch,steps=50`` as axis values.

    Raises:
        UsageError: it is not that, or an axis or value is not allowed.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equal for _, equal, _ in pairs):
        raise UsageError(f"--exclude {text!r} is not AXIS=VALUE[,AXIS=VALUE…], such as backend=torch,steps=50")
    for axis, _, _ in pairs:
        pick(AXES, axis, "axis")
    return {axis: read_value(axis, value) for axis, _, value in pairs}


FILE_KEYS = ("artifacts", "prompts", "rounds", "warmup", "seed", "checkpoint", "isolation", "grid", "axes", "exclude")


def read_file(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """A TOML matrix: folders of artifacts, relative to the file, and what it says of `Matrix`.

    Raises:
        UsageError: it cannot be read, has an unknown key, or a value of another kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--matrix {path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--matrix {path} is not TOML: {error}") from error
    for key in content:
        if key not in FILE_KEYS:
            near = suggestion(key, FILE_KEYS)
            raise UsageError(f"{path}: {key!r} is unknown; allowed: {', '.join(FILE_KEYS)}.{near}")
    kinds = {"rounds": int, "warmup": int, "seed": int, "checkpoint": str, "isolation": str, "axes": dict}
    for key, value in content.items():
        kind = kinds.get(key, list)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{path}: {key} is {value!r}; it must be a {kind.__name__}")
    said: dict[str, Any] = {k: v for k, v in content.items() if k in kinds}
    said["axes"] = {}
    for axis, values in content.get("axes", {}).items():
        if axis == "artifact" or axis not in AXES:
            allowed = ", ".join(a for a in AXES if a != "artifact")
            raise UsageError(f"{path}: axis {axis!r} is unknown; allowed: {allowed}")
        said["axes"][axis] = read_values(axis, values if isinstance(values, list) else [values])
    for key in ("prompts", "grid"):
        if key in content:
            said[key] = tuple(name_of_entry(path, key, v) for v in content[key])
    if "exclude" in content:
        said["exclude"] = tuple(rule_of(path, rule) for rule in content["exclude"])
    folders = [path.parent / name_of_entry(path, "artifacts", v) for v in content.get("artifacts", [])]
    return folders, said


def name_of_entry(path: Path, key: str, value: Any) -> str:
    """A text of a list in the file.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(value, str):
        raise UsageError(f"{path}: {key} has {value!r}; every entry is a text")
    return value


def rule_of(path: Path, rule: Any) -> dict[str, Any]:
    """One ``[[exclude]]`` table.

    Raises:
        UsageError: it is no table of axes, or a value is not allowed.
    """
    if not isinstance(rule, dict) or not rule or any(axis not in AXES for axis in rule):
        raise UsageError(f"{path}: exclude {rule!r} is not a table of axes; allowed: {', '.join(AXES)}")
    return {axis: read_value(axis, value) for axis, value in rule.items()}


def with_flags(said: dict[str, Any], flags: Mapping[str, Any]) -> Matrix:
    """What the file says, each part replaced by a flag where one is given (not None)."""
    given = {k: v for k, v in flags.items() if v is not None and k != "axes"}
    axes = {**said.get("axes", {}), **{a: v for a, v in flags.get("axes", {}).items() if v is not None}}
    return Matrix(**{**said, **given, "axes": axes})


def matrix(
    artifacts: Sequence[Artifact], backends: Sequence[str], *, engines: Mapping[str, str] | None = None, **said: Any
) -> list[Case]:
    """Every artifact on every backend. `engines` is the table of backends that exist; the rest as `Matrix` and AXES.

    Raises:
        UsageError: no artifact, no backend, an unknown backend, or one named twice.
    """
    from intaglio.runtimes.engine import ENGINES

    if not artifacts or not backends:
        raise UsageError("a benchmark needs at least one artifact and one backend")
    for backend in backends:
        pick(engines or ENGINES, backend.partition(":")[0], "backend")
    axes = {"backend": read_values("backend", backends)}
    axes |= {a: (said.pop(a),) for a in list(said) if a in AXES and said[a] is not None}
    rest = {k: v for k, v in said.items() if k not in AXES}
    return Matrix(axes=axes, **rest).cases(artifacts)
