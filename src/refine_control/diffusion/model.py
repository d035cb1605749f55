"""The one adapter around diffusers: a foundation, its control modules, and what turns pictures and words into tensors.

No diffusers type leaks past this room. A transformer pair (SD3Transformer2DModel + SD3ControlNetModel) would be one
more `Denoiser`; see docs/architecture.md.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, MultiControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from refine_control.diffusion.noise import sampler
from refine_control.diffusion.text import Text, embed_sd, embed_xl
from refine_control.errors import ModelError
from refine_control.recipe import SampleConfig

REPEATED = {"ResnetBlock2D", "BasicTransformerBlock"}


def halvings(widths: Sequence[int]) -> int:
    """How many times smaller a network's last level is than its first, along one side: every level but one halves."""
    return 2 ** (len(widths) - 1)


class Denoiser(nn.Module):
    """Foundation (UNet2DConditionModel) + module (ControlNetModel, several as MultiControlNetModel, or None), as one.

    downscale: pixels per latent, along one side; told to SDXL where there is no control to measure.
    """

    def __init__(
        self,
        foundation: UNet2DConditionModel,
        module: ControlNetModel | MultiControlNetModel | None = None,
        downscale: int = 8,
    ) -> None:
        super().__init__()
        self.foundation = foundation
        self.module = module
        self.downscale = downscale

    @property
    def nets(self) -> tuple[ControlNetModel, ...]:
        """The module's ControlNets: none, one or several."""
        if self.module is None:
            return ()
        return tuple(self.module.nets) if isinstance(self.module, MultiControlNetModel) else (self.module,)

    @property
    def control_channels(self) -> int:
        """Channels of the control that all nets together take, 0 without a module."""
        return sum(net.config.conditioning_channels for net in self.nets)

    def checkpoint_activations(self) -> None:
        """Keeps few activations for the backward pass and computes the others again there."""
        for network in (self.foundation, *self.nets):
            network.enable_gradient_checkpointing()

    def compile_blocks(self) -> None:
        """torch.compile for the layers that repeat, each kind and size of them once; blocks can still be tapped."""
        torch._dynamo.config.recompile_limit = 64  # each size of a layer is a recompilation
        torch._functorch.config.donated_buffer = False  # else each term's own gradient cannot be measured
        for module in self.modules():
            if type(module).__name__ in REPEATED and module._compiled_call_impl is None:
                module.compile()

    def forward(self, x_t: Tensor, t: Tensor, text: Text, control: Tensor | None = None) -> Tensor:
        """The prediction at x_t.

        Args:
            x_t: noisy latents (B, c, h, w). t: int64 (B,). text: tokens (B, L, D), pooled (B, P) for SDXL.
            control: (B, 3, H, W), known pixels in [0, 1], pixels to fill -1; for k nets (B, 3k, H, W), the control
                pictures stacked in channels. Without a module nothing looks at it.

        Weights in half precision compute in it; the prediction comes back in x_t's own.

        Raises:
            ModelError: control has other channels than the nets take.
        """
        given, dtype = x_t.dtype, self.foundation.dtype
        x_t, control = x_t.to(dtype), None if control is None else control.to(dtype)
        text = Text(*(None if part is None else part.to(dtype) for part in text))  # type: ignore[arg-type]
        added = self._sizes(x_t, text, control)
        passes = [
            net(x_t, t, text.tokens, part, added_cond_kwargs=added, return_dict=False)
            for net, part in zip(self.nets, self._parts(control), strict=True)
        ]
        residuals = mid = None
        if passes:  # residuals of several nets add up, place by place; the UNet itself would cut a short list silently
            residuals = [sum(places[1:], places[0]) for places in zip(*(down for down, _ in passes), strict=True)]
            mid = sum((m for _, m in passes[1:]), passes[0][1])
        return self.foundation(
            x_t,
            t,
            text.tokens,
            added_cond_kwargs=added,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0].to(given)

    def _parts(self, control: Tensor | None) -> tuple[Tensor, ...]:
        """Each net's own channels of the control."""
        if not self.nets:
            return ()
        given = 0 if control is None else control.shape[1]
        if control is None or given != self.control_channels:
            raise ModelError(
                f"the control has {given} channels but the model's {len(self.nets)} ControlNet(s) take "
                f"{self.control_channels}; stack one control picture for each in channels"
            )
        return control.split([net.config.conditioning_channels for net in self.nets], dim=1)

    def _sizes(self, x_t: Tensor, text: Text, control: Tensor | None) -> dict[str, Any] | None:
        """What SDXL reads beside tokens: pooled text, and in pixels the original size, crop corner and target size."""
        if self.foundation.config.addition_embed_type != "text_time":
            return None
        measured, scale = (x_t, self.downscale) if control is None else (control, 1)
        height, width = (side * scale for side in measured.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x_t.dtype, device=x_t.device)
        return {"text_embeds": text.pooled, "time_ids": sizes.expand(len(x_t), -1)}


class EmbeddedDenoiser(Denoiser):
    """The same networks, shared and not copied, given what `embed` makes of the control instead of the control.

    That part of a module, a third of a small one's work, does not depend on the step: it is needed once a picture.
    """

    def __init__(self, whole: Denoiser, downscale: int) -> None:
        bare = [_without_embedding(net) for net in whole.nets]
        module = MultiControlNetModel(bare) if len(bare) > 1 else next(iter(bare), None)
        super().__init__(whole.foundation, module, downscale)
        self.embeddings = nn.ModuleList(net.controlnet_cond_embedding for net in whole.nets)
        self._whole = (whole,)  # in a tuple: its parameters are not these twice

    def embed(self, control: Tensor) -> Tensor:
        """control (B, 3k, H, W) -> condition (B, c, h, w), those of k nets stacked in channels."""
        parts = self._whole[0]._parts(control)
        return torch.cat([embed(part) for embed, part in zip(self.embeddings, parts, strict=True)], dim=1)

    def _parts(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        if condition is None or not self.nets:
            return ()
        return condition.split([net.config.block_out_channels[0] for net in self.nets], dim=1)

    def _sizes(self, x_t: Tensor, text: Text, control: Tensor | None) -> dict[str, Any] | None:
        return super()._sizes(x_t, text, None)


def _without_embedding(net: ControlNetModel) -> ControlNetModel:
    bare = copy.copy(net)
    bare._modules = {**net._modules, "controlnet_cond_embedding": nn.Identity()}
    return bare


@dataclass
class Model:
    """Everything that a stock pipeline holds, with the adapter in place of its denoising networks.

    scheduler: a diffusers scheduler config. text_encoder_2, tokenizer_2: SDXL only.
    empty_is_zeros: the empty caption is all zeros instead of the encoded ''. The empty caption always means "no
    caption": it is what dropped captions train on, what plain pictures carry and what guidance points away from.
    usual: how it draws where nothing else is said; a student as its recipe sampled it.
    only_steps: the one number of sampler steps whose timesteps it has learnt; None: all.
    """

    denoiser: Denoiser
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    empty_is_zeros: bool = False
    usual: SampleConfig = field(default_factory=SampleConfig)
    only_steps: int | None = None

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return halvings(self.vae.config.block_out_channels)

    @property
    def resolution(self) -> int:
        return self.denoiser.foundation.config.sample_size * self.downscale

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        networks = self.denoiser, self.vae, self.text_encoder, self.text_encoder_2
        return tuple(network for network in networks if network is not None)

    @property
    def parts(self) -> tuple[Any, ...]:
        """As `networks`, the denoiser taken apart: each with the config that it is saved with."""
        return (self.denoiser.foundation, *self.denoiser.nets, *self.networks[1:])

    def to(self, device: str | torch.device) -> Model:
        for network in self.networks:
            network.to(device)
        return self

    def freeze(self) -> Model:
        """No gradients, eval mode. No nn.Module owns a Model, so no owner's `.train()` can undo it."""
        for network in self.networks:
            network.requires_grad_(False).eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, c, h, w) of about unit variance: the posterior's mode."""
        return self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> pictures (B, 3, H, W), clamped to [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def embed(self, captions: list[str]) -> Text:
        """Captions -> tokens (B, L, D), with SDXL pooled (B, P) too. '' means no caption."""
        if self.text_encoder_2 is None:
            return embed_sd(captions, self.tokenizer, self.text_encoder)
        encoders = self.text_encoder, self.text_encoder_2
        return embed_xl(captions, (self.tokenizer, self.tokenizer_2), encoders, self.empty_is_zeros)

    def pipeline(self) -> Any:
        """The stock pipeline over these very networks (shared, not copied)."""
        import diffusers

        name = "StableDiffusion" if self.text_encoder_2 is None else "StableDiffusionXL"
        parts = {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "unet": self.denoiser.foundation,
            "scheduler": sampler(self.scheduler),
        }
        if self.denoiser.module is not None:
            name += "ControlNet"
            parts["controlnet"] = self.denoiser.module
        if self.text_encoder_2 is None:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        else:
            parts |= {"text_encoder_2": self.text_encoder_2, "tokenizer_2": self.tokenizer_2}
            parts |= {"force_zeros_for_empty_prompt": self.empty_is_zeros, "add_watermarker": False}
        pipeline = getattr(diffusers, f"{name}Pipeline")(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
