"""A student starts as its teacher, as far as its layers and channels go."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import tiny_sd
from refine_control.diffusion.build import module_of
from refine_control.diffusion.model import Denoiser, Model
from refine_control.plans import DenoiserPlan
from refine_control.student.axes import axes
from refine_control.student.named import named_plan, plan_of, reshape
from refine_control.student.plan import build_student, probe
from refine_control.student.transplant import origin, strongest, transplant
from tiny import TEACHER, plan, tiny_denoiser

SD = plan(16, 32, 64, 64, layers_per_block=2, attention=(True, True, True, False), heads=(4, 4, 4, 4))


def state(denoiser: Denoiser) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}


def inputs(denoiser: Denoiser) -> tuple:
    """Random ones that fit a denoiser from `tiny` or `tiny_sd`."""
    generator = torch.Generator().manual_seed(0)
    x_t, _, text, control = probe(Model(denoiser, tiny_sd.tiny_vae(), None, tiny_sd._tokenizer(), {}))
    draw = [None if part is None else torch.randn(part.shape, generator=generator) for part in (x_t, *text, control)]
    return draw[0], torch.tensor([500]), type(text)(draw[1], draw[2]), draw[3]


def xl_denoiser() -> Denoiser:
    """SDXL's embeddings of sizes and linear projections, with two ControlNets."""
    torch.manual_seed(0)
    unet = tiny_sd.tiny_unet("sdxl")
    nets = [tiny_sd.tiny_controlnet(unet, seed) for seed in range(2)]
    return Denoiser(unet, module_of(nets), downscale=2)


@pytest.fixture(params=["tiny", "sd", "no mid", "sdxl"])
def source(request: pytest.FixtureRequest) -> Denoiser:
    shapes = {"tiny": TEACHER, "sd": SD, "no mid": plan(16, 32, mid_block="none")}
    return tiny_denoiser(shapes[request.param]) if request.param in shapes else xl_denoiser()


def student_of(source: Denoiser, shape: DenoiserPlan) -> Denoiser:
    torch.manual_seed(1)
    return build_student(shape, Model(source, tiny_sd.tiny_vae(), None, None, {})).eval()


# All channels


def test_the_same_plan_becomes_the_teacher(source: Denoiser) -> None:
    student, given = student_of(source, plan_of(source)), inputs(source)
    with torch.no_grad():
        assert not torch.equal(student(*given), source(*given))
        assert transplant(student, source) == []
        assert torch.equal(student(*given), source(*given))
    ours, theirs = student.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# Fewer layers


@pytest.mark.parametrize("name", ["bk-base", "bk-small", "bk-tiny"])
def test_a_block_removed_student_finds_a_whole_source_for_every_tensor(name) -> None:
    source = tiny_denoiser(SD)
    small, before = named_plan(name, source), state(source)
    student = student_of(source, small)
    assert transplant(student, source) == []
    for key, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[origin(key, small, SD)]), key


def test_the_student_maps_to_the_teachers_layers_by_their_place() -> None:
    small = reshape(SD, SD.block_out_channels[:-1], layers_per_block=1)
    places = {
        "foundation.down_blocks.1.resnets.0.conv1.weight": "foundation.down_blocks.1.resnets.0.conv1.weight",
        "foundation.down_blocks.1.downsamplers.0.conv.bias": "foundation.down_blocks.1.downsamplers.0.conv.bias",
        "foundation.up_blocks.0.resnets.0.conv1.weight": "foundation.up_blocks.1.resnets.0.conv1.weight",
        "foundation.up_blocks.0.attentions.1.proj_in.weight": "foundation.up_blocks.1.attentions.2.proj_in.weight",
        "foundation.up_blocks.2.resnets.1.conv1.weight": "foundation.up_blocks.3.resnets.2.conv1.weight",
        "foundation.up_blocks.1.upsamplers.0.conv.bias": "foundation.up_blocks.2.upsamplers.0.conv.bias",
        # teacher: conv_in 0, level 0: layers 1 2 and downsampler 3, level 1: 4 5 6, level 2: 7 8 9, level 3: 10 11
        "module.controlnet_down_blocks.0.weight": "module.controlnet_down_blocks.0.weight",
        "module.controlnet_down_blocks.1.weight": "module.controlnet_down_blocks.1.weight",
        "module.controlnet_down_blocks.2.weight": "module.controlnet_down_blocks.3.weight",
        "module.controlnet_down_blocks.3.weight": "module.controlnet_down_blocks.4.weight",
        "module.controlnet_down_blocks.4.weight": "module.controlnet_down_blocks.6.weight",
        "module.nets.1.controlnet_down_blocks.5.bias": "module.nets.1.controlnet_down_blocks.7.bias",
    }
    assert {name: origin(name, small, SD) for name in places} == places


def test_a_student_with_more_than_the_teacher_has_names_what_stays_fresh() -> None:
    source = tiny_denoiser(plan(8, 16, attention=(False, True)))
    student = student_of(source, plan(8, 24, 24, layers_per_block=2))
    before = state(student)
    fresh = set(transplant(student, source))
    after = student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in fresh)
    for name, why in {
        "foundation.down_blocks.1.resnets.0.conv1.weight": "wider than the teacher's",
        "foundation.down_blocks.2.resnets.0.conv1.weight": "a level the teacher lacks",
        "foundation.down_blocks.0.resnets.1.conv1.weight": "a layer the teacher lacks",
        "foundation.down_blocks.0.attentions.0.proj_in.weight": "the teacher has no attention here",
        "module.controlnet_down_blocks.2.weight": "the second layer of the top level",
        "foundation.up_blocks.0.resnets.0.conv1.weight": "the way up from a level the teacher lacks",
    }.items():
        assert name in fresh, why
    assert "foundation.conv_in.weight" not in fresh
    assert torch.equal(after["foundation.conv_in.weight"], source.state_dict()["foundation.conv_in.weight"])


def test_where_only_the_student_needs_a_shortcut_it_starts_as_the_teachers_identity() -> None:
    source = tiny_denoiser(plan(16, 32, 32))
    student = student_of(source, plan(16, 32, 16))
    assert transplant(student, source) == []
    resnet = student.foundation.down_blocks[2].resnets[0]
    kept = resnet.conv_shortcut.weight.squeeze()
    assert kept.sum() == 16
    assert (kept.sum(1) == 1).all()
    assert not resnet.conv_shortcut.bias.any()


# Fewer channels


def kept_rows(small: Tensor, large: Tensor) -> list[int]:
    """Which of large's first-dimension entries small's are, for vectors of distinct numbers."""
    return [large.tolist().index(value) for value in small.tolist()]


def numbered(shape: DenoiserPlan) -> Denoiser:
    """Distinct numbers in every norm weight, so that a student's tell which channels they come from."""
    source = tiny_denoiser(shape)
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.weight.copy_(torch.arange(len(module.weight)))
    return source


def test_half_the_width_is_finite_and_made_of_the_teachers_numbers(source: Denoiser) -> None:
    whole = plan_of(source)
    student = student_of(source, reshape(whole, [width // 2 for width in whole.block_out_channels]))
    before = state(source)
    assert transplant(student, source) == []
    with torch.no_grad():
        assert student(*inputs(source)).isfinite().all()
    for name, tensor in student.state_dict().items():
        assert torch.isin(tensor, before[origin(name, plan_of(student), whole)]).all(), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items()), "the teacher stays"


def norms_of_stream(net: nn.Module, level: int) -> list[nn.Module]:
    """Those that read a level's residual stream and nothing else."""
    block = net.down_blocks[level]
    norms = [block.resnets[1].norm1, *(attention.norm for attention in getattr(block, "attentions", []))]
    if level == len(net.down_blocks) - 1:
        norms += [*(resnet.norm1 for resnet in net.mid_block.resnets), net.mid_block.attentions[0].norm]
    if hasattr(net, "up_blocks"):
        up = net.up_blocks[len(net.down_blocks) - 1 - level]
        norms += [*(attention.norm for attention in getattr(up, "attentions", []))]
        norms += [net.conv_norm_out] if level == 0 else []
    return norms


def test_a_level_keeps_the_same_channels_everywhere_and_as_many_of_each_group() -> None:
    source = numbered(SD)
    student = student_of(source, reshape(SD, (8, 16, 32, 32)))
    transplant(student, source)
    for part in ("foundation", "module"):
        kept = []
        for level in range(4):
            ours, theirs = (norms_of_stream(getattr(net, part), level) for net in (student, source))
            rows = [kept_rows(mine.weight, their.weight) for mine, their in zip(ours, theirs, strict=True)]
            assert len(rows) > 1
            assert rows == [sorted(rows[0])] * len(rows)
            group = SD.block_out_channels[level] // 4
            assert [sum(row // group == g for row in rows[0]) for g in range(4)] == [group // 2] * 4
            kept.append(rows[0])
        assert kept[2] == kept[3], "levels of equal width are one stream: no shortcut stands between them"
        assert kept[1] != [2 * row for row in range(16)], "chosen by weight, not by place"


def test_the_way_up_reads_the_channels_of_hidden_and_of_its_skip() -> None:
    source = numbered(SD)
    student = student_of(source, reshape(SD, (8, 16, 32, 32)))
    transplant(student, source)
    ours, theirs = student.foundation, source.foundation

    def rows(pick) -> list[int]:
        return kept_rows(pick(ours).weight, pick(theirs).weight)

    level = [rows(lambda net, i=i: net.down_blocks[i].resnets[1].norm1) for i in range(4)]
    seen = {
        (up, layer): rows(lambda net, up=up, layer=layer: net.up_blocks[up].resnets[layer].norm1)
        for up in range(4)
        for layer in range(3)
    }
    for (up, layer), channels in seen.items():
        here = 3 - up
        hidden = level[min(here + 1, 3)] if layer == 0 else level[here]
        skip = level[max(here - 1, 0)] if layer == 2 else level[here]
        width = SD.block_out_channels[min(here + 1, 3)] if layer == 0 else SD.block_out_channels[here]
        assert channels == [*hidden, *(width + row for row in skip)], (up, layer)


def test_heads_stay_whole_and_the_strongest_remain() -> None:
    shape = plan(16, 32, heads=(4, 4))
    source = tiny_denoiser(shape)
    attention = "foundation.mid_block.attentions.0.transformer_blocks.0.attn1"
    with torch.no_grad():
        for part in ("to_q", "to_k", "to_v"):
            weight = source.state_dict()[f"{attention}.{part}.weight"]
            weight[8:16] *= 10  # heads 1 and 3 of 8 channels each
            weight[24:32] *= 10
            weight[:3] *= 12  # the strongest channels of all, but not enough to make head 0 one of the strongest two
    student = student_of(source, plan(8, 16, heads=(2, 2)))
    transplant(student, source)
    inside = [*range(8, 16), *range(24, 32)]
    for part in ("to_q", "to_k", "to_v"):
        ours, theirs = (net.state_dict()[f"{attention}.{part}.weight"] for net in (student, source))
        assert all(torch.isin(row, theirs[i]).all() for row, i in zip(ours, inside, strict=True)), part
    ours, theirs = (net.state_dict()[f"{attention}.to_out.0.weight"] for net in (student, source))
    assert all(torch.isin(row, theirs[:, i]).all() for row, i in zip(ours.T, inside, strict=True))


def test_geglu_keeps_value_and_gate_of_the_same_channel() -> None:
    source = tiny_denoiser(TEACHER)
    student = student_of(source, plan(8, 16))
    transplant(student, source)
    name = "foundation.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.{}"
    ours, theirs = student.state_dict(), source.state_dict()
    rows = kept_rows(ours[name.format("0.proj.bias")], theirs[name.format("0.proj.bias")])
    assert [row - 64 for row in rows[32:]] == rows[:32]
    column = theirs[name.format("2.weight")][:, rows[:32]]
    assert torch.isin(ours[name.format("2.weight")], column).all()


def test_every_tensor_of_a_denoiser_has_a_named_space(source: Denoiser) -> None:
    whole = plan_of(source)
    fixed = {"foundation.conv_in.weight", "foundation.conv_out.weight"}
    for name, tensor in source.state_dict().items():
        dimensions = axes(name, tensor.shape, whole)
        assert [sum(axis.size for axis in dimension) for dimension in dimensions] == list(tensor.shape), name
        inner = [axis.choice for dimension in dimensions[:2] for axis in dimension]
        reads_outside = ("attn2.to_k", "attn2.to_v", "conv_in", "conv_out", "add_embedding.linear_1")
        assert "all" not in inner or any(word in name for word in reads_outside) or name in fixed, name


@dataclass
class Planted:
    """A teacher whose every other run of `run` channels is dead, and the student that lacks just these."""

    teacher: Denoiser
    student: Denoiser


def dead(width: int, run: int) -> Tensor:
    return torch.arange(width) // run % 2 == 1


def plant(large: DenoiserPlan, small: DenoiserPlan) -> Planted:
    """Dead channels: nothing writes them. In each norm group of the student's lie a dead and a living group of the
    teacher's, so no living channel is normalised with a dead one. Two kinds of norm span both all the same, and are
    made deaf (they hand on their bias alone): those of [hidden, skip] on the way up, and the LayerNorms of tokens.
    """
    teacher = tiny_denoiser(large, text_width=16)
    with torch.no_grad():
        for name, tensor in teacher.state_dict().items():
            spaces = axes(name, tensor.shape, large)[0]
            if name.endswith((".norm1.weight", ".norm2.weight", ".norm3.weight")) and (
                "transformer_blocks" in name or ("up_blocks" in name and "norm1" in name)
            ):
                tensor.zero_()
            start = 0
            for axis in spaces:
                if axis.choice in ("groups", "any", "heads"):
                    parts = axis.parts if axis.parts > 1 else 2
                    tensor[start : start + axis.size][dead(axis.size, axis.size // parts)] = 0
                start += axis.size
    return Planted(teacher, student_of(teacher, small))


@pytest.mark.parametrize("layers", [1, 2])
def test_cutting_dead_channels_changes_nothing(layers: int) -> None:
    common = {"layers_per_block": layers, "attention": (False, True)}
    large = plan(32, 32, heads=(4, 4), norm_num_groups=8, **common)
    small = plan(16, 16, heads=(2, 2), norm_num_groups=4, **common)
    planted = plant(large, small)
    given = inputs(planted.teacher)
    assert transplant(planted.student, planted.teacher) == []
    # waves of the time embedding are chosen by frequency, not by strength: hand over what the teacher's make
    with torch.no_grad():
        for ours, theirs in (
            (planted.student.foundation, planted.teacher.foundation),
            (planted.student.module, planted.teacher.module),
        ):
            time = theirs.time_embedding(theirs.time_proj(given[1]))[:, ~dead(128, 64)]
            ours.time_embedding.linear_2.weight.zero_()
            ours.time_embedding.linear_2.bias.copy_(time[0])
        whole, cut = planted.teacher(*given), planted.student(*given)
        other = planted.student(given[0], given[1], type(given[2])(given[2].tokens + 1), given[3] + 1)
    assert (cut - other).abs().max() > 1e-3, "text and control are heard"
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-4)


def test_strongest() -> None:
    importance = torch.tensor([[1.0, 5.0, 3.0, 4.0], [9.0, 0.0, 2.0, 8.0]])
    assert strongest(importance, 2).tolist() == [1, 3, 4, 7]
    assert strongest(importance.view(1, -1), 3).tolist() == [1, 4, 7]
    assert strongest(torch.zeros(1, 4), 2).tolist() == [0, 1], "ties: the first"


def test_time_waves_stay_evenly_spaced() -> None:
    """The embedding of a step is [cos, sin] of waves from fast to slow; half of them are every second one."""
    source = tiny_denoiser(TEACHER)
    student = student_of(source, plan(8, 16))
    transplant(student, source)
    ours, theirs = (net.foundation.time_embedding.linear_1.weight for net in (student, source))
    assert all(torch.isin(ours[:, i], theirs[:, 2 * i]).all() for i in range(8))


def test_several_controlnets_are_cut_one_by_one() -> None:
    source = xl_denoiser()
    student = student_of(source, reshape(plan_of(source), (4, 8)))
    transplant(student, source)
    ours, theirs = ([net.controlnet_cond_embedding.conv_in.bias for net in pair.nets] for pair in (student, source))
    assert not torch.equal(*ours)
    assert all(torch.isin(mine, their).all() for mine, their in zip(ours, theirs, strict=True))
