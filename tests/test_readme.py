"""What the pages say is so: flags, files, links, commands, examples, tables."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import harness
from harness import loop
from harness.__main__ import COMMANDS
from harness.__main__ import main as harness_command
from harness.config import recipe_names, release
from harness.flags import FLAGS, NOT_TAKEN, OWNED_BY_LAUNCH_CONFIG, parse
from harness.sweep.spec import sweep_files
from harness.train import main
from tests.support.inputs import (
    label_flags,
    labelled,
    save_bert_tokenizer,
    save_gpt_tokenizer,
    text_flags,
    write_rows,
    write_text,
)
from tests.support.pages import (
    MAP,
    PAGES,
    README,
    ROOT,
    TEXTS,
    TRACKING,
    blocks,
    commands,
    last_table,
    made_rows,
    section,
)
from tests.support.wandb.file import read_all

INSTALL, TRAIN = "pip install -e .", "accelerate launch harness/train.py"
INSTALL_AND_TEST = "pip install -e '.[test]' && pytest"
# Flags of `accelerate launch`, of torchrun, of the other commands, of tests.faults and, up to a hyphen, of sbatch.
OF_OTHERS = {"config_file", "num_processes", "cpu", "num_machines", "machine_rank", "main_process_ip"}
OF_OTHERS |= {"main_process_port", "deepspeed_multinode_launcher", "nproc_per_node", "help", "version", "flag"}
OF_OTHERS |= {"registry", "alias", "max_shard_size", "until", "once", "interval", "nodes", "gpus", "time", "dry", "no"}
OF_OTHERS |= {"launch", "partition", "account", "array", "sbatch", "qos", "me", "requeue", "signal", "cpus", "dist"}
OF_OTHERS |= {"kills", "folder", "trainer", "case", "cases", "device", "json", "seconds"}
OF_OTHERS |= {"best_config", "count", "launcher", "replay", "show", "storage", "study", "workers"}  # of `harness sweep`
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TRAINING = re.compile(r"(?:^|\s)(?:harness train|harness-train|harness/train\.py|-m harness train|slurm/\w+\.sbatch)\s")
OTHER = re.compile(r"^harness (\w+) (.*)$")
TYPED = sorted({command for page in TEXTS.values() for command in commands(page)})
ASKED = [command for command in TYPED if "--help" in command]
# Lengths that no link or code needs; tables and code may be longer.
LONGEST_LINE = 120


def arguments_of(command: str) -> list[str]:
    """What a command of a page gives to the parser of a training."""
    return shlex.split(TRAINING.split(command + " ", maxsplit=1)[1])


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


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings of a page."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def test_the_two_commands_are_there_as_they_are_typed() -> None:
    assert blocks("bash")[0].splitlines() == [INSTALL, TRAIN]
    assert INSTALL_AND_TEST in blocks("bash", TEXTS["CONTRIBUTING.md"])[0].splitlines()
    # .ci/run runs these very lines.
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert INSTALL_AND_TEST in steps
    assert TRAIN in steps


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 200
    assert len(TEXTS["README.ko.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_in_an_editor(name: str) -> None:
    prose = re.sub(r"^ *```.*?^ *```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in prose.splitlines() if len(line) > LONGEST_LINE and not line.startswith("|")]


@pytest.mark.parametrize("name", PAGES)
def test_each_flag_exists_or_is_refused(name: str) -> None:
    named = set(re.findall(r"--([a-z][a-z0-9_]+)", TEXTS[name])) - OF_OTHERS
    assert not named - set(FLAGS) - set(NOT_TAKEN) - {f"no_{flag}" for flag in FLAGS}


@pytest.mark.parametrize(("name", "title"), made_rows())
def test_a_table_says_what_the_code_says(name: str, title: str) -> None:
    """`python -m tests.support.pages` writes it anew."""
    assert last_table(section(title, TEXTS[name])) == made_rows()[name, title]


def test_flags_of_the_launch_config_are_named() -> None:
    text = section("## Differences from the Trainer", MAP)
    launched = text.split("These belong to the launch config", 1)[1].split("These are refused:", 1)[0]
    assert set(re.findall(r"--([a-z_0-9]+)", launched)) == set(OWNED_BY_LAUNCH_CONFIG)


def test_other_defaults_than_the_trainers_are_told() -> None:
    theirs = {field.name: default(field) for field in fields(TrainingArguments) if field.name in FLAGS}
    changed = {name for name, value in theirs.items() if value != FLAGS[name].default}
    if release("transformers") < (5, 23):  # it was not yet the older name of another flag, and false
        changed.remove("gradient_checkpointing")
    told = set(re.findall(r"^\| `--([a-z_]+)`", section("## Differences from the Trainer", MAP), flags=re.MULTILINE))
    assert changed <= told
    assert {"report_to", "output_dir"} <= set(re.findall(r"`(\w+)=", section("## From the Trainer")))


def default(field: object) -> object:
    made = getattr(field, "default_factory", None)
    return made() if callable(made) else getattr(field, "default", None)


def test_all_variables_are_listed_with_their_flags() -> None:
    pairs = [
        pair
        for row in last_table(section("## Settings", TRACKING))[2:]
        for pair in zip(*(re.findall(r"`(?:--)?(\w+)`", cell) for cell in row.split("|")[1:3]), strict=True)
    ]
    declared = {name: flag.env for name, flag in FLAGS.items() if flag.env is not None}
    assert {flag: variable for variable, flag in pairs} == {**declared, "run_name": "WANDB_NAME"}


@pytest.mark.parametrize("name", PAGES)
def test_each_link_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if ":" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", PAGES)
def test_each_named_file_exists(name: str) -> None:
    named = re.findall(r"`((?:harness|tests|launch_configs|\.ci)/[\w./-]*)`", TEXTS[name])
    named += re.findall(r"(?<![\w/])(?:launch_configs|slurm)/\w+\.\w+", TEXTS[name])
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_tree_is_the_trees() -> None:
    (tree,) = [block for block in blocks("text") if "harness/  " in block]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else ROOT / "harness"
        assert (folder / name).exists(), name


def test_the_map_names_each_folder_and_file() -> None:
    named = set(re.findall(r"`(\w+(?:\.py|/))`", section("## Folders", MAP)))
    found = {path.name + "/" * path.is_dir() for path in (ROOT / "harness").iterdir() if path.name != "__pycache__"}
    assert named == {name for name in found if name.endswith((".py", "/"))} - {"__init__.py"}


def test_the_shipped_files_are_listed() -> None:
    for name in ("README.md", "README.ko.md", "harness/tasks/README.md"):
        assert not [recipe for recipe in recipe_names() if f"`{recipe}`" not in TEXTS[name]]
    assert not [name for name in sweep_files() if f"`{name}`" not in TEXTS["harness/sweep/README.md"]]
    configs = sorted(path.name for path in (ROOT / "launch_configs").glob("*.yaml"))
    assert sorted(set(re.findall(r"\((\w+\.yaml)\)", TEXTS["launch_configs/README.md"]))) == configs


def test_the_quickstart_is_as_told() -> None:
    plan = parse([]).plan
    shown = blocks("text")[0]
    assert f"\nstep {plan.eval_steps:g}/{plan.max_steps} " in "\n" + shown
    assert f"\nstep {plan.max_steps}/{plan.max_steps} " in shown


def test_the_functions_of_the_loop_are_those_named() -> None:
    (row,) = [line for line in MAP.splitlines() if line.startswith("| `loop.py`")]
    named = set(re.findall(r"`([a-z_]+)`", row)) | {"train_step"}
    assert {"fit", "train_step"} <= named
    assert all(callable(getattr(loop, name)) for name in named)
    assert len((ROOT / "harness" / "loop.py").read_text(encoding="utf-8").splitlines()) < 250  # as the first page says
    assert callable(harness.run)
    assert callable(harness.latest_checkpoint)


@pytest.mark.parametrize("command", TYPED)
def test_each_command_of_ours_parses(command: str) -> None:
    if command in ASKED:
        return
    if (workers := re.search(r"slurm/array\.sbatch (?!-)(.*)$", command)) is not None:
        command = f"harness sweep {workers[1]}"
    if TRAINING.search(command + " "):
        parse(arguments_of(command))
    elif (other := OTHER.match(command)) is not None:
        parser = import_module(f"harness.commands.{other[1]}").parser()
        words, _, flags = other[2].partition(" -- ")
        _, rest = parser.parse_known_args(shlex.split(words))
        parse(shlex.split(flags))
        if other[1] == "submit":
            parse(rest)
        else:
            assert not rest
    else:
        assert not re.search(r"\bharness [a-z]|-m harness", command.partition('"$(')[0])


@pytest.mark.parametrize("command", ASKED)
def test_each_help_that_is_named_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = harness_command(shlex.split(command)[1:])
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code in (0, None)
    assert capsys.readouterr().out


def test_the_commands_are_those_of_the_pages() -> None:
    assert {word for command in TYPED for word in re.findall(r"\bharness ([a-z]+)", command)} == set(COMMANDS)


def test_a_command_asks_for_what_it_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in (("export", "runs/cola/checkpoint-500: no such folder"), ("sync", "runs: no such folder")):
        command = next(command for command in commands() if command.startswith(f"harness {name}"))
        assert harness_command(shlex.split(command)[1:]) == 2
        assert message in capsys.readouterr().err


def test_the_command_that_submits_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [command for command in commands() if command.startswith("harness submit")]
    assert harness_command(["submit", "--dry-run", *shlex.split(command)[2:]]) == 0
    assert "multi_node.sbatch --config quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_refused_flag_ends_with_2_and_the_remedy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--{name}", "1"]) == 2
    assert f"--{name} is not supported: {NOT_TAKEN[name]}" in capsys.readouterr().err


def test_the_task_of_ones_own_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = next(block for block in blocks("python") if "Network" in block)
    (tmp_path / "parabola.py").write_text(example, encoding="utf-8")
    command = next(command for command in commands() if "parabola:build" in command)
    assert command.startswith("PYTHONPATH=. harness train ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(".")
    assert main([*arguments_of(command), "--use_cpu"]) == 0
    output_dir = next((tmp_path / "runs").iterdir())
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 10
    assert str(output_dir.relative_to(tmp_path)) in capsys.readouterr().out


def test_the_example_in_python_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks("python", MAP) if "harness.run(" in block), names)  # noqa: S102
    losses = [row["eval_loss"] for row in names["result"].state.log_history if "eval_loss" in row]
    assert losses[-1] < losses[0] / 2
    given = {"harness": harness, "model": names["Network"](), "data": names["points"]}
    exec(next(block for block in blocks("python") if "harness.run(" in block), given)  # noqa: S102
    assert given["result"].state.global_step == 100  # type: ignore[attr-defined]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def train_example(page: str, folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Train with the `build` of a page's example, which replaces parts of a shipped task; returns the history."""
    (example,) = [block for block in blocks("python", page) if "replace(" in block]
    (folder / f"{folder.name}_example.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    run_of = ["--output_dir", str(folder / "run"), "--report_to", "none", "--use_cpu", "--save_strategy", "no"]
    assert main([*flags, f"--task={folder.name}_example:build", "--eval_strategy=epoch", "--seed=1", *run_of]) == 0
    history = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return list(history)


def test_the_first_pages_shipped_task_has_another_loss_and_other_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data.csv", labelled(4))
    flags = [flag for flag in label_flags(save_bert_tokenizer(tmp_path / "bert"), data) if "--task=" not in flag]
    history = train_example(README, tmp_path, [*flags, f"--validation_file={data}"], monkeypatch)
    found = next(entry for entry in history if "eval_loss" in entry)
    assert {"eval_f1", "eval_recall"} < set(found)
    assert "eval_accuracy" not in found
    # As many of either class, of which one weighs five times: 3 times the mean of the plain loss.
    assert found["eval_loss"] == pytest.approx(3 * math.log(2), rel=0.1)


def test_a_shipped_task_takes_all_parts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = text_flags(save_gpt_tokenizer(tmp_path / "gpt"), write_text(tmp_path / "text.txt"))
    flags = [*(flag for flag in flags if "--task=" not in flag), "--logging_steps=5", "--max_steps=20"]
    history = train_example(TEXTS["harness/tasks/README.md"], tmp_path, flags, monkeypatch)
    found = next(entry for entry in history if "eval_loss" in entry)
    assert 0 < found["eval_error_rate"] <= 1
    assert found["eval_perplexity"] == math.exp(found["eval_loss"])
    assert {entry["step"] for entry in history if "embedding_norm" in entry} == {10, 20}


def test_the_tracker_works_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    example = next(block for block in blocks("python", TRACKING) if "from harness.tracking import" in block)
    (tmp_path / "by_hand.py").write_text(example, encoding="utf-8")
    done = run([sys.executable, "by_hand.py"], tmp_path, PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    (tracked,) = read_all(tmp_path)
    assert (tracked.project, tracked.display_name, tracked.exit_code) == ("demo", "by-hand", 0)
    assert tracked.config["lr"] == 0.01
    assert [row["train/global_step"] for row in tracked.rows] == list(range(1, 33))
    assert tracked.rows[-1]["train/loss"] < tracked.rows[0]["train/loss"]
    watched = [row["train/global_step"] for row in tracked.rows if "gradients/0.weight._type" in row]
    assert watched == list(range(4, 33, 4))


def test_the_korean_page_has_the_same_code() -> None:
    korean = TEXTS["README.ko.md"]
    assert re.findall(r"^```.*?^```$", korean, re.MULTILINE | re.DOTALL) == re.findall(
        r"^```.*?^```$", README, re.MULTILINE | re.DOTALL
    )
    assert commands(korean) == commands()
    assert len(re.findall(r"^#+ ", korean, re.MULTILINE)) == len(re.findall(r"^#+ ", README, re.MULTILINE))
    assert len(re.findall(r"^\|", korean, re.MULTILINE)) == len(re.findall(r"^\|", README, re.MULTILINE))
    linked = [{target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", page)} for page in (korean, README)]
    assert linked[0] - {"README.md"} == linked[1] - {"README.ko.md"}


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


@pytest.mark.parametrize(
    "command", [["-m", "harness", "train"], [str(ROOT / "harness" / "train.py")]], ids=["module", "script"]
)
def test_the_entry_points_are_the_same_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Under WANDB_MODE=offline transformers prints a line when its Trainer is imported.
    monkeypatch.delenv("WANDB_MODE")
    done = run([sys.executable, *command, "--print_config"], tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert main(["--print_config"]) == 0
    assert done.stdout == capsys.readouterr().out


def test_the_installed_commands_are_those_functions() -> None:
    installed = {name: entry_points(group="console_scripts", name=name) for name in ("harness", "harness-train")}
    assert [each.value for each in installed["harness-train"]] == ["harness.train:script"]
    assert [each.value for each in installed["harness"]] == ["harness.__main__:script"]
