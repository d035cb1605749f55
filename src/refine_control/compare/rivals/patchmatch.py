"""PatchMatch (Barnes et al. 2009) as pypatchmatch has it, patches of 7 x 7; the filled pixels have byte precision."""

import numpy as np
from torch import Tensor

from refine_control.errors import UserError
from refine_control.evaluate.baselines import fill_each

try:
    from patchmatch import patch_match
except ImportError:
    raise UserError("the rival patchmatch needs pypatchmatch: pip install -e '.[compare]' in the clone") from None

RADIUS = 3  # of a patch, as in the package's examples


def fill(images: Tensor, masks: Tensor) -> Tensor:
    def one(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
        patch_match.set_random_seed(0)
        as_bytes = np.ascontiguousarray((picture * 255).round().astype(np.uint8))
        filled = patch_match.inpaint(as_bytes, hole.astype(np.uint8)[..., None] * 255, patch_size=RADIUS)
        return filled.astype(np.float64) / 255

    return fill_each(images, masks, one)
