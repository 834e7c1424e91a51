"""The table of other tools, their environments, and their loaders beside our torch backend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peer_run
import pytest

from intaglio.bench import peer_checkpoint, peers
from intaglio.bench.peer_common import opened
from intaglio.bench.peers import ENVIRONMENTS, EXPORTS, PEERS, TORCH, make, python_of
from intaglio.profiles.errors import CheckpointError, ToolError, Unsupported, UsageError
from intaglio.profiles.registry import resolve
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.sampling import StepEvent

LATENTS = 1e-4  # relative L2; measured 6e-7 with diffusers, 4e-6 with optimum's own exports
REQUEST = {"seed": 11, "num_inference_steps": 4, "width": 64, "height": 96}


class FakePip:
    """Does what the commands would leave behind; fails at the first that contains `fails`."""

    def __init__(self, fails="nothing"):
        self.commands, self.fails = [], fails

    def __call__(self, command):
        self.commands.append(list(command))
        if any(self.fails in word for word in command):
            raise ToolError(f"{self.fails} failed")
        if "venv" in command:
            folder = Path(command[-1])
            (folder / "lib/python3.11/site-packages").mkdir(parents=True)
            (folder / "bin").mkdir()
            (folder / "bin/python").write_text("")
        return "torch==2.13.0\n"


@pytest.mark.parametrize("name", [n for n, p in PEERS.items() if p.environment])
def test_an_environment_is_made_once_with_the_pins_of_the_table(name, tmp_path):
    pip = FakePip()
    folder = make(name, tmp_path, run=pip)
    row = ENVIRONMENTS[PEERS[name].environment]
    assert python_of(name, tmp_path) == str(folder / "bin/python")
    install = next(c for c in pip.commands if "install" in c)
    assert set(row.requirements) <= set(install)
    assert "-c" in install and TORCH in (folder / "constraints.txt").read_text().splitlines()
    assert [c[-1] for c in pip.commands if "uninstall" in c] == list(row.without)
    assert (folder / "lib/python3.11/site-packages/intaglio/bench/worker.py").exists()
    assert json.loads((folder / "peer.json").read_text())["installed"] == ["torch==2.13.0"]
    done = len(pip.commands)
    assert make(name, tmp_path, run=pip) == folder
    assert len(pip.commands) == done


@pytest.mark.parametrize("fails", ["venv", "install", "uninstall", "freeze"])
def test_an_environment_is_there_whole_or_not_at_all(fails, tmp_path):
    with pytest.raises(ToolError, match=fails):
        make("optimum-intel", tmp_path, run=FakePip(fails))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_outdated_environment_is_answered_with_the_command(tmp_path):
    with pytest.raises(UsageError, match=r"not installed; run: python -m intaglio\.bench\.peers make openvino-genai"):
        python_of("openvino-genai", tmp_path)
    folder = make("openvino-genai", tmp_path, run=FakePip())
    (folder / "peer.json").write_text(json.dumps({"requirements": ["openvino-genai==1.0"], "installed": []}))
    for refused in (python_of, make):
        with pytest.raises(UsageError, match="remove it, then run"):
            refused("openvino-genai", tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'diffusers'"):
        python_of("difusers", tmp_path)
    with pytest.raises(UsageError, match="runs in this interpreter"):
        make("diffusers", tmp_path)


def test_every_row_names_what_exists_and_pins_it(capsys):
    for peer in PEERS.values():
        assert callable(resolve(peer.loader))  # whose modules import nothing of the tools
        assert not peer.environment or peer.environment in ENVIRONMENTS
        assert not peer.export or peer.export in EXPORTS
        assert peer.families and peer.note
    for row in EXPORTS.values():
        assert callable(resolve(row.function))
    for row in ENVIRONMENTS.values():
        assert all("==" in requirement for requirement in row.requirements)
        assert not any(r.startswith("torch") and r != TORCH for r in row.requirements)
    assert peers.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in PEERS)


def test_an_export_is_made_once_and_again_when_the_checkpoint_changes(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    monkeypatch.setattr(peers, "python_of", lambda name: "python")
    asked = []

    def run(command):
        asked.append(command)
        folder = Path(command[-1])
        folder.mkdir(parents=True)
        (folder / "prepared.json").write_text(json.dumps({"seconds": 2.5, "bytes": 7}))

    first = peers.prepare("openvino-genai", checkpoint, tmp_path / "out", run=run)
    again = peers.prepare("optimum-intel", checkpoint, tmp_path / "out", run=run)  # GenAI reads its export
    assert first == again and first["seconds"] == 2.5 and len(asked) == 1
    (checkpoint / "model_index.json").write_text((checkpoint / "model_index.json").read_text() + "\n")
    assert peers.prepare("optimum-intel", checkpoint, tmp_path / "out", run=run)["folder"] != first["folder"]


def test_loaders_refuse_what_they_would_not_heed(tiny_artifact):
    with pytest.raises(UsageError, match="no setting 'dtype'"):
        opened(tiny_artifact.folder, "optimum-intel", {"dtype": "float16"})
    with pytest.raises(UsageError, match="no setting 'export'"):
        opened(tiny_artifact.folder, "diffusers", {"export": "x"})
    with pytest.raises(Unsupported, match="does not run the family 'sd'"):
        opened(tiny_artifact.folder, "openvino-genai-taylorseer", None)


@pytest.mark.parametrize("chosen", [{}, {"count": 2, "scheduler": "euler_a"}, {"guidance_scale": 1.0}])
def test_diffusers_makes_the_latents_of_our_torch_backend(chosen, tiny_checkpoint, tiny_artifact):
    where = {"backend": "diffusers", "threads": 1, "checkpoint": str(tiny_checkpoint)}
    pipe = resolve(PEERS["diffusers"].loader)(tiny_artifact.folder, **where)
    result, events = peer_run.finish(pipe.stream("a red cat", **REQUEST, **chosen))
    ours = load(tiny_artifact, backend="torch", checkpoint=str(tiny_checkpoint))
    expected, ours_events = peer_run.finish(ours.stream("a red cat", **REQUEST, **chosen))
    assert len(events) == len(ours_events) and all(isinstance(event, StepEvent) for event in events)
    for event, ours_event in zip(events, ours_events, strict=True):
        assert relative_l2(event.latents, ours_event.latents) <= LATENTS
        assert event.timestep == ours_event.timestep and event.seconds > 0
    assert relative_l2(result.latents, expected.latents) <= LATENTS
    assert len(result.images) == chosen.get("count", 1) and result.images[0].size == (64, 96)
    assert result.seconds.keys() >= {"text_encoder", "denoiser", "vae_decoder"}
    assert 0 < result.seconds["denoiser"] <= sum(event.seconds for event in events)
    other, _ = peer_run.finish(pipe.stream("a red cat", **{**REQUEST, "seed": 12}, **chosen))
    assert relative_l2(other.latents, expected.latents) > 0.1  # the comparison can fail


@pytest.mark.parametrize("peer", ["optimum-intel", "optimum-onnx"])
def test_a_tool_on_its_own_export_makes_our_latents(peer, tiny_checkpoint, tiny_artifact, tmp_path):
    peer_run.python_of(peer)
    folder = tmp_path / "export"
    peer_run.ask(peer, "make_export", name=PEERS[peer].export, checkpoint=tiny_checkpoint, folder=folder)
    assert json.loads((folder / "prepared.json").read_text())["seconds"] > 0
    found = peer_run.picture(peer, tiny_artifact.folder, tmp_path / "a.npz", "a red cat", REQUEST, export=folder)
    ours = load(tiny_artifact, backend="onnxruntime")("a red cat", **REQUEST)
    assert relative_l2(found["latents"], ours.latents) <= LATENTS
    assert found["steps"] == REQUEST["num_inference_steps"] and np.array_equal(found["last"], found["latents"])


def test_text_encoders_get_the_names_an_older_transformers_knows(tiny_checkpoint, tmp_path):
    from safetensors.numpy import load_file
    from transformers import CLIPTextModel

    folder = Path(shutil.copytree(tiny_checkpoint / "text_encoder", tmp_path / "text_encoder"))
    file = folder / "model.safetensors"
    before = load_file(file)
    assert any(name.startswith("embeddings.") for name in before)  # else there is nothing to do
    peer_checkpoint.prefix(file)
    after = load_file(file)
    assert set(after) == {f"text_model.{name}" for name in before}
    assert all(np.array_equal(after[f"text_model.{name}"], values) for name, values in before.items())
    peer_checkpoint.check(CLIPTextModel, folder)


def test_a_text_encoder_that_would_stay_random_is_refused(tiny_checkpoint, tmp_path):
    from safetensors.numpy import load_file, save_file
    from transformers import CLIPTextModel

    folder = Path(shutil.copytree(tiny_checkpoint / "text_encoder", tmp_path / "text_encoder"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not load 1 parameters of text_encoder"):
        peer_checkpoint.check(CLIPTextModel, folder)


def test_a_row_named_after_codes_is_refused_where_nothing_was_coded(tiny_artifact, tiny_artifact_int8):
    from intaglio.bench.peer_optimum_intel import checked

    assert checked(tiny_artifact.folder, "fp32")["unet"]["f32"] > 0
    for artifact, weights in ((tiny_artifact, "int8"), (tiny_artifact, "int4"), (tiny_artifact_int8, "fp32")):
        with pytest.raises(ToolError, match=f"is not {weights}"):
            checked(artifact.folder, weights)
    assert checked(tiny_artifact_int8.folder, "int8")


def test_another_precision_than_float32_is_refused(tiny_artifact):
    import openvino

    from intaglio.bench.peer_optimum_intel import check

    path = tiny_artifact.component("vae_decoder") / "openvino_model.xml"
    check(openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}), "vae_decoder")

    class Half:
        def get_property(self, name):
            assert name == "INFERENCE_PRECISION_HINT"
            return openvino.Type.bf16

    with pytest.raises(Unsupported, match="computes unet in bf16"):
        check(Half(), "unet")
