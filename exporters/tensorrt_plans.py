"""Kinds of TensorRT plans: with their weights, without, or with weights that can be exchanged; tried before promised.

A plan without weights is as small as its kernels, and one graph's data could serve every compute capability. Whether a
builder makes one is found out by making one, of a single product: TensorRT-RTX 1.7.1 compiles such plans on the GPU
that they are for and fails without it (``CHECK(status == CUDA_SUCCESS)``), though plans with weights need none.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from intaglio.profiles.errors import Unsupported
from intaglio.profiles.registry import pick
from intaglio.runtimes.tensorrt_api import load_api, make_logger

INSIDE = "inside"
KINDS = {INSIDE: "", "stripped": "STRIP_PLAN", "refit": "REFIT"}  # to the builder's flag
SIDE = 64  # of the product that is tried


def check_kind(kind: str, api: str, sm: str) -> None:
    """Refuse a kind of plan that is not made here.

    Raises:
        UsageError: there is no such kind.
        Unsupported: the builder refuses it; with its reason.
    """
    flag = pick(KINDS, kind, "tensorrt.weights")
    if not flag:
        return
    version, reason = tried(api, flag, sm)
    said = f"refuses it without that GPU: {reason}" if reason else "makes one, which is not loaded here yet"
    raise Unsupported(
        f"tensorrt.weights={kind} is not supported for {sm}: {api} {version} {said}; "
        f"use --set tensorrt.weights={INSIDE}"
    )


@functools.cache
def tried(api: str, flag: str, sm: str) -> tuple[str, str]:
    """The API's version and why it makes no plan with `flag` for `sm`; empty where it makes one."""
    trt = load_api(api)
    log = make_logger(trt)
    builder: Any = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    value = network.add_input("x", trt.float16, (SIDE, SIDE))
    weight = np.eye(SIDE, dtype=np.float16)
    constant = network.add_constant((SIDE, SIDE), trt.Weights(weight)).get_output(0)
    plain = trt.MatrixOperation.NONE
    network.mark_output(network.add_matrix_multiply(value, plain, constant, plain).get_output(0))
    config = builder.create_builder_config()
    if api == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, sm.upper()), 0)
    config.set_flag(getattr(trt.BuilderFlag, flag))
    if builder.build_serialized_network(network, config) is not None:
        return str(trt.__version__), ""
    return str(trt.__version__), " ".join(log.errors[-1].split()) if log.errors else "it gives no reason"
