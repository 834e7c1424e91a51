"""Artifacts that somebody changed to read or run what is not in them, and sealed again: every digest agrees."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import HARMLESS, MARK, Ground, Row, both, edit, fifo, link, module, replace

from intaglio.profiles.artifact import SUMS, format_sums, sha256
from intaglio.profiles.manifest import MANIFEST

PART = "text_encoder"
DATA = f"{PART}/model.onnx.data"


def seal(folder: Path) -> None:
    """New sizes and digests everywhere, as whoever changes an artifact on purpose would write them."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    sums = {n: sha256(folder / n) if (folder / n).is_file() else hashlib.sha256().hexdigest() for n in names}
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else None
    if manifest is not None:
        for name, record in manifest.get("files", {}).items():
            if name in sums:
                record.update(size=(folder / name).stat().st_size, sha256=sums[name])
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
        sums[MANIFEST] = sha256(folder / MANIFEST)
    sums.pop(SUMS, None)
    if not (folder / SUMS).is_symlink() and (folder / SUMS).is_file():
        (folder / SUMS).write_text(format_sums(sums))


def sealed(*makers: Callable[[Ground], Any]) -> Callable[[Ground], Path]:
    """All makers, then `seal`."""

    def make(ground: Ground) -> Path:
        both(*makers)(ground)
        seal(ground.folder)
        return ground.folder

    return make


def manifest(change: Callable[[dict[str, Any], Ground], Any]) -> Callable[[Ground], None]:
    """A maker that edits the manifest."""

    def make(ground: Ground) -> None:
        path = ground.folder / MANIFEST
        data = json.loads(path.read_text())
        change(data, ground)
        path.write_text(json.dumps(data))

    return make


def external(sparse: bool = False, **facts: str) -> Callable[[Ground], None]:
    """A maker that changes where the first large initializer lies; ``{outside}`` in a value is a copy of the data."""

    def make(ground: Ground) -> None:
        import onnx

        shutil.copyfile(ground.folder / DATA, ground.outside / "model.onnx.data")
        path = ground.folder / PART / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.external_data)
        values = {e.key: e.value for e in tensor.external_data}
        values |= {key: value.format(outside=ground.outside) for key, value in facts.items()}
        del tensor.external_data[:]
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)
        if sparse:
            made = model.graph.sparse_initializer.add()
            made.values.CopyFrom(tensor)
            count = math.prod(tensor.dims)
            made.values.name, made.values.dims[:], made.dims[:] = "sparse", [count], [count]
            made.indices.CopyFrom(onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [count], range(count)))
        path.write_bytes(model.SerializeToString())

    return make


def ir(old: str, new: str) -> Callable[[Ground], None]:
    """A maker that replaces words of the OpenVINO IR; ``{outside}`` as for `external`."""

    def make(ground: Ground) -> None:
        words = new.format(outside=ground.outside)
        replace(ground.folder / PART / "openvino_model.xml", old, words)

    return make


def opened(words: tuple[str, ...], *makers: Callable[[Ground], Any], action: str = "artifact") -> Row:
    """A row: refused (or harmless) when it is opened and loaded on every engine."""
    return Row(sealed(*makers), words, action)


def external_row(*words: str, **facts: str) -> Row:
    """A row of ONNX's matrix of external data."""
    return opened((*words, f"{PART}/model.onnx"), external(**facts))


XXE = '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY x SYSTEM "file://{outside}/secret.txt">]>'
ROWS: dict[str, Row] = {
    "manifest: file by a relative path": opened(
        ("manifest.json", "../../outside/x"),
        manifest(lambda m, _: m["files"].update({"../../outside/x": {"size": 1, "sha256": "0" * 64}})),
    ),
    "manifest: file by an absolute path": opened(
        ("manifest.json", "secret.txt"),
        manifest(lambda m, g: m["files"].update({f"{g.outside}/secret.txt": {"size": 1, "sha256": "0" * 64}})),
    ),
    "manifest: component by a path": opened(
        ("manifest.json", f"../{MARK}"),
        manifest(lambda m, _: m["components"].update({f"../{MARK}": m["components"][PART]})),
    ),
    "manifest: engine outside": opened(
        ("manifest.json", "../evil.engine"),
        manifest(
            lambda m, _: m["engines"].update(
                {f"{PART}/tensorrt/../../../evil.engine": {"sm": "sm90", "api": "tensorrt", "version": "11"}}
            )
        ),
    ),
    "manifest: dtype that is a path": opened(
        ("manifest.json", "/../"), manifest(lambda m, _: m["dtypes"]["onnx"].update({PART: "x/../../../../outside/y"}))
    ),
    "manifest: deep": opened(
        ("manifest.json", "nested deeper"),
        lambda g: (g.folder / MANIFEST).write_text('{"schema_version": 3, "a": ' + "[" * 500 + "]" * 500 + "}"),
    ),
    "manifest is a link out": Row(
        both(link(MANIFEST, "manifest.json"), lambda g: seal(g.folder)), (MANIFEST, "symbolic link"), "artifact"
    ),
    "manifest is a pipe": Row(fifo(MANIFEST), (MANIFEST, "a named pipe"), "artifact"),
    "list of digests is a pipe": Row(fifo(SUMS), (SUMS, "a named pipe"), "artifact"),
    "list of digests: file outside": Row(
        lambda g: (g.folder / SUMS).open("a").write(f"{'0' * 64}  ../../outside/secret.txt\n") and None,
        ("SHA256SUMS",),
        "artifact",
    ),
    "weights are a pipe": opened((DATA, "a named pipe"), fifo(DATA)),
    "tokenizer is a link out": opened(
        ("tokenizer.json", "symbolic link"), link("tokenizer/tokenizer.json", "tokenizer.json")
    ),
    "component is a link out": opened((PART, "symbolic link"), link(PART, PART)),
    "copied with a link out": opened(
        ("tokenizer.json", "symbolic link"), link("tokenizer/tokenizer.json", "tokenizer.json"), action="copied"
    ),
    "copied with a hard link": opened((DATA, "hard link"), link(DATA, "data", hard=True), action="copied"),
    "external data: relative": external_row(location="../../../outside/model.onnx.data"),
    "external data: relative within a path": external_row(location="x/../../../../outside/model.onnx.data"),
    "external data: absolute": external_row(location="{outside}/model.onnx.data"),
    "external data: a URL": external_row(location="file://{outside}/model.onnx.data"),
    "external data: beyond the file": external_row(length=str(1 << 50)),
    "external data: negative offset": external_row(offset="-1"),
    "external data: unknown key": external_row(__class__="x"),
    "external data: sparse": opened(
        (f"{PART}/model.onnx",), external(sparse=True, location="../../../outside/model.onnx.data")
    ),
    "external data: a link": opened((DATA, "symbolic link"), link(DATA, "data")),
    "external data: a link above": opened(
        (f"{PART}/inner", "symbolic link"), external(location="inner/data"), link(f"{PART}/inner", "inner")
    ),
    "external data: a hard link": opened((DATA, "hard link"), link(DATA, "data", hard=True)),
    "external data: a pipe": opened((f"{PART}/pipe", "a named pipe"), external(location="pipe"), fifo(f"{PART}/pipe")),
    "IR: entity of a file": opened(HARMLESS, ir('<?xml version="1.0"?>', XXE), ir("<net ", "<net x='&x;' ")),
    "IR: constant beyond the weights": opened(("openvino_model.xml",), ir(' offset="0"', f' offset="{1 << 60}"')),
    "IR: weights are a link": opened(
        ("openvino_model.bin", "symbolic link"), link(f"{PART}/openvino_model.bin", "openvino_model.bin")
    ),
    "as it was built": opened(HARMLESS),
    "code for others, and configurations that ask for it": opened(
        HARMLESS,
        module(f"{MARK}.py"),
        module(f"{PART}/openvino_model.py"),
        edit(f"{PART}/config.json", auto_map={"AutoModel": f"{MARK}.Payload"}),
        edit("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": [f"{MARK}.Payload", None]}),
    ),
}
