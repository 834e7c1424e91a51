"""Presets of the profiles: what a distillation wants of a request, and the schedule it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.checkpoint import write_config
from intaglio.exporters.parts import SCHEDULER
from intaglio.profiles.family import Preset, load_family
from intaglio.profiles.registry import pick

if TYPE_CHECKING:
    from intaglio.exporters.checkpoint import Checkpoint

# Part of the `options` of a family whose profile has presets.
OPTION: Mapping[str, str] = {
    "preset": "steps, guidance and schedule of a distillation whose weights are in the checkpoint or a fused LoRA"
}


def preset_of(checkpoint: Checkpoint, family: str) -> Preset | None:
    """The preset that ``--set FAMILY.preset=`` names, if it does.

    Raises:
        UsageError: there is none of this name.
    """
    name = checkpoint.options.get("preset")
    return None if name is None else pick(load_family(family).presets, name, f"{family}.preset")


def preset_settings(checkpoint: Checkpoint, family: str) -> dict[str, Any]:
    """What the preset says of steps, guidance and parameters; it comes before the checkpoint's own defaults."""
    preset = preset_of(checkpoint, family)
    return {} if preset is None else dict(preset.settings)


def write_preset_scheduler(checkpoint: Checkpoint, family: str, folder: Path) -> None:
    """The preset's scheduler in place of the checkpoint's in an artifact's `folder`, where the preset has one."""
    preset = preset_of(checkpoint, family)
    if preset is not None and preset.scheduler:
        write_config(preset.scheduler, folder / SCHEDULER)
