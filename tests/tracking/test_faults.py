"""Real trainings while W&B's server is ill, hung, slow or away, each beside the same training without W&B."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.faulty_training import SAVES, STEPS, Training, committed
from tests.support.parity import history
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow

Scenario = Callable[[Path, WandbServer], Training]
# What other processes here may take from a step, and from all of them; a wait for the server takes longer.
STEP_SLACK_SECONDS, TRAINING_SLACK_SECONDS = 2.0, 5.0


def stays_dead(folder: Path, server: WandbServer) -> Training:
    training = Training(folder, server, pace=0.1, wandb_finish_timeout=2)
    training.reach(12)
    server.kill()
    return training.ended()


def is_never_there(folder: Path, server: WandbServer) -> Training:
    server.stop()
    return Training(folder, server).ended()


def cuts_uploads(folder: Path, server: WandbServer) -> Training:
    server.fault("drop", "put artifact/optimizer.pt", after_bytes=100_000, count=2)
    return Training(folder, server, pace=0.1).ended()


def answers_500_for_20_seconds(folder: Path, server: WandbServer) -> Training:
    training = Training(folder, server, pace=0.9)
    training.reach(8)
    server.fault("status", "", code=500, seconds=20)
    return training.ended()


def hangs_for_60_seconds(folder: Path, server: WandbServer) -> Training:
    training = Training(folder, server, pace=1.5)
    training.reach(8)
    server.fault("hang", "", seconds=60)
    return training.ended()


def dies_and_comes_back(folder: Path, server: WandbServer) -> Training:
    training = Training(folder, server, pace=0.4)
    training.reach(8)
    server.kill()
    training.reach(22)
    server.start()
    return training.ended()


def is_slower_than_the_saves(folder: Path, server: WandbServer) -> Training:
    server.fault("throttle", "put artifact/", bytes_per_second=400_000)
    return Training(folder, server, pace=0.1, save_steps=3).ended()


def refuses_rows(folder: Path, server: WandbServer) -> Training:
    training = Training(folder, server, pace=0.1)
    training.reach(12)
    server.fault("status", "file_stream", code=403)
    training.ended()
    server.clear_faults()
    return training


def is_silent_from_the_start(folder: Path, server: WandbServer) -> Training:
    server.fault("hang", "")
    return Training(folder, server).ended()


def is_silent_behind_its_front_page(folder: Path, server: WandbServer) -> Training:
    server.fault("hang", "graphql")
    return Training(folder, server, variables={"WANDB_INIT_TIMEOUT": "4"}).ended()


def no_room_to_stage(folder: Path, server: WandbServer) -> Training:
    with small_file_system(folder / "out" / "wandb-artifacts") as small:
        fill(small)
        return Training(folder, server, pace=0.1).ended()


def no_room_for_wandb(folder: Path, server: WandbServer) -> Training:
    with small_file_system(folder / "small") as small:
        training = Training(folder, server, pace=0.1, wandb_dir=small)
        training.reach(12)
        fill(small)
        return training.ended()


def no_room_for_an_offline_run(folder: Path, server: WandbServer) -> Training:
    with small_file_system(folder / "small") as small:
        training = Training(folder, server, pace=0.1, wandb_dir=small, wandb_mode="offline")
        training.reach(12)
        fill(small)
        return training.ended()


PLAIN: list[Scenario] = [stays_dead, is_never_there]
SLOW: list[Scenario] = [
    *(cuts_uploads, answers_500_for_20_seconds, hangs_for_60_seconds, dies_and_comes_back, is_slower_than_the_saves),
    *(refuses_rows, is_silent_from_the_start, is_silent_behind_its_front_page, no_room_to_stage, no_room_for_wandb),
    no_room_for_an_offline_run,
]


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """One of 64 KB; without root's rights the test is skipped."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


class Played:
    """Scenarios side by side, each in a folder and with a server of its own, and the same training without W&B."""

    def __init__(self, folder: Path, scenarios: list[Scenario]) -> None:
        self.servers = {scenario: WandbServer(folder / f"server-of-{scenario.__name__}") for scenario in scenarios}
        with ThreadPoolExecutor(len(scenarios)) as pool:
            self._trainings = {each: pool.submit(self._play, each, folder / each.__name__) for each in scenarios}
            self.without = Training.here(folder / "without")

    def _play(self, scenario: Scenario, folder: Path) -> Training:
        self.servers[scenario].start()
        return scenario(folder, self.servers[scenario])

    def __getitem__(self, scenario: Scenario) -> tuple[Training, WandbServer]:
        return self._trainings[scenario].result(), self.servers[scenario]

    def undisturbed(self, scenario: Scenario) -> tuple[Training, WandbServer]:
        """A training that came out as without W&B, no step of which waited."""
        training, server = self[scenario]
        times = [training.opening_seconds, training.training_seconds, training.closing_seconds, training.longest_step]
        print(f"{scenario.__name__}: opening, steps, end, longest step (s): {[round(each, 2) for each in times]}")
        assert len(training.began_steps) == STEPS
        assert history(training.output_dir) == history(self.without.output_dir)
        ours, theirs = ((each.output_dir / "model.safetensors").read_bytes() for each in (training, self.without))
        assert ours == theirs
        assert training.longest_step - training.pace < self.without.longest_step + STEP_SLACK_SECONDS
        waited = training.training_seconds - STEPS * training.pace
        assert waited < self.without.training_seconds + TRAINING_SLACK_SECONDS
        return training, server

    def close(self) -> None:
        for server in self.servers.values():
            server.stop()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    trainings = Played(tmp_path_factory.mktemp("plain"), PLAIN)
    yield trainings
    trainings.close()


@pytest.fixture(scope="module")
def played_at_length(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    trainings = Played(tmp_path_factory.mktemp("slow"), SLOW)
    yield trainings
    trainings.close()


def assert_rows_are_there_once(training: Training, server: WandbServer) -> None:
    expected = [(event["step"], event.get("loss")) for event in history(training.output_dir)]
    (found,) = server.runs()
    assert [(row["train/global_step"], row.get("train/loss")) for row in found.rows] == expected
    assert len(expected) == STEPS + 1


def assert_artifacts_are_there_once(training: Training, server: WandbServer, save_steps: int = SAVES) -> None:
    found = list(committed(server))
    checkpoints = [each for each in found if each.collection == f"checkpoint-{training.run_id}"]
    models = [each for each in found if each.collection == f"model-{training.run_id}"]
    assert len(checkpoints) + len(models) == len(found)
    steps = range(save_steps, STEPS + 1, save_steps)
    assert [each.version for each in checkpoints] == [f"v{number}" for number in range(len(steps))]
    for step, checkpoint in zip(steps, checkpoints, strict=True):
        assert f"checkpoint_global_step_{step}" in checkpoint.aliases
        assert ("latest" in checkpoint.aliases) == (step == STEPS)
        written = training.output_dir / f"checkpoint-{step}"
        assert {path.name: path.read_bytes() for path in written.iterdir()} == {
            name: path.read_bytes() for name, path in checkpoint.contents.items()
        }
    base, final = models
    assert "base_model" in base.aliases
    assert set(final.aliases) == {"final_model", "latest"}
    assert final.contents["model.safetensors"].read_bytes() == (training.output_dir / "model.safetensors").read_bytes()


def assert_all_is_confirmed(training: Training, artifacts: int) -> None:
    assert training.report[1] == f"{STEPS + 1} rows, all confirmed by the server"
    assert training.report[2].startswith(f"{artifacts} artifacts confirmed by the server: ")
    assert len(training.report) == 3


def assert_kept_offline(training: Training) -> None:
    """One line says so, and the training ends as if nothing had been."""
    (line,) = [line for line in training.err.splitlines() if "kept offline" in line]
    assert "W&B could not be reached" in line
    assert re.fullmatch(r"offline; upload it with `harness sync \S+`", training.report[0])
    assert training.err.count("WARNING harness") == 1


# In a plain run.


def test_a_server_that_dies_and_stays_dead_stops_nothing_and_the_report_says_what_is_missing(played: Played) -> None:
    training, _ = played.undisturbed(stays_dead)
    _, rows, artifacts = training.report
    assert rows == "an unknown number of 31 rows confirmed by the server; deliver the rest as the artifacts"
    arrived, missing = artifacts.split("; ")[:2]
    assert re.match(r"\d artifacts? confirmed by the server", arrived)
    assert re.match(r"\d artifacts not delivered: ", missing)
    assert f"checkpoint-{training.run_id} (checkpoint_global_step_30): the server did not answer for 2 s" in missing
    assert f"model-{training.run_id} (final_model)" in missing
    assert "; deliver: harness sync " in artifacts
    assert "gets no more artifacts" not in training.err  # the report has said it
    # Uploads and rows are each given up after --wandb_finish_timeout.
    assert training.closing_seconds < 20


def test_the_commands_that_the_report_prints_deliver_what_the_dead_server_missed(played: Played) -> None:
    training, server = played[stays_dead]
    server.start()
    deliver(training)
    assert_rows_are_there_once(training, server)
    assert_artifacts_are_there_once(training, server)
    server.stop()


def test_a_server_that_is_never_there_leaves_an_offline_run_said_in_one_line(played: Played) -> None:
    training, server = played.undisturbed(is_never_there)
    assert_kept_offline(training)
    assert server.runs() == []
    assert training.opening_seconds < played.without.opening_seconds + 10


def test_syncing_the_offline_run_delivers_all_rows_and_artifacts(played: Played) -> None:
    training, server = played[is_never_there]
    server.start()
    (command,) = re.findall(r"`(harness sync \S+)`", training.report[0])
    synced = training.type_in(command)
    assert synced.returncode == 0, synced.stderr
    assert_rows_are_there_once(training, server)
    assert_artifacts_are_there_once(training, server)
    server.stop()


def deliver(training: Training) -> None:
    """Type what the report says."""
    for line in training.report:
        for command in re.findall(r"deliver(?: the rest)?: (.+)$", line):
            done = training.type_in(command)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


# At length.


def test_a_connection_that_drops_in_mid_upload_delays_the_artifact_only(played_at_length: Played) -> None:
    training, server = played_at_length.undisturbed(cuts_uploads)
    assert sum(bool(request.get("fault")) for request in server.requests()) == 2
    assert_all_is_confirmed(training, artifacts=5)
    assert_rows_are_there_once(training, server)
    assert_artifacts_are_there_once(training, server)


@pytest.mark.parametrize(
    "scenario", [answers_500_for_20_seconds, hangs_for_60_seconds, dies_and_comes_back, no_room_for_wandb]
)
def test_what_was_logged_while_the_server_was_ill_or_away_arrives_once(
    played_at_length: Played, scenario: Scenario
) -> None:
    training, server = played_at_length.undisturbed(scenario)
    assert_all_is_confirmed(training, artifacts=5)
    assert_rows_are_there_once(training, server)
    assert_artifacts_are_there_once(training, server)


def test_uploads_slower_than_the_saves_come_whole_and_in_order(played_at_length: Played) -> None:
    training, server = played_at_length.undisturbed(is_slower_than_the_saves)
    assert training.err.count("Uploads to W&B are slower than saves") == 1
    assert_all_is_confirmed(training, artifacts=12)
    assert_artifacts_are_there_once(training, server, save_steps=3)


def test_rows_that_the_server_refuses_are_missed_and_can_be_delivered_later(played_at_length: Played) -> None:
    training, server = played_at_length.undisturbed(refuses_rows)
    arrived = len(server.runs()[0].rows)
    assert 0 < arrived <= STEPS
    assert training.report[1].startswith(f"{arrived} of 31 rows confirmed by the server; deliver the rest: ")
    assert_artifacts_are_there_once(training, server)
    deliver(training)
    assert_rows_are_there_once(training, server)


@pytest.mark.parametrize("scenario", [is_silent_from_the_start, is_silent_behind_its_front_page])
def test_a_server_that_is_silent_from_the_start_costs_seconds_and_leaves_an_offline_run(
    played_at_length: Played, scenario: Scenario
) -> None:
    training, server = played_at_length.undisturbed(scenario)
    assert_kept_offline(training)
    # Its timeout is 4 s; eleven trainings start at once here. wandb alone would wait for 90 s.
    assert training.opening_seconds < played_at_length.without.opening_seconds + 45
    server.clear_faults()
    (command,) = re.findall(r"`(harness sync \S+)`", training.report[0])
    assert training.type_in(command).returncode == 0
    assert_rows_are_there_once(training, server)
    assert_artifacts_are_there_once(training, server)


def test_without_room_to_stage_one_warning_is_given_and_the_report_names_the_artifacts(
    played_at_length: Played,
) -> None:
    training, server = played_at_length.undisturbed(no_room_to_stage)
    (line,) = [line for line in training.err.splitlines() if line.startswith("WARNING harness")]
    assert "could not be staged, training goes on: OSError: [Errno 28] No space left on device" in line
    assert training.report[1] == f"{STEPS + 1} rows, all confirmed by the server"
    assert training.report[2].startswith("5 artifacts not delivered: ")
    for name in ("base_model", *(f"checkpoint_global_step_{step}" for step in (10, 20, 30))):
        assert f"({name}): could not be staged" in training.report[2]
    assert list(committed(server)) == []


def test_rows_that_a_full_disk_has_lost_are_not_called_kept(played_at_length: Played) -> None:
    training, _ = played_at_length.undisturbed(no_room_for_an_offline_run)
    lost = re.fullmatch(r"(\d+) of 31 rows are in (\S+), the others are lost \(a full disk\?\)", training.report[1])
    assert lost is not None, training.report
    assert int(lost[1]) < STEPS
