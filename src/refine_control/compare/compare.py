"""A whole comparison: every run, then the tables, the plots and the page. `refine-control demo` is a small one."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from pathlib import Path

from tqdm import tqdm

from refine_control.compare.claims import CLASSICAL
from refine_control.compare.plan import TEACHER, CompareRecipe, Run, base_recipe, runs, with_results
from refine_control.compare.runs import Workshop, finish, result_of
from refine_control.compare.sharing import finished, planned_beginning
from refine_control.compare.speed import Times, kept_times, measure, minutes, untimed
from refine_control.compare.summary import summarise
from refine_control.distill.checkpoint import step_of
from refine_control.distill.distil import with_known_commits
from refine_control.distill.processes import pick_device, refuse_processes
from refine_control.errors import BusyError, RecipeError, UserError
from refine_control.evaluate.domains import check_fillable
from refine_control.files import is_held, write_whole
from refine_control.provenance import machine


def compare(
    plan: CompareRecipe,
    overrides: dict[str, str],
    rivals: Sequence[Path] = (),
    finished_only: bool = False,
    part: CompareRecipe | None = None,
) -> str:
    """Trains and scores every row with every seed, resuming what is there. Returns the table, to be printed.

    Writes, in output_dir: ROW/seed-N/run.json and pictures.png, speed.json, and of all runs that are complete
    scores.json, table.md, table.csv, plots and report.html; in work_dir: ROW/seed-N/ with the student, losses and
    checkpoints. Started twice, two processes share the runs out.

    overrides: of the base recipe. rivals: files beside those in compare/rivals/. finished_only: nothing is trained or
    scored. part: `narrowed`, the rows and seeds that are trained.

    Raises:
        UserError: runs that are there were made on another device. RecipeError: they are of another recipe.
    """
    refuse_processes("compare")
    shop = Workshop(base_recipe(plan, overrides), rivals)
    todo = _planned(with_results(plan, None if finished_only else part or plan), overrides, shop)
    if finished_only:
        todo = [run for run in todo if result_of(run) is not None]
    todo.sort(key=lambda run: result_of(run) is None)  # what is there is checked before anything is trained
    _refuse_mixed_devices(todo)
    if any(run.rival in CLASSICAL for run in todo):
        check_fillable(shop.domains)
    busy = todo
    for _ in range(2):  # what was busy may be finished by now, or given up
        busy = [run for run in busy if not _finish_unless_busy(run, shop)]
    if busy:
        tqdm.write(f"{len(busy)} of {len(todo)} runs are another process's; the table has those that are finished")
    there = _in_order([run for run in todo if run not in busy], plan)
    _refuse_mixed_devices(there)  # as another process may have made some by now
    return summarise(plan, there, _times(plan, _trained(there, shop), shop), shop)


def _finish_unless_busy(run: Run, shop: Workshop) -> bool:
    """Whether that was done; False where another process is at the run."""
    try:
        finish(run, shop)
    except BusyError:
        return False
    return True


def _times(plan: CompareRecipe, rows: Sequence[Run], shop: Workshop) -> Times:
    """As they were measured before, or now; none while another process trains."""
    if times := kept_times([_speed_file(plan)], rows, shop):
        return times
    if not _is_alone(plan):
        tqdm.write("another process is training: the table is without times, of the last that ends it has them")
        return untimed()
    times = measure(rows, shop)
    write_whole(_speed_file(plan), json.dumps(times, indent=1))
    return times


def _in_order(todo: Sequence[Run], plan: CompareRecipe) -> list[Run]:
    """As the plan has its rows, each from its first seed on."""
    rows = [TEACHER, *plan.rows]
    return sorted(todo, key=lambda run: (rows.index(run.row), run.seed))


def _refuse_mixed_devices(todo: Sequence[Run]) -> None:
    """Of the results that are there, and of the runs that are left to do."""
    devices = set()
    for run in todo:
        result = result_of(run) or {"machine": machine(), "device": pick_device(run.recipe.run.device).type}
        gpu, used = result["machine"]["gpu"], result.get("device")  # the latter is not in results of earlier versions
        devices.add(gpu if gpu and used != "cpu" else (used or "cpu").upper())
    if len(devices) > 1:
        raise UserError(f"the runs are of different devices ({', '.join(sorted(devices))}); give each an output_dir")


def dry_run(plan: CompareRecipe, overrides: dict[str, str], rivals: Sequence[Path] = ()) -> str:
    """What `compare` would do, as a table: rows, seeds, steps, what is there, how long training takes here, of a run
    from its first step and of what is left to do.

    What it measures for that it keeps in work_dir, beside no table's own times.
    """
    shop = Workshop(base_recipe(plan, overrides), rivals)
    todo = _planned(plan, overrides, shop)
    planned = Path(plan.work_dir or plan.output_dir) / "planned-speed.json"
    trained = _trained(todo, shop)
    times = kept_times([planned, _speed_file(plan)], trained, shop)
    if times is None:
        times = measure(trained, shop)
        if _is_alone(plan):
            write_whole(planned, json.dumps(times, indent=1))
    lines = [f"{'row':32} {'seeds':>9} {'steps':>12} {'done':>5} {'a run':>10} {'left':>10}"]
    scored = {run.out for run in todo if result_of(run) is not None}
    behind, total = done_of(todo, scored, shop), 0.0
    for row in dict.fromkeys(run.row for run in todo):
        ours = [run for run in todo if run.row == row]
        there = sum(run.out in scored for run in ours)
        whole = minutes(ours[0], times) or 0
        left = sum(whole * (1 - behind[run.out]) for run in ours)
        total += left
        counts = [str(stage.steps) for stage in ours[0].recipe.stages.values() if stage.steps]
        steps = " + ".join(counts) if row in times["step_ms"] else "-"
        seeds = ",".join(str(run.seed) for run in ours)
        lines.append(f"{row:32} {seeds:>9} {steps:>12} {there:>2}/{len(ours):<2} {whole:>6.1f} min {left:>6.0f} min")
    lines.append(f"{'':32} {'':9} {'':12} {'':5} {'':10} {total:>6.0f} min")
    return "\n".join(lines)


def _is_alone(plan: CompareRecipe) -> bool:
    """Whether no other process is at a run of this comparison."""
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
