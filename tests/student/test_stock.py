"""A student without a mid block is saved, loaded and run by the stock pipelines, and is our own Denoiser's equal.

Stock diffusers cannot build a ControlNet without a mid block (issue 8424); what we rely on instead is tested here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

import tiny_sd
from refine_control.diffusion import store
from refine_control.diffusion.model import Model
from refine_control.diffusion.text import Text
from refine_control.student.plan import build_student
from refine_control.student.transplant import transplant

PIPELINES = {"sd": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}


@pytest.fixture(scope="module", params=PIPELINES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """A bk-small student, and the stock pipeline that its folder loads as."""
    root = tmp_path_factory.mktemp("stock")
    teacher = store.load(str(tiny_sd.save_pipeline(root / "teacher", request.param)))
    student = replace(teacher, denoiser=build_student("bk-small", teacher).eval())
    transplant(student.denoiser, teacher.denoiser)
    store.save(student, root / "student")
    kind = getattr(diffusers, PIPELINES[request.param])
    pipeline = kind.from_pretrained(root / "student", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return student, pipeline


def test_what_is_loaded_is_what_was_saved(saved: tuple[Model, Any]) -> None:
    student, pipeline = saved
    assert pipeline.unet.mid_block is None
    for ours, theirs in (
        (student.denoiser.foundation, pipeline.unet),
        (student.denoiser.module, pipeline.controlnet),
    ):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_the_stock_pipeline_computes_what_our_denoiser_does(saved: tuple[Model, Any]) -> None:
    student, pipeline = saved
    seen: list[tuple[tuple, dict, Any]] = []
    controls: list[torch.Tensor] = []
    hooks = [
        pipeline.unet.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True
        ),
        pipeline.controlnet.register_forward_pre_hook(
            lambda _, args, kwargs: controls.append(kwargs["controlnet_cond"]), with_kwargs=True
        ),
    ]
    size = {} if "XL" not in type(pipeline).__name__ else {"height": 16, "width": 16}
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    out = pipeline(
        "a red cat", image=picture, num_inference_steps=2, generator=generator, output_type="latent", **size
    ).images
    for hook in hooks:
        hook.remove()
    assert out.shape == (1, 4, 8, 8)
    assert len(seen) >= 2
    for (args, kwargs, theirs), control in zip(seen, controls, strict=True):
        x_t, t = args[:2]
        assert len(kwargs["down_block_additional_residuals"]) == sum(
            len(block.resnets) for block in pipeline.unet.up_blocks
        )
        assert kwargs["mid_block_additional_residual"].abs().max() > 0
        text = Text(kwargs["encoder_hidden_states"], (kwargs["added_cond_kwargs"] or {}).get("text_embeds"))
        with torch.no_grad():
            ours = student.denoiser(x_t, t.expand(len(x_t)), text, control)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_mid_residual_reaches_a_foundation_without_mid_block(saved: tuple[Model, Any]) -> None:
    student, _ = saved
    denoiser = student.denoiser
    pooled = torch.zeros(1, 20) if denoiser.foundation.config.addition_embed_type else None
    width = denoiser.foundation.config.cross_attention_dim
    text = Text(torch.zeros(1, 8, width), pooled)
    given = torch.zeros(1, 4, 8, 8), torch.tensor([500]), text, torch.zeros(1, 3, 16, 16)
    last = denoiser.module.controlnet_mid_block
    with torch.no_grad():
        before, bias = denoiser(*given), last.bias.clone()
        last.bias += 1
        after = denoiser(*given)
        last.bias.copy_(bias)
    assert (after - before).abs().max() > 1e-3
