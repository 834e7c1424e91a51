"""Long checks have a home: which of them are missing, and which are older than the sources they speak of."""

from __future__ import annotations

import json

import pytest

from intaglio.bench import evidence


@pytest.mark.parametrize("name", evidence.CHECKS)
def test_the_figures_on_file_are_whole_and_as_new_as_their_sources(name):
    """A check that is missing or older than its sources is named in the summary; a record that lies fails."""
    state = evidence.status()[name]
    if state == "missing":
        pytest.skip(f"evidence {name!r} is missing; run: make evidence {name}")
    facts = json.loads((evidence.ROOT / evidence.FOLDER / f"{name}.json").read_text())
    assert facts["command"] == f"make evidence {name}"
    assert facts["figures"]
    assert len(facts["sources_sha256"]) == 64
    assert len(facts["commit"]) == 40
    assert facts["machine"]
    if state == "stale":
        pytest.skip(f"evidence {name!r} is older than its sources; run: make evidence {name}")


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
