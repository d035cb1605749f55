"""Parts that do not belong together are refused when they are read, and both values are named."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from published import UNETS, VAE, controlnet
from refine_control.diffusion.belonging import check_belonging
from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.store import load
from refine_control.errors import ModelError
from tiny_sd import save_pipeline, tiny_controlnet, tiny_unet, tiny_vae


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: save_pipeline(root / family, family, 0) for family in ("sd", "sdxl")}


def net_for(family: str = "sd", unet: dict[str, Any] | None = None, **changes: Any) -> Callable[[], Any]:
    return lambda: tiny_controlnet(tiny_unet(family, **(unet or {})), **changes)


DEEP = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.mark.parametrize(
    ("family", "net", "what"),
    [
        ("sd", net_for(cross_attention_dim=24), "cross_attention_dim of UNet and {} differ, 16 and 24"),
        ("sd", net_for(in_channels=9), "in_channels of UNet and {} differ, 4 and 9"),
        ("sd", net_for(block_out_channels=(8, 24)), "block_out_channels of UNet and {} differ, (8, 16) and (8, 24)"),
        ("sd", net_for(unet=DEEP), "block_out_channels of UNet and {} differ, (8, 16) and (8, 16, 16)"),
        ("sd", net_for(layers_per_block=2), "layers_per_block of UNet and {} differ, (1, 1) and (2, 2)"),
        (
            "sd",
            net_for(conditioning_embedding_out_channels=(4, 4, 8)),
            "pixels per latent of VAE and {} differ, 2 and 4",
        ),
        (
            "sd",
            net_for(conditioning_channels=4),
            "conditioning_channels of {} and channels of a control picture differ, 4 and 3",
        ),
        (
            "sdxl",
            net_for("sdxl", addition_embed_type=None, projection_class_embeddings_input_dim=None),
            "addition_embed_type of UNet and {} differ, text_time and None",
        ),
        (
            "sdxl",
            net_for("sdxl", projection_class_embeddings_input_dim=50),
            "projection_class_embeddings_input_dim of UNet and {} differ, 44 and 50",
        ),
        ("sdxl", net_for(), "cross_attention_dim of UNet and {} differ, 40 and 16"),
    ],
)
def test_a_controlnet_of_another_teacher(bases: dict, tmp_path: Path, family: str, net: Callable, what: str) -> None:
    fitting, other = str(tmp_path / "fitting"), str(tmp_path / "other")
    net_for(family)().save_pretrained(fitting)
    net().save_pretrained(other)
    load(str(bases[family]), controlnets=[fitting])
    assert refused(bases[family], [fitting, other]).endswith(what.format(f"ControlNet '{other}'"))


def test_a_controlnet_that_looks_elsewhere_but_fits_is_taken(bases: dict, tmp_path: Path) -> None:
    """Attention within a block changes no residual's shape: the small SDXL ControlNets have less of it."""
    net_for(down_block_types=("DownBlock2D", "DownBlock2D"))().save_pretrained(tmp_path / "small")
    assert load(str(bases["sd"]), controlnets=[str(tmp_path / "small")]).denoiser.module is not None


def refused(folder: Path, controlnets: list[str] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        load(str(folder), controlnets=controlnets or [])
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def unet_of(family: str, **changes: Any) -> dict[str, Any]:
    return {"unet": tiny_unet(family, **changes)}


@pytest.mark.parametrize(
    ("family", "parts", "what"),
    [
        ("sd", lambda: unet_of("sd", in_channels=9), "latent channels of UNet and VAE differ, 9 and 4"),
        ("sd", lambda: unet_of("sd", out_channels=8), "latent channels of UNet's output and VAE differ, 8 and 4"),
        ("sd", lambda: {"vae": tiny_vae(latent_channels=6)}, "latent channels of UNet and VAE differ, 4 and 6"),
        ("sd", lambda: unet_of("sd", cross_attention_dim=24), "text input and text encoder differ, 24 and 16"),
        ("sd", lambda: unet_of("sdxl", cross_attention_dim=16), "pipeline's class differ, text_time and None"),
        ("sdxl", lambda: unet_of("sdxl", cross_attention_dim=24), "text input and text encoder differ, 24 and 40"),
        (
            "sdxl",
            lambda: unet_of("sdxl", projection_class_embeddings_input_dim=39),
            "width of pooled text and sizes differ, 39 and 44",
        ),
        ("sd", lambda: unet_of("sd", time_cond_proj_dim=8), "unet has time_cond_proj_dim = 8, not null"),
        ("sd", lambda: {"vae": tiny_vae(shift_factor=0.1)}, "vae has shift_factor = 0.1, not null"),
        (
            "sd",
            lambda: unet_of("sd", sample_size=(8, 16)),
            "sample_size in unet/config.json is [8, 16]; write one number",
        ),
        (
            "sd",
            lambda: unet_of("sd", sample_size=10**6),
            "sample_size in unet/config.json is 1000000; latents have 1 to",
        ),
        ("sd", lambda: unet_of("sd", sample_size=0), "sample_size in unet/config.json is 0; latents have 1 to 2048"),
        ("sd", lambda: unet_of("sd", sample_size=None), "sample_size in unet/config.json is None; write one number"),
    ],
)
def test_a_foundation_with_parts_of_another(tmp_path: Path, family: str, parts: Callable, what: str) -> None:
    assert what in refused(save_pipeline(tmp_path, family, 0, **parts()))


def test_captions_longer_than_the_text_encoder_reads(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path, "sd", 0)
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 12}))
    assert "tokens in a caption of tokenizer and text encoder differ, 12 and 8" in refused(folder)


class Words:
    """In a published tokenizer's place."""

    model_max_length = 77

    def __len__(self) -> int:
        return 49408


def encoder(width: int) -> SimpleNamespace:
    config = {"hidden_size": width, "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": width}
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.mark.parametrize(("family", "widths"), [("sd15", [768]), ("sd21", [1024]), ("sdxl", [768, 1280])])
def test_the_published_models_and_their_controlnets_belong_together(family: str, widths: list[int]) -> None:
    """Their configs are of several versions, and lack the keys of later ones."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNETS[family])
        denoiser = Denoiser(unet, ControlNetModel.from_config(controlnet(UNETS[family])))
        vae = AutoencoderKL.from_config(VAE)
    first, *second = [Words() for _ in widths]

    def check(*encoders: SimpleNamespace) -> None:
        check_belonging(Model(denoiser, vae, encoders[0], first, {}, *encoders[1:], *second), family)

    fitting = [encoder(width) for width in widths]
    check(*fitting)
    with pytest.raises(ModelError, match=rf"text input and text encoder differ, {sum(widths)} and {sum(widths) - 1}$"):
        check(encoder(widths[0] - 1), *fitting[1:])
