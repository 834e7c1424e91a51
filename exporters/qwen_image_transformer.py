"""QwenImageTransformer2DModel with position ids and real numbers: traceable, weights under their own names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rotary_embedding(theta: float, widths: Sequence[int]) -> torch.nn.Module:
    """Position ids float32 [T, 3] of image and text to cos and sin of each, float32 [T, 1, sum(widths) / 2].

    RoFormer, arXiv:2104.09864, one band of channels an axis: the angles of diffusers' complex table, in its arithmetic.
    """
    import torch

    class RotaryEmbedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for axis, width in enumerate(widths):
                exponents = torch.arange(0, width, 2).to(torch.float32).div(width)
                self.register_buffer(f"frequencies_{axis}", 1.0 / torch.pow(theta, exponents), persistent=False)

        def forward(self, ids: tuple[torch.Tensor, torch.Tensor], **_: Any) -> tuple[torch.Tensor, ...]:
            turns: list[torch.Tensor] = []
            for positions in ids:
                bands = [positions[:, i : i + 1] * self.get_buffer(f"frequencies_{i}") for i in range(len(widths))]
                angles = torch.cat(bands, dim=-1).unsqueeze(1)
                turns.append(torch.stack([angles.cos(), angles.sin()]))
            return tuple(turns)

    return RotaryEmbedding()


def rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels of x [B, T, H, D] as complex numbers, times cos + i sin: `turn` [2, T, 1, D/2]."""
    import torch

    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


class JointAttention:
    """Attention over text and image tokens together, text first: an attention processor on diffusers' own layers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens [B, L, D], text tokens [B, T, D] and a mask over the latter bool [B, T] to both streams."""
        import torch

        image, text, heads = hidden_states, encoder_hidden_states, (attn.heads, -1)
        turn_image, turn_text = image_rotary_emb
        layers = (
            (attn.add_q_proj, attn.norm_added_q, attn.to_q, attn.norm_q),
            (attn.add_k_proj, attn.norm_added_k, attn.to_k, attn.norm_k),
        )
        query, key = (
            torch.cat(
                [
                    rotated(norm_text(project_text(text).unflatten(-1, heads)), turn_text),
                    rotated(norm_image(project_image(image).unflatten(-1, heads)), turn_image),
                ],
                dim=1,
            )
            for project_text, norm_text, project_image, norm_image in layers
        )
        value = torch.cat([attn.add_v_proj(text), attn.to_v(image)], dim=1).unflatten(-1, heads)
        seen = torch.cat([encoder_hidden_states_mask, torch.ones_like(image[..., 0], dtype=torch.bool)], dim=1)
        # ONNX Runtime's Attention takes a row of the mask for every query.
        seen = seen[:, None, None, :].expand(-1, 1, query.shape[1], -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen
        )
        joint = mixed.transpose(1, 2).flatten(2)
        length = text.shape[1]
        return attn.to_out[0](joint[:, length:]), attn.to_add_out(joint[:, :length])


def wrap_transformer(model: Any) -> torch.nn.Module:
    """Packed latents [B, L, 4C], text states [B, T, D] and mask [B, T], time (0 to 1) [B], ids [L, 3] and [T, 3].

    A mask of ones is no mask. Time is multiplied by 1000 inside. diffusers' own forward runs, with real-valued rotary
    embeddings from position ids in place of complex ones from picture sizes.
    """
    import torch

    embed = model.pos_embed
    model.pos_embed = rotary_embedding(embed.theta, embed.axes_dim)
    for block in model.transformer_blocks:
        block.attn.processor = JointAttention()

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            encoder_hidden_states_mask: torch.Tensor,
            timestep: torch.Tensor,
            img_ids: torch.Tensor,
            txt_ids: torch.Tensor,
        ) -> torch.Tensor:
            predicted: torch.Tensor = self.model(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                timestep=timestep,
                img_shapes=(img_ids, txt_ids),
                return_dict=False,
            )[0]
            return predicted

    return Transformer()
