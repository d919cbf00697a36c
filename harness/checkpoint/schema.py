"""
What the small files of a checkpoint have to hold. Each is compared with it as it is read, before anything is used.

A folder may be torn, damaged, or made by somebody: a digest only says that a file is the one that was written.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.errors import ConfigError

NUM_WORDS = 624  # of the state of a Mersenne twister, Python's and numpy's
CUDA_STATES = (8, 16)  # bytes: the seed, and an offset behind it
MOST = 10**300  # what a float can be
MOST_SHOWN = 40  # letters of a value in a message


@dataclass(frozen=True)
class Kind:
    """A kind of value: what it is, in words, and the function that tells whether a value is one."""

    what: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.what} or {other.what}", lambda value: self.holds(value) or other.holds(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) or (is_whole and abs(value) < MOST)  # operations may be more than 64 bits count


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(Path(value).name) and "\0" not in value


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and COUNT.holds(row.get("step", 0)) and (FINITE | NOTHING).holds(row.get("epoch"))
        for row in value
    )


def _are_numbers(value: Any) -> bool:
    # A task's own optimizer may have its rates as tensors.
    return isinstance(value, list | tuple) and all(_is_number(each) or is_floats(each, ()) for each in value)


NOTHING = Kind("null", lambda value: value is None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number", _is_whole)
COUNT = Kind("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
POSITIVE = Kind("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
NUMBER = Kind("a number", _is_number)
FINITE = Kind("a number of at least 0", lambda value: _is_number(value) and math.isfinite(value) and value >= 0)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value))
LIST = Kind("a list", lambda value: isinstance(value, list))
NUMBERS = Kind("a list of numbers", _are_numbers)

TRAINER_STATE = {
    "global_step": COUNT,
    "epoch": FINITE | NOTHING,
    "log_history": Kind("a list of rows", _is_history),
    "best_metric": NUMBER | NOTHING,
    "best_global_step": COUNT | NOTHING,
    "best_model_checkpoint": Kind("a path", _is_path) | NOTHING,
    "num_input_tokens_seen": FINITE,
    "total_flos": FINITE,
    "stateful_callbacks": MAPPING | NOTHING,
}
OUR_STATE = {
    "early_stopping_patience_counter": COUNT,
    "last_logged_step": COUNT,
    "loss_from_step": COUNT,
    "num_skipped_steps": COUNT,
    "total_loss": NUMBER,
    "is_ended": FLAG,
}
MANIFEST = {
    "step": COUNT,
    "world_size": POSITIVE,
    "only_model": FLAG,
    "optim": TEXT,
    "zero_stage": Kind("0, 1, 2 or 3", lambda value: _is_whole(value) and 0 <= value <= 3),
    **dict.fromkeys(("state", "software", "arguments", "data", "tracking", "loss", "splitting"), MAPPING),
}
POSITION = {
    "epoch": COUNT,
    "batches": COUNT,
    "num_samples": COUNT | NOTHING,
    "num_processes": POSITIVE,
    "per_device_train_batch_size": POSITIVE,
    "gradient_accumulation_steps": POSITIVE,
    "train_sampling_strategy": TEXT,
    "dataloader_drop_last": FLAG,
    "dataloader_num_workers": COUNT | NOTHING,
    "seed": WHOLE,
    "data_digest": TEXT | NOTHING,
    "packing": TEXT | NOTHING,
    "max_tokens_per_batch": POSITIVE,
    "token_batches": POSITIVE,
    "token_batches_digest": TEXT,
}
NEEDED_OF_POSITION = tuple(POSITION)[:6]
TRACKING = {"rows": COUNT, "run": MAPPING | NOTHING, "attached": MAPPING, "shown": MAPPING}
SPLITTING = {"batch_size": POSITIVE, "most_rows": POSITIVE}
LOSS = {"sums": FLAG, "means": FLAG, "by": TEXT}
SCHEDULE = {"last_epoch": COUNT, "_step_count": COUNT, "base_lrs": NUMBERS, "_last_lr": NUMBERS}
# What a schedule goes on from, where it has it; other values are its arguments.
OF_A_SCHEDULE = (*SCHEDULE, "best", "num_bad_epochs", "cooldown_counter")
SCALER = {
    "scale": Kind("a number above 0", lambda value: FINITE.holds(value) and value > 0),
    **dict.fromkeys(("growth_factor", "backoff_factor"), FINITE),
    "growth_interval": POSITIVE,
    "_growth_tracker": COUNT,
}


def check(where: str, values: Any, fields: Mapping[str, Kind], *, needs: Collection[str] = ()) -> None:
    """Raise ConfigError unless the values are a mapping, with all that it `needs`, each that is there of its kind."""
    if not MAPPING.holds(values):
        raise ConfigError(f"{where} holds {_shown(values)} instead of a mapping")
    if missing := [name for name in needs if name not in values]:
        raise ConfigError(f"{where} has no {missing[0]}")
    for name, kind in fields.items():
        if name in values and not kind.holds(values[name]):
            raise ConfigError(f"{where}: {name} is {_shown(values[name])}, not {kind.what}")


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, int | float) else ascii(value) if isinstance(value, str) else None
    text = f"a {type(value).__name__}" if text is None else text
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def read_json(file: Path) -> Any:
    """Return the content of a JSON file. Raises ConfigError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name} can't be read: {type(error).__name__} {error}") from error


def check_counters(file: str, counters: Any) -> None:
    """Raise ConfigError unless it is the content of a trainer_state.json, ours or a Trainer's."""
    check(file, counters, TRAINER_STATE, needs=("global_step",))
    step = counters["global_step"]
    ahead = [row["step"] for row in counters.get("log_history", []) if row.get("step", 0) > step]
    if ahead or (counters.get("best_global_step") or 0) > step:
        raise ConfigError(f"{file}: it knows of steps behind its own, {step}")
    stopping = (counters.get("stateful_callbacks") or {}).get("EarlyStoppingCallback", {})
    for each in stopping if isinstance(stopping, list) else [stopping]:
        check(f"{file}: EarlyStoppingCallback", each, {"attributes": MAPPING})
        check(f"{file}: EarlyStoppingCallback", each.get("attributes", {}), OUR_STATE)


def check_manifest(file: str, manifest: Any, *, step: int) -> None:
    """Raise ConfigError unless it is the content of a harness_state.json of this step."""
    check(file, manifest, MANIFEST)
    if manifest.get("step", step) != step:
        raise ConfigError(f"{file} is of step {manifest['step']}, the counters are of step {step}")
    state = manifest.get("state", {})
    check(f"{file}: state", state, OUR_STATE)
    for name in ("last_logged_step", "loss_from_step", "num_skipped_steps"):
        if state.get(name, 0) > step:
            raise ConfigError(f"{file}: {name} is {state[name]}, at step {step}")
    if manifest.get("data"):
        check(f"{file}: data", manifest["data"], POSITION, needs=NEEDED_OF_POSITION)
    check(f"{file}: tracking", manifest.get("tracking", {}), TRACKING)
    if loss := manifest.get("loss", {}):
        check(f"{file}: loss", loss, LOSS, needs=LOSS)
    if splitting := manifest.get("splitting", {}):
        check(f"{file}: splitting", splitting, SPLITTING, needs=SPLITTING)
    check(f"{file}: arguments", manifest.get("arguments", {}), {"total_steps": COUNT})


def check_ours(manifest: Mapping[str, Any], states: Collection[Any]) -> None:
    """Raise ConfigError if a checkpoint of ours lacks something that every one of them has."""
    check("the manifest", manifest, {}, needs=("step", "world_size", "data", "state"))
    check("the manifest: state", manifest["state"], {}, needs=OUR_STATE.keys() - {"num_skipped_steps"})
    if None in states:
        raise ConfigError("the state of the random generators is missing")
    for state in states:
        check("the state of a rank", state.get("harness", {}), {}, needs=("data", "window"))
        check("the state of a rank", state["harness"]["data"], {}, needs=("epoch_start", "ahead"))


def check_schedule(file: str, state: Any) -> None:
    """Raise ConfigError unless it is the state of a schedule."""
    check(file, state, SCHEDULE, needs=("last_epoch",))


def check_scaler(file: str, state: Any) -> None:
    """Raise ConfigError unless it is the state of a loss scaler; one that is off saves an empty one."""
    check(file, state, SCALER, needs=SCALER if state else ())


def check_rank_state(file: str, state: Any) -> None:
    """Raise ConfigError unless it is what a rank has saved of its own: generators, and our values beside them."""
    check_generators(file, state)
    _check_states(file, state.get("cuda"), is_cuda=True)
    check(file, state, {"harness": MAPPING})
    ours = state.get("harness", {})
    check(f"{file}: harness", ours, dict.fromkeys(("data", "own", "window"), MAPPING))
    for kind, own in ours.get("own", {}).items():
        _check_states(file, own, is_cuda=kind == "cuda")
    data = ours.get("data", {})
    for name in ("epoch_start", "ahead"):
        if data.get(name) is not None:
            check_generators(f"{file}: {name}", data[name])
    if data.get("stream") is not None:
        _check_stream(f"{file}: stream", data["stream"])
    if "window" in ours:
        _check_window(f"{file}: window", ours["window"])


def check_generators(where: str, state: Any) -> None:
    """Raise ConfigError unless the states of the host's generators are such that each takes its own."""
    check(where, state, {}, needs=("python", "numpy", "cpu"))
    try:
        random.Random().setstate(state["python"])
        name, words, position, *normal = state["numpy"]
        is_whole = isinstance(words, np.ndarray) and words.dtype == np.uint32 and words.shape == (NUM_WORDS,)
        # Numpy itself believes the position, and would read behind the words.
        if not (is_whole and _is_whole(position) and 0 <= position <= NUM_WORDS):
            raise ValueError("numpy's state is no state of a Mersenne twister")
        np.random.RandomState().set_state((name, words, position, *normal))
        _check_bytes(state["cpu"])
        torch.Generator().set_state(state["cpu"])
    except (ValueError, TypeError, RuntimeError, OverflowError, IndexError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{where} holds no state of the random generators: {reason}") from error


def _check_states(where: str, states: Any, *, is_cuda: bool) -> None:
    """Check the state of a device, or the list of those of all."""
    try:
        for state in states if isinstance(states, list) else [] if states is None else [states]:
            _check_bytes(state)
            if is_cuda and (len(state) not in CUDA_STATES or int.from_bytes(bytes(state[8:].tolist()), "little") % 4):
                raise ValueError(f"it takes {CUDA_STATES[1]} bytes")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where} holds no state of a device's random generator: {error}") from error


def _check_bytes(state: Any) -> None:
    is_plain = type(state) is torch.Tensor and state.layout == torch.strided and state.device.type == "cpu"
    if not is_plain or state.dtype != torch.uint8 or state.dim() != 1 or not state.is_contiguous():
        raise ValueError("a state is a row of bytes")


def _check_window(where: str, window: Any) -> None:
    check(where, window, {"grad_norm": NUMBER, "learning_rate": NUMBER, "outputs": MAPPING}, needs=("sums",))
    check(where, window, {}, needs=("grad_norm", "learning_rate"))
    if not is_floats(window["sums"], (2,)):
        raise ConfigError(f"{where}: sums are not two numbers")
    for name, value in window.get("outputs", {}).items():
        if not (_is_number(value) or is_floats(value, ())):
            raise ConfigError(f"{where}: {name} is no number")


def is_floats(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is a plain tensor on the CPU, of floating-point numbers and of this shape."""
    is_plain = type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
    return is_plain and tuple(value.shape) == shape and value.is_floating_point()


def _check_stream(where: str, stream: Any) -> None:
    check(where, stream, {"workers": LIST, "next_worker": COUNT}, needs=("workers", "next_worker"))
    marks = stream["workers"]
    for mark in marks:
        if mark is not None:
            check(where, mark, {"batches": COUNT, "state": MAPPING | NOTHING}, needs=("batches", "state"))
    if not marks or stream["next_worker"] >= len(marks):
        raise ConfigError(f"{where}: next_worker is {stream['next_worker']}, of {len(marks)}")
