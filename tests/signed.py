"""A small artifact with one engine, and keys: what the tests of signatures and of trust start from."""

from __future__ import annotations

from intaglio.profiles.artifact import Artifact, seal
from intaglio.profiles.manifest import SCHEMA_VERSION, Manifest
from intaglio.profiles.spec import ComponentRecord, TensorSpec

ENGINE = "unet/tensorrt/model.sm89.engine"
FACTS = {"sm": "sm89", "api": "tensorrt-rtx", "version": "1.7.1.116"}
FILES = {ENGINE: b"plan", "unet/model.onnx": b"graph", "unet/model.onnx.data": bytes(1000)}
RECORD = ComponentRecord(
    source="unet",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    parameters=1,
    format="none",
    targets=("onnx", "tensorrt"),
    tensors={},
    weights={},
)


def manifest(engines):
    """A manifest of one component with these engines."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="sd",
        name="tiny",
        components={"unet": RECORD},
        shapes={},
        settings={},
        recipe={},
        contract={},
        dtypes={},
        licence=None,
        provenance={},
        engines=engines,
        files={},
    )


def make_artifact(folder):
    """A sound artifact of three files and their records; returns it opened."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    seal(folder, manifest({ENGINE: FACTS}), {})
    return Artifact.open(folder)


def make_keys(folder, name="key", curve="SECP256R1", password=None):
    """A new key pair as two PEM files: private, public."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(pem, pkcs8, lock))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    public.chmod(0o644)
    return private, public


def flip(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
