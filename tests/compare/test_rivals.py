"""Rivals: what each computes, and that one small file is enough for another."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from refine_control.compare.rivals import find, known
from refine_control.compare.rivals.attention_transfer import attention
from refine_control.distill.alignment import Bridges
from refine_control.distill.stages import Seen, tri_level
from refine_control.errors import RecipeError, UserError
from refine_control.recipe import LossWeights

ALL = LossWeights(task=1, output=1, feature=1)


@pytest.fixture
def seen() -> Seen:
    torch.manual_seed(0)
    bridges = Bridges({"a": "b"}, {"a": (3, 4, 4)}, {"b": (5, 2, 2)})
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, :8] = 1
    draw = torch.randn
    return Seen(
        draw(2, 4, 8, 8, requires_grad=True), draw(2, 4, 8, 8), draw(2, 4, 8, 8), torch.ones(2), torch.ones(2), mask,
        {"a": draw(2, 3, 4, 4, requires_grad=True)}, {"b": draw(2, 5, 2, 2)}, bridges,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["attention-transfer", "cosine", "hole-only"])
def test_a_distillation_rival_names_the_terms_that_have_weights_and_teaches_the_student(name: str, seen: Seen) -> None:
    losses = find(name).losses
    assert losses is not None
    terms = losses(seen, ALL)
    assert set(terms) == {"task", "output", "feature"}
    torch.stack(list(terms.values())).sum().backward()
    assert seen.student["a"].grad is not None
    assert set(losses(replace(seen, bridges=None, taught=None), LossWeights(task=1))) == {"task"}


def test_attention_is_blind_to_scale_and_sees_where(seen: Seen) -> None:
    feature = torch.rand(1, 3, 4, 4)
    assert attention(3 * feature, (4, 4)).sub(attention(feature, (4, 4))).abs().max() < 1e-6
    assert attention(feature, (2, 2)).shape == (1, 4)
    losses = find("attention-transfer").losses
    assert losses is not None
    twin = replace(
        seen, teacher={"b": seen.student["a"]}, bridges=Bridges({"a": "b"}, {"a": (3, 4, 4)}, {"b": (3, 4, 4)})
    )
    assert losses(twin, ALL)["feature"].item() == pytest.approx(0, abs=1e-12)


def test_cosine_is_0_for_the_same_direction_and_2_for_the_opposite(seen: Seen) -> None:
    losses = find("cosine").losses
    assert losses is not None
    assert seen.bridges is not None
    bridged = seen.bridges(seen.student)["a"].detach()
    for factor, expected in ((7, 0), (-0.1, 2)):
        told = losses(replace(seen, teacher={"b": factor * bridged}), ALL)["feature"]
        assert told.item() == pytest.approx(expected, abs=1e-5)


def test_hole_only_looks_into_the_hole(seen: Seen) -> None:
    losses = find("hole-only").losses
    assert losses is not None
    assert seen.taught is not None
    outside = seen.predicted.detach().clone()
    outside[:, :, 4:] += 5
    assert losses(replace(seen, taught=outside), ALL)["output"].item() == 0
    inside = seen.predicted.detach().clone()
    inside[:, :, :4] += 5
    assert losses(replace(seen, taught=inside), ALL)["output"].item() == pytest.approx(5, rel=1e-5)
    assert losses(seen, ALL)["task"].equal(tri_level(seen, ALL)["task"])


def test_the_example_in_the_docs_is_a_rival(seen: Seen, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/evaluate.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_rival.py").write_text(code)
    losses = find("my-rival", [tmp_path / "my_rival.py"]).losses
    assert losses is not None
    assert seen.taught is not None
    gap = (seen.predicted - seen.taught).abs().mean()
    assert losses(seen, LossWeights(task=0.1, output=1))["output"].equal(gap)


@pytest.mark.parametrize("name", ["mean-fill", "telea", "navier-stokes", "biharmonic", "patchmatch"])
def test_a_rival_without_training_keeps_what_is_known_and_does_not_see_the_hole(name: str) -> None:
    fill = find(name).fill
    assert fill is not None
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 24, 24, generator=generator)
    masks = torch.zeros(2, 1, 24, 24)
    masks[:, :, 8:16, 6:14] = 1
    filled = fill(images, masks)
    assert torch.equal(filled[masks.expand_as(images) == 0], images[masks.expand_as(images) == 0])
    other = torch.where(masks.bool(), 1 - images, images)
    assert torch.equal(fill(other, masks), filled)


def test_the_feed_forward_network_does_not_see_the_hole_and_learns() -> None:
    made = find("feedforward").network
    assert made is not None
    network = made()
    batch = tiny.batch()
    painted = network.paint(batch.image, batch.mask)
    assert painted.shape == batch.image.shape
    other = torch.where(batch.mask.bool(), -batch.image, batch.image)
    assert torch.equal(network.paint(other, batch.mask), painted)
    network(batch)["task"].backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_picture_of_the_feed_forward_network_counts_alike_whatever_stands_beside_it() -> None:
    made, pictures = find("feedforward").network, tiny.batch(4)
    assert made is not None
    network = made()
    parts = [SimpleNamespace(image=pictures.image[i : i + 1], mask=pictures.mask[i : i + 1]) for i in range(4)]
    alone = torch.stack([network(part)["task"] for part in parts])
    assert alone.std() > 0
    assert alone.mean().item() == pytest.approx(network(pictures)["task"].item(), rel=1e-5)


def test_results_of_a_network_follow_that_which_it_is_built_on() -> None:
    base, larger = (known()[name].read_bytes() for name in ("feedforward", "feedforward-larger"))
    assert find("feedforward-larger").digest == hashlib.sha256(larger + base).hexdigest()
    assert find("feedforward").digest == hashlib.sha256(base).hexdigest()


def test_every_rival_defines_one_thing() -> None:
    for name in known():
        rival = find(name)
        assert sum(part is not None for part in (rival.losses, rival.fill, rival.network)) == 1


def test_a_rival_of_ones_own_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "my_rival.py"
    path.write_text("def losses(seen, weights):\n    return {'task': seen.predicted.abs().mean()}\n")
    rival = find("my-rival", [path])
    assert rival.losses is not None
    before = rival.digest
    path.write_text(path.read_text() + "# changed\n")
    assert find("my-rival", [path]).digest != before


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no rival 'magic'; there are: attention-transfer"):
        find("magic")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="defines nothing; it must define one of: losses, fill, Network"):
        find("empty", [tmp_path / "empty.py"])
    (tmp_path / "broken.py").write_text("import nowhere_at_all")
    with pytest.raises(UserError, match="cannot be run: ModuleNotFoundError: No module named 'nowhere_at_all'"):
        find("broken", [tmp_path / "broken.py"])
    with pytest.raises(UserError, match="cannot read rival"):
        find("gone", [tmp_path / "gone.py"])
