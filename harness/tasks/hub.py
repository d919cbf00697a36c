"""What the flags take from the Hub, and whether it can be had: found out before anything slow is imported."""

from __future__ import annotations

import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from harness.config import is_first_rank, variable
from harness.errors import ConfigError
from harness.signals import say
from harness.tasks.flags import SHIPPED, TaskConfig
from harness.tasks.text.glue import HUB_NAME

MODEL_FLAGS = ("model_name_or_path", "config_name", "tokenizer_name", "image_processor_name")
WEIGHTS = (".safetensors", ".bin")
# A server that is there answers in milliseconds; a network that drops all packets never does.
SECONDS_TO_ANSWER = 3.0


@dataclass(frozen=True)
class Wanted:
    """What a flag takes from the Hub: a model, with its config and tokenizer, or a data set."""

    flag: str
    name: str
    is_dataset: bool = False
    shown: str = ""

    def is_cached(self, config: TaskConfig) -> bool:
        """Whether a cache of this machine holds it."""
        if self.is_dataset:
            return snapshot_of(self.name, config, is_dataset=True) is not None or _is_prepared(self.name, config)
        folder = snapshot_of(self.name, config)
        if folder is None:
            return False
        return self.flag != "model_name_or_path" or any(file.suffix in WEIGHTS for file in _files(folder))

    def download(self, config: TaskConfig) -> str:
        """The command that brings it into the cache."""
        words = ["hf", "download", self.name, *(["--repo-type", "dataset"] if self.is_dataset else [])]
        if not self.is_dataset and config.model_revision != "main":
            words += ["--revision", config.model_revision]
        return shlex.join([*words, *(["--cache-dir", config.cache_dir] if config.cache_dir else [])])


def wanted_of(config: TaskConfig) -> list[Wanted]:
    """Return what a shipped task takes from the Hub: the names that are no folder here. Of any other task nothing."""
    if config.task not in SHIPPED:
        return []
    named = ((flag, getattr(config, flag)) for flag in MODEL_FLAGS)
    found = [Wanted(flag, name) for flag, name in named if name and _is_elsewhere(name)]
    if config.dataset_name is not None:
        if config.dataset_name and _is_elsewhere(config.dataset_name):
            found.append(Wanted("dataset_name", config.dataset_name, is_dataset=True))
    elif config.task_name and config.train_file is None:
        shown = f"--task_name={config.task_name} ({HUB_NAME})"
        found.append(Wanted("task_name", HUB_NAME, is_dataset=True, shown=shown))
    return found


def _is_elsewhere(name: str) -> bool:
    return not name.startswith("wandb:") and not Path(name).exists()


@contextmanager
def hub_or_cache(config: TaskConfig, recipe: str | None = None) -> Iterator[None]:
    """
    Decide once whether the Hub can be reached; if not, take model and data from its cache in the block.

    The libraries would try each file anew, and each try costs seconds. Raises ConfigError for what is in no cache
    then; it names the `recipe`, or file of flags, and the commands that fetch what is missing.
    """
    wanted = wanted_of(config)
    is_offline = bool(_constants().HF_HUB_OFFLINE)
    if not wanted or (not is_offline and is_reachable(str(_constants().ENDPOINT))):
        yield
        return
    if missing := [each for each in wanted if not each.is_cached(config)]:
        raise ConfigError(_refusal(missing, config, recipe, is_offline=is_offline))
    if is_offline:
        yield
        return
    if is_first_rank():
        say("The Hub can't be reached: model and data are taken from its cache.", sys.stderr)
    with _offline():
        yield


def _refusal(missing: list[Wanted], config: TaskConfig, recipe: str | None, *, is_offline: bool) -> str:
    flags = " and ".join(dict.fromkeys(each.shown or f"--{each.flag}={each.name}" for each in missing))
    commands = " and ".join(dict.fromkeys(f"`{each.download(config)}`" for each in missing))
    start = f"--config={recipe} needs {flags}" if recipe else flags
    why = " (HF_HUB_OFFLINE is set)" if is_offline else ""
    return (
        f"{start}: no such folder here, not in the Hub's cache, and the Hub can't be reached{why}; check the name, or "
        f"run {commands} where there is a network first."
    )


def snapshot_of(name: str, config: TaskConfig, *, is_dataset: bool = False) -> Path | None:
    """Return the folder of the Hub's cache that holds a model or a data set, None if there is none."""
    home = str(_constants().HF_HUB_CACHE)
    revision = "main" if is_dataset else config.model_revision
    for cache in dict.fromkeys((config.cache_dir or home, home) if is_dataset else (config.cache_dir or home,)):
        folder = Path(cache).expanduser() / "--".join(["datasets" if is_dataset else "models", *name.split("/")])
        try:
            commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            commit = revision
        found = folder / "snapshots" / commit
        # Of a data set, a load that was online leaves the card alone.
        if any(not (is_dataset and file.suffix in ("", ".md")) for file in _files(found)):
            return found
    return None


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; a link whose file is gone is none."""
    return (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _is_prepared(name: str, config: TaskConfig) -> bool:
    """Whether `datasets` has prepared the data set before, in the variant that is asked for."""
    home = variable("HF_DATASETS_CACHE") or Path(str(_constants().HF_HOME)) / "datasets"
    cache = Path(config.cache_dir or home).expanduser()
    variant = config.dataset_config_name or (config.task_name if name == HUB_NAME else None) or "*"
    folders = cache.iterdir() if cache.is_dir() else []
    mine = [folder for folder in folders if _plain(folder.name) == _plain(name)]
    return any(True for folder in mine for _ in folder.glob(f"{variant}*/*/*/dataset_info.json"))


def _plain(name: str) -> str:
    """Return a data set's name without what its folder's name has in other signs: org/MyData is org___my_data."""
    return name.replace("/", "").replace("_", "").lower()


def is_reachable(address: str) -> bool:
    """Whether a server, or the proxy before it, takes a connection within seconds."""
    url = urlsplit(address)
    host, proxies = url.hostname or "", getproxies()
    proxy = None if proxy_bypass(host) else proxies.get(url.scheme) or proxies.get("all")
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    answers: list[bool] = []
    # In a thread: to find an address can't be given a limit, and without a network may take half a minute.
    thread = threading.Thread(target=_connect, args=(url, answers), daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    return any(answers)


def _connect(url: Any, answers: list[bool]) -> None:
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        with socket.create_connection((url.hostname or "", port), timeout=SECONDS_TO_ANSWER):
            answers.append(True)
    except (OSError, ValueError):  # ValueError: what is no port, in a variable of a proxy
        answers.append(False)


@contextmanager
def _offline() -> Iterator[None]:
    """Let huggingface_hub, and with it transformers and datasets, use their caches alone in the block."""
    constants = _constants()
    constants.HF_HUB_OFFLINE = True
    of_datasets = sys.modules.get("datasets.config")
    before = getattr(of_datasets, "HF_HUB_OFFLINE", None)
    if of_datasets is not None:
        of_datasets.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
        loaded: Any = sys.modules.get("datasets.config")
        if loaded is not None:  # imported in the block, it has taken the value of then
            loaded.HF_HUB_OFFLINE = bool(variable("HF_DATASETS_OFFLINE")) if before is None else before


def _constants() -> Any:
    from huggingface_hub import constants

    return constants
