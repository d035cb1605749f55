"""Known answers (docs: METRICS) and properties of every score."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from refine_control.evaluate.metrics import CMMD, PSNR_CEILING, frechet, kernel_distance, lpips_distance, psnr, ssim


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(rng: torch.Generator, n: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=rng)


def left_hole(n: int = 3, side: int = 16) -> torch.Tensor:
    mask = torch.zeros(n, 1, side, side)
    mask[..., : side // 4] = 1
    return mask


def cmmd(real: torch.Tensor, fake: torch.Tensor) -> float:
    metric = CMMD()
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


# PSNR


def test_psnr_of_a_constant_error():
    true = torch.full((2, 3, 16, 16), 0.4, dtype=torch.float64)
    assert psnr(true + 0.1, true).tolist() == pytest.approx([20, 20])


def test_psnr_over_the_hole_sees_only_the_hole():
    true = torch.full((3, 3, 16, 16), 0.5, dtype=torch.float64)
    mask = left_hole().double()
    pred = true + 0.1 * mask
    assert psnr(pred, true, mask).tolist() == pytest.approx([20] * 3)
    assert psnr(pred, true).tolist() == pytest.approx([20 + 10 * math.log10(4)] * 3)  # a quarter of the pixels
    assert psnr(pred, true, 1 - mask).tolist() == [math.inf] * 3


def test_psnr_of_a_copy_is_infinite_and_of_the_floor_100():
    true = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64)
    assert psnr(true, true).item() == math.inf
    assert psnr(true + 1e-5, true).item() == pytest.approx(PSNR_CEILING)


def test_psnr_is_torchmetrics_image_by_image(rng):
    pred, true = images(rng), images(rng)
    expected = [peak_signal_noise_ratio(p, t, data_range=1.0).item() for p, t in zip(pred, true, strict=True)]
    assert psnr(pred, true).tolist() == pytest.approx(expected, abs=1e-4)


# SSIM


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.2, 0.8), (0.0, 1.0)])
def test_ssim_of_constants(a, b):
    pred, true = (torch.full((2, 3, 16, 16), value, dtype=torch.float64) for value in (a, b))
    expected = [(2 * a * b + 1e-4) / (a * a + b * b + 1e-4)] * 2
    assert ssim(pred, true).tolist() == pytest.approx(expected)
    assert ssim(pred, true, left_hole(2)).tolist() == pytest.approx(expected)


def test_ssim_is_torchmetrics_and_a_full_mask_is_the_whole(rng):
    pred, true = images(rng), images(rng)
    expected = structural_similarity_index_measure(pred, true, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(pred, true), expected.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ssim(pred, true, torch.ones(3, 1, 16, 16)), ssim(pred, true))


def test_ssim_over_the_hole_ignores_what_is_far_from_it(rng):
    true = images(rng, side=32)
    mask = left_hole(side=32)  # columns 0-7; a window reaches 5 further
    pred = true.clone()
    pred[..., 16:] = 0
    assert ssim(pred, true, mask).tolist() == pytest.approx([1] * 3)
    assert (ssim(pred, true) < 0.9).all()


@pytest.mark.parametrize("score", [psnr, ssim])
@pytest.mark.parametrize("mask", [None, left_hole()])
def test_paired_scores_are_symmetric_and_per_image(score, mask, rng):
    pred, true = images(rng), images(rng)
    values = score(pred, true, mask)
    assert values.shape == (3,)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, score(true, pred, mask))
    alone = score(pred[1:2], true[1:2], None if mask is None else mask[1:2])
    torch.testing.assert_close(values[1:2], alone)


@pytest.mark.parametrize(
    ("pred", "mask", "message"),
    [
        (torch.rand(2, 3, 16, 16) * 2 - 1, None, r"pred must lie in \[0, 1\], got \[-"),
        (torch.full((2, 3, 16, 16), math.nan), None, "nan"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None, "uint8"),
        (torch.rand(2, 1, 16, 16), None, r"\(2, 1, 16, 16\)"),
        (torch.rand(2, 3, 4, 16), None, "8 px"),
        (torch.rand(2, 3, 16, 17), None, r"\(2, 3, 16, 17\)"),
        (torch.rand(2, 3, 16, 16), torch.ones(2, 3, 16, 16), r"mask must be \(2, 1, 16, 16\)"),
        (torch.rand(2, 3, 16, 16), torch.full((2, 1, 16, 16), 0.5), "0.5"),
        (torch.rand(2, 3, 16, 16), torch.stack([torch.ones(1, 16, 16), torch.zeros(1, 16, 16)]), "image 1"),
    ],
)
def test_bad_input_is_refused_by_value(pred, mask, message):
    with pytest.raises(ValueError, match=message):
        psnr(pred, torch.rand(2, 3, 16, 16), mask)


# LPIPS on given features


def features(rng: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(3, channels, side, side, generator=rng) for channels, side in ((4, 32), (8, 8), (16, 2))]


def test_lpips_of_equal_features_is_zero_whatever_their_length(rng):
    a = features(rng)
    for mask in (None, left_hole()):
        assert lpips_distance(a, a, mask).tolist() == [0, 0, 0]
        assert lpips_distance(a, [7 * one for one in a], mask).tolist() == pytest.approx([0, 0, 0], abs=1e-10)


def test_lpips_of_orthogonal_and_opposite_vectors():
    x, y = (torch.zeros(1, 2, 4, 4) for _ in range(2))
    x[:, 0], y[:, 1] = 3, 5
    assert lpips_distance([x], [y]).item() == pytest.approx(2)
    assert lpips_distance([x], [-x]).item() == pytest.approx(4)
    assert lpips_distance([x, x], [y, x]).item() == pytest.approx(1)  # the mean over layers
    weights = (torch.tensor([0.25, 0.5]),)
    assert lpips_distance([x], [y], channel_weights=weights).item() == pytest.approx(0.75)


def test_lpips_over_the_hole_weights_by_the_area_of_the_mask():
    a, b = (torch.zeros(1, 2, 2, 2) for _ in range(2))
    a[:, 0] = 1
    b[:, 0] = 1
    b[0, :, :, 0] = torch.tensor([[0.0], [1.0]])  # the left half differs by 2
    left = left_hole(1, 8)  # covers half of the left half
    assert lpips_distance([a], [b]).item() == pytest.approx(1)
    assert lpips_distance([a], [b], left).item() == pytest.approx(2)
    both = left.clone()
    both[..., 7:] = 1  # and a quarter of the right half
    assert lpips_distance([a], [b], both).item() == pytest.approx(2 * 0.5 / 0.75)
    finer = [F.interpolate(one, (16, 16)) for one in (a, b)]  # maps finer than the mask
    assert lpips_distance(finer[:1], finer[1:], both).item() == pytest.approx(2 * 2 / 3)


def test_lpips_is_symmetric_and_refuses_other_shapes(rng):
    a, b = features(rng), features(rng)
    torch.testing.assert_close(lpips_distance(a, b, left_hole()), lpips_distance(b, a, left_hole()))
    for other in ([], b[:2], [b[0], b[1], b[1]]):
        with pytest.raises(ValueError, match="feature maps"):
            lpips_distance(a, other)


# FID and KID on given features


def cross(variances: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """2 D points whose mean and (unbiased) covariance, diagonal, are exactly the given ones."""
    d = len(variances)
    arms = torch.diag((variances * (2 * d - 1) / 2).sqrt())
    return mean + torch.cat([arms, -arms])


def test_frechet_of_equal_sets_is_zero(rng):
    many, few = torch.randn(200, 8, generator=rng), torch.rand(10, 64, generator=rng)
    assert frechet(many, many).item() == pytest.approx(0, abs=1e-9)
    assert frechet(few, few).item() == pytest.approx(0, abs=1e-4)  # singular covariances
    assert frechet(few, few).item() >= 0


def test_frechet_of_diagonal_covariances(rng):
    a, b = (torch.rand(6, generator=rng, dtype=torch.float64) + 0.1 for _ in range(2))
    mean_a, mean_b = (torch.randn(6, generator=rng, dtype=torch.float64) for _ in range(2))
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    torch.testing.assert_close(frechet(cross(a, mean_a), cross(b, mean_b)), expected)


def test_frechet_of_a_shift(rng):
    a = torch.randn(300, 16, generator=rng, dtype=torch.float64)
    assert frechet(a, a + 0.5).item() == pytest.approx(16 * 0.5**2)


def test_frechet_is_float64_and_symmetric(rng):
    a, b = torch.randn(50, 8, generator=rng), torch.randn(40, 8, generator=rng)
    assert frechet(a, b).dtype == torch.float64
    torch.testing.assert_close(frechet(a, b), frechet(b, a))


def test_kernel_distance_is_the_unbiased_estimate(rng):
    a, b = (torch.randn(12, 5, generator=rng, dtype=torch.float64) for _ in range(2))

    def kernel(x, y):
        return (x @ y.T / 5 + 1) ** 3

    off = ~torch.eye(12, dtype=torch.bool)
    expected = kernel(a, a)[off].mean() + kernel(b, b)[off].mean() - 2 * kernel(a, b).mean()
    torch.testing.assert_close(kernel_distance(a, b), expected)
    torch.testing.assert_close(kernel_distance(a, b), kernel_distance(b, a))
    with pytest.raises(ValueError, match="12 and 11"):
        kernel_distance(a, b[:11])


@pytest.mark.parametrize("score", [frechet, kernel_distance])
@pytest.mark.parametrize("other", [torch.rand(1, 4), torch.rand(4, 5), torch.rand(4)])
def test_feature_distances_refuse_bad_sets(score, other):
    with pytest.raises(ValueError, match="at least 2"):
        score(torch.rand(4, 4), other)


# CMMD


def test_cmmd_of_equal_sets_is_zero(rng):
    a = torch.randn(30, 16, generator=rng)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    assert cmmd(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_cmmd_of_an_orthogonal_and_of_an_antipodal_pair():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-0.01)), abs=1e-9)
    assert cmmd(x, y) == pytest.approx(19.90033, abs=1e-5)
    assert cmmd(x, -x) == pytest.approx(2000 * (1 - math.exp(-0.02)), abs=1e-9)
    assert cmmd(x, -x) == pytest.approx(39.60265, abs=1e-5)


def test_cmmd_is_the_naive_formula_over_more_than_one_chunk(rng):
    a, b = torch.randn(700, 4, generator=rng), torch.randn(530, 4, generator=rng) + 0.3
    x, y = (F.normalize(one.double()) for one in (a, b))

    def mean_kernel(p, q):
        return torch.exp(-torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist").square() / 200).mean()

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_cmmd_knows_no_length_order_or_batching(rng):
    a, b = torch.randn(20, 8, generator=rng), torch.randn(25, 8, generator=rng)
    assert cmmd(3 * a, b) == pytest.approx(cmmd(a, b))
    assert cmmd(b, a) == pytest.approx(cmmd(a, b))
    metric = CMMD()
    for part in a.split(7):
        metric.update(part, real=True)
    metric.update(b, real=False)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(cmmd(a, b))


def test_cmmd_refuses_what_has_no_direction_and_an_empty_side():
    metric = CMMD()
    for bad, message in ((torch.zeros(1, 4), "zero"), (torch.full((1, 4), math.nan), "NaN"), (torch.ones(4), "N, D")):
        with pytest.raises(ValueError, match=message):
            metric.update(bad, real=True)
    metric.reset()
    metric.update(torch.ones(1, 4), real=True)
    with pytest.raises(ValueError, match="one side"):
        metric.compute()
