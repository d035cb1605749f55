"""Captions -> what a denoiser reads of them, number for number as the stock pipelines' `encode_prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class Text(NamedTuple):
    """tokens: (B, L, D), what cross-attention sees. pooled: (B, P), one vector a caption; SDXL only."""

    tokens: Tensor
    pooled: Tensor | None = None


def embed_sd(captions: Sequence[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> Text:
    """The last hidden state. '' goes through the encoder like any other caption."""
    tokens = _tokenize(captions, tokenizer, encoder)
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return Text(encoder(tokens.input_ids, attention_mask=mask)[0])


def embed_xl(
    captions: Sequence[str],
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    empty_is_zeros: bool,
) -> Text:
    """The penultimate hidden states of both encoders, side by side, and the second encoder's projection.

    empty_is_zeros: '' means no caption, all zeros (the pipeline's force_zeros_for_empty_prompt); else it is encoded.
    """
    outputs = [
        encoder(_tokenize(captions, tokenizer, encoder).input_ids, output_hidden_states=True)
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
    ]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = outputs[-1].text_embeds
    if empty_is_zeros:
        said = torch.tensor([caption != "" for caption in captions], device=tokens.device)
        tokens, pooled = tokens * said[:, None, None], pooled * said[:, None]
    return Text(tokens, pooled)


def _tokenize(captions: Sequence[str], tokenizer: CLIPTokenizer, encoder: Any) -> Any:
    """input_ids and attention_mask, int64 (B, L), longer captions cut."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.device)
