"""The flags of a training: length and cadence, loss, metrics, console, stopping, debugging."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import Json, arg, at_least, choice, section
from harness.errors import ConfigError
from harness.files import write_whole

INTERVALS = ("no", "steps", "epoch")


@section("schedule")
@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Length and cadence, with the Trainer's names and defaults."""

    num_train_epochs: float = arg(
        3.0, "Epochs to train; a fraction ends inside an epoch.", on_resume="checked", common=True
    )
    max_steps: int = arg(
        -1, "Optimizer steps to train; above 0 it replaces --num_train_epochs.", on_resume="checked", common=True
    )
    logging_strategy: str = arg("steps", "When to log: no, steps, epoch.", on_resume="free")
    logging_steps: float = arg(500, "Steps between logs; below 1: a share of all steps.", on_resume="free", common=True)
    logging_first_step: bool = arg(False, "Log the first step too.", on_resume="free")
    eval_strategy: str = arg("no", "When to evaluate: no, steps, epoch.", on_resume="free", common=True)
    eval_steps: float | None = arg(
        help="Steps between evaluations; below 1: a share. Default: --logging_steps.", on_resume="free", common=True
    )
    eval_delay: float = arg(0, "Epochs or steps to wait before the first evaluation.", on_resume="free")
    eval_on_start: bool = arg(False, "Evaluate before the first step.", on_resume="free")
    save_strategy: str = arg(
        "steps", "When to save a checkpoint: no, steps, epoch, best.", on_resume="free", common=True
    )
    save_steps: float = arg(
        500, "Steps between checkpoints; below 1: a share of all steps.", on_resume="free", common=True
    )

    def __post_init__(self) -> None:
        choice("logging_strategy", self.logging_strategy, INTERVALS)
        choice("eval_strategy", self.eval_strategy, INTERVALS)
        choice("save_strategy", self.save_strategy, (*INTERVALS, "best"))
        at_least(0, eval_delay=self.eval_delay)
        if not math.isfinite(self.num_train_epochs) or (self.max_steps <= 0 and self.num_train_epochs <= 0):
            raise ConfigError(f"--num_train_epochs={self.num_train_epochs}: use more than 0, or give --max_steps.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"--max_steps={self.max_steps}: use 1 or more, or leave it out to count epochs.")
        for kind in ("logging", "eval", "save"):
            steps = getattr(self, f"{kind}_steps")
            if getattr(self, f"{kind}_strategy") != "steps" or steps is None:
                continue
            if not 0 < steps < math.inf:
                raise ConfigError(f"--{kind}_steps={steps}: use 1 or more, or a share of all steps below 1.")
            if steps > 1 and steps != int(steps):
                raise ConfigError(f"--{kind}_steps={steps}: use a whole number, or a share of all steps below 1.")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ConfigError("--save_strategy=best needs evaluations: give --eval_strategy steps or epoch.")


# What Transformers takes, and what torch.utils.checkpoint does of plain values.
CHECKPOINTING = (
    *("use_reentrant", "every_n_layers", "offload", "preserve_rng_state"),
    *("determinism_check", "debug", "early_stop"),
)


@section("loss")
@dataclass(frozen=True, kw_only=True)
class ModelingConfig:
    """What is done to the model, and how its loss and gradients are treated."""

    activation_checkpointing: bool | None = arg(
        help="Compute activations again in the backward pass: less memory, more time.", on_resume="free", common=True
    )
    activation_checkpointing_kwargs: Json | None = arg(
        help="JSON: use_reentrant, every_n_layers, offload, ...", on_resume="free"
    )
    gradient_checkpointing: bool | None = arg(help="The older name of --activation_checkpointing.", on_resume="free")
    gradient_checkpointing_kwargs: Json | None = arg(
        help="The older name of --activation_checkpointing_kwargs.", on_resume="free"
    )
    use_liger_kernel: bool = arg(False, "Use Liger's kernels; needs liger-kernel.")
    liger_kernel_config: Json | None = arg(help='JSON for Liger: {"rope": true, "swiglu": false, ...}.')
    use_cache: bool = arg(False, "Let the model keep keys and values for generation while it trains.", on_resume="free")
    neftune_noise_alpha: float | None = arg(help="Noise on the embeddings (NEFTune, arXiv 2310.05914), e.g. 5.")
    label_smoothing_factor: float = arg(0.0, "Label smoothing; 0 is off.")
    label_names: list[str] | None = arg(
        help="Keys of a batch that are labels, for evaluations; default: the arguments of the model's forward with "
        "`label` in their names."
    )
    loss_scaling: str = arg(
        "global", "Loss and gradient: of a step's samples at once (global), or as the Trainer sums them (trainer)."
    )
    average_tokens_across_devices: bool = arg(True, "Divide the loss by the number of items on all devices.")
    max_grad_norm: float = arg(1.0, "Clip the norm of the gradients; 0 is off.", mutable=True)
    torch_empty_cache_steps: int | None = arg(help="Empty the device's cache every N steps.", on_resume="free")

    def __post_init__(self) -> None:
        at_least(
            0,
            neftune_noise_alpha=self.neftune_noise_alpha,
            label_smoothing_factor=self.label_smoothing_factor,
            max_grad_norm=self.max_grad_norm,
        )
        at_least(1, torch_empty_cache_steps=self.torch_empty_cache_steps)
        choice("loss_scaling", self.loss_scaling, ("global", "trainer"))
        self._check_kwargs()
        if self.label_smoothing_factor > 0 and "labels" not in (self.label_names or ["labels"]):
            raise ConfigError(
                f"--label_smoothing_factor={self.label_smoothing_factor} smooths `labels`, and --label_names="
                f"{' '.join(self.label_names or [])} has none of that name; leave one of them out."
            )
        if self.label_smoothing_factor > 1:
            raise ConfigError(f"--label_smoothing_factor={self.label_smoothing_factor}: use 0 to 1.")

    def _check_kwargs(self) -> None:
        name = "activation" if self.activation_checkpointing_kwargs is not None else "gradient"
        given = self.checkpointing_kwargs
        flag = f"--{name}_checkpointing_kwargs={dict(given)}"
        if given and self.activation_checkpointing is None and self.gradient_checkpointing is None:
            raise ConfigError(f"{flag} does nothing without --{name}_checkpointing; give both.")
        if self.liger_kernel_config is not None and not self.use_liger_kernel:
            raise ConfigError("--liger_kernel_config does nothing without --use_liger_kernel; give both.")
        for key in given:
            if key not in CHECKPOINTING:
                raise ConfigError(f"{flag}: {key} is not known; use {', '.join(CHECKPOINTING)}.")
        every = given.get("every_n_layers", 1)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"{flag}: every_n_layers is a number of layers, 1 or more.")
        for key, value in given.items():
            if key not in ("every_n_layers", "determinism_check") and not isinstance(value, bool):
                raise ConfigError(f"{flag}: {key} is true or false.")

    @property
    def checkpointing_kwargs(self) -> dict[str, Any]:
        """What the checkpointing is given, under either name."""
        return dict(self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {})

    @property
    def checkpoints_activations(self) -> bool:
        """Whether either name turns it on."""
        first = self.activation_checkpointing
        return bool(self.gradient_checkpointing if first is None else first)


@section("loss")
@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is counted."""

    logging_nan_inf_filter: bool = arg(
        True, "Show a loss that is not finite as the mean of the others.", on_resume="free"
    )
    include_num_input_tokens_seen: str = arg(
        "no", "Count the tokens of the input: no, all, non_padding; bare: all.", bare="all"
    )

    def __post_init__(self) -> None:
        # The Trainer takes a boolean here too.
        aliases = {"true": "all", "false": "no"}
        value = aliases.get(self.include_num_input_tokens_seen.lower(), self.include_num_input_tokens_seen)
        choice("include_num_input_tokens_seen", value, ("no", "all", "non_padding"))
        object.__setattr__(self, "include_num_input_tokens_seen", value)


@section("console", on_resume="unrelated")
@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """What the speed is compared with."""

    peak_flops: float | None = arg(
        help="Peak of one device in FLOP/s, e.g. 312e12, for train/throughput/mfu; default: that of a known card."
    )

    def __post_init__(self) -> None:
        if self.peak_flops is not None and not 1e9 <= self.peak_flops < math.inf:
            raise ConfigError(f"--peak_flops={self.peak_flops:g}: give FLOP/s of one device, 1e9 or more, e.g. 312e12.")


@section("evaluation", on_resume="free")
@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How evaluations are done."""

    prediction_loss_only: bool = arg(False, "Compute the loss alone, no other metric.")
    bf16_full_eval: bool = arg(False, "With --do_eval or --do_predict: evaluate in bfloat16 after the training.")
    fp16_full_eval: bool = arg(False, "With --do_eval or --do_predict: evaluate in float16 after the training.")

    def __post_init__(self) -> None:
        if self.bf16_full_eval and self.fp16_full_eval:
            raise ConfigError("--bf16_full_eval and --fp16_full_eval exclude each other; give one of them.")


@section("best")
@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """The best model and early stopping, with the meaning of the Trainer and its EarlyStoppingCallback."""

    load_best_model_at_end: bool = arg(
        False, "End with the weights of the best evaluation.", on_resume="free", common=True
    )
    metric_for_best_model: str | None = arg(
        help="The metric that decides, with or without eval_; default: loss.", common=True
    )
    greater_is_better: bool | None = arg(help="Default: true unless the metric's name ends with loss.")
    early_stopping_patience: int | None = arg(
        help="Stop after so many evaluations without a better one.", on_resume="free", common=True
    )
    early_stopping_threshold: float = arg(0.0, "How much better an evaluation must be to count.", on_resume="free")

    def __post_init__(self) -> None:
        at_least(1, early_stopping_patience=self.early_stopping_patience)
        at_least(0, early_stopping_threshold=self.early_stopping_threshold)
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ConfigError("--early_stopping_threshold does nothing without --early_stopping_patience; give both.")

    def metric(self, *, wanted: bool) -> str | None:
        """The metric's name with eval_, or None if none decides; `wanted` if something else needs one."""
        name = self.metric_for_best_model
        if name is None and (wanted or self.load_best_model_at_end):
            name = "loss"
        return name if name is None or name.startswith("eval_") else f"eval_{name}"


LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")


@section("console", on_resume="unrelated")
@dataclass(frozen=True, kw_only=True)
class ConsoleConfig:
    """How much is said, and by which process."""

    disable_tqdm: bool | None = arg(help="No progress bar; default: none if --log_level is error or critical.")
    log_level: str = arg("passive", f"Level of the main process: {', '.join(LOG_LEVELS)}. passive: info for ours only.")
    log_level_replica: str = arg("warning", "Level of the other processes, same values.")
    log_on_each_node: bool = arg(True, "With several nodes, let the first process of each use --log_level.")

    def __post_init__(self) -> None:
        choice("log_level", self.log_level, LOG_LEVELS)
        choice("log_level_replica", self.log_level_replica, LOG_LEVELS)

    @property
    def shows_progress(self) -> bool:
        """The answer to --disable_tqdm, or what follows from the log level where it isn't given."""
        if self.disable_tqdm is None:
            return self.log_level not in ("error", "critical")
        return not self.disable_tqdm


@section("checkpoints", on_resume="unrelated")
@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """When a training ends before its plan."""

    time_limit_margin_seconds: float = arg(
        60.0,
        "Under SLURM save and stop so long before the job's time limit, beside the time that a save and the longest "
        "step take; 0: leave the limit alone.",
    )
    stop_on_nonfinite: int = arg(
        0,
        "Stop when loss or gradients of N steps in a row are not finite, as a report or a save finds, and save no "
        "checkpoint after such a step; 0: never.",
    )
    stop_at_step: int | None = arg(
        help="Save after this step and stop with exit code 0; a resume goes on. The schedule stays that of --max_steps."
    )
    pruning_file: str | None = arg(
        help="Given by harness sweep: after each evaluation wait until this file says whether to go on."
    )

    def __post_init__(self) -> None:
        at_least(1, stop_at_step=self.stop_at_step)
        at_least(
            0,
            time_limit_margin_seconds=self.time_limit_margin_seconds,
            stop_on_nonfinite=self.stop_on_nonfinite,
        )


@dataclass(frozen=True, kw_only=True)
class Word:
    """What --pruning_file says of a trial: that it goes on up to step `through`, and ends at `prune_at`, if it does."""

    through: int = -1
    prune_at: int | None = None

    @classmethod
    def read(cls, path: Path) -> Word:
        """Return the word in a file; that of a file which is not there decides nothing."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(through=int(found["through"]), prune_at=found["prune_at"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        """Put the word into a file. Raises OSError."""
        write_whole(path, json.dumps({"through": self.through, "prune_at": self.prune_at}) + "\n")

    def on(self, step: int) -> bool | None:
        """Whether the trial ends at a step that has been evaluated; None while that is not decided."""
        if self.prune_at is not None and step >= self.prune_at:
            return True
        return False if step <= self.through else None


@section("console", on_resume="unrelated")
@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a step is called slow."""

    slow_step_seconds: float = arg(
        60.0, "Warn, and name the late rank, if a step takes longer than this and than ten times the usual; 0: never."
    )

    def __post_init__(self) -> None:
        at_least(0, slow_step_seconds=self.slow_step_seconds)


# What a bare --debug gives to the flags that were not given.
DEBUG_DEFAULTS: dict[str, Any] = {
    "max_train_samples": 64,
    "max_eval_samples": 16,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": ["none"],
    "dataloader_num_workers": 0,
    "full_determinism": True,
    "disable_tqdm": True,
    "slow_step_seconds": 0.0,  # somebody at breakpoint() takes his time
}


@section("debugging", on_resume="unrelated")
@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Little data, everything shown, a stop at the first value that is not finite."""

    debug: str = arg(
        "",
        "Bare: few samples and steps, nothing saved or tracked, all shown, stop at NaN. "
        "underflow_overflow: the Trainer's report of activations.",
        bare="on",
        common=True,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "debug", self.meant(self.debug))
        choice("debug", self.debug, ("", "on", "underflow_overflow"))

    @staticmethod
    def meant(value: str) -> str:
        """The mode that a value means, which may be a YAML file's true or false."""
        return {"true": "on", "false": ""}.get(value.lower(), value)

    @property
    def is_on(self) -> bool:
        """Whether this is the debugging mode, not the Trainer's report."""
        return self.debug == "on"
