"""What a run leaves behind: the final model, evaluations and predictions, a sample, a table of what came out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from harness.build import Session, eval_set, eval_sets, prepare_for_evaluation, weights_dtype
from harness.errors import CheckpointError, ConfigError
from harness.files import update_json, write_json
from harness.loop import Run
from harness.model.adapters import complete_card, is_adapted, merged
from harness.model.weights import is_sharded, save_model
from harness.model_card import CARD_FILE, write_model_card
from harness.tracking import rewrite
from harness.training.state import TRAINER_STATE_FILE, TrainState

MERGED_DIR = "merged"
PREDICTIONS_FILE = "predict_results.txt"  # the name in Transformers' example scripts


def save_final(session: Session, run: Run, state: TrainState, weights: Mapping[str, torch.Tensor]) -> None:
    """Rank zero: the model and the state that the training ended with."""
    model, output_dir, best = session.task.model, session.output_dir, run.best
    if run.checkpoints.is_shut_out:
        raise CheckpointError(
            f"Another process has taken over {output_dir}: this one ends, its model is not put there."
        )
    files = save_model(model, session.task.processing_class, output_dir, as_published=True, weights=weights)
    write_json(output_dir / TRAINER_STATE_FILE, state.trainer_state(early_stopping=best.early_stopping))
    write_model_card(output_dir, session.config, state, badge=run.tracker.badge)
    if is_adapted(model):
        complete_card(model, output_dir)
        files.append(output_dir / CARD_FILE)  # peft puts one into every folder of an adapter
    metadata: dict[str, float] | None = None
    if best.config.load_best_model_at_end and state.best_metric is not None:
        # The names are the Trainer's, the misspelt one too.
        metric = best.config.metric_for_best_model or "loss"
        metadata = {f"eval/{metric}": state.best_metric, "train/total_floss": state.total_flos}
    run.tracker.log_model(files, metadata=metadata)


def save_merged(session: Session) -> None:
    """Rank zero: the whole model with its adapter merged into it, as the last that is done with the model."""
    task = session.task
    save_model(merged(task.model), task.processing_class, session.output_dir / MERGED_DIR, as_published=True)


def conclude(session: Session, run: Run | None, state: TrainState, trained: dict[str, float]) -> list[tuple[str, str]]:
    """
    Collective: evaluate, predict and show what the model does, after a training or without one.

    Returns the rows of a short table on rank zero, none on the others; `trained` are the metrics of the training.
    """
    results = trained | evaluate_and_predict(session, run, state)
    sample = make_sample(session)
    if session.accelerator.is_main_process:
        update_json(session.output_dir / "all_results.json", results)
        if sample:
            session.console.line(f"sample: {sample}")
    rows = describe_end(session, run, state, results) if session.accelerator.is_main_process else []
    if run is not None and session.config.adapters.save_merged_model:
        run.checkpoints.together(lambda: save_merged(session) if run.checkpoints.is_writer else None)
    return rows


def evaluate_and_predict(session: Session, run: Run | None, state: TrainState) -> dict[str, float]:
    """Collective: what --do_eval and --do_predict ask for, after the training as in Transformers' example scripts."""
    asked = session.config.run
    if not (asked.do_eval or asked.do_predict):
        return {}
    accelerator, task = session.accelerator, session.task
    model = prepare_for_evaluation(session) if run is None else run.model
    if run is not None:
        run.optimizer.eval()
    if (dtype := weights_dtype(session.config)) is not None:
        if is_sharded(task.model):
            raise ConfigError(
                "--bf16_full_eval and --fp16_full_eval can't be used with ZeRO-3 or FSDP; leave them out."
            )
        model = model.to(dtype)
    results: dict[str, float] = {}
    sets = [*(eval_sets(session) if asked.do_eval else ())]
    if asked.do_predict:
        sets.append(eval_set(session, task.test_dataset, "test"))
    keeps = task.describe_predictions is not None
    for data in sets:
        outcome = session.evaluator.run(model, data, keep_predictions=keeps and data.prefix == "test")
        session.console.evaluation(outcome.metrics, step=state.global_step)
        row = {**outcome.metrics, "epoch": state.epoch, **outcome.extras}
        accelerator.log(rewrite(row), step=state.global_step)
        results |= outcome.metrics
        if outcome.predictions is not None and task.describe_predictions and accelerator.is_main_process:
            lines = task.describe_predictions(outcome.predictions)
            (session.output_dir / PREDICTIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return results


def make_sample(session: Session) -> str:
    """Collective: a text from the trained model, on rank zero alone unless it takes all; "" if its task makes none."""
    task = session.task
    if task.sample is None or not session.config.run.trains:
        return ""
    takes_part = session.accelerator.is_main_process or is_sharded(task.model)
    return task.sample(task.model.eval()) if takes_part else ""


def describe_end(
    session: Session, run: Run | None, state: TrainState, results: dict[str, float]
) -> list[tuple[str, str]]:
    """Rank zero: what came out and where it is, as rows of a short table."""
    rows = []
    if state.best_metric is not None:
        best = f"{state.best_metric:.4f} at step {state.best_global_step or 'unknown'}"
        rows.append((f"best {session.config.best_metric}", best))
    if losses := [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]:
        rows.append(("last eval_loss", f"{losses[-1]:.4f} (first: {losses[0]:.4f})"))
    if "train_samples_per_second" in results:
        rate, seconds = results["train_samples_per_second"], results["train_runtime"]
        rows.append(("speed", f"{rate:.1f} samples/s, {seconds:.1f} s in all"))
    if run is not None:
        rows.append(("model", str(session.output_dir)))
        if session.config.adapters.save_merged_model:
            rows.append(("merged model", f"{session.output_dir}/{MERGED_DIR}"))
        if session.config.plan.save_strategy != "no":
            rows.append(("checkpoints", f"{session.output_dir}/checkpoint-*"))
            rows.append(("", run.checkpoints.describe()))
    if session.config.run.do_predict and session.task.describe_predictions is not None:
        rows.append(("predictions", f"{session.output_dir}/{PREDICTIONS_FILE}"))
    return rows
