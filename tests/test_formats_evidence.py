"""What every number format keeps and saves, from the figures on file, and the page that shows them."""

from __future__ import annotations

import json
import math

import pytest

from intaglio.bench import formats_page
from intaglio.bench.evidence_formats import BACKENDS, VARIANTS, Settings, compared
from intaglio.bench.formats_cells import REFERENCE, TORCH, Cell, find, running, timing
from intaglio.bench.metrics import METRICS
from intaglio.profiles.errors import ToolError, Unsupported
from intaglio.quantize.formats import check_formats

FILE = formats_page.ROOT / formats_page.FOLDER / "formats.json"
PSNR = {"int8": 40.0, "w8a8": 30.0}  # dB, median over the prompts, on every backend
LOST = 0.05  # of the names: top-5 retrieval under fp32's on the same backend
RETRIEVED = ("int4", "nf4")
WEIGHTS = {"int8": 0.95, "int4": 0.95, "nf4": 0.95}  # of the bytes of eligible MatMul weights
MACS = {"w8a8": 0.90}  # of the multiply-accumulates of MatMul and Conv


@pytest.fixture(scope="module")
def figures():
    if not FILE.exists():
        pytest.skip("evidence 'formats' is missing; run: make evidence formats")
    return json.loads(FILE.read_text(encoding="utf-8"))["figures"]


@pytest.fixture(scope="module")
def rows(figures):
    made = {(row["format"], row["backend"]): row for row in figures["rows"]}
    assert len(made) == len(figures["rows"])
    return made


def refused(name, backend):
    try:
        check_formats([VARIANTS[name][0]], (backend,))
    except Unsupported:
        return True
    return False


def test_every_format_was_measured_on_every_backend_or_is_refused_by_the_table(rows):
    assert set(rows) == {(REFERENCE, TORCH), *((name, backend) for name in VARIANTS for backend in BACKENDS)}
    for (name, backend), row in rows.items():
        assert (row["status"] == "refused") == (backend != TORCH and refused(name, backend)), (name, backend)
        if row["status"] == "refused":
            assert row["reason"]


def test_the_check_was_run_in_full(figures):
    whole = Settings()
    assert (figures["names"], figures["prompts"]) == (whole.names, whole.prompts)
    assert (figures["steps"], figures["rounds"]) == (whole.steps, whole.rounds)


def test_no_row_lacks_a_figure(rows):
    for key, row in rows.items():
        if row["status"] == "refused":
            continue
        for part in (row, row["denoiser"]):
            ratios = [part[name]["median"] for name in ("seconds_ratio_to_fp32", "seconds_ratio_to_torch")]
            assert all(math.isfinite(v) and v > 0 for v in (*ratios, part["seconds"], part["peak_bytes"])), key
        assert row["bytes"] > row["denoiser_bytes"] > 0, key
        assert 0 <= row["retrieval"]["top1"] <= row["retrieval"]["top5"] <= 1, key
        assert set(formats_page.SHORT) <= set(row) or key == (REFERENCE, TORCH), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PSNR)
def test_8_bit_pictures_are_those_of_fp32(rows, name, backend):
    median = rows[name, backend]["psnr"]["median"]
    assert median is None or median >= PSNR[name]  # none: identical


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RETRIEVED)
def test_4_bit_pictures_still_show_what_was_asked_for(rows, name, backend):
    assert rows[name, backend]["retrieval"]["top5"] >= rows[REFERENCE, backend]["retrieval"]["top5"] - LOST


@pytest.mark.parametrize("name", WEIGHTS)
def test_matrix_products_are_covered(figures, name):
    covered = figures["coverage"][name]
    assert covered["whole"]["weights"] >= WEIGHTS[name]
    assert covered["components"]["unet"]["weights"] >= WEIGHTS[name]


@pytest.mark.parametrize("name", MACS)
def test_arithmetic_is_covered(figures, name):
    covered = figures["coverage"][name]
    assert covered["whole"]["macs"] >= MACS[name]
    assert covered["components"]["unet"]["macs"] >= MACS[name]


def test_fewer_bits_are_fewer_bytes(rows):
    for backend in BACKENDS:
        sizes = [rows[name, backend]["denoiser_bytes"] for name in (REFERENCE, "int8", "int4")]
        assert sizes == sorted(sizes, reverse=True)


def test_the_page_is_the_tables_and_the_figures():
    assert formats_page.PAGE.read_text(encoding="utf-8") == formats_page.page()


def test_the_readme_has_the_figures():
    text = formats_page.README.read_text(encoding="utf-8")
    assert text.count(formats_page.START) == text.count(formats_page.END) == 1
    assert formats_page.readme(text) == text


def write(root, name, figures):
    file = root / formats_page.FOLDER / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"figures": figures}))


def spread(value):
    return {"median": value, "min": value, "max": value}


def example(name, backend, top5=1.0):
    timed = {
        "seconds": 0.5,
        "seconds_ratio_to_fp32": spread(0.75),
        "seconds_ratio_to_torch": spread(0.25),
        "peak_bytes": 3e8,
    }
    metrics = {name: {"median": None if name == "psnr" else 0.5, "worst": 0.25} for name in METRICS}
    found = {"pictures": 200, "top1": 0.5, "top5": top5}
    first = {"format": name, "backend": backend, "status": "measured"}
    return {**first, **timed, **metrics, "bytes": 2e7, "denoiser_bytes": 1e7, "retrieval": found, "denoiser": timed}


def test_measured_and_refused_cells_are_on_the_page(tmp_path):
    assert formats_page.page(tmp_path).count("Not measured") == 3
    measured = [example("fp32", "openvino"), example("int8", "openvino", 0.975)]
    no = {"format": "fp8", "backend": "openvino", "status": "refused", "reason": "no such operator"}
    shares = {"weights": 1.0, "all_weights": 0.5, "macs": None}
    coverage = {"int8": {"whole": shares, "components": {"unet": shares}, "exceptions": {"a": "none: high"}}}
    facts = {"steps": 20, "rounds": 7, "prompts": 32, "unet_calls": 5, "coverage": coverage}
    write(tmp_path, "formats", {**facts, "rows": [*measured, no]})
    text = formats_page.page(tmp_path)
    assert "| `int8` | openvino | 20.0 | 10.0 | 0.75 (0.75-0.75) | 0.25 (0.25-0.25) | 300.0 | identical / 0.2 |" in text
    assert "97.5% of 200" in text
    assert "| `fp8` | openvino | refused: no such operator |" in text
    short = formats_page.readme(
        "before <!-- formats: python -m intaglio.bench.formats_page --> old <!-- end of formats --> after", tmp_path
    )
    assert "| `int8` | openvino | 20.0 | 0.50 | 0.75 | 300 | identical | 0.5000 | 0.5000 | 97.5% |" in short
    assert short.startswith("before <!--")
    assert short.endswith("--> after")
    assert "old" not in short
    assert "| `int8` | 100.0% | 50.0% | - | 100.0% | 50.0% | - | 1 |" in text


def test_the_transformer_is_on_the_page(tmp_path):
    row = {"backend": "openvino", "format": "w8a8", "activations": "static", "speed_of_torch": 2.5}
    row |= {"speed_of_own_fp32": 2.0, "peak_bytes": 1e9, "peak_of_own_fp32": 0.3, "relative_l2": 0.01, "bytes": 5e8}
    write(
        tmp_path,
        "mmdit",
        {"rounds": 7, "model": {"layers": 12}, "rows": [{**row, "coverage_weights": 1.0, "coverage_macs": 0.9}]},
    )
    text = formats_page.page(tmp_path)
    assert "layers: 12." in text
    assert "| openvino | `w8a8` | static | 500.0 | 2.00 | 2.50 | 1000.0 | 0.30 | 0.01000 | 100.0% | 90.0% |" in text
    assert text.count("Not measured") == 2


def cell(name, backend, **values):
    from intaglio.bench.cases import Case

    case = Case(artifact="nowhere", label=f"{name} {backend}", backend=backend, prompts=("x",))
    return Cell(format=name, backend=backend, case=case, **values)


def test_a_cell_that_fails_is_an_error_that_names_it():
    from rich.console import Console
    from rich.progress import Progress

    with (
        Progress(console=Console(quiet=True)) as bars,
        pytest.raises(ToolError, match="int8 on openvino: load: nowhere is not a folder"),
        running([cell("int8", "openvino")], bars, "load"),
    ):
        pass


def test_ratios_are_taken_within_rounds():
    cells = [
        cell(REFERENCE, TORCH, seconds=[8.0, 16.0, 80.0]),
        cell(REFERENCE, "openvino", seconds=[4.0, 8.0, 40.0]),  # the last round met a busy machine
        cell("int8", "openvino", seconds=[2.0, 4.0, 20.0]),
    ]
    made = timing(find(cells, "int8", "openvino"), cells)
    assert made["seconds"] == 4
    assert made["seconds_ratio_to_fp32"]["values"] == [0.5, 0.5, 0.5]
    assert made["seconds_ratio_to_torch"]["median"] == 0.25


def test_pictures_are_compared_for_half_of_the_prompts_in_each_language():
    picks = [(language, index) for language in ("en", "zh") for index in range(50)]
    chosen = compared(picks, 32)
    assert len(chosen) == len(set(chosen)) == 32
    assert set(chosen) <= set(picks)
    assert [index for language, index in chosen if language == "en"] == [i for lang, i in chosen if lang == "zh"]
