"""What a certificate needs wherever an artifact runs: backends that are there, its pictures on disk, its judgement."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.certificate import (
    ARRAYS,
    FOLDER,
    REFERENCE,
    Allowed,
    BackendRecord,
    Certificate,
    Rules,
    allowed,
)
from intaglio.profiles.errors import ArtifactError, NumericsError
from intaglio.profiles.registry import installed, need
from intaglio.runtimes.tensorrt_api import APIS, installed_apis, present_gpu
from intaglio.runtimes.trajectory import Trajectory, digest_of

NOISE = "noise"
BACKENDS = {"onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}  # target to what runs it
TARGETS = {backend: target for target, backend in BACKENDS.items()}
WORDS = {"torch": "torch", "unquantized": "the unquantized graph"}


@dataclass(slots=True)
class Evidence:
    """What a certificate stores beside its figures, one entry a prompt.

    Attributes:
        noise: float32 [1, C, h, w].
        pictures: uint8 [H, W, 3] by backend, those of the reference under ``reference``.
        latents: final ones, float32 [1, C, h, w], likewise.
    """

    noise: list[np.ndarray]
    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)
    latents: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, runs: list[Trajectory]) -> None:
        """Keep what one backend made."""
        self.pictures[name] = [run.image for run in runs]
        self.latents[name] = [run.latents for run in runs]


def write_evidence(artifact: Artifact, evidence: Evidence) -> None:
    """Write ``certificate/NAME/K.png`` and the arrays into an unfinished artifact."""
    from PIL import Image

    folder = artifact.folder / FOLDER
    for name, pictures in evidence.pictures.items():
        (folder / name).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / name / f"{number}.png")
    arrays = {f"{name}-{k}": a for name, rows in evidence.latents.items() for k, a in enumerate(rows)}
    arrays.update({f"{NOISE}-{k}": a for k, a in enumerate(evidence.noise)})
    folder.mkdir(exist_ok=True)
    np.savez(folder / ARRAYS, allow_pickle=False, **arrays)


def read_evidence(artifact: Artifact, certificate: Certificate) -> Evidence:
    """Read it back.

    Raises:
        ArtifactError: a picture or an array is missing, or the noise is not the certificate's.
    """
    from PIL import Image

    folder, count = artifact.folder / FOLDER, len(certificate.prompts)
    ran = [name for name, record in certificate.backends.items() if record.version]
    names = [*([REFERENCE] if certificate.reference else []), *ran]
    try:
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            evidence = Evidence([arrays[f"{NOISE}-{k}"] for k in range(count)])
            for name in names:
                evidence.latents[name] = [arrays[f"{name}-{k}"] for k in range(count)]
        for name in names:
            files = [folder / name / f"{k}.png" for k in range(count)]
            evidence.pictures[name] = [np.asarray(Image.open(file, formats=["PNG"]).convert("RGB")) for file in files]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{folder} is incomplete ({error}); build the artifact again") from error
    for number, (prompt, noise) in enumerate(zip(certificate.prompts, evidence.noise, strict=True)):
        if digest_of(noise) != prompt.noise_sha256:
            raise ArtifactError(
                f"{folder / ARRAYS}: {NOISE}-{number} is not the certificate's; build the artifact again"
            )
    return evidence


def backends_of(artifact: Artifact) -> dict[str, str | None]:
    """The backends of an artifact's targets, and why each cannot run here; ``None`` where it can."""
    targets = dict.fromkeys(t for record in artifact.manifest.components.values() for t in record.targets)
    return {BACKENDS[target]: absence(BACKENDS[target]) for target in targets}


def absence(backend: str) -> str | None:
    """Why a backend cannot run on this machine."""
    if backend != "tensorrt":
        return None if installed(backend) else f"not installed here; run: pip install 'intaglio[{backend}]'"
    if not installed_apis():
        return "not installed here; run: pip install 'intaglio[tensorrt]'"
    return None if present_gpu() else "there is no NVIDIA GPU here"


def backend_version(backend: str) -> str:
    """The version of the library that runs a backend."""
    module = APIS[installed_apis()[0]] if backend == "tensorrt" else backend
    return str(need(module, extra=backend).__version__)


def allowed_on(rules: Rules, artifact: Artifact, backend: str, components: tuple[str, ...]) -> Allowed:
    """What `backend` may differ by; ONNX Runtime computes in float32 on a CPU whatever else was built."""
    dtypes = {} if backend == "onnxruntime" else artifact.manifest.dtypes.get(TARGETS[backend], {})
    return allowed(rules, artifact.manifest, components, dtypes)


@dataclass(frozen=True, slots=True)
class Miss:
    """A figure beyond its threshold: in words, which threshold (``error``, ``psnr``, ``ssim``), of which component."""

    text: str
    key: str
    component: str
    excess: float


def misses(backend: str, record: BackendRecord) -> list[Miss]:
    """Every figure of a backend beyond its threshold, components before pictures, the worst first.

    Raises:
        NumericsError: a figure is not a finite number.
    """
    found, pictures, limits = [], [], record.allowed
    for reference, comparison in record.against.items():
        against, worst = WORDS[reference], ("", 0.0)
        for component, places in comparison.components.items():
            limit = limits.components[component]
            place, error = max(places.items(), key=lambda row: row[1])
            excess = error / limit if limit else (np.inf if error else 0.0)
            worst = max(worst, (component, excess), key=lambda row: row[1])
            if not excess <= 1:
                text = f"{component} on {backend} differs from {against} by {error:.1e} ({place}), allowed {limit:.1e}"
                found.append(Miss(text, "error", component, excess))
        for key, unit, values in (("psnr", " dB", comparison.psnr), ("ssim", "", comparison.ssim)):
            for number, value in enumerate(values):
                least = getattr(limits, key)
                if value is not None and not np.isfinite(value):
                    raise NumericsError(f"{key} on {backend} is {value} against {against}")
                if value is not None and value < least:
                    text = (
                        f"picture {number} on {backend}: {key.upper()} {value:.4g}{unit} against {against}, "
                        f"{least:g} needed; nearest to its limit is {worst[0] or 'no component'}"
                    )
                    pictures.append(Miss(text, key, worst[0], least / max(value, 1e-3)))
    return [m for rows in (found, pictures) for m in sorted(rows, key=lambda miss: -miss.excess)]
