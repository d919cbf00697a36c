"""The GLUE tasks: their columns and scores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from harness.config import choice
from harness.tasks.flags import TaskConfig

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """The columns that hold a task's one or two texts, and the names of its scores."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)


GLUE = {
    "cola": GlueTask(("sentence",), ("matthews_correlation",)),
    "mnli": GlueTask(("premise", "hypothesis")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("accuracy", "f1")),
    "qnli": GlueTask(("question", "sentence")),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "rte": GlueTask(("sentence1", "sentence2")),
    "sst2": GlueTask(("sentence",)),
    "stsb": GlueTask(("sentence1", "sentence2"), ("pearson", "spearmanr")),
    "wnli": GlueTask(("sentence1", "sentence2")),
}


def with_glue(config: TaskConfig) -> TaskConfig:
    """
    Return the flags with what --task_name stands for: the data set on the Hub, columns, whether labels are numbers.

    Data given by --dataset_name or by files replaces the Hub's. Raises ConfigError for an unknown task.
    """
    if config.task_name is None:
        return config
    choice("task_name", config.task_name, tuple(GLUE))
    here = config.dataset_name is not None or config.train_file is not None
    return dataclasses.replace(
        config,
        dataset_name=config.dataset_name if here else HUB_NAME,
        dataset_config_name=config.dataset_config_name if here else config.task_name,
        text_column_names=config.text_column_names or ",".join(GLUE[config.task_name].columns),
        do_regression=config.task_name == "stsb" if config.do_regression is None else config.do_regression,
    )
