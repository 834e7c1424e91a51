import builtins
import importlib
import json
import math
import sys

import numpy as np
import pytest

from intaglio.bench import machine, memory, ms_ssim, ssimulacra2
from intaglio.bench.enforce import enforce
from intaglio.bench.fidelity import against
from intaglio.bench.metrics import METRICS, flip_map, measure, need_metrics, worst
from intaglio.profiles.errors import MissingDependency, UsageError

missing = [name for name in ("flip_evaluator", "ssimulacra2", "scipy") if importlib.util.find_spec(name) is None]
needs_flip = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")

SAME = 1e-12  # MS-SSIM against the same definition elsewhere; measured 1e-15
BORDERS = 6e-3  # MS-SSIM against torchmetrics, whose last scale has reflected borders; measured 3.9e-3 and 9e-5
# What a picture of the same model on another backend should keep; ordinary rounding (1/255) keeps all of it.
LIMITS = {"psnr": 35.0, "ssim": 0.97, "ms_ssim": 0.99, "ssimulacra2": 80.0, "flip": 0.05}
FAULTS = {  # and which metrics must see them beside others; measured on `scene` in the comment
    "1 px shift": (lambda a: np.roll(a, 1, axis=1), {"ssim", "ssimulacra2"}),  # 22.6 dB .648 .952 22.5 .103
    "contrast x0.9": (
        lambda a: rounded((a - 127.5) * 0.9 + 127.5),
        {"flip", "ssimulacra2"},
    ),  # 31.2 .980 .996 65 .185
    "RGB to BGR": (lambda a: a[:, :, ::-1].copy(), {"psnr", "flip"}),  # 12.8 .631 .676 -57.7 .410
    "black": (np.zeros_like, set(METRICS)),  # 4.8 .005 .068 -1438 .942
    "noise 8/255": (lambda a: noisy(a, 8), {"ssim", "ms_ssim"}),  # 30.2 .691 .952 60.4 .078
}
BLIND = {"contrast x0.9": {"ssim", "ms_ssim"}}  # structure alone does not see a wrong VAE scale


def picture(seed=0, size=32):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def rounded(values):
    return np.rint(values.clip(0, 255)).astype(np.uint8)


def noisy(image, deviation):
    return rounded(image + np.random.default_rng(1).normal(0, deviation, image.shape))


def scene(height=256, width=256):
    """Gradients, a wave, 40 discs and a little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / min(height, width)
    image = np.stack([200 * x, 120 + 80 * np.sin(9 * y), 60 + 60 * (x + y)], -1)
    for _ in range(40):
        cx, cy, radius = rng.random(3) * [1, 1, 0.15]
        image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = rng.integers(0, 256, 3)
    return rounded(image + rng.normal(0, 4, image.shape))


@needs_flip
def test_identical_pictures_give_null_and_identical():
    a = scene()
    result = measure(a, a.copy())
    same = {"ssim": pytest.approx(1.0), "ms_ssim": pytest.approx(1.0), "ssimulacra2": 100.0, "flip": 0.0}
    assert result == {"identical": True, "reasons": {}, "psnr": None, **same}
    json.dumps(result, allow_nan=False)


@needs_flip
@pytest.mark.parametrize("name", METRICS)
def test_less_noise_is_better_on_every_metric(name):
    a = scene()
    little, much = (measure(noisy(a, deviation), a, [name])[name] for deviation in (1, 8))
    assert (little > much) is METRICS[name].higher_is_better
    assert little != much


@needs_flip
def test_every_fault_is_seen_by_two_metrics_and_rounding_by_none():
    a = scene()
    assert enforce(measure(noisy(a, 0.5), a), LIMITS) == []
    assert enforce(measure(a, a), LIMITS) == []
    for name, (fault, wanted) in FAULTS.items():
        seen = {line.split()[0] for line in enforce(measure(fault(a), a), LIMITS)}
        assert len(seen) >= 2, name
        assert wanted <= seen, name
        assert not seen & BLIND.get(name, set()), name


@needs_flip
@pytest.mark.parametrize("name", METRICS)
def test_a_picture_too_small_has_no_value_but_a_reason(name):
    least = METRICS[name].smallest
    big, wide = (measure(scene(least, side), noisy(scene(least, side), 2), [name]) for side in (least, least + 9))
    assert big["reasons"] == wide["reasons"] == {}
    assert np.isfinite([big[name], wide[name]]).all()
    if least > 1:
        small = measure(picture(size=least - 1), picture(1, size=least - 1), [name])
        assert small[name] is None
        assert f"{least}x{least} pixels or more, found {least - 1}x{least - 1}" in small["reasons"][name]
        assert f"{name} has no value (needs {least}x{least}" in enforce(small, {name: 0.5})[0]
        with pytest.raises(UsageError, match=f"at least {least}x{least}|at least 11x11"):
            importlib.import_module(METRICS[name].path.split(":")[0]).__dict__[name](picture(size=10), picture(size=10))


def channels_first(image):
    import torch

    return torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[:, None]  # channels as a batch: each alone


def test_ms_ssim_is_the_product_of_the_scales_as_torchmetrics_computes_each():
    functional = pytest.importorskip("torchmetrics.functional.image")
    from torch.nn.functional import avg_pool2d

    plain = functional.structural_similarity_index_measure
    whole = functional.multiscale_structural_similarity_index_measure
    for other in (np.roll(scene(), 3, axis=1), noisy(scene(), 12)):
        a, b = channels_first(other), channels_first(scene())
        product = 1.0
        for weight in ms_ssim.WEIGHTS[:-1]:
            options = {"data_range": 255.0, "reduction": "none", "return_contrast_sensitivity": True}
            product = product * plain(a, b, **options)[1] ** weight
            a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
        last = plain(a, b, data_range=255.0, reduction="none", return_full_image=True)[1][..., 5:-5, 5:-5]
        product = product * last.mean((1, 2, 3)) ** ms_ssim.WEIGHTS[-1]
        found = ms_ssim.ms_ssim(other, scene())
        assert found == pytest.approx(product.mean().item(), abs=SAME)
        theirs = whole(channels_first(other), channels_first(scene()), data_range=255.0)
        assert found == pytest.approx(theirs.item(), abs=BORDERS)


def test_ms_ssim_agrees_with_pytorch_msssim():
    """Recorded from pytorch-msssim 1.0.0 in float64, its window too: ms_ssim(x, y, data_range=255)."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:256, 0:256]
    a = np.stack([x * 255 / 256, y * 255 / 256, (x + y) * 127 / 256], -1) + rng.normal(0, 20, (256, 256, 3))
    a = a.clip(0, 255).astype(np.uint8)
    b = (a.astype(int) + np.random.default_rng(8).integers(-20, 21, a.shape)).clip(0, 255).astype(np.uint8)
    assert ms_ssim.ms_ssim(np.roll(a, 3, 1), a) == pytest.approx(0.5627064912390369, abs=SAME)
    assert ms_ssim.ms_ssim(b, a) == pytest.approx(0.9414381249232225, abs=SAME)


def test_an_inverted_picture_has_an_ms_ssim_and_no_nan():
    assert 0 <= ms_ssim.ms_ssim(255 - scene(), scene()) < 0.1


@needs_flip
def test_ssimulacra2_is_that_of_the_files_and_leaves_none_behind(tmp_path, monkeypatch):
    from PIL import Image
    from ssimulacra2 import compute_ssimulacra2

    image, reference = noisy(scene(230, 257), 3), scene(230, 257)
    for name, pixels in (("a", image), ("b", reference)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    wanted = compute_ssimulacra2(tmp_path / "b.png", tmp_path / "a.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert ssimulacra2.ssimulacra2(image, reference) == wanted
    assert not list(empty.iterdir())
    assert ssimulacra2.ssimulacra2(reference, image) != wanted
    with pytest.raises(UsageError, match="RGB"):
        ssimulacra2.ssimulacra2(image[:, :, :1], reference[:, :, :1])


def test_an_enforced_metric_without_a_value_fails():
    values = {"identical": False, "psnr": None, "ssim": 0.9, "flip": math.nan, "reasons": {"psnr": "too small"}}
    limits = {"psnr": 30.0, "ssim": 0.95, "flip": 0.1, "ms_ssim": 0.9, "lpips": 0.2}
    lines = enforce(values, limits, {"lpips": False})
    assert [line.split()[0] for line in lines] == list(limits)
    assert lines[0] == "psnr has no value (too small), allowed: 30 or more"
    assert lines[1] == "ssim 0.9, allowed: 0.95 or more"
    assert lines[3] == "ms_ssim has no value (it was not measured), allowed: 0.9 or more"
    assert lines[4].endswith("allowed: 0.2 or less")
    assert enforce({**values, "lpips": 0.2}, {"lpips": 0.2}, {"lpips": False}) == []
    assert enforce({"identical": True, "psnr": None}, {"psnr": 60.0}) == []
    with pytest.raises(UsageError, match="Did you mean 'ssim'"):
        enforce(values, {"sim": 0.9})


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


@pytest.mark.parametrize("package", ["flip_evaluator", "ssimulacra2", "scipy"])
def test_a_missing_package_is_an_error_with_the_pip_line(monkeypatch, package):
    real = importlib.import_module

    def absent(name, *rest):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(name=package)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependency, match=r"pip install 'intaglio\[bench\]'"):
        measure(scene(), noisy(scene(), 1))
    with pytest.raises(MissingDependency, match=r"pip install 'intaglio\[bench\]'"):
        need_metrics()


def test_worst_follows_each_metrics_direction():
    new = {"ms_ssim": 0.9, "ssimulacra2": 80.0}
    rows = [
        {"identical": False, "psnr": 40.0, "ssim": 0.9, "flip": 0.2, "latents_relative_l2": 0.1, **new},
        {"identical": True, "psnr": None, "ssim": 1.0, "flip": 0.0, "latents_relative_l2": 0.0, **new, "ms_ssim": None},
        {"identical": False, "psnr": 30.0, "ssim": 0.95, "flip": 0.1, "latents_relative_l2": None, **new},
    ]
    wanted = {"identical": False, "psnr": 30.0, "ssim": 0.9, "flip": 0.2, "latents_relative_l2": 0.1, **new}
    assert worst(rows) == wanted
    assert worst(rows[1:2])["ms_ssim"] is None
    assert worst(rows[1:2])["identical"]
    assert METRICS["flip"].higher_is_better is False


def test_pictures_of_another_size_are_not_judged_but_said(tmp_path):
    from PIL import Image

    for name, size in (("a", 32), ("b", 48)):
        Image.fromarray(picture(size=size)).save(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}.npy", np.zeros((1, 1, 4, 4, 4), np.float32))
    found = against(["b.png"], ["a.png"], tmp_path)
    assert found["worst"] is None
    assert found["prompts"] == []
    assert "cannot be compared" in found["reason"]


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
    # np.ones might be given memory that the process holds already
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(block, np.uint8)
    array[:] = 1
    during = memory.host_memory_now()
    del array
    block.close()
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
    found = memory.VramProbe("cuda:1").read()
    names = ("framework_bytes", "process_bytes", "device_delta_bytes")
    assert found == {
        **dict.fromkeys(names),
        "reasons": dict.fromkeys(names, "no NVIDIA GPU"),
        "reason": "no NVIDIA GPU",
    }


def test_a_process_the_driver_does_not_list_is_none_not_zero(monkeypatch):
    monkeypatch.setattr(memory, "gpus", lambda: ([{"name": "GPU"}], ""))
    used = iter([(1000, None), (5000, None)])
    monkeypatch.setattr(memory, "vram_used", lambda index: next(used))
    result = memory.VramProbe("cuda:1").read()
    assert (result["process_bytes"], result["device_delta_bytes"]) == (None, 4000)
    assert "does not list" in result["reasons"]["process_bytes"]
    assert "device_delta_bytes" not in result["reasons"]


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
