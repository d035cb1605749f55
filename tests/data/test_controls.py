"""The inpainting control, pixel by pixel."""

import torch

from refine_control.data.controls import inpaint_control


def test_known_pixels_go_to_0_1_and_holes_to_minus_1() -> None:
    image = torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    expected = torch.tensor([[0.0, -1.0], [0.75, 1.0]]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    assert torch.equal(inpaint_control(image, mask), expected)


def test_holes_say_nothing_of_what_was_there_and_the_input_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    mask = (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float()
    other = torch.where(mask > 0.5, torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1, image)
    before = image.clone()
    control = inpaint_control(image, mask)
    assert torch.equal(control, inpaint_control(other, mask))
    assert torch.equal(image, before)
    holes = mask.expand_as(image) > 0.5
    assert (control[holes] == -1).all()
    assert (control[~holes] >= 0).all()
    assert control.dtype == image.dtype
