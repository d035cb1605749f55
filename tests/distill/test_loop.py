"""The loop learns, logs what it says, averages, and goes on after any interruption as if there had been none."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from refine_control.data.batch import Batch
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Model
from refine_control.diffusion.taps import feature_shapes
from refine_control.distill import checkpoint, loop
from refine_control.distill.alignment import Bridges, automatic_map
from refine_control.distill.loop import Losses, train
from refine_control.distill.optimizer import learning_rate
from refine_control.distill.processes import pick_device, refuse_processes, set_threads
from refine_control.distill.stages import Distillation
from refine_control.errors import DataError, Interrupted, RecipeError, UserError
from refine_control.recipe import RunConfig, StageConfig
from refine_control.student.plan import probe
from tiny import RUN, STUDENT, batch, loader, stage, tiny_denoiser

ONE = batch(2)
STRICT = {"max_skipped_steps": 0}
SAVED_OFTEN = RUN.model_copy(update={"checkpoint_every": 2})


class Toy(nn.Module):
    """A vector that learns two goals; what each step asks is drawn from its batch's seed."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -2.0, 2.0, 0.5]))
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)
        self.seen: list[Tensor] = []  # the weights at the start of each step

    def forward(self, batch: Batch) -> Losses:
        self.seen.append(self.x.detach().clone())
        goal = torch.randn(4, generator=batch.generator())
        return {"near": (self.x - goal).square().mean(), "small": self.x.square().sum()}


def numbered(step: int, part: int = 0, parts: int = 1) -> Batch:
    return replace(ONE, seed=step)


def toy(
    folder: Path, model: Toy, weights: tuple[float, float] = (1, 0.1), run: RunConfig = RUN, **changes: object
) -> Toy:
    config = stage(**{"learning_rate": 0.1, **changes})
    train(folder, model, dict(zip(("near", "small"), weights, strict=True)), numbered, config, run)
    return model


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def newest(folder: Path) -> dict[str, dict[str, Tensor]]:
    (path,) = (folder / "checkpoints").iterdir()
    return {name: load_file(path / f"{name}.safetensors") for name in ("trainable", "ema", "optimizer")}


def no_seconds(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "waited")} for line in lines]


def interrupted_at(step: int, objective: nn.Module, error: type[BaseException]) -> None:
    calls = iter(range(10**6))

    def stop(*_: object) -> None:
        if next(calls) == step:
            raise error

    objective.register_forward_pre_hook(stop)


def distillation(teacher: Model, config: StageConfig, cache_gb: float = 1e-12) -> Distillation:
    """Of a tiny student, always the same. By default its encoder keeps nothing, so that all runs compute alike."""
    student = tiny_denoiser(STUDENT, seed=1)
    shapes = [feature_shapes(network, probe(teacher)) for network in (student, teacher.denoiser)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bridges = Bridges(automatic_map(*shapes), *shapes)
    return Distillation(student, teacher, bridges, Encoder(teacher, cache_gb), config)


def distilled(teacher: Model, folder: Path, run: RunConfig, stop_at: int = 10**6) -> dict[str, Tensor]:
    """Five steps of all three terms on mixed rows."""
    config = stage(steps=5, ema_decay=0.5, learning_rate=1e-3)
    objective = distillation(teacher, config)
    interrupted_at(stop_at, objective, KeyboardInterrupt)
    train(folder, objective, config.weights.model_dump(), loader(4, 0.5), config, run)
    return objective.state_dict()


# It learns


def test_a_student_learns_one_batch(teacher: Model, tmp_path: Path) -> None:
    config = stage(steps=25, learning_rate=3e-3, caption_dropout=0)
    objective = distillation(teacher, config, cache_gb=0.1)
    train(tmp_path, objective, config.weights.model_dump(), lambda *_: batch(4, 0.5), config, RUN)
    log = log_of(tmp_path)
    assert len(log) == 25
    for term in ("loss", "task", "output", "feature"):
        assert log[-1][term] < 0.8 * log[0][term], term
    assert not objective.student.training


def test_only_what_requires_gradients_moves(tmp_path: Path) -> None:
    model = toy(tmp_path, Toy())
    assert not torch.equal(model.x, Toy().x)
    assert torch.equal(model.still, torch.ones(2))


def test_the_first_step_is_adams(tmp_path: Path) -> None:
    """Adam's first step is the learning rate, against the gradient's sign; AdamW shrinks the weights beside it."""
    toy(tmp_path, Toy(), weights=(0, 1), steps=1, learning_rate=0.04, warmup_steps=4, weight_decay=0.5)
    before = Toy().x.detach()
    expected = before * (1 - 0.01 * 0.5) - 0.01 * before.sign()
    torch.testing.assert_close(newest(tmp_path)["trainable"]["x"], expected)


# What it logs


def test_the_log_names_terms_sum_rate_and_gradients(tmp_path: Path) -> None:
    run = RUN.model_copy(update={"grad_norm_every": 2})
    config = {"steps": 5, "learning_rate": 0.1, "warmup_steps": 2}
    model = toy(tmp_path, Toy(), (1, 0.1), run, **config)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    for line in log:
        assert line["loss"] == pytest.approx(line["near"] + 0.1 * line["small"])
        assert line["lr"] == learning_rate(line["step"] - 1, stage(**config))
        assert ("grad_norm/near" in line) == ("grad_norm/small" in line) == (line["step"] in (1, 3, 5))
    x, goal = model.seen[0], torch.randn(4, generator=numbered(0).generator())
    near, small = (x - goal) * 2 / 4, 2 * x
    assert log[0]["near"] == pytest.approx((x - goal).square().mean().item())
    assert log[0]["grad_norm/near"] == pytest.approx(near.norm().item())
    assert log[0]["grad_norm/small"] == pytest.approx(small.norm().item())
    assert log[0]["grad_norm"] == pytest.approx((near + 0.1 * small).norm().item())


def test_it_logs_as_seldom_as_asked(tmp_path: Path) -> None:
    toy(tmp_path, Toy(), run=RUN.model_copy(update={"log_every": 3}), steps=7)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 3, 6]


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Adam does not see a gradient's size, but its second moment does."""
    toy(tmp_path, Toy(), weights=(0, 1), steps=1, max_grad_norm=0.5)
    second_moment = newest(tmp_path)["optimizer"]["0.exp_avg_sq"]
    assert second_moment.sum().item() == pytest.approx(0.01 * 0.5**2, rel=1e-3)
    assert log_of(tmp_path)[0]["grad_norm"] == pytest.approx(2 * Toy().x.norm().item())


def test_the_learning_rate_warms_up_then_falls_as_a_cosine() -> None:
    config = stage(steps=110, learning_rate=0.2, warmup_steps=10, final_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.02 * (step + 1) for step in range(10)])
    assert rates[10] == max(rates) == 0.2
    assert rates[60] == pytest.approx((0.2 + 0.02) / 2), "half way down, half way through"
    assert rates[110] == pytest.approx(0.02)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, stage(steps=5, learning_rate=0.2)) == 0.2
    assert learning_rate(2, stage(steps=3, learning_rate=0.2, warmup_steps=6)) == pytest.approx(0.1)


@pytest.mark.parametrize("passes", [2, 4])
def test_passes_that_share_a_batch_learn_what_the_whole_batch_teaches(
    teacher: Model, tmp_path: Path, passes: int
) -> None:
    whole, shared = (
        distilled(teacher, tmp_path / str(n), run=RUN.model_copy(update={"gradient_accumulation_steps": n}))
        for n in (1, passes)
    )
    start = {f"student.{key}": value for key, value in tiny_denoiser(STUDENT, seed=1).state_dict().items()}
    for key, value in start.items():
        assert (shared[key] - whole[key]).norm() < 0.02 * (whole[key] - value).norm(), key
    first, second = (log_of(tmp_path / str(n)) for n in (1, passes))
    for ours, theirs in zip(first, second, strict=True):
        assert {k: ours[k] for k in ("loss", "task", "output", "feature", "grad_norm")} == pytest.approx(
            {k: theirs[k] for k in ("loss", "task", "output", "feature", "grad_norm")}, rel=1e-4
        )


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    run = RUN.model_copy(update={"gradient_accumulation_steps": 3})
    with pytest.raises(RecipeError, match="batch_size 4 does not divide into 1 processes x 3 gradient_accumulation"):
        toy(tmp_path, Toy(), run=run)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_change_nothing(teacher: Model, tmp_path: Path, workers: int) -> None:
    one, other = (
        distilled(teacher, tmp_path / str(n), run=RUN.model_copy(update={"workers": n})) for n in (1, workers)
    )
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


# Averaged weights


def test_the_averaged_weights_are_what_is_left(tmp_path: Path) -> None:
    """The average begins at the first step's result; its decay grows as (1 + k) / (10 + k) up to the recipe's."""
    model = toy(tmp_path, Toy(), steps=8, ema_decay=0.3)
    states = [*model.seen[1:], newest(tmp_path)["trainable"]["x"]]
    average = states[0]
    for k, state in enumerate(states[1:], 1):
        decay = min(0.3, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * state
    torch.testing.assert_close(model.x.detach(), average)
    assert not torch.equal(model.x, states[-1])
    assert torch.equal(newest(tmp_path)["ema"]["0"], model.x)
    assert torch.equal(toy(tmp_path / "none", Toy(), steps=8, ema_decay=0).x, states[-1])


def test_previews_see_the_average_and_leave_no_trace(tmp_path: Path) -> None:
    quiet, shown = Toy(), Toy()
    previews: dict[str, Tensor] = {}

    def preview(path: Path) -> None:
        assert not shown.training
        previews[path.name] = shown.x.detach().clone()

    run = SAVED_OFTEN.model_copy(update={"preview_every": 2})
    config = stage(steps=5, learning_rate=0.1)
    weights = {"near": 1, "small": 0.1}
    train(tmp_path / "shown", shown, weights, numbered, config, run, preview)
    train(tmp_path / "quiet", quiet, weights, numbered, config, run)
    assert list(previews) == ["preview-000002.png", "preview-000004.png", "preview-000005.png"]
    assert torch.equal(previews["preview-000005.png"], shown.x)
    assert torch.equal(shown.x, quiet.x)
    assert all(torch.equal(a, b) for a, b in zip(shown.seen, quiet.seen, strict=True))


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_interrupted_and_run_again_equals_uninterrupted(tmp_path: Path, at: int, error: type[BaseException]) -> None:
    whole = toy(tmp_path / "whole", Toy(), run=SAVED_OFTEN, steps=7)
    half = Toy()
    interrupted_at(at, half, error)
    with pytest.raises(error):
        toy(tmp_path / "half", half, run=SAVED_OFTEN, steps=7)
    again = toy(tmp_path / "half", Toy(), run=SAVED_OFTEN, steps=7)
    assert len(again.seen) == 7 - at // 2 * 2, "it goes on from the checkpoint, not from the start"
    assert torch.equal(again.x, whole.x)
    assert no_seconds(log_of(tmp_path / "half")) == no_seconds(log_of(tmp_path / "whole"))
    for name, tensors in newest(tmp_path / "whole").items():
        for key, tensor in tensors.items():
            assert torch.equal(newest(tmp_path / "half")[name][key], tensor), f"{name} {key}"


def test_a_distillation_interrupted_equals_uninterrupted(teacher: Model, tmp_path: Path) -> None:
    """All three terms, mixed rows, bridges: bit by bit. The encoder keeps nothing, so that both compute alike."""
    whole = distilled(teacher, tmp_path / "whole", SAVED_OFTEN)
    with pytest.raises(KeyboardInterrupt):
        distilled(teacher, tmp_path / "half", SAVED_OFTEN, stop_at=3)
    again = distilled(teacher, tmp_path / "half", SAVED_OFTEN)
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    assert no_seconds(log_of(tmp_path / "half")) == no_seconds(log_of(tmp_path / "whole"))
    assert newest(tmp_path / "whole").keys() == newest(tmp_path / "half").keys()


def test_a_power_cut_takes_no_line_that_a_checkpoint_knows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not synced is gone then."""
    on_disk: dict[str, bytes] = {}
    monkeypatch.setattr(loop, "sync", lambda path: on_disk.update({path.name: path.read_bytes()}))
    true, saved = checkpoint.save, []

    def save(folder: Path, step: int, state: checkpoint.State) -> None:
        written = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
        assert on_disk == written
        saved.append(step)
        true(folder, step, state)

    monkeypatch.setattr(checkpoint, "save", save)
    toy(tmp_path, Failing(0, 4), run=SAVED_OFTEN, steps=6)
    assert saved == [2, 4, 6]
    assert set(on_disk) == {"losses.jsonl", "skipped.jsonl"}


def test_seconds_go_on_after_an_interruption(tmp_path: Path) -> None:
    half = Toy()
    interrupted_at(4, half, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, half, run=SAVED_OFTEN, steps=6)
    lines = log_of(tmp_path)
    lines[-1]["seconds"] = 1000.0
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    toy(tmp_path, Toy(), run=SAVED_OFTEN, steps=6)
    assert [line["seconds"] > 1000 for line in log_of(tmp_path)] == [False, False, False, False, True, True]


def test_time_spent_waiting_for_data_is_logged(tmp_path: Path) -> None:
    def slow(step: int, part: int, parts: int) -> Batch:
        time.sleep(0.02)
        return numbered(step)

    run = RUN.model_copy(update={"workers": 0})
    train(tmp_path, Toy(), {"near": 1, "small": 0.1}, slow, stage(steps=5), run)
    waited = [line["waited"] for line in log_of(tmp_path)]
    assert all(later - earlier >= 0.02 for earlier, later in pairwise(waited))
    assert all(line["waited"] <= line["seconds"] for line in log_of(tmp_path))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    done = toy(tmp_path, Toy(), steps=4)
    lines = log_of(tmp_path)
    again = toy(tmp_path, Toy(), steps=4)
    assert again.seen == []
    assert torch.equal(again.x, done.x)
    assert log_of(tmp_path) == lines


def test_killed_while_it_pruned_the_rest_goes_with_the_next_run(tmp_path: Path) -> None:
    toy(tmp_path, Toy(), steps=4)
    torn = tmp_path / "checkpoints" / "step-000002"
    torn.mkdir()
    (torn / "ema.safetensors").write_bytes(b"")
    toy(tmp_path, Toy(), steps=4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    toy(tmp_path, Toy(), steps=4)
    assert len(toy(tmp_path, Toy(), steps=6).seen) == 2
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


ODD = ['{"step": 1}', '{"step": 1e999, "seconds": 1}', '{"step": 1, "seconds": "x"}', '{"step": 1, "seconds": NaN}']
ODD += ['{"step": null}', '{"step": "1", "seconds": 1}', '{"step": 1, "seconds": 1, "waited": []}', "[" * 50_000]
ODD += [f'{{"step": 1, "seconds": 1{"0" * 400}}}']


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "lo', b"\0\0\0\n", b"\xff\n[1]\n7\n", *(f"{line}\n".encode() for line in ODD)]
)
def test_torn_and_odd_lines_of_the_log_do_not_stop_a_resume(tmp_path: Path, torn: bytes) -> None:
    """What a power cut in the middle of a write leaves behind."""
    half = Toy()
    interrupted_at(3, half, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, half, run=SAVED_OFTEN, steps=5)
    with open(tmp_path / "losses.jsonl", "ab") as log:
        log.write(torn)
    toy(tmp_path, Toy(), run=SAVED_OFTEN, steps=5)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_term_and_pictures(tmp_path: Path, bad: float) -> None:
    model = Toy()
    true = model.forward
    model.forward = lambda b: true(b) if b.seed != 3 else {**true(b), "near": torch.tensor(bad, requires_grad=True)}
    with pytest.raises(UserError) as caught:
        toy(tmp_path, model, run=SAVED_OFTEN.model_copy(update=STRICT), steps=6)
    assert str(caught.value).startswith(
        f"step 3: loss or gradient is not finite (loss = {bad:g}, near = {bad:g}, small"
    )
    (line,) = skipped_in(tmp_path)
    assert line["pictures"] == list(ONE.keys)
    assert line["losses"]["near"] == str(bad)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert newest(tmp_path)["trainable"]["x"].isfinite().all()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = Toy()

    def spoil(_: nn.Module, inputs: tuple[Batch]) -> None:
        if inputs[0].seed == 3:
            model.x.data[2] = torch.inf

    model.register_forward_pre_hook(spoil)
    with pytest.raises(UserError, match=r"after step 4 weights are not finite; .* learning rate, 0.1, is too high"):
        toy(tmp_path, model, run=SAVED_OFTEN, steps=6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert newest(tmp_path)["trainable"]["x"].isfinite().all()


def skipped_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


class Failing(Toy):
    """Its loss is not finite in some steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, batch: Batch) -> Losses:
        terms = super().forward(batch)
        return {**terms, "near": terms["near"] * torch.nan} if batch.seed in self.steps else terms


def test_a_step_that_is_not_finite_is_left_out_and_named(tmp_path: Path) -> None:
    model = toy(tmp_path, Failing(1, 3), run=SAVED_OFTEN, steps=6)
    assert [torch.equal(*pair) for pair in pairwise([*model.seen, model.x])][1:4:2] == [True, True]
    assert [line["step"] for line in skipped_in(tmp_path)] == [1, 3]
    assert [line["step"] for line in log_of(tmp_path)] == [1, 3, 5, 6]
    assert newest(tmp_path)["trainable"]["x"].isfinite().all()
    assert newest(tmp_path)["ema"]["0"].isfinite().all()


def test_the_allowance_counts_what_was_skipped_before_an_interruption(tmp_path: Path) -> None:
    run = SAVED_OFTEN.model_copy(update={"max_skipped_steps": 2})
    half = Failing(1, 3, 5)
    interrupted_at(5, half, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, half, run=run, steps=8)
    with pytest.raises(UserError, match=r"step 5: .* as in 2 steps before"):
        toy(tmp_path, Failing(1, 3, 5), run=run, steps=8)
    more = run.model_copy(update={"max_skipped_steps": 3})
    toy(tmp_path, Failing(1, 3, 5), run=more, steps=8)
    assert [line["step"] for line in skipped_in(tmp_path)] == [1, 3, 5]
    whole = toy(tmp_path / "whole", Failing(1, 3, 5), run=more, steps=8)
    assert torch.equal(newest(tmp_path)["trainable"]["x"], newest(tmp_path / "whole")["trainable"]["x"])
    assert whole.x.isfinite().all()


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_saves_it(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    model = Toy()
    true = model.forward
    model.forward = lambda b: (signal.raise_signal(number) if b.seed == 2 else None, true(b))[1]
    with pytest.raises(Interrupted) as stopped:
        toy(tmp_path / "half", model, steps=6)
    assert stopped.value.number == number
    assert signal.getsignal(number) == before
    assert (tmp_path / "half" / "checkpoints" / "step-000003").is_dir()
    again, whole = toy(tmp_path / "half", Toy(), steps=6), toy(tmp_path / "whole", Toy(), steps=6)
    assert len(again.seen) == 3
    assert torch.equal(again.x, whole.x)
    assert no_seconds(log_of(tmp_path / "half")) == no_seconds(log_of(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, number: int) -> None:
    code = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from distill.test_loop import Toy, toy
model = Toy()
true = model.forward
def forward(b):
    if b.seed == 2:
        signal.raise_signal({int(number)})
        signal.raise_signal({int(number)})
        print("still here")
    return true(b)
model.forward = forward
toy(Path({str(tmp_path)!r}), model, steps=6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -number, done.stderr
    assert "stopping after this step; once more stops at once" in done.stderr
    assert "still here" not in done.stdout
    assert not (tmp_path / "checkpoints").exists()


def test_memory_that_runs_out_names_the_step_and_what_takes_less(tmp_path: Path) -> None:
    model = Toy()
    true = model.forward
    model.forward = lambda b: true(b) if b.seed != 3 else {**true(b), "near": torch.empty(2**60).sum()}
    with pytest.raises(UserError, match=r"step 3: out of memory .* double run\.gradient_accumulation_steps"):
        toy(tmp_path, model, run=SAVED_OFTEN, steps=6)
    assert newest(tmp_path)["trainable"]["x"].isfinite().all()
    assert len(toy(tmp_path, Toy(), run=SAVED_OFTEN, steps=6).seen) == 4


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path: Path) -> None:
    """The loss is finite: 0 times infinity comes up on the way back only."""
    model = Toy()
    true = model.forward
    model.forward = lambda b: true(b) if b.seed != 3 else {**true(b), "near": (model.x * 0).sqrt().sum()}
    toy(tmp_path, model, run=SAVED_OFTEN, steps=6)
    assert [line["step"] for line in skipped_in(tmp_path)] == [3]
    assert model.x.isfinite().all()


# Half precision and eight bits


class Wide(Toy):
    """As Toy, with a matrix large enough that bitsandbytes keeps its moments in eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 4 * 2048).reshape(4, 2048))

    def forward(self, batch: Batch) -> Losses:
        terms = super().forward(batch)
        return {**terms, "small": terms["small"] + (self.x @ self.matrix).square().mean()}


class Overflowing(Wide):
    """Its gradient overflows in half precision at a scale of 65536, 32768 and 16384: three steps are left out."""

    def forward(self, batch: Batch) -> Losses:
        terms = super().forward(batch)
        return {**terms, "near": terms["near"] + 4 * self.x.half().float().sum()}


class Square(Toy):
    """As Toy, with a matrix large enough that Muon counts it as one."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 16 * 16).reshape(16, 16))

    def forward(self, batch: Batch) -> Losses:
        terms = super().forward(batch)
        return {**terms, "small": terms["small"] + (self.x.repeat(4) @ self.matrix).square().mean()}


@pytest.mark.parametrize(
    ("kind", "change", "optimizer"),
    [
        (Wide, {"use_8bit_adam": True}, "adamw"),
        (Overflowing, {"mixed_precision": "fp16"}, "adamw"),
        (Square, {}, "muon"),
    ],
    ids=["8 bits", "fp16", "muon"],
)
def test_an_interrupted_run_equals_one_that_was_not(
    tmp_path: Path, kind: type[Wide | Square], change: dict[str, object], optimizer: str
) -> None:
    changes = {"run": SAVED_OFTEN.model_copy(update=change), "steps": 7, "max_grad_norm": 10, "optimizer": optimizer}
    whole = toy(tmp_path / "whole", kind(), **changes)
    half = kind()
    interrupted_at(5, half, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "half", half, **changes)
    again = toy(tmp_path / "half", kind(), **changes)
    assert len(again.seen) == 3
    assert torch.equal(again.x, whole.x)
    assert torch.equal(again.matrix, whole.matrix)
    assert no_seconds(log_of(tmp_path / "half")) == no_seconds(log_of(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_is_no_fault_of_the_scale(tmp_path: Path) -> None:
    """Also in the step after one that overflowed, which is usual at the start."""
    model = Overflowing()
    true = model.forward
    model.forward = lambda b: true(b) if b.seed != 1 else {**true(b), "near": (model.x * torch.nan).sum()}
    with pytest.raises(UserError, match="step 1: loss or gradient is not finite"):
        toy(tmp_path, model, run=RUN.model_copy(update={"mixed_precision": "fp16", **STRICT}), steps=6)


def test_one_process_has_nothing_to_share(tmp_path: Path) -> None:
    plain = toy(tmp_path / "plain", Toy(), steps=3)
    shard = toy(tmp_path / "shard", Toy(), run=RUN.model_copy(update={"shard": True}), steps=3)
    assert torch.equal(plain.x, shard.x)


def test_a_run_does_not_go_on_with_another_optimiser(tmp_path: Path) -> None:
    toy(tmp_path, Wide(), steps=2)
    with pytest.raises(DataError, match=r"was written with run\.use_8bit_adam false; go on with that"):
        toy(tmp_path, Wide(), run=RUN.model_copy(update={"use_8bit_adam": True}), steps=4)


def test_a_scale_too_large_costs_steps_not_the_run(tmp_path: Path) -> None:
    """A gradient of 4 in half precision: 4 x 65536, 4 x 32768 and 4 x 16384 overflow, 4 x 8192 does not."""
    model = Toy()
    true = model.forward
    model.forward = lambda b: {**true(b), "near": 4 * model.x.half().float().sum()}
    fp16 = RUN.model_copy(update={"mixed_precision": "fp16"})
    toy(tmp_path, model, run=fp16, steps=6)
    assert torch.equal(model.seen[3], model.seen[0]), "a step that overflows changes nothing"
    assert not torch.equal(model.seen[-1], model.seen[0])
    assert ["grad_norm" in line for line in log_of(tmp_path)] == [False] * 3 + [True] * 3


# Devices and threads


def test_a_device_that_does_not_exist() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UserError, match=r"run\.device = 'abacus' is no device; give auto, cpu"):
        pick_device("abacus")
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match=rf"run\.device = '{absent}' but torch sees {torch.cuda.device_count()} GPUs"):
        pick_device(absent)


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for processes in ("1", "4", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        set_threads(RunConfig())
    assert given == [8, 2, 1]


def test_what_is_one_processs_work_is_refused_to_several(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_processes("compare")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="compare runs as one process, only distill is shared by several"):
        refuse_processes("compare")


def test_threads_are_a_setting() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(RunConfig(num_threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
