"""Output for a person: log levels, a progress bar or plain lines, and the table at the end."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from harness.config import is_dumb_terminal
from harness.masking import masked
from harness.signals import say
from harness.training.flags import ConsoleConfig

TIMING_SUFFIXES = ("_runtime", "_samples_per_second", "_steps_per_second")
# Part of the caller's rate, or too long for a line; they are in the tracker and in the history.
NOT_IN_A_LINE = ("num_input_tokens_seen", "train_tokens_per_second", "total_flos")
LEAST_BAR_COLUMNS = 20  # the text beside the bar is shortened for it


def set_up_logging(config: ConsoleConfig, *, is_main: bool, is_local_main: bool) -> None:
    """Set the levels of our log and of the libraries', as the Trainer's example scripts do. It may be called again."""
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


@contextmanager
def logging_kept() -> Iterator[None]:
    """Put our log and the libraries' back, as `set_up_logging` has found them, at the end of the block."""
    import huggingface_hub.utils
    from transformers.utils import logging as transformers_logging

    ours, models = logging.getLogger("harness"), logging.getLogger("transformers.modeling_utils")
    before = list(ours.handlers), ours.level, ours.propagate
    verbosity, filters = transformers_logging.get_verbosity(), list(models.filters)
    shows_bars = transformers_logging.is_progress_bar_enabled()
    hides_hub = huggingface_hub.utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        ours.handlers[:], ours.propagate = before[0], before[2]
        ours.setLevel(before[1])
        models.filters[:] = filters
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()
        if not hides_hub:
            huggingface_hub.utils.enable_progress_bars()  # type: ignore[attr-defined]


class Console:
    """
    Progress and results for a person: lines above a bar if stderr is a terminal, else one line a report.

    Lines go to standard output. If it is not enabled, as on other ranks, it prints nothing.
    """

    def __init__(self, enabled: bool, progress: bool) -> None:
        self._enabled = enabled
        self._progress = progress
        self._bar: _Bar | None = None
        self._redirected = ExitStack()
        self._unit = "step"
        self._total_steps: int | None = None
        self._initial_step = self._step = 0
        self._started_at = time.monotonic()

    def start(self, total_steps: int, initial_step: int, unit: str = "step") -> None:
        """Begin at `initial_step` of `total_steps`; `unit` names what is counted."""
        self.close()
        self._unit, self._total_steps = unit, total_steps
        self._initial_step = self._step = initial_step
        self._started_at = time.monotonic()
        if self._enabled and self._progress and _shows_a_bar():
            self._redirected.enter_context(_libraries_above_the_bar())
            self._bar = _Bar(self, total_steps, initial_step, unit)

    def advance(self, global_step: int) -> None:
        """Show that this step is done. Called at every step."""
        self._step = global_step
        if self._bar is not None:
            self._bar.update(global_step - self._bar.n)

    def report(self, logs: Mapping[str, float], *, step: int, rate: str | None) -> None:
        """Show a training report as a line; `rate` is text such as `812 samples/s`, which a bar shows."""
        if not self._enabled:
            return
        shown = in_a_line(logs)
        if self._bar is None:
            self._step = step
            self.line("  ".join([f"{self._position()}{self._share()}", shown, *_given(rate), f"ETA {self.eta()}"]))
            return
        self._bar.rate = rate or ""
        self.advance(step)
        self.line(f"{self._position()}  {shown}")

    def evaluation(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Show the results of an evaluation as one line: the loss first, the seconds last."""
        self._step = step
        names = sorted(metrics, key=lambda name: not name.endswith("_loss"))
        seconds = [f"{metrics[name]:.1f} s" for name in names if name.endswith("_runtime")]
        self.line("  ".join([self._position(), in_a_line({name: metrics[name] for name in names}), *seconds]))

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._enabled:
            with suppress(OSError), tqdm.external_write_mode(file=sys.stdout):
                say(masked(text), sys.stdout)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hide the bar while something else prints or reads: a debugger, a sample."""
        if self._bar is None or self._bar.disable:
            yield
            return
        self._bar.clear()
        self._bar.disable = True  # otherwise a log record would draw it again
        try:
            yield
        finally:
            self._bar.disable = False
            self._bar.update(self._step - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is and stop updating it."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        self._redirected.close()

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print two aligned columns."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.line(f"{name:<{width}}  {value}".rstrip())

    def eta(self) -> str:
        """Return the time left as h:mm:ss, at the mean pace since the start; `?` before the first step."""
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
    """
    tqdm with the console's estimate of the time left, and without its thread, so that breakpoint() works.

    The bar has at least LEAST_BAR_COLUMNS; the rate is shown as far as there is room for it.
    """

    monitor_interval = 0

    def __init__(self, console: Console, total: int, initial: int, unit: str) -> None:
        self._console = console
        self.rate = ""
        super().__init__(
            total=total,
            initial=initial,
            desc=unit,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2,
            miniters=1,  # check the clock at each update, so that a slow step is shown without that thread
            bar_format="{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| ETA {eta}{rate_text}",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values that the format may name: those of tqdm, `eta`, and `rate_text`."""
        values, eta = super().format_dict, self._console.eta()
        others = f"{self.desc} {self.total}/{self.total} 100%|| ETA {eta}"
        room = (values["ncols"] or 0) - LEAST_BAR_COLUMNS - len(others)
        whole = f", {self.rate}" if self.rate else ""
        fits = (text for text in (whole, whole.rpartition(", ")[0]) if len(text) <= room)
        return {**values, "eta": eta, "rate_text": next(fits, "")}


class _Handler(logging.Handler):
    """A log handler that writes to the current stderr, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(masked(self.format(record)), file=sys.stderr)
            sys.stderr.flush()
        except Exception:  # a logging handler must never raise into the program
            self.handleError(record)


def _make_handler() -> logging.Handler:
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    return handler


def _set_up_libraries(level: int | None, *, shows_progress: bool) -> None:
    # Imported here, since they take a second.
    import huggingface_hub.utils
    from transformers.utils import logging as transformers_logging

    # Every GPT-2 warns at its first step that its class has no loss_type, which a user can't change.
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


@contextmanager
def _libraries_above_the_bar() -> Iterator[None]:
    """While the bar is shown, print Python's warnings and the libraries' log lines above it."""

    def above(write: Callable[..., None]) -> Callable[..., None]:
        def write_above(*args: Any, **kwargs: Any) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                write(*args, **kwargs)

        return write_above

    loggers = (each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger))
    handlers = {handler for each in (logging.root, *loggers) for handler in each.handlers} | {logging.lastResort}
    writing = [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]
    show, warnings.showwarning = warnings.showwarning, above(warnings.showwarning)
    for handler in writing:
        vars(handler)["emit"] = above(handler.emit)
    try:
        yield
    finally:
        warnings.showwarning = show
        for handler in writing:
            del vars(handler)["emit"]


def _shows_a_bar() -> bool:
    """Whether stderr is a terminal that reports its size and can return to the beginning of a line."""
    if not sys.stderr.isatty() or is_dumb_terminal():
        return False
    size = os.get_terminal_size(sys.stderr.fileno())
    return size.columns > 0 and size.lines > 2


def in_a_line(metrics: Mapping[str, float]) -> str:
    """Return the metrics as text, without timings and those that are too long for a line."""
    left_out = (*NOT_IN_A_LINE, *(name for name in metrics if name.endswith(TIMING_SUFFIXES)))
    return "  ".join(_pair(name, value) for name, value in metrics.items() if name not in left_out)


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
    """Return the number with `count` significant digits; whole numbers stay whole, and NaN is nan."""
    if isinstance(value, int):
        return str(value)
    return f"{value:#.{count}g}".removesuffix(".")
