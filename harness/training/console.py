"""What a person sees: the log's levels, a progress bar or plain lines, the table at the end."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from harness.training.flags import ConsoleConfig

TIMING_SUFFIXES = ("_runtime", "_samples_per_second", "_steps_per_second")
# Known to the caller's rate, or too long for a line; they are in the tracker and in the history.
NOT_IN_A_LINE = ("num_input_tokens_seen", "train_tokens_per_second", "total_flos")


def set_up_logging(config: ConsoleConfig, *, is_main: bool, is_local_main: bool) -> None:
    """Set the levels of our log and of the libraries', as the Trainer's example scripts do. Once or again."""
    speaks = is_local_main if config.log_on_each_node else is_main
    level = config.log_level if speaks else config.log_level_replica
    ours = logging.getLogger("harness")
    for handler in list(ours.handlers):
        ours.removeHandler(handler)
    ours.addHandler(_make_handler())
    ours.propagate = False
    if level == "passive":
        ours.setLevel(logging.INFO if speaks else logging.WARNING)
    else:
        ours.setLevel(level.upper())
    shows_progress = speaks and config.shows_progress
    _set_up_libraries(None if level == "passive" else ours.level, shows_progress=shows_progress)


class Console:
    """
    Progress and results, for a person: a bar where stderr is a terminal, one line a report elsewhere.

    Lines go to standard output. Not enabled (on other ranks) it is silent.
    """

    def __init__(self, enabled: bool, progress: bool) -> None:
        self._enabled = enabled
        self._progress = progress
        self._bar: _Bar | None = None
        self._unit = "step"
        self._is_paused = False
        self._total_steps: int | None = None
        self._initial_step = self._step = 0
        self._started_at = time.monotonic()

    def start(self, total_steps: int, initial_step: int, unit: str = "step") -> None:
        """Begin at `initial_step` of `total_steps`; `unit` names what is counted."""
        self.close()
        self._unit, self._total_steps = unit, total_steps
        self._initial_step = self._step = initial_step
        self._started_at = time.monotonic()
        if self._enabled and self._progress and _is_on_terminal():
            self._bar = _Bar(self, total_steps, initial_step, unit)

    def advance(self, global_step: int) -> None:
        """Note that this step is done. Called at every step."""
        self._step = global_step
        if self._bar is not None and not self._is_paused:
            self._bar.update(global_step - self._bar.n)

    def report(self, logs: Mapping[str, float], *, step: int, rate: str | None) -> None:
        """Show a training report, in the bar or as a line; `rate` is text such as `812 samples/s`."""
        if not self._enabled:
            return
        self._step = step
        shown = [_pair(name, value) for name, value in logs.items() if name not in NOT_IN_A_LINE]
        if self._bar is None:
            self.line("  ".join([f"{self._position()}{self._share()}", *shown, *_given(rate), f"ETA {self.eta()}"]))
            return
        self.advance(step)
        brief = [_pair(name, logs[name]) for name in ("loss", "learning_rate") if name in logs]
        self._bar.set_postfix_str(", ".join([*brief, *_given(rate)]), refresh=not self._is_paused)

    def evaluation(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Show the results of an evaluation as one line: the loss first, the seconds last."""
        self._step = step
        names = sorted(metrics, key=lambda name: not name.endswith("_loss"))
        shown = [_pair(name, metrics[name]) for name in names if not name.endswith(TIMING_SUFFIXES)]
        seconds = [f"{metrics[name]:.1f} s" for name in names if name.endswith("_runtime")]
        self.line("  ".join([self._position(), *shown, *seconds]))

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is None or self._is_paused:
            print(text, flush=True)
        else:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Take the bar away for as long as something else prints or reads: a debugger, a sample."""
        if self._bar is None or self._is_paused:
            yield
            return
        self._bar.clear()
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self._bar.update(self._step - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands and show it no more."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print two aligned columns."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.line(f"{name:<{width}}  {value}".rstrip())

    def eta(self) -> str:
        """Time that is left, as h:mm:ss, at the mean pace since the start; `?` before the first step."""
        done = self._step - self._initial_step
        if done <= 0 or self._total_steps is None:
            return "?"
        pace = (time.monotonic() - self._started_at) / done
        return str(timedelta(seconds=round(pace * max(0, self._total_steps - self._step))))

    def _position(self) -> str:
        total = "" if self._total_steps is None else f"/{self._total_steps}"
        return f"{self._unit} {self._step}{total}"

    def _share(self) -> str:
        return f" ({100 * self._step / self._total_steps:.0f} %)" if self._total_steps else ""


class _Bar(tqdm):  # type: ignore[type-arg]
    """tqdm with the console's estimate of the time left, and without its thread: breakpoint() must work."""

    monitor_interval = 0

    def __init__(self, console: Console, total: int, initial: int, unit: str) -> None:
        self._console = console
        super().__init__(
            total=total,
            initial=initial,
            desc=unit,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2,
            miniters=1,  # each update looks at the clock, so that a slow step is shown without that thread
            bar_format="{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| ETA {eta}{postfix}",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values that the format may name: those of tqdm, and `eta`."""
        return {**super().format_dict, "eta": self._console.eta()}


class _Handler(logging.Handler):
    """Writes to today's stderr, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:  # logging's contract: a handler never raises into the program
            self.handleError(record)


def _make_handler() -> logging.Handler:
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    return handler


def _set_up_libraries(level: int | None, *, shows_progress: bool) -> None:
    # Here, not above: they take a second to import, which importing this file should not.
    import huggingface_hub.utils
    from transformers.utils import logging as transformers_logging

    # Said of every GPT-2 at its first step, whose class has no loss_type; nothing that a user could change.
    logging.getLogger("transformers.modeling_utils").addFilter(_says_something_new)
    datasets = sys.modules.get("datasets")
    if level is not None:
        transformers_logging.set_verbosity(level)
        if datasets is not None:
            datasets.utils.logging.set_verbosity(level)
    if not shows_progress:
        transformers_logging.disable_progress_bar()
        if datasets is not None:
            datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # lazily exported


def _says_something_new(record: logging.LogRecord) -> bool:
    return "`loss_type=None` was set in the config" not in record.getMessage()


def _is_on_terminal() -> bool:
    """Whether stderr is a terminal that tells its size; on others (some containers) tqdm shows nothing."""
    if not sys.stderr.isatty():
        return False
    size = os.get_terminal_size(sys.stderr.fileno())
    return size.columns > 0 and size.lines > 2


def _given(text: str | None) -> list[str]:
    return [text] if text else []


def _pair(name: str, value: float) -> str:
    if name == "learning_rate":
        return f"lr {value:.3g}"
    if name == "grad_norm":
        return f"grad_norm {_digits(value, 3)}"
    if name == "epoch":
        return f"epoch {value:.2f}"
    return f"{name} {_digits(value, 4)}"


def _digits(value: float, count: int) -> str:
    """The number with so many significant digits; whole numbers whole; NaN is nan."""
    if isinstance(value, int):
        return str(value)
    return f"{value:#.{count}g}".removesuffix(".")
