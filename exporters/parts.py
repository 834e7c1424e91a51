"""Components that several families share: tensor facts, loaders, CLIP and T5 text encoders, AutoencoderKL, files.

Names follow optimum's ONNX exports (``optimum/exporters/onnx/model_configs.py``), so other tools can load the parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.checkpoint import write_config
from intaglio.exporters.component import Component
from intaglio.exporters.tokenizer_files import check_tokenizer, copy_tokenizer
from intaglio.exporters.weights import VARIANT, weight_files
from intaglio.profiles.errors import CheckpointError, ToolError
from intaglio.profiles.spec import Range, TensorSpec
from intaglio.runtimes.scheduler_config import SchedulerConfig

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint

OLD_VAE_ATTENTION = (
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
)
OLD_TEXT_MODEL = ((r"^text_model\.", ""),)  # transformers 5 flattened CLIPTextModel
LONGEST_PROMPT = 4  # chunks of CLIP's tokens that one prompt may have
CLIP_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
SCHEDULER = "scheduler/scheduler_config.json"
PATCH = 2  # latents along one side of a token, where latents are packed
DEFAULT_SIZE = 128  # latents along one side of diffusers' default picture in those families


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    """A tensor fact in one line."""
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def pretrained(library: str, name: str, part: str) -> Callable[[Checkpoint], Any]:
    """A loader of the library's own class in float32: the reference, independent of our reading of the weights.

    Args:
        library: ``diffusers`` or ``transformers``.
        name: the class.
        part: the component's folder in the checkpoint.
    """

    def read(checkpoint: Checkpoint) -> Any:
        import importlib

        import torch

        kind = getattr(importlib.import_module(library), name)
        if checkpoint.single is not None:
            from intaglio.exporters.single_file import library_model

            return library_model(checkpoint.single, checkpoint.folder, kind, part)
        folder = checkpoint.folder / part
        variant = VARIANT if f".{VARIANT}" in weight_files(folder)[0].name else None
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "variant": variant}
        return kind.from_pretrained(folder, torch_dtype=torch.float32, **options)

    return read


def untrained(library: str, name: str) -> Callable[[Mapping[str, Any]], Any]:
    """A maker of the diffusers class `name` from its ``config.json``."""

    def make(config: Mapping[str, Any]) -> Any:
        import importlib

        return getattr(importlib.import_module(library), name).from_config(config)

    return make


def clip_from_config(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """A maker of ``CLIPTextModel`` or ``CLIPTextModelWithProjection`` from its ``config.json``."""

    def make(config: Mapping[str, Any]) -> Any:
        import transformers

        return getattr(transformers, name)(transformers.CLIPTextConfig(**config))

    return make


def wrap_clip(model: Any) -> torch.nn.Module:
    """``input_ids`` int64 [B, T] to pooled [B, D], last hidden states [B, T, D] and every hidden state, float32.

    The pooled output is the projection ``text_embeds`` where the model has one, ``pooler_output`` otherwise.
    ``hidden_states.i`` is the residual stream before layer i, ``hidden_states.N`` after the last one.
    """
    import torch

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = self.model(input_ids, output_hidden_states=True)
            pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
            return (pooled, output.last_hidden_state, *output.hidden_states)

    return TextEncoder()


def clip_text_encoder(checkpoint: Checkpoint, part: str, *, axis: str = "tokens") -> Component:
    """A CLIP text encoder with every hidden state, as optimum exports those of SDXL and SD3.

    Raises:
        CheckpointError: it is of another class.
    """
    config = checkpoint.config(part)
    kind = checkpoint.component_class(part)
    if kind not in CLIP_CLASSES:
        raise CheckpointError(f"{part} is a {kind}, allowed: {', '.join(CLIP_CLASSES)}")
    width = config["hidden_size"]
    projected = kind == "CLIPTextModelWithProjection"
    pooled = (
        spec("text_embeds", "batch", config["projection_dim"]) if projected else spec("pooler_output", "batch", width)
    )
    states = [spec(f"hidden_states.{i}", "batch", axis, width) for i in range(config["num_hidden_layers"] + 1)]
    return Component(
        name=part,
        source=part,
        model=clip_from_config(kind),
        reference=pretrained("transformers", kind, part),
        wrap=wrap_clip,
        inputs=(spec("input_ids", "batch", axis, dtype="int64"),),
        outputs=(pooled, spec("last_hidden_state", "batch", axis, width), *states),
        rename=() if projected else OLD_TEXT_MODEL,
        ignore=r"embeddings\.position_ids$" + ("" if projected else r"|^text_projection\."),
    )


def t5_from_config(config: Mapping[str, Any]) -> Any:
    """An untrained T5EncoderModel."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config))


def wrap_t5(model: Any) -> torch.nn.Module:
    """``input_ids`` int64 [B, T] to last hidden states float32 [B, T, D]; no mask, as the pipelines call it."""
    import torch

    class TextEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model.encoder  # without its twin of the embedding, ``shared``

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.encoder(input_ids)[0]
            return states

    return TextEncoder()


def t5_text_encoder(checkpoint: Checkpoint, part: str, *, axis: str = "t5_tokens") -> Component:
    """A T5 encoder (SD3's third, FLUX.1's second)."""
    return Component(
        name=part,
        source=part,
        model=t5_from_config,
        reference=pretrained("transformers", "T5EncoderModel", part),
        wrap=wrap_t5,
        inputs=(spec("input_ids", "batch", axis, dtype="int64"),),
        outputs=(spec("last_hidden_state", "batch", axis, checkpoint.config(part)["d_model"]),),
        prefix="",
        rename=((r"^shared\.", "encoder.embed_tokens."),),
        ignore=r"^decoder\.|^lm_head\.",
        repeats=("encoder.block",),
    )


def wrap_vae_encoder(vae: Any) -> torch.nn.Module:
    """Pixels in [-1, 1] [B, 3, H, W] to posterior mean and log variance [B, 2C, h, w]: nothing random in a graph."""
    import torch

    class VaeEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            moments: torch.Tensor = self.encoder(sample)
            return moments if self.quant_conv is None else self.quant_conv(moments)

    return VaeEncoder()


def wrap_vae_decoder(vae: Any) -> torch.nn.Module:
    """Unscaled latents [B, C, h, w] to pixels in about [-1, 1] [B, 3, H, W]."""
    import torch

    class VaeDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = self.decoder(
                latents if self.post_quant_conv is None else self.post_quant_conv(latents)
            )
            return decoded

    return VaeDecoder()


def autoencoder(
    checkpoint: Checkpoint, name: str = "AutoencoderKL", *, tiny: bool = True, ignore: str = ""
) -> tuple[Component, ...]:
    """VAE encoder and decoder of AutoencoderKL and of classes built like it; of an AutoencoderTiny the decoder.

    Args:
        checkpoint: its folder ``vae``.
        name: the diffusers class.
        tiny: whether the family goes without a VAE encoder, so that an AutoencoderTiny will do for AutoencoderKL.
        ignore: regular expression of further keys that are in neither graph.

    Raises:
        CheckpointError: it is of another class.
    """
    from intaglio.exporters.preview_vae import CLASS, own_decoder  # which is made of these parts

    found = checkpoint.config("vae").get("_class_name", name)
    if found == CLASS and name == "AutoencoderKL" and tiny:
        return (own_decoder(checkpoint),)
    if found != name:
        raise CheckpointError(f"{checkpoint.folder / 'vae/config.json'} is a {found}; allowed: {name}")
    vae, factor = checkpoint.config("vae"), vae_scale_factor(checkpoint)
    latent = (f"height/{factor}", f"width/{factor}")
    image = spec("sample", "batch", vae["in_channels"], "height", "width")
    more = f"|{ignore}" if ignore else ""
    shared: dict[str, Any] = {
        "source": "vae",
        "model": untrained("diffusers", name),
        "reference": pretrained("diffusers", name, "vae"),
        "prefix": "",
        "rename": OLD_VAE_ATTENTION,
    }
    return (
        Component(
            name="vae_encoder",
            wrap=wrap_vae_encoder,
            inputs=(image,),
            outputs=(spec("latent_parameters", "batch", 2 * vae["latent_channels"], *latent),),
            ignore=r"^(decoder|post_quant_conv)\." + more,
            **shared,
        ),
        Component(
            name="vae_decoder",
            wrap=wrap_vae_decoder,
            inputs=(spec("latent_sample", "batch", vae["latent_channels"], *latent),),
            outputs=(image,),
            ignore=r"^(encoder|quant_conv)\." + more,
            **shared,
        ),
    )


def vae_scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels per latent along one side."""
    return int(2 ** (len(checkpoint.config("vae")["block_out_channels"]) - 1))


def default_sides(ranges: Mapping[str, Range], factor: int) -> dict[str, Range]:
    """`sides` of the families whose tokens are patches of 2 x 2 latents, around diffusers' default picture.

    Args:
        ranges: of the profile.
        factor: pixels per latent along one side.
    """
    own = dict.fromkeys(("height", "width"), DEFAULT_SIZE * factor)
    return sides(ranges, own, smallest=PATCH * PATCH * factor, multiple=PATCH * factor)


def sides(ranges: Mapping[str, Range], opt: Mapping[str, int], *, smallest: int, multiple: int) -> dict[str, Range]:
    """The profile's `ranges` with height and width around the checkpoint's own size.

    Args:
        ranges: of the profile.
        opt: the checkpoint's height and width in pixels.
        smallest: the least side the denoiser can take, in pixels.
        multiple: steps of a side, in pixels.
    """
    result = dict(ranges)
    for axis, side in opt.items():
        bounds = ranges[axis]
        step = max(multiple, bounds.multiple)
        low, high = max(smallest, min(bounds.min, side)), max(bounds.max, side)
        result[axis] = Range(min=-(-low // step) * step, opt=side, max=high // step * step, multiple=step)
    return result


def fitted(bounds: Range, length: int) -> Range:
    """A token range whose optimum and maximum are `length`."""
    return Range(min=min(bounds.min, length), opt=length, max=length)


def context(ranges: Mapping[str, Range], length: int) -> Range:
    """Tokens that a UNet reads: chunks of what its CLIP encoders read, `length` each."""
    return Range(min=min(ranges["context_tokens"].min, length), opt=length, max=LONGEST_PROMPT * length)


def sampling_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's own ``sampling_defaults.json``, where it has one: steps and guidance it was made for.

    Raises:
        CheckpointError: it has another key.
    """
    if not (checkpoint.folder / "sampling_defaults.json").exists():
        return {}
    defaults = checkpoint.config(".", "sampling_defaults.json")
    unknown = sorted(defaults.keys() - {"num_inference_steps", "guidance_scale"})
    if unknown:
        raise CheckpointError(f"{checkpoint.folder / 'sampling_defaults.json'} has the unknown key {unknown[0]!r}")
    return defaults


def check_classes(checkpoint: Checkpoint, allowed: Mapping[str, Sequence[str | None]]) -> None:
    """Refuse parts of classes that a family cannot read.

    Args:
        checkpoint: its ``model_index.json`` names the classes.
        allowed: part -> classes; None where the pipeline can go without it.

    Raises:
        CheckpointError: naming the part, its class and the allowed ones.
    """
    for part, classes in allowed.items():
        found = checkpoint.component_class(part)
        if found not in classes:
            raise CheckpointError(f"{part} is a {found}, allowed: {', '.join(map(str, classes))}")


def check_files(checkpoint: Checkpoint, tokenizers: tuple[str, ...]) -> None:
    """What `copy_pipeline_files` will need is there.

    Raises:
        CheckpointError: naming the file of a tokenizer or the scheduler that is missing, not JSON, or that no
            artifact could be sampled with.
    """
    config = checkpoint.config("scheduler", "scheduler_config.json")
    try:
        SchedulerConfig.from_dict(config)
    except ToolError as error:
        raise CheckpointError(f"{checkpoint.folder / SCHEDULER}: {error}") from error
    for part in tokenizers:
        check_tokenizer(checkpoint.folder / part)


def copy_pipeline_files(checkpoint: Checkpoint, folder: Path, tokenizers: tuple[str, ...]) -> None:
    """Pipeline index, scheduler, and tokenizers (with a ``tokenizer.json`` made where there is none)."""
    write_config(checkpoint.index, folder / "model_index.json")
    (folder / "scheduler").mkdir(parents=True)
    shutil.copyfile(checkpoint.folder / SCHEDULER, folder / SCHEDULER)
    for part in tokenizers:
        copy_tokenizer(checkpoint.folder / part, folder / part)
