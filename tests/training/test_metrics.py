"""The loss of the window, the work done and the rates: the Trainer's values."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from harness.distributed.transfer import gather_numbers
from harness.errors import ConfigError
from harness.training.flags import MetricsConfig
from harness.training.metrics import Clock, Window, Work
from harness.training.state import TrainState
from tests.support.launching import DDP, flags, launcher, run
from tests.support.parity import TRAINING, history

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
