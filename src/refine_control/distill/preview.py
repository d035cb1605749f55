"""Pictures during training: what the model is shown, what it makes of it, truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from refine_control.data.batch import derive_seed
from refine_control.data.loader import Pictures, make_batch
from refine_control.diffusion.model import Model
from refine_control.diffusion.sample import fill
from refine_control.recipe import MaskConfig, SampleConfig

COLUMNS = 12


class Preview:
    """Draws the same held-out pictures, masks and noise each time it is called."""

    def __init__(
        self, model: Model, pictures: tuple[Pictures, Pictures | None], masks: MaskConfig, config: SampleConfig
    ) -> None:
        sets = [p for p in pictures if p is not None]
        share = COLUMNS // len(sets)
        examples = [p[int(i)] for p in sets for i in np.linspace(0, p.examples - 1, share)]
        has_label = [p is pictures[0] for p in sets for _ in range(share)]
        self.kinds = sets[0].config.controls
        numbers = [0] * len(examples)
        self.batch = make_batch(
            examples, masks.model_dump(), derive_seed("preview"), has_label, numbers, controls=self.kinds
        )
        self.model, self.config = model, config

    def __call__(self, path: Path) -> None:
        b = self.batch
        seeds = [derive_seed("preview", i) for i in range(len(b))]
        drawn, pasted = fill(self.model, b, self.config, seeds)
        shown = [
            mask_out(b.image, b.mask) if kind == "inpaint" else part * 2 - 1
            for kind, part in zip(self.kinds, b.control.split(3, dim=1), strict=True)
        ]
        save_grid(path, [*shown, drawn, pasted, b.image])


def mask_out(image: Tensor, mask: Tensor) -> Tensor:
    """The picture with its hole in mid-grey, to be looked at."""
    return image * (1 - mask)


def save_grid(path: Path, rows: list[Tensor], scale: int = 2) -> None:
    """Writes a PNG of several (N, 3, H, W) rows in [-1, 1], one below the other."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    array = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)
