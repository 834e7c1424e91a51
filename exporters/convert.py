"""``intaglio convert``: a pickled checkpoint into safetensors, without running what a pickle can carry.

The pickle is read in a process of its own by torch's restricted unpickler (``weights_only``), which knows tensors and
plain containers; whatever else it names is refused, except for classes of training frameworks that are known to lie
beside the weights and are replaced by something empty.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.exporters.weights import PICKLES, read_header
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import CheckpointError, UsageError
from intaglio.profiles.registry import need

# Objects that trainers save beside the weights. Nothing of them is needed: each becomes an empty stand-in.
STAND_INS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
HEADROOM = 1 << 30  # bytes that the output may have beyond the input, for tensors that share memory in the pickle
CHILD = "from intaglio.exporters.convert import child; child()"
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def convert(source: str | Path, output: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Write the tensors of a pickle as safetensors, whole or not at all.

    Args:
        source: ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` or ``.pkl``, written by ``torch.save``.
        output: ``.safetensors`` file.
        force: replace it if it exists.

    Returns:
        ``tensors``: their number; ``left_out``: names of what is no tensor; ``bytes``.

    Raises:
        UsageError: a name that cannot be, or an output that exists.
        CheckpointError: the pickle refers to something other than tensors, is damaged, or holds no tensor.
    """
    path, target = Path(source), Path(output)
    check_names(path, target, force=force)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        facts = _read_in_child(path, temporary)
        header = read_header(temporary)
        if sorted(header) != facts["names"]:
            raise CheckpointError(f"{path} was not converted whole; nothing was written")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0o022)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes for its owner alone
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {"tensors": len(header), "left_out": facts["left_out"], "bytes": target.stat().st_size}


def check_names(path: Path, target: Path, *, force: bool) -> None:
    """The input is a pickle and the output can be written.

    Raises:
        UsageError: with what is allowed.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; allowed: {', '.join(PICKLES)} written by torch.save")
    if path.suffix not in PICKLES:
        raise UsageError(f"{path} is not a pickle by its name; allowed: {', '.join(PICKLES)}")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target} is not named .safetensors; choose another output")
    if target.is_dir() or (target.exists() and not force):
        raise UsageError(f"{target} exists; choose another name or add --force to replace it")


def _read_in_child(path: Path, temporary: Path) -> dict[str, Any]:
    command = [sys.executable, "-P", "-c", CHILD, str(path.absolute()), str(temporary.absolute())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(f"{path} could not be read: {lines[-1]}") from None
    if "refused" in facts:
        raise CheckpointError(f"{path} {facts['refused']}; nothing was written")
    return facts


def child() -> None:
    """The process that reads: arguments are the pickle and the output; prints one line of JSON."""
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    limit_resources(source.stat().st_size)
    print(json.dumps(read_and_write(source, output)), flush=True)


def limit_resources(size: int) -> None:
    """No core dumps, no output much larger than the input, few open files."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * size + HEADROOM,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


class StandIn:
    """What is built instead of an object that is not needed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_and_write(source: Path, output: Path) -> dict[str, Any]:
    """Convert in this process; returns what `convert` needs to know, or ``{"refused": reason}``."""
    import pickle

    import torch
    from safetensors.torch import save_file

    stand_ins = [(type("StandIn", (StandIn,), {}), name) for name in STAND_INS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=_is_zip(source))
    except pickle.UnpicklingError as error:
        return {"refused": _reason(str(error))}
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        return {"refused": f"was not written by torch.save, or is damaged ({' '.join(str(error).split())[:100]})"}
    tensors, left_out = collect(loaded)
    if not tensors:
        return {"refused": "holds no tensor"}
    odd = sorted(n for n, t in tensors.items() if str(t.dtype).removeprefix("torch.") not in DTYPES or t.is_sparse)
    if odd:
        return {"refused": f"has {odd[0]} as {tensors[odd[0]].dtype}, which is not converted"}
    save_file(unshared(tensors), output, metadata={"format": "pt"})
    return {"names": sorted(tensors), "left_out": left_out}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(message: str) -> str:
    named = re.search(r"(?:GLOBAL|Unsupported (?:global|class)[: ]*(?:GLOBAL)?)\s*`?([\w.]+)", message)
    if named:
        return f"refers to {named[1]}, which is no tensor and could run code when it is read"
    detail = message.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or ["unknown"]
    return f"was not written by torch.save, or is damaged ({detail[0][:100]})"


def collect(loaded: Any) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a checkpoint by name, and the names of what else it has, ascending.

    A nested ``state_dict`` is the checkpoint; what lies beside it is left out.
    """
    import torch

    left_out: list[str] = []
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        left_out += [str(key) for key in loaded if key != "state_dict"]
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        return {}, left_out
    tensors = {str(k): v.detach() for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    left_out += [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    return tensors, sorted(left_out)


def unshared(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        result[name] = tensor if whole and place not in seen else tensor.clone().contiguous()
        seen.add(place)
    return result


def configure_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio convert``."""
    parser.add_argument("checkpoint", help=f"a pickle of tensors: {', '.join(PICKLES)}")
    parser.add_argument("-o", "--output", required=True, metavar="SAFETENSORS", help="file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run_convert(args: argparse.Namespace) -> int:
    """Convert and say what was left out."""
    for module in ("torch", "safetensors"):
        need(module, extra="export")
    facts = convert(args.checkpoint, args.output, force=args.force)
    if facts["left_out"]:
        say(f"note: left out, being no tensors: {', '.join(facts['left_out'])}")
    text = f"{args.output}: {facts['tensors']} tensors, {facts['bytes'] / 1e6:.1f} MB"
    print(json.dumps({"output": args.output, **facts}, indent=1) if args.json else text)
    return 0


CONVERT = Verb(configure_convert, run_convert)
