"""Trainings that `wandb agent` starts: folders, parameters, stops, preemptions, and the death of the agent."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.launching import DDP, free_port
from tests.support.wandb.sweeps import Sweep, end, flags, script, steps_of
from tests.support.wandb_server import WandbServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PARAMETERS = {
    "learning_rate": {"values": [1e-3, 2e-3]},
    "lr_scheduler_type": {"value": "cosine_with_restarts"},
    "lr_scheduler_kwargs": {"parameters": {"num_cycles": {"value": 2}}},
    "logging_first_step": {"value": True},
    "wandb_tags": {"value": ["a", "b"]},
    "weight_decay": {"value": 0.1},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_grid_has_a_folder_and_each_row_once_a_run_and_a_stop_in_the_app_saves(
    server: WandbServer, tmp_path: Path
) -> None:
    """And what the command line overrules, or W&B, is said."""
    typed = ["--wandb_project", "another", "--weight_decay", "0.2"]
    folder = tmp_path / "grid"
    with Sweep(folder, server, PARAMETERS, script(*flags(folder, pace=0.15, learning_rate=None), *typed)) as sweep:
        agent = sweep.agent()
        stopped = sweep.reach(1, 12)
        server.request_stop(stopped, "grid")
        assert sweep.ended(agent) == 0
    first, second = sweep.runs
    assert (first.state, first.exit_code, steps_of(first)) == ("finished", 0, [*range(1, 31)])
    assert (second.state, second.exit_code, second.preempting) == ("finished", 0, False)
    assert second.id == stopped
    last = max(steps_of(second))
    assert steps_of(second) == [*range(1, last + 1)]
    assert 12 <= last < 30
    assert f"Stopped from the W&B app at step {last} of 30: saved" in sweep.said
    assert (sweep.output_dir(stopped) / f"checkpoint-{last}" / "harness_state.json").is_file()
    assert not [*folder.rglob("preempted")]
    for run, rate in ((first, 1e-3), (second, 2e-3)):
        values = yaml.safe_load((sweep.output_dir(run.id) / "harness_config.yaml").read_text(encoding="utf-8"))
        assert values["learning_rate"] == run.config["learning_rate"] == rate
        assert values["lr_scheduler_kwargs"] == run.config["lr_scheduler_kwargs"] == {"num_cycles": 2}
        assert values["wandb_tags"] == run.config["wandb_tags"] == run.tags == ["a", "b"]
        assert values["logging_first_step"] is run.config["logging_first_step"] is True
        assert (values["weight_decay"], run.config["weight_decay"]) == (0.2, 0.1)
        assert run.config["output_dir"] == str(Path("runs") / f"sweep-{sweep.id}" / run.id)
        assert run.config["harness"]["sweep_parameters"] == sorted(PARAMETERS)
        assert run.project == "grid"
    assert sweep.said.count("--weight_decay=0.2 overrules sweep") == 2
    assert sweep.said.count("--wandb_project=another is passed over") == 2
    assert "was locked" not in sweep.said
    assert "Ignoring" not in sweep.said
    assert server.unknown() == []


def test_two_processes_are_stopped_preempted_and_outlive_their_agent(server: WandbServer, tmp_path: Path) -> None:
    """They go on as the same run, whose rows are in W&B once; what was stopped in the app stays so."""
    folder = tmp_path / "pair"
    launch = [
        *("${env}", "${interpreter}", "-m", "accelerate.commands.launch", f"--config_file={DDP}"),
        *(f"--main_process_port={free_port()}", "-m", "harness", "train", "${args}"),
    ]
    command = [*launch, *flags(folder, pace=0.15, learning_rate=None, per_device_train_batch_size=4)]
    with Sweep(folder, server, {"learning_rate": {"values": [1e-3, 2e-3]}}, command) as sweep:
        agent = sweep.agent("--forward-signals")
        server.request_stop(sweep.reach(0, 6), "pair")
        run_id = sweep.reach(1, 6)
        end(agent)  # as a scheduler does
        assert sweep.ended(agent) == 0
        assert [(run.state, run.preempting) for run in sweep.runs] == [("finished", False), ("preempted", True)]
        assert [path.parent.name for path in folder.rglob("preempted")] == [run_id]

        agent = sweep.agent()
        sweep.reach(1, 16)
        end(agent, signal.SIGKILL)
        agent.wait()
        sweep.wait(lambda: not sweep.processes(run_id), "the orphans have ended")
        assert sweep.runs[1].state == "preempted"
        assert "The sweep agent, or the launcher under it, has ended: stopped at step" in sweep.said

        assert sweep.ended(sweep.agent()) == 0
    first, second = sweep.runs
    assert [(run.state, run.exit_code) for run in (first, second)] == [("finished", 0)] * 2
    last = max(steps_of(first))
    assert steps_of(first) == [*range(1, last + 1)]
    assert 6 <= last < 30
    assert f"Stopped from the W&B app at step {last} of 30: saved" in sweep.said
    assert steps_of(second) == [*range(1, 31)]
    assert second.config["learning_rate"] == 2e-3
    assert sweep.said.count("Agent received command: resume") == 2
    assert sweep.said.count("Agent received command: run") == 2
    assert "was locked" not in sweep.said
    assert server.unknown() == []
