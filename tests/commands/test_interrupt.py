"""Ctrl-C and a terminal that is closed: the first saves and says how to go on, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.find import list_checkpoints
from harness.train import main
from tests.support.faulty_training import Training
from tests.support.launching import DDP, ROOT, SCRIPT, launcher, run, torchrun
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, reset
from tests.support.wandb.file import read_all

STOPPING = "tests.support.tasks.stopping_task:build"
ARGUMENTS = {**TRAINING, "save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1}
ALONE: dict[str, Any] = {"report_to": "none", "wandb_run_id": None, "wandb_log_model": None}
PROMISE = "Ctrl-C: the step, evaluation or save under way is finished, then the training is saved and ends."


@pytest.fixture(autouse=True)
def python_handles_signals() -> Iterator[None]:
    """Whatever started the tests may ignore them."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def flags(folder: Path, number: str, **more: object) -> list[str]:
    task = {"after": 50, "sent": str(folder.with_name("sent")), "signal": number}
    return as_flags({"task": STOPPING, "task_args": task, "output_dir": folder, **ARGUMENTS, **more})


def until(what: Any, training: Training) -> None:
    end = time.monotonic() + 100
    while not what():
        assert training.process.poll() is None, training.err[-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def press(training: Training) -> None:
    """Ctrl-C goes to all processes of a terminal's foreground."""
    os.killpg(training.process.pid, signal.SIGINT)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_ctrl_c_saves_and_the_command_that_is_told_goes_on_to_the_same_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(flags(whole, "SIGINT", task="tests.support.tasks.parity_task:build", task_args={})) == 0
    reset()
    assert main(flags(folder, "SIGINT", report_to="wandb")) == 130
    message = last_line(capsys.readouterr().err)
    said, _, command = message.partition("; go on with: ")
    assert said == "harness train: Interrupted at step 6 of 15: saved"
    assert (folder / "checkpoint-6" / "harness_state.json").is_file()
    assert not (folder / "preempted").exists()
    (saved,) = read_all(folder)
    assert (saved.exit_code, saved.is_preempting) == (130, True)

    reset()
    words = shlex.split(command)
    assert words[:2] == ["harness", "train"]
    assert main(words[2:]) == 0
    assert_equal_runs(whole, folder)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_preempts_unless_nohup_ignores_it(ignored: bool, tmp_path: Path) -> None:
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert main(flags(tmp_path / "run", "SIGHUP", report_to="none")) == (0 if ignored else 85)
    assert (tmp_path / "run" / "preempted").exists() is not ignored


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        assert main(flags(tmp_path / "run", "SIGINT", report_to="none")) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    task = {"save_seconds": 60, "quick_saves": 1}
    training = Training(tmp_path / "run", None, pace=0.1, task=task, save_steps=5, **ALONE)
    until(training.times.with_name("saves").exists, training)  # the second save
    press(training)
    until(lambda: PROMISE in training.err, training)
    time.sleep(0.6)  # within half a second it may be one Ctrl-C, sent twice
    began = time.monotonic()
    press(training)
    training.ended(130)
    assert time.monotonic() - began < 20, "it did not wait for the save"
    assert (training.output_dir / "checkpoint-5" / "harness_state.json").is_file()
    assert not (training.output_dir / "checkpoint-10").exists()
    says = r"Interrupted twice at step \d+ of 30: what is after checkpoint-5 is not saved; go on with: "
    assert re.search(says, last_line(training.err))


def test_ctrl_c_in_the_final_save_completes_it(tmp_path: Path) -> None:
    more = {"max_steps": 4, "save_strategy": "no", "do_train": True, "do_eval": True}
    training = Training(tmp_path / "run", None, task={"save_seconds": 1}, **{**ALONE, **more})
    until(training.times.with_name("saves").exists, training)
    press(training)
    training.ended(130)
    assert "Ctrl-C: the training is complete, its model is written before it ends." in training.err
    says = "Interrupted after the last step: the training is complete, its model is in "
    assert last_line(training.err) == f"harness train: {says}{training.output_dir}."
    assert (training.output_dir / "model.safetensors").is_file()
    assert "eval_loss" not in training.out


def test_ctrl_c_in_the_evaluation_after_the_training_ends_it(tmp_path: Path) -> None:
    more = {"max_steps": 4, "save_strategy": "no", "do_train": True, "do_eval": True}
    training = Training(tmp_path / "run", None, task={"eval_seconds": 60}, **{**ALONE, **more})
    until((training.output_dir / "README.md").exists, training)
    time.sleep(1)
    press(training)
    training.ended(130)
    assert "the training is complete, its model is in" in last_line(training.err)


def test_ctrl_c_while_libraries_are_loaded_is_a_line(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPT, *flags(tmp_path / "run", "SIGINT", report_to="none")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert "Loading torch" in process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest == "harness: Interrupted.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_of_all_processes_leaves_the_workers_of_the_data_to_the_training(
    number: signal.Signals, tmp_path: Path
) -> None:
    more = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1, **ALONE}
    training = Training(tmp_path / "run", None, pace=0.5, **more)
    training.reach(4)
    os.killpg(training.process.pid, number)
    training.ended(130 if number == signal.SIGINT else 85)
    assert ": saved; go on with: " in last_line(training.err)


class Terminal:
    """A training in the foreground of a terminal of its own, which `flags` are given to."""

    def __init__(self, *words: str) -> None:
        self.shown = ""
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, *words])  # noqa: S606

    def wait_for(self, text: str, key: str = "") -> None:
        """Read until it shows this after what was waited for before; `key` is pressed each second until it does."""
        end, pressed_at = time.monotonic() + 100, 0.0
        while text not in self.shown:
            assert time.monotonic() < end, self.shown[-2000:]
            if key and time.monotonic() - pressed_at > 1:
                self.type_in(key)
                pressed_at = time.monotonic()
            if select.select([self.end], [], [], 0.2)[0]:
                self.shown += os.read(self.end, 1 << 16).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def type_in(self, text: str) -> None:
        os.write(self.end, text.encode())

    def ended(self) -> int:
        """Read to the end; returns the exit code."""
        with contextlib.suppress(OSError):
            while piece := os.read(self.end, 1 << 16):
                self.shown += piece.decode(errors="replace")
        return self.code()

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_ctrl_c_at_a_debuggers_prompt_is_the_debuggers(tmp_path: Path) -> None:
    task = ["--task=tests.support.tasks.odd_tasks:with_breakpoint", '--task_args={"stop": true}']
    terminal = Terminal(SCRIPT, *task, "--use_cpu", "--debug", f"--output_dir={tmp_path / 'run'}")
    terminal.wait_for("(Pdb) ")
    # Python shows the prompt a moment before it listens: a Ctrl-C in between is answered with the next key.
    terminal.wait_for("--KeyboardInterrupt--", key="\x03")
    terminal.wait_for("(Pdb) ")
    terminal.type_in("p len(samples)\n")
    terminal.wait_for("8")
    terminal.type_in("c\n")
    assert terminal.ended() == 0, terminal.shown[-2000:]
    assert "step 4/4" in terminal.shown
    assert "Ctrl-C" not in terminal.shown


@pytest.mark.slow
def test_a_terminal_that_goes_away_preempts_the_training(tmp_path: Path) -> None:
    task = {
        "task": "tests.support.tasks.faulty_task:build",
        "task_args": {"times": str(tmp_path / "t"), "seconds": 0.2},
    }
    folder = tmp_path / "run"
    terminal = Terminal(SCRIPT, *as_flags({**ARGUMENTS, **task, "output_dir": folder, "report_to": "none"}))
    terminal.wait_for("step 3/15")
    os.close(terminal.end)
    assert terminal.code() == 85
    assert (folder / "preempted").is_file()
    assert list(folder.glob("checkpoint-*/harness_state.json"))


def launched(folder: Path, command: list[str], seconds: int = 30, **task: object) -> Training:
    arguments = {**ALONE, "per_device_train_batch_size": 4, "max_steps": 20, "save_steps": 4}
    return Training(
        folder,
        None,
        pace=0.2,
        command=(*command, SCRIPT),
        task={"batch": 4, **task},
        cwd=ROOT,
        variables={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(seconds)},
        **arguments,
    )


@pytest.mark.slow
@pytest.mark.parametrize("starts", [lambda: torchrun(2), lambda: launcher(DDP)], ids=["torchrun", "accelerate"])
def test_ctrl_c_of_a_launcher_saves_on_all_ranks_and_tells_what_was_typed(starts: Any, tmp_path: Path) -> None:
    command = starts()
    training = launched(tmp_path / "run", command)
    training.reach(6)
    press(training)
    training.ended(1)
    err = training.err
    assert f"{PROMISE} Ctrl-C again ends it at once. The launcher kills all processes 30 s from now" in err
    assert re.search(r"The training is saved now; the launcher kills all processes in (2\d|30) s\.", err)
    assert err.count("harness train: Interrupted at step ") == 1
    typed = re.search(r"Interrupted at step \d+ of 20: saved; go on with: (.+)", err)
    assert typed is not None
    words = shlex.split(typed.group(1))
    assert words[: len(command)] == command
    if command[2] == "accelerate.commands.launch":
        return  # from here on it is the same
    ended = run(words, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="30")
    assert ended.code == 0, ended.err[-3000:]
    assert "Going on from" in ended.out + ended.err
    whole = launched(tmp_path / "whole", command).ended()
    assert_equal_runs(whole.output_dir, training.output_dir)


@pytest.mark.slow
def test_a_save_that_outlives_the_launchers_patience_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    training = launched(tmp_path / "run", torchrun(2), seconds=4, save_seconds=60, quick_saves=1)
    training.reach(6)
    press(training)
    training.ended(1)
    assert "kills all processes 4 s from now" in training.err
    assert "harness train:" not in training.err, "it was killed"
    assert [path.name for path in list_checkpoints(training.output_dir)] == ["checkpoint-4"]
