"""What the README says is so: its flags, its files, its commands, its examples."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness import loop
from harness.commands.submit import main as submit
from harness.commands.sync import main as sync
from harness.export.__main__ import main as export
from harness.flags import GONE, OWNED_BY_LAUNCH_CONFIG, REFUSED, parse
from harness.train import main
from tests.support.pages import FLAGS, README, ROOT, blocks, commands
from tests.support.wandb.differences import DIFFERENCES
from tests.support.wandb.file import read_all

INSTALL_AND_TRAIN = "pip install -e . && accelerate launch harness/train.py"
INSTALL_AND_TEST = "pip install -e '.[test]' && pytest"
NOT_TAKEN = {**OWNED_BY_LAUNCH_CONFIG, **REFUSED, **GONE}
# Flags of `accelerate launch`, of `python -m harness.tracking` and of `python -m harness.export`.
OF_OTHERS = {"config_file", "num_processes", "cpu", "registry", "max_shard_size"}
OF_OTHERS |= {"num_machines", "machine_rank", "main_process_ip", "main_process_port"}
# Of `python -m harness.sync` and `python -m harness.submit`, up to their first hyphen.
OF_OTHERS |= {"until", "once", "interval", "nodes", "gpus", "time", "dry", "no"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
OURS = re.compile(r"(?:^|\s)(?:harness-train|harness/train\.py|-m harness\.train)(?=\s|$)")


def arguments_of(command: str) -> list[str]:
    """What a command of the README gives to our parser."""
    return shlex.split(OURS.split(command, maxsplit=1)[1])


def section(title: str) -> str:
    return README.split(f"\n{title}\n", 1)[1].split("\n## ", 1)[0]


def example(module: str) -> str:
    """The Python block that imports `module`."""
    found = [block for block in blocks("python") if f"from {module} import" in block]
    assert len(found) == 1
    return found[0]


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_two_commands_are_there_as_they_are_typed() -> None:
    assert f"```bash\n{INSTALL_AND_TRAIN}\n```" in README
    assert f"```bash\n{INSTALL_AND_TEST}\n```" in README
    # .ci/run runs these very lines.
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert INSTALL_AND_TEST in steps
    assert INSTALL_AND_TRAIN.split(" && ")[1] in steps


def test_each_flag_exists_or_is_refused() -> None:
    named = {name for name in re.findall(r"--([a-z][a-z0-9_]+)", README) if name not in OF_OTHERS}
    assert not named - FLAGS - {"help"} - set(NOT_TAKEN)


def test_all_refused_flags_are_listed_and_none_that_is_taken() -> None:
    text = section("## From the Trainer")
    launched, refused = text.split("These belong to the launch config", 1)[1].split("These are refused:", 1)
    assert set(re.findall(r"--([a-z_0-9]+)", launched)) == set(OWNED_BY_LAUNCH_CONFIG)
    rows = [line.split("|")[1] for line in refused.splitlines() if line.startswith("| `--")]
    assert set(re.findall(r"--([a-z_0-9]+)", " ".join(rows))) == set(REFUSED) | set(GONE)


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_refused_flag_ends_with_2_and_the_remedy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--{name}", "1"]) == 2
    assert f"--{name} is not supported: {NOT_TAKEN[name]}" in capsys.readouterr().err


def test_each_named_file_exists() -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if ":" not in target]
    paths = re.findall(r"`((?:harness|tests|launch_configs|\.ci)/[\w./-]*)`", README)
    assert links
    assert paths
    assert not [path for path in {*links, *paths} if not (ROOT / path).exists()]


def test_the_named_recipes_are_the_shipped_ones() -> None:
    named = README.split("a shipped recipe by its name: ", 1)[1].split(".", 1)[0]
    assert sorted(re.findall(r"`(\w+)`", named)) == sorted(p.stem for p in (ROOT / "harness/recipes").glob("*.yaml"))


def test_the_quickstart_is_as_told() -> None:
    plan = parse([]).plan
    assert f"the loss every {plan.logging_steps:g} steps and evaluates every {plan.eval_steps:g}:" in README
    assert f"\nstep {plan.eval_steps:g}/{plan.max_steps} " in "\n" + blocks("text")[0]


def test_the_functions_of_the_loop_are_those_named() -> None:
    named = re.findall(r"`([a-z_]+)`", section("## The loop"))
    assert {"fit", "train_step", "follow", "finish"} <= set(named)
    assert all(callable(getattr(loop, name)) for name in named)


@pytest.mark.parametrize("command", [command for command in commands() if OURS.search(command)])
def test_each_command_parses(command: str) -> None:
    parse(arguments_of(command))


def test_the_command_of_the_export_asks_for_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [command for command in commands() if "harness.export" in command]
    assert export(shlex.split(command)[3:]) == 2
    assert "CHECKPOINT=runs/cola/checkpoint-500: no such folder" in capsys.readouterr().err


def test_the_command_that_submits_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [command for command in commands() if "harness.submit" in command]
    assert submit(["--dry-run", *shlex.split(command)[3:]]) == 0
    assert "multi_node.sbatch --config quickstart" in capsys.readouterr().out


def test_the_command_that_syncs_asks_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [command for command in commands() if "harness.sync" in command]
    monkeypatch.chdir(tmp_path)
    assert sync(shlex.split(command)[3:]) == 2
    assert "runs: no such folder" in capsys.readouterr().err


def test_the_task_of_ones_own_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parabola.py").write_text(example("harness.tasks"), encoding="utf-8")
    command = next(command for command in commands() if "parabola:build" in command)
    assert command.startswith("PYTHONPATH=. harness-train ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(".")
    assert main([*arguments_of(command), "--use_cpu"]) == 0
    output_dir = next((tmp_path / "runs").iterdir())
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 10
    assert str(output_dir.relative_to(tmp_path)) in capsys.readouterr().out


def test_the_tracker_works_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "by_hand.py").write_text(example("harness.tracking"), encoding="utf-8")
    done = run([sys.executable, "by_hand.py"], tmp_path, PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    (tracked,) = read_all(tmp_path)
    assert (tracked.project, tracked.display_name, tracked.exit_code) == ("demo", "by-hand", 0)
    assert tracked.config["lr"] == 0.01
    assert [row["train/global_step"] for row in tracked.rows] == list(range(1, 33))
    assert tracked.rows[-1]["train/loss"] < tracked.rows[0]["train/loss"]
    watched = [row["train/global_step"] for row in tracked.rows if "gradients/0.weight._type" in row]
    assert watched == list(range(4, 33, 4))


@pytest.mark.slow
def test_two_processes_that_would_be_one_are_refused(tmp_path: Path) -> None:
    script = str(ROOT / "harness" / "train.py")
    done = run([*LAUNCH, "--cpu", "--num_processes", "2", script, "--expect_num_processes", "2"], tmp_path)
    assert done.returncode != 0
    assert "--expect_num_processes=2, but the launcher started 1" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_ddp_command_starts_two_processes(tmp_path: Path) -> None:
    command = next(command for command in commands() if "--expect_num_processes" in command)
    given = shlex.split(command.removeprefix("accelerate launch "))
    small = ["--task", "tests.support.tasks.parity_task:build", "--max_steps", "2", "--report_to", "none", "--use_cpu"]
    done = run([*LAUNCH, *given, *small, "--save_steps", "2", "--output_dir", str(tmp_path / "run")], ROOT)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run/checkpoint-2/harness_state.json").read_text(encoding="utf-8"))
    assert manifest["world_size"] == 2


def test_the_differences_in_wandb_are_those_that_were_found() -> None:
    text = section("### Where it differs from the Trainer's")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [difference.as_markdown() for difference in DIFFERENCES.values()]


@pytest.mark.parametrize(
    "command",
    [["-m", "harness.train"], [str(ROOT / "harness" / "train.py")]],
    ids=["module", "script"],
)
def test_the_entry_points_are_the_same_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under WANDB_MODE=offline transformers prints a line when its Trainer is imported.
    monkeypatch.delenv("WANDB_MODE")
    done = run([sys.executable, *command, "--print_config"], tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout == parse([]).as_yaml()


def test_the_installed_command_is_that_function() -> None:
    from importlib.metadata import entry_points

    (installed,) = entry_points(group="console_scripts", name="harness-train")
    assert installed.value == "harness.train:script"
