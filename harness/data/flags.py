"""The flags of the batches and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config import arg, at_least, choice, section
from harness.errors import ConfigError


@section("batches")
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Batches and how they are loaded."""

    per_device_train_batch_size: int = arg(8, "Samples a device in a micro-batch.", on_resume="checked", common=True)
    per_device_eval_batch_size: int = arg(
        8, "Samples a device in a batch of an evaluation.", on_resume="free", common=True
    )
    gradient_accumulation_steps: int = arg(
        1, "Micro-batches of a device in an optimizer step.", on_resume="checked", common=True
    )
    max_tokens_per_batch: int | None = arg(
        help="Batches of as many samples as fit into so many tokens on a device, padding included, in evaluations too; "
        "instead of --per_device_train_batch_size and --per_device_eval_batch_size.",
        on_resume="checked",
    )
    auto_find_batch_size: bool = arg(
        False,
        "Find the largest micro-batch that fits in memory; the samples of a step stay as many. One that is too large "
        "later is split.",
        on_resume="free",
    )
    train_sampling_strategy: str = arg("random", "Order of the training data: random, sequential, group_by_length.")
    length_column_name: str = arg(
        "length", "Column with the lengths for group_by_length and --max_tokens_per_batch; else they are measured."
    )
    data_seed: int | None = arg(help="Seed of the order alone; default: --seed.")
    dataloader_drop_last: bool = arg(False, "Leave out the last batch of an epoch if it is not full.")
    dataloader_num_workers: int = arg(
        0, "Processes that load batches; 0: the main process does.", on_resume="free", common=True
    )
    dataloader_pin_memory: bool = arg(True, "Load into pinned memory.", on_resume="free")
    dataloader_persistent_workers: bool = arg(False, "Keep the worker processes between epochs.", on_resume="free")
    dataloader_prefetch_factor: int | None = arg(
        help="Batches each worker loads ahead; default: torch's 2.", on_resume="free"
    )
    dataloader_multiprocessing_context: str | None = arg(
        help="How workers start: fork, spawn, forkserver.", on_resume="free"
    )
    dataloader_in_order: bool = arg(True, "Keep the order of the batches with several workers.", on_resume="free")
    dataloader_seed_batches: bool = arg(
        False,
        "Seed each batch from --seed, epoch and number: what collators and samples draw at random resumes exactly "
        "with workers too.",
    )
    remove_unused_columns: bool = arg(True, "Hide the columns that the model's forward does not take.")
    ignore_data_skip: bool = arg(
        False, "On resume begin the epoch's data anew: fast, but not the same run.", on_resume="unrelated"
    )
    allow_changed_data_order: bool = arg(
        False,
        "Resume even if the global batch, the data or its order has changed: some samples come twice or never.",
        on_resume="unrelated",
    )
    overfit_batches: int | None = arg(help="Train and evaluate on the first N batches only, to see the loss go to 0.")

    def __post_init__(self) -> None:
        at_least(
            1,
            per_device_train_batch_size=self.per_device_train_batch_size,
            per_device_eval_batch_size=self.per_device_eval_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            dataloader_prefetch_factor=self.dataloader_prefetch_factor,
            overfit_batches=self.overfit_batches,
            max_tokens_per_batch=self.max_tokens_per_batch,
        )
        at_least(0, dataloader_num_workers=self.dataloader_num_workers, data_seed=self.data_seed)
        if self.train_sampling_strategy == "batch_rebalance":
            raise ConfigError(
                "--train_sampling_strategy=batch_rebalance makes micro-batches of any size, and a resume needs to know "
                "how many samples a step had; use --max_tokens_per_batch, or group_by_length."
            )
        choice(
            "train_sampling_strategy",
            self.train_sampling_strategy,
            ("random", "sequential", "group_by_length"),
        )
        if self.max_tokens_per_batch is not None:
            self._check_tokens()
        if self.auto_find_batch_size:
            self._check_finding()
        if self.dataloader_multiprocessing_context is not None:
            allowed = ("fork", "spawn", "forkserver")
            choice("dataloader_multiprocessing_context", self.dataloader_multiprocessing_context, allowed)
        if self.dataloader_num_workers == 0:
            for name in ("prefetch_factor", "multiprocessing_context"):
                if getattr(self, f"dataloader_{name}") is not None:
                    raise ConfigError(f"--dataloader_{name} needs --dataloader_num_workers of 1 or more.")
            if self.dataloader_persistent_workers:
                raise ConfigError("--dataloader_persistent_workers needs --dataloader_num_workers of 1 or more.")
        if not self.dataloader_in_order:
            raise ConfigError(
                "--dataloader_in_order=false makes the order of the data depend on timing, so no run could be "
                "resumed or repeated; leave it out."
            )

    def _check_tokens(self) -> None:
        """Raise ConfigError for a flag that means nothing where batches are made by tokens."""
        flag = f"--max_tokens_per_batch={self.max_tokens_per_batch}"
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            value, default = getattr(self, name), DataConfig.__dataclass_fields__[name].default
            if value != default:
                raise ConfigError(
                    f"--{name}={value} says nothing beside {flag}, by which a batch holds as many samples as fit: "
                    f"leave it out, or give its default, {default}, where a recipe has it."
                )
        if self.train_sampling_strategy == "group_by_length":
            raise ConfigError(
                f"--train_sampling_strategy=group_by_length says nothing beside {flag}, whose batches are of samples "
                "of similar length: leave it out."
            )
        if self.dataloader_drop_last:
            raise ConfigError(
                f"--dataloader_drop_last leaves out a batch that is not full, and with {flag} each holds what fits: "
                "leave it out."
            )
        if self.overfit_batches is not None:
            raise ConfigError(
                f"--overfit_batches={self.overfit_batches} counts batches of --per_device_train_batch_size samples: "
                f"leave {flag} out."
            )

    def _check_finding(self) -> None:
        """Raise ConfigError where no size of a micro-batch can be found, or the run would depend on it."""
        if self.max_tokens_per_batch is not None:
            raise ConfigError(
                f"--auto_find_batch_size finds a number of samples, and --max_tokens_per_batch="
                f"{self.max_tokens_per_batch} puts as many into a batch as fit: leave one of them out."
            )
        if self.dataloader_drop_last:
            raise ConfigError(
                "--auto_find_batch_size with --dataloader_drop_last: how many samples an epoch leaves out would depend "
                "on the machine; leave one of them out."
            )
        if self.per_device_train_batch_size * self.gradient_accumulation_steps == 1:
            raise ConfigError(
                "--auto_find_batch_size divides the samples of a device in a step, and --per_device_train_batch_size=1 "
                "with --gradient_accumulation_steps=1 leaves one: give their number as --per_device_train_batch_size."
            )
