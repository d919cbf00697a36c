"""All flags together: none of the Trainer's is forgotten, none of ours does nothing."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from harness.config import RECIPES_DIR, Json
from harness.errors import ConfigError
from harness.flags import GONE, OWNED_BY_LAUNCH_CONFIG, REFUSED, SAY_WHAT_TO_TRAIN, SECTIONS, Config, parse
from harness.training.flags import DEBUG_DEFAULTS

HARNESS = Path(__file__).parent.parent / "harness"
FLAGS = {field.name: (section, field) for section in SECTIONS for field in dataclasses.fields(section)}
TRAINERS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
# Flags whose default is not the Trainer's, on purpose.
OTHER_DEFAULTS = {"report_to": ["wandb"]}


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_flag_stands_in_exactly_one_place(name: str) -> None:
    places = [table for table in (FLAGS, OWNED_BY_LAUNCH_CONFIG, REFUSED) if name in table]
    assert len(places) == 1


def test_tables_hold_no_flag_that_is_taken_and_none_twice() -> None:
    tables = [OWNED_BY_LAUNCH_CONFIG, REFUSED, GONE]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    assert not set(names) & set(FLAGS)
    assert not set(GONE) & set(TRAINERS)


def test_sections_are_those_of_the_configuration_in_order() -> None:
    config = parse([])
    assert [type(getattr(config, field.name)) for field in dataclasses.fields(Config)] == list(SECTIONS)


def values(default: Any) -> Any:
    """Trainer's defaults as plain values: enumerations as their text, its None for no lists."""
    if isinstance(default, Json):
        return dict(default)
    return getattr(default, "value", default)


@pytest.mark.parametrize("name", sorted(set(FLAGS) & set(TRAINERS)))
def test_default_is_the_trainers(name: str) -> None:
    ours = default_of(FLAGS[name][1])
    if name in OTHER_DEFAULTS:
        assert ours == OTHER_DEFAULTS[name] != values(default_of(TRAINERS[name]))
        return
    theirs = values(default_of(TRAINERS[name]))
    # Its JSON flags default to None or {}; both say: nothing given.
    assert ours == theirs or (not ours and not theirs and ours is None and theirs == {})


@pytest.mark.parametrize(("name", "reason"), sorted((OWNED_BY_LAUNCH_CONFIG | REFUSED | GONE).items()))
def test_refused_flag_is_refused_with_its_reason(name: str, reason: str, tmp_path: Path) -> None:
    for argv in ([f"--{name}", "x"], [f"--{name}=x"], [f"--{name.replace('_', '-')}=x"], [f"--{name}"]):
        with pytest.raises(ConfigError, match=re.escape(f"--{name} is not supported: {reason}")):
            parse(argv)
    path = tmp_path / "refused.yaml"
    path.write_text(f"{name}: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"refused.yaml: {name} is not supported: {reason}")):
        parse(["--config", str(path)])


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_has_help(name: str) -> None:
    text = FLAGS[name][1].metadata["help"]
    assert len(text) > 10
    assert text[-1] in ".)?" or text.endswith("...")


class Reads(ast.NodeVisitor):
    """Attribute names that code reads, and texts (for getattr), without the checks of sections themselves."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "__post_init__":
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if not isinstance(node.value, ast.Call) or getattr(node.value.func, "id", "") != "arg":
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in node.values]
        # f"{kind}_steps" may be any of three flags; f"{a}_{b}" says nothing.
        if sum(len(part.value) for part in node.values if isinstance(part, ast.Constant)) > 3:
            self.names |= {name for name in FLAGS if re.fullmatch("".join(parts), name)}
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.visit(part)


@pytest.fixture(scope="module")
def reads() -> set[str]:
    visitor = Reads()
    for path in HARNESS.rglob("*.py"):
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.names


# Read under their names in a loop over the section's fields, by the Trainer's own function.
READ_BY_THE_TRAINER = {"optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate"}
# Named in a tuple, and read by getattr.
READ_BY_GETATTR = {"early_stopping_patience", "early_stopping_threshold"}
# A task of the user's own reads the first; of the second every value but one is refused.
READ_ELSEWHERE = {"task_args", "dataloader_in_order", "config"}


@pytest.mark.parametrize("name", sorted(set(FLAGS) - READ_BY_THE_TRAINER - READ_BY_GETATTR - READ_ELSEWHERE))
def test_every_flag_is_read(name: str, reads: set[str]) -> None:
    assert name in reads, "a flag that nothing reads does nothing"


def test_order_that_depends_on_timing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--dataloader_in_order=false"):
        parse(["--dataloader_in_order", "false"])


def test_command_without_input_is_the_quickstart() -> None:
    expected = yaml.safe_load((RECIPES_DIR / "quickstart.yaml").read_text(encoding="utf-8"))
    flat = parse([]).flat()
    assert {name: flat[name] for name in expected} == expected
    assert parse(["--max_steps", "2", "--seed", "1"]).plan.max_steps == 2
    assert parse(["--max_steps", "2", "--seed", "1"]).task.task == expected["task"]


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize("name", SAY_WHAT_TO_TRAIN)
def test_saying_what_to_train_leaves_nothing_of_the_quickstart(name: str) -> None:
    value = {"task": "masked-lm", "task_name": "cola"}.get(name, "x")
    flat = parse([f"--{name}", value]).flat()
    changed = {flag for flag in flat if flat[flag] != default_of(FLAGS[flag][1])}
    assert changed == {name}


@pytest.mark.usefixtures("no_variables")
def test_a_config_leaves_nothing_of_the_quickstart(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("seed: 5\n", encoding="utf-8")
    flat = parse(["--config", str(path)]).flat()
    assert {flag for flag in flat if flat[flag] != default_of(FLAGS[flag][1])} == {"config", "seed"}


def test_bare_debug_gives_its_values_to_what_was_not_given() -> None:
    flat = parse(["--debug"]).flat()
    assert {name: flat[name] for name in DEBUG_DEFAULTS} == DEBUG_DEFAULTS
    flat = parse(["--debug", "--max_steps", "9", "--report_to", "tensorboard", "--logging_steps=3"]).flat()
    given = {"max_steps": 9, "report_to": ["tensorboard"], "logging_steps": 3}
    assert {name: flat[name] for name in DEBUG_DEFAULTS} == DEBUG_DEFAULTS | given


def test_debug_goes_before_a_config_and_flags_before_debug(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("max_steps: 900\nseed: 5\n", encoding="utf-8")
    config = parse(["--config", str(path), "--debug", "--save_strategy", "epoch"])
    expected = (DEBUG_DEFAULTS["max_steps"], 5, "epoch")
    assert (config.plan.max_steps, config.topology.seed, config.plan.save_strategy) == expected


@pytest.mark.parametrize(
    ("value", "mode"), [("true", "on"), ("false", ""), ("underflow_overflow", "underflow_overflow")]
)
def test_debug_takes_a_value(value: str, mode: str) -> None:
    config = parse(["--debug", value, "--train_file", "x.txt"])
    assert config.debug.debug == mode
    assert config.debug.is_on == (mode == "on")
    assert (config.plan.max_steps == DEBUG_DEFAULTS["max_steps"]) == (mode == "on")


def test_unknown_kind_of_debugging_is_refused() -> None:
    with pytest.raises(ConfigError, match="--debug=tpu_metrics_debug is not known"):
        parse(["--debug", "tpu_metrics_debug"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--lr_scheduler_type reduce_lr_on_plateau", "goes by evaluations"),
        ("--early_stopping_patience 2 --metric_for_best_model loss", "counts evaluations"),
        ("--early_stopping_patience 2 --eval_strategy steps", "needs --metric_for_best_model"),
        ("--save_strategy best --eval_strategy steps", "needs --metric_for_best_model"),
        ("--save_strategy best", "needs evaluations"),
        ("--eval_strategy epoch --metric_for_best_model accuracy --prediction_loss_only", "not computed"),
        ("--load_best_model_at_end --eval_strategy epoch", "equal strategies"),
        ("--load_best_model_at_end --eval_strategy no --save_strategy no", "needs evaluations"),
        ("--load_best_model_at_end --eval_strategy steps --eval_steps 3 --save_steps 7", "multiple of"),
        ("--load_best_model_at_end --eval_strategy steps --eval_steps 0.1 --save_steps 10", "multiple of"),
        ("--load_best_model_at_end --eval_strategy steps --eval_steps 0.2 --save_steps 0.5", "multiple of"),
    ],
)  # fmt: skip
def test_contradicting_flags_are_refused(argv: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(["--train_file", "x.txt", *argv.split()])


@pytest.mark.parametrize(
    "argv",
    [
        "--load_best_model_at_end --eval_strategy steps --eval_steps 0.1 --save_steps 0.3",
        "--load_best_model_at_end --eval_strategy steps --eval_steps 5 --save_steps 10",
        "--load_best_model_at_end --eval_strategy steps --save_strategy best --metric_for_best_model loss",
        "--load_best_model_at_end --eval_strategy epoch --save_strategy epoch",
        "--lr_scheduler_type reduce_lr_on_plateau --eval_strategy epoch",
    ],
)
def test_agreeing_flags_are_taken(argv: str) -> None:
    assert parse(["--train_file", "x.txt", *argv.split()]).plan.eval_strategy != "no"
