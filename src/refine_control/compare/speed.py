"""What a training step of each row takes, all rows in turns: so a busy moment, or another machine, hits all alike.

Steps times this is the wall time that a table shows. The logs' own seconds depend on what else ran, on which machine,
and on what was cached by a row before.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from refine_control.compare.plan import TEACHER, Run
from refine_control.compare.runs import Workshop, blank
from refine_control.distill.distil import OURS
from refine_control.distill.learner import Learner
from refine_control.distill.loop import take_step
from refine_control.distill.processes import gather, share_out
from refine_control.distill.stages import Distillation
from refine_control.evaluate.heldout import latency_ms, one_forward
from refine_control.provenance import machine

Times = dict[str, Any]
ROUNDS, TURNS, WARM = 3, 3, 2  # each learner is made anew in each round; its first turns are not counted
OF = "fastest"  # which of all turns counts for a step: what else this machine does only adds to one


def kept_times(paths: Sequence[Path], runs: Sequence[Run], shop: Workshop) -> Times | None:
    """What `measure` kept in one of the files, if that had these rows with these recipes, on such a machine."""
    recipes = _recipes(runs, shop)
    for file in paths:
        with suppress(OSError, ValueError, KeyError):  # not there, torn, or of another version
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["of"] == OF and recipes.items() <= kept["recipes"].items() and kept["machine"] == machine():
                return cast(Times, kept)
    return None


def measure(runs: Sequence[Run], shop: Workshop) -> Times:
    """{"step_ms": {row: {stage: ms}}, "forward_ms": {row: ms}, "machine", "rounds", "turns", ...}."""
    return {"step_ms": step_times(runs, shop), "forward_ms": forward_times(runs, shop), "of": OF, "rounds": ROUNDS,
            "turns": TURNS, "machine": machine(), "recipes": _recipes(runs, shop)}  # fmt: skip


def untimed() -> Times:
    """As `measure`, of no row: beside another process's training all takes longer."""
    return {"step_ms": {}, "forward_ms": {}, "rounds": 0, "turns": 0, "machine": machine()}


def _recipes(runs: Sequence[Run], shop: Workshop) -> dict[str, dict[str, str]]:
    """Row -> stage -> what decides the time of its step."""
    return {
        run.row: {name: _kind(run, name, shop) for name, stage in run.recipe.stages.items() if stage.steps}
        for run in runs
    }


def step_times(runs: Sequence[Run], shop: Workshop) -> dict[str, dict[str, float]]:
    """Row -> {"stage1": ms, "stage2": ms} of one step; stages without steps are left out.

    Of all turns the fastest. Rows whose steps do the same work are measured once. One learner is in memory at a time.
    """
    steps = {(run.row, name): run for run in runs for name, stage in run.recipe.stages.items() if stage.steps}
    kinds = {_kind(run, stage, shop): (run, stage) for (_, stage), run in steps.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in tqdm(range(ROUNDS), desc=f"timing {len(kinds)} kinds of steps", unit="round"):
        for kind, (run, stage) in kinds.items():
            with tempfile.TemporaryDirectory() as scratch:
                step = _step(run, stage, shop, Path(scratch))
                for turn in range(WARM + TURNS):
                    began = time.perf_counter()
                    step(turn)
                    if turn >= WARM:
                        taken[kind].append(1e3 * (time.perf_counter() - began))
    times: dict[str, dict[str, float]] = {}
    for (row, stage), run in steps.items():
        times.setdefault(row, {})[stage] = min(taken[_kind(run, stage, shop)])
    return times


def _kind(run: Run, name: str, shop: Workshop) -> str:
    """What decides how long a step takes."""
    recipe, stage, rival = run.recipe, run.recipe.stages[name], shop.rival(run)
    terms = [term for term, weight in stage.weights.model_dump().items() if weight]
    parts = [
        recipe.student,
        recipe.alignment,
        stage.batch_size,
        stage.optimizer,
        stage.labelled_fraction,
        rival and rival.digest,
        recipe.teacher,
        recipe.controlnets,
        recipe.data.resolution,
        recipe.data.controls,
        recipe.run.model_dump(),
    ]
    return f"{terms} {parts}"


def forward_times(runs: Sequence[Run], shop: Workshop) -> dict[str, float]:
    """Row -> ms of one forward on one picture, medians, in turns: of foundation + module, the teacher's too, or of a
    rival's own network."""
    forwards: dict[str, Callable[[], object]] = {}
    plans: dict[str, str] = {}  # row -> the student that it shares with others
    for run in runs:
        rival, distiller, plan = shop.rival(run), shop.distiller(run.recipe), str(run.recipe.student)
        if rival and rival.network:
            network: Any = rival.network().to(distiller.teacher.device).eval().requires_grad_(False)
            forwards[run.row] = partial(network.paint, *blank(run.recipe.data.resolution, distiller.teacher.device))
            continue
        forwards.setdefault(TEACHER, one_forward(distiller.teacher))
        if plan not in plans.values():
            student, _ = distiller.fresh_student(run.recipe, measure=False)
            student.eval().requires_grad_(False)
            forwards[run.row] = one_forward(replace(distiller.teacher, denoiser=student))
        plans[run.row] = plan
    measured = {name: taken["median"] for name, taken in latency_ms(forwards).items()}
    by_plan = {plans[row]: ms for row, ms in measured.items() if row in plans}
    return measured | {row: by_plan[plan] for row, plan in plans.items()}


def minutes(run: Run, measured: dict[str, Any]) -> float | None:
    """Of the training of a run; None where its row is not trained."""
    if run.row not in measured["step_ms"]:
        return None
    return sum(run.recipe.stages[stage].steps * ms for stage, ms in measured["step_ms"][run.row].items()) / 60e3


def _step(run: Run, name: str, shop: Workshop, folder: Path) -> Callable[[int], None]:
    """turn -> one training step of a row, batches and all; nothing that the teacher made is kept."""
    recipe, distiller, rival = run.recipe, shop.distiller(run.recipe), shop.rival(run)
    stage = recipe.stages[name]
    objective: nn.Module
    if rival and rival.network:
        objective, weights = rival.network().to(distiller.teacher.device), {"task": 1.0}
    else:
        student, bridges = distiller.fresh_student(recipe, measure=False)
        losses = rival.losses if rival and rival.losses else OURS.losses
        objective = Distillation(student, distiller.teacher, bridges, distiller.encoder, stage, losses=losses)
        weights = stage.weights.model_dump()
    team = gather(distiller.teacher.device)
    batches = share_out(distiller.loader(recipe, stage, "speed"), stage, recipe.run, team)
    learner = Learner(objective, weights, stage, recipe.run, team, folder)

    def step(turn: int) -> None:
        take_step(learner, 0, batches(turn % WARM), weights)  # met while warming up, so that all is in memory
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step
