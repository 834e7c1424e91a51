"""``intaglio convert``: what torch.save wrote becomes safetensors; what a pickle can do besides does not happen."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest

from intaglio.exporters.convert import STAND_INS, convert, read_and_write
from intaglio.profiles.errors import CheckpointError, UsageError


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.system, (f"touch '{self.mark}'",))


class Subprocess(Malicious):
    """The same by another door."""

    def __reduce__(self):
        return (subprocess.check_call, (["touch", self.mark],))


class Evaluated(Malicious):
    """And another."""

    def __reduce__(self):
        return (eval, (f"open({self.mark!r}, 'w')",))


@pytest.fixture
def tensors():
    import torch

    torch.manual_seed(3)
    wide = torch.randn(6, 4)
    return {
        "plain": wide,
        "half": wide.half(),
        "bfloat": wide.bfloat16(),
        "transposed": wide.T,
        "slice": wide[1:3],
        "shared": wide,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "count": torch.tensor(7),
        "empty": torch.zeros(0),
    }


def saved(path, content, **options):
    import torch

    torch.save(content, path, **options)
    return path


def check(output, wanted):
    import torch
    from safetensors.torch import load_file

    found = load_file(output)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach()), name


@pytest.mark.parametrize(("zipped", "nested"), [(True, 0), (False, 1), (True, 2)])
def test_every_tensor_arrives(tensors, zipped, nested, tmp_path):
    content = tensors
    for depth in range(nested):
        content = {"state_dict": content, f"epoch{depth}": 3}
    source = saved(tmp_path / "x.ckpt", content, _use_new_zipfile_serialization=zipped)
    facts = convert(source, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", tensors)
    assert facts["tensors"] == len(tensors)
    assert facts["left_out"] == [f"epoch{depth}" for depth in range(nested)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.ckpt", "x.safetensors"]


def test_what_lightning_leaves_in_a_checkpoint_is_left_out(tensors, tmp_path, monkeypatch):
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    modules = {name: types.ModuleType(name) for name in names}
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    modules[names[-1]].ModelCheckpoint = callback
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert f"{names[-1]}.ModelCheckpoint" in STAND_INS
    state = {callback: {"monitor": "val/loss", "best_model_score": np.float32(0.1), "callback": callback()}}
    content = {"state_dict": tensors, "callbacks": state, "global_step": 470000, "optimizer_states": [{"lr": 1e-4}]}
    facts = convert(saved(tmp_path / "x.ckpt", content), tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", tensors)
    assert facts["left_out"] == ["callbacks", "global_step", "optimizer_states"]


DOORS = {"os.system": Malicious, "subprocess": Subprocess, "eval": Evaluated}


@pytest.mark.parametrize(
    ("door", "zipped"), [("os.system", True), ("os.system", False), ("subprocess", True), ("eval", True)]
)
def test_a_malicious_pickle_is_refused_and_does_nothing(door, zipped, tensors, tmp_path, intaglio):
    mark = tmp_path / "mark"
    content = {**tensors, "payload": DOORS[door](mark)}
    source = saved(tmp_path / "evil.ckpt", content, _use_new_zipfile_serialization=zipped)
    code, out, err = intaglio("convert", source, "-o", tmp_path / "out.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"intaglio: {source} refers to ")
    assert err.endswith("which is no tensor and could run code when it is read; nothing was written\n")
    assert [p.name for p in tmp_path.iterdir()] == ["evil.ckpt"]
    pickle.loads(pickle.dumps(DOORS[door](mark)))
    assert mark.exists(), "the payload works where somebody unpickles it"


def test_a_bare_pickle_is_refused_and_does_nothing(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(CheckpointError, match="nothing was written"):
        convert(tmp_path / "evil.bin", tmp_path / "out.safetensors")
    assert not mark.exists()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


BAD = {
    "not a pickle": (lambda p, t: p.write_bytes(b"garbage"), ["was not written by torch.save, or is damaged"]),
    "empty": (lambda p, t: p.write_bytes(b""), ["was not written by torch.save, or is damaged"]),
    "cut": (lambda p, t: cut(saved(p, t)), ["was not written by torch.save, or is damaged"]),
    "no tensors": (lambda p, t: saved(p, {"epoch": 3}), ["holds no tensor"]),
    "a bare tensor": (lambda p, t: saved(p, t["plain"]), ["holds no tensor"]),
    "sparse": (lambda p, t: saved(p, {"a": t["plain"].to_sparse()}), ["has a as"]),
    "complex": (lambda p, t: saved(p, {"a": t["plain"].to(dtype=__import__("torch").complex64)}), ["complex64"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted(name, tensors, tmp_path):
    make, words = BAD[name]
    source = tmp_path / "x.pt"
    make(source, tensors)
    facts = read_and_write(source, tmp_path / "x.safetensors")  # what the child process does
    assert all(word in facts["refused"] for word in words)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_child_that_dies_is_an_error_and_leaves_nothing(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr("intaglio.exporters.convert.CHILD", "import sys; sys.exit('no memory left')")
    with pytest.raises(CheckpointError, match=r"x\.pt could not be read: no memory left"):
        convert(saved(tmp_path / "x.pt", tensors), tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_an_existing_file_is_replaced_only_when_asked(tensors, tmp_path):
    source, output = saved(tmp_path / "x.ckpt", tensors), tmp_path / "x.safetensors"
    output.write_text("precious")
    with pytest.raises(UsageError, match="exists; choose another name or add --force"):
        convert(source, output)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    with pytest.raises(CheckpointError):
        convert(tmp_path / "evil.ckpt", output, force=True)
    assert output.read_text() == "precious", "what fails replaces nothing"
    convert(source, output, force=True)
    check(output, tensors)


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("gone.ckpt", "x.safetensors", "gone.ckpt is not a file; allowed: .bin, .ckpt"),
        ("x.safetensors", "y.safetensors", "x.safetensors is not a pickle by its name"),
        ("x.ckpt", "x.bin", "x.bin is not named .safetensors"),
    ],
)
def test_wrong_names(source, output, words, tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "x.ckpt", tensors)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        convert(source, output)
    assert words in str(caught.value)


def test_command_line(tensors, tmp_path, intaglio):
    source, output = saved(tmp_path / "x.ckpt", {"state_dict": tensors, "epoch": 3}), tmp_path / "x.safetensors"
    code, out, err = intaglio("convert", source, "-o", output)
    assert (code, err) == (0, "note: left out, being no tensors: epoch\n")
    assert out == f"{output}: {len(tensors)} tensors, 0.0 MB\n"
    code, out, err = intaglio("convert", source, "-o", output, "--force", "--json")
    assert json.loads(out) == {
        "output": str(output),
        "tensors": len(tensors),
        "left_out": ["epoch"],
        "bytes": output.stat().st_size,
    }
