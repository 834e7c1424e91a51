"""The page of the server, as a person has it: in a browser, with the keyboard, on a phone, in two languages."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import random
import re
import types
import urllib.error
import urllib.parse
import urllib.request

import devtools
import numpy as np
import pytest
from serving import serving
from test_report_page import MARK_CONTRAST, TEXT_CONTRAST, luminance

from intaglio.bench import report_style
from intaglio.runtimes import serve_page
from intaglio.runtimes.serve_queue import PRIORITIES, FairQueue

KEY = "a-key-of-24-characters-x"
FLAGS = ("--backend", "openvino", "--threads", "1", "--concurrency", "1", "--limit", "steps=900")
SOON = 20  # seconds that are enough for an answer, and too few for LONG steps of 256x256
LONG = 900  # steps of a request that does not end by itself within a test
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> 红心"
STATUS = "document.getElementById('status').textContent"
ERROR = "document.getElementById('error').textContent"
WATCH = """
window.shares = [], window.said = [], window.seen = new Set();
new MutationObserver(() => {
  const bar = document.getElementById("progress"), preview = document.querySelector(".plate:not(.final) img[src]");
  if (bar.hasAttribute("value")) shares.push(bar.value);
  if (preview) seen.add(preview.src);
  said.push(document.getElementById("spoken").textContent);
}).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
document.getElementById("prompt").focus();
"""
PIXELS = """
(image => {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
  canvas.drawImage(image, 0, 0);
  return [...canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data];
})(document.querySelector(".final img"))
"""
CUT_OFF = "of 25 words the sixteen tokens of this encoder hold less than a half, which the picture says " * 2

needs_chromium = pytest.mark.skipif(
    devtools.find() is None, reason="no Chromium is installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def server(tiny_artifact, tiny_artifact_int8, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"somebody:{KEY}\n")
    artifacts = [f"tiny={tiny_artifact.folder}", f"small={tiny_artifact_int8.folder}"]
    with serving(*artifacts, flags=(*FLAGS, "--api-key-file", keys)) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = devtools.Tab(tmp_path_factory.mktemp("profile"), login=("anybody", KEY))
    yield tab
    tab.close()


@pytest.fixture
def tab(server, browser):
    """The page as somebody sees it who never was there; at the end it has complained about nothing."""
    browser.look((1280, 900))
    browser.open(server.url)
    browser.send("Storage.clearDataForOrigin", origin=server.url, storageTypes="all")
    browser.open(server.url)
    browser.requests.clear()
    browser.complaints.clear()
    yield browser
    assert not browser.complaints


def pictures(count):
    return f"document.querySelectorAll('#pictures li').length === {count}"


def value(field):
    return f"document.getElementById('{field}').value"


def write(tab, **fields):
    for field, text in fields.items():
        tab.type(field, str(text))


def make(tab, count=1, **fields):
    """Fill in the form, press Ctrl+Enter, and wait until the gallery has `count` pictures."""
    write(tab, **fields)
    tab.press("Enter", ctrl=True)
    tab.wait(f"{pictures(count)} && !document.title.includes('·')")


JSON = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


def ask(server, path="/", body=None, headers=JSON):
    """Status, headers and bytes of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SOON) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def told(data):
    return [json.loads(line[6:]) for line in data.decode().split("\n") if line.startswith("data: ")]


class Busy:
    """Somebody else's request, which has the only place of the first model until it is let go."""

    def __init__(self, server):
        self.connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
        body = {"prompt": "a", "num_inference_steps": LONG, "width": 128, "height": 128}
        self.connection.request("POST", "/ui/pictures", json.dumps(body), JSON)
        self.answer = self.connection.getresponse()
        while b'"step"' not in (line := self.answer.readline()):
            assert line, "it was refused"

    def let_go(self):
        self.answer.close()
        self.connection.close()


# The routes.


def test_the_events_say_how_it_goes_and_the_picture_is_the_one_of_the_documented_route(server):
    wanted = {"prompt": "red heart", "num_inference_steps": 4, "guidance_scale": 2.0}
    status, headers, data = ask(server, "/ui/pictures", {**wanted, "seed": str(2**63), "n": 2, "previews": 2})
    assert (status, headers["Content-Type"].split(";")[0], headers["Cache-Control"]) == (
        200, "text/event-stream", "no-store",
    )  # fmt: skip
    found = told(data)
    assert found[0] == {"type": "taken", "n": 2, "width": 64, "height": 64}
    assert {e["state"] for e in found if e["type"] == "standing"} <= {"waiting", "beginning"}
    steps = [(e["picture"], e["index"], e["total"]) for e in found if e["type"] == "step"]
    assert steps == [(picture, index, 4) for picture in range(2) for index in range(4)]
    shares = [e["progress"] for e in found if e["type"] == "step"]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [e["picture"] for e in found if e["type"] == "preview"] == [0, 0]
    made = [e for e in found if e["type"] == "picture"]
    assert [e["seed"] for e in made] == [str(2**63), str(2**63 + 1)], "exact, beyond float64"
    body = {**wanted, "seed": 2**63, "n": 2}
    same = json.loads(ask(server, "/v1/images/generations", body)[2])["data"]
    assert [e["data"] for e in made] == [e["b64_json"] for e in same], "the same bytes"


def test_without_the_key_there_is_nothing(server):
    for path, body in {"/ui/models": None, "/ui/pictures": {"prompt": "a"}, "/": None}.items():
        status, headers, data = ask(server, path, body, {"Content-Type": "application/json"})
        assert status == 401
        assert headers["WWW-Authenticate"].startswith("Basic "), "so that a browser asks for it"
        assert path == "/" or set(json.loads(data)["error"]) == {"message", "code", "param", "request_id"}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "x", "colour": "red"}, 400, "colour"),
        ({"prompt": 1}, 400, "prompt"),
        ({"prompt": "x", "seed": 1}, 400, "seed"),
        ({"prompt": "x", "seed": "-1"}, 400, "seed"),
        ({"prompt": "x", "previews": serve_page.MOST_PREVIEWS + 1}, 400, "previews"),
        ({"prompt": "x", "num_inference_steps": LONG + 1}, 400, "num_inference_steps"),
        ({"prompt": "x", "model": "<b>"}, 404, "model"),
        ({"prompt": "x", "width": 65}, 400, None),
    ],
)
def test_what_is_wrong_is_refused_by_name(server, body, status, param):
    code, _, data = ask(server, "/ui/pictures", body)
    error = json.loads(data)["error"]
    assert (code, error["param"]) == (status, param)
    assert error["request_id"]
    assert "\n" not in error["message"]


def test_the_facts_are_those_of_the_documented_route(server):
    found = json.loads(ask(server, "/ui/models")[2])
    listed = json.loads(ask(server, "/v1/models")[2])["data"]
    assert [m["name"] for m in found["models"]] == [m["id"] for m in listed] == ["tiny", "small"]
    for ours, theirs in zip(found["models"], listed, strict=True):
        assert theirs["intaglio"].items() <= ours.items()
    assert found["limits"]["steps"] == LONG
    tiny = found["models"][0]
    assert tiny["sizes"]["width"] == {"min": 64, "default": 64, "max": 1024, "multiple": 8}
    for one in tiny["schedulers"]:
        body = {"prompt": "x", "num_inference_steps": 2, "scheduler": one["name"]}
        assert [e["scheduler"] for e in told(ask(server, "/ui/pictures", body)[2]) if e["type"] == "picture"] == [
            one["name"]
        ]


def test_the_policy_allows_these_bytes_alone(server):
    status, headers, data = ask(server)
    html, policy = data.decode(), headers["Content-Security-Policy"]
    assert status == 200
    assert headers.get_all("Content-Security-Policy") == [policy], "one, not the guard's as well"
    for tag in ("style", "script"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|innerHTML|\bon\w+=", html)
    assert not re.search(r'<[^>]+ style="', html)


def test_who_is_ahead_is_who_the_queue_serves_first():
    draw = random.Random(0)
    for _ in range(200):
        queue = FairQueue(99)
        for number in range(draw.randrange(1, 12)):
            facts = {"client": draw.choice("xyz"), "priority": draw.choice(list(PRIORITIES.values()))}
            queue.put(types.SimpleNamespace(number=number, model=draw.choice("ab"), **facts))
        hub, jobs = types.SimpleNamespace(queue=queue), list(queue)
        for model in "ab":  # what waits for another model never begins before
            places = {job.number: serve_page.ahead(hub, job) for job in jobs if job.model == model}
            served = [queue.pop(lambda job, model=model: job.model == model).number for _ in places]
            assert [places[number] for number in served] == list(range(len(served)))
    assert len(queue) == 0


# The words and the colours.


def test_both_languages_have_every_phrase_with_the_same_blanks():
    text = (serve_page.HERE / "serve_page_words.js").read_text(encoding="utf-8")
    tables = re.findall(r"^  (en|zh): \{\n(.*?)^  \},", text, re.DOTALL | re.MULTILINE)
    found = {name: dict(re.findall(r'^    (\w+): "(.*)",$', body, re.MULTILINE)) for name, body in tables}
    assert found["en"].keys() == found["zh"].keys()
    for key, phrase in found["en"].items():
        assert set(re.findall(r"\{\w+\}", phrase)) == set(re.findall(r"\{\w+\}", found["zh"][key])), key
    html, _ = serve_page.document()
    scripts = "".join((serve_page.HERE / name).read_text(encoding="utf-8") for name in serve_page.SCRIPTS)
    used = set(re.findall(r'data-(?:say|hint|label)="(\w+)"', html)) | set(re.findall(r'\bsay\("(\w+)"', scripts))
    assert used <= found["en"].keys()


def root_colours(style):
    blocks = re.findall(r":root\{([^}]*)\}", style)
    return [dict(re.findall(r"--([\w-]+):(#[0-9a-f]+)", body)) for body in blocks]


def test_colours_are_the_reports_and_can_be_read():
    style = (serve_page.HERE / serve_page.STYLE).read_text(encoding="utf-8")
    light, dark = root_colours(style)
    assert [light, dark] == root_colours(report_style.STYLE)
    for theme in (light, {**light, **dark}):
        for name in theme.keys() - {"page", "card", "line"}:
            wanted = TEXT_CONTRAST if name in ("ink", "soft", "bad") else MARK_CONTRAST
            for ground in ("page", "card"):
                a, b = sorted((luminance(theme[name]), luminance(theme[ground])))
                assert (b + 0.05) / (a + 0.05) >= wanted, (name, ground)


# In a browser.


@needs_chromium
def test_from_the_prompt_to_the_picture_by_keyboard(server, tab):
    tab.run(WATCH)
    tab.send("Input.insertText", text="red heart")
    make(tab, seed=7, num_inference_steps=40)
    shares = tab.run("shares")
    assert len({share for share in shares if 0 < share < 1}) >= 5, "the bar moves"
    assert tab.run("seen.size") == 4, "the previews of 'a few'"
    said = [text for text in tab.run("said") if text]
    assert any(re.fullmatch(r"\d+ %", text) for text in said)
    assert len(set(said)) < 12, "a screen reader is not told of every step"
    assert re.fullmatch(r"Done in \d+\.\d s\.", said[-1])
    expected = {"prompt": "red heart", "seed": 7, "num_inference_steps": 40}
    data = json.loads(ask(server, "/v1/images/generations", expected)[2])["data"][0]["b64_json"]
    shown = tab.run(PIXELS)
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert np.array_equal(np.asarray(image.convert("RGBA")).ravel(), shown), "every pixel"
    origin = urllib.parse.urlsplit(server.url).netloc
    asked = {urllib.parse.urlsplit(url.removeprefix("blob:")).netloc for url in tab.requests if url[:5] != "data:"}
    assert asked == {origin}


@needs_chromium
def test_escape_gives_the_place_back(server, tab):
    write(tab, prompt="a", num_inference_steps=LONG, width=256, height=256)
    tab.press("Enter", ctrl=True)
    tab.wait("document.getElementById('progress').value > 0")
    tab.press("Enter", ctrl=True)
    assert "Esc" in tab.run("document.getElementById('spoken').textContent"), "one at a time, and it says so"
    tab.press("Escape")
    tab.wait(f"{STATUS} === 'Cancelled.'")
    assert tab.run("document.getElementById('cancel').hidden")
    assert tab.run("document.title") == "Intaglio"
    shown = told(ask(server, "/ui/pictures", {"prompt": "a", "num_inference_steps": 2})[2])
    assert shown[-1]["type"] == "picture", "the only place is free"
    assert tab.run(pictures(0))
    assert tab.run(ERROR) == ""


@needs_chromium
def test_who_waits_sees_how_many_are_ahead_and_may_leave(server, tab):
    busy, second = Busy(server), None
    try:
        write(tab, prompt="a", num_inference_steps=2)
        tab.press("Enter", ctrl=True)
        tab.wait(f"{STATUS} === 'Next in line …'")
        assert tab.run("!document.getElementById('progress').hasAttribute('value')"), "no share is known"
        tab.press("Escape")
        tab.wait(f"{STATUS} === 'Cancelled.'")
        second = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
        body = json.dumps({"prompt": "a", "num_inference_steps": 2, "n": 3})
        second.request("POST", "/ui/pictures", body, JSON)
        waiting = second.getresponse()
        tab.press("Enter", ctrl=True)
        tab.wait(f"/^Waiting: [1-3] ahead/.test({STATUS})")
        busy.let_go()
        tab.wait(pictures(1))
        assert sum(e["type"] == "picture" for e in told(waiting.read())) == 3
    finally:
        busy.let_go()
        if second is not None:
            second.close()


@needs_chromium
def test_the_gallery_restores_parameters_downloads_deletes_and_lasts(server, tab):
    asked = {"prompt": HOSTILE, "negative_prompt": "blue", "width": 72, "num_inference_steps": 3, "seed": 2**64 - 1}
    tab.run("const list = document.getElementById('scheduler'); list.value = 'euler';"
            "list.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
    make(tab, **asked)
    make(tab, count=3, prompt="b", negative_prompt="", width=64, seed=1, n=2)
    assert tab.run("[...document.querySelectorAll('#pictures .facts')].map(e => e.textContent)") == [
        "2", "1", str(2**64 - 1),
    ]  # fmt: skip
    tab.open(server.url)  # another day
    assert tab.run(value("prompt")) == "b"
    assert tab.run(value("n")) == "2"
    tab.click("#pictures li:nth-child(3) .thumb")
    restored = {**asked, "height": 64, "guidance_scale": 7.5, "scheduler": "euler", "model": "tiny", "n": ""}
    for field, wanted in restored.items():
        assert tab.run(value(field)) == str(wanted), field
    assert tab.run("document.querySelectorAll('.plate.final').length") == 1
    assert tab.run("document.querySelectorAll('img:not(.frame img, .thumb img), script').length") == 1
    assert tab.run("document.title") == "Intaglio", "a prompt is text"
    link = "document.querySelector('#pictures li:nth-child(3) .download')"
    assert tab.run(f"{link}.download") == f"tiny-{2**64 - 1}.png"
    kept = base64.b64decode(tab.run(
        "new Promise(r => { const q = indexedDB.open('intaglio'); q.onsuccess = () => { const g ="
        " q.result.transaction('pictures').objectStore('pictures').getAll(); g.onsuccess = () => { const f ="
        " new FileReader(); f.onload = () => r(f.result.split(',')[1]); f.readAsDataURL(g.result[0].blob); } } })"
    ))  # fmt: skip
    assert HOSTILE.encode() in kept, "the file says how it was made"
    tab.click("#pictures li:nth-child(1) .delete")
    tab.wait(pictures(2))
    tab.click("#undo")
    tab.wait(pictures(3))
    tab.click("#delete-all")
    tab.wait("document.querySelectorAll('#pictures li').length === 0")
    tab.open(server.url)
    assert tab.run("document.getElementById('gallery').hidden")


@needs_chromium
def test_what_the_model_warns_of_is_shown(tab):
    make(tab, prompt=CUT_OFF, num_inference_steps=2)
    assert "cut off" in tab.run("document.querySelector('.plate .warning').innerText")


@needs_chromium
def test_errors_are_one_line_at_their_field_in_both_languages(tab):
    write(tab, width=65)
    tab.press("Enter", ctrl=True)
    assert tab.run(ERROR) == "Write a prompt first."
    write(tab, prompt="a")
    tab.press("Enter", ctrl=True)
    assert tab.run(ERROR) == "Width: 64 to 1024 in steps of 8."
    assert tab.run("document.activeElement.id") == "width"
    assert tab.run("document.getElementById('width').getAttribute('aria-invalid')") == "true"
    tab.click("#language")
    write(tab, width=64, seed="9" * 20)
    tab.press("Enter", ctrl=True)
    tab.wait(f"{ERROR}.startsWith('请求有误：seed: 9')")
    assert tab.run("document.getElementById('error').getClientRects().length") == 1
    assert tab.complaints == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]
    tab.complaints.clear()  # which is the browser's own note


@needs_chromium
def test_the_language_is_the_persons_and_can_be_changed(server, tab):
    assert tab.run("document.documentElement.lang") == "en"
    tab.click("#language")
    assert tab.run("document.documentElement.lang") == "zh-Hans"
    assert tab.run("document.getElementById('make').innerText").startswith("生成")
    bare = "[...document.querySelectorAll('button, input, select, textarea, a[href]')].filter(e => e.offsetParent &&"
    bare += " !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    assert tab.run(bare) == [], "without a name"
    tab.open(server.url)
    assert tab.run("document.documentElement.lang") == "zh-Hans", "kept"
    tab.run("localStorage.clear()")
    tab.send("Emulation.setUserAgentOverride", userAgent="test", acceptLanguage="zh-CN")
    tab.open(server.url)
    assert tab.run("document.documentElement.lang") == "zh-Hans", "the browser's"
    tab.send("Emulation.setUserAgentOverride", userAgent="test", acceptLanguage="en-US")


@needs_chromium
def test_the_model_is_chosen_and_its_backend_and_formats_are_shown(tab):
    served = "document.getElementById('served').textContent"
    assert tab.run(served) == "tiny · openvino on cpu · weights unquantized"
    tab.run("const list = document.getElementById('model'); list.value = 'small';"
            "list.dispatchEvent(new Event('input', {bubbles: true}));"
            "list.dispatchEvent(new Event('change', {bubbles: true}))")  # fmt: skip
    assert tab.run(served) == "small · openvino on cpu · weights int8"
    make(tab, prompt="a", num_inference_steps=2)
    assert tab.run("document.querySelector('#pictures .download').download").startswith("small-")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_every_control_shows_its_focus(server, tab, dark):
    tab.look((360, 740), dark=dark)
    make(tab, prompt="nowhereabreak" * 12, num_inference_steps=2, seed=2**64 - 2, n=2, count=2)
    assert tab.run("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    outside = "[...document.querySelectorAll('body *')].filter(e => e.offsetParent && !e.closest('.unseen') &&"
    outside += " e.getBoundingClientRect().right > 361).map(e => e.className || e.id || e.tagName)"
    assert tab.run(outside) == []
    small = "[...document.querySelectorAll('button, input, select')].filter(e => e.offsetParent &&"
    small += " e.getBoundingClientRect().height < 38).map(e => e.outerHTML)"
    assert tab.run(small) == [], "too small for a finger"
    seen = set()
    tab.open(server.url)
    for _ in range(30):
        tab.press("Tab")
        focused = "(e => [e.id || e.className, getComputedStyle(e).outlineStyle, e === document.body])"
        name, outline, body = tab.run(f"{focused}(document.activeElement)")
        if body:
            break
        assert outline == "solid", name
        seen.add(name)
    fields = {"model", "prompt", "negative_prompt", "width", "height", "num_inference_steps", "seed", "n", "scheduler"}
    assert seen >= fields | {"language", "make", "previews", "thumb", "icon download", "icon delete"}


@needs_chromium
def test_a_key_in_the_address_does_as_well(server, tab):
    tab.open(server.url.replace("//", f"//anybody:{KEY}@"))  # `fetch` takes no such address
    make(tab, prompt="a", num_inference_steps=2)
