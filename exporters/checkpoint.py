"""Open a diffusers checkpoint folder: class, configs, safetensors headers. Nothing is unpickled, nothing downloaded."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.profiles.artifact import sha256
from intaglio.profiles.errors import CheckpointError
from intaglio.profiles.registry import suggestion

EMBEDDED = ("emoji",)  # checkpoints that ship with the package, by name
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A diffusers pipeline folder; `name` is what the user calls it."""

    folder: Path
    name: str
    index: Mapping[str, Any]

    @property
    def pipeline_class(self) -> str:
        """The ``_class_name`` of ``model_index.json``."""
        return str(self.index["_class_name"])

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """A component's JSON configuration.

        Raises:
            CheckpointError: it is missing or not JSON.
        """
        return _read_json(self.folder / part / file)

    def weights(self, part: str, *, prefix: str = "") -> Weights:
        """The safetensors files of a component."""
        return Weights(files=weight_files(self.folder / part), prefix=prefix)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or an embedded one by its name.

    Raises:
        CheckpointError: missing, a pickle, not a pipeline folder; the message says what would be accepted.
    """
    folder = embedded_folder(str(source)) if str(source) in EMBEDDED else Path(source)
    if folder.suffix in PICKLES:
        raise CheckpointError(
            f"{folder} is a pickle ({folder.suffix}) and can run code when it is read; convert it to safetensors first"
        )
    if not folder.is_dir():
        near = suggestion(str(source), EMBEDDED)
        raise CheckpointError(
            f"{source} is not a folder; allowed: a diffusers pipeline folder or {', '.join(EMBEDDED)}.{near}"
        )
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder} has no model_index.json, so it is not a diffusers pipeline folder")
    index = _read_json(folder / "model_index.json")
    if "_class_name" not in index:
        raise CheckpointError(f"{folder / 'model_index.json'} has no _class_name")
    name = str(source) if str(source) in EMBEDDED else folder.resolve().name
    return Checkpoint(folder=folder, name=name, index=index)


def embedded_folder(name: str) -> Path:
    """The folder of an embedded checkpoint, as a real path."""
    folder = Path(str(resources.files("intaglio.profiles"))) / name
    if not (folder / "model_index.json").exists():
        raise CheckpointError(
            f"the embedded checkpoint {name!r} is not installed; reinstall intaglio with its package data"
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return _Config(data, path)


def write_config(config: Mapping[str, Any], path: Path) -> None:
    """Write a diffusers configuration without what libraries note about where it was loaded from."""
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class _Config(dict[str, Any]):
    """A JSON object that knows its file, so that a key it lacks is the checkpoint's error and not ours."""

    def __init__(self, data: Mapping[str, Any], path: Path) -> None:
        super().__init__(data)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._path} has no {key!r}; the checkpoint is incomplete")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component folder, sharded or not.

    Raises:
        CheckpointError: there is none, or only a pickle.
    """
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return (folder / name,)
        if (folder / f"{name}.index.json").exists():
            shards = sorted(set(_read_json(folder / f"{name}.index.json").get("weight_map", {}).values()))
            missing = [s for s in shards if not (folder / s).exists()]
            if missing or not shards:
                raise CheckpointError(
                    f"{folder / (missing[0] if missing else name)} is missing; the checkpoint is incomplete"
                )
            return tuple(folder / s for s in shards)
    variants = sorted(folder.glob("*.fp16.safetensors"))
    if variants:
        return (variants[0],)
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix in PICKLES:
            raise CheckpointError(
                f"{path} is a pickle, which can run code when it is read; convert it to safetensors first"
            )
    raise CheckpointError(f"{folder / WEIGHT_FILES[0]} is missing; the checkpoint is incomplete")


class Weights(Mapping[str, "Parameter"]):
    """Parameter name to shape and dtype, from the headers; values are read one at a time.

    Args:
        files: safetensors files.
        prefix: removed from names that have it; names without it are left out when it is not empty.
    """

    def __init__(self, *, files: Iterable[Path], prefix: str = "") -> None:
        self.files = tuple(files)
        self._entries: dict[str, Parameter] = {}
        for file in self.files:
            for key, (dtype, shape) in _header(file).items():
                if key.startswith(prefix):
                    entry = Parameter(file=file, key=key, dtype=dtype, shape=shape)
                    self._entries[key.removeprefix(prefix)] = entry

    def __getitem__(self, name: str) -> Parameter:
        return self._entries[name]

    def __iter__(self) -> Any:
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
    """One tensor of a safetensors file; dtype as safetensors names it (``F16``, ``BF16``, ``F32``)."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The values in their own dtype (bfloat16 as ``ml_dtypes.bfloat16``)."""
        import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
        from safetensors import safe_open

        with safe_open(self.file, framework="numpy") as tensors:
            value: np.ndarray = tensors.get_tensor(self.key)
        return value


@functools.lru_cache(maxsize=64)
def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  not a mapping
            return {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error


def source_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of every file the build may read, by relative path."""
    wanted = [p for p in checkpoint.folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt") and p.is_file()]
    names = {p.relative_to(checkpoint.folder).as_posix(): p for p in wanted}
    return {name: sha256(names[name]) for name in sorted(names)}
