"""The whole score: known answers through a stub network, the regions, the bins, and reuse of the true features."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refine_control.evaluate import score as score_module
from refine_control.evaluate.domains import Domain
from refine_control.evaluate.features import Extractor, efficientnet_lite0
from refine_control.evaluate.metrics import psnr, ssim
from refine_control.evaluate.score import RATIO_BINS, Reference, hole_box


class Stub(nn.Module):
    """The image is its own feature map and its corners its vector; counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        self.seen += len(images)
        maps = [images, images[:, :, ::2, ::2]]
        return maps, images[:, :, :: images.shape[2] - 1, :: images.shape[3] - 1].flatten(1) + 0.01


def stub(*families: str) -> Extractor:
    return Extractor("stub", "0" * 64, "none", 16, {family: f"{family}[stub]" for family in families}, Stub())


ALL = ("lpips", "fid", "cmmd")


def score(pred: Tensor, true: Tensor, mask: Tensor, extractor: Extractor, batch_size: int = 32) -> dict[str, Any]:
    return Reference(true, mask, extractor, batch_size).score(pred)


@pytest.fixture
def true() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Tensor:
    """Holes of 1/16, 5/32, 1/4, 15/32, 1/2 and 3/4 of the image."""
    mask = torch.zeros(6, 1, 32, 32)
    for index, (height, width) in enumerate(((8, 8), (16, 10), (16, 16), (16, 30), (16, 32), (24, 32))):
        mask[index, :, :height, :width] = 1
    return mask


def test_a_perfect_prediction(true, mask):
    result = score(true, true, mask, stub(*ALL))
    metrics = result["metrics"]
    assert list(metrics) == ["psnr", "ssim", "lpips[stub]", "fid[stub]", "cmmd[stub]"]
    for region in ("whole", "hole"):
        assert metrics["psnr"][region] == 100
        assert metrics["ssim"][region] == pytest.approx(1)
        for name in ("lpips[stub]", "fid[stub]", "cmmd[stub]"):
            assert metrics[name][region] == pytest.approx(0, abs=1e-6)


def test_regions_bins_and_images_agree_with_the_metrics(true, mask):
    pred = torch.where(mask.bool(), 1 - true, true)
    result = score(pred, true, mask, stub(*ALL), batch_size=4)
    assert result["per_image"]["psnr"]["hole"] == pytest.approx(psnr(pred, true, mask).tolist())
    assert result["per_image"]["ssim"]["whole"] == pytest.approx(ssim(pred, true).tolist())
    for name, regions in result["per_image"].items():
        for region, values in regions.items():
            assert len(values) == 6
            assert result["metrics"][name][region] == pytest.approx(sum(values) / 6)
    bins = result["by_ratio"]
    assert [entry["n"] for entry in bins.values()] == [1, 1, 1, 2, 1]
    halves = result["per_image"]["ssim"]["hole"][3:5]
    assert bins["0.35-0.5"]["ssim"]["hole"] == pytest.approx(sum(halves) / 2)


def test_an_empty_bin_says_so(true, mask):
    result = score(true[:2], true[:2], mask[:1].expand(2, -1, -1, -1), stub("lpips"))
    assert len(result["by_ratio"]) == len(RATIO_BINS)
    assert result["by_ratio"]["0.2-0.35"] == {"n": 0}


def test_several_extractors_score_as_one(true, mask):
    other = replace(stub("lpips"), scores={"lpips": "lpips"})
    pred = torch.where(mask.bool(), 1 - true, true)
    both = Domain(None, [Reference(true, mask, stub(*ALL)), Reference(true, mask, other)]).score(pred)
    for names in (both["metrics"], both["per_image"], both["by_ratio"]["0.35-0.5"]):
        assert {"psnr", "lpips[stub]", "lpips"} <= set(names)
    assert both["by_ratio"]["0.35-0.5"]["n"] == 2


def test_changes_outside_the_box_do_not_reach_the_hole(true, mask):
    """Crops of FID and CMMD, and the paired scores, of the small hole in the corner see nothing of the far corner."""
    corner = mask[:1].expand(6, -1, -1, -1)
    pred = true.clone()
    pred[:, :, 16:, 16:] = 0
    metrics = score(pred, true, corner, stub(*ALL))["metrics"]
    for name in ("lpips[stub]", "fid[stub]", "cmmd[stub]"):
        assert metrics[name]["hole"] == pytest.approx(0, abs=1e-6)
        assert metrics[name]["whole"] > 0.001
    assert metrics["psnr"]["hole"] == 100 > metrics["psnr"]["whole"]
    assert metrics["ssim"]["hole"] == pytest.approx(1)


def test_one_reference_scores_many_models_from_one_extraction(true, mask):
    extractor = stub(*ALL)
    reference = Reference(true, mask, extractor, batch_size=4)
    assert extractor.network.seen == 12  # whole and crop of each true image
    first = reference.score(1 - true)
    assert extractor.network.seen == 24
    assert reference.score(true)["metrics"]["psnr"]["whole"] == 100
    assert reference.score(1 - true) == first == score(1 - true, true, mask, stub(*ALL), batch_size=4)


def test_maps_beyond_the_memory_limit_are_extracted_again(true, mask, monkeypatch):
    expected = score(1 - true, true, mask, stub("lpips"), batch_size=2)
    monkeypatch.setattr(score_module, "_MAPS_KEPT", 2 * 3 * 32 * 32 * 4 * 5 // 4)  # one batch
    extractor = stub("lpips")
    reference = Reference(true, mask, extractor, batch_size=2)
    assert [maps is not None for maps in reference._maps] == [True, False, False]
    assert reference.score(1 - true) == expected
    assert extractor.network.seen == 6 + 6 + 4


@pytest.mark.parametrize("families", [(), ("fid",), ("lpips",), ("cmmd", "fid")])
def test_an_extractor_gives_only_the_scores_it_names(families, true, mask):
    metrics = score(1 - true, true, mask, stub(*families))["metrics"]
    assert set(metrics) == {"psnr", "ssim"} | {f"{family}[stub]" for family in families}


def test_the_result_is_json_and_says_what_made_it(true, mask):
    result = json.loads(json.dumps(score(true, true, mask, stub(*ALL), batch_size=5)))
    assert result["provenance"] == {
        "extractor": "stub",
        "sha256": "0" * 64,
        "resize": "none",
        "n": 6,
        "batch_size": 5,
        "image_size": [32, 32],
    }
    assert "bounding box" in result["rules"]["hole, fid and cmmd"]


@pytest.mark.parametrize(
    ("hole", "size", "expected"),
    [
        ((slice(10, 20), slice(10, 20)), (32, 32), (10, 20, 10, 20)),
        ((slice(15, 16), slice(15, 16)), (32, 32), (11, 19, 11, 19)),  # at least 8 px
        ((slice(0, 2), slice(30, 32)), (32, 32), (0, 8, 24, 32)),  # moved inside
        ((slice(4, 8), slice(0, 20)), (32, 32), (0, 20, 0, 20)),  # square
        ((slice(4, 8), slice(0, 40)), (16, 64), (0, 16, 0, 40)),  # as square as the image allows
        ((slice(0, 32), slice(0, 32)), (32, 32), (0, 32, 0, 32)),
    ],
)
def test_hole_box(hole, size, expected):
    mask = torch.zeros(size)
    mask[hole] = 1
    rows, columns = hole_box(mask)
    assert (rows.start, rows.stop, columns.start, columns.stop) == expected
    assert mask[rows, columns].sum() == mask.sum()


def test_bad_input_is_refused_by_value(true, mask):
    reference = Reference(true, mask, stub())
    with pytest.raises(ValueError, match=r"pred \(5, 3, 32, 32\)"):
        reference.score(true[:5])
    with pytest.raises(ValueError, match=r"pred must lie in \[0, 1\]"):
        reference.score(true * 2 - 1)
    with pytest.raises(ValueError, match="got 1 and 32"):
        Reference(true[:1], mask[:1], stub())
    with pytest.raises(ValueError, match="got 6 and 0"):
        Reference(true, mask, stub(), batch_size=0)
    with pytest.raises(ValueError, match="no hole in image 0"):
        Reference(true, torch.zeros_like(mask), stub())


def test_real_features_rank_a_mild_change_before_a_strong_one(true, mask):
    reference = Reference(true, mask, efficientnet_lite0())
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    mild, strong = (
        reference.score(torch.where(mask.bool(), (true + scale * noise).clamp(0, 1), true))["metrics"]
        for scale in (0.05, 0.5)
    )
    for name in ("lpips[efficientnet-lite0]", "fid[efficientnet-lite0]", "cmmd[efficientnet-lite0]"):
        for region in ("whole", "hole"):
            assert 0 < mild[name][region] < strong[name][region]
