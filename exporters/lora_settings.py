"""PEFT's settings of a LoRA: what its scale is, where the file's tensors do not say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.exporters.config_files import read_json
from intaglio.exporters.weights import read_header, read_metadata
from intaglio.profiles.errors import CheckpointError, Unsupported
from intaglio.profiles.paths import check_file, link_roots

PEFT_METADATA = "lora_adapter_metadata"  # where diffusers writes PEFT's settings in a safetensors header
PEFT_CONFIG = "adapter_config.json"  # where PEFT itself writes them, beside the file
# Starts of training that take their first product out of the model's own weights, which the file does not have.
CHANGED_BASE = r"^(pissa|olora|corda|loftq)"


def peft_settings(path: Path) -> tuple[dict[str, dict[str, Any]], Path | None]:
    """PEFT's settings of a file by component, and the file they are in, where they are not in the file itself.

    diffusers writes them into the header, as ``COMPONENT.lora_alpha``; PEFT writes ``adapter_config.json``.

    Raises:
        CheckpointError: they cannot be read.
        Unsupported: they say that it is more than a LoRA.
    """
    config = path.parent / PEFT_CONFIG
    stated, source = read_metadata(path).get(PEFT_METADATA), None
    if stated is None and config.is_file() and any(k.startswith("base_model.model.") for k in read_header(path)):
        check_file(config, CheckpointError, link_roots(path.parent))
        stated, source = json.dumps(read_json(config)), config
    if stated is None:
        return {}, None
    try:
        flat: dict[str, Any] = dict(json.loads(stated))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source or path}: PEFT's settings cannot be read ({error})") from error
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, dot, name = key.partition(".")
        for component in (part,) if dot else ("unet", "transformer"):  # of a model that was saved alone
            by_part.setdefault(component, {})[name if dot else key] = value
    for settings in by_part.values():
        if "lora_alpha" not in settings:
            raise CheckpointError(f"{source or path}: PEFT's settings have no lora_alpha")
        if settings.get("lora_bias"):
            raise Unsupported(f"{path} is a LoRA with lora_bias, which cannot be fused; allowed: LoRA, LoCon and DoRA")
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and re.match(CHANGED_BASE, start.lower()):
            raise Unsupported(
                f"{path} was trained from init_lora_weights {start}, which changes the model's weights too"
            )
    return by_part, source


def scale_of(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Alpha over rank of a layer, or over its root (https://arxiv.org/abs/2312.03732), as PEFT's settings say."""
    patterns = dict(settings.get("alpha_pattern") or {})
    own = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), None)  # as PEFT's `get_pattern_key`
    value = float(patterns[own] if own is not None else settings["lora_alpha"])
    return value / math.sqrt(rank) if settings.get("use_rslora") else value / rank
