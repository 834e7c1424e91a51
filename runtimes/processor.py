"""What the processor's integer products do, where engines do not say so themselves."""

from __future__ import annotations

import platform
from pathlib import Path

CPU_FACTS, X64, DOT_PRODUCTS = Path("/proc/cpuinfo"), ("x86_64", "AMD64"), {"avx512_vnni", "avx_vnni"}


def dot_products() -> bool:
    """Whether an x64 processor adds int8 products in 32 bits (VNNI); False where that is not known."""
    if platform.machine() not in X64:
        return False
    try:
        return bool(DOT_PRODUCTS & set(CPU_FACTS.read_text(encoding="utf-8").split()))
    except OSError:
        return False


def products_saturate() -> bool:
    """Whether int8 products may saturate at 16 bits: x64 processors without VNNI, or not known.

    Without it u8 x s8 is VPMADDUBSW, which adds two products in 16 bits (Intel's instruction set reference).
    """
    return platform.machine() in X64 and not dot_products()
