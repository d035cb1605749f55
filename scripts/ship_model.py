"""Puts a trained model into the zoo with its card: fp16 safetensors, scores, the gate's verdicts, how to make it again.

    refine-control evaluate runs/emoji-teacher/model --baselines --output_dir results/teacher-gate
    python scripts/ship_model.py emoji-teacher results/teacher-gate/scores.json runs/emoji-teacher

Without the run, the scores on the card are written anew and the model stays. The card's numbers are read from the run's
losses.jsonl and from scores.json; nothing is typed in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from refine_control.diffusion.store import ZOO, load, save
from refine_control.errors import UserError
from refine_control.evaluate.metrics import sign
from refine_control.evaluate.saved import BASELINES
from refine_control.files import put_in_place
from results_page import by_domain, on_what

HEADER = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [inpainting, controlnet, refine-control]
---
# {name}

{what} Stock format: `StableDiffusionControlNetPipeline.from_pretrained` loads this folder; safetensors, fp16.

- Data: emoji with captions and clip art without, drawings on white, {resolution} px; see `data/README.md` for sources
  and licences. Concepts of the test split were not trained on.
- Make it again: `{command}`
- Trained for: {training}
- Seed {seed}; scored on {machine}

Known limits: drawings only, English captions of a few words, weak on faces and writing. A student inherits
its teacher's errors.
"""


def training_line(run: Path, batch_sizes: dict[str, int]) -> str:
    parts = []
    for stage, batch_size in batch_sizes.items():
        log = run / stage / "losses.jsonl"
        if log.is_file():
            last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
            parts.append(f"{stage} {last['step']:,} steps of {batch_size} pictures, {last['seconds'] / 60:.0f} minutes")
    return "; ".join(parts)


def score_table(scores: dict[str, Any]) -> list[str]:
    rows = {name: entry["domains"] for name, entry in scores.items() if "domains" in entry}
    rows = {Path(name).name if "/" in name else name: domains for name, domains in rows.items()}
    return by_domain(rows)


def gate(model: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    """The teacher's gate, on the labelled domain's held-out concepts, line by line."""
    mine = model["domains"]["labelled"]
    lines = ["## Gate", ""]
    for metric in mine:
        rivals = ("mean_fill",) if sign(metric) > 0 else BASELINES
        regions = ("hole",) if sign(metric) > 0 else ("whole", "hole")
        for region in regions:
            ours = mine[metric][region]
            theirs = {name: scores[name]["domains"]["labelled"][metric][region] for name in rivals}
            better = {n: sign(metric) * (ours - v) > 0 for n, v in theirs.items()}
            lost = [name for name, won in better.items() if not won]
            verdict = "passes" if not lost else f"**fails** against {', '.join(lost)}"
            lines.append(f"- {metric}, {region}: {verdict} ({ours:.4g})")
    losses = model["caption_losses"]
    ordered = losses["right"] < losses["empty"] < losses["shuffled"]
    shown = ", ".join(f"{kind} {value:.5f}" for kind, value in losses.items())
    lines.append(f"- captions, right < empty < shuffled: {'passes' if ordered else '**fails**'} ({shown})")
    return lines


def entry_of(scores: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The scores of the first of these that `evaluate` was given. Raises UserError where it was given none."""
    for name in names:
        if name in scores:
            return dict(scores[name])
    raise UserError(f"no scores of {' or '.join(names)} there; evaluate it first")


def scores_on_card(scores: dict[str, Any], entry: dict[str, Any], is_teacher: bool) -> str:
    lines = ["## Scores", "", on_what(scores), "", *score_table(scores), *(gate(entry, scores) if is_teacher else [])]
    return "\n".join(lines) + "\n"


def ship(name: str, scores: dict[str, Any], run: Path, note: str) -> None:
    """Replaces the model of this name in the zoo."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    is_teacher = "denoiser" in recipe
    folder = run / ("model" if is_teacher else "student")
    target, aside = ZOO / name, ZOO / f".{name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    save(load(str(folder)), aside, torch.float16)
    stages = ("autoencoder", "denoiser") if is_teacher else ("stage1", "stage2")
    sizes = {s: recipe.get(f"{s}_stage", recipe.get(s))["batch_size"] for s in stages}
    command = "train-teacher recipes/emoji-teacher.yaml" if is_teacher else f"distill recipes/{name}.yaml"
    machine, entry = scores["machine"], entry_of(scores, [str(folder)])
    card = HEADER.format(
        name=name,
        what=f"{entry['params']:,} parameters in foundation and module, {entry['macs']:,} MACs a forward.",
        resolution=recipe["data"]["resolution"],
        command=f"refine-control {command}",
        training=training_line(run, sizes),
        seed=recipe["seed"],
        machine=f"{machine['cores']} CPU cores" + (f", {machine['gpu']}" if machine["gpu"] else ""),
    )
    if recipe.get("init_from"):
        card += "The times are those of the last run, which went on from other weights. "
        card += "From nothing the recipe was not run in this form.\n"
    card += f"{note}\n\n" + scores_on_card(scores, entry, is_teacher)
    (aside / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(run / "recipe.yaml", aside / "recipe.yaml")
    put_in_place(aside, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("scores", type=Path)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--note", default="", help="a sentence for the card")
    args = parser.parse_args()
    scores = json.loads(args.scores.read_text(encoding="utf-8"))
    target = ZOO / args.name
    if args.run:
        ship(args.name, scores, args.run, args.note)
    else:
        recipe = yaml.safe_load((target / "recipe.yaml").read_text(encoding="utf-8"))
        card = (target / "README.md").read_text(encoding="utf-8").partition("## Scores")[0]
        run = Path(recipe["output_dir"])
        entry = entry_of(scores, [str(run / "model"), str(run / "student"), f"zoo:{args.name}"])
        card += scores_on_card(scores, entry, "denoiser" in recipe)
        (target / "README.md").write_text(card, encoding="utf-8")
    print(f"{target}: {sum(p.stat().st_size for p in target.rglob('*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"ship_model: {error}")
