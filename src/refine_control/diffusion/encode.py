"""Pictures -> latents and captions -> embeddings, each computed once: kept in memory while it fits, or on disk."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from refine_control.data.batch import Batch
from refine_control.diffusion.cache import EncoderCache
from refine_control.diffusion.model import Model
from refine_control.diffusion.text import Text

Row = tuple[Tensor, ...]


class Encoder:
    """What a frozen VAE and a frozen text encoder make of a batch. Deterministic, so keeping it changes
    nothing."""

    def __init__(self, model: Model, cache_gb: float, on_disk: EncoderCache | None = None) -> None:
        self.model, self.on_disk = model, on_disk
        self._bytes_left = cache_gb * 2**30
        self._latents: dict[Hashable, Row] = {}
        self._texts: dict[Hashable, Row] = {}

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """(B, c, h, w), scaled to about unit variance."""
        if self.on_disk is not None:
            return self.on_disk.latents(batch.index.tolist()).to(batch.image)
        return self._memo(
            self._latents,
            batch.index.tolist(),
            lambda rows: [self.model.encode(batch.image[rows].to(self.model.device))],
        )[0]

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Text:
        """tokens (B, L, D), with SDXL pooled (B, P) too. '' means no caption."""
        kept = None if self.on_disk is None else self.on_disk.text(captions)
        if kept is not None:
            return Text(*(part.to(self.model.device) for part in kept))

        def compute(rows: list[int]) -> list[Tensor]:
            return [part for part in self.model.embed([captions[i] for i in rows]) if part is not None]

        return Text(*self._memo(self._texts, captions, compute))

    def _memo(
        self, kept: dict[Hashable, Row], keys: Sequence[Hashable], compute: Callable[[list[int]], list[Tensor]]
    ) -> list[Tensor]:
        """compute: row numbers -> one tensor, or several side by side, with one entry for each of these rows.

        Rows are computed one by one: by its neighbours in a batch a row would be rounded otherwise, and a run that was
        interrupted meets others than one that was not.
        """
        missing = {key: row for row, key in enumerate(keys) if key not in kept}
        with torch.autocast(self.model.device.type, enabled=False):  # latents do not depend on how a step computes
            fresh = {key: tuple(part[0] for part in compute([row])) for key, row in missing.items()}
        rows = [fresh[key] if key in fresh else tuple(p.to(self.model.device) for p in kept[key]) for key in keys]
        result = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        for key, row in fresh.items():
            size = sum(part.element_size() * part.numel() for part in row)
            if size <= self._bytes_left:
                self._bytes_left -= size
                kept[key] = tuple(part.cpu() for part in row)  # a GPU's memory is for networks
        return result
