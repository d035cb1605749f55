"""A student starts as its teacher, as far as shapes allow."""

import pytest
import torch
from torch import Tensor

from refine_control.diffusion.model import Denoiser, Model
from refine_control.student.plan import probe
from refine_control.student.transplant import select, transplant
from tiny import STUDENT, TEACHER, plan, tiny_denoiser


def state(denoiser: Denoiser) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}


@pytest.mark.parametrize("shape", [TEACHER, plan(16, 32, mid_block="none")], ids=["with mid block", "without"])
def test_the_same_plan_becomes_the_teacher(teacher: Model, shape) -> None:
    source, student = tiny_denoiser(shape, seed=0), tiny_denoiser(shape, seed=1)
    x_t, t, text, control = probe(teacher)
    inputs = (torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0)), t + 500, text, control)
    with torch.no_grad():
        assert not torch.equal(student(*inputs), source(*inputs))
        assert transplant(student, source) == []
        assert torch.equal(student(*inputs), source(*inputs))


def test_a_narrower_student_is_filled_from_the_teacher() -> None:
    source, student = tiny_denoiser(TEACHER, seed=0), tiny_denoiser(STUDENT, seed=1)
    fresh, before = state(student), state(source)
    assert transplant(student, source) == []
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, select(before[name], tensor.shape)), name
    changed = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, fresh[name])]
    assert "foundation.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight" in changed
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items()), "the teacher stays"


def test_select_takes_evenly_spaced_rows_and_columns() -> None:
    grid = torch.arange(6)[:, None] * 10 + torch.arange(4)[None]
    assert select(grid, torch.Size([3, 2])).tolist() == [[0, 2], [20, 22], [40, 42]]
    assert select(torch.arange(7), torch.Size([3])).tolist() == [0, 2, 4]
    assert torch.equal(select(grid, grid.shape), grid)


@pytest.mark.parametrize(("wide", "narrow"), [((32, 64), (16, 32)), ((24, 48), (16, 32)), ((48, 20), (12, 5))])
def test_select_keeps_the_channels_of_concatenated_skips(wide: tuple[int, int], narrow: tuple[int, int]) -> None:
    """An up block sees [hidden, skip]: cut by one ratio, the cut of the whole is the whole of the cuts."""
    parts = [torch.randn(width) for width in wide]
    cuts = torch.cat([select(part, torch.Size([width])) for part, width in zip(parts, narrow, strict=True)])
    assert torch.equal(select(torch.cat(parts), torch.Size([sum(narrow)])), cuts)


def test_fewer_levels_leave_out_the_deepest_up_block() -> None:
    source, student = tiny_denoiser(plan(16, 24, 32), seed=0), tiny_denoiser(plan(8, 12), seed=1)
    transplant(student, source)
    ours, theirs = student.state_dict(), source.state_dict()
    for i in (0, 1):
        down, up = f"foundation.down_blocks.{i}.resnets.0.conv1.bias", "foundation.up_blocks.{}.resnets.0.conv1.bias"
        assert torch.equal(ours[down], select(theirs[down], ours[down].shape))
        assert torch.equal(ours[up.format(i)], select(theirs[up.format(i + 1)], ours[up.format(i)].shape))
        assert not torch.equal(ours[up.format(i)], select(theirs[up.format(i)], ours[up.format(i)].shape))


def test_what_finds_no_source_stays_fresh_and_is_named() -> None:
    source = tiny_denoiser(plan(8, 16, attention=(False, True)), seed=0)
    student = tiny_denoiser(plan(8, 24), seed=1)
    before = state(student)
    fresh = transplant(student, source)
    after = student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in fresh)
    assert "foundation.down_blocks.1.resnets.0.conv1.weight" in fresh, "wider than the teacher's"
    assert "foundation.down_blocks.0.attentions.0.proj_in.weight" in fresh, "the teacher has no attention here"
    assert "foundation.conv_in.weight" not in fresh
    assert torch.equal(after["foundation.conv_in.weight"], source.state_dict()["foundation.conv_in.weight"])
