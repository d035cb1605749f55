"""Free-form masks by LaMa's numbers (Suvorov et al. 2021, 2109.07161): given for 256 px, scaled with the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from refine_control.errors import RecipeError

LARGEST_AREA = 0.5


@dataclass(frozen=True)
class Kind:
    """Chains of strokes and, with probability `boxes_weight / (1 + boxes_weight)`, boxes instead. Lengths at 256 px."""

    strokes: tuple[int, int]
    width: int
    length: int
    boxes_weight: float = 0.0
    boxes: tuple[int, int] = (0, 0)
    box_side: tuple[int, int] = (0, 0)
    margin: int = 0


KINDS = {
    "thin": Kind(strokes=(4, 50), width=10, length=40),
    "medium": Kind(strokes=(4, 5), width=50, length=100, boxes_weight=0.3, boxes=(1, 5), box_side=(10, 50)),
    "thick": Kind((1, 5), 100, 200, boxes_weight=0.3, boxes=(1, 3), box_side=(30, 150), margin=10),
}


def sample_mask(weights: Mapping[str, float], size: tuple[int, int], seed: int) -> np.ndarray:
    """One mask, decided by its seed alone: a kind drawn by weight, then the mask. uint8 (H, W), 1 = hole.

    Raises:
        RecipeError: an unknown kind, or no kind with a weight above 0.
    """
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise RecipeError(f"masks: weights {dict(weights)}; give at least one kind a weight above 0, and none below 0")
    rng = np.random.default_rng(seed)
    kinds = list(weights)
    kind = kinds[int(rng.choice(len(kinds), p=[weights[k] / total for k in kinds]))]
    return draw_mask(kind, size, rng)


def draw_mask(kind: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A mask of one kind: thin, medium, thick, or box (one rectangle over 12-50 % of the area). uint8 (H, W), 1 = hole.

    Drawn again until it covers more than nothing and at most half.
    """
    if kind != "box" and kind not in KINDS:
        raise RecipeError(f"masks: unknown kind '{kind}'; there are thin, medium, thick and box")
    if min(size) < 8:
        raise RecipeError(f"masks: {size[1]}x{size[0]} is too small for a mask; use a resolution of 8 or more")
    strokes = kind != "box" and rng.random() * (1 + KINDS[kind].boxes_weight) < 1  # drawn once: area decides no kind
    while True:
        canvas = Image.new("L", (size[1], size[0]))
        if kind == "box":
            _rectangle(ImageDraw.Draw(canvas), size, rng)
        elif strokes:
            _strokes(ImageDraw.Draw(canvas), KINDS[kind], size, rng)
        else:
            _boxes(ImageDraw.Draw(canvas), KINDS[kind], size, rng)
        mask = np.array(canvas)
        if 0 < mask.mean() <= LARGEST_AREA:
            return mask


def _strokes(canvas: ImageDraw.ImageDraw, kind: Kind, size: tuple[int, int], rng: np.random.Generator) -> None:
    scale = min(size) / 256
    counts = rng.integers(1, 6, int(rng.integers(kind.strokes[0], kind.strokes[1] + 1)))
    total = int(counts.sum())  # all numbers are drawn at once: a call for each stroke is most of a mask's time
    starts = (rng.random((len(counts), 2)) * (size[1], size[0])).tolist()
    angles = rng.uniform(0, 4, total) * np.repeat(np.where(np.arange(len(counts)) % 2, 1, -1), counts)
    lengths = rng.uniform(10, 10 + kind.length, total) * scale
    steps = iter(np.stack([lengths * np.sin(angles), lengths * np.cos(angles)], axis=1).tolist())
    widths = iter(np.rint(rng.uniform(5, 5 + kind.width, total) * scale).clip(1).astype(int).tolist())
    for (x, y), count in zip(starts, counts.tolist(), strict=True):
        for _ in range(count):
            (dx, dy), width = next(steps), next(widths)
            end = min(max(x + dx, 0), size[1] - 1), min(max(y + dy, 0), size[0] - 1)
            canvas.line([(x, y), end], fill=1, width=width)
            if width > 2:  # round ends, so that turns have no notches
                for cx, cy in ((x, y), end):
                    canvas.ellipse([cx - width / 2, cy - width / 2, cx + width / 2, cy + width / 2], fill=1)
            x, y = end


def _boxes(canvas: ImageDraw.ImageDraw, kind: Kind, size: tuple[int, int], rng: np.random.Generator) -> None:
    scale = min(size) / 256
    margin = round(kind.margin * scale)
    for _ in range(int(rng.integers(kind.boxes[0], kind.boxes[1] + 1))):
        height, width = (max(1, round(rng.uniform(*kind.box_side) * scale)) for _ in range(2))
        top = int(rng.integers(margin, max(margin + 1, size[0] - margin - height + 1)))
        left = int(rng.integers(margin, max(margin + 1, size[1] - margin - width + 1)))
        canvas.rectangle([left, top, left + width - 1, top + height - 1], fill=1)


def _rectangle(canvas: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    area, aspect = rng.uniform(0.12, 0.5), math.exp(rng.uniform(-0.7, 0.7))
    height = min(size[0], max(1, round(math.sqrt(area * aspect) * size[0])))
    width = min(size[1], max(1, round(area * size[0] * size[1] / height)))
    top, left = int(rng.integers(0, size[0] - height + 1)), int(rng.integers(0, size[1] - width + 1))
    canvas.rectangle([left, top, left + width - 1, top + height - 1], fill=1)
