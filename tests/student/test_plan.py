"""A plan's cost is known before any training, and is the true one."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from refine_control.diffusion.model import Denoiser, Model
from refine_control.errors import RecipeError
from refine_control.recipe import DenoiserPlan, validate
from refine_control.student.plan import build_student, cost, plan_table, probe
from tiny import STUDENT, TEACHER, plan, tiny_denoiser, tiny_model

PLANS = {
    "narrow": STUDENT,
    "no mid block": plan(8, 16, mid_block="none"),
    "no attention at the top": plan(8, 16, attention=(False, True)),
    "two layers": plan(8, 16, layers_per_block=2),
    "three levels": plan(8, 16, 24),
}


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def student(request: pytest.FixtureRequest, teacher: Model) -> Denoiser:
    return build_student(request.param, teacher)


def test_parameters_are_counted_exactly(student: Denoiser, teacher: Model) -> None:
    c = cost(student, teacher)
    assert c.foundation_parameters == sum(p.numel() for p in student.foundation.parameters())
    assert c.module_parameters == sum(p.numel() for p in student.module.parameters())
    assert c.parameters == sum(p.numel() for p in student.parameters())


def test_macs_are_those_of_a_real_forward(student: Denoiser, teacher: Model) -> None:
    # torch does not count its fused attention on the CPU; the plain one is the same multiplications
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        student(*probe(teacher))
    assert cost(student, teacher).macs == counter.get_total_flops() // 2


def test_counting_computes_and_changes_nothing(teacher: Model) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.denoiser.state_dict().items()}
    cost(teacher.denoiser, teacher)
    assert all(p.device.type == "cpu" for p in teacher.denoiser.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.denoiser.state_dict().items())


def test_a_convolution_by_hand(teacher: Model) -> None:
    """conv_in: 3x3 over 4 channels for each of 16 channels of 8x8 latents, in foundation and module alike."""
    with FlopCounterMode(display=False, depth=10) as counter, torch.no_grad():
        teacher.denoiser(*probe(teacher))
    counts = counter.get_flop_counts()
    for part in ("foundation", "module"):
        assert counts[f"Denoiser.{part}.conv_in"].popitem()[1] == 2 * 3 * 3 * 4 * 16 * 8 * 8


def test_narrower_costs_less_of_both(teacher: Model) -> None:
    wide, narrow = (cost(tiny_denoiser(shape), teacher) for shape in (TEACHER, STUDENT))
    assert narrow.foundation_parameters < wide.foundation_parameters
    assert narrow.module_parameters < wide.module_parameters
    assert narrow.macs < wide.macs


def test_without_mid_block_only_the_foundation_shrinks(teacher: Model) -> None:
    whole, without = (
        cost(build_student(plan(8, 16, mid_block=kind), teacher), teacher) for kind in ("attention", "none")
    )
    assert without.foundation_parameters < whole.foundation_parameters
    assert without.module_parameters == whole.module_parameters
    assert without.macs < whole.macs


def test_a_student_speaks_its_teachers_language(student: Denoiser, teacher: Model) -> None:
    x_t, t, text, control = probe(teacher)
    with torch.no_grad():
        ours, theirs = student(x_t, t, text, control), teacher.denoiser(x_t, t, text, control)
    assert ours.shape == theirs.shape == x_t.shape


def test_the_table_states_both(teacher: Model) -> None:
    table = plan_table(STUDENT, teacher)
    ours, theirs = cost(build_student(STUDENT, teacher), teacher), cost(teacher.denoiser, teacher)
    for number in (ours.parameters, ours.macs, theirs.parameters, theirs.macs):
        assert f"{number:,}" in table
    assert f"{theirs.parameters / ours.parameters:.1f}x fewer parameters" in table


def test_probe_fits_the_model() -> None:
    x_t, t, text, control = probe(tiny_model())
    assert [tuple(x.shape) for x in (x_t, t, text, control)] == [(1, 4, 8, 8), (1,), (1, 8, 16), (1, 3, 16, 16)]
    assert isinstance(t, Tensor)
    assert t.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": [True]}, "block_out_channels has 2 levels; give attention and heads 2 entries each"),
        ({"heads": [2, 2, 2]}, "block_out_channels has 2 levels; give attention and heads 2 entries each"),
        ({"block_out_channels": [8, 18]}, "width 18 must be a multiple of norm_num_groups=4 and heads=2"),
        ({"heads": [2, 3]}, "width 16 must be a multiple of norm_num_groups=4 and heads=3"),
        ({"mid_block": "simple"}, "'mid_block' = 'simple'"),
        ({"layers_per_block": 0}, "'layers_per_block' = 0"),
    ],
)
def test_a_plan_that_cannot_be_built(changes: dict, message: str) -> None:
    good = {"block_out_channels": [8, 16], "attention": [True, True], "heads": [2, 2], "norm_num_groups": 4}
    assert validate(DenoiserPlan, good, "test").block_out_channels == (8, 16)
    with pytest.raises(RecipeError) as caught:
        validate(DenoiserPlan, good | changes, "test")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
