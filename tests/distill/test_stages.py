"""Batch in, named losses out: who learns, who does not, and which rows teach what."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from refine_control.data.batch import Batch
from refine_control.data.table import Steps
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.taps import feature_shapes
from refine_control.distill.alignment import Bridges, automatic_map
from refine_control.distill.stages import Distillation, teacher_features
from refine_control.errors import RecipeError
from refine_control.plans import DenoiserPlan
from refine_control.recipe import StageConfig
from refine_control.student.plan import probe
from tiny import STUDENT, batch, loader, plan, stage, tiny_denoiser, tiny_model


def bridged(student: Denoiser, teacher: Model) -> Bridges:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours, theirs = (feature_shapes(network, probe(teacher)) for network in (student, teacher.denoiser))
        return Bridges(automatic_map(ours, theirs), ours, theirs)


def terms_of(teacher: Model, config: StageConfig, rows: Batch, student: Denoiser | None = None) -> dict[str, Tensor]:
    student = student or tiny_denoiser(STUDENT, seed=1)
    return Distillation(student, teacher, bridged(student, teacher), Encoder(teacher, 0.1), config)(rows)


def test_a_stage_of_few_steps_asks_at_their_timesteps_alone() -> None:
    teacher, student = tiny_model().freeze(), tiny_denoiser(STUDENT, seed=1)
    encoder, two, one = Encoder(teacher, 0.1), stage(num_inference_steps=2), stage(num_inference_steps=1)
    learning = Distillation(student, teacher, bridged(student, teacher), encoder, two)
    asked: dict[str, list[int]] = {"student": [], "teacher": []}
    student.register_forward_hook(lambda _, inputs, __: asked["student"].extend(inputs[1].tolist()))
    teacher.denoiser.register_forward_hook(lambda _, inputs, __: asked["teacher"].extend(inputs[1].tolist()))
    learning(batch(4))
    assert {name: sorted(t) for name, t in asked.items()} == {name: [499, 499, 999, 999] for name in asked}
    asked["teacher"].clear()
    assert list(teacher_features((), teacher, encoder, one, [batch(4)])) == [{}]
    assert asked["teacher"] == [999] * 4, "the norms of features are of these too"


def test_min_snr_that_silences_all_that_is_learnt_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"snr_gamma 5\.0 gives the timesteps of num_inference_steps 1 no weight"):
        terms_of(tiny_model().freeze(), stage(num_inference_steps=1, snr_gamma=5), batch(2))


def runs_of(network: nn.Module) -> list[None]:
    runs: list[None] = []
    network.register_forward_hook(lambda *_: runs.append(None))
    return runs


@pytest.mark.parametrize("labelled_fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    "shape", [STUDENT, plan(8, 16, mid_block="none"), plan(8, 16, 16)], ids=["same", "no mid", "deeper"]
)
def test_every_student_parameter_learns_and_no_teacher_parameter(shape: DenoiserPlan, labelled_fraction: float) -> None:
    teacher, student = tiny_model().freeze(), tiny_denoiser(shape, seed=1)
    bridges = bridged(student, teacher)
    networks = {"denoiser": teacher.denoiser, "vae": teacher.vae, "text": teacher.text_encoder}
    before = {(n, k): v.clone() for n, network in networks.items() for k, v in network.state_dict().items()}
    learning = [*student.named_parameters(prefix="student"), *bridges.named_parameters(prefix="bridges")]
    optimizer = torch.optim.AdamW([p for _, p in learning], lr=0.1)

    terms = Distillation(student, teacher, bridges, Encoder(teacher, 0.1), stage())(batch(4, labelled_fraction))
    assert set(terms) == {"task", "output", "feature"}
    torch.stack(list(terms.values())).sum().backward()
    assert [name for name, p in learning if p.grad is None or not p.grad.any()] == []
    assert [p for network in networks.values() for p in network.parameters() if p.grad is not None] == []

    optimizer.step()
    for network_name, network in networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[network_name, key]), f"{network_name}.{key}"
        assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("term", ["output", "feature"])
def test_each_teachers_term_alone_reaches_the_module_too(teacher: Model, term: str) -> None:
    student = tiny_denoiser(STUDENT, seed=1)
    config = stage(weights=(0, term == "output", term == "feature"))
    terms = terms_of(teacher, config, batch(), student)
    assert list(terms) == [term]
    terms[term].backward()
    for part in (student.foundation, student.module):
        assert part.conv_in.weight.grad.any()


def test_from_scratch_never_runs_the_teacher() -> None:
    teacher, student = tiny_model().freeze(), tiny_denoiser(STUDENT, seed=1)
    bridges, encoder = bridged(student, teacher), Encoder(teacher, 0.1)
    runs = runs_of(teacher.denoiser)
    scratch, distilled = (
        Distillation(student, teacher, bridges, encoder, stage(weights=w)) for w in ((1, 0, 0), (1, 1, 1))
    )
    assert set(scratch(batch())) == {"task"}
    assert not runs
    distilled(batch())
    assert len(runs) == 1, "once for both terms"


def test_no_hook_is_left_on_either_network() -> None:
    teacher, student = tiny_model().freeze(), tiny_denoiser(STUDENT, seed=1)
    terms_of(teacher, stage(), batch(), student)
    assert not any(module._forward_hooks for n in (teacher.denoiser, student) for module in n.modules())


def test_a_student_that_is_its_teacher_has_no_output_loss(teacher: Model) -> None:
    terms = terms_of(teacher, stage(weights=(1, 1, 0)), batch(), tiny_denoiser(seed=0))
    assert terms["output"] == 0
    assert terms["task"] > 0


def test_the_same_batch_gives_the_same_losses(teacher: Model) -> None:
    student = tiny_denoiser(STUDENT, seed=1)
    losses = Distillation(student, teacher, bridged(student, teacher), Encoder(teacher, 0.1), stage())
    torch.manual_seed(1)
    first = losses(batch(4, 0.5))
    torch.manual_seed(2)
    assert losses(batch(4, 0.5)) == first
    assert losses(replace(batch(4, 0.5), seed=7))["task"] != first["task"]


def test_what_is_kept_does_not_depend_on_its_neighbours(teacher: Model) -> None:
    """After a resume the memory is empty, and rows are computed beside others than before: equal up to rounding."""
    whole = batch(4)
    warm = Encoder(teacher, 0.1)
    for row in range(4):
        warm.latents(loader(4)(0, row, 4))
        warm.text([whole.captions[row]])
    cold = Encoder(teacher, 0.1)
    torch.testing.assert_close(warm.latents(whole), cold.latents(whole), rtol=0, atol=1e-5)
    torch.testing.assert_close(warm.text(whole.captions), cold.text(whole.captions), rtol=0, atol=1e-5)


def changed(rows: Batch, which: Tensor) -> Batch:
    """Other pictures in the rows where `which` is true."""
    image = torch.where(which[:, None, None, None], -rows.image.flip(-2), rows.image)
    return replace(rows, image=image)


@pytest.mark.parametrize("on_unlabelled", [True, False])
def test_plain_rows_take_the_task_term_only_if_asked(teacher: Model, on_unlabelled: bool) -> None:
    rows, config = batch(4, 0.5), stage(task_on_unlabelled=on_unlabelled)
    plain = changed(rows, ~rows.labelled)
    before, after = terms_of(teacher, config, rows), terms_of(teacher, config, plain)
    assert (before["task"] != after["task"]) == on_unlabelled
    assert before["output"] != after["output"], "the teacher's terms take every row"
    assert before["feature"] != after["feature"]
    assert before["task"] != terms_of(teacher, config, changed(rows, rows.labelled))["task"]


@pytest.mark.parametrize(("on_unlabelled", "learns"), [(True, True), (False, False)])
def test_the_task_gradient_of_plain_rows(teacher: Model, on_unlabelled: bool, learns: bool) -> None:
    student = tiny_denoiser(STUDENT, seed=1)
    task = terms_of(teacher, stage(task_on_unlabelled=on_unlabelled), batch(4, 0.0), student)["task"]
    gradients = torch.autograd.grad(task, list(student.parameters()))
    assert any(g.any() for g in gradients) == learns


def seen_captions(teacher: Model, config: StageConfig, rows: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    seen: list[tuple[str, ...]] = []
    true: Callable = Encoder.text
    monkeypatch.setattr(Encoder, "text", lambda self, captions: seen.append(tuple(captions)) or true(self, captions))
    terms_of(teacher, config, rows)
    (captions,) = seen
    return captions


def test_plain_rows_get_the_empty_prompt(teacher: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batch(4, 0.5)
    captions = seen_captions(teacher, stage(caption_dropout=0), rows, monkeypatch)
    assert captions == rows.captions
    assert [caption == "" for caption in captions] == (~rows.labelled).tolist()


def test_the_hole_weighs_more_in_the_task_and_output_terms_alone(teacher: Model) -> None:
    plain, weighed = (terms_of(teacher, stage(hole_weight=w), batch()) for w in (1.0, 9.0))
    assert weighed["task"] != plain["task"]
    assert weighed["output"] != plain["output"]
    assert weighed["feature"] == plain["feature"]


def test_min_snr_weighs_the_terms_down(teacher: Model) -> None:
    plain, weighed = (terms_of(teacher, stage(snr_gamma=gamma), batch()) for gamma in (None, 1.0))
    assert 0 < weighed["task"] < plain["task"]
    assert 0 < weighed["output"] < plain["output"]
    assert weighed["feature"] == plain["feature"]


def test_what_the_teacher_made_of_a_step_is_kept_for_the_next_student(teacher: Model, tmp_path: Path) -> None:
    """Bit by bit as when it was made, and the teacher is not run again; another step is another one."""
    rows, other = batch(4, 0.5), batch(4, 0.5, seed=1)
    runs = runs_of(teacher.denoiser)

    def losses_of(rows: Batch, weights: tuple = (1, 1, 1)) -> dict[str, Tensor]:
        student, kept = tiny_denoiser(STUDENT, seed=1), Steps(tmp_path, "teacher", {}, 1.0)
        config, encoder = stage(weights=weights), Encoder(teacher, 0.1)
        return Distillation(student, teacher, bridged(student, teacher), encoder, config, kept)(rows)

    made = losses_of(rows)
    assert len(runs) == 1 + 1, "one to know its shapes"
    found = losses_of(rows)
    assert len(runs) == 2 + 1
    assert {name: term.item() for name, term in made.items()} == {name: term.item() for name, term in found.items()}
    plain = terms_of(teacher, stage(), rows)
    assert {name: term.item() for name, term in made.items()} == pytest.approx(
        {name: term.item() for name, term in plain.items()}, rel=1e-3
    )
    count = len(runs)
    assert losses_of(rows, (1, 1, 0))["output"] == made["output"], "another run that needs less of it"
    assert len(runs) == count + 1
    count = len(runs)
    losses_of(other)
    assert len(runs) == count + 2
