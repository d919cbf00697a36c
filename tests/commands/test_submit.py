"""`harness submit`: what would fail in the queue is refused before, what would not is handed to sbatch."""

from __future__ import annotations

import os
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.commands import checks
from harness.commands.submit import ROOT

CPU = ("--gpus-per-node", "0")
# Name: options, flags of train.py, and what the message must say.
WRONG: dict[str, tuple[list[str], str]] = {
    "time": (["--time", "12h"], "--time=12h: write it as 12:00:00"),
    "nodes": (["--nodes", "0"], "--nodes=0: use 1 or more"),
    "no number": (["--nodes", "two"], "Argument --nodes: invalid int value"),
    "gpus": (["--gpus-per-node", "-1"], "--gpus-per-node=-1: use 0 (train on the CPU) or more"),
    "array": (["--array", "a-b"], "--array=a-b: write it as 0-7"),
    "array of many nodes": (["--array", "0-3", "--nodes", "2"], "each task of a sweep is on one node; leave one out"),
    "unknown flag": ([*CPU, "--learning_rat", "1"], "--learning_rat"),
    "bad value": ([*CPU, "--max_steps", "many"], "--max_steps"),
    "unknown recipe": ([*CPU, "--config", "nonesuch"], "nonesuch"),
    "owned by the launch config": ([*CPU, "--deepspeed", "x.json"], "choose a launch config with"),
    "no launch config": ([*CPU, "--launch-config", "nonesuch.yaml"], "no such file; see launch_configs/"),
    "no YAML": ([*CPU, "--launch-config", "broken.yaml"], "broken.yaml can't be read"),
    "one process": (["--gpus-per-node", "2", "--launch-config", "single.yaml"], "use launch_configs/ddp.yaml"),
    "MULTI_CPU": (["--launch-config", "multi_cpu.yaml"], "MULTI_CPU is not supported"),
    "FSDP1": (["--launch-config", "fsdp1.yaml"], "use launch_configs/fsdp2.yaml"),
    "CPU on GPUs": (["--launch-config", "cpu_2.yaml"], "give --gpus-per-node 0, or take it out"),
    "fp16 on CPU": ([*CPU, "--nodes", "2", "--launch-config", "ddp_fp16.yaml"], "mixed_precision: fp16 needs a GPU"),
    "train file": ([*CPU, "--task", "causal-lm", "--train_file", "none.txt"], "--train_file=none.txt: no such file"),
    "model not cached": (
        [*CPU, "--no-internet", "--model_name_or_path", "no/model", "--train_file", "a.txt"],
        "--model_name_or_path=no/model is not in the cache, and the nodes have no internet: run `hf download no/model`",
    ),
    "name that only a library knows": ([*CPU, "--optim=adamm"], "--optim=adamm is not known"),
    "path of a model": (
        [*CPU, "--model_name_or_path", "runs/cola/checkpoint-500", "--train_file", "a.txt"],
        "--model_name_or_path=runs/cola/checkpoint-500: no such folder",
    ),
    "path of a model of nodes without internet": (
        [*CPU, "--no-internet", "--model_name_or_path", "./nope", "--train_file", "a.txt"],
        "--model_name_or_path=./nope: no such folder",
    ),
    "new model to evaluate": ([*CPU, "--config", "quickstart", "--do_eval"], "--do_eval without --do_train"),
    "model in W&B": (
        [*CPU, "--no-internet", "--model_name_or_path", "wandb:a/b/c:v0", "--train_file", "a.txt"],
        "needs the network, and the nodes have none",
    ),
    "data not cached": (
        [*CPU, "--no-internet", "--model_type", "gpt2", "--tokenizer_name", "here", "--dataset_name", "no/data"],
        "run `HF_HUB_OFFLINE=0 hf download no/data --repo-type dataset` here first",
    ),
    "online without internet": (
        [*CPU, "--no-internet", "--wandb_mode", "online"],
        "--wandb_mode=online with --no-internet: leave one of them out",
    ),
    "online without login": ([*CPU, "--wandb_mode", "online"], "run `wandb login`"),
    "disk": (
        [*CPU, "--model_type", "gpt2", "--config_overrides", "n_embd=400000,n_head=8", "--save_total_limit", "9"],
        "smaller --save_total_limit",
    ),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with some files, no login and no variables."""
    for path in (ROOT / "launch_configs").glob("*.yaml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    (tmp_path / "multi_cpu.yaml").write_text("distributed_type: MULTI_CPU", encoding="utf-8")
    (tmp_path / "fsdp1.yaml").write_text("distributed_type: FSDP", encoding="utf-8")
    (tmp_path / "a.txt").write_text("Text.\n", encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_with_the_remedy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, remedy = WRONG[name]
    assert main(["submit", "--dry-run", *arguments]) == 2
    said = capsys.readouterr()
    assert remedy in said.err
    assert said.err.count("harness submit: ") == len(said.err.splitlines()) == 1
    assert "sbatch --" not in said.out


def test_without_deepspeed_its_launch_configs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["submit", "--dry-run", *CPU, "--launch-config", "zero2.yaml"])
    said = capsys.readouterr()
    if find_spec("deepspeed") is None:
        assert (code, "pip install 'accelerate-harness[deepspeed]'" in said.err) == (2, True)
    else:
        assert (code, said.err) == (0, "")


def test_the_exact_line_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(*arguments: str) -> list[str]:
        assert main(["submit", "--dry-run", *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    asked = ["--nodes", "4", "--gpus-per-node", "8", "--time", "12:00:00", "--partition", "p", "--account", "a"]
    flags = ["--config", "quickstart", "--learning_rate", "1e-3", "--run_name", "two words"]
    said = lines(*asked, "--sbatch=--qos=high", "--no-internet", *flags)
    options = "--nodes=4 --gpus-per-node=8 --time=12:00:00 --partition=p --account=a --qos=high"
    assert said[-2] == (
        f"HARNESS_DIR={ROOT} WANDB_MODE=offline HF_HUB_OFFLINE=1 sbatch {options} {ROOT}/slurm/multi_node.sbatch "
        "--config quickstart --learning_rate 1e-3 --run_name 'two words'"
    )
    assert said[-1] == "Not submitted (--dry-run)."
    assert "checked: ddp.yaml on 32 processes" in said
    assert any("parameters, about" in line and "--save_total_limit 2" in line for line in said)
    monkeypatch.chdir(ROOT)
    assert lines(*CPU, "--report_to", "none")[-2] == (
        "sbatch --nodes=1 --gpus-per-node=0 slurm/single_node.sbatch --report_to none"
    )
    sweep = ["--array", "0-2%1", "--launch-config", "launch_configs/ddp_bf16.yaml"]
    assert lines(*sweep)[-2] == (
        f"LAUNCH_CONFIG={ROOT}/launch_configs/ddp_bf16.yaml sbatch --nodes=1 --array=0-2%1 slurm/array.sbatch"
    )


def test_the_size_of_a_model_is_known_before_it_is_made() -> None:
    from harness.flags import parse

    config = parse(["--model_type", "gpt2", "--train_file", "a.txt", "--tokenizer_name", "here"])
    assert checks.num_parameters(config.task) == 124_439_808  # GPT-2's
    config = parse(["--model_type", "gpt2", "--train_file", "a.txt", "--save_total_limit", "2", "--save_only_model"])
    said = checks.check_disk(config, Path("runs/new"))
    assert "124.4 M parameters, about 0.46 GiB a checkpoint, up to 3 of them at once" in said


def test_what_is_in_the_caches_is_found_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folders of huggingface_hub and datasets."""
    model = tmp_path / "cache" / "models--Some--Model"
    (model / "snapshots" / "0123").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    (model / "snapshots" / "0123" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    data = tmp_path / "cache" / "Some___my_data" / "english-0a1b" / "0.0.0" / "4567"
    data.mkdir(parents=True)
    named = "--model_name_or_path Some/Model --dataset_name Some/MyData --dataset_config_name english"
    asked = ["submit", "--dry-run", *CPU, "--no-internet", *named.split(), "--cache_dir", str(tmp_path / "cache")]
    assert main(asked) == 2
    assert f"run `hf download Some/Model --cache-dir {tmp_path}/cache` here first" in capsys.readouterr().err
    (model / "snapshots" / "0123" / "model.safetensors").touch()
    assert main(asked) == 2
    fetch = f"hf download Some/MyData --repo-type dataset --cache-dir {tmp_path}/cache"
    assert fetch in capsys.readouterr().err
    (data / "dataset_info.json").touch()
    assert main(asked) == 0
    assert "53.6 M parameters" in capsys.readouterr().out


def test_without_a_cluster_it_says_where_to_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *CPU, "--report_to", "none"]) == 2
    assert "run this on the cluster's login node, or give --dry-run" in capsys.readouterr().err


def test_what_sbatch_refuses_is_said_and_what_it_takes_is_followed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SLURM's place is taken by a script that keeps what it was given; tests/slurm submits to a real one."""
    sbatch = tmp_path / "sbatch"
    given = tmp_path / "given"
    sbatch.write_text(f'#!/bin/sh\necho "$WANDB_MODE" "$@" > {shlex.quote(str(given))}\necho "17;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["submit", *CPU, "--no-internet", "--max_steps", "3"]) == 0
    said = capsys.readouterr().out
    assert given.read_text().startswith("offline --parsable --nodes=1 --gpus-per-node=0 ")
    assert given.read_text().endswith("single_node.sbatch --max_steps 3\n")
    for part in (
        "Submitted job 17.",
        "tail -F slurm-17.out",
        "runs/job-17",
        "harness sync runs --until-finished",
        "scancel 17",
    ):
        assert part in said
    sbatch.write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    assert main(["submit", *CPU, "--partition", "none"]) == 1
    assert "sbatch refuses the job: invalid partition" in capsys.readouterr().err
