"""The inpainting control, pixel by pixel, and that it is what diffusers' ControlNets are given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from refine_control.data.controls import controls_of, edges, grey, inpaint_control
from refine_control.data.example import Example
from refine_control.data.loader import make_batch
from refine_control.errors import DataError
from tiny import examples


def some(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in [-1, 1] and masks of {0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1,
        (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float(),
    )


def test_known_pixels_go_to_0_1_and_holes_to_minus_1() -> None:
    image = torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    expected = torch.tensor([[0.0, -1.0], [0.75, 1.0]]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    assert torch.equal(inpaint_control(image, mask), expected)


def test_holes_say_nothing_of_what_was_there_and_the_input_is_kept() -> None:
    image, mask = some(0)
    other = torch.where(mask > 0.5, some(1)[0], image)
    before = image.clone()
    control = inpaint_control(image, mask)
    assert torch.equal(control, inpaint_control(other, mask))
    assert torch.equal(image, before)
    holes = mask.expand_as(image) > 0.5
    assert (control[holes] == -1).all()
    assert (control[~holes] >= 0).all()
    assert (control[~holes] <= 1).all()
    assert control.dtype == image.dtype


def test_it_is_the_condition_of_diffusers_own_example() -> None:
    """As https://huggingface.co/diffusers/tools run_control_inpaint.py makes it of a picture and a mask of bytes."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    grey = rng.choice(np.array([0, 255], np.uint8), (16, 16))
    theirs = picture.astype(np.float32) / 255
    theirs[grey.astype(np.float32) / 255 > 0.5] = -1.0

    # The picture and the mask go through the processors of StableDiffusionControlNetInpaintPipeline.
    image = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(picture))
    binary = VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    ).preprocess(Image.fromarray(grey))
    ours = inpaint_control(image, binary)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(2, 0, 1)[None], rtol=0, atol=1e-6)
    assert torch.equal(ours == -1, binary.bool().expand_as(ours)), "holes are exactly -1"


def test_diffusers_hands_it_on_as_it_is() -> None:
    """Its control processor neither normalises nor clips a tensor, so the network sees -1 in the holes."""
    control = inpaint_control(*some(2))
    processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
    assert torch.equal(processor.preprocess(control, height=8, width=8), control)


# Other kinds


def test_edges_are_where_the_picture_changes() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 8:] = 255
    drawn = edges(picture)
    assert drawn.shape == picture.shape
    assert drawn.dtype == np.uint8
    assert set(np.unique(drawn)) == {0, 255}
    columns = np.flatnonzero(drawn[..., 0].any(axis=0))
    assert columns.min() >= 6
    assert columns.max() <= 9
    assert not edges(np.full((16, 16, 3), 90, np.uint8)).any()


def test_grey_is_luminance() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert grey(colours)[0].tolist() == [[76] * 3, [150] * 3, [29] * 3, [255] * 3]


def with_control(example: Example) -> Example:
    return replace(example, control=255 - example.image)


def test_kinds_are_stacked_in_channels_in_the_order_asked() -> None:
    rows = [with_control(example) for example in examples(3)]
    image, mask = torch.rand(3, 3, 16, 16) * 2 - 1, (torch.rand(3, 1, 16, 16) > 0.5).float()
    stacked = controls_of(("file", "inpaint", "grey"), rows, image, mask)
    assert stacked.shape == (3, 9, 16, 16)
    files = torch.from_numpy(np.stack([example.control for example in rows if example.control is not None]))
    assert torch.equal(stacked[:, :3], files.permute(0, 3, 1, 2) / 255)
    assert torch.equal(stacked[:, 3:6], inpaint_control(image, mask))
    assert torch.equal(stacked[:, 6:], controls_of(("grey",), rows, image, mask))


def test_without_inpainting_the_whole_picture_is_to_be_drawn() -> None:
    batch = make_batch(examples(2), {"box": 1.0}, 0, [True] * 2, [0, 1], controls=("edges",))
    assert (batch.mask == 1).all()
    both = make_batch(examples(2), {"box": 1.0}, 0, [True] * 2, [0, 1], controls=("edges", "inpaint"))
    assert torch.equal(both.control[:, :3], batch.control)
    assert 0 < both.mask.mean() < 1


def test_a_picture_without_the_conditioning_image_that_is_asked_for() -> None:
    rows = [with_control(examples(2)[0]), examples(2)[1]]
    with pytest.raises(DataError, match=r"labelled-1: no conditioning image; name one in metadata\.jsonl"):
        make_batch(rows, {"box": 1.0}, 0, [True] * 2, [0, 1], controls=("file",))
