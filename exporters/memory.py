"""``--max-memory``: what each stage of a build will hold for itself, said before it starts.

Private memory counts (anonymous and shared), not pages of mapped files, which the kernel may drop: weights are read
tensor by tensor. The constants are a little above what `make evidence large` measured at 11.9 billion parameters; what
a build really held is in ``build.json``, with a remark where that was more than its limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from intaglio.exporters.component import Component
from intaglio.exporters.recipes import needs_feeds
from intaglio.profiles.errors import UsageError
from intaglio.runtimes.host_memory import available_bytes

if TYPE_CHECKING:
    from intaglio.exporters.plan import Plan
    from intaglio.profiles.recipe import ComponentRecipe

MIB, GIB = 2**20, 2**30
LIBRARIES = 640 * MIB  # torch, diffusers, transformers, onnx and the traced graph of 57 blocks: 480 to 590 measured
TENSOR = 1.0  # times the largest weight in float32: its codes, the next one's, and tiles; 0.7 measured in int4
WHOLE_TENSOR = 4.0  # the same where it is smoothed, searched or split as a whole
LAYER = 5.0  # the same while it is compared: decoded codes, torch's copy, the segment's; 2.5 to 5.4 measured
ACTIVATIONS = 200 * MIB  # of the comparison's few tokens
WHOLE = 1.4  # times a component in float32, where it must be run whole
PLANS = 2.5  # the same, where TensorRT builds its plan


def weights_of(plan: Plan, component: Component) -> list[int]:
    """Number of elements of each parameter of a component, from the headers."""
    import re

    kept = plan.checkpoint.weights(component.source).renamed(component.rename).items()
    return [math.prod(p.shape) for name, p in kept if not re.search(component.ignore, name)]


def stage_bytes(plan: Plan) -> dict[str, int]:
    """What each stage is expected to hold, in bytes of private memory; what a stage does in parts is not the whole."""
    found: dict[str, int] = {}
    for component in plan.components:
        rows = component_bytes(plan, component, plan.recipe[component.name])
        found.update({f"{component.name}: {stage}": size for stage, size in rows.items()})
    return found


def component_bytes(plan: Plan, component: Component, recipe: ComponentRecipe) -> dict[str, int]:
    """The same of one component's stages, with this recipe."""
    sizes, parts = weights_of(plan, component), compare_limit(plan)
    largest, total = 4 * max(sizes, default=0), 4 * sum(sizes)
    in_parts = parts is not None and total > parts
    found = {
        "write": LIBRARIES + int((WHOLE_TENSOR if recipe.rank or needs_feeds(recipe) else TENSOR) * largest),
        "compare with torch": LIBRARIES + ACTIVATIONS + (int(LAYER * largest) if in_parts else int(2 * WHOLE * total)),
    }
    if "openvino" in plan.targets:  # it maps the graph's data and writes from there: 170 MiB at 11.9 billion parameters
        found["openvino"] = LIBRARIES
    if "tensorrt" in plan.targets:
        found["tensorrt"] = LIBRARIES + int(PLANS * total)
    for what in whole_components(plan).get(component.name, ()):
        found[what] = LIBRARIES + int(WHOLE * total)
    return found


def whole_components(plan: Plan) -> Mapping[str, tuple[str, ...]]:
    """Components that a stage can only run whole, with the stage's name."""
    from intaglio.exporters.plan import audited

    return dict.fromkeys(audited(plan), ("audit float16 ranges",))


def compare_limit(plan: Plan) -> int | None:
    """Bytes of float32 weights up to which a component is compared whole; ``None``: any."""
    if plan.memory is not None:
        return max(int((plan.memory - LIBRARIES - ACTIVATIONS) / (2 * WHOLE)), 1)
    available = available_bytes()
    return None if available is None else int(available / (2 * WHOLE))


def check_memory(plan: Plan) -> None:
    """Refuse a limit that some stage cannot keep.

    Raises:
        UsageError: with the stage, what it takes and the least limit that is enough.
    """
    if plan.memory is None:
        return
    stages = stage_bytes(plan)
    stage = max(stages, key=lambda name: stages[name])
    if stages[stage] > plan.memory:
        least = math.ceil(stages[stage] / (100 * MIB)) * 100
        raise UsageError(
            f"--max-memory {plan.memory / GIB:.2f}GiB is not enough for the stage {stage!r}, which takes about "
            f"{stages[stage] / GIB:.2f} GiB; give --max-memory {least}MiB or more"
        )
