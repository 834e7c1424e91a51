"""Native code is loaded only where this host built it or an accepted key signed it, after all that can be checked."""

from __future__ import annotations

import dataclasses
import os
import shutil
import types

import pytest
from signed import ENGINE, FACTS, flip, make_artifact, make_keys

from intaglio.profiles import trust
from intaglio.profiles.artifact import Artifact, format_sums, read_sums, sha256
from intaglio.profiles.errors import ArtifactError, ToolError, Unsupported, UsageError
from intaglio.profiles.signing import sign
from intaglio.profiles.trust import accepted_keys, built_folder, keys_folder, remember_engines
from intaglio.runtimes import engine_tensorrt
from intaglio.runtimes.engine import EngineOptions, load_engine

MACHINE = "0123456789abcdef0123456789abcdef\n"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A user's folders of their own, and the file that says which machine this is."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = tmp_path / "machine-id"
    file.write_text(MACHINE)
    monkeypatch.setattr(trust, "MACHINE", (str(tmp_path / "nothing"), str(file)))
    return file


@pytest.fixture
def artifact(tmp_path):
    """Built elsewhere, not signed."""
    return make_artifact(tmp_path / "artifact")


@pytest.fixture
def accepted(tmp_path):
    """The private key to an accepted public one."""
    private, public = make_keys(tmp_path)
    accept(public)
    return private


def accept(public, name="ours.pem"):
    keys_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    keys_folder().chmod(0o700)
    return shutil.copy(public, keys_folder() / name)


@pytest.fixture
def events(monkeypatch):
    """What is asked of driver, TensorRT and GPU, in order; a plan that TensorRT is given is ``deserialize``."""
    found = []

    def event(name, value=None):
        def happen(*_, **__):
            found.append(name)
            return value() if callable(value) else value

        return happen

    class ILogger:
        pass

    def deserialize(plan):
        found.append("deserialize")
        assert plan == b"plan"

    def runtime(log):
        found.append("runtime")
        return types.SimpleNamespace(deserialize_cuda_engine=deserialize)

    api = types.SimpleNamespace(__version__=FACTS["version"], ILogger=ILogger, Runtime=runtime)
    cuda = types.SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(engine_tensorrt, "installed_apis", lambda: ("tensorrt-rtx",))
    monkeypatch.setattr(engine_tensorrt, "capability_of_gpu", event("capability", "sm89"))
    monkeypatch.setattr(engine_tensorrt, "check_driver", event("driver"))
    monkeypatch.setattr(engine_tensorrt, "load_api", event("api", api))
    monkeypatch.setattr(engine_tensorrt, "Cuda", event("cuda", cuda))
    for name in ("check_engines", "check_version", "read_engine"):
        real = getattr(engine_tensorrt, name)
        monkeypatch.setattr(engine_tensorrt, name, noted(found, name, real))
    return found


def noted(found, name, real):
    def call(*args):
        found.append(name)
        return real(*args)

    return call


def load(artifact, **settings):
    """Load the engine as far as the stand-in goes, which is to the deserializer and no further."""
    with pytest.raises(ToolError, match="TensorRT cannot load"):
        load_engine("tensorrt", artifact, "unet", EngineOptions(settings=settings))


def refused(artifact, events, **settings):
    """The line of a refusal that comes before anything of driver, GPU and TensorRT is asked."""
    events.clear()
    with pytest.raises(ArtifactError) as caught:
        load_engine("tensorrt", artifact, "unet", EngineOptions(settings=settings))
    assert events == ["check_engines"]
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{artifact.folder / ENGINE} is native code and is not loaded: this host did not build it")
    for way in (f"intaglio sign {artifact.folder}", str(keys_folder()), "build the artifact here"):
        assert way in line
    return line


# --- order ----------------------------------------------------------------------------------------------------------

ORDER = [
    "check_engines",
    "capability",
    "driver",
    "api",
    "check_version",
    "read_engine",
    "cuda",
    "runtime",
    "deserialize",
]


def test_trust_comes_first_then_gpu_driver_and_version_then_the_plan_is_read_and_given_to_tensorrt(artifact, events):
    remember_engines(artifact.folder, [ENGINE])
    load(artifact)
    assert events == ORDER


def raising(error):
    def call(*_):
        raise error

    return call


REFUSALS = {  # what is wrong, and the last that is asked
    "another compute capability": ("capability_of_gpu", lambda index: "sm120", "check_engines", "only for sm89"),
    "no GPU": ("capability_of_gpu", raising(Unsupported("no NVIDIA GPU here")), "check_engines", "no NVIDIA GPU here"),
    "an old driver": ("check_driver", raising(Unsupported("for CUDA 12.8")), "capability", "for CUDA 12.8"),
    "another release": ("load_api", lambda name: types.SimpleNamespace(__version__="9"), "check_version", "9 is inst"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_trusted_plan_that_does_not_fit_is_not_deserialized(name, artifact, events, monkeypatch):
    function, double, last, words = REFUSALS[name]
    remember_engines(artifact.folder, [ENGINE])
    monkeypatch.setattr(engine_tensorrt, function, double)
    with pytest.raises(Unsupported, match=words):
        load_engine("tensorrt", artifact, "unet")
    assert events[-1] == last


# --- built here -----------------------------------------------------------------------------------------------------


def test_what_this_host_built_is_loaded_without_a_signature_and_without_a_list(artifact, events):
    """A build samples with its engines before it writes ``SHA256SUMS``."""
    assert "the artifact has no model.sig" in refused(artifact, events)
    assert remember_engines(artifact.folder, artifact.manifest.engines) == []
    load(artifact)
    (artifact.folder / "SHA256SUMS").unlink()
    load(artifact)


def test_the_record_is_the_users_alone_and_no_part_of_the_artifact(artifact):
    before = sorted(artifact.folder.rglob("*"))
    remember_engines(artifact.folder, [ENGINE])
    assert sorted(artifact.folder.rglob("*")) == before
    (file,) = built_folder().iterdir()
    assert (file.name, file.read_bytes()) == (sha256(artifact.folder / ENGINE), b"")
    assert (file.stat().st_mode & 0o777, built_folder().stat().st_mode & 0o777) == (0o600, 0o700)
    assert remember_engines(artifact.folder, [ENGINE]) == [], "twice is fine"


def test_the_machines_id_is_not_written_down(artifact, tmp_path):
    remember_engines(artifact.folder, [ENGINE])
    assert not [p for p in (tmp_path / "state").rglob("*") if MACHINE.strip() in str(p)]


def test_a_record_on_another_machine_or_of_another_user_counts_for_nothing(artifact, events, machine, monkeypatch):
    remember_engines(artifact.folder, [ENGINE])
    machine.write_text(MACHINE[::-1])
    refused(artifact, events)
    machine.write_text(MACHINE)
    load(artifact)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    refused(artifact, events)


def test_another_engine_than_the_recorded_one_is_refused(artifact, events):
    remember_engines(artifact.folder, [ENGINE])
    flip(artifact.folder / ENGINE)
    sums = {**read_sums(artifact.folder), ENGINE: sha256(artifact.folder / ENGINE)}
    (artifact.folder / "SHA256SUMS").write_text(format_sums(sums))
    refused(Artifact.open(artifact.folder), events)


def test_a_digest_that_is_a_path_finds_no_record(artifact, tmp_path, events):
    """The list of digests is the artifact's; what stands in it must not lead to a file elsewhere."""
    built_folder().mkdir(parents=True)
    (tmp_path / "anything").write_bytes(b"")
    path = "../../../../" + 22 * "./" + "anything"
    assert len(path) == 64 and (built_folder() / path).samefile(tmp_path / "anything")
    relist(artifact.folder, **{ENGINE: path})
    refused(artifact, events)


def test_a_record_that_others_can_write_is_an_error(artifact):
    remember_engines(artifact.folder, [ENGINE])
    built_folder().chmod(0o777)
    with pytest.raises(UsageError, match=r"others can change it; own it and run: chmod go-w .*built"):
        trust.check_engines(artifact, [ENGINE])


def test_an_engine_that_changes_after_the_check_is_not_deserialized(artifact, events, monkeypatch):
    """The bytes that are given to TensorRT are the ones that were vouched for."""
    remember_engines(artifact.folder, [ENGINE])
    monkeypatch.setattr(engine_tensorrt, "check_driver", lambda: flip(artifact.folder / ENGINE))
    with pytest.raises(ArtifactError, match=f"{ENGINE} was altered"):
        load_engine("tensorrt", artifact, "unet")
    assert events[-1] == "read_engine"


def test_what_cannot_be_recorded_is_a_remark(artifact, tmp_path, machine):
    assert remember_engines(artifact.folder, []) == [], "an artifact without engines has nothing to record"
    machine.write_text("\n")
    (remark,) = remember_engines(artifact.folder, [ENGINE])
    assert "not recorded as built here: this system has no machine id; they load when the artifact is signed" in remark
    machine.write_text(MACHINE)
    (tmp_path / "state").write_text("in the way")
    (remark,) = remember_engines(artifact.folder, [ENGINE])
    assert f"{built_folder()} cannot be written (Not a directory)" in remark


def test_the_first_id_that_the_system_has_counts(machine, tmp_path, monkeypatch):
    first = tmp_path / "nothing"
    alone = trust.host()
    assert len(alone) == 64
    for empty in ("", "uninitialized\n"):
        first.write_text(empty)
        assert trust.host() == alone
    first.write_text("ffff\n")
    assert trust.host() not in (alone, None)
    monkeypatch.setattr(trust, "MACHINE", ())
    assert trust.host() is None and built_folder() is None


# --- signed ---------------------------------------------------------------------------------------------------------


def test_what_an_accepted_key_signed_is_loaded(artifact, accepted, events):
    refused(artifact, events)
    sign(artifact, accepted)
    load(artifact)
    assert events[-len(ORDER) :] == ORDER


def test_without_accepted_keys_a_signature_counts_for_nothing(artifact, tmp_path, events):
    sign(artifact, make_keys(tmp_path)[0])
    assert "no key is accepted" in refused(artifact, events)
    keys_folder().mkdir(parents=True)
    assert "no key is accepted" in refused(artifact, events)


def test_a_stranger_s_signature_counts_for_nothing(artifact, accepted, tmp_path, events):
    sign(artifact, make_keys(tmp_path, "stranger")[0])
    assert f"model.sig was not made with the key of {keys_folder() / 'ours.pem'}" in refused(artifact, events)


def test_any_of_several_accepted_keys_will_do(artifact, accepted, tmp_path, events):
    private, public = make_keys(tmp_path, "second", "SECP384R1")
    sign(artifact, private)
    refused(artifact, events)
    accept(public, "a-second.pem")
    accept(make_keys(tmp_path, "third")[1], "z-third.pem")
    load(artifact)


def test_a_key_can_be_named_instead(artifact, accepted, tmp_path, events):
    private, public = make_keys(tmp_path, "named")
    sign(artifact, private)
    load(artifact, public_key=str(public))
    refused(artifact, events, public_key=str(keys_folder() / "ours.pem"))
    with pytest.raises(UsageError, match=r"--set tensorrt\.private_key is unknown; allowed: public_key"):
        load_engine("tensorrt", artifact, "unet", EngineOptions(settings={"private_key": "x"}))


def relist(folder, **changes):
    (folder / "SHA256SUMS").write_text(format_sums({**read_sums(folder), **changes}))


def swap_engine(artifact):
    flip(artifact.folder / ENGINE)
    relist(artifact.folder, **{ENGINE: sha256(artifact.folder / ENGINE)})


def swap_manifest(artifact):
    """The engine is signed, and what it is said to be is another's."""
    other = dataclasses.replace(artifact.manifest, engines={ENGINE: {**FACTS, "version": "9"}})
    (artifact.folder / "manifest.json").write_bytes(other.to_bytes())
    relist(artifact.folder, **{"manifest.json": sha256(artifact.folder / "manifest.json")})


CHANGES = {
    "the engine and its digest": (swap_engine, "model.sig is of other files than these"),
    "the manifest and its digest": (swap_manifest, "model.sig is of other files than these"),
    "the signature": (lambda a: (a.folder / "model.sig").write_text("{}"), "cannot be read as a signature"),
    "no signature": (lambda a: (a.folder / "model.sig").unlink(), "the artifact has no model.sig"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_after_signing_is_refused(name, artifact, accepted, events):
    change, words = CHANGES[name]
    sign(artifact, accepted)
    change(artifact)
    assert words in refused(Artifact.open(artifact.folder), events)


def test_a_manifest_in_memory_that_nobody_signed_is_refused(artifact, accepted, events):
    sign(artifact, accepted)
    other = dataclasses.replace(artifact.manifest, engines={ENGINE: {**FACTS, "version": "9"}})
    assert "manifest.json is not the one" in refused(dataclasses.replace(artifact, manifest=other), events)


def test_an_engine_that_the_list_does_not_have_is_refused(artifact, accepted):
    sign(artifact, accepted)
    (artifact.folder / "unet/tensorrt/model.sm120.engine").write_bytes(b"another")
    with pytest.raises(ArtifactError, match="SHA256SUMS does not list it"):
        trust.check_engines(artifact, ["unet/tensorrt/model.sm120.engine"])


@pytest.mark.parametrize("shared", ["folder", "key"])
def test_keys_that_others_can_change_are_an_error(shared, artifact, accepted):
    sign(artifact, accepted)
    path = keys_folder() if shared == "folder" else keys_folder() / "ours.pem"
    path.chmod(0o777)
    with pytest.raises(UsageError, match=f"{path} decides which native code runs.* chmod go-w {path}$"):
        trust.check_engines(artifact, [ENGINE])


def test_junk_among_the_keys_is_an_error_that_names_it(artifact, accepted):
    sign(artifact, accepted)
    file = keys_folder() / "junk.pem"
    file.write_text("junk")
    with pytest.raises(UsageError, match=r"public key .*junk\.pem cannot be used"):
        trust.check_engines(artifact, [ENGINE])
    file.unlink()
    (keys_folder() / "notes.txt").write_text("not a key, and not taken for one")
    assert accepted_keys() == [keys_folder() / "ours.pem"]
    trust.check_engines(artifact, [ENGINE])
