"""Step -> Batch, as a pure function of (seed, step): nothing to save, and resuming cannot lose its place."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from refine_control.data.batch import Batch, derive_seed
from refine_control.data.controls import controls_of
from refine_control.data.example import Example
from refine_control.data.images import fit_square, fit_square_mask
from refine_control.data.masks import sample_mask
from refine_control.data.source import check
from refine_control.data.table import fingerprint
from refine_control.errors import DataError
from refine_control.recipe import DataConfig, MaskConfig

# Pictures (H, W, 3) and masks (H, W): a mask stays 0 or 1.
_RESAMPLING = {3: Image.Resampling.BICUBIC, 2: Image.Resampling.NEAREST}


UNLABELLED = 1 << 40  # added to the numbers of plain pictures: keeps them apart from those of captioned ones


class Dataset(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def keys(self) -> list[str]: ...
    def files(self) -> list[Path]: ...
    def text(self, index: int) -> str | None: ...


class Pictures:
    """A data set at one resolution, `variants` versions of each picture, decoded once while they fit in memory."""

    def __init__(self, dataset: Dataset, config: DataConfig, variants: int, limit: int | None = None) -> None:
        usable = _without_faults(dataset) if config.skip_corrupt else dataset
        self.dataset, self._with_faults = _evenly_spread(usable, limit), _evenly_spread(dataset, limit)
        self.limit = limit
        if len(self.dataset) == 0:
            raise DataError("the data set holds no usable picture")
        self.config = config
        self.variants = variants
        self.examples = len(self.dataset)
        self._kept: dict[int, Example] = {}
        room = config.cache_gb * 2**30
        self._bytes_left = room if 3 * config.resolution**2 * len(self) <= room else 0

    def __len__(self) -> int:
        return self.examples * self.variants

    def __getitem__(self, number: int) -> Example:
        """Version `number // examples` of picture `number % examples`: image uint8 (H, W, 3) at the resolution."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number in self._kept:
            return self._kept[number]
        version, index = divmod(number, self.examples)
        try:
            read = self.dataset[index]
        except DataError as error:  # other pictures would make it another run
            raise DataError(f"{error}; a run that has begun goes on with data.skip_corrupt true") from None
        example = self._versioned(read, version, index)
        arrays = (example.image, example.mask, example.control)
        size = sum(array.nbytes for array in arrays if array is not None)
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._kept[number] = example
        return example

    def text(self, index: int) -> str:
        """The caption of example `index`, '' where it has none; decodes nothing."""
        return self.dataset.text(index) or ""

    def captions(self) -> list[str]:
        """Of the examples as they are before skip_corrupt leaves some out; '' where there is none that can be read."""
        found = []
        for index in range(len(self._with_faults)):
            try:
                found.append(self._with_faults.text(index) or "")
            except DataError:
                if not self.config.skip_corrupt:
                    raise
                found.append("")
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Changes with what `self[number]` may be: the files, and how they become pictures of one size."""
        config = self.config.model_dump(include={"resolution", "fit", "skip_corrupt"})
        return {
            "files": fingerprint(self.dataset.files()),
            "examples": self.examples,
            "variants": self.variants,
            **({"evenly_spread": True} if self.limit else {}),
            **config,
        }

    def contents(self, captioned: bool) -> str:
        """Changes with the files' names and sizes and with the captions, not with when they were written.

        Nor with skip_corrupt, so that a run that met a corrupt picture can go on without it.
        """
        digest = hashlib.sha256("\0".join(self.captions() if captioned else []).encode())
        for path in sorted(self.dataset.files()):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

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


def _evenly_spread(dataset: Dataset, count: int | None) -> Dataset:
    """All of it where it has no more."""
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())


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

    def files(self) -> list[Path]:
        return self.dataset.files()

    def text(self, index: int) -> str | None:
        return self.dataset.text(self.rows[index])


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
        self.controls = next(pictures.config.controls for pictures in (labelled, unlabelled) if pictures)
        self.labelled_rows = round(batch_size * labelled_fraction)
        if (self.labelled_rows == 0) != (labelled_fraction == 0) or (self.labelled_rows == batch_size) != (
            labelled_fraction == 1
        ):
            raise DataError(f"labelled_fraction {labelled_fraction} of {batch_size} rows is no row; use a larger batch")

    def __call__(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Every `parts`-th row of the step's batch, from row `part` on. The parts of a step make up its whole batch."""
        rows = range(part, self.batch_size, parts)
        if not rows:
            raise DataError(f"a batch of {self.batch_size} rows has no row for process {part + 1} of {parts}")
        plain_rows = self.batch_size - self.labelled_rows
        examples, numbers = [], []
        for row in rows:
            if row < self.labelled_rows:
                pictures, offset = self.labelled, 0
                position = step * self.labelled_rows + row
            else:
                pictures, offset = self.unlabelled, UNLABELLED
                position = step * plain_rows + row - self.labelled_rows
            assert pictures is not None
            number = shuffled(position, len(pictures), self.seed)
            examples.append(pictures[number])
            numbers.append(offset + number)
        has_label = [row < self.labelled_rows for row in rows]
        seed = derive_seed(self.seed, "step", step)
        return make_batch(examples, self.mask_weights, seed, has_label, numbers, rows, self.batch_size, self.controls)


def make_batch(
    examples: list[Example],
    mask_weights: dict[str, float],
    seed: int,
    labelled: list[bool],
    numbers: list[int],
    rows: Sequence[int] | None = None,
    whole: int | None = None,
    controls: Sequence[str] = ("inpaint",),
) -> Batch:
    """Collates examples; a row with a mask of its own keeps it, every other draws one by its own seed.

    Where no control is for inpainting, the whole picture is to be drawn: the mask is 1 everywhere.

    rows, whole: the examples' places in a batch that is shared out; by default they are the whole batch.
    """
    rows = range(len(examples)) if rows is None else rows
    size = examples[0].image.shape[:2]
    masks = [
        e.mask if e.mask is not None else sample_mask(mask_weights, size, derive_seed(seed, "mask", row))
        for row, e in zip(rows, examples, strict=True)
    ]
    image = torch.from_numpy(np.stack([e.image for e in examples])).permute(0, 3, 1, 2).float() / 127.5 - 1
    mask = torch.from_numpy(np.stack(masks))[:, None].float()
    mask = mask if "inpaint" in controls else torch.ones_like(mask)
    return Batch(
        image=image,
        mask=mask,
        control=controls_of(controls, examples, image, mask),
        captions=tuple((e.text or "") if has else "" for e, has in zip(examples, labelled, strict=True)),
        labelled=torch.tensor(labelled),
        index=torch.tensor(numbers),
        keys=tuple(e.key for e in examples),
        seed=seed,
        rows=tuple(rows),
        whole=whole or len(examples),
    )


def shuffled(position: int, n: int, seed: int) -> int:
    """Entry `position` of an endless stream in which every n in a row are a new permutation of 0..n-1.

    A Feistel network over the next even power of two, walked until it lands below n (Black & Rogaway 2002): no table
    of n entries is ever made, so a stream over 10^8 pictures starts anywhere at once.
    """
    epoch, place = divmod(position, n)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    key = derive_seed(seed, "epoch", epoch)
    while True:
        high, low = place >> half, place & ((1 << half) - 1)
        for turn in range(4):
            high, low = low, high ^ (derive_seed(key, turn, low) & ((1 << half) - 1))
        place = (high << half) | low
        if place < n:
            return place
