"""The one adapter around diffusers: a foundation, its control module, and what turns pictures and words into tensors.

No diffusers type leaks past this file. A transformer pair (SD3Transformer2DModel + SD3ControlNetModel) would be one
more `Denoiser` here; see docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer


class Denoiser(nn.Module):
    """Foundation (UNet2DConditionModel) + module (ControlNetModel), run as one network."""

    def __init__(self, foundation: UNet2DConditionModel, module: ControlNetModel) -> None:
        super().__init__()
        self.foundation = foundation
        self.module = module

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, control: Tensor) -> Tensor:
        """The prediction at x_t.

        Args:
            x_t: noisy latents (B, c, h, w). t: int64 (B,). text: (B, L, D).
            control: (B, 3, H, W), known pixels in [0, 1], pixels to fill -1.
        """
        residuals, mid = self.module(x_t, t, text, control, return_dict=False)
        return self.foundation(
            x_t,
            t,
            text,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]


@dataclass
class Model:
    """Everything a stock StableDiffusionControlNetPipeline holds, with the adapter in place of its two networks."""

    denoiser: Denoiser
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        return self.denoiser.foundation.config.sample_size * self.downscale

    def to(self, device: str | torch.device) -> Model:
        for network in (self.denoiser, self.vae, self.text_encoder):
            network.to(device)
        return self

    def freeze(self) -> Model:
        """No gradients, eval mode. No nn.Module owns a Model, so no owner's `.train()` can undo it."""
        for network in (self.denoiser, self.vae, self.text_encoder):
            network.requires_grad_(False).eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, c, h, w) of about unit variance: the posterior's mode."""
        return self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> pictures (B, 3, H, W), clamped to [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> token ids, int64 (B, L)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device)

    def embed(self, captions: list[str]) -> Tensor:
        """Captions -> text embeddings (B, L, D)."""
        return self.text_encoder(self.tokenize(captions)).last_hidden_state

    def pipeline(self) -> Any:
        """The stock pipeline over these very networks (shared, not copied)."""
        from diffusers import StableDiffusionControlNetPipeline

        pipeline = StableDiffusionControlNetPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.denoiser.foundation,
            controlnet=self.denoiser.module,
            scheduler=DDIMScheduler.from_config(self.scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
