"""A feed-forward inpainting network of the student's size, trained by regression: no diffusion, no teacher, no text.

A U-Net of residual blocks on the picture with its hole at 0 and the mask beside it, at half the resolution: a step is
no longer than one of distillation. L1, a pixel of the hole more than a known one, as inpainting networks weight them
(LaMa, 2109.07161, less its adversary).
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refine_control.data.batch import Batch
from refine_control.distill.loop import Losses

KNOWN = 0.04  # of a pixel that is known; all of them together then count about a tenth of those to fill


class Network(nn.Module):
    """3.4M parameters with these widths, about as many as the student of recipes/demo.yaml has."""

    def __init__(self, widths: tuple[int, ...] = (48, 112, 208), blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(4 * 4, widths[0], 3, padding=1)
        wider = list(itertools.pairwise(widths))
        self.down = nn.ModuleList([_stack(w, blocks) for w in widths])
        self.shrink = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in wider])
        self.grow = nn.ModuleList([nn.ConvTranspose2d(b, a, 4, 2, 1) for a, b in reversed(wider)])
        self.up = nn.ModuleList([_stack(w, blocks) for w in reversed(widths[:-1])])
        self.last = nn.Conv2d(widths[0], 4 * 3, 3, padding=1)

    def paint(self, image: Tensor, mask: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1], mask (B, 1, H, W), 1 = hole -> (B, 3, H, W). H and W: multiples of 8."""
        h = self.first(F.pixel_unshuffle(torch.cat([image * (1 - mask), mask], 1), 2))
        kept = []
        for place, stack in enumerate(self.down):
            h = stack(h)
            if place < len(self.shrink):
                kept.append(h)
                h = self.shrink[place](h)
        for grow, stack, skip in zip(self.grow, self.up, reversed(kept), strict=True):
            h = stack(grow(h) + skip)
        return F.pixel_shuffle(self.last(h), 2)

    def forward(self, batch: Batch) -> Losses:
        gap = (self.paint(batch.image, batch.mask) - batch.image).abs()
        return {"task": torch.mean(gap * torch.where(batch.mask.bool(), 1.0, KNOWN))}


class _Residual(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _stack(width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(_Residual(width) for _ in range(blocks)))
