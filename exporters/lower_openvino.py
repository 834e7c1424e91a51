"""OpenVINO IR from the shared ONNX graph: the same codes, in ``openvino_model.xml`` and ``.bin``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from intaglio.exporters.lowering import Job, Lowered
from intaglio.exporters.openvino_names import number_names
from intaglio.exporters.openvino_passes import waist_reader
from intaglio.exporters.store import GRAPH
from intaglio.profiles.errors import ParityError
from intaglio.profiles.registry import need
from intaglio.profiles.spec import TensorSpec

if TYPE_CHECKING:
    import openvino

XML = "openvino_model.xml"
SCALE_FACTOR = ("runtime_options", "ACTIVATIONS_SCALE_FACTOR")


class LowerOpenVino:
    """The ``openvino`` target."""

    options: tuple[str, ...] = ()

    def check(self, options: Mapping[str, str], formats: Collection[str] = ()) -> None:
        """OpenVINO must be installed.

        Raises:
            MissingDependency: it is not.
        """
        need("openvino", extra="openvino")

    def lower(self, job: Job) -> Lowered:
        """Convert, compare with the tensor facts, save.

        Raises:
            ParityError: an input or output changed its name, type or dynamic axes.
        """
        import openvino

        job.progress("openvino: convert")
        with waist_reader(job.folder) as core:
            model = core.read_model(job.folder / GRAPH)
            for port, spec in zip((*model.inputs, *model.outputs), (*job.inputs, *job.outputs), strict=True):
                compare_port(job.component, port, spec)
            if job.contract.activations_scale_factor:  # where optimum-intel puts it, and OpenVINO's GPU plugin reads it
                model.set_rt_info(str(job.contract.activations_scale_factor), list(SCALE_FACTOR))
            number_names(model)
            openvino.save_model(model, job.folder / XML, compress_to_fp16=False)
            return Lowered(facts={"operators": operators(model), "constants": constants(model)})


def compare_port(component: str, port: openvino.Output, spec: TensorSpec) -> None:
    """Refuse an IR port that is not what the manifest says.

    Raises:
        ParityError: naming the component, the port and the difference.
    """
    dims = tuple(0 if d.is_dynamic else int(d.get_length()) for d in port.get_partial_shape())
    wanted = tuple(d if isinstance(d, int) else 0 for d in spec.shape)
    dtype = {"f32": "float32", "i64": "int64", "i32": "int32"}.get(port.get_element_type().get_type_name())
    if spec.name not in port.get_names() or dtype != spec.dtype or len(dims) != len(wanted):
        raise ParityError(f"{component}: OpenVINO has {port.get_names()} {dtype} {dims}, the manifest {spec}")
    if any(w == 0 and d != 0 for d, w in zip(dims, wanted, strict=True)):
        raise ParityError(f"{component}: OpenVINO made {spec.name} static: {dims}, the manifest says {spec.shape}")


def operators(model: openvino.Model) -> dict[str, int]:
    """Operator types and their counts."""
    counts: dict[str, int] = {}
    for op in model.get_ops():
        counts[op.get_type_name()] = counts.get(op.get_type_name(), 0) + 1
    return dict(sorted(counts.items()))


def constants(model: openvino.Model) -> dict[str, int]:
    """Bytes of Constant nodes by element type."""
    counts: dict[str, int] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type().get_type_name()
            counts[kind] = counts.get(kind, 0) + int(op.get_byte_size())
    return dict(sorted(counts.items()))


LOWERING = LowerOpenVino()
