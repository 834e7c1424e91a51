"""Rows of other tools in a benchmark: what is asked of them, and what of them is in the report."""

import pytest
from fake_bench import artifact_at, cases_of, fast_workers, journal_of

from intaglio.bench import peer_cases as module
from intaglio.bench import run
from intaglio.bench.assemble import new_row
from intaglio.bench.journal import plan_of
from intaglio.bench.matrix import matrix
from intaglio.bench.peer_cases import NAME, checkpoint_folder, peer_cases
from intaglio.bench.peers import PEERS
from intaglio.profiles.errors import UsageError


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Every peer is there and has exported; the checkpoint is an empty folder."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/model.safetensors").write_bytes(b"w" * 700)
    monkeypatch.setattr(module, "python_of", lambda name: f"/somewhere/{name}/bin/python")
    exported = {"folder": str(tmp_path / "exports/x"), "bytes": 900}
    monkeypatch.setattr(
        module, "prepare", lambda name, folder: exported if PEERS[name].export else {"folder": folder, "bytes": 0}
    )
    monkeypatch.setattr(module, "checkpoint_folder", lambda given, artifact: tmp_path / "checkpoint")
    return tmp_path


def test_every_peer_gets_a_case_for_each_picture_and_number_of_threads(installed):
    artifacts = {str(a.folder): a for a in (artifact_at(installed / "fp32"), artifact_at(installed / "int8"))}
    cases = matrix(list(artifacts.values()), ("torch", "openvino"), threads=1, prompts=("x",))
    cases += [c for steps in (4, 8) for c in matrix(list(artifacts.values()), ("torch",), steps=steps, prompts=("x",))]
    found = peer_cases(list(PEERS), cases, artifacts, "")
    assert [c.label for c in found[:3]] == ["peer/diffusers"] * 3
    for name, row in PEERS.items():
        own = [c for c in found if c.backend == name]
        assert [(c.threads, c.steps) for c in own] == [(1, None), (0, 4), (0, 8)]
        assert {c.loader for c in own} == {row.loader}
        assert {bool(c.python) for c in own} == {bool(row.environment)}
        assert {c.note for c in own} == {row.note}
        assert {c.bytes for c in own} == {900 if row.export else 700}
        assert {c.precision for c in own} <= {"fp32", "int8", "int4"}
        table = new_row(own[0], artifacts[own[0].artifact])
        assert table["artifact"] == NAME
        assert table["labels"] == [f"{own[0].label}: {row.note}"]
        assert table["artifact_bytes"] == own[0].bytes


def test_a_dry_run_exports_nothing(installed, monkeypatch):
    monkeypatch.setattr(module, "prepare", lambda name, folder: pytest.fail("it exported"))
    artifact = artifact_at(installed / "fp32")
    own = matrix([artifact], ("torch",), prompts=("x",))
    found = peer_cases(["optimum-intel"], own, {str(artifact.folder): artifact}, "", dry=True)
    assert [c.label for c in found] == ["peer/optimum-intel"]


def test_a_journal_does_not_name_the_places_of_a_machine(installed):
    artifact = artifact_at(installed / "fp32")
    artifacts = {str(artifact.folder): artifact}
    cases = peer_cases(["optimum-intel"], matrix([artifact], ("torch",), prompts=("x",)), artifacts, "")
    plan = plan_of(cases, {str(artifact.folder): artifact.manifest.digest}, 0)
    assert str(installed) not in str(plan)
    assert "/somewhere" not in str(plan)


def test_peers_are_compared_with_the_checkpoints_own_numbers(installed):
    artifact = artifact_at(installed / "int8", format_="int8")
    cases = matrix([artifact], ("torch",), prompts=("x",))
    with pytest.raises(UsageError, match="--peer needs an artifact that is not quantized"):
        peer_cases(["diffusers"], cases, {str(artifact.folder): artifact}, "")
    with pytest.raises(UsageError, match="unknown peer 'difusers'"):
        peer_cases(["difusers"], cases, {str(artifact.folder): artifact}, "")


def test_the_checkpoint_is_the_artifacts_own(tiny_artifact, tmp_path):
    from intaglio.profiles.errors import CheckpointError

    assert (checkpoint_folder("", tiny_artifact) / "model_index.json").exists()
    with pytest.raises(CheckpointError, match="is not the checkpoint this artifact was built from"):
        checkpoint_folder("emoji", tiny_artifact)


def test_a_peers_row_stands_beside_ours(tmp_path, monkeypatch):
    from dataclasses import replace

    fast_workers(monkeypatch)
    artifact = artifact_at(tmp_path / "a")
    own = cases_of(artifact, backends=("torch",))
    foreign = replace(own[0], name=NAME, label="peer/other", precision="fp32", note="no cache", bytes=5)
    journal = journal_of(tmp_path / "out", [*own, foreign], [artifact])
    report = run.run_matrix([*own, foreign], {str(artifact.folder): artifact}, journal, command="x", parts=())
    row = report["cases"][1]
    assert (row["artifact"], row["precision"], row["artifact_bytes"]) == (NAME, "fp32", 5)
    assert row["worst"]["identical"]
    assert row["speedup"]["n"] == 3
    assert list(report["artifacts"]) == ["a"], "a peer is no artifact"
