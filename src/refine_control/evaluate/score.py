"""All scores of one model's pictures against the true ones: whole and hole, on average, by image and by mask ratio."""

from typing import Any

import torch
from torch import Tensor

from refine_control.evaluate.features import Extractor, squash
from refine_control.evaluate.metrics import (
    CMMD,
    MIN_SIDE,
    PSNR_CEILING,
    check_images,
    check_mask,
    frechet,
    lpips_distance,
    psnr,
    ssim,
)

__all__ = ["RATIO_BINS", "RULES", "Reference", "hole_box", "scoring"]

SCORING = 1  # raised where code changes that draws or scores: no table then mixes scores of two versions
RATIO_BINS = ((0.0, 0.1), (0.1, 0.2), (0.2, 0.35), (0.35, 0.5), (0.5, 1.0))  # mask area, low < a <= high
RULES = {
    "whole": "all pixels; features of the whole image",
    "hole, paired": "psnr: hole pixels only; ssim: similarity map averaged over hole pixels; lpips: distances between "
    "the whole images' feature maps, averaged with the area-resampled mask as weights",
    "hole, fid and cmmd": f"features of a square crop around the hole's bounding box, {MIN_SIDE} px a side or more, "
    "moved inside the image, the same box for the prediction and the true image",
    "psnr": f"each image capped at {PSNR_CEILING:g} dB (squared error floored at 1e-10) before any mean",
    "by_ratio": "mask area a of an image in the bin low < a <= high",
    "fid": "biased upwards by few samples, most below as many samples as feature dimensions: compare equal n only",
}
_MAPS_KEPT = 1 << 30  # bytes of true feature maps held in memory; what is beyond is extracted anew for every model

Pair = dict[str, Tensor]  # {"whole": (N,), "hole": (N,)}


def _span(low: int, high: int, length: int, limit: int) -> slice:
    start = min(max((low + high - length) // 2, 0), limit - length)
    return slice(start, start + length)


def hole_box(mask: Tensor) -> tuple[slice, slice]:
    """The rows and columns, of a mask (H, W), of the square around the hole's bounding box.

    Its side is the longer side of the box, `MIN_SIDE` or more; it is centred on the box, then moved inside the image.
    Only where the image is too narrow for it does it become a rectangle, which still covers the hole.
    """
    rows, columns = (mask.bool().any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    side = max(rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0], MIN_SIDE)
    height, width = mask.shape
    return (
        _span(rows[0], rows[-1] + 1, min(side, height), height),
        _span(columns[0], columns[-1] + 1, min(side, width), width),
    )


def scoring() -> dict[str, int]:
    """What the version of the scoring adds to the settings of a result: nothing to those of the first."""
    return {"scoring": SCORING} if SCORING > 1 else {}


class Reference:
    """The true images of an evaluation, their masks and their features, extracted once for any number of models.

    true (N, 3, H, W) in [0, 1], mask (N, 1, H, W) in {0, 1} with a hole in each, N >= 2; ValueError otherwise. Memory:
    both tensors, the vectors, and up to 1 GiB of feature maps (0.45 MB an image with EfficientNet-Lite0). Features move
    with the batch size by rounding, so keep it fixed; it is part of the provenance.
    """

    def __init__(self, true: Tensor, mask: Tensor, extractor: Extractor, batch_size: int = 32) -> None:
        check_images("true", true)
        check_mask(mask, true)
        if len(true) < 2 or batch_size < 1:
            raise ValueError(f"need 2 images or more, in batches of 1 or more; got {len(true)} and {batch_size}")
        self.true, self.mask, self.extractor, self.batch_size = true, mask, extractor, batch_size
        self._boxes = [hole_box(one[0]) for one in mask]
        self._batches = [slice(start, start + batch_size) for start in range(0, len(true), batch_size)]
        self._has_pooled = any(family in extractor.scores for family in ("fid", "cmmd"))
        self._maps: list[list[Tensor] | None] = []
        pooled = []
        kept = 0
        for rows in self._batches:
            maps, vectors = self._extract(true, rows)
            kept += sum(one.nbytes for one in maps)
            self._maps.append(maps if kept <= _MAPS_KEPT else None)
            pooled.append(vectors)
        self._pooled = _joined(pooled)

    def _extract(self, images: Tensor, rows: slice) -> tuple[list[Tensor], Pair]:
        """Feature maps of the whole images, and vectors (n, D) of the whole images and of their crops to the holes."""
        maps, whole = self.extractor.extract(images[rows])
        if not self._has_pooled:
            return maps, {}
        crops = [
            squash(image[None, :, box[0], box[1]], self.extractor.size)
            for image, box in zip(images[rows], self._boxes[rows], strict=True)
        ]
        return maps, {"whole": whole.cpu(), "hole": self.extractor.extract(torch.cat(crops))[1].cpu()}

    def score(self, pred: Tensor) -> dict[str, Any]:
        """Scores a model's images (N, 3, H, W) in [0, 1], in the order of the true ones.

        Returns, all of it plain numbers, text, lists and dicts (JSON):
          metrics     {name: {"whole": x, "hole": y}}: psnr (dB) and ssim, higher is better; and, as far as the
                      extractor gives them, lpips, fid and cmmd under the extractor's names, lower is better
          by_ratio    {"0.1-0.2": {"n": count, name: {"whole": x, "hole": y}}}: the paired metrics by mask area;
                      without metrics where n is 0. The last bin, above 0.5, is there so that the counts add up to N
          per_image   {name: {"whole": [...], "hole": [...]}} of the paired metrics, in the order given, for
                      paired tests
          rules       what "whole" and "hole" mean for each metric, `RULES`
          provenance  extractor, sha256, resize rule, n, batch size, image size

        "hole" of FID and CMMD is taken on crops: what lies outside `hole_box` of each mask, the square around the
        hole's bounding box, is cut away from the prediction and from the true image; what is left is squashed to the
        input size of the extractor.
        """
        check_images("pred", pred)
        if pred.shape != self.true.shape:
            raise ValueError(f"pred {tuple(pred.shape)} must have the true images' shape {tuple(self.true.shape)}")
        batches, pooled = [], []
        for index, rows in enumerate(self._batches):
            maps, vectors = self._extract(pred, rows)
            batches.append(self._paired(pred[rows], index, rows, maps))
            pooled.append(vectors)
        paired = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
        means = {name: _means(pair) for name, pair in paired.items()}
        return {
            "metrics": means | self._distribution(_joined(pooled)),
            "by_ratio": self._by_ratio(paired),
            "per_image": {name: {region: x.tolist() for region, x in pair.items()} for name, pair in paired.items()},
            "rules": dict(RULES),
            "provenance": self.provenance(),
        }

    def provenance(self) -> dict[str, Any]:
        """What made the scores: without it a FID is no number."""
        return {
            "extractor": self.extractor.name,
            "sha256": self.extractor.sha256,
            "resize": self.extractor.resize,
            "n": len(self.true),
            "batch_size": self.batch_size,
            "image_size": list(self.true.shape[2:]),
        }

    def _paired(self, pred: Tensor, index: int, rows: slice, maps: list[Tensor]) -> dict[str, Pair]:
        """The scores (n,) of one batch that compare each prediction with its own true image."""
        true, mask, extractor = self.true[rows], self.mask[rows], self.extractor
        scores = {
            "psnr": {
                "whole": psnr(pred, true).clamp(max=PSNR_CEILING),
                "hole": psnr(pred, true, mask).clamp(max=PSNR_CEILING),
            },
            "ssim": {"whole": ssim(pred, true), "hole": ssim(pred, true, mask)},
        }
        if "lpips" in extractor.scores:
            true_maps = self._maps[index] or extractor.extract(true)[0]
            scores[extractor.scores["lpips"]] = {
                "whole": lpips_distance(maps, true_maps, None, extractor.channel_weights).cpu(),
                "hole": lpips_distance(maps, true_maps, mask, extractor.channel_weights).cpu(),
            }
        return scores

    def _distribution(self, pooled: Pair) -> dict[str, dict[str, float]]:
        scores = {}
        names = self.extractor.scores
        if "fid" in names:
            scores[names["fid"]] = {
                region: frechet(self._pooled[region], vectors).item() for region, vectors in pooled.items()
            }
        if "cmmd" in names:
            scores[names["cmmd"]] = {region: _cmmd(self._pooled[region], vectors) for region, vectors in pooled.items()}
        return scores

    def _by_ratio(self, paired: dict[str, Pair]) -> dict[str, dict[str, Any]]:
        area = self.mask.double().mean((1, 2, 3))
        bins: dict[str, dict[str, Any]] = {}
        for low, high in RATIO_BINS:
            chosen = (area > low) & (area <= high)
            count = int(chosen.sum())
            entry: dict[str, Any] = {"n": count}
            if count:
                entry |= {
                    name: _means({region: one[chosen] for region, one in pair.items()}) for name, pair in paired.items()
                }
            bins[f"{low:g}-{high:g}"] = entry
        return bins


def _joined(batches: list[Pair]) -> Pair:
    return {region: torch.cat([batch[region] for batch in batches]) for region in batches[0]}


def _means(pair: Pair) -> dict[str, float]:
    return {region: values.mean().item() for region, values in pair.items()}


def _cmmd(true: Tensor, pred: Tensor) -> float:
    metric = CMMD()
    metric.update(true, real=True)
    metric.update(pred, real=False)
    return metric.compute().item()
