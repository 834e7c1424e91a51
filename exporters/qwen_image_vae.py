"""AutoencoderKLQwenImage on one frame: the video VAE of Qwen-Image as an image VAE, weights under their own names.

Its convolutions are causal in time: before the first frame there are zeros, so of a kernel [M, C, T, kH, kW] the last
time slice alone meets the picture. ``Conv2d`` with that slice is the same sum without the products by zero, and a
third of the weights. Convolutions in time between frames (``time_conv``) never run on one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from intaglio.exporters.component import Component
from intaglio.exporters.parts import pretrained, spec, untrained

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.checkpoint import Checkpoint

NAME = "AutoencoderKLQwenImage"
# Weights of causal convolutions; those of plain ones (``resample``, ``to_qkv``, ``proj``) have two axes less in time.
CAUSAL = r"\b(conv_in|conv_out|conv1|conv2|conv_shortcut|quant_conv|post_quant_conv)\.weight$"
UNUSED = r"\.time_conv\."
SMALLEST_NORM = 1e-12  # of torch.nn.functional.normalize


def flat_convolution(conv: Any) -> torch.nn.Module:
    """A causal 3D convolution as the 2D one it is on a single frame."""
    import torch

    padding = conv.kernel_size[1] // 2, conv.kernel_size[2] // 2  # every causal convolution of this VAE keeps the size
    flat = torch.nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size[1:], padding=padding)
    flat.weight = torch.nn.Parameter(conv.weight[:, :, -1].detach().clone())
    flat.bias = conv.bias
    return flat


def flat_norm(norm: Any) -> torch.nn.Module:
    """Each pixel's channels divided by their length, times sqrt(C) and gamma: [B, C, h, w] to the same."""
    import torch

    class PixelNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = torch.nn.Parameter(norm.gamma.detach().reshape(-1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
            return x / length * norm.scale * self.gamma

    return PixelNorm()


def flat_resample(resample: Any) -> torch.nn.Module:
    """Half or double the sides; ``nearest-exact`` equals ``nearest`` at a whole factor."""
    import torch

    class Resample(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resample = resample.resample
            if resample.mode.startswith("upsample"):
                self.resample[0] = torch.nn.Upsample(scale_factor=2.0, mode="nearest")

        def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
            result: torch.Tensor = self.resample(x)
            return result

    return Resample()


def flat_attention(block: Any) -> torch.nn.Module:
    """Self-attention of all pixels, one head: [B, C, h, w] to the same."""
    import torch

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.to_qkv, self.proj = flat_norm(block.norm), block.to_qkv, block.proj

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pixels = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
            query, key, value = pixels.chunk(3, dim=-1)
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            result: torch.Tensor = x + self.proj(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))
            return result

    return Attention()


FLAT: Mapping[str, Callable[[Any], Any]] = {
    "QwenImageCausalConv3d": flat_convolution,
    "QwenImageRMS_norm": flat_norm,
    "QwenImageResample": flat_resample,
    "QwenImageAttentionBlock": flat_attention,
}


def flatten(module: Any) -> Any:
    """Replace every layer of FLAT inside `module` by its form for one frame, in place."""
    for name, child in module.named_children():
        kind = type(child).__name__
        if kind in FLAT:
            setattr(module, name, FLAT[kind](child))
        else:
            flatten(child)
    return module


def wrap_encoder(vae: Any) -> torch.nn.Module:
    """Pixels in [-1, 1] [B, 3, H, W] to posterior mean and log variance [B, 2C, h, w]."""
    import torch

    class VaeEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.quant_conv = flatten(vae.encoder), flat_convolution(vae.quant_conv)

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            moments: torch.Tensor = self.quant_conv(self.encoder(sample))
            return moments

    return VaeEncoder()


def wrap_decoder(vae: Any) -> torch.nn.Module:
    """Unscaled latents [B, C, h, w] to pixels in about [-1, 1] [B, 3, H, W]; diffusers clamps them, here it shows."""
    import torch

    class VaeDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.post_quant_conv = flatten(vae.decoder), flat_convolution(vae.post_quant_conv)

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            decoded: torch.Tensor = self.decoder(self.post_quant_conv(latents))
            return decoded

    return VaeDecoder()


def scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels per latent along one side."""
    return int(2 ** len(checkpoint.config("vae")["temperal_downsample"]))


def one_frame_autoencoder(checkpoint: Checkpoint) -> tuple[Component, Component]:
    """VAE encoder and decoder, for pictures."""
    vae, factor = checkpoint.config("vae"), scale_factor(checkpoint)
    latent = (f"height/{factor}", f"width/{factor}")
    image = spec("sample", "batch", vae.get("input_channels", 3), "height", "width")
    shared: dict[str, Any] = {
        "source": "vae",
        "model": untrained("diffusers", NAME),
        "reference": pretrained("diffusers", NAME, "vae"),
        "prefix": "",
        "transforms": ((CAUSAL, "last_frame"),),
    }
    return (
        Component(
            name="vae_encoder",
            wrap=wrap_encoder,
            inputs=(image,),
            outputs=(spec("latent_parameters", "batch", 2 * vae["z_dim"], *latent),),
            ignore=rf"^(decoder|post_quant_conv)\.|{UNUSED}",
            **shared,
        ),
        Component(
            name="vae_decoder",
            wrap=wrap_decoder,
            inputs=(spec("latent_sample", "batch", vae["z_dim"], *latent),),
            outputs=(image,),
            ignore=rf"^(encoder|quant_conv)\.|{UNUSED}",
            **shared,
        ),
    )
