"""``docs/formats.md`` and the README's table, generated from the tables of formats and the figures on file.

``python -m intaglio.bench.formats_page`` writes both; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.bench.evidence import FOLDER, ROOT
from intaglio.quantize.formats import FORMATS, OPS, SUPPORT, TARGETS, Format

PAGE, README = ROOT / "docs/formats.md", ROOT / "README.md"
START, END = "<!-- formats: python -m intaglio.bench.formats_page -->", "<!-- end of formats -->"
SHORT = {"psnr": 1, "ssim": 4, "flip": 4}  # metrics of the README's table and their decimals
MB = 1e6
INTRODUCTION = """# Number formats

This page is generated from the tables the code reads and from the figures on file (`python -m
intaglio.bench.formats_page`); a test compares it. `intaglio build CHECKPOINT -o ART --quant int8` quantizes all
components, `--quant unet=w8a8` one, `--profile recipe.X.toml` names layers.

A format is asked for by one name and carried out layer by layer: a convolution, an embedding or a layer whose width is
no multiple of the block takes the format that the columns on the right name. What a family keeps high is in its
`profiles/family.X.toml`, and the manifest lists every exception."""
RUNS = """*native*: the backend computes on the codes or keeps them packed in memory. *lowered*: the same, after the
build rewrote the graph for this backend, with the same codes. *stored-only*: the file is smaller, the backend unpacks
the weights to compute. The reason of each cell is in [support](support.md)."""
EMOJI = """The embedded checkpoint, 128x128, {steps} steps, one thread; a case is a process of its own. *x fp32* and *x
torch* are seconds of an image over those of the same backend in fp32 and of torch eager in fp32, the median (and range)
of {rounds} interleaved rounds: under 1 is faster. *Peak* is the highest resident memory over load and one image. PSNR,
SSIM and FLIP are the median and the worst of {prompts} prompts against fp32 on the same backend from the same noise;
the rows of fp32 are compared with torch. *top-1* and *top-5*: share of names, English and Chinese, whose emoji is the
nearest, or among the five nearest, of all 775; `fp32` is the yardstick."""
UNET = """The UNet alone, in a process that loads nothing else: peak memory over load and {calls} calls, and seconds a
call at the shapes of one picture with guidance (batch 2)."""
COVERAGE = """Shares at the format that was asked for (or at the floor the family sets): bytes of MatMul weights, bytes
of MatMul and Conv weights, multiply-accumulates of both where calibration counted them. Embeddings, and weights of
under 4096 elements, are not eligible."""
NOT_MEASURED = "Not measured; run `make evidence {}`."


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> list[str]:
    """Markdown lines; the last `numbers` columns are set right."""
    rules = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *rows)]


def format_row(name: str, row: Format) -> list[str]:
    """What a format is."""
    scale = f"a block of {row.block}" if row.block else "an output channel"
    others = ", ".join(f"{op}: {other}" for op, other in row.others)
    return [
        f"`{name}`",
        f"{row.bits:g}",
        row.codebook,
        row.storage,
        scale if row.codec else "-",
        f"{row.activations}, static" if row.activations else "float",
        others or "-",
        row.smaller or "-",
    ]


def support_rows() -> list[list[str]]:
    """Format and operator to what each target does; ``+`` where it was measured to be faster than fp32."""

    def cell(name: str, op: str, target: str) -> str:
        row = SUPPORT.get((name, op, target))
        return "-" if row is None else row.how + (" +" if row.faster else "")

    wanted = [(n, op) for n in FORMATS for op in OPS if any((n, op, t) in SUPPORT for t in TARGETS if t != "torch")]
    return [[f"`{name}`", op, *(cell(name, op, target) for target in TARGETS)] for name, op in wanted]


def number(value: float | None, digits: int, missing: str = "-") -> str:
    """A figure with a fixed number of decimals."""
    return missing if value is None else f"{value:.{digits}f}"


def ratio(value: Mapping[str, Any] | None) -> str:
    """Median and range."""
    return "-" if value is None else f"{value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})"


def megabytes(value: float | None) -> str:
    """Bytes in MB."""
    return number(None if value is None else value / MB, 1)


def both(row: Mapping[str, Any], name: str, digits: int) -> str:
    """Median and worst of a metric; a PSNR that is missing is that of identical pictures."""
    if name not in row:
        return "-"
    return " / ".join(number(row[name][k], digits, "identical") for k in ("median", "worst"))


def emoji_row(row: Mapping[str, Any]) -> list[str]:
    """A row of the table of pictures; of a refused cell its reason."""
    first = [f"`{row['format']}`", row["backend"]]
    if row["status"] == "refused":
        return [*first, f"refused: {row['reason']}", *[""] * 9]
    found = row["retrieval"]
    return [
        *first,
        megabytes(row["bytes"]),
        megabytes(row["denoiser_bytes"]),
        ratio(row["seconds_ratio_to_fp32"]),
        ratio(row["seconds_ratio_to_torch"]),
        megabytes(row["peak_bytes"]),
        both(row, "psnr", 1),
        both(row, "ssim", 4),
        both(row, "flip", 4),
        f"{found['top1']:.0%}",
        f"{found['top5']:.1%} of {found['pictures']}",
    ]


def unet_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Every measured UNet, its peak also as a share of fp32's on the same backend."""
    peaks = {r["backend"]: r["denoiser"]["peak_bytes"] for r in rows if r["format"] == "fp32"}
    made = []
    for row in rows:
        alone = row["denoiser"]
        share = alone["peak_bytes"] / peaks[row["backend"]] if alone["peak_bytes"] else None
        made.append(
            [
                f"`{row['format']}`",
                row["backend"],
                megabytes(row["denoiser_bytes"]),
                megabytes(alone["peak_bytes"]),
                number(share, 2),
                number(alone["seconds"] * 1000, 1),
                ratio(alone["seconds_ratio_to_fp32"]),
                ratio(alone["seconds_ratio_to_torch"]),
            ]
        )
    return made


def coverage_rows(coverage: Mapping[str, Any]) -> list[list[str]]:
    """Shares of the UNet and of all components together."""

    def shares(one: Mapping[str, Any]) -> list[str]:
        values = [one[k] for k in ("weights", "all_weights", "macs")]
        return ["-" if v is None else f"{v:.1%}" for v in values]

    return [
        [f"`{name}`", *shares(one["components"]["unet"]), *shares(one["whole"]), str(len(one["exceptions"]))]
        for name, one in coverage.items()
    ]


def emoji_section(root: Path) -> list[str]:
    """Pictures, UNets and coverage of the embedded checkpoint."""
    facts = recorded("formats", root)
    if facts is None:
        return ["## Measured: the embedded checkpoint", "", NOT_MEASURED.format("formats")]
    measured = [row for row in facts["rows"] if row["status"] == "measured"]
    head = ["format", "backend", "MB", "UNet MB", "x fp32", "x torch", "peak MB", "PSNR dB", "SSIM", "FLIP"]
    unet = ["format", "backend", "MB", "peak MB", "of fp32's", "ms", "x fp32", "x torch"]
    parts = [f"{whose} {what}" for whose in ("UNet", "all") for what in ("MatMul", "MatMul + Conv", "MACs")]
    return [
        *["## Measured: the embedded checkpoint", "", EMOJI.format(**facts), ""],
        *table([*head, "top-1", "top-5"], map(emoji_row, facts["rows"]), 10),
        *["", "## Measured: its UNet", "", UNET.format(calls=facts["unet_calls"]), ""],
        *table(unet, unet_rows(measured), 6),
        *["", "## Coverage", "", COVERAGE, ""],
        *table(["format", *parts, "exceptions"], coverage_rows(facts["coverage"]), 7),
    ]


def mmdit_section(root: Path) -> list[str]:
    """The transformer of a diffusion model at a size that matters."""
    facts = recorded("mmdit", root)
    if facts is None:
        return ["## Measured: a transformer", "", NOT_MEASURED.format("mmdit")]
    columns: dict[str, Callable[[Any], str]] = {
        "backend": str,
        "format": lambda v: f"`{v}`",
        "activations": str,
        "bytes": megabytes,
        "speed_of_own_fp32": lambda v: number(v, 2),
        "speed_of_torch": lambda v: number(v, 2),
        "peak_bytes": megabytes,
        "peak_of_own_fp32": lambda v: number(v, 2),
        "relative_l2": lambda v: number(v, 5),
        "coverage_weights": lambda v: "-" if v is None else f"{v:.1%}",
        "coverage_macs": lambda v: "-" if v is None else f"{v:.1%}",
    }
    head = ["backend", "format", "activations", "MB", "x fp32", "x torch", "peak MB", "of fp32's", "relative L2"]
    model = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts["model"].items())
    rows = [[show(row[key]) for key, show in columns.items()] for row in facts["rows"]]
    note = (
        "*x fp32* and *x torch*: seconds of a call of fp32 on the same backend, and of torch eager in fp32, over this "
        f"row's, the median of {facts['rounds']} interleaved rounds on all threads: above 1 is faster. Relative L2 is "
        "that of the output to torch in fp32, on normal inputs. *peak*: load and one call, a process of its own."
    )
    return [
        *["## Measured: a transformer", "", f"{model}.", "", note, ""],
        *table([*head, "MatMul weights", "MACs"], rows, 8),
    ]


def exceptions_section(root: Path) -> list[str]:
    """What the layers that stay high buy."""
    facts = recorded("exceptions", root)
    if facts is None:
        return ["## What the exceptions buy", "", NOT_MEASURED.format("exceptions")]
    text = (
        f"On the embedded checkpoint's UNet, {facts['backend']}, {facts['steps']} steps: median PSNR over "
        f"{facts['prompts']} prompts by the family's rules, less that with the named layers in the format, too; "
        "and the bytes that costs."
    )
    rows = [
        [
            f"`{name}`, {row['psnr']:.1f} dB",
            f"`{pattern}`",
            f"{cost['buys_db']:+.2f}",
            f"{cost['costs_bytes'] / MB:.2f}",
        ]
        for name, row in facts["formats"].items()
        for pattern, cost in row["exceptions"].items()
    ]
    return ["## What the exceptions buy", "", text, "", *table(["recipe", "layers", "dB", "MB"], rows, 2)]


def recorded(name: str, root: Path) -> dict[str, Any] | None:
    """The figures of a check, if it is on file."""
    file = root / FOLDER / f"{name}.json"
    if not file.exists():
        return None
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return figures


def page(root: Path = ROOT) -> str:
    """The whole page, with the figures under `root`."""
    head = ["format", "bits", "a code is one of", "stored as", "a scale for", "inputs", "elsewhere", "other widths"]
    lines = [
        *[INTRODUCTION, "", "## What each format is", ""],
        *table(head, [format_row(name, row) for name, row in FORMATS.items()]),
        *["", "## Where it runs", "", f"{RUNS} A `+` marks what is faster than fp32 there.", ""],
        *table(["format", "operator", *TARGETS], support_rows()),
        *["", *emoji_section(root), "", *mmdit_section(root), "", *exceptions_section(root), ""],
    ]
    return "\n".join(lines)


def readme_table(root: Path = ROOT) -> str:
    """Formats and backends in short, between the README's markers."""
    facts = recorded("formats", root)
    if facts is None:
        return f"{START}\n{NOT_MEASURED.format('formats')}\n{END}"
    head = ["format", "backend", "MB", "s/image", "x fp32", "peak MB", "PSNR dB", "SSIM", "FLIP", "right emoji"]
    rows = [
        [
            f"`{row['format']}`",
            row["backend"],
            megabytes(row["bytes"]),
            number(row["seconds"], 2),
            number(row["seconds_ratio_to_fp32"]["median"], 2),
            number(row["peak_bytes"] / MB, 0),
            *(number(row[m]["median"], d, "identical") if m in row else "-" for m, d in SHORT.items()),
            f"{row['retrieval']['top5']:.1%}",
        ]
        for row in facts["rows"]
        if row["status"] == "measured"
    ]
    return "\n".join([START, *table(head, rows, 8), END])


def readme(text: str, root: Path = ROOT) -> str:
    """The README with its table as the figures under `root` have it."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + readme_table(root) + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
