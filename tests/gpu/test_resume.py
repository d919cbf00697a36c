"""A training that was killed, or stopped, goes on to the bit: dropout's generators, the scaler, the optimizer, W&B."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint.layout import SCALER_FILE, rng_file, why_invalid
from harness.distributed.backend import OPTIMIZER_FILE
from tests.gpu.conftest import NeedsCard
from tests.support.faulty_training import SAVES, STEPS, Training, committed
from tests.support.parity import TRAINING, assert_equal_runs, history, run_harness
from tests.support.wandb.seen import _untimed
from tests.support.wandb_server import RunRecord, WandbServer

SAVED, LAST = 5, 12
ARGUMENTS: dict[str, Any] = {
    **TRAINING,
    "max_steps": LAST,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "full_determinism": True,
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGUSR1")
PACE = 0.1


def going_on(whole: Path, folder: Path, device: str, **arguments: Any) -> Path:
    """The training from the first checkpoint of another, to its end."""
    shutil.copytree(whole / f"checkpoint-{SAVED}", folder / f"checkpoint-{SAVED}")
    run_harness(folder, {**ARGUMENTS, "resume_from_checkpoint": "true", **arguments}, device=device)
    return folder


def load(checkpoint: Path, name: str) -> Any:
    return torch.load(checkpoint / name, weights_only=False, map_location="cpu")  # it is ours


def assert_equal_state(expected: Path, found: Path, device: str) -> None:
    """What a checkpoint holds beside weights and history, which show no difference before the next step."""
    assert why_invalid(found) is None
    generators = [load(each, rng_file(0, 1)) for each in (expected, found)]
    for kind in ("cpu", *(("cuda",) if device == "cuda" else ())):
        assert torch.equal(*(each[kind] for each in generators)), kind
    assert generators[0]["python"] == generators[1]["python"]
    for name in (OPTIMIZER_FILE, SCALER_FILE):
        if (expected / name).exists():
            torch.testing.assert_close(load(found, name), load(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resume_is_exact(
    precision: str, device: str, tmp_path: Path, deterministic: None, needs_card: NeedsCard
) -> None:
    if precision == "fp16":
        needs_card("fp16")
    whole = tmp_path / "whole"
    run_harness(whole, {**ARGUMENTS, precision: True}, device=device)
    first, last = (whole / f"checkpoint-{step}" for step in (SAVED, LAST))
    if device == "cuda":
        assert not torch.equal(load(first, rng_file(0, 1))["cuda"], load(last, rng_file(0, 1))["cuda"]), (
            "dropout draws there"
        )
    assert (first / SCALER_FILE).is_file() == (precision == "fp16")
    again = going_on(whole, tmp_path / "again", device, **{precision: True})
    assert_equal_runs(whole, again)
    assert_equal_state(last, again / last.name, device)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("now_fused", [True, False], ids=["to the fused one", "from the fused one"])
def test_a_resume_steps_with_the_adamw_that_it_is_told(
    now_fused: bool, precision: str, device: str, tmp_path: Path, deterministic: None, needs_card: NeedsCard
) -> None:
    names = {True: "adamw_torch_fused", False: "adamw_torch"}
    if precision == "fp16":
        needs_card("fp16")
    whole = tmp_path / "whole"
    run_harness(whole, {**ARGUMENTS, precision: True, "optim": names[not now_fused]}, device=device)
    now = {precision: True, "optim": names[now_fused], "allow_changed_arguments": True}
    again = going_on(whole, tmp_path / "again", device, **now)
    for folder, fused in ((whole, not now_fused), (again, now_fused)):
        groups = load(folder / f"checkpoint-{LAST}", OPTIMIZER_FILE)["param_groups"]
        assert [bool(group["fused"]) for group in groups] == [fused] * len(groups)
    expected, found = ([event["loss"] for event in history(folder) if "loss" in event] for folder in (whole, again))
    assert found[:SAVED] == expected[:SAVED]
    assert found == pytest.approx(expected, rel=1e-3)  # the two kernels round each in its own way


def test_a_checkpoint_of_a_card_goes_on_without_one(device: str, tmp_path: Path, deterministic: None) -> None:
    arguments = {"task_args": {"dropout": 0.0}}  # the devices draw different numbers
    run_harness(tmp_path / "whole", {**ARGUMENTS, **arguments}, device=device)
    again = going_on(tmp_path / "whole", tmp_path / "again", "cpu", **arguments)
    expected, found = (
        [event["loss"] for event in history(folder) if "loss" in event] for folder in (tmp_path / "whole", again)
    )
    assert found[:SAVED] == expected[:SAVED]
    assert found == pytest.approx(expected, rel=1e-3)


# Killed, with W&B's server on this machine and each checkpoint sent there.


def killed(folder: Path, server: WandbServer, name: str, device: str) -> Training:
    """The training, which gets that signal in mid-training, and its next attempt, which ends."""
    given: dict[str, Any] = {"pace": PACE, "device": device, "bf16": True, "full_determinism": True}
    training = Training(folder, server, **given)
    training.reach(SAVES + 4)
    if name == "SIGKILL":
        while why_invalid(training.output_dir / f"checkpoint-{SAVES}") is not None:
            assert training.process.poll() is None, training.err[-3000:]
            time.sleep(0.02)
        os.killpg(training.process.pid, signal.SIGKILL)
        training.ended(-signal.SIGKILL)
    else:
        training.process.send_signal(getattr(signal, name))
        training.ended(85)
    return Training(folder, server, resume_from_checkpoint="true", **given).ended()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def trainings(
    server: WandbServer, device: str, processes: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[Training]]:
    """All at once, for they mostly wait: one that nothing happens to, and one for each signal."""
    folder = tmp_path_factory.mktemp("trainings")

    def undisturbed() -> Training:
        given: dict[str, Any] = {"pace": PACE, "device": device, "bf16": True, "full_determinism": True}
        return Training(folder / "undisturbed", server, **given).ended()

    with ThreadPoolExecutor() as pool:
        started = {name: pool.submit(killed, folder / name, server, name, device) for name in SIGNALS}
        return {"undisturbed": pool.submit(undisturbed), **started}


def run_of(training: Training, server: WandbServer) -> RunRecord:
    return server.run(training.run_id)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_killed_training_goes_on_to_the_bit_and_w_and_b_has_all_once(
    name: str, trainings: dict[str, Future[Training]], server: WandbServer, device: str
) -> None:
    whole, training = trainings["undisturbed"].result(), trainings[name].result()
    _, _, from_step = training.out.partition(f"Going on from {training.output_dir}/checkpoint-")
    stopped_at = int(from_step.partition(",")[0])
    assert stopped_at % SAVES == 0 if name == "SIGKILL" else SAVES < stopped_at < STEPS
    assert_equal_runs(whole.output_dir, training.output_dir)
    last = f"checkpoint-{STEPS}"
    assert_equal_state(whole.output_dir / last, training.output_dir / last, device)
    expected, run = run_of(whole, server), run_of(training, server)
    assert [_untimed(row) for row in run.rows] == [_untimed(row) for row in expected.rows]
    assert _untimed(run.summary) == _untimed(expected.summary)
    aliases = [alias for each in committed(server) if each.logged_by == run.id for alias in each.aliases]
    steps = sorted({*range(SAVES, STEPS + 1, SAVES), stopped_at})
    assert sorted(alias for alias in aliases if "_step_" in alias) == [f"checkpoint_global_step_{n}" for n in steps]
    assert aliases.count("final_model") == 1
