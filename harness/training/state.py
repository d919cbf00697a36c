"""State that must survive a restart, apart from tensors: plain JSON that contains the Trainer's trainer_state.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

TRAINER_STATE_FILE = "trainer_state.json"


@dataclass(kw_only=True)
class TrainState:
    """
    The counters and the history of a run; the fields are those of transformers.TrainerState that it needs.

    `epoch` is a fraction: 1.5 is the middle of the second epoch. `total_loss` is the sum of the losses of all reported
    steps since `loss_from_step`, from which `train_loss` is computed. `num_skipped_steps` counts the steps whose
    gradients overflowed in fp16; `global_step` includes them, as in the Trainer.

    Of steps whose loss or gradients are not finite: how many there were, the first of them, and how many have followed
    one another up to now. `num_nonfinite_losses` counts the losses of micro-batches, over all ranks.
    """

    epoch: float = 0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int = 8
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    early_stopping_patience_counter: int = 0
    last_logged_step: int = 0
    total_loss: float = 0.0
    loss_from_step: int = 0
    is_ended: bool = False
    num_skipped_steps: int = 0
    num_nonfinite_losses: int = 0
    num_nonfinite_steps: int = 0
    first_nonfinite_step: int = 0
    nonfinite_steps_in_a_row: int = 0
    should_stop: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Return the fields that `trainer_state.json` has no place for."""
        return {name: value for name in _OURS if (value := getattr(self, name)) or name not in _IF_ANY}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load what `state_dict` returned; unknown keys of a newer version are ignored."""
        for name in _OURS:
            if name in saved:
                setattr(self, name, saved[name])

    def trainer_state(self, *, early_stopping: dict[str, Any] | None) -> dict[str, Any]:
        """
        Return the content of `trainer_state.json` as transformers.TrainerState writes it, so that its readers work.

        `early_stopping` holds the arguments of EarlyStoppingCallback where early stopping is on.
        """
        # Between steps the Trainer's control flags are false; only the stop matters to a reader.
        control = dict.fromkeys(
            ("should_epoch_stop", "should_evaluate", "should_log", "should_save", "should_training_stop"),
            False,
        )
        is_last = self.should_stop or self.global_step >= self.max_steps
        control |= {"should_save": True, "should_training_stop": is_last}
        callbacks: dict[str, Any] = {}
        if early_stopping is not None:
            counter = {"early_stopping_patience_counter": self.early_stopping_patience_counter}
            callbacks["EarlyStoppingCallback"] = {"args": early_stopping, "attributes": counter}
        callbacks["TrainerControl"] = {"args": control, "attributes": {}}
        names = [each.name for each in fields(self) if each.name not in (*_OURS, "should_stop")]
        # Rows are never changed once they are in the history, so a shallow copy is enough.
        ours = {name: getattr(self, name) for name in names} | {"log_history": list(self.log_history)}
        return ours | {
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "stateful_callbacks": callbacks,
            "trial_name": None,
            "trial_params": None,
        }

    def load_trainer_state(self, path: Path) -> None:
        """Load the counters and the history from a `trainer_state.json`, ours or a Trainer's, that has been checked."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        for item in fields(self):
            if item.name in saved and item.name not in (*_OURS, *_OF_THE_PLAN):
                setattr(self, item.name, saved[item.name])
        stopping = (saved.get("stateful_callbacks") or {}).get("EarlyStoppingCallback", {})
        counter = (stopping[0] if isinstance(stopping, list) else stopping).get("attributes", {})
        self.early_stopping_patience_counter = counter.get("early_stopping_patience_counter", 0)
        # A Trainer saves neither the loss that it has not logged yet nor the sum of the logged ones.
        self.last_logged_step = self.loss_from_step = self.global_step


_OURS = (
    "early_stopping_patience_counter",
    "last_logged_step",
    "total_loss",
    "loss_from_step",
    "is_ended",
    "num_skipped_steps",
    "num_nonfinite_losses",
    "num_nonfinite_steps",
    "first_nonfinite_step",
    "nonfinite_steps_in_a_row",
)
_IF_ANY = _OURS[-4:]  # the checkpoint of a sound training has none of them
_OF_THE_PLAN = (
    "max_steps",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "train_batch_size",
)
