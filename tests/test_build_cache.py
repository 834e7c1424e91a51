"""The cache of builds: what is the same is made once, what differs in anything is made anew, damage is found."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
import tiny_flux
from partial import build_only

from intaglio.exporters import build_cache
from intaglio.exporters.build_cache import entries, entries_folder

INT4 = {"transformer": "int4"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_flux.flux(tmp_path_factory.mktemp("cached") / "flux")


@pytest.fixture(scope="module")
def filled(checkpoint, tmp_path_factory):
    """A cache with one int4 build for two targets in it, and that build."""
    home = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        # the cache of builds alone: traced graphs are taken from the tests' own
        patch.setattr(build_cache, "entries_folder", lambda: home / "cache/intaglio/builds")
        patch.setenv(build_cache.VARIABLE, "1GiB")
        built = build_only(checkpoint, home / "art", "transformer", quant=INT4, targets=("openvino",))
    return home / "cache", built


@pytest.fixture
def cache(filled, tmp_path, monkeypatch):
    """A copy of it."""
    shutil.copytree(filled[0], tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(build_cache.VARIABLE, "1GiB")
    return tmp_path / "cache/intaglio/builds"


def taken(artifact):
    """The stages of a build that the cache had."""
    log = json.loads((artifact.folder / "build.json").read_text())
    return {row["stage"].rpartition(": ")[2] for row in log["stages"] if row.get("from_build_cache")}


def test_the_same_build_is_taken_whole_and_is_the_same(cache, filled, checkpoint, tmp_path):
    again = build_only(checkpoint, tmp_path / "art", "transformer", quant=INT4, targets=("openvino",))
    assert taken(filled[1]) == set()
    assert taken(again) == {"capture", "onnx", "openvino"}
    assert again.manifest.digest == filled[1].manifest.digest
    again.verify()


def test_another_target_takes_the_graph_and_makes_the_rest(cache, checkpoint, tmp_path):
    other = build_only(checkpoint, tmp_path / "art", "transformer", quant=INT4, targets=())
    assert taken(other) == {"capture", "onnx"}
    assert other.manifest.components["transformer"].targets == ("onnx",)


CHANGES = {
    "format": lambda checkpoint, ask: ask.update(quant={"transformer": "int8"}),
    "method": lambda checkpoint, ask: ask.update(options={"quantize.method": "rtn"}),
    "shapes": lambda checkpoint, ask: None,
    "weights": lambda checkpoint, ask: change_weights(checkpoint),
    "configuration": lambda checkpoint, ask: change_config(checkpoint),
    "tools": lambda checkpoint, ask: None,
}


def change_weights(checkpoint):
    (file,) = (checkpoint / "transformer").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def change_config(checkpoint):
    path = checkpoint / "transformer/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"axes_dims_rope": config["axes_dims_rope"][::-1]}))


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_made_anew(what, cache, checkpoint, tmp_path, monkeypatch):
    copy, ask = shutil.copytree(checkpoint, tmp_path / "checkpoint"), {"quant": INT4}
    CHANGES[what](copy, ask)
    if what == "tools":
        monkeypatch.setattr("intaglio.exporters.build_component.tools", lambda: ("another",))
    decided = facts_of(copy, batch=3 if what == "shapes" else None, **ask)
    assert build_cache.read_entry(entries_folder() / build_cache.key_of(decided)) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build_cache.read_entry(entries_folder() / build_cache.key_of(facts_of(checkpoint, quant=INT4)))


def facts_of(checkpoint, batch=None, **ask):
    """What the cache would look a build's transformer up by."""
    from intaglio.exporters.build_component import graph_facts, prepared_of
    from intaglio.exporters.checkpoint import source_digests
    from intaglio.exporters.plan import make_plan

    plan = make_plan(checkpoint, **ask)
    if batch is not None:
        shapes = plan.shapes | {"batch": dataclasses.replace(plan.shapes["batch"], max=batch)}
        plan = dataclasses.replace(plan, shapes=shapes)
    (component,) = (c for c in plan.components if c.name == "transformer")
    return graph_facts(plan, prepared_of(plan, component), source_digests(plan.checkpoint), None)


def test_what_another_host_lowered_is_lowered_here(cache, checkpoint, tmp_path, monkeypatch):
    """A cache may lie in a home that several machines share, and engines are believed where they were built."""
    monkeypatch.setattr("intaglio.exporters.build_component.host", lambda: "another")
    other = build_only(checkpoint, tmp_path / "art", "transformer", quant=INT4, targets=("openvino",))
    assert taken(other) == {"capture"}


DAMAGES = {
    "a bit of a file": lambda place: flip(place / "files/b/data"),
    "a missing file": lambda place: (place / "files/a").unlink(),
    "half a note": lambda place: (place / "entry.json").write_text((place / "entry.json").read_text()[:100]),
    "a note of another entry": lambda place: edit_note(place, facts={}),
    "a path out of the entry": lambda place: edit_note(place, files={"../../x": "0" * 64}),
}
FACTS = {"weights": "1", "tools": "2"}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def edit_note(place, **changes):
    note = place / "entry.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | changes))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A cache with one small entry; the folder of that entry."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "small"))
    monkeypatch.setenv(build_cache.VARIABLE, "1MB")
    return filled_again(tmp_path)


def filled_again(folder):
    """Put the entry of FACTS into the cache."""
    source = folder / "source"
    (source / "b").mkdir(parents=True, exist_ok=True)
    (source / "a").write_bytes(b"graph")
    (source / "b/data").write_bytes(bytes(range(256)) * 9)
    about = {"component": "unet", "target": "graph"}
    assert build_cache.put(FACTS, source, ["a", "b/data"], about=about, notes={"record": 1}) == ""
    return entries_folder() / build_cache.key_of(FACTS)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_thrown_away_and_leaves_nothing_in_the_build(damage, small, tmp_path):
    taken = build_cache.take(FACTS, tmp_path / "taken")
    assert taken.notes == {"record": 1}
    assert (tmp_path / "taken/b/data").read_bytes() == (tmp_path / "source/b/data").read_bytes()
    DAMAGES[damage](small)
    assert build_cache.take(FACTS, tmp_path / "again") is None
    assert not [p for p in tmp_path.rglob("again/**/*") if p.is_file()]
    assert not (tmp_path.parent / "x").exists()
    filled_again(tmp_path)
    assert build_cache.take(FACTS, tmp_path / "again") == taken


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_damaged(damage, small, intaglio):
    assert intaglio("cache", "verify") == (0, "1 entries, 0 damaged and removed\n", "")
    DAMAGES[damage](small)
    code, out, err = intaglio("cache", "verify", "--json")
    assert code == 1
    assert str(small) in err
    assert list(json.loads(out)["damaged"]) == [small.name]
    assert not small.exists()


def graph_entry():
    return next(place for place, entry, _ in entries() if entry.about["target"] == "graph")


def test_list_and_gc(cache, intaglio):
    listed = json.loads(intaglio("cache", "list", "--json")[1])
    assert {row["about"]["target"] for row in listed["entries"]} == {"graph", "onnx", "openvino"}
    assert all(row["about"]["format"] == "int4" for row in listed["entries"])
    assert listed["bytes"] == sum(row["bytes"] for row in listed["entries"])
    assert intaglio("cache", "list")[1].count("transformer  int4") == len(listed["entries"])
    oldest = graph_entry()
    os.utime(oldest / "entry.json", (1, 1))
    (cache / ".new-left").mkdir()
    os.utime(cache / ".new-left", (1, 1))
    assert intaglio("cache", "gc", "--max-size", str(listed["bytes"] - 1))[0] == 0
    assert not oldest.exists()
    assert not (cache / ".new-left").exists()
    assert len(list(entries())) == len(listed["entries"]) - 1
    assert intaglio("cache", "gc", "--max-size", "0")[1] == f"{len(listed['entries']) - 1} removed, 0.0 MB left\n"
    code, _, err = intaglio("cache", "gc", "--max-size", "much")
    assert (code, err.count("\n")) == (2, 1)
    assert "--max-size=much is not allowed" in err


def test_what_exceeds_the_limit_is_not_kept_and_the_log_says_so(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(build_cache, "entries_folder", lambda: tmp_path / "builds")
    monkeypatch.setenv(build_cache.VARIABLE, "100KB")
    built = build_only(checkpoint, tmp_path / "art", "transformer", quant=INT4)
    log = json.loads((built.folder / "build.json").read_text())
    (reason,) = {row["not_cached"] for row in log["stages"] if "not_cached" in row}
    assert "more than 50% of INTAGLIO_BUILD_CACHE=100000" in reason
    monkeypatch.setenv(build_cache.VARIABLE, "0")
    build_only(checkpoint, tmp_path / "none", "transformer", quant=INT4)
    assert not (tmp_path / "builds").exists()


def test_a_cache_that_cannot_be_written_costs_nothing_else(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build_cache, "entries_folder", lambda: tmp_path / "file" / "builds")
    monkeypatch.setenv(build_cache.VARIABLE, "1GiB")
    built = build_only(checkpoint, tmp_path / "art", "transformer", quant=INT4)
    log = json.loads((built.folder / "build.json").read_text())
    assert any("not_cached" in row for row in log["stages"])
    built.verify()


def test_a_wrong_limit_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv(build_cache.VARIABLE, "lots")
    from intaglio.profiles.errors import UsageError

    with pytest.raises(UsageError, match="INTAGLIO_BUILD_CACHE=lots is not allowed"):
        build_only(checkpoint, tmp_path / "art", "transformer", quant=INT4)
