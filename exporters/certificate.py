"""The certificate of a build: what is asked for, and what a build does with it.

Every backend that can run here samples a fixed prompt set from the same noise. Its references are the unquantized
graphs on the same backend, which show what quantization costs, and torch on the checkpoint's weights, which shows all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from intaglio.exporters.certificate_run import make_certificate
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.certificate import Certificate, Overrides, load_rules
from intaglio.profiles.errors import UsageError

if TYPE_CHECKING:
    from intaglio.exporters.plan import Plan
    from intaglio.exporters.stages import Stages

# Parameters of one component, and steps: five runs at a large model's own 28 or 50 steps take hours on a CPU.
LARGE, LARGE_STEPS = 200_000_000, 4
COUNTS, LIMITS = ("prompts", "steps"), ("psnr", "ssim", "error")
CERTIFICATE_OPTIONS = tuple(f"certificate.{key}" for key in (*COUNTS, *LIMITS))
PROMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateSettings:
    """How much is sampled: prompts of the fixed set, steps (``None``: the artifact's own); limits the user chose."""

    prompts: int = PROMPTS
    steps: int | None = None
    limits: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """What a build seals: the certificate, if one was asked for, and remarks for ``build.json``."""

    certificate: Certificate | None
    remarks: tuple[str, ...]


def certificate_settings(options: Mapping[str, str]) -> CertificateSettings | None:
    """``--set certificate.prompts=N`` (0: no certificate), ``.steps=N``, and ``.psnr``, ``.ssim``, ``.error``.

    Raises:
        UsageError: a value that is no number, or out of its range.
    """
    most = len(load_rules().prompts)
    prompts = count_of(options, "prompts", 0, most)
    steps = count_of(options, "steps", 1, None)
    limits = Overrides(**{key: limit_of(options, key) for key in LIMITS})
    if prompts == 0:
        return None
    return CertificateSettings(prompts=PROMPTS if prompts is None else prompts, steps=steps, limits=limits)


def count_of(options: Mapping[str, str], key: str, least: int, most: int | None) -> int | None:
    """A whole number."""
    text = options.get(f"certificate.{key}")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise UsageError(f"--set certificate.{key}={text} is not allowed: a whole number, {bounds}")
    return int(text)


def limit_of(options: Mapping[str, str], key: str) -> float | None:
    """A number, 0 or more."""
    text = options.get(f"certificate.{key}")
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"--set certificate.{key}={text} is not allowed: a number, 0 or more")
    return value


def certify(plan: Plan, artifact: Artifact, draft: Artifact | None, stages: Stages, *, accept: bool) -> Certified:
    """Sample, compare and judge a build that is not sealed yet; pictures and latents are in ``certificate/`` then.

    Raises:
        ParityError: a figure misses its threshold and `accept` is not given.
        NumericsError: NaN or a picture without content, which nobody may accept.
    """
    if plan.certificate is None:
        return Certified(certificate=None, remarks=("no certificate was asked for: certificate.prompts is 0",))
    with stages.stage("certificate") as facts:
        asked, few = plan.certificate, few_steps(plan.certificate, artifact)
        found = make_certificate(
            artifact,
            draft,
            prompts=asked.prompts,
            steps=few or asked.steps,
            limits=asked.limits,
            accept=accept,
            note=stages.note,
        )
        facts["backends"] = [name for name, record in found.backends.items() if record.against]
    remarks = [f"certificate: {name}: {reason}" for name, reason in found.skipped.items()]
    if few:
        remarks.append(f"certificate: {few} steps, the model is large; --set certificate.steps=N takes more")
    remarks += [f"certificate: waived by --accept-fidelity: {miss}" for miss in found.waived]
    return Certified(certificate=found, remarks=tuple(remarks))


def few_steps(asked: CertificateSettings, artifact: Artifact) -> int | None:
    """LARGE_STEPS where nothing else was asked for and a component is LARGE."""
    largest = max(record.parameters for record in artifact.manifest.components.values())
    return LARGE_STEPS if asked.steps is None and largest > LARGE else None
