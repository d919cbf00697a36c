"""The comparison sees a lost row, a double one, a changed bit, a missing checkpoint; and nothing where nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.writer import Checkpoints, Content
from harness.training import rng
from tests.faults.compare import Verdict, compare_rows, compare_runs, compare_word, without_first_end
from tests.faults.plan import FIRST_END, STEPS

LAST = f"checkpoint-{STEPS}"


def make_run(folder: Path, *, weight: float = 1.0, momentum: float = 1.0, generator: int = 7) -> Path:
    """What a run leaves, as far as it is compared, its last checkpoint by the real writer."""
    weights = {"weight": torch.full((4,), weight)}
    history = [{"loss": 0.1 * step, "step": step, "train_runtime": 3.0} for step in range(1, 4)]
    state = {
        "global_step": STEPS,
        "log_history": history,
        "best_model_checkpoint": str(folder / LAST),
        "best_metric": 0.1,
        "epoch": 2.0,
    }
    checkpoints = Checkpoints(
        folder,
        CheckpointConfig(),
        ranks=(0, 1),
        agree=lambda error: None if error is None else str(error),
        gather=lambda value: [value],
        meet=lambda _: None,
    )
    checkpoints.save(
        Content(
            step=STEPS,
            weights=weights,
            write_model=lambda path, tensors: save_file(dict(tensors), path / "model.safetensors"),
            files={
                "optimizer.pt": {
                    "state": {0: {"momentum_buffer": torch.full((4,), momentum)}},
                    "param_groups": [{"lr": 0.1, "params": [0]}],
                },
                "scheduler.pt": {"last_epoch": STEPS},
            },
            trainer_state=state,
            rank_state={**rng.capture_host(), "cpu": torch.Generator().manual_seed(generator).get_state()},
            shared={},
        )
    )
    checkpoints.check_last()
    save_file(weights, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def compared(tmp_path: Path, spoil: Callable[[Path], Any], **values: Any) -> dict[str, int]:
    expected, found = make_run(tmp_path / "expected"), make_run(tmp_path / "found", **values)
    spoil(found)
    verdict = Verdict()
    compare_runs(expected, found, processes=1, verdict=verdict)
    assert len(verdict.details) == len(verdict.counts)
    assert verdict.is_good == (not verdict.counts)
    return dict(verdict.counts)


def change_state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")


def nothing(_: Any) -> None:
    """Leave it as it is."""


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SPOILT: dict[str, tuple[Callable[[Path], Any], dict[str, int]]] = {
    "nothing": (nothing, {}),
    "the clock": (lambda run: change_state(run, lambda it: it["log_history"][0].update(train_runtime=9.0)), {}),
    "a bit of the weights": (lambda run: flip(run / "model.safetensors"), {"diverged": 1}),
    "the last bit of a loss": (
        lambda run: change_state(run, lambda it: it["log_history"][1].update(loss=0.2 + 2**-55)),
        {"diverged": 1},
    ),
    "an event less": (lambda run: change_state(run, lambda it: it["log_history"].pop()), {"diverged": 1}),
    "an event twice": (
        lambda run: change_state(run, lambda it: it["log_history"].append(it["log_history"][-1])),
        {"diverged": 1},
    ),
    "another best": (lambda run: change_state(run, lambda it: it.update(best_metric=0.2)), {"diverged": 1}),
    "a counter is missing": (lambda run: change_state(run, lambda it: it.pop("epoch")), {"diverged": 1}),
    "no last checkpoint": (lambda run: shutil.rmtree(run / LAST), {"checkpoints": 1}),
    "a damaged checkpoint": (lambda run: flip(run / LAST / "optimizer.pt"), {"checkpoints": 1}),
    "an older one is damaged": (
        lambda run: flip(shutil.copytree(run / LAST, run / "checkpoint-55") / "model.safetensors"),
        {"checkpoints": 1},
    ),
    "a leftover": (lambda run: (run / "checkpoint-40.partial").mkdir(), {"leftovers": 1}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_differs_between_two_runs_is_counted(what: str, tmp_path: Path) -> None:
    spoil, counts = SPOILT[what]
    assert compared(tmp_path, spoil) == counts


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({"weight": 1.0 + 2**-23}, {"diverged": 1, "checkpoints": 1}),
        ({"momentum": 1.0 + 2**-23}, {"checkpoints": 1}),
        ({"generator": 8}, {"checkpoints": 1}),
    ],
    ids=str,
)
def test_a_state_that_was_saved_otherwise_is_counted(
    values: dict[str, Any], counts: dict[str, int], tmp_path: Path
) -> None:
    assert compared(tmp_path, nothing, **values) == counts


def rows() -> list[dict[str, Any]]:
    """Five rows; the fourth step has two of them."""
    reports = [{"train/global_step": step, "train/loss": 0.5 * step, "_step": i} for i, step in enumerate((2, 4, 6, 8))]
    evaluation = {"train/global_step": 4, "eval/loss": 0.7, "eval/runtime": 0.1, "_timestamp": 5.0, "_step": 4}
    return [*reports[:2], evaluation, *reports[2:]]


ROWS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], dict[str, int]]] = {
    "nothing": (nothing, {}),
    "the clock": (lambda found: found[2].update({"eval/runtime": 8.0, "_timestamp": 9.0}), {}),
    "a row is lost": (lambda found: found.pop(1), {"rows_missing": 1}),
    "the evaluation of a step is lost": (lambda found: found.pop(2), {"rows_missing": 1}),
    "all are lost": (lambda found: found.clear(), {"rows_missing": 5}),
    "a row is double": (lambda found: found.append(dict(found[0])), {"rows_double": 1}),
    "a row is there three times": (lambda found: found.extend([found[0], found[0]]), {"rows_double": 2}),
    "a row of a step that never was": (lambda found: found.append({"train/global_step": 99}), {"rows_double": 1}),
    "a value": (lambda found: found[1].update({"train/loss": 2.0 + 2**-51}), {"rows_differing": 1}),
    "a name": (lambda found: found[1].update({"train/more": 1}), {"rows_missing": 1, "rows_double": 1}),
    "the order": (lambda found: found.insert(0, found.pop()), {"rows_disordered": 1}),
}


@pytest.mark.parametrize("what", ROWS)
def test_what_differs_between_rows_is_counted(what: str) -> None:
    spoil, counts = ROWS[what]
    found, verdict = rows(), Verdict()
    spoil(found)
    compare_rows(rows(), found, verdict=verdict)
    assert dict(verdict.counts) == counts


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ("run  5 rows, all confirmed by the server", {}),
        ("6 rows, all confirmed by the server", {"false_word": 1}),
        ("4 rows, all confirmed by the server", {"false_word": 1}),
        ("3 of 5 rows confirmed by the server; deliver the rest: harness sync out", {}),
        ("6 of 7 rows confirmed by the server; deliver the rest: harness sync out", {"false_word": 1}),
        ("", {"false_word": 1}),
    ],
)
def test_what_the_end_says_is_compared_with_the_server(said: str, counts: dict[str, int]) -> None:
    verdict = Verdict()
    compare_word(said, rows(), verdict=verdict)
    assert dict(verdict.counts) == counts


def test_the_first_end_of_an_extended_run_may_be_there_once() -> None:
    end = {"train/global_step": FIRST_END, "train/epoch": 2, "_step": 9}
    for number, counts in ((0, {}), (1, {}), (2, {"rows_double": 1})):
        verdict = Verdict()
        assert without_first_end([*rows(), *[end] * number], verdict=verdict) == rows()
        assert dict(verdict.counts) == counts
