"""What a sweep agent gives a process is read from its file, and left out where it is repeated on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.agent import sweep_run
from harness.checkpoint.find import in_sweep
from harness.checkpoint.flags import CheckpointConfig
from harness.errors import ConfigError
from harness.flags import Reading, read
from tests.support.launching import ROOT

PARAMETERS = {"learning_rate": 1e-5, "bf16": False, "logging_first_step": True, "wandb_tags": ["a", "b"]}
NESTED = {"lr_scheduler_kwargs": {"num_cycles": 2}}
# What W&B gives for a run that it resumes: all of the run's configuration.
OF_A_RUN: dict[str, Any] = {
    **PARAMETERS,
    "_wandb": {"cli_version": "0.31.0"},
    "dtype": "float32",
    "vocab_size": 64,
    "harness": {"software": {"torch": "2.13"}, "sweep_parameters": sorted(PARAMETERS)},
    "seed": 7,
    "token": "<TOKEN>",
}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes what an agent gives, with the values of its variables."""

    def write(values: dict[str, Any]) -> Path:
        file = tmp_path / "config-r.yaml"
        file.write_text(
            yaml.safe_dump({"wandb_version": 1, **{k: {"value": v} for k, v in values.items()}}, sort_keys=False)
        )
        names = {"SWEEP_ID": "s", "RUN_ID": "r", "PROJECT": "p", "SWEEP_PARAM_PATH": str(file)}
        for name, value in names.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        return file

    return write


def reading(*argv: str, is_strict: bool = True) -> Reading:
    return read(["--task", "causal-lm", *argv], sweep=sweep_run(is_strict=is_strict))


def as_command(form: str, values: dict[str, Any], file: Path) -> list[str]:
    """What the agent makes of `${form}`."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    if form == "args_json_file":
        return [str(file.with_suffix(".json"))]
    return list(create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})[form])


FORMS = (
    *("args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json", "args_json_file"),
    *("args_append_hydra", "args_override_hydra"),
)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_the_arguments_gives_the_same_values(form: str, given: Any) -> None:
    values = {**PARAMETERS, **NESTED}
    file = given(values)
    found = reading("--seed", "3", *as_command(form, values, file), "--max_steps=9")
    config = found.checked()
    assert {name: config.flat()[name] for name in values} == values
    assert (config.flat()["seed"], config.flat()["max_steps"], found.notes) == (3, 9, [])
    assert found.origins["learning_rate"] == "sweep"


def test_without_the_arguments_on_the_command_line_they_hold_too(given: Any) -> None:
    given(PARAMETERS)
    assert reading().checked().optim.learning_rate == 1e-5


def test_a_run_that_is_resumed_takes_the_parameters_of_its_sweep_alone(given: Any) -> None:
    file = given(OF_A_RUN)
    config = reading("--max_steps=9", "--seed=7", *as_command("args", OF_A_RUN, file), "--bf16=False").checked()
    assert {name: config.flat()[name] for name in PARAMETERS} == PARAMETERS
    assert (config.flat()["max_steps"], config.flat()["dtype"]) == (9, None)
    assert config.flat()["seed"] == 7, "it is typed, and what the agent has put there looks the same"
    assert reading("--seed=3").checked().flat()["seed"] == 3
    assert reading(*as_command("args", OF_A_RUN, file)).checked().flat()["seed"] == 42


def test_where_the_file_is_not_the_command_line_has_the_parameters(given: Any) -> None:
    given(PARAMETERS).unlink()
    config = reading(
        "--learning_rate=1e-05", "--bf16=False", "--logging_first_step=True", "--_wandb={'a': 1}"
    ).checked()
    assert (config.optim.learning_rate, config.plan.logging_first_step) == (1e-5, True)


def test_words_of_an_agent_are_unknown_without_one() -> None:
    with pytest.raises(ConfigError, match="--_wandb is not a known flag"):
        reading("--_wandb={'a': 1}").checked()


@pytest.mark.parametrize(
    ("parameter", "why"),
    [
        ("learning_rat", "Sweep s: its parameter learning_rat is not a known flag. Did you mean learning_rate?"),
        ("warmup_ratio", "Sweep s: its parameter warmup_ratio is not supported: --warmup_steps takes a share"),
    ],
)
def test_a_parameter_that_is_no_flag_is_refused_except_in_a_script(parameter: str, why: str, given: Any) -> None:
    given({parameter: 0.1})
    with pytest.raises(ConfigError, match=why.replace("?", r"\?")):
        reading().checked()
    assert reading(is_strict=False).checked().optim.learning_rate == 5e-5


def test_a_value_that_no_flag_takes_is_refused(given: Any) -> None:
    given({"learning_rate": "fast"})
    with pytest.raises(ConfigError, match="--learning_rate: invalid float value: 'fast'"):
        reading("--learning_rate=fast").checked()


def test_what_is_typed_beside_a_parameter_holds_and_is_said_where_it_differs(given: Any) -> None:
    given(PARAMETERS)
    found = reading("--learning_rate", "0.1", "--logging-first-step", "--bf16=no")
    assert found.checked().optim.learning_rate == 0.1
    assert [*found.notes] == [
        "--learning_rate=0.1 overrules sweep s, which has 1e-05: the training takes 0.1, W&B goes on showing 1e-05. "
        "Take it out of one of them."
    ]


def test_which_run_it_is_says_w_and_b(given: Any) -> None:
    given(PARAMETERS)
    found = reading("--wandb_project", "mine", "--wandb_run_id", "r", "--wandb_entity", "me")
    config = found.checked().tracking
    assert (config.wandb_project, config.wandb_run_id, config.wandb_entity) == ("p", "r", None)
    assert [note.partition(" is passed over")[0] for note in found.notes] == [
        "--wandb_project=mine",
        "--wandb_entity=me",
    ]
    with pytest.raises(ConfigError, match="--wandb_fork: a run of a sweep keeps its id"):
        reading("--wandb_fork").checked()


@pytest.mark.parametrize("content", ["", "- a", "a: {b: 1}\nc: 2", "a: [", "\x00"])
def test_a_file_that_says_nothing_is_passed_over(content: str, given: Any) -> None:
    given({}).write_text(content)
    found = sweep_run()
    assert found is not None
    assert (found.given, found.parameters) == ({}, {})
    assert found.output_dir == Path("runs/sweep-s/r")
    assert json.dumps(found.typed(["--seed", "1"])) == '["--seed", "1"]'


def test_a_run_of_a_sweep_has_a_folder_of_its_own_and_goes_on_there(given: Any) -> None:
    given({})
    sweep = sweep_run()
    assert sweep is not None
    own = in_sweep(CheckpointConfig(), sweep)
    assert (own.output_dir, own.resume_from_checkpoint) == ("runs/sweep-s/r", "auto")
    assert in_sweep(CheckpointConfig(resume_from_checkpoint="false"), sweep).resume_from_checkpoint == "false"
    assert in_sweep(CheckpointConfig(resume_from_checkpoint="true"), sweep).output_dir == "runs/sweep-s/r"
    chosen = CheckpointConfig(output_dir="mine")
    assert in_sweep(chosen, sweep) == chosen


def test_the_sweep_of_the_page_is_one(given: Any) -> None:
    page = (ROOT / "harness" / "agent" / "README.md").read_text(encoding="utf-8")
    sweep = yaml.safe_load(page.partition("```yaml")[2].partition("```")[0])

    def first(entry: dict[str, Any]) -> Any:
        if "parameters" in entry:
            return {name: first(each) for name, each in entry["parameters"].items()}
        return entry.get("value", entry.get("min", [*entry.get("values", []), None][0]))

    values = first(sweep)
    given(values)
    config = reading(*[word for word in sweep["command"][3:] if word != "${args}"]).checked()
    for name, value in values.items():
        assert config.flat()[name] == value
