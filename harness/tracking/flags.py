"""What the user asks of the tracking: flags, and the WANDB_* variables under them."""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec
from typing import Any

from harness.config import arg, at_home, at_least, choice, flags_of, section
from harness.errors import ConfigError
from harness.masking import is_secret_name, masked
from harness.tracking.media.due import Every

DEFAULT_PROJECT = "huggingface"
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
LOG_MODEL = ("false", "end", "checkpoint")
WATCH = ("false", "gradients", "parameters", "all")
MODES = ("auto", "online", "offline", "disabled")
RESUME = ("allow", "must", "never", "auto")
ARTIFACT_NAMES = ("harness", "transformers")
# The most characters that W&B's server takes; wandb itself knows of the project's and the tags' only.
LONGEST = {
    "run_name": 128,
    "project": 128,
    "wandb_project": 128,
    "wandb_run_id": 128,
    "wandb_run_group": 128,
    "wandb_job_type": 64,
    "wandb_registry": 128,
}
LONGEST_TAG = 64
DEFAULT_TABLE_EPOCHS = 2  # those of the W&B guide


@section("tracking", on_resume="unrelated")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the metrics go, and what W&B gets beside them."""

    report_to: list[str] = arg(
        ["wandb"],
        "wandb, none, all that are installed, or trackers of Accelerate. The Trainer's default is none.",
        common=True,
    )
    run_name: str | None = arg(
        help="Name of the run in W&B; default: WANDB_NAME, or one that W&B makes up.", common=True
    )
    project: str = arg(DEFAULT_PROJECT, "Project of the run; for W&B --wandb_project goes first.")

    wandb_disabled: bool = arg(False, "Nothing goes to W&B.", env="WANDB_DISABLED")
    wandb_mode: str = arg(
        "auto",
        "online, offline, disabled, or auto: online with credentials and a server that answers, else offline.",
        env="WANDB_MODE",
    )
    wandb_project: str | None = arg(help="Project in W&B; default: --project.", env="WANDB_PROJECT", common=True)
    wandb_entity: str | None = arg(help="User or team in W&B.", env="WANDB_ENTITY")
    wandb_run_id: str | None = arg(help="Id of the run, to go on with it or to choose one.", env="WANDB_RUN_ID")
    wandb_resume: str | None = arg(
        help="allow, must, never or auto: what a run id that exists means; default with an id: allow.",
        env="WANDB_RESUME",
    )
    wandb_fork: bool = arg(
        False, "Go on from the checkpoint as a new W&B run, in one group with the run that the checkpoint is of."
    )
    wandb_run_group: str | None = arg(help="Group of the run.", env="WANDB_RUN_GROUP")
    wandb_job_type: str | None = arg(help="Job type of the run.", env="WANDB_JOB_TYPE")
    wandb_tags: list[str] | None = arg(help="Tags of the run.", env="WANDB_TAGS")
    wandb_notes: str | None = arg(help="Notes on the run.", env="WANDB_NOTES")
    wandb_dir: str | None = arg(help="Folder for W&B's files; default: --output_dir.", env="WANDB_DIR")
    wandb_silent: bool = arg(False, "Hide what W&B prints.", env="WANDB_SILENT")

    wandb_log_model: str = arg(
        "false",
        "Upload models: end (the final one, or the best with --load_best_model_at_end), checkpoint (each "
        "checkpoint too, resumable), false.",
        env="WANDB_LOG_MODEL",
        common=True,
    )
    wandb_artifact_names: str = arg(
        "harness",
        "harness: model-NAME and checkpoint-NAME; transformers: model-NAME for both, as since transformers 4.41.",
    )
    wandb_keep_checkpoints: int | None = arg(
        help="Keep so many checkpoint versions of this run on the server, beside the best, the latest and those with "
        "an alias of your own; default: all."
    )
    wandb_registry: str | None = arg(help="Link the final model to this collection of the registry.")

    wandb_watch: str = arg(
        "false",
        "Histograms of gradients, parameters or all, every max(100, --logging_steps) steps; false.",
        env="WANDB_WATCH",
    )
    wandb_watch_max_tensors: int | None = arg(
        help="Watch at most so many parameters, spread over the model; default: as many as fit into a row."
    )
    wandb_watch_patterns: list[str] | None = arg(
        help="Watch only parameters whose names match one of these, e.g. '*.attn.*'."
    )

    wandb_eval_samples: int | None = arg(help="Log a table of so many predictions on the evaluation set.")
    wandb_eval_samples_freq: int | None = arg(
        help="Epochs between these tables; default: 2, or none with --wandb_eval_samples_steps."
    )
    wandb_eval_samples_steps: int | None = arg(
        help="Steps between these tables: each is of the first evaluation at or after a multiple."
    )
    wandb_finish_timeout: float = arg(
        120.0, "Seconds at the end to go on trying while the W&B server does not answer; then say what is missing."
    )

    def __post_init__(self) -> None:
        for name in ("run_name", "wandb_run_group", "wandb_job_type", "wandb_tags", "wandb_notes"):  # only shown
            object.__setattr__(self, name, masked(getattr(self, name)))
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ConfigError(f"--report_to {' '.join(self.report_to)}: none stands alone.")
        at_least(
            1,
            wandb_keep_checkpoints=self.wandb_keep_checkpoints,
            wandb_watch_max_tensors=self.wandb_watch_max_tensors,
            wandb_eval_samples=self.wandb_eval_samples,
            wandb_eval_samples_freq=self.wandb_eval_samples_freq,
            wandb_eval_samples_steps=self.wandb_eval_samples_steps,
        )
        at_least(0, wandb_finish_timeout=self.wandb_finish_timeout)
        if self.wandb_dir is not None:
            object.__setattr__(self, "wandb_dir", at_home(self.wandb_dir))
        if self.uses_wandb:
            self._check_choices()
            if self.sends:
                self._check_lengths()

    def _check_choices(self) -> None:
        # Quotes and capitals are tolerated: the W&B guide's own `%env WANDB_LOG_MODEL="checkpoint"` keeps the quotes.
        for name, allowed in (("wandb_log_model", LOG_MODEL), ("wandb_watch", WATCH), ("wandb_mode", MODES)):
            value = str(getattr(self, name)).strip().strip("'\"").lower()
            value = {"": allowed[0], "dryrun": "offline", "run": "online"}.get(value, value)
            choice(f"{name} ({flags_of(TrackingConfig)[name].env})", value, allowed)
            object.__setattr__(self, name, value)
        if self.wandb_resume is not None:
            choice("wandb_resume (WANDB_RESUME)", self.wandb_resume, RESUME)
        choice("wandb_artifact_names", self.wandb_artifact_names, ARTIFACT_NAMES)
        if self.wandb_resume == "must" and self.wandb_run_id is None:
            raise ConfigError("--wandb_resume=must (WANDB_RESUME) needs --wandb_run_id (WANDB_RUN_ID): which run?")
        for name, kinds in (("wandb_keep_checkpoints", ("checkpoint",)), ("wandb_registry", ("end", "checkpoint"))):
            if getattr(self, name) is not None and self.wandb_log_model not in kinds:
                raise ConfigError(f"--{name} does nothing without --wandb_log_model {' or '.join(kinds)}.")
        if self.wandb_eval_samples_steps is not None and self.wandb_eval_samples is None:
            raise ConfigError("--wandb_eval_samples_steps does nothing without --wandb_eval_samples: of how many?")
        for name in ("wandb_watch_max_tensors", "wandb_watch_patterns"):
            if getattr(self, name) is not None and self.wandb_watch == "false":
                raise ConfigError(f"--{name} does nothing without --wandb_watch gradients, parameters or all.")

    def _check_lengths(self) -> None:
        # Offline too: what is too long would be refused when it is uploaded, and the run can't be renamed then.
        given = {f"--{name}": (getattr(self, name), most) for name, most in LONGEST.items()}
        given["WANDB_NAME"] = (None if self.run_name else os.environ.get("WANDB_NAME"), LONGEST["run_name"])
        problems = [
            f"{name}={value[:20]}... has {len(value)} characters: W&B takes at most {most}."
            for name, (value, most) in given.items()
            if value is not None and len(value) > most
        ]
        source = "WANDB_TAGS" if os.environ.get("WANDB_TAGS", "").split(",") == self.wandb_tags else "--wandb_tags"
        for tag in self.wandb_tags or []:
            if not 1 <= len(tag) <= LONGEST_TAG:
                shown = f"{tag[:20]}..." if tag else "''"
                problems.append(f"{source}: {shown} has {len(tag)} characters: W&B takes 1 to {LONGEST_TAG} in a tag.")
        if problems:
            raise ConfigError(*problems)

    @property
    def uses_wandb(self) -> bool:
        """Whether there will be a W&B run."""
        # Not by `tracker_names`: the parser asks, and does not wait for accelerate.
        is_named = "wandb" in self.report_to or ("all" in self.report_to and find_spec("wandb") is not None)
        return is_named and not self.wandb_disabled

    @property
    def tables_every(self) -> Every:
        """How often tables of predictions are due."""
        steps = self.wandb_eval_samples_steps
        epochs = DEFAULT_TABLE_EPOCHS if steps is None else None
        return Every(epochs=self.wandb_eval_samples_freq or epochs, steps=steps)

    @property
    def sends(self) -> bool:
        """Whether there will be a W&B run that keeps anything, here or on a server."""
        return self.uses_wandb and self.wandb_mode != "disabled"

    def check_trackers(self) -> None:
        """Raise ConfigError for a tracker that accelerate does not know or that is not installed."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for name in self.report_to:
            choice("report_to", name, ("none", "all", *sorted(LOGGER_TYPE_TO_CLASS)))
        for name in self.tracker_names():
            if name not in _installed():
                raise ConfigError(f"--report_to={name}: the package is not installed; run `pip install {name}`.")

    def tracker_names(self) -> list[str]:
        """What `report_to` stands for: each tracker once."""
        names = _installed() if "all" in self.report_to else self.report_to
        return [name for name in dict.fromkeys(names) if name != "none"]

    def init_kwargs(self) -> dict[str, Any]:
        """What of this goes to `wandb.init`; its own `settings` hold the rest."""
        kwargs: dict[str, Any] = {
            "project": self.wandb_project or self.project,
            "name": self.run_name,
            "entity": self.wandb_entity,
            "id": self.wandb_run_id,
            # An id that exists, without a word on resuming: wandb would write new rows over the old ones.
            "resume": self.wandb_resume or ("allow" if self.wandb_run_id else None),
            "group": self.wandb_run_group,
            "job_type": self.wandb_job_type,
            "tags": self.wandb_tags,
            "notes": self.wandb_notes,
            "dir": self.wandb_dir,
        }
        return {name: value for name, value in kwargs.items() if value is not None}

    @classmethod
    def from_environment(cls, **flags: Any) -> TrackingConfig:
        """The configuration of an own loop: the variables, and `flags` over them. Raises ConfigError."""
        values, problems = from_environment()
        if problems:
            raise ConfigError(*problems)
        return cls(**{**values, **flags})


def from_environment() -> tuple[dict[str, Any], list[str]]:
    """What the variables of flags give that are set, by flag; and what is wrong with them."""
    # W&B itself reads WANDB_NAME for a run without a name.
    values: dict[str, Any] = {"run_name": None} if os.environ.get("WANDB_NAME") else {}
    problems: list[str] = []
    for name, flag in flags_of(TrackingConfig).items():
        text = os.environ.get(flag.env or "")
        if not text:
            continue
        if flag.type == list[str]:
            values[name] = [item.strip() for item in text.split(",") if item.strip()]
        elif flag.type is bool:
            word = text.strip().strip("'\"").lower()
            values[name] = word in TRUE
            if word not in (*TRUE, *FALSE):
                problems.append(f"{flag.env}={text} is not understood; use true or false, or unset it.")
        else:
            values[name] = text
    return values, problems


def check_environment() -> None:
    """Raise ConfigError for a WANDB_* variable that wandb refuses; it would do so only when the run opens."""
    import wandb

    settings = wandb.Settings()
    for name, value in os.environ.items():
        if not name.startswith("WANDB_"):
            continue
        try:
            settings.update_from_env_vars({name: value})
        except (ValueError, wandb.errors.UsageError) as error:  # pydantic's ValidationError is a ValueError
            of_pydantic = [each["msg"] for each in error.errors()] if hasattr(error, "errors") else []  # without values
            reason = " ".join(masked("; ".join(of_pydantic) or str(error)).split())[:300].rstrip(".")
            shown = name if is_secret_name(name) else f"{name}={masked(value)}"
            raise ConfigError(f"{shown} is refused by wandb: {reason}. Put it right or unset it.") from None


def check_names(config: TrackingConfig) -> None:
    """Raise ConfigError for a project or a run id that wandb refuses; it would do so only when the run opens."""
    import wandb

    kwargs = config.init_kwargs()
    project = "wandb_project" if config.wandb_project else "project"
    for flag, setting, value in ((project, "project", kwargs["project"]), ("wandb_run_id", "run_id", kwargs.get("id"))):
        try:
            wandb.Settings(**{setting: value})
        except (ValueError, wandb.errors.UsageError) as error:
            raise ConfigError(f"--{flag}={value} is refused by wandb: {error}. Choose another.") from error


def _installed() -> list[str]:
    """The trackers that can be used, W&B first; those that a user registered have no package to look for."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    found = {str(name) for name in get_available_trackers()}
    known = {str(name) for name in LoggerType}
    return sorted(
        (name for name in LOGGER_TYPE_TO_CLASS if name in found or name not in known),
        key=lambda name: (name != "wandb", name),
    )
