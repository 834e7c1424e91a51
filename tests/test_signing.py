"""Signatures: what ours and OpenSSF's command say of each other's, and what is refused, in one line with the way on."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from signed import ENGINE, FILES, flip, make_artifact, make_keys

from intaglio.profiles import artifact as artifact_module
from intaglio.profiles.artifact import Artifact, format_sums, read_sums, sha256
from intaglio.profiles.errors import ArtifactError

CURVES = ("SECP256R1", "SECP384R1", "SECP521R1")
COVERED = ("SHA256SUMS", "manifest.json", "build.json", *FILES)


@pytest.fixture
def folder(tmp_path):
    """An artifact that is not signed."""
    return make_artifact(tmp_path / "artifact").folder


@pytest.fixture
def keys(tmp_path):
    """Private and public key."""
    return make_keys(tmp_path)


@pytest.fixture
def signed(folder, keys, intaglio):
    """The artifact, signed by the command line."""
    code, out, err = intaglio("sign", folder, "--private-key", keys[0])
    assert (code, out, err) == (0, f"{folder / 'model.sig'}\n", "")
    return folder


def stock(*arguments):
    """The command of the package model-signing, in a process of its own: whether it says yes, and all it says."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def stock_verify(folder, public):
    return stock("verify", "key", folder, "--signature", folder / "model.sig", "--public_key", public)


def stock_sign(folder, private, *options):
    done, said = stock("sign", "key", folder, "--signature", folder / "model.sig", "--private_key", private, *options)
    assert done, said


def refusal(intaglio, *arguments):
    """The one line of a refusal."""
    code, out, err = intaglio(*arguments)
    assert (code, out) == (2, ""), out + err
    assert err.startswith("intaglio: ") and len(err.splitlines()) == 1, err
    return err


def payload(folder):
    bundle = json.loads((folder / "model.sig").read_text())
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


# --- both ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", CURVES)
def test_what_is_signed_verifies_and_is_still_a_sound_artifact(curve, folder, tmp_path, intaglio):
    private, public = make_keys(tmp_path, "own", curve)
    assert intaglio("sign", folder, "--private-key", private)[0] == 0
    code, out, err = intaglio("verify", folder, "--public-key", public)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"signature: model.sig is of all these files and of the key {public}"
    Artifact.open(folder)


def test_the_signature_covers_every_file(signed):
    resources = payload(signed)["predicate"]["resources"]
    assert sorted(r["name"] for r in resources) == sorted(COVERED)
    assert {r["name"]: r["digest"] for r in resources} == {n: sha256(signed / n) for n in COVERED}


@pytest.mark.parametrize("curve", CURVES[:2])
def test_the_stock_command_accepts_ours(curve, folder, tmp_path, intaglio):
    private, public = make_keys(tmp_path, "own", curve)
    intaglio("sign", folder, "--private-key", private)
    assert stock_verify(folder, public) == (True, "Verification succeeded\n")
    accepted, said = stock_verify(folder, make_keys(tmp_path, "other", curve)[1])
    assert not accepted and "Key mismatch" in said


def test_the_stock_command_accepts_a_copy_of_the_signature_from_elsewhere(signed, keys, tmp_path):
    """It passes over the signature it is given, and over ``model.sig`` because the signature says so."""
    copied = shutil.copy(signed / "model.sig", tmp_path / "copy.sig")
    accepted, said = stock("verify", "key", signed, "--signature", copied, "--public_key", keys[1])
    assert accepted, said


@pytest.mark.parametrize("name", ["SHA256SUMS", "manifest.json", ENGINE, "unet/model.onnx.data"])
def test_the_stock_command_refuses_one_flipped_bit(name, signed, keys):
    flip(signed / name)
    accepted, said = stock_verify(signed, keys[1])
    assert not accepted and "Hash mismatch" in said and name in said


@pytest.mark.parametrize("curve", CURVES[:2])
def test_ours_accepts_what_the_stock_command_made(curve, folder, tmp_path, intaglio):
    private, public = make_keys(tmp_path, "own", curve)
    stock_sign(folder, private)
    code, out, err = intaglio("verify", folder, "--public-key", public, "--json")
    assert (code, err, json.loads(out)["signature"]) == (0, "", "valid")


def test_a_file_that_the_stock_command_leaves_out_is_refused(signed, keys, intaglio):
    """Its default passes over git's files."""
    (signed / ".gitattributes").write_text("* text\n")
    assert stock_verify(signed, keys[1])[0]
    line = refusal(intaglio, "verify", signed, "--public-key", keys[1])
    assert f"{signed / '.gitattributes'} is not listed" in line


@pytest.mark.parametrize("left_out", ["unet/tensorrt", "SHA256SUMS"])
def test_a_signature_that_leaves_out_a_file_is_not_one_of_the_artifact(left_out, folder, keys, intaglio):
    """The stock command takes the list of what to leave out from the signature and accepts it."""
    stock_sign(folder, keys[0], "--ignore-paths", folder / left_out)
    assert stock_verify(folder, keys[1])[0]
    line = refusal(intaglio, "verify", folder, "--public-key", keys[1])
    assert f"is of other files than these (Extra files found in model artifact: {left_out}" in line


def test_nothing_needs_the_network(folder, keys, intaglio, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert intaglio("sign", folder, "--private-key", keys[0])[0] == 0
    assert intaglio("verify", folder, "--public-key", keys[1])[0] == 0


# --- verify ---------------------------------------------------------------------------------------------------------


def test_without_a_key_one_line_says_whether_there_is_a_signature(folder, keys, intaglio):
    code, out, _ = intaglio("verify", folder)
    assert (code, out.splitlines()[1:]) == (0, ["signature: none; there is no model.sig"])
    intaglio("sign", folder, "--private-key", keys[0])
    code, out, _ = intaglio("verify", folder)
    assert (code, out.splitlines()[1:]) == (0, ["signature: model.sig, not checked; add --public-key PEM"])
    assert json.loads(intaglio("verify", folder, "--json")[1])["signature"] == "not checked"


def test_another_key_is_refused(signed, tmp_path, intaglio):
    line = refusal(intaglio, "verify", signed, "--public-key", make_keys(tmp_path, "other")[1])
    assert "model.sig was not made with the key of" in line
    assert f"run: intaglio verify {signed} --public-key KEY.pem" in line


def test_another_signature_under_the_keys_name_is_refused(signed, tmp_path, keys, intaglio):
    """Whoever cannot sign can still write the hint at the key into the bundle."""
    bundle = json.loads((signed / "model.sig").read_text())
    intaglio("sign", signed, "--private-key", make_keys(tmp_path, "other")[0], "--force")
    other = json.loads((signed / "model.sig").read_text())
    other["verificationMaterial"] = bundle["verificationMaterial"]
    (signed / "model.sig").write_text(json.dumps(other))
    assert "was not made with the key of" in refusal(intaglio, "verify", signed, "--public-key", keys[1])


def test_a_missing_signature_is_refused(folder, keys, intaglio):
    line = refusal(intaglio, "verify", folder, "--public-key", keys[1])
    assert line == f"intaglio: {folder} has no model.sig; run: intaglio sign {folder} --private-key KEY.pem\n"


@pytest.mark.parametrize("name", COVERED)
def test_a_changed_file_is_refused(name, signed, keys, intaglio):
    flip(signed / name)
    line = refusal(intaglio, "verify", signed, "--public-key", keys[1])
    assert str(signed) in line


@pytest.mark.parametrize("name", [ENGINE, "unet/model.onnx.data", "build.json"])
def test_a_changed_file_is_refused_though_its_digest_was_changed_too(name, signed, keys, intaglio):
    """Without a key this passes for a sound artifact: that is what signatures are for."""
    sums = dict(read_sums(signed))
    manifest = json.loads((signed / "manifest.json").read_text())
    flip(signed / name)
    sums[name] = sha256(signed / name)
    if name in manifest["files"]:
        manifest["files"][name]["sha256"] = sums[name]
        text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        (signed / "manifest.json").write_text(text)
        sums["manifest.json"] = sha256(signed / "manifest.json")
    (signed / "SHA256SUMS").write_text(format_sums(sums))
    assert intaglio("verify", signed)[0] == 0
    line = refusal(intaglio, "verify", signed, "--public-key", keys[1])
    assert "model.sig is of other files than these (Hash mismatch for SHA256SUMS)" in line
    assert f"run: intaglio sign {signed} --private-key KEY.pem --force" in line


def edited(**changes):
    return lambda text: json.dumps({**json.loads(text), **changes})


def envelope(**changes):
    def change(text):
        bundle = json.loads(text)
        return json.dumps({**bundle, "dsseEnvelope": {**bundle["dsseEnvelope"], **changes}})

    return change


GARBAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not text": lambda text: "\udcff\udcfe",
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "no envelope": edited(dsseEnvelope=None),
    "another kind of bundle": edited(mediaType="application/json"),
    "no signatures": envelope(signatures=[]),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused(name, signed, keys, intaglio):
    path = signed / "model.sig"
    path.write_bytes(GARBAGE[name](path.read_text()).encode(errors="surrogateescape"))
    line = refusal(intaglio, "verify", signed, "--public-key", keys[1])
    assert "model.sig cannot be read as a signature" in line
    assert f"run: intaglio sign {signed} --private-key KEY.pem --force" in line


def test_an_altered_statement_is_refused(signed, keys, intaglio):
    """The payload names other digests and the signature stays."""
    statement, path = payload(signed), signed / "model.sig"
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    text = path.read_text()
    for altered in (base64.b64encode(json.dumps(statement).encode()).decode(), "%%%"):
        path.write_text(envelope(payload=altered)(text))
        assert "was not made with the key of" in refusal(intaglio, "verify", signed, "--public-key", keys[1])


def test_what_is_too_large_for_a_signature_is_not_read(signed, keys, intaglio, monkeypatch):
    from intaglio.profiles import signing

    monkeypatch.setattr(signing, "MOST_BYTES", 100)
    assert "more than 100 bytes" in refusal(intaglio, "verify", signed, "--public-key", keys[1])


@pytest.mark.parametrize("name", ["unet/model.sig", "model.sig.bak", "model.sig2", "extra"])
def test_every_other_unlisted_file_is_still_refused(name, signed):
    (signed / name).write_bytes((signed / "model.sig").read_bytes())
    with pytest.raises(ArtifactError, match=f"{name} is not listed in SHA256SUMS"):
        Artifact.open(signed)


def test_a_signature_behind_a_link_is_refused(signed, tmp_path):
    (signed / "model.sig").rename(tmp_path / "away.sig")
    (signed / "model.sig").symlink_to(tmp_path / "away.sig")
    with pytest.raises(ArtifactError, match=r"model\.sig is a symbolic link"):
        Artifact.open(signed)


# --- sign -----------------------------------------------------------------------------------------------------------


def test_an_altered_artifact_is_not_signed(folder, keys, intaglio):
    flip(folder / ENGINE)
    assert f"{folder / ENGINE} was altered" in refusal(intaglio, "sign", folder, "--private-key", keys[0])
    assert not (folder / "model.sig").exists()


def test_signing_hashes_every_file_whatever_is_remembered(folder, keys, intaglio, monkeypatch):
    names, real = [], artifact_module.sha256
    monkeypatch.setattr(artifact_module, "sha256", lambda path: names.append(path.name) or real(path))
    intaglio("sign", folder, "--private-key", keys[0])
    assert len(names) == len(read_sums(folder))


def test_an_existing_signature_is_replaced_with_force_only(signed, tmp_path, intaglio):
    before = (signed / "model.sig").read_bytes()
    private, public = make_keys(tmp_path, "other")
    assert "exists; add --force" in refusal(intaglio, "sign", signed, "--private-key", private)
    assert (signed / "model.sig").read_bytes() == before
    code, out, _ = intaglio("sign", signed, "--private-key", private, "--force", "--json")
    assert (code, json.loads(out)["signature"]) == (0, str(signed / "model.sig"))
    assert intaglio("verify", signed, "--public-key", public)[0] == 0


@pytest.mark.parametrize("before", [None, b"the old one"])
def test_a_signature_is_written_whole_or_not_at_all(before, folder, keys, intaglio, monkeypatch):
    if before:
        (folder / "model.sig").write_bytes(before)
    around = sorted(p.name for p in folder.parent.iterdir())

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = refusal(intaglio, "sign", folder, "--private-key", keys[0], "--force")
    assert "model.sig cannot be written (No space left on device)" in line
    assert sorted(p.name for p in folder.parent.iterdir()) == around
    assert (folder / "model.sig").exists() == bool(before)
    assert not before or (folder / "model.sig").read_bytes() == before


def test_an_artifact_that_is_replaced_meanwhile_is_not_signed(folder, keys, tmp_path, monkeypatch):
    from intaglio.profiles import signing
    from intaglio.profiles.staging import swap

    other, real = make_artifact(tmp_path / "other").folder, signing.read_sums

    def read_and_replace(place):
        sums = real(place)
        swap(other, folder)
        return sums

    monkeypatch.setattr(signing, "read_sums", read_and_replace)
    with pytest.raises(ArtifactError, match="was replaced since it was opened"):
        signing.sign(Artifact.open(folder), keys[0])
    assert not (folder / "model.sig").exists()


def test_a_password_is_read_from_a_file(folder, tmp_path, intaglio):
    private, public = make_keys(tmp_path, "locked", password=b"s\xc3\xa9same")
    file = tmp_path / "password"
    file.write_bytes(b"s\xc3\xa9same\n")
    assert "not given" in refusal(intaglio, "sign", folder, "--private-key", private)
    assert intaglio("sign", folder, "--private-key", private, "--password-file", file)[0] == 0
    assert intaglio("verify", folder, "--public-key", public)[0] == 0
    file.write_bytes(b"wrong\n")
    line = refusal(intaglio, "sign", folder, "--private-key", private, "--password-file", file, "--force")
    assert "Incorrect password" in line and "wrong" not in line
    file.write_bytes(b"\n")
    line = refusal(intaglio, "sign", folder, "--private-key", private, "--password-file", file, "--force")
    assert "has an empty first line" in line
    line = refusal(intaglio, "sign", folder, "--private-key", private, "--password-file", tmp_path / "no", "--force")
    assert "cannot be read" in line


def rsa(folder):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa as kind

    key = kind.generate_private_key(65537, 2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "wrong.pem").write_bytes(key.private_bytes(*form))
    public = key.public_key().public_bytes(form[0], serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "wrong.pub.pem").write_bytes(public)


def junk(folder):
    (folder / "wrong.pem").write_text("junk")
    (folder / "wrong.pub.pem").write_text("junk")


WRONG_KEYS = {
    "RSA": rsa,
    "another curve": lambda folder: make_keys(folder, "wrong", "SECP256K1"),
    "junk": junk,
    "missing": lambda folder: None,
}


@pytest.mark.parametrize("kind", WRONG_KEYS)
def test_a_key_of_another_kind_is_refused(kind, signed, tmp_path, intaglio):
    WRONG_KEYS[kind](tmp_path)
    private, public = tmp_path / "wrong.pem", tmp_path / "wrong.pub.pem"
    for line in (
        refusal(intaglio, "sign", signed, "--private-key", private, "--force"),
        refusal(intaglio, "verify", signed, "--public-key", public),
    ):
        assert "wrong." in line and "name an elliptic-curve key (P-256, P-384 or P-521) in PEM" in line


def test_without_the_package_it_is_the_pip_line(signed, keys, intaglio, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for command in (
        ("sign", signed, "--private-key", keys[0], "--force"),
        ("verify", signed, "--public-key", keys[1]),
    ):
        assert "run: pip install 'intaglio[sign]'" in refusal(intaglio, *command)
    assert intaglio("verify", signed)[0] == 0


def test_only_what_asks_for_it_imports_the_package(signed):
    code = """
import sys
from intaglio.__main__ import main
import intaglio.runtimes.engine_tensorrt, intaglio.profiles.trust, intaglio.profiles.signing
main(["verify", sys.argv[1]])
print(sorted({"model_signing", "cryptography", "sigstore"} & sys.modules.keys()))"""
    done = subprocess.run([sys.executable, "-c", code, str(signed)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_new_build_takes_no_old_signature_along(signed):
    """Sealing a folder that holds one removes it: it is of other files."""
    from intaglio.profiles.artifact import seal

    opened = Artifact.open(signed)
    for name in ("manifest.json", "build.json", "SHA256SUMS"):
        (signed / name).unlink()
    seal(signed, opened.manifest, {})
    assert not (signed / "model.sig").exists()
    Artifact.open(signed)
