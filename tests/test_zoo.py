"""What we ship: small enough, loadable by stock diffusers, and the demo's student as much smaller as promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from refine_control.cli import main
from refine_control.diffusion.store import ZOO, load
from refine_control.recipe import DistilRecipe
from refine_control.recipe import load as load_recipe
from refine_control.student.plan import build_student, cost

RECIPES = Path(__file__).parent.parent / "recipes"
SHIPPED = sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_is_small_carded_and_runs_in_stock_pipelines(name: str) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetInpaintPipeline, StableDiffusionControlNetPipeline

    folder = ZOO / name
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 45e6
    assert not list(folder.rglob("*.bin"))
    assert (folder / "README.md").is_file()
    model = load(f"zoo:{name}")
    side = model.resolution
    for pipeline_class in (StableDiffusionControlNetPipeline, StableDiffusionControlNetInpaintPipeline):
        controlnet = ControlNetModel.from_pretrained(folder, subfolder="controlnet", torch_dtype=torch.float32)
        pipeline = pipeline_class.from_pretrained(
            folder, controlnet=controlnet, torch_dtype=torch.float32, use_safetensors=True
        )
        pipeline.set_progress_bar_config(disable=True)
        control = torch.zeros(1, 3, side, side)
        extra = {"image": control}
        if pipeline_class is StableDiffusionControlNetInpaintPipeline:
            extra = {"image": control, "mask_image": torch.ones(1, 1, side, side), "control_image": control}
        pictures = pipeline("flat cat face", num_inference_steps=2, output_type="np", **extra).images
        assert pictures.shape == (1, side, side, 3)


def test_demo_student_is_four_times_smaller_and_six_times_cheaper() -> None:
    recipe = load_recipe(DistilRecipe, RECIPES / "demo.yaml")
    teacher = load(recipe.teacher)
    large, small = cost(teacher.denoiser, teacher), cost(build_student(recipe.student, teacher), teacher)
    assert large.parameters >= 4 * small.parameters
    assert large.macs >= 6 * small.macs


@pytest.mark.slow
def test_demo_from_end_to_end_with_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    few = ["--stage1.steps", "4", "--stage2.steps", "2", "--evaluate.images", "16", "--run.num_threads", "1"]
    assert main(["demo", "--output_dir", str(tmp_path), *few]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["rows"]) == {"teacher", "scratch", "refine-control"}
    assert all(set(row["mean"]) == {"labelled", "unlabelled"} for row in scores["rows"].values())
    assert (tmp_path / "report.html").stat().st_size > 50_000
