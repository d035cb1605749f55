"""Picture -> control signal, of one kind or of several stacked in channels, one for each ControlNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refine_control.data.example import Example
from refine_control.errors import DataError


def inpaint_control(image: Float[Tensor, "B 3 H W"], mask: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 3 H W"]:
    """The inpainting control of diffusers' own ControlNets: known pixels as they are, pixels to fill exactly -1.

    Args:
        image: (B, 3, H, W) in [-1, 1]. mask: (B, 1, H, W) in {0, 1}, 1 = pixels to fill.

    Returns:
        (B, 3, H, W): known pixels in [0, 1], the others -1.
    """
    return torch.where(mask > 0.5, -torch.ones_like(image), (image + 1) / 2)


def edges(picture: np.ndarray) -> np.ndarray:
    """Canny's edges, white on black, as ControlNets of that name are trained on. uint8 (H, W, 3) -> the same."""
    import cv2

    return np.repeat(cv2.Canny(picture, 100, 200)[..., None], 3, axis=2)


def grey(picture: np.ndarray) -> np.ndarray:
    """Luminance alone: the model then colours. uint8 (H, W, 3) -> the same."""
    luminance = picture @ np.array([0.299, 0.587, 0.114])
    return np.repeat(luminance.round().astype(np.uint8)[..., None], 3, axis=2)


DERIVED: dict[str, Callable[[np.ndarray], np.ndarray]] = {"edges": edges, "grey": grey}


def controls_of(
    kinds: Sequence[str],
    examples: Sequence[Example],
    image: Float[Tensor, "B 3 H W"],
    mask: Float[Tensor, "B 1 H W"],
) -> Float[Tensor, "B k H W"]:
    """The control of each kind, stacked in channels: k = 3 x kinds.

    'inpaint' and the derived kinds come from the picture itself, so plain pictures have them too; 'file' is the data
    set's own conditioning image, in [0, 1].

    Raises:
        DataError: 'file' is asked for and an example has no conditioning image.
    """
    stacked = []
    for kind in kinds:
        if kind == "inpaint":
            stacked.append(inpaint_control(image, mask))
        else:
            pictures = [_conditioning(e) if kind == "file" else DERIVED[kind](e.image) for e in examples]
            stacked.append(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(image) / 255)
    return torch.cat(stacked, dim=1)


def _conditioning(example: Example) -> np.ndarray:
    if example.control is None:
        raise DataError(
            f"{example.key}: no conditioning image; name one in metadata.jsonl (conditioning_image_file_name), "
            "or derive the control: set data.controls to inpaint, edges or grey"
        )
    return example.control
