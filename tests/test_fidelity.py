import math

import numpy as np
import pytest

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.fidelity import WINDOW, gaussian, psnr, relative_l2, ssim


def pictures(shape=(48, 37, 3), noise=12.0):
    rng = np.random.default_rng(3)
    a = rng.integers(0, 256, shape).astype(np.float64)
    a = (a + np.roll(a, 1, 0) + np.roll(a, 1, 1)) / 3
    b = np.clip(a + rng.normal(0, noise, shape), 0, 255)
    return a.astype(np.uint8), b.astype(np.uint8)


def test_psnr_of_a_known_error():
    a = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(a + np.uint8(1), a) == pytest.approx(20 * math.log10(255))
    assert psnr(a, a) == math.inf


def test_psnr_does_not_wrap_around():
    assert psnr(np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)) == 0.0


@pytest.mark.parametrize("shape", [(48, 37, 3), (11, 64, 3), (30, 30)])
def test_psnr_and_ssim_agree_with_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pictures(shape)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = metrics.structural_similarity(b, a, channel_axis=-1 if a.ndim == 3 else None, **settings)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert psnr(a, b) == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9)


def test_ssim_of_identical_pictures_is_one():
    a, _ = pictures()
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)


def test_the_window_is_the_papers():
    weights = gaussian()
    assert weights.size == WINDOW == 11
    assert weights.sum() == pytest.approx(1)
    assert weights[5] / weights[4] == pytest.approx(math.exp(0.5 / 1.5**2))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_cannot_be_compared_is_refused(metric):
    a = np.zeros((16, 16, 3), np.uint8)
    for b in (a.astype(np.float32), np.zeros((16, 17, 3), np.uint8), np.zeros((2, 16, 16, 3), np.uint8)):
        with pytest.raises(UsageError):
            metric(b, a)


def test_ssim_refuses_a_picture_smaller_than_its_window():
    a = np.zeros((10, 64, 3), np.uint8)
    with pytest.raises(UsageError, match="11x11"):
        ssim(a, a)


def test_relative_l2():
    b = np.array([[3.0, 4.0]], np.float32)
    assert relative_l2(b * np.float32(1.5), b) == pytest.approx(0.5)
    assert relative_l2(b, b) == 0.0
    assert relative_l2(b * 0, b * 0) == 0.0
    assert relative_l2(b, b * 0) == math.inf
    assert math.isnan(relative_l2(b * np.nan, b))
    with pytest.raises(UsageError):
        relative_l2(b, b[0])


def test_relative_l2_of_float16_does_not_overflow():
    b = np.full(100_000, 60_000, np.float16)
    assert relative_l2(b, b) == 0.0
    assert relative_l2(-b, b) == pytest.approx(2.0)
