"""A labelled picture: prompts across, backends and precisions down. Makes the README's first image.

``python -m intaglio.bench.grid ARTIFACT:BACKEND… -o grid.png --font FONT.ttc --prompt P…``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.profiles.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN, HEADER, LABEL = 8, 34, 150  # pixels
INK, PAPER = (40, 40, 44), (255, 255, 255)


def compose(rows: Sequence[tuple[str, Sequence[Image]]], columns: Sequence[str], font: str) -> Image:
    """Images of one size in a table with labels.

    Args:
        rows: label and images of each row.
        columns: label of each column.
        font: a TrueType file that has the labels' characters.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    width, height = rows[0][1][0].size
    size = (LABEL + len(columns) * (width + MARGIN), HEADER + len(rows) * (height + MARGIN))
    sheet = Pillow.new("RGB", size, PAPER)
    draw, face = ImageDraw.Draw(sheet), ImageFont.truetype(font, 16)
    for k, text in enumerate(columns):
        x = LABEL + k * (width + MARGIN) + width // 2
        draw.text((x, HEADER // 2), text, INK, font=face, anchor="mm")
    for r, (label, images) in enumerate(rows):
        y = HEADER + r * (height + MARGIN)
        draw.multiline_text((MARGIN, y + height // 2), label, INK, font=face, anchor="lm")
        for k, image in enumerate(images):
            sheet.paste(image, (LABEL + k * (width + MARGIN), y))
    return sheet


def main(argv: list[str] | None = None) -> None:
    """Generate every cell and save the picture.

    Raises:
        UsageError: a row is not ARTIFACT:BACKEND.
    """
    from intaglio.runtimes.pipeline import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="ARTIFACT:BACKEND")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--font", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = []
    for row in args.rows:
        folder, colon, backend = row.rpartition(":")
        if not colon:
            raise UsageError(f"{row!r} is not ARTIFACT:BACKEND")
        pipeline = load(folder, backend=backend)
        formats = "/".join(sorted(set(pipeline.artifact.manifest.recipe.values())))
        label = f"{backend}\n{'fp32' if formats == 'none' else formats}"
        rows.append((label, [pipeline(p, seed=args.seed).images[0] for p in args.prompt]))
        pipeline.close()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    compose(rows, args.prompt, args.font).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
