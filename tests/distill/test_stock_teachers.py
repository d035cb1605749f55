"""Distillation from teachers as users have them: any family, with and without a module, pinned when it is the hub's."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from refine_control import recipe as recipes
from refine_control.diffusion import hub, store
from refine_control.diffusion.noise import NoiseSchedule, sampler_at
from refine_control.diffusion.store import load
from refine_control.distill.distil import Distiller, distil
from refine_control.errors import RecipeError
from refine_control.plans import StudentName
from refine_control.recipe import DistilRecipe, SampleConfig
from refine_control.student.plan import build_student
from tiny import DATA, RUN, STUDENT, stage, write_folder
from tiny_sd import NAMES, save_pipeline, tiny_controlnet, tiny_unet

COMMIT = "c" * 40


def recipe_for(root: Path, teacher: str, controlnets: tuple[str, ...] = ()) -> DistilRecipe:
    return DistilRecipe(
        output_dir=str(root / "run"),
        teacher=teacher,
        controlnets=controlnets,
        data=DATA.model_copy(update={"labelled": str(write_folder(root / "labelled", 4))}),
        student=STUDENT,
        stage1=stage(1),
        stage2=stage(0),
        sample=SampleConfig(num_inference_steps=1),
        run=RUN,
    )


@pytest.mark.parametrize(("family", "nets"), [("sd", 0), ("sd2", 1), ("sdxl", 0), ("sdxl", 1)])
def test_a_student_of_any_family_is_saved_as_its_teachers_class(tmp_path: Path, family: str, nets: int) -> None:
    teacher = save_pipeline(tmp_path / "teacher", family, nets)
    student = DiffusionPipeline.from_pretrained(distil(recipe_for(tmp_path, str(teacher))), local_files_only=True)
    assert type(student).__name__ == f"{NAMES[family]}{'ControlNet' if nets else ''}Pipeline"
    assert tuple(student.unet.config.block_out_channels) == STUDENT.block_out_channels


def test_two_controlnets_are_distilled_into_two(tmp_path: Path) -> None:
    """One is shown the masked picture, the other its edges; each learns from its own teacher, and both learn."""
    teacher = save_pipeline(tmp_path / "teacher", "sd", 2)
    recipe = recipe_for(tmp_path, str(teacher))
    with pytest.raises(RecipeError, match=r"names 1 controls \(inpaint\) but teacher .* has 2 ControlNets"):
        distil(recipe)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"controls": ("inpaint", "edges")})})
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run)
    start, bridges = distiller.fresh_student(recipe)
    for ours, theirs in bridges.mapping.items():
        assert ours.rpartition(".")[0] == theirs.rpartition(".")[0], "net 0 from net 0, net 1 from net 1"
    assert {point.split(".")[2] for point in bridges.mapping if point.startswith("module.nets")} == {"0", "1"}
    student = load(str(distil(recipe)))
    assert len(student.denoiser.nets) == 2
    for before, after in zip(start.nets, student.denoiser.nets, strict=True):
        assert not torch.equal(before.conv_in.weight, after.conv_in.weight)


def test_a_run_keeps_the_commits_of_what_it_took_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"org/model": save_pipeline(tmp_path / "model", "sd", 0), "org/net": tmp_path / "net"}
    tiny_controlnet(tiny_unet()).save_pretrained(folders["org/net"])

    def model_info(repo: str, revision: str | None) -> SimpleNamespace:
        files = [path.relative_to(folders[repo]).as_posix() for path in folders[repo].rglob("*.*")]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=file) for file in files])

    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **_: str(folders[repo]))
    recipe = recipe_for(tmp_path, "org/model", ("org/net@main",))
    distil(recipe)
    saved = recipes.load(DistilRecipe, tmp_path / "run" / "recipe.yaml")
    assert saved.teacher == f"org/model@{COMMIT}"
    assert saved.controlnets == (f"org/net@{COMMIT}",)
    assert saved.model_copy(update={"teacher": recipe.teacher, "controlnets": recipe.controlnets}) == recipe
    monkeypatch.setattr(f"{__name__}.COMMIT", "1" * 40)  # the hub's main moves on; the run does not
    distil(recipe.model_copy(update={"controlnets": ("org/net",)}))
    assert recipes.load(DistilRecipe, tmp_path / "run" / "recipe.yaml") == saved


def test_few_steps_begin_at_pure_noise_whatever_the_teachers_scheduler(tmp_path: Path) -> None:
    """Stable Diffusion's own scheduler puts its one step at t = 1."""
    teacher = save_pipeline(tmp_path / "teacher", "sd", 1)
    scheduler = load(str(teacher)).scheduler
    assert NoiseSchedule.of_stage(scheduler, stage(num_inference_steps=1)).timesteps.tolist() == [999]
    assert NoiseSchedule.of_stage(scheduler, stage(num_inference_steps=4)).timesteps.tolist() == [249, 499, 749, 999]
    one = recipe_for(tmp_path, str(teacher)).model_copy(update={"stage1": stage(1, num_inference_steps=1)})
    distiller = Distiller(one.teacher, one.data, one.run)
    assert distiller.contents(one)["timesteps"] == "trailing", "a run of before is another"
    assert "timesteps" not in distiller.contents(recipe_for(tmp_path / "all", str(teacher)))
    student = load(str(distil(one)))
    assert sampler_at(student.scheduler, 1).timesteps.tolist() == [999]


def test_named_students_of_a_deep_teacher_are_read_again(tmp_path: Path) -> None:
    """Of SDXL's depth: three levels, of 1, 2 and 10 transformer layers."""
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    three = {"block_out_channels": (8, 16, 16), "transformer_layers_per_block": (1, 2, 10), "layers_per_block": 2}
    unet = tiny_unet("sdxl", **blocks, **three, attention_head_dim=(2, 4, 4))
    net = tiny_controlnet(unet, conditioning_embedding_out_channels=(4, 8))
    teacher = load(str(save_pipeline(tmp_path / "teacher", "sdxl", 1, unet=unet, controlnet=net)))
    names: tuple[StudentName, ...] = ("bk-small", "micro")
    for name in names:
        student = replace(teacher, denoiser=build_student(name, teacher))
        store.save(student, tmp_path / name)
        assert load(str(tmp_path / name)).denoiser.nets
