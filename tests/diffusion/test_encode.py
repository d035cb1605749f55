"""What is kept equals what would be computed; nothing is computed twice; memory has a limit."""

from dataclasses import replace

import torch
from torch import Tensor

from refine_control.data.batch import Batch
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Model
from refine_control.diffusion.text import Text
from tiny import batch

ROW_BYTES = 4 * 3 * 16 * 16
LOTS = 1.0


class Counting:
    """In a model's place: encodes a picture as itself and remembers how often it was asked for each."""

    device = torch.device("cpu")

    def __init__(self, pooled: bool = False) -> None:
        self.pooled = pooled
        self.pictures: list[float] = []
        self.captions: list[str] = []

    def encode(self, images: Tensor) -> Tensor:
        self.pictures += [image.flatten()[0].item() for image in images]
        return images * 1

    def embed(self, captions: list[str]) -> Text:
        self.captions += captions
        lengths = torch.tensor([[float(len(caption))] for caption in captions])
        return Text(lengths[..., None], -lengths if self.pooled else None)


def numbered(*numbers: int) -> Batch:
    """Picture k is filled with the number k, which is its key too."""
    image = torch.tensor(numbers).float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    return replace(batch(len(numbers)), image=image, index=torch.tensor(numbers))


def first_pixels(latents: Tensor) -> list[float]:
    return latents[:, 0, 0, 0].tolist()


def test_equal_to_computing(teacher: Model) -> None:
    b, encoder = batch(4), Encoder(teacher, LOTS)
    first = encoder.latents(b)
    with torch.no_grad():
        torch.testing.assert_close(first, teacher.encode(b.image))
        torch.testing.assert_close(encoder.text(b.captions).tokens, teacher.embed(list(b.captions)).tokens)
    assert torch.equal(encoder.latents(b), first)
    assert not first.requires_grad


def test_each_key_is_computed_once() -> None:
    model = Counting()
    encoder = Encoder(model, LOTS)
    assert first_pixels(encoder.latents(numbered(3, 1, 3))) == [3, 1, 3]
    assert first_pixels(encoder.latents(numbered(1, 2, 3))) == [1, 2, 3]
    assert sorted(model.pictures) == [1, 2, 3]
    assert encoder.text(["a", "", "a"]).tokens.flatten().tolist() == [1, 0, 1]
    assert encoder.text(["bb", "a"]).tokens.flatten().tolist() == [2, 1]
    assert sorted(model.captions) == ["", "a", "bb"]


def test_pooled_text_is_kept_beside_its_tokens() -> None:
    model = Counting(pooled=True)
    encoder = Encoder(model, LOTS)
    encoder.text(["a", "bb"])
    text = encoder.text(["ccc", "bb", "a"])
    assert text.tokens.shape == (3, 1, 1)
    assert text.tokens.flatten().tolist() == [3, 2, 1]
    assert text.pooled.flatten().tolist() == [-3, -2, -1]
    assert model.captions == ["a", "bb", "ccc"]
    assert Encoder(Counting(), LOTS).text(["a"]).pooled is None


def test_keeps_no_more_than_its_limit() -> None:
    model = Counting()
    encoder = Encoder(model, 2.5 * ROW_BYTES / 2**30)
    for _ in range(3):
        assert first_pixels(encoder.latents(numbered(0, 1, 2, 3))) == [0, 1, 2, 3]
    assert sorted(model.pictures) == [0, 1, *[2] * 3, *[3] * 3]


def test_a_kept_row_does_not_hold_its_batch() -> None:
    encoder = Encoder(Counting(), LOTS)
    encoder.latents(numbered(*range(8)))
    assert [kept.untyped_storage().nbytes() for (kept,) in encoder._latents.values()] == [ROW_BYTES] * 8


def test_a_steps_precision_does_not_reach_what_is_kept(teacher: Model) -> None:
    b = batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Encoder(teacher, LOTS)
        latents, text = inside.latents(b), inside.text(b.captions)
    outside = Encoder(teacher, LOTS)
    assert torch.equal(latents, outside.latents(b))
    assert torch.equal(text.tokens, outside.text(b.captions).tokens)
