"""Tensors of a safetensors file as views of its pages: nothing is copied before it is worked on.

The library's own reader copies each tensor into memory of its own. It still checks every header (`read_header`): that
tensors lie behind one another without gaps, inside the file, and have the bytes that dtype and shape imply.
"""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path

import numpy as np

FLOATS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16"}
NARROW = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "?"}
SIGNED, UNSIGNED = ({f"{kind.upper()}{8 * size}": f"{kind}{size}" for size in (1, 2, 4, 8)} for kind in ("i", "u"))
DTYPES = {**FLOATS, **NARROW, **SIGNED, **UNSIGNED}


def mapped(file: Path, key: str) -> np.ndarray:
    """One tensor of a file whose header was checked, read-only, in its own dtype (``ml_dtypes`` beyond NumPy's).

    The file is mapped anew each time, so that its pages stop counting for the process once the array is gone. Format:
    eight bytes with the header's length, the header as JSON, the tensors (huggingface.co/docs/safetensors).
    """
    facts = file.stat()
    start, rows = _offsets(file, facts.st_mtime_ns, facts.st_size)
    dtype, shape, (begin, end) = rows[key]
    if begin == end:
        return np.empty(shape, dtype)
    pages = np.memmap(file, np.uint8, "r", offset=start + begin, shape=(end - begin,))
    return pages.view(np.ndarray).view(dtype).reshape(shape)


@functools.lru_cache(maxsize=64)
def _offsets(
    file: Path, changed: int, size: int
) -> tuple[int, dict[str, tuple[np.dtype, tuple[int, ...], tuple[int, int]]]]:
    import ml_dtypes  # noqa: F401  gives NumPy bfloat16 and float8 by name

    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    rows = {k: (np.dtype(DTYPES[r["dtype"]]), tuple(r["shape"]), tuple(r["data_offsets"])) for k, r in header.items()}
    return 8 + length, rows
