"""Shapes of networks, as data: what a recipe says of an autoencoder, a text encoder, a foundation with its module."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AutoencoderPlan(Config):
    latent_channels: PositiveInt = 8
    block_out_channels: tuple[PositiveInt, ...] = (32, 64, 128)
    layers_per_block: PositiveInt = 1
    norm_num_groups: PositiveInt = 8


class TextPlan(Config):
    vocab_size: PositiveInt = 2000
    max_length: PositiveInt = 16
    hidden_size: PositiveInt = 128
    layers: PositiveInt = 2
    heads: PositiveInt = 4


class DenoiserPlan(Config):
    """Shape of a foundation (UNet) and of the module (ControlNet) that mirrors its encoder; level 0 is the top.

    layers_per_block, transformer_layers: one number for all levels, or one a level. A stock ControlNetModel knows
    one layers_per_block only, so different ones need a foundation without a module.
    heads: attention heads of each level, whether it has attention or not. It is what diffusers writes as
    `attention_head_dim`, a misnomer it keeps for old files (its issue 2011): SD 1.5's 8 is 8 heads at every width.
    mid_block: "none" takes it from the foundation; the module keeps one resnet there (see `build`).

    What a student must share with its teacher (latents, text, time and size embeddings) is not here: it is copied.
    """

    block_out_channels: tuple[PositiveInt, ...] = Field(min_length=1)
    layers_per_block: PositiveInt | tuple[PositiveInt, ...] = 1
    attention: tuple[bool, ...]
    transformer_layers: PositiveInt | tuple[PositiveInt, ...] = 1
    heads: tuple[PositiveInt, ...]
    mid_block: Literal["attention", "none"] = "attention"
    norm_num_groups: PositiveInt = 16
    conditioning_channels: tuple[PositiveInt, ...] = (16, 32, 64)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each level."""
        return self._each(self.layers_per_block)

    @property
    def transformers(self) -> tuple[int, ...]:
        """Transformer layers of each level, where it has attention."""
        return self._each(self.transformer_layers)

    def _each(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @model_validator(mode="after")
    def _levels_agree(self) -> DenoiserPlan:
        levels = len(self.block_out_channels)
        if len(self.attention) != levels or len(self.heads) != levels:
            raise ValueError(f"block_out_channels has {levels} levels; give attention and heads {levels} entries each")
        if len(self.layers) != levels or len(self.transformers) != levels:
            raise ValueError(
                f"layers_per_block and transformer_layers: give one number, or {levels}, one for each level"
            )
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % self.norm_num_groups or width % heads:
                raise ValueError(
                    f"width {width} must be a multiple of norm_num_groups={self.norm_num_groups} and heads={heads}"
                )
        return self


StudentName = Literal["bk-base", "bk-small", "bk-tiny", "mobile", "micro"]  # relative to a teacher: student/named.py
StudentPlan = Annotated[
    Annotated[DenoiserPlan, Tag("union[plan]")] | Annotated[StudentName, Tag("union[name]")],
    Discriminator(lambda value: "union[name]" if isinstance(value, str) else "union[plan]"),
]
