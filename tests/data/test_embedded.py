"""The data in the repository: readable, captioned, as many as the card says, and no test picture in training."""

import hashlib
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from refine_control.data.example import Example
from refine_control.data.shards import ShardDataset
from refine_control.data.source import open_dataset

DATA = Path(__file__).parents[2] / "data"
DOMAINS = ("emoji", "openclipart")
SPLITS = ("train", "val", "test")


@cache
def examples(domain: str, split: str) -> list[Example]:
    dataset = open_dataset(DATA / domain, split)
    assert isinstance(dataset, ShardDataset)
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_picture_decodes_at_64_px_and_is_not_blank(domain: str, split: str) -> None:
    for example in examples(domain, split):
        assert example.image.shape == (64, 64, 3), example.key
        assert example.image.std() >= 4, example.key


def test_no_concept_is_in_two_splits() -> None:
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        sides = [{e.extra["concept"] for d in DOMAINS for e in examples(d, split)} for split in (first, second)]
        assert sides[0].isdisjoint(sides[1])


def test_no_picture_is_there_twice() -> None:
    everything = [e for domain in DOMAINS for split in SPLITS for e in examples(domain, split)]
    seen = Counter(hashlib.sha256(e.image.tobytes()).digest() for e in everything)
    assert set(seen.values()) == {1}
    assert max(Counter(e.key for e in everything).values()) == 1


def test_styles_and_genders_of_a_thing_share_a_split() -> None:
    split_of: dict[str, str] = {}
    for split in SPLITS:
        for e in examples("emoji", split):
            code = e.key.partition("_")[2]
            code = re.sub("-200d-(2640|2642)", "", re.sub("1f468|1f469|1f9d1", "person", code))
            assert split_of.setdefault(code, split) == split, e.key


def test_captions() -> None:
    for split in SPLITS:
        for e in examples("emoji", split):
            style = {"fluent": "3d", "noto": "flat"}[e.extra["source"]]
            assert e.text is not None
            assert re.fullmatch(f"{style} [a-z ]+, .+", e.text)
            assert e.text.endswith(f", {e.extra['name']}")
            assert e.text == e.text.lower()
        assert all(e.text is None and e.extra["source_file"] for e in examples("openclipart", split))


def test_left_out_are_flags_and_skin_tones() -> None:
    for split in SPLITS:
        for e in examples("emoji", split):
            assert e.extra["category"] not in {"Flags", "Component"}
            assert re.search("1f3f[b-f]", e.key) is None


def test_shares_of_the_splits() -> None:
    sizes = {(d, s): len(examples(d, s)) for d in DOMAINS for s in SPLITS}
    assert sum(sizes[d, s] for d in ("emoji",) for s in SPLITS) > 3000
    assert 0.07 < sizes["emoji", "test"] / sum(sizes["emoji", s] for s in SPLITS) < 0.13
    assert 0.025 < sizes["openclipart", "test"] / sum(sizes["openclipart", s] for s in SPLITS) < 0.075
    assert all(size >= 80 for size in sizes.values())


def test_one_concept_does_not_fill_the_test_split() -> None:
    for domain in DOMAINS:
        counts = Counter(e.extra["concept"] for e in examples(domain, "test"))
        assert max(counts.values()) <= 20


def test_the_card_counts_what_is_there() -> None:
    card = (DATA / "README.md").read_text(encoding="utf-8")
    for domain, sources in (("emoji", ("fluent", "noto")), ("openclipart", ("openclipart",))):
        for source in sources:
            counts = [sum(e.extra["source"] == source for e in examples(domain, split)) for split in SPLITS]
            assert f"| {source} | {' | '.join(map(str, counts))} |" in card


def test_size_and_licences() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 45_000_000
    for name, words in {
        "fluent-emoji.txt": "Microsoft Corporation",
        "emoji-data.txt": "Cal Henderson",
        "noto-emoji.txt": "Apache License",
        "openclipart.txt": "Public Domain Dedication",
    }.items():
        assert words in (DATA / "LICENSES" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("split", ["val", "test"])
def test_no_held_out_picture_is_a_near_copy_of_a_training_picture(split: str) -> None:
    """Nor of a mirrored one: training mirrors its pictures. Measured by a picture's own contrast over 16 x 16 cells."""

    def small(pictures: np.ndarray) -> np.ndarray:
        cells = pictures.reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4), dtype=np.float32)
        return cells.reshape(len(pictures), -1)

    def stacked(part: str) -> np.ndarray:
        return np.stack([e.image for d in DOMAINS for e in examples(d, part)])

    train, held_out = small(stacked("train")), stacked(split)
    for pictures in (small(held_out), small(held_out[:, :, ::-1])):
        squared = (pictures**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * pictures @ train.T
        nearest = np.sqrt(np.maximum(squared.min(axis=1), 0) / train.shape[1])
        # The nearest is at 0.076: the snowman without snow. Copies resized, or saved as JPEG of quality 95, mostly lie
        # below 0.03; pale pictures and copies of low quality pass, so this finds careless copies only.
        assert (nearest / pictures.std(axis=1)).min() > 0.05
