"""A report as JSON, Markdown, HTML and a table in plain text, all made from the same plain data and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from intaglio.bench.machine import sentence
from intaglio.profiles.errors import UsageError
from intaglio.profiles.staging import swap

JSON, MARKDOWN, CSV, HTML = "report.json", "report.md", "report.csv", "report.html"
BUSY = 0.25  # load per core before the benchmark from which a reader should be warned
Report = Mapping[str, Any]


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent for everyday sizes; a dash where there is no value."""
    if value is None:
        return "–"
    text = f"{value:#.{digits}g}".removesuffix(".")
    return f"{value:.0f}" if "e+" in text else text


def megabytes(value: int | None) -> str:
    """Bytes as MB (10^6)."""
    return "–" if value is None else f"{value / 1e6:.0f}" if value >= 1e7 else f"{value / 1e6:.1f}"


def decibels(worst: Mapping[str, Any]) -> str:
    """A PSNR; ``identical`` where the pictures are."""
    if worst.get("identical"):
        return "identical"
    return "–" if worst.get("psnr") is None else f"{worst['psnr']:.1f}"


def ratio(speedup: Mapping[str, Any] | None) -> str:
    """A speed-up with its range over the rounds."""
    return "–" if speedup is None else f"{speedup['median']:.2f} ({speedup['min']:.2f}–{speedup['max']:.2f})"


def names(report: Report) -> list[str]:
    """Headings of the columns that name a case: every row has them, measured or not."""
    swept = [a for a in report["axes"] if a not in ("artifact", "backend")]
    return ["artifact", "backend", "precision", *swept, "size MB"]


def columns(report: Report) -> list[str]:
    """Headings of the table."""
    times = f"x {report['reference']['backend']} (range)"
    heads = [*names(report), "load s", "first s", "s/image (range, n)", times]
    return [*heads, "peak MB", "PSNR dB", "SSIM", "FLIP", "verdict"]


def axis_text(row: Mapping[str, Any], axis: str) -> str:
    """A row's value of a swept axis."""
    value = row.get(axis)
    return "own" if value is None else "x".join(map(str, value)) if isinstance(value, list) else f"{value}"


def cells(report: Report, row: Mapping[str, Any]) -> list[str]:
    """One case as text, a cell a heading; a case that was not measured has its reason in place of the figures."""
    swept = [axis_text(row, a) for a in names(report)[3:-1]]
    told = "".join(f" {key}={value}" for key, value in (row.get("settings") or {}).items())
    start = [row["artifact"], row["backend"] + told, row["precision"], *swept, megabytes(row["artifact_bytes"])]
    if row["status"] != "ok":
        return [*start, row["error"]]
    worst, image, peak = row["worst"] or {}, row["image_s"], row["memory"]["peak_bytes"] if row["memory"] else None
    return [
        *start,
        number(row["load_s"]),
        number(row["first_image_s"]),
        f"{number(image['median'])} ({number(image['min'])}–{number(image['max'])}, {image['n']})" if image else "–",
        ratio(row["speedup"]),
        megabytes(peak),
        decibels(worst),
        "–" if worst.get("ssim") is None else f"{worst['ssim']:.4f}",
        "–" if worst.get("flip") is None else f"{worst['flip']:.4f}",
        passed(row),
    ]


def passed(row: Mapping[str, Any]) -> str:
    """Whether a case is within its limits."""
    verdict = row["verdict"]
    if row["label"] == row["reference"]:
        return "reference"
    return (
        "–" if verdict["passed"] is None else "passed" if verdict["passed"] else f"{len(verdict['exceeded'])} exceeded"
    )


def table(report: Report) -> str:
    """The cases in aligned plain text, for a terminal or a README; reasons run to the right of their row."""
    rows, fixed = [columns(report), *(cells(report, r) for r in report["cases"])], len(names(report))
    full = [r for r in rows if len(r) == len(rows[0])]
    widths = [max(len(r[i]) for r in full) for i in range(len(rows[0]))]
    for i in range(fixed):  # names are in every row
        widths[i] = max(len(r[i]) for r in rows)
    lines = []
    for row in rows:
        parts = [c.ljust(w) if i < fixed - 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        parts = parts if len(row) == len(widths) else [*parts[:fixed], row[fixed]]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def floor_text(group: Mapping[str, Any]) -> str:
    """How far the reference of a group is from itself."""
    found = []
    for floor in group["noise_floor"]:
        if floor["reason"]:
            found.append(f"{floor['what']}: none, {floor['reason']}")
        elif floor["worst"]["identical"]:
            found.append(f"{floor['what']}: identical")
        else:
            figures = [f"{decibels(floor['worst'])} dB", f"SSIM {number(floor['worst']['ssim'], 4)}"]
            figures.append(f"latents {number(floor['worst']['latents_relative_l2'], 2)}")
            found.append(f"{floor['what']}: {', '.join(figures)}")
    return "; ".join(found)


def notes(report: Report) -> list[str]:
    """What a reader must know to trust the figures, one sentence each."""
    average, cores = report["load_average"], report["machine"]["cpu"]["cores"]
    settings = report["settings"]
    result = [
        f"Machine: {sentence(report['machine'])}.",
        f"Reference: {report['reference']['why']}. PSNR, SSIM and FLIP are the worst of {len(settings['prompts'])} "
        "prompts, from the same initial noise.",
        f"The column “{columns(report)[len(names(report)) + 3]}” is the median of {settings['rounds']} interleaved "
        "rounds of reference "
        "seconds divided by the case's seconds in the same round, so that a slow minute hits both; above 1 is faster. "
        "It is the figure to quote, with its range: seconds depend on what else the machine was doing.",
        *(
            f"Noise floor of {g['reference']} against itself: {floor_text(g)}."
            for g in report["groups"]
            if g["noise_floor"]
        ),
        "Load includes importing the backend, not hashing the artifact. First is the first image after loading. "
        "Size counts the files of the artifact that the backend reads; the torch rows show the shared graph's.",
    ]
    if average["start"] is not None:
        result.append(f"Load average {average['start']} before and {average['end']} after, on {cores} cores.")
        if average["start"] > BUSY * cores:
            result.append(
                "The machine was busy with other work. Threads that wait for each other suffer most from that, torch's "
                "more than the others', so ratios to torch are then too kind: repeat with --threads 1, or idle."
            )
    result += [
        f"{c['label']} is unsteady: its slowest image took {c['image_s']['max'] / c['image_s']['min']:.2f} times its "
        f"fastest. Fastest against fastest the ratio is {c['speedup_of_fastest']:.2f}."
        for c in report["cases"]
        if c.get("unsteady") and c.get("speedup_of_fastest")
    ]
    peaks = [c for c in report["cases"] if c.get("memory") and c["memory"]["peak_bytes"] is not None]
    reasons = sorted({c["memory"]["reason"] for c in report["cases"] if c.get("memory") and c["memory"]["reason"]})
    if peaks:
        result.append(
            "Peak is the kernel's high-water mark of one process of its own, interpreter and libraries included, from "
            "before the load to the end of the first image; it is not a process that was timed."
        )
    result += [f"Host memory: {r}." for r in reasons]
    result += [f"VRAM: {r}." for r in sorted({c["vram"]["reason"] for c in report["cases"] if c.get("vram")}) if r]
    result += sorted({f"{label}." for case in report["cases"] for label in case.get("labels", [])})
    for case in report["cases"]:
        if case.get("repeatable") is False:
            result.append(f"{case['label']} did not give the same picture every time.")
        if case.get("fidelity_reason"):
            result.append(f"{case['label']}: {case['fidelity_reason']}.")
    return result


def escape(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(report: Report) -> list[str]:
    """The lines of the table."""
    heads = columns(report)
    lines = [f"| {' | '.join(heads)} |"]
    left = len(names(report)) - 1
    lines.append(f"| {' | '.join('---' if i < left else '---:' for i in range(len(heads)))} |")
    for case in report["cases"]:
        row = [escape(c) for c in cells(report, case)]
        lines.append(f"| {' | '.join(row + [''] * (len(heads) - len(row)))} |")
    return lines


def markdown(report: Report) -> str:
    """The table, the notes and the figures per prompt."""
    lines = ["# Intaglio benchmark", "", f"`{report['command']}`", "", *markdown_table(report)]
    lines += ["", *(f"- {n}" for n in notes(report)), "", "## Per prompt", ""]
    lines += [
        "| case | prompt | PSNR dB | SSIM | FLIP | latents, relative L2 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in report["cases"]:
        for picture in (p for p in case.get("prompts", []) if "psnr" in p):
            figures = [decibels(picture), *(number(picture[k], 4) for k in ("ssim", "flip", "latents_relative_l2"))]
            lines.append(f"| {escape(case['label'])} | {escape(picture['prompt'])} | {' | '.join(figures)} |")
    exceeded = [(c["label"], e) for c in report["cases"] for e in (c.get("verdict") or {}).get("exceeded", [])]
    if exceeded:
        lines += ["", "## Beyond their limits", "", *(f"- {escape(label)}: {escape(text)}" for label, text in exceeded)]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """Indented JSON.

    Raises:
        ValueError: a NaN or an infinity got in, which JSON does not have.
    """
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomic(path: Path, text: str) -> None:
    """Write a file as a whole: readers see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def texts_of(report: Report, folder: Path) -> dict[str, str]:
    """Every file of a report by name, made from its JSON and the pictures in `folder` and nothing else.

    Raises:
        UsageError: the report is not as its schema has it.
    """
    from intaglio.bench.report_files import check_schema, to_csv
    from intaglio.bench.report_html import page

    plain = json.loads(to_json(report))
    check_schema(plain)
    return {JSON: to_json(report), MARKDOWN: markdown(plain), CSV: to_csv(plain), HTML: page(plain, folder)}


def write(report: Report, folder: Path) -> None:
    """Write report.json, report.md, report.csv and report.html beside the pictures in ``folder/images``.

    Raises:
        UsageError: the report is not as its schema has it.
    """
    for name, text in texts_of(report, folder).items():  # all made before the first is written
        write_atomic(folder / name, text)


@contextlib.contextmanager
def report_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Give a sibling temporary folder that becomes `target` when the block ends well, and vanishes otherwise.

    Raises:
        UsageError: `target` exists and `force` is not given, or it exists and is not a report, or cannot be written.
    """
    check_target(target, force=force)
    temporary = target.absolute().with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        message = f"{target} cannot be written ({error.strerror}); choose another output folder"
        raise UsageError(message) from error
    try:
        yield temporary
        swap(temporary, target.absolute())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_target(target: Path, *, force: bool) -> None:
    """Refuse an output folder before hours of work.

    Raises:
        UsageError: it exists and `force` is not given, or it is not an earlier report.
    """
    if not target.exists():
        return
    if not force:
        message = f"{target} exists; choose another name or add --force to replace it"
        raise UsageError(message)
    if not target.is_dir() or (any(target.iterdir()) and not (target / JSON).exists()):
        message = f"{target} exists and is not a report; --force replaces reports only, choose another name"
        raise UsageError(message)
