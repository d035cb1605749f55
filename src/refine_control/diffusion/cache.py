"""Latents, text embeddings and teacher outputs on disk, each keyed by everything that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from refine_control.data.loader import UNLABELLED, Pictures
from refine_control.data.table import Table
from refine_control.diffusion.model import Model

ROWS, PIXELS = 16, 16 * 256**2  # captions or pictures encoded at once, and of pictures so many pixels


class EncoderCache:
    """Latents of every version of every picture, and embeddings of every caption, computed once for many runs.

    All processes share the filling. Raises DataError where the disk is full or cannot be written.
    """

    def __init__(self, model: Model, labelled: Pictures, unlabelled: Pictures | None, root: Path) -> None:
        vae = digest(model.vae)
        self.labelled = latent_table(model, vae, labelled, root)
        self.unlabelled = None if unlabelled is None else latent_table(model, vae, unlabelled, root)
        captions = {labelled.text(i) for i in range(labelled.examples)}
        self.captions = {caption: row for row, caption in enumerate(sorted({*captions, ""}))}
        self.texts = text_tables(model, list(self.captions), root)

    def latents(self, index: Sequence[int]) -> Tensor:
        """(B, c, h, w) for batch.index."""
        rows = []
        for number in index:
            table = self.labelled if number < UNLABELLED else self.unlabelled
            assert table is not None
            rows.append(table[[number % UNLABELLED]])
        return torch.from_numpy(np.concatenate(rows))

    def text(self, captions: Sequence[str]) -> list[Tensor] | None:
        """Tokens (B, L, D), with SDXL pooled (B, P); None where a caption is not among those of the data set."""
        if any(caption not in self.captions for caption in captions):
            return None
        rows = [self.captions[caption] for caption in captions]
        return [torch.from_numpy(table[rows]) for table in self.texts]


@torch.no_grad()
def latent_table(model: Model, vae: str, pictures: Pictures, root: Path) -> Table:
    """Row n: the latents of pictures[n]. vae: the digest of the model's."""

    def compute(numbers: range) -> np.ndarray:
        images = torch.from_numpy(np.stack([pictures[number].image for number in numbers])).to(model.device)
        return _array(model.encode(images.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1))

    dtype = next(model.vae.parameters()).dtype
    side = pictures.config.resolution // model.downscale
    key = {"vae": vae, "scale": model.vae.config.scaling_factor, "pictures": pictures.fingerprint()}
    shape = (model.vae.config.latent_channels, side, side)
    rows = max(1, min(ROWS, PIXELS // pictures.config.resolution**2))
    return _filled(Table(root, "latents", key, len(pictures), shape, _name(dtype)), compute, rows)


@torch.no_grad()
def text_tables(model: Model, captions: list[str], root: Path) -> list[Table]:
    """Row i: the tokens of captions[i]; with SDXL a second table of pooled embeddings."""
    encoders = [e for e in (model.text_encoder, model.text_encoder_2) if e is not None]
    key: dict[str, Any] = {
        "encoders": [digest(encoder) for encoder in encoders],
        "ids": caption_ids(model, captions),
        "empty_is_zeros": model.empty_is_zeros,
    }

    def embed(rows: range) -> list[Tensor]:
        return [part for part in model.embed([captions[row] for row in rows]) if part is not None]

    tables = []
    for place, part in enumerate(embed(range(1))):
        table = Table(root, "text", {**key, "part": place}, len(captions), part.shape[1:], _name(part.dtype))
        tables.append(_filled(table, lambda rows, place=place: _array(embed(rows)[place])))
    return tables


def caption_ids(model: Model, captions: list[str]) -> list[str]:
    """A hash of what each tokenizer makes of captions: changes with either."""
    made = [
        (tokenizer(captions, verbose=False).input_ids, tokenizer.model_max_length, tokenizer.pad_token_id)
        for tokenizer in (model.tokenizer, model.tokenizer_2)
        if tokenizer is not None
    ]
    return [hashlib.sha256(repr(each).encode()).hexdigest() for each in made]


def settings(model: Model, captions: list[str]) -> dict[str, Any]:
    """What decides, beside its weights, what a model answers; plain data. captions: that the tokenizers are tried on.

    Without what says who saved it, and how: libraries note that in their configs, some of it in no order.
    """
    configs = [
        network.config if isinstance(network.config, dict) else network.config.to_dict() for network in model.parts
    ]
    found = {
        **{
            f"{type(part).__name__} {place}": _lasting(c)
            for place, (part, c) in enumerate(zip(model.parts, configs, strict=True))
        },
        "scheduler": _lasting(model.scheduler),
        "empty_is_zeros": model.empty_is_zeros,
        "words": caption_ids(model, captions),
    }
    return json.loads(json.dumps(found, default=str))


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in ("transformers_version", "dtype")}


def digest(network: nn.Module) -> str:
    """Of every weight, its name and type."""
    total = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _filled(table: Table, compute: Any, rows: int = ROWS) -> Table:
    team = PartialState()
    if not table.is_complete():
        table.fill(compute, rows, team.process_index, team.num_processes)
        team.wait_for_everyone()
        if team.is_main_process:
            table.finish()
        team.wait_for_everyone()
    return table


def _name(dtype: torch.dtype) -> str:
    """numpy has no bfloat16: such values are kept as float32, which holds them exactly."""
    return {torch.float16: "float16"}.get(dtype, "float32")


def _array(values: Tensor) -> np.ndarray:
    return (values if values.dtype == torch.float16 else values.float()).cpu().numpy()
