"""A student for a budget: the widest of each structure that stays within it, and the best of these.

Structures vary what the literature removes: layers of a block and the mid block (BK-SDM, 2305.15798), the deepest
level, and half of the transformer layers where a level has several (SDXL's ten). None has attention at the top
resolution, where it costs most and helps least (SnapFusion, 2306.00980; MobileDiffusion, 2311.16567), unless the
teacher has it nowhere else. Within a structure all levels keep the teacher's proportions.

Rank: parameters x layers, the largest first: what uses the budget up, and is deep where that comes at the same price.
It is arithmetic, not a measurement of quality: train two when it matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import yaml

from refine_control.diffusion.model import Model
from refine_control.errors import RecipeError
from refine_control.plans import DenoiserPlan
from refine_control.student.count import Setting, count
from refine_control.student.named import plan_of, reshape, scaled
from refine_control.student.plan import Cost, cost, cost_table

STEPS = 64  # widths that are tried, as parts of the teacher's
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Candidate:
    plan: DenoiserPlan
    cost: Cost

    @property
    def label(self) -> str:
        """E.g. '160-320-640-640, 1 layer, no mid, attention at 1 2'."""
        plan = self.plan
        attention = " ".join(str(level) for level, has in enumerate(plan.attention) if has) or "no level"
        widths = "-".join(map(str, plan.block_out_channels))
        transformers = "" if plan.transformer_layers == 1 else f" x{max(plan.transformers)}"
        return (
            f"{widths}, {max(plan.layers)} layer{'s' * (max(plan.layers) > 1)}, "
            f"{'mid' if plan.mid_block == 'attention' else 'no mid'}, attention at {attention}{transformers}"
        )


def search(teacher: Model, macs: int | None = None, parameters: int | None = None, keep: int = 6) -> list[Candidate]:
    """The best students within a budget, of foundation and module together, the best first.

    Args:
        teacher: may lie on the meta device; weights are never read.
        macs, parameters: at most; None is no limit.

    Raises:
        RecipeError: nothing is small enough.
    """
    whole, setting = plan_of(teacher.denoiser), Setting.of(teacher)
    fitting: list[Candidate] = []
    least: Cost | None = None
    for structure in _structures(whole):
        for plan in _widths(whole, structure):
            total = count(plan, setting)
            if (macs is None or total.macs <= macs) and (parameters is None or total.parameters <= parameters):
                fitting.append(Candidate(plan, total))
                break
            least = min(least or total, total, key=lambda c: (c.macs, c.parameters))
    if not fitting:
        assert least, "without a limit everything fits"
        raise RecipeError(
            f"no student of this teacher is within the budget; the smallest has {least.macs:,} MACs "
            f"and {least.parameters:,} parameters: raise --macs or --params, or write a plan by hand"
        )
    return sorted(fitting, key=lambda c: c.cost.parameters * _layers(c.plan), reverse=True)[:keep]


def search_table(candidates: list[Candidate], teacher: Model) -> str:
    """The candidates beside their teacher, and the first of them as YAML for a recipe."""
    costs = {"teacher": cost(teacher.denoiser, teacher), **{c.label: c.cost for c in candidates}}
    return f"{cost_table(costs)}\n\nThe first, for a recipe:\n\n{as_yaml(candidates[0].plan)}"


def as_yaml(plan: DenoiserPlan) -> str:
    return yaml.safe_dump({"student": plan.model_dump(mode="json")}, sort_keys=False, default_flow_style=None)


def parse_amount(text: str, flag: str) -> int:
    """'60G' -> 60000000000; units K, M, G, T; decimals are fine.

    Raises:
        RecipeError: it reads as no positive number.
    """
    unit = UNITS.get(text[-1:].upper(), 1)
    try:
        amount = round(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        amount = 0
    if amount <= 0:
        raise RecipeError(f"{flag} '{text}' is no amount; give e.g. 60G, 50M or 800K")
    return amount


def _structures(whole: DenoiserPlan) -> Iterator[dict]:
    """Changes to the teacher's plan; 'levels' says how many to keep. The least changed come first."""
    levels = len(whole.block_out_channels)
    for keep, layers, mid, share in product(
        (levels, levels - 1) if levels > 2 else (levels,),
        dict.fromkeys((max(whole.layers), 1)),
        dict.fromkeys((whole.mid_block, "none")),
        (1, 2) if max(whole.transformers) > 1 else (1,),
    ):
        below = whole.attention[1:keep]
        yield {
            "levels": keep,
            "layers_per_block": layers,
            "mid_block": mid,
            "attention": (whole.attention[0] and not any(below), *below),
            "transformer_layers": tuple(-(-depth // share) for depth in whole.transformers[:keep]),
        }


def _widths(whole: DenoiserPlan, structure: dict) -> Iterator[DenoiserPlan]:
    """A structure at every width, the widest first."""
    changes = dict(structure)
    levels = changes.pop("levels")
    steps = (scaled(whole, [Fraction(part, STEPS)] * levels) for part in range(STEPS, 0, -1))
    for widths in dict.fromkeys(steps):
        yield reshape(whole, widths, **changes)


def _layers(plan: DenoiserPlan) -> int:
    """Resnets and transformer layers of the foundation, in a row."""
    down_and_up = zip(plan.layers, plan.attention, plan.transformers, strict=True)
    rows = sum((2 * layers + 1) * (1 + has * depth) for layers, has, depth in down_and_up)
    return rows + (2 + plan.transformers[-1] if plan.mid_block == "attention" else 0)
