"""A saved model on every held-out domain: its scores, its cost, its pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from refine_control.data.source import warn_if_trained_on
from refine_control.diffusion.model import Model
from refine_control.diffusion.noise import at_few_steps
from refine_control.diffusion.store import load, resolve, resolve_controlnet
from refine_control.distill.processes import pick_device
from refine_control.distill.teacher import check_resolution, open_pictures
from refine_control.errors import DataError
from refine_control.evaluate.features import efficientnet_lite0, standard
from refine_control.evaluate.heldout import HeldOut
from refine_control.evaluate.score import Reference, scoring
from refine_control.files import sync, write_whole
from refine_control.provenance import commit
from refine_control.recipe import DataConfig, DistilRecipe, EvaluateConfig, MaskConfig
from refine_control.student.plan import cost

MODEL_FILES = (".safetensors", ".json", ".txt")


@dataclass
class Domain:
    """One held-out set and the features of its true pictures, by every extractor; the first is the offline one.

    trained_on: some of the pictures are training's too, for want of a split of their own.
    """

    heldout: HeldOut
    references: list[Reference]
    trained_on: bool = False

    def score(self, drawn: Tensor) -> dict[str, Any]:
        """As `Reference.score`, with the metrics of all extractors together and one provenance for each."""
        results = [reference.score(drawn) for reference in self.references]
        whole = results[0] | {"provenance": self.provenance()}
        for result in results[1:]:
            whole["metrics"] |= result["metrics"]
            whole["per_image"] |= result["per_image"]
            whole["by_ratio"] = {area: whole["by_ratio"][area] | one for area, one in result["by_ratio"].items()}
        return whole

    def provenance(self) -> list[dict[str, Any]]:
        """What made the scores, one for each extractor."""
        told = {"trained_on": True} if self.trained_on else {}
        return [reference.provenance() | told for reference in self.references]


def open_domains(data: DataConfig, masks: MaskConfig, config: EvaluateConfig) -> dict[str, Domain]:
    """The held-out sets of a recipe: 'labelled', and 'unlabelled' where there is one."""
    extractors = [efficientnet_lite0(), *(standard(kind, path) for kind, path in config.standard.items())]
    domains = {}
    tested = open_pictures(data, config.split, variants=1)
    for name, pictures in zip(("labelled", "unlabelled"), tested, strict=True):
        if pictures is not None:
            files = pictures.dataset.files()
            trained_on = warn_if_trained_on(getattr(data, name), files, config.split, data.skip_corrupt)
            heldout = HeldOut.choose(pictures, name == "labelled", masks, config)
            if len(heldout.batch) < 2:  # of one picture no spread can be told
                raise DataError(
                    f"'evaluate.images' = {config.images}, and the {name} pictures of split '{config.split}' are "
                    f"{pictures.examples}: too few for scores; give 2 or more"
                )
            references = [Reference(heldout.true, heldout.batch.mask, extractor) for extractor in extractors]
            domains[name] = Domain(heldout, references, trained_on)
    return domains


def check_fillable(domains: dict[str, Domain]) -> None:
    """Raises DataError where classical inpainting has nothing to fill from."""
    for name, domain in domains.items():
        if full := int(domain.heldout.batch.mask.flatten(1).all(1).sum()):
            raise DataError(
                f"{full} masks of the {name} pictures cover all of them, and classical inpainting fills from what is "
                "known; leave it out, or set data.controls [inpaint] with smaller holes"
            )


def controlnets_of(name: str, recipe: DistilRecipe) -> Sequence[str]:
    """The recipe's, of a model that is its teacher, at whatever commit; any other has its own."""
    return recipe.controlnets if name.partition("@")[0] == recipe.teacher.partition("@")[0] else ()


def evaluate_model(
    name: str,
    domains: dict[str, Domain],
    recipe: DistilRecipe,
    folder: Path,
    controlnets: Sequence[str] = (),
    steps: int | None = None,
    model: Model | None = None,
) -> dict[str, Any]:
    """Scores a saved model on every domain, once: the result is kept in `folder` beside the pictures.

    steps: the one number that its students learn; it is drawn at their timesteps then (`at_few_steps`).
    model: what `name` is, where it is loaded already.

    Returns {"settings", "commit", "cost": {"params", "macs"}, "domains": {domain: see Reference.score}}; commit is
    missing in what an earlier version kept. Pictures (N, 3, H, W) in [0, 1] are read back with `drawn`.
    """
    kept = folder / "evaluation.json"
    settings = {
        "model": _fingerprint(resolve(name, not controlnets), *map(resolve_controlnet, controlnets)),
        "sample": recipe.sample.model_dump(),
        "extractors": next(iter(domains.values())).provenance(),
        "heldout": {name: domain.heldout.fingerprint() for name, domain in domains.items()},
        **scoring(),
    }
    if steps is not None:
        settings["timesteps"] = "trailing"
    before = _result(kept)
    if before.get("settings") == settings:
        return before
    model = model or load(name, pick_device(recipe.run.device), controlnets).freeze()
    model = replace(model, scheduler=at_few_steps(model.scheduler, steps))
    check_resolution(model, name, recipe.data)
    counted = cost(model.denoiser, model)
    result: dict[str, Any] = {
        "settings": settings,
        "commit": commit(),
        "cost": {"params": counted.parameters, "macs": counted.macs},
        "domains": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for domain_name, domain in tqdm(domains.items(), desc=f"evaluating {name}", unit="domain"):
        pictures[domain_name] = domain.heldout.draw(model, recipe.sample)
        result["domains"][domain_name] = domain.score(pictures[domain_name])
    kept.unlink(missing_ok=True)  # the older pictures are about to go
    try:
        save_file({d: (p * 255).round().byte().contiguous() for d, p in pictures.items()}, folder / "drawn.safetensors")
        sync(folder / "drawn.safetensors")
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise DataError(f"cannot write to '{folder}': {error}; make room, then run the same command") from None
    write_whole(kept, json.dumps(result))
    return result


def _result(path: Path) -> dict[str, Any]:
    """What was scored before; {} where nothing was, or where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def drawn(folder: Path) -> dict[str, Tensor]:
    """Domain -> the pictures that `evaluate_model` drew, (N, 3, H, W) in [0, 1]."""
    return {domain: p.float() / 255 for domain, p in load_file(folder / "drawn.safetensors").items()}


def _fingerprint(*folders: Path) -> str:
    """Changes when the model does: of every file of weights, config, scheduler or tokenizer, its place and bytes."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES):
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
