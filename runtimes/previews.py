"""Pictures of what a step sees, by the tiny VAE of an artifact that was built with one. NumPy only.

What is decoded is the scheduler's estimate of the clean latents where it has one (`schedulers.CleanEstimator`), the
latents after the step otherwise, which still have the noise that remains in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.sampling import to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from intaglio.profiles.artifact import Artifact

PREVIEW = "vae_preview"
DECODERS = ("vae_decoder", PREVIEW)


class Releases(Protocol):
    """What unloads a component where memory is short; see `loop.Components`."""

    def release(self, *names: str) -> None:
        """These are not needed again."""


def need_preview_vae(artifact: Artifact) -> None:
    """Refuse an artifact without a tiny VAE.

    Raises:
        UsageError: with the command that builds one with it.
    """
    if PREVIEW not in artifact.manifest.components:
        raise UsageError(
            f"{artifact.folder} has no tiny VAE for previews; build it with one: "
            "intaglio build CHECKPOINT -o ARTIFACT --preview-vae FOLDER"
        )


@dataclass(slots=True)
class Previewer:
    """Estimates of one request's clean latents to pictures; the engine is loaded for the first one that is asked for.

    Attributes:
        artifact: which may have no tiny VAE; that is an error when a preview is asked for, not before.
        engines: the tiny VAE is given back when the last step is over, and after every preview from then on.
        decode: float32 [pictures, C, h, w] as the loop has them, and the name of one of DECODERS, to pixels in about
            [-1, 1] [pictures, 3, H, W].
    """

    artifact: Artifact
    engines: Releases
    decode: Callable[[np.ndarray, str], np.ndarray]
    over: bool = False

    def __call__(self, estimate: np.ndarray, decoder: str = PREVIEW) -> list[Image]:
        """RGB pictures, by the tiny VAE or, slower, by the one that makes the final ones.

        Raises:
            UsageError: the artifact has no tiny VAE.
            NumericsError: the decoder returned NaN or infinity.
        """
        from PIL import Image

        if decoder == PREVIEW:
            need_preview_vae(self.artifact)
        try:
            return [Image.fromarray(p) for p in to_bytes(self.decode(estimate, decoder), decoder)]
        finally:
            if self.over:
                self.engines.release(PREVIEW)

    def end(self) -> None:
        """The last step is over."""
        self.over = True
        self.engines.release(PREVIEW)


def preview_file(file: Path, index: int) -> Path:
    """``NAME.step-03.png`` beside the picture ``NAME.png``, for the step `index`, counted from 0."""
    return file.with_name(f"{file.stem}.step-{index:02}{file.suffix}")


def refuse_existing(files: Sequence[Path]) -> None:
    """Refuse to write over previews of an earlier request.

    Raises:
        UsageError: naming the first one.
    """
    for file in files:
        start = f"{file.stem}.step-"
        for path in sorted(file.parent.iterdir()):
            if path.name.startswith(start) and path.suffix == file.suffix:
                raise UsageError(f"{path} exists; choose another name or add --force")
