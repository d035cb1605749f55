"""One run: a row with one seed, trained where it has to be and scored. Its result is one JSON, whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from refine_control import __version__
from refine_control.claim import has_trained, learnt, rounding
from refine_control.compare.plan import TEACHER, Run
from refine_control.compare.rivals import Rival, find
from refine_control.compare.sharing import share_stage1
from refine_control.distill.distil import OURS, Distiller
from refine_control.distill.loop import train
from refine_control.distill.processes import pick_device, set_threads
from refine_control.distill.stages import VERSION, Method
from refine_control.errors import DataError, RecipeError
from refine_control.evaluate.domains import Domain, drawn, evaluate_model, open_domains
from refine_control.evaluate.score import scoring
from refine_control.files import hold, write_whole
from refine_control.provenance import commit, machine
from refine_control.recipe import DistilRecipe, load

SHOWN = 12  # pictures of each domain, kept of a run to be looked at


@dataclass
class Workshop:
    """What runs share: teachers with their data and what was computed of them, held-out pictures, rivals.

    base: names the held-out pictures, for every row alike, whatever it learns from.
    """

    base: DistilRecipe
    rivals: Sequence[Path] = ()

    def __post_init__(self) -> None:
        set_threads(self.base.run)  # which kept times are of
        self.commit = commit()  # now, before anybody changes what is running
        self._distillers: dict[tuple[str, str], Distiller] = {}  # of a teacher, of data
        self._found: dict[str, Rival] = {}

    def distiller(self, recipe: DistilRecipe) -> Distiller:
        teacher = json.dumps([recipe.teacher, recipe.controlnets, recipe.run.model_dump()])
        key = teacher, recipe.data.model_dump_json()
        if key not in self._distillers:
            loaded = next((known for (name, _), known in self._distillers.items() if name == teacher), None)
            self._distillers[key] = (
                loaded.on(recipe.data)
                if loaded
                else Distiller(recipe.teacher, recipe.data, recipe.run, recipe.controlnets)
            )
        return self._distillers[key]

    @cached_property
    def domains(self) -> dict[str, Domain]:
        return open_domains(self.base.data, self.base.masks, self.base.evaluate)

    def find(self, name: str) -> Rival:
        if name not in self._found:
            self._found[name] = find(name, self.rivals)
        return self._found[name]

    def rival(self, run: Run) -> Rival | None:
        return self.find(run.rival) if run.rival else None

    def is_trained(self, run: Run) -> bool:
        """Whether the row learns: the teacher and inpainting without training need no second seed."""
        rival = self.rival(run)
        return run.row != TEACHER and (rival is None or rival.fill is None)


def result_of(run: Run) -> dict[str, Any] | None:
    """The run's result, None where it is not complete. Raises DataError where it cannot be read."""
    path = run.out / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise DataError(f"cannot read '{path}' ({error}); remove it, then the run is made anew") from None


def finish(run: Run, shop: Workshop) -> None:
    """Trains and scores a run, or takes its result as it is when it is complete and of this recipe.

    Raises:
        RecipeError: the result that is there is of another recipe, teacher, data, method or rival.
        BusyError: another process is at the run.
    """
    with hold(run.work):
        distiller, rival = shop.distiller(run.recipe), shop.rival(run)
        recipe = distiller.pinned(run.recipe)
        method = Method(rival.losses, rival.digest) if rival and rival.losses else OURS
        made_by = {**distiller.contents(recipe, method), **({"method": rival.digest} if rival else {})}
        identity = digest_of(recipe if shop.is_trained(run) else None, recipe, distiller, made_by, shop.domains)
        kept = result_of(run)
        if kept is not None:
            if kept["identity"] != identity:
                raise RecipeError(
                    f"'{run.out / 'run.json'}' is the result of another recipe, teacher, data, method, rival, "
                    "precision or scoring network; remove it, or choose another output_dir"
                )
            return
        result = {
            "row": run.row, "seed": run.seed, "identity": identity, "commit": shop.commit, "version": __version__,
            "machine": machine(), "device": pick_device(recipe.run.device).type,
            "rival": run.rival, "is_trained": shop.is_trained(run), "contents": made_by,
            "recipe": _finite(recipe.model_dump(mode="json")),
            **_scored(run, recipe, distiller, rival, method, shop.domains),
            "trained_seconds": trained_seconds(run.work),
        }  # fmt: skip
        _keep_losses(run)
        write_whole(run.out / "run.json", json.dumps(_rounded(result)))


def digest_of(
    trained: DistilRecipe | None,
    recipe: DistilRecipe,
    distiller: Distiller,
    made_by: dict[str, str],
    domains: dict[str, Domain],
) -> str:
    """Of all that decides a result: what is learnt, where anything is, of what, how and on what it is scored."""
    scored = {name: getattr(recipe, name).model_dump(mode="json") for name in ("sample", "evaluate")}
    scored |= {name: domain.heldout.fingerprint() for name, domain in domains.items()} | scoring()
    if recipe.evaluate.standard:  # else the networks are those of this version
        scored["extractors"] = next(iter(domains.values())).provenance()
    learning = [VERSION, learnt(trained), *filter(None, [rounding(trained.run)])] if trained else None
    decides = [learning, made_by, distiller.settings(), scored]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _scored(
    run: Run,
    recipe: DistilRecipe,
    distiller: Distiller,
    rival: Rival | None,
    method: Method,
    domains: dict[str, Domain],
) -> dict[str, Any]:
    """{"cost", "settings", "domains"} of a run, after what training it takes."""
    if run.row == TEACHER:
        return _scored_model(distiller.name, domains, recipe, run, distiller.controlnets, recipe.only_steps)
    if rival and rival.fill:
        return _scored_pictures(rival.fill, domains, run)
    _refuse_other_rounding(recipe, run.work)
    if rival and rival.network:
        return _trained_network(rival, distiller, domains, recipe, run)
    share_stage1(recipe, run.work, method, distiller)
    return _scored_model(str(distiller.run_held(recipe, run.work, method)), domains, recipe, run)


def _refuse_other_rounding(recipe: DistilRecipe, work: Path) -> None:
    """A row that is trained in two precisions would be called one of the second."""
    if has_trained(work) and (work / "recipe.yaml").is_file():
        before, now = rounding(load(DistilRecipe, work / "recipe.yaml").run), rounding(recipe.run)
        if before != now:
            raise RecipeError(
                f"'{work}' was begun with {before or 'fp32'}, not {now or 'fp32'}, and a row is of one precision; "
                "run it so, or remove the folder, or give another work_dir and output_dir"
            )


def _keep_losses(run: Run) -> None:
    """stage1-losses.jsonl, stage2-losses.jsonl beside the result, for the page when work_dir is gone."""
    for stale in run.out.glob("stage*-losses.jsonl"):
        stale.unlink()
    for log in run.work.glob("stage*/losses.jsonl"):
        write_whole(run.out / f"{log.parent.name}-losses.jsonl", log.read_text(encoding="utf-8"))


def trained_seconds(folder: Path) -> float | None:
    """Training time of all stages, by their logs; interruptions do not count, and what else the machine did does."""
    logs = [log.read_text(encoding="utf-8").splitlines() for log in sorted(folder.glob("stage*/losses.jsonl"))]
    return sum(json.loads(lines[-1])["seconds"] for lines in logs if lines) if logs else None


def _scored_model(
    name: str,
    domains: dict[str, Domain],
    recipe: DistilRecipe,
    run: Run,
    controlnets: Sequence[str] = (),
    steps: int | None = None,
) -> dict[str, Any]:
    result = evaluate_model(name, domains, recipe, run.work, controlnets, steps)
    _keep_pictures(run, drawn(run.work))
    return {"cost": result["cost"], "settings": result["settings"], "domains": result["domains"]}


def _scored_pictures(
    fill: Callable[[Tensor, Tensor], Tensor], domains: dict[str, Domain], run: Run, cost: dict[str, int] | None = None
) -> dict[str, Any]:
    pictures = {name: fill(domain.heldout.true, domain.heldout.batch.mask) for name, domain in domains.items()}
    _keep_pictures(run, pictures)
    settings = {"heldout": {name: domain.heldout.fingerprint() for name, domain in domains.items()}}
    scores = {name: domain.score(pictures[name]) for name, domain in domains.items()}
    return {"cost": cost, "settings": settings, "domains": scores}


def _trained_network(
    rival: Rival, distiller: Distiller, domains: dict[str, Domain], recipe: DistilRecipe, run: Run
) -> dict[str, Any]:
    """A network of a rival's own, on the batches of both stages."""
    assert rival.network is not None
    torch.manual_seed(recipe.seed)
    network: Any = rival.network().to(distiller.teacher.device)
    distiller.claim(recipe, run.work, Method(digest=rival.digest))
    for name, stage in recipe.stages.items():
        if stage.steps:
            train(run.work / name, network, {"task": 1.0}, distiller.loader(recipe, stage, name), stage, recipe.run)

    @torch.no_grad()
    def fill(images: Tensor, masks: Tensor) -> Tensor:
        device = distiller.teacher.device
        size = recipe.sample.batch_size
        parts = zip((images * 2 - 1).split(size), masks.split(size), strict=True)
        painted = torch.cat([network.paint(image.to(device), mask.to(device)).cpu() for image, mask in parts])
        return torch.where(masks.bool(), (painted.clamp(-1, 1) + 1) / 2, images)

    return _scored_pictures(fill, domains, run, network_cost(network, recipe.data.resolution))


def network_cost(network: nn.Module, side: int) -> dict[str, int]:
    """Parameters, and MACs of one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cast(Any, network).paint(*blank(side, device))
    return {"params": sum(p.numel() for p in network.parameters()), "macs": counter.get_total_flops() // 2}


def blank(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 3, side, side) and (1, 1, side, side): one picture and its mask, to measure a network on."""
    return torch.zeros(1, 3, side, side, device=device), torch.zeros(1, 1, side, side, device=device)


def shown_of(count: int) -> list[int]:
    """Which of `count` held-out pictures are kept: evenly spread."""
    return np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int).tolist()


def _keep_pictures(run: Run, pictures: dict[str, Tensor]) -> None:
    """pictures.png: a row of SHOWN pictures for each domain, pixel for pixel, to be read back by `pictures_of`."""
    lines = [torch.cat(list(p[shown_of(len(p))]), 2) for p in pictures.values()]
    widest = max(line.shape[2] for line in lines)
    sheet = torch.cat([torch.nn.functional.pad(line, (0, widest - line.shape[2])) for line in lines], 1)
    run.out.mkdir(parents=True, exist_ok=True)
    array = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(run.out / "pictures.png", optimize=True)


def read_sheet(path: Path) -> Tensor:
    """(3, H, W) in [0, 1], pictures beside and below each other as they were kept."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def pictures_of(run: Run, domains: dict[str, Domain]) -> dict[str, Tensor]:
    """Domain -> (n, 3, H, W) in [0, 1], the pictures that `shown_of` names; empty where none are kept."""
    path = run.out / "pictures.png"
    if not path.is_file():
        return {}
    sheet, pictures, top = read_sheet(path), {}, 0
    for name, domain in domains.items():
        height, width = domain.heldout.true.shape[2:]
        count = len(shown_of(len(domain.heldout.true)))
        line = sheet[:, top : top + height, : count * width]
        pictures[name] = torch.stack(line.split(width, 2))
        top += height
    return pictures


def _finite(value: Any) -> Any:
    """A recipe's plain data with infinities as text, which JSON can hold and a recipe takes."""
    return _with_floats(value, lambda number: number if math.isfinite(number) else str(number))


def _rounded(value: Any) -> Any:
    """Six digits are more than any score has; all of them would be most of the file."""
    return _with_floats(value, lambda number: float(f"{number:.6g}"))


def _with_floats(value: Any, made: Callable[[float], Any]) -> Any:
    if isinstance(value, float):
        return made(value)
    if isinstance(value, dict):
        return {key: _with_floats(one, made) for key, one in value.items()}
    return [_with_floats(one, made) for one in value] if isinstance(value, list | tuple) else value
