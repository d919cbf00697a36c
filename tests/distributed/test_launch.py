"""Real launches: accelerate, torchrun, plain Python; several processes, and those that must not start."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator

from harness.distributed.accelerator import _check_processes
from harness.distributed.launch import launcher_arguments, read_launch
from harness.errors import ConfigError
from harness.train import main
from tests.support.faulty_training import Training
from tests.support.launching import DDP, PLAIN, ROOT, SCRIPT, flags, launcher, run, torchrun
from tests.support.parity import AS_TRAINER, TRAINING, assert_equal_runs, history, without_ours
from tests.support.wandb.file import read_all
from tests.support.wandb_server import WandbServer

# Two processes, and 117 samples: the Trainer fills the last round up with samples that count again.
ARGUMENTS = {
    **TRAINING,
    **AS_TRAINER,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "ddp_find_unused_parameters": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Trainer on two processes."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    call = json.dumps({"folder": str(folder), "arguments": {**ARGUMENTS, "save_strategy": "no"}})
    ended = run([*launcher(DDP), "-m", "tests.support.trainer_script", call])
    assert ended.code == 0, ended.err[-3000:]
    assert "processes: 2" in ended.out
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by our script."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    ended = run([*launcher(DDP), SCRIPT, *flags(folder, {**ARGUMENTS, "expect_num_processes": 2})], forked=False)
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("step 1/8") == 1, "one rank speaks"
    return folder


def processes_of(folder: Path) -> int:
    manifest = json.loads((folder / "checkpoint-3" / "harness_state.json").read_text(encoding="utf-8"))
    return int(manifest["world_size"])


def test_two_processes_are_the_trainer_on_two(trainers: Path, ours: Path) -> None:
    assert processes_of(ours) == 2
    assert any("eval_loss" in entry for entry in history(ours))
    assert_equal_runs(trainers, ours)


@pytest.mark.slow
def test_by_default_the_loss_of_evaluations_and_of_a_step_that_is_filled_up_are_others(
    trainers: Path, tmp_path: Path
) -> None:
    by_default = without_ours(ARGUMENTS)
    folder = tmp_path / "out"
    ended = run([*launcher(DDP), SCRIPT, *flags(folder, {**by_default, "expect_num_processes": 2})])
    assert ended.code == 0, ended.err[-3000:]
    others = {
        (event["step"], name)
        for theirs, event in zip(history(trainers), history(folder), strict=True)
        for name in theirs
        if event[name] != theirs[name]
    }
    of_the_last_step = {(8, name) for name in ("loss", "grad_norm", "eval_loss", "total_flos", "train_loss")}
    assert others == {(4, "eval_loss"), *of_the_last_step}


def test_each_rank_has_its_generators_in_a_checkpoint(ours: Path) -> None:
    names = {path.name for path in (ours / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "harness_state.json"} <= names
    assert "rng_state.pth" not in names


@pytest.mark.slow
def test_a_resume_on_two_processes_in_mid_epoch_is_the_uninterrupted_trainer(
    trainers: Path, ours: Path, tmp_path: Path
) -> None:
    assert processes_of(ours) == 2
    resumed = tmp_path / "resumed"
    arguments = {**ARGUMENTS, "resume_from_checkpoint": ours / "checkpoint-3"}
    ended = run([*launcher(DDP), SCRIPT, *flags(resumed, arguments)])
    assert ended.code == 0, ended.err[-3000:]
    assert ended.out.count("Going on from") == 1
    assert "step 1/8" not in ended.out
    assert_equal_runs(trainers, resumed)


@pytest.mark.slow
def test_torchrun_trains_the_same(ours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ended = run([*torchrun(2), SCRIPT, *flags(folder, {**ARGUMENTS, "expect_num_processes": 2})], forked=False)
    assert ended.code == 0, ended.err[-3000:]
    assert processes_of(folder) == 2
    assert_equal_runs(ours, folder)


def test_a_checkpoint_of_two_processes_is_refused_by_one_with_another_global_batch(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert processes_of(ours) == 2
    arguments = {**ARGUMENTS, "resume_from_checkpoint": ours / "checkpoint-3"}
    assert main([*flags(tmp_path / "out", arguments), "--use_cpu"]) == 2
    shown = capsys.readouterr().err
    assert "16 samples: --per_device_train_batch_size 4 x --gradient_accumulation_steps 2 x 2 processes" in shown
    assert "(now 8 samples: --per_device_train_batch_size 4 x --gradient_accumulation_steps 2 x 1 processes)" in shown
    assert "--allow_changed_data_order" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", PLAIN, ids=lambda path: path.stem)
def test_every_launch_config_trains(config: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    arguments = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "expect_num_processes": content["num_processes"]}
    ended = run([*launcher(config), SCRIPT, *flags(tmp_path / "out", arguments)], forked=False)
    assert ended.code == 0, ended.err[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert ended.out.count("step 1/2") == 1
    manifest = json.loads((tmp_path / "out" / "checkpoint-2" / "harness_state.json").read_text(encoding="utf-8"))
    assert manifest["arguments"]["mixed_precision"] == content["mixed_precision"]
    assert manifest["arguments"]["device"] == "cpu" or not content.get("use_cpu")


@pytest.mark.slow
def test_a_refusal_after_the_processes_have_met_is_said_once(tmp_path: Path) -> None:
    arguments = {"resume_from_checkpoint": "true"}
    ended = run([*launcher(DDP), SCRIPT, *flags(tmp_path / "out", arguments)])
    assert ended.code != 0
    assert ended.err.count("harness train: ") == 1
    assert "no whole checkpoint" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_others_its_own_traceback_first(tmp_path: Path, rank: int) -> None:
    # Sample 48 is in the sixth batch of a rank, which is drawn ahead, with the data of step 5.
    task = {"fault_rank": rank, "raises_at": 48}
    command = (*launcher(DDP), SCRIPT)
    training = Training(tmp_path / "run", None, command=command, task=task, expect_num_processes=2).ended(code=1)
    assert "step 4/16" in training.out
    assert "step 5/16" not in training.out
    lines = training.err.splitlines()
    first = next(i for i, line in enumerate(lines) if "Traceback" in line)
    after = lines[first:]
    raised = next(i for i, line in enumerate(after) if "RuntimeError: sample 48 can't be read" in line)
    assert not any("Traceback" in line for line in after[1:raised])
    assert "tests/support/tasks/faulty_task.py" in after[raised - 2] + after[raised - 3] + after[raised - 4]
    times = training.folder / ("times-1" if rank else "times")
    seconds = time.monotonic() - float(times.read_text().split()[-1])
    assert seconds < 25, "the launcher ended long after the error"
    (saved,) = read_all(tmp_path)
    assert saved.exit_code == 1


@pytest.mark.slow
def test_wandb_learns_of_the_failure_though_the_launcher_ends_rank_zero_meanwhile(tmp_path: Path) -> None:
    task = {"fault_rank": 1, "raises_at": 80}
    command = (*launcher(DDP), SCRIPT)
    with WandbServer(tmp_path / "server") as server:
        training = Training(tmp_path / "run", server, pace=0.2, command=command, task=task, expect_num_processes=2)
        training.reach(3)
        server.fault("hang", "file_stream", seconds=10)  # rank zero still delivers when the launcher's SIGTERM comes
        training.ended(code=1)
        assert "closing signal SIGTERM" in training.err
        assert (server.run("run").state, server.run("run").exit_code) == ("failed", 1)


def config_of(kind: str, folder: Path) -> Path:
    path = folder / "launch.yaml"
    values: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind, "num_processes": 2}
    values |= {"num_machines": 1, "mixed_precision": "no"}
    if kind == "FSDP":
        values["fsdp_config"] = {"fsdp_version": 1, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    if kind == "DEEPSPEED":
        values["deepspeed_config"] = {"zero_stage": 2}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


ONE_PROCESS = (
    r"accelerate launch was asked for 2 processes and started 1: MULTI_CPU, NO and --cpu start one\. Use MULTI_GPU, .*"
    r"launch_configs/cpu_2.yaml.*: change "
)
# What accelerate does without a word: several trainings where one was meant. None: it is made to work.
SILENT: dict[str, tuple[str, list[str], str | None]] = {
    "MULTI_CPU starts one process": ("MULTI_CPU", [], ONE_PROCESS + r"`distributed_type` in \S*launch.yaml, line 2\."),
    # FSDP2 is made to work, in test_fsdp.py.
    "FSDP without an accelerator": ("FSDP", [], r"FSDP without .*`fsdp_version` in \S*launch.yaml, line 7"),
    "MULTI_GPU without an accelerator, and gloo asked for": ("MULTI_GPU", ["--ddp_backend=gloo"], None),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SILENT)
def test_a_silent_failure_of_the_launch_is_refused_or_made_to_work(what: str, tmp_path: Path) -> None:
    # DeepSpeed without an accelerator is made to work too: every test of test_zero.py is such a launch.
    kind, options, says = SILENT[what]
    ours = [option for option in options if "ddp" in option]
    command = [*launcher(config_of(kind, tmp_path), *[option for option in options if option not in ours]), SCRIPT]
    arguments = {"max_steps": 2, "logging_steps": 1, "save_steps": 2}
    ended = run([*command, *flags(tmp_path / "out", arguments), *ours], forked=False)
    if says is None:
        assert ended.code == 0, ended.err[-3000:]
        assert ended.out.count("step 1/2") == 1
        manifest = json.loads((tmp_path / "out" / "checkpoint-2" / "harness_state.json").read_text(encoding="utf-8"))
        assert manifest["world_size"] == 2
        return
    assert ended.code != 0
    assert ended.err.count("harness train: ") == 1
    assert re.search(says, ended.err), ended.err[-3000:]
    assert "exit status 2" in ended.err or "exitcode  : 2 " in ended.err, "the code of train.py itself"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "distributed_type: FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type: DEEPSPEED"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--bf16 contradicts mixed_precision: fp16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_rank_that_must_not_start_ends_with_2(
    variables: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argv = [*flags(tmp_path / "out", {}), "--bf16"]
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert says in shown
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("harness.train.SECONDS_FOR_RANK_ZERO", 0.5)
    began = time.monotonic()
    assert main(argv) == 2
    assert time.monotonic() - began > 0.5, "rank zero speaks for all, and the launcher ends all with the first"
    assert "(not on rank zero)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
INSTALLED = {name: shutil.which(name, path=PATH) for name in ("harness", "harness-train")}


@pytest.mark.slow
def test_all_ways_to_start_are_the_same_from_any_folder(tmp_path: Path) -> None:
    argv = ["--train_file=x.txt", "--print_config"]
    (tmp_path / "logging.py").write_text("raise ImportError('not this one')\n", encoding="utf-8")
    ways = [
        [sys.executable, SCRIPT],
        [sys.executable, "-P", "-m", "harness.train"],
        [sys.executable, "-P", "-m", "harness", "train"],
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "-m", "harness", "train"],
        *([[INSTALLED["harness"], "train"]] if INSTALLED["harness"] else []),
        *([[INSTALLED["harness-train"]]] if INSTALLED["harness-train"] else []),
    ]
    # Only -P, or for the process that accelerate starts this, keeps the folder in which one stands off the path.
    safe = {"PYTHONSAFEPATH": "1"}
    found = [run([*way, *argv], cwd=tmp_path, forked=False, **(safe if "launch" in way else {})) for way in ways]
    assert [ended.code for ended in found] == [0] * len(ways), found[0].err[-2000:]
    assert len({ended.out for ended in found}) == 1
    assert yaml.safe_load(found[0].out)["train_file"] == "x.txt"
    assert len(ways) == 6 or None in INSTALLED.values()


@pytest.mark.slow
def test_printed_config_is_yaml_with_wandb_offline_too(tmp_path: Path) -> None:
    ended = run(
        [sys.executable, SCRIPT, "--train_file=x.txt", "--print_config"],
        cwd=tmp_path,
        forked=False,
        WANDB_MODE="offline",
    )
    assert ended.code == 0
    assert yaml.safe_load(ended.out)["train_file"] == "x.txt"


@pytest.mark.slow
def test_the_script_does_not_put_its_own_folder_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import harness.train\n"
        f"assert {str(ROOT / 'harness')!r} not in sys.path\n"
        "from tests.support.tasks.parity_task import build\n",
        encoding="utf-8",
    )
    argv = [*flags(tmp_path / "out", {"max_steps": 1}), "--use_cpu"]
    argv[0] = "--task=own_task:build"
    ended = run([sys.executable, SCRIPT, *argv], cwd=tmp_path, forked=False, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert ended.code == 0, ended.err[-2000:]
    assert re.search(r"^folder +", ended.out, re.MULTILINE)


LAUNCHES = {
    "a file": (["--config_file", "{file}", "train.py"], 2, "`num_processes` in {file}, line 3"),
    "a flag": (["--config_file={file}", "--num_processes", "4", "train.py"], 4, "--num_processes of accelerate launch"),
    "no more": (["--config_file={file}", "train.py", "--num_processes=4"], 2, "`num_processes` in {file}, line 3"),
    "a module": (["--config_file", "{file}", "-m", "harness", "train"], 2, "`num_processes` in {file}, line 3"),
    "no file": (["--cpu", "train.py"], None, "`num_processes` (accelerate launch --help)"),
}
WAYS = {
    "script": ["/usr/bin/python", "/usr/bin/accelerate", "launch"],
    "command": ["/usr/bin/python", "/usr/bin/accelerate-launch"],
    "module": ["python", "-u", "-m", "accelerate.commands.launch"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", LAUNCHES)
def test_what_a_launch_was_told_is_read_from_its_command_line(what: str, way: str, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text("# num_processes: 9\ndistributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n")
    options, num_processes, place = LAUNCHES[what]
    found = launcher_arguments([*WAYS[way], *[option.format(file=file) for option in options]])
    assert found is not None
    launch = read_launch(found)
    assert launch is not None
    assert launch.num_processes == num_processes
    assert launch.where("num_processes") == place.format(file=file)
    assert launch.uses_cpu
    assert launch.where("distributed_type") == (
        f"`distributed_type` in {file}, line 2" if launch.path else "--cpu of accelerate launch"
    )


@pytest.mark.parametrize(
    "command", [["python", "train.py"], ["bash", "-c", "accelerate launch x"], ["accelerate", "env"]]
)
def test_another_command_is_no_launch(command: list[str]) -> None:
    assert launcher_arguments(command) is None


def test_a_key_is_found_in_the_file_of_deepspeeds_own_too(tmp_path: Path) -> None:
    own, file = tmp_path / "ds.json", tmp_path / "launch.yaml"
    own.write_text('{\n  "gradient_clipping": 0.5\n}\n')
    file.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: {own}\n")
    launch = read_launch([f"--config_file={file}", "train.py"])
    assert launch is not None
    assert launch.where("gradient_clipping") == f"`gradient_clipping` in {own}, line 2"
    assert launch.where("num_machines") == f"`num_machines`, which {file} does not have"


@pytest.mark.parametrize(
    ("text", "options", "backend"),
    [
        ("dynamo_config:\n  dynamo_backend: INDUCTOR\n", [], "INDUCTOR"),
        ("dynamo_config:\n  backend: aot_eager\n", [], "aot_eager"),
        ("dynamo_backend: EAGER\n", [], "EAGER"),
        ("dynamo_config:\n  dynamo_backend: 'NO'\n", ["--dynamo_backend=inductor"], "inductor"),
        ("dynamo_config:\n  dynamo_backend: INDUCTOR\n", ["--dynamo_backend=no"], ""),
        ("dynamo_config:\n  dynamo_backend: 'NO'\n", [], ""),
        ("dynamo_config: {}\n", [], ""),
        ("num_processes: 1\n", [], ""),
    ],
)
def test_the_compiler_that_a_launch_asks_for_is_known(
    text: str, options: list[str], backend: str, tmp_path: Path
) -> None:
    (tmp_path / "launch.yaml").write_text(text)
    launch = read_launch([f"--config_file={tmp_path / 'launch.yaml'}", *options, "train.py"])
    assert launch is not None
    assert launch.compile_backend == backend


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    says = r"started 2 processes, the process group has 1 and accelerate 1 .*: change `distributed_type` of the launch"
    with pytest.raises(ConfigError, match=says):
        _check_processes(accelerator)
    monkeypatch.setenv("WORLD_SIZE", "1")
    _check_processes(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="says distributed_type: DEEPSPEED, but accelerate made it NO"):
        _check_processes(accelerator)
