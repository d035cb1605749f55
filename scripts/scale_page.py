"""Writes docs/scale.md: a run on 100 million pictures and 64 GPUs, worked out from counts and from results/*.json.

python scripts/scale_page.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from published import write_configs  # noqa: E402
from refine_control.distill.footprint import footprint  # noqa: E402
from refine_control.recipe import DistilRecipe, load  # noqa: E402
from refine_control.student.outline import plan_teacher  # noqa: E402
from refine_control.student.plan import cost, plan_cost  # noqa: E402

PICTURES, GPUS, HOSTS, BATCH = 100_000_000, 64, 8, 2048
LOST_GPU_HOURS = 54 * 24 * 16_384 / 419  # GPU-hours for each unexpected interruption, Llama 3 (2407.21783, table 5)
NETWORK = 100e9 / 8  # bytes a second and host


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def counts() -> dict[str, Any]:
    """Of a run, by the configs alone."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = plan_teacher(str(write_configs(Path(folder) / "sd15", "sd15")), ())
    recipe = load(DistilRecipe, ROOT / "recipes/sd15-inpaint.yaml")
    student, foot = plan_cost(recipe.student, teacher), footprint(recipe, teacher)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.vae.to("meta").encode(torch.empty(1, 3, teacher.resolution, teacher.resolution, device="meta"))
    vae = counter.get_total_flops() / 1e12
    step = 2 * (cost(teacher.denoiser, teacher).macs + 3 * student.macs) / 1e12
    rows = PICTURES / (1 - recipe.stage2.labelled_fraction)  # captioned ones are mixed in
    hours = {rate: rows * (step + vae) / (GPUS * rate) / 3600 for rate in (25, 50, 100)}
    step_seconds, gradient = hours[50] * 3600 / (rows / BATCH), 4 * student.parameters
    return {
        "batch": BATCH,
        "captioned": recipe.stage2.labelled_fraction,
        "stage1_steps": math.ceil(recipe.stage1.steps * recipe.stage1.batch_size / BATCH),
        "steps": math.ceil(rows / BATCH),
        "tflop": step + vae,
        "tflop_step": step,
        "tflop_vae": vae,
        "vae_share": vae / (step + vae),
        "hours": hours,
        "memory_gb": foot.memory / 1e9,
        "rows": foot.rows,
        "latents_kb": foot.latents / 1e3,
        "latents_tb": PICTURES * foot.latents / 1e12,
        "read_rate": rows / (hours[50] * 3600) / HOSTS,
        "step_seconds": step_seconds,
        "gradient_mb": gradient / 1e6,
        "exchange_ms": 2e3 * gradient / NETWORK,
        "checkpoint_gb": foot.checkpoint / 1e9,
        "checkpoint_minutes": 1000 * step_seconds / 60,
        "failures": GPUS * hours[50] / LOST_GPU_HOURS,
        "lost_gpu_hours": LOST_GPU_HOURS,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    data, known = read("benchmark-data"), counts()
    core_rate = data["pictures_per_second_and_core"]
    measured = {
        "picture_kb": data["bytes"]["95"] / 1e3,
        "pictures_tb": PICTURES * data["bytes"]["95"] / 1e12,
        "lossless_kb": data["bytes"]["None"] / 1e3,
        "core_rate": core_rate,
        "read_cores": known["read_rate"] / core_rate,
        "index_bytes": data["index_bytes_each"],
        "index_gb": PICTURES * data["index_bytes_each"] / 1e9,
        "index_million": data["index_seconds_per_million"],
        "index_hours": PICTURES / 1e6 * data["index_seconds_per_million"] / 3600,
        "cache": read("benchmark-cache"),
        "scaling": read("benchmark-scaling"),
        "full": read("full-size"),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    page = environment.get_template("scale.md.jinja").render(**known, **measured)
    (ROOT / "docs" / "scale.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
