"""Which rows share a call of the denoiser: no more than allowed, and nothing that has to stay apart."""

from __future__ import annotations

import numpy as np
import pytest
from serve_stub import FEEDS, shape

from intaglio.profiles.spec import ComponentRecord, TensorSpec
from intaglio.runtimes.evaluation import Evaluation, batch_inputs, batches, height

INPUTS, OUTPUTS = FEEDS["unet"]
RECORD = ComponentRecord(
    source="unet",
    inputs=tuple(TensorSpec(name=n, dtype=d, shape=shape(s)) for n, d, s in INPUTS),
    outputs=tuple(TensorSpec(name=n, dtype="float32", shape=shape(s)) for n, s in OUTPUTS),
    parameters=0, format="none", targets=("onnx",), tensors={}, weights={},
)  # fmt: skip


def feeds(rows=1, side=8):
    return {
        "sample": np.zeros((rows, 16, side, side), np.float32),
        "timestep": np.zeros(rows, np.float32),
        "encoder_hidden_states": np.zeros((rows, 24, 160), np.float32),
    }


def guided(rows=1, *, together=True):
    return Evaluation(feeds=(feeds(rows), feeds(rows)), together=together)


ONE = Evaluation(feeds=(feeds(),))
CASES = {  # name -> (evaluations, limit, calls)
    "one row a call, with guidance too": ([guided()], 1, [[(0, 0)], [(0, 1)]]),
    "three branches in two rows": (
        [Evaluation(feeds=(feeds(),) * 3), ONE], 2, [[(0, 0), (0, 1)], [(0, 2), (1, 0)]],
    ),
    "those that are separate calls alone share here": (
        [guided(together=False), guided(together=False)], 8, [[(0, 0), (0, 1), (1, 0), (1, 1)]],
    ),
    "branches that fit stay together": ([ONE, guided(), ONE], 2, [[(0, 0), (2, 0)], [(1, 0), (1, 1)]]),
    "a branch that is too much by itself": ([guided(3), ONE], 2, [[(0, 0)], [(0, 1)], [(1, 0)]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_call_has_no_more_rows_than_allowed(name):
    wanted, limit, expected = CASES[name]
    found = batches(wanted, RECORD, limit)
    assert found == expected
    rows = [sum(height(wanted[n].feeds[b], batch_inputs(RECORD)) for n, b in batch) for batch in found]
    assert all(count <= limit or len(batch) == 1 for count, batch in zip(rows, found, strict=True))


def test_every_branch_runs_once_whatever_the_limit():
    wanted = [guided(), ONE, guided(together=False), Evaluation(feeds=(feeds(side=4), feeds())), guided(2)]
    places = {(n, b) for n, evaluation in enumerate(wanted) for b in range(len(evaluation.feeds))}
    for limit in range(1, 12):
        found = [place for batch in batches(wanted, RECORD, limit) for place in batch]
        assert len(found) == len(places)
        assert set(found) == places
