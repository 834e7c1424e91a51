"""The files of a report, the database of reports, and the README's figures."""

import copy
import csv
import io
import json

import pytest
from fake_bench import artifact_at, fast_workers, measured

from intaglio.bench import database, report, run
from intaglio.bench.report_cli import configure_report, run_report
from intaglio.bench.report_files import check_schema, flat, model_card, to_csv
from intaglio.profiles.errors import UsageError

pytest.importorskip("flip_evaluator")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two artifacts in a folder, and its data as read back."""
    with pytest.MonkeyPatch.context() as patch:
        fast_workers(patch)
        base = tmp_path_factory.mktemp("files")
        artifacts = artifact_at(base / "fp32"), artifact_at(base / "int8", format_="int8")
        report.write(measured(base, *artifacts, backends=("torch", "openvino"), parts=run.PARTS), base / ".out.partial")
    return base / ".out.partial", json.loads((base / ".out.partial/report.json").read_text(encoding="utf-8"))


@pytest.fixture
def data(written):
    """A copy to change."""
    return copy.deepcopy(written[1])


def test_a_report_keeps_its_schema(data):
    check_schema(data)


BREAKS = {
    "an unknown key": lambda r: r.update(colour="red"),
    "an older version": lambda r: r.update(schema_version=1),
    "a figure that is a text": lambda r: r["cases"][0]["image_s"].update(median="fast"),
    "a missing figure": lambda r: r["cases"][0].pop("memory"),
    "a negative time": lambda r: r["cases"][0].update(load_s=-1.0),
    "no digest": lambda r: r["cases"][0]["prompts"][0].update(sha256="x"),
    "no case": lambda r: r.update(cases=[]),
    "a status of its own": lambda r: r["cases"][0].update(status="fine"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_the_schema_does_not_have_is_refused(data, name):
    BREAKS[name](data)
    with pytest.raises(UsageError, match=r"is not as report\.schema\.json has it"):
        check_schema(data)


def test_the_csv_has_a_line_a_case_and_reads_back(data):
    rows = list(csv.DictReader(io.StringIO(to_csv(data))))
    assert [r["label"] for r in rows] == [c["label"] for c in data["cases"]]
    for row, case in zip(rows, data["cases"], strict=True):
        assert float(row["image_s_median"]) == case["image_s"]["median"]
        assert int(row["memory_peak_bytes"]) == case["memory"]["peak_bytes"]
        assert row["vram_process_bytes"] == "", "what is not known is empty, not zero"
        assert list(row) == list(flat(case))


def test_the_hub_reads_the_model_card(data):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(model_card(data))
    assert card.data.library_name == "intaglio"
    assert card.data.pipeline_tag == "text-to-image"
    assert {"torch", "openvino", "int8", "sd"} <= set(card.data.tags)
    found = {(e.metric_type, e.metric_name): e.metric_value for e in card.data.eval_results}
    for case in data["cases"]:
        name = f"Seconds per image ({case['backend']}, {case['precision']}, {data['machine']['cpu']['model']})"
        assert found["latency", name] == case["image_s"]["median"]
    assert "| fp32 | torch | fp32 |" in card.text
    assert str(data["command"]) in card.text


def reported(folder, *flags):
    import argparse

    parser = argparse.ArgumentParser()
    configure_report(parser)
    return run_report(parser.parse_args([str(folder), *flags]))


def test_everything_is_made_again_from_the_json_byte_by_byte(written, tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(written[0], folder)
    assert reported(folder, "--check") == 0
    names = ("report.md", "report.csv", "report.html")
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    assert reported(folder, "--check") == 1
    assert reported(folder) == 0
    assert {name: (folder / name).read_bytes() for name in names} == before
    (folder / "report.md").write_text("# Better figures\n")
    assert reported(folder, "--check") == 1
    assert "report.md is not what report.json makes" in capsys.readouterr().err
    assert reported(folder, "--model-card") == 0
    assert capsys.readouterr().out.startswith("---\nlibrary_name: intaglio")


def test_a_folder_without_a_report_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="run: intaglio bench ARTIFACT"):
        reported(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UsageError, match="is no report: it holds a list"):
        reported(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": NaN}')
    with pytest.raises(UsageError, match="is no report"):
        reported(tmp_path)


def test_a_filed_report_is_of_its_machine_and_cannot_change_unseen(data, tmp_path):
    path = database.submit(data, "embedded", tmp_path)
    assert path.parent.name == database.machine_name(data["machine"])
    assert list(database.reports(tmp_path)) == [path]
    assert database.shown(tmp_path)[0] == path
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"sittings": 1', '"sittings": 2'), encoding="utf-8")
    with pytest.raises(UsageError, match="is not what its name says"):
        database.reports(tmp_path)
    path.write_text(text, encoding="utf-8")
    path.parent.rename(tmp_path / "another-machine")
    with pytest.raises(UsageError, match="is of the machine"):
        database.reports(tmp_path)
    with pytest.raises(UsageError, match="small letters"):
        database.submit(data, "My Report", tmp_path)
    data["cases"][0]["colour"] = "red"
    with pytest.raises(UsageError, match="schema"):
        database.submit(data, "embedded", tmp_path)


def test_the_newest_report_of_a_name_is_shown(data, tmp_path):
    database.submit(data, "embedded", tmp_path)
    data["created"] = "2999-01-01T00:00:00Z"
    newest = database.submit(data, "embedded", tmp_path)
    database.submit({**data, "created": "2999-01-02T00:00:00Z"}, "other", tmp_path)
    assert database.shown(tmp_path)[0] == newest
    with pytest.raises(UsageError, match="no report 'third' is filed"):
        database.shown(tmp_path, "third")


def test_the_readmes_figures_are_those_on_file():
    text = database.README.read_text(encoding="utf-8")
    assert text.count(database.START) == text.count(database.END) == 1
    assert database.readme(text) == text
    root = database.ROOT / database.FOLDER
    assert database.reports(root), "every filed report is whole"
    path, found = database.shown(root)
    assert path.stem in text
    for case in found["cases"]:
        if case["status"] == "ok":
            assert f"{case['speedup']['median']:.2f}" in text


def test_likely_machines_have_names_of_their_own():
    machine = {"cpu": {"model": "Intel(R) Xeon(R) Processor", "cores": 2, "flags": ["avx512_vnni"]}, "gpus": []}
    assert database.machine_name(machine) == "intel-xeon-processor-avx512-vnni-2-cores"
    card = {**machine, "gpus": [{"name": "NVIDIA GeForce RTX 4090"}]}
    assert database.machine_name(card) == "nvidia-geforce-rtx-4090-2-cores"
