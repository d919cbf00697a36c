"""What the flags ask of a task and its data: refused before anything is trained, where it can't be had."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from harness.data.packing import check_packing
from harness.errors import ConfigError
from harness.flags import Config
from harness.tasks import Task
from harness.tasks.text.flags import prompts_of
from harness.training.evaluation import Evaluator
from harness.training.loss import Loss

logger = logging.getLogger(__name__)


def check_data(config: Config, task: Task, num_processes: int) -> None:
    """Raise ConfigError for data that is missing, empty, or not what a flag works with."""
    if config.task.packing:
        check_packing(config.data, use_cache=config.modeling.use_cache)
    _check_labels(config, task)
    _check_batches(config, task, num_processes)
    needs_eval = config.plan.eval_strategy != "no" or config.plan.eval_on_start or config.run.do_eval
    if config.run.trains and task.train_dataset is None:
        raise ConfigError(f"--task={config.task.task} has no training data: give --train_file or --dataset_name.")
    if config.run.trains and hasattr(task.train_dataset, "__len__") and len(task.train_dataset) == 0:
        raise ConfigError("The training data is empty.")
    if needs_eval and task.eval_dataset is None and config.data.overfit_batches is None:
        flag = f"--eval_strategy {config.plan.eval_strategy}" if config.plan.eval_strategy != "no" else "An evaluation"
        raise ConfigError(f"{flag} needs validation data: give --validation_file, or a data set that has some.")
    if config.run.do_predict and task.test_dataset is None:
        raise ConfigError("--do_predict needs test data: give --test_file, or a data set with a test split.")
    if config.run.trains:
        _check_texts(config, task)
    count = config.tracking.wandb_eval_samples
    if count is not None and config.tracking.uses_wandb and config.run.trains:
        if config.plan.eval_strategy == "no":
            raise ConfigError(f"--wandb_eval_samples={count} needs evaluations: give --eval_strategy epoch or steps.")
        if task.predict_samples is None:
            raise ConfigError(
                f"--wandb_eval_samples={count}: --task={config.task.task} has no predict_samples that shows what the "
                "model makes of samples; give it one, or leave the flag out."
            )


def _check_texts(config: Config, task: Task) -> None:
    prompts_of(config.task)  # raises for a file that can't be read
    steps, samples = config.task.generate_steps, config.task.generate_samples
    if steps is not None and task.complete is None:
        raise ConfigError(
            f"--generate_steps={steps}: --task={config.task.task} has no `complete` that writes a text for a prompt; "
            "use causal-lm or seq2seq, give the task one, or leave the flag out."
        )
    if samples is not None and task.draw is None:
        raise ConfigError(
            f"--generate_samples={samples}: --task={config.task.task} has no `draw` that draws texts; use causal-lm, "
            "give the task one, or leave the flag out."
        )
    if samples is not None and config.plan.eval_strategy == "no":
        raise ConfigError(f"--generate_samples={samples} needs evaluations: give --eval_strategy epoch or steps.")


def _check_labels(config: Config, task: Task) -> None:
    factor = config.modeling.label_smoothing_factor
    kind = getattr(getattr(task.model, "config", None), "problem_type", None)
    if factor > 0 and kind in ("regression", "multi_label_classification"):
        what = "numbers" if kind == "regression" else "several labels a sample"
        raise ConfigError(
            f"--label_smoothing_factor={factor} is of one label out of many, and the labels here are {what}; leave it "
            "out."
        )


def tell_of_labels(task: Task, loss: Loss) -> None:
    """Warn of evaluations without a loss, since no argument of the model is named as labels are."""
    if task.eval_dataset is not None and not (loss.label_names or loss.needs_no_labels):
        logger.warning(
            "%s.forward has no argument with `label` in its name: evaluations have no loss and no metrics. Give "
            "--label_names with the keys of a batch that are labels.",
            type(task.model).__name__,
        )


def _check_batches(config: Config, task: Task, num_processes: int) -> None:
    """Refuse batches by tokens that can't be, and --dataloader_drop_last where it leaves an evaluation nothing."""
    if config.data.max_tokens_per_batch is not None:
        _check_tokens(config, task)
    if not config.data.dataloader_drop_last or config.data.overfit_batches is not None:
        return
    a_round = config.data.per_device_eval_batch_size * num_processes
    sets = task.eval_dataset if isinstance(task.eval_dataset, Mapping) else {"evaluation": task.eval_dataset}
    for name, samples in {**sets, "test": task.test_dataset}.items():
        if hasattr(samples, "__len__") and 0 < len(samples) < a_round:
            raise ConfigError(
                f"--dataloader_drop_last leaves no batch of the {name} data: {len(samples)} samples, and a round takes "
                f"{a_round}; use a smaller --per_device_eval_batch_size, or leave it out."
            )


def _check_tokens(config: Config, task: Task) -> None:
    flag = f"--max_tokens_per_batch={config.data.max_tokens_per_batch}"
    if config.modeling.loss_scaling == "trainer":
        raise ConfigError(
            f"--loss_scaling=trainer takes means of batches' means, which would depend on how many samples {flag} puts "
            "into each: leave one of the two out."
        )
    if any(isinstance(each, torch.utils.data.IterableDataset) for each in _data_sets(config, task)):
        raise ConfigError(
            f"{flag} divides the data by the lengths of all samples, and a stream has none: use "
            "--per_device_train_batch_size."
        )


def _data_sets(config: Config, task: Task) -> list[Any]:
    """Return the data sets that are read."""
    sets = task.eval_dataset.values() if isinstance(task.eval_dataset, Mapping) else [task.eval_dataset]
    train = [task.train_dataset] if config.run.trains else []
    test = [task.test_dataset] if config.run.do_predict else []
    return [each for each in (*train, *sets, *test) if each is not None]


def check_best_metric(config: Config, task: Task, evaluator: Evaluator) -> None:
    """Raise ConfigError if --metric_for_best_model names a value that no evaluation has."""
    if config.best_metric is None or config.plan.eval_strategy == "no":
        return
    sets = task.eval_dataset if isinstance(task.eval_dataset, Mapping) else {None: task.eval_dataset}
    prefixes = ["eval" if name is None else f"eval_{name}" for name in sets]
    known = sorted(f"{prefix}_{name}" for prefix in prefixes for name in evaluator.metric_names())
    if config.best_metric not in known:
        own = " The values of after_evaluation are not known before, so none of them can decide."
        raise ConfigError(
            f"--metric_for_best_model={config.best.metric_for_best_model or 'loss'} is in no evaluation; "
            f"there are: {', '.join(known)}.{own if task.after_evaluation is not None else ''}"
        )
