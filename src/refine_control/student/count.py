"""Parameters and MACs of a plan by arithmetic, in microseconds: what a search needs by the thousand.

Follows diffusers' UNet2DConditionModel and ControlNetModel for SD and SDXL layer by layer; tests hold it against the
networks themselves on the meta device. Biases count as parameters, not as MACs; nor do norms and activations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from refine_control.diffusion.model import Model
from refine_control.plans import DenoiserPlan
from refine_control.student.plan import Cost


@dataclass(frozen=True)
class Count:
    parameters: int = 0
    macs: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.parameters + other.parameters, self.macs + other.macs)

    def times(self, n: int) -> Count:
        return Count(n * self.parameters, n * self.macs)


@dataclass(frozen=True)
class Setting:
    """What a student shares with its teacher. side: latents along one side. added: SDXL's pooled text and sizes."""

    side: int
    downscale: int
    latent_channels: int
    out_channels: int
    tokens: int
    text_width: int
    added_width: int | None
    control_channels: tuple[int, ...]  # of each ControlNet

    @classmethod
    def of(cls, teacher: Model) -> Setting:
        config = teacher.denoiser.foundation.config
        return cls(
            side=config.sample_size,
            downscale=teacher.downscale,
            latent_channels=config.in_channels,
            out_channels=config.out_channels,
            tokens=teacher.tokenizer.model_max_length,
            text_width=config.cross_attention_dim,
            added_width=config.projection_class_embeddings_input_dim if config.addition_embed_type else None,
            control_channels=tuple(net.config.conditioning_channels for net in teacher.denoiser.nets),
        )


def count(plan: DenoiserPlan, setting: Setting) -> Cost:
    """What `cost` counts of the networks that the plan builds."""
    foundation = _foundation(plan, setting)
    modules = sum((_module(plan, setting, channels) for channels in setting.control_channels), Count())
    return Cost(foundation.parameters, modules.parameters, foundation.macs + modules.macs)


def _foundation(plan: DenoiserPlan, s: Setting) -> Count:
    widths = plan.block_out_channels
    total = _encoder(plan, s)
    if plan.mid_block == "attention":
        total += _mid(plan, s)
    for level in reversed(range(len(widths))):
        width, pixels = widths[level], _pixels(level, s)
        hidden = widths[min(level + 1, len(widths) - 1)]
        for layer in range(plan.layers[level] + 1):
            is_last = layer == plan.layers[level]
            skip = widths[max(level - 1, 0)] if is_last else width
            total += _layer(plan, s, level, (width if layer else hidden) + skip)
        if level:
            total += _conv(width, width, 3, 4 * pixels)
    return total + _norm(widths[0]) + _conv(widths[0], s.out_channels, 3, _pixels(0, s))


def _module(plan: DenoiserPlan, s: Setting, control_channels: int) -> Count:
    widths = plan.block_out_channels
    total = _encoder(plan, s) + _conv(widths[0], widths[0], 1, _pixels(0, s))
    for level, width in enumerate(widths):
        total += _conv(width, width, 1, _pixels(level, s)).times(plan.layers[level])
        if level < len(widths) - 1:
            total += _conv(width, width, 1, _pixels(level + 1, s))
    deepest = _pixels(len(widths) - 1, s)
    total += _conv(widths[-1], widths[-1], 1, deepest)
    total += _mid(plan, s) if plan.mid_block == "attention" else _resnet(widths[-1], widths[-1], 4 * widths[0], deepest)
    pixels = _pixels(0, s) * s.downscale**2
    inner = plan.conditioning_channels
    total += _conv(control_channels, inner[0], 3, pixels)
    for here, below in itertools.pairwise(inner):
        total += _conv(here, here, 3, pixels) + _conv(here, below, 3, pixels // 4)
        pixels //= 4
    return total + _conv(inner[-1], widths[0], 3, pixels)


def _encoder(plan: DenoiserPlan, s: Setting) -> Count:
    """Input, embeddings and way down, which foundation and module have in common."""
    widths = plan.block_out_channels
    time = 4 * widths[0]
    total = _conv(s.latent_channels, widths[0], 3, _pixels(0, s)) + _linear(widths[0], time) + _linear(time, time)
    if s.added_width:
        total += _linear(s.added_width, time) + _linear(time, time)
    for level, width in enumerate(widths):
        for layer in range(plan.layers[level]):
            total += _layer(plan, s, level, width if layer else widths[max(level - 1, 0)])
        if level < len(widths) - 1:
            total += _conv(width, width, 3, _pixels(level + 1, s))
    return total


def _layer(plan: DenoiserPlan, s: Setting, level: int, channels_in: int) -> Count:
    """A resnet, and a transformer where the level has attention."""
    width, pixels = plan.block_out_channels[level], _pixels(level, s)
    resnet = _resnet(channels_in, width, 4 * plan.block_out_channels[0], pixels)
    return resnet + _transformer(plan, s, level) if plan.attention[level] else resnet


def _mid(plan: DenoiserPlan, s: Setting) -> Count:
    deepest, width = len(plan.block_out_channels) - 1, plan.block_out_channels[-1]
    resnet = _resnet(width, width, 4 * plan.block_out_channels[0], _pixels(deepest, s))
    return resnet.times(2) + _transformer(plan, s, deepest)


def _resnet(channels_in: int, width: int, time: int, pixels: int) -> Count:
    total = _norm(channels_in) + _conv(channels_in, width, 3, pixels) + _linear(time, width)
    total += _norm(width) + _conv(width, width, 3, pixels)
    return total if channels_in == width else total + _conv(channels_in, width, 1, pixels)


def _transformer(plan: DenoiserPlan, s: Setting, level: int) -> Count:
    width, pixels = plan.block_out_channels[level], _pixels(level, s)
    out = _linear(width, width, pixels)
    self_attention = Count(3 * width**2, 3 * pixels * width**2 + 2 * pixels**2 * width) + out
    text = 2 * width * s.text_width
    cross_attention = Count(width**2 + text, pixels * width**2 + s.tokens * text + 2 * pixels * s.tokens * width) + out
    feed_forward = _linear(width, 8 * width, pixels) + _linear(4 * width, width, pixels)
    block = self_attention + cross_attention + feed_forward + _norm(width).times(3)
    return _norm(width) + out.times(2) + block.times(plan.transformers[level])


def _conv(channels_in: int, channels_out: int, kernel: int, pixels_out: int) -> Count:
    weights = kernel**2 * channels_in * channels_out
    return Count(weights + channels_out, weights * pixels_out)


def _linear(width_in: int, width_out: int, rows: int = 1) -> Count:
    return _conv(width_in, width_out, 1, rows)


def _norm(width: int) -> Count:
    return Count(2 * width)


def _pixels(level: int, s: Setting) -> int:
    return (s.side >> level) ** 2
