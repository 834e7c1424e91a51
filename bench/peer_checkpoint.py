"""A checkpoint as the older transformers of other tools read it, and the proof that they read all of it.

transformers 5.23 writes the weights of CLIPTextModel without the prefix ``text_model.``. What is older finds none of
them, says so in a warning, and goes on with random ones.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intaglio.exporters.interop import for_transformers_4
from intaglio.profiles.errors import CheckpointError

PREFIX, FLAT, CLASS = "text_model.", ("embeddings.", "encoder.", "final_layer_norm."), "CLIPTextModel"


@contextlib.contextmanager
def readable(checkpoint: Path) -> Iterator[Path]:
    """A folder of links to a checkpoint's files, with those anew that an older transformers would not read.

    Raises:
        CheckpointError: a text encoder would still not be loaded whole.
    """
    import transformers

    with tempfile.TemporaryDirectory(prefix="intaglio-peer-") as scratch:
        place = Path(scratch) / "checkpoint"
        shutil.copytree(checkpoint, place, copy_function=link)
        if transformers.__version__.startswith("4."):
            for_transformers_4(place)
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        models = {n: v[1] for n, v in index.items() if n.startswith("text_encoder") and v[0] == "transformers"}
        for name, kind in models.items():
            if kind == CLASS:
                for file in sorted((place / name).glob("*.safetensors")):
                    prefix(file)
            check(getattr(transformers, kind), place / name)
        yield place


def link(source: str, target: str) -> str:
    """A symbolic link in place of a copy: checkpoints are large."""
    Path(target).symlink_to(Path(source).resolve())
    return target


def prefix(file: Path) -> None:
    """Write a safetensors file anew with PREFIX before the names that lack it; its data keeps its order."""
    with file.open("rb") as source:
        (size,) = struct.unpack("<Q", source.read(8))
        header: dict[str, Any] = json.loads(source.read(size))
        if not any(name.startswith(FLAT) for name in header):
            return
        renamed = {PREFIX + n if n.startswith(FLAT) else n: facts for n, facts in header.items()}
        text = json.dumps(renamed).encode()
        text += b" " * (-len(text) % 8)
        with file.with_suffix(".new").open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, target)
    file.with_suffix(".new").replace(file)


def check(kind: Any, folder: Path) -> None:
    """Load a model once to see whether anything of it stays random.

    Raises:
        CheckpointError: naming the first parameter that the files do not have.
    """
    _, facts = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    missing = sorted(facts["missing_keys"]) + sorted(str(k) for k in facts["mismatched_keys"])
    if missing:
        raise CheckpointError(
            f"this transformers does not load {len(missing)} parameters of {folder.name} ({missing[0]}, …) and would "
            "compute with random ones; the peer cannot be compared on this checkpoint"
        )
