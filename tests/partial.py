"""Artifacts of which only the components under test were built; the others come from one that was built before."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from intaglio.profiles.artifact import Artifact

QUICK = {"certificate.prompts": "0"}  # options of builds whose pictures nobody looks at


def build_only(checkpoint: Path, folder: Path, *names: str, **options: Any) -> Artifact:
    """Build these components alone; `options` are those of `build`."""
    import intaglio.exporters.build as module

    plan = module.make_plan

    def some(*args: Any, **more: Any) -> Any:
        made = plan(*args, **more)
        return dataclasses.replace(made, components=tuple(c for c in made.components if c.name in names))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_plan", some)
        return module.build(checkpoint, folder, **{**options, "options": {**QUICK, **options.get("options", {})}})


def completed(part: Artifact, whole: Artifact, *names: str) -> Artifact:
    """`part` with these components of `whole` copied in; its sums no longer fit, so it can be loaded as it is only."""
    for name in names:
        shutil.copytree(whole.component(name), part.component(name))
    ours, theirs = part.manifest, whole.manifest
    components = {**ours.components, **{name: theirs.components[name] for name in names}}
    contract = {**theirs.contract, **ours.contract}
    return dataclasses.replace(part, manifest=dataclasses.replace(ours, components=components, contract=contract))
