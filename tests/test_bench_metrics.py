import builtins
import importlib
import json
import sys

import numpy as np
import pytest

from intaglio.bench import machine, memory
from intaglio.bench.metrics import METRICS, flip_map, judge, measure, worst
from intaglio.profiles.errors import MissingDependency, UsageError

needs_flip = pytest.mark.skipif(
    importlib.util.find_spec("flip_evaluator") is None, reason="flip-evaluator is not installed"
)


def picture(seed=0, size=32):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


@needs_flip
def test_identical_pictures_give_null_and_identical():
    a = picture()
    result = measure(a, a.copy())
    assert result == {"identical": True, "psnr": None, "ssim": pytest.approx(1.0), "flip": 0.0}
    json.dumps(result, allow_nan=False)


@needs_flip
def test_flip_sees_a_contrast_error_that_ssim_misses():
    y, x = np.mgrid[0:64, 0:64]
    a = np.stack([x * 3, y * 3, (x + y) * 2], -1).astype(np.uint8)
    b = np.rint((a.astype(float) - 128) * 0.9 + 128).astype(np.uint8)
    result = measure(b, a)
    assert result["ssim"] > 0.985
    assert result["flip"] > 0.1


@needs_flip
def test_the_heat_map_is_a_picture_of_the_same_size_and_dark_where_equal():
    a = picture(size=40)
    b = a.copy()
    b[:, 20:] = 255 - b[:, 20:]
    heat = np.asarray(flip_map(b, a)).astype(int)
    assert heat.shape == (40, 40, 3)
    assert heat[:, :10].sum() < heat[:, 30:].sum() / 4


def test_unknown_metric_is_named():
    with pytest.raises(UsageError, match="psnr"):
        measure(picture(), picture(), ["pnsr"])


def test_a_missing_package_is_an_error_with_the_pip_line(monkeypatch):
    real = importlib.import_module

    def absent(name, *rest):
        if name == "flip_evaluator":
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependency, match=r"pip install 'intaglio\[bench\]'"):
        measure(picture(), picture(1))


def test_worst_follows_each_metrics_direction():
    rows = [
        {"identical": False, "psnr": 40.0, "ssim": 0.9, "flip": 0.2, "latents_relative_l2": 0.1},
        {"identical": True, "psnr": None, "ssim": 1.0, "flip": 0.0, "latents_relative_l2": 0.0},
        {"identical": False, "psnr": 30.0, "ssim": 0.95, "flip": 0.1, "latents_relative_l2": None},
    ]
    assert worst(rows) == {"identical": False, "psnr": 30.0, "ssim": 0.9, "flip": 0.2, "latents_relative_l2": 0.1}
    assert worst(rows[1:2])["identical"]
    assert METRICS["flip"].higher_is_better is False


def test_pictures_of_another_size_are_not_judged_but_said(tmp_path):
    from PIL import Image

    rows = []
    for name, size in (("a", 32), ("b", 48)):
        Image.fromarray(picture(size=size)).save(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}.npy", np.zeros((1, 4, 4, 4), np.float32))
        rows.append({"prompts": [{"image": f"{name}.png"}]})
    judge(rows[1], rows[0], tmp_path)
    assert rows[1]["worst"]["psnr"] is None
    assert "cannot be compared" in rows[1]["fidelity_reason"]


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from Linux's /proc")


@linux
def test_peak_is_reset_and_then_sees_an_allocation():
    import mmap

    size = 100_000_000
    block = mmap.mmap(-1, size)
    block.write(b"x" * size)
    block.close()
    if memory.reset_peak():
        pytest.skip(memory.reset_peak())
    before = memory.host_memory_now()
    assert before["peak_bytes"] - before["resident_bytes"] < 20_000_000
    array = np.ones(size, np.uint8)
    during = memory.host_memory_now()
    del array
    after = memory.host_memory_now()
    assert during["peak_bytes"] - before["resident_bytes"] == pytest.approx(size, rel=0.1)
    assert during["anonymous_bytes"] - before["anonymous_bytes"] == pytest.approx(size, rel=0.1)
    assert after["peak_bytes"] == pytest.approx(during["resident_bytes"], rel=0.05)
    assert after["resident_bytes"] < before["resident_bytes"] + size / 2


@linux
def test_mapped_weights_count_as_file_backed(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\1" * 40_000_000)
    before = memory.host_memory_now()
    mapped = np.memmap(path, np.uint8, "r")
    assert int(mapped.sum()) == 40_000_000
    after = memory.host_memory_now()
    assert after["file_bytes"] - before["file_bytes"] == pytest.approx(40_000_000, rel=0.1)
    assert after["anonymous_bytes"] - before["anonymous_bytes"] < 10_000_000


def test_elsewhere_memory_is_none_with_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "win32" in memory.reset_peak()
    found = memory.host_memory_now()
    assert found["peak_bytes"] is None
    assert "win32" in found["reason"]


def test_without_a_driver_vram_is_none_with_a_reason(monkeypatch):
    monkeypatch.setattr(memory, "gpus", lambda: ([], "no NVIDIA GPU"))
    assert memory.VramProbe("cuda:1").read() == {
        "process_bytes": None,
        "device_delta_bytes": None,
        "reason": "no NVIDIA GPU",
    }


def test_a_process_the_driver_does_not_list_is_none_not_zero(monkeypatch):
    monkeypatch.setattr(memory, "gpus", lambda: ([{"name": "GPU"}], ""))
    used = iter([(1000, None), (5000, None)])
    monkeypatch.setattr(memory, "vram_used", lambda index: next(used))
    result = memory.VramProbe("cuda:1").read()
    assert (result["process_bytes"], result["device_delta_bytes"]) == (None, 4000)
    assert "does not list" in result["reason"]


def test_no_nvml_package_is_a_reason(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "pynvml":
            raise ModuleNotFoundError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert "pip install" in memory.gpus()[1]


def test_the_fingerprint_names_no_host_and_no_person():
    import getpass
    import platform

    text = json.dumps(machine.fingerprint(), allow_nan=False)
    user = getpass.getuser()
    assert platform.node() not in text or len(platform.node()) < 4
    assert f'"{user}"' not in text
    assert f"/{user}" not in text
    assert "cores" in text
    assert "core" in machine.sentence(machine.fingerprint())


def test_head_is_read_loose_packed_and_detached(tmp_path):
    (tmp_path / "refs/heads").mkdir(parents=True)
    (tmp_path / "HEAD").write_text("ref: refs/heads/main\n")
    assert machine.read_head(tmp_path) is None
    (tmp_path / "packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    assert machine.read_head(tmp_path) == "abc123"
    (tmp_path / "refs/heads/main").write_text("def456\n")
    assert machine.read_head(tmp_path) == "def456"
    (tmp_path / "HEAD").write_text("0123\n")
    assert machine.read_head(tmp_path) == "0123"
