"""Areas, repeatability, scale and weights of the drawn masks."""

import time

import numpy as np
import pytest

from refine_control.data.masks import draw_mask, sample_mask
from refine_control.errors import UserError

KINDS = ("thin", "medium", "thick", "box")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 96), (256, 256)])
def test_mask_is_binary_and_covers_something_and_at_most_half(kind: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        mask = draw_mask(kind, size, rng)
        assert mask.shape == size
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
        assert 0 < mask.mean() <= 0.5


@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_box_is_one_full_rectangle_of_an_eighth_to_half(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        mask = draw_mask("box", size, rng)
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert mask.sum() == rows.sum() * columns.sum()
        assert 0.11 < mask.mean() <= 0.5  # sides are whole pixels, so 12 % can become a little less


def erosion_survives(mask: np.ndarray, side: int) -> bool:
    """Whether a full square of that side lies in the mask."""
    table = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]
    return bool((sums == side * side).any())


def test_thick_strokes_are_wider_than_thin_ones() -> None:
    def share(kind: str) -> float:
        rng = np.random.default_rng(2)
        return float(np.mean([erosion_survives(draw_mask(kind, (256, 256), rng), 32) for _ in range(60)]))

    assert share("thick") > 0.8
    assert share("thin") < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_area_does_not_depend_on_the_resolution(kind: str) -> None:
    def areas(side: int) -> np.ndarray:
        return np.array([draw_mask(kind, (side, side), np.random.default_rng(seed)).mean() for seed in range(300)])

    large = areas(256)
    for side in (32, 64):  # a mean of 300 has a standard error of about 0.008
        small = areas(side)
        assert abs(small.mean() - large.mean()) < 0.03
        assert abs(small.std() - large.std()) < 0.03


def test_one_seed_one_mask() -> None:
    weights = {"thin": 1.0, "medium": 1.0, "box": 1.0}
    masks = [sample_mask(weights, (32, 32), seed) for seed in range(20)]
    for seed, mask in enumerate(masks):
        assert np.array_equal(mask, sample_mask(weights, (32, 32), seed))
    assert len({mask.tobytes() for mask in masks}) == 20


def test_a_mask_neither_sees_nor_moves_the_global_generators() -> None:
    weights = {"thin": 1.0, "thick": 1.0}
    np.random.seed(0)
    first, state = sample_mask(weights, (32, 32), 5), np.random.get_state()[1].copy()
    np.random.seed(1)
    assert np.array_equal(first, sample_mask(weights, (32, 32), 5))
    np.random.seed(0)
    sample_mask(weights, (32, 32), 6)
    assert np.array_equal(np.random.get_state()[1], state)


def test_weights_are_renormalised_and_choose_the_kind() -> None:
    def is_box(mask: np.ndarray) -> bool:
        return bool(mask.sum() == mask.any(axis=1).sum() * mask.any(axis=0).sum())

    seeds = range(300)
    assert all(is_box(sample_mask({"box": 7.0, "thin": 0.0}, (64, 64), seed)) for seed in seeds)
    boxes = np.mean([is_box(sample_mask({"box": 1.0, "thin": 3.0}, (64, 64), seed)) for seed in seeds])
    assert 0.17 < boxes < 0.33


@pytest.mark.parametrize("weights", [{}, {"thin": 0.0, "box": 0.0}, {"oval": 1.0}])
def test_wrong_weights_are_the_users_error(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="oval" if weights.get("oval") else "weight"):
        sample_mask(weights, (32, 32), 0)


def test_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="'oval'"):
        draw_mask("oval", (32, 32), np.random.default_rng(0))


@pytest.mark.parametrize("side", [32, 64])
def test_a_mask_is_cheap(side: int) -> None:
    weights = dict.fromkeys(KINDS, 1.0)
    start = time.process_time()
    for seed in range(200):
        sample_mask(weights, (side, side), seed)
    assert (time.process_time() - start) / 200 < 0.005  # about 0.5 ms; ten times that on a slow machine
