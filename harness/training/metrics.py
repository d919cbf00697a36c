"""The values of a training report: the loss of the window, the work done, the run's rates. Names are the Trainer's."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers.trainer_utils import speed_metrics

from harness.distributed.sharding import num_parameters
from harness.distributed.transfer import gather_numbers, to_device
from harness.errors import ConfigError, NonFiniteError
from harness.training.flags import MetricsConfig, StoppingConfig
from harness.training.state import TrainState
from harness.training.weighing import Repeated, num_tokens

logger = logging.getLogger(__name__)

STEPS_OF_A_WORD = 32
REMEDIES = (
    "lower --learning_rate or let it rise more slowly (--warmup_steps), try --bf16 instead of --fp16, look at the data "
    "there; --debug underflow_overflow names the module where it begins"
)


class Window:
    """
    The losses since the last report: a float32 sum on the device that is only read at a report.

    Mirrors the Trainer's `_tr_loss` and its filter: a loss that is not finite counts as the sum so far divided by 1 +
    the steps since the report. The number of such losses is kept too, and of `logged_outputs`, names of scalars among
    the model's outputs, the sums over this rank's parts of the global batches, weighted as the loss is.
    """

    def __init__(self, accelerator: Accelerator, config: MetricsConfig, logged_outputs: tuple[str, ...] = ()) -> None:
        self.accelerator = accelerator
        self.filters = config.logging_nan_inf_filter
        self.outputs = {name: torch.zeros((), device=accelerator.device) for name in logged_outputs}
        # The sum of the losses, and the number of those that are not finite.
        self.sums = torch.zeros(2, device=accelerator.device)
        self._before, self._outputs_before = self.sums, dict(self.outputs)  # those before the step under way
        self.grad_norm: torch.Tensor | float = 0.0
        self.learning_rate = 0.0

    def add(self, loss: torch.Tensor, *, steps_since_report: int) -> None:
        """Add the loss of a micro-batch, a scalar on the device, without a host sync."""
        finite = torch.isfinite(loss)
        if self.filters:
            loss = torch.where(finite, loss, self.sums[0] / (1 + steps_since_report))
        # Not in place: the sums of each step are looked at later, by NonFinite.
        self.sums = self.sums + torch.stack([loss.float(), (~finite).float()])

    def add_outputs(self, outputs: Any, *, part: torch.Tensor | float) -> None:
        """
        Add the logged outputs of a micro-batch, which is this part of the global batch, without a host sync.

        Raises ConfigError for a name that is not among the outputs, or is no scalar.
        """
        for name, total in self.outputs.items():
            value = _scalar(outputs, name) * part
            if isinstance(part, torch.Tensor):
                value = torch.where(part > 0, value, 0.0)  # without a target it may be no number
            if isinstance(part, torch.Tensor) or part > 0:
                self.outputs[name] = total + value  # not in place, as above

    def end_step(self, norm: torch.Tensor | float, *, learning_rate: float, nonfinite: NonFinite) -> None:
        """Note a step's norm of the gradients and learning rate, and for later whether it was finite: no host sync."""
        self.grad_norm, self.learning_rate = norm, learning_rate
        nonfinite.add(norm, sums=(self._before, self.sums))
        self._before, self._outputs_before = self.sums, dict(self.outputs)

    def restart_step(self) -> None:
        """Forget what the micro-batches of the step under way have added: it is made again."""
        self.sums, self.outputs = self._before, dict(self._outputs_before)

    def values(self) -> dict[str, torch.Tensor | float]:
        """Return this rank's numbers, for a report to gather: no host sync."""
        losses = {"loss": self.sums[0], "nonfinite_losses": self.sums[1], "grad_norm": self.grad_norm}
        return {**losses, **{f"outputs/{name}": total for name, total in self.outputs.items()}}

    def mean_outputs(self, of_ranks: Sequence[Mapping[str, float]], *, num_steps: int) -> dict[str, float]:
        """Return the means of the logged outputs over the global batches of `num_steps`, of all ranks' `values`."""
        return {name: sum(each[f"outputs/{name}"] for each in of_ranks) / num_steps for name in self.outputs}

    def drain(self, of_ranks: Sequence[Mapping[str, float]]) -> tuple[float, int]:
        """
        Return the mean over the ranks of the summed losses, in float32, and how many losses were not finite.

        `of_ranks` are the `values` of all ranks. The next window begins.
        """
        loss = torch.tensor([values["loss"] for values in of_ranks], dtype=torch.float32, device="cpu").mean()
        self.grad_norm = of_ranks[self.accelerator.process_index]["grad_norm"]
        self.sums = self._before = torch.zeros_like(self.sums)
        self.outputs = {name: torch.zeros_like(total) for name, total in self.outputs.items()}
        self._outputs_before = dict(self.outputs)
        return loss.item(), int(sum(values["nonfinite_losses"] for values in of_ranks))

    def undrained(self) -> float:
        """Return what this rank alone has summed up since the last report."""
        return self.sums[0].item()

    def last_step(self) -> dict[str, float]:
        """Return the norm of the gradients before clipping and the learning rate of the last step."""
        norm = self.grad_norm
        return {
            "grad_norm": norm.item() if isinstance(norm, torch.Tensor) else norm,
            "learning_rate": self.learning_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of what no report has shown yet."""
        outputs = {name: total.cpu().clone() for name, total in self.outputs.items()}
        return {"sums": self.sums.cpu().clone(), **self.last_step(), **({"outputs": outputs} if outputs else {})}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; a logged output that it lacks begins at zero."""
        self.sums = self._before = torch.zeros_like(self.sums).copy_(saved["sums"])
        for name, total in self.outputs.items():
            total.copy_(torch.as_tensor(saved.get("outputs", {}).get(name, 0.0)))
        self.grad_norm, self.learning_rate = saved["grad_norm"], saved["learning_rate"]

    def load_state_dicts(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """
        Load the windows of all ranks of a run with another number of ranks: the next report has the values of theirs.

        Each rank gets the mean of their losses. Losses that were not finite are counted on rank zero only, and so are
        the logged outputs, of which a report takes the sum.
        """
        sums = torch.stack([state["sums"] for state in saved])
        num_nonfinite = sums[:, 1].sum() if self.accelerator.is_main_process else torch.zeros(())
        whole: dict[str, Any] = {"sums": torch.stack([sums[:, 0].mean(), num_nonfinite])}
        if self.outputs and self.accelerator.is_main_process:
            parts = [state.get("outputs", {}) for state in saved]
            whole["outputs"] = {name: sum(part.get(name, 0.0) for part in parts) for name in self.outputs}
        self.load_state_dict({**saved[0], "outputs": {}, **whole})


def _scalar(outputs: Any, name: str) -> torch.Tensor:
    """Return an output in float32, off the graph. Raises ConfigError."""
    start = f"The task's logged_outputs name {name}, and the model's outputs"
    if not isinstance(outputs, Mapping):
        raise ConfigError(f"{start} are no mapping but a {type(outputs).__name__}: they have no names.")
    value = outputs.get(name)
    if value is None:
        raise ConfigError(
            f"{start} have it not, only: {', '.join(key for key in outputs if outputs[key] is not None)}."
        )
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        what = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ConfigError(f"{start} have it as {what}: it takes a tensor without dimensions.")
    return value.detach().float()


class NonFinite:
    """
    Finds the optimizer steps whose loss or gradients are not finite: a bit a step, which stays on the device.

    While fp16's loss scaler looks for its scale gradients overflow, and it skips the step. That counts only where the
    scale has come below 1: then it is not the scale that is too large.
    """

    def __init__(self, accelerator: Accelerator, config: StoppingConfig, *, scales_loss: bool) -> None:
        self.accelerator, self.limit, self.scales_loss = accelerator, config.stop_on_nonfinite, scales_loss
        # The steps since the last look in words of bits, and of the latest the values that the bits are made of.
        self._words: list[torch.Tensor] = []
        self._sums: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._norms: list[torch.Tensor] = []
        self._num_steps = self._most_in_a_row = 0
        self._has_warned = False

    def add(self, norm: torch.Tensor | float, *, sums: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Note a step by the norm of its gradients and a window's sums before and after it: no host sync."""
        self._sums.append(sums)
        if isinstance(norm, torch.Tensor):  # DeepSpeed does not always know it
            self._norms.append(norm)
        self._num_steps += 1
        if len(self._sums) == STEPS_OF_A_WORD:
            self._pack()

    def _pack(self) -> None:
        before, after = (torch.stack(each)[:, 1] for each in zip(*self._sums, strict=True))
        found = after > before
        if len(self._norms) == len(found):
            found = found | to_device(self._are_unsound(torch.stack(self._norms)), found.device)
        self._words.append((found.long() << torch.arange(len(found), device=found.device)).sum())
        self._sums, self._norms = [], []

    def _are_unsound(self, norms: torch.Tensor) -> torch.Tensor:
        found = ~torch.isfinite(norms)
        if not self.scales_loss:
            return found
        if (scaler := self.accelerator.scaler) is None:  # DeepSpeed's, which raises at the end of its scale
            return torch.zeros_like(found)
        scale: torch.Tensor = scaler.scale(torch.ones((), device=norms.device))
        return found & (scale < 1)

    def values(self) -> dict[str, torch.Tensor | float]:
        """Return this rank's bits, for a report to gather: no host sync."""
        if self._sums:
            self._pack()
        return {f"nonfinite_steps/{i}": word for i, word in enumerate(self._words)}

    def add_to(self, state: TrainState, of_ranks: Sequence[Mapping[str, float]]) -> None:
        """
        Add the steps since the last look, the `values` of all ranks, to the state; rank zero warns of the first.

        A step counts if it does on any rank. They begin anew.
        """
        state.num_nonfinite_losses += int(sum(values.get("nonfinite_losses", 0) for values in of_ranks))
        for i in range(self._num_steps):
            word, bit = divmod(i, STEPS_OF_A_WORD)
            if not any(int(values[f"nonfinite_steps/{word}"]) >> bit & 1 for values in of_ranks):
                state.nonfinite_steps_in_a_row = 0
                continue
            state.num_nonfinite_steps += 1
            state.nonfinite_steps_in_a_row += 1
            self._most_in_a_row = max(self._most_in_a_row, state.nonfinite_steps_in_a_row)
            self._tell(state, step=state.global_step - self._num_steps + 1 + i)
        self._words, self._num_steps = [], 0

    def _tell(self, state: TrainState, *, step: int) -> None:
        state.first_nonfinite_step = state.first_nonfinite_step or step
        if not self._has_warned and self.accelerator.is_main_process:
            ends = "" if self.limit else ", --stop_on_nonfinite 10 ends such a training"
            logger.warning("The loss or the gradients of step %d are not finite: %s%s.", step, REMEDIES, ends)
        self._has_warned = True

    def settle(self, state: TrainState) -> None:
        """
        Collective: add the steps since the last look to the state; a host sync, if there are any.

        Raises NonFiniteError as `check` does.
        """
        if self._num_steps:
            self.add_to(state, gather_numbers(self.accelerator, self.values()))
        self.check(state)

    def may_save(self, state: TrainState) -> bool:
        """
        Collective: whether to save: with --stop_on_nonfinite not after a step that is not finite, which rank zero says.

        Raises NonFiniteError as `check` does. A host sync, if the flag is given.
        """
        if not self.limit:
            return True
        self.settle(state)
        if state.nonfinite_steps_in_a_row and self.accelerator.is_main_process:
            logger.warning("checkpoint-%d is not written: its last step is not finite.", state.global_step)
        return not state.nonfinite_steps_in_a_row

    def check(self, state: TrainState) -> None:
        """Raise NonFiniteError, the same on all ranks, if as many steps in a row as the flag says were not finite."""
        if 0 < self.limit <= self._most_in_a_row:
            raise stopped_at(state, num_steps=self._most_in_a_row)

    def check_last(self, state: TrainState) -> None:
        """
        Collective: with --stop_on_nonfinite, raise NonFiniteError if the last step is not finite.

        For a stop ahead of its time: what it would save is of no use.
        """
        if self.limit:
            self.settle(state)
        if self.limit and state.nonfinite_steps_in_a_row:
            raise stopped_at(state, num_steps=state.nonfinite_steps_in_a_row)


def stopped_at(state: TrainState, *, num_steps: int) -> NonFiniteError:
    """Return the error that ends a training of which so many steps in a row were not finite."""
    steps = "the last step" if num_steps == 1 else f"{num_steps} steps in a row"
    return NonFiniteError(
        f"Stopped at step {state.global_step} of {state.max_steps}: the loss or the gradients of {steps} are not "
        f"finite; the first such step was {state.first_nonfinite_step}. Checkpoints of before are kept, and go on with "
        f"--resume_from_checkpoint true. What may help: {REMEDIES}."
    )


class Work:
    """
    Operations and tokens of this rank since they were last added to the run's state.

    Mirrors Trainer.floating_point_ops (6 x elements of the main input x parameters without embeddings) and
    Trainer._track_num_input_tokens, without its host sync at every micro-batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: MetricsConfig,
        accelerator: Accelerator,
        *,
        pad_token_id: int | None,
        packs: bool = False,
    ) -> None:
        self.accelerator, self.pad_token_id, self.packs = accelerator, pad_token_id, packs
        self.counts = config.include_num_input_tokens_seen
        self.input_name: str = getattr(model, "main_input_name", "input_ids")
        self.flos_per_element = 6 * (num_parameters(model, exclude_embeddings=True) or 0)
        self.flos = 0.0
        self.tokens = torch.zeros((), dtype=torch.int64, device=accelerator.device)

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a micro-batch. Raises ConfigError if its tokens are to be counted and can't be."""
        if isinstance(batch, Repeated):
            return
        main_input = batch.get(self.input_name)
        if main_input is not None:
            self.flos += self.flos_per_element * main_input.numel()
        if self.counts == "no":
            return
        if main_input is None:
            raise ConfigError(f"--include_num_input_tokens_seen: a batch has no {self.input_name}; leave it out.")
        if self.counts == "non_padding" and self.packs:
            self.tokens += num_tokens(batch)
        elif self.counts == "non_padding" and "attention_mask" in batch:
            self.tokens += batch["attention_mask"].sum()
        elif self.counts == "non_padding" and self.pad_token_id is not None:
            self.tokens += (main_input != self.pad_token_id).sum()
        else:
            self.tokens += main_input.numel()

    def values(self) -> dict[str, torch.Tensor | float]:
        """Return this rank's counts, for a report to gather: no host sync."""
        return {"flos": self.flos} | ({} if self.counts == "no" else {"tokens_seen": self.tokens})

    def add_to(self, state: TrainState, of_ranks: Sequence[Mapping[str, float]]) -> None:
        """Add the counts of all ranks, the `values` of each, to the state; they begin anew."""
        done = [values["flos"] for values in of_ranks]
        if len(done) > 1:  # float32 among ranks, as the Trainer has it
            done = [torch.tensor(done, dtype=torch.float32, device="cpu").sum().item()]
        state.total_flos += done[0]
        self.flos = 0.0
        if self.counts != "no":
            self._add_tokens(state, of_ranks)

    def _add_tokens(self, state: TrainState, of_ranks: Sequence[Mapping[str, float]]) -> None:
        state.num_input_tokens_seen += int(sum(values["tokens_seen"] for values in of_ranks))
        self.tokens.zero_()

    def settle(self, state: TrainState) -> None:
        """Collective: add the counts of all ranks to the state; a host sync."""
        self.add_to(state, gather_numbers(self.accelerator, self.values()))

    def settle_tokens(self, state: TrainState) -> None:
        """Collective: add the tokens of all ranks to the state; a host sync, if they are counted."""
        if self.counts != "no":
            self._add_tokens(state, gather_numbers(self.accelerator, {"tokens_seen": self.tokens}))


class Clock:
    """Measures seconds, samples and tokens of this process since its start."""

    def __init__(self, state: TrainState) -> None:
        self.begin(state)

    def begin(self, state: TrainState) -> None:
        """Start right before the first step, from the counters that a checkpoint has put into the state."""
        self.started_at = time.time()
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen

    def rates(self, **work: float) -> dict[str, float]:
        """Return the Trainer's `train_runtime` and the rates per second: num_samples, num_steps, num_tokens."""
        rates: dict[str, float] = speed_metrics("train", self.started_at, **work)
        return rates
