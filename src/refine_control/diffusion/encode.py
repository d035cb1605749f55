"""Pictures -> latents and captions -> embeddings, each computed once while it fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from refine_control.data.batch import Batch
from refine_control.diffusion.model import Model


class Encoder:
    """What a frozen VAE and a frozen text encoder make of a batch. Deterministic, so keeping it changes nothing
    but the last bit: convolutions round by their neighbours in a batch."""

    def __init__(self, model: Model, cache_gb: float) -> None:
        self.model = model
        self._bytes_left = cache_gb * 2**30
        self._latents: dict[Hashable, Tensor] = {}
        self._texts: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """(B, c, h, w), scaled to about unit variance."""
        return self._memo(
            self._latents,
            batch.index.tolist(),
            lambda rows: self.model.encode(batch.image[rows].to(self.model.device)),
        )

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """(B, L, D). '' is the empty prompt."""
        return self._memo(self._texts, captions, lambda rows: self.model.embed([captions[i] for i in rows]))

    def _memo(
        self, kept: dict[Hashable, Tensor], keys: Sequence[Hashable], compute: Callable[[list[int]], Tensor]
    ) -> Tensor:
        missing = {key: row for row, key in enumerate(keys) if key not in kept}
        if not missing:
            return torch.stack([kept[key] for key in keys])
        fresh = dict(zip(missing, compute(list(missing.values())), strict=True))
        result = torch.stack([fresh[key] if key in fresh else kept[key] for key in keys])
        for key, value in fresh.items():
            size = value.element_size() * value.numel()
            if size <= self._bytes_left:
                self._bytes_left -= size
                kept[key] = value.clone()  # a row of its own: a view would keep its whole batch alive
        return result
