"""MLPerf's four scenarios: their metrics, the rules of a run, and the run itself.

The rules are numbers in ``mlperf.toml``, in mlperf.conf's own keys and units. LoadGen alone says whether a run was
VALID; that it obeyed the rules is read from its log.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.bench.loadgen import LoadgenError, Logs, Subject, Task, play, read_logs
from intaglio.bench.statistics import PERCENTILES, percentile_needs
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import pick

PROFILES = ("short", "mlperf")
WARM = 2  # timed queries after an untimed first one
AGREE, FLOOR = 0.05, 1e-3  # share, or seconds, within which our mean latency is LoadGen's; the pipe takes 2e-4
NOTE = (
    "LoadGen's rules of a benchmark are not the benchmark: model, prompts and steps are the user's, accuracy was not "
    "checked, and MLCommons has not verified the result"
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One of LoadGen's.

    Attributes:
        loadgen: its name there.
        metric: what it reports, with the rules' numbers in it, and the `unit`.
        line: how the metric's name ends in LoadGen's summary, in nanoseconds, which alone has every percentile; or its
            key (``result_…``) in the detail log, which has more digits.
        rate: the attribute of LoadGen's settings for the expected rate, or where it ends in ``_ns`` its inverse.
        share: of the measured rate that LoadGen is told. Above 1 it prepares more than enough queries; the server's
            leaves room for queries that come together.
        batched: whether samples of a query may share a call.
    """

    loadgen: str
    metric: str
    unit: str
    line: str
    rate: str
    share: float
    batched: bool

    def value(self, logs: Logs) -> float:
        """The metric in its unit."""
        found = logs.detail(self.line) if self.line.startswith("result_") else int(logs.summary(self.line)) / 1e9
        return float(found)


PERCENTILE_LINE = "th percentile latency (ns)"
SCENARIOS = {
    "single_stream": Scenario(
        "SingleStream",
        "latency of a query, percentile {target_latency_percentile:g}",
        *("s", PERCENTILE_LINE, "single_stream_expected_latency_ns", 2.0, False),
    ),
    "multi_stream": Scenario(
        "MultiStream",
        "latency of a query of {samples_per_query} samples, percentile {target_latency_percentile:g}",
        *("s", PERCENTILE_LINE, "multi_stream_expected_latency_ns", 2.0, True),
    ),
    "offline": Scenario(
        "Offline", "samples a second", *("1/s", "result_samples_per_second", "offline_expected_qps", 2.0, True)
    ),
    "server": Scenario(
        "Server",
        "queries a second as scheduled, percentile {target_latency_percentile:g} within {target_latency} ms",
        *("1/s", "result_scheduled_samples_per_sec", "server_target_qps", 0.5, False),
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A number of mlperf.conf: its names in LoadGen's settings and in its detail log, there `scale` times as large."""

    attribute: str
    effective: str
    least: float
    most: float
    scale: float = 1


RULES = {
    "min_duration": Rule("min_duration_ms", "effective_min_duration_ms", 0, 2**40),
    "min_query_count": Rule("min_query_count", "effective_min_query_count", 2, 2**40),
    "performance_sample_count_override": Rule(
        "performance_sample_count_override", "effective_performance_sample_count", 0, 2**40
    ),
    "samples_per_query": Rule("multi_stream_samples_per_query", "effective_samples_per_query", 1, 2**20),
    "target_latency": Rule("server_target_latency_ns", "effective_target_latency_ns", 1, 2**40, scale=10**6),
    "target_latency_percentile": Rule(
        "{scenario}_target_latency_percentile", "effective_target_latency_percentile", 1, 99.99, scale=0.01
    ),
    **{
        f"{of}_rng_seed": Rule(f"{of}_rng_seed", f"effective_{of}_rng_seed", 0, 2**64 - 1)
        for of in ("qsl", "sample_index", "schedule")
    },
}


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers of a run, by mlperf.conf's keys, and the name that a report may give them."""

    profile: str
    numbers: Mapping[str, float]

    def settings(self, scenario: str, rate: float) -> dict[str, float]:
        """Attributes of LoadGen's settings; `rate` is what it is told to expect, in queries (offline: samples)/s."""
        told = {RULES[k].attribute.format(scenario=scenario): v * RULES[k].scale for k, v in self.numbers.items()}
        name = SCENARIOS[scenario].rate
        return {**told, name: 1e9 / rate if name.endswith("_ns") else rate}

    def check_prompts(self, count: int) -> None:
        """Refuse fewer prompts than the rules want, of which LoadGen itself would say nothing.

        Raises:
            UsageError: with the ways out.
        """
        key = "performance_sample_count_override"
        if count < self.numbers[key]:
            raise UsageError(
                f"{count} prompts are fewer than the {self.numbers[key]} of profile {self.profile} ({key}); give more "
                f"with --prompts FILE, or --set {key}=0 for as many as there are"
            )

    def check_obeyed(self, scenario: str, logs: Logs, prompts: int) -> None:
        """Compare the numbers with those that LoadGen's detail log calls effective.

        Raises:
            LoadgenError: one differs.
        """
        for key, number in self.numbers.items():
            name, wanted = RULES[key].effective, number * RULES[key].scale
            used = float(logs.detail(name))
            if scenario == "offline" and key == "min_query_count":  # there is one query; this many samples or more
                used = min(wanted, float(logs.detail("effective_min_sample_count")))
            if key == "performance_sample_count_override" and not number:
                wanted = prompts
            if not math.isclose(used, wanted, rel_tol=1e-6):
                raise LoadgenError(f"LoadGen was told {key} {number} and its log says {name} {used:g}")


def read_rules(profile: str, scenario: str, changes: Sequence[str] = ()) -> Rules:
    """The numbers of a profile of ``mlperf.toml`` with ``KEY=NUMBER`` changes.

    Raises:
        UsageError: an unknown profile, scenario or key, or a number that is not allowed.
    """
    pick(SCENARIOS, scenario, "scenario")
    pick(dict.fromkeys(PROFILES), profile, "profile")
    table = tomllib.loads(Path(__file__).with_name("mlperf.toml").read_text(encoding="utf-8"))[profile]
    numbers: dict[str, float] = {**table["all"], **table[scenario]}
    asked: dict[str, float] = {}
    for text in changes:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r} is not KEY=NUMBER; for example --set min_duration=60000")
        pick(numbers, key, f"number of the scenario {scenario}")
        if key in asked:
            raise UsageError(f"--set {key} is given twice; say it once")
        asked[key] = read_number(key, value)
    changed = ", ".join(key for key, value in asked.items() if value != numbers[key])
    return Rules(f"custom ({profile} with {changed} changed)" if changed else profile, {**numbers, **asked})


def read_number(key: str, text: str) -> float:
    """The value of a rule.

    Raises:
        UsageError: it is not a number (a percentile may have decimals) or outside the rule's bounds.
    """
    rule, kind = RULES[key], float if RULES[key].scale < 1 else int
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not rule.least <= value <= rule.most:
        word = "a number" if kind is float else "a whole number"
        raise UsageError(f"--set {key}={text} is not allowed: {word}, {rule.least} to {rule.most}")
    return value


def warm_rate(scenario: str, subject: Subject, prompts: Sequence[str], rules: Rules) -> float:
    """Queries (offline: samples) a second that this makes, from the median of WARM queries after an untimed one."""
    count = {"multi_stream": int(rules.numbers.get("samples_per_query", 1)), "offline": subject.batch}.get(scenario, 1)
    numbers = [k % len(prompts) for k in range(count)]
    seconds = []
    for _ in range(1 + WARM):
        start = time.perf_counter()
        for first in range(0, count, subject.batch):
            part = numbers[first : first + subject.batch]
            subject.make(part, [prompts[n] for n in part])
        seconds.append(time.perf_counter() - start)
    return (count if scenario == "offline" else 1) / statistics.median(seconds[1:])


def measure(
    scenario: str,
    rules: Rules,
    prompts: Sequence[str],
    subject: Subject,
    folder: Path,
    *,
    target_qps: float | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Run one scenario; LoadGen's logs are then in `folder`.

    Args:
        scenario: a name from SCENARIOS.
        rules: of that scenario.
        prompts: one a sample.
        subject: makes the pictures.
        folder: exists.
        target_qps: queries (offline: samples) a second that LoadGen is to expect, or for the server to send; where
            not given it follows from a few pictures made before.
        tell: is given the number of samples done.

    Returns:
        Plain data: seconds, and LoadGen's own figures as its log has them.

    Raises:
        UsageError: there are fewer prompts than the rules want.
        LoadgenError: see `play` and `Rules.check_obeyed`. What `subject` raises passes through.
    """
    rules.check_prompts(len(prompts))
    row = SCENARIOS[scenario]
    subject = subject if row.batched else dataclasses.replace(subject, batch=1)
    measured = warm_rate(scenario, subject, prompts, rules)
    rate = target_qps or measured * row.share
    task = Task(scenario=row.loadgen, settings=rules.settings(scenario, rate), samples=len(prompts))
    latencies = play(task, prompts, subject, folder, tell)
    logs = read_logs(folder)
    rules.check_obeyed(scenario, logs, len(prompts))
    ours, theirs = statistics.fmean(latencies), float(logs.detail("result_mean_latency_ns")) / 1e9
    return {
        "scenario": scenario,
        "profile": rules.profile,
        "valid": logs.valid,
        "why": logs.why,
        "metric": {
            "name": row.metric.format(**rules.numbers),
            "unit": row.unit,
            "value": row.value(logs),
        },
        "latency_s": spread(latencies),
        "cross_check": {
            "ours_mean_s": ours,
            "loadgen_mean_s": theirs,
            "agree": abs(ours - theirs) <= max(AGREE * theirs, FLOOR),
        },
        "loadgen": logs.figures(),
        "settings": dict(rules.numbers),
        "rate": {"told": rate, "measured": measured, "from": "measured" if target_qps is None else "target-qps"},
        "prompts": len(prompts),
        "batch": subject.batch,
        "note": NOTE,
    }


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Number, mean, median, extremes, and the percentiles that there are enough of."""
    values = np.asarray(seconds)
    found = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES if values.size >= percentile_needs(p)}
    centre = {"mean": float(values.mean()), "median": float(np.median(values))}
    return {"n": int(values.size), **centre, "least": float(values.min()), "most": float(values.max()), **found}
