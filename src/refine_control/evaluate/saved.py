"""Saved models, and classical inpainting beside them, on a recipe's held-out pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from refine_control.diffusion.generate import say_if_blind
from refine_control.diffusion.store import load
from refine_control.distill.preview import mask_out, save_grid
from refine_control.distill.processes import pick_device, refuse_processes, set_threads
from refine_control.evaluate import baselines
from refine_control.evaluate.captions import caption_losses
from refine_control.evaluate.domains import Domain, check_fillable, controlnets_of, drawn, evaluate_model, open_domains
from refine_control.evaluate.heldout import latency_ms, one_forward
from refine_control.evaluate.report import Row, text_table, write_table
from refine_control.files import write_whole
from refine_control.provenance import commit, machine
from refine_control.recipe import DistilRecipe

BASELINES = ("mean_fill", "telea", "navier_stokes", "biharmonic")


def evaluate(recipe: DistilRecipe, models: Sequence[str], with_baselines: bool) -> str:
    """Scores saved models, and classical inpainting where asked, on a recipe's held-out pictures.

    Writes scores.json, table.csv, table.md and for each model a sheet of pictures of each domain in recipe.output_dir.
    A model that is the recipe's teacher is scored with the recipe's controlnets.
    The models' task losses under the right, the empty and a stranger's caption stand in scores.json too. Returns the
    table, to be printed.
    """
    refuse_processes("evaluate")
    set_threads(recipe.run)
    made_by = commit()  # now, before anybody changes what is running
    out = Path(recipe.output_dir)
    domains = open_domains(recipe.data, recipe.masks, recipe.evaluate)
    if with_baselines:
        check_fillable(domains)
    table: dict[str, Any] = {}
    rows = []
    for name in models:
        folder = out / name.replace(":", "-").replace("/", "-").strip("-.")
        nets = controlnets_of(name, recipe)
        model = load(name, pick_device(recipe.run.device), nets).freeze()
        result = evaluate_model(name, domains, recipe, folder, nets, model=model)
        say_if_blind(model, name, "--teacher and --controlnets")
        scores = {domain: scored["metrics"] for domain, scored in result["domains"].items()}
        cost = {"latency_ms": latency_ms({name: one_forward(model)})[name]["median"], **result["cost"]}
        listened = caption_losses(model, domains["labelled"].heldout)
        table[name] = {"domains": scores, **cost, "caption_losses": listened, "commit": result.get("commit", "")}
        pictures = drawn(folder)
        rows.append(Row(name, name, scores, **cost, wall_seconds=None, steps=None, drawn=pictures))
        for key, domain in domains.items():
            _save_sheet(folder / f"{key}.png", domain, pictures[key])
    for name in BASELINES if with_baselines else ():
        filled = {key: getattr(baselines, name)(d.heldout.true, d.heldout.batch.mask) for key, d in domains.items()}
        scores = {key: d.score(filled[key])["metrics"] for key, d in domains.items()}
        table[name] = {"domains": scores}
        rows.append(Row(name, name, scores, None, None, None, None, None, filled))
    table["provenance"] = domains["labelled"].provenance()
    table["sample"] = recipe.sample.model_dump()
    table |= {key: getattr(recipe, key).model_dump(mode="json") for key in ("data", "masks", "evaluate")}
    table["heldout"] = {key: domain.heldout.fingerprint() for key, domain in domains.items()}
    table |= {"commit": made_by, "machine": machine()}
    out.mkdir(parents=True, exist_ok=True)
    seen = [key for key, domain in domains.items() if domain.trained_on]
    note = f"Of pictures that were trained on: the scores of {' and '.join(seen)}." if seen else ""
    write_table(rows, out / "table.csv", out / "table.md", note)
    write_whole(out / "scores.json", json.dumps(table, indent=1))
    return text_table(rows)


def _save_sheet(path: Path, domain: Domain, pictures: Tensor, count: int = 64, columns: int = 16) -> None:
    """Some of the held-out pictures, evenly spread, to be looked at: three rows each of input, drawn and truth."""
    batch = domain.heldout.batch
    columns = min(columns, len(batch))
    shown = np.linspace(0, len(batch) - 1, min(count, len(batch)) // columns * columns).round().astype(int)
    kinds = (mask_out(batch.image, batch.mask), pictures * 2 - 1, batch.image)
    save_grid(path, [kind[list(part)] for part in shown.reshape(-1, columns) for kind in kinds])
