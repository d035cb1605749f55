"""A plan's cost is known before any training, and is the true one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from refine_control.diffusion.model import Denoiser, Model
from refine_control.errors import RecipeError
from refine_control.plans import DenoiserPlan
from refine_control.recipe import validate
from refine_control.student.named import named_plan
from refine_control.student.plan import build_student, cost, plan_cost, plan_table, probe
from tiny import STUDENT, TEACHER, plan, tiny_denoiser, tiny_model

PLANS = {
    "narrow": STUDENT,
    "no mid block": plan(8, 16, mid_block="none"),
    "no attention at the top": plan(8, 16, attention=(False, True)),
    "two layers": plan(8, 16, layers_per_block=2),
    "three levels": plan(8, 16, 24),
    "deep transformers": plan(8, 16, 24, transformer_layers=(1, 2, 3)),
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


def test_without_mid_block_the_module_keeps_one_resnet_of_it(teacher: Model) -> None:
    whole, without = (build_student(plan(8, 16, mid_block=kind), teacher) for kind in ("attention", "none"))
    assert without.foundation.mid_block is None
    assert without.module.config.mid_block_type == "UNetMidBlock2D"
    kept, all_of_it = (dict(net.module.mid_block.named_parameters()) for net in (without, whole))
    assert kept.keys() == {name for name in all_of_it if name.startswith("resnets.0.")}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mid", ["attention", "none"])
def test_the_module_hands_over_as_many_residuals_as_the_foundation_takes(teacher: Model, layers: int, mid: str) -> None:
    """Stock UNets zip them with their skips: a list that is too short is cut silently."""
    student = build_student(plan(8, 16, 24, layers_per_block=layers, mid_block=mid), teacher)
    x_t, t, text, control = probe(teacher)
    with torch.no_grad():
        residuals, _ = student.module(x_t, t, text.tokens, control, return_dict=False)
    assert len(residuals) == sum(len(block.resnets) for block in student.foundation.up_blocks)


def test_layers_may_differ_by_level_where_no_module_must_follow(teacher: Model) -> None:
    uneven = plan(8, 16, layers_per_block=(1, 2))
    alone = replace(teacher, denoiser=Denoiser(teacher.denoiser.foundation, None, downscale=2))
    student = build_student(uneven, alone)
    assert [len(block.resnets) for block in student.foundation.down_blocks] == [1, 2]
    assert [len(block.resnets) for block in student.foundation.up_blocks] == [3, 2]
    with torch.no_grad():
        assert student(*probe(alone)).shape == probe(alone)[0].shape
    with pytest.raises(RecipeError, match=r"layers_per_block \(1, 2\): a ControlNet has one number"):
        build_student(uneven, teacher)


def test_a_student_speaks_its_teachers_language(student: Denoiser, teacher: Model) -> None:
    x_t, t, text, control = probe(teacher)
    with torch.no_grad():
        ours, theirs = student(x_t, t, text, control), teacher.denoiser(x_t, t, text, control)
    assert ours.shape == theirs.shape == x_t.shape


def test_a_wrong_conditioning_is_named(teacher: Model) -> None:
    wrong = plan(8, 16).model_copy(update={"conditioning_channels": (4, 8, 16)})
    with pytest.raises(RecipeError, match="has 3 entries; the teacher's latents are 2x smaller"):
        build_student(wrong, teacher)


def test_a_recipe_takes_a_plan_or_a_name(teacher: Model) -> None:
    assert plan_cost("bk-base", teacher) == plan_cost(named_plan("bk-base", teacher.denoiser), teacher)


def test_the_table_states_both(teacher: Model) -> None:
    table = plan_table(STUDENT, teacher)
    ours, theirs = cost(build_student(STUDENT, teacher), teacher), cost(teacher.denoiser, teacher)
    for number in (ours.parameters, ours.macs, theirs.parameters, theirs.macs):
        assert f"{number:,}" in table
    assert f"{theirs.parameters / ours.parameters:.1f}x fewer parameters" in table


def test_probe_fits_the_model() -> None:
    x_t, t, text, control = probe(tiny_model())
    assert [tuple(x.shape) for x in (x_t, t, text.tokens, control)] == [(1, 4, 8, 8), (1,), (1, 8, 16), (1, 3, 16, 16)]
    assert text.pooled is None
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
        ({"layers_per_block": [1, 2, 3]}, "give one number, or 2, one for each level"),
        ({"transformer_layers": [2]}, "give one number, or 2, one for each level"),
        ({"block_out_channels": []}, "'block_out_channels' = []"),
    ],
)
def test_a_plan_that_cannot_be_built(changes: dict, message: str) -> None:
    good = {"block_out_channels": [8, 16], "attention": [True, True], "heads": [2, 2], "norm_num_groups": 4}
    assert validate(DenoiserPlan, good, "test").block_out_channels == (8, 16)
    with pytest.raises(RecipeError) as caught:
        validate(DenoiserPlan, good | changes, "test")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
