"""Weights on disk: which files a component has, what is in them, one tensor at a time. Nothing is unpickled."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from intaglio.exporters.config_files import read_json
from intaglio.exporters.mapped_tensors import mapped
from intaglio.profiles.errors import CheckpointError
from intaglio.profiles.paths import check_regular, is_inside

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
VARIANT = "fp16"  # read where a component has no other weights
Step = Literal["T"] | tuple[int | tuple[int | None, int | None], ...]  # a transposition, or an index: [i] and [a:b]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component folder, sharded or not.

    Raises:
        CheckpointError: there is none, or only a pickle.
    """
    for name in (*WEIGHT_FILES, *(n.replace(".safetensors", f".{VARIANT}.safetensors") for n in WEIGHT_FILES)):
        if (folder / name).exists():
            return (folder / name,)
        found = [folder / f"{name}.index.json", folder / f"{name.replace(f'.{VARIANT}', '')}.index.{VARIANT}.json"]
        for index in (path for path in found if path.exists()):
            shards = shard_names(index)
            missing = [s for s in shards if not (folder / s).exists()]
            if missing or not shards:
                raise CheckpointError(
                    f"{folder / (missing[0] if missing else name)} is missing; the checkpoint is incomplete"
                )
            return tuple(folder / s for s in shards)
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix in PICKLES:
            name = WEIGHT_FILES[0] if path.name.startswith("diffusion") else WEIGHT_FILES[1]
            raise CheckpointError(
                f"{path} is a pickle, which can run code when it is read; convert it to safetensors first: "
                f"intaglio convert {path} -o {folder / name}"
            )
    raise CheckpointError(f"{folder / WEIGHT_FILES[0]} is missing; the checkpoint is incomplete")


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards (``*.safetensors.index.json``) names, ascending.

    Raises:
        CheckpointError: it has no table of names, or one leads out of the index' folder.
    """
    table = read_json(index).get("weight_map", {})
    names = list(table.values()) if isinstance(table, dict) else [table]
    for name in names:
        if not is_inside(name):
            raise CheckpointError(
                f"{index} names the file {str(name)[:100]!r}, allowed: names of files in its own folder"
            )
    return sorted(set(names))


class Weights(Mapping[str, "Parameter"]):
    """Parameter name to shape and dtype, from the headers; values are read one at a time.

    Args:
        files: safetensors files.
        prefix: removed from names that have it; names without it are left out when it is not empty.
    """

    def __init__(self, *, files: Iterable[Path], prefix: str = "") -> None:
        self.files: tuple[Path, ...] = tuple(files)
        self._entries: dict[str, Parameter] = {}
        for file in self.files:
            for key, (dtype, shape) in read_header(file).items():
                if key.startswith(prefix):
                    entry = Parameter(file=file, key=key, dtype=dtype, shape=shape)
                    self._entries[key.removeprefix(prefix)] = entry

    @classmethod
    def of(cls, file: Path, entries: Mapping[str, Parameter]) -> Weights:
        """Parameters of `file` under names of their own."""
        weights = cls(files=())
        weights.files, weights._entries = (file,), dict(entries)
        return weights

    def below(self, prefix: str) -> Weights:
        """The parameters whose names have `prefix`, without it."""
        entries = {name.removeprefix(prefix): p for name, p in self.items() if name.startswith(prefix)}
        return Weights.of(self.files[0], entries)

    def __getitem__(self, name: str) -> Parameter:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def renamed(self, rules: Iterable[tuple[str, str]]) -> dict[str, Parameter]:
        """The same parameters under the names of today's modules: `rules` are regular expressions, all applied."""

        def rename(name: str) -> str:
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            return name

        return {rename(name): parameter for name, parameter in self.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor of a safetensors file, or a view of it; dtype as safetensors names it (``F16``, ``BF16``, ``F32``).

    `shape` is that of the view; its steps are applied in order.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    view: tuple[Step, ...] = ()

    def read(self) -> np.ndarray:
        """The values in their own dtype (bfloat16 as ``ml_dtypes.bfloat16``), read-only pages of the file."""
        value = mapped(self.file, self.key)
        for step in self.view:
            value = value.T if step == "T" else value[tuple(i if isinstance(i, int) else slice(*i) for i in step)]
        return value


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name to dtype and shape; read once while the file stays as it is.

    Raises:
        CheckpointError: it is not a safetensors file, or not all of it is there.
    """
    try:
        facts = file.stat()
        check_regular(file, facts, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error
    return _header(file, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=64)
def _header(file: Path, changed: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  not a mapping
            return {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error


def read_metadata(file: Path) -> dict[str, str]:
    """The free-form strings of a safetensors header."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return dict(tensors.metadata() or {})
