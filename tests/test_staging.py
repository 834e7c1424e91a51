"""A target is absent, old or complete whatever happens to the process that makes it, and the next one tidies up."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from partial import build_only
from rot import Nursery, law

from intaglio.profiles import staging
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import UsageError
from intaglio.profiles.staging import CONTENT, claim, writing

TARGETS = ["onnx", "openvino"]
POINTS = 6  # of a build that are tried here; `make evidence rot` tries all
NOBODY = 65534
KEY = "0123456789abcdef"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def make(target, text, **options):
    """A folder that looks like an artifact, made by `writing`."""
    with writing(target, **options) as folder:
        (folder / "manifest.json").write_text(text)


def text_of(target):
    return (target / "manifest.json").read_text()


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch):
    """With and without a file system that can exchange two names."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    return request.param


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_folder_appears_and_is_replaced(renames, tmp_path):
    target = tmp_path / "deep/artifact"
    make(target, "old")
    with writing(target, force=True) as folder:
        (folder / "manifest.json").write_text("new")
        assert text_of(target) == "old"
    assert text_of(target) == "new"
    assert names(tmp_path / "deep") == ["artifact"]


def test_the_exchange_is_what_happens_here(tmp_path):
    """Else the target is absent for a moment, and the tests of it prove little."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    if not staging.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    assert (tmp_path / "a/text").read_text() == "b"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_are_those_of_the_umask_whatever_libraries_wrote(umask, tmp_path):
    before = os.umask(umask)
    try:
        with writing(tmp_path / "artifact") as folder:
            (folder / "unet").mkdir(mode=0o700)
            (folder / "unet/model.onnx").touch(mode=0o600)
            (folder / "unet/run").touch(mode=0o755)
    finally:
        os.umask(before)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    folder, file = 0o777 & ~umask, 0o666 & ~umask
    assert found == {"artifact": folder, "unet": folder, "model.onnx": file, "run": file}


def test_everything_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: order.append(str(Path(f"/proc/self/fd/{d}").readlink())) or fsync(d))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    with writing(tmp_path / "artifact", key=KEY) as folder:
        (folder / "unet").mkdir()
        (folder / "unet/data").write_text("")
    inside = tmp_path / f".artifact.{KEY}.building" / CONTENT
    assert [Path(p) for p in order[:3]] == [inside / "unet/data", inside / "unet", inside]
    assert order[3:] == ["rename", str(tmp_path)]


def test_a_dangling_link_is_in_the_way(tmp_path):
    (tmp_path / "artifact").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"):
        make(tmp_path / "artifact", "new")


def test_a_link_is_replaced_and_what_it_leads_to_stays(renames, tmp_path):
    make(tmp_path / "v1", "one")
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    make(tmp_path / "current", "two", force=True)
    assert (text_of(tmp_path / "current"), text_of(tmp_path / "v1")) == ("two", "one")
    assert names(tmp_path) == ["current", "v1"]


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_block_that_fails_leaves_nothing(tmp_path):
    make(tmp_path / "artifact", "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), writing(tmp_path / "artifact", force=True) as folder:
            (folder / "half").write_text("")
            raise error
    assert names(tmp_path) == ["artifact"]
    assert text_of(tmp_path / "artifact") == "old"


def test_a_rename_that_fails_leaves_the_old_artifact(tmp_path, monkeypatch):
    old, real = tmp_path / "artifact", os.replace
    make(old, "old")

    def replace(source, target):
        if Path(source).name == CONTENT:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        make(old, "new", force=True)
    assert names(tmp_path) == [old.name]
    assert text_of(old) == "old"


def test_a_second_maker_is_refused_at_once_and_told_whom_to_wait_for(tmp_path):
    target = tmp_path / "artifact"
    with claim(target) as held:
        held.start(KEY)
        before = names(tmp_path)
        message = f"{target} is being built by process {os.getpid()}; wait for it or choose another name"
        with pytest.raises(UsageError, match=f"^{re.escape(message)}$"), claim(target, force=True):
            pass
        assert names(tmp_path) == before
        with claim(tmp_path / "other") as other:
            other.start(KEY)
    assert names(tmp_path) == ["artifact", "other"]


def test_the_second_of_two_builds_is_refused(tiny_checkpoint, refused, tmp_path):
    with claim(tmp_path / "artifact"):
        words = ["artifact is being built by process", str(os.getpid()), "choose another name"]
        refused("build", tiny_checkpoint, "-o", tmp_path / "artifact", words=words)


# --- what killed processes left -------------------------------------------------------------------------------------


def test_what_another_key_left_goes_and_the_same_key_finds_its_own(tmp_path):
    mine, other = (tmp_path / f".artifact.{key}.building" for key in (KEY, KEY[::-1]))
    for folder in (mine, other):
        (folder / CONTENT).mkdir(parents=True)
        (folder / "note").write_text("of a killed build")
    not_ours = [".artifact.building.txt", ".artifact2.0123456789abcdef.building", ".artifact.0123.building"]
    for name in not_ours:
        (tmp_path / name).write_text("")
    with claim(tmp_path / "artifact") as held:
        assert held.start(KEY) == mine
        assert (mine / "note").exists()
        assert not other.exists()
    assert names(tmp_path) == sorted([*not_ours, "artifact"])


def test_a_claim_that_never_started_keeps_what_a_killed_build_left(tmp_path):
    left = tmp_path / f".artifact.{KEY}.building"
    left.mkdir()
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "artifact"):
        raise KeyboardInterrupt
    assert names(tmp_path) == [left.name]


def test_killed_between_two_renames(tmp_path):
    """The old folder is put back first, and is then in the way as it was."""
    target = tmp_path / "artifact"
    make(target, "old")
    target.rename(tmp_path / f".artifact.{KEY}.old")
    with pytest.raises(UsageError, match="exists; choose another name or add --force"), claim(target):
        pass
    assert names(tmp_path) == ["artifact"]
    shutil.copytree(target, tmp_path / f".artifact.{KEY}.old")
    make(target, "new", force=True)
    assert names(tmp_path) == ["artifact"]
    assert text_of(target) == "new"


@pytest.fixture(scope="module")
def nursery(tiny_checkpoint):
    started = Nursery(tiny_checkpoint, "text_encoder")
    yield started
    started.close()


@pytest.fixture(scope="module")
def old(nursery, tmp_path_factory):
    """An artifact of one component for ONNX alone, which builds for both targets replace."""
    folder = tmp_path_factory.mktemp("old") / "artifact"
    assert nursery.build(folder, targets=["onnx"]).code == 0
    return folder


@pytest.fixture(scope="module")
def new(nursery, tmp_path_factory):
    """The artifact of an undisturbed build and how many changes to the file system made it."""
    folder = tmp_path_factory.mktemp("new") / "artifact"
    done = nursery.build(folder, targets=TARGETS)
    assert done.code == 0, done.error
    assert done.points > 50
    return folder, done.points


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_any_point_it_is_absent_old_or_complete_and_the_next_tidies_up(
    replacing, nursery, old, new, tmp_path
):
    target, (complete, points) = tmp_path / "artifact", new
    digests = [Artifact.open(folder).manifest.digest for folder in (old, complete)]
    before = digests[0] if replacing else None
    for step in range(POINTS):
        if replacing:
            shutil.copytree(old, target)
        killed = nursery.build(target, at=1 + step * points // POINTS, targets=TARGETS, force=True)
        assert killed.code == -signal.SIGKILL
        law(target, before, digests[1])
        after = nursery.build(target, targets=TARGETS, force=True)
        assert after.code == 0, after.error
        law(target, digests[1])
        assert names(tmp_path) == ["artifact"]
        shutil.rmtree(target)


@pytest.fixture
def mounted(tmp_path):
    """A function: mount at a folder; skips where that is not permitted."""
    mounts = []

    def call(*arguments):
        place = tmp_path / f"mount {len(mounts)}"
        place.mkdir()
        done = subprocess.run(["mount", *arguments, place], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        mounts.append(place)
        return place

    yield call
    for place in reversed(mounts):
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="mount is not installed")
@pytest.mark.parametrize("kilobytes", [64, 460, 520, 620])
def test_a_full_disk_is_named_and_leaves_nothing(kilobytes, nursery, mounted):
    """Where NumPy, protobuf and OpenVINO run out of space, each of which says so differently or not at all."""
    place = mounted("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs")
    failed = nursery.build(place / "artifact", targets=TARGETS)
    assert failed.code == 1
    assert failed.error.startswith("OSError: [Errno 28] No space left on device"), failed.error
    assert names(place) == []


@pytest.mark.skipif(not shutil.which("mount"), reason="mount is not installed")
def test_a_read_only_place_is_refused(tiny_checkpoint, tmp_path, mounted, intaglio):
    (tmp_path / "source").mkdir()
    place = mounted("--bind", "-o", "ro", str(tmp_path / "source"))
    code, out, err = intaglio("build", tiny_checkpoint, "-o", place / "artifact")
    message = "cannot be written (Read-only file system); choose another output folder"
    assert (code, out, err) == (2, "", f"intaglio: {place / 'artifact'} {message}\n")


@pytest.mark.skipif(not shutil.which("mount"), reason="mount is not installed")
@pytest.mark.parametrize("kind", ["of its own", "a bind of the same disk"])
def test_a_mount_is_refused_before_anything_is_made(kind, tiny_checkpoint, tmp_path, mounted, refused):
    """Its name cannot be given to another folder: EBUSY, and only after the whole build."""
    make(tmp_path / "source file", "old")
    where = ["-t", "tmpfs", "tmpfs"] if kind == "of its own" else ["--bind", str(tmp_path / "source file")]
    place = mounted(*where)
    (place / "manifest.json").write_text("old")
    before = names(tmp_path)
    refused("build", tiny_checkpoint, "-o", place, "--force", words=["is a mount", "mount its parent"])
    with pytest.raises(UsageError, match="is a mount"), writing(place, force=True):
        raise AssertionError("it began")
    assert (names(tmp_path), text_of(place)) == (before, "old")
    make(place / "artifact", "new")
    assert text_of(place / "artifact") == "new"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_folder_of_somebody_else_is_refused():
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        reading, ending = os.pipe()
        child = os.fork()
        if child == 0:
            os.setuid(NOBODY)
            try:
                make(place / "artifact", "new")
            except UsageError as error:
                os.write(ending, str(error).encode())
            os._exit(0)
        os.close(ending)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        os.waitpid(child, 0)
        assert said == f"{place / 'artifact'} cannot be written (Permission denied); choose another output folder"
        assert names(place) == []


def test_an_artifact_of_a_build_is_readable_for_all(new):
    modes = {stat.S_IMODE(p.stat().st_mode) for p in new[0].rglob("*") if p.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_a_build_in_another_process_is_the_same(nursery, new, tiny_checkpoint, tmp_path):
    made = build_only(tiny_checkpoint, tmp_path / "here", "text_encoder", targets=TARGETS)
    assert made.manifest.digest == Artifact.open(new[0]).manifest.digest


def test_what_came_into_the_way_meanwhile_stays(tmp_path):
    with pytest.raises(UsageError, match="exists; choose another name"), writing(tmp_path / "artifact"):
        (tmp_path / "artifact").mkdir()
        (tmp_path / "artifact/thesis.txt").write_text("mine")
    assert names(tmp_path / "artifact") == ["thesis.txt"]
    assert names(tmp_path) == ["artifact"]
