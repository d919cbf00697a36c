"""Opens the W&B run: online if that is possible, else offline, which one line says. It never prompts."""

from __future__ import annotations

import logging
import multiprocessing
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.config import at_home
from harness.errors import ConfigError, NoCredentialsError
from harness.masking import masked, masked_words
from harness.tracking.client import failures, has_credentials, one_line, why_silent
from harness.tracking.flags import TrackingConfig, check_environment
from harness.tracking.folders import expand_folders
from harness.tracking.run.identity import home_of
from harness.tracking.run.refusals import why_refused
from harness.tracking.run.sweep import of_sweep
from harness.tracking.run.terminal import speak_through_log

logger = logging.getLogger(__name__)

INIT_TIMEOUT_SECONDS = 30
GIT_TIMEOUT_SECONDS = 10
NEEDS_CREDENTIALS = (
    "--wandb_mode=online (WANDB_MODE) needs credentials, and there are none: run `wandb login`, set WANDB_API_KEY, "
    "or use auto or offline."
)


def open_run(
    config: TrackingConfig, init_kwargs: Mapping[str, Any], *, stop: Callable[[], None], must_be_online: bool = False
) -> Any:
    """
    Open the run; `stop` is called from another thread when the user presses Stop in the app.

    None if wandb itself does not work, or if it can't be online and `must_be_online`. Raises ConfigError for what wandb
    refuses, and with --wandb_mode online for a lack of credentials and what W&B refuses.
    """
    from wandb.errors import UsageError

    expand_folders()
    check_environment()
    kwargs = of_sweep(dict(init_kwargs))
    kwargs["settings"] = _settings(config, kwargs.get("settings"), stop)
    mode = kwargs.pop("mode", None) or config.wandb_mode
    if kwargs.get("dir") and mode != "disabled":
        _make_folder(kwargs)
    is_demanded = config.wandb_mode == "online" or (mode == "online" and not must_be_online)
    if mode in ("offline", "disabled"):
        return _offline(kwargs, mode=mode, reason="")
    try:
        if (reason := _why_offline(kwargs["settings"])) is None:
            return _online(kwargs)
    except NoCredentialsError:
        if is_demanded:
            raise ConfigError(NEEDS_CREDENTIALS) from None
        reason = "No W&B credentials (`wandb login`)"
    except UsageError as error:  # --wandb_resume must without such a run, a name that can't be
        raise ConfigError(f"W&B refuses the run: {error}") from error
    except failures() as error:
        refusal = why_refused(error, kwargs)
        if refusal is not None and is_demanded:
            raise ConfigError(f"{refusal}. Without --wandb_mode=online (WANDB_MODE) it is kept offline.") from error
        reason = refusal or f"W&B could not be reached ({one_line(error)})"
    if must_be_online:
        logger.warning("%s: the run is online and stays so; its rows wait on this disk until it is resumed.", reason)
        return None
    return _offline(kwargs, mode="offline", reason=reason)


def _make_folder(kwargs: dict[str, Any]) -> None:
    """Make the folder that W&B's files go to: wandb would go to /tmp instead. Raises ConfigError."""
    folder = Path(at_home(str(kwargs["dir"])))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--wandb_dir={folder} (WANDB_DIR) can't hold W&B's files of a run: {error}.") from error
    kwargs["dir"] = str(folder)


def check_credentials(config: TrackingConfig) -> None:
    """Raise ConfigError if --wandb_mode online has no credentials, before anything is written."""
    if config.wandb_mode == "online" and not has_credentials():
        raise ConfigError(NEEDS_CREDENTIALS)


def where(run: Any) -> str:
    """Say where a run is: its address, or how to upload its folder."""
    if run.disabled:
        return ""
    if not run.offline:
        return str(masked(str(run.url)))
    folder = Path(run.settings.sync_dir)
    return f"offline; upload it with `harness sync {shlex.quote(_as_typed(home_of(folder)))}`"


def _as_typed(path: Path) -> str:
    """The shorter of a path's two names: from the working directory if it is below that, else the absolute one."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def is_notebook() -> bool:
    """
    Whether this process is a Jupyter kernel, by the test that IPython's own documentation gives.

    A child that `accelerate.notebook_launcher` forks from it has its shell too, and ends with the training.
    """
    shell = sys.modules.get("IPython")
    is_kernel = shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    return is_kernel and multiprocessing.parent_process() is None


def _settings(config: TrackingConfig, given: Any, stop: Callable[[], None]) -> Any:
    """Return the settings for `wandb.init`; what the caller or the environment has set stays."""
    import wandb

    settings = wandb.Settings(**given) if isinstance(given, dict) else given or wandb.Settings()
    ours: dict[str, Any] = {
        "init_timeout": INIT_TIMEOUT_SECONDS,
        "finish_timeout": config.wandb_finish_timeout,
        "stop_fn": stop,  # wandb's own would raise KeyboardInterrupt in the middle of a step
        "save_code": True,
    }
    if config.wandb_silent:
        ours["silent"] = True
    inherited = wandb.setup().settings
    for name, value in ours.items():
        if name not in settings.model_fields_set | inherited.model_fields_set:
            setattr(settings, name, value)
    _hide_secrets(settings, inherited)
    speak_through_log(settings)
    return settings


def _hide_secrets(settings: Any, inherited: Any) -> None:
    """Mask what wandb would record as it is: texts of its own variables, and the login in the address of git."""
    for name in ("run_name", "run_notes", "run_group", "run_job_type", "run_tags"):
        value = getattr(settings, name) or getattr(inherited, name)
        if (hidden := masked(value)) != value:
            setattr(settings, name, hidden)
    if settings.disable_git or inherited.disable_git or settings.git_remote_url or inherited.git_remote_url:
        return
    remote = settings.git_remote if "git_remote" in settings.model_fields_set else inherited.git_remote
    address = _ask_git("config", "--get", f"remote.{remote}.url")
    if (hidden := masked(address)) != address:
        settings.git_remote_url = hidden
        settings.git_commit = _ask_git("rev-parse", "--verify", "HEAD") or None  # wandb asks for both or for none


def _ask_git(*question: str) -> str:
    """Return git's answer in the working directory; "" without git or a repository."""
    if (git := shutil.which("git")) is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - what is asked here
            [git, *question], capture_output=True, text=True, timeout=GIT_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _why_offline(settings: Any) -> str | None:
    """Return why the run can't be online, or None, within seconds. Raises NoCredentialsError."""
    import wandb

    merged = wandb.setup().settings.model_copy()
    merged.update_from_settings(settings)
    if not has_credentials(merged):
        raise NoCredentialsError
    if (first := why_silent(merged.base_url)) is None:
        return None
    time.sleep(1)  # a hiccup is no reason for an offline run
    if why_silent(merged.base_url) is None:
        return None
    return f"W&B could not be reached ({first})"


def _online(kwargs: Mapping[str, Any]) -> Any:
    import wandb

    try:
        return _init({**kwargs, "mode": "online"})
    except Exception:
        # Its process goes on holding the run's id: the offline run, or a notebook's next try, would be refused.
        with suppress(*failures()):
            wandb.teardown()
        raise


def _offline(kwargs: Mapping[str, Any], *, mode: str, reason: str) -> Any:
    from wandb.errors import UsageError

    try:
        run = _init({**kwargs, "mode": mode})
    except UsageError as error:  # not the network: offline it is refused too
        raise ConfigError(f"W&B refuses the run: {error}") from error
    except failures() as error:
        logger.warning("W&B is off, the training goes on without it: %s", one_line(error))
        return None
    if reason:  # where it is, and how to upload it, is said at the end: by the harness, or by wandb
        logger.warning("%s: the run is kept offline.", reason)
    return run


def _init(kwargs: Mapping[str, Any]) -> Any:
    import wandb

    speak_through_log(kwargs["settings"])  # again: after a teardown wandb has forgotten it
    with _masked_command_line():
        try:
            run = wandb.init(**kwargs)
        except ValueError as error:  # pydantic's ValidationError among them: a setting given in code
            raise ConfigError(f"wandb.init refuses its arguments: {one_line(error)}") from error
    for handler in logging.getLogger("wandb").handlers:
        # Its debug log: where a disk does not take it, Python would print a traceback for each line.
        handler.handleError = _pass_over  # type: ignore[method-assign]
    return run


def _pass_over(record: logging.LogRecord) -> None:
    """Do nothing about a line that could not be logged."""


@contextmanager
def _masked_command_line() -> Iterator[None]:
    # wandb records sys.argv as it is, `--token ...` with it.
    argv, sys.argv = sys.argv, masked_words(sys.argv)
    try:
        yield
    finally:
        sys.argv = argv
