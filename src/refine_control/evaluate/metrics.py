"""Scores as functions of tensors; where the features come from is `features.py`'s affair.

Images are float (N, 3, H, W) in [0, 1], masks (N, 1, H, W) in {0, 1} with 1 = hole. Sums are float64. With a mask a
score is taken over the hole only. PSNR, SSIM, FID and KID are torchmetrics'; LPIPS on given features and CMMD are ours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd
from torchmetrics.utilities.data import dim_zero_cat

__all__ = [
    "CMMD",
    "MIN_SIDE",
    "PSNR_CEILING",
    "check_images",
    "check_mask",
    "frechet",
    "kernel_distance",
    "lpips_distance",
    "psnr",
    "sign",
    "ssim",
]

MIN_SIDE = 8  # pixels; SSIM's 11-pixel window needs 6
PSNR_CEILING = 100.0  # dB; means floor the squared error at 1e-10, so that one exact copy leaves them finite
_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0
_CHUNK = 512  # rows of a kernel matrix held at once


def sign(metric: str) -> int:
    """1 for a metric of which more is better, -1 where less is; `lpips[efficientnet-lite0]` counts as lpips."""
    return 1 if metric.partition("[")[0] in ("psnr", "ssim") else -1


def arrow(metric: str) -> str:
    """Which way is better, for a table's heading."""
    return "↑" if sign(metric) > 0 else "↓"


def check_images(name: str, images: Tensor) -> None:
    """Refuse what is not float (N, 3, H, W) in [0, 1], `MIN_SIDE` pixels a side; the ValueError says what it got."""
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must be float (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if images.shape[0] == 0 or min(images.shape[2:]) < MIN_SIDE:
        raise ValueError(f"{name} must hold images of {MIN_SIDE} px a side or more, got {tuple(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"{name} must lie in [0, 1], got [{low:g}, {high:g}]; rescale or clamp it")


def check_mask(mask: Tensor, images: Tensor) -> None:
    """Refuse what is not (N, 1, H, W) in {0, 1} for these images, or has an image without a hole (ValueError)."""
    expected = (images.shape[0], 1, *images.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must be {expected} for these images, got {tuple(mask.shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask must hold only 0 and 1, got values from {mask.min().item():g} to {mask.max().item():g}")
    empty = (~mask.bool().flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask has no hole in image {empty[0]} ({len(empty)} such); every image needs one hole pixel")


def _check_pair(pred: Tensor, true: Tensor, mask: Tensor | None) -> None:
    check_images("pred", pred)
    check_images("true", true)
    if pred.shape != true.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and true {tuple(true.shape)} must have one shape")
    if mask is not None:
        check_mask(mask, true)


def _over_hole(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of (N, C, H, W) over the channels and, weighted by a mask (N, 1, H, W), over space: (N,)."""
    values, mask = values.double().mean(1, keepdim=True), mask.double()
    return (values * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def psnr(pred: Tensor, true: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB at data range 1: (N,) float64, higher is better.

    An exact copy scores inf, which is the truth; whoever takes a mean clamps to `PSNR_CEILING` first.
    """
    _check_pair(pred, true, mask)
    pred, true = pred.double(), true.double()
    if mask is None:
        return peak_signal_noise_ratio(pred, true, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return -10 * _over_hole((pred - true).square(), mask).log10()


def ssim(pred: Tensor, true: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity of each image at data range 1: (N,) float64, at most 1, higher is better.

    Gaussian window of sigma 1.5 (11 px), reflected at the border. With a mask the similarity map is averaged over the
    hole pixels; their windows still see up to 5 px of what is around the hole.
    """
    _check_pair(pred, true, mask)
    similarity, image = structural_similarity_index_measure(
        pred.double(), true.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    return similarity if mask is None else _over_hole(image, mask)


def lpips_distance(
    features_a: list[Tensor],
    features_b: list[Tensor],
    mask: Tensor | None = None,
    channel_weights: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Perceptual distance of each image from feature maps, a list of (N, C, h, w) a side: (N,) float64, 0 when equal.

    Zhang et al. 2018 (1801.03924), equation 1: every position's channel vector is made a unit vector, the squared
    difference is summed over channels, averaged over space and over layers. Without `channel_weights`, one (C,) a
    layer, this is the uncalibrated LPIPS; with the published ones times the number of layers (the published one sums
    over layers) it is the calibrated one. A mask (N, 1, H, W) is area-resampled to h x w and weights the average over
    space; a position's receptive field still reaches beyond the hole.
    """
    if not features_a or [a.shape for a in features_a] != [b.shape for b in features_b]:
        shapes = [[tuple(f.shape) for f in side] for side in (features_a, features_b)]
        raise ValueError(f"both sides need the same one or more feature maps, got {shapes[0]} and {shapes[1]}")
    layers = []
    for layer, (a, b) in enumerate(zip(features_a, features_b, strict=True)):
        difference = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square()
        if channel_weights is not None:
            difference = difference * channel_weights[layer].to(difference).view(1, -1, 1, 1)
        summed = difference.sum(1, keepdim=True)
        weight = torch.ones_like(summed) if mask is None else F.interpolate(mask.to(a), a.shape[2:], mode="area")
        layers.append(_over_hole(summed, weight))
    return torch.stack(layers).mean(0)


class _Identity(nn.Module):
    """A 'feature network' for torchmetrics that passes ready feature vectors (N, D) through."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check_features(features_a: Tensor, features_b: Tensor) -> None:
    shapes = tuple(features_a.shape), tuple(features_b.shape)
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"two sets of at least 2 feature vectors (N, D) of one length are needed, got {shapes}")


def frechet(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Frechet distance of two sets of feature vectors, (N, D) and (M, D): float64 scalar, 0 or more (FID, 1706.08500).

    torchmetrics' machinery on float64 sums. With fewer samples than dimensions the covariances are singular: the
    distance is biased far upwards (compare equal N only) and its rounding error reaches 1e-4, hence the floor at 0.
    """
    _check_features(features_a, features_b)
    metric = FrechetInceptionDistance(feature=_Identity(features_a.shape[1]))
    metric.update(features_a.double(), real=True)
    metric.update(features_b.double(), real=False)
    return metric.compute().clamp(min=0)


def kernel_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Kernel distance of two equally large sets of feature vectors (N, D): float64 scalar, unscaled (KID, 1801.01401).

    The unbiased estimate over all samples at once, without random subsets, so it repeats exactly; it may be below 0.
    """
    _check_features(features_a, features_b)
    if features_a.shape != features_b.shape:  # torchmetrics takes one N for all three kernel means
        raise ValueError(f"two sets of one size are needed, got {len(features_a)} and {len(features_b)} vectors")
    return poly_mmd(features_a.double(), features_b.double())


def _kernel_mean_less_one(x: Tensor, y: Tensor) -> Tensor:
    """mean k(x, y) - 1 over all pairs of unit vectors; all kernel values lie in [0.98, 1], so the 1 is never formed."""
    total = x.new_zeros(())
    for rows in x.split(_CHUNK):  # |x - y|^2 / (2 sigma^2) = (1 - x.y) / sigma^2
        total += torch.expm1((rows @ y.T - 1) / _CMMD_SIGMA**2).sum()
    return total / (len(x) * len(y))


class CMMD(Metric):
    """CLIP maximum mean discrepancy (2401.09603): 1000 MMD^2, Gaussian kernel of sigma 10, float64, lower is better.

    The biased estimate: its means include the diagonals. Embeddings are L2-normalised here, so they may come as they
    are. Between 0 (equal sets) and 39.60265 (two opposite points).
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, real: bool) -> None:
        """Take embeddings (N, D) of real or of generated images; zero or non-finite ones are a ValueError."""
        if embeddings.ndim != 2:
            raise ValueError(f"embeddings must be (N, D), got {tuple(embeddings.shape)}")
        embeddings = embeddings.detach().double()
        length = embeddings.norm(dim=1, keepdim=True)
        if not (length.isfinite() & (length > 0)).all():
            raise ValueError("embeddings hold a zero, infinite or NaN vector, which has no direction")
        (self.real if real else self.fake).append(embeddings / length)

    def compute(self) -> Tensor:
        """The score of everything seen since the last reset; ValueError if a side is empty."""
        if len(self.real) == 0 or len(self.fake) == 0:
            raise ValueError("CMMD needs real and generated embeddings; one side got none")
        x, y = dim_zero_cat(self.real), dim_zero_cat(self.fake)
        within = _kernel_mean_less_one(x, x) + _kernel_mean_less_one(y, y)
        return _CMMD_SCALE * (within - 2 * _kernel_mean_less_one(x, y))
