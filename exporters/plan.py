"""What a build will do, decided and checked before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from intaglio.exporters import additions
from intaglio.exporters.certificate import CERTIFICATE_OPTIONS, CertificateSettings, certificate_settings
from intaglio.exporters.checkpoint import Checkpoint, open_checkpoint
from intaglio.exporters.checkpoint_index import family_options
from intaglio.exporters.component import Component, FamilyExporter, family_of
from intaglio.exporters.dtypes import compute_dtypes, parse_dtypes
from intaglio.exporters.lowering import TARGETS, lowering
from intaglio.exporters.memory import WHOLE, check_memory, weights_of
from intaglio.exporters.preview_vae import CONTRACTS, with_preview
from intaglio.exporters.recipes import (
    calibration_set,
    component_recipes,
    formats_of,
    is_quantized,
    needs_feeds,
    option_keys,
)
from intaglio.exporters.recipes import remarks as recipe_remarks
from intaglio.profiles.errors import UsageError
from intaglio.profiles.family import Contract, Family
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.profiles.registry import pick
from intaglio.profiles.sizes import parse_bytes
from intaglio.profiles.spec import Range
from intaglio.quantize.feeds import CalibrationSet
from intaglio.quantize.formats import check_formats

AUDIT_STEPS = "audit.steps"
CALIBRATION_SHARE = 4  # of --max-memory, for the weights of a segment: they unfold to float32
RUNTIME_OF = {"onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a build needs, decided and checked before anything is written."""

    checkpoint: Checkpoint
    exporter: FamilyExporter
    profile: Family
    components: tuple[Component, ...]
    shapes: Mapping[str, Range]
    targets: tuple[str, ...]
    recipe: Mapping[str, ComponentRecipe]
    calibration: CalibrationSet | None
    certificate: CertificateSettings | None
    options: Mapping[str, str]
    dtypes: Mapping[str, Mapping[str, str]]
    remarks: tuple[str, ...]
    memory: int | None = None

    def target_options(self, target: str) -> dict[str, str]:
        """The ``--set`` values of one target, without its name."""
        return {k.partition(".")[2]: v for k, v in self.options.items() if k.partition(".")[0] == target}

    @property
    def formats(self) -> dict[str, str]:
        """Nominal format by component."""
        return {name: recipe.format for name, recipe in self.recipe.items()}

    @property
    def quantized(self) -> tuple[str, ...]:
        """Components that are."""
        return tuple(name for name, recipe in self.recipe.items() if is_quantized(recipe))

    @property
    def drafted(self) -> bool:
        """Whether the unquantized graphs are needed: to record feeds, to compare pictures, to audit ranges."""
        return bool(self.quantized) and bool(self.calibration or self.certificate or audited(self))

    def contract(self, component: str) -> Contract:
        """Numerics of a component of this checkpoint."""
        return contracts_of(self.components, self.profile)[component]


def make_plan(
    checkpoint: str | Path | Checkpoint,
    *,
    targets: Sequence[str] = ("onnx",),
    quant: Mapping[str, str] | None = None,
    recipe: str | Path | None = None,
    dtype: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    config: str | Path | None = None,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    preview_vae: str | None = None,
    max_memory: str | None = None,
) -> Plan:
    """Check a build's inputs.

    Args:
        checkpoint: see `open_checkpoint`.
        targets: of TARGETS; ``onnx`` is always among them, the others are lowered from it.
        quant: component (or ``*``) to format.
        recipe: a ``recipe.X.toml``; `quant` and ``quantize.`` options go over it.
        dtype: ``fp16``, ``bf16`` or ``fp32`` to compute in, or ``target=fp16``, within the contracts; OpenVINO knows no
            float32 islands, so that its fp16 is audited without them.
        options: ``target.key`` or ``family.key`` to value.
        config: diffusers folder whose configuration fits, for a single file that none of ours fits.
        loras: ``PATH[:WEIGHT]`` of LoRAs to fuse, in order.
        embeddings: ``PATH[:TOKEN]`` of textual inversions to add, in order.
        preview_vae: folder of a diffusers AutoencoderTiny to export as a further decoder.
        max_memory: private memory the build may hold, such as ``2GiB``; refused where a stage cannot keep it.

    Raises:
        ToolError: the first thing that cannot work.
    """
    opened = open_checkpoint(checkpoint, config=config, options=options)
    exporter, profile = family_of(opened)
    opened = dataclasses.replace(opened, options=family_options(options or {}, profile.name))
    profile = dataclasses.replace(profile, contract={**CONTRACTS, **profile.contract})
    opened = additions.with_additions(opened, exporter.components(opened), loras, embeddings, preview_vae)
    components = with_preview(exporter.components(opened), opened, profile.name)
    chosen = tuple(dict.fromkeys(("onnx", *targets)))
    for target in chosen:
        pick(TARGETS, target, "target")
    contracts, names = contracts_of(components, profile), tuple(c.name for c in components)
    recipes = component_recipes(quant or {}, recipe, options or {}, names, contracts)
    dtypes, notes = compute_dtypes(contracts, chosen, parse_dtypes(dtype, chosen))
    remarks = check_formats(formats_of(recipes), tuple(RUNTIME_OF[t] for t in chosen))
    remarks += [*recipe_remarks(recipes, contracts), *notes, *undone(opened), *opened.remarks]
    remarks += opened.inversions.remarks({c.source: opened.config(c.source) for c in components})
    plan = Plan(
        checkpoint=opened,
        exporter=exporter,
        profile=profile,
        components=components,
        shapes=exporter.shapes(opened, profile),
        targets=chosen,
        recipe=recipes,
        calibration=calibration_set(options or {}) if any(needs_feeds(r) for r in recipes.values()) else None,
        certificate=certificate_settings(options or {}),
        options=dict(options or {}),
        dtypes=dtypes,
        remarks=tuple(remarks),
        memory=None if max_memory is None else parse_bytes(max_memory, "--max-memory"),
    )
    check_options(plan)
    plan = within_memory(plan)
    for component in components:
        opened.weights(component.source)
    return plan


def within_memory(plan: Plan) -> Plan:
    """The plan as the limit of memory allows it: no certificate of what cannot run whole, calibration in segments.

    Raises:
        UsageError: a stage cannot keep the limit.
    """
    if plan.memory is None:
        return plan
    check_memory(plan)
    remarks, certificate, calibration = plan.remarks, plan.certificate, plan.calibration
    large = [c.name for c in plan.components if WHOLE * 4 * sum(weights_of(plan, c)) > plan.memory]
    if large and certificate:
        certificate = None
        remarks += (f"no certificate: {', '.join(large)} cannot run whole within --max-memory; give more for one",)
    if calibration and calibration.memory is None:
        calibration = dataclasses.replace(calibration, memory=plan.memory // CALIBRATION_SHARE)
    return dataclasses.replace(plan, remarks=remarks, certificate=certificate, calibration=calibration)


def contracts_of(components: Sequence[Component], profile: Family) -> dict[str, Contract]:
    """Numerics by component: the family's, as each component of this checkpoint takes them."""
    return {c.name: c.contract(profile.contract.get(c.name, Contract())) for c in components}


def check_options(plan: Plan) -> None:
    """Every ``--set`` key belongs to the family or a target that is built, and every target can be built here."""
    allowed = [f"{t}.{o}" for t in plan.targets for o in lowering(t).options]
    allowed += [f"{plan.profile.name}.{o}" for o in plan.exporter.options]
    allowed += [AUDIT_STEPS, *CERTIFICATE_OPTIONS, *(option_keys() if plan.calibration else ())]
    audit_steps(plan.options)
    for key in plan.options:
        # Those of the checkpoint were checked when it was opened, those of quantization with the recipes.
        if key not in allowed and not key.startswith(("checkpoint.", "quantize.")):
            raise UsageError(f"--set {key} is unknown here; allowed: {', '.join(allowed)}")
    for target in plan.targets:
        lowering(target).check(plan.target_options(target), formats_of(plan.recipe))


def audited(plan: Plan) -> dict[str, Contract]:
    """The components that some target computes in float16, with their contracts."""
    found: dict[str, Contract] = {}
    contracts = contracts_of(plan.components, plan.profile)
    for target, rows in plan.dtypes.items():
        for name in (n for n in contracts if rows[n] == "float16"):
            contract = contracts[name]
            if target == "openvino":  # its plugins know no islands: everything is float16
                contract = dataclasses.replace(contract, float32_ops=(), float32_parameters=())
            if target == "openvino" or name not in found:
                found[name] = contract
    return found


def audit_steps(options: Mapping[str, str]) -> int | None:
    """``--set audit.steps=N``: denoising steps of the audit; ``None`` for the artifact's own number.

    Raises:
        UsageError: it is not a whole number from 1.
    """
    text = options.get(AUDIT_STEPS)
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"--set {AUDIT_STEPS}={text} is not allowed: a whole number, 1 or more")
    return None if text is None else int(text)


def undone(checkpoint: Checkpoint) -> list[str]:
    """Remarks on parts of the checkpoint that an artifact does not have."""
    remarks = {
        "safety_checker": "the checkpoint's safety_checker is not exported: pictures are not filtered by it",
        "image_encoder": "the checkpoint's image_encoder is not exported: IP-Adapters are not supported",
    }
    return [remark for part, remark in remarks.items() if checkpoint.component_class(part) is not None]
