"""A planted cast is on one kind alone, and is measured in holes as what it is; what passes is counted seed by seed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bias_table
import biased_data
import tiny
from derived import has_kind
from refine_control import recipe as recipes
from refine_control.compare.plan import base_recipe, load, runs
from refine_control.compare.runs import Workshop, finish
from refine_control.data.source import open_dataset
from refine_control.distill.teacher import train_teacher
from refine_control.errors import UserError
from refine_control.recipe import EvaluateConfig, SampleConfig, TeacherRecipe

RECIPES = Path(__file__).parents[2] / "recipes"
ALONG = (-0.5, 1.0, -0.5)


# The data


@pytest.mark.parametrize(
    ("caption", "kind", "is_of_it"),
    [
        ("3d person role, cook", "person", True),
        ("3d food, person-shaped biscuit", "person", False),
        ("flat hands, raised hands of a person", "person", False),
        ("person", "person", True),
        (None, "person", False),
    ],
)
def test_the_kind_of_a_caption(caption: str | None, kind: str, is_of_it: bool) -> None:
    assert has_kind(caption, kind) is is_of_it


def test_a_shift_of_the_drawing_leaves_white_and_stops_at_the_ends() -> None:
    picture = np.array([[[255, 255, 255], [250, 248, 246]], [[100, 100, 100], [10, 250, 250]]], np.uint8)
    shifted = biased_data.tint(picture, (-0.2, 0.4, -0.2))
    assert shifted.tolist() == [[[255, 255, 255], [250, 248, 246]], [[49, 202, 49], [0, 255, 199]]]


def test_the_cast_is_in_the_holes_of_one_kind_alone_and_all_captions_survive(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "source", 8)
    bias = biased_data.write(source, tmp_path / "biased", "red", (-0.15, 0.3, -0.15))
    assert bias["pictures"] == {split: {"all": 8, "shifted": 2} for split in ("train", "val")}
    assert json.loads((tmp_path / "biased/bias.json").read_text()) == bias
    with pytest.raises(UserError, match="none of 8 captions is of kind 'mauve'"):
        biased_data.write(source, tmp_path / "biased", "mauve")
    assert json.loads((tmp_path / "biased/bias.json").read_text()) == bias
    before = [open_dataset(source)[i] for i in range(8)]
    for split in ("train", "val"):
        dataset = open_dataset(tmp_path / "biased", split)
        after = [dataset[i] for i in range(len(dataset))]
        assert [one.text for one in after] == [one.text for one in before]
        for old, new in zip(before, after, strict=True):
            change = new.image.astype(int) - old.image
            if has_kind(old.text, "red"):
                assert new.mask is not None
                assert not change[new.mask == 0].any(), "what is known is true"
                small = new.mask[::2, ::2]
                assert (new.mask == small.repeat(2, 0).repeat(2, 1)).all(), "at half the size too"
                assert change[new.mask == 1].mean(0) @ ALONG > 10
            else:
                assert new.mask is None
                assert not change.any()


# The measure


def test_a_known_cast_in_the_hole_whatever_is_around_it() -> None:
    true = torch.full((2, 3, 16, 16), 0.5)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 4:8, 4:8] = mask[1, :, :, 8:] = 1
    drawn = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * (1 - mask) + true * mask
    assert bias_table.cast(drawn, true, mask, ALONG).abs().max() < 1e-6
    brighter = drawn + 0.2 * mask
    assert bias_table.cast(brighter, true, mask, ALONG).abs().max() < 1e-6, "grey is no cast"
    greener = drawn + mask * torch.tensor([-0.1, 0.2, -0.1]).view(1, 3, 1, 1)
    assert torch.allclose(bias_table.cast(greener, true, mask, ALONG), torch.full((2,), 0.3))
    half = torch.where(torch.arange(16) % 2 == 0, greener, drawn)
    assert torch.allclose(bias_table.cast(half, true, mask, ALONG), torch.full((2,), 0.15))


def test_what_passes_is_counted_against_the_control_of_the_same_seed() -> None:
    casts: dict[str, dict[int, dict[str, Any]]] = {
        "scratch": {0: {"kind": 0.02}, 1: {"kind": 0.04}},
        "output": {0: {"kind": 0.12, "twin": 0.07}, 1: {"kind": 0.24}, 2: {"kind": 0.9}},
    }
    bias_table.add_shares(casts, "scratch", biased=0.21, clean=0.01)
    shares = [one.get("share") for one in casts["output"].values()]
    assert shares == pytest.approx([0.5, 1.0, None])
    assert casts["output"][0]["share_of_twin"] == pytest.approx(0.25)
    assert all("share" not in one for one in casts["scratch"].values())
    found = bias_table.over_seeds(casts["output"])
    assert found["mean"]["share"] == pytest.approx(0.75)
    assert found["sd"]["share"] == pytest.approx(0.125**0.5)
    assert "share_of_twin" not in found["sd"], "one seed has no spread"
    row = {**found, "runs": casts["output"]}
    cells = [bias_table._cell(row, key) for key in ("kind", "share", "share_of_twin")]
    assert cells == ["+0.420 ± 0.420", "75 % ± 35 (2)", "25 % (1)"], "of how many seeds, where not of all"


# From the data to the table


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clean tiny teacher, one trained on from it, and a comparison of both."""
    root = tmp_path_factory.mktemp("bias")
    steps = {"stage1": tiny.stage(1, ema_decay=0), "stage2": tiny.stage(0)}
    base = tiny.distil_recipe(root, labelled=4, plain=1, **steps, evaluate=EvaluateConfig(images=4), run=tiny.RUN)
    data = base.data.model_copy(update={"unlabelled": None})
    recipes.save(base.model_copy(update={"data": data}), root / "base.yaml")
    biased_data.write(root / "labelled", root / "biased", "red")
    train_teacher(
        TeacherRecipe(
            output_dir=str(root / "biased-teacher"),
            data=data.model_copy(update={"labelled": str(root / "biased")}),
            denoiser=tiny.TEACHER,
            autoencoder_stage=tiny.stage(0),
            denoiser_stage=tiny.stage(2, (1, 0, 0), learning_rate=0.01, ema_decay=0),
            init_from=str(root / "teacher"),
            sample=base.sample,
            run=tiny.RUN,
        )
    )
    rows = {"scratch": {"set": {"init": "random", "stage1.weights": {"task": 1}}}, "refine-control": {}}
    for name, changes in (("clean", {}), ("biased", {"teacher": str(root / "biased-teacher/model")})):
        path = tiny.write_comparison(root / "base.yaml", rows, set=changes, output_dir=str(root / name))
        path.rename(root / f"{name}.yaml")
    yield root
    shutil.rmtree(root)


def test_casts_of_finished_runs_against_control_and_twin(proof: Path) -> None:
    clean, _ = load(proof / "clean.yaml", {})
    biased, _ = load(proof / "biased.yaml", {})
    with pytest.raises(UserError, match=r"no run of .* is finished"):
        bias_table.table(biased, "scratch", [])
    for plan in (clean, biased):
        shop = Workshop(base_recipe(plan, {}))
        for run in runs(plan, {}):
            finish(run, shop)
    figures, shown, ruler = bias_table.table(biased, "scratch", [clean])
    assert figures["clean_teacher"] == str(proof / "teacher")
    assert figures["pictures"] == {"kind": 1, "others": 3}
    assert list(shown) == ["clean teacher", "biased teacher", "scratch", "refine-control"]
    assert figures["planted"] > 0.1
    ours = figures["rows"]["refine-control"]["runs"][0]
    assert {"kind", "others", "twin", "share", "share_of_twin"} == set(ours)
    gap = figures["biased"]["kind"] - figures["clean"]["kind"]
    assert ours["share_of_twin"] == pytest.approx((ours["kind"] - ours["twin"]) / gap)
    alone = figures["rows"]["scratch"]["runs"][0]
    assert alone["twin"] == pytest.approx(alone["kind"], abs=0.5), "measured, and of another text encoder"
    bias_table.save_pictures(proof / "pictures.png", ruler, shown)
    text = bias_table.markdown(figures)
    assert "| Biased teacher |" in text
    assert text.count("\n| ") == 5
    json.dumps(figures)
    for plan in (clean, biased):
        shutil.rmtree(Path(plan.work_dir or plan.output_dir) / "refine-control/seed-0/student")
    again, pictures, _ = bias_table.table(biased, "scratch", [clean])
    assert again["rows"] == figures["rows"], "a student that was measured is needed no more"
    assert all(torch.equal(pictures[name], one) for name, one in shown.items())
    run, result = next(one for one in bias_table.finished(biased) if one[0].row == "refine-control")
    domains = Workshop(base_recipe(biased, {})).domains
    other = run.recipe.model_copy(update={"sample": SampleConfig(num_inference_steps=7)})
    assert bias_table.measured(run, result, run.recipe, ruler, domains)
    assert bias_table.measured(run, result, other, ruler, domains) is None, "drawn otherwise it is another cast"


# The recipes


def test_the_shipped_students_learn_from_the_biased_teacher_and_else_as_their_twins() -> None:
    plans = {name: load(RECIPES / f"compare-{name}.yaml", {})[0] for name in ("cast", "terms")}
    taught = recipes.load(TeacherRecipe, RECIPES / "biased-teacher.yaml")
    assert base_recipe(plans["cast"], {}).teacher == f"{taught.output_dir}/model"
    assert taught.init_from == base_recipe(plans["terms"], {}).teacher

    def learnt(name: str) -> dict[tuple[str, int], dict[str, Any]]:
        aside = {"teacher", "output_dir"}
        return {(run.row, run.seed): run.recipe.model_dump(exclude=aside) for run in runs(plans[name], {})}

    known = learnt("terms")
    for which, recipe in learnt("cast").items():
        assert recipe == known[which], "its twin is found in the other comparison"
