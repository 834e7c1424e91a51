"""A file that was verified is not hashed again while it is the same, and never taken for the same when it is not."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from intaglio.profiles import artifact as module
from intaglio.profiles import verified
from intaglio.profiles.artifact import Artifact, read_sums, whole
from intaglio.profiles.errors import ArtifactError
from intaglio.profiles.staging import swap

NAME = "unet/model.onnx.data"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return verified.record_file()


@pytest.fixture
def hashed(cache, monkeypatch):
    """The names of the files that were hashed, in order."""
    names, real = [], module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: names.append(path.name) or real(path))
    return names


@pytest.fixture
def folder(tiny_artifact, copy_artifact, monkeypatch):
    """A copy of an artifact, old enough to be remembered."""
    monkeypatch.setattr(verified, "RACY_NS", 0)
    return copy_artifact(tiny_artifact)


def opened(folder, hashed):
    """How many files opening hashes."""
    hashed.clear()
    Artifact.open(folder)
    return len(hashed)


def test_the_second_open_hashes_nothing(folder, hashed):
    files = len(read_sums(folder))
    assert [opened(folder, hashed) for _ in range(3)] == [files, 0, 0]


def test_the_verb_hashes_everything_every_time(folder, hashed, intaglio):
    opened(folder, hashed)
    for _ in range(2):
        hashed.clear()
        assert intaglio("verify", folder)[0] == 0
        assert len(hashed) == len(read_sums(folder))


def test_what_is_remembered_is_nobody_elses(folder, hashed, cache):
    opened(folder, hashed)
    assert (cache.stat().st_mode & 0o777, cache.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    cache.chmod(0o622)
    assert opened(folder, hashed), "a file that others can write is not believed"


def test_young_files_are_hashed_again(tiny_artifact, copy_artifact, hashed):
    """Within two seconds a file may change without its times telling."""
    folder = copy_artifact(tiny_artifact)
    assert opened(folder, hashed) == opened(folder, hashed) == len(read_sums(folder))


def same_times(path, change):
    """Change a file and give it its times of before."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def flip(path):
    with path.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


def replace(path):
    """Another file takes its name."""
    other = path.with_name("other")
    shutil.copyfile(path, other)
    flip(other)
    os.replace(other, path)


@pytest.mark.parametrize("change", [flip, replace])
def test_a_change_that_keeps_size_and_time_is_noticed(change, folder, hashed):
    opened(folder, hashed)
    same_times(folder / NAME, change)
    with pytest.raises(ArtifactError, match=f"{NAME} was altered"):
        Artifact.open(folder)


def test_a_file_put_back_is_hashed_alone(folder, hashed):
    opened(folder, hashed)
    shutil.copy2(folder / NAME, folder / "x")
    os.replace(folder / "x", folder / NAME)
    assert opened(folder, hashed) == 1
    assert opened(folder, hashed) == 0


def test_the_list_of_files_is_checked_every_time(folder, hashed):
    opened(folder, hashed)
    (folder / "unet/extra").write_bytes(b"")
    with pytest.raises(ArtifactError, match="unet/extra is not listed"):
        Artifact.open(folder)
    (folder / "unet/extra").unlink()
    (folder / NAME).rename(folder.parent / "away")
    with pytest.raises(ArtifactError, match=f"{NAME} is missing"):
        Artifact.open(folder)


def test_an_edited_list_of_digests_is_not_excused_by_what_was_remembered(folder, hashed):
    opened(folder, hashed)
    path = folder / "SHA256SUMS"
    path.write_text(path.read_text().replace(read_sums(folder)[NAME], "0" * 64))
    with pytest.raises(ArtifactError, match="was altered"):
        Artifact.open(folder)


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[:-20],
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "no entries": lambda text: json.dumps(dict.fromkeys(json.loads(text), 3)),
    "no files": lambda text: json.dumps({k: {**v, "files": [1]} for k, v in json.loads(text).items()}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_ignored(name, folder, hashed, cache):
    files = opened(folder, hashed)
    cache.write_text(DAMAGE[name](cache.read_text()))
    assert opened(folder, hashed) == files
    assert opened(folder, hashed) == 0, "it was written anew"


def test_a_record_that_cannot_be_written_costs_time_only(folder, hashed, cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("in the way")
    files = len(read_sums(folder))
    assert [opened(folder, hashed) for _ in range(2)] == [files, files]


def test_folders_that_are_gone_are_forgotten(folder, hashed, cache, tmp_path):
    opened(folder, hashed)
    folder.rename(tmp_path / "moved")
    opened(tmp_path / "moved", hashed)
    assert list(json.loads(cache.read_text())) == [str(tmp_path / "moved")]


# --- an artifact that is replaced while it is read ------------------------------------------------------------------


def replaced(folder, source):
    """Put a copy of `source` in the place of `folder`, as a build does."""
    time.sleep(0.01)
    swap(shutil.copytree(source, folder.with_name("next")), folder)


def test_what_is_read_of_two_builds_is_thrown_away(folder, tiny_artifact):
    made, thrown = [], []

    def read(artifact):
        if len(made) < 2:
            replaced(folder, tiny_artifact.folder)
        made.append(len(made))
        return made[-1]

    assert whole(folder, read, discard=thrown.append) == 2
    assert thrown == [0, 1]


def test_a_failure_of_a_build_that_is_gone_does_not_count(folder, tiny_artifact):
    tries = []

    def read(artifact):
        tries.append(1)
        if len(tries) == 1:
            replaced(folder, tiny_artifact.folder)
            raise FileNotFoundError(artifact.folder / NAME)
        return "read"

    assert whole(folder, read) == "read"


def test_a_failure_of_the_build_that_is_there_counts(folder):
    def read(artifact):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        whole(folder, read)


def test_an_artifact_that_never_stands_still_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 3)
    with pytest.raises(ArtifactError, match="again and again"):
        whole(folder, lambda artifact: replaced(folder, artifact.folder))


def test_what_is_read_later_is_not_of_another_build(folder, tiny_artifact):
    artifact = Artifact.open(folder)
    artifact.check_current()
    (folder / "note").write_text("a folder that only gained a file is the same")
    artifact.check_current()
    (folder / "note").unlink()
    replaced(folder, tiny_artifact.folder)
    with pytest.raises(ArtifactError, match="was replaced since it was opened; load it again"):
        artifact.check_current()
    Artifact.open(folder).check_current()
