"""How a run ends in W&B, what is recorded of it, and that no secret is."""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.faulty_training import ROOT, SCRIPT, STEPS, Training, committed, environment
from tests.support.launching import DDP, launcher
from tests.support.wandb.file import read_all
from tests.support.wandb_server import API_KEY, WandbServer

pytestmark = pytest.mark.slow

PROJECT = "huggingface"
# Made up anew: a source that holds them would be in the patch of what is not committed.
TOKEN, HF_TOKEN, OFFLINE_KEY = f"hf_{secrets.token_hex(17)}", f"hf_{secrets.token_hex(17)}", secrets.token_hex(20)
SERVER_KEYS = [API_KEY, base64.b64encode(f"api:{API_KEY}".encode()).decode()]
SECRETS = [TOKEN, HF_TOKEN, OFFLINE_KEY, *SERVER_KEYS]

NOTEBOOK = """
import sys
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3")
def run(cell):
    reply = client.execute_interactive(cell, timeout=120, output_hook=lambda message: None)
    assert reply["content"]["status"] == "ok", "\\n".join(reply["content"]["traceback"])
try:
    run(f"from harness.train import main; code = main({sys.argv[1:]!r})")
    run("import wandb; assert code == 0; assert wandb.run is not None; wandb.log({'after': 1})")
    run("wandb.finish(); assert wandb.run is None")
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def is_good(folder: Path, server: WandbServer) -> Training:
    """It is given secrets, and runs in the repository as users do."""
    variables = {"HF_TOKEN": HF_TOKEN, "OMP_NUM_THREADS": "1"}
    return Training(folder, server, variables=variables, token=TOKEN, cwd=ROOT).ended()


def is_good_offline(folder: Path, server: WandbServer) -> Training:
    variables = {"HF_TOKEN": HF_TOKEN, "WANDB_API_KEY": OFFLINE_KEY, "WANDB_MODE": "offline"}
    return Training(folder, None, variables=variables, token=TOKEN).ended()


def crashes(folder: Path, server: WandbServer) -> Training:
    return Training(folder, server, task={"raises_at": 60}, variables={"HF_TOKEN": HF_TOKEN}, token=TOKEN).ended(1)


def crashes_offline(folder: Path, server: WandbServer) -> Training:
    return Training(folder, None, task={"raises_at": 60}, variables={"WANDB_MODE": "offline"}).ended(1)


def is_interrupted(folder: Path, server: WandbServer) -> Training:
    """Ctrl-C reaches all processes of a terminal, wandb's too."""
    training = Training(folder, server, pace=0.2)
    training.reach(8)
    os.killpg(training.process.pid, signal.SIGINT)
    return training.ended(130)


def is_terminated(folder: Path, server: WandbServer) -> Training:
    training = Training(folder, server, pace=0.2)
    training.reach(8)
    training.process.terminate()
    return training.ended(85)


def is_terminated_and_resumed(folder: Path, server: WandbServer) -> Training:
    is_terminated(folder, server)
    (folder / "times").unlink()
    # Its pace is an argument of the task.
    return Training(folder, server, resume_from_checkpoint="true", allow_changed_arguments=True).ended()


def is_stopped_in_the_app(folder: Path, server: WandbServer) -> Training:
    training = Training(folder, server, pace=1.5)
    training.reach(2)
    server.request_stop(training.run_id, PROJECT)
    return training.ended()


def is_stopped_in_the_app_on_two_ranks(folder: Path, server: WandbServer) -> Training:
    arguments = {"per_device_train_batch_size": 4}
    training = Training(folder, server, pace=1.5, command=(*launcher(DDP), SCRIPT), task={"batch": 4}, **arguments)
    training.reach(2)
    server.request_stop(training.run_id, PROJECT)
    return training.ended()


Scenario = Callable[[Path, WandbServer], Training]
PLAIN: list[Scenario] = [is_good, is_terminated, crashes_offline]
SLOW: list[Scenario] = [
    *(is_good_offline, crashes, is_interrupted, is_terminated_and_resumed),
    *(is_stopped_in_the_app, is_stopped_in_the_app_on_two_ranks),
]


class Played:
    """Trainings side by side, with one server."""

    def __init__(self, folder: Path, server: WandbServer, scenarios: list[Scenario]) -> None:
        self.server = server
        self._trainings: dict[Scenario, Future[Training]] = {}
        with ThreadPoolExecutor(len(scenarios)) as pool:
            for scenario in scenarios:
                self._trainings[scenario] = pool.submit(scenario, folder / scenario.__name__, server)

    def __getitem__(self, scenario: Scenario) -> Training:
        return self._trainings[scenario].result()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("plain")
    with WandbServer(folder / "server") as server:
        yield Played(folder, server, PLAIN)


@pytest.fixture(scope="module")
def played_at_length(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("slow")
    with WandbServer(folder / "server") as server:
        yield Played(folder, server, SLOW)


def files_with(text: str, *folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    if text in SERVER_KEYS:  # constants of the tests, which wandb's patch of this repository may hold
        files = [path for path in files if path.name != "diff.patch"]
    return [path for path in files if text.encode() in path.read_bytes()]


# In a plain run.


def test_the_last_lines_say_that_the_server_has_everything(played: Played) -> None:
    training = played[is_good]
    where, rows, artifacts = training.report
    assert training.out.splitlines()[-1].endswith(artifacts)
    assert where == f"{played.server.url}/tester/{PROJECT}/runs/{training.run_id}"
    assert rows == f"{STEPS + 1} rows, all confirmed by the server"
    assert artifacts.startswith(f"5 artifacts confirmed by the server: model-{training.run_id}:v0")
    run = played.server.run(training.run_id)
    assert (run.state, run.exit_code, len(run.rows)) == ("finished", 0, STEPS + 1)


def test_how_the_run_was_made_is_recorded(played: Played) -> None:
    training = played[is_good]
    run = played.server.run(training.run_id)
    metadata = json.loads(run.files["wandb-metadata.json"].read_text())
    assert metadata["program"] == SCRIPT
    assert f"--output_dir={training.output_dir}" in metadata["args"]
    assert metadata["python"].startswith(f"CPython {sys.version_info.major}.{sys.version_info.minor}")
    assert {"host", "os", "cpu_count", "executable", "startedAt"} <= metadata.keys()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode == 0:
        assert metadata["git"]["commit"] == git.stdout.strip()
    requirements = run.files["requirements.txt"].read_text()
    assert "torch==" in requirements
    assert "wandb==" in requirements
    assert run.files["code/harness/train.py"].read_text() == Path(SCRIPT).read_text(encoding="utf-8")
    assert run.config["harness"]["launch"]["OMP_NUM_THREADS"] == "1"
    assert {"torch", "transformers", "accelerate"} <= run.config["harness"]["software"].keys()
    assert (run.config["learning_rate"], run.config["output_dir"]) == (2e-3, str(training.output_dir))


def test_the_console_is_recorded(played: Played) -> None:
    training = played[is_good]
    run = played.server.run(training.run_id)
    shown = [line for line in training.out.splitlines() if line.startswith(f"step {STEPS}/{STEPS}")]
    assert len(shown) == 1
    assert shown[0] in "\n".join(run.output)
    assert shown[0] in run.files["output.log"].read_text()


def test_no_secret_is_kept_anywhere(played: Played) -> None:
    training = played[is_good]
    places = (training.folder, played.server.folder)
    assert list(committed(played.server))
    # What was looked through is what would hold them: the masks are there.
    assert any("server" in str(path) for path in files_with("<TOKEN>", *places))
    assert any(path.suffix == ".wandb" for path in files_with("<SECRET>", *places))
    for secret in SECRETS:
        assert files_with(secret, *places) == []


def test_a_run_that_sigterm_ends_is_preempted(played: Played) -> None:
    training, server = played[is_terminated], played.server
    run = server.run(training.run_id)
    assert (run.preempting, run.state, run.exit_code) == (True, "preempted", 85)
    rows = len(run.rows)
    assert 0 < rows < STEPS
    assert (training.output_dir / f"checkpoint-{rows}").is_dir()


def test_an_offline_run_that_crashes_is_recorded_as_failed(played: Played) -> None:
    training = played[crashes_offline]
    assert "RuntimeError: sample 60 can't be read" in training.err
    (saved,) = read_all(training.folder)
    assert saved.exit_code == 1
    assert 0 < len(saved.rows) < 10


# At length.


def test_no_secret_is_kept_offline(played_at_length: Played) -> None:
    training = played_at_length[is_good_offline]
    assert any(path.suffix == ".wandb" for path in files_with("<TOKEN>", training.folder))
    for secret in SECRETS:
        assert files_with(secret, training.folder) == []


def test_a_crash_fails_the_run_keeps_its_rows_and_leaks_nothing(played_at_length: Played) -> None:
    training, server = played_at_length[crashes], played_at_length.server
    assert "RuntimeError: sample 60 can't be read" in training.err
    run = server.run(training.run_id)
    assert (run.state, run.exit_code) == ("failed", 1)
    assert [row["train/global_step"] for row in run.rows] == list(range(1, len(run.rows) + 1))
    assert len(run.rows) > 0
    for secret in SECRETS:
        assert files_with(secret, training.folder, server.folder) == []


def test_an_interrupted_run_is_left_as_a_preempted_one_is(played_at_length: Played) -> None:
    training = played_at_length[is_interrupted]
    assert "harness train: Interrupted at step " in training.err.splitlines()[-1]
    run = played_at_length.server.run(training.run_id)
    assert (run.preempting, run.state, run.exit_code) == (True, "preempted", 130)
    rows = len(run.rows)
    assert 0 < rows < STEPS
    assert (training.output_dir / f"checkpoint-{rows}").is_dir()
    assert not (training.output_dir / "preempted").exists()


def test_a_preempted_run_goes_on_as_the_same_run(played_at_length: Played) -> None:
    training = played_at_length[is_terminated_and_resumed]
    assert training.report[1] == f"{STEPS + 1} rows, all confirmed by the server"
    run = played_at_length.server.run(training.run_id)
    assert (run.state, run.exit_code) == ("finished", 0)
    assert [row["train/global_step"] for row in run.rows] == [*range(1, STEPS + 1), STEPS]


@pytest.mark.parametrize("scenario", [is_stopped_in_the_app, is_stopped_in_the_app_on_two_ranks])
def test_stop_in_the_app_ends_the_training_at_a_step_with_a_checkpoint(
    played_at_length: Played, scenario: Scenario
) -> None:
    training = played_at_length[scenario]
    (message,) = [line for line in training.err.splitlines() if line.startswith("harness train: ")]
    assert "Stopped from the W&B app at step " in message
    step = int(message.partition("at step ")[2].split()[0])
    assert 2 <= step < STEPS
    assert json.loads((training.output_dir / f"checkpoint-{step}" / "harness_state.json").read_text())["step"] == step
    assert not (training.output_dir / "preempted").exists()
    run = played_at_length.server.run(training.run_id)
    assert (run.state, run.exit_code) == ("finished", 0)
    assert [row["train/global_step"] for row in run.rows] == list(range(1, step + 1))


def test_in_a_notebook_the_run_stays_open_until_it_is_finished_there(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    with WandbServer(tmp_path / "server") as server:
        flags = Training.flags_for(tmp_path / "cell", wandb_run_id="cell")
        (tmp_path / "cell").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", NOTEBOOK, *flags],
            env=environment(tmp_path, server, WANDB_SILENT="true"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        run = server.run("cell")
    assert (run.state, run.exit_code) == ("finished", 0)
    assert [row.get("train/global_step") for row in run.rows[: STEPS + 1]] == [*range(1, STEPS + 1), STEPS]
    assert run.rows[STEPS + 1]["after"] == 1
