"""Long checks have a home: which of them are missing, and which are older than the sources they speak of."""

from __future__ import annotations

import json
import warnings

import pytest

from intaglio.bench import evidence


class StaleEvidence(UserWarning):
    pass


def test_every_long_check_has_figures_on_file():
    states = evidence.status()
    for name, state in states.items():
        print(f"{name:<12} {state}")
        if state == "stale":
            warnings.filterwarnings("default", category=StaleEvidence)
            warnings.warn(StaleEvidence(f"{name} is older than its sources; run: make evidence {name}"), stacklevel=1)
    missing = [name for name, state in states.items() if state == "missing"]
    assert not missing, f"run: make evidence {' '.join(missing)}"


@pytest.mark.parametrize("name", evidence.CHECKS)
def test_records_say_what_was_run_where_and_on_what(name):
    facts = json.loads((evidence.ROOT / evidence.FOLDER / f"{name}.json").read_text())
    assert facts["command"] == f"make evidence {name}"
    assert facts["figures"]
    assert len(facts["sources_sha256"]) == 64
    assert facts["commit"]
    assert facts["machine"]


@pytest.mark.parametrize("name", evidence.CHECKS)
def test_sources_of_every_check_exist(name):
    for pattern in evidence.CHECKS[name].sources:
        assert list(evidence.ROOT.glob(pattern)), pattern


def test_a_changed_source_makes_a_record_stale(tmp_path, monkeypatch):
    check = evidence.Check(run="", sources=("a*.txt",), about="")
    monkeypatch.setattr(evidence, "CHECKS", {"one": check})
    (tmp_path / "a1.txt").write_text("x")
    assert evidence.status(tmp_path) == {"one": "missing"}
    file = tmp_path / evidence.FOLDER / "one.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"sources_sha256": evidence.source_digest(check, tmp_path)}))
    assert evidence.status(tmp_path) == {"one": "fresh"}
    (tmp_path / "a2.txt").write_text("y")
    assert evidence.status(tmp_path) == {"one": "stale"}
