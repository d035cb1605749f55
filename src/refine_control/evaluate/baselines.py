"""Classical inpainting, the floor a model has to beat.

Every function takes images (N, 3, H, W) float in [0, 1] and masks (N, 1, H, W) in {0, 1}, 1 = hole, and returns images
of the same shape and dtype in which the known pixels are exactly the given ones. ValueError for anything else, and for
an image without a hole or without a known pixel.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from refine_control.evaluate.metrics import check_images, check_mask

__all__ = ["biharmonic", "fill_each", "mean_fill", "navier_stokes", "telea"]

_RADIUS = 3  # pixels around a hole pixel that OpenCV looks at


def _check(image: Tensor, mask: Tensor) -> None:
    check_images("image", image)
    check_mask(mask, image)
    full = mask.flatten(1).all(1).nonzero().flatten().tolist()
    if full:
        raise ValueError(f"mask covers all of image {full[0]} ({len(full)} such); there is nothing to fill it from")


def mean_fill(image: Tensor, mask: Tensor) -> Tensor:
    """The mean colour of each image's known pixels."""
    _check(image, mask)
    known = 1 - mask.to(image)
    mean = (image * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return torch.where(mask.bool(), mean, image)


def fill_each(image: Tensor, mask: Tensor, fill: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Tensor:
    """Apply fill((H, W, 3) float64 in [0, 1], (H, W) bool) -> (H, W, 3) to each image; take only the hole from it."""
    # Where a hole touches the border OpenCV reads pixels inside it (we saw 37 of 255 levels come through), so the truth
    # must not be there to be found.
    pictures = mean_fill(image, mask).permute(0, 2, 3, 1).cpu().double().numpy()
    filled = np.stack([fill(one, hole) for one, hole in zip(pictures, mask[:, 0].bool().cpu().numpy(), strict=True)])
    result = torch.from_numpy(filled).permute(0, 3, 1, 2).clamp(0, 1).to(image)
    return torch.where(mask.bool(), result, image)


def _opencv(image: Tensor, mask: Tensor, method: int) -> Tensor:
    import cv2

    def fill(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
        as_bytes = np.ascontiguousarray((picture * 255).round().astype(np.uint8))  # OpenCV inpaints bytes only
        return cv2.inpaint(as_bytes, hole.astype(np.uint8), _RADIUS, method).astype(np.float64) / 255

    return fill_each(image, mask, fill)


def telea(image: Tensor, mask: Tensor) -> Tensor:
    """Fast marching (Telea 2004), OpenCV, radius 3; the filled pixels have byte precision."""
    import cv2

    return _opencv(image, mask, cv2.INPAINT_TELEA)


def navier_stokes(image: Tensor, mask: Tensor) -> Tensor:
    """Navier-Stokes (Bertalmio, Bertozzi and Sapiro 2001), OpenCV, radius 3; the filled pixels have byte precision."""
    import cv2

    return _opencv(image, mask, cv2.INPAINT_NS)


def biharmonic(image: Tensor, mask: Tensor) -> Tensor:
    """Biharmonic equation (Damelin and Hoang 2018), scikit-image."""
    from skimage.restoration import inpaint_biharmonic

    return fill_each(image, mask, lambda picture, hole: inpaint_biharmonic(picture, hole, channel_axis=-1))
