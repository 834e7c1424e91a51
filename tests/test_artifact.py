"""An artifact notices every change, says the same for the same inputs, and tells nothing about who made it."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from partial import build_only

from intaglio.profiles.artifact import Artifact, format_sums, read_sums, sha256
from intaglio.profiles.errors import ArtifactError, ProfileError, UsageError
from intaglio.profiles.manifest import read_manifest
from intaglio.profiles.spec import Range
from intaglio.profiles.strict import from_dict, to_dict


def flip(position):
    def change(path):
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return change


CHANGES = {
    "first bit flipped": flip(0),
    "middle bit flipped": flip(0.5),
    "last bit flipped": flip(1),
    "truncated by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte appended": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "a link to itself elsewhere": lambda path: path.symlink_to(shutil.move(path, path.parent.parent.parent / "moved")),
}


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def refusal(folder):
    """What opening says, or an empty string."""
    try:
        Artifact.open(folder)
    except ArtifactError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_to_any_file_is_refused_by_name(change, tiny_artifact, copy_artifact):
    folder = copy_artifact(tiny_artifact)
    names = files_of(folder)
    assert len(names) > 20
    assert refusal(folder) == ""
    for name in names:
        CHANGES[change](folder / name)
        message = refusal(folder)
        # A digest that was altered in the list is seen at the file it speaks of.
        accepted = names if name == "SHA256SUMS" else [name]
        named = any(re.search(rf"{re.escape(str(folder / n))}(?![\w.])", message) for n in accepted)
        assert named or (name == "manifest.json" and name in message), f"{name}, {change}: {message or 'silent'}"
        assert "\n" not in message
        (folder / name).unlink(missing_ok=True)
        shutil.copyfile(tiny_artifact.folder / name, folder / name)
    assert refusal(folder) == "", "every file was put back"


def test_two_files_swapped(tiny_artifact, copy_artifact):
    folder = copy_artifact(tiny_artifact)
    first, second = folder / "vae_encoder/model.onnx.data", folder / "vae_decoder/model.onnx.data"
    os.replace(first, folder / "x")
    os.replace(second, first)
    os.replace(folder / "x", second)
    assert str(second) in refusal(folder) or str(first) in refusal(folder)


def test_a_file_too_many(tiny_artifact, copy_artifact):
    folder = copy_artifact(tiny_artifact)
    (folder / "unet/extra.bin").write_bytes(b"")
    assert f"{folder / 'unet/extra.bin'} is not listed in SHA256SUMS" in refusal(folder)


def test_links_are_refused(tiny_artifact, copy_artifact):
    """ONNX, ONNX Runtime and OpenVINO refuse external data behind a link; so does the artifact, with the way out."""
    folder = copy_artifact(tiny_artifact)
    (folder / "link").symlink_to(tiny_artifact.folder / "unet", target_is_directory=True)
    assert f"{folder / 'link'} is a symbolic link" in refusal(folder)
    assert "cp -rL" in refusal(folder)


def rewrite(folder, manifest):
    """Write a manifest and bring the list of digests up to date, as someone who edits on purpose would."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    sums = {**read_sums(folder), "manifest.json": sha256(folder / "manifest.json")}
    (folder / "SHA256SUMS").write_text(format_sums(sums))


MANIFESTS = {  # an edit, and what the message holds
    "schema of tomorrow": (lambda m: m.update(schema_version=99), ["schema version 99", "reads 3"]),
    "unknown key": (lambda m: m.update(familly="sd"), ["unknown key 'familly'", "Did you mean 'family'?"]),
    "key missing": (lambda m: m.pop("recipe"), ["key 'recipe' is missing"]),
    "wrong type": (lambda m: m.update(family=3), ["family: expected str, found 3"]),
    "deep wrong type": (
        lambda m: m["components"]["unet"].update(parameters="many"),
        ["components.unet: parameters: expected int, found 'many'"],
    ),
    "empty range": (lambda m: m["shapes"]["batch"].update(max=0), ["shapes.batch", "min <= opt <= max"]),
    "digest of a file": (
        lambda m: m["files"]["unet/model.onnx"].update(sha256="0" * 64),
        ["unet/model.onnx", "altered"],
    ),
    "size of a file": (lambda m: m["files"]["unet/model.onnx"].update(size=1), ["unet/model.onnx", "expected 1"]),
    "a file nobody listed": (
        lambda m: m["files"].update(ghost={"size": 1, "sha256": "0" * 64}),
        ["SHA256SUMS does not list ghost"],
    ),
}


@pytest.mark.parametrize("edit", MANIFESTS)
def test_an_edited_manifest_is_refused_even_with_its_digest_updated(edit, tiny_artifact, copy_artifact):
    folder = copy_artifact(tiny_artifact)
    change, words = MANIFESTS[edit]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    rewrite(folder, manifest)
    message = refusal(folder)
    assert str(folder) in message
    assert all(word in message for word in words), message


def test_an_edited_manifest_is_refused(tiny_artifact, copy_artifact):
    folder = copy_artifact(tiny_artifact)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"guidance_scale": 7.5', '"guidance_scale": 9.5'))
    assert f"{path} was altered" in refusal(folder)


SUMS = {
    "a line removed": lambda lines: lines[1:],
    "a line twice": lambda lines: [lines[0], *lines],
    "another order": lambda lines: lines[::-1],
    "no double space": lambda lines: [lines[0].replace("  ", " "), *lines[1:]],
    "a path out of the folder": lambda lines: [*lines, "0" * 64 + "  ../elsewhere"],
    "an empty line": lambda lines: [*lines, ""],
    "Windows line ends": lambda lines: [f"{line}\r" for line in lines],
}


@pytest.mark.parametrize("edit", SUMS)
def test_an_edited_list_of_digests_is_refused(edit, tiny_artifact, copy_artifact):
    folder = copy_artifact(tiny_artifact)
    path = folder / "SHA256SUMS"
    lines = SUMS[edit](path.read_text().splitlines())
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert str(folder) in refusal(folder)
    assert "build the artifact again" in refusal(folder)


def test_sha256sum_reads_the_list(tiny_artifact):
    """Whoever has no intaglio can check an artifact with coreutils."""
    if not shutil.which("sha256sum"):
        pytest.skip("sha256sum is not installed")
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tiny_artifact.folder, check=True)


def test_verify_counts_every_file(tiny_artifact, intaglio):
    code, out, _ = intaglio("verify", tiny_artifact.folder)
    listed = len(files_of(tiny_artifact.folder)) - 1  # SHA256SUMS cannot list itself
    assert (code, out) == (
        0,
        f"{tiny_artifact.folder}: {listed} files as recorded, manifest {tiny_artifact.manifest.digest}\n"
        "signature: none; there is no model.sig\n",
    )


def test_the_same_inputs_give_the_same_artifact(tiny_artifact, cli_build):
    """Built by this process and by ``intaglio build``: only the log of the build may differ."""
    again = Artifact.open(cli_build.folder)
    assert again.manifest.digest == tiny_artifact.manifest.digest
    first, second = read_sums(tiny_artifact.folder), read_sums(again.folder)
    assert {name for name in first | second if first.get(name) != second.get(name)} <= {"build.json"}


def test_nothing_tells_who_built_it_or_where(tiny_artifact, tiny_checkpoint):
    """No absolute path in any file, no name of the user or the host in the records; nor torch's unordered notes."""
    forbidden = [
        str(tiny_checkpoint.parent),
        str(tiny_artifact.folder.parent),
        "site-packages",
        "range_constraints",
        f"{Path.home()}/",
    ]
    for name in files_of(tiny_artifact.folder):
        data = (tiny_artifact.folder / name).read_bytes()
        assert [word for word in forbidden if word.encode() in data] == [], name
    for name in ("manifest.json", "build.json"):
        text = (tiny_artifact.folder / name).read_text(encoding="utf-8")
        for person in {getpass.getuser(), socket.gethostname()}:
            assert not re.search(rf"\b{re.escape(person)}\b", text), (name, person)
        absolute = [value for value in values(json.loads(text)) if re.match(r"/|[A-Za-z]:\\|~|file:", value)]
        assert absolute == [], name


ELSEWHERE = "some-other-computer"  # a name that no graph has
SOMEBODY = "somebody-else"
BUILD = """
import sys
from pathlib import Path
from partial import build_only
build_only(Path(sys.argv[1]), Path("artifact"), "text_encoder", targets=("onnx", "openvino"))
"""


def can_rename_the_computer():
    """Whether a process may have a host name of its own here; without it only the variable differs."""
    tools = shutil.which("unshare") and shutil.which("hostname")
    return bool(tools) and not subprocess.run(["unshare", "-u", "hostname", ELSEWHERE], capture_output=True).returncode


def test_another_person_on_another_computer_builds_the_same(tiny_checkpoint, tmp_path):
    """Other names, home, folders, hash seed, language, time zone and caches; the digest is the one of this process."""
    here = build_only(tiny_checkpoint, tmp_path / "here", "text_encoder", targets=("onnx", "openvino"))
    home = tmp_path / SOMEBODY
    checkpoint = shutil.copytree(tiny_checkpoint, home / tiny_checkpoint.name)  # the name is in the manifest
    environment = {
        **os.environ,
        **dict.fromkeys(("USER", "LOGNAME", "USERNAME"), SOMEBODY),
        **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home)),
        "HOSTNAME": ELSEWHERE,
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", BUILD, str(checkpoint)]
    if can_rename_the_computer():
        command = ["unshare", "-u", "sh", "-c", f'hostname {ELSEWHERE} && exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there = Artifact.open(home / "artifact")
    assert there.manifest.digest == here.manifest.digest
    for name in files_of(there.folder):
        data = (there.folder / name).read_bytes()
        assert [word for word in (ELSEWHERE, SOMEBODY, str(tmp_path)) if word.encode() in data] == [], name


def values(data):
    """Every string in JSON data, keys too."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from values(value)
    elif isinstance(data, list):
        for value in data:
            yield from values(value)


def test_files_are_plain_and_their_own(tiny_artifact):
    for path in tiny_artifact.folder.rglob("*"):
        assert not path.is_symlink(), path
        assert path.is_dir() or path.stat().st_nlink == 1, f"{path} is a hard link, which onnx refuses"
        assert path.suffix not in (".bin.index", ".pkl", ".pt", ".ckpt"), path


def test_the_manifest_reads_back_as_it_was_written(tiny_artifact):
    manifest = read_manifest(tiny_artifact.folder)
    assert manifest.to_bytes() == (tiny_artifact.folder / "manifest.json").read_bytes()
    assert manifest.digest == sha256(tiny_artifact.folder / "manifest.json")


# --- strict reading -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    weight: float
    names: tuple[str, ...] = ()
    flag: bool = False
    scale: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    count: int
    leaves: Mapping[str, Leaf]


GOOD = {"count": 1, "leaves": {"a": {"weight": 2, "names": ["x"], "flag": True, "scale": None}}}
WRONG = {
    "unknown key": (
        {**GOOD, "cuont": 2},
        "file.toml: unknown key 'cuont'; allowed: count, leaves. Did you mean 'count'?",
    ),
    "missing key": ({"count": 1}, "file.toml: key 'leaves' is missing"),
    "not a table": ([1], "file.toml: expected a table, found [1]"),
    "text for a number": ({**GOOD, "count": "1"}, "file.toml: count: expected int, found '1'"),
    "yes for a number": ({**GOOD, "count": True}, "file.toml: count: expected int, found True"),
    "fraction for a number": ({**GOOD, "count": 1.5}, "file.toml: count: expected int, found 1.5"),
    "deep unknown key": (
        {"count": 1, "leaves": {"a": {"weight": 1, "wight": 2}}},
        "file.toml: leaves.a: unknown key 'wight'; allowed: flag, names, scale, weight. Did you mean 'weight'?",
    ),
    "deep wrong item": (
        {"count": 1, "leaves": {"a": {"weight": 1, "names": ["x", 3]}}},
        "file.toml: leaves.a: names[1]: expected str, found 3",
    ),
    "number for a flag": (
        {"count": 1, "leaves": {"a": {"weight": 1, "flag": 1}}},
        "file.toml: leaves.a: flag: expected bool, found 1",
    ),
    "none of the options": (
        {"count": 1, "leaves": {"a": {"weight": 1, "scale": 3}}},
        "file.toml: leaves.a: scale: 3 is none of str, NoneType",
    ),
}


def test_strict_reading_returns_the_dataclass_and_converts_whole_numbers_to_floats():
    found = from_dict(Tree, GOOD, "file.toml")
    assert found == Tree(count=1, leaves={"a": Leaf(weight=2.0, names=("x",), flag=True)})
    assert isinstance(found.leaves["a"].weight, float)
    assert to_dict(found) == GOOD


@pytest.mark.parametrize("name", WRONG)
def test_strict_reading_refuses(name):
    data, message = WRONG[name]
    with pytest.raises(ProfileError, match=f"^{re.escape(message)}$"):
        from_dict(Tree, data, "file.toml")
    with pytest.raises(ArtifactError):
        from_dict(Tree, data, "file.toml", error=ArtifactError)


# --- ranges ---------------------------------------------------------------------------------------------------------

SIDE = Range(min=64, opt=512, max=1024, multiple=8)


@pytest.mark.parametrize("value", [64, 72, 512, 1024])
def test_range_takes(value):
    SIDE.check("width", value)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (0, "64"),
        (-8, "64"),
        (63, "64"),
        (65, "64"),
        (71, "72"),
        (513, "512"),
        (519, "520"),
        (1025, "1024"),
        (9999, "1024"),
    ],
)
def test_range_refuses_and_gives_the_nearest(value, nearest):
    message = f"width {value} is not allowed: 64 to 1024 in steps of 8; the nearest is {nearest}"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        SIDE.check("width", value)


def test_range_without_steps_does_not_speak_of_them():
    with pytest.raises(UsageError, match=r"^batch 17 is not allowed: 1 to 16; the nearest is 16$"):
        Range(min=1, opt=2, max=16).check("batch", 17)


@pytest.mark.parametrize(
    "values",
    [
        {"min": 0, "opt": 1, "max": 2},
        {"min": 2, "opt": 1, "max": 3},
        {"min": 1, "opt": 4, "max": 3},
        {"min": 8, "opt": 12, "max": 16, "multiple": 8},
        {"min": 4, "opt": 8, "max": 16, "multiple": 8},
    ],
)
def test_a_range_that_contradicts_itself(values):
    with pytest.raises(ProfileError, match=r"needs min <= opt <= max, all multiples of \d"):
        Range(**values)
