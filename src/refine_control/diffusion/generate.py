"""One picture, a mask, a prompt -> the picture with its hole filled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from refine_control.data.example import Example, is_unicode
from refine_control.data.images import fit_square, fit_square_mask, read_image, read_mask
from refine_control.data.loader import make_batch
from refine_control.diffusion.model import Model
from refine_control.diffusion.sample import fill
from refine_control.diffusion.store import load
from refine_control.errors import DataError
from refine_control.recipe import SampleConfig


def generate(
    model: str,
    image: Path,
    mask: Path,
    prompt: str,
    out: Path,
    config: SampleConfig,
    device: str,
    controls: Sequence[str] = ("inpaint",),
    controlnets: Sequence[str] = (),
) -> int:
    """Fills the white part of `mask` in `image` and writes a PNG at the model's resolution. Known pixels stay.

    A picture of another size is brought to it; of one that is not square, the square in its middle is kept. Returns
    that resolution. What `config` leaves unset is as the model asks, see `Model.usual`.

    Raises:
        DataError: picture and mask cannot be read or differ in size, the mask is empty or in colour, the prompt is no
            Unicode, or `out` cannot be written.
        RecipeError: see `sample`.
    """
    if not is_unicode(prompt):  # so Python spells bytes of a command line that are no UTF-8
        raise DataError(f"--prompt {prompt!r} is not UTF-8; write it in a terminal and a locale that are")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise DataError(f"'{out}' has no ending of a kind of picture; give --out one, as in filled.png")
    picture, hole = read_image(image), read_mask(mask, coloured=False)
    if picture.shape[:2] != hole.shape:
        (h, w), (mh, mw) = picture.shape[:2], hole.shape
        raise DataError(f"'{mask}' is {mw}x{mh} but '{image}' is {w}x{h}; give a mask of the picture's size")
    loaded = load(model, device, controlnets).freeze()
    say_if_blind(loaded, model, "--controlnet")
    side = loaded.resolution
    hole = fit_square_mask(hole, side)
    if not hole.any():
        raise DataError(f"'{mask}' has no white at {side}x{side}, the model's resolution; nothing is to be filled")
    example = Example(image.name, fit_square(picture, side), prompt, hole)
    batch = make_batch([example], {}, config.seed, [True], [0], controls=controls)
    config = loaded.usual.model_copy(update=config.model_dump(exclude_unset=True))
    _, filled = fill(loaded, batch, config, [config.seed])
    pixels = ((filled[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(out)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write '{out}': {error}; give --out another name, ending in .png") from None
    return side


def say_if_blind(model: Model, name: str, given_by: str) -> None:
    """A line on stderr where a model has no ControlNet. given_by: the flag or key that names one."""
    if not model.denoiser.nets:
        note = f"has no ControlNet, so it does not see the picture around the hole; give one with {given_by}"
        print(f"refine-control: '{name}' {note}", file=sys.stderr)
