"""The verb ``verify``: files by their digests, who signed them by a key, every backend by the pictures it makes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.profiles.artifact import SIGNATURE, Artifact
from intaglio.profiles.certificate import REFERENCE, Allowed, Certificate, Prompt, read_certificate
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import MissingDependency, NumericsError, Unsupported, UsageError
from intaglio.profiles.registry import pick
from intaglio.profiles.signing import check_signature
from intaglio.profiles.strict import to_dict

if TYPE_CHECKING:
    from intaglio.runtimes.certificate import Evidence
    from intaglio.runtimes.trajectory import Trajectory

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One picture made again, or why it was not.

    Attributes:
        prompt: its number in the certificate.
        reference, own: PSNR in dB against the reference's picture and against the same backend's; ``None`` where the
            certificate has none.
        latents: relative L2 of the final latents against the same backend's.
        verdict: ``ok``, ``waived``, ``skipped: …``, or what is wrong.
        failed: whether it is wrong.
    """

    backend: str
    prompt: int | None = None
    reference: float | None = None
    own: float | None = None
    latents: float | None = None
    verdict: str
    failed: bool = False


def repeat(artifact: Artifact, backends: Sequence[str] = (), note: Note = lambda text: None) -> list[Row]:
    """Sample the certificate's prompts again from its noise, on every backend that is here or on those named.

    Raises:
        ArtifactError: there is no certificate, or it is incomplete or another artifact's.
        UsageError: a backend is named that the artifact was not built for.
        MissingDependency: a backend is named that is not here, or none is.
    """
    from intaglio.runtimes.certificate import backends_of, read_evidence

    certificate = read_certificate(artifact.folder, artifact.manifest)
    evidence, present = read_evidence(artifact, certificate), backends_of(artifact)
    for name in backends:
        if pick(present, name, "backend of this artifact"):
            raise MissingDependency(f"{name}: {present[name]}")
    rows: list[Row] = []
    for name in backends or present:
        reason = present[name]
        if reason is None:
            rows += repeat_on(artifact, certificate, evidence, name, note)
        else:
            rows.append(Row(backend=name, verdict=f"skipped: {reason}"))
    if all(row.prompt is None and not row.failed for row in rows):
        raise MissingDependency("; ".join(f"{row.backend} {row.verdict}" for row in rows))
    return rows


def repeat_on(artifact: Artifact, certificate: Certificate, evidence: Evidence, backend: str, note: Note) -> list[Row]:
    """One backend's rows; one that cannot load an artifact here is skipped with the reason."""
    from intaglio.runtimes.trajectory import opened, request_of, trajectory

    runs: list[Trajectory] = []
    try:
        with opened(artifact, backend) as pipeline:
            for number, (prompt, noise) in enumerate(zip(certificate.prompts, evidence.noise, strict=True)):
                note(f"{backend}: picture {number + 1} of {len(certificate.prompts)}")
                steps = certificate.settings["num_inference_steps"]
                request = request_of(pipeline, Prompt(text=prompt.text, seed=prompt.seed), steps, noise)
                runs.append(trajectory(pipeline, request))
    except (Unsupported, MissingDependency) as error:
        return [Row(backend=backend, verdict=f"skipped: {error}")]
    except NumericsError as error:
        return [Row(backend=backend, verdict=str(error), failed=True)]
    limits, waived = certificate.backends[backend].allowed, bool(certificate.waived)
    return [judge(backend, k, run, evidence, limits, waived=waived) for k, run in enumerate(runs)]


def judge(backend: str, number: int, run: Trajectory, evidence: Evidence, limits: Allowed, *, waived: bool) -> Row:
    """One picture against the stored ones; what was waived at the build only has to come out as it did then."""
    from intaglio.runtimes.fidelity import relative_l2
    from intaglio.runtimes.trajectory import decibels, rounded, similarity

    stored = {name: evidence.pictures[name][number] for name in (REFERENCE, backend) if name in evidence.pictures}
    found = {name: decibels(run.image, picture) for name, picture in stored.items()}
    wrong = []
    if REFERENCE in found:
        alike = similarity(run.image, stored[REFERENCE])
        if found[REFERENCE] < limits.psnr:
            wrong.append(f"{limits.psnr:g} dB to the reference needed")
        if alike is not None and alike < limits.ssim:
            wrong.append(f"SSIM {alike:.3f} to the reference, {limits.ssim:g} needed")
    excused = waived and bool(wrong)
    wrong = [] if waived else wrong
    latents = None
    if backend in found:
        latents = rounded(relative_l2(run.latents, evidence.latents[backend][number]))
        if found[backend] < limits.repeat:
            wrong.append(f"{limits.repeat:g} dB to its own picture needed")
    return Row(
        backend=backend,
        prompt=number,
        reference=found.get(REFERENCE),
        own=found.get(backend),
        latents=latents,
        verdict="; ".join(wrong) or ("waived" if excused else "ok"),
        failed=bool(wrong),
    )


def table(rows: Sequence[Row], certificate: Certificate) -> str:
    """The rows for people."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [f"{'backend':<12} {'picture':>7} {'PSNR reference':>15} {'PSNR own':>9} {'latents own':>12}  verdict"]
    lines += [
        f"{r.backend:<12} {number(r.prompt, 'd'):>7} {number(r.reference, '.1f'):>15} {number(r.own, '.1f'):>9} "
        f"{number(r.latents, '.1e'):>12}  {r.verdict}"
        for r in rows
    ]
    source = f"reference: {certificate.reference} {certificate.reference_version}" if certificate.reference else ""
    return "\n".join([*lines, source or "reference: none ran at the build"])


SIGNATURES = {
    "none": f"signature: none; there is no {SIGNATURE}",
    "not checked": f"signature: {SIGNATURE}, not checked; add --public-key PEM",
    "valid": f"signature: {SIGNATURE} is of all these files and of the key {{key}}",
}


def signature(artifact: Artifact, public_key: str | None) -> str:
    """Which of SIGNATURES is true of an artifact whose files are as recorded.

    Raises:
        ArtifactError: with a key, the signature is missing or not this key's over these files.
    """
    if public_key is None:
        return "not checked" if (artifact.folder / SIGNATURE).is_file() else "none"
    check_signature(artifact.folder, Path(public_key))
    artifact.check_current()
    return "valid"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio verify``."""
    parser.add_argument("artifact")
    parser.add_argument(
        "--public-key", metavar="PEM", help="check that the owner of this key signed the artifact (intaglio sign)"
    )
    parser.add_argument(
        "--images", action="store_true", help="make the certificate's pictures again and compare; exit 1 if they differ"
    )
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        help="with --images: this one alone; repeatable. Else all that are here",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Hash every file, check the signature and repeat the pictures where asked; exit 1 when one is not what it was.

    Raises:
        ToolError: an altered file, naming it; another's signature or none; see `repeat`.
    """
    if args.backend and not args.images:
        raise UsageError("--backend says where pictures are made; add --images")
    artifact = Artifact.open(args.artifact, verify=False)
    count = artifact.verify()
    state = signature(artifact, args.public_key)
    facts = {
        "artifact": str(artifact.folder),
        "files": count,
        "digest": artifact.manifest.digest,
        "signature": state,
    }
    if not args.json:
        print(f"{artifact.folder}: {count} files as recorded, manifest {artifact.manifest.digest}")
        print(SIGNATURES[state].format(key=args.public_key))
    rows = repeat(artifact, tuple(dict.fromkeys(args.backend)), say) if args.images else []
    if args.json:
        print(json.dumps({**facts, **({"images": to_dict(rows)} if args.images else {})}, indent=1, ensure_ascii=False))
    elif rows:
        print(table(rows, read_certificate(artifact.folder, artifact.manifest)))
    wrong = [row for row in rows if row.failed]
    if wrong:
        say(f"intaglio: {wrong[0].backend} does not make the certificate's pictures here: {wrong[0].verdict}")
    return 1 if wrong else 0


VERIFY = Verb(configure, run)
