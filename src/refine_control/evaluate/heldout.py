"""The held-out pictures of one domain, with the masks, captions and noise that every model gets alike."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from refine_control.data.batch import Batch, derive_seed
from refine_control.data.loader import Pictures, make_batch
from refine_control.diffusion.model import Model
from refine_control.diffusion.sample import fill
from refine_control.errors import DataError
from refine_control.recipe import EvaluateConfig, MaskConfig, SampleConfig
from refine_control.student.plan import probe


@dataclass(frozen=True)
class HeldOut:
    """One domain's test pictures. batch.image: (N, 3, H, W) in [-1, 1]; masks and noise depend on the row alone."""

    batch: Batch

    @classmethod
    def choose(cls, pictures: Pictures, has_captions: bool, masks: MaskConfig, config: EvaluateConfig) -> HeldOut:
        """`config.images` pictures, evenly spaced over the data set (all of them where there are fewer)."""
        count = min(config.images, pictures.examples)
        rows = np.linspace(0, pictures.examples - 1, count).round().astype(int).tolist()
        examples = [pictures[row] for row in rows]
        for example in examples:
            if example.mask is not None and not example.mask.any():
                side = example.mask.shape[0]
                raise DataError(f"{example.key}: its mask has no white at {side}x{side}; paint a larger hole")
        seed = derive_seed("held-out", config.seed)
        known = [has_captions] * count
        return cls(make_batch(examples, masks.model_dump(), seed, known, rows, controls=pictures.config.controls))

    @property
    def true(self) -> Tensor:
        """(N, 3, H, W) in [0, 1]."""
        return (self.batch.image + 1) / 2

    def fingerprint(self) -> str:
        """Changes with the pictures, the masks or the captions: what a kept score was measured on."""
        digest = hashlib.sha256("\0".join(self.batch.captions).encode())
        for tensor in (self.batch.image, self.batch.mask, self.batch.control):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def draw(self, model: Model, config: SampleConfig) -> Tensor:
        """What the model makes of every masked picture, known pixels pasted back: (N, 3, H, W) in [0, 1]."""
        b = self.batch
        seeds = [derive_seed("noise", config.seed, row) for row in range(len(b))]
        return (fill(model, b, config, seeds)[1] + 1) / 2


def one_forward(model: Model) -> Callable[[], object]:
    """Of foundation + module, on one picture."""
    return partial(model.denoiser, *probe(model, model.device))


@torch.no_grad()
def latency_ms(forwards: Mapping[str, Callable[[], object]], repeats: int = 30) -> dict[str, dict[str, float]]:
    """Milliseconds that each takes, such as `one_forward` of a model: median and quartiles, all in turns."""
    taken: dict[str, list[float]] = {name: [] for name in forwards}
    for turn in range(repeats + 3):
        for name, forward in forwards.items():
            began = time.perf_counter()
            forward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 3:  # the first turns warm up
                taken[name].append((time.perf_counter() - began) * 1e3)
    return {
        name: dict(zip(("low", "median", "high"), np.percentile(ms, [25, 50, 75]).tolist(), strict=True))
        for name, ms in taken.items()
    }
