"""Our sampling loop against the stock pipeline's, and rows that do not know of each other."""

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from torch import Tensor

from refine_control.data.controls import inpaint_control
from refine_control.diffusion.model import Model
from refine_control.diffusion.sample import paste, sample
from refine_control.recipe import NoiseConfig, SampleConfig
from tiny import STUDENT, batch, plan, tiny_model

SEEDS = [11, 12, 13]


def control() -> tuple[Tensor, tuple[str, ...]]:
    b = batch(3)
    return inpaint_control(b.image, b.mask), b.captions


def stock(model: Model, signal: Tensor, captions: tuple[str, ...], config: SampleConfig) -> Tensor:
    """The pipeline's pictures in [-1, 1], from the noise that `sample` draws."""
    shape = (model.denoiser.foundation.config.in_channels, 8, 8)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    pipeline: StableDiffusionControlNetPipeline = model.pipeline()
    drawn = pipeline(
        prompt=list(captions),
        image=signal,
        latents=noise,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        output_type="pt",
    )
    return drawn.images * 2 - 1


@pytest.mark.parametrize("guidance_scale", [1, 2])
@pytest.mark.parametrize("mid_block", ["attention", "none"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_agrees_with_the_stock_pipeline(prediction_type: str, mid_block: str, guidance_scale: float) -> None:
    noise = NoiseConfig(prediction_type=prediction_type, rescale_betas_zero_snr=prediction_type != "epsilon")
    model = tiny_model(plan(8, 16, mid_block=mid_block), noise).freeze()
    config = SampleConfig(num_inference_steps=3, guidance_scale=guidance_scale)
    signal, captions = control()
    ours = sample(model, signal, captions, config, SEEDS)
    torch.testing.assert_close(ours, stock(model, signal, captions, config), rtol=0, atol=1e-4)
    assert ours.std() > 0.05, "pictures that are all one grey would agree too"


def test_a_row_does_not_depend_on_its_neighbours(teacher: Model) -> None:
    signal, captions = control()
    by_three, by_two, by_one = (
        sample(teacher, signal, captions, SampleConfig(num_inference_steps=2, batch_size=n), SEEDS) for n in (3, 2, 1)
    )
    torch.testing.assert_close(by_two, by_three, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_one, by_three, rtol=0, atol=1e-5)


def test_seed_control_and_caption_each_steer() -> None:
    model = tiny_model(STUDENT).freeze()
    config = SampleConfig(num_inference_steps=2)
    signal, captions = control()
    first = sample(model, signal, captions, config, SEEDS)
    assert first.shape == (3, 3, 16, 16)
    assert first.abs().max() <= 1
    assert torch.equal(sample(model, signal, captions, config, SEEDS), first)
    assert not torch.equal(sample(model, signal, captions, config, [1, 2, 3]), first)
    assert not torch.equal(sample(model, -signal, captions, config, SEEDS), first)
    assert not torch.equal(sample(model, signal, captions[::-1], config, SEEDS), first)


def test_paste_keeps_the_known() -> None:
    drawn, known = torch.full((1, 3, 2, 2), 0.5), torch.zeros(1, 3, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    assert torch.equal(paste(drawn, known, mask)[0, 0], torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
