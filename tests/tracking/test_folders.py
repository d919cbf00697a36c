"""A ~ is the home; a folder for W&B that can't be written to is one line ahead of a training, or nobody's matter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.flags import parse
from harness.tracking import TrackingConfig
from harness.tracking.flags import LONGEST
from harness.tracking.folders import VARIABLES, check_folders, expand_folders
from tests.support.faulty_training import Training
from tests.support.wandb.artifact_processes import environment

SHORT: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "wandb_log_model": None}


def test_a_tilde_is_the_home_in_each_of_wandbs_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.setenv(name, f"~/{name}")
    expand_folders()
    assert {name: os.environ[name] for name in VARIABLES} == {name: f"{tmp_path}/{name}" for name in VARIABLES}
    assert TrackingConfig(wandb_dir="~/here").wandb_dir == f"{tmp_path}/here"
    assert TrackingConfig(wandb_dir="~nobody-at-all/here").wandb_dir == "~nobody-at-all/here"
    check_folders(str(tmp_path / "not" / "there" / "yet"))
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_in_flags_that_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").touch()
    config = parse(["--train_file=~/text.txt", "--model_type=gpt2", "--tokenizer_name=~", "--run_name=~"])
    assert (config.task.train_file, config.task.tokenizer_name) == ([f"{tmp_path}/text.txt"], str(tmp_path))
    assert config.tracking.run_name == "~"


def test_a_folder_that_can_not_be_written_to_is_named_with_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("WANDB_DATA_DIR", str(file / "below"))
    with pytest.raises(ConfigError) as refused:
        check_folders(str(file))
    assert refused.value.problems == (
        f"--wandb_dir (WANDB_DIR)={file} can't hold W&B's files of a run: {file} is no folder. "
        "Choose another folder, or leave it out.",
        f"WANDB_DATA_DIR={file}/below can't hold tables and artifacts on their way to W&B: {file} is no folder. "
        "Choose another folder, or leave it out.",
    )
    monkeypatch.delenv("WANDB_DATA_DIR")
    with pytest.raises(ConfigError, match="=/proc/none can't hold W&B's files of a run: "):
        check_folders("/proc/none")


@pytest.mark.parametrize("flag", [*LONGEST, "wandb_tags", "WANDB_NAME"])
def test_what_is_longer_than_w_and_b_takes_is_refused_offline_too(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_NAME", raising=False)

    def given(length: int, **more: Any) -> TrackingConfig:
        text, modes = "x" * length, {"wandb_mode": "offline", "wandb_log_model": "end", **more}
        if flag == "WANDB_NAME":
            monkeypatch.setenv(flag, text)
            return TrackingConfig(**modes)
        return TrackingConfig(**modes, **{flag: [text] if flag == "wandb_tags" else text})

    most = {"wandb_tags": 64, "wandb_job_type": 64}.get(flag, 128)
    given(most)
    with pytest.raises(ConfigError, match=rf"{flag}.* has {most + 1} characters: W&B takes .*{most}"):
        given(most + 1)
    given(most + 1, wandb_mode="disabled")
    given(most + 1, report_to=["none"])
    if flag == "wandb_tags":
        with pytest.raises(ConfigError, match="has 0 characters"):
            given(0)


@pytest.mark.slow
def test_a_folder_that_is_none_is_one_line_and_with_wandb_disabled_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    bad = {name: str(file) for name in VARIABLES} | {"WANDB_MODE": "offline"}
    refused = Training(tmp_path / "refused", None, variables=bad, **SHORT).ended(2)
    assert "Traceback" not in refused.err
    assert refused.err.count("is no folder") == 2
    for off in ({"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}):
        name = "-".join(off)
        assert "Traceback" not in Training(tmp_path / name, None, variables={**bad, **off}, **SHORT).ended().err
    file.unlink()
    home = environment(tmp_path / "home-of")["HOME"]
    Path(home).mkdir(parents=True)
    tilde = {name: f"~/{name}" for name in VARIABLES} | {"WANDB_MODE": "offline", "HOME": home}
    ended = Training(tmp_path / "tilde", None, variables=tilde, **SHORT).ended()
    assert list((Path(home) / "WANDB_DIR" / "wandb").glob("offline-run-*"))
    assert not list((tmp_path / "tilde").rglob("~"))
    assert ended.report[0].startswith("offline; ")
