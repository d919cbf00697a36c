"""Where a study is kept: SQLite, a journal file for many machines, or a database; and patience with what is locked."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness.errors import ConfigError, HarnessError
from harness.masking import masked

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

T = TypeVar("T")

JOURNAL = "journal:"
SQLITE = "sqlite:///"
# Several workers write to one file; a transaction takes milliseconds.
SECONDS_OF_PATIENCE = 300.0
SECONDS_FOR_LOCK = 60.0


def check_optuna() -> None:
    """Raise ConfigError where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise ConfigError("A sweep needs Optuna: pip install 'accelerate-harness[optuna]'.")


def default_storage(folder: Path, *, is_shared: bool) -> str:
    """Return where the study of a folder is kept unless --storage says otherwise: `is_shared` among machines or not."""
    return f"{JOURNAL}{folder / 'study.log'}" if is_shared else f"{SQLITE}{folder / 'study.db'}"


def open_storage(storage: str) -> BaseStorage:
    """Open a storage, which makes its tables or its file. Raises ConfigError if that can't be."""
    import optuna
    from optuna.storages import RDBStorage, get_storage
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        if storage.startswith(JOURNAL):
            path = Path(storage.removeprefix(JOURNAL)).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        options = {"connect_args": {"timeout": SECONDS_FOR_LOCK}} if storage.startswith("sqlite") else {}
        if storage.startswith(SQLITE):
            Path(storage.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        return patiently(lambda: get_storage(RDBStorage(storage, engine_kwargs=options)))
    except HarnessError:
        raise
    except Exception as error:  # the drivers' and SQLAlchemy's own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--storage={masked(storage)} can't be opened: {masked(reason)}. Give sqlite:///PATH, journal:PATH (many "
            "machines), or a database's address."
        ) from None


def patiently(work: Callable[[], T]) -> T:
    """Do something with a storage, again and again while another process has it locked. Raises HarnessError."""
    import optuna
    from sqlalchemy.exc import OperationalError

    until = time.monotonic() + SECONDS_OF_PATIENCE
    while True:
        try:
            return work()
        except Exception as error:
            if not isinstance(error, (optuna.exceptions.StorageInternalError, OperationalError)):
                raise
            reason = f"{error} {error.__cause__ or ''}".lower()
            if not any(word in reason for word in ("locked", "busy", "deadlock", "timeout", "serializ")):
                raise HarnessError(f"The storage of the study fails: {masked(' '.join(str(error).split()))}") from error
            if time.monotonic() > until:
                raise HarnessError(
                    f"The storage of the study has been locked for {SECONDS_OF_PATIENCE:.0f} s: is it on a network's "
                    "file system? Then give --storage journal:PATH. Start the sweep again to go on."
                ) from error
        time.sleep(random.uniform(0.01, 0.2))
