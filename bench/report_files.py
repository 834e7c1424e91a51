"""What a report becomes beside the page: CSV for spreadsheets, the schema its JSON keeps, a block for a model card."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from intaglio.bench.machine import sentence
from intaglio.bench.report import decibels, megabytes, number
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need

SCHEMA = "report.schema.json"
Report = Mapping[str, Any]
NAMES = ("label", "artifact", "backend", "precision", "device", "threads", "size", "batch", "steps", "scheduler")
PLAIN = ("guidance_scale", "manifest_digest", "artifact_bytes", "status", "error", "load_s", "first_image_s")
SPREADS = ("image_s", "step_s", "cpu_s", "speedup")
PARTS = ("median", "min", "max", "n", "mad")
MEMORY = ("peak_bytes", "peak_private_bytes", "peak_file_bytes")
VRAM = ("framework_bytes", "process_bytes", "device_delta_bytes")
WORST = ("psnr", "ssim", "ms_ssim", "ssimulacra2", "flip", "latents_relative_l2")


def check_schema(report: Report) -> None:
    """Refuse a report that its own schema does not allow.

    Raises:
        UsageError: naming the place and what is wrong.
        MissingDependency: jsonschema is not installed.
    """
    jsonschema = need("jsonschema", extra="bench")
    text = (resources.files("intaglio.bench") / SCHEMA).read_text(encoding="utf-8")
    validator = jsonschema.Draft202012Validator(json.loads(text))
    error = next(iter(sorted(validator.iter_errors(report), key=lambda e: list(map(str, e.absolute_path)))), None)
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the report"
        raise UsageError(f"{where} is not as {SCHEMA} has it: {error.message[:200]}")


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One case as a row of a table: every figure that is one number, empty where there is none."""
    found: dict[str, Any] = {name: row.get(name) for name in (*NAMES, *PLAIN)}
    found["size"] = "x".join(map(str, row["size"])) if row.get("size") else None
    for name in SPREADS:
        found |= {f"{name}_{part}": (row.get(name) or {}).get(part) for part in PARTS}
    found |= {f"memory_{name}": (row.get("memory") or {}).get(name) for name in MEMORY}
    found |= {f"vram_{name}": (row.get("vram") or {}).get(name) for name in VRAM}
    energy = row.get("energy") or {}
    found["joules_median"] = (energy.get("joules") or {}).get("median")
    worst, verdict = row.get("worst") or {}, row.get("verdict") or {}
    found |= {"identical": worst.get("identical"), **{f"worst_{name}": worst.get(name) for name in WORST}}
    return {**found, "passed": verdict.get("passed"), "exceeded": "; ".join(verdict.get("exceeded", []))}


def to_csv(report: Report) -> str:
    """Every case as a line of RFC 4180, headed; seconds, bytes and joules."""
    rows = [flat(row) for row in report["cases"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def model_card(report: Report) -> str:
    """The block of a Hub model card: YAML front matter with the results, then a table for people.

    Source of the keys: the Hub's model card specification (``model-index``), huggingface/hub-docs, modelcard.md.
    """
    lines = ["---", "library_name: intaglio", "pipeline_tag: text-to-image"]
    licences = {a["licence"] for a in report["artifacts"].values() if a["licence"]}
    if len(licences) == 1:
        lines.append(f"license: {quoted(licences.pop())}")
    lines += ["tags:", *(f"- {quoted(t)}" for t in tags(report)), "model-index:"]
    for name, facts in report["artifacts"].items():
        rows = [r for r in report["cases"] if r["artifact"] == name and r["status"] == "ok" and r.get("image_s")]
        if not rows:
            continue
        lines += [f"- name: {quoted(facts['name'])}", "  results:"]
        for row in rows:
            title = f"{row['backend']}, {row['precision']}, {report['machine']['cpu']['model']}"
            lines += ["  - task:", "      type: text-to-image", "    dataset:"]
            prompts = quoted(f"{len(row['prompts'])} prompts")
            lines += [f"      name: {prompts}", "      type: prompts", "    metrics:"]
            lines += [
                line
                for kind, label, value in card_metrics(row, title)
                for line in (f"    - type: {kind}", f"      name: {quoted(label)}", f"      value: {value}")
            ]
    lines += ["---", "", f"Measured with `{report['command']}` on {sentence(report['machine'])}.", ""]
    lines += ["| artifact | backend | precision | MB | s/image | speed | PSNR dB | SSIM | FLIP |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in report["cases"]:
        if row["status"] != "ok" or not row.get("image_s"):
            continue
        worst = row["worst"] or {}
        figures = [megabytes(row["artifact_bytes"]), number(row["image_s"]["median"])]
        figures += [f"{row['speedup']['median']:.2f}" if row["speedup"] else "–", decibels(worst)]
        figures += [number(worst.get(name), 4) for name in ("ssim", "flip")]
        lines.append(f"| {row['artifact']} | {row['backend']} | {row['precision']} | {' | '.join(figures)} |")
    lines += ["", *(f"- `{name}`: manifest {a['manifest_digest']}" for name, a in report["artifacts"].items())]
    return "\n".join(lines) + "\n"


def card_metrics(row: Mapping[str, Any], title: str) -> list[tuple[str, str, float]]:
    """Type, name and value of what a card says of a case."""
    found = [("latency", f"Seconds per image ({title})", row["image_s"]["median"])]
    worst = row["worst"] or {}
    names = (("psnr", "Worst PSNR, dB"), ("ssim", "Worst SSIM"), ("flip", "Worst FLIP"))
    return found + [(k, f"{n} to {row['reference']} ({title})", worst[k]) for k, n in names if worst.get(k) is not None]


def tags(report: Report) -> list[str]:
    """Backends and formats of the report, and the family."""
    rows = [r for r in report["cases"] if r["status"] == "ok"]
    found = [a["family"] for a in report["artifacts"].values()]
    found += [word for r in rows for word in (r["backend"], *r["precision"].split("+"))]
    return list(dict.fromkeys(found))


def quoted(text: str) -> str:
    """A YAML string; JSON's are such."""
    return json.dumps(text, ensure_ascii=False)
