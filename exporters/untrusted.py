"""What a checkpoint may not say: code to import or fetch, classes nobody reads, files outside of it.

All of it is looked at when a checkpoint is opened, before a library sees the folder. The keys are those through which
diffusers, transformers, timm, NeMo and Hydra have been made to run code (CVE-2026-44513, CVE-2026-4372, CVE-2026-5241,
CVE-2026-22807, CVE-2025-23304); they are refused wherever they stand, nested too, because what a library does with a
key depends on its version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.exporters.config_files import read_json
from intaglio.exporters.weights import shard_names
from intaglio.profiles.errors import CheckpointError, Unsupported
from intaglio.profiles.paths import check_file, check_tree, is_inside, link_roots
from intaglio.profiles.strict import members

INDEX = "model_index.json"
REMOTE_CODE = re.compile(
    r"auto_map|custom_pipelines?|custom_generate|_target_|trust_remote_code|class_path"
    r"|_?(attn|experts)_implementation.*|use_kernels|kernel_config|__.*"
)
NOTE = "_attn_implementation_autoset"  # a boolean that transformers 4.45 to 4.52 left in what they saved
# Parts a pipeline may have: the library and the classes each may be of. Which one of those is a family's to say.
MODEL = r"[A-Z]\w*"
PARTS: Sequence[tuple[str, tuple[str, ...], str]] = (
    (r"text_encoder(_[23])?", ("transformers",), MODEL),
    (r"tokenizer(_[23])?", ("transformers",), r"[A-Z]\w*(Tokenizer(Fast)?|Processor|Backend)"),
    (r"unet|transformer|vae", ("diffusers",), MODEL),
    (r"scheduler", ("diffusers",), r"[A-Z]\w*Scheduler"),
    (r"safety_checker", ("stable_diffusion", "diffusers"), r"StableDiffusionSafetyChecker"),
    (r"image_encoder", ("transformers",), r"[A-Z]\w*VisionModel(WithProjection)?"),
    (r"feature_extractor", ("transformers",), r"[A-Z]\w*(ImageProcessor(Fast|Pil)?|FeatureExtractor)"),
)
NOT_EXPORTED = ("safety_checker", "image_encoder", "feature_extractor")  # of those nothing is read
# Words of a language as keys and, in added tokens, anything: not read as configurations.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json")
ADAPTER = "adapter_config.json"  # transformers follows its ``base_model_name_or_path`` where PEFT is installed


def read_index(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline's folder in which every file that may be read was looked at.

    Args:
        folder: a diffusers pipeline.
        files: names of what is read beside the parts' folders.

    Raises:
        CheckpointError: naming the first file, key, class or link that is refused.
    """
    roots = link_roots(folder)
    for name in files:
        if (folder / name).is_symlink() or (folder / name).exists():
            check_file(folder / name, CheckpointError, roots)
    index = read_json(folder / INDEX)
    check_keys(index, folder / INDEX)
    check_index(index, folder / INDEX)
    for path in sorted(folder.iterdir()):
        if known_part(path.name) is not None and path.name not in NOT_EXPORTED:
            check_part(path, roots)
    return index


def check_part(folder: Path, roots: Sequence[Path] = ()) -> None:
    """Look at every file of a part, whoever reads it: its kind, its links, what its configurations say.

    `roots` are where links may lead; without any, those of `link_roots`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        Unsupported: there is a PEFT adapter in it.
    """
    roots = roots or link_roots(folder)
    check_file(folder, CheckpointError, roots)
    for path in check_tree(folder, CheckpointError, roots) if folder.is_dir() else ():
        if path.name == ADAPTER:
            raise Unsupported(
                f"{path}: a PEFT adapter in a part's folder names another model to load; remove it, and give its "
                "safetensors file with --lora"
            )
        if ".index." in path.name and path.suffix == ".json":
            shard_names(path)
        elif path.suffix == ".json" and path.name not in VOCABULARIES:
            check_keys(read_json(path), path)


def known_part(name: str) -> tuple[tuple[str, ...], str] | None:
    """The libraries and classes a part may be of."""
    return next((row[1:] for row in PARTS if re.fullmatch(row[0], name)), None)


def check_index(index: Mapping[str, Any], path: Path) -> None:
    """The pipeline and its parts are of libraries and kinds that are read here; nothing is imported to find out.

    Raises:
        CheckpointError: naming the part, what it is, and what is allowed.
    """
    if "_class_name" in index and not isinstance(index["_class_name"], str):
        raise CheckpointError(f"{path} names a pipeline of its own code, {index['_class_name']!r}; allowed: a class")
    for part, value in index.items():
        if not isinstance(value, list | dict):
            continue  # an option of the pipeline
        rule = known_part(part)
        if rule is None:
            allowed = ", ".join(row[0] for row in PARTS)
            raise CheckpointError(f"{path} has the unknown part {part[:100]!r}; allowed: {allowed}")
        libraries, classes = rule
        if value == [None, None]:
            continue
        if not (len(value) == 2 and all(isinstance(v, str) for v in value)):
            raise CheckpointError(f"{path}: {part} is {value!r}, allowed: [library, class]")
        library, name = value
        if library not in libraries or not re.fullmatch(classes, name):
            raise CheckpointError(
                f"{path}: {part} is the class {name!r} of {library!r}, which is not imported; "
                f"allowed: {' or '.join(libraries)} and a class {classes}"
            )


def check_keys(config: Mapping[str, Any], path: Path) -> None:
    """No key that makes a library import or fetch code, and no name of a file that leads out of the folder.

    Raises:
        CheckpointError: naming the key.
    """
    for _, key, value in members(dict(config)):
        if key is not None and REMOTE_CODE.fullmatch(key) and not harmless(key, value):
            raise CheckpointError(
                f"{path} has {key!r} = {str(value)[:100]!r}, by which libraries load code of somebody else; no code of "
                "a checkpoint is run: remove the key if the model works without it"
            )
        if key == "fast_tokenizer_files" and not (isinstance(value, list) and all(map(is_inside, value))):
            raise CheckpointError(f"{path} has {key!r} = {str(value)[:100]!r}, allowed: names of files in its folder")


def harmless(key: str, value: Any) -> bool:
    """Whether a key says that there is no such code."""
    return value is None or value is False or (key == NOTE and isinstance(value, bool))
