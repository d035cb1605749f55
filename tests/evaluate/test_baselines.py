"""Classical inpainting: known pixels stay to the bit, and each fills what it should be able to fill."""

import pytest
import torch

from refine_control.evaluate.baselines import biharmonic, mean_fill, navier_stokes, telea
from refine_control.evaluate.metrics import psnr

BASELINES = [mean_fill, telea, navier_stokes, biharmonic]


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, 10:20, 12:18] = 1
    mask[1, :, 0:8, 20:32] = 1
    return mask


@pytest.mark.parametrize("fill", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_pixels_stay_and_the_hole_holds_colours(fill, dtype, mask):
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = image.clone()
    filled = fill(image, mask)
    known = (mask == 0).expand_as(image)
    assert filled.dtype == dtype
    assert torch.equal(filled[known], image[known])
    assert torch.equal(image, before)
    assert 0 <= filled.min() <= filled.max() <= 1
    assert not torch.equal(filled, image)


@pytest.mark.parametrize("fill", BASELINES)
def test_the_hole_is_never_looked_at(fill, mask):
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fill(image, mask), fill(torch.where(mask.bool(), 1 - image, image), mask))


@pytest.mark.parametrize("fill", BASELINES)
def test_a_plain_colour_is_restored(fill, mask):
    image = (torch.tensor([51, 102, 204]) / 255).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(fill(image, mask), image, atol=3.5 / 255, rtol=0)  # Telea at the border: 3 levels


def test_a_ramp_is_restored_best_by_the_smooth_one(mask):
    image = torch.linspace(0.1, 0.9, 32).expand(2, 3, 32, 32)
    scores = {fill: psnr(fill(image, mask), image, mask)[0].item() for fill in BASELINES}
    assert scores[biharmonic] > 40
    assert min(scores[telea], scores[navier_stokes]) > scores[mean_fill]


def test_mean_fill_takes_each_image_by_itself(mask):
    image = torch.where(mask.bool(), 0.9, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)).expand(2, 3, 32, 32)
    filled = mean_fill(image, mask)
    torch.testing.assert_close(filled[0], torch.full((3, 32, 32), 0.25))
    torch.testing.assert_close(filled[1], torch.full((3, 32, 32), 0.75))


@pytest.mark.parametrize("fill", BASELINES)
def test_bad_input_is_refused(fill, mask):
    image = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="image must lie"):
        fill(image * 2, mask)
    with pytest.raises(ValueError, match="covers all of image 1"):
        fill(image, torch.stack([mask[0], torch.ones_like(mask[1])]))
    with pytest.raises(ValueError, match="no hole in image 0"):
        fill(image, torch.zeros_like(mask))
