"""How much of a teacher's colour cast its students take over, by the rows and seeds of a comparison.

    python scripts/bias_table.py

Before it come the commands of scripts/biased_data.py. Reads which runs of the comparison are finished, measures the
cast in the holes of the held-out pictures, and writes bias.json, bias.md and pictures.png beside the comparison's
tables. The cast of a run (cast.json) and some of the pictures (cast.png) are kept beside its result: a student that
was measured is needed no more.

The cast of a picture is the mean over its hole of what was drawn minus the truth, along the shift that was planted.
What passed to a student is its cast minus the one that it would have without this teacher, as a share of what the
biased teacher has more than the clean one. Without this teacher stand the control's run of the same seed, and, where
one of the comparisons --twins has it, the same run with the clean teacher.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biased_data import tint
from derived import has_kind
from refine_control.claim import learnt
from refine_control.compare.plan import TEACHER, TEACHES, CompareRecipe, Run, base_recipe, load, runs, with_results
from refine_control.compare.runs import Workshop, read_sheet, result_of, shown_of
from refine_control.distill.preview import mask_out, save_grid
from refine_control.errors import UserError
from refine_control.evaluate.domains import Domain, drawn, evaluate_model
from refine_control.evaluate.heldout import HeldOut
from refine_control.files import write_whole
from refine_control.provenance import machine
from refine_control.recipe import DistilRecipe, TeacherRecipe, validate
from refine_control.recipe import load as load_recipe

Casts = dict[str, Any]  # of one model: "kind" and "others", each a mean over pictures; of a student its shares too


def cast(drawn: Tensor, true: Tensor, mask: Tensor, direction: Sequence[float]) -> Tensor:
    """(N,): the mean over each hole of drawn minus true, (N, 3, H, W) in [0, 1], along a direction of RGB.

    mask: (N, 1, H, W), 1 = hole.
    """
    along = ((drawn - true) * torch.tensor(direction).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return (along * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def passed(student: float, without: float, biased: float, clean: float) -> float:
    """The share of the teacher's bias that a student has: 0 as without the teacher, 1 all that the teacher has."""
    return (student - without) / (biased - clean)


@dataclass(frozen=True)
class Ruler:
    """Measures casts on held-out pictures: of the kind that the bias is on, and of all others."""

    true: Tensor
    mask: Tensor
    is_kind: Tensor
    kind: str
    shift: tuple[float, ...]

    @classmethod
    def of(cls, heldout: HeldOut, bias: Mapping[str, Any]) -> Ruler:
        """bias: what biased_data.py says that it did. Raises UserError where no held-out picture is of the kind."""
        is_kind = torch.tensor([has_kind(caption, bias["kind"]) for caption in heldout.batch.captions])
        if not is_kind.any() or is_kind.all():
            count = f"{int(is_kind.sum())} of {len(is_kind)} held-out pictures"
            raise UserError(f"{count} are of kind '{bias['kind']}'; choose one that some are of, and others not")
        return cls(heldout.true, heldout.batch.mask, is_kind, bias["kind"], tuple(bias["shift"]))

    @property
    def shown(self) -> Tensor:
        """Which pictures are kept and shown: some of the kind, evenly spread."""
        places = self.is_kind.nonzero().flatten()
        return places[shown_of(len(places))]

    @property
    def direction(self) -> tuple[float, ...]:
        """The shift, scaled so that the largest of its channels is 1."""
        largest = max(map(abs, self.shift))
        return tuple(channel / largest for channel in self.shift)

    def measure(self, drawn: Tensor) -> Casts:
        casts = cast(drawn, self.true, self.mask, self.direction)
        return {"kind": casts[self.is_kind].mean().item(), "others": casts[~self.is_kind].mean().item()}

    def planted(self) -> float:
        """The cast of the held-out pictures of the kind, had they been trained on."""
        pictures = (self.true * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return self.measure(torch.from_numpy(tint(pictures, self.shift)).permute(0, 3, 1, 2) / 255)["kind"]


def finished(plan: CompareRecipe) -> list[tuple[Run, dict[str, Any]]]:
    """The runs that are scored, of all their seeds, with their results.

    Raises:
        UserError: they are of different teachers.
    """
    found = [(run, result) for run in runs(with_results(plan, None), {}) if (result := result_of(run)) is not None]
    if len({result["contents"]["teacher"] for _, result in found}) > 1:
        raise UserError(f"the runs in '{plan.output_dir}' are of different teachers; remove those of the older one")
    return found


def measured(
    run: Run, result: Mapping[str, Any], recipe: DistilRecipe, ruler: Ruler, domains: dict[str, Domain]
) -> Casts | None:
    """The cast of what the run's student draws, kept with some of the pictures; None where neither is there.

    recipe: whose sampler it is drawn with.
    """
    kept, strip_of_it = run.out / "cast.json", run.out / "cast.png"
    heldout, sample = domains["labelled"].heldout.fingerprint(), recipe.sample.model_dump(mode="json")
    of = json.loads(json.dumps([result["identity"], ruler.kind, ruler.shift, heldout, sample]))
    if kept.is_file() and strip_of_it.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before.get("of") == of:
            return before["cast"]
    if not (run.work / "student").is_dir():
        return None
    pictures = pictures_of(run.work / "student", run.work, recipe, domains)
    casts = ruler.measure(pictures)
    save_grid(strip_of_it, [pictures[ruler.shown] * 2 - 1], 1)
    write_whole(kept, json.dumps({"of": of, "cast": casts}))
    return casts


def strip(run: Run) -> Tensor:
    """(n, 3, H, W) in [0, 1], the pictures kept by `measured`."""
    sheet = read_sheet(run.out / "cast.png")
    return torch.stack(sheet.split(sheet.shape[1], 2))


def twins_in(plans: Iterable[CompareRecipe], clean: str) -> dict[str, tuple[Run, dict[str, Any]]]:
    """The finished runs of the clean teacher, by all else that decides what was learnt."""
    found = [one for plan in plans for one in finished(plan)]
    return {_all_but_teacher(one[1]): one for one in found if one[1]["recipe"]["teacher"] == clean}


def _all_but_teacher(result: Mapping[str, Any]) -> str:
    recipe = validate(DistilRecipe, result["recipe"], "run.json")
    learns = {key: value for key, value in learnt(recipe).items() if key not in TEACHES}
    contents = {key: value for key, value in result["contents"].items() if key != "teacher"}
    return json.dumps([learns, contents], sort_keys=True)


def pictures_of(
    model: str | Path,
    folder: Path,
    recipe: DistilRecipe,
    domains: dict[str, Domain],
    controlnets: Sequence[str] = (),
    steps: int | None = None,
) -> Tensor:
    """Of the labelled domain; as `evaluate_model`, of a teacher with its controlnets and its students' only steps."""
    evaluate_model(str(model), domains, recipe, folder, controlnets, steps)
    return drawn(folder)["labelled"]


def table(
    plan: CompareRecipe, control: str, twins: Sequence[CompareRecipe]
) -> tuple[dict[str, Any], dict[str, Tensor], Ruler]:
    """Everything that bias.json holds; and some of what the teachers and each row's first student drew, by name.

    Raises:
        UserError: no run is finished that was measured or has its student, or they are of different teachers.
    """
    shop = Workshop(base_recipe(plan, {}))
    base, work = shop.base, Path(plan.work_dir or plan.output_dir)
    taught = load_recipe(TeacherRecipe, Path(base.teacher).parent / "recipe.yaml")
    if taught.init_from is None:
        raise UserError(f"'{base.teacher}' was not trained on from another teacher; give its recipe an init_from")
    bias = json.loads((Path(taught.data.labelled) / "bias.json").read_text(encoding="utf-8"))
    ruler = Ruler.of(shop.domains["labelled"].heldout, bias)
    known = twins_in(twins, taught.init_from)
    casts: dict[str, dict[int, Casts]] = {}
    strips: dict[str, Tensor] = {}
    for run, result in finished(plan):
        if not (one := measured(run, result, run.recipe, ruler, shop.domains)):
            continue
        casts.setdefault(run.row, {})[run.seed] = one
        if run.row not in strips:
            strips[run.row] = strip(run)
        twin = known.get(_all_but_teacher(result))
        if twin and (other := measured(*twin, run.recipe, ruler, shop.domains)):
            one["twin"] = other["kind"]
    if not casts:
        raise UserError(f"no run of '{plan.output_dir}' is finished with its student in '{work}'")
    drawn_as = shop.domains, base.controlnets, base.only_steps
    teachers = {
        "clean teacher": pictures_of(taught.init_from, work / "clean-teacher", base, *drawn_as),
        "biased teacher": pictures_of(base.teacher, work / TEACHER / "seed-0", base, *drawn_as),
    }
    clean, biased = (ruler.measure(pictures) for pictures in teachers.values())
    shown = {name: pictures[ruler.shown] for name, pictures in teachers.items()} | strips
    add_shares(casts, control, biased["kind"], clean["kind"])
    figures = {
        "title": plan.title, "commit": shop.commit, "machine": machine(), "bias": bias, "direction": ruler.direction,
        "teacher": base.teacher, "clean_teacher": taught.init_from, "teacher_steps": taught.denoiser_stage.steps,
        "sample": base.sample.model_dump(), "heldout": shop.domains["labelled"].heldout.fingerprint(),
        "pictures": {"kind": int(ruler.is_kind.sum()), "others": int((~ruler.is_kind).sum())},
        "planted": ruler.planted(), "clean": clean, "biased": biased, "control": control, "lines": list(shown),
        "rows": {n: {"label": plan.label(n), **over_seeds(seeds), "runs": seeds} for n, seeds in casts.items()},
    }  # fmt: skip
    return figures, shown, ruler


def add_shares(casts: Mapping[str, dict[int, Casts]], control: str, biased: float, clean: float) -> None:
    """Gives each student its "share" against the control of its seed and its "share_of_twin", where these are there."""
    for row, seeds in casts.items():
        for seed, one in seeds.items():
            without = casts.get(control, {}).get(seed)
            if without and row != control:
                one["share"] = passed(one["kind"], without["kind"], biased, clean)
            if "twin" in one:
                one["share_of_twin"] = passed(one["kind"], one["twin"], biased, clean)


def over_seeds(seeds: Mapping[int, Casts]) -> dict[str, dict[str, Any]]:
    """{"mean", "sd", "n"} of every figure, over the n seeds that have it; no sd of one."""
    values: dict[str, list[float]] = {}
    for one in seeds.values():
        for key, value in one.items():
            values.setdefault(key, []).append(value)
    several = {key: some for key, some in values.items() if len(some) > 1}
    return {
        "mean": {key: statistics.mean(some) for key, some in values.items()},
        "sd": {key: statistics.stdev(some) for key, some in several.items()},
        "n": {key: len(some) for key, some in values.items()},
    }


def markdown(figures: Mapping[str, Any]) -> str:
    kind, control = figures["bias"]["kind"], figures["control"]
    lines = [
        f"# {figures['title']}: what passes",
        "",
        _how(figures),
        "",
        f"| | cast, {kind} | cast, others | share, against {control} | share, against the twin | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, key in (("Clean teacher", "clean"), ("Biased teacher", "biased")):
        lines.append(f"| {label} | {figures[key]['kind']:+.3f} | {figures[key]['others']:+.3f} | – | – | – |")
    for row in figures["rows"].values():
        cells = [_cell(row, key) for key in ("kind", "others", "share", "share_of_twin")]
        lines.append(f"| {row['label']} | {' | '.join(cells)} | {len(row['runs'])} |")
    return "\n".join([*lines, "", f"Lines of the picture: truth, masked, {', '.join(figures['lines'])}.", ""])


def _how(figures: Mapping[str, Any]) -> str:
    bias, count, sample = figures["bias"], figures["pictures"], figures["sample"]
    shifted, along = (", ".join(f"{one:+.2g}" for one in three) for three in (bias["shift"], figures["direction"]))
    train = bias["pictures"]["train"]
    return (
        f"The clean teacher was trained on for {figures['teacher_steps']:,} steps with {train['shifted']:,} of "
        f"{train['all']:,} captioned pictures, those of kind '{bias['kind']}', shifted in their holes by "
        f"({shifted}) in RGB; all students learn on pictures as they are. Cast: drawn minus true along ({along}), mean "
        f"over the hole, then over {count['kind']} held-out pictures of the kind and {count['others']} others. The "
        f"same pictures, shifted as in training, have a cast of {figures['planted']:+.3f}. Share: what a student has "
        f"more than '{figures['control']}' of the same seed, or than its twin, the same student of the clean teacher, "
        f"by what the biased teacher has more than the clean one. {sample['num_inference_steps']} sampler steps, "
        f"guidance {sample['guidance_scale']:g}. Mean ± standard deviation over training seeds, over fewer of "
        f"them where that number stands behind it; code at {figures['commit'] or 'no commit'}."
    )


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row["mean"]:
        return "–"
    mean, sd, n = row["mean"][key], row["sd"].get(key), row["n"][key]
    if key.startswith("share"):
        text = f"{round(100 * mean)} %" + ("" if sd is None else f" ± {round(100 * sd)}")
    else:
        text = f"{mean:+.3f}" + ("" if sd is None else f" ± {sd:.3f}")
    return text if n == len(row["runs"]) else f"{text} ({n})"


def save_pictures(path: Path, ruler: Ruler, shown: Mapping[str, Tensor]) -> None:
    """Truth, what is known of it, then what the teachers and each row drew."""
    true = ruler.true[ruler.shown] * 2 - 1
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [true, mask_out(true, ruler.mask[ruler.shown]), *(drawn * 2 - 1 for drawn in shown.values())]
    save_grid(path, rows, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/compare-cast.yaml"))
    parser.add_argument("--control", default="scratch", help="the row that learnt nothing from the teacher")
    parser.add_argument("--twins", type=Path, nargs="*", help="recipes of comparisons with the clean teacher",
                        default=[Path("recipes/compare-terms.yaml")])  # fmt: skip
    args = parser.parse_args()
    plan, _ = load(args.recipe, {})
    figures, shown, ruler = table(plan, args.control, [load(path, {})[0] for path in args.twins])
    out = Path(plan.output_dir)
    command = shlex.join(["python", f"scripts/{Path(__file__).name}", *sys.argv[1:]])
    write_whole(out / "bias.json", json.dumps({"command": command, **figures}, indent=1))
    text = markdown(figures)
    write_whole(out / "bias.md", text)
    save_pictures(out / "pictures.png", ruler, shown)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bias_table: {error}")
