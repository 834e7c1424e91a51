"""Learned metrics from a local folder: everything they read is listed in ``metrics.toml`` with its sha256.

::

    [lpips]                       # the key by which limits name the metric
    kind = "lpips"                # a row of KINDS
    net = "alex"                  # the kind's own options
    [lpips.files]                 # relative to the folder
    "alexnet.safetensors" = "sha256:..."
    "lpips_alex_heads.safetensors" = "sha256:..."

Nothing is downloaded, nothing is unpickled, and no other file of the folder is opened.
"""

from __future__ import annotations

import abc
import hashlib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.profiles.registry import need, pick, resolve
from intaglio.profiles.strict import from_dict
from intaglio.runtimes.fidelity import pair

FILE = "metrics.toml"
KINDS = {
    "lpips": "intaglio.bench.learned_lpips:Lpips",
    "dists": "intaglio.bench.learned_dists:Dists",
    "clip_image": "intaglio.bench.learned_clip:ClipImage",
    "clip_score": "intaglio.bench.learned_clip:ClipScore",
    "fid": "intaglio.bench.learned_fid:Fid",
}
SHORT = 12  # hexadecimal digits of a digest in a printed name
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class Pinned:
    """The files of one metric; each is read whole and compared with its digest before anything is made of it.

    Args:
        folder: that names are relative to.
        files: name to ``sha256:`` and 64 hexadecimal digits.
        suffixes: that the kind reads.
        where: for messages.

    Raises:
        UsageError: a name leads out of the folder, its kind of file is not read, or a digest is not one.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], suffixes: Sequence[str], where: str) -> None:
        self.folder, self.where = folder, where
        self.sums: dict[str, str] = {}
        if not files:
            raise UsageError(f"{where}: [files] is empty; list each file with its sha256")
        for name, digest in files.items():
            found, path = DIGEST.fullmatch(digest), PurePosixPath(name)
            if found is None:
                raise UsageError(f"{where}: {name} = {digest!r}; write sha256: and 64 digits, as sha256sum prints them")
            if path.is_absolute() or ".." in path.parts or not (folder / name).resolve().is_relative_to(folder):
                raise UsageError(f"{where}: {name!r} leads out of {folder}; name files inside of it")
            if path.suffix not in suffixes:
                raise UsageError(f"{where}: {name!r} is not read; allowed: {', '.join(suffixes)}")
            self.sums[name] = found[1]

    @property
    def digest(self) -> str:
        """First digits of the file's sha256; of several, of what ``sha256sum`` prints of them sorted by name."""
        if len(self.sums) == 1:
            return next(iter(self.sums.values()))[:SHORT]
        lines = "".join(f"{self.sums[name]}  {name}\n" for name in sorted(self.sums))
        return hashlib.sha256(lines.encode()).hexdigest()[:SHORT]

    def named(self, wanted: str) -> str:
        """The one file of this name, in whatever folder, or with this suffix.

        Raises:
            UsageError: there is none, or more than one.
        """
        found = [name for name in self.sums if wanted in (PurePosixPath(name).name, PurePosixPath(name).suffix)]
        if len(found) != 1:
            raise UsageError(f"{self.where}: needs one file {wanted}, found {len(found)}; list it under files")
        return found[0]

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            UsageError: it cannot be read, or is another than the one that was pinned.
        """
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise UsageError(f"{self.where}: {self.folder / name} cannot be read ({error.strerror})") from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.sums[name]:
            message = f"{self.folder / name} has sha256:{found}, pinned in {FILE}: sha256:{self.sums[name]}"
            raise UsageError(f"{self.where}: {message}")
        return data

    def tensors(self) -> dict[str, Any]:
        """The float32 torch tensors of all safetensors files by name.

        Raises:
            UsageError: a file is damaged or altered, or a name is in two files.
            MissingDependency: torch or safetensors is not installed.
        """
        safetensors = need("safetensors.torch", extra="export")
        result: dict[str, Any] = {}
        for file in (name for name in self.sums if name.endswith(".safetensors")):
            data = self.read(file)
            try:
                found = safetensors.load(data)
            except Exception as error:  # the format's own error is no subclass of ValueError
                raise UsageError(f"{self.where}: {file} is no safetensors file ({error})") from error
            if twice := sorted(result.keys() & found.keys()):
                raise UsageError(f"{self.where}: {file} has {twice[0]}, which is in another file too")
            result |= {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
        return result


class LearnedMetric(abc.ABC):
    """One metric of the folder, its weights loaded. A kind overrides `_measure` or `measure_sets`.

    Attributes:
        Options: dataclass of the kind's keys in the file, beside ``kind`` and ``files``.
        SUFFIXES: of the files that it reads.
        higher_is_better: the direction.
        needs_prompt: whether `measure` looks at the prompt.
        of_sets: whether it compares sets of pictures and not pairs.
        key: the metric's table in the file.
    """

    Options: ClassVar[type[Any]]
    SUFFIXES: ClassVar[tuple[str, ...]] = (".safetensors",)
    higher_is_better: ClassVar[bool]
    needs_prompt: ClassVar[bool] = False
    of_sets: ClassVar[bool] = False

    def __init__(self, key: str, options: Any, files: Pinned) -> None:
        self.key, self.options, self.files = key, options, files
        self.load()

    @property
    def name(self) -> str:
        """As printed: the key, the extractor, the digest of its files and the resize rule."""
        return f"{self.key} ({self.extractor}, {self.files.digest}, {self.resize_rule})"

    @property
    @abc.abstractmethod
    def extractor(self) -> str:
        """The network, for the printed name."""

    @property
    @abc.abstractmethod
    def resize_rule(self) -> str:
        """What is done to a picture's size, for the printed name."""

    @abc.abstractmethod
    def load(self) -> None:
        """Read the files.

        Raises:
            UsageError: a file is missing, altered or not what the kind needs.
        """

    def measure(self, image: np.ndarray, reference: np.ndarray, prompt: str | None = None) -> float:
        """The metric of a picture, its reference and its prompt; both pictures uint8 [H, W, 3] of one size.

        Raises:
            UsageError: the metric compares sets, the pictures cannot be compared, or a prompt is missing or too long.
            NumericsError: the value is not finite.
        """
        if self.of_sets:
            raise UsageError(f"{self.key} compares sets of pictures, not pairs; call measure_sets")
        check(pair(image, reference)[0])
        value = self._measure(image, reference, prompt)
        if not math.isfinite(value):
            raise NumericsError(f"{self.name} is {value}; look for NaN in its weights")
        return value

    def _measure(self, image: np.ndarray, reference: np.ndarray, prompt: str | None) -> float:
        raise NotImplementedError

    def measure_sets(self, images: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
        """The distance of two sets of pictures, each uint8 [H, W, 3].

        Raises:
            UsageError: the metric compares pairs, or a set is too small.
            NumericsError: the value is not finite.
        """
        raise UsageError(f"{self.key} compares pairs of pictures, not sets of {len(images)} and {len(references)}")


def check(picture: np.ndarray) -> None:
    """Refuse what is no RGB picture [H, W, 3].

    Raises:
        UsageError: the shape.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UsageError(f"learned metrics need RGB pictures [H, W, 3], found {picture.shape}")


def load_metrics(folder: Path) -> dict[str, LearnedMetric]:
    """The learned metrics of `folder` by their key, in the file's order, ready to measure.

    Raises:
        UsageError: ``metrics.toml`` is missing or has an unknown key or value, or a file is not the pinned one.
        MissingDependency: a package that a kind needs is not installed.
    """
    folder = folder.resolve()
    try:
        tables = tomllib.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / FILE} cannot be read ({error}); list the metrics and their files there") from error
    return {key: load_metric(folder, key, table) for key, table in tables.items()}


def load_metric(folder: Path, key: str, table: Any) -> LearnedMetric:
    """One table of the file. Errors as `load_metrics`."""
    where = f"{folder / FILE}: [{key}]"
    if not isinstance(table, Mapping) or not isinstance(table.get("files", {}), Mapping):
        raise UsageError(f"{where}: expected a table with kind and files")
    if missing := {"kind", "files"} - table.keys():
        raise UsageError(f"{where}: key {sorted(missing)[0]!r} is missing")
    kind: type[LearnedMetric] = resolve(pick(KINDS, str(table["kind"]), f"kind of [{key}] in {folder / FILE}"))
    rest = {name: value for name, value in table.items() if name not in ("kind", "files")}
    options = from_dict(kind.Options, rest, where, error=UsageError)
    files = {str(name): str(digest) for name, digest in table["files"].items()}
    return kind(key, options, Pinned(folder, files, kind.SUFFIXES, where))
