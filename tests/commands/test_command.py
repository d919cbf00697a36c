"""`harness`: one command, which loads what it needs when it is called, and one boundary for all that goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.__main__ import COMMANDS, main
from harness.checkpoint.find import list_checkpoints
from harness.commands import completion
from harness.errors import ConfigError
from tests.support.parity import TRAINING, as_flags, reset

ROOT = Path(__file__).parents[2]
HEAVY = ("accelerate", "datasets", "numpy", "peft", "torch", "transformers", "wandb")
LOADED = f"""
import contextlib, json, sys
import harness
from harness.__main__ import main
import harness.commands
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
LIGHT = [["--help"], ["--version"], ["nonsense"], *([name, "--help"] for name in COMMANDS)]


@pytest.mark.parametrize("argv", LIGHT, ids=" ".join)
def test_what_only_says_something_loads_no_library(argv: list[str], tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *argv], capture_output=True, text=True, check=True, cwd=tmp_path, env=variables
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_help_names_each_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in shown
        assert shown.count(command.help) == 2
    assert 'eval "$(harness completion bash)"' in shown


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"harness {harness.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["synk"], "harness: synk is not a command; use one of: train, sync, export, submit, link, sweep"),
        (["synk"], "Did you mean sync?"),
        (["upload", "runs"], "harness: upload is not a command"),
        (["--learning_rate", "1"], "harness: --learning_rate follows a command, for example: harness train --learning"),
        (["sync"], "harness sync: The following arguments are required: DIR. See harness sync --help."),
        (["sync", ".", "--onse"], "harness sync: Unrecognized arguments: --onse. See harness sync --help."),
        (["export", "a"], "harness export: The following arguments are required: OUT. See harness export --help."),
        (["link", "model"], "harness link: The following arguments are required: --registry. See harness link --help."),
        (["link", "model", "--registry", "M"], "harness link: model: give an artifact as ENTITY/PROJECT/NAME:ALIAS"),
        (["submit", "--time", "12h"], "harness submit: --time=12h: write it as 12:00:00"),
        (["completion", "fish"], "harness completion: Argument shell: invalid choice: 'fish'"),
        (["train", "--learning_rat", "1"], "harness train: --learning_rat is not a known flag. Did you mean"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "completion")])
def test_an_interrupt_ends_each_command_with_130(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"harness.commands.{name}.run", interrupt)
    assert main([name]) == 130
    assert capsys.readouterr().err == f"harness {name}: {COMMANDS[name].interrupted}\n"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_completes_commands_flags_and_choices(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "learning_rate", "until-finished", "bfloat16"):
        assert word in script


def test_bash_completes_what_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")
    typed = {
        "harness ex": "export",
        "harness sync --onc": "--once",
        "harness train --learning_ra": "--learning_rate",
        "harness train --bf16 --learning_ra": "--learning_rate",
        "harness train --config scr": "script",
        "harness submit --dry-run --learning_ra": "--learning_rate",
        "harness export --dtype bf": "bfloat16",
    }
    for line, expected in typed.items():
        asks = f"source ./script; COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; _shtab_harness"
        done = subprocess.run(
            ["bash", "-c", f'{asks}; echo "${{COMPREPLY[@]}}"'],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        assert done.stdout.split() == [expected], f"{line}\n{done.stderr}"


def test_the_package_trains_and_finds_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    reset()
    assert harness.latest_checkpoint(tmp_path / "out") is None
    flags = {**TRAINING, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": tmp_path / "out"}
    argv = ["--task=tests.support.tasks.parity_task:build", *as_flags(flags), "--report_to=none", "--use_cpu"]
    assert harness.run(argv).state.global_step == 4
    newest = harness.latest_checkpoint(str(tmp_path / "out"))
    assert newest == tmp_path / "out" / "checkpoint-4"
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert len(list_checkpoints(tmp_path / "out")) == 2
    assert harness.latest_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    with pytest.raises(ConfigError, match="--learning_rat is not a known flag"):
        harness.run(["--learning_rat=1"])


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="module 'harness' has no attribute 'fit'"):
        harness.fit  # noqa: B018
