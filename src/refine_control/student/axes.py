"""Which space each dimension of each tensor lives in: what must be cut alike when a network is made narrower.

A space is a set of channels that several tensors share: some write it, others read it. How its channels may be chosen:

    all     as they are: latents, text, SDXL's sizes, control pictures, and whatever we do not know
    evenly  evenly spaced: the waves of the time embedding, which are ordered by frequency
    any     whichever
    groups  as many of each norm group: a residual stream, one for each level, and the inside of each resnet
    heads   whole attention heads, then as many of each head

Levels of equal width share one residual stream, because the resnet between them has no projection. What a resnet on
the way up reads is two spaces side by side, [hidden, skip]; GEGLU writes its space twice, [value, gate].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from refine_control.plans import DenoiserPlan


class Axis(NamedTuple):
    """Channels of one space along one dimension. parts: the norm groups or heads that they fall into."""

    choice: Literal["all", "evenly", "any", "groups", "heads"]
    space: str
    size: int
    parts: int = 1


Dimension = tuple[Axis, ...]  # the spaces that stand side by side along it


def axes(name: str, shape: Sequence[int], plan: DenoiserPlan) -> tuple[Dimension, ...]:
    """The spaces of a denoiser's tensor, dimension by dimension; kernels' sides count as all.

    name: as in Denoiser.state_dict(). plan: of that denoiser.
    """
    words = name.split(".")[:-1]
    cut = 3 if words[:2] == ["module", "nets"] else 1
    part = _Part(".".join(words[:cut]), shape, plan)
    known = part.dimensions(words[cut:]) or ()
    rest = tuple((Axis("all", f"{name} {i}", size),) for i, size in enumerate(shape))
    return (*known[: len(shape)], *rest[len(known) :])


def residuals(plan: DenoiserPlan) -> list[tuple[int, int | None]]:
    """What a ControlNet hands over, in the order of its controlnet_down_blocks: (level, layer of that level).

    Layer None is the level's downsampler; (-1, None), as if above the top, is conv_in.
    """
    places: list[tuple[int, int | None]] = [(-1, None)]
    for level, layers in enumerate(plan.layers):
        places += [(level, layer) for layer in range(layers)]
        places += [(level, None)] if level < len(plan.layers) - 1 else []
    return places


class _Part:
    """Foundation or ControlNet, while one of its tensors, of this shape, is looked at."""

    def __init__(self, name: str, shape: Sequence[int], plan: DenoiserPlan) -> None:
        self.name, self.shape, self.plan = name, shape, plan
        self.time = self._any("time", 0), self._any("time", 1)  # written, read

    def dimensions(self, words: list[str]) -> tuple[Dimension, ...] | None:
        levels = len(self.plan.block_out_channels)
        match words:
            case ["down_blocks", block, *rest]:
                level = int(block)
                return self._block(rest, level, level, first=self._stream(max(level - 1, 0)), skips=False)
            case ["mid_block", *rest]:
                return self._block(rest, levels - 1, "mid", first=self._stream(levels - 1), skips=False)
            case ["up_blocks", block, *rest]:
                level = levels - 1 - int(block)
                below = self._stream(min(level + 1, levels - 1))
                return self._block(rest, level, f"up {level}", first=below, skips=True)
            case ["controlnet_down_blocks", n]:
                level = max(0, residuals(self.plan)[int(n)][0])
                return self._stream(level, "foundation"), self._stream(level)
            case ["controlnet_mid_block"]:
                return self._stream(levels - 1, "foundation"), self._stream(levels - 1)
            case ["conv_in"]:
                return (self._stream(0),)
            case ["conv_norm_out"]:
                return (self._stream(0),)
            case ["conv_out"]:
                return self._all("latents", 0), self._stream(0)
            case ["time_embedding", "linear_1"]:
                return self._any("time inside", 0), (Axis("evenly", "waves", self.shape[-1]),)
            case ["time_embedding", "linear_2"]:
                return self.time[0], self._any("time inside", 1)
            case ["add_embedding", "linear_1"]:
                return (self._any("sizes inside", 0),)
            case ["add_embedding", "linear_2"]:
                return self.time[0], self._any("sizes inside", 1)
            case ["controlnet_cond_embedding", *rest]:
                return self._conditioning(rest)
        return None

    def _block(self, words: list[str], level: int, where: object, first: Dimension, skips: bool):
        """first: what the first resnet reads from the block before; skips: each reads a skip beside it."""
        stream, width = self._stream(level), self.plan.block_out_channels[level]
        unit = f"{where} {' '.join(words[:2])}"
        inside = (Axis("groups", f"{self.name} {unit}", width, self.plan.norm_num_groups),)
        match words:
            case ["resnets", layer, *rest]:
                reads = stream if int(layer) else first
                if skips:
                    is_last = int(layer) == self.plan.layers[level]
                    reads += self._stream(max(level - 1, 0)) if is_last else stream
                return {
                    "norm1": (reads,),
                    "conv1": (inside, reads),
                    "time_emb_proj": (inside * (self.shape[0] // width), self.time[1]),
                    "norm2": (inside,),
                    "conv2": (stream, inside),
                    "conv_shortcut": (stream, reads),
                }.get(rest[0])
            case ["downsamplers" | "upsamplers", _, "conv"]:
                return stream, stream
            case ["attentions", _, *rest]:
                return self._transformer(rest, unit, stream, level)
        return None

    def _transformer(self, words: list[str], unit: str, stream: Dimension, level: int):
        tokens = self._any(unit, 0), self._any(unit, 1)  # written, read
        match words:
            case ["norm"]:
                return (stream,)
            case ["proj_in"]:
                return tokens[0], stream
            case ["proj_out"]:
                return stream, tokens[1]
            case ["transformer_blocks", _, "norm1" | "norm2" | "norm3"]:
                return (tokens[0],)
            case ["transformer_blocks", layer, "attn1" | "attn2" as attention, *rest]:
                where = f"{unit} {layer} {attention}"
                reads = (tokens[1],) if attention == "attn1" else ()  # attn2's keys and values read text
                match rest:
                    case ["to_q"]:
                        return self._heads(f"{where} qk", 0, level), tokens[1]
                    case ["to_k"]:
                        return self._heads(f"{where} qk", 0, level), *reads
                    case ["to_v"]:
                        return self._heads(f"{where} v", 0, level), *reads
                    case ["to_out", "0"]:
                        return tokens[0], self._heads(f"{where} v", 1, level)
            case ["transformer_blocks", layer, "ff", "net", "0", "proj"]:
                half = (Axis("any", f"{self.name} {unit} {layer} ff", self.shape[0] // 2),)
                return half * 2, tokens[1]
            case ["transformer_blocks", layer, "ff", "net", "2"]:
                return tokens[0], self._any(f"{unit} {layer} ff", 1)
        return None

    def _conditioning(self, words: list[str]):
        """Convolutions in a row: each reads what the one before it writes."""
        last = 2 * len(self.plan.conditioning_channels) - 2
        match words:
            case ["conv_in"]:
                return (self._any("control 0", 0),)
            case ["blocks", n]:
                return self._any(f"control {int(n) + 1}", 0), self._any(f"control {n}", 1)
            case ["conv_out"]:
                return self._stream(0), self._any(f"control {last}", 1)
        return None

    def _stream(self, level: int, part: str | None = None) -> Dimension:
        widths, top = self.plan.block_out_channels, level
        while top and widths[top - 1] == widths[level]:
            top -= 1
        return (Axis("groups", f"{part or self.name} level {top}", widths[level], self.plan.norm_num_groups),)

    def _heads(self, space: str, dim: int, level: int) -> Dimension:
        return (Axis("heads", f"{self.name} {space}", self._size(dim), self.plan.heads[level]),)

    def _any(self, space: str, dim: int) -> Dimension:
        return (Axis("any", f"{self.name} {space}", self._size(dim)),)

    def _all(self, space: str, dim: int) -> Dimension:
        return (Axis("all", space, self._size(dim)),)

    def _size(self, dim: int) -> int:
        return self.shape[dim] if dim < len(self.shape) else 0  # a bias has no dimension that reads
