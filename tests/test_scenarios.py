"""MLPerf's scenarios under the real LoadGen: valid runs, its own rules, and ends that are not good ones."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import shutil
import time

import numpy as np
import psutil
import pytest

from intaglio.bench.loadgen import DETAIL, SUMMARY, LoadgenError, Subject, read_logs
from intaglio.bench.loadgen_cli import REPORT, configure_scenario, read_prompts, run_scenario, subject_of
from intaglio.bench.scenarios import RULES, SCENARIOS, measure, read_rules
from intaglio.profiles.errors import NumericsError, UsageError

pytest.importorskip("mlperf_loadgen", reason="needs pip install 'intaglio[bench]'")

PROMPTS = ("red heart", "红心", "cat face", "rocket", "pizza")
SLEEP = 0.02  # seconds of a call of the fake pipeline
# What the machine adds to a sleep; measured 2 % idle. Below 1 nothing may be: a sleep is never shorter.
SLOWER = 1.5
BATCH_TOLERANCE = 1  # of 255, as in test_cli: the batch changes the order of float32 sums
# mlperf.conf of MLPerf Inference, stable-diffusion-xl, and LoadGen's default of min_query_count where it says none.
MLPERF = {
    "min_duration": dict.fromkeys(SCENARIOS, 600_000),
    "performance_sample_count_override": dict.fromkeys(SCENARIOS, 5000),
    "qsl_rng_seed": dict.fromkeys(SCENARIOS, 2085463073848966840),
    "sample_index_rng_seed": dict.fromkeys(SCENARIOS, 2747215439041700203),
    "schedule_rng_seed": dict.fromkeys(SCENARIOS, 16159082839903944936),
    "min_query_count": {"single_stream": 100, "multi_stream": 662, "offline": 5000, "server": 100},
    "target_latency_percentile": {"single_stream": 90, "multi_stream": 99, "server": 99},
    "samples_per_query": {"multi_stream": 8},
    "target_latency": {"server": 20_000},
}
EFFECTIVE = {  # the detail log's key and unit
    "min_duration": ("effective_min_duration_ms", 1),
    "performance_sample_count_override": ("effective_performance_sample_count", 1),
    "qsl_rng_seed": ("effective_qsl_rng_seed", 1),
    "sample_index_rng_seed": ("effective_sample_index_rng_seed", 1),
    "schedule_rng_seed": ("effective_schedule_rng_seed", 1),
    "min_query_count": ("effective_min_query_count", 1),
    "target_latency_percentile": ("effective_target_latency_percentile", 0.01),
    "samples_per_query": ("effective_samples_per_query", 1),
    "target_latency": ("effective_target_latency_ns", 1_000_000),
}


class Sleeper:
    """Pictures that take a known time a call."""

    def __init__(self, seconds=SLEEP):
        self.seconds, self.calls = seconds, []

    def __call__(self, numbers, prompts):
        assert [PROMPTS[n] for n in numbers] == list(prompts)
        self.calls.append(tuple(numbers))
        time.sleep(self.seconds)
        return [None] * len(prompts)


def mlperf(scenario):
    return {key: by[scenario] for key, by in MLPERF.items() if scenario in by}


def measured(scenario, folder, make, *changes, batch=8, **options):
    return measure(
        scenario, read_rules("short", scenario, changes), PROMPTS, Subject(make=make, batch=batch), folder, **options
    )


@pytest.fixture
def command():
    """A function: the verb in this process, with an artifact and more words."""

    def call(*words):
        parser = argparse.ArgumentParser()
        configure_scenario(parser)
        return run_scenario(parser.parse_args([str(word) for word in words]))

    return call


EXPECTED = {  # the metric of SLEEP a call: seconds, or a rate
    "single_stream": SLEEP,
    "multi_stream": SLEEP,  # 8 samples in one call
    "offline": 8 / SLEEP,
    "server": None,  # as LoadGen was told
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_short_run_is_valid_and_measures_the_known_time(scenario, tmp_path):
    make = Sleeper()
    report = measured(scenario, tmp_path, make)
    assert (report["valid"], report["why"], report["profile"]) == (True, "", "short")
    assert report["loadgen"]["result_validity"] == "VALID"
    assert report["loadgen"]["errors"] == []
    value, expected = report["metric"]["value"], EXPECTED[scenario]
    if scenario == "server":
        assert value == pytest.approx(report["rate"]["told"], rel=0.3)  # 64 Poisson arrivals of a fixed seed
        assert report["rate"]["told"] == pytest.approx(0.5 / SLEEP, rel=SLOWER - 1)
    else:
        fast, slow = sorted((expected, expected * SLOWER if report["metric"]["unit"] == "s" else expected / SLOWER))
        assert fast <= value <= slow
    check = report["cross_check"]
    assert check["agree"]
    assert check["ours_mean_s"] == pytest.approx(check["loadgen_mean_s"], rel=0.05)
    sizes = {len(call) for call in make.calls}
    assert sizes == ({1} if scenario in ("single_stream", "server") else {8}) or scenario == "offline"
    assert max(sizes) == (1 if scenario in ("single_stream", "server") else 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((SUMMARY, DETAIL))
    json.dumps(report, allow_nan=False)


def test_a_query_larger_than_the_batch_takes_several_calls(tmp_path):
    report = measured("multi_stream", tmp_path, make := Sleeper(0.002), batch=3)
    assert {len(call) for call in make.calls} == {2, 3}
    assert report["valid"]
    assert report["metric"]["value"] >= 3 * 0.002


def test_the_seed_decides_the_order_of_samples(tmp_path):
    orders = []
    for number, changes in enumerate(((), (), ("sample_index_rng_seed=1",))):
        (folder := tmp_path / str(number)).mkdir()
        measured("single_stream", folder, make := Sleeper(0.001), "min_duration=0", *changes)
        orders.append(make.calls[3:67])  # after the pictures to warm up
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_profile_mlperf_is_mlperf_conf(scenario):
    """Against the numbers above, and against the mlperf.conf in LoadGen's wheel."""
    import mlperf_loadgen

    rules = read_rules("mlperf", scenario)
    assert rules.numbers == mlperf(scenario)
    assert rules.profile == "mlperf"
    theirs = mlperf_loadgen.TestSettings()
    assert theirs.FromConfig("", "stable-diffusion-xl", SCENARIOS[scenario].loadgen, 0) == 0
    ours = rules.settings(scenario, 1.0)
    ours.pop(SCENARIOS[scenario].rate)
    assert len(ours) == len(mlperf(scenario))
    assert {name: getattr(theirs, name) for name in ours} == pytest.approx(ours, rel=1e-12)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_loadgen_takes_the_numbers_of_mlperf(scenario, tmp_path):
    """As its own log says before the first query; the run, of ten minutes, ends with the pipeline's error."""
    calls = 0

    def make(numbers, prompts):
        nonlocal calls
        calls += 1
        if calls <= 3:  # to warm up
            return [None] * len(prompts)
        end = time.monotonic() + 10
        while "effective_sample_concatenate_permutation" not in (tmp_path / DETAIL).read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        raise NumericsError("enough was seen")

    rules, prompts = read_rules("mlperf", scenario), [f"prompt {k}" for k in range(5000)]
    with pytest.raises(NumericsError, match="enough was seen"):
        measure(scenario, rules, prompts, Subject(make=make, batch=8), tmp_path, target_qps=1.0)
    logs = read_logs(tmp_path)
    for key, number in mlperf(scenario).items():
        name, scale = EFFECTIVE[key]
        if (scenario, key) == ("offline", "min_query_count"):  # the one query has at least so many samples
            assert logs.detail("effective_min_sample_count") == number
        else:
            assert float(logs.detail(name)) == pytest.approx(number * scale, rel=1e-9), key
    assert EFFECTIVE.keys() == RULES.keys()


def test_a_changed_number_takes_the_word_away():
    assert read_rules("mlperf", "server", ["min_duration=600000"]).profile == "mlperf"
    for key, number in mlperf("server").items():
        assert read_rules("mlperf", "server", [f"{key}={number - 1}"]).profile == f"custom (mlperf with {key} changed)"
    changed = read_rules("short", "server", ["target_latency=5", "min_query_count=50"])
    assert changed.profile == "custom (short with target_latency, min_query_count changed)"
    assert changed.numbers["target_latency"] == 5


REFUSED = {
    ("short", "sever"): "unknown scenario 'sever'.*Did you mean 'server'",
    ("mlpref", "server"): "unknown profile 'mlpref'.*Did you mean 'mlperf'",
    ("short", "server", "min_durations=1"): "unknown number .* 'min_durations'.*Did you mean 'min_duration'",
    ("short", "offline", "samples_per_query=4"): "unknown number of the scenario offline 'samples_per_query'",
    ("short", "server", "min_duration"): "'min_duration' is not KEY=NUMBER",
    ("short", "server", "min_duration=1.5"): "min_duration=1.5 is not allowed: a whole number",
    ("short", "server", "min_query_count=1"): "min_query_count=1 is not allowed: a whole number, 2 to",
    ("short", "server", "target_latency_percentile=nan"): "is not allowed: a number, 1 to 99.99",
    ("short", "server", "min_duration=1", "min_duration=2"): "min_duration is given twice",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_is_refused(words, command, tmp_path):
    profile, scenario, *changes = words
    more = [word for change in changes for word in ("--set", change)]
    with pytest.raises(UsageError, match=f"^[^\n]*{REFUSED[words]}[^\n]*$"):
        command(tmp_path / "artifact", "--profile", profile, "--scenario", scenario, *more)


def test_mlperf_wants_its_number_of_prompts(command, tmp_path):
    (few := tmp_path / "few.txt").write_text("a\nb\n")
    words = [tmp_path / "artifact", "--profile", "mlperf", "--scenario", "offline", "--prompts", few]
    with pytest.raises(UsageError, match=r"^2 prompts are fewer than the 5000 .*--set performance_sample_count_overr"):
        command(*words)
    (gap := tmp_path / "gap.txt").write_text("a\n\nb\n")
    with pytest.raises(UsageError, match="empty line, 2"):
        read_prompts(gap)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    assert read_prompts(few) == ("a", "b")


INVALID = {
    ("server", "target_latency=1"): "Reduce target QPS",
    ("single_stream", "min_query_count=10", "min_duration=0"): "early stopping.*Need to process at least 64 queries",
}


@pytest.mark.parametrize("words", INVALID, ids=" ".join)
def test_loadgen_alone_says_what_is_invalid(words, tmp_path):
    scenario, *changes = words
    report = measured(scenario, tmp_path, Sleeper(0.005), *changes)
    assert not report["valid"]
    assert re.search(INVALID[words], report["why"])
    assert "\n" not in report["why"]


def test_an_audit_config_in_the_working_folder_changes_nothing(tmp_path, monkeypatch):
    """LoadGen by itself would take its numbers from there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.config").write_text("*.*.min_query_count = 7\n*.*.min_duration = 0\n")
    (out := tmp_path / "out").mkdir()
    report = measured("single_stream", out, Sleeper(0.001), "min_duration=0")
    assert report["loadgen"]["result_query_count"] == 64
    assert "audit" not in (out / DETAIL).read_text().lower()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_loadgen_that_does_not_obey_is_found_out(scenario, tmp_path):
    """Its log against rules with another number."""
    measured(scenario, tmp_path, Sleeper(0.001), "min_duration=50")
    logs, rules = read_logs(tmp_path), read_rules("short", scenario, ["min_duration=50"])
    rules.check_obeyed(scenario, logs, len(PROMPTS))
    for key, number in rules.numbers.items():
        other = dataclasses.replace(rules, numbers={**rules.numbers, key: number * 1000 + 1})
        with pytest.raises(LoadgenError, match=f"told {key} "):
            other.check_obeyed(scenario, logs, len(PROMPTS))


def test_loadgen_that_dies_is_no_hang(tmp_path):
    calls = 0

    def make(numbers, prompts):
        nonlocal calls
        calls += 1
        if calls == 5:
            psutil.Process().children()[0].kill()
        return [None] * len(prompts)

    with pytest.raises(LoadgenError, match="ended with -9"):
        measured("single_stream", tmp_path, make, target_qps=100.0)
    assert psutil.Process().children() == []


@pytest.mark.parametrize("error", [NumericsError("the picture is black"), KeyboardInterrupt()], ids=repr)
def test_an_error_ends_a_run_of_ten_minutes_at_once(error, tmp_path):
    calls = 0

    def make(numbers, prompts):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise error
        return [None] * len(prompts)

    start = time.monotonic()
    with pytest.raises(type(error), match=str(error)):
        measured("server", tmp_path, make, "min_duration=600000", target_qps=20.0)
    assert time.monotonic() - start < 10
    assert psutil.Process().children() == []


def test_pictures_that_are_missing_are_an_error(tmp_path):
    with pytest.raises(LoadgenError, match="8 prompts gave 7 pictures"):
        measured("multi_stream", tmp_path, lambda numbers, prompts: [None] * 7, target_qps=100.0)


@pytest.fixture(scope="module")
def pipeline(tiny_artifact):
    from intaglio.runtimes.pipeline import load

    with_engines = load(tiny_artifact.folder, threads=1)
    yield with_engines
    with_engines.close()


@pytest.mark.parametrize("scheduler", [None, "euler_a"])
def test_a_sample_is_the_same_picture_in_any_batch(pipeline, scheduler, monkeypatch):
    """Also where the scheduler draws noise of its own at every step."""
    monkeypatch.setattr(pipeline, "request", functools.partial(pipeline.request, scheduler=scheduler))
    subject = subject_of(pipeline, steps=2, seed=7)
    assert subject.batch == 8
    together = subject.make((3, 0, 4), [PROMPTS[n] for n in (3, 0, 4)])
    for number, picture in zip((3, 0, 4), together, strict=True):
        alone = pipeline(PROMPTS[number], seed=7 + number, num_inference_steps=2).images[0]
        difference = np.abs(np.asarray(picture, np.int16) - np.asarray(alone, np.int16)).max()
        assert difference <= BATCH_TOLERANCE
    assert np.asarray(together[0]).std() > 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_artifact_runs_valid(scenario, tiny_artifact, command, tmp_path, capsys):
    words = ["--scenario", scenario, "--steps", 1, "--threads", 1, "--json", "-o", tmp_path / "out"]
    for _ in range(3):  # what else runs here may come between LoadGen's clock and ours, which the verb then says
        code = command(tiny_artifact.folder, *words)
        captured = capsys.readouterr()
        if not any(words in captured.err for words in ("repeat on an idle machine", "Increase expected QPS")):
            break
        shutil.rmtree(tmp_path / "out")
    report = json.loads(captured.out)
    assert (code, captured.err) == (0, ""), report["why"]
    assert report == json.loads((tmp_path / "out" / REPORT).read_text(encoding="utf-8"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted((REPORT, SUMMARY, DETAIL))
    assert "Result is : VALID" in (tmp_path / "out" / SUMMARY).read_text()
    assert report["artifact"]["digest"] == tiny_artifact.manifest.digest
    assert report["machine"]["cpu"]["cores"]
    assert report["metric"]["value"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_of_the_pipeline_is_its_message_and_leaves_nothing(tiny_artifact, command, tmp_path, monkeypatch):
    from intaglio.runtimes.sd import StableDiffusion

    decode, calls = StableDiffusion.decode, 0

    def failing(self, *arguments):
        nonlocal calls
        calls += 1
        if calls > 6:
            raise NumericsError("vae_decoder returned NaN")
        return decode(self, *arguments)

    monkeypatch.setattr(StableDiffusion, "decode", failing)
    words = ["--scenario", "single_stream", "--steps", 1, "--threads", 1, "-o", tmp_path / "out"]
    with pytest.raises(NumericsError, match=r"^vae_decoder returned NaN$"):
        command(tiny_artifact.folder, *words)
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_run_is_kept_and_says_why(tiny_artifact, command, tmp_path, capsys):
    words = ["--scenario", "server", "--set", "target_latency=1", "--steps", 1, "--threads", 1, "-o", tmp_path / "out"]
    assert command(tiny_artifact.folder, *words) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("server, custom (short with target_latency changed): INVALID\n")
    assert captured.err.startswith("INVALID: Reduce target QPS")
    assert captured.err.count("\n") == 1
    assert not json.loads((tmp_path / "out" / REPORT).read_text(encoding="utf-8"))["valid"]
    with pytest.raises(UsageError, match="exists; choose another name"):
        command(tiny_artifact.folder, *words)
