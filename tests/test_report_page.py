"""The page of a report: whole, the same every time, and right about what is missing."""

import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import report_cases

from intaglio.bench import report_files, report_plots, report_style, report_svg
from intaglio.bench.report_html import page
from intaglio.bench.report_pictures import WORST

SECTIONS = ("summary", "pareto", "seconds", "memory", "drift", "grid", "pictures", "scores", "exceeded", "method")
HOSTILE = "<img src=x onerror=alert(1)>\"'&</title></style><script>alert(2)</script> 红心"
VOID = {"meta", "input", "br", "wbr"}
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0  # WCAG 2.2, 1.4.3 and 1.4.11


class Page(HTMLParser):
    """Elements of a page with their attributes, the text of each, and whether every one is closed."""

    def __init__(self, html):
        super().__init__()
        self.html, self.stack, self.found, self.texts = html, [], [], []
        self.feed(html)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.texts.append(data)

    def of(self, tag, kind=""):
        return [a for t, a in self.found if t == tag and (not kind or kind in (a.get("class") or "").split())]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def part(html, name):
    """The HTML of one section."""
    return re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)[0]


@pytest.fixture(scope="module")
def thorough(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thorough")
    result = report_cases.thorough(folder)
    return folder, result, page(result, folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    result = report_cases.quick(folder)
    return folder, result, page(result, folder)


@pytest.fixture
def changed(thorough):
    """A copy of the thorough report, and how to make its page."""
    folder, result, _ = thorough
    return copy.deepcopy(result), lambda found: page(found, folder)


def test_the_reports_are_as_the_schema_has_them(thorough, quick):
    pytest.importorskip("jsonschema")
    for _, result, _ in (thorough, quick):
        report_files.check_schema(json.loads(json.dumps(result)))


def test_the_page_needs_nothing_else(thorough, quick):
    for _, _, html in (thorough, quick):
        assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
        for tag, attributes in Page(html).found:
            for name in ("src", "href", "srcset", "action", "poster"):
                value = attributes.get(name)
                assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)


def test_every_element_is_closed_and_every_reference_leads_to_one_picture(thorough, quick):
    for _, result, html in (thorough, quick):
        found = Page(html)
        names = [a["id"] for _, a in found.found if "id" in a]
        assert len(names) == len(set(names))
        used = {a["href"][1:] for a in found.of("use")}
        kept = {a["id"] for a in found.of("image")}
        assert used == kept
        shown = [p for c in result["cases"] for p in c.get("prompts", ())]
        assert len(kept) == len(shown) + len([p for p in shown if "heat" in p])


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_page_is_the_same_bytes_in_another_process(thorough, seed):
    folder, result, html = thorough
    (folder / "report.json").write_text(json.dumps(result), encoding="utf-8")
    code = "import json, sys; from pathlib import Path; from intaglio.bench.report_html import page\n"
    code += "folder = Path(sys.argv[1]); found = json.loads((folder / 'report.json').read_text(encoding='utf-8'))\n"
    code += "sys.stdout.buffer.write(page(found, folder).encode())"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    made = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, check=True, env=environment)
    assert made.stdout.decode() == html


def test_hostile_texts_stay_texts(tmp_path):
    result = report_cases.thorough(tmp_path, prompts=(HOSTILE, "b"))
    for row in result["cases"]:
        row["artifact"] = row["label"] = row["label"].replace("int8", HOSTILE)
        row["error"] = HOSTILE if row["error"] else ""
    result["groups"][0]["labels"] = [c["label"] for c in result["cases"]]
    result["groups"][0]["noise_floor"][0]["what"] = HOSTILE
    result["cases"][1]["verdict"] = {"passed": False, "exceeded": [HOSTILE]}
    result["cases"][1]["components_reason"], result["cases"][1]["components"] = HOSTILE, None
    result["command"] = f"intaglio bench {HOSTILE}"
    html = page(result, tmp_path)
    found = Page(html)
    assert len(found.of("script")) == 1
    assert not found.of("img")
    assert not [a for _, a in found.found if any(name.startswith("on") for name in a)]
    assert HOSTILE in "".join(found.texts)
    assert [t for t, _ in found.found[:6]] == ["html", "head", "meta", "meta", "title", "style"]


def test_a_thorough_report_has_every_section_in_order(thorough):
    _, result, html = thorough
    found = Page(html)
    names = [a["id"] for a in found.of("section")]
    assert names == [n for n in (*SECTIONS, "environment") if n != "grid"]
    for said in (result["command"], result["created"], "digest-of-none", "digest-of-int8", "load average 0.1 before"):
        assert said in found.text
    assert part(html, "pareto").count('<svg class="plot') == 2, "for a wide and a narrow window"
    assert part(html, "memory").count("class=area") == 2 * 6
    assert "98.7 %" in part(html, "seconds")
    assert part(html, "drift").count('class="dashed floor-line"') == 2 * 2
    assert "noise floor, float64" in part(html, "scores")
    assert "built, not run: no NVIDIA GPU" in part(html, "summary")


def test_a_quick_report_says_what_was_not_measured(quick):
    _, _, html = quick
    found = Page(html)
    assert [a["id"] for a in found.of("section")] == [*SECTIONS, "environment"]
    assert "was not measured" in part(html, "memory")
    assert "<polygon" not in html
    assert "All cases: not measured" in part(html, "drift")
    assert "The noise floor was not measured" in part(html, "scores")
    for name in ("pareto", "drift"):
        assert part(html, name).count('<svg class="plot') == 6
        assert "the first 6 of 9 groups" in part(html, name)
        assert "steps 20, scheduler dpmpp_2m" in part(html, name)


def test_every_picture_has_words_and_every_slider_a_name(thorough, quick):
    for _, _, html in (thorough, quick):
        found = Page(html)
        images = [a for a in found.of("svg") if a.get("role") == "img"]
        assert all(a["aria-label"] for a in images)
        sliders = [a for a in found.of("input") if a["type"] == "range" and a.get("id") != "all"]
        assert sliders
        assert all("red heart" in a["aria-label"] or "红心" in a["aria-label"] for a in sliders)
        unnamed = [a for a in found.of("svg") if a.get("role") != "img" and a.get("id") != "store"]
        assert len(unnamed) <= 8, "only the marks of the keys, with their words beside them"


def test_the_grid_has_every_cell(quick):
    folder, result, html = quick
    sheets = re.findall(r"<h3>([^<]*)</h3>(.*?)</table>", part(html, "grid"), re.DOTALL)
    assert [heading for heading, _ in sheets] == ["artifact none, “red heart”", "artifact int4, “red heart”"]
    for _, body in sheets:
        assert body.count("<td>") == body.count("<svg") == 9
        heads = re.findall(r"<th scope=(col|row)><small>(\w+)</small> (\w+)</th>", body)
        assert [h[1:] for h in heads if h[0] == "col"] == [("steps", s) for s in ("4", "8", "20")]
        assert [h[1:] for h in heads if h[0] == "row"] == [("scheduler", s) for s in ("euler", "unipc", "dpmpp_2m")]
    assert sheets[0][1].count("reference") == 9
    cells = re.findall(r"<span>([^<]*)</span>", sheets[1][1])
    assert cells[:3] == ["0.0800 s · 33.4 dB", "0.160 s · 33.8 dB", "0.400 s · 35.0 dB"]
    less = copy.deepcopy(result)
    gone = less["cases"].pop()["label"]
    less["groups"][-1]["labels"].remove(gone)
    less["cases"][1].update(status="error", error="run: it fell over", image_s=None, prompts=[])
    text = part(page(less, folder), "grid")
    assert text.count("excluded") == 1
    assert "run: it fell over" in text
    assert text.count("<td>") == 18


@pytest.mark.parametrize("axes", [("steps",), ("steps", "artifact")])
def test_a_smaller_grid_shows_the_axes_it_leaves_out(quick, axes):
    folder, result, _ = quick
    text = part(page({**result, "grid": list(axes)}, folder), "grid")
    assert text.count("<svg") == len(result["cases"])
    assert text.count("dpmpp_2m") >= 6


def test_missing_values_leave_the_rest_standing(changed):
    result, make = changed
    rows = {c["label"]: c for c in result["cases"]}
    rows["none/onnxruntime"].update(worst=None, drift=[], fidelity_reason="other sizes", same_backend=None)
    for shown in rows["none/onnxruntime"]["prompts"]:
        for key in ("identical", "psnr", "ssim", "ms_ssim", "ssimulacra2", "flip", "latents_relative_l2", "heat"):
            shown.pop(key)
    rows["none/openvino"].update(speedup=None, stage_s={}, stages_of_whole=None, memory=None, load_s=None)
    rows["int8/torch"].update(status="error", error="load: broken", image_s=None, prompts=[], worst=None, speedup=None)
    rows["int8/torch"].pop("verdict")
    rows["int8/onnxruntime"]["drift"] = [None] * 4
    for row in result["cases"]:
        row["artifact_bytes"] = 0  # a foreign pipeline's
    rows["int8/openvino"]["memory"].update(peak_bytes=None, reason="the kernel refuses", marks={})
    result["groups"][0]["noise_floor"][0] = {"what": "float64", "worst": None, "drift": [], "reason": "no torch"}
    result["load_average"] = {"start": None, "end": None}
    result["available_bytes_while_measuring"] = None
    text = Page(make(result)).text
    for said in ("other sizes", "not comparable", "load: broken", "the kernel refuses", "no torch"):
        assert said in text
    assert "NaN or infinity at some step: int8/onnxruntime" in text
    assert not re.search(r"\b(None|nan|inf)\b", text)


def test_identical_pictures_everywhere_need_no_plot(changed):
    result, make = changed
    for row in result["cases"][:6]:
        row["worst"] = report_cases.figures(None)
        row["drift"] = [0.0] * 4
        row["prompts"] = [p | report_cases.figures(None) for p in row["prompts"]]
    result["groups"][0]["noise_floor"] = []
    html = make(result)
    assert "nothing to plot" in part(html, "pareto")
    assert "The same latents at every step: none/onnxruntime" in part(html, "drift")
    assert "No picture differs" in part(html, "pictures")


def test_nothing_measured_still_makes_a_page(changed):
    result, make = changed
    for row in result["cases"]:
        row.update(status="error", error="load: broken", image_s=None, prompts=[], worst=None)
    text = Page(make(result)).text
    assert text.count("load: broken") == len(result["cases"])
    assert "No case was measured" in text


def test_what_exceeds_its_limit_stands_out_with_the_limit(changed):
    result, make = changed
    row = result["cases"][4]
    row["components"][2]["relative_l2"] = 0.0174
    said = "unet at step 3 differs by 1.74e-02, allowed 0.01"
    row["verdict"] = {"passed": False, "exceeded": [said, "psnr 46.9, allowed 50 or more"]}
    html = make(result)
    assert re.findall("<span class=bad>([^<]*)</span>", part(html, "drift")) == ["0.0174 &gt; 0.01"]
    assert "<span class=bad>2 exceeded</span>" in part(html, "summary")
    assert re.findall("<li class=bad>([^<]*)</li>", part(html, "exceeded")) == [
        f"int8/onnxruntime: {said}",
        "int8/onnxruntime: psnr 46.9, allowed 50 or more",
    ]


def test_learned_scores_and_limits_are_shown_and_missing_ones_say_why(changed):
    result, make = changed
    result["learned"], result["limits"] = {"lpips": "LPIPS <alex>"}, {"psnr": 40.0}
    for row in result["cases"][:6]:
        row["worst"]["lpips"] = 0.0321
    result["cases"][3]["same_backend"] = {
        "label": "none/torch",
        "worst": report_cases.figures(45.6),
        "drift": [],
        "reason": "",
    }
    html = make(result)
    scores = part(html, "scores")
    assert "LPIPS &lt;alex&gt;" in scores
    assert scores.count("<td>0.0321</td>") == 6
    assert '<span title="none/torch">45.6</span>' in scores
    assert "MS-SSIM needs 161x161 pixels or more, found 16x16." in scores
    assert "psnr 40" in part(html, "environment")


def test_the_worst_pictures_come_first(thorough):
    _, result, html = thorough
    gallery = part(html, "pictures").split("<h3>")[1]
    shown = re.findall(r"<b>([^\"]*?)</b><span>“([^”]*)”", gallery.replace("<wbr>", ""))
    flips = sorted(
        ((p["flip"], c["label"], p["prompt"]) for c in result["cases"] for p in c.get("prompts", ())), reverse=True
    )
    assert shown == [(label, prompt) for _, label, prompt in flips[:WORST]]
    assert gallery.count("<th scope=row class=l>floor</th><td>92.0</td><td>1.0e-05</td>") == WORST


def test_equal_pictures_are_in_the_file_once_and_lost_ones_are_named(tmp_path):
    result = report_cases.thorough(tmp_path)
    before = page(result, tmp_path)
    first = result["cases"][0]["prompts"][0]["image"]
    shutil.copy(tmp_path / first, tmp_path / result["cases"][1]["prompts"][0]["image"])
    assert page(result, tmp_path).count("<image") == before.count("<image") - 1
    (tmp_path / first).unlink()
    (tmp_path / result["cases"][3]["prompts"][1]["heat"]).write_bytes(b"no picture")
    text = Page(page(result, tmp_path)).text
    assert f"{first} cannot be read" in text
    assert f"{result['cases'][3]['prompts'][1]['heat']} cannot be read" in text


def test_large_pictures_are_scaled_and_the_page_says_so(tmp_path):
    result = report_cases.thorough(tmp_path)
    report_cases.picture(tmp_path, "1/0.png", 5, size=(1024, 512))
    html = page(result, tmp_path)
    assert html.count("data:image/webp") == 1
    assert 'width="512" height="256"' in html
    assert "scaled down to 512 pixels" in html


def test_labels_do_not_overlap():
    room = (2.0, 16.0, 330.0, 318.0)
    draw = random.Random(0)
    for count, spot in itertools.product((3, 9, 12), (1.0, 40.0, 200.0)):
        marks = [(165 + draw.uniform(-spot, spot) / 2, 150 + draw.uniform(-spot, spot) / 2, 8.0) for _ in range(count)]
        boxes = report_svg.place_labels(marks, [f"artifact-{i}/openvino" for i in range(count)], room)
        assert all(b[0] >= room[0] and b[1] >= room[1] and b[2] <= room[2] and b[3] <= room[3] for b in boxes)
        assert not [pair for pair in itertools.combinations(boxes, 2) if report_svg.overlap(*pair)]
    heights = report_svg.spread_down([50.0] * 9 + [10.0], 20, 300)
    assert all(abs(a - b) >= report_svg.ROW - 1e-9 for a, b in itertools.combinations(heights, 2))


def test_the_front_is_what_none_beats():
    def point(x, y, size):
        return report_plots.Point(label="", short="", backend="", x=x, low=x, high=x, y=y, size=size)

    exact, fast, small, beaten = point(1, None, 40), point(2, 40.0, 40), point(1.5, 30.0, 10), point(1.5, 30.0, 20)
    assert report_plots.front([exact, fast, small, beaten], sizes=False) == [exact, fast]
    assert report_plots.front([beaten, small, fast, exact], sizes=True) == [exact, small, fast]


def test_many_points_are_named_where_none_beats_them(changed):
    result, make = changed
    extra = copy.deepcopy(result["cases"][4])
    for number in range(report_plots.MOST_LABELS):
        row = {**extra, "label": f"more{number}/onnxruntime", "artifact": f"more{number}"}
        result["cases"].append(row)
        result["groups"][0]["labels"].append(row["label"])
        row["speedup"] = report_cases.spread(0.5)
    text = part(make(result), "pareto")
    assert "only those are named that none beats" in text
    assert "<title>more7/onnxruntime" in text
    assert ">more7/onnxruntime</text>" not in text
    assert ">none/onnxruntime</text>" in text


def test_far_apart_speeds_get_a_logarithmic_axis(changed):
    result, make = changed
    result["cases"][5]["speedup"] = report_cases.spread(50.0)
    ticks = re.findall(r">([\d.]+)×</text>", part(make(result), "pareto"))
    assert ticks[: len(ticks) // 2] == ["1", "2", "5", "10", "20", "50"]


def test_axes_are_ticked_with_round_values():
    assert report_svg.ticks(0, 9.2, 4) == [0, 2.5, 5, 7.5]
    assert report_svg.ticks(33.0, 33.9)[1:3] == [33.2, 33.4]
    assert report_svg.log_ticks(0.8, 12) == [1, 2, 5, 10]
    assert report_svg.power(-8) == "10⁻⁸"
    frame = report_svg.Frame(left=0, right=100, top=0, bottom=100, x0=1, x1=100, y0=0, y1=1, log_x=True)
    assert math.isclose(frame.x(10), 50)


def luminance(colour):
    digits = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_can_be_read_in_light_and_in_dark():
    style = report_style.STYLE + report_style.PAGE_STYLE
    blocks = re.findall(r"(@media\(prefers-color-scheme:dark\)\{)?:root\{([^}]*)\}", style)
    light, dark = {}, {}
    for media, body in blocks:
        colours = dict(re.findall(r"--([\w-]+):(#[0-9a-f]+)", body))
        light.update({} if media else colours)
        dark.update(colours)

    assert {"ink", "soft", "bad", "torch", "s-denoiser"} <= {*light}
    assert {"ink", "soft", "bad", "torch"} <= {*dark}
    for theme in (light, {**light, **dark}):
        for name, colour in theme.items():
            if name in ("page", "card", "line"):
                continue
            wanted = TEXT_CONTRAST if name in ("ink", "soft", "bad") else MARK_CONTRAST
            for ground in ("page", "card"):
                a, b = sorted((luminance(colour), luminance(theme[ground])))
                assert (b + 0.05) / (a + 0.05) >= wanted, (name, ground, colour)


PROBE = """<script>
function move(slider, to) { slider.value = to; slider.dispatchEvent(new Event("input", {bubbles: true})); }
move(document.getElementById("all"), 40);
const frames = [...document.querySelectorAll(".frame")], own = frames[0].querySelector("input");
move(own, 70);
parent.postMessage({scroll: document.documentElement.scrollWidth, width: innerWidth,
  cuts: frames.map(f => f.style.getPropertyValue("--cut")), slider: getComputedStyle(own).display,
  dark: matchMedia("(prefers-color-scheme:dark)").matches}, "*");
</script></body>"""
# a window is never narrower than 500 pixels, so the page lies in a frame of the width asked for
AROUND = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{}</title>
<body style="margin:0"><script>addEventListener("message", e => document.title = JSON.stringify(e.data))</script>
<iframe src="page.html" style="display:block;border:0;width:WIDTHpx;height:1400px"></iframe></body>"""
WIDTHS = {"light": 1280, "dark": 1280, "phone": 360}


@pytest.mark.parametrize("look", WIDTHS)
def test_a_browser_shows_it(thorough, quick, tmp_path, look):
    from PIL import Image

    browser = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if browser is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    width, shot = WIDTHS[look], tmp_path / f"{look}.png"
    html = (quick if look == "phone" else thorough)[2]
    (tmp_path / "page.html").write_text(html.replace("</body>", PROBE), encoding="utf-8")
    (tmp_path / "around.html").write_text(AROUND.replace("WIDTH", str(width)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},1400"]
    flags += [f"--blink-settings=preferredColorScheme={int(look != 'dark')}", "--dump-dom", f"--screenshot={shot}"]
    command = [browser, *flags, (tmp_path / "around.html").as_uri()]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = json.loads(re.search("<title>(.*?)</title>", made.stdout)[1])
    assert said["width"] == width
    assert said["scroll"] <= width, "the page scrolls sideways"
    assert said["dark"] is (look == "dark")
    assert said["slider"] == "block"
    assert said["cuts"] == ["70%", *["40%"] * (len(said["cuts"]) - 1)]
    with Image.open(shot) as image:
        seen = image.convert("RGB").crop((0, 0, width, image.height))
    assert seen.width == width
    assert (sum(seen.getpixel((3, 3))) < 3 * 60) is (look == "dark")
    assert len(seen.getcolors(1 << 24)) > 50, "an empty page"
