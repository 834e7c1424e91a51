"""A tiny VAE beside a checkpoint's own: diffusers' ``AutoencoderTiny``, exported as the component ``vae_preview``.

It decodes the latents of the sampling loop as they are, in milliseconds, for pictures of what a step sees and for
models of a few steps: https://github.com/madebyollin/taesd. Of its two halves the decoder is exported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.exporters.checkpoint import PREVIEW, Checkpoint, stored_weights
from intaglio.exporters.component import Component
from intaglio.exporters.config_files import read_json
from intaglio.exporters.hub import cached_folder, is_repository
from intaglio.exporters.licence import licence_of
from intaglio.exporters.parts import pretrained, spec, untrained, vae_scale_factor
from intaglio.exporters.untrusted import check_part
from intaglio.exporters.weights import PICKLES, Weights, weight_files
from intaglio.profiles.artifact import sha256
from intaglio.profiles.errors import CheckpointError, UsageError
from intaglio.profiles.family import Contract

if TYPE_CHECKING:
    import torch

CLASS = "AutoencoderTiny"
# Families whose latents an AutoencoderTiny was made for, with its usual name.
NAMES = {"flux": "taef1", "sd": "taesd", "sd3": "taesd3", "sdxl": "taesdxl"}
# diffusers' defaults of what a config.json may leave out.
DEFAULTS: Mapping[str, Any] = {
    "out_channels": 3,
    "latent_channels": 4,
    "num_decoder_blocks": (3, 3, 3, 1),
    "upsampling_scaling_factor": 2,
}
ENCODER = r"^encoder\."
CONTRACTS = {
    PREVIEW: Contract(
        dtype="float16",
        tensorrt_profiles="range",
        source="its model cards run it in fp16 (huggingface.co/madebyollin/taesd) and bf16 (madebyollin/taef1)",
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewVae:
    """The folder of an AutoencoderTiny, what the user calls it, and one sha256 over what is read of it."""

    folder: Path
    name: str
    digest: str

    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        return read_json(self.folder / "config.json")

    def weights(self) -> Weights:
        """Its parameters; see `stored_weights`."""
        return stored_weights(self.folder)

    def provenance(self) -> dict[str, Any]:
        """Name, digest and licence, no path."""
        return {"file": self.name, "sha256": self.digest, "licence": licence_of(self.folder)}


def open_preview_vae(source: str) -> PreviewVae:
    """What ``--preview-vae`` names: a folder, or ``ORG/NAME`` in Hugging Face's cache.

    Raises:
        UsageError: it is a file.
        CheckpointError: it is missing, incomplete, a pickle, a model of another class, or not what `untrusted` lets in.
    """
    folder, name = Path(source), Path(source).resolve().name
    if folder.suffix in PICKLES and folder.is_file():
        raise CheckpointError(
            f"--preview-vae {folder} is a pickle ({folder.suffix}) and can run code when it is read; give the folder "
            f"of a diffusers {CLASS} with safetensors"
        )
    if folder.is_file():
        raise UsageError(f"--preview-vae {folder} is a file; give the folder of a diffusers {CLASS}")
    if not folder.is_dir():
        if not is_repository(source):
            raise CheckpointError(f"--preview-vae {source} is not a folder; give that of a diffusers {CLASS}")
        folder, name = cached_folder(source, "config.json", CLASS), source.partition("@")[0]
    if (folder / "model_index.json").exists():
        raise CheckpointError(f"--preview-vae {folder} is a pipeline; give the folder of a diffusers {CLASS} alone")
    check_part(folder)
    kind = read_json(folder / "config.json")["_class_name"]
    if kind != CLASS:
        raise CheckpointError(f"{folder / 'config.json'} is a {kind}; allowed for --preview-vae: {CLASS}")
    return PreviewVae(folder=folder, name=name, digest=digest_of_folder(folder))


def digest_of_folder(folder: Path) -> str:
    """One sha256 over the names and digests of the configuration and the weights."""
    files = {file.name: sha256(file) for file in (folder / "config.json", *weight_files(folder))}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def with_preview(components: Sequence[Component], checkpoint: Checkpoint, family: str) -> tuple[Component, ...]:
    """The family's components, and the tiny VAE's decoder where the checkpoint was given one.

    Raises:
        CheckpointError: it was made for other latents.
    """
    vae = checkpoint.preview
    if vae is None:
        return tuple(components)
    check_fit(vae, components, family)
    decoder = next(c for c in components if c.name == "vae_decoder")
    preview = Component(
        name=PREVIEW,
        source=PREVIEW,
        model=from_config,
        reference=lambda _: load(vae),
        wrap=wrap_preview,
        inputs=decoder.inputs,
        outputs=decoder.outputs,
        prefix="",
        ignore=ENCODER,
    )
    return (*components, preview)


def check_fit(vae: PreviewVae, components: Sequence[Component], family: str) -> None:
    """Its latents are those of the family, as far as names and shapes tell.

    Raises:
        CheckpointError: they are not.
    """
    own = ", ".join(f"{name} for {key}" for key, name in NAMES.items())
    if family not in NAMES:
        raise CheckpointError(
            f"--preview-vae {vae.name}: no {CLASS} decodes the latents of the family {family}; there are {own}"
        )
    short = vae.name.rpartition("/")[2].lower()
    if short in NAMES.values() and short != NAMES[family]:
        raise CheckpointError(f"--preview-vae {vae.name} is for other latents than the family {family}'s; take {own}")
    channels, factor = latents_of(vae.config())
    _, wanted, height, _ = next(c for c in components if c.name == "vae_decoder").inputs[0].shape
    if (channels, f"height/{factor}") != (wanted, height):
        raise CheckpointError(
            f"{vae.folder / 'config.json'} is for latents of {channels} channels at 1/{factor} of the height; the "
            f"checkpoint's have {wanted} at {height}; take {own}"
        )


def latents_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent channels, and pixels per latent along one side.

    Raises:
        CheckpointError: it does not make RGB pictures.
    """
    told = {**DEFAULTS, **config}
    if told["out_channels"] != DEFAULTS["out_channels"]:
        raise CheckpointError(
            f"an {CLASS} with out_channels = {told['out_channels']} makes no RGB pictures; allowed: 3"
        )
    return told["latent_channels"], told["upsampling_scaling_factor"] ** (len(told["num_decoder_blocks"]) - 1)


def load(vae: PreviewVae) -> Any:
    """Diffusers' own model in float32: the reference."""
    folder = vae.folder.absolute()
    return reference(folder.name)(Checkpoint(folder=folder.parent, name=vae.name, index={}))


def reference(part: str) -> Callable[[Checkpoint], Any]:
    """A loader of diffusers' own model from a folder; `capture` has compared its weights with its configuration."""

    def read(checkpoint: Checkpoint) -> Any:
        with quiet():
            return pretrained("diffusers", CLASS, part)(checkpoint)

    return read


def from_config(config: Mapping[str, Any]) -> Any:
    """An untrained AutoencoderTiny."""
    with quiet():
        return untrained("diffusers", CLASS)(config)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' warning that it does not expect the ``block_out_channels`` it writes itself."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def wrap_decoder(vae: Any) -> torch.nn.Module:
    """Latents [B, C, h, w] as the model takes them to pixels in about [-1, 1] [B, 3, H, W]."""
    import torch

    class TinyDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = vae.decoder

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = self.decoder(latents)
            return decoded

    return TinyDecoder()


def wrap_preview(vae: Any) -> torch.nn.Module:
    """The same from the loop's latents: unscaled by the tiny VAE's own factor and shift, as pipelines do; 1 and 0."""
    import torch

    class Preview(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = vae.decoder
            self.factor, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0)

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            if (self.factor, self.shift) != (1.0, 0.0):
                latents = latents / self.factor + self.shift
            decoded: torch.Tensor = self.decoder(latents)
            return decoded

    return Preview()


def own_decoder(checkpoint: Checkpoint) -> Component:
    """The decoder of a checkpoint whose own ``vae`` is an AutoencoderTiny.

    Raises:
        CheckpointError: its configuration has no scaling factor, or does not say its size as the other VAEs' do.
    """
    config = checkpoint.config("vae")
    channels, factor = latents_of(config)
    place = checkpoint.folder / "vae/config.json"
    if "scaling_factor" not in config:  # the families' default is another VAE's
        raise CheckpointError(f"{place} has no 'scaling_factor'; that of an {CLASS} is 1.0")
    if factor != vae_scale_factor(checkpoint):
        raise CheckpointError(f"{place} makes {factor} pixels of a latent, its block_out_channels say otherwise")
    return Component(
        name="vae_decoder",
        source="vae",
        model=from_config,
        reference=reference("vae"),
        wrap=wrap_decoder,
        inputs=(spec("latent_sample", "batch", channels, f"height/{factor}", f"width/{factor}"),),
        outputs=(spec("sample", "batch", 3, "height", "width"),),
        prefix="",
        ignore=ENCODER,
    )
