"""Stable Diffusion 3's position table: cropped from the middle at any size, and stored as its two axes.

The table comes from the checkpoint, as in diffusers, rounded to the checkpoint's dtype. It is a sine-cosine table of a
square grid, half of the channels for each axis (MAE, arXiv:2111.06377): [384, 384, 1536] of SD 3.5 Medium is 906 MB in
float32, its two axes are 2.4 MB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters.checkpoint import Weights
from intaglio.profiles.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TABLE = r"^pos_embed\.pos_embed$"
KEY = "pos_embed.pos_embed"


def position_table(weights: Weights, size: int) -> tuple[np.ndarray, ...]:
    """The checkpoint's table [size, size, D], as (across [size, D/2], down [size, D/2]) where it is exactly those two.

    Across is indexed by the column, down by the row; a table is their values side by side. Float32.

    Raises:
        CheckpointError: the table is missing or not of `size` times `size` positions.
    """
    where = weights.files[0]
    if KEY not in weights:
        raise CheckpointError(f"{where} does not fit its config.json: {KEY} is missing")
    stored = weights[KEY].read()
    if stored.size % (size * size) or stored.size == 0:
        raise CheckpointError(f"{where}: {KEY} has shape {stored.shape}, config.json implies {size} x {size} positions")
    table = stored.reshape(size, size, -1)
    half = table.shape[-1] // 2
    across, down = table[0, :, :half], table[:, 0, half:]
    separable = all(
        np.array_equal(row[:, :half], across) and (row[:, half:] == down[i]).all() for i, row in enumerate(table)
    )
    parts = (across, down) if separable else (table,)
    return tuple(part.astype(np.float32) for part in parts)


def cropped_patch_embed(embed: Any, table: tuple[np.ndarray, ...]) -> torch.nn.Module:
    """``PatchEmbed`` of diffusers with ``pos_embed_max_size``, for symbolic sizes.

    Latents [B, C, h, w] to tokens [B, h/p * w/p, D] with their positions added: the middle of the table; where there
    are two middles, the upper left one.

    Args:
        embed: the module it replaces, for its convolution.
        table: see `position_table`.
    """
    import torch

    patch, size, separable = embed.patch_size, len(table[0]), len(table) == 2

    class CroppedPatchEmbed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = embed.proj
            for name, values in zip(("across", "down") if separable else ("table",), table, strict=True):
                self.register_buffer(name, torch.from_numpy(values), persistent=False)

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
            y = torch.arange(rows, device=latents.device) + (size - rows) // 2
            x = torch.arange(columns, device=latents.device) + (size - columns) // 2
            if separable:
                across = self.get_buffer("across").index_select(0, x)[None].expand(rows, -1, -1)
                down = self.get_buffer("down").index_select(0, y)[:, None].expand(-1, columns, -1)
                positions = torch.cat([across, down], dim=-1)
            else:
                positions = self.get_buffer("table").index_select(0, y).index_select(1, x)
            tokens: torch.Tensor = self.proj(latents)
            return tokens.flatten(2).transpose(1, 2) + positions.flatten(0, 1)

    return CroppedPatchEmbed()
