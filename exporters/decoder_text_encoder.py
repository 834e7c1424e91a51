"""Causal language models as text encoders: some of their hidden states, stacked, and no layer behind the last of them.

transformers' ``output.hidden_states[k]`` is the residual stream before layer k, and behind the final norm for k = N.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from intaglio.exporters.component import Component
from intaglio.exporters.config_files import section
from intaglio.exporters.parts import spec
from intaglio.profiles.errors import CheckpointError, Unsupported

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint

ATTENTION = "intaglio_masked"
# What is never part of the graph: output head, vision tower, buffers that old checkpoints stored.
OTHER_PARTS = r"^(model\.)?(lm_head|vision_tower|visual|multi_modal_projector)\.|rotary_emb\.inv_freq$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Where a transformers class keeps its decoder.

    Attributes:
        model: the decoder's class, made from the text configuration.
        config: class of the text configuration.
        text: key of the text configuration in ``config.json``; None where it is all of it.
        path: attributes from the model to its decoder.
    """

    model: str
    config: str
    text: str | None
    path: tuple[str, ...]


DECODERS: Mapping[str, Decoder] = {
    "Qwen3ForCausalLM": Decoder(model="Qwen3Model", config="Qwen3Config", text=None, path=("model",)),
    "Mistral3ForConditionalGeneration": Decoder(
        model="MistralModel", config="MistralConfig", text="text_config", path=("model", "language_model")
    ),
}
# ``language_model.model.`` in checkpoints from transformers 4, ``model.language_model.`` in newer ones.
RENAME = ((r"^(model\.)?language_model\.(model\.)?", "model."),)


def text_config(checkpoint: Checkpoint, part: str) -> Mapping[str, Any]:
    """The decoder's own configuration.

    Raises:
        CheckpointError: the part is of a class that is not in `DECODERS`, or its configuration lacks the text model's.
    """
    kind, config = str(checkpoint.component_class(part)), checkpoint.config(part)
    if kind not in DECODERS:
        raise CheckpointError(f"{part} is a {kind}, allowed: {', '.join(DECODERS)}")
    key = DECODERS[kind].text
    return config if key is None else section(config, key, checkpoint.folder / part / "config.json")


def decoder_text_encoder(
    checkpoint: Checkpoint, part: str, *, states: Sequence[int], axis: str = "tokens", longest: int
) -> Component:
    """``input_ids``, ``attention_mask`` int64 [B, T] to ``prompt_embeds`` float32 [B, T, len(states) * D].

    Args:
        checkpoint: its folder `part` holds a class of `DECODERS`.
        part: the component.
        states: indices into ``hidden_states``, ascending; the layers behind the last one are left out.
        axis: name of the token axis.
        longest: tokens of the longest prompt.

    Raises:
        CheckpointError: a state that the model does not have.
        Unsupported: attention over a window that is shorter than the longest prompt.
    """
    config = text_config(checkpoint, part)
    depth = config["num_hidden_layers"]
    if not states or not all(0 <= k <= depth for k in states):
        raise CheckpointError(f"{part} has {depth} layers, its hidden states are 0 to {depth}, not {tuple(states)}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < longest:
        raise Unsupported(f"{part} attends to {window} tokens only (sliding_window); prompts have up to {longest}")
    kind, last = str(checkpoint.component_class(part)), max(states)
    return Component(
        name=part,
        source=part,
        model=untrained_decoder(kind, last),
        reference=pretrained_decoder(kind, part, last),
        wrap=wrap_decoder(tuple(states), final_norm=last == depth),
        inputs=(
            spec("input_ids", "batch", axis, dtype="int64"),
            spec("attention_mask", "batch", axis, dtype="int64"),
        ),
        outputs=(spec("prompt_embeds", "batch", axis, len(states) * config["hidden_size"]),),
        prefix="",
        rename=RENAME,
        ignore="|".join([OTHER_PARTS, *left_out(last, depth)]),
    )


def left_out(last: int, depth: int) -> list[str]:
    """Regular expressions of the parameters behind layer `last` of `depth`."""
    if last == depth:
        return []
    layers = "|".join(map(str, range(last, depth)))
    return [rf"^model\.layers\.({layers})\.", re.escape("model.norm.weight") + "$"]


def cut(config: Any, layers: int) -> Any:
    """A transformers text configuration with that many layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def untrained_decoder(kind: str, layers: int) -> Callable[[Mapping[str, Any]], Any]:
    """A maker of the decoder's first `layers` layers from ``config.json``."""

    def make(config: Mapping[str, Any]) -> Any:
        import transformers

        decoder = DECODERS[kind]
        values = dict(config if decoder.text is None else config[decoder.text])
        own = getattr(transformers, decoder.config).from_dict(values)
        return getattr(transformers, decoder.model)(cut(own, layers))

    return make


def pretrained_decoder(kind: str, part: str, layers: int) -> Callable[[Checkpoint], Any]:
    """A loader of the library's whole class in float32, with the first `layers` layers; returns its decoder."""

    def read(checkpoint: Checkpoint) -> Any:
        import torch
        import transformers

        folder = checkpoint.folder / part
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cut(config.get_text_config(), layers)
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would list the layers that are left out as unexpected
        try:
            model = getattr(transformers, kind).from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        finally:
            transformers.logging.set_verbosity(level)
        for name in DECODERS[kind].path:
            model = getattr(model, name)
        return model

    return read


def masked_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    prompt_mask: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a decoder layer; queries [B, H, T, d], keys and values [B, H', T, d] to [B, T, H, d].

    A query that may see nothing, as padding on the left does, gets zeros from torch and NaN or an average elsewhere.
    `attention_mask` lets it see itself, and here the values of padding, which nobody else sees, become zero.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import repeat_kv

    value = value * prompt_mask[:, None, :, None].to(value.dtype)
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def causal_mask(prompt_mask: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool [B, 1, T, T]: earlier tokens that are not padding; itself where there is no such token."""
    import torch

    index = torch.arange(prompt_mask.shape[1], device=prompt_mask.device)
    earlier = (index[None, :] <= index[:, None])[None, None]
    seen = earlier & prompt_mask[:, None, None, :].bool()
    blind = seen.float().amax(-1, keepdim=True) == 0
    return seen | (blind & (index[None, :] == index[:, None])[None, None])


def wrap_decoder(states: tuple[int, ...], *, final_norm: bool) -> Callable[[Any], torch.nn.Module]:
    """A wrapper of a decoder that ends at its last wanted layer; `final_norm` where that is the model's last."""

    def wrap(model: Any) -> torch.nn.Module:
        import torch
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, masked_attention)
        model.set_attn_implementation(ATTENTION)
        if not final_norm:
            model.norm = torch.nn.Identity()

        class TextEncoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
                output = self.model(
                    input_ids=input_ids,
                    attention_mask=causal_mask(attention_mask),
                    prompt_mask=attention_mask,
                    output_hidden_states=True,
                    use_cache=False,
                )
                return torch.cat([output.hidden_states[k] for k in states], dim=-1)

        return TextEncoder()

    return wrap
