"""Picture -> control signal."""

import torch
from jaxtyping import Float
from torch import Tensor


def inpaint_control(image: Float[Tensor, "B 3 H W"], mask: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 3 H W"]:
    """The inpainting control of diffusers' own ControlNets: known pixels as they are, pixels to fill exactly -1.

    Args:
        image: (B, 3, H, W) in [-1, 1]. mask: (B, 1, H, W) in {0, 1}, 1 = pixels to fill.

    Returns:
        (B, 3, H, W): known pixels in [0, 1], the others -1.
    """
    return torch.where(mask > 0.5, -torch.ones_like(image), (image + 1) / 2)
