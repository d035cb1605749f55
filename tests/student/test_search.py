"""The arithmetic is the networks' own, and the search returns the widest students within the budget."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import tiny_sd
from published import UNETS, write_configs
from refine_control.diffusion.build import module_of
from refine_control.diffusion.model import Denoiser, Model
from refine_control.errors import RecipeError
from refine_control.plans import DenoiserPlan
from refine_control.recipe import validate
from refine_control.student.count import Setting, count
from refine_control.student.named import named_plan, plan_of, reshape
from refine_control.student.outline import plan_teacher
from refine_control.student.plan import cost, plan_cost
from refine_control.student.search import parse_amount, search, search_table
from tiny import plan, tiny_denoiser, tiny_model

SHAPES = [
    plan(16, 24, 40, layers_per_block=layers, mid_block=mid, attention=attention, transformer_layers=(1, 3, 2))
    for layers, mid, attention in itertools.product(
        (1, 2), ("attention", "none"), ((True, True, True), (False, True, False))
    )
]


@pytest.mark.parametrize("shape", SHAPES)
def test_arithmetic_is_what_the_networks_count(teacher: Model, shape: DenoiserPlan) -> None:
    assert count(shape, Setting.of(teacher)) == plan_cost(shape, teacher)


@pytest.mark.parametrize("family", UNETS)
def test_arithmetic_is_what_published_networks_count(family: str, tmp_path: Path) -> None:
    teacher = plan_teacher(str(write_configs(tmp_path, family)))
    shape = named_plan("micro", teacher.denoiser)
    assert count(shape, Setting.of(teacher)) == plan_cost(shape, teacher)
    if family == "sd15":
        assert count(plan_of(teacher.denoiser), Setting.of(teacher)) == cost(teacher.denoiser, teacher)


@pytest.mark.parametrize("nets", [0, 2])
def test_arithmetic_counts_every_controlnet(nets: int) -> None:
    unet = tiny_sd.tiny_unet("sdxl")
    module = module_of([tiny_sd.tiny_controlnet(unet, seed) for seed in range(nets)])
    tokenizer = type("Tokenizer", (), {"model_max_length": tiny_sd.LENGTH})()
    teacher = Model(Denoiser(unet, module, downscale=2), tiny_sd.tiny_vae(), None, tokenizer, {})
    assert count(plan_of(teacher.denoiser), Setting.of(teacher)) == cost(teacher.denoiser, teacher)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return plan_teacher(str(write_configs(tmp_path_factory.mktemp("configs"), "sd15")))


@pytest.mark.parametrize(
    "budget", [{"macs": 60 * 10**9}, {"parameters": 50 * 10**6}, {"macs": 10**11, "parameters": 10**8}]
)
def test_candidates_are_within_the_budget_and_a_wider_one_is_not(sd15: Model, budget: dict[str, int]) -> None:
    found, setting = search(sd15, **budget), Setting.of(sd15)
    assert len(found) == 6
    assert len({candidate.label for candidate in found}) == 6

    def fits(shape: DenoiserPlan) -> bool:
        c = count(shape, setting)
        return c.macs <= budget.get("macs", c.macs) and c.parameters <= budget.get("parameters", c.parameters)

    for candidate in found:
        shape = candidate.plan
        assert candidate.cost == count(shape, setting)
        assert fits(shape)
        wider = tuple(width + 32 for width in shape.block_out_channels)
        changes = {"heads": (1,) * len(wider)}
        assert not fits(replace_widths(shape, wider, **changes))
        assert not shape.attention[0], "never at the top resolution"


def replace_widths(shape: DenoiserPlan, widths: tuple[int, ...], **changes: object) -> DenoiserPlan:
    return validate(DenoiserPlan, shape.model_dump() | {"block_out_channels": widths} | changes, "test")


def test_the_ranking_is_parameters_times_layers(sd15: Model) -> None:
    def layers(shape: DenoiserPlan) -> int:
        """Down and up: resnets, and a transformer beside each where there is attention."""
        levels = zip(shape.layers, shape.attention, strict=True)
        row = sum((2 * n + 1) * (2 if attention else 1) for n, attention in levels)
        return row + (3 if shape.mid_block == "attention" else 0)

    found = search(sd15, macs=60 * 10**9)
    scores = [candidate.cost.parameters * layers(candidate.plan) for candidate in found]
    assert scores == sorted(scores, reverse=True)


def test_everything_fits_in_the_teachers_own_size() -> None:
    shape = plan(16, 32, attention=(False, True))
    teacher = replace(tiny_model(), denoiser=tiny_denoiser(shape))
    best = search(teacher, macs=cost(teacher.denoiser, teacher).macs)[0]
    assert best.plan == reshape(shape, (16, 32))


def test_attention_at_the_top_stays_where_there_is_no_other() -> None:
    teacher = replace(tiny_model(), denoiser=tiny_denoiser(plan(16, 32, attention=(True, False))))
    assert all(candidate.plan.attention == (True, False) for candidate in search(teacher, parameters=10**9))


def test_deep_transformers_may_be_halved() -> None:
    teacher = replace(tiny_model(), denoiser=tiny_denoiser(plan(16, 32, transformer_layers=(1, 5))))
    depths = {candidate.plan.transformers for candidate in search(teacher, parameters=10**9)}
    assert depths == {(1, 5), (1, 3)}


def test_nothing_is_small_enough(teacher: Model) -> None:
    with pytest.raises(RecipeError, match=r"the smallest has [\d,]+ MACs and [\d,]+ parameters: raise"):
        search(teacher, macs=1000)


def test_the_table_ends_with_a_plan_for_a_recipe(teacher: Model) -> None:
    found = search(teacher, parameters=100_000)
    table, _, text = search_table(found, teacher).partition("The first, for a recipe:")
    assert validate(DenoiserPlan, yaml.safe_load(text)["student"], "table") == found[0].plan
    lines = table.strip().splitlines()
    assert len(lines) == 2 + len(found)
    assert f"{cost(teacher.denoiser, teacher).macs:,}" in lines[1]
    for line, candidate in zip(lines[2:], found, strict=True):
        assert candidate.label in line
        assert f"{candidate.cost.parameters:,}" in line


@pytest.mark.parametrize(
    ("text", "amount"), [("60G", 60 * 10**9), ("1.5m", 1_500_000), ("800K", 800_000), ("12", 12), ("2T", 2 * 10**12)]
)
def test_amounts(text: str, amount: int) -> None:
    assert parse_amount(text, "--macs") == amount


@pytest.mark.parametrize("text", ["", "G", "lots", "-3G", "0", "nanG", "infM", "6 0 G"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(RecipeError, match="--macs"):
        parse_amount(text, "--macs")
