"""What a step draws: all of it from the batch's seed, timesteps spread evenly."""

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from refine_control.diffusion.noise import NoiseSchedule, sampler_at, scheduler_config
from refine_control.distill.draw import Draw, draw
from refine_control.recipe import NoiseConfig
from tiny import batch

PER_ROW = ("image", "mask", "control", "captions", "labelled", "index", "keys", "rows")
SCHEDULE = NoiseSchedule.from_config(scheduler_config(NoiseConfig()))


def drawn(seed: int = 0, rows: int = 8, caption_dropout: float = 0.0) -> Draw:
    latents = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(99))
    return draw(replace(batch(rows), seed=seed), latents, SCHEDULE, caption_dropout)


def equal(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_seed_decides_everything() -> None:
    torch.manual_seed(1)
    first = drawn(0, caption_dropout=0.5)
    torch.manual_seed(2)
    again, other = drawn(0, caption_dropout=0.5), drawn(1, caption_dropout=0.5)
    assert all(equal(getattr(first, f.name), getattr(again, f.name)) for f in fields(Draw))
    assert not any(equal(getattr(first, name), getattr(other, name)) for name in ("t", "eps", "x_t", "target"))


def test_each_eighth_of_the_timesteps_gets_one_row() -> None:
    seen = set()
    for seed in range(20):
        t = drawn(seed).t.sort().values
        gaps = torch.cat([t, t[:1] + 1000]).diff()
        assert t.min() >= 0
        assert t.max() <= 999
        assert gaps.min() >= 124
        assert gaps.max() <= 126
        seen.add(int(t[0]))
    assert len(seen) > 10, "where the eighths begin is random"


def test_noise_is_standard_and_what_x_t_is_made_of() -> None:
    d = drawn(rows=64)
    assert abs(d.eps.mean()) < 0.02
    assert abs(d.eps.std() - 1) < 0.02
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(99))
    torch.testing.assert_close(d.x_t, SCHEDULE.add_noise(latents, d.eps, d.t))
    torch.testing.assert_close(d.target, SCHEDULE.target(latents, d.eps, d.t))


def test_captions_are_dropped_as_often_as_asked() -> None:
    b = batch(8)
    assert drawn(caption_dropout=0.0).captions == b.captions
    assert drawn(caption_dropout=1.0).captions == ("",) * 8
    dropped = sum(drawn(seed, caption_dropout=0.25).captions.count("") for seed in range(100))
    assert 150 <= dropped <= 250


def test_words_are_dropped_as_often_as_asked_and_the_others_keep_their_order() -> None:
    said = "one two three four five six seven eight"
    b, latents = replace(batch(8), captions=(said,) * 8), torch.zeros(8, 4, 8, 8)
    assert draw(b, latents, SCHEDULE, word_dropout=0.0).captions == b.captions
    assert draw(b, latents, SCHEDULE, word_dropout=1.0).captions == ("",) * 8
    left = [
        caption.split()
        for seed in range(40)
        for caption in draw(replace(b, seed=seed), latents, SCHEDULE, word_dropout=0.25).captions
    ]
    places = [[said.split().index(word) for word in words] for words in left]
    assert all(row == sorted(row) for row in places)
    kept = np.bincount(np.concatenate(places), minlength=8) / len(left)
    assert (abs(kept - 0.75) < 0.1).all(), "each word alike"


def test_a_part_of_a_batch_loses_the_words_that_it_loses_in_the_whole() -> None:
    b = replace(batch(8), captions=tuple(f"one two three four of picture {row}" for row in range(8)))
    half = replace(b, **{name: getattr(b, name)[1::2] for name in PER_ROW})
    whole = draw(b, torch.zeros(8, 4, 8, 8), SCHEDULE, 0.2, 0.5).captions
    assert draw(half, torch.zeros(4, 4, 8, 8), SCHEDULE, 0.2, 0.5).captions == whole[1::2]
    assert len(set(whole)) > 4


def test_the_control_hides_the_hole_and_nothing_else() -> None:
    b = batch(8)
    hole = b.mask.expand_as(b.image) == 1
    control = drawn().control
    assert (control[hole] == -1).all()
    torch.testing.assert_close(control[~hole], (b.image[~hole] + 1) / 2)
    assert hole.any()
    assert not hole.all()


def test_a_student_of_few_steps_learns_the_timesteps_that_its_sampler_visits() -> None:
    config = scheduler_config(NoiseConfig())
    for steps in (1, 2, 5):
        schedule = NoiseSchedule.from_config(config, steps)
        visited = sampler_at(config, steps).timesteps
        assert set(schedule.timesteps.tolist()) == set(visited.tolist())
        t = draw(batch(20), torch.zeros(20, 4, 8, 8), schedule).t
        assert t.unique(return_counts=True)[1].tolist() == [20 // steps] * steps, "each as often as the others"
