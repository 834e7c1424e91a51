"""The text that webuis write into a PNG under ``parameters``, so that a picture says how it was made.

The form is AUTOMATIC1111's (``modules/infotext_utils.py`` there): the prompt, ``Negative prompt: …``, and a last line
of ``Key: value`` pairs, values with a comma, a colon or a line break in JSON quotes. `parse` is its inverse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# Our schedulers by the names that webuis show.
SAMPLER_NAMES = {
    "ddim": "DDIM",
    "pndm": "PNDM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "lcm": "LCM",
    "flow_match_euler": "Flow Match Euler",
}
NEGATIVE = "Negative prompt: "
PAIR = re.compile(r'\s*([\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
# Keys of the last line: (its name, the parameter, how its value is read).
KEYS: tuple[tuple[str, str, Any], ...] = (
    ("Steps", "num_inference_steps", int),
    ("Sampler", "scheduler", str),
    ("CFG scale", "guidance_scale", float),
    ("Seed", "seed", int),
    ("Size", "size", str),
    ("Model hash", "model_hash", str),
    ("Model", "model", str),
)
OTHERS = "Parameters"  # what the family's own are under, as JSON


def quoted(value: Any) -> str:
    """A value as the last line has it."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def infotext(prompt: str, parameters: Mapping[str, Any], *, model: str, digest: str) -> str:
    """The text of one picture.

    Args:
        prompt: of the picture.
        parameters: all of `Pipeline.request`'s; ``scheduler`` by our name.
        model: the artifact's name.
        digest: of its manifest; the first ten digits are shown.
    """
    known = {"width", "height", "negative_prompt", *(key for _, key, _ in KEYS)}
    others = {k: v for k, v in parameters.items() if k not in known and v is not None}
    values = {
        **parameters,
        "scheduler": SAMPLER_NAMES.get(parameters["scheduler"], parameters["scheduler"]),
        "size": f"{parameters['width']}x{parameters['height']}",
        "model_hash": digest[:10],
        "model": model,
    }
    pairs = [f"{name}: {quoted(values[key])}" for name, key, _ in KEYS]
    pairs += [f"{OTHERS}: {json.dumps(json.dumps(others, ensure_ascii=False), ensure_ascii=False)}"] if others else []
    negative = parameters.get("negative_prompt")
    lines = [prompt, *([NEGATIVE + negative] if negative else []), ", ".join([*pairs, "Version: intaglio"])]
    return "\n".join(lines)


def parse(text: str) -> dict[str, Any]:
    """What `infotext` was made of: ``prompt``, ``negative_prompt`` and the parameters; sizes as width and height."""
    *lines, last = text.strip().split("\n")
    found = {m[1].strip(): json.loads(m[2]) if m[2].startswith('"') else m[2].strip() for m in PAIR.finditer(last)}
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE)
    result: dict[str, Any] = {"prompt": "\n".join(lines[:start]), "negative_prompt": negative}
    for name, key, read in KEYS:
        if name in found:
            result[key] = read(found[name])
    names = {shown: ours for ours, shown in SAMPLER_NAMES.items()}
    if "scheduler" in result:
        result["scheduler"] = names.get(result["scheduler"], result["scheduler"])
    if "size" in result:
        width, _, height = result.pop("size").partition("x")
        result["width"], result["height"] = int(width), int(height)
    return {**result, **json.loads(found.get(OTHERS, "{}"))}
