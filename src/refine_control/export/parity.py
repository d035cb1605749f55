"""How far an exported model is from torch: graph by graph on fixed inputs, and by the scores of what it draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from refine_control.data.batch import derive_seed
from refine_control.data.loader import Pictures
from refine_control.data.source import open_usable, warn_if_trained_on
from refine_control.diffusion.sample import paste
from refine_control.errors import DataError
from refine_control.evaluate.features import efficientnet_lite0
from refine_control.evaluate.heldout import HeldOut
from refine_control.evaluate.metrics import sign
from refine_control.evaluate.score import Reference
from refine_control.export.graph import Graph
from refine_control.export.onnx import Feed
from refine_control.recipe import DataConfig, EvaluateConfig, MaskConfig, SampleConfig, validate
from refine_control.runtime import Student, noise

BOUNDS = {"fp32": 1e-4, "fp16": 1e-2, "int8": 10.0}  # of graph_error; int8's own is what it does to the scores
MOST_LOSS = 0.02  # of a score, through int8


def graph_error(graph: Graph, student: Student) -> float:
    """The largest difference from torch, in units of the largest number that torch gives, of 1 where that is less."""
    inputs = {name: tensor.numpy() for name, tensor in graph.inputs.items()}
    got = student.run(graph.name, **inputs)
    return max(
        float(np.abs(ours - theirs.numpy()).max() / max(1.0, theirs.abs().max().item()))
        for ours, theirs in zip(got, graph.expected(), strict=True)
    )


def open_heldout(
    folder: str, split: str, images: int, resolution: int, controls: Sequence[str] = ("inpaint",)
) -> HeldOut:
    """Pictures with masks, controls and captions, chosen as `refine-control evaluate` chooses them.

    Raises:
        DataError: they cannot be read, or those to be scored (split test) are fewer than 2.
    """
    dataset = open_usable(folder, split, skip_corrupt=True)
    if split == "test":
        warn_if_trained_on(folder, dataset.files(), split, lenient=True)
    given = {"labelled": folder, "resolution": resolution, "controls": controls}
    data = validate(DataConfig, given, "command line")
    how = (True, MaskConfig(), EvaluateConfig(split=split, images=images))
    try:
        heldout = HeldOut.choose(Pictures(dataset, data, variants=1), *how)
    except DataError:  # only now is every picture looked at, to leave out those that cannot be read
        pictures = Pictures(dataset, data.model_copy(update={"skip_corrupt": True}), variants=1)
        heldout = HeldOut.choose(pictures, *how)
    if split == "test" and len(heldout.batch) < min(2, images):
        raise DataError(f"'{folder}' has one picture that can be used; give 2 or more")
    return heldout


def draw(student: Student, heldout: HeldOut, config: SampleConfig) -> Tensor:
    """What an exported model makes of every masked picture, from the noise that `HeldOut.draw` starts from:
    (N, 3, S, S) in [0, 1], known pixels pasted back."""
    batch, drawn = heldout.batch, []
    has_module = "condition" in student.manifest["graphs"]
    for row in tqdm(range(len(batch)), desc="drawing", unit="picture", leave=False):
        latents = noise(derive_seed("noise", config.seed, row), (1, *student.manifest["latent_shape"]))
        control = batch.control[row : row + 1].numpy() if has_module else None
        drawn.append(
            student.sample(control, batch.captions[row], config.num_inference_steps, config.guidance_scale, latents)
        )
    whole = torch.from_numpy(np.concatenate(drawn))
    return (paste(whole, batch.image, batch.mask) + 1) / 2


def calibration_feeds(student: Student, heldout: HeldOut, config: SampleConfig) -> dict[str, list[Feed]]:
    """What every graph is given while the student draws: {graph: [inputs, ...]}."""
    feeds: dict[str, list[Feed]] = {name: [] for name in student.manifest["graphs"]}
    run = student.run

    def recorded(graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        feeds[graph].append(inputs)
        return run(graph, **inputs)

    student.run = recorded  # type: ignore[method-assign]
    try:
        draw(student, heldout, config)
    finally:
        student.run = run  # type: ignore[method-assign]
    return feeds


def reference_of(heldout: HeldOut) -> Reference:
    return Reference(heldout.true, heldout.batch.mask, efficientnet_lite0())


def losses(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """How much worse each score of the hole became, as a part of what it was: 0.02 is two percent."""
    lost = {}
    for name in before:
        was, is_now = before[name]["hole"], after[name]["hole"]
        worse = (was - is_now) * sign(name)
        lost[name] = worse / abs(was) if was else math.copysign(math.inf, worse) if worse else 0.0
    return lost
