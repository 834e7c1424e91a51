"""The text that webuis write into a PNG under ``parameters``, so that a picture says how it was made.

The form is AUTOMATIC1111's (``modules/infotext_utils.py`` there): the prompt, ``Negative prompt: …``, and a last line
of ``Key: value`` pairs, values with a comma, a colon or a line break in JSON quotes. `parse` is its inverse, `shown`
what webuis show of it, and `png_texts` reads it from a file without a look at the pixels.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

from intaglio.profiles.errors import UsageError

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
# Every part takes what it can and gives nothing back, so that no text takes longer than its length.
PAIR = re.compile(r'\s*+([^:,"\n]++):\s*+("(?:\\.|[^\\"])*+"|[^,]*+)\s*+(?:,|$)')
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
SCHEDULE = "Schedule type"  # since 1.9 webuis say apart from the sampler what its name said before
STOPPED = "Stopped after"  # steps, where a client had enough: the parameters then do not give this picture
OTHERS = "Parameters"  # what the family's own are under, as JSON; prompts, too, that the lines cannot say
SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
MOST_CHARACTERS = 2**18
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_TEXT = 2**20  # bytes of the texts of one file, unpacked
LATIN, UTF = "latin-1", "utf-8"


def number(value: float) -> str:
    """A number in as few digits as give it back."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def quoted(value: Any) -> str:
    """A value as the last line has it."""
    text = number(value) if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def unquoted(text: str) -> str:
    """The inverse; what only looks like JSON stays as it is."""
    if text.startswith('"') and text.endswith('"'):
        try:
            return str(json.loads(text))
        except ValueError:
            pass
    return text.strip()


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
    negative = parameters.get("negative_prompt") or ""
    head = [prompt, *([NEGATIVE + negative] if negative else [])]
    if prompts("\n".join([*head, ""])) != (prompt, negative):
        others |= {"prompt": prompt, "negative_prompt": negative}
    pairs = [f"{name}: {quoted(values[key])}" for name, key, _ in KEYS]
    pairs += [f"{OTHERS}: {json.dumps(json.dumps(others, ensure_ascii=False), ensure_ascii=False)}"] if others else []
    return "\n".join([*head, ", ".join([*pairs, "Version: intaglio"])])


def stopped(text: str, steps: int) -> str:
    """An infotext of a picture whose denoising was ended after `steps` steps."""
    return f"{text}, {STOPPED}: {steps}"


def prompts(text: str) -> tuple[str, str]:
    """The prompt and the negative prompt of the lines before the last one."""
    *lines, _ = text.lstrip().split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE.rstrip())), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE.rstrip()).removeprefix(" ")
    return "\n".join(lines[:start]), negative


def pairs_of(line: str) -> dict[str, str]:
    """The pairs of the last line; what is no pair is passed over."""
    found, place = {}, 0
    while place < len(line):
        if match := PAIR.match(line, place):
            found[match[1].strip()] = unquoted(match[2])
            place = max(match.end(), place + 1)
        else:
            place = line.find(",", place) + 1 or len(line)
    return found


def split(text: str) -> tuple[str, str, dict[str, str], dict[str, Any]]:
    """The prompt, the negative prompt, the pairs, and what is under OTHERS.

    Raises:
        UsageError: it is too long, or has no last line of pairs.
    """
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"the picture's text has {len(text)} characters; allowed: {MOST_CHARACTERS}")
    pairs = pairs_of(text.rstrip().rpartition("\n")[2])
    if "Steps" not in pairs:
        raise UsageError("the picture's text is not what webuis write: its last line has no Steps")
    prompt, negative = prompts(text.rstrip())
    try:
        others = json.loads(pairs.pop(OTHERS, "{}"))
    except (ValueError, RecursionError):
        others = None
    if not isinstance(others, dict):
        raise UsageError(f"the picture's text has {OTHERS} that are no JSON object")
    prompt, negative = others.pop("prompt", prompt), others.pop("negative_prompt", negative)
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise UsageError(f"the picture's text has {OTHERS} with a prompt that is no text")
    try:
        json.dumps([prompt, negative, pairs, others], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UsageError("the picture's text has half of a surrogate pair") from None
    return prompt, negative, pairs, others


def scheduler_of(sampler: str, schedule: str = "") -> str:
    """Our scheduler of a webui's names; the sampler's own name where there is none."""
    names = {shown.lower(): ours for ours, shown in SAMPLER_NAMES.items()}
    plain = "" if schedule.lower() in ("", "automatic") else f" {schedule.lower()}"
    whole = sampler.lower() if sampler.lower().endswith(plain) else f"{sampler.lower()}{plain}"
    return names.get(whole, whole if plain else sampler)


def parse(text: str) -> dict[str, Any]:
    """What `infotext` was made of: ``prompt``, ``negative_prompt`` and the parameters; sizes as width and height.

    Raises:
        UsageError: it is no such text.
    """
    prompt, negative, pairs, others = split(text)
    result: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    for name, key, read in (*KEYS, (STOPPED, "stopped_after_steps", int)):
        if name not in pairs:
            continue
        try:
            result[key] = read(pairs[name])
        except ValueError:
            raise UsageError(f"the picture's text has a {name} that is no number") from None
    if "scheduler" in result:
        result["scheduler"] = scheduler_of(result["scheduler"], pairs.get(SCHEDULE, ""))
    if not math.isfinite(result.get("guidance_scale", 0.0)):
        raise UsageError("the picture's text has a CFG scale that is no finite number")
    if "size" in result:
        size = SIZE.fullmatch(result.pop("size"))
        if size is None:
            raise UsageError("the picture's text has a Size that is not WIDTHxHEIGHT")
        result["width"], result["height"] = int(size[1]), int(size[2])
    return {**result, **others}


def shown(text: str) -> dict[str, str]:
    """The same under the names, and as the strings, that webuis show.

    Raises:
        UsageError: it is no such text.
    """
    prompt, negative, pairs, others = split(text)
    result = {"Prompt": prompt, "Negative prompt": negative, **pairs}
    if size := SIZE.fullmatch(result.get("Size", "")):
        del result["Size"]
        result |= {"Size-1": size[1], "Size-2": size[2]}
    return {**result, **({OTHERS: json.dumps(others, ensure_ascii=False)} if others else {})}


def png_texts(data: bytes) -> dict[str, str]:
    """The texts of a PNG by their keys: chunks ``tEXt``, ``zTXt`` and ``iTXt`` (PNG, third edition, section 11.3.3).

    Nothing of the picture is decoded, and packed texts are unpacked to MOST_TEXT bytes only.

    Raises:
        UsageError: it is no PNG, one that is cut off or damaged, or its texts are too long.
    """
    if not data.startswith(SIGNATURE):
        raise UsageError("the picture is not a PNG")
    found: dict[str, str] = {}
    place, left = len(SIGNATURE), MOST_TEXT
    while True:
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body, checksum = data[place + 8 : place + 8 + length], data[place + 8 + length : place + 12 + length]
        if len(checksum) < 4:
            raise UsageError("the PNG is cut off")
        if kind in READERS:
            if zlib.crc32(kind + body) != int.from_bytes(checksum, "big"):
                raise UsageError("the PNG is damaged: a text's checksum is wrong")
            key, value = READERS[kind](body, left)
            left -= len(key) + len(value)
            if left < 0:
                raise UsageError(f"the PNG has more than {MOST_TEXT} bytes of text")
            found.setdefault(key, value)
        if kind == b"IEND":
            return found
        place += 12 + length


def _plain(body: bytes, most: int) -> tuple[str, str]:
    key, _, value = body.partition(b"\0")
    return key.decode(LATIN), value.decode(LATIN)


def _packed(body: bytes, most: int) -> tuple[str, str]:
    key, _, rest = body.partition(b"\0")
    return key.decode(LATIN), _unpacked(rest[:1], rest[1:], most).decode(LATIN)


def _international(body: bytes, most: int) -> tuple[str, str]:
    key, _, rest = body.partition(b"\0")
    value = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated key
    if rest[:1] == b"\1":
        value = _unpacked(rest[1:2], value, most)
    try:
        return key.decode(LATIN), value.decode(UTF)
    except UnicodeDecodeError:
        raise UsageError("the PNG has a text that is not UTF-8") from None


def _unpacked(method: bytes, data: bytes, most: int) -> bytes:
    if method != b"\0":
        raise UsageError("the PNG has a text packed in an unknown way")
    unpacker = zlib.decompressobj()
    try:
        value = unpacker.decompress(data, max(1, most))
    except zlib.error:
        raise UsageError("the PNG has a text that cannot be unpacked") from None
    if not unpacker.eof:
        raise UsageError(f"the PNG has a text that is cut off, or more than {MOST_TEXT} bytes of it")
    return value


READERS = {b"tEXt": _plain, b"zTXt": _packed, b"iTXt": _international}
