"""What one training step sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B pictures with their masks and captions.

    image: float32 (B, 3, H, W) in [-1, 1]. mask: float32 (B, 1, H, W), 1 = pixels to fill.
    captions: B strings, '' where there is none. labelled: bool (B,).
    index: int64 (B,), one number for each version of each picture, to keep what was computed of it.
    keys: B names for messages. seed: every random draw of the step starts from it.
    """

    image: Tensor
    mask: Tensor
    captions: tuple[str, ...]
    labelled: Tensor
    index: Tensor
    keys: tuple[str, ...]
    seed: int

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> Batch:
        return replace(self, image=self.image.to(device), mask=self.mask.to(device), labelled=self.labelled.to(device))

    def generator(self) -> torch.Generator:
        """A fresh CPU generator: the same draws on every device and after every resume."""
        return torch.Generator().manual_seed(self.seed)
