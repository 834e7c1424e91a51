"""Checkpoints and the files beside them that somebody made to run code or to read what is not theirs, one row each.

A row is made in a folder of its own out of a sound checkpoint. `outside` is a folder that nothing may touch: decoys
that would be read with success lie there. Whatever a payload does, it makes the file `CANARY`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ldm

MARK = "hostile_payload_7f3a"  # in every payload: the name of its module, and a word of its code
CODE = f"open({{canary!r}}, 'w').close()  # {MARK}\n"
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
HARMLESS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ground:
    """Where a row is made: `folder` is a copy of `base`, `outside` is forbidden, `canary` must not come to be."""

    base: Path
    folder: Path
    outside: Path

    @property
    def canary(self) -> Path:
        """The file that every payload makes."""
        return self.outside.parent / "CANARY"

    def code(self) -> str:
        """A module that leaves the canary when it is imported, whatever class is asked of it."""
        return CODE.format(canary=str(self.canary)) + "class Payload:\n    pass\n"


@dataclass(frozen=True)
class Row:
    """What is made, who is to read it (an entry of ``hostile_watch.ACTIONS``), what the refusal says.

    `words` empty means harmless: read, with nothing of it run and nothing outside of it opened.
    """

    make: Callable[[Ground], Any]
    words: tuple[str, ...]
    action: str = "build"


class Payload:
    """A pickle of it runs `CODE`."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


def edit(file: str, **changes: Any) -> Callable[[Ground], None]:
    """A maker that changes keys of a JSON file; ``...`` removes one."""

    def make(ground: Ground) -> None:
        path = ground.folder / file
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    return make


def replace(path: Path, old: str, new: str) -> None:
    """Other words in a file."""
    words = path.read_text()
    assert old in words
    path.write_text(words.replace(old, new, 1))


def text(file: str, content: str) -> Callable[[Ground], None]:
    """A maker that writes a file anew."""
    return lambda ground: (ground.folder / file).write_text(content) and None


def link(file: str, target: str, *, hard: bool = False) -> Callable[[Ground], None]:
    """A maker that puts a link to ``outside/target`` in place of a file or folder; the decoy there is a copy of it."""

    def make(ground: Ground) -> None:
        path, decoy = ground.folder / file, ground.outside / target
        if path.is_dir():
            shutil.copytree(path, decoy, dirs_exist_ok=True)
            shutil.rmtree(path)
        elif path.exists():
            decoy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, decoy)
            path.unlink()
        path.hardlink_to(decoy) if hard else path.symlink_to(decoy)

    return make


def fifo(file: str) -> Callable[[Ground], None]:
    """A maker that puts a pipe nobody writes to in place of a file: whoever opens it waits."""

    def make(ground: Ground) -> None:
        (ground.folder / file).unlink(missing_ok=True)
        os.mkfifo(ground.folder / file)

    return make


def module(file: str) -> Callable[[Ground], None]:
    """A maker that puts a payload's code into the folder."""
    return lambda ground: (ground.folder / file).write_text(ground.code()) and None


def both(*makers: Callable[[Ground], Any]) -> Callable[[Ground], None]:
    """All of them, in order."""

    def make(ground: Ground) -> None:
        for maker in makers:
            maker(ground)

    return make


def pickled(file: str, *, instead: str | None = None) -> Callable[[Ground], None]:
    """A maker of a pickle with a payload, of plain pickle or as torch's zip; `instead` is removed."""

    def make(ground: Ground) -> None:
        data = pickle.dumps(Payload(ground.code()))
        path = ground.folder / file
        if path.suffix in (".ckpt", ".safetensors"):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", data)
                archive.writestr("archive/version", "3\n")
        else:
            path.write_bytes(data)
        if instead:
            (ground.folder / instead).unlink()

    return make


def shards(name: str) -> Callable[[Ground], None]:
    """A maker of an index of shards that names a file by another place; the decoy is a copy of the real weights."""

    def make(ground: Ground) -> None:
        file = ground.folder / UNET
        shutil.copyfile(file, ground.outside / "shard.safetensors")
        given = name.format(outside=ground.outside)
        file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": given}}))
        file.unlink()

    return make


def header(change: Callable[[bytes, int], bytes], file: str = UNET) -> Callable[[Ground], None]:
    """A maker that rewrites a safetensors header: gets its JSON and the number of bytes behind it."""

    def make(ground: Ground) -> None:
        data = (ground.folder / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        made = change(data[8 : 8 + length], len(data) - 8 - length)
        (ground.folder / file).write_bytes(struct.pack("<Q", len(made)) + made + data[8 + length :])

    return make


def tensor(**facts: Any) -> Callable[[bytes, int], bytes]:
    """A change of the first tensor's facts."""

    def change(head: bytes, _: int) -> bytes:
        table = json.loads(head)
        first = next(k for k in table if k != "__metadata__")
        return json.dumps({**table, first: {**table[first], **facts}}).encode()

    return change


def huge(length: int) -> Callable[[Ground], None]:
    """A maker of a safetensors file that says its header has this many bytes."""

    def make(ground: Ground) -> None:
        data = (ground.folder / UNET).read_bytes()
        (ground.folder / UNET).write_bytes(struct.pack("<Q", length) + data[8:])

    return make


def config_key(key: str, value: Any, file: str = "unet/config.json", word: str = "") -> Row:
    """A row: a key that libraries run code for (or `word` somewhere in its value), and the code beside it."""
    return Row(both(edit(file, **{key: value}), module(f"{Path(file).parent}/{MARK}.py")), (file, word or key))


def index_part(words: tuple[str, ...], **parts: Any) -> Row:
    """A row: a part of ``model_index.json``, with code of that name in the folder."""
    return Row(both(edit("model_index.json", **parts), module(f"{MARK}.py"), module(f"unet/{MARK}.py")), words)


def hugging_face(ground: Ground) -> Path:
    """The folder as huggingface_hub keeps it: every file a link to a blob. Other than the same links by hand."""
    repository = ground.folder.parent / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    for number, file in enumerate(sorted(p for p in ground.folder.rglob("*") if p.is_file())):
        blob, place = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(ground.folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot


def cache_with_a_way_out(ground: Ground) -> Path:
    """The same, one blob of it a link to somewhere else."""
    snapshot = hugging_face(ground)
    blob = (snapshot / "tokenizer/merges.txt").resolve()
    shutil.move(blob, ground.outside / "merges.txt")
    blob.symlink_to(ground.outside / "merges.txt")
    return snapshot


def archive(suffix: str, form: str) -> Callable[[Ground], Path]:
    """A maker of an archive in place of the folder, with a member that would land outside."""

    def make(ground: Ground) -> Path:
        shutil.make_archive(str(ground.folder.parent / "archive"), form, ground.folder)
        path = next(ground.folder.parent.glob("archive.*")).rename(ground.folder.parent / f"archive{suffix}")
        if form == "zip":
            with zipfile.ZipFile(path, "a") as file:
                file.writestr("../outside/zip-slip.txt", "x")
        return path

    return make


def single(ground: Ground) -> Path:
    """The checkpoint as one file, beside its folder."""
    return ldm.write_ldm(ground.base, "sd1", ground.folder.parent / "one.safetensors")


def single_with(*makers: Callable[[Ground], Any]) -> Callable[[Ground], tuple[Path, Path]]:
    """A maker of a sound single file whose ``--config`` folder is hostile."""

    def make(ground: Ground) -> tuple[Path, Path]:
        both(*makers)(ground)
        return single(ground), ground.folder

    return make


def alone(name: str, maker: Callable[[str], Callable[[Ground], Any]] | None = None) -> Callable[[Ground], Path]:
    """A maker of one file, for an option that takes a path; `maker` is given the name."""

    def make(ground: Ground) -> Path:
        if maker is not None:
            maker(name)(ground)
        return ground.folder / name

    return make


def tiny_vae(*makers: Callable[[Ground], Any]) -> Callable[[Ground], Path]:
    """A maker of an AutoencoderTiny that was tampered with, in a folder ``taesd``."""

    def make(ground: Ground) -> Path:
        import diffusers

        size = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
        diffusers.AutoencoderTiny(**size).save_pretrained(ground.folder / "taesd")
        both(*makers)(ground)
        return ground.folder / "taesd"

    return make


EVIL = f"{MARK}.Payload"
DEEP = "[" * 100_000 + "]" * 100_000
TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch %s') }}"

INDEX = {
    "pipeline class nobody knows": index_part(("EvilPipeline", "not supported"), _class_name="EvilPipeline"),
    "pipeline class of its own module": index_part(("of its own code",), _class_name=[MARK, "Payload"]),
    "pipeline class by a dotted path": index_part((EVIL, "not supported"), _class_name=EVIL),
    "library that is a module in the folder": index_part(("unet", MARK, "not imported"), unet=[MARK, "Payload"]),
    "library that can do harm": index_part(("scheduler", "'os'", "not imported"), scheduler=["os", "DDIMScheduler"]),
    "library below diffusers": index_part(("vae", "diffusers.x"), vae=["diffusers.x", "AutoencoderKL"]),
    "class by a dotted path": index_part(("unet", "allowed"), unet=["diffusers", f"utils.{EVIL}"]),
    "class that is a function": index_part(("tokenizer", "pipeline"), tokenizer=["transformers", "pipeline"]),
    "class of another part": index_part(("unet is a", "AutoModel"), unet=["diffusers", "AutoModel"]),
    "part with a path for a name": index_part(
        ("../../outside", "unknown part"), **{"../../outside": ["diffusers", "X"]}
    ),
    "part with an absolute path": index_part(("unknown part",), **{"/etc": ["diffusers", "X"]}),
    "part nobody knows": index_part(("unknown part", "sidecar"), sidecar=["diffusers", "AutoencoderKL"]),
    "custom_pipeline": config_key("custom_pipeline", MARK, "model_index.json"),
}
KEYS = {
    "auto_map in a part": config_key("auto_map", {"AutoModel": EVIL}),
    "auto_map in a tokenizer": config_key(
        "auto_map", {"AutoTokenizer": [EVIL, None]}, "tokenizer/tokenizer_config.json"
    ),
    "auto_map in a text encoder": config_key("auto_map", {"AutoConfig": EVIL}, "text_encoder/config.json"),
    "custom_pipeline in a scheduler": config_key("custom_pipeline", MARK, "scheduler/scheduler_config.json"),
    "attention from a hub of kernels": config_key(
        "_attn_implementation", "kernels-community/flash-attn", "text_encoder/config.json"
    ),
    "attention by the internal key": config_key(
        "_attn_implementation_internal", "someone/kernel", "text_encoder/config.json"
    ),
    "attention by the public key": config_key("attn_implementation", "a/kernel:f", "text_encoder/config.json"),
    "trust_remote_code deep inside": config_key(
        "text_config", [{"a": {"trust_remote_code": True}}], "text_encoder/config.json", "trust_remote_code"
    ),
    "_target_ of Hydra": config_key("down_block_types", [{"_target_": "os.system"}], word="_target_"),
    "dunder key": config_key("__class__", EVIL, "text_encoder/config.json"),
    "key in a file only a library reads": Row(
        text("text_encoder/generation_config.json", json.dumps({"custom_generate": EVIL})),
        ("generation_config.json", "custom_generate"),
    ),
    "adapter that names another model": Row(
        text("text_encoder/adapter_config.json", json.dumps({"base_model_name_or_path": "/etc", "peft_type": "LORA"})),
        ("text_encoder/adapter_config.json", "PEFT"),
    ),
    "tokenizer file by another place": Row(
        edit("tokenizer/tokenizer_config.json", fast_tokenizer_files=["../../../outside/tokenizer.4.0.json"]),
        ("tokenizer_config.json", "fast_tokenizer_files", "../../../outside"),
    ),
    "config that recurses": Row(text("vae/config.json", f'{{"a": {DEEP}}}'), ("vae/config.json", "nested deeper")),
    "config of 40 MB": Row(
        text("vae/config.json", json.dumps({"a": "x" * 40_000_000})), ("vae/config.json", "bytes, allowed")
    ),
    "NaN in a config": Row(edit("unet/config.json", norm_eps=float("nan")), ("unet/config.json", "NaN")),
    "a number beyond floats": Row(
        lambda g: replace(g.folder / "unet/config.json", '"norm_eps": 1e-05', '"norm_eps": 1e999'),
        ("unet/config.json", "1e999"),
    ),
    "config that is not UTF-8": Row(
        lambda g: (g.folder / "unet/config.json").write_bytes(b'{"a": "\xff"}') and None,
        ("unet/config.json", "utf-8"),
    ),
}
WEIGHTS = {
    "pickled weights .bin": Row(pickled("unet/diffusion_pytorch_model.bin", instead=UNET), ("model.bin", "pickle")),
    "pickled weights .ckpt": Row(pickled("unet/model.ckpt", instead=UNET), ("model.ckpt", "pickle")),
    "pickled weights .pt": Row(pickled("text_encoder/model.pt", instead=TEXT), ("model.pt", "pickle")),
    "pickle named safetensors": Row(pickled(UNET), (UNET, "not a safetensors file")),
    "shards by a relative path": Row(shards("../../../outside/shard.safetensors"), ("index.json", "../../../outside")),
    "shards by an absolute path": Row(shards("{outside}/shard.safetensors"), ("index.json", "allowed: names")),
    "shards by a Windows path": Row(shards("..\\..\\outside\\shard.safetensors"), ("index.json", "allowed: names")),
    "shards that are no names": Row(
        both(shards("x"), text(f"{UNET}.index.json", '{"weight_map": {"a": ["x"]}}')), ("index.json", "allowed: names")
    ),
    "shard index beside whole weights": Row(
        text(f"{UNET}.index.json", '{"weight_map": {"a": "../../../outside/x"}}'), ("index.json", "../../../outside")
    ),
    "shard that is a link out": Row(
        both(shards("shard.safetensors"), link("unet/shard.safetensors", "shard.safetensors")),
        ("unet/shard.safetensors", "symbolic link out"),
    ),
    "header larger than memory": Row(huge(1 << 62), (UNET, "not a safetensors file")),
    "header larger than the file": Row(huge(90_000_000), (UNET, "not a safetensors file")),
    "tensors that overlap": Row(header(tensor(data_offsets=[4, 8])), (UNET, "not a safetensors file")),
    "tensor beyond the file": Row(header(tensor(data_offsets=[0, 1 << 40])), (UNET, "not a safetensors file")),
    "tensor of a negative size": Row(header(tensor(shape=[-1, 4])), (UNET, "not a safetensors file")),
    "size that overflows": Row(header(tensor(shape=[1 << 62, 1 << 62])), (UNET, "not a safetensors file")),
    "dtype that does not match the size": Row(header(tensor(dtype="F16")), (UNET, "not a safetensors file")),
    "dtype nobody knows": Row(header(tensor(dtype="PICKLE")), (UNET, "not a safetensors file")),
    "header with a key twice": Row(
        header(lambda head, _: head.replace(b"{", b'{"__metadata__":{},"__metadata__":{"a":"b"},', 1)),
        (UNET, "not a safetensors file"),
    ),
    "header that is not UTF-8": Row(
        header(lambda head, _: head.replace(b"weight", b"\xffeight", 1)), (UNET, "not a safetensors file")
    ),
    "header that recurses": Row(
        header(lambda head, _: b'{"__metadata__":{"a":' + DEEP.encode() + b"}}"), (UNET, "not a safetensors file")
    ),
}
LINKS = {
    "config is a link out": Row(link("unet/config.json", "config.json"), ("unet/config.json", "symbolic link out")),
    "index is a link out": Row(link("model_index.json", "index.json"), ("model_index.json", "symbolic link out")),
    "licence is a link out": Row(link("LICENSE", "secret.txt"), ("LICENSE", "symbolic link out")),
    "part is a link out": Row(link("vae", "vae"), ("vae", "symbolic link out")),
    "tokenizer file is a link out": Row(
        link("tokenizer/merges.txt", "merges.txt"), ("merges.txt", "symbolic link out")
    ),
    "template is a link out": Row(link("tokenizer/chat_template.jinja", "secret.txt"), ("jinja", "symbolic link out")),
    "weights are a link out": Row(link(UNET, "unet.safetensors"), (UNET, "symbolic link out")),
    "link to a device": Row(
        both(lambda g: (g.folder / UNET).unlink(), lambda g: (g.folder / UNET).symlink_to("/dev/zero")),
        (UNET, "/dev/zero"),
    ),
    "link to itself": Row(lambda g: (g.folder / "vae/x.json").symlink_to("x.json"), ("vae/x.json", "leads nowhere")),
    "config is a hard link": Row(link("unet/config.json", "config.json", hard=True), ("config.json", "hard link")),
    "template is a hard link": Row(
        link("tokenizer/chat_template.jinja", "secret.txt", hard=True), ("chat_template.jinja", "hard link")
    ),
    "weights are a hard link": Row(link(UNET, "unet.safetensors", hard=True), (UNET, "hard link")),
    "licence is a hard link": Row(link("LICENSE", "secret.txt", hard=True), ("LICENSE", "hard link")),
    "config is a pipe": Row(fifo("unet/config.json"), ("unet/config.json", "a named pipe")),
    "index is a pipe": Row(fifo("model_index.json"), ("model_index.json", "a named pipe")),
    "weights are a pipe": Row(fifo(UNET), (UNET, "a named pipe")),
    "readme is a pipe": Row(fifo("README.md"), ("README.md", "a named pipe")),
    "tokenizer file is a pipe": Row(fifo("tokenizer/vocab.json"), ("vocab.json", "a named pipe")),
    "cache with a way out": Row(cache_with_a_way_out, ("tokenizer/merges.txt", "symbolic link out")),
    "zip in place of a folder": Row(archive(".zip", "zip"), ("archive.zip is not a folder",)),
    "tar in place of a folder": Row(archive(".tar", "tar"), ("archive.tar is not a folder",)),
}
OTHERS = {
    "single file with a payload": Row(alone("one.ckpt", pickled), ("one.ckpt", "pickle"), "single"),
    "single file, a pickle named safetensors": Row(
        alone("one.safetensors", pickled), ("one.safetensors", "not a safetensors file"), "single"
    ),
    "single file that is a pipe": Row(alone("one.safetensors", fifo), ("one.safetensors is not a folder",), "single"),
    "configuration with a link out": Row(
        single_with(link("tokenizer/merges.txt", "merges.txt")), ("merges.txt", "symbolic link out"), "single"
    ),
    "configuration with code": Row(
        single_with(edit("text_encoder/config.json", auto_map={"AutoModel": EVIL})),
        ("config.json", "auto_map"),
        "single",
    ),
    "LoRA that is a pickle": Row(alone("lora.bin", pickled), ("lora.bin", "pickle"), "lora"),
    "LoRA, a pickle named safetensors": Row(
        alone("lora.safetensors", pickled), ("lora.safetensors", "not a safet"), "lora"
    ),
    "LoRA that is a pipe": Row(alone("lora.safetensors", fifo), ("no such file",), "lora"),
    "embedding that is a pickle": Row(alone("cat.pt", pickled), ("cat.pt", "pickle"), "embedding"),
    "embedding that is a device": Row(lambda g: Path("/dev/zero"), ("/dev/zero", "no such file"), "embedding"),
    "tiny VAE that is a pickle": Row(
        tiny_vae(pickled("taesd/diffusion_pytorch_model.bin", instead="taesd/diffusion_pytorch_model.safetensors")),
        ("diffusion_pytorch_model.bin", "pickle"),
        "preview",
    ),
    "tiny VAE with a link out": Row(
        tiny_vae(link("taesd/config.json", "taesd.json")), ("config.json", "symbolic link out"), "preview"
    ),
    "tiny VAE with code": Row(
        tiny_vae(edit("taesd/config.json", auto_map={"AutoModel": EVIL})), ("config.json", "auto_map"), "preview"
    ),
    "tiny VAE with a pipe": Row(tiny_vae(fifo("taesd/README.md")), ("README.md", "a named pipe"), "preview"),
    "template that leaves its sandbox": Row(
        lambda g: edit("tokenizer/tokenizer_config.json", chat_template=TEMPLATE % g.canary)(g),
        ("chat template", "fails"),
        "template",
    ),
    "vocabulary that recurses": Row(text("tokenizer/tokenizer.json", DEEP), ("no tokenizer that",), "tokenizer"),
}
SOUND = {
    "as it was saved": Row(lambda g: None, HARMLESS),
    "Hugging Face's cache": Row(hugging_face, HARMLESS),
    "code that nothing names": Row(
        both(
            *(module(f"{p}{n}.py") for p in ("", "unet/", "tokenizer/") for n in (MARK, "unet", "__init__", "pipeline"))
        ),
        HARMLESS,
    ),
    "pickle beside the weights": Row(
        both(pickled("unet/diffusion_pytorch_model.bin"), pickled("text_encoder/pytorch_model.bin")), HARMLESS
    ),
    "link inside": Row(
        both(
            lambda g: (g.folder / "unet/config.json").rename(g.folder / "unet.json"),
            lambda g: (g.folder / "unet/config.json").symlink_to("../unet.json"),
        ),
        HARMLESS,
    ),
    "links out where nothing is read": Row(
        both(lambda g: (g.folder / "notes").symlink_to(g.outside), link("assets.json", "secret.txt")), HARMLESS
    ),
    "what older transformers noted": Row(
        edit("text_encoder/config.json", _attn_implementation_autoset=True, auto_map=None, trust_remote_code=False),
        HARMLESS,
    ),
    "tokenizer files of another machine": Row(
        both(
            lambda g: shutil.copyfile(g.folder / "tokenizer/vocab.json", g.outside / "vocab.json"),
            lambda g: edit(
                "tokenizer/tokenizer_config.json",
                vocab_file=str(g.outside / "vocab.json"),
                tokenizer_file=str(g.outside / "secret.txt"),
                special_tokens_map_file="/home/me/special_tokens_map.json",
            )(g),
        ),
        HARMLESS,
    ),
    "single file": Row(single_with(), HARMLESS, "single"),
}
ROWS: dict[str, Row] = {**INDEX, **KEYS, **WEIGHTS, **LINKS, **OTHERS, **SOUND}
