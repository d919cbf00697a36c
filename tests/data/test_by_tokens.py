"""Batches by tokens: what fits, divided once, in an order that a resume goes on with."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

import harness
from harness.config import Json
from harness.data.by_tokens import TokenBatches, TokenLimit
from harness.data.flags import DataConfig
from harness.data.loader import RankBatches, TrainLoader
from harness.data.position import converted, why_other_order
from harness.data.samples import Samples
from harness.errors import ConfigError
from harness.tasks import TaskConfig
from harness.training import rng
from tests.support.launching import DDP, SCRIPT, flags, launcher, run
from tests.support.parity import TRAINING, assert_equal_runs, history, run_harness
from tests.support.tasks import parity_task, recording_task


class Texts(Dataset):  # type: ignore[type-arg]
    """Samples by the lengths of their inputs and, with a second one, of their labels."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = [length if isinstance(length, tuple) else (length,) for length in lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        names = ("input_ids", "labels")
        return {name: [index] * length for name, length in zip(names, self.lengths[index], strict=False)}


def limit(max_tokens: int, **options: Any) -> TokenLimit:
    return TokenLimit(**{"max_tokens": max_tokens, "names": ("input_ids", "labels"), "seed": 3, **options})


def divided(lengths: Any, max_tokens: int, **options: Any) -> TokenBatches:
    return limit(max_tokens, **options).divide(Texts(lengths), column="length")


def cost(lengths: list[tuple[int, ...]], ranks: int) -> int:
    """The tokens of the largest share, were all padded to the longest."""
    return sum(max(each) for each in zip(*lengths, strict=True)) * -(-len(lengths) // ranks)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("keys", [1, 2])
def test_each_sample_is_in_one_batch_and_each_batch_holds_what_fits(keys: int, in_order: bool) -> None:
    generator = np.random.default_rng(0)
    compared = 0
    for size, longest, max_tokens, ranks in itertools.product((1, 2, 7, 60, 700), (3, 20), (40, 170), (1, 2, 3)):
        lengths = [tuple(map(int, row)) for row in generator.integers(1, longest, (size, keys))]
        batches = divided(lengths, max_tokens, in_order=in_order, num_ranks=ranks)
        found = [batches[i] for i in range(len(batches))]
        assert sorted(itertools.chain(*found)) == list(range(size))
        assert not in_order or list(itertools.chain(*found)) == list(range(size))
        for batch, following in zip(found, [*found[1:], []], strict=True):
            case = (size, longest, max_tokens, ranks, batch)
            share = -(-len(batch) // ranks)
            assert len(batch) % ranks == 0 or not following, case
            for rank in range(ranks):
                own = [lengths[i] for i in batch[rank * share : (rank + 1) * share]]
                assert not own or cost(own, 1) <= max_tokens, case
            with_more = [lengths[i] for i in (*batch, *following[:ranks])]
            assert len(following) < ranks or cost(with_more, ranks) > max_tokens, case
            compared += 1
    assert compared > 500


def test_samples_of_similar_length_come_together_and_ties_by_chance() -> None:
    lengths = [1 + i % 40 for i in range(4000)]
    batches = divided(lengths, 400)
    found = [batches[i] for i in range(len(batches))]
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in found)
    assert padded < 1.06 * sum(lengths)
    assert all(len({lengths[i] for i in batch}) <= 2 for batch in found[: len(found) // 2])
    assert divided(lengths, 400).digest == batches.digest
    assert divided(lengths, 400, seed=4).digest != batches.digest


def test_a_sample_that_fits_nowhere_and_samples_without_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max_tokens_per_batch=20: sample 1 has 21 tokens; give at least as many"):
        divided([(3, 4), (12, 9)], 20)
    rows = datasets.Dataset.from_dict({"pixels": [[1]]})
    with pytest.raises(
        ConfigError, match=r"--max_tokens_per_batch=20: samples have no input_ids.*--length_column_name"
    ):
        limit(20).divide(rows, column="length")
    sized = datasets.Dataset.from_dict({"pixels": [[1], [2], [3]], "size": [9, 8, 7]})
    assert [*map(len, [limit(20).divide(sized, column="size")[i] for i in range(2)])] == [2, 1]


LENGTHS = [1 + (7 * i) % 23 for i in range(90)]


def loader_of(**config: Any) -> TrainLoader:
    samples = Samples(dataset=Texts(LENGTHS), collate=as_ids, by_tokens=divided(LENGTHS, 60))
    options = DataConfig(max_tokens_per_batch=60, **config)
    return TrainLoader(samples, options, Accelerator(cpu=True), seed=42)


def as_ids(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"ids": torch.tensor([sample["input_ids"][0] for sample in samples])}


def ids(batches: Any) -> list[list[int]]:
    return [batch["ids"].tolist() for batch in batches]


def test_an_epoch_shuffles_the_batches_as_they_are_and_a_resume_goes_on_at_any() -> None:
    whole = loader_of()
    epochs = [ids(whole.epoch(epoch)) for epoch in range(3)]
    assert sorted(itertools.chain(*epochs[0])) == list(range(90))
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert whole.num_batches == len(epochs[0]) > 15
    for drawn in range(len(epochs[1])):
        first = loader_of()
        first.epoch_index = 1
        head = ids(itertools.islice(first.epoch(1), drawn))
        resumed = loader_of()
        resumed.load_state_dict(first.state_dict(), first.rng_state_dict(), rng.capture_host())
        assert head + ids(resumed.epoch(1)) == epochs[1]
        assert resumed.remaining == 0
    peeked = loader_of()
    assert ids([peeked.peek()]) == epochs[0][:1]
    assert ids(peeked.epoch(0)) == epochs[0]


def test_sequential_batches_come_in_the_datas_order() -> None:
    samples = Samples(dataset=Texts(LENGTHS), collate=as_ids, by_tokens=divided(LENGTHS, 60, in_order=True))
    config = DataConfig(max_tokens_per_batch=60, train_sampling_strategy="sequential")
    loader = TrainLoader(samples, config, Accelerator(cpu=True), seed=42)
    for epoch in (0, 1):
        assert list(itertools.chain(*ids(loader.epoch(epoch)))) == list(range(90))


def steps_from(where: dict[str, Any]) -> list[list[int]]:
    """The batches of the optimizer steps from a place to the end of the epoch, in their order."""
    count, processes = where["token_batches"], where["num_processes"]
    accumulation, start = where["gradient_accumulation_steps"], where["batches"]
    ranks = []
    for rank in range(processes):
        batches = RankBatches(count, 1, ranks=(rank, processes), drop_last=False)
        batches.begin(lambda: np.arange(count), start)
        ranks.append([[] if batches.is_repeated(start + i) else each for i, each in enumerate(batches)])
    rounds = [list(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]
    return [list(itertools.chain(*rounds[i : i + accumulation])) for i in range(0, len(rounds), accumulation)]


def position(accumulation: int, processes: int, **values: Any) -> dict[str, Any]:
    data = loader_of(gradient_accumulation_steps=accumulation).state_dict()
    return {**data, "num_processes": processes, **values}


def test_other_processes_with_as_many_batches_in_a_step_go_on_with_the_same_ones() -> None:
    layouts = [(1, 4), (2, 2), (4, 1)]
    for count, old, new in itertools.product((8, 9, 11), layouts, layouts):
        before, after = (position(*layout, token_batches=count) for layout in (old, new))
        assert why_other_order(before, after) == ""
        whole = steps_from(before)
        for step in range(len(whole) + 1):
            before["batches"] = min(step * old[0], -(-count // old[1]))
            after |= converted(before, after)
            assert steps_from(after) == whole[step:], (count, old, new, step)
    saved = position(2, 2)
    says = "a global batch of 4 batches by tokens: .* 2 processes .now 2 batches by tokens: "
    assert re.search(says, why_other_order(saved, position(2, 1)))
    assert why_other_order(saved, {**saved, "token_batches_digest": "f" * 16}).startswith("token_batches_digest ")
    without = {name: value for name, value in saved.items() if "token" not in name}
    assert why_other_order(without, saved) == "max_tokens_per_batch None (now 60)"
    assert why_other_order(saved, without) == "max_tokens_per_batch 60 (now None)"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_tokens_per_batch": 0}, "--max_tokens_per_batch=0"),
        ({"per_device_train_batch_size": 4}, "--per_device_train_batch_size=4 says nothing beside --max_tokens_per_b"),
        ({"per_device_eval_batch_size": 4}, "--per_device_eval_batch_size=4 says nothing beside --max_tokens_per_b"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length says nothing beside --max_tokens_per_batch"),
        ({"dataloader_drop_last": True}, "--dataloader_drop_last leaves out .* with --max_tokens_per_batch=64"),
        ({"overfit_batches": 2}, "--overfit_batches=2 counts batches of --per_device_train_batch_size samples"),
    ],
)  # fmt: skip
def test_flags_that_say_nothing_beside_batches_by_tokens_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**{"max_tokens_per_batch": 64, **values})


# Whole runs

TASK = "tests.support.tasks.recording_task:build"
ARGUMENTS = {
    **{name: value for name, value in TRAINING.items() if "batch_size" not in name},
    "max_tokens_per_batch": 128,
    "save_strategy": "steps",
    "save_steps": 7,
}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"loss_scaling": "trainer"}, "--loss_scaling=trainer takes means of batches' means"),
        ({"task_args": {"stream": True}, "max_steps": 2}, "divides the data by the lengths of all samples, and a str"),
    ],
)
def test_what_does_not_go_with_batches_by_tokens_is_refused(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    arguments = {**ARGUMENTS, "report_to": "none", "use_cpu": True, "output_dir": tmp_path / "out", **changed}
    options = Json(arguments.pop("task_args", {}))
    with pytest.raises(ConfigError, match=says):
        harness.run(as_flags(arguments), **own(options))


def as_flags(arguments: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in arguments.items()]


def own(options: Any = None) -> dict[str, Any]:
    """Model and data of the parity task as arguments of harness.run."""
    task = parity_task.build(TaskConfig(task_args=options))
    names = ("model", "train_dataset", "eval_dataset", "data_collator", "metrics")
    return {name: getattr(task, name) for name in names}


def train(folder: Path, arguments: dict[str, Any], *, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    if processes == 1:
        monkeypatch.setenv(recording_task.VARIABLE, str(folder))
        run_harness(folder / "run", arguments, task=TASK)
        return
    command = [
        *launcher(DDP),
        f"--num_processes={processes}",
        SCRIPT,
        *flags(folder / "run", {**arguments, "task": TASK}),
    ]
    ended = run(command, **{recording_task.VARIABLE: str(folder)})
    assert ended.code == 0, ended.err[-3000:]


def test_a_run_on_batches_by_tokens_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = (tmp_path / name for name in ("whole", "resumed"))
    train(whole, ARGUMENTS, processes=1, monkeypatch=monkeypatch)
    arguments = {**ARGUMENTS, "resume_from_checkpoint": whole / "run" / "checkpoint-7"}
    train(resumed, arguments, processes=1, monkeypatch=monkeypatch)
    assert_equal_runs(whole / "run", resumed / "run")
    batches = recording_task.recorded(whole, 1)[0]
    assert sorted(itertools.chain(*batches[: len(batches) // 2])) == list(range(117))
    assert recording_task.recorded(resumed, 1)[0] == batches[7:]


def test_an_evaluation_by_tokens_scores_what_one_in_batches_of_samples_does(tmp_path: Path) -> None:
    found = []
    for size in ("--per_device_eval_batch_size=8", "--max_tokens_per_batch=80"):
        flags_ = [size, "--max_steps=1", "--eval_on_start", "--report_to=none", "--use_cpu", "--save_strategy=no"]
        flags_.append(f"--output_dir={tmp_path / str(len(found))}")
        torch.manual_seed(0)
        rows = harness.run(flags_, **own()).state.log_history
        found.append({name: rows[0][name] for name in ("eval_loss", "eval_accuracy")})
        assert rows[0]["eval_samples_per_second"] > rows[0]["eval_steps_per_second"]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Predicted(parity_task.TokenAccuracy):
    """Predictions of what counts alone, which no padding changes."""

    def predictions(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.where(labels == -100, -100, logits.argmax(-1))


def described(predictions: Any) -> list[str]:
    return [" ".join(str(token) for token in row if token != -100) for row in predictions.tolist()]


def test_predictions_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    """Whatever the order of the batches: line N of predict_results.txt is of sample N."""
    texts = []
    ways = ("train_sampling_strategy=random", "train_sampling_strategy=group_by_length", "max_tokens_per_batch=80")
    for i, way in enumerate(ways):
        torch.manual_seed(0)
        task = {**own(), "metrics": Predicted, "describe_predictions": described}
        task["test_dataset"] = task["eval_dataset"]
        out = tmp_path / str(i)
        harness.run([f"--{way}", "--do_predict", f"--output_dir={out}", "--report_to=none", "--use_cpu"], **task)
        texts.append((out / "predict_results.txt").read_text(encoding="utf-8").splitlines())
    assert len(set(texts[0])) == 21
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_two_processes_then_one_then_two_have_the_same_batches_in_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = {"whole": (2, 2), "one": (4, 1), "two": (2, 2)}
    origin = {"one": "whole/run/checkpoint-2", "two": "one/run/checkpoint-4"}
    for name, (accumulation, processes) in layouts.items():
        arguments: dict[str, Any] = {**ARGUMENTS, "save_steps": 2, "gradient_accumulation_steps": accumulation}
        if name in origin:
            arguments["resume_from_checkpoint"] = tmp_path / origin[name]
        train(tmp_path / name, arguments, processes=processes, monkeypatch=monkeypatch)
        assert len(list((tmp_path / name).glob("rank-*"))) == processes
    first, second = recording_task.recorded(tmp_path / "whole", 2)
    (alone,) = recording_task.recorded(tmp_path / "one", 1)
    assert alone[:4] == [first[4], second[4], first[5], second[5]], "the batches of step 3"
    whole = history(tmp_path / "whole" / "run")
    assert len(whole) > 10
    for name in origin:
        for expected, found in zip(whole, history(tmp_path / name / "run"), strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
