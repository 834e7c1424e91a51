"""The mathematics of calibration: activation ranges, SmoothQuant, AWQ, low-rank corrections."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

from intaglio.profiles.errors import UsageError
from intaglio.quantize import awq, fp8, int4, int8, low_rank, nf4, ranges, smoothquant
from intaglio.quantize.ranges import RANGES, ROUNDINGS, activation_scale

CODECS = {
    "int8": int8.CODEC,
    "int4 rtn": int4.RTN_64,
    "int4 mse": int4.BLOCK_64,
    "nf4": nf4.CODEC,
    "fp8": fp8.CODEC,
}
NEAR_BEST = 1.01  # mse's error over the best of a dense grid; measured 1.0070
SAME = 2e-6  # of one scale to Model-Optimizer's, relative, float32 powers; measured 2e-7
NO_WORSE = 1.01  # our AWQ's output error over Model-Optimizer's; measured 0.985 to 1.000
NEAR_SVD_DB = 0.1  # the randomized SVD's residual over the exact one's on white noise; measured 0.052


def inputs(n=256, k=256, spread=1.2, seed=0):
    """Rows whose channels differ in size, as the inputs of a transformer's layers do."""
    random = np.random.RandomState(seed)
    return (random.standard_normal((n, k)) * random.lognormal(0, spread, k)).astype(np.float32)


def matrix(k=256, n=192, outliers=0, seed=1):
    random = np.random.RandomState(seed)
    weight = random.standard_normal((k, n)) * 0.05
    weight[random.permutation(k)[:outliers]] *= 10
    return weight.astype(np.float32)


SAMPLES = {
    "gauss": inputs(512, 64, 0.0),
    "channels": inputs(512, 64),
    "outlier": np.append(inputs(512, 64, 0.0), np.full((1, 64), 30, np.float32), axis=0),
    "heavy": np.random.RandomState(3).standard_t(2, (512, 64)).astype(np.float32),
    "one sign": np.abs(inputs(512, 64)),
}


def quantize_back(x, scale, levels):
    """The quantized tensor in float64, rounded by ml_dtypes where it is e4m3."""
    value = np.clip(x.astype(np.float64) / scale, -levels, levels)
    if levels == 127:
        return np.rint(value) * scale
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return value.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def lost(x, scale, levels):
    return float(np.square(x - quantize_back(x, scale, levels)).mean())


def relative(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


# Ranges


@pytest.mark.parametrize("levels", ROUNDINGS)
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_nearly_the_best_clip_there_is_and_never_worse_than_the_others(name, levels):
    x = SAMPLES[name]
    peak = np.abs(x).max(axis=0)
    found = {method: lost(x, activation_scale(x, peak, method=method, levels=levels), levels) for method in RANGES}
    dense = min(lost(x, clip / levels, levels) for clip in peak.max() * np.geomspace(1, 1 / 64, 400))
    assert found["mse"] <= dense * NEAR_BEST
    assert found["mse"] <= min(found.values()) * (1 + 1e-6)


def test_the_three_ways_differ_where_they_should():
    x = SAMPLES["heavy"]
    scale = {method: activation_scale(x, np.abs(x).max(axis=0), method=method) for method in RANGES}
    assert scale["absmax"] == float(np.abs(x).max() / np.float32(127))
    assert scale["percentile"] == pytest.approx(np.percentile(np.abs(x.astype(np.float64)), 99.99) / 127, rel=1e-6)
    assert len(set(scale.values())) == 3 and max(scale.values()) == scale["absmax"]


@pytest.mark.parametrize("levels", ROUNDINGS)
@pytest.mark.parametrize("method", RANGES)
def test_ranges_of_special_tensors(method, levels):
    def scale(samples, peak):
        return activation_scale(np.asarray(samples, np.float32), np.asarray(peak), method=method, levels=levels)

    assert scale(np.zeros((4, 3)), np.zeros(3)) == 1
    assert scale(np.full((4, 3), -2.5), np.full(3, 2.5)) == float(np.float32(2.5) / np.float32(levels))
    # A peak seen outside of the samples, which alone say nothing.
    assert scale(np.zeros((4, 3)), [0, 0, 8.0]) == float(np.float32(8) / np.float32(levels))
    assert scale(np.full((4, 3), 1e-40), np.full(3, 1e-40)) > 0
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            scale([[1, bad, 2]], [1, 1, 2])
        with pytest.raises(ValueError, match="NaN or infinity"):
            scale([[1, 1, 2]], [1, bad, 2])
    with pytest.raises(ValueError, match="empty"):
        scale(np.zeros((0, 3)), np.ones(3))


def test_a_wrong_method_and_wrong_levels_are_refused():
    with pytest.raises(UsageError, match="absmax, mse, percentile"):
        activation_scale(np.ones((2, 2)), np.ones(2), method="entropy")
    with pytest.raises(ValueError, match="127, 448"):
        activation_scale(np.ones((2, 2)), np.ones(2), levels=128)


def test_e4m3_rounds_as_ml_dtypes_does():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # every magnitude
    halves = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(halves, np.float32(side)) for side in (-500, 500)]
    x = np.concatenate([codes, halves, *near, np.geomspace(1e-5, 448, 5000).astype(np.float32)])
    out = np.empty_like(x)
    ranges.round_e4m3(x, out)
    assert np.array_equal(out, x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


# SmoothQuant


def test_smoothing_changes_nothing_but_the_ranges():
    x, weight = inputs(), matrix()
    x[:, 5] = 0
    weight[7] = 0
    peak, w_peak = np.abs(x).max(axis=0), smoothquant.weight_peaks([weight, weight / 2])
    assert np.array_equal(w_peak, np.abs(weight).max(axis=1))
    exact = x.astype(np.float64) @ weight
    for alpha in (0.0, 0.5, 0.8, 1.0):
        scale = smoothquant.smoothing(peak, w_peak, alpha).astype(np.float64)
        assert np.isfinite(scale).all() and (scale > 0).all() and scale[5] == 1
        assert relative((x / scale) @ (scale[:, None] * weight), exact) < 1e-12
    # At a half both sides get the same ranges: sqrt(max|x| max|W|); at one the activations' are all 1.
    live = (peak > 0) & (w_peak > 0)
    scale = smoothquant.smoothing(peak, w_peak, 0.5)
    np.testing.assert_allclose((peak / scale)[live], (w_peak * scale)[live], rtol=1e-5)
    np.testing.assert_allclose((peak / smoothquant.smoothing(peak, w_peak, 1.0))[live], 1, rtol=1e-6)
    assert np.array_equal(smoothquant.smoothing(peak, w_peak, None), np.ones(256))
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="0 to 1"):
            smoothquant.smoothing(peak, w_peak, wrong)
    with pytest.raises(ValueError, match="NaN"):
        smoothquant.smoothing(peak * np.nan, w_peak, 0.5)
    with pytest.raises(ValueError, match="channels"):
        smoothquant.smoothing(peak[:9], w_peak, 0.5)


def int8_layer_error(x, peak, weights, scale):
    """The output error of W8A8 with explicit fake quantization in float64: the definition `best_alpha` must meet."""
    step = activation_scale(x / scale, peak / scale)
    codes = quantize_back((x / scale).astype(np.float32), step, 127)
    found, truth = [], []
    for weight in weights:
        scaled = scale[:, None].astype(np.float64) * weight
        steps = np.abs(scaled).max(axis=0) / 127
        found.append(codes @ (np.rint(scaled / steps) * steps))
        truth.append(x.astype(np.float64) @ weight)
    return relative(np.hstack(found), np.hstack(truth))


def test_best_alpha_finds_the_least_error_of_the_int8_layer():
    x, weights = inputs(200, spread=1.5), [matrix(n=64), matrix(n=96, seed=2)]
    peak, w_peak = np.abs(x).max(axis=0), smoothquant.weight_peaks(weights)
    alpha, before, after = smoothquant.best_alpha(x, peak, weights)
    tried = (None, *smoothquant.ALPHAS)
    errors = [int8_layer_error(x, peak, weights, smoothquant.smoothing(peak, w_peak, a)) for a in tried]
    assert before == pytest.approx(errors[0], rel=1e-3) and after == pytest.approx(min(errors), rel=1e-3)
    assert tried[int(np.argmin(errors))] == alpha
    assert after < before / 2  # measured 0.41
    assert (alpha, before, after) == smoothquant.best_alpha(x, peak, weights)


def test_best_alpha_leaves_a_layer_alone_that_smoothing_would_harm():
    random = np.random.RandomState(0)  # whole numbers up to 127 on both sides: int8 loses nothing
    x = random.randint(-127, 128, (64, 256)).astype(np.float32)
    weight = random.randint(-127, 128, (256, 32)).astype(np.float32)
    x[0], weight[0] = 127, 127
    weight[1:9] = 1
    alpha, before, after = smoothquant.best_alpha(x, np.full(256, 127.0), [weight], alphas=(0.5,))
    assert alpha is None and after == before < 1e-6
    assert smoothquant.best_alpha(x, np.full(256, 127.0), [weight], alphas=(1.0,))[0] is None
    assert smoothquant.best_alpha(x * 0, np.zeros(256), [weight]) == (None, 0, 0)


# AWQ


@pytest.mark.parametrize("name", CODECS)
def test_awq_is_measured_on_the_layer_and_never_worse_than_no_scaling(name):
    codec = CODECS[name]
    x, weights = inputs(), [matrix(n=64), matrix(n=96, seed=2)]
    x[:, 3] = 0
    scale, before, after = awq.search(weights, x, codec)
    assert scale.dtype == np.float32 and scale.shape == (256,) and (scale > 0).all() and scale[3] == 1
    truth = np.hstack([x.astype(np.float64) @ weight for weight in weights])
    for factor, error in ((np.ones(256, np.float32), before), (scale, after)):
        importance = (np.square(x, dtype=np.float64).mean(axis=0) / np.square(factor, dtype=np.float64)).astype("f4")
        tensors = [codec.encode(factor[:, None] * weight, 1, importance=importance) for weight in weights]
        back = [codec.decode(t, w.shape, 1) for t, w in zip(tensors, weights, strict=True)]
        found = np.hstack([(x / factor).astype(np.float64) @ w for w in back])
        assert error == pytest.approx(relative(found, truth), rel=1e-3)
    assert after < 0.97 * before  # measured 0.74 (int4 rtn) to 0.94 (int4 mse)
    again, *_ = awq.search(weights, x, codec)
    assert np.array_equal(scale, again)


def test_awq_without_anything_to_gain_and_without_input():
    same = np.random.RandomState(0).choice([-1, 1], (128, 64)).astype(np.float32)
    weight = np.full((64, 16), 0.5, np.float32)
    scale, before, after = awq.search([weight], same, int4.RTN_64)
    assert np.array_equal(scale, np.ones(64)) and before == after
    scale, before, after = awq.search([weight], same * 0, int4.RTN_64)
    assert np.array_equal(scale, np.ones(64)) and before == after == 0
    with pytest.raises(ValueError, match="NaN"):
        awq.search([weight], same * np.nan, int4.RTN_64)


def test_a_search_on_some_columns_is_measured_on_all_and_keeps_its_gain(monkeypatch):
    x, weights = inputs(), [matrix(n=640), matrix(n=160, seed=2)]
    _, before, whole = awq.search(weights, x, int4.RTN_64)
    monkeypatch.setattr(awq, "COLUMNS", 100)
    _, same, part = awq.search(weights, x, int4.RTN_64)
    assert same == before and whole <= part <= 1.03 * whole < before  # measured 1.001
    some = ranges.some_columns(weights, 100)
    assert [w.shape[1] for w in some] == [80, 20]
    assert {tuple(column) for column in some[1].T} <= {tuple(column) for column in weights[1].T}


# Low rank


@pytest.mark.parametrize("name", CODECS)
def test_a_correction_makes_the_weight_it_says(name):
    codec, weight = CODECS[name], matrix(outliers=6)
    importance = np.square(inputs()).mean(axis=0)
    for given in (None, importance):
        tensors, a, b, before, after = low_rank.correct(weight, codec, 1, 16, importance=given)
        assert a.dtype == b.dtype == np.float16 and a.shape == (256, 16) and b.shape == (16, 192)
        assert set(tensors) == set(codec.layout(weight.shape, 1))
        root = np.ones(256) if given is None else np.sqrt(given.astype(np.float64))
        found = codec.decode(tensors, weight.shape, 1) + a.astype(np.float64) @ b.astype(np.float64)
        plain = codec.decode(codec.encode(weight, 1, importance=given), weight.shape, 1)
        assert after == pytest.approx(relative(root[:, None] * found, root[:, None] * weight), rel=1e-3)
        assert before == pytest.approx(relative(root[:, None] * plain, root[:, None] * weight), rel=1e-3)
        assert after < 0.6 * before  # measured 0.10 (int8, weighted) to 0.49 (fp8)
        again = low_rank.correct(weight, codec, 1, 16, importance=given)
        assert all(np.array_equal(again[0][role], tensors[role]) for role in tensors)
        assert np.array_equal(again[1], a) and np.array_equal(again[2], b) and again[3:] == (before, after)


def test_more_rank_is_better_and_beats_each_way_of_the_literature():
    weight, codec = matrix(outliers=6), int4.RTN_64
    errors = [low_rank.correct(weight, codec, 1, rank)[-1] for rank in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    coded = weight - codec.decode(codec.encode(weight, 1), weight.shape, 1)
    u, s, vt = np.linalg.svd(coded)
    lqer = np.linalg.norm(s[16:]) / np.linalg.norm(weight)
    u, s, vt = np.linalg.svd(weight)
    rest = weight - (u[:, :16] * s[:16]) @ vt[:16]
    svdquant = np.linalg.norm(rest - codec.decode(codec.encode(rest, 1), rest.shape, 1)) / np.linalg.norm(weight)
    assert errors[2] < min(lqer, svdquant)


def test_a_randomized_svd_is_nearly_the_exact_one(monkeypatch):
    monkeypatch.setattr(low_rank, "EXACT", 1)
    for shape in ((600, 900), (900, 600)):
        noise = np.random.RandomState(5).standard_normal(shape).astype(np.float32)
        u, s, vt = low_rank.leading(noise, 32)
        exact = np.linalg.svd(noise, compute_uv=False)
        residual = np.linalg.norm(noise - (u * s) @ vt)
        assert 20 * np.log10(residual / np.linalg.norm(exact[32:])) < NEAR_SVD_DB
        assert u.shape == (shape[0], 32) and s.shape == (32,) and vt.shape == (32, shape[1])


def test_corrections_of_special_weights():
    zero = np.zeros((64, 32), np.float32)
    _, a, b, before, after = low_rank.correct(zero, int4.RTN_64, 1, 4)
    assert not a.any() and not b.any() and before == after == 0
    weight, dead = matrix(64, 32), np.ones(64, np.float32)
    dead[:60] = 0
    for given in (dead, dead * 0, dead * 1e-30):
        *_, a, b, before, after = low_rank.correct(weight, int4.RTN_64, 1, 8, importance=given)
        assert np.isfinite(a).all() and np.isfinite(b).all() and after <= before
    for scale in (1e-6, 1e6):
        assert low_rank.correct(weight * np.float32(scale), int8.CODEC, 1, 8)[-1] == pytest.approx(
            low_rank.correct(weight, int8.CODEC, 1, 8)[-1], rel=0.05
        )
    with pytest.raises(ValueError, match="rank 33"):
        low_rank.correct(weight, int4.RTN_64, 1, 33)
    with pytest.raises(ValueError, match="NaN or infinity"):
        low_rank.correct(weight * np.nan, int4.RTN_64, 1, 4)
    for wrong in (dead[:3], -dead, dead * np.nan):
        with pytest.raises(ValueError, match="importance"):
            low_rank.correct(weight, int4.RTN_64, 1, 4, importance=wrong)


# Model-Optimizer


@pytest.fixture(scope="module")
def modelopt():
    """(torch, modelopt.torch.quantization), whose imports warn of much that is not ours."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch, pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)


def optimized(modelopt, config, x, weight):
    """Model-Optimizer's output of one layer without bias, and the scales that divide its input."""
    torch, mtq = modelopt
    model = torch.nn.Sequential(torch.nn.Linear(*weight.shape, bias=False))
    tensor = torch.from_numpy(x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0].weight.copy_(torch.from_numpy(weight.T.copy()))
        model = mtq.quantize(model, config, lambda m: m(tensor))
        return model(tensor).numpy(), 1 / model[0].input_quantizer.pre_quant_scale.numpy().ravel()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8, 1.0])
def test_smoothing_is_model_optimizers(modelopt, alpha):
    config = copy.deepcopy(modelopt[1].INT8_SMOOTHQUANT_CFG) | {"algorithm": {"method": "smoothquant", "alpha": alpha}}
    x, weight = inputs(), matrix()  # without a channel of zeros: Model-Optimizer 0.47 fails on it
    _, theirs = optimized(modelopt, config, x, weight)
    ours = smoothquant.smoothing(np.abs(x).max(axis=0), smoothquant.weight_peaks([weight]), alpha)
    np.testing.assert_allclose(ours, theirs, rtol=SAME)


@pytest.mark.parametrize(("k", "block"), [(256, 128), (256, 64), (512, 128), (160, 32)])
def test_awq_is_as_good_as_model_optimizers(modelopt, k, block):
    config = copy.deepcopy(modelopt[1].INT4_AWQ_CFG) | {"algorithm": {"method": "awq_lite"}}
    sized = [e["cfg"] for e in config["quant_cfg"] if "block_sizes" in (e.get("cfg") or {})]
    assert sized
    for entry in sized:
        entry["block_sizes"] = {-1: block, "type": "static"}
    x, weight = inputs(k=k), matrix(k)
    codec = int4.Int4(block, "absmax")
    found, theirs = optimized(modelopt, config, x, weight)
    their_error = relative(found, x @ weight)
    _, before, after = awq.search([weight], x, codec)
    assert after <= NO_WORSE * their_error < before
    # Their scales give the same error through our codec: it is the same arithmetic that is compared.
    moments = np.square(x, dtype=np.float64).mean(axis=0)
    assert awq.output_error([weight], x, moments, codec, theirs) == pytest.approx(their_error, rel=1e-3)
