"""Step -> batch: a pure function that passes every picture before it repeats one."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refine_control.data.batch import Batch, derive_seed
from refine_control.data.example import Example
from refine_control.data.loader import Loader, Pictures, make_batch, shuffled
from refine_control.errors import DataError
from refine_control.recipe import DataConfig, MaskConfig
from tiny import DATA, SIDE, WORDS, examples, loader

MASKS = MaskConfig().model_dump()


def same(a: Batch, b: Batch) -> dict[str, bool]:
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)}
    return {name: torch.equal(x, y) if isinstance(x, Tensor) else x == y for name, (x, y) in pairs.items()}


# The order of pictures


def stream(n: int, positions: range, seed: int) -> list[int]:
    return [shuffled(position, n, seed) for position in positions]


@given(n=st.integers(1, 70), epoch=st.integers(0, 10**9), seed=st.integers(0, 2**63 - 1))
def test_every_n_in_a_row_are_a_permutation(n: int, epoch: int, seed: int) -> None:
    assert sorted(stream(n, range(epoch * n, (epoch + 1) * n), seed)) == list(range(n))


def test_each_pass_and_each_seed_has_its_own_order() -> None:
    first, second, other = stream(50, range(50), 0), stream(50, range(50, 100), 0), stream(50, range(50), 1)
    assert first != second
    assert first != other
    assert first != list(range(50))


def test_every_place_is_as_likely_for_a_picture() -> None:
    """Over 3,000 passes, how often picture i comes at place j: chi-squared of 144 cells with 121 degrees of freedom."""
    counts = np.zeros((12, 12))
    for epoch in range(3000):
        counts[range(12), stream(12, range(12 * epoch, 12 * (epoch + 1)), 7)] += 1
    chi_squared = ((counts - 250) ** 2 / 250).sum()
    assert 70 < chi_squared < 190, chi_squared


def test_a_stream_over_a_hundred_million_pictures_starts_anywhere() -> None:
    n = 10**8
    late = stream(n, range(37 * n + 5, 37 * n + 1005), 3)
    assert len(set(late)) == 1000
    assert all(0 <= number < n for number in late)


def test_batches_walk_through_all_pictures() -> None:
    batches = [loader(4, 1.0)(step) for step in range(3)]
    rows = [int(i) for b in batches for i in b.index]
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))


def test_each_set_is_walked_through_at_its_own_pace() -> None:
    """Two captioned rows of six pictures, three plain rows of five, each step."""
    batches = [loader(5, 0.4)(step) for step in range(15)]
    labelled = [key for b in batches for key, has in zip(b.keys, b.labelled, strict=True) if has]
    plain = [key for b in batches for key, has in zip(b.keys, b.labelled, strict=True) if not has]
    for keys, n in ((labelled, 6), (plain, 5)):
        for epoch in range(len(keys) // n):
            assert len(set(keys[epoch * n : (epoch + 1) * n])) == n


# Purity


@pytest.mark.parametrize("labelled_fraction", [1.0, 0.5, 0.0])
def test_a_batch_depends_on_seed_and_step_alone(labelled_fraction: float) -> None:
    walked = loader(4, labelled_fraction)
    for step in range(5):
        batch = walked(step)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(same(batch, loader(4, labelled_fraction)(4)).values()), "as if it had come first"
    for other in (walked(3), loader(4, labelled_fraction, seed=1)(4)):
        differs = same(batch, other)
        assert not any(differs[name] for name in ("image", "mask", "index", "keys", "seed")), differs


@pytest.mark.parametrize(("fraction", "rows"), [(1.0, 8), (0.75, 6), (0.5, 4), (0.1, 1), (0.0, 0)])
def test_the_labelled_fraction_is_kept_in_every_batch(fraction: float, rows: int) -> None:
    for step in range(5):
        batch = loader(8, fraction)(step)
        assert len(batch) == 8
        assert int(batch.labelled.sum()) == rows
        assert [key.startswith("labelled") for key in batch.keys] == batch.labelled.tolist()
        assert [caption != "" for caption in batch.captions] == batch.labelled.tolist()


def test_the_two_sets_never_share_a_number() -> None:
    numbers: dict[int, str] = {}
    for step in range(10):
        batch = loader(6, 0.5)(step)
        for number, key in zip(batch.index.tolist(), batch.keys, strict=True):
            assert numbers.setdefault(number, key) == key
    assert len(numbers) == 6 + 5


# Collation


def test_pictures_become_float_channels_first_in_minus_1_1() -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[0, 1] = (255, 51, 0)
    batch = make_batch([Example("a", image, "words")], MASKS, 0, [True], [7])
    assert batch.image.shape == (1, 3, SIDE, SIDE)
    assert batch.image.dtype == batch.mask.dtype == torch.float32
    torch.testing.assert_close(batch.image[0, :, 0, 1], torch.tensor([1.0, -0.6, -1.0]))
    assert (batch.image[0, :, 1:] == -1).all()
    assert (batch.captions, batch.keys, batch.index.tolist()) == (("words",), ("a",), [7])


def test_a_caption_counts_only_in_a_labelled_row() -> None:
    rows = [Example("a", np.zeros((SIDE, SIDE, 3), np.uint8), text) for text in ("said", "secret", None)]
    assert make_batch(rows, MASKS, 0, [True, False, True], [0, 1, 2]).captions == ("said", "", "")


def test_masks_differ_by_row_and_are_equal_on_repeat() -> None:
    pictures = [replace(example, mask=None) for example in examples(8)]
    batch, again, other = (make_batch(pictures, MASKS, seed, [True] * 8, list(range(8))) for seed in (0, 0, 1))
    assert torch.equal(batch.mask, again.mask)
    assert not torch.equal(batch.mask, other.mask)
    assert batch.mask.shape == (8, 1, SIDE, SIDE)
    assert set(batch.mask.unique().tolist()) == {0, 1}
    assert len({tuple(mask.flatten().tolist()) for mask in batch.mask}) == 8


def test_a_mask_of_ones_own_is_kept_and_leaves_the_others_theirs() -> None:
    pictures = examples(3)
    own = np.zeros((SIDE, SIDE), np.uint8)
    own[2:5, 3:9] = 1
    drawn = make_batch(pictures, MASKS, 0, [True] * 3, [0, 1, 2]).mask
    with_own = make_batch(
        [pictures[0], replace(pictures[1], mask=own), pictures[2]], MASKS, 0, [True] * 3, [0, 1, 2]
    ).mask
    assert torch.equal(with_own[1, 0], torch.from_numpy(own).float())
    assert torch.equal(with_own[[0, 2]], drawn[[0, 2]])


def test_generators_start_from_the_batchs_seed() -> None:
    batch = loader(2)(0)
    assert torch.equal(torch.rand(3, generator=batch.generator()), torch.rand(3, generator=batch.generator()))
    other = loader(2)(1)
    assert not torch.equal(torch.rand(3, generator=batch.generator()), torch.rand(3, generator=other.generator()))


# Sharing out


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("labelled_fraction", [1.0, 0.5])
def test_the_parts_of_a_step_make_up_its_whole_batch(parts: int, labelled_fraction: float) -> None:
    """Pictures, masks, captions and noise: whoever computes a row, it is the same row."""
    load = loader(8, labelled_fraction)
    whole = load(3)
    noise = whole.noise((2, 3))
    for part in range(parts):
        shared = load(3, part, parts)
        rows = list(shared.rows)
        assert rows == list(range(part, 8, parts))
        for name in ("image", "mask", "labelled", "index"):
            assert torch.equal(getattr(shared, name), getattr(whole, name)[rows]), name
        assert shared.captions == tuple(whole.captions[row] for row in rows)
        assert torch.equal(shared.noise((2, 3)), noise[rows])
        assert (shared.seed, shared.whole) == (whole.seed, 8)


def test_more_processes_than_rows() -> None:
    with pytest.raises(DataError, match="a batch of 2 rows has no row for process 3 of 3"):
        loader(2)(0, 2, 3)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_seeds_of_different_parts_differ(a: list[int], b: list[int]) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
    assert 0 <= derive_seed(*a) < 2**63


# Versions of a picture


class Once:
    """A data set that counts how often each picture is read."""

    def __init__(self, n: int) -> None:
        self.rows, self.reads = examples(n), [0] * n

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        self.reads[index] += 1
        return self.rows[index]

    def keys(self) -> list[str]:
        return [row.key for row in self.rows]


def with_versions(n: int, variants: int, **changes: object) -> tuple[Pictures, Once]:
    dataset = Once(n)
    return Pictures(dataset, DATA.model_copy(update=changes), variants), dataset


def test_versions_are_as_it_is_mirrored_then_zoomed() -> None:
    pictures, dataset = with_versions(3, 4)
    assert len(pictures) == 12
    for index in range(3):
        versions = [pictures[version * 3 + index] for version in range(4)]
        assert {v.key for v in versions} == {dataset.rows[index].key}
        assert {v.text for v in versions} == {WORDS[index]}
        assert np.array_equal(versions[0].image, dataset.rows[index].image)
        assert np.array_equal(versions[1].image, versions[0].image[:, ::-1])
        assert not np.array_equal(versions[2].image, versions[0].image)


def test_mask_and_control_turn_with_their_picture() -> None:
    left = np.zeros((SIDE, SIDE, 3), np.uint8)
    left[:, :6] = 255
    example = Example("a", left, "half", (left[..., 0] > 0).astype(np.uint8), left)
    pictures = Pictures([example], DATA, variants=6)
    for version in range(6):
        turned = pictures[version]
        bright = turned.image[..., 0] > 127
        assert bright[:, 0 if version % 2 == 0 else -1].all()
        assert turned.mask.dtype == np.uint8
        assert set(np.unique(turned.mask)) == {0, 1}
        assert np.mean(turned.mask == bright) > 0.9
        assert np.array_equal(turned.control, turned.image)


def test_a_version_is_the_same_each_time() -> None:
    one, other = with_versions(2, 6, cache_gb=1e-9)[0], with_versions(2, 6)[0]
    for number in range(12):
        assert np.array_equal(one[number].image, other[number].image)
        assert np.array_equal(one[number].image, one[number].image)


def test_pictures_are_read_once_if_they_fit_and_each_time_if_not() -> None:
    kept, kept_reads = with_versions(3, 1)
    read, read_reads = with_versions(3, 1, cache_gb=1e-9)
    for _ in range(2):
        for number in range(3):
            assert np.array_equal(kept[number].image, read[number].image)
    assert kept_reads.reads == [1, 1, 1]
    assert read_reads.reads == [2, 2, 2]


def test_a_limit_takes_pictures_evenly_spread_and_their_versions() -> None:
    pictures = Pictures(examples(5), DATA, variants=2, limit=3)
    assert [pictures[i].key for i in range(len(pictures))] == [f"labelled-{i}" for i in (0, 2, 4, 0, 2, 4)]
    assert len(Pictures(examples(5), DATA, variants=1, limit=99)) == 5


# Mistakes


def test_an_empty_data_set() -> None:
    with pytest.raises(DataError, match="no usable picture"):
        Pictures([], DataConfig(), 1)


def test_a_fraction_that_the_data_cannot_give() -> None:
    with pytest.raises(DataError, match=r"labelled_fraction is 0\.5 but there is no labelled data"):
        loader(4, 0.5, labelled=None)
    with pytest.raises(DataError, match=r"labelled_fraction is 0\.5, so plain images are needed: set data\.unlabelled"):
        loader(4, 0.5, unlabelled=None)
    assert isinstance(loader(4, 1.0, unlabelled=None), Loader)
    assert isinstance(loader(4, 0.0, labelled=None), Loader)


def test_all_that_is_kept_of_a_picture_counts() -> None:
    """Its mask and its control too: 7 bytes a pixel."""
    one = 7 * DATA.resolution**2 / 2**30
    pictures, reads = with_versions(3, 1, cache_gb=2.5 * one)
    reads.rows = [replace(row, mask=np.ones((SIDE, SIDE), np.uint8), control=row.image) for row in reads.rows]
    for _ in range(2):
        for number in range(3):
            assert pictures[number].control is not None
    assert reads.reads == [1, 1, 2]
