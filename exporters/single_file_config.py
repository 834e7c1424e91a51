"""Configuration and tokenizer for single-file checkpoints, which hold neither: our bundled ones, or a folder's."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from intaglio.exporters.config_files import read_json
from intaglio.profiles.errors import CheckpointError

MERGES = "clip_merges.txt.gz"
SCHEDULER = "scheduler/scheduler_config.json"
CONFIGURATION_SUFFIXES = (".json", ".txt", ".model", ".jinja")
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def bundled_folder(name: str) -> Path:
    """A folder of ``profiles/single_file``.

    Raises:
        CheckpointError: the package was installed without its data.
    """
    folder = Path(str(resources.files("intaglio.profiles"))) / "single_file" / name
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder} is not installed; reinstall intaglio with its package data")
    return folder


@functools.lru_cache(maxsize=16)
def configured(source: Path, changes: str) -> Path:
    """A copy of a configuration, without weights, that lives as long as the process.

    Args:
        source: a bundled folder, whose tokenizers are written out, or a diffusers folder.
        changes: JSON object of keys of the scheduler that differ.
    """
    holder = tempfile.TemporaryDirectory(prefix="intaglio-configuration-")
    _folders.append(holder)
    target = Path(holder.name)
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix in CONFIGURATION_SUFFIXES:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    merges = source.parent / MERGES
    if merges.exists():
        for folder in target.glob("tokenizer*"):
            write_clip_vocabulary(gzip.decompress(merges.read_bytes()).decode("utf-8"), folder)
    scheduler = read_json(target / SCHEDULER) | json.loads(changes)
    (target / SCHEDULER).write_text(json.dumps(scheduler, indent=1) + "\n", encoding="utf-8")
    return target


def write_clip_vocabulary(merges: str, folder: Path) -> None:
    """``merges.txt`` and the ``vocab.json`` that follows from it: bytes, bytes at a word's end, merges, special tokens.

    The order of the bytes is that of ``bytes_to_unicode`` in OpenAI's CLIP: printable ones first, as they are.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pairs = [line.replace(" ", "") for line in merges.splitlines()[1:]]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *pairs, *SPECIAL_TOKENS]
    vocabulary = json.dumps({word: index for index, word in enumerate(words)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
