"""The figures on file of killed, resumed, replaced and verified artifacts hold what the project promises of them."""

from __future__ import annotations

import json

import pytest

from intaglio.bench.evidence import FOLDER, ROOT
from intaglio.bench.evidence_rot import COMPONENTS, LARGE_BYTES

FILE = ROOT / FOLDER / "rot.json"
KILLS, AT_RANDOM = 200, 20
GENERATIONS, REPLACEMENTS = 1000, 20
VERIFICATION = 1.1  # of hashing the same files


@pytest.fixture(scope="module")
def figures():
    if not FILE.exists():
        pytest.skip("evidence 'rot' is missing; run: make evidence rot")
    return json.loads(FILE.read_text(encoding="utf-8"))["figures"]


def test_no_kill_left_anything_but_the_old_or_the_complete_artifact(figures):
    kills = figures["kills"]
    assert kills["wrong"] == []
    assert kills["kills"] >= KILLS
    assert sum(n for state, n in kills["at_random_times"].items() if state.endswith("killed")) >= AT_RANDOM
    for kind in ("at_each_change", "at_random_times"):
        assert set(kills[kind]) <= {f"{s}, {e}" for s in ("absent", "old", "complete") for e in ("killed", "was over")}
    assert {"absent, killed", "old, killed", "complete, killed"} <= set(kills["at_each_change"])
    assert kills["next_run_resumed"] > 0


def test_finished_components_are_taken_up_and_the_digest_is_the_same(figures):
    assert [row["killed_in"] for row in figures["resumed"]] == list(COMPONENTS)
    for row in figures["resumed"]:
        assert row["signal"] == 9
        assert row["resumed"] == row["finished"]
        assert row["same_digest"]


def test_no_generation_failed_or_mixed_weights_while_the_artifact_was_replaced(figures):
    swap = figures["hot_swap"]
    assert swap["failed"] == []
    assert set(swap["pictures"]) == {"a", "b"}
    assert sum(swap["pictures"].values()) == swap["generations"] >= GENERATIONS
    assert swap["replacements"] >= REPLACEMENTS
    assert swap["left"] == []


def test_verification_costs_what_hashing_costs(figures):
    found = figures["verification"]
    assert found["bytes"] >= LARGE_BYTES
    assert found["verify_of_hashing"] <= VERIFICATION
    again = found["seconds"]["open_again"] - found["seconds"]["read_manifest"]
    assert again < found["seconds"]["hashing"] / 5, "what was verified is not hashed again"
