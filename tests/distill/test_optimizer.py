"""Clipping, schedules and the loss scale stand in test_loop.py as the loop uses them; here is what they do alone."""

import sys

import pytest
import torch
from torch import nn

from refine_control.distill.optimizer import LossScale, build_optimizer, ema_decay, moment_bytes
from refine_control.errors import RecipeError
from refine_control.recipe import RunConfig
from tiny import RUN, stage

EIGHT = RUN.model_copy(update={"use_8bit_adam": True})


def test_the_scale_halves_on_overflow_and_doubles_after_patience() -> None:
    scale = LossScale(True)
    assert scale.value == 65536
    scale.update(False)
    assert (scale.value, scale.lowered) == (32768, True)
    for _ in range(1999):
        scale.update(True)
    assert (scale.value, scale.lowered) == (32768, False)
    scale.update(True)
    assert scale.value == 65536


def test_at_a_scale_of_one_the_scale_is_not_to_blame() -> None:
    scale = LossScale(True)
    for _ in range(16):
        scale.update(False)
        assert scale.lowered
    assert scale.value == 1
    scale.update(False)
    assert (scale.value, scale.lowered) == (1, False)


def test_without_fp16_nothing_is_scaled() -> None:
    scale = LossScale(False)
    for finite in (True, False):
        scale.update(finite)
        assert (scale.value, scale.lowered, scale.state()) == (1, False, {})


def test_the_scale_goes_on() -> None:
    scale, again = LossScale(True), LossScale(True)
    for finite in (False, True, True):
        scale.update(finite)
    again.load(scale.state())
    assert (again.value, again.good) == (scale.value, scale.good) == (32768, 2)


def test_eight_bit_moments_take_a_quarter_of_the_memory_and_step_alike() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(256, 256), torch.randn(256, 256)
    sizes, ends = [], []
    for run in (RUN, EIGHT):
        weight = nn.Parameter(start.clone())
        optimizer = build_optimizer([weight], stage(), run)
        for _ in range(3):
            weight.grad = gradient.clone()
            optimizer.step()
        moments = [value for name, value in optimizer.state[weight].items() if "qmap" not in name and name != "step"]
        sizes.append(sum(value.nbytes for value in moments))
        ends.append(weight.detach())
    assert sizes[1] < 0.27 * sizes[0]
    assert (ends[1] - ends[0]).norm() < 0.1 * (ends[0] - start).norm()


def test_eight_bits_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(RecipeError, match=r"needs bitsandbytes: pip install -e '\.\[8bit\]'"):
        build_optimizer([nn.Parameter(torch.zeros(1))], stage(), EIGHT)


@pytest.mark.parametrize("run", [RUN, EIGHT], ids=["fp32", "8 bits"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_counted_as_they_are_kept(run: RunConfig, optimizer: str) -> None:
    if run is EIGHT and optimizer == "muon":
        pytest.skip("refused")
    config = stage(optimizer=optimizer)
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((256, 256), (8192,))]
    built = build_optimizer(weights, config, run)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    built.step()
    for weight in weights:
        kept = sum(v.nbytes for k, v in built.state[weight].items() if k != "step" and "qmap" not in k)
        assert kept == pytest.approx(moment_bytes(weight, config, run), rel=0.05)


def test_the_average_forgets_the_random_start() -> None:
    config = stage(ema_decay=0.9)
    assert ema_decay(0, config) == 0
    assert ema_decay(1, config) == pytest.approx(2 / 11)
    assert ema_decay(1000, config) == 0.9
