"""
The loops that people train with, each as its own documentation shows it, on one `Work`.

All clip the gradient's norm, step AdamW and decay the learning rate linearly, in float32 on one device. Nothing is
saved, nothing evaluated. Where `work.is_tracked` they log the loss to an offline run of W&B.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler, set_seed

from harness.train import main
from tests.benchmarks.contest import OURS
from tests.benchmarks.peers.work import LEARNING_RATE, MAX_GRAD_NORM, SEED, TASK, Work, offered

Way = Callable[[Work, str], None]


def loader_of(work: Work) -> DataLoader[Any]:
    return DataLoader(work.samples, batch_size=work.batch, shuffle=True, collate_fn=work.collator)


def torch_alone(work: Work, folder: str) -> None:
    """What one writes by hand: no accelerator, no counting."""
    model = work.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    loader = loader_of(work)
    scheduler = get_scheduler("linear", optimizer, 0, len(loader))
    run = _wandb_run(folder) if work.is_tracked else None
    for step, batch in enumerate(loader, start=1):
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        if run is not None and step % work.logging_steps == 0:
            rate = scheduler.get_last_lr()[0]
            run.log({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate, "step": step})
        scheduler.step()
        optimizer.zero_grad()
    if run is not None:
        run.finish()


def accelerate(work: Work, folder: str) -> None:
    """https://huggingface.co/docs/accelerate/basic_tutorials/migration"""
    accelerator = Accelerator(cpu=True, log_with="wandb" if work.is_tracked else None)
    if work.is_tracked:
        accelerator.init_trackers("benchmarks", init_kwargs={"wandb": {"dir": folder}})
    model = work.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    loader = loader_of(work)
    scheduler = get_scheduler("linear", optimizer, 0, len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for step, batch in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        if work.is_tracked and step % work.logging_steps == 0:
            accelerator.log({"loss": loss.item(), "learning_rate": scheduler.get_last_lr()[0]}, step=step)
        scheduler.step()
    accelerator.end_training()


def fabric(work: Work, folder: str) -> None:
    """https://lightning.ai/docs/fabric/stable/fundamentals/convert.html"""
    from lightning.fabric import Fabric

    with _quiet_lightning():
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        model = work.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        loader = loader_of(work)
        scheduler = get_scheduler("linear", optimizer, 0, len(loader))
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(loader)
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()


def lightning(work: Work, folder: str) -> None:
    """https://lightning.ai/docs/pytorch/stable/starter/introduction.html"""
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer
    from lightning.pytorch.loggers import WandbLogger

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model()

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, fused=True)
            scheduler = get_scheduler("linear", optimizer, 0, work.steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    with _quiet_lightning():
        trainer = LightningTrainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=MAX_GRAD_NORM,
            default_root_dir=folder,
            logger=WandbLogger(offline=True, save_dir=folder, project="benchmarks") if work.is_tracked else False,
            log_every_n_steps=work.logging_steps,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader_of(work))
    if work.is_tracked:
        import wandb

        wandb.finish()


def trainer(work: Work, folder: str) -> None:
    """https://huggingface.co/docs/transformers/trainer"""
    arguments = TrainingArguments(**_arguments(work, folder))
    Trainer(work.model(), arguments, data_collator=work.collator, train_dataset=work.samples).train()
    _finish_wandb(work)


def trl(work: Work, folder: str) -> None:
    """https://huggingface.co/docs/trl/sft_trainer, on tokens; in float32 and without checkpointing, as the others."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from tests.support.inputs import save_gpt_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_gpt_tokenizer(folder))
    tokenizer.pad_token = tokenizer.eos_token
    rows = work.tokens.tolist()
    arguments = SFTConfig(**_arguments(work, folder), bf16=False, gradient_checkpointing=False, max_length=None)
    SFTTrainer(
        work.model(),
        arguments,
        data_collator=work.noting(DataCollatorForLanguageModeling(tokenizer.pad_token_id)),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
    ).train()
    _finish_wandb(work)


def ours(work: Work, folder: str) -> None:
    """`harness train`, whose task is `Work`."""
    flags = [f"--{name}={value}" for name, value in _arguments(work, f"{folder}/run").items()]
    with offered(work):
        code = main([f"--task={TASK}", *flags])
    if code != 0:
        raise RuntimeError(f"harness ended with {code}")


WAYS: dict[str, Way] = {
    "bare torch": torch_alone,
    "bare Accelerate": accelerate,
    "Lightning Fabric": fabric,
    "Lightning": lightning,
    "Trainer": trainer,
    "TRL": trl,
    OURS: ours,
}


def milliseconds(name: str, work: Work) -> float:
    """A step of this loop in the middle."""
    environment = dict(os.environ)
    work.calls.clear()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            os.environ["WANDB_DIR"] = folder
            set_seed(SEED)
            WAYS[name](work, folder)
    finally:
        os.environ.clear()
        os.environ.update(environment)  # the Trainer tells accelerate by variables what to do
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if len(work.calls) < work.steps:
        raise RuntimeError(f"{name} made {len(work.calls)} batches of {work.steps}")
    return work.milliseconds()


def _arguments(work: Work, folder: str) -> dict[str, Any]:
    """What the Trainer, TRL and harness are told, in the names that they share."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": work.batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": work.logging_steps,
        "save_strategy": "no",
        "report_to": "wandb" if work.is_tracked else "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def _wandb_run(folder: str) -> Any:
    import wandb

    return wandb.init(project="benchmarks", dir=folder)


def _finish_wandb(work: Work) -> None:
    if work.is_tracked:
        import wandb

        wandb.finish()


@contextlib.contextmanager
def _quiet_lightning() -> Any:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
