"""Students by name, relative to a teacher.

bk-base, bk-small, bk-tiny: the block-removed students of BK-SDM (Kim et al. 2023, 2305.15798), at full width: one layer
per block; also no mid block; also without the deepest level. They save parameters, hardly compute.
mobile, micro: narrower too. One layer per block, no mid block, at most three levels, no attention at the top
resolution, where it costs most: 160/320/512 and 64/128/192 channels of SD's and SDXL's 320/640/1280.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from refine_control.diffusion.model import Denoiser
from refine_control.errors import ModelError, RecipeError
from refine_control.plans import DenoiserPlan, StudentName

SHARES: dict[str, tuple[Fraction, ...]] = {  # of the teacher's width, from the top level down
    "mobile": (Fraction(1, 2), Fraction(1, 2), Fraction(2, 5)),
    "micro": (Fraction(1, 5), Fraction(1, 5), Fraction(3, 20)),
}
MICRO_CONDITIONING = (16, 32, 64, 96)  # at most: the usual 256 would be half of micro's work
ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}


def plan_of(teacher: Denoiser) -> DenoiserPlan:
    """The plan that a built foundation and its module follow.

    Raises:
        ModelError: blocks of other kinds than SD's and SDXL's, a depth that changes within a level, or numbers that no
            plan may have.
    """
    config = teacher.foundation.config
    levels = len(config.block_out_channels)
    foreign = set(config.down_block_types) - set(ATTENTION)
    if foreign:
        raise ModelError(f"no plan has the teacher's {foreign.pop()}; we make students of {' and '.join(ATTENTION)}")
    depths = _each(config.transformer_layers_per_block, levels)
    if not all(isinstance(depth, int) for depth in depths):
        raise ModelError(f"transformer_layers_per_block {list(depths)}: the teacher's depth changes within a level")
    conditioning = {}
    if teacher.nets:
        conditioning["conditioning_channels"] = tuple(teacher.nets[0].config.conditioning_embedding_out_channels)
    try:
        return DenoiserPlan(
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=_short(_each(config.layers_per_block, levels)),
            attention=tuple(ATTENTION[kind] for kind in config.down_block_types),
            transformer_layers=_short(depths),
            heads=_each(config.attention_head_dim, levels),
            mid_block="none" if config.mid_block_type is None else "attention",
            norm_num_groups=config.norm_num_groups,
            **conditioning,
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"no plan has the shape of the teacher: {' '.join(str(error).split())[:300]}") from None


def named_plan(name: StudentName, teacher: Denoiser) -> DenoiserPlan:
    """The plan of a named student of this teacher.

    Raises:
        RecipeError: bk-tiny of a teacher with one level. ModelError: see `plan_of`.
    """
    whole = plan_of(teacher)
    levels = len(whole.block_out_channels)
    if name == "bk-base":
        return reshape(whole, whole.block_out_channels, layers_per_block=1)
    if name == "bk-small":
        return reshape(whole, whole.block_out_channels, layers_per_block=1, mid_block="none")
    if name == "bk-tiny":
        if levels == 1:
            raise RecipeError("student bk-tiny drops the deepest level and the teacher has one only; take bk-small")
        return reshape(whole, whole.block_out_channels[:-1], layers_per_block=1, mid_block="none")
    widths = scaled(whole, SHARES[name])
    changes: dict[str, Any] = {"attention": (False, *whole.attention[1 : len(widths)])}
    if name == "micro":
        caps = (*MICRO_CONDITIONING, *MICRO_CONDITIONING[-1:] * len(whole.conditioning_channels))
        changes["conditioning_channels"] = tuple(map(min, whole.conditioning_channels, caps))
    return reshape(whole, widths, layers_per_block=1, mid_block="none", **changes)


def reshape(teacher: DenoiserPlan, widths: Sequence[int], **changes: Any) -> DenoiserPlan:
    """The teacher's plan with these widths, for its first len(widths) levels, and further changes."""
    levels = len(widths)
    shape = {
        **teacher.model_dump(),
        "block_out_channels": tuple(widths),
        "layers_per_block": teacher.layers[:levels],
        "attention": teacher.attention[:levels],
        "transformer_layers": teacher.transformers[:levels],
        "heads": tuple(map(_heads, widths, teacher.block_out_channels, teacher.heads)),
        **changes,
    }
    for key in ("layers_per_block", "transformer_layers"):
        shape[key] = _short(_each(shape[key], levels))
    return DenoiserPlan(**shape)


def scaled(teacher: DenoiserPlan, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """The teacher's widths times these shares, as multiples of the norm groups; as many levels as there are of both."""
    step = teacher.norm_num_groups
    return tuple(
        max(step, round(width * share / step) * step)
        for width, share in zip(teacher.block_out_channels, shares, strict=False)
    )


def _heads(width: int, teacher_width: int, teacher_heads: int) -> int:
    """As many as the teacher has, else the most that divide the width, best with a multiple of 8 channels a head."""
    if width == teacher_width:
        return teacher_heads
    fitting = [heads for heads in range(1, teacher_heads + 1) if width % heads == 0]
    return max(fitting, key=lambda heads: (width // heads % 8 == 0, heads))


def _each(value: Any, levels: int) -> tuple:
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _short(values: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else values
