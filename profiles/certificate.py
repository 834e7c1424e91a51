"""The certificate of an artifact: what was sampled, how far it was from its references, and what was allowed.

It lies in ``certificate/``, beside the manifest whose digest it names: its figures differ between machines, so they are
covered by ``SHA256SUMS`` and not by the manifest.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from intaglio.profiles.errors import ArtifactError
from intaglio.profiles.manifest import WORD, Manifest
from intaglio.profiles.spec import ComponentRecord
from intaglio.profiles.strict import from_dict, to_dict

FOLDER, FILE, ARRAYS = "certificate", "certificate.json", "latents.npz"
REFERENCE = "reference"  # folder of the pictures everything is compared with
SCHEMA_VERSION = 1
IDENTICAL = 200.0  # dB, written for pictures without any difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The least PSNR (dB) and SSIM of pictures, the largest relative L2 error of a component, and where they come from.

    `repeat` is the least PSNR of a later run against the stored picture of the same backend.
    """

    psnr: float
    ssim: float
    error: float
    repeat: float = IDENTICAL
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text and the seed of its noise."""

    text: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """``certificate.toml``: the fixed prompts, and limits by format, compute dtype and activation arithmetic."""

    prompts: tuple[Prompt, ...]
    formats: dict[str, Limits]
    dtypes: dict[str, Limits]
    activations: dict[str, Limits]


def load_rules() -> Rules:
    """Read ``certificate.toml``."""
    text = (resources.files("intaglio.profiles") / "certificate.toml").read_text(encoding="utf-8")
    return from_dict(Rules, tomllib.loads(text), "certificate.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What one backend's figures may be: of pictures, of each component, and of a repetition; `rows` decided it."""

    psnr: float
    ssim: float
    components: dict[str, float]
    repeat: float
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """Limits that ``--set certificate.KEY=NUMBER`` put in place of the table's."""

    psnr: float | None = None
    ssim: float | None = None
    error: float | None = None


def rows_of(record: ComponentRecord, dtype: str) -> tuple[str, ...]:
    """Names of the rows that apply to a component: ``formats.int8``, ``dtypes.float32``, ``activations.exact``."""
    quantization = record.quantization
    layers = quantization.recipe.get("layers", {}) if quantization else {}
    formats = dict.fromkeys(f"formats.{name}" for name in (record.format, *layers.values()))
    arithmetic = quantization.activations if quantization else "exact"
    return (*formats, f"dtypes.{dtype}", f"activations.{arithmetic}")


def allowed(rules: Rules, manifest: Manifest, components: Iterable[str], dtypes: dict[str, str]) -> Allowed:
    """The loosest of the rows that apply: each component's own for its error, all of them for pictures.

    Args:
        rules: of ``certificate.toml``.
        manifest: says how each component was built.
        components: those that make a picture.
        dtypes: what the backend computes each component in.
    """
    names = {c: rows_of(r, dtypes.get(c, "float32")) for c, r in manifest.components.items()}

    def limits(name: str) -> Limits:
        table, _, row = name.partition(".")
        found: Limits = getattr(rules, table)[row]
        return found

    rows = tuple(dict.fromkeys(name for component in components for name in names[component]))
    return Allowed(
        psnr=min(limits(r).psnr for r in rows),
        ssim=min(limits(r).ssim for r in rows),
        components={c: max(limits(r).error for r in own) for c, own in names.items()},
        repeat=min(limits(r).repeat for r in rows),
        rows=rows,
    )


def overridden(found: Allowed, overrides: Overrides) -> Allowed:
    """The same with what the user said instead; it is named among the rows."""
    given = {key: value for key in ("psnr", "ssim", "error") if (value := getattr(overrides, key)) is not None}
    return Allowed(
        psnr=given.get("psnr", found.psnr),
        ssim=given.get("ssim", found.ssim),
        components={c: given.get("error", limit) for c, limit in found.components.items()},
        repeat=found.repeat,
        rows=(*found.rows, *(f"--set certificate.{key}={value:g}" for key, value in given.items())),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One backend against one reference; lists have one entry a prompt.

    Attributes:
        psnr, ssim: of the pictures; SSIM is ``None`` where a side is shorter than its window.
        latents: relative L2 of the final latents.
        drift: relative L2 of the latents after each step, each run on its own trajectory.
        components: relative L2 of each component's outputs on the reference's feeds, by the place they were taken
            (``text``, ``step 3``, ``decode``), the largest over prompts.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float | None, ...]
    latents: tuple[float, ...]
    drift: tuple[tuple[float, ...], ...]
    components: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """A backend's version, limits, and figures by reference (``torch``, ``unquantized``); none where it did not run."""

    version: str | None
    allowed: Allowed
    against: dict[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A prompt, the seed of its noise, and the sha256 of the noise (float32, little endian)."""

    text: str
    seed: int
    noise_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """``certificate/certificate.json``.

    Attributes:
        manifest: digest of the manifest it belongs to.
        settings: steps, guidance, scheduler, size in pixels.
        reference: whose pictures are in ``certificate/reference``: ``torch``, or ``unquantized BACKEND``.
        skipped: what did not run, or was not compared with, and why.
        waived: what was missed and accepted with ``--accept-fidelity``.
    """

    schema_version: int = SCHEMA_VERSION
    manifest: str = ""
    prompts: tuple[Sampled, ...]
    settings: dict[str, Any]
    reference: str | None
    reference_version: str | None
    backends: dict[str, BackendRecord]
    skipped: dict[str, str]
    waived: tuple[str, ...]


def write_certificate(folder: Path, certificate: Certificate) -> Path:
    """Write ``certificate.json`` into an artifact's folder."""
    file = folder / FOLDER / FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(to_dict(certificate), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def read_certificate(folder: Path, manifest: Manifest) -> Certificate:
    """The certificate of an artifact.

    Raises:
        ArtifactError: there is none, it is of another schema, or it belongs to another manifest.
    """
    path = folder / FOLDER / FILE
    again = "build the artifact again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} has no certificate, so there are no pictures to compare with; "
            f"{again}, without --set certificate.prompts=0"
        ) from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); {again}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema version {version}, this intaglio reads {SCHEMA_VERSION}; {again}")
    certificate = from_dict(Certificate, data, str(path), error=ArtifactError)
    for name in (n for n in certificate.backends if not WORD.fullmatch(n)):  # folders of pictures
        raise ArtifactError(f"{path} has the backend {name[:100]!r}, allowed: names of engines; {again}")
    if certificate.manifest != manifest.digest:
        raise ArtifactError(f"{path} belongs to the manifest {certificate.manifest[:16]}, not to this one; {again}")
    return certificate
