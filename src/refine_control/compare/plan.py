"""What is compared: rows over seeds, each a base recipe with some keys set otherwise. Data only; no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from refine_control.errors import RecipeError
from refine_control.plans import Config
from refine_control.recipe import DistilRecipe, read_tree, validate

TEACHER = "teacher"  # the row that every comparison has, first
TEACHES = ("teacher", "controlnets")  # keys of a recipe that are alike in all rows
# Likewise, of what the rows are scored on, and how.
SCORED = ("evaluate", "sample", "masks", "data.controls", "data.fit", "data.resolution")
OF_A_RUN = ("seed", "output_dir")  # which the comparison gives each
LEARNT = (".num_inference_steps", ".steps", ".optimizer")  # of a stage, which bear on the sampler and on the run
# If a comparison sets them, its teacher is drawn and scored so too.
SHARED = (*TEACHES, *SCORED, "data.labelled", "data.skip_corrupt", "run")


def _is_of(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or below one, or the whole of what one is in."""
    return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in sections)


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("give one seed or more, each once")
    return seeds


class RowPlan(Config):
    """One row. rival: a file of compare/rivals/ or of --rival, by its name; without one the paper's loss trains it."""

    label: str = ""
    rival: str | None = None
    set: dict[str, Any] = Field({}, description="dotted keys of the base recipe; 'stages.' means both")
    seeds: tuple[int, ...] | None = None  # instead of the comparison's

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return value if value is None else _each_once(value)

    @field_validator("rival")
    @classmethod
    def _a_name_is_no_path(cls, value: str | None) -> str | None:
        if value is not None and not value.replace("-", "_").isidentifier():
            raise ValueError("a rival is named by words with '-' between, as its file is; a recipe cannot name a path")
        return value

    @field_validator("set")
    @classmethod
    def _is_taught_and_scored_as_the_others(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if _is_of(key, TEACHES):
                raise ValueError(f"all rows have one teacher; set '{key}' for the whole comparison, beside its rows")
            if _is_of(key, SCORED):
                raise ValueError(f"all rows are scored alike; set '{key}' for the whole comparison, beside its rows")
            if _is_of(key, OF_A_RUN):
                raise ValueError(f"'{key}' is the comparison's: see its 'seeds', 'output_dir' and 'work_dir'")
        return value


class CompareRecipe(Config):
    """`refine-control compare`. output_dir keeps what is small: a JSON for each run, tables, plots, the page. work_dir
    keeps students and checkpoints (by default the same folder). ours: the row that all others are tested against.
    proof: whether the table says where ours is above the others and near the teacher; an ablation need not."""

    title: str = "Refine-Control: from a teacher to a student"
    output_dir: str
    work_dir: str | None = None
    base: str
    set: dict[str, Any] = Field({}, description="dotted keys of the base recipe, for all rows")
    seeds: tuple[int, ...] = (0, 1, 2)
    ours: str = "refine-control"
    proof: bool = True
    rows: dict[str, RowPlan]

    @field_validator("seeds")
    @classmethod
    def _at_least_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _each_once(value)

    @field_validator("rows")
    @classmethod
    def _names_are_folders(cls, value: dict[str, RowPlan]) -> dict[str, RowPlan]:
        if not value:
            raise ValueError("give one row or more")
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name) or name == TEACHER:
                raise ValueError(f"'{name}' is no name for a row: letters, digits, '-' and '.'; '{TEACHER}' is taken")
        return value

    @model_validator(mode="after")
    def _ours_is_a_row(self) -> CompareRecipe:
        if self.ours not in self.rows:
            raise ValueError(f"'ours' = '{self.ours}' is no row; there are: {', '.join(self.rows)}")
        return self

    def label(self, row: str) -> str:
        return "Teacher" if row == TEACHER else self.rows[row].label or row


class Run(NamedTuple):
    """One row with one seed: its recipe, where its results and where its students go."""

    row: str
    seed: int
    recipe: DistilRecipe
    rival: str | None
    out: Path
    work: Path

    @property
    def steps(self) -> int:
        """Of both stages."""
        return sum(stage.steps for stage in self.recipe.stages.values())


def load(path: Path, overrides: dict[str, str]) -> tuple[CompareRecipe, dict[str, str]]:
    """A comparison, and the overrides that are of its base recipe: all that are no keys of the comparison itself."""
    own = {key: value for key, value in overrides.items() if key.split(".")[0] in CompareRecipe.model_fields}
    tree = read_tree(CompareRecipe, path, own)
    tree["base"] = str((path.parent / str(tree.get("base", ""))).resolve()) if tree.get("base") else None
    return validate(CompareRecipe, tree, f"recipe '{path}'"), {k: v for k, v in overrides.items() if k not in own}


def narrowed(plan: CompareRecipe, rows: Sequence[str] | None, seeds: Sequence[int] | None) -> CompareRecipe:
    """Some of the rows, in the order given, and other seeds for all of them.

    Raises:
        RecipeError: a name is no row.
    """
    chosen = plan.rows
    if rows is not None:
        for name in rows:
            if name not in plan.rows:
                raise RecipeError(f"no row '{name}'; there are: {', '.join(plan.rows)}")
        chosen = {name: plan.rows[name] for name in rows}
    if seeds is not None:
        chosen = {name: row.model_copy(update={"seeds": None}) for name, row in chosen.items()}
    return plan.model_copy(update={"rows": chosen, "seeds": tuple(seeds) if seeds else plan.seeds})


def with_results(plan: CompareRecipe, part: CompareRecipe | None) -> CompareRecipe:
    """The rows and seeds of `part`, and all of plan's rows and any seeds that have a result."""
    rows = {}
    for name, row in plan.rows.items():
        found = (path.parent.name for path in Path(plan.output_dir).glob(f"{name}/seed-*/run.json"))
        seeds = {int(number) for folder in found if (number := folder.removeprefix("seed-")).isdigit()}
        if part and name in part.rows:
            seeds.update(part.rows[name].seeds or part.seeds)
        if seeds:
            rows[name] = row.model_copy(update={"seeds": tuple(sorted(seeds))})
    return plan.model_copy(update={"rows": rows})


def base_recipe(plan: CompareRecipe, overrides: dict[str, str]) -> DistilRecipe:
    """The base with the comparison's own teacher, sampler, controls and masks: of the teacher's row, and of what every
    row is scored on."""
    shared = {k: v for k, v in plan.set.items() if _is_of(k, SHARED) or k.endswith(LEARNT)}
    return _recipe(plan, [shared, overrides])


def runs(plan: CompareRecipe, overrides: dict[str, str], once: Sequence[str] = ()) -> list[Run]:
    """All runs: seed by seed, so that a table over some seeds is there early. once: rows that need no second seed.

    overrides: of the command line, laid over what the rows set.
    """
    out, work = Path(plan.output_dir), Path(plan.work_dir or plan.output_dir)
    ordered: dict[int, list[Run]] = {}
    for name, row in plan.rows.items():
        seeds = row.seeds or plan.seeds
        for place, seed in enumerate(seeds[:1] if name in once else seeds):
            part = f"{name}/seed-{seed}"
            layers = [plan.set, row.set, overrides, {"seed": seed, "output_dir": str(work / part)}]
            run = Run(name, seed, _recipe(plan, layers, f"row '{name}'"), row.rival, out / part, work / part)
            ordered.setdefault(place, []).append(run)
    return [run for place in sorted(ordered) for run in ordered[place]]


def _recipe(plan: CompareRecipe, layers: Sequence[Mapping[str, Any]], origin: str = "") -> DistilRecipe:
    """The base with layers of dotted keys over it, the last on top."""
    laid: dict[str, Any] = {}
    for key, value in (item for layer in layers for item in layer.items()):
        for one in [f"stage{n}.{key[7:]}" for n in (1, 2)] if key.startswith("stages.") else [key]:
            laid.pop(one, None)  # so that it comes after what the layers below set
            laid[one] = value
    tree = read_tree(DistilRecipe, plan.base, laid)
    tree.setdefault("output_dir", plan.output_dir)
    return validate(DistilRecipe, tree, f"recipe '{plan.base}'" + (f", {origin}" if origin else ""))
