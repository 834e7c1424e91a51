"""TensorRT plans from the shared ONNX graph, ahead of time: ``tensorrt/model.sm89.engine`` per compute capability.

TensorRT-RTX builds for named compute capabilities with no GPU. ``tensorrt`` itself is used where it is installed and
the GPU asked for is in the machine. Networks are strongly typed in the contract's dtype (`intaglio.exporters.cast`).
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from intaglio.exporters.cast import DTYPES, cast_to_contract
from intaglio.exporters.lowering import Job, Lowered
from intaglio.exporters.store import DATA, GRAPH
from intaglio.exporters.tensorrt_checks import Prepared, check_size, codes_found, compare, network_facts, probes, sizes
from intaglio.exporters.tensorrt_passes import check_formats, check_graph, decode_nf4
from intaglio.exporters.tensorrt_plans import INSIDE, check_kind
from intaglio.profiles.errors import ToolError, UsageError
from intaglio.profiles.registry import pick, suggestion
from intaglio.profiles.spec import Range, TensorSpec, split_axis
from intaglio.runtimes.tensorrt_api import installed_apis, load_api, make_logger, present_gpu

FOLDER = "tensorrt"
# What TensorRT-RTX 1.7 builds for (trt.ComputeCapability): Turing, Ampere, Ada, Blackwell. Hopper (sm90) is not there.
RTX_SMS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
DEFAULT_SMS = ("sm89", "sm120")  # RTX 40 and RTX 50
FIXED_BATCHES = (1, 2)  # one image without and with guidance: most of all runs
# ``batches`` is faster at batch 1 and 2. TensorRT then keeps a second copy of unquantized weights that are multiplied
# with [batch, K] (AdaLN, embeddings), in another layout: measured 2.0 times the weights; 1.03 for [batch, tokens, K].
PROFILES = {"batches": FIXED_BATCHES, "range": ()}

Profile = dict[str, tuple[int, int, int]]


class LowerTensorRt:
    """The ``tensorrt`` target: ``sm`` lists compute capabilities, ``profiles`` is ``batches`` (one for batch 1, one for
    batch 2, one for all) or ``range`` (one for all: smaller plans), ``weights`` a row of `tensorrt_plans.KINDS`.
    """

    options: tuple[str, ...] = ("sm", "profiles", "weights")

    def check(self, options: Mapping[str, str], formats: Collection[str] = ()) -> None:
        """Refuse wrong options or a missing package before anything is built.

        Raises:
            UsageError: an unknown compute capability, choice of profiles or kind of plan.
            Unsupported: a compute capability has no such weight format, or the builder makes no such plan here.
            MissingDependency: neither API is installed, or not the one a compute capability needs.
        """
        sms = wanted_sms(options)
        check_formats(formats, sms)
        for sm in sms:
            load_api(api_for(sm))
            check_kind(options.get("weights", INSIDE), api_for(sm), sm)
        pick(PROFILES, options.get("profiles", "batches"), "tensorrt.profiles")

    def lower(self, job: Job) -> Lowered:
        """Cast, parse, compare, build one plan per compute capability, check their sizes.

        Raises:
            ParityError: the network or a plan is not what the manifest and the graph say.
            ToolError: TensorRT refuses the graph; with its last error.
            Unsupported: a format that a compute capability lacks, or a form TensorRT takes wrongly.
        """
        sms = wanted_sms(job.options)
        dtype = job.dtype
        (job.folder / FOLDER).mkdir(exist_ok=True)
        facts: dict[str, Any] = {"dtype": dtype}
        engines: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="intaglio-tensorrt-") as scratch:
            job.progress(f"tensorrt: cast to {dtype}")
            graph = prepare(job, dtype, Path(scratch))
            facts["cast"] = dict(graph.facts)
            for api in dict.fromkeys(api_for(sm) for sm in sms):
                builder = PlanBuilder(load_api(api), api, job, graph)
                facts.setdefault("layers", dict(builder.network_facts.layers))
                for sm in (s for s in sms if api_for(s) == api):
                    job.progress(f"tensorrt: build {sm}")
                    name = f"{FOLDER}/{Path(GRAPH).stem}.{sm}.engine"
                    engines[name], facts[sm] = builder.write(job.folder / name, sm)
        return Lowered(facts=facts, engines=engines)


class PlanBuilder:
    """One parsed network of one API, from which plans are built."""

    def __init__(self, trt: ModuleType, api: str, job: Job, graph: Prepared) -> None:
        self.trt, self.api, self.job, self.graph = trt, api, job, graph
        self.log = make_logger(trt)
        self.builder: Any = trt.Builder(self.log)
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network: Any = self.builder.create_network(flag)
        self.parser: Any = trt.OnnxParser(self.network, self.log)  # owns the weights the network points to
        if not self.parser.parse_from_file(str(graph.path)):
            errors = [self.parser.get_error(i) for i in range(self.parser.num_errors)]
            reasons = [f"{e.node_operator()} ({e.node_name()}): {e.desc()}" for e in errors]
            raise ToolError(f"{job.component}: TensorRT cannot parse the graph: {one_line(reasons or self.log.errors)}")
        self.decomposable = allow_decomposition(trt, self.network)
        self.network_facts = network_facts(self.network)
        compare(job.component, self.network_facts, job.inputs, job.outputs, graph.quantizers)
        self.profiles = profiles(
            job.inputs, job.shapes, PROFILES[job.options.get("profiles", job.contract.tensorrt_profiles)]
        )

    def write(self, path: Path, sm: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Build for `sm` and write the plan; returns the engine's record and the build's facts.

        Raises:
            ToolError: the build failed.
            ParityError: the plan's size is not plausible.
        """
        start = time.perf_counter()
        plan = self._build(sm)
        size, layers = int(plan.nbytes), sum(self.network_facts.layers.values())
        check_size(f"{self.job.component} {sm}", size, self.graph, layers, len(self.profiles))
        path.write_bytes(memoryview(plan))
        record = {
            "sm": sm,
            "api": self.api,
            "version": self.trt.__version__,
            "profiles": [{axis: list(sizes) for axis, sizes in p.items()} for p in self.profiles],
            "bytes": size,
        }
        facts = {
            "seconds": round(time.perf_counter() - start, 2),
            "plan_bytes": size,
            "weight_bytes": self.graph.packed,
            "data_bytes": self.job.packed_bytes,
            "plan_to_weights": round(size / max(self.graph.packed, 1), 3),
            "codes_found": f"{codes_found(path, self.graph.probes)} of {len(self.graph.probes)}",
            "decomposable_attention": self.decomposable,
            "warnings": sorted(set(self.log.warnings))[:8],
        }
        return record, facts

    def _build(self, sm: str) -> Any:
        trt, config = self.trt, self.builder.create_builder_config()
        if self.api == "tensorrt-rtx":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, sm.upper()), 0)
        for profile in self.profiles:
            config.add_optimization_profile(self._profile(profile))
        plan = self.builder.build_serialized_network(self.network, config)
        if plan is None:
            raise ToolError(f"{self.job.component}: TensorRT builds no plan for {sm}: {one_line(self.log.errors)}")
        return plan

    def _profile(self, sizes: Profile) -> Any:
        result = self.builder.create_optimization_profile()
        for spec in self.job.inputs:
            bounds = [spec.sizes({axis: s[i] for axis, s in sizes.items()}) for i in range(3)]
            result.set_shape(spec.name, *bounds)
        if not result:
            raise ToolError(f"{self.job.component}: TensorRT refuses the profile {sizes}: {one_line(self.log.errors)}")
        return result


def wanted_sms(options: Mapping[str, str]) -> tuple[str, ...]:
    """Compute capabilities to build for: ``{"sm": "sm89,sm120"}`` is ``("sm89", "sm120")``.

    Raises:
        UsageError: one is empty, named twice or not built for; with what is allowed.
    """
    if "sm" not in options:
        return DEFAULT_SMS
    names = tuple(name.strip().lower() for name in options["sm"].split(","))
    here = present_gpu() if "tensorrt" in installed_apis() else None
    allowed = (*RTX_SMS, *((here,) if here and here not in RTX_SMS else ()))
    for name in names:
        if name not in allowed:
            hint = ""
            if name == "sm90":
                hint = " TensorRT-RTX has no Hopper; install tensorrt on a machine with that GPU."
            near = suggestion(name, allowed)
            raise UsageError(f"tensorrt.sm {name!r} is not built for; allowed: {', '.join(allowed)}.{near}{hint}")
    if len(set(names)) < len(names):
        raise UsageError(f"tensorrt.sm names one twice: {options['sm']!r}; for example --set tensorrt.sm=sm89,sm120")
    return names


def api_for(sm: str) -> str:
    """The API that builds for `sm`: ``tensorrt`` for the GPU in this machine, TensorRT-RTX for any other."""
    return "tensorrt" if "tensorrt" in installed_apis() and present_gpu() == sm else "tensorrt-rtx"


def prepare(job: Job, dtype: str, scratch: Path) -> Prepared:
    """The graph in the compute dtype, NF4 decoded to it; one in float32 without NF4 is used where it lies.

    Raises:
        Unsupported: the cast refuses the graph, or TensorRT would fail on it, see `check_graph`.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    path, facts = job.folder / GRAPH, {}
    model = ir.load(path)
    check_graph(job.component, model, wanted_sms(job.options))
    decoded = decode_nf4(model)
    if dtype in DTYPES:
        # TensorRT's parser refuses `softmax_precision`: the softmax inside Attention is its own affair. It wants the
        # scales of both sides of a product in one dtype, and converts those of convolutions to float32 itself.
        report = cast_to_contract(model, dtype, job.contract, softmax_attribute=False, float32_scales=True)
        facts = report.to_json()
    else:
        common.ShapeInferencePass(data_prop=False)(model)
    if decoded:
        facts["decoded_nf4"] = decoded
    if facts:
        path = scratch / GRAPH
        ir.save(model, path, external_data=DATA)
    types = Counter(node.op_type for node in model.graph)
    return Prepared(
        path=path,
        dtype=dtype,
        quantizers={name: types[name] for name in ("DequantizeLinear", "QuantizeLinear")},
        probes=probes(model),
        facts=facts,
        **sizes(model, dtype),
    )


def profiles(
    inputs: Sequence[TensorSpec], shapes: Mapping[str, Range], batches: Sequence[int] = FIXED_BATCHES
) -> list[Profile]:
    """Optimization profiles, each (min, opt, max) per axis: the fixed `batches`, then the whole range.

    A fixed batch lets TensorRT choose kernels for that batch alone. The whole range is left out where the fixed
    batches cover it, and stands alone where the inputs have no batch.
    """
    axes = {split_axis(d)[0] for spec in inputs for d in spec.shape if isinstance(d, str)}
    whole = {axis: (r.min, r.opt, r.max) for axis, r in shapes.items() if axis in axes}
    if "batch" not in whole:
        return [whole]
    low, _, high = whole["batch"]
    fixed = [b for b in batches if low <= b <= high]
    result: list[Profile] = [{**whole, "batch": (b, b, b)} for b in fixed]
    return result if set(range(low, high + 1)) <= set(fixed) else [*result, whole]


def allow_decomposition(trt: ModuleType, network: Any) -> int:
    """Let TensorRT split attention that has no fused kernel (head sizes, float32) instead of refusing it; counted."""
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class, as TensorRT's samples do
            layer.attention.decomposable = True
            count += 1
    return count


def one_line(messages: Sequence[str]) -> str:
    """The last message, in one line."""
    return " ".join(messages[-1].split()) if messages else "it gives no reason"


LOWERING = LowerTensorRt()
