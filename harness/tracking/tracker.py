"""The W&B run behind Accelerate's tracker interface. Rank zero's, silent elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker

from harness.config import plain
from harness.distributed.accelerator import choose_backend
from harness.masking import masked
from harness.tracking.flags import TrackingConfig
from harness.tracking.media.graph import log_graph
from harness.tracking.media.histograms import Selection, Watch
from harness.tracking.recorded import model_config, num_parameters
from harness.tracking.rows.journal import JOURNAL_FILE, SUMMARY_ONLY, decoded, rewrite
from harness.tracking.rows.local import LocalRows
from harness.tracking.run.attempts import Attempts
from harness.tracking.run.close import summary_numbers
from harness.tracking.run.live import LiveRun


class WandbTracker(GeneralTracker):  # type: ignore[misc]
    """
    A W&B run behind Accelerate's interface, with the Trainer's rows, artifacts and histograms. It never prompts.

    - config: all that the --wandb_* flags say; default: the WANDB_* variables. run_name, log_model and watch are the
      commonest of them.
    - output_dir: the folder of the checkpoints, where an earlier attempt may have left uploads; default: where
      wandb keeps its files.
    - attempts: what makes one run, with each row once, of all attempts at a training that resumes; its caller saves and
      loads the tracker's state. Without it each start is a run, as WANDB_RUN_ID and WANDB_RESUME say.
    - local: where the rows go without W&B, which is then left alone.
    - init_kwargs: anything else that `wandb.init` takes: project, id, resume, group, dir ...

    A run that is already open is adopted as it is and left open at the end. Without credentials, or when the
    server can't be reached, the run is offline: W&B doesn't stop a training. All ranks hold the object; on ranks
    other than the main one nothing reaches W&B.
    """

    name = "wandb"
    requires_logging_directory = False
    main_process_only = True

    def __init__(
        self,
        config: TrackingConfig | None = None,
        *,
        run_name: str | None = None,
        log_model: str | None = None,
        watch: str | None = None,
        output_dir: str | Path | None = None,
        attempts: Attempts | None = None,
        local: LocalRows | None = None,
        **init_kwargs: Any,
    ) -> None:
        super().__init__()
        given = {"run_name": run_name, "wandb_log_model": log_model, "wandb_watch": watch}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.config = TrackingConfig.from_environment(**changes) if config is None else replace(config, **changes)
        self._stop = threading.Event()
        self._attempts, self._local = attempts, local
        self._live = LiveRun(
            self.config,
            {**self.config.init_kwargs(), **init_kwargs},
            output_dir=None if output_dir is None else Path(output_dir),
            attempts=attempts,
            stop=lambda: self._stop.set(),  # a function, not the event's method: wandb copies its settings deeply
        )
        self._watch: Watch | None = None
        self._attached: dict[str, Any] = {}
        self._num_parameters: int | None = None
        self._architecture = ""
        self._report: list[str] = []

    @property
    def tracker(self) -> Any:
        """The wandb run; None before the start, after the end, on other ranks, under WANDB_DISABLED=true."""
        return self._live.run

    @property
    def run_id(self) -> str | None:
        """The run's id; None where `tracker` is."""
        return None if self._live.run is None else str(self._live.run.id)

    @property
    def run_url(self) -> str | None:
        """The run's address; None offline, and where `tracker` is."""
        run = self._live.run
        return None if run is None or run.offline or run.disabled else str(run.url)

    @property
    def stop_requested(self) -> bool:
        """Whether somebody has pressed Stop in the W&B app. Of use on the main rank only."""
        return self._stop.is_set()

    @property
    def badge(self) -> str | None:
        """A line of Markdown for the model card, which leads to the run; None offline. The Trainer's."""
        run = self._live.run
        if run is None or run.offline or run.disabled:
            return None
        image = "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg"
        return f'[<img src="{image}" alt="Visualize in Weights & Biases" width="200" height="32"/>]({run.url})'

    def start(self) -> None:
        """Take over the run that is open, or open one. Raises ConfigError for settings that wandb refuses."""
        if self._live.run is not None or not PartialState().is_main_process:
            return
        if self._local is not None:
            self._local.open()
        if self._local is not None or not self.config.uses_wandb:
            return
        self._live.open()
        self._live.set_up(_define_metrics)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Add `values` to the run's configuration, secrets masked."""
        self._live.set_up(lambda run: run.config.update(masked(values), allow_val_change=True))

    def watch(self, model: torch.nn.Module, accelerator: Accelerator | None = None, *, log_freq: int = 100) -> None:
        """
        Collective: take the prepared model, as `wandb.watch` does, and record what it is made of.

        Histograms of what --wandb_watch says are then due every `log_freq` optimizer steps (the Trainer:
        max(100, logging_steps)); with --wandb_log_model the architecture is the first artifact.
        """
        unwrapped = model if accelerator is None else accelerator.unwrap_model(model, keep_torch_compile=False)
        if self.config.uses_wandb and self.config.wandb_watch != "false":
            self._watch = Watch(
                unwrapped,
                log=self.config.wandb_watch,
                log_freq=log_freq,
                selection=Selection(
                    max_tensors=self.config.wandb_watch_max_tensors, patterns=self.config.wandb_watch_patterns or ()
                ),
                is_main=PartialState().is_main_process,
                gradient_of=None if accelerator is None else choose_backend(accelerator).gradient_function(),
            )
            self._live.set_up(lambda run: log_graph(run, unwrapped))
        self._num_parameters, self._architecture = num_parameters(unwrapped), str(unwrapped)
        if self._live.artifacts is not None:
            configuration = model_config(unwrapped)
            metadata = {
                "model_config": None if configuration is None else plain(configuration),
                "num_parameters": self._num_parameters,
                "initial_model": True,
            }
            self._live.artifacts.log_architecture(f"{self._architecture}\n", metadata=metadata)

    def observe(self, step: int, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """
        Collective: histograms for the optimizer step that is being made, if they are due; the next row takes them.

        Call it after the last backward, before clipping. `scaler` is the one of fp16, whose scale is taken out.
        """
        if self._watch is not None and self._watch.is_due(step):
            grad_scale = 1.0 if scaler is None else float(scaler.get_scale())
            observed = self._watch.observe(grad_scale=grad_scale)
            self._attached |= {name: {"_type": "histogram", **asdict(found)} for name, found in observed.items()}

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Send one row under the Trainer's names. `step` is the optimizer step; wandb's own counts rows."""
        summary = {name: value for name, value in values.items() if name in SUMMARY_ONLY}
        row = rewrite({name: value for name, value in values.items() if name not in SUMMARY_ONLY})
        if step is not None:
            row["train/global_step"] = step
        self._send(summary, row, kwargs)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Put values into the run's summary, under the names they have, without a row."""
        self._live.set_up(lambda run: run.summary.update(dict(values)))

    def log_media(self, values: Mapping[str, Any], *, step: int) -> None:
        """Send tables, charts or values of the user's own in a row, under the names they have."""
        if values:
            self._send({}, {**values, "train/global_step": step}, {})

    def checkpoint_logger(self, *, step: int, epoch: float = 0.0, is_best: bool = False) -> Callable[[Path], None]:
        """Return what takes a checkpoint's folder once it is written: `log_checkpoint` with the numbers of now."""
        metadata = self._numbers() if self._live.artifacts is not None else {}

        def log(folder: Path) -> None:
            if self._live.artifacts is not None:
                self._live.artifacts.log_checkpoint(folder, step=step, epoch=epoch, is_best=is_best, metadata=metadata)

        return log

    def log_checkpoint(self, folder: str | Path, *, step: int, epoch: float = 0.0, is_best: bool = False) -> None:
        """
        With --wandb_log_model checkpoint: hand a checkpoint's folder over to be uploaded in the background.

        It may be deleted as soon as this returns, which takes milliseconds.
        """
        self.checkpoint_logger(step=step, epoch=epoch, is_best=is_best)(Path(folder))

    def log_model(self, files: Sequence[Path], *, metadata: Mapping[str, float] | None = None) -> None:
        """With --wandb_log_model: hand the files of the final model over; `metadata` replaces the summary's numbers."""
        if self._live.artifacts is not None:
            numbers_: dict[str, Any] = self._numbers(with_parameters=False) if metadata is None else dict(metadata)
            if metadata is not None:
                numbers_["model/num_parameters"] = self._num_parameters or 0
            self._live.artifacts.log_model(
                files, architecture=f"{self._architecture}\n", metadata={**numbers_, "final_model": True}
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in JSON types: number of rows, the run, histograms that wait for a row."""
        if self._local is not None:
            return self._local.state_dict()
        if self._live.history is None or self._attempts is None or self._attempts.identity is None:
            return {}
        self._live.history.sync()
        run = self._attempts.identity.of_checkpoint()
        return {"rows": self._live.history.rows, "run": run, "attached": self._attached}

    def files_of_checkpoint(self) -> dict[str, Callable[[Path], None]]:
        """Return the files that a checkpoint keeps: by name the function that writes each, in any thread."""
        if self._local is not None:
            return self._local.files_of_checkpoint()
        return {} if self._live.history is None else {JOURNAL_FILE: self._live.history.copier()}

    def load_state_dict(self, saved: Mapping[str, Any], folder: Path, *, changes: str = "") -> None:
        """
        Go on with the rows and the run of the checkpoint in `folder`. Call it before `start`.

        `changes` says why the numbers differ from there on, or is "". A run that has rows beyond the checkpoint can't
        go on then.
        """
        if self._local is not None:
            self._local.load_state_dict(saved, folder)
        if self._attempts is not None:
            self._attempts.load_state_dict(saved, folder, changes=changes)
            self._attached = dict(saved.get("attached", {}))

    def mark_preempting(self) -> None:
        """Tell W&B at once that the run will be preempted. `finish` then takes seconds, whatever the network does."""
        self._live.mark_preempting()

    def finish(self, exit_code: int = 0) -> None:
        """
        End the run if it was made here: an adopted one is its owner's. A second call does nothing.

        In a notebook a run that did not fail stays open until `wandb.finish()`, as under the Trainer; with `attempts`
        the next training ends it.
        """
        if self._local is not None:
            self._local.close()
        self._report = self._live.close(exit_code) or self._report

    def abandon(self) -> None:
        """Leave the run open for the next attempt, and wait for nothing; an adopted run stays its owner's."""
        self._live.abandon()

    def describe(self) -> str:
        """Say where the run is, also when it is over: its address, or its folder and how to upload it."""
        return self._live.where

    def report(self) -> list[str]:
        """Say after the end what the server has of the run, what it lacks, and the command that delivers the rest."""
        return self._report

    def _send(self, summary: dict[str, Any], row: dict[str, Any], kwargs: dict[str, Any]) -> None:
        row = {name: masked(value) if isinstance(value, str) else value for name, value in row.items()}
        if self._local is not None:
            self._local.log(row)
            return
        row, self._attached = {**decoded(self._attached), **row}, {}
        if summary:
            self._live.set_up(lambda run: run.summary.update(summary))
        self._live.log(row, kwargs)

    def _numbers(self, *, with_parameters: bool = True) -> dict[str, float | None]:
        found = self._live.deliver(summary_numbers) or {}
        if with_parameters and self._num_parameters is not None:
            found["model/num_parameters"] = self._num_parameters
        return dict(found)


def _define_metrics(run: Any) -> None:
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
