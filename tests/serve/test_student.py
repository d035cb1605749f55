"""The page's JavaScript against the Python that it mirrors: schedule, noise, tokens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from refine_control import runtime
from serve.conftest import MODEL, Look

pytestmark = pytest.mark.slow
Run = Callable[..., Any]


@pytest.fixture
def run(site: Path, look: Callable[..., Look]) -> Run:
    """Runs the body of an async JavaScript function of (from, given); from("x.js") imports a module of the page."""
    seen = look(site)

    def call(body: str, given: Any = None) -> Any:
        wrapped = f"async given => {{ const from = name => import(new URL(name, location)); {body} }}"
        return seen.page.evaluate(wrapped, given)

    return call


CONFIGS = [
    {
        "prediction_type": kind,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "final_alpha_cumprod": final,
        "clip_sample_range": clip,
    }
    for (kind, spacing), (offset, final, clip) in itertools.product(
        itertools.product(["epsilon", "sample", "v_prediction"], ["leading", "trailing", "linspace"]),
        [(0, 1.0, None), (1, 0.9991, 0.5)],
    )
]


def test_schedules_are_the_same_number_for_number(run: Run) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas).tolist()
    x, prediction = (np.random.default_rng(n).standard_normal(64).astype(np.float32) for n in (0, 1))
    counts = [1, 2, 3, 7, 10, 20, 50, 333, 999]
    body = """
        const { Scheduler } = await from("student.js");
        const [x, prediction] = [given.x, given.prediction].map((each) => Float32Array.from(each));
        return given.configs.map((config) => {
            const scheduler = new Scheduler({ ...config, alphas_cumprod: given.abar });
            return given.counts.map((steps) => {
                const times = scheduler.timesteps(steps);
                const t = times[steps >> 1];
                const { x0, eps } = scheduler.toX0Eps(prediction, t, x);
                return [times, ...[x0, eps, scheduler.step(x0, eps, t, steps)].map((each) => [...each])];
            });
        });"""
    given = {"x": x.tolist(), "prediction": prediction.tolist(), "configs": CONFIGS, "abar": abar, "counts": counts}
    for config, answers in zip(CONFIGS, run(body, given), strict=True):
        scheduler = runtime.Scheduler({**config, "alphas_cumprod": abar})
        for steps, (times, x0, eps, after) in zip(counts, answers, strict=True):
            expected = scheduler.timesteps(steps)
            assert times == expected.tolist(), (config, steps)
            t = int(expected[steps >> 1])
            parts = scheduler.to_x0_eps(prediction, t, x)
            for mine, theirs in zip((x0, eps, after), (*parts, scheduler.step(*parts, t, steps)), strict=True):
                assert np.array_equal(np.array(mine, dtype=np.float32), theirs), (config, steps)


@pytest.mark.parametrize("total", [1000, 100, 97])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_up_to_fifty(run: Run, total: int, spacing: str) -> None:
    config = {"alphas_cumprod": [0.5] * total, "timestep_spacing": spacing, "steps_offset": 0}
    body = """
        const scheduler = new (await from("student.js")).Scheduler(given);
        return [...Array(50).keys()].map((i) => scheduler.timesteps(i + 1));"""
    # numpy's arange gives "trailing" one number too many, -1, for some totals that are not 1000
    expected = [runtime.Scheduler(config).timesteps(steps)[:steps].tolist() for steps in range(1, 51)]
    assert run(body, config) == expected


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
@pytest.mark.parametrize("count", [16, 512, 777, 16384])
def test_a_seed_draws_what_torch_draws(run: Run, seed: int, count: int) -> None:
    drawn = run('return [...(await from("noise.js")).noise(given.seed, given.count)];', {"seed": seed, "count": count})
    expected = torch.randn(count, generator=torch.Generator().manual_seed(seed)).numpy()
    assert np.abs(np.array(drawn) - expected).max() <= 2e-6


def captions() -> list[str]:
    """Ordinary ones, odd ones, and random ones of many scripts."""
    draw = random.Random(0)
    letters = "abc XYZ 019 ,.;:!?'\"-_()[]<>|/ ´éÉñÇßſİıÅÅﬁΑΣσςЖжЯ漢字かナ한글עאب😀👩‍🚀🏳️‍🌈\t\n  "
    odd = ["", " ", "flat cat face", "3D  Red\tAPPLE ", "it's we'll I'D", "<|endoftext|> inside", "ΟΔΟΣ", "x" * 400]
    return [*odd, *("".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(500))]


def test_captions_become_the_same_tokens(run: Run, site: Path) -> None:
    path = site / "models" / MODEL / "tokenizer.json"
    reference = Tokenizer.from_file(str(path))
    reference.no_padding()
    reference.no_truncation()
    body = """
        const { makeEncode } = await from("words.js");
        const { fitTokens } = await from("student.js");
        const encode = makeEncode(given.tokenizer);
        return given.captions.map((caption) => fitTokens(encode(caption), 16, 1));"""
    answers = run(body, {"tokenizer": json.loads(path.read_text()), "captions": captions()})
    wrong = [
        (caption, mine, expected)
        for caption, mine in zip(captions(), answers, strict=True)
        if mine != (expected := runtime.fit_tokens(reference.encode(caption).ids, 16, 1))
    ]
    assert wrong == []


def test_rounding_and_control_are_numpys(run: Run) -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.uniform(-1.2, 1.2, 744), np.arange(24) / 127.5 - 1 + 0.5 / 127.5]).astype(np.float32)
    picture, hole = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), rng.integers(0, 2, (16, 16), dtype=np.uint8)
    body = """
        const { paste, toControl } = await from("student.js");
        const picture = Uint8ClampedArray.from(given.picture);
        const pasted = paste(Float32Array.from(given.drawn), picture, Uint8Array.from(given.hole));
        return [[...pasted], [...toControl(picture, Uint8Array.from(given.hole), 16).data]];"""
    opaque = np.concatenate([picture, np.full((16, 16, 1), 255, dtype=np.uint8)], axis=-1)
    given = {"drawn": drawn.tolist(), "picture": opaque.ravel().tolist(), "hole": hole.ravel().tolist()}
    pasted, control = run(body, given)
    values = drawn.reshape(3, 16, 16).transpose(1, 2, 0)
    pixels = np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)
    expected = np.where(hole[..., None] == 1, pixels, picture)
    assert np.array_equal(np.array(pasted, dtype=np.uint8).reshape(16, 16, 4)[..., :3], expected)
    known = picture.astype(np.float32).transpose(2, 0, 1)[None] / 255
    assert np.array_equal(np.array(control, dtype=np.float32), np.where(hole == 1, np.float32(-1), known).ravel())
