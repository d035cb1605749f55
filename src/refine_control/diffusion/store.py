"""A model's folder on disk: a stock diffusers pipeline, safetensors only, whole or not there."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from refine_control.diffusion.model import Denoiser, Model
from refine_control.errors import ModelError

disable_progress_bar()  # one bar for each file of a model says nothing

ZOO = Path(__file__).parent.parent / "zoo"


def save(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a folder that stock StableDiffusionControlNetPipeline.from_pretrained loads (safetensors).

    Written aside, then renamed: a half-written model is never seen.

    Raises:
        ModelError: `folder` holds something else than a model, or the disk is full.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ModelError(f"'{folder}' holds other files than a model; choose another folder")
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    whole = model if dtype == torch.float32 else copy.deepcopy(model)
    for network in (whole.denoiser, whole.vae, whole.text_encoder):
        network.to(dtype)
    try:
        whole.pipeline().save_pretrained(aside, safe_serialization=True)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise ModelError(f"cannot write '{folder}': {error}; make room, then run the same command") from None
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


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
