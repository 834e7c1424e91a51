"""A run that is killed keeps what it finished; another one finishes it. Processes are apart and the parent sleeps."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_bench import DELAYS, artifact_at, cases_of, fast_workers, journal_of, measured

from intaglio.bench import run
from intaglio.bench.journal import JOURNAL, begin, partial_folder, publishing, read_events
from intaglio.bench.report import write
from intaglio.profiles.errors import ToolError, UsageError

PARENT = 0.25  # of the wall time that the parent may compute; measured 0.05 with fake pipelines, 0.003 with real ones
STAGES = 0.02  # that the stages of an image may miss of the whole
STEP = 0.001  # seconds a step of known length may be off, or 1 %
CHILD = """
import sys, pathlib
sys.path[:0] = {paths!r}
import fake_bench
from intaglio.bench import run
run.SETTLE = 0.0
base = pathlib.Path({base!r})
artifact = fake_bench.artifact_at(base / "b" / "a") if not (base / "b").exists() else None
from intaglio.profiles.artifact import Artifact
artifact = artifact or Artifact.open(base / "b" / "a")
cases = fake_bench.cases_of(artifact, backends=("torch", "onnxruntime"), rounds=40)
journal = fake_bench.journal_of(base / "out", cases, [artifact])
run.run_matrix(cases, {{str(artifact.folder): artifact}}, journal, command="x", parts=())
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Workers are found and need not settle."""
    fast_workers(monkeypatch)


def test_what_a_killed_run_finished_is_kept_and_the_rest_is_measured(tmp_path):
    import intaglio

    paths = [str(Path(__file__).parent), str(Path(intaglio.__file__).parent.parent)]
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(base=str(tmp_path), paths=paths)])
    path = partial_folder(tmp_path / "out") / JOURNAL
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b'"timed"') < 7:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = [e for e in read_events(path) if e["event"] == "timed"]
    assert len(before) >= 7
    from intaglio.profiles.artifact import Artifact

    artifact = Artifact.open(tmp_path / "b/a")
    cases = cases_of(artifact, backends=("torch", "onnxruntime"), rounds=40)
    with pytest.raises(UsageError, match="--resume to finish it or --force"):
        journal_of(tmp_path / "out", cases, [artifact])
    journal = journal_of(tmp_path / "out", cases, [artifact], resume=True)
    with publishing(journal, tmp_path / "out") as folder:
        table = {str(artifact.folder): artifact}
        report = run.run_matrix(cases, table, journal, command="y", parts=())
        write(report, folder)
    assert not partial_folder(tmp_path / "out").exists()
    after = [e for e in read_events(tmp_path / "out" / JOURNAL) if e["event"] == "timed"]
    assert after[: len(before)] == before, "nothing that was measured is lost"
    assert report["sittings"] == 2
    whole = {t for t in range(40) if sum(e["turn"] == t for e in before) == 2}
    again = {e["turn"] for e in after[len(before) :]}
    assert not whole & again, "a round that was whole is not measured again"
    assert whole | again == set(range(40))
    for row in report["cases"]:
        assert row["image_s"]["n"] == 40
        assert row["speedup"]["n"] == 40, "both sides of a ratio are of one sitting"
        assert len(row["loads_s"]) == 2
    assert json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))["sittings"] == 2


def test_another_plan_is_not_resumed(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    cases = cases_of(artifact, backends=("torch",))
    journal_of(tmp_path / "out", cases, [artifact])
    more = cases_of(artifact, backends=("torch", "openvino"))
    with pytest.raises(UsageError, match=r"of another plan \(with a/openvino\)"):
        journal_of(tmp_path / "out", more, [artifact], resume=True)
    longer = cases_of(artifact, backends=("torch",), rounds=9)
    with pytest.raises(UsageError, match=r"of another plan \(a/torch: repeats\)"):
        journal_of(tmp_path / "out", longer, [artifact], resume=True)
    with pytest.raises(UsageError, match="there is no unfinished run"):
        begin(tmp_path / "other", {"digest": "x", "cases": [], "seed": 0}, resume=True, force=False)


def test_a_line_cut_short_is_dropped_and_a_damaged_one_refused(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    journal = journal_of(tmp_path / "out", cases_of(artifact, backends=("torch",)), [artifact])
    journal.write("error", case="x", error="y")
    path = journal.folder / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "timed", "case"')
    assert [e["event"] for e in read_events(path)] == ["plan", "error"]
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"error": "y"', b'"error": NaN'))
    with pytest.raises(UsageError, match="jsonl:2 is damaged"):
        read_events(path)


def test_a_failed_case_is_tried_again_in_the_next_sitting(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    flag = tmp_path / "broken"
    flag.touch()
    settings = ("a/openvino", {"crash_while": str(flag)})
    cases = cases_of(artifact, backends=("torch", "openvino"), settings=settings)
    journal = journal_of(tmp_path / "out", cases, [artifact])
    table = {str(artifact.folder): artifact}
    first = run.run_matrix(cases, table, journal, command="x", parts=())
    assert [r["status"] for r in first["cases"]] == ["ok", "error"]
    flag.unlink()
    journal = journal_of(tmp_path / "out", cases, [artifact], resume=True)
    second = run.run_matrix(cases, table, journal, command="x", parts=())
    assert [r["status"] for r in second["cases"]] == ["ok", "ok"]
    assert second["cases"][1]["speedup"]["n"] == 3


def test_the_parent_sleeps_while_a_worker_measures(tmp_path):
    report = measured(tmp_path, artifact_at(tmp_path / "a"), backends=("torch",), rounds=20, steps=20)
    assert report["parent_cpu_s"] < PARENT * report["seconds"]


def test_known_sleeps_are_measured_and_stages_add_up(tmp_path):
    report = measured(tmp_path, artifact_at(tmp_path / "a"), rounds=5, steps=20)
    for row in report["cases"]:
        assert row["stages_of_whole"] == pytest.approx(1, abs=STAGES)
        wanted = 20 * DELAYS[row["backend"]]
        assert min(row["image_s"]["values"]) >= wanted
        assert min(row["image_s"]["values"]) <= wanted * 1.01 + 20 * STEP
        assert len(row["warmup_s"]) == 1


def test_fresh_isolation_loads_for_every_round(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    cases = cases_of(artifact, backends=("torch", "openvino"), rounds=3)
    journal = journal_of(tmp_path / "out", cases, [artifact])
    table = {str(artifact.folder): artifact}
    report = run.run_matrix(cases, table, journal, command="x", isolation="fresh", parts=())
    for row in report["cases"]:
        assert len(row["loads_s"]) == 3
        assert row["image_s"]["n"] == row["speedup"]["n"] == 3
        assert len(row["prompts"]) == 2


def test_a_failure_beside_the_rounds_is_not_passed_over(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    cases = cases_of(artifact, backends=("torch",))
    journal = journal_of(tmp_path / "out", cases, [artifact])
    table = {str(artifact.folder): artifact}
    assert run.run_matrix(cases, table, journal, command="x", parts=())["cases"][0]["status"] == "ok"
    journal.write("error", case="a/torch", error="replay: the worker died")
    said = {"seed": 0, "isolation": "shared", "grid": ()}
    row = run.assemble(journal, cases, table, **said)["cases"][0]
    assert (row["status"], row["error"]) == ("error", "replay: the worker died")
    journal.sitting += 1  # another sitting did not fail
    assert run.assemble(journal, cases, table, **said)["cases"][0]["status"] == "ok"


def test_a_worker_for_one_question_does_not_stay(tmp_path):
    artifact = artifact_at(tmp_path / "a")
    cases = cases_of(artifact, backends=("torch",))
    journal = journal_of(tmp_path / "out", cases, [artifact])
    seat = run.Seat(case=cases[0], journal=journal, timeout=60)
    assert run.asked_once(seat, "replay", prompt=0, folder="x")["reason"] == "its components cannot be reached"
    assert seat.worker is None
    assert not journal.has("opened"), "loading for a question is no figure of the case"


def test_cases_that_do_not_fit_together_are_refused(tmp_path, monkeypatch):
    left = iter([4 << 30, 2 << 30, 1 << 30])
    monkeypatch.setattr(run, "available_bytes", lambda: next(left, 1 << 30))
    artifact = artifact_at(tmp_path / "a")
    cases = cases_of(artifact)
    journal = journal_of(tmp_path / "out", cases, [artifact])
    seats = [run.Seat(case=c, journal=journal, timeout=60) for c in cases]
    with pytest.raises(ToolError, match=r"1 of 3 cases are loaded and 2\.0 GiB are left, where one took 2\.0; add"):
        run.measure_shared(seats, 0, lambda text: None)
    for seat in seats:
        seat.close()


def test_groups_have_references_of_their_own(tmp_path):
    report = measured(tmp_path, artifact_at(tmp_path / "a"), artifact_at(tmp_path / "b", format_="int8"))
    assert [g["reference"] for g in report["groups"]] == ["a/torch"]
    cases = cases_of(artifact_at(tmp_path / "c"), backends=("torch", "openvino"))
    from dataclasses import replace

    both = [*cases, *(replace(c, steps=5, label=f"{c.label} steps=5") for c in cases)]
    artifact = artifact_at(tmp_path / "d/c")
    journal = journal_of(tmp_path / "two", [replace(c, artifact=str(artifact.folder)) for c in both], [artifact])
    table = {str(artifact.folder): artifact}
    found = run.run_matrix(
        [replace(c, artifact=str(artifact.folder)) for c in both], table, journal, command="x", parts=()
    )
    assert [g["reference"] for g in found["groups"]] == ["c/torch", "c/torch steps=5"]
    assert [r["reference"] for r in found["cases"]] == ["c/torch", "c/torch", "c/torch steps=5", "c/torch steps=5"]
