"""All sections together: what the command line takes, what spans sections, and where the Trainer's flags went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import yaml

from harness.checkpoint.flags import CheckpointConfig
from harness.config import arg, parse_sections, read_yaml
from harness.data.flags import DataConfig
from harness.distributed.flags import TopologyConfig
from harness.errors import ConfigError
from harness.model.flags import BY_METRIC, AdapterConfig, OptimConfig
from harness.tasks.flags import SHIPPED, TaskConfig
from harness.tracking import TrackingConfig
from harness.tracking.flags import under_environment
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

QUICKSTART = "quickstart"
# Any of these says what to train; then nothing of the quickstart recipe is used.
SAY_WHAT_TO_TRAIN = (
    "task",
    "task_name",
    "model_name_or_path",
    "model_type",
    "config_name",
    "dataset_name",
    "train_file",
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
    "auto_find_batch_size": "a batch size found by failing differs between lives of a run; give one that fits",
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
    "label_names": "they are read from the model's forward",
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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the command does."""

    config: str | None = arg(help="YAML file of flags, or the name of a shipped recipe; flags given here win.")
    print_config: bool = arg(False, "Print the resolved configuration as YAML and end.")
    do_train: bool = arg(False, "Train. Without any --do_* flag training is what is done.")
    do_eval: bool = arg(False, "Evaluate the final (or best, or given) model once more at the end.")
    do_predict: bool = arg(False, "Predict on the test set at the end: predict_results.txt in --output_dir.")

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
        plan, best = self.plan, self.best
        if self.adapters.is_on and self.task.model_name_or_path is None and self.task.task in SHIPPED:
            raise ConfigError(
                "An adapter is saved without its model, and a new model could not be found again: give "
                "--model_name_or_path, or train the whole model."
            )
        evaluates = plan.eval_strategy != "no"
        if best.load_best_model_at_end:
            self._check_best_can_be_loaded()
        if self.optim.lr_scheduler_type in BY_METRIC and not evaluates:
            raise ConfigError(
                f"--lr_scheduler_type={self.optim.lr_scheduler_type} goes by evaluations: "
                "give --eval_strategy steps or epoch."
            )
        if best.early_stopping_patience is not None and not evaluates:
            raise ConfigError("--early_stopping_patience counts evaluations: give --eval_strategy steps or epoch.")
        if self.best_metric is None and best.early_stopping_patience is not None:
            raise ConfigError("--early_stopping_patience needs --metric_for_best_model, e.g. loss.")
        if self.best_metric is None and plan.save_strategy == "best":
            raise ConfigError("--save_strategy=best needs --metric_for_best_model, e.g. loss.")
        if self.best_metric is not None and self.evaluation.prediction_loss_only and "loss" not in self.best_metric:
            raise ConfigError(
                f"--metric_for_best_model={best.metric_for_best_model} is not computed with --prediction_loss_only."
            )

    def _check_best_can_be_loaded(self) -> None:
        plan = self.plan
        if plan.save_strategy == "best":
            return
        if plan.eval_strategy != plan.save_strategy:
            raise ConfigError(
                f"--load_best_model_at_end needs equal strategies, not --eval_strategy {plan.eval_strategy} and "
                f"--save_strategy {plan.save_strategy}; make them equal, or give --save_strategy best."
            )
        if plan.eval_strategy == "no":
            raise ConfigError("--load_best_model_at_end needs evaluations: give --eval_strategy steps or epoch.")
        eval_steps = plan.logging_steps if plan.eval_steps is None else plan.eval_steps
        mixed = (eval_steps < 1) != (plan.save_steps < 1)
        # Shares are compared as whole millionths: their floats are not exact.
        scale = 1_000_000 if eval_steps < 1 else 1
        if plan.eval_strategy == "steps" and (mixed or round(plan.save_steps * scale) % round(eval_steps * scale)):
            raise ConfigError(
                f"--load_best_model_at_end needs --save_steps ({plan.save_steps:g}) to be a multiple of "
                f"--eval_steps ({eval_steps:g}): the best evaluation must have a checkpoint."
            )

    @property
    def best_metric(self) -> str | None:
        """The metric that says which evaluation is the best, with eval_; None if none was asked for."""
        return self.best.metric(wanted=self.optim.lr_scheduler_type in BY_METRIC)

    def flat(self) -> dict[str, Any]:
        """All values by flag name, tokens masked: what is recorded."""
        values: dict[str, Any] = {}
        for section in fields(self):
            values |= asdict(getattr(self, section.name))
        return {name: "<TOKEN>" if name == "token" and value else value for name, value in values.items()}

    def as_yaml(self) -> str:
        """The values by flag name; `--config` reads them again."""
        # Which run it was is no part of how it was configured: another one of the same configuration is a new run.
        # What one resume was allowed is not allowed for good.
        skipped = ["config", "print_config", "token", "wandb_run_id", "wandb_resume"]
        skipped += ["allow_changed_arguments", "allow_changed_data_order"]
        values = {name: dict(v) if isinstance(v, dict) else v for name, v in self.flat().items() if name not in skipped}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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


def parse(argv: Sequence[str]) -> Config:
    """
    Return the configuration of a command line.

    Flags go over WANDB_* variables, over `--config` or, where nothing says what to train, over quickstart. With a bare
    --debug whatever no flag gives takes the values of DEBUG_DEFAULTS. Raises ConfigError.
    """
    refused = OWNED_BY_LAUNCH_CONFIG | REFUSED | GONE
    source = _value_of("config", argv)
    base: Mapping[str, Any] = read_yaml(source, SECTIONS, refused=refused) if source is not None else {}
    sections, given = parse_sections(SECTIONS, argv, refused=refused, base=under_environment(base))
    if source is None and not given & {*SAY_WHAT_TO_TRAIN}:
        base = read_yaml(QUICKSTART, SECTIONS, refused=refused)
    if any(isinstance(section, DebugConfig) and section.is_on for section in sections):
        base = {**base, **{name: value for name, value in DEBUG_DEFAULTS.items() if name not in given}}
    sections, _ = parse_sections(SECTIONS, argv, refused=refused, base=under_environment(base))
    return Config(**dict(zip([field.name for field in fields(Config)], sections, strict=True)))


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    # --config has to be read before the parser can know the values under the flags.
    for i, token in enumerate(argv):
        if token == f"--{flag}" and i + 1 < len(argv):
            return argv[i + 1]
        if token.startswith(f"--{flag}="):
            return token.split("=", 1)[1]
    return None
