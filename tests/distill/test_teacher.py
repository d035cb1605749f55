"""The teacher's own training, end to end on a few pictures."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from pydantic import ValidationError

from refine_control.diffusion import store
from refine_control.diffusion.store import load
from refine_control.distill.teacher import (
    Reconstruction,
    TeacherTask,
    _fresh_or_loaded,
    open_pictures,
    open_shown,
    train_teacher,
)
from refine_control.errors import DataError, ModelError, RecipeError
from refine_control.recipe import NoiseConfig, SampleConfig, TeacherRecipe, save
from tiny import AUTOENCODER, DATA, RUN, TEACHER, TEXT, batch, stage, tiny_model, write_folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> TeacherRecipe:
    root = tmp_path_factory.mktemp("teacher")
    return TeacherRecipe(
        output_dir=str(root / "run"),
        data=DATA.model_copy(update={"labelled": str(write_folder(root / "labelled", 6))}),
        autoencoder=AUTOENCODER,
        text=TEXT,
        denoiser=TEACHER,
        autoencoder_stage=stage(3, (1, 0, 0), ema_decay=0.5),
        denoiser_stage=stage(3, (1, 0, 0), ema_decay=0.5),
        sample=SampleConfig(num_inference_steps=1, guidance_scale=1),
        run=RUN,
    )


@pytest.fixture(scope="module")
def folder(recipe: TeacherRecipe) -> Path:
    return train_teacher(recipe)


def test_it_is_saved_in_half_and_loads(folder: Path, recipe: TeacherRecipe) -> None:
    model = load(str(folder))
    assert model.resolution == 16
    assert tuple(model.denoiser.foundation.config.block_out_channels) == TEACHER.block_out_channels
    assert model.tokenizer.model_max_length == TEXT.max_length
    assert model.scheduler["prediction_type"] == recipe.noise.prediction_type
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    parameters = sum(p.numel() for n in (model.denoiser, model.vae, model.text_encoder) for p in n.parameters())
    assert weights < 2.5 * parameters


def test_a_run_keeps_its_tokenizer(folder: Path, recipe: TeacherRecipe) -> None:
    """Trained anew at a resume, it would give the embeddings that were learned to other words."""
    pictures, _ = open_pictures(recipe.data)
    kept = folder.parent / "tokenizer"
    marked = kept / "tokenizer_config.json"
    before = marked.read_bytes()
    again = _fresh_or_loaded(recipe, pictures, kept)
    assert marked.read_bytes() == before
    words = ["a red cat", "two yellow suns"]
    assert again.tokenizer(words).input_ids == load(str(folder)).tokenizer(words).input_ids
    assert again.tokenizer.model_max_length == TEXT.max_length


def test_a_tokenizer_that_nothing_was_trained_with_is_made_anew(recipe: TeacherRecipe, tmp_path: Path) -> None:
    pictures, _ = open_pictures(recipe.data)
    _fresh_or_loaded(recipe, pictures, tmp_path / "tokenizer")
    longer = recipe.model_copy(update={"text": TEXT.model_copy(update={"max_length": 2 * TEXT.max_length})})
    model = _fresh_or_loaded(longer, pictures, tmp_path / "tokenizer")
    assert model.tokenizer.model_max_length == 2 * TEXT.max_length


def test_without_a_val_split_what_is_trained_on_is_shown(recipe: TeacherRecipe, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / split, 4)
    data = recipe.data.model_copy(update={"labelled": str(tmp_path), "unlabelled": None})
    trained, tested = (open_pictures(data, split)[0].dataset.files() for split in ("train", "test"))
    assert open_shown(data)[0].dataset.files() == trained != tested
    with pytest.raises(DataError, match="no 'val' folder, only train, test"):
        open_pictures(data, "val")


def test_latents_have_about_unit_variance(folder: Path, recipe: TeacherRecipe) -> None:
    model = load(str(folder))
    pictures, _ = open_pictures(recipe.data)
    images = torch.stack([torch.from_numpy(pictures[i].image).permute(2, 0, 1) / 127.5 - 1 for i in range(6)])
    with torch.no_grad():
        assert 0.7 < model.encode(images).std() < 1.4
    assert model.vae.config.scaling_factor != 0.18215, "not the default of diffusers"


def test_going_on_from_a_model_leaves_its_autoencoder(folder: Path, recipe: TeacherRecipe, tmp_path: Path) -> None:
    """Where its stage has no steps. And moves everything else: foundation, module and text encoder."""
    kept = {"init_from": str(folder), "autoencoder_stage": stage(0, (1, 0, 0))}
    further = recipe.model_copy(update={"output_dir": str(tmp_path), **kept})
    before, after = load(str(folder)), load(str(train_teacher(further)))
    assert not (tmp_path / "autoencoder").exists()
    for key, value in before.vae.state_dict().items():
        assert torch.equal(after.vae.state_dict()[key], value), key
    for ours, theirs in (
        (after.denoiser.foundation.conv_out.weight, before.denoiser.foundation.conv_out.weight),
        (after.denoiser.module.controlnet_mid_block.weight, before.denoiser.module.controlnet_mid_block.weight),
        (next(after.text_encoder.parameters()), next(before.text_encoder.parameters())),
    ):
        assert not torch.equal(ours, theirs)


def test_what_the_recipe_says_of_a_model_to_go_on_from_is_true(folder: Path, recipe: TeacherRecipe) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(RecipeError) as error:
            train_teacher(recipe.model_copy(update={"init_from": str(folder), **changes}))
        return str(error.value)

    other = TEACHER.model_copy(update={"norm_num_groups": 8})
    assert f"denoiser.norm_num_groups is 8, but {TEACHER.norm_num_groups} of '{folder}'" in refused(denoiser=other)
    noise = NoiseConfig(prediction_type="sample")
    assert "noise.prediction_type is sample, but v_prediction of" in refused(noise=noise)


def test_another_model_to_go_on_from(folder: Path, recipe: TeacherRecipe, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "from")
    begun = {"init_from": str(tmp_path / "from"), "autoencoder_stage": stage(0, (1, 0, 0))}
    further = recipe.model_copy(update={"output_dir": str(tmp_path / "run"), **begun})
    train_teacher(further)
    train_teacher(further)
    model = load(str(folder))
    with torch.no_grad():
        model.denoiser.foundation.conv_out.weight += 1
    store.save(model, tmp_path / "from", torch.float16)
    with pytest.raises(RecipeError, match=r"holds a run of another recipe .*init_from"):
        train_teacher(further)


def test_a_mistake_in_the_denoisers_stage_does_not_cost_the_autoencoder(recipe: TeacherRecipe, tmp_path: Path) -> None:
    short = recipe.denoiser_stage.model_copy(update={"labelled_fraction": 0.5})
    with pytest.raises(DataError, match=r"plain images are needed: set data\.unlabelled"):
        train_teacher(recipe.model_copy(update={"output_dir": str(tmp_path), "denoiser_stage": short}))
    assert not (tmp_path / "autoencoder").exists()


def test_a_batch_that_does_not_divide_is_told_by_its_stage(recipe: TeacherRecipe, tmp_path: Path) -> None:
    odd = {"denoiser_stage": recipe.denoiser_stage.model_copy(update={"batch_size": 3})}
    run = RUN.model_copy(update={"gradient_accumulation_steps": 2})
    with pytest.raises(RecipeError, match="denoiser_stage: batch_size 3 does not divide"):
        train_teacher(recipe.model_copy(update={"output_dir": str(tmp_path), "run": run, **odd}))
    assert not (tmp_path / "autoencoder").exists()


def test_it_is_trained_on_the_cpu_where_accelerate_would_choose_another(
    recipe: TeacherRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac: what accelerate is told first, it keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: torch.device("meta")))
    try:
        run = RUN.model_copy(update={"device": "cpu"})
        train_teacher(recipe.model_copy(update={"output_dir": str(tmp_path), "run": run}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_commit_that_a_run_began_with_is_kept(
    recipe: TeacherRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(recipe.model_copy(update={"init_from": "org/model@abc"}), tmp_path / "recipe.yaml")
    asked: list[str] = []
    monkeypatch.setattr(store, "pin", lambda name: asked.append(name) or "zoo:none")
    for name in ("org/model", "org/other"):
        with pytest.raises(ModelError):
            train_teacher(recipe.model_copy(update={"init_from": name, "output_dir": str(tmp_path)}))
    assert asked == ["org/model@abc", "org/other"]


def test_a_teacher_learns_by_the_task_alone(recipe: TeacherRecipe) -> None:
    plain = recipe.model_dump()
    plain["denoiser_stage"]["weights"] = {"task": 1, "output": 1}
    with pytest.raises(ValidationError, match="a teacher learns by the task alone"):
        TeacherRecipe.model_validate(plain)


def test_the_task_weighs_holes_and_leaves_out_plain_pictures_as_the_stages_do() -> None:
    model, pictures = tiny_model(), batch(4, 0.5)

    def task(**changes: object) -> float:
        return TeacherTask(model, stage(caption_dropout=0, **changes), cache_gb=0.1)(pictures)["task"].item()

    assert task(hole_weight=8.0) != task()
    half = task(task_on_unlabelled=False)
    assert 0 < half < task()


def test_the_task_reaches_denoiser_and_text_encoder_and_spares_the_autoencoder() -> None:
    model = tiny_model()
    model.vae.requires_grad_(False)
    terms = TeacherTask(model, stage(caption_dropout=0), cache_gb=0.1)(batch(4, 0.5))
    assert list(terms) == ["task"]
    terms["task"].backward()
    for network in (model.denoiser, model.text_encoder):
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [p for p in model.vae.parameters() if p.grad is not None] == []


def test_every_weight_of_the_autoencoder_learns_and_its_losses_are_repeatable() -> None:
    vae = tiny_model().vae
    losses = Reconstruction(vae)
    terms = losses(batch())
    torch.stack(list(terms.values())).sum().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []
    torch.manual_seed(5)
    assert losses(batch()) == terms
