"""Pictures of the report, each in the file once: the grid, the worst ones, and every prompt beside its reference."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from intaglio.bench.report import axis_text, number
from intaglio.bench.report_groups import breakable, floor_of, group_of, measured, score, short, tiny, title

LARGEST = 512  # pixels; a larger picture is shown scaled down, the original lies beside the page
SIDES = ((160, LARGEST), (640, 256))  # up to so many pictures, this side; beyond the last, SMALLEST
SMALLEST = 128
QUALITY = 92
WORST = 6
Row = Mapping[str, Any]


def encoded(path: Path, largest: int = LARGEST) -> tuple[str, int, int]:
    """A picture as a ``data:`` URI, PNG as it is or scaled down to `largest` as WebP, and its width and height.

    Raises:
        OSError: it is not there, or no picture.
    """
    from PIL import Image

    raw, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(raw)) as image:
        size = image.size
        if max(size) > largest:
            image.thumbnail((largest, largest))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=QUALITY)
            raw, kind, size = buffer.getvalue(), "webp", image.size
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}", *size


def data_uri(path: Path) -> str:
    """A picture as a ``data:`` URI. Errors as `encoded`."""
    return encoded(path)[0]


@dataclass(slots=True)
class Store:
    """The pictures of a page: `show` refers to one, `html` has them all, equal ones once.

    Attributes:
        folder: of the report.
        largest: side in pixels above which a picture is scaled down.
    """

    folder: Path
    largest: int = LARGEST
    scaled: bool = False
    _names: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    _images: dict[str, str] = field(default_factory=dict)

    def show(self, path: str, alt: str, kind: str = "") -> str:
        """A picture as SVG that scales to its place; one that cannot be read says so."""
        if path not in self._names:
            try:
                uri, width, height = encoded(self.folder / path, self.largest)
            except OSError:
                return f"<div class=missing>{escape(alt)}: {escape(path)} cannot be read</div>"
            self.scaled = self.scaled or uri.startswith("data:image/webp")
            name = f"p{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
            self._names[path] = name, width, height
            self._images[name] = f'<image id="{name}" width="{width}" height="{height}" href="{uri}"/>'
        name, width, height = self._names[path]
        start = f'<svg class="{f"picture {kind}".strip()}" viewBox="0 0 {width} {height}" role="img"'
        return f'{start} aria-label="{escape(alt)}"><use href="#{name}"/></svg>'

    def html(self) -> str:
        """All pictures, not shown where it stands."""
        images = "".join(self._images.values())
        return f'<svg id="store" aria-hidden="true"><defs>{images}</defs></svg>'


def store_for(report: Row, folder: Path) -> Store:
    """A store whose largest side keeps the page at a size a browser opens."""
    count = sum(1 + bool(p.get("heat")) for c in report["cases"] for p in c.get("prompts", ()))
    return Store(folder, next((side for most, side in SIDES if count <= most), SMALLEST))


def plate(store: Store, picture: Row, case: Row, truth: Row | None) -> str:
    """A picture with its reference, uncovered by a slider, and its heat map, shown by the switch."""
    title_of = f"{case['label']}: {picture['prompt']}"
    own = store.show(picture["image"], title_of)
    if truth is None or not own.startswith("<svg"):
        return f"<div class=plate>{own}</div>"
    over = store.show(truth["image"], f"reference: {picture['prompt']}", "over ref")
    heat = store.show(picture["heat"], f"FLIP heat map, {title_of}", "over heat") if picture.get("heat") else ""
    label = escape(f"Uncover the reference over {title_of}, per cent from the left")
    slider = f'<input type=range min=0 max=100 value=0 aria-label="{label}">'
    kind = "plate judged" if heat else "plate"
    return f'<div class=frame><div class="{kind}">{own}{over}<i class=line></i>{heat}</div>{slider}</div>'


def figure(store: Store, report: Row, case: Row, picture: Row, *, prompt: bool = False) -> str:
    """A picture, its scores and the noise floor's beside them."""
    group = group_of(report, case["label"])
    truth = None if case["label"] == case.get("reference") else reference_of(report, case, picture)
    times = f"{case['speedup']['median']:.2f}× speed, " if case.get("speedup") else ""
    marks, lines = "", [f"{times}{number(case['image_s']['median'])} s"]
    if case["label"] == case.get("reference"):
        lines.append("reference")
    elif not picture.get("identical") and picture.get("psnr") is None:
        lines.append("not comparable")
    else:
        marks = mini(picture, floor_of(group))
    if prompt:
        lines.insert(0, f"“{picture['prompt']}”")
    name = breakable(case["label"] if prompt else short(group, case["label"]))
    body = "".join(f"<span>{escape(t)}</span>" for t in lines)
    return f"<figure>{plate(store, picture, case, truth)}<figcaption><b>{name}</b>{body}{marks}</figcaption></figure>"


def mini(picture: Row, floor: Row | None) -> str:
    """The scores of a picture over the noise floor's."""
    rows = [("picture", picture), *([("floor", floor)] if floor else [])]
    body = "".join(
        f"<tr><th scope=row class=l>{name}</th>"
        f"<td>{score(figures).removesuffix(' dB')}</td><td>{tiny(figures.get('flip'))}</td></tr>"
        for name, figures in rows
    )
    return f"<table class=mini><tr><td></td><th scope=col>PSNR dB</th><th scope=col>FLIP</th></tr>{body}</table>"


def reference_of(report: Row, case: Row, picture: Row) -> Row | None:
    """The reference's picture of the same prompt; None where there is none to compare with."""
    found = next((c for c in report["cases"] if c["label"] == case.get("reference")), None)
    pictures = (found or {}).get("prompts", ())
    return next((p for p in pictures if p["prompt"] == picture["prompt"]), None)


def worst(store: Store, report: Row) -> str:
    """The pictures that the eye tells furthest from their reference."""
    found = [(p["flip"], c, p) for c in measured(report) for p in c.get("prompts", ()) if p.get("flip")]
    if not found:
        return "<p class=lead>No picture differs from its reference, or none can be compared.</p>"
    found.sort(key=lambda f: -f[0])
    return f"<div class=grid>{''.join(figure(store, report, c, p, prompt=True) for _, c, p in found[:WORST])}</div>"


def gallery(store: Store, report: Row) -> str:
    """Per prompt and group: the reference first, then the cases."""
    parts = []
    for index, prompt in enumerate(report["settings"]["prompts"]):
        parts.append(f"<h3>{escape(prompt)}</h3>")
        for group in report["groups"]:
            cases = [c for c in measured(report) if c["label"] in group["labels"] and index < len(c.get("prompts", ()))]
            cases.sort(key=lambda c: c["label"] != group["reference"])
            name = title(report, group)
            parts.append(f"<p class=lead>{escape(name)}</p>" if name and cases else "")
            figures = "".join(figure(store, report, c, c["prompts"][index]) for c in cases)
            parts.append(f"<div class=grid>{figures}</div>" if cases else "")
    return "".join(parts)


def grid(store: Store, report: Row) -> str:
    """The first prompt over up to three axes: across, down, and a sheet each."""
    axes = list(report["grid"])
    cases = [c for c in report["cases"] if c["status"] in ("ok", "error")]
    values = {a: list(dict.fromkeys(axis_text(c, a) for c in cases)) for a in axes}
    across, down, third = [*axes, None, None][:3]
    prompt = report["settings"]["prompts"][0]
    parts = []
    for z in values[third] if third else [None]:
        heading = f"{words(third)} {z}, “{prompt}”" if third else f"“{prompt}”"
        corner = f"{words(across)} →" + (f"<br>{words(down)} ↓" if down else "")
        top = "".join(f"<th scope=col><small>{words(across)}</small> {escape(x)}</th>" for x in values[across])
        rows = []
        for y in values[down] if down else [None]:
            wanted = {k: str(v) for k, v in ((down, y), (third, z)) if k}
            found = [cell(store, report, cases, {**wanted, across: x}) for x in values[across]]
            name = f"<small>{words(down)}</small> {escape(str(y))}" if down else ""
            rows.append(f"<tr><th scope=row>{name}</th>{''.join(f'<td>{f}</td>' for f in found)}</tr>")
        box = f'<div class="wide sheet" tabindex=0 role=region aria-label="{escape(heading)}">'
        head = f"<thead><tr><th class=stay scope=col><small>{corner}</small></th>{top}</tr></thead>"
        sheet = f"{box}<table>{head}<tbody>{''.join(rows)}</tbody></table></div>"
        parts.append(f"<div><h3>{escape(heading)}</h3>{sheet}</div>")
    return f"<div class=sheets>{''.join(parts)}</div>"


def words(axis: str | None) -> str:
    """The name of an axis in a heading."""
    return (axis or "").replace("_", " ")


def cell(store: Store, report: Row, cases: Sequence[Row], wanted: Mapping[str, str]) -> str:
    """The pictures of one place, one for each value of the axes that the grid leaves out."""
    found = [c for c in cases if all(axis_text(c, a) == v for a, v in wanted.items())]
    others = [a for a in report["axes"] if a not in wanted]
    parts = []
    for case in found:
        name = ", ".join(axis_text(case, a) for a in others)
        head = f"<b>{escape(name)}</b>" if name else ""
        if case["status"] != "ok" or not case.get("prompts"):
            parts.append(f"{head}<span class=bad>{escape(case['error'] or 'no picture')}</span>")
            continue
        picture = case["prompts"][0]
        is_reference = case["label"] == case.get("reference")
        seconds = number(case["image_s"]["median"]) if case.get("image_s") else "–"
        error = "reference" if is_reference else score(picture)
        error = "not comparable" if error == "–" else error
        drawn = store.show(picture["image"], f"{case['label']}: {picture['prompt']}")
        parts.append(f"{head}{drawn}<span>{seconds} s · {escape(error)}</span>")
    return "".join(parts) or "<span>excluded</span>"
