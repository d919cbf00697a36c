"""The same training by transformers.Trainer, as its users restart it: from the newest checkpoint if there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from harness.distributed.ranks import settle
from harness.tasks import TaskConfig
from tests.faults.task import build
from tests.support.tasks.parity_task import TokenAccuracy


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    metrics = TokenAccuracy()
    metrics.update(torch.tensor(np.asarray(prediction.predictions)), torch.tensor(prediction.label_ids))
    return metrics.compute()


def main() -> None:
    torch.set_num_threads(1)
    arguments = TrainingArguments(**json.loads(sys.argv[1]), use_cpu=True, disable_tqdm=True)
    set_seed(arguments.seed)
    task = build(TaskConfig(task="tests.faults.task:build"))
    trainer = Trainer(
        model=task.model,
        args=arguments,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
    )
    output_dir = Path(arguments.output_dir)
    last = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=True if last else None)
    trainer.save_model()
    trainer.save_state()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        settle()  # without it a rank hangs now and then in torch's destructor
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
