"""The embedded teacher, trained by the same loop: first the autoencoder, then foundation + module + text encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from refine_control.claim import claim, has_trained, known_commits
from refine_control.data.batch import Batch
from refine_control.data.loader import Loader, Pictures
from refine_control.data.source import NoSplitError, open_usable
from refine_control.diffusion import store
from refine_control.diffusion.build import build_autoencoder, build_denoiser, build_text_encoder, build_tokenizer
from refine_control.diffusion.cache import digest
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Model, halvings
from refine_control.diffusion.noise import NoiseSchedule, at_few_steps, sampler_at, scheduler_config
from refine_control.distill.draw import draw
from refine_control.distill.loop import Losses, train
from refine_control.distill.losses import by_place, task_loss
from refine_control.distill.preview import Preview, save_grid
from refine_control.distill.processes import pick_device, refuse_processes, set_threads, share_out
from refine_control.distill.stages import takes_task
from refine_control.errors import DataError, ModelError, RecipeError
from refine_control.files import hold, put_in_place
from refine_control.recipe import DataConfig, RunConfig, StageConfig, TeacherRecipe
from refine_control.student.named import plan_of

KL_WEIGHT = 1e-6  # Rombach et al. 2022 (2112.10752): only keeps latents from drifting apart


def train_teacher(recipe: TeacherRecipe) -> Path:
    """Trains what the recipe describes, or goes on where it stopped. Returns the folder of the saved model."""
    refuse_processes("train-teacher")
    folder = Path(recipe.output_dir)
    with hold(folder):
        return _train_teacher(recipe, folder)


def _train_teacher(recipe: TeacherRecipe, folder: Path) -> Path:
    set_threads(recipe.run)
    device = pick_device(recipe.run.device)  # first: accelerate keeps what it is told first
    labelled, unlabelled = open_pictures(recipe.data)
    if recipe.init_from:
        known = known_commits(TeacherRecipe, folder, lambda begun: [begun.init_from])
        recipe = recipe.model_copy(update={"init_from": store.pin(known.get(recipe.init_from, recipe.init_from))})
    torch.manual_seed(recipe.seed)
    model = _fresh_or_loaded(recipe, labelled, folder / "tokenizer")
    begun_from = {"init_from": [digest(part) for part in model.parts]} if recipe.init_from else {}
    claim(recipe, folder, contents(labelled, unlabelled), begun_from)
    sampler_at(model.scheduler, recipe.sample.num_inference_steps)  # now, not at the first preview
    loader = _loader(recipe, recipe.denoiser_stage, labelled, unlabelled)
    check_stage("denoiser_stage", recipe.denoiser_stage, recipe.run, loader, model.scheduler)
    only = recipe.denoiser_stage.num_inference_steps
    model = replace(model, usual=recipe.sample, only_steps=only, scheduler=at_few_steps(model.scheduler, only))
    model.to(device)
    if recipe.autoencoder_stage.steps:
        _train_autoencoder(recipe, model, labelled, unlabelled, folder / "autoencoder")
    _train_denoiser(recipe, model, loader, folder / "denoiser")
    store.save(model, folder / "model", torch.float16)
    return folder / "model"


def open_pictures(
    data: DataConfig, split: str = "train", variants: int | None = None
) -> tuple[Pictures, Pictures | None]:
    """The labelled and the plain data set of a recipe, at its resolution."""
    variants = variants or data.variants
    limit = data.labelled_limit if split == "train" else None
    labelled = Pictures(open_usable(data.labelled, split, data.skip_corrupt), data, variants, limit)
    if not any(labelled.text(index) for index in range(labelled.examples)):
        raise DataError(
            f"no picture of '{data.labelled}' has a caption; give each a 'text' in its metadata.jsonl, "
            "or name the folder data.unlabelled"
        )
    unlabelled = (
        Pictures(open_usable(data.unlabelled, split, data.skip_corrupt), data, variants) if data.unlabelled else None
    )
    return labelled, unlabelled


def open_shown(data: DataConfig) -> tuple[Pictures, Pictures | None]:
    """What is looked at while training: of 'val', or where a data set has splits but not that one, of 'train'."""
    try:
        return open_pictures(data, "val", variants=1)
    except NoSplitError:
        return open_pictures(data, variants=1)


def check_resolution(model: Model, name: str, data: DataConfig) -> None:
    """Raises ModelError where a recipe's pictures are not of the size that a model works at."""
    if data.resolution != model.resolution:
        raise ModelError(
            f"data.resolution is {data.resolution} but model '{name}' works at {model.resolution}; "
            f"set data.resolution {model.resolution}"
        )


def check_stage(name: str, stage: StageConfig, run: RunConfig, loader: Loader, scheduler: dict[str, Any]) -> None:
    """Raises RecipeError, naming the stage, where it could not begin: now, not when those before it have trained."""
    try:
        share_out(loader, stage, run, PartialState())
        NoiseSchedule.of_stage(scheduler, stage)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None


def contents(labelled: Pictures, unlabelled: Pictures | None) -> dict[str, str]:
    """Digests of the data sets, by their place in a recipe."""
    digests = {"data.labelled": labelled.contents(captioned=True)}
    return digests | ({"data.unlabelled": unlabelled.contents(captioned=False)} if unlabelled else {})


def _fresh_or_loaded(recipe: TeacherRecipe, labelled: Pictures, kept_tokenizer: Path) -> Model:
    """Byte-pair training numbers equally frequent pairs differently in every process, so the tokenizer is kept, as soon
    as anything has been trained with it."""
    if recipe.init_from:
        model = store.load(recipe.init_from)
        check_resolution(model, recipe.init_from, recipe.data)
        _check_description(recipe, model)
        return model
    vae = build_autoencoder(recipe.autoencoder)
    if not (kept_tokenizer.is_dir() and has_trained(kept_tokenizer.parent)):
        captions = [labelled.text(i) for i in range(labelled.examples)]
        aside = kept_tokenizer.with_name(".tokenizer.part")
        build_tokenizer(recipe.text, captions).save_pretrained(aside)
        put_in_place(aside, kept_tokenizer)
    tokenizer = CLIPTokenizer.from_pretrained(kept_tokenizer, local_files_only=True)
    text_encoder = build_text_encoder(recipe.text, tokenizer)
    side = recipe.data.resolution // halvings(recipe.autoencoder.block_out_channels)
    denoiser = build_denoiser(recipe.denoiser, recipe.autoencoder.latent_channels, recipe.text.hidden_size, side)
    return Model(denoiser, vae, text_encoder, tokenizer, scheduler_config(recipe.noise))


def _check_description(recipe: TeacherRecipe, model: Model) -> None:
    """Raises RecipeError where the recipe describes another model than init_from is: its saved copy would be wrong."""
    said, found = (
        plan.model_dump() | {"layers_per_block": plan.layers, "transformer_layers": plan.transformers}
        for plan in (recipe.denoiser, plan_of(model.denoiser))
    )
    noise = recipe.noise.model_dump()
    if not model.denoiser.nets:
        del said["conditioning_channels"]
    pairs = {f"denoiser.{key}": (said[key], found[key]) for key in said}
    pairs |= {f"noise.{key}": (noise[key], model.scheduler.get(key, noise[key])) for key in noise}
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise RecipeError(
                f"{key} is {ours}, but {theirs} of '{recipe.init_from}', whose weights are taken: set that"
            )


def _loader(recipe: TeacherRecipe, stage: StageConfig, labelled: Pictures, unlabelled: Pictures | None) -> Loader:
    return Loader(labelled, unlabelled, recipe.masks, stage.batch_size, stage.labelled_fraction, recipe.seed)


def _train_autoencoder(
    recipe: TeacherRecipe, model: Model, labelled: Pictures, unlabelled: Pictures | None, folder: Path
) -> None:
    loader = _loader(recipe, recipe.autoencoder_stage, labelled, unlabelled)
    fixed = loader(0).image[:16].to(model.device)

    def preview(path: Path) -> None:
        with torch.no_grad():
            save_grid(path, [fixed.cpu(), model.decode(model.encode(fixed)).cpu()])

    weights = {"reconstruction": 1.0, "colour": 2.0, "edges": 0.5, "kl": KL_WEIGHT}
    train(folder, Reconstruction(model.vae), weights, loader, recipe.autoencoder_stage, recipe.run, preview)
    with torch.no_grad():  # Rombach et al. 2022, section G: latents of unit variance
        modes = model.vae.encode(
            torch.cat([loader(step).image for step in range(8)]).to(model.device)
        ).latent_dist.mode()
    model.vae.register_to_config(scaling_factor=float(1 / modes.std()))


class Reconstruction(nn.Module):
    """The autoencoder's losses of a batch."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: Batch) -> Losses:
        posterior = self.vae.encode(batch.image).latent_dist
        noise = batch.noise(tuple(posterior.mean.shape[1:])).to(batch.image)
        rebuilt = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return {
            "reconstruction": F.l1_loss(rebuilt, batch.image),
            "colour": F.mse_loss(rebuilt, batch.image),  # without it rare hues, such as green, turn grey
            "edges": F.l1_loss(_edges(rebuilt), _edges(batch.image)),
            "kl": posterior.kl().mean(),
        }


def _edges(image: Tensor) -> Tensor:
    """Differences of neighbours, both ways, (B, 6, H-1, W-1): what keeps outlines sharp."""
    corner = image[..., :-1, :-1]
    return torch.cat([image[..., 1:, :-1] - corner, image[..., :-1, 1:] - corner], dim=1)


def _train_denoiser(recipe: TeacherRecipe, model: Model, loader: Loader, folder: Path) -> None:
    stage = recipe.denoiser_stage
    model.vae.requires_grad_(False).eval()
    validation = open_shown(recipe.data)
    train(
        folder,
        TeacherTask(model, stage, recipe.data.cache_gb),
        stage.weights.model_dump(include={"task"}),
        loader,
        stage,
        recipe.run,
        Preview(model, validation, recipe.masks, recipe.sample),
    )


class TeacherTask(nn.Module):
    """L_task of a batch alone, the text encoders learning along."""

    def __init__(self, model: Model, stage: StageConfig, cache_gb: float) -> None:
        super().__init__()
        self.denoiser = model.denoiser.requires_grad_(True)
        self.text_encoder = model.text_encoder.requires_grad_(True)
        self.text_encoder_2 = model.text_encoder_2.requires_grad_(True) if model.text_encoder_2 else None
        self.model, self.stage = model, stage
        self.schedule = NoiseSchedule.of_stage(model.scheduler, stage)
        self.encoder = Encoder(model, cache_gb)

    def forward(self, batch: Batch) -> Losses:
        stage = self.stage
        d = draw(batch, self.encoder.latents(batch), self.schedule, stage.caption_dropout, stage.word_dropout)
        prediction = self.denoiser(d.x_t, d.t, self.model.embed(list(d.captions)), d.control)
        weight = self.schedule.row_weight(d.t, stage.snr_gamma)
        weight = weight * takes_task(batch, stage).to(weight)
        place = by_place(batch.mask, stage.hole_weight, prediction.shape[-2:])
        return {"task": task_loss(prediction, d.target, weight, place)}
