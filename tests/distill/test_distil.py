"""A distillation as the user runs it: folders in, a stock pipeline out, whole after any interruption."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from refine_control import recipe as recipes
from refine_control.data.loader import Loader
from refine_control.diffusion.model import Model
from refine_control.diffusion.store import load
from refine_control.distill import checkpoint
from refine_control.distill.distil import Distiller, distil
from refine_control.errors import ModelError, RecipeError
from refine_control.recipe import DistilRecipe
from refine_control.student.plan import probe
from tiny import RUN, STUDENT, distil_recipe, stage


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> DistilRecipe:
    """Three steps on captioned pictures, three with plain ones mixed in. No latents are kept, so runs compute alike."""
    return distil_recipe(
        tmp_path_factory.mktemp("distil"),
        labelled=5,
        plain=4,
        stage1=stage(3, ema_decay=0.5),
        stage2=stage(3, ema_decay=0.5, labelled_fraction=0.5),
        run=RUN.model_copy(update={"checkpoint_every": 1}),
    )


def into(recipe: DistilRecipe, folder: Path, **changes: object) -> DistilRecipe:
    return recipe.model_copy(update={"output_dir": str(folder), **changes})


def weights(student: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in ("unet", "controlnet", "vae", "text_encoder")
        for path in (student / part).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def differing(a: Path, b: Path) -> set[str]:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


@pytest.fixture(scope="module")
def finished(recipe: DistilRecipe) -> Path:
    return distil(recipe)


def test_the_student_is_a_stock_pipeline_with_its_teachers_ears_and_eyes(finished: Path, recipe: DistilRecipe) -> None:
    student, teacher = load(str(finished)), load(recipe.teacher)
    assert tuple(student.denoiser.foundation.config.block_out_channels) == STUDENT.block_out_channels
    assert not [name for name in weights(finished) if "bridge" in name or "projections" in name]
    for ours, theirs in ((student.vae, teacher.vae), (student.text_encoder, teacher.text_encoder)):
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
    assert student.scheduler["prediction_type"] == teacher.scheduler["prediction_type"]
    assert student.usual.num_inference_steps == recipe.sample.num_inference_steps
    drawn = student.pipeline()("a red cat", image=-torch.ones(1, 3, 16, 16), num_inference_steps=2, output_type="pt")
    assert drawn.images.shape == (1, 3, 16, 16)


def test_a_student_of_one_step_says_so(recipe: DistilRecipe, tmp_path: Path) -> None:
    one = {"num_inference_steps": 1}
    sample = recipe.sample.model_copy(update=one)
    few = into(recipe, tmp_path / "run", stage1=stage(1, **one), stage2=stage(0), sample=sample)
    student = distil(few)
    assert load(str(student)).only_steps == 1
    taught = into(recipe, tmp_path / "taught", teacher=str(student))
    with pytest.raises(RecipeError, match=r"has learnt the timesteps of 1 step\(s\) alone; set stage1\.num_inference"):
        distil(taught)
    alone = {"stage1": stage(1, (1, 0, 0)), "stage2": stage(0)}
    assert (
        distil(into(taught, tmp_path / "alone", init="random", **alone)).parent / "stage1/preview-000001.png"
    ).is_file()


def test_what_the_teacher_made_of_few_timesteps_is_kept_apart(recipe: DistilRecipe, tmp_path: Path) -> None:
    data = recipe.data.model_copy(update={"cache_dir": str(tmp_path), "teacher_cache_gb": 0.1})
    distiller = Distiller(recipe.teacher, data, recipe.run)
    stages = (stage(1), stage(1, num_inference_steps=1), stage(1, num_inference_steps=2))
    kept = [distiller._kept_steps(recipe, one, 0) for one in stages]
    assert len({steps.folder for steps in kept if steps}) == 3


def test_the_run_keeps_its_recipe_its_losses_and_its_previews(finished: Path, recipe: DistilRecipe) -> None:
    folder = finished.parent
    assert recipes.load(DistilRecipe, folder / "recipe.yaml") == recipe
    for name in ("stage1", "stage2"):
        assert len((folder / name / "losses.jsonl").read_text().splitlines()) == 3
        assert (folder / name / "preview-000003.png").is_file()
    assert not list(folder.glob(".*.part"))


def test_both_stages_move_the_student(finished: Path, recipe: DistilRecipe) -> None:
    first, _ = Distiller(recipe.teacher, recipe.data, recipe.run).fresh_student(recipe)
    start = first.state_dict()["foundation.conv_out.weight"]
    after = {}
    for name in ("stage1", "stage2"):
        (path,) = (finished.parent / name / "checkpoints").iterdir()
        after[name] = load_file(path / "trainable.safetensors")["student.foundation.conv_out.weight"]
    assert not torch.equal(start, after["stage1"])
    assert not torch.equal(after["stage1"], after["stage2"])


@pytest.mark.parametrize("where", ["stage1", "stage2"])
def test_interrupted_in_either_stage_and_run_again_equals_uninterrupted(
    finished: Path, recipe: DistilRecipe, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = checkpoint.save

    def save_then_stop(folder: Path, step: int, *rest: object) -> None:
        true(folder, step, *rest)
        if (folder.parent.name, step) == (where, 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            distil(into(recipe, tmp_path))
    assert not (tmp_path / "student").exists()
    assert differing(distil(into(recipe, tmp_path)), finished) == set()


def test_run_again_changes_nothing(finished: Path, recipe: DistilRecipe, tmp_path: Path) -> None:
    before = weights(finished)
    distil(recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(finished).items())


def test_seed_and_start_decide_the_student(finished: Path, recipe: DistilRecipe, tmp_path: Path) -> None:
    other_seed = distil(into(recipe, tmp_path / "seed", seed=1))
    other_start = distil(into(recipe, tmp_path / "start", init="random"))
    for other in (other_seed, other_start):
        assert "unet.conv_out.weight" in differing(finished, other)
        assert not {name for name in differing(finished, other) if name.startswith(("vae.", "text_encoder."))}


def test_the_recipes_random_state_is_its_own(recipe: DistilRecipe) -> None:
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run)
    torch.manual_seed(1)
    student, bridges = distiller.fresh_student(recipe)
    torch.manual_seed(2)
    again, bridges_again = distiller.fresh_student(recipe)
    for one, other in ((student, again), (bridges, bridges_again)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_each_stage_and_each_seed_sees_its_own_batches(
    recipe: DistilRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    class Noted(Loader):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            seeds.append(self.seed)

    monkeypatch.setattr("refine_control.distill.distil.Loader", Noted)
    short = {"stage1": stage(1), "stage2": stage(1)}
    for seed in (0, 1):
        distil(into(recipe, tmp_path / str(seed), seed=seed, **short))
    assert len(set(seeds)) == 6, "two stages and the norms, for two seeds"


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ({"batch_size": 3}, "stage2: batch_size 3 does not divide"),
        ({"snr_gamma": 5.0, "num_inference_steps": 1}, r"stage2: snr_gamma 5\.0 gives .* no weight"),
    ],
)
def test_a_mistake_in_stage_2_does_not_cost_stage_1(
    recipe: DistilRecipe, tmp_path: Path, mistake: dict[str, object], told: str
) -> None:
    run = RUN.model_copy(update={"gradient_accumulation_steps": 2})
    wrong = into(recipe, tmp_path, run=run, stage2=recipe.stage2.model_copy(update=mistake))
    with pytest.raises(RecipeError, match=told):
        distil(wrong)
    assert not (tmp_path / "stage1").exists()


def test_an_alignment_of_ones_own(recipe: DistilRecipe) -> None:
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run)
    mapping = {"foundation.up_blocks.1": "foundation.up_blocks.0"}
    assert distiller.fresh_student(recipe.model_copy(update={"alignment": mapping}))[1].mapping == mapping
    with pytest.raises(RecipeError, match=r"the teacher has no point 'foundation\.nose'"):
        distiller.fresh_student(recipe.model_copy(update={"alignment": {"module.mid_block": "foundation.nose"}}))


def test_another_resolution_than_the_teachers(recipe: DistilRecipe) -> None:
    data = recipe.data.model_copy(update={"resolution": 32})
    with pytest.raises(ModelError, match=r"data\.resolution is 32 but model .* works at 16; set data\.resolution 16"):
        Distiller(recipe.teacher, data, recipe.run)


def test_caches_on_disk_change_a_student_by_rounding_only_and_serve_the_next_run(
    finished: Path, recipe: DistilRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recipe.data.model_copy(update={"cache_dir": str(tmp_path / "cache"), "teacher_cache_gb": 1.0})
    first = distil(into(recipe, tmp_path / "first", data=data))
    kept = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kept == ["latents", "latents", "teacher", "teacher", "text"]
    with monkeypatch.context() as patch:
        patch.setattr("refine_control.data.table.Table.fill", None)
        patch.setattr("refine_control.data.table.Steps.put", None)
        second = distil(into(recipe, tmp_path / "second", data=data))
    assert differing(first, second) == set()
    ours, theirs = weights(first), weights(finished)
    for key, value in theirs.items():
        assert (ours[key] - value).abs().mean() < 1e-3, key


COMPILED = [pytest.mark.slow, pytest.mark.timeout(580), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"teacher_dtype": "bf16"}, 2e-3),
        ({"mixed_precision": "fp16"}, 2e-3),
        pytest.param({"compile": True}, 1e-4, marks=COMPILED),  # where a gradient is near 0 Adam may step either way
    ],
    ids=str,
)
def test_saving_memory_changes_a_student_by_rounding_only(
    finished: Path, recipe: DistilRecipe, tmp_path: Path, change: dict[str, object], tolerance: float
) -> None:
    other = distil(into(recipe, tmp_path, run=recipe.run.model_copy(update=change)))
    ours, theirs = weights(other), weights(finished)
    for key, value in theirs.items():
        assert (ours[key] - value).abs().mean() < tolerance, key
    if "mixed_precision" in change:
        assert any(not torch.equal(ours[key], value) for key, value in theirs.items()), "half precision was used"
    if "compile" in change:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_checkpointed_activations_are_computed_twice_and_the_teachers_weights_are_half(recipe: DistilRecipe) -> None:
    run = recipe.run.model_copy(update={"gradient_checkpointing": True, "teacher_dtype": "fp16"})
    distiller = Distiller(recipe.teacher, recipe.data, run)
    assert {p.dtype for p in distiller.teacher.denoiser.parameters()} == {torch.float16}
    assert {p.dtype for p in distiller.teacher.vae.parameters()} == {torch.float32}
    student, _ = distiller.fresh_student(recipe.model_copy(update={"run": run}))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    runs: list[int] = []
    student.foundation.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: runs.append(1))
    student.train()(*probe(distiller.teacher)).sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize(
    "change", ["scale", "empty", "config", "captions", "words", "seed", "precision", "controls", "dtype"]
)
def test_what_decides_the_teachers_outputs_decides_where_they_are_kept(
    recipe: DistilRecipe, tmp_path: Path, change: str
) -> None:
    data = recipe.data.model_copy(update={"cache_dir": str(tmp_path), "teacher_cache_gb": 1.0})
    distiller = Distiller(recipe.teacher, data, recipe.run)
    seed, run, stage1 = 0, recipe.run, recipe.stage1

    def place() -> str:
        kept = distiller._kept_steps(recipe.model_copy(update={"run": run}), stage1, seed)
        assert kept is not None
        return kept.folder.name

    before = place()
    assert place() == before
    if change == "scale":
        distiller.teacher.vae.register_to_config(scaling_factor=0.5)
    elif change == "empty":
        distiller.teacher.empty_is_zeros = True
    elif change == "config":
        distiller.teacher.denoiser.foundation.register_to_config(attention_head_dim=3)
    elif change == "captions":
        distiller.teacher.tokenizer.add_tokens(["red cat"])
    elif change == "seed":
        seed = 1
    elif change == "controls":
        distiller.data = data.model_copy(update={"controls": ("edges",)})
    elif change == "dtype":
        distiller = Distiller(recipe.teacher, data, run.model_copy(update={"teacher_dtype": "bf16"}))
    elif change == "words":
        stage1 = stage1.model_copy(update={"word_dropout": 0.5})
    else:
        run = run.model_copy(update={"mixed_precision": "bf16"})
    assert place() != before


def test_the_teacher_is_half_before_it_is_moved(recipe: DistilRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.dtype] = []
    monkeypatch.setattr(Model, "to", lambda model, device: moved.append(model.denoiser.foundation.dtype) or model)
    Distiller(recipe.teacher, recipe.data, RUN.model_copy(update={"teacher_dtype": "bf16"}))
    assert moved[-1] == torch.bfloat16


def test_two_half_types_on_a_cpu_are_refused(recipe: DistilRecipe) -> None:
    with pytest.raises(RecipeError, match="on a CPU give one type"):
        Distiller(
            recipe.teacher, recipe.data, RUN.model_copy(update={"teacher_dtype": "fp16", "mixed_precision": "bf16"})
        )


def test_norms_are_measured_on_the_first_stage_that_is_run(recipe: DistilRecipe, tmp_path: Path) -> None:
    run = RUN.model_copy(update={"gradient_accumulation_steps": 4})
    skipped = {"stage1": stage(0, batch_size=2), "stage2": stage(1, batch_size=4)}
    assert distil(into(recipe, tmp_path / "run", run=run, **skipped)).is_dir()


def test_a_recipe_that_lies_in_the_output_folder_is_not_written_over(recipe: DistilRecipe, tmp_path: Path) -> None:
    mine = "# mine\n" + yaml.safe_dump(recipe.model_dump(mode="json"))
    (tmp_path / "recipe.yaml").write_text(mine)
    with pytest.raises(RecipeError, match=r"recipe\.yaml' would be written over, and is not as a run writes it"):
        distil(into(recipe, tmp_path))
    assert (tmp_path / "recipe.yaml").read_text() == mine
