"""Measured reports by machine, under ``bench/results``; the README's table is made of one, and a test checks it.

A file is ``MACHINE/NAME-DIGEST.json``: the report's JSON as it is, the first twelve digits of its sha256 in its name,
so that no figure changes unseen. ``python -m intaglio.bench.database`` writes the README's part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.bench.machine import sentence
from intaglio.bench.report import markdown_table, to_json, write_atomic
from intaglio.bench.report_files import check_schema
from intaglio.profiles.errors import UsageError
from intaglio.profiles.strict import parse_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("bench/results")
README = ROOT / "README.md"
START = "<!-- measured: python -m intaglio.bench.database -->"
END = "<!-- end of measured -->"
# The README's reports by name, and what stands above each table. The first one has what is there for everybody.
SHOWN = {
    "embedded": "",
    "sd15-unet": "The same at a real size: Stable Diffusion 1.5's UNet (860 M parameters, random weights, a small VAE: "
    "`python -m intaglio.bench.real_size`), 512x512, two steps without guidance.",
}
DIGITS = 12
FILE = re.compile(r"(?P<name>[a-z0-9-]+)-(?P<digest>[0-9a-f]{12})\.json")
DECIDING = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm")  # what tells machines of one name apart
Report = Mapping[str, Any]


def machine_name(machine: Mapping[str, Any]) -> str:
    """A folder for reports of like machines: GPU or processor, cores, deciding instruction sets."""
    cpu = machine["cpu"]
    words = [g["name"] for g in machine["gpus"]] or [cpu["model"], *(f for f in DECIDING if f in cpu["flags"])]
    text = f"{' '.join(words)} {cpu['cores']} cores".lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def submit(report: Report, name: str, root: Path) -> Path:
    """File a report under `root` by its machine.

    Raises:
        UsageError: a name that is none, or a report that is not as the schema has it, or from an unfinished state.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) is None:
        raise UsageError(f"--submit-format name {name!r} is not allowed: small letters, digits and dashes")
    check_schema(report)
    text = to_json(report)
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
    path = root / machine_name(report["machine"]) / f"{name}-{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def reports(root: Path) -> dict[Path, dict[str, Any]]:
    """Every report filed under `root`, checked.

    Raises:
        UsageError: a file is not named by its digest, lies under another machine, or is not as the schema has it.
    """
    found = {}
    for path in sorted(root.glob("*/*.json")):
        if path.parent.name == "evidence":
            continue
        data, match = path.read_bytes(), FILE.fullmatch(path.name)
        if match is None or hashlib.sha256(data).hexdigest()[:DIGITS] != match["digest"]:
            raise UsageError(f"{path} is not what its name says; file the report again with --submit-format")
        report = parse_json(data)
        check_schema(report)
        if path.parent.name != machine_name(report["machine"]):
            raise UsageError(f"{path} is of the machine {machine_name(report['machine'])}")
        found[path] = report
    return found


def shown(root: Path, name: str = next(iter(SHOWN))) -> tuple[Path, dict[str, Any]]:
    """The newest report of a name.

    Raises:
        UsageError: there is none.
    """
    own = {p: r for p, r in reports(root).items() if FILE.fullmatch(p.name)["name"] == name}  # type: ignore[index]
    if not own:
        raise UsageError(f"no report {name!r} is filed under {root}; run: intaglio bench … --submit-format {name}")
    return max(own.items(), key=lambda item: item[1]["created"])


def block(root: Path = ROOT / FOLDER) -> str:
    """The README's tables and where they come from."""
    return "\n".join([START, "\n\n".join(table(root, name, title) for name, title in SHOWN.items()), END])


def table(root: Path, name: str, title: str) -> str:
    """One report's table under its title, and how it was measured."""
    path, report = shown(root, name)
    source = path.relative_to(root.parent.parent).as_posix()
    facts = report["settings"]
    return "\n".join(
        [
            *([title, ""] if title else []),
            *markdown_table(report),
            "",
            f"Measured by `{report['command']}` on {sentence(report['machine'])}; every figure is of "
            f"[{path.stem}]({source}). “x {report['reference']['backend']}” is the median ratio of {facts['rounds']} "
            f"interleaved rounds to {report['reference']['label']}, with its range; PSNR, SSIM and FLIP are the worst "
            f"of {len(facts['prompts'])} prompts against it from the same noise.",
        ]
    )


def readme(text: str, root: Path = ROOT / FOLDER) -> str:
    """The README's text with the part between the marks made anew."""
    before, rest = text.split(START)
    return before + block(root) + rest.split(END)[1]


def main() -> None:
    """Write the README."""
    write_atomic(README, readme(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
