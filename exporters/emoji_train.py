"""Train the embedded `emoji` checkpoint: a small, real, bilingual Stable Diffusion pipeline.

``python -m intaglio.exporters.emoji_train WORK -o profiles/emoji`` installs the npm data, trains the VAE, then the
UNet with its text encoder, and writes a diffusers ``StableDiffusionPipeline`` folder with fp16 safetensors. Every
stage resumes from its last state in WORK. Time budgets count training seconds, over all runs.

Sources: DDPM/latent diffusion loss on the velocity target (Salimans & Ho 2022, arXiv:2202.00512); betas rescaled to
zero terminal SNR and trailing timesteps (Lin et al. 2023, arXiv:2305.08891).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.exporters import emoji_data

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

IMAGE_SIZE = 128  # pixels
LATENT_CHANNELS = 16
VAE_CHANNELS = (32, 48, 80, 112, 144)  # 128 px -> 8x8 latents
UNET_CHANNELS = (128, 192, 160)
TEXT_WIDTH = 160
SAVE_SECONDS = 240.0
EMA_DECAY = 0.999
SAMPLING_DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 2.5}


class Trainer:
    """Parameters, AdamW moments and their moving average, saved as safetensors so that a run can resume."""

    def __init__(self, modules: dict[str, torch.nn.Module], folder: Path, *, minutes: float, peak_lr: float) -> None:
        import torch

        self.modules, self.folder, self.seconds, self.peak_lr = modules, folder, minutes * 60, peak_lr
        self.parameters = {f"{m}.{n}": p for m, mod in modules.items() for n, p in mod.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.step, self.elapsed, self.last = 0, 0.0, time.monotonic()
        if (folder / "state.json").exists():
            self._resume()

    @property
    def progress(self) -> float:
        """Share of the time budget used, 0 to 1."""
        return min(1.0, self.elapsed / self.seconds)

    def update(self, loss: torch.Tensor) -> None:
        """One optimizer step on a scalar loss, with warm-up, cosine decay and gradient clipping at norm 1."""
        import torch

        lr = self.peak_lr * min(1.0, (self.step + 1) / 300) * (0.49 * (1 + math.cos(math.pi * self.progress)) + 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.parameters.values())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)
        now = time.monotonic()
        self.elapsed, self.last = self.elapsed + now - self.last, now

    def save(self) -> None:
        """Write the whole state beside the old one, then swap: a kill leaves one of the two."""
        from safetensors.torch import save_file

        state = {}
        for name, p in self.parameters.items():
            moments = self.optimizer.state[p]
            state[f"parameter/{name}"] = p.detach()
            state[f"average/{name}"] = self.average[name]
            state[f"m/{name}"], state[f"v/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f"state-{self.step}.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, new)
        facts = {"file": new.name, "step": self.step, "elapsed": self.elapsed}
        temporary = self.folder / "state.json.new"
        temporary.write_text(json.dumps(facts))
        os.replace(temporary, self.folder / "state.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != new:
                old.unlink()
        self.last = time.monotonic()

    def _resume(self) -> None:
        import torch
        from safetensors.torch import load_file

        facts = json.loads((self.folder / "state.json").read_text())
        state = load_file(self.folder / facts["file"])
        self.step, self.elapsed = facts["step"], facts["elapsed"]
        for name, p in self.parameters.items():
            p.data.copy_(state[f"parameter/{name}"])
            self.average[name].copy_(state[f"average/{name}"])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"m/{name}"],
                "exp_avg_sq": state[f"v/{name}"],
            }

    def use_average(self) -> None:
        """Replace the parameters by their moving average (before export)."""
        for name, p in self.parameters.items():
            p.data.copy_(self.average[name])


def train(trainer: Trainer, loss: Callable[[], torch.Tensor], name: str) -> None:
    """Run `loss` until the trainer's time budget is used, with a progress bar, saving as it goes."""
    from rich.progress import Progress

    saved = time.monotonic()
    recent: list[float] = []
    with Progress() as bar:
        task = bar.add_task(name, total=1.0)
        while trainer.progress < 1.0:
            value = loss()
            trainer.update(value)
            recent = [*recent[-199:], value.item()]
            bar.update(task, completed=trainer.progress, description=f"{name} {trainer.step}: {np.mean(recent):.4f}")
            if trainer.step % 100 == 0 and not bar.console.is_terminal:
                bar.console.print(f"{name} {trainer.step} {trainer.elapsed:.0f} s, loss {np.mean(recent):.4f}")
            if time.monotonic() - saved > SAVE_SECONDS:
                trainer.save()
                saved = time.monotonic()
    trainer.save()


def make_vae() -> Any:
    """An untrained AutoencoderKL with a 16x spatial reduction, in channels-last."""
    import torch
    from diffusers import AutoencoderKL

    depth = len(VAE_CHANNELS)
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8 if all(c % 8 == 0 for c in VAE_CHANNELS) else 1,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def train_vae(images: np.ndarray, work: Path, *, minutes: float, device: str) -> tuple[Any, torch.Tensor]:
    """Train on random crops, then whole images; return the VAE and scaled latents float32 [N, C, h, w].

    The loss is L1 + 2 MSE + L1 of the image gradients, with noise of std 0.05 on the latents: reconstruction only,
    the posterior variance is then set to exp(-20).
    """
    import torch

    vae = make_vae().to(device)
    trainer = Trainer({"vae": vae}, work / "vae", minutes=minutes, peak_lr=1.5e-3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def loss() -> torch.Tensor:
        crop, count = (64, 16) if trainer.progress < 0.6 else (IMAGE_SIZE, 8)
        y, x = (random.randrange(0, IMAGE_SIZE - crop + 1) for _ in range(2))
        batch = pixels[torch.randint(0, len(pixels), (count,)), :, y : y + crop, x : x + crop]
        batch = (batch.float() / 127.5 - 1).to(device, memory_format=torch.channels_last)
        if random.random() < 0.5:
            batch = batch.flip(3)
        with torch.autocast(device, torch.bfloat16):
            mean = vae.quant_conv(vae.encoder(batch))[:, :LATENT_CHANNELS].float()
            decoded = vae.decoder(vae.post_quant_conv(mean + 0.05 * torch.randn_like(mean))).float()
        return reconstruction_loss(decoded, batch) + 1e-3 * mean.square().mean()

    train(trainer, loss, "vae")
    trainer.use_average()
    with torch.no_grad():
        chunks = (pixels[k : k + 32].float().to(device) / 127.5 - 1 for k in range(0, len(pixels), 32))
        latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in chunks])
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -20.0
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return vae, latents * vae.config.scaling_factor


def train_decoder(
    vae: Any, latents: torch.Tensor, images: np.ndarray, work: Path, *, minutes: float, device: str
) -> None:
    """Train the decoder on, with the encoder and so the latents fixed: whole images, noise of std 0.05 on the latents.

    The UNet does not see the difference, so this stage can run at any time after the VAE's.
    """
    import torch

    if minutes <= 0:
        return
    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    trainer = Trainer(modules, work / "decoder", minutes=minutes, peak_lr=8e-4)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    unscaled = latents / vae.config.scaling_factor

    def loss() -> torch.Tensor:
        picked = torch.randint(0, len(pixels), (8,))
        target = (pixels[picked].float() / 127.5 - 1).to(device, memory_format=torch.channels_last)
        start = unscaled[picked].to(device)
        with torch.autocast(device, torch.bfloat16):
            decoded = vae.decoder(vae.post_quant_conv(start + 0.05 * torch.randn_like(start))).float()
        return reconstruction_loss(decoded, target)

    train(trainer, loss, "decoder")
    trainer.use_average()


def reconstruction_loss(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + L1 of the image gradients, of pixels in [-1, 1]."""
    error = decoded - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


def make_text_encoder(tokenizer: Any) -> Any:
    """An untrained three-layer CLIP text model for the bilingual tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=emoji_data.TOKENIZER_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def make_unet() -> Any:
    """An untrained UNet for 8x8 latents, in channels-last."""
    import torch
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2 ** (len(VAE_CHANNELS) - 1),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # heads, by diffusers' historical name
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def make_scheduler() -> Any:
    """DDIM, v-prediction, zero terminal SNR, trailing timesteps."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_unet(
    emoji: list[emoji_data.Emoji], latents: torch.Tensor, tokenizer: Any, work: Path, *, minutes: float, device: str
) -> tuple[Any, Any, Any]:
    """Train UNet and text encoder together; return them with the scheduler."""
    import torch
    import torch.nn.functional as F
    from diffusers.models.attention_processor import AttnProcessor

    text_encoder, unet, scheduler = make_text_encoder(tokenizer).to(device), make_unet().to(device), make_scheduler()
    if device == "cpu":
        # torch 2.13's fused CPU attention has a slow backward: 0.94 s a step with it, 0.60 s without, on one core.
        unet.set_attn_processor(AttnProcessor())
    modules = {"text_encoder": text_encoder, "unet": unet}
    trainer = Trainer(modules, work / "unet", minutes=minutes, peak_lr=1e-3)
    alphas = scheduler.alphas_cumprod.to(device)
    rng, batch = random.Random(trainer.step), 64
    queue: list[int] = []

    def loss() -> torch.Tensor:
        while len(queue) < batch:
            queue.extend(rng.sample(range(len(emoji)), len(emoji)))
        picked = [queue.pop() for _ in range(batch)]
        texts = [emoji_data.caption(emoji[i], rng) for i in picked]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        clean = latents[picked].to(device, memory_format=torch.channels_last)
        noise, timestep = torch.randn_like(clean), torch.randint(0, 1000, (batch,), device=device)
        alpha = alphas[timestep].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with torch.autocast(device, torch.bfloat16):
            predicted = unet(noisy, timestep, text_encoder(ids)[0]).sample
        return F.mse_loss(predicted.float(), velocity)

    train(trainer, loss, "unet")
    trainer.use_average()
    return text_encoder, unet, scheduler


def main(argv: list[str] | None = None) -> None:
    """Train everything and write the pipeline folder."""
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for data and training state")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--vae-minutes", type=float, default=22)
    parser.add_argument("--unet-minutes", type=float, default=110)
    parser.add_argument("--decoder-minutes", type=float, default=12)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random.seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)

    emoji = emoji_data.read_emoji(emoji_data.npm_install(args.work / "npm"))
    images = emoji_data.render(emoji, IMAGE_SIZE)
    np.save(args.work / "images.npy", images)
    emoji_data.train_tokenizer(emoji, args.work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    vae, latents = train_vae(images, args.work, minutes=args.vae_minutes, device=args.device)
    text_encoder, unet, scheduler = train_unet(
        emoji, latents, tokenizer, args.work, minutes=args.unet_minutes, device=args.device
    )
    train_decoder(vae, latents, images, args.work, minutes=args.decoder_minutes, device=args.device)
    for module in (vae, text_encoder, unet):
        module.to("cpu", torch.float16, memory_format=torch.contiguous_format).eval()
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(args.output)
    names = [{"hexcode": one.hexcode, "en": one.label, "zh": one.zh} for one in emoji]
    emoji_data.write_training_set(args.output, names, images)
    (args.output / "sampling_defaults.json").write_text(json.dumps(SAMPLING_DEFAULTS, indent=1) + "\n")


if __name__ == "__main__":
    main()
