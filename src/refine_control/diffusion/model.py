"""The one adapter around diffusers: a foundation, its control module, and what turns pictures and words into tensors.

No diffusers type leaks past this file. A transformer pair (SD3Transformer2DModel + SD3ControlNetModel) would be one
more `Denoiser` here; see docs/architecture.md.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from refine_control.errors import ModelError
from refine_control.recipe import AutoencoderPlan, DenoiserPlan, TextPlan

disable_progress_bar()  # one bar for each file of a model says nothing

ZOO = Path(__file__).parent.parent / "zoo"


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


def build_denoiser(plan: DenoiserPlan, latent_channels: int, text_width: int, sample_size: int) -> Denoiser:
    """A fresh foundation and the module that mirrors its encoder.

    Without a mid block the module keeps one and the foundation has none: stock ControlNetModel cannot be built
    without (diffusers issue 8424), and stock UNets add the mid residual all the same.
    """
    foundation_shape = {
        "in_channels": latent_channels,
        "block_out_channels": plan.block_out_channels,
        "layers_per_block": plan.layers_per_block,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in plan.attention),
        "norm_num_groups": plan.norm_num_groups,
        "cross_attention_dim": text_width,
        "attention_head_dim": plan.heads,  # diffusers' name; it has always meant the number of heads
    }
    foundation = UNet2DConditionModel(
        **foundation_shape,
        sample_size=sample_size,
        out_channels=latent_channels,
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(plan.attention)),
        mid_block_type="UNetMidBlock2DCrossAttn" if plan.mid_block == "attention" else None,
    )
    module = ControlNetModel(**foundation_shape, conditioning_embedding_out_channels=plan.conditioning_channels)
    return Denoiser(foundation, module)


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

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes a folder that stock StableDiffusionControlNetPipeline.from_pretrained loads (safetensors).

        Written aside, then renamed: a half-written model is never seen.

        Raises:
            ModelError: `folder` holds something else than a model, or the disk is full.
        """
        if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
            raise ModelError(f"'{folder}' holds other files than a model; choose another folder")
        aside = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        whole = self if dtype == torch.float32 else copy.deepcopy(self)
        for network in (whole.denoiser, whole.vae, whole.text_encoder):
            network.to(dtype)
        try:
            whole.pipeline().save_pretrained(aside, safe_serialization=True)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise ModelError(f"cannot write '{folder}': {error}; make room, then run the same command") from None
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)

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


def build_autoencoder(plan: AutoencoderPlan) -> AutoencoderKL:
    levels = len(plan.block_out_channels)
    return AutoencoderKL(
        latent_channels=plan.latent_channels,
        block_out_channels=plan.block_out_channels,
        layers_per_block=plan.layers_per_block,
        norm_num_groups=plan.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=False,
    )


def build_text(plan: TextPlan, captions: list[str]) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A fresh text encoder and a byte-pair tokenizer trained on these captions."""
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=plan.vocab_size)
    tokenizer.model_max_length = plan.max_length
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden_size,
        intermediate_size=4 * plan.hidden_size,
        projection_dim=plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=plan.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), tokenizer


def resolve(name: str) -> Path:
    """A model's folder, from a path or `zoo:NAME`.

    Raises:
        ModelError: no such folder, or it holds no saved pipeline.
    """
    if name.startswith("zoo:"):
        folder = ZOO / name.removeprefix("zoo:")
        known = ", ".join(f"zoo:{path.parent.name}" for path in sorted(ZOO.glob("*/model_index.json"))) or "none yet"
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"no model '{name}' is embedded; there are: {known}")
        return folder
    folder = Path(name)
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"'{name}' is no saved pipeline: it has no model_index.json; give a folder or zoo:NAME")
    return folder


def load(name: str, device: str | torch.device = "cpu") -> Model:
    """Reads a saved ControlNet pipeline, safetensors only, as float32.

    Raises:
        ModelError: a part is missing or malformed, or the parts do not belong together.
    """
    folder = resolve(name)
    try:
        foundation = _read(UNet2DConditionModel, folder, "unet", low_cpu_mem_usage=False)
        module = _read(ControlNetModel, folder, "controlnet", low_cpu_mem_usage=False)
        vae = _read(AutoencoderKL, folder, "vae", low_cpu_mem_usage=False)
        text_encoder = _read(CLIPTextModel, folder, "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        scheduler = dict(DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load '{name}': {' '.join(str(error).split())[:300]}") from None
    model = Model(Denoiser(foundation, module), vae, text_encoder, tokenizer, scheduler)
    _check_belonging(model, name)
    return model.to(device)


def _read(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    """One network as float32. diffusers and transformers fill a missing tensor with noise and only warn; we refuse."""
    network, loading = kind.from_pretrained(
        folder, subfolder=part, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if loading["missing_keys"]:
        raise ValueError(
            f"{part} lacks {len(loading['missing_keys'])} tensors, e.g. {sorted(loading['missing_keys'])[0]}"
        )
    return network.float()


def _check_belonging(model: Model, name: str) -> None:
    foundation, module = model.denoiser.foundation.config, model.denoiser.module.config
    pairs = {
        "vocabulary of tokenizer and text encoder": (len(model.tokenizer), model.text_encoder.config.vocab_size),
        "cross_attention_dim of UNet and ControlNet": (foundation.cross_attention_dim, module.cross_attention_dim),
        "in_channels of UNet and ControlNet": (foundation.in_channels, module.in_channels),
        "block_out_channels of UNet and ControlNet": (
            tuple(foundation.block_out_channels),
            tuple(module.block_out_channels),
        ),
        "latent channels of UNet and VAE": (foundation.in_channels, model.vae.config.latent_channels),
        "width of UNet's text input and text encoder": (
            foundation.cross_attention_dim,
            model.text_encoder.config.hidden_size,
        ),
    }
    for what, (left, right) in pairs.items():
        if left != right:
            raise ModelError(f"the parts of '{name}' do not belong together: {what} differ, {left} and {right}")
