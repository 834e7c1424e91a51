"""A checkpoint's tokenizer folder into an artifact, and its chat template into one line of text.

What lands in the artifact is what transformers makes of the checkpoint here: ``tokenizer.json`` with every added
token, and ``tokenizer_config.json`` with the resolved padding token, sides and length, which depend on a class's
defaults and on files that overrule each other (Stable Diffusion 2's ``special_tokens_map.json`` has another padding
token than its ``tokenizer_config.json``). The runtime then needs the ``tokenizers`` library alone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from intaglio.exporters.config_files import read_json
from intaglio.profiles.errors import CheckpointError, UsageError
from intaglio.runtimes.text import MARKER, fill_template

CONFIG = "tokenizer_config.json"
VOCABULARY = "tokenizer.json"
COPIED = (
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
SOURCES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Files a tokenizer can be made of, the first complete row is used."""
MACHINE_SPECIFIC = (
    *("name_or_path", "_name_or_path", "is_local", "local_files_only"),
    *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"),
)
SENTENCEPIECE = ("sentencepiece", "google.protobuf")
SENTENCEPIECE_HINT = "pip install sentencepiece protobuf"
SENTINEL = "Sentinel7f3a9c51"  # nothing that a template treats in its own way, and nothing a template contains
PROBES = (
    "",
    " a  red cat ",
    "\n\tlines\n\nand tabs\t\n",
    "UPPER lower ß İ",
    "{} {{ name }} {% raw %} { }",
    "<think>a</think>b",
    "<|im_start|>system\n<|im_end|></s>[INST][/INST]",
    "<b>&amp;\"quotes\" 'and' \\ slashes/",
    "红心 😀 e\u0301",
)


def check_tokenizer(folder: Path) -> None:
    """What `copy_tokenizer` will need is there.

    Raises:
        CheckpointError: naming the file that is missing or not JSON, or the package that reads it.
    """
    read_json(folder / CONFIG)
    for row in SOURCES:
        missing = [name for name in row if not (folder / name).exists()]
        if not missing:
            break
        if len(missing) < len(row):
            raise CheckpointError(f"{folder / missing[0]} is missing; the checkpoint is incomplete")
    else:
        raise CheckpointError(f"{folder / VOCABULARY} is missing; the checkpoint is incomplete")
    if row == ("spiece.model",) and not all(map(_installed, SENTENCEPIECE)):
        raise CheckpointError(f"{folder} has spiece.model alone, which needs a package to read: {SENTENCEPIECE_HINT}")


def copy_tokenizer(source: Path, target: Path, *, kind: str | None = None) -> None:
    """Write the tokenizer of the folder `source` to `target`, which may exist; files of other parts stay behind.

    ``tokenizer.json`` is copied where transformers encodes with just that, and written anew where it does not or where
    the checkpoint has older files alone. `kind` is the transformers class in ``model_index.json``; without it, or for a
    processor, the one that ``tokenizer_config.json`` names is used. What is written does not depend on the
    checkpoint's place.

    Raises:
        CheckpointError: see `check_tokenizer`; transformers cannot load the folder; there is no padding token.
    """
    check_tokenizer(source)
    tokenizer = load_tokenizer(source, kind=kind)
    if tokenizer.pad_token is None:
        raise CheckpointError(f"{source / CONFIG} has no pad_token; prompts cannot be padded")
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    backend = _backend(tokenizer)
    if (source / VOCABULARY).exists() and _same_tokenizer(source / VOCABULARY, backend):
        shutil.copyfile(source / VOCABULARY, target / VOCABULARY)
    else:
        backend.save(str(target / VOCABULARY))
    _write_config(read_json(source / CONFIG), tokenizer, target / CONFIG)


def load_tokenizer(folder: Path, *, kind: str | None = None) -> Any:
    """The transformers tokenizer of a folder, from its files alone.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import transformers

    if kind is None or kind.endswith("Processor"):  # a processor's image half is of no use here, and needs torchvision
        kind = "AutoTokenizer"
    try:
        with _own_files(folder) as place:
            return getattr(transformers, kind).from_pretrained(place, local_files_only=True)
    except Exception as error:  # any kind, from JSON errors to those of other packages
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load: {reason}") from error


@contextlib.contextmanager
def _own_files(folder: Path) -> Iterator[Path]:
    """The folder, or a copy whose configuration names no files: transformers before 5 opens them wherever they lie."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if not any(key.endswith("_file") for key in MACHINE_SPECIFIC if config.get(key) is not None):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="intaglio-tokenizer-") as scratch:
        place = Path(shutil.copytree(folder, Path(scratch) / "tokenizer"))
        kept = {key: value for key, value in config.items() if key not in MACHINE_SPECIFIC}
        (place / CONFIG).write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
        yield place


def prompt_template(folder: Path, messages: Sequence[Any], *, placeholder: str = MARKER, **options: Any) -> str:
    """The text that the chat template of a tokenizer writes around a prompt, with `MARKER` where the prompt goes.

    `messages` is a conversation in which the string `placeholder` stands for the prompt, once; `options` go to
    ``apply_chat_template`` (``add_generation_prompt``, ``enable_thinking``). At run time
    `intaglio.runtimes.text.fill_template` puts a prompt in. A text that begins with the begin token is to be encoded
    with ``add_special_tokens=False``, as transformers' processors do.

    Raises:
        UsageError: `placeholder` is not in `messages` exactly once.
        CheckpointError: there is no chat template, it fails, it alters some prompt (strips it, for one), or it writes
            `MARKER` itself before the prompt.
    """
    if _count(messages, placeholder) != 1:
        found = _count(messages, placeholder)
        raise UsageError(f"messages have the placeholder {placeholder!r} {found} times, allowed: once")
    tokenizer = load_tokenizer(folder)
    own = folder / "chat_template.json"  # of older processors; their chat_template.jinja is the tokenizer's as well
    if own.exists() and not (folder / "chat_template.jinja").exists():
        tokenizer.chat_template = read_json(own)["chat_template"]

    def render(prompt: str) -> str:
        try:
            filled = _replaced(messages, placeholder, prompt)
            return str(tokenizer.apply_chat_template(filled, tokenize=False, **options))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the chat template of {folder} fails on the prompt {prompt!r}: {reason}") from error

    before, found_it, after = render(SENTINEL).partition(SENTINEL)
    template = before + MARKER + after
    if not found_it or SENTINEL in after or MARKER in before:
        raise CheckpointError(f"the chat template of {folder} does not have the prompt in it once: {template!r}")
    for probe in PROBES:
        if render(probe) != fill_template(template, probe):
            raise CheckpointError(f"the chat template of {folder} alters the prompt {probe!r}")
    return template


def _backend(tokenizer: Any) -> Any:
    """A copy of the ``tokenizers`` object inside, without padding and truncation."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _same_tokenizer(file: Path, backend: Any) -> bool:
    from tokenizers import Tokenizer

    stored = Tokenizer.from_file(str(file))
    stored.no_padding()
    stored.no_truncation()
    return bool(stored.to_str() == backend.to_str())


def _write_config(config: dict[str, Any], tokenizer: Any, file: Path) -> None:
    kept = {key: value for key, value in config.items() if key not in MACHINE_SPECIFIC}
    resolved = {name: getattr(tokenizer, name) for name in ("model_max_length", "padding_side", "truncation_side")}
    for key, token in tokenizer.special_tokens_map.items():
        written = kept.get(key)
        if (written["content"] if isinstance(written, dict) else written) != token:
            kept[key] = token
    kept |= resolved
    text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return False


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    return [_replaced(item, old, new) for item in value] if isinstance(value, list | tuple) else value


def _count(value: Any, text: str) -> int:
    if isinstance(value, str):
        return value.count(text)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_count(item, text) for item in items)
