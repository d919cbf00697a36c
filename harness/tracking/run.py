"""The W&B run: opened, given its configuration and its rows, finished. Rank zero's, silent elsewhere."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from harness.config import ConfigError, arg, choice

logger = logging.getLogger(__name__)

DEFAULT_PROJECT = "huggingface"
INIT_TIMEOUT_SECONDS = 30
# They describe the whole run: the Trainer puts them into the summary, under these names, not into a row.
SUMMARY_ONLY = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
)
TRUE, FALSE = ("true", "1", "yes", "on"), ("", "false", "0", "no", "off")
SECRET_SUFFIXES = ("_token", "api_key")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the metrics go. All else about W&B is said in its own WANDB_* variables."""

    report_to: list[str] = arg(
        ["wandb"],
        "wandb, none, all that are installed, or trackers of Accelerate. The Trainer's default is none.",
    )
    run_name: str | None = arg(help="Name of the run in W&B; default: WANDB_NAME, or one that W&B makes up.")
    project: str = arg(DEFAULT_PROJECT, "Project of the run. For W&B the variable WANDB_PROJECT goes first.")

    def __post_init__(self) -> None:
        for name in self.report_to:
            choice("report_to", name, ("none", "all", *sorted(LOGGER_TYPE_TO_CLASS)))
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ConfigError(f"--report_to {' '.join(self.report_to)}: none stands alone.")
        for name in self.tracker_names():
            if name not in _installed():
                raise ConfigError(f"--report_to={name}: the package is not installed; run `pip install {name}`.")

    def tracker_names(self) -> list[str]:
        """What `report_to` stands for: each tracker once."""
        names = _installed() if "all" in self.report_to else self.report_to
        return [name for name in dict.fromkeys(names) if name != "none"]


def trackers(config: TrackingConfig, *, dir: str) -> list[str | WandbTracker]:  # noqa: A002 - wandb's name for it
    """
    What to give `Accelerator(log_with=...)`; W&B's files go to `dir` unless WANDB_DIR is set.

    Raises ConfigError, on every rank alike, for variables that W&B or this version doesn't understand.
    """
    chosen: list[str | WandbTracker] = []
    for name in config.tracker_names():
        if name != "wandb":
            chosen.append(name)
        elif not _is_disabled():
            _check_variables()
            chosen.append(
                WandbTracker(
                    run_name=config.run_name,
                    project=os.environ.get("WANDB_PROJECT") or config.project,
                    dir=None if os.environ.get("WANDB_DIR") else dir,
                )
            )
    return chosen


def run_config(model: torch.nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The run's configuration as the Trainer has it, in JSON types: adapter, model, arguments; these win."""
    model_config: Any = getattr(model, "config", None)
    if model_config is not None and not isinstance(model_config, Mapping):
        model_config = model_config.to_dict()
    peft_config: Any = getattr(model, "peft_config", None)
    return {
        **({"peft_config": _plain(peft_config)} if peft_config is not None else {}),
        **_plain(model_config or {}),
        **{name: f"<{name.upper()}>" if _is_secret(name) else _plain(value) for name, value in arguments.items()},
        "model/num_parameters": _num_parameters(model),
    }


def store_configuration(opened: Iterable[GeneralTracker], values: Mapping[str, Any]) -> None:
    """
    Give the configuration to the trackers of an Accelerator, after `init_trackers(project)` without one.

    W&B keeps it as it is. The others get scalars, the rest as JSON text: TensorBoard raises for others.
    """
    scalars = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(_plain(value))
        for name, value in _masked(values).items()
    }
    for tracker in opened:
        tracker.store_init_configuration(dict(values) if isinstance(tracker, WandbTracker) else scalars)


def rewrite(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    The Trainer's names as its reports show them: `eval_loss` is `eval/loss`, `loss` is `train/loss`.

    Names with a slash are the user's own and stay, as do the five of the summary: twice changes nothing.
    """
    return {_rewritten(name): value for name, value in values.items()}


class WandbTracker(GeneralTracker):  # type: ignore[misc]
    """
    A W&B run behind Accelerate's interface, with the Trainer's rows. It never prompts.

    - run_name, project, dir: the name of the run, its project (default: WANDB_PROJECT, or huggingface), the
      folder under which W&B keeps its files.
    - init_kwargs: anything else that `wandb.init` takes.

    A run that is already open is adopted as it is and left open at the end. Without credentials, or when the
    server can't be reached, the run is offline: W&B doesn't stop a training. On ranks other than the main one
    every method does nothing.
    """

    name = "wandb"
    requires_logging_directory = False
    main_process_only = True

    def __init__(
        self,
        *,
        run_name: str | None = None,
        project: str | None = None,
        dir: str | None = None,  # noqa: A002 - wandb's name for it
        **init_kwargs: Any,
    ) -> None:
        super().__init__()
        self._init_kwargs = init_kwargs
        if run_name is not None:
            self._init_kwargs["name"] = run_name
        if project is not None:
            self._init_kwargs["project"] = project
        if dir is not None:
            self._init_kwargs["dir"] = dir
        self._run: Any = None
        self._is_own = False
        self._has_warned = False
        self._where = ""

    @property
    def tracker(self) -> Any:
        """The wandb run; None before the start, after the end, on other ranks, under WANDB_DISABLED=true."""
        return self._run

    def start(self) -> None:
        """Adopt the open run or make one. Raises ConfigError for settings that wandb refuses."""
        if self._run is not None or not PartialState().is_main_process or _is_disabled():
            return
        import wandb

        self._is_own = wandb.run is None
        self._run = self._opened() if self._is_own else wandb.run
        self._where = "" if self._run is None else _where(self._run)
        self._deliver(self._define_metrics)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Add `values` to the run's configuration, secrets masked."""
        self._deliver(lambda: self._run.config.update(_masked(values), allow_val_change=True))

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Send one row under the Trainer's names. `step` is the optimizer step; wandb's own counts rows."""
        if self._run is None:
            return
        summary = {name: value for name, value in values.items() if name in SUMMARY_ONLY}
        row = rewrite({name: value for name, value in values.items() if name not in SUMMARY_ONLY})
        if step is not None:
            row["train/global_step"] = step
        self._deliver(lambda: self._send(summary, row, kwargs))

    def finish(self, exit_code: int = 0) -> None:
        """End the run if it was made here: an adopted one is its owner's. A second call does nothing."""
        if self._is_own:
            self._deliver(lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def describe(self) -> str:
        """Where to find the run, also when it is over: its address, or its folder and how to upload it."""
        return self._where

    def _opened(self) -> Any:
        _check_settings()
        kwargs = {"project": os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT, **self._init_kwargs}
        kwargs["settings"] = _patient(kwargs.get("settings"))
        if kwargs.get("dir"):
            Path(kwargs["dir"]).mkdir(parents=True, exist_ok=True)  # wandb would go to /tmp instead
        try:
            if _would_prompt(kwargs):
                run = _init({**kwargs, "mode": "offline"})
                folder = run.settings.sync_dir
                logger.warning(
                    "No W&B credentials found: the run is kept offline in %s. Look at it with "
                    "`wandb leet %s`; upload it later with `wandb login` and `wandb sync %s`.",
                    *(folder, folder, folder),
                )
                return run
            return _init(kwargs)
        except _failures() as error:
            return self._opened_offline(kwargs, error)

    def _opened_offline(self, kwargs: dict[str, Any], reason: Exception) -> Any:
        from wandb.errors import UsageError

        try:
            run = _init({**kwargs, "mode": "offline"})
        except UsageError as error:  # not the network: offline it is refused too
            raise ConfigError(f"W&B refuses the run: {error}") from error
        except _failures() as error:
            logger.warning("W&B is off, the training goes on without it: %s", _one_line(error))
            return None
        logger.warning(
            "W&B could not be reached (%s): the run is kept offline in %s; upload it later with `wandb sync %s`.",
            *(_one_line(reason), run.settings.sync_dir, run.settings.sync_dir),
        )
        return run

    def _define_metrics(self) -> None:
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def _send(self, summary: dict[str, Any], row: dict[str, Any], kwargs: dict[str, Any]) -> None:
        for name, value in summary.items():
            self._run.summary[name] = value
        self._run.log(row, **kwargs)

    def _deliver(self, action: Callable[[], Any]) -> None:
        """Do something with the run, if there is one; a failure of wandb's is a warning, the first time."""
        if self._run is None:
            return
        try:
            action()
        except _failures() as error:
            if not self._has_warned:
                logger.warning("W&B failed, the training goes on; rows may be missing: %s", _one_line(error))
            self._has_warned = True


def _installed() -> list[str]:
    """The trackers that can be used, W&B first; those that a user registered have no package to look for."""
    found = {str(name) for name in get_available_trackers()}
    known = {str(name) for name in LoggerType}
    return sorted(
        (name for name in LOGGER_TYPE_TO_CLASS if name in found or name not in known),
        key=lambda name: (name != "wandb", name),
    )


def _is_disabled() -> bool:
    value = os.environ.get("WANDB_DISABLED", "").strip().lower()
    if value not in (*TRUE, *FALSE):
        raise ConfigError(f"WANDB_DISABLED={value} is not understood; use true or false, or unset it.")
    return value in TRUE


def _check_variables() -> None:
    for name in ("WANDB_LOG_MODEL", "WANDB_WATCH"):
        value = os.environ.get(name, "")
        if value.strip().strip("'\"").lower() not in ("", "false"):
            raise ConfigError(f"{name}={value} is not supported by this version yet; unset it.")
    _check_settings()


def _check_settings() -> None:
    """Raise ConfigError for a WANDB_* variable that wandb refuses; it would do so only when the run opens."""
    import wandb

    settings = wandb.Settings()
    for name, value in os.environ.items():
        if not name.startswith("WANDB_"):
            continue
        try:
            settings.update_from_env_vars({name: value})
        except (ValueError, wandb.errors.UsageError) as error:  # pydantic's ValidationError is a ValueError
            raise ConfigError(
                f"{name}={value} is refused by wandb: {_one_line(error)}. Put it right or unset it."
            ) from error


def _patient(settings: Any) -> Any:
    """The settings of `wandb.init` with a shorter time limit, unless one is given."""
    import wandb

    settings = wandb.Settings(**settings) if isinstance(settings, dict) else settings or wandb.Settings()
    if "init_timeout" not in settings.model_fields_set and not os.environ.get("WANDB_INIT_TIMEOUT"):
        settings.init_timeout = INIT_TIMEOUT_SECONDS
    return settings


def _would_prompt(kwargs: Mapping[str, Any]) -> bool:
    """Whether `wandb.init` would look for credentials and find none."""
    import wandb
    from wandb.sdk.lib.wbauth import HostUrl, authenticate_session

    settings = wandb.setup().settings.model_copy()
    settings.update_from_settings(kwargs["settings"])
    mode = kwargs.get("mode") or settings.mode
    if mode not in ("online", "run", "shared") or settings.api_key:
        return False
    # Not wandb.login(prompt=False): it asks the server for the user's name: seconds if out of reach.
    host = HostUrl(settings.base_url, app_url=settings.app_url)
    return authenticate_session(host=host, source="wandb.init()", prompt=False, update_session=False) is None


def _init(kwargs: Mapping[str, Any]) -> Any:
    import wandb

    try:
        return wandb.init(**kwargs)
    except ValueError as error:  # pydantic's ValidationError among them: a setting given in code
        raise ConfigError(f"wandb.init refuses its arguments: {_one_line(error)}") from error


def _where(run: Any) -> str:
    if run.disabled:
        return ""
    folder = run.settings.sync_dir
    return f"offline in {folder}; upload it with `wandb sync {folder}`" if run.offline else str(run.url)


def _failures() -> tuple[type[Exception], ...]:
    """What wandb raises when its server, its service process or the disk fails."""
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


def _rewritten(name: str) -> str:
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name[len(prefix) + 1 :]}"
    return name if "/" in name or name in SUMMARY_ONLY else f"train/{name}"


def _is_secret(name: str) -> bool:
    return name == "token" or name.endswith(SECRET_SUFFIXES)


def _masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without secrets. A text like <image> is a model's special token, or masked already."""
    masked: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            masked[name] = _masked(value)
        elif isinstance(value, str) and _is_secret(str(name)) and not (value[:1] == "<" and value[-1:] == ">"):
            masked[name] = f"<{name.upper()}>"
        else:
            masked[name] = value
    return masked


def _plain(value: Any) -> Any:
    """The value in JSON types."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return str(value)


def _num_parameters(model: torch.nn.Module) -> int:
    count: Any = getattr(model, "num_parameters", None)
    return int(count()) if callable(count) else sum(parameter.numel() for parameter in model.parameters())
