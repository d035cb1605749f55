"""A whole comparison: every run, then the tables, the plots and the page. `refine-control demo` is a small one."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from tqdm import tqdm

from refine_control.compare.claims import CLASSICAL
from refine_control.compare.plan import TEACHER, CompareRecipe, Run, base_recipe, runs
from refine_control.compare.runs import Workshop, finish, result_of
from refine_control.compare.sharing import finished, planned_beginning
from refine_control.compare.speed import measure_once, minutes
from refine_control.compare.summary import summarise
from refine_control.distill.checkpoint import step_of
from refine_control.distill.distil import with_known_commits
from refine_control.distill.processes import refuse_processes
from refine_control.errors import BusyError, RecipeError
from refine_control.evaluate.domains import check_fillable
from refine_control.files import is_held


def compare(
    plan: CompareRecipe, overrides: dict[str, str], rivals: Sequence[Path] = (), finished_only: bool = False
) -> str:
    """Trains and scores every row with every seed, resuming what is there. Returns the table, to be printed.

    Writes, in output_dir: ROW/seed-N/run.json and pictures.png, speed.json, scores.json, table.md, table.csv, plots
    and report.html; in work_dir: ROW/seed-N/ with the student, losses and checkpoints. Started twice, two
    processes share the runs out.

    overrides: of the base recipe. rivals: files beside those in compare/rivals/. finished_only: nothing is trained or
    scored, the tables are of the runs that are complete.
    """
    refuse_processes("compare")
    shop = Workshop(base_recipe(plan, overrides), rivals)
    todo = [run for run in _planned(plan, overrides, shop) if not finished_only or result_of(run) is not None]
    if any(run.rival in CLASSICAL for run in todo):
        check_fillable(shop.domains)
    elsewhere = 0
    for run in todo:
        try:
            finish(run, shop)
        except BusyError:
            elsewhere += 1
    if elsewhere:
        tqdm.write(f"{elsewhere} of {len(todo)} runs are another process's; the table has those that it has finished")
    times = measure_once(_speed_file(plan), _trained(todo, shop), shop, alone=_is_alone(plan))
    return summarise(plan, todo, times, shop)


def dry_run(plan: CompareRecipe, overrides: dict[str, str], rivals: Sequence[Path] = ()) -> str:
    """What `compare` would do, as a table: rows, seeds, steps, what is there, how long training the rest takes here.

    What it measures for that it keeps in work_dir, beside no table's own times.
    """
    shop = Workshop(base_recipe(plan, overrides), rivals)
    todo = _planned(plan, overrides, shop)
    planned = Path(plan.work_dir or plan.output_dir) / "planned-speed.json"
    times = measure_once(planned, _trained(todo, shop), shop, other=_speed_file(plan), alone=_is_alone(plan))
    lines = [f"{'row':32} {'seeds':>9} {'steps':>12} {'done':>5} {'training left':>14}"]
    scored = {run.out for run in todo if result_of(run) is not None}
    behind, total = done_of(todo, scored, shop), 0.0
    for row in dict.fromkeys(run.row for run in todo):
        ours = [run for run in todo if run.row == row]
        there = sum(run.out in scored for run in ours)
        left = sum((minutes(run, times) or 0) * (1 - behind[run.out]) for run in ours)
        total += left
        counts = [str(stage.steps) for stage in ours[0].recipe.stages.values() if stage.steps]
        steps = " + ".join(counts) if row in times["step_ms"] else "-"
        seeds = ",".join(str(run.seed) for run in ours)
        lines.append(f"{row:32} {seeds:>9} {steps:>12} {there:>2}/{len(ours):<2} {left:>10.0f} min")
    lines.append(f"{'':32} {'':9} {'':12} {'':5} {total:>10.0f} min")
    return "\n".join(lines)


def _is_alone(plan: CompareRecipe) -> bool:
    """Whether no other process is at a run of this comparison, of rows that are left out here too."""
    locks = Path(plan.work_dir or plan.output_dir).glob("*/seed-*/.lock")
    return not any(is_held(lock.parent) for lock in locks)


def done_of(todo: Sequence[Run], scored: Set[Path], shop: Workshop) -> dict[Path, float]:
    """run.out -> the share of its steps that are done: 1 of those in `scored`. A stage 1 that another run has, or will
    have by then, counts as done where `share_stage1` takes it over."""
    done = {run.out: float(run.out in scored) for run in todo}
    begun = finished(todo[0].work.parent.parent)
    shared = {planned_beginning(recipe, contents.get("method")) for _, recipe, contents in begun}
    for run in todo:
        if done[run.out] or not shop.is_trained(run):
            continue
        rival = shop.rival(run)
        steps = {name: _newest_checkpoint(run.work / name / "checkpoints") for name in run.recipe.stages}
        if rival is None or rival.losses:
            stage1 = planned_beginning(run.recipe, rival.digest if rival else None)
            if stage1 in shared and not (run.work / "stage1").exists():
                steps["stage1"] = run.recipe.stage1.steps
            shared.add(stage1)
        done[run.out] = sum(steps.values()) / run.steps if run.steps else 0.0
    return done


def _newest_checkpoint(folder: Path) -> int:
    return max((step_of(path) for path in folder.glob("step-*")), default=0)


def _planned(plan: CompareRecipe, overrides: dict[str, str], shop: Workshop) -> list[Run]:
    """The teacher's run and all others. Every rival is read first: a mistake there should not cost the rows before."""
    found = {name: shop.find(row.rival) for name, row in plan.rows.items() if row.rival}
    rest = runs(plan, overrides, once=[name for name, rival in found.items() if rival.fill])
    for run in rest:
        if run.rival and found[run.row].fill and "inpaint" not in run.recipe.data.controls:
            raise RecipeError(f"row '{run.row}' inpaints, but data.controls has no 'inpaint'; leave the row out")
    base = shop.base
    for run in rest:
        base = with_known_commits(base, run.work)
    pinned = {"teacher": base.teacher, "controlnets": base.controlnets}
    out, work = (Path(folder) / TEACHER / "seed-0" for folder in (plan.output_dir, plan.work_dir or plan.output_dir))
    teacher = Run(TEACHER, 0, base, None, out, work)
    return [teacher, *(run._replace(recipe=run.recipe.model_copy(update=pinned)) for run in rest)]


def _trained(todo: Sequence[Run], shop: Workshop) -> list[Run]:
    """The first run of each row that is trained."""
    first = {run.row: run for run in reversed(todo)}
    return [run for run in todo if run is first[run.row] and shop.is_trained(run)]


def _speed_file(plan: CompareRecipe) -> Path:
    return Path(plan.output_dir) / "speed.json"
