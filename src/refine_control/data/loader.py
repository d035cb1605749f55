"""Step -> Batch, as a pure function of (seed, step): nothing to save, and resuming cannot lose its place."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from refine_control.data.batch import Batch
from refine_control.data.example import Example
from refine_control.data.images import fit_square, fit_square_mask
from refine_control.data.masks import sample_mask
from refine_control.data.source import check
from refine_control.errors import DataError
from refine_control.recipe import DataConfig, MaskConfig

# Pictures (H, W, 3) and masks (H, W): a mask stays 0 or 1.
_RESAMPLING = {3: Image.Resampling.BICUBIC, 2: Image.Resampling.NEAREST}


class Dataset(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def keys(self) -> list[str]: ...


def derive_seed(*parts: int | str) -> int:
    """One 63-bit seed from what decides it; unlike a sum, no two recipes of parts meet."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Pictures:
    """A data set at one resolution, `variants` versions of each picture, decoded once while they fit in memory."""

    def __init__(self, dataset: Dataset, config: DataConfig, variants: int, limit: int | None = None) -> None:
        self.dataset = _without_faults(dataset) if config.skip_corrupt else dataset
        if len(self.dataset) == 0:
            raise DataError("the data set holds no usable picture")
        self.config = config
        self.variants = variants
        self.examples = min(len(self.dataset), limit or len(self.dataset))
        budget = config.cache_gb * 2**30 / (3 * config.resolution**2)
        self._kept: dict[int, Example] | None = {} if len(self) <= budget else None

    def __len__(self) -> int:
        return self.examples * self.variants

    def __getitem__(self, number: int) -> Example:
        """Version `number // examples` of picture `number % examples`: image uint8 (H, W, 3) at the resolution."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        if self._kept is not None and number in self._kept:
            return self._kept[number]
        version, index = divmod(number, self.examples)
        example = self._versioned(self.dataset[index], version, index)
        if self._kept is not None:
            self._kept[number] = example
        return example

    def _versioned(self, example: Example, version: int, index: int) -> Example:
        """Version 0 as it is, 1 mirrored, others zoomed and shifted by up to an eighth, every second one mirrored."""
        size, fit = self.config.resolution, self.config.fit

        def turned(picture: np.ndarray) -> np.ndarray:
            if version >= 2:
                picture = _zoom(picture, np.random.default_rng(derive_seed("variant", index, version)))
            return np.ascontiguousarray(picture[:, ::-1]) if version % 2 else picture

        return replace(
            example,
            image=fit_square(turned(example.image), size, fit),
            mask=None if example.mask is None else fit_square_mask(turned(example.mask), size, fit),
            control=None if example.control is None else fit_square(turned(example.control), size, fit),
        )


def _zoom(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop of 7/8 to all of the picture, anywhere in it. The draws do not depend on the picture's content."""
    height, width = image.shape[:2]
    scale = rng.uniform(0.875, 1.0)
    crop_h, crop_w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = int(rng.uniform(0, height - crop_h + 1)), int(rng.uniform(0, width - crop_w + 1))
    crop = image[top : top + crop_h, left : left + crop_w]
    return np.asarray(Image.fromarray(crop).resize((width, height), _RESAMPLING[image.ndim]))


class Subset:
    """Some rows of a data set."""

    def __init__(self, dataset: Dataset, rows: list[int]) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[self.rows[index]]

    def keys(self) -> list[str]:
        keys = self.dataset.keys()
        return [keys[row] for row in self.rows]


def _without_faults(dataset: Dataset) -> Dataset:
    """Leaves out, and lists, the pictures that cannot be used: only where the recipe says skip_corrupt."""
    faults = dict(check(dataset))
    for reason in faults.values():
        print(f"skipped: {reason}", file=sys.stderr)
    return Subset(dataset, [row for row, key in enumerate(dataset.keys()) if key not in faults]) if faults else dataset


class Loader:
    """Batches of labelled rows, plain rows, or both: `loader(step) -> Batch`."""

    def __init__(
        self,
        labelled: Pictures | None,
        unlabelled: Pictures | None,
        masks: MaskConfig,
        batch_size: int,
        labelled_fraction: float,
        seed: int,
    ) -> None:
        if labelled_fraction > 0 and labelled is None:
            raise DataError(f"labelled_fraction is {labelled_fraction} but there is no labelled data")
        if labelled_fraction < 1 and unlabelled is None:
            raise DataError(
                f"labelled_fraction is {labelled_fraction}, so plain images are needed: set data.unlabelled, or 1.0"
            )
        self.labelled, self.unlabelled = labelled, unlabelled
        self.mask_weights = masks.model_dump()
        self.batch_size, self.seed = batch_size, seed
        self.labelled_rows = round(batch_size * labelled_fraction)
        if (self.labelled_rows == 0) != (labelled_fraction == 0) or (self.labelled_rows == batch_size) != (
            labelled_fraction == 1
        ):
            raise DataError(f"labelled_fraction {labelled_fraction} of {batch_size} rows is no row; use a larger batch")

    def __call__(self, step: int) -> Batch:
        counts = (
            (self.labelled, self.labelled_rows, True),
            (self.unlabelled, self.batch_size - self.labelled_rows, False),
        )
        numbers, examples, labelled = [], [], []
        for pictures, rows, has_label in counts:
            if pictures is None or rows == 0:
                continue
            offset = 0 if has_label else 1 << 40  # keeps the numbers of the two sets apart
            for number in shuffled(len(pictures), range(step * rows, (step + 1) * rows), self.seed):
                numbers.append(offset + number)
                examples.append(pictures[number])
                labelled.append(has_label)
        return make_batch(examples, self.mask_weights, derive_seed(self.seed, "step", step), labelled, numbers)


def make_batch(
    examples: list[Example], mask_weights: dict[str, float], seed: int, labelled: list[bool], numbers: list[int]
) -> Batch:
    """Collates examples; a row with a mask of its own keeps it, every other draws one by its own seed."""
    size = examples[0].image.shape[:2]
    masks = [
        e.mask if e.mask is not None else sample_mask(mask_weights, size, derive_seed(seed, "mask", row))
        for row, e in enumerate(examples)
    ]
    return Batch(
        image=torch.from_numpy(np.stack([e.image for e in examples])).permute(0, 3, 1, 2).float() / 127.5 - 1,
        mask=torch.from_numpy(np.stack(masks))[:, None].float(),
        captions=tuple((e.text or "") if has else "" for e, has in zip(examples, labelled, strict=True)),
        labelled=torch.tensor(labelled),
        index=torch.tensor(numbers),
        keys=tuple(e.key for e in examples),
        seed=seed,
    )


def shuffled(n: int, positions: range, seed: int) -> list[int]:
    """Entries of an endless stream in which every n in a row are a new permutation of 0..n-1."""
    result = []
    for epoch in range(positions.start // n, (positions.stop - 1) // n + 1):
        order = np.random.default_rng([seed & 0xFFFFFFFF, epoch]).permutation(n)
        low, high = max(positions.start, epoch * n), min(positions.stop, (epoch + 1) * n)
        result.extend(order[low - epoch * n : high - epoch * n].tolist())
    return result
