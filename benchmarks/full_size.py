"""The whole path at Stable Diffusion's size: random weights of the published shapes, 1.22B parameters, two steps.

    python benchmarks/full_size.py --targets bk-tiny,mobile --out results/full-size.json

For each student: `refine-control distill` of recipes/sd15-inpaint.yaml, shortened to two optimiser steps of one
picture, from loading to the saved student, with its time and the most memory it took; then benchmarks/step.py, one step
against its floor. Quality is not claimed: weights are random. On a GPU: --steps 200 --batch_size 8.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from published import SD15_UNET, TEXT, VAE, controlnet
from refine_control.diffusion.build import build_tokenizer
from refine_control.plans import TextPlan
from refine_control.provenance import machine

RECIPE = Path(__file__).parent.parent / "recipes" / "sd15-inpaint.yaml"
SIDE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="bk-tiny,mobile")
    parser.add_argument("--steps", type=int, default=7, help="of the step benchmark; the first third warms up")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--parts", default="distill,step", help="the others are left as --out has them")
    parser.add_argument("--out", type=Path, default=Path("results/full-size.json"))
    args = parser.parse_args()
    results: dict = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"targets": {}}
    results["machine"] = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_teacher(folder / "teacher")
        write_pictures(folder / "pictures", 4)
        for target in args.targets.split(","):
            result = results["targets"].setdefault(target, {})
            if "distill" in args.parts:
                result["distill"] = distill(folder, target)
            if "step" in args.parts:
                result["step"] = step(folder, target, args.steps, args.batch_size)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(json.dumps(results, indent=1))


def write_random_teacher(folder: Path) -> None:
    """SD 1.5 and its inpainting ControlNet as a stock pipeline's folder: the published configs, random fp16 weights."""
    torch.manual_seed(0)
    parts = {
        "unet": lambda: UNet2DConditionModel.from_config(SD15_UNET),
        "controlnet": lambda: ControlNetModel.from_config(controlnet(SD15_UNET)),
        "vae": lambda: AutoencoderKL.from_config(VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    for part, build in parts.items():
        build().half().save_pretrained(folder / part)
    build_tokenizer(TextPlan(max_length=77), ["a red circle", "a blue square"]).save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionControlNetPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "controlnet": ["diffusers", "ControlNetModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red circle"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def overrides(folder: Path, target: str, batch_size: int) -> list[str]:
    given = {
        "output_dir": folder / f"run-{target}",
        "teacher": folder / "teacher",
        "controlnets": "[]",
        "student": target,
        "data.labelled": folder / "pictures",
        "data.unlabelled": folder / "pictures",
        "data.variants": 1,
        "data.cache_dir": folder / "cache",
        "stage1.batch_size": batch_size,
        "run.gradient_accumulation_steps": 1,
        "run.workers": 0,
        "run.log_every": 1,
        "sample.num_inference_steps": 1,  # the preview at the end shows noise anyway
        "sample.guidance_scale": 1,
        "sample.batch_size": 1,
    }
    if not torch.cuda.is_available():  # no half precision worth having there
        given |= {"run.mixed_precision": "no", "run.teacher_dtype": "fp32"}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def distill(folder: Path, target: str) -> dict:
    """Two optimiser steps, from loading to the saved student, in a process of its own."""
    command = [sys.executable, "-m", "refine_control", "distill", str(RECIPE), *overrides(folder, target, 1)]
    command += ["--stage1.steps", "2", "--stage2.steps", "0"]
    began = time.perf_counter()
    _, status, used = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise SystemExit(f"distill ended with status {status}")
    taken = time.perf_counter() - began
    log = (folder / f"run-{target}" / "stage1" / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "seconds": taken,
        "peak_memory_gb": used.ru_maxrss * 1024 / 1e9,  # kibibytes, on Linux
        "losses": [json.loads(line)["loss"] for line in log],
    }


def step(folder: Path, target: str, steps: int, batch_size: int) -> dict:
    """benchmarks/step.py on the same recipe, in a process of its own."""
    out = folder / "step.json"
    script = Path(__file__).with_name("step.py")
    command = [sys.executable, str(script), str(RECIPE), "--steps", str(steps), "--out", str(out)]
    subprocess.run([*command, *overrides(folder, target, batch_size)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
