"""What one training step sees, and every random number that it draws."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """One 63-bit seed from what decides it; unlike a sum, no two recipes of parts meet."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Batch:
    """B pictures with their masks and captions: a step's rows, or one process's part of them.

    image: float32 (B, 3, H, W) in [-1, 1]. mask: float32 (B, 1, H, W), 1 = pixels to fill.
    control: float32 (B, k, H, W), what the ControlNets are shown; see controls.py.
    captions: B strings, '' where there is none. labelled: bool (B,).
    index: int64 (B,), one number for each version of each picture, to keep what was computed of it.
    keys: B names for messages. seed: every random draw of the step starts from it.
    rows: B places in the step's whole batch, which has `whole` rows. A row's draws depend on the seed and its place
    alone, so they do not change when the batch is shared out over processes.
    """

    image: Float[Tensor, "B 3 H W"]
    mask: Float[Tensor, "B 1 H W"]
    control: Float[Tensor, "B k H W"]
    captions: tuple[str, ...]
    labelled: Bool[Tensor, " B"]
    index: Int64[Tensor, " B"]
    keys: tuple[str, ...]
    seed: int
    rows: tuple[int, ...]
    whole: int

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> Batch:
        names = ("image", "mask", "control", "labelled")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def generator(self, *purpose: int | str) -> torch.Generator:
        """A fresh CPU generator: the same draws on every device and after every resume."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))

    def noise(self, shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
        """Standard normal noise, (B, *shape), on the CPU: each row from a generator of its own."""
        return torch.stack([torch.randn(shape, generator=self.generator("noise", row)) for row in self.rows])
