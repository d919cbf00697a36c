"""All sections together: what the command line takes, what spans sections, and where the Trainer's flags went."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from harness.agent import Layer, SweepRun
from harness.checkpoint.flags import CheckpointConfig
from harness.config import (
    Flag,
    arg,
    build_sections,
    choice,
    flags_of,
    read_argv,
    read_yaml,
    section,
    together,
)
from harness.data.flags import DataConfig
from harness.distributed.flags import TopologyConfig
from harness.errors import ConfigError
from harness.masking import is_masked, masked
from harness.model.flags import BY_METRIC, AdapterConfig, OptimConfig
from harness.tasks import OWN
from harness.tasks.files import data_files
from harness.tasks.flags import PARTS as TASK_PARTS
from harness.tasks.flags import SHIPPED, TaskConfig, under
from harness.tracking import TrackingConfig
from harness.tracking.flags import from_environment
from harness.training.flags import (
    DEBUG_DEFAULTS,
    BestConfig,
    ConsoleConfig,
    DebugConfig,
    EvaluationConfig,
    MetricsConfig,
    ModelingConfig,
    PlanConfig,
    StoppingConfig,
    ThroughputConfig,
    WatchdogConfig,
)

QUICKSTART, OF_QUICKSTART = "quickstart", "harness.tasks.quickstart:build"  # the recipe, and its task
# Which run it was is no part of how it was configured: another one of the same configuration is a new run. What one
# resume was allowed is not allowed for good.
NOT_CONFIGURATION = (
    *("config", "print_config", "token", "wandb_run_id", "wandb_resume"),
    *("allow_changed_arguments", "allow_changed_data_order", "change_on_resume", "stop_at_step"),
)
# Any of these says what to train; then nothing of the quickstart recipe is used.
SAY_WHAT_TO_TRAIN = (
    *("task", "task_name", "model_name_or_path", "model_type", "config_name", "dataset_name", "train_file"),
)

# Fields of TrainingArguments that belong to the launch config (`accelerate config`, launch_configs/).
OWNED_BY_LAUNCH_CONFIG = {
    "deepspeed": "choose a launch config with distributed_type: DEEPSPEED",
    "fsdp": "choose a launch config with distributed_type: FSDP",
    "fsdp_config": "it is the fsdp_config of the launch config",
    "local_rank": "the launcher sets it",
    "parallelism_config": "it is the parallelism_config of the launch config",
}

_BY_HAND = "upload --output_dir with `hf upload`"
_STREAMED = "metrics are computed batch by batch here, so logits never pile up"
REFUSED = {
    "accelerator_config": "the loop needs its values for exact resume; batches are even and not split",
    "batch_eval_metrics": _STREAMED,
    "enable_jit_checkpoint": "SIGTERM always saves before it stops the training",
    "eval_accumulation_steps": _STREAMED,
    "eval_do_concat_batches": _STREAMED,
    "eval_use_gather_object": _STREAMED,
    "hub_always_push": _BY_HAND,
    "hub_model_id": _BY_HAND,
    "hub_private_repo": _BY_HAND,
    "hub_revision": _BY_HAND,
    "hub_strategy": _BY_HAND,
    "hub_token": "use `hf auth login`, or --token for downloads",
    "include_for_metrics": "a task's metrics take what they need; see harness/tasks/__init__.py",
    "push_to_hub": _BY_HAND,
    "restore_callback_states_from_checkpoint": "a resume always goes on from the saved state",
    "save_on_each_node": "the main process writes; put --output_dir on storage that all nodes see",
    "skip_memory_metrics": "--debug shows the peak memory",
    "trackio_bucket_id": "set it in trackio's own configuration",
    "trackio_space_id": "set it in trackio's own configuration",
    "trackio_static_space_id": "set it in trackio's own configuration",
}
# Flags that earlier versions of transformers had.
GONE = {
    "evaluation_strategy": "it is --eval_strategy now",
    "fp16_backend": "the launch config and --fp16 decide",
    "group_by_length": "it is --train_sampling_strategy group_by_length now",
    "half_precision_backend": "the launch config and --fp16 or --bf16 decide",
    "logging_dir": "trackers that need a folder use --output_dir",
    "no_cuda": "it is --use_cpu now",
    "overwrite_output_dir": "delete the folder, take another --output_dir, or --resume_from_checkpoint",
    "per_gpu_train_batch_size": "it is --per_device_train_batch_size now",
    "save_safetensors": "weights are always saved as safetensors",
    "warmup_ratio": "--warmup_steps takes a share of all steps below 1, e.g. 0.1",
}


NOT_TAKEN = OWNED_BY_LAUNCH_CONFIG | REFUSED | GONE


@section("command", on_resume="unrelated")
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the command does."""

    config: str | None = arg(
        help="YAML file of flags, or the name of a shipped recipe; flags given here win.", common=True
    )
    print_config: str = arg(
        "",
        "Print what differs from the defaults and where it is from, or all of it, as YAML, and end.",
        bare="changed",
        common=True,
    )
    do_train: bool = arg(False, "Train. Without any --do_* flag training is what is done.")
    do_eval: bool = arg(False, "Evaluate the final (or best, or given) model once more at the end.", common=True)
    do_predict: bool = arg(False, "Predict on the test set at the end: predict_results.txt in --output_dir.")

    def __post_init__(self) -> None:
        meant = {"true": "changed", "false": ""}.get(self.print_config.lower(), self.print_config)
        choice("print_config", meant, ("", "changed", "all"))
        object.__setattr__(self, "print_config", meant)

    @property
    def trains(self) -> bool:
        """Whether to train: asked for, or nothing else was."""
        return self.do_train or not (self.do_eval or self.do_predict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration, a section for each file that reads one."""

    run: RunConfig
    task: TaskConfig
    data: DataConfig
    plan: PlanConfig
    optim: OptimConfig
    adapters: AdapterConfig
    modeling: ModelingConfig
    metrics: MetricsConfig
    throughput: ThroughputConfig
    evaluation: EvaluationConfig
    best: BestConfig
    checkpoint: CheckpointConfig
    topology: TopologyConfig
    tracking: TrackingConfig
    console: ConsoleConfig
    stopping: StoppingConfig
    watchdog: WatchdogConfig
    debug: DebugConfig

    def __post_init__(self) -> None:
        if problems := [*self._contradictions()]:
            raise ConfigError(*problems)

    def _contradictions(self) -> Iterator[str]:
        plan = self.plan
        if self.adapters.is_on and self.task.model_name_or_path is None and self.task.task in SHIPPED:
            yield (
                "An adapter is saved without its model, and a new model could not be found again: give "
                "--model_name_or_path, or train the whole model."
            )
        if self.stopping.stop_on_nonfinite and plan.logging_strategy == "no":
            yield (
                f"--stop_on_nonfinite={self.stopping.stop_on_nonfinite} looks at the steps in a report, and "
                "--logging_strategy=no makes none; give steps or epoch."
            )
        if self.stopping.stop_at_step is not None and plan.save_strategy == "no":
            yield "--stop_at_step saves, and --save_strategy=no saves nothing: give steps, epoch or best."
        for name in self.checkpoint.change_on_resume or []:
            if name not in MUTABLE:
                yield f"--change_on_resume {name}: no such flag can change in a training; use {', '.join(MUTABLE)}."
        yield from self._of_evaluations()

    def _of_evaluations(self) -> Iterator[str]:
        plan, best = self.plan, self.best
        evaluates = plan.eval_strategy != "no"
        if best.load_best_model_at_end and plan.save_strategy != "best":
            yield from self._why_best_can_not_be_loaded()
        if self.optim.lr_scheduler_type in BY_METRIC and not evaluates:
            yield (
                f"--lr_scheduler_type={self.optim.lr_scheduler_type} goes by evaluations: "
                "give --eval_strategy steps or epoch."
            )
        if best.early_stopping_patience is not None and not evaluates:
            yield "--early_stopping_patience counts evaluations: give --eval_strategy steps or epoch."
        if self.best_metric is None and best.early_stopping_patience is not None:
            yield "--early_stopping_patience needs --metric_for_best_model, e.g. loss."
        if self.best_metric is None and plan.save_strategy == "best":
            yield "--save_strategy=best needs --metric_for_best_model, e.g. loss."
        if self.best_metric is not None and self.evaluation.prediction_loss_only and "loss" not in self.best_metric:
            yield f"--metric_for_best_model={best.metric_for_best_model} is not computed with --prediction_loss_only."

    def _why_best_can_not_be_loaded(self) -> Iterator[str]:
        plan = self.plan
        eval_steps = plan.logging_steps if plan.eval_steps is None else plan.eval_steps
        mixed = (eval_steps < 1) != (plan.save_steps < 1)
        # Shares are compared as whole millionths: their floats are not exact.
        scale = 1_000_000 if eval_steps < 1 else 1
        if plan.eval_strategy != plan.save_strategy:
            yield (
                f"--load_best_model_at_end needs equal strategies, not --eval_strategy {plan.eval_strategy} and "
                f"--save_strategy {plan.save_strategy}; make them equal, or give --save_strategy best."
            )
        elif plan.eval_strategy == "no":
            yield "--load_best_model_at_end needs evaluations: give --eval_strategy steps or epoch."
        elif plan.eval_strategy == "steps" and (mixed or round(plan.save_steps * scale) % round(eval_steps * scale)):
            yield (
                f"--load_best_model_at_end needs --save_steps ({plan.save_steps:g}) to be a multiple of "
                f"--eval_steps ({eval_steps:g}): the best evaluation must have a checkpoint."
            )

    def check_weights(self) -> None:
        """Raise ConfigError where nothing is trained, and the model would be a new one: its weights are random."""
        is_new = self.task.task in (*SHIPPED, OF_QUICKSTART) and self.task.model_name_or_path is None
        if is_new and not self.run.trains:
            flag = "--do_eval" if self.run.do_eval else "--do_predict"
            raise ConfigError(
                f"{flag} without --do_train takes a model that has been trained, and none is given: a new one has "
                "random weights. Give the run's folder as --model_name_or_path, or --do_train too."
            )

    @property
    def best_metric(self) -> str | None:
        """The metric that says which evaluation is the best, with eval_; None if none was asked for."""
        return self.best.metric(wanted=self.optim.lr_scheduler_type in BY_METRIC)

    def flat(self) -> dict[str, Any]:
        """All values by flag name, without secrets: what is recorded."""
        values: dict[str, Any] = {}
        for field in fields(self):
            values |= asdict(getattr(self, field.name))
        for name, value in values.items():
            if FLAGS[name].path == "file" and isinstance(value, list) and len(value) == 1:
                values[name] = value[0]  # as one is written
        return {name: masked(value, name) for name, value in values.items()}

    def as_yaml(self) -> str:
        """The values by flag name; `--config` reads them again."""
        return _dump({name: value for name, value in self.flat().items() if name not in NOT_CONFIGURATION})


SECTIONS: tuple[type, ...] = (
    RunConfig,
    TaskConfig,
    DataConfig,
    PlanConfig,
    OptimConfig,
    AdapterConfig,
    ModelingConfig,
    MetricsConfig,
    ThroughputConfig,
    EvaluationConfig,
    BestConfig,
    CheckpointConfig,
    TopologyConfig,
    TrackingConfig,
    ConsoleConfig,
    StoppingConfig,
    WatchdogConfig,
    DebugConfig,
)


FLAGS = flags_of(*SECTIONS)
MUTABLE = tuple(name for name, flag in FLAGS.items() if flag.mutable)
# NAME or ORGANISATION/NAME; anything else is a path.
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
INDENT = 30  # of the help's texts beside the flags


def _described_groups() -> dict[str, str]:
    """The groups in the sections' order, each with the first line of its largest section's docstring."""
    sizes: dict[str, int] = {}
    found: dict[str, str] = {}
    for each in SECTIONS:
        for part in reversed(TASK_PARTS) if each is TaskConfig else (each,):
            flags = flags_of(part)
            group = next(iter(flags.values())).group
            if len(flags) > sizes.get(group, 0):
                sizes[group], found[group] = len(flags), (part.__doc__ or "").strip().splitlines()[0]
    return found


GROUPS = _described_groups()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """
    What a command line comes to: the values that something gave, what gave each, what could not be read, and notes.

    The values are still as they were written.
    """

    values: Mapping[str, Any]
    origins: Mapping[str, str]
    problems: Sequence[str]
    notes: Sequence[str] = ()

    @cached_property
    def config(self) -> Config:
        """The configuration. Raises ConfigError."""
        if self.problems:
            raise ConfigError(*self.problems)
        names = [field.name for field in fields(Config)]
        return Config(**dict(zip(names, build_sections(SECTIONS, self.values), strict=True)))

    def checked(self) -> Config:
        """The configuration. Raises one ConfigError for all that is wrong, paths where nothing is among it."""
        of_values = [partial(build_sections, SECTIONS, self.values)] if self.problems else []
        together([lambda: self.config, *of_values, self._check_paths])
        return self.config

    def _check_paths(self) -> None:
        # A task of one's own may read them as it likes.
        if str(self.values.get("task", FLAGS["task"].default)) not in SHIPPED:
            return
        given = {name: FLAGS[name].value_of(value) for name, value in self.values.items() if value and FLAGS[name].path}
        together(partial(_check_path, FLAGS[name], value) for name, value in given.items())

    def as_yaml(self, *, everything: bool) -> str:
        """The values as YAML that `--config` reads again, below what gave them."""
        by_origin: dict[str, dict[str, Any]] = {origin: {} for origin in (*self.origins.values(), "default")}
        for name, value in self.config.flat().items():
            if name not in NOT_CONFIGURATION and (everything or value != FLAGS[name].default):
                by_origin[self.origins.get(name, "default")][name] = value
        parts = [f"# {origin}\n{_dump(values)}" for origin, values in by_origin.items() if values]
        return "\n".join(parts) or "{}\n"


def _check_path(flag: Flag, value: Any) -> None:
    """Raise ConfigError for what is not there; a model may be on the Hub."""
    if flag.path == "file":
        data_files(flag.name, value)
        return
    may_be_elsewhere = flag.path == "model" and (HUB_NAME.fullmatch(value) or value.startswith("wandb:"))
    if not may_be_elsewhere and not (Path(value).exists() if flag.path == "model" else Path(value).is_dir()):
        start = f"check the path (relative ones start at {Path.cwd()})."
        raise ConfigError(f"--{flag.name}={value}: no such folder; {start}")


def _dump(values: Mapping[str, Any]) -> str:
    plain = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def read(argv: Sequence[str], *, own_task: bool = False, sweep: SweepRun | None = None) -> Reading:
    """
    Read a command line and what lies under it.

    Flags go over a sweep's parameters, over WANDB_* variables, over `--config` or, where nothing says what to train,
    over quickstart; with `own_task` the caller has model and data. With a bare --debug whatever no flag gives takes the
    values of DEBUG_DEFAULTS.
    """
    typed, problems = read_argv(argv if sweep is None else sweep.typed(argv), FLAGS, NOT_TAKEN)
    variables, of_variables = from_environment()
    of_sweep = Layer() if sweep is None else sweep.beside(typed, variables, FLAGS, NOT_TAKEN)
    given = {**of_sweep.values, **typed}
    from_file: dict[str, Any] = {}
    of_file: list[str] = []
    source = given.get("config")
    origin = f"--config {source}"
    if source is None and not own_task and not given.keys() & {*SAY_WHAT_TO_TRAIN}:
        source, origin = QUICKSTART, f"recipe {QUICKSTART}: nothing says what to train"
    if source is not None:
        from_file, of_file = read_yaml(source, FLAGS, refused=NOT_TAKEN)
        from_file = under(given, from_file)
    is_debugging = DebugConfig.meant(str(given.get("debug", from_file.get("debug", "")))) == "on"
    layers: list[tuple[Mapping[str, Any], Mapping[str, str]]] = [
        ({"task": OWN} if own_task else {}, {"task": "argument"}),
        (from_file, dict.fromkeys(from_file, origin)),
        (DEBUG_DEFAULTS if is_debugging else {}, dict.fromkeys(DEBUG_DEFAULTS, "--debug")),
        (variables, {name: f"variable {FLAGS[name].env}" for name in variables}),
        (of_sweep.values, dict.fromkeys(of_sweep.values, "sweep")),
        (typed, dict.fromkeys(typed, "command line")),
    ]
    values = {name: value for layer, _ in layers for name, value in layer.items()}
    origins = {name: of_layer[name] for layer, of_layer in layers for name in layer}
    masked(values)  # from here on no message quotes what they call a secret
    hidden = [
        f"--{name} ({origins[name]}) holds what stands for a secret that was not recorded: give it with the secret."
        for name, value in values.items()
        if is_masked(value, name)
    ]
    return Reading(
        values={name: value for name, value in values.items() if value is not None},
        origins=origins,
        problems=[*problems, *of_sweep.problems, *of_file, *of_variables, *hidden],
        notes=of_sweep.notes,
    )


def parse(argv: Sequence[str]) -> Config:
    """The configuration of a command line; see `read`. Raises ConfigError."""
    return read(argv).config


def help_topic(argv: Sequence[str]) -> str | None:
    """What help a command line asks for: a topic, or an empty text; None if it asks for none."""
    for i, token in enumerate(argv):
        flag, _, topic = token.partition("=")
        if flag in ("-h", "--help"):
            return topic or next(iter(argv[i + 1 :]), "")
    return None


def help_text(topic: str) -> str:
    """The help on a topic; an empty one: the commonest flags. Raises ConfigError for an unknown one."""
    width = min(shutil.get_terminal_size().columns, 120)
    name = topic.removeprefix("--").replace("-", "_")
    if topic in ("", "all"):
        shown = [flag for flag in FLAGS.values() if flag.is_common or topic]
        return "\n\n".join([_introduction(len(shown), width), *_groups(shown, width), _ending(width)])
    if topic == "refused":
        return "\n".join(line for name, why in sorted(NOT_TAKEN.items()) for line in _beside(f"--{name}", why, width))
    if topic in GROUPS:
        return "\n\n".join(_groups([flag for flag in FLAGS.values() if flag.group == topic], width))
    if name in FLAGS:
        return "\n".join(_entry(FLAGS[name], width))
    if name in NOT_TAKEN:
        return "\n".join(_beside(f"--{name}", f"is not taken: {NOT_TAKEN[name]}.", width))
    raise ConfigError(f"--help {topic}: no such flag or group; groups: {', '.join(GROUPS)}; or all, or refused.")


def _introduction(count: int, width: int) -> str:
    usage = "usage: harness train [--flag value ...]\n\n"
    how_many = "All" if count == len(FLAGS) else f"The {count} commonest of {len(FLAGS)}"
    return usage + textwrap.fill(
        f"{how_many} flags. --config names a YAML file of them or a recipe; --print_config shows what a command line "
        "comes to. Without any of them a small model learns English in a minute.",
        width,
        break_on_hyphens=False,
    )


def _ending(width: int) -> str:
    return textwrap.fill(
        "More: --help all, --help GROUP, --help FLAG, and --help refused for the Trainer's flags that are not taken. "
        f"Groups: {', '.join(GROUPS)}.",
        width,
        break_on_hyphens=False,
    )


def _groups(shown: Sequence[Flag], width: int) -> Iterable[str]:
    for group, what in GROUPS.items():
        lines = [line for flag in shown if flag.group == group for line in _entry(flag, width)]
        if lines:
            yield "\n".join([*textwrap.wrap(f"{group}: {what}", width), *lines])


def _entry(flag: Flag, width: int) -> list[str]:
    notes = []
    if flag.default is True:
        notes.append(f"default: true; --no_{flag.name}")
    elif flag.default not in (None, False, "", -1):
        default = " ".join(flag.default) if isinstance(flag.default, list) else flag.default
        notes.append(f"default: {default}")
    if flag.env is not None:
        notes.append(f"or {flag.env}")
    text = f"{flag.help} [{'; '.join(notes)}]" if notes else flag.help
    return _beside(f"--{flag.name}{_value(flag)}", text, width)


def _value(flag: Flag) -> str:
    if flag.type is bool:
        return ""
    value = {int: "N", float: "X", str: "TEXT", list[str]: "TEXT ..."}.get(flag.type, "JSON")
    return f" [{value}]" if flag.bare is not None else f" {value}"


def _beside(flag: str, text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width - INDENT, break_on_hyphens=False, break_long_words=False)
    left = f"  {flag}"
    if len(left) > INDENT - 2:
        return [left, *(" " * INDENT + line for line in lines)]
    return [f"{left:{INDENT}}{lines[0]}", *(" " * INDENT + line for line in lines[1:])]
