"""Compute dtypes per target and component: what was asked for with ``--dtype``, within what the contracts allow.

On a CPU, ONNX Runtime and OpenVINO compute in float32. TensorRT takes the contract's dtype. ``--dtype`` changes that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.profiles.family import Contract
from intaglio.profiles.registry import pick

NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
SHORT = {full: short for short, full in NAMES.items()}
CONTRACTS = "contract"  # stands for the dtype of the component's contract
DEFAULTS = {"onnx": "float32", "openvino": "float32", "tensorrt": CONTRACTS}
DENOISERS = ("unet", "transformer")


def parse_dtypes(values: Iterable[str], targets: Iterable[str]) -> dict[str, str]:
    """``["fp16", "tensorrt=bf16"]`` as target to dtype; without a target for all of them.

    Raises:
        UsageError: an unknown dtype, a target that is not built, or one given twice.
    """
    built = tuple(targets)
    everywhere: dict[str, str] = {}
    single: dict[str, str] = {}
    for value in (part.strip() for text in values for part in text.split(",")):
        target, equals, name = value.rpartition("=")
        if equals and target not in built:
            raise UsageError(f"--dtype {value!r} names {target!r}, which is not built; allowed: {', '.join(built)}")
        if target in single or (not equals and everywhere):
            raise UsageError(f"--dtype {value!r} says again what was said; give one dtype for each target")
        dtype = pick(NAMES, name, "dtype")
        if equals:
            single[target] = dtype
        else:
            everywhere = dict.fromkeys(built, dtype)
    return {**everywhere, **single}


def compute_dtypes(
    contracts: Mapping[str, Contract], targets: Iterable[str], asked: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Target to component to dtype, and remarks on components that stay in their contract's dtype.

    Raises:
        Unsupported: the denoiser's contract does not allow the dtype that was asked for; with its source.
    """
    result: dict[str, dict[str, str]] = {}
    remarks = []
    for target in targets:
        wanted = asked.get(target, DEFAULTS[target])
        result[target] = {}
        for component, contract in contracts.items():
            dtype = contract.dtype if wanted == CONTRACTS else wanted
            if dtype not in contract.allowed:
                words, where = ", ".join(SHORT[d] for d in contract.allowed), f"{SHORT[dtype]} on {target}"
                if component in DENOISERS:
                    raise Unsupported(f"{component} cannot compute in {where}; allowed: {words} ({contract.source})")
                remarks.append(f"{component} stays in {SHORT[contract.dtype]}, not {where}: {contract.source}")
                dtype = contract.dtype
            result[target][component] = dtype
    return result, remarks
