"""Tables of the report: the summary, errors of the components, scores beside the noise floor, what was there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from intaglio.bench.report import cells, columns, names, number
from intaglio.bench.report_groups import breakable, floor_of, group_of, measured, members, score, tiny, title

SCORES = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "ssimulacra2": "SSIMULACRA 2",
    "flip": "FLIP",
    "latents_relative_l2": "latents, relative L2",
}
SMALL = 1e-3  # a FLIP below which four decimals say too little
DIGITS = {"ssim": "{:.4f}", "ms_ssim": "{:.4f}", "ssimulacra2": "{:.1f}", "flip": "{:.4f}"}
Row = Mapping[str, Any]


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    label: str,
    kinds: Mapping[int, str] | None = None,
    row_kinds: Sequence[str] = (),
) -> str:
    """A table in a box of its own that scrolls sideways; the first column stays.

    Args:
        heads: HTML, a column each.
        rows: HTML, as many cells; a row with fewer ends in a cell over the rest.
        label: what the table is, for a screen reader.
        kinds: CSS classes by column.
        row_kinds: CSS class by row.
    """
    kinds = kinds or {}
    style = [f' class="{kinds[i]}"' if i in kinds else "" for i in range(len(heads))]
    top = "".join(
        f"<th scope=col{' class=' + chr(34) + 'l stay' + chr(34) if i == 0 else style[i]}>{h}</th>"
        for i, h in enumerate(heads)
    )
    lines = []
    for index, row in enumerate(rows):
        body = [f"<th scope=row>{row[0]}</th>"]
        for i, cell in enumerate(row[1:], 1):
            if i == len(row) - 1 < len(heads) - 1:
                body.append(f'<td class=reason colspan="{len(heads) - i}">{cell}</td>')
            else:
                body.append(f"<td{style[i]}>{cell}</td>")
        kind = f' class="{row_kinds[index]}"' if index < len(row_kinds) and row_kinds[index] else ""
        lines.append(f"<tr{kind}>{''.join(body)}</tr>")
    box = f'<div class=wide tabindex=0 role=region aria-label="{escape(label)}">'
    return f"{box}<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def summary(report: Row) -> str:
    """The table of all cases, and the noise floor's PSNR beside each."""
    fixed, swept = len(names(report)), len(names(report)) - 1
    rows = []
    for case in report["cases"]:
        row = [escape(t) for t in cells(report, case)]
        if case["status"] == "ok":
            floor = floor_of(group_of(report, case["label"]))
            row.append(score(floor) if floor else "–")
            row[-2] = f"<span class=bad>{row[-2]}</span>" if case["verdict"]["passed"] is False else row[-2]
        else:
            row = row[: fixed + 1]
        rows.append(row)
    heads = [*map(escape, columns(report)), "noise floor"]
    status = ["" if c["status"] == "ok" else "error" if c["status"] == "error" else "unrun" for c in report["cases"]]
    return table(heads, rows, "All cases", dict.fromkeys(range(1, swept), "l"), status)


def components(report: Row) -> str:
    """Relative L2 of every component's output, given the reference's inputs; beyond its limit, with the limit."""
    by_columns: dict[tuple[tuple[str, int], ...], list[Row]] = {}
    reasons: dict[str, list[str]] = {}
    for case in measured(report):
        if not case.get("components"):
            reasons.setdefault(case.get("components_reason") or "not measured", []).append(case["label"])
            continue
        key = tuple(dict.fromkeys((c["component"], c["step"]) for c in case["components"]))
        by_columns.setdefault(key, []).append(case)
    parts = []
    for key, cases in by_columns.items():
        heads = ["case", *(f"{escape(name)}<br>step {step}" for name, step in key), "loop’s inputs", "pixels, of 255"]
        rows = [component_row(case, key) for case in cases]
        parts.append(table(heads, rows, "Relative L2 of the components' outputs"))
    everybody = len(measured(report))
    for reason, labels in reasons.items():
        who = "all cases" if len(labels) == everybody else ", ".join(labels)
        parts.append(f"<p class=lead>{escape(who[:1].upper() + who[1:])}: {escape(reason)}.</p>")
    return "".join(parts)


def component_row(case: Row, key: Sequence[tuple[str, int]]) -> list[str]:
    """The cells of one case."""
    row = [breakable(case["label"])]
    for name, step in key:
        call = next((c for c in case["components"] if (c["component"], c["step"]) == (name, step)), None)
        if call is None:
            row.append("–")
            continue
        value = tiny(call["relative_l2"]) if not call["reason"] else escape(call["reason"])
        limit = exceeded_limit(case, name, step)
        bad = limit or call["reason"]
        over = f" &gt; {escape(limit)}" if limit else ""
        row.append(f"<span class=bad>{value}{over}</span>" if bad else value)
    loop = case.get("loop")
    if not loop:
        return [*row, "–", "–"]
    said = escape(loop["strayed"]) if loop["strayed"] else tiny(loop["inputs"])
    pixels = str(loop["pixels"])
    return [
        *row,
        *(f"<span class=bad>{t}</span>" if b else t for t, b in ((said, loop["strayed"]), (pixels, loop["pixels"]))),
    ]


def exceeded_limit(case: Row, component: str, step: int) -> str:
    """The limit that a component's error exceeds, as the verdict words it; empty where it does not."""
    start = f"{component} at step {step} differs by "
    said = next((t for t in (case.get("verdict") or {}).get("exceeded", ()) if t.startswith(start)), "")
    return said.rpartition("allowed ")[2] if "allowed " in said else ""


def scores(report: Row) -> str:
    """Every score of every case, worst over the prompts; each group begins with its noise floor."""
    heads = SCORES | {key: escape(name) for key, name in report.get("learned", {}).items()}
    rows, kinds = [], []
    for group in report["groups"]:
        name = title(report, group)
        for floor in group["noise_floor"]:
            words = escape(f"noise floor, {floor['what']}" + (f" ({name})" if name else ""))
            worst = floor["worst"]
            rows.append([words, *score_cells(worst, heads), "–"] if worst else [words, escape(floor["reason"])])
            kinds.append("floor")
        for case in members(report, group):
            label, worst = breakable(case["label"]), case.get("worst")
            if worst:
                rows.append([label, *score_cells(worst, heads), to_own_backend(case)])
            else:
                rows.append([label, escape(case.get("fidelity_reason") or "not comparable")])
            kinds.append("")
    titles = ["case", *heads.values(), "PSNR dB, to its backend unquantized"]
    kept = [i for i in range(len(titles)) if i < 2 or any(len(r) == len(titles) and r[i] != "–" for r in rows)]
    rows = [[r[i] for i in kept] if len(r) == len(titles) else r for r in rows]
    body = table([titles[i] for i in kept], rows, "Scores, the worst over the prompts", row_kinds=kinds)
    return body + "".join(f"<p class=lead>{escape(said)}.</p>" for said in missing_scores(report, heads))


def score_cells(figures: Row, keys: Iterable[str]) -> list[str]:
    """A cell each of the scores."""
    found = []
    for key in keys:
        value = figures.get(key)
        if key == "psnr":
            found.append(score(figures).removesuffix(" dB"))
        elif value is None:
            found.append("–")
        else:
            small = key == "flip" and 0 < value < SMALL
            found.append(tiny(value) if small or key not in DIGITS else DIGITS[key].format(value))
    return found


def to_own_backend(case: Row) -> str:
    """The PSNR of a quantized case against the unquantized one of its backend, which its tooltip names."""
    same = case.get("same_backend")
    if not same:
        return "–"
    figure = score(same["worst"]).removesuffix(" dB")
    return f'<span title="{escape(same["label"])}">{figure}</span>'


def missing_scores(report: Row, heads: Mapping[str, str]) -> list[str]:
    """Why scores have no value, each reason once."""
    known = [
        p["reasons"] for c in report["cases"] for p in (*c.get("prompts", ()), c.get("worst") or {}) if "reasons" in p
    ]
    found = sorted({(key, reason) for reasons in known for key, reason in reasons.items()})
    return [f"{heads.get(key, key)} {reason}" for key, reason in found]


def exceeded(report: Row) -> str:
    """What is beyond its limits, a sentence each."""
    found = [(c["label"], t) for c in report["cases"] for t in (c.get("verdict") or {}).get("exceeded", ())]
    judged = [c for c in report["cases"] if (c.get("verdict") or {}).get("passed") is not None]
    if found:
        return f"<ul>{''.join(f'<li class=bad>{escape(a)}: {escape(b)}</li>' for a, b in found)}</ul>"
    words = (
        f"Nothing; {len(judged)} of {len(measured(report))} cases could be judged." if judged else "Nothing was judged."
    )
    return f"<p class=lead>{words}</p>"


def repeatability(report: Row) -> str:
    """Whether the same prompt and seed gave the same picture every time."""
    known = [c for c in report["cases"] if c.get("repeatable") is not None]
    other = [c["label"] for c in known if not c["repeatable"]]
    if not known:
        return "Not known."
    if not other:
        return f"All {len(known)} cases gave the same pictures every time."
    return f"Not the same pictures every time: {', '.join(other)}. The other {len(known) - len(other)} did."


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, as a list; empty ones are left out."""
    body = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs if v)
    return f"<dl class=facts>{body}</dl>"


def environment(report: Row) -> str:
    """The machine, the packages and what else went on while it measured."""
    machine, settings, load = report["machine"], report["settings"], report["load_average"]
    cpu = machine["cpu"]
    available = report.get("available_bytes_while_measuring")
    energy = sorted({c["energy"]["reason"] for c in report["cases"] if (c.get("energy") or {}).get("reason")})
    joules = [
        f"{c['label']} {number(c['energy']['joules']['median'])} J"
        for c in report["cases"]
        if (c.get("energy") or {}).get("joules")
    ]
    gpu = ", ".join(g["name"] for g in machine["gpus"]) or machine["gpus_reason"]
    quota = "" if cpu.get("quota_cores") is None else f", quota {cpu['quota_cores']:g}"
    return facts(
        [
            ("processor", f"{cpu['model']}, {cpu['architecture']}{', virtual' if cpu['virtual'] else ''}"),
            ("cores", f"{cpu['cores']} of {cpu['cores_of_machine']}{quota}"),
            ("instructions", ", ".join(cpu["flags"])),
            (
                "memory",
                f"{machine['memory_gib']} GiB"
                + (f", {available / 2**30:.1f} GiB available while measuring" if available else ""),
            ),
            ("GPU", gpu),
            ("system", machine["system"]),
            ("Python", machine["python"]),
            ("packages", ", ".join(f"{k} {v}" for k, v in machine["packages"].items())),
            ("commit", machine.get("git_commit") or ""),
            ("load average", f"{show(load['start'])} before, {show(load['end'])} after"),
            ("took", f"{number(report['seconds'])} s, sittings: {report['sittings']}"),
            ("the bench’s own CPU", f"{number(report['parent_cpu_s'])} s"),
            ("settings", ", ".join(f"{k.replace('_', ' ')} {show(v)}" for k, v in settings.items() if k != "prompts")),
            ("limits asked for", ", ".join(f"{k} {v:g}" for k, v in report.get("limits", {}).items())),
            ("energy", "; ".join([*joules, *energy])),
            ("repeatability", repeatability(report)),
        ]
    )


def show(value: Any) -> str:
    """A setting as people write it."""
    return "own" if value is None else "x".join(map(str, value)) if isinstance(value, list) else str(value)


def digests(report: Row) -> list[tuple[str, str]]:
    """Every artifact and its digest."""
    return [(f"artifact {name}", facts["manifest_digest"]) for name, facts in report["artifacts"].items()]
