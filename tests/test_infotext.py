"""The text in a PNG: what is written is read back, whatever it is, and hostile files cost nothing."""

from __future__ import annotations

import io
import struct
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.infotext import (
    MOST_CHARACTERS,
    MOST_TEXT,
    SAMPLER_NAMES,
    SIGNATURE,
    infotext,
    parse,
    png_texts,
    shown,
    stopped,
)
from intaglio.runtimes.schedulers import SCHEDULERS

PARAMETERS = {
    "negative_prompt": "blurry, low quality",
    "seed": 2**63 + 1,
    "width": 128,
    "height": 64,
    "num_inference_steps": 20,
    "guidance_scale": 7.123456789,
    "scheduler": "euler_a",
    "clip_skip": 1,
    "prompt_weights": True,
}
SECONDS = 5.0  # of CPU, for two texts of MOST_CHARACTERS; measured 1.1 for the worst of HOSTILE
# The example of AUTOMATIC1111's wiki in the form of version 1.10, where the schedule has a key of its own.
FOREIGN = """a cat, (sitting:1.2)
on a mat
Negative prompt: dog,
bird
Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 12345, Size: 512x768, \
Model hash: abcdef0123, Model: sd-v1-5, Lora hashes: "one: 11, two: 22", Version: v1.10.1"""
HOSTILE = (
    "a",
    " ",
    ",",
    ":",
    '"',
    'a:"',
    'a:"b,',
    'a:"\\",',
    "a:,",
    "\\",
    'a:"\\',
    ", :",
    "\n",
    "Steps: 3,",
    "Steps: 3\n",
)


def written(prompt, negative, **changes):
    parameters = {**PARAMETERS, "negative_prompt": negative, **changes}
    return infotext(prompt, parameters, model='a, "b": c', digest="0123456789abcdef")


@pytest.mark.parametrize("negative", [None, "", "plain", " x ", "Negative prompt: y", "Steps: 3, Sampler: DDIM"])
@pytest.mark.parametrize(
    "prompt",
    [
        "red heart",
        "",
        "  lead",
        "trail\n",
        'a, "b": c',
        "红心\r\n第二行",
        "a\nNegative prompt: b\nc",
        "x\nSteps: 1, Seed: 2",
    ],
)
def test_prompts_of_any_form_come_back(prompt, negative):
    found = parse(written(prompt, negative))
    assert (found["prompt"], found["negative_prompt"]) == (prompt, negative or "")
    assert {name: found[name] for name in PARAMETERS if name != "negative_prompt"} == {
        name: value for name, value in PARAMETERS.items() if name != "negative_prompt"
    }
    assert (found["model"], found["model_hash"]) == ('a, "b": c', "0123456789")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), negative=st.text(max_size=60), scale=st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_any_number_come_back(text, negative, scale):
    found = parse(written(text, negative, guidance_scale=scale))
    assert (found["prompt"], found["negative_prompt"], found["guidance_scale"]) == (text, negative, scale)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_a_name_that_comes_back(name):
    assert parse(written("x", None, scheduler=name))["scheduler"] == name
    assert SAMPLER_NAMES[name] in written("x", None, scheduler=name)


def test_a_plain_text_is_as_webuis_write_it():
    text = infotext("red heart", {**PARAMETERS, "clip_skip": None, "prompt_weights": None}, model="m", digest="f" * 64)
    assert text == (
        "red heart\nNegative prompt: blurry, low quality\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.123456789, Seed: 9223372036854775809, Size: 128x64, "
        "Model hash: ffffffffff, Model: m, Version: intaglio"
    )


def test_a_text_of_another_program_is_read():
    found = parse(FOREIGN)
    assert found["prompt"] == "a cat, (sitting:1.2)\non a mat"
    assert found["negative_prompt"] == "dog,\nbird"
    assert found["scheduler"] == "dpmpp_2m_karras"
    assert (found["width"], found["height"], found["num_inference_steps"]) == (512, 768, 30)
    assert (found["guidance_scale"], found["seed"]) == (5.5, 12345)
    seen = shown(FOREIGN)
    assert seen["Lora hashes"] == "one: 11, two: 22"
    assert (seen["Size-1"], seen["Size-2"], seen["Schedule type"]) == ("512", "768", "Karras")
    assert parse(FOREIGN.replace("DPM++ 2M", "Heun++").replace("Karras", "Automatic"))["scheduler"] == "Heun++"


def test_a_picture_that_was_stopped_says_so():
    text = stopped(written("x", None), 7)
    assert parse(text)["stopped_after_steps"] == 7
    assert parse(text)["num_inference_steps"] == 20
    assert "stopped_after_steps" not in parse(written("x", None))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no Steps"),
        ("a cat", "no Steps"),
        ("a\nSteps: many", "Steps"),
        ("a\nSteps: 3, Seed: 0x3", "Seed"),
        ("a\nSteps: " + "9" * 5000, "Steps"),
        ("a\nSteps: 3, CFG scale: nan", "CFG scale"),
        ("a\nSteps: 3, Size: 3", "Size"),
        ("a\nSteps: 3, Size: 9999999x9999999", "Size"),
        ("a\nSteps: 3, Parameters: x", "Parameters"),
        ('a\nSteps: 3, Parameters: "[1]"', "Parameters"),
        ('a\nSteps: 3, Parameters: "{\\"prompt\\": 3}"', "prompt"),
        ('a\nSteps: 3, Parameters: "' + "[" * 100_000 + '"', "Parameters"),
        ('a\nSteps: 3, Model: "\\ud800"', "surrogate"),
        ("a" * MOST_CHARACTERS + "\nSteps: 3", str(MOST_CHARACTERS)),
    ],
)
def test_what_is_no_such_text_is_refused_by_name(text, word):
    with pytest.raises(UsageError, match=word):
        parse(text)


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_take_no_time(piece):
    text = "x\nSteps: 3, " + piece * ((MOST_CHARACTERS - 20) // len(piece))
    start = time.process_time()
    for one in (text, text.removeprefix("x\nSteps: 3, ")):
        try:
            parse(one)
        except UsageError:
            continue
    assert time.process_time() - start < SECONDS


def png(texts=(), pixels=(3, 2)):
    info, target = PngInfo(), io.BytesIO()
    for call, key, value, *packed in texts:
        getattr(info, call)(key, value, **({"zip": True} if packed else {}))
    Image.new("RGB", pixels).save(target, "PNG", pnginfo=info)
    return target.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_texts_of_every_kind_are_read_as_pillow_reads_them():
    data = png([
        ("add_text", "plain", "caf\xe9"), ("add_text", "packed", "x" * 5000, True), ("add_itxt", "world", "红心\n二"),
        ("add_itxt", "small", "心" * 3000, True), ("add_text", "empty", ""),
    ])  # fmt: skip
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert png_texts(data) == image.text
    assert png_texts(data)["world"] == "红心\n二"
    assert png_texts(png()) == {}


def test_texts_are_read_without_a_look_at_the_pixels():
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    bomb = SIGNATURE + chunk(b"IHDR", header) + chunk(b"tEXt", b"parameters\0x") + chunk(b"IEND", b"")
    assert png_texts(bomb) == {"parameters": "x"}


def test_a_packed_text_is_not_unpacked_beyond_the_limit():
    bomb = zlib.compress(b"x" * (200 * MOST_TEXT), 9)
    for kind, body in ((b"zTXt", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb)):
        with pytest.raises(UsageError, match=str(MOST_TEXT)):
            png_texts(SIGNATURE + chunk(kind, body) + chunk(b"IEND", b""))
    many = b"".join(chunk(b"zTXt", b"%d\0\0" % k + zlib.compress(b"y" * (MOST_TEXT // 4))) for k in range(6))
    with pytest.raises(UsageError, match=str(MOST_TEXT)):
        png_texts(SIGNATURE + many + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "not a PNG"),
        (b"\xff\xd8\xff", "not a PNG"),
        (SIGNATURE, "cut off"),
        (png()[:-5], "cut off"),
        (SIGNATURE + struct.pack(">I", 2**32 - 1) + b"tEXt", "cut off"),
        (png([("add_text", "key", "value")]).replace(b"value", b"other"), "checksum"),
        (SIGNATURE + chunk(b"zTXt", b"k\0\1x"), "unknown way"),
        (SIGNATURE + chunk(b"zTXt", b"k\0\0xx"), "cannot be unpacked"),
        (SIGNATURE + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 99)[:-6]), "cut off"),
        (SIGNATURE + chunk(b"iTXt", b"k\0\0\0\0\0\xff"), "UTF-8"),
    ],
)
def test_what_is_no_sound_png_is_refused(data, word):
    with pytest.raises(UsageError, match=word):
        png_texts(data)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(8, 200), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(place, value):
    data = bytearray(png([("add_text", "a", "b"), ("add_itxt", "c", "d", True), ("add_text", "e", "f" * 50, True)]))
    data[min(place, len(data) - 1)] = value
    try:
        found = png_texts(bytes(data))
    except UsageError:
        return
    assert set(found.items()) <= {("a", "b"), ("c", "d"), ("e", "f" * 50)}
