"""The loss of the window, the work done and the rates: the Trainer's values."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from harness.distributed.transfer import gather_numbers
from harness.errors import ConfigError, NonFiniteError
from harness.train import main
from harness.training.flags import MetricsConfig, StoppingConfig
from harness.training.metrics import Clock, NonFinite, Window, Work
from harness.training.state import TrainState
from tests.support.launching import DDP, flags, launcher, run
from tests.support.measuring.syncs import READS, Dispatched
from tests.support.parity import TRAINING, as_flags, history, reset

FINITE, BAD = [1.5, 0.7, 2.25, 1.1], [1.5, math.nan, 0.7, math.inf, 2.0, -math.inf]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def window(accelerator: Accelerator, losses: list[float], filters: bool) -> Window:
    """Each loss is a step of its own since the last report."""
    found = Window(accelerator, MetricsConfig(logging_nan_inf_filter=filters))
    for step, loss in enumerate(losses):
        found.add(torch.tensor(loss), steps_since_report=step)
    return found


def drained(found: Window) -> tuple[float, int]:
    return found.drain(gather_numbers(found.accelerator, found.values()))


def trainers(losses: list[float], filters: bool) -> float:
    """The lines of Trainer._run_epoch about `_tr_loss`."""
    total = torch.tensor(0.0)
    for step, value in enumerate(losses):
        loss = torch.tensor(value)
        if filters and (torch.isnan(loss) or torch.isinf(loss)):
            total += total / (1 + step)
        else:
            total += loss
    return total.item()


@pytest.mark.parametrize("losses", [FINITE, BAD, [math.nan], [math.nan, 1.0]], ids=str)
def test_filtered_loss_is_the_trainers(losses: list[float], accelerator: Accelerator) -> None:
    total, num_nonfinite = drained(window(accelerator, losses, filters=True))
    assert total == trainers(losses, filters=True)
    assert math.isfinite(total)
    assert num_nonfinite == sum(not math.isfinite(loss) for loss in losses)


def test_unfiltered_loss_shows_nan_and_counts_it(accelerator: Accelerator) -> None:
    total, num_nonfinite = drained(window(accelerator, BAD, filters=False))
    assert math.isnan(total)
    assert num_nonfinite == 3
    total, _ = drained(window(accelerator, FINITE, filters=False))
    assert total == trainers(FINITE, filters=False)


@pytest.mark.parametrize("filters", [True, False])
def test_a_nan_does_not_reach_the_next_report(filters: bool, accelerator: Accelerator) -> None:
    found = window(accelerator, BAD, filters)
    drained(found)
    assert found.undrained() == 0.0
    found.add(torch.tensor(1.25), steps_since_report=0)
    assert drained(found) == (1.25, 0)


def test_a_report_shows_this_ranks_norm_and_the_mean_of_all_ranks_losses(accelerator: Accelerator) -> None:
    found = Window(accelerator, MetricsConfig())
    others = {"loss": 0.5, "nonfinite_losses": 2.0, "grad_norm": 7.0}
    found.grad_norm = torch.tensor(0.1, dtype=torch.bfloat16)
    of_ranks = [*gather_numbers(accelerator, found.values()), others]
    found.add(torch.tensor(9.0), steps_since_report=0)
    assert found.drain(of_ranks) == (0.25, 2)
    assert found.last_step()["grad_norm"] == torch.tensor(0.1, dtype=torch.bfloat16).item()


def test_half_precision_losses_are_summed_in_float32(accelerator: Accelerator) -> None:
    found = Window(accelerator, MetricsConfig())
    for step in range(300):
        found.add(torch.tensor(1.0, dtype=torch.bfloat16), steps_since_report=step)
    assert drained(found)[0] == 300.0


def test_window_goes_on_where_it_was_saved(accelerator: Accelerator) -> None:
    whole, first = window(accelerator, FINITE, True), window(accelerator, FINITE[:2], True)
    first.grad_norm, first.learning_rate = torch.tensor(0.5), 1e-3
    second = Window(accelerator, MetricsConfig())
    second.load_state_dict(first.state_dict())
    assert second.last_step() == {"grad_norm": 0.5, "learning_rate": 1e-3}
    for step, loss in enumerate(FINITE[2:], start=2):
        second.add(torch.tensor(loss), steps_since_report=step)
    assert drained(second) == drained(whole)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_window_of_other_ranks_is_reported_as_theirs(ranks: int, accelerator: Accelerator) -> None:
    saved = [{"sums": torch.tensor([2.0 + i, 1.0 + i]), "grad_norm": 0.5, "learning_rate": 1e-3} for i in range(2)]
    reports = []
    for rank in range(ranks):
        found = Window(accelerator, MetricsConfig())
        found.accelerator = SimpleNamespace(is_main_process=rank == 0)  # type: ignore[assignment]
        found.load_state_dicts(saved)
        assert found.last_step() == {"grad_norm": 0.5, "learning_rate": 1e-3}
        reports.append(found.sums.tolist())
    assert [report[0] for report in reports] == [2.5] * ranks, "the mean over any number of ranks is theirs"
    assert sum(report[1] for report in reports) == 3, "each loss that was not finite is counted once"


@pytest.mark.parametrize("ranks", [1, 3])
def test_logged_outputs_of_other_ranks_are_reported_as_theirs(ranks: int, accelerator: Accelerator) -> None:
    """Of two steps on two ranks, whose micro-batches were 3/4 and 1/4 of the global batch; one had no target."""
    saved = []
    for value, part in ((2.0, torch.tensor(0.75)), (6.0, torch.tensor(0.25))):
        found = Window(accelerator, MetricsConfig(), ("penalty",))
        for _ in range(2):
            found.add_outputs({"penalty": torch.tensor(value, dtype=torch.bfloat16)}, part=part)
        found.add_outputs({"penalty": torch.tensor(math.nan)}, part=torch.tensor(0.0))
        saved.append(found.state_dict())
    of_ranks = []
    for rank in range(ranks):
        found = Window(accelerator, MetricsConfig(), ("penalty",))
        found.accelerator = SimpleNamespace(is_main_process=rank == 0)  # type: ignore[assignment]
        found.load_state_dicts(saved)
        of_ranks.append({name: float(value) for name, value in found.values().items()})
    assert found.mean_outputs(of_ranks, num_steps=2) == {"penalty": 3.0}


def test_saved_window_does_not_change_with_later_steps(accelerator: Accelerator) -> None:
    found = window(accelerator, FINITE, True)
    saved = found.state_dict()
    before = saved["sums"].clone()
    found.add(torch.tensor(9.0), steps_since_report=4)
    assert torch.equal(saved["sums"], before)


def work(accelerator: Accelerator, counts: str, pad: int | None = 0) -> tuple[Work, GPT2LMHeadModel]:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    config = MetricsConfig(include_num_input_tokens_seen=counts)
    return Work(model, config, accelerator, pad_token_id=pad), model


BATCH = {"input_ids": torch.tensor([[3, 4, 0], [5, 0, 0]])}
MASK = {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}


@pytest.mark.parametrize(
    ("counts", "mask", "pad", "expected"),
    [
        ("all", {}, 0, 6),
        ("true", {}, 0, 6),
        ("non_padding", {}, 0, 3),
        ("non_padding", MASK, 0, 4),
        ("non_padding", {}, None, 6),
    ],
)
def test_tokens_are_counted(
    counts: str, mask: dict[str, torch.Tensor], pad: int | None, expected: int, accelerator: Accelerator
) -> None:
    found, _ = work(accelerator, counts, pad)
    state = TrainState()
    for _ in range(2):
        found.add({**BATCH, **mask})
    found.settle_tokens(state)
    found.settle_tokens(state)
    found.settle(state)
    assert state.num_input_tokens_seen == 2 * expected


def test_operations_are_the_trainers_count(accelerator: Accelerator, tmp_path: Path) -> None:
    found, model = work(accelerator, "no")
    state = TrainState()
    found.add(BATCH)
    found.settle(state)
    found.settle(state)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert state.total_flos == Trainer(model=model, args=args).floating_point_ops(BATCH) > 0


def test_operations_of_several_ranks_are_added_in_float32_and_tokens_are_not(accelerator: Accelerator) -> None:
    found, _ = work(accelerator, "all")
    state = TrainState()
    found.add_to(state, [{"flos": 2.0**24 + 1, "tokens_seen": 2**24 + 1}, {"flos": 0.0, "tokens_seen": 2**53 + 1}])
    assert state.total_flos == 2.0**24
    assert state.num_input_tokens_seen == 2**24 + 2**53 + 2


def test_tokens_without_a_main_input_are_refused(accelerator: Accelerator) -> None:
    found, _ = work(accelerator, "all")
    with pytest.raises(ConfigError, match="a batch has no input_ids"):
        found.add({"pixel_values": torch.zeros(1)})


def test_unknown_count_is_refused() -> None:
    with pytest.raises(ConfigError, match="--include_num_input_tokens_seen=some is not known"):
        MetricsConfig(include_num_input_tokens_seen="some")


def test_rates_count_this_attempt_only() -> None:
    state = TrainState(global_step=10, num_input_tokens_seen=1000)
    clock = Clock(state)
    clock.started_at -= 10
    state.global_step, state.num_input_tokens_seen = 30, 1500
    rates = clock.rates(num_tokens=state.num_input_tokens_seen - clock.first_tokens)
    assert list(rates) == ["train_runtime", "train_tokens_per_second"]
    assert rates["train_tokens_per_second"] == pytest.approx(50, rel=0.01)


@pytest.mark.slow
def test_a_report_of_two_processes_is_one_collective(tmp_path: Path) -> None:
    short = {**TRAINING, "max_steps": 4, "logging_steps": 2, "include_num_input_tokens_seen": "non_padding"}
    command = ["-m", "tests.support.measuring.syncs", str(tmp_path / "count"), *flags(tmp_path / "run", short)]
    done = run([*launcher(DDP), *command, "--expect_num_processes", "2"], cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "count").read_text() == "2"
    (tokens,) = {event["num_input_tokens_seen"] for event in history(tmp_path / "run") if event["step"] == 4}
    assert 4 * 2 * 8 * 6 < tokens <= 4 * 2 * 8 * 32


# A step of such a size is finite, and nothing after it is.
DIVERGES = {
    "task": "tests.support.tasks.parity_task:build",
    "optim": "sgd",
    "learning_rate": 1e38,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 6,
    "logging_steps": 2,
    "report_to": "none",
    "use_cpu": True,
}


def diverged(folder: Path, **more: object) -> int:
    return main(as_flags({**DIVERGES, "output_dir": folder, **more}))


def test_a_loss_that_is_not_finite_is_shown_told_of_once_and_named_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diverged(tmp_path / "run") == 0
    shown = capsys.readouterr()
    reports = [line for line in shown.out.splitlines() if line.startswith("step ")]
    assert len(reports) == 3
    assert all("loss nan  grad_norm nan" in line for line in reports)
    assert shown.err.count("are not finite") == 1
    assert "The loss or the gradients of step 2 are not finite: lower --learning_rate" in shown.err
    assert re.search(r"^train +loss nan  train_loss nan  grad_norm nan", shown.out, re.MULTILINE)
    assert re.search(r"^not finite +loss or gradients of 5 of 6 steps, the first: 2$", shown.out, re.MULTILINE)
    losses = [row["loss"] for row in history(tmp_path / "run") if "loss" in row]
    assert all(map(math.isfinite, losses)), "rows keep the Trainer's value"


def test_so_many_steps_that_are_not_finite_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert diverged(out, stop_on_nonfinite=3, save_steps=1) == 1
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert "Stopped at step 4 of 6: the loss or the gradients of 3 steps in a row are not finite; the first" in shown
    assert "such step was 2. " in shown
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"], "the last one that is of any use"
    assert "checkpoint-2 is not written: its last step is not finite" in shown
    assert not (out / "model.safetensors").exists()


def test_fewer_steps_than_the_limit_end_no_training(tmp_path: Path) -> None:
    assert diverged(tmp_path / "run", stop_on_nonfinite=6, save_strategy="no") == 0


def test_the_count_of_steps_goes_on_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert diverged(out, max_steps=4, save_steps=4) == 0
    reset()
    capsys.readouterr()
    # At step 6 there are 5 in a row, of which the resumed attempt has seen 2.
    assert diverged(out, stop_on_nonfinite=5, save_strategy="no", resume_from_checkpoint="true") == 1
    assert "5 steps in a row are not finite; the first such step was 2." in capsys.readouterr().err


def test_a_limit_that_nothing_looks_at_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diverged(tmp_path / "run", stop_on_nonfinite=2, logging_strategy="no") == 2
    assert "--stop_on_nonfinite=2 looks at the steps in a report" in capsys.readouterr().err
    assert diverged(tmp_path / "run", stop_on_nonfinite=-1) == 2
    assert "--stop_on_nonfinite=-1" in capsys.readouterr().err


def nonfinite(accelerator: Accelerator, *, limit: int = 0, scales_loss: bool = False) -> NonFinite:
    return NonFinite(accelerator, StoppingConfig(stop_on_nonfinite=limit), scales_loss=scales_loss)


def step(steps: NonFinite, found: Window, *, loss: float = 1.0, norm: float = 1.0) -> None:
    found.add(torch.tensor(loss), steps_since_report=0)
    found.end_step(torch.tensor(norm), learning_rate=1e-3, nonfinite=steps)


BAD_STEPS = [3, 31, 32, 33, 34, 70]  # a word holds 32


def test_each_step_that_is_not_finite_is_found_on_whichever_rank_it_is(accelerator: Accelerator) -> None:
    of_ranks = []
    for rank in range(2):
        steps, found = nonfinite(accelerator), Window(accelerator, MetricsConfig())
        for number in range(1, 71):
            is_bad = number in BAD_STEPS[rank::2]
            step(steps, found, **({"loss": math.nan} if rank else {"norm": math.inf}) if is_bad else {})
            if number == 40:
                drained(found)  # a report begins the sums anew
        of_ranks.append({name: float(value) for name, value in steps.values().items()})
    assert [len(values) for values in of_ranks] == [3, 3]
    state = TrainState(global_step=170, max_steps=200)
    steps.add_to(state, of_ranks)
    assert (state.num_nonfinite_steps, state.first_nonfinite_step, state.nonfinite_steps_in_a_row) == (6, 103, 1)
    step(steps, found)
    state.global_step = 171
    steps.settle(state)
    assert (state.num_nonfinite_steps, state.nonfinite_steps_in_a_row) == (6, 0)


def test_steps_in_a_row_are_counted_over_reports(accelerator: Accelerator) -> None:
    steps, found = nonfinite(accelerator, limit=3), Window(accelerator, MetricsConfig())
    state = TrainState(max_steps=9)
    for norms in ([math.nan, math.nan, 1.0, math.nan], [math.nan]):
        for norm in norms:
            step(steps, found, norm=norm)
            state.global_step += 1
        steps.settle(state)
    assert not steps.may_save(state)
    step(steps, found, norm=math.nan)
    state.global_step += 1
    with pytest.raises(NonFiniteError, match=r"Stopped at step 6 of 9: .* 3 steps in a row .* first such step was 1"):
        steps.may_save(state)


def test_a_stop_saves_nothing_that_is_not_finite(accelerator: Accelerator) -> None:
    for limit in (0, 9):
        steps, found = nonfinite(accelerator, limit=limit), Window(accelerator, MetricsConfig())
        state = TrainState(global_step=1, max_steps=9)
        step(steps, found, loss=math.inf)
        with nullcontext() if limit == 0 else pytest.raises(NonFiniteError, match="the last step are not finite"):
            steps.check_last(state)
        assert steps.may_save(state) == (limit == 0)


def test_a_step_that_the_loss_scaler_skips_is_no_alarm_while_it_looks_for_its_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=True)
    accelerator = SimpleNamespace(device=torch.device("cpu"), scaler=scaler, is_main_process=True)
    steps = NonFinite(accelerator, StoppingConfig(), scales_loss=True)  # type: ignore[arg-type]
    found = Window(accelerator, MetricsConfig())  # type: ignore[arg-type]
    scaler.scale(torch.ones(()))  # makes its scale
    state = TrainState(global_step=1)
    for scale, loss, counts in ((4.0, 1.0, 0), (1.0, 1.0, 0), (0.5, 1.0, 1), (4.0, math.nan, 2)):
        scaler.update(scale)
        step(steps, found, loss=loss, norm=math.inf)
        steps.add_to(state, [{name: float(value) for name, value in steps.values().items()}])
        assert state.num_nonfinite_steps == counts


def test_a_step_costs_no_operation_but_one_in_so_many(accelerator: Accelerator) -> None:
    seen: list[str] = []
    steps, found = nonfinite(accelerator, limit=1), Window(accelerator, MetricsConfig())
    norm = torch.tensor(1.0)
    with Dispatched(lambda operation: seen.append(str(operation))):
        for _ in range(31):
            found.end_step(norm, learning_rate=1e-3, nonfinite=steps)
        assert seen == []
        found.end_step(norm, learning_rate=1e-3, nonfinite=steps)
    assert 0 < len(seen) <= 20
    assert not READS & {*seen}


def test_a_checkpoint_of_a_sound_training_has_no_word_of_steps_that_are_not_finite() -> None:
    assert not [name for name in TrainState().state_dict() if "nonfinite" in name]
    state = TrainState()
    state.load_state_dict(TrainState(num_nonfinite_steps=2, first_nonfinite_step=7).state_dict())
    assert (state.num_nonfinite_steps, state.first_nonfinite_step) == (2, 7)


@pytest.mark.slow
def test_two_ranks_end_together_where_steps_are_not_finite(tmp_path: Path) -> None:
    short = {**DIVERGES, "stop_on_nonfinite": 3, "save_steps": 1}
    argv = [name for name in flags(tmp_path / "run", short) if name != "--use_cpu"]
    done = run([*launcher(DDP), "-m", "harness", "train", *argv, "--expect_num_processes", "2"], cwd=tmp_path)
    assert done.code == 1
    assert done.err.count("harness train: Stopped at step 4 of 6") == 1
    assert "not on rank zero" not in done.err
    assert done.err.count("The loss or the gradients of step 2 are not finite") == 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
