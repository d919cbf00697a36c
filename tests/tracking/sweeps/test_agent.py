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


def test_each_run_of_a_grid_has_its_parameters_a_folder_and_each_row_once(server: WandbServer, tmp_path: Path) -> None:
    """And what the command line overrules, or W&B, is said."""
    typed = ["--wandb_project", "another", "--weight_decay", "0.2"]
    folder = tmp_path / "grid"
    with Sweep(folder, server, PARAMETERS, script(*flags(folder, learning_rate=None), *typed)) as sweep:
        assert sweep.ended(sweep.agent()) == 0
    assert len(sweep.runs) == 2
    for run, rate in zip(sweep.runs, (1e-3, 2e-3), strict=True):
        assert (run.state, run.exit_code, run.project) == ("finished", 0, "grid")
        assert steps_of(run) == [*range(1, 31)]
        values = yaml.safe_load((sweep.output_dir(run.id) / "harness_config.yaml").read_text(encoding="utf-8"))
        assert values["learning_rate"] == run.config["learning_rate"] == rate
        assert values["lr_scheduler_kwargs"] == run.config["lr_scheduler_kwargs"] == {"num_cycles": 2}
        assert values["wandb_tags"] == run.config["wandb_tags"] == run.tags == ["a", "b"]
        assert values["logging_first_step"] is run.config["logging_first_step"] is True
        assert (values["weight_decay"], run.config["weight_decay"]) == (0.2, 0.1)
        assert run.config["output_dir"] == str(Path("runs") / f"sweep-{sweep.id}" / run.id)
        assert run.config["harness"]["sweep_parameters"] == sorted(PARAMETERS)
    assert sweep.said.count("--weight_decay=0.2 overrules sweep") == 2
    assert sweep.said.count("--wandb_project=another is passed over") == 2
    assert "was locked" not in sweep.said
    assert "Ignoring" not in sweep.said
    assert server.unknown() == []


def test_two_processes_are_preempted_outlive_their_agent_and_are_stopped_in_the_app(
    server: WandbServer, tmp_path: Path
) -> None:
    """They go on as the same run, whose rows are in W&B once."""
    folder = tmp_path / "pair"
    launch = [
        *("${env}", "${interpreter}", "-m", "accelerate.commands.launch", f"--config_file={DDP}"),
        *(f"--main_process_port={free_port()}", "-m", "harness", "train", "${args}"),
    ]
    # So long that nothing ends by itself.
    length = {"max_steps": 2000, "num_train_epochs": None, "save_total_limit": 2, "per_device_train_batch_size": 4}
    command = [*launch, *flags(folder, pace=0.1, learning_rate=None, **length)]
    with Sweep(folder, server, {"learning_rate": {"values": [1e-3]}}, command) as sweep:
        agent = sweep.agent("--forward-signals")
        run_id = sweep.reach(0, 3)
        end(agent)  # as a scheduler does
        assert sweep.ended(agent) == 0
        assert (sweep.runs[0].state, sweep.runs[0].preempting) == ("preempted", True)
        assert (sweep.output_dir(run_id) / "preempted").is_file()

        agent = sweep.agent()
        sweep.reach(0, max(sweep.steps(run_id)) + 3)
        end(agent, signal.SIGKILL)
        agent.wait()
        sweep.wait(lambda: not sweep.processes(run_id), "the orphans have ended")
        assert sweep.runs[0].state == "preempted"
        assert "The sweep agent, or the launcher under it, has ended: stopped at step" in sweep.said

        agent = sweep.agent()
        sweep.reach(0, max(sweep.steps(run_id)) + 3)
        server.request_stop(run_id, "pair")
        assert sweep.ended(agent) == 0
    (run,) = sweep.runs
    assert (run.state, run.exit_code, run.preempting) == ("finished", 0, False)
    last = max(steps_of(run))
    assert steps_of(run) == [*range(1, last + 1)]
    assert last >= 9
    assert f"Stopped from the W&B app at step {last} of 2000: saved" in sweep.said
    assert (sweep.output_dir(run_id) / f"checkpoint-{last}" / "harness_state.json").is_file()
    assert not (sweep.output_dir(run_id) / "preempted").exists()
    assert sweep.said.count("Agent received command: resume") == 2
    assert "was locked" not in sweep.said
    assert "goes on showing" not in sweep.said
    assert server.unknown() == []
