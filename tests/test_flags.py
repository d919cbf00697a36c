"""All flags together: none of the Trainer's is forgotten, none of ours does nothing."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from harness.config import RECIPES_DIR, Flag, Json, release
from harness.errors import ConfigError
from harness.flags import FLAGS as ALL_FLAGS
from harness.flags import (
    GONE,
    GROUPS,
    NOT_TAKEN,
    OWNED_BY_LAUNCH_CONFIG,
    REFUSED,
    SAY_WHAT_TO_TRAIN,
    SECTIONS,
    Config,
    help_text,
    help_topic,
    parse,
    read,
)
from harness.tasks.flags import OWNERS, SHIPPED
from harness.train import main
from harness.training.flags import DEBUG_DEFAULTS

HARNESS = Path(__file__).parent.parent / "harness"
FLAGS = {field.name: (section, field) for section in SECTIONS for field in dataclasses.fields(section)}
# Transformers took them until then, with a warning.
OLD = {"logging_dir", "warmup_ratio"} if release("transformers") < (5, 15) else set()
TRAINERS = {
    field.name: field for field in dataclasses.fields(TrainingArguments) if field.init and field.name not in OLD
}
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
    if name == "gradient_checkpointing" and release("transformers") < (5, 23):
        assert (ours, theirs) == (None, False), "it was not yet the older name of another flag"
        return
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


@pytest.mark.parametrize("flag", ALL_FLAGS.values(), ids=ALL_FLAGS)
def test_every_flag_has_its_facts(flag: Flag) -> None:
    assert len(flag.help) > 10
    assert flag.help[-1] in ".)?" or flag.help.endswith("...")
    assert flag.group in GROUPS
    assert flag.on_resume in ("unrelated", "free", "checked", "refused")
    assert flag.type in (bool, int, float, str, list[str]) or issubclass(flag.type, Json)
    assert (flag.env is None) == (flag.name not in VARIABLES)
    assert flag.env in (None, flag.name.upper())


# Those of the guide to W&B's integration with Transformers, and wandb's own.
VARIABLES = {f"wandb_{name}" for name in ("disabled", "mode", "project", "entity", "run_id", "resume", "run_group")}
VARIABLES |= {f"wandb_{name}" for name in ("job_type", "tags", "notes", "dir", "silent", "log_model", "watch")}


def test_owners_are_the_tasks_whose_group_a_flag_is_in() -> None:
    assert set(OWNERS.values()) <= set(SHIPPED)
    assert OWNERS["predict_with_generate"] == "seq2seq"
    assert OWNERS["train_dir"] == "image-classification"
    assert "max_seq_length" not in OWNERS


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize(("name", "owner"), OWNERS.items())
def test_a_flag_of_another_task_is_refused(name: str, owner: str) -> None:
    flag = ALL_FLAGS[name]
    value = {bool: str(not flag.default).lower(), int: "3", float: "0.5"}.get(flag.type, "x")
    others = [task for task in SHIPPED if task != owner]
    for task in others:
        with pytest.raises(ConfigError, match=f"--{name}=.* is of --task {owner}, and --task={task} does not read it"):
            parse([f"--task={task}", f"--{name}={value}"])


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
    with pytest.raises(ConfigError, match=r"--train_sampling_strategy=batch_rebalance .* use --max_tokens_per_batch"):
        parse(["--train_sampling_strategy", "batch_rebalance"])


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


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("narrow")
def test_help_shows_the_commonest_flags_and_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert 35 <= len(flags_in(shown)) <= 50
    assert flags_in(shown) == [flag.name for name, flag in ordered().items() if flag.is_common]
    for more in ("--help all", "--help GROUP", "--help FLAG", "--help refused", *GROUPS):
        assert more in shown
    assert max(map(len, shown.splitlines())) <= 80


def ordered() -> dict[str, Flag]:
    return {name: flag for group in GROUPS for name, flag in ALL_FLAGS.items() if flag.group == group}


@pytest.mark.usefixtures("narrow")
def test_help_shows_each_flag_once() -> None:
    shown = help_text("all")
    assert flags_in(shown) == list(ordered())
    assert sorted(ordered()) == sorted(ALL_FLAGS)
    assert [name for group in GROUPS for name in flags_in(help_text(group))] == list(ordered())
    assert sorted(flags_in(help_text("refused"))) == sorted(NOT_TAKEN)
    assert max(map(len, shown.splitlines())) <= 80
    with_variables = {name: flag.env for name, flag in ALL_FLAGS.items() if flag.env}
    assert [name for name, env in with_variables.items() if f"or {env}" not in " ".join(help_text(name).split())] == []


def test_help_of_one_flag_says_what_becomes_of_it() -> None:
    assert flags_in(help_text("--learning-rate")) == ["learning_rate"]
    assert REFUSED["push_to_hub"] in " ".join(help_text("push_to_hub").split())
    with pytest.raises(ConfigError, match="--help optimiser: no such flag or group; groups: command, model"):
        help_text("optimiser")


@pytest.mark.parametrize(
    ("argv", "topic"),
    [
        ([], None),
        (["--seed", "3"], None),
        (["--help"], ""),
        (["-h"], ""),
        (["--seed", "3", "--help"], ""),
        (["--help", "--seed", "3"], "--seed"),
        (["--help", "tracking"], "tracking"),
        (["--help=tracking"], "tracking"),
    ],
)
def test_help_is_asked_for(argv: list[str], topic: str | None) -> None:
    assert help_topic(argv) == topic


def test_mistakes_are_reported_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text("sed: 3\nseed: three\n", encoding="utf-8")
    wrong = {
        "--learning_rat=1": "--learning_rat is not a known flag. Did you mean learning_rate",
        "--push_to_hub": "--push_to_hub is not supported",
        "--label_smoothing_factor=2": "--label_smoothing_factor=2.0: use 0 to 1",
        "--max_steps=many": "--max_steps: invalid int value: 'many'",
        f"--config={tmp_path}/own.yaml": "own.yaml: sed is not a known flag. Did you mean seed",
        "--train_file=gone.txt": "--train_file=gone.txt: no such file; check the path",
        "--tokenizer_name=./gone": "--tokenizer_name=./gone: no such folder; check the path",
    }
    assert main([*wrong]) == 2
    shown = capsys.readouterr().err
    assert f"{len(wrong) + 1} mistakes:" in shown
    assert "--seed: invalid int value: 'three'" in shown
    for says in wrong.values():
        assert shown.count(says) == 1


def test_contradictions_are_reported_together() -> None:
    argv = ["--task=causal-lm", "--load_best_model_at_end", "--save_strategy=epoch", "--early_stopping_patience=2"]
    with pytest.raises(ConfigError) as refused:
        parse(argv)
    assert [problem.split()[0] for problem in refused.value.problems] == [
        "--load_best_model_at_end",
        "--early_stopping_patience",
    ]


@pytest.mark.parametrize("name", ["org/model", "model", "wandb:team/project/model:best", str(RECIPES_DIR)])
def test_a_name_that_may_be_on_the_hub_is_not_looked_for(name: str) -> None:
    assert read([f"--model_name_or_path={name}"]).checked().task.model_name_or_path == name


def test_a_task_of_ones_own_reads_paths_as_it_likes() -> None:
    assert read(["--task=own:build", "--train_file=s3://b/x.txt"]).checked().task.train_file == ["s3://b/x.txt"]


# What a process that parses must not wait for.
HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "wandb", "sklearn", "scipy", "pandas", "PIL")
HEAVY += ("deepspeed", "numpy", "huggingface_hub", "safetensors", "psutil", "tqdm")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--print_config"], 0),
        (["--config=imdb_lora", "--print_config", "all"], 0),
        (["--report_to=all", "--print_config"], 0),
        (["--zzz"], 2),
        (["--train_file=gone.txt", "--optim=lomo"], 2),
        (["--load_best_model_at_end", "--eval_strategy=epoch"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_parsing_loads_no_library(argv: list[str], code: int, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from harness.train import main\n"
        f"code = main({argv!r})\n"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules], len(sys.modules), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HARNESS.parent)}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"{code} [] ")
    assert int(last.split()[-1]) < 400
    assert "Loading" not in ended.stderr


@pytest.mark.parametrize(("flags", "is_told"), [([], True), (["--log_level=error"], False)])
def test_a_training_says_what_it_loads(flags: list[str], is_told: bool, tmp_path: Path) -> None:
    # It ends by a name that only the libraries know to be wrong.
    command = [sys.executable, str(HARNESS / "train.py"), "--torch_compile_backend=none", "--optim=adamm", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 2
    assert (ended.stderr.splitlines()[0] == "Loading torch, transformers and accelerate ...") is is_told
    assert "2 mistakes:" in ended.stderr
    assert "--optim=adamm is not known; use one of: " in ended.stderr
    assert "--torch_compile_backend=none is not known" in ended.stderr
    assert not list(tmp_path.iterdir())
