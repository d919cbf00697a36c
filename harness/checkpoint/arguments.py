"""What may change between two lives of a run: every flag, and what a resume makes of another value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.config import masked, plain

# Where a run lives, who watches it, what one command asks for: no value that it computes hangs on these.
UNRELATED = frozenset(
    {
        *("config", "print_config", "do_train", "do_eval", "do_predict", "debug"),
        *("output_dir", "resume_from_checkpoint", "ignore_data_skip", "async_save", "expect_num_processes"),
        "save_merged_model",
        *("allow_changed_arguments", "allow_changed_data_order"),
        *("cache_dir", "token", "trust_remote_code"),
        *("preprocessing_num_workers", "preprocess_on_main", "overwrite_cache"),
        *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "peak_flops", "slow_step_seconds"),
        "time_limit_margin_seconds",
        *("report_to", "run_name", "project", "wandb_disabled", "wandb_mode", "wandb_project", "wandb_entity"),
        *(
            "wandb_run_id",
            "wandb_resume",
            "wandb_fork",
            "wandb_run_group",
            "wandb_job_type",
            "wandb_tags",
            "wandb_notes",
        ),
        *("wandb_dir", "wandb_silent", "wandb_log_model", "wandb_artifact_names", "wandb_keep_checkpoints"),
        *("wandb_registry", "wandb_watch", "wandb_watch_max_tensors", "wandb_watch_patterns"),
        *("wandb_eval_samples", "wandb_eval_samples_freq", "wandb_finish_timeout"),
    }
)
# Told, and taken: when something is logged, evaluated or saved, and how the same batches are computed.
FREE = frozenset(
    {
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        *("prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "max_eval_samples", "max_predict_samples"),
        *("predict_with_generate", "generation_max_length", "generation_num_beams"),
        *("test_file", "test_split_name", "metric_name"),
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end"),
        *("early_stopping_patience", "early_stopping_threshold"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "use_cache", "torch_empty_cache_steps"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("ddp_timeout", "ddp_find_unused_parameters", "ddp_static_graph", "num_processes"),
    }
)
# Told, and judged by what they come to: the global batch (harness/data/position.py), precision, device, length.
CHECKED = frozenset(
    {
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
        *("bf16", "fp16", "use_cpu"),
        *("max_steps", "num_train_epochs", "total_steps"),
    }
)
# The run would go on with other numbers, and nothing would show it.
REFUSED = frozenset(
    {
        *("task", "task_args", "model_name_or_path", "model_type", "config_name", "config_overrides"),
        *("tokenizer_name", "model_revision", "dtype", "attn_implementation", "ignore_mismatched_sizes"),
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
        "peft_config",
        *("dataset_name", "dataset_config_name", "task_name", "train_file", "train_split_name", "streaming"),
        # Where these are not given a part of the training data is held out.
        *("validation_file", "validation_dir", "validation_split_name", "validation_split_percentage"),
        *("train_dir", "image_column_name", "image_processor_name", "without_augmentation"),
        *("text_column_names", "text_column_delimiter", "label_column_name", "max_train_samples", "block_size"),
        *("keep_linebreaks", "max_seq_length", "pad_to_max_length", "mlm_probability", "line_by_line"),
        *("summary_column", "source_prefix", "max_source_length", "max_target_length"),
        *("do_regression", "label_all_tokens", "remove_unused_columns", "overfit_batches"),
        *("train_sampling_strategy", "length_column_name", "data_seed", "dataloader_drop_last"),
        "dataloader_seed_batches",
        *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "adam_beta1"),
        *("adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
        *("use_liger_kernel", "liger_kernel_config", "include_num_input_tokens_seen"),
        *("metric_for_best_model", "greater_is_better"),
        *("seed", "full_determinism", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("mixed_precision", "device"),
    }
)
# Not flags: what flags and the launch config together come to.
RESOLVED = ("mixed_precision", "device", "num_processes", "total_steps")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What differs from the arguments of a checkpoint, as `name old -> new`; `refused` is a part of `told`."""

    told: tuple[str, ...]
    refused: tuple[str, ...]


def recorded(flags: Mapping[str, Any], **resolved: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a run's arguments: JSON types, no secrets."""
    return masked(plain({**flags, **resolved}))


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """
    Compare the arguments of a checkpoint with those of today.

    A name that one of them lacks is of another version and says nothing; with {} for a Trainer's nothing differs.
    """
    changed = [name for name in now if name not in UNRELATED and name in saved and saved[name] != now[name]]
    refused = [name for name in changed if name in REFUSED]
    # Longer is a wish; shorter would end on another schedule than it was begun with.
    was_asked = not {"max_steps", "num_train_epochs"}.isdisjoint(changed)
    if was_asked and now["total_steps"] < saved["total_steps"]:
        refused.append("total_steps")
    told = {name: f"{name} {_shown(saved[name])} -> {_shown(now[name])}" for name in changed}
    return Changes(told=tuple(told.values()), refused=tuple(told[name] for name in refused))


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
