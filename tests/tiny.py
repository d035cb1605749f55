"""Tiny models and data, made by the package's own builders: 16 px pictures, latents 4x8x8, two levels."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from refine_control.data.batch import Batch
from refine_control.data.example import Example
from refine_control.data.loader import Loader, Pictures
from refine_control.diffusion import store
from refine_control.diffusion.build import build_autoencoder, build_denoiser, build_text_encoder, build_tokenizer
from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.noise import scheduler_config
from refine_control.plans import AutoencoderPlan, DenoiserPlan, TextPlan
from refine_control.recipe import (
    DataConfig,
    DistilRecipe,
    LossWeights,
    MaskConfig,
    NoiseConfig,
    RunConfig,
    SampleConfig,
    StageConfig,
)

SIDE = 16
WORDS = ("a red cat", "a blue dog", "one green leaf", "two yellow suns", "a small house", "an old tree")
TEXT = TextPlan(vocab_size=600, max_length=8, hidden_size=16, layers=1, heads=2)
AUTOENCODER = AutoencoderPlan(latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4)
DATA = DataConfig(resolution=SIDE, variants=1, cache_gb=0.1)
RUN = RunConfig(device="cpu", num_threads=1, checkpoint_every=1000, log_every=1, grad_norm_every=1000)


def plan(*widths: int, **changes: Any) -> DenoiserPlan:
    """Attention and two heads at every level, unless told otherwise."""
    levels = len(widths)
    shape = {"attention": (True,) * levels, "heads": (2,) * levels, "norm_num_groups": 4}
    return DenoiserPlan(block_out_channels=widths, conditioning_channels=(4, 8), **{**shape, **changes})


TEACHER = plan(16, 32)
STUDENT = plan(8, 16)


def tiny_denoiser(shape: DenoiserPlan = TEACHER, seed: int = 0, text_width: int = TEXT.hidden_size) -> Denoiser:
    """Random weights, the module's zero convolutions too: fresh ones would hide whether the module does anything."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        denoiser = build_denoiser(shape, AUTOENCODER.latent_channels, text_width, SIDE // 2)
        for parameter in denoiser.module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return denoiser.eval()


def tiny_model(shape: DenoiserPlan = TEACHER, noise: NoiseConfig | None = None, seed: int = 0) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build_autoencoder(AUTOENCODER).eval()
        tokenizer = build_tokenizer(TEXT, list(WORDS))
        text_encoder = build_text_encoder(TEXT, tokenizer)
    return Model(
        tiny_denoiser(shape, seed), vae, text_encoder.eval(), tokenizer, scheduler_config(noise or NoiseConfig())
    )


def examples(n: int, captioned: bool = True, seed: int = 0) -> list[Example]:
    """Smooth two-coloured pictures, each its own."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 1, SIDE)[:, None, None] * np.ones((1, SIDE, 1))
    colours = rng.integers(0, 256, (n, 2, 3))
    return [
        Example(
            f"{'labelled' if captioned else 'plain'}-{i}",
            ((1 - slope) * colours[i, 0] + slope * colours[i, 1]).astype(np.uint8),
            WORDS[i % len(WORDS)] if captioned else None,
        )
        for i in range(n)
    ]


def loader(batch_size: int = 4, labelled_fraction: float = 1.0, seed: int = 0, **changes: Any) -> Loader:
    """Six captioned pictures and five plain ones."""
    sets = {"labelled": Pictures(examples(6), DATA, 1), "unlabelled": Pictures(examples(5, False, seed=1), DATA, 1)}
    return Loader(
        **{**sets, **changes},
        masks=MaskConfig(),
        batch_size=batch_size,
        labelled_fraction=labelled_fraction,
        seed=seed,
    )


def batch(rows: int = 4, labelled_fraction: float = 1.0, seed: int = 0) -> Batch:
    return loader(rows, labelled_fraction, seed)(0)


def stage(steps: int = 4, weights: tuple[float, float, float] = (1, 1, 1), **changes: Any) -> StageConfig:
    """weights: of task, output, feature."""
    w = LossWeights(task=weights[0], output=weights[1], feature=weights[2])
    return StageConfig(**{"steps": steps, "batch_size": 4, "warmup_steps": 0, "weights": w, **changes})


def distil_recipe(root: Path, labelled: int, plain: int, **parts: Any) -> DistilRecipe:
    """A tiny teacher and both data sets written under root. No latents are kept, so that runs compute alike."""
    store.save(tiny_model(), root / "teacher")
    data = {
        "labelled": str(write_folder(root / "labelled", labelled)),
        "unlabelled": str(write_folder(root / "plain", plain, captioned=False)),
        "cache_gb": 1e-12,
    }
    return DistilRecipe(
        output_dir=str(root / "run"),
        teacher=str(root / "teacher"),
        data=DATA.model_copy(update=data),
        student=STUDENT,
        sample=SampleConfig(num_inference_steps=1, guidance_scale=1),
        **parts,
    )


def write_comparison(base: Path, rows: dict[str, Any] | None = None, **keys: Any) -> Path:
    """compare.yaml beside a base recipe: scratch and the method, or other rows."""
    scratch = {"set": {"init": "random", "stage1.weights": {"task": 1}, "stage2.weights": {"task": 1}}}
    rows = {"scratch": scratch, "refine-control": {}} if rows is None else rows
    plan = {"output_dir": str(base.parent / "compare"), "base": base.name, "seeds": [0], "rows": rows}
    if rows and "refine-control" not in rows:
        plan["ours"] = next(iter(rows))
    path = base.with_name("compare.yaml")
    path.write_text(yaml.safe_dump(plan | keys, sort_keys=False), encoding="utf-8")
    return path


def write_folder(folder: Path, n: int, captioned: bool = True) -> Path:
    """`examples` as PNGs that `open_dataset` reads, the same for every split."""
    folder.mkdir(parents=True)
    lines = []
    for i, example in enumerate(examples(n, captioned)):
        Image.fromarray(example.image).save(folder / f"{i}.png")
        lines.append(f'{{"file_name": "{i}.png", "text": "{example.text}"}}\n')
    if captioned:
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def least(kind: Any) -> Any:
    """The least that an export's manifest may say where `runtime.MUST_HAVE` has this kind."""
    if isinstance(kind, dict):
        return {key: least(each) for key, each in kind.items()}
    if isinstance(kind, tuple):
        return kind[0]
    return [] if isinstance(kind, list) else None if isinstance(kind, UnionType) else kind()
