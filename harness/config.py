"""The parser: command line and YAML to frozen sections. The sections stand beside the code that reads them."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import os
from argparse import ArgumentDefaultsHelpFormatter
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from harness.errors import ConfigError

SECRET_SUFFIXES = ("_token", "api_key")
RECIPES_DIR = Path(__file__).parent / "recipes"


class Json(dict[str, Any]):
    """The value of a flag that takes a dictionary, written as JSON: `--lr_scheduler_kwargs '{"power": 2}'`."""

    def __init__(self, value: str | Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"not JSON: {error}") from error
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
        super().__init__(value)


def arg(default: Any = None, help: str = "", **argparse_options: Any) -> Any:  # noqa: A002
    """A field of a section: its default, its help text and, where needed, argparse's own options."""
    metadata = {"help": help.replace("%", "%%"), **argparse_options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def choice(flag: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed ones. Raises ConfigError."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--{flag}={value} is not known; use one of: {', '.join(allowed)}.{hint}")


def at_least(minimum: float, **flags: float | None) -> None:
    """Refuse numbers below `minimum`, NaN and infinity; None passes. Raises ConfigError."""
    for flag, value in flags.items():
        if value is not None and not minimum <= value < math.inf:
            raise ConfigError(f"--{flag}={value}: use {minimum:g} or more.")


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """HfArgumentParser that raises ConfigError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ". See --help.")


def parse_sections(
    sections: Sequence[type],
    argv: Sequence[str],
    *,
    refused: Mapping[str, str],
    base: Mapping[str, Any] | None = None,
) -> tuple[list[Any], set[str]]:
    """
    Parse `argv` over the values of `base` (a recipe, already read) into one instance a section.

    Both go through the same conversions, so a YAML `1e-3` is a number. `refused` maps names of flags that exist
    elsewhere to the reason they don't here. Returns the sections in order and the names given in `argv`.
    Raises ConfigError for unknown, misspelt, repeated, refused or malformed flags.
    """
    parser = _Parser(
        [_unlinked(section) for section in sections],
        prog="harness train",
        allow_abbrev=False,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    names = [field.name for section in sections for field in dataclasses.fields(section)]
    given = [_name_of(token, names) for token in argv if token.startswith("--")]
    for name in given:
        _check_name(name, f"--{name}", names, refused)
    for name, count in Counter(given).items():
        if count > 1:
            raise ConfigError(f"--{name} is given {count} times; give it once.")
    # A value of the base that the command line replaces must not reach argparse: `nargs="+"` fields would mix.
    from_base = {name: value for name, value in (base or {}).items() if name not in given and value is not None}
    namespace, rest = parser.parse_known_args([*_as_argv(from_base), *argv])
    if rest:
        raise ConfigError(f"{rest[0]} belongs to no flag; values follow their flag: --flag value.")
    built = [
        section(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(section)})
        for section in sections
    ]
    return built, set(given)


def read_yaml(source: str, sections: Sequence[type], *, refused: Mapping[str, str]) -> dict[str, Any]:
    """
    Read a YAML file, or a shipped recipe by its name, as a flat mapping of flag names to values.

    Raises ConfigError for a missing file, broken YAML, repeated, unknown or refused keys.
    """
    path = Path(source)
    if not path.is_file():
        recipes = sorted(recipe.stem for recipe in RECIPES_DIR.glob("*.yaml"))
        if source not in recipes:
            raise ConfigError(
                f"--config={source}: no such file, and no shipped recipe of that name; recipes: {', '.join(recipes)}."
            )
        path = RECIPES_DIR / f"{source}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_NoDuplicates)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config={source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config={source} holds no mapping; write one `flag: value` a line.")
    names = [field.name for section in sections for field in dataclasses.fields(section)]
    for key in values:
        _check_name(str(key), f"{path.name}: {key}", names, refused)
    return values


class _NoDuplicates(yaml.SafeLoader):
    """YAML lets a later key win silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value)
        for key, count in keys.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given {count} times", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def _unlinked(section: type) -> type:
    """A copy of the class: HfArgumentParser rewrites the type of the fields it is given."""
    twin = type(section.__name__, section.__bases__, dict(section.__dict__))
    fields = {name: copy.copy(field) for name, field in section.__dataclass_fields__.items()}  # type: ignore[attr-defined]
    twin.__dataclass_fields__ = fields  # type: ignore[attr-defined]
    return twin


def _name_of(token: str, names: Sequence[str]) -> str:
    name = token[2:].split("=", 1)[0].replace("-", "_")
    positive = name.removeprefix("no_")
    return positive if name not in names and positive in names else name


def _check_name(name: str, shown: str, names: Sequence[str], refused: Mapping[str, str]) -> None:
    if name in names or name == "help":
        return
    if name in refused:
        raise ConfigError(f"{shown} is not supported: {refused[name]}.")
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else " See --help for all flags."
    raise ConfigError(f"{shown} is not a known flag.{hint}")


def _as_argv(values: Mapping[str, Any]) -> list[str]:
    argv: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            argv.append(f"--{name}={json.dumps(value)}")
        else:
            argv.append(f"--{name}={value}")
    return argv


def is_first_rank() -> bool:
    """Whether this process speaks for all, also before there is an Accelerator."""
    return int(os.environ.get("RANK", "0")) == 0


def is_secret(name: str) -> bool:
    """Whether a value of this name must not be recorded."""
    return name == "token" or name.endswith(SECRET_SUFFIXES)


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without secrets. A text like <image> is a model's special token, or masked already."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result[name] = masked(value)
        elif isinstance(value, str) and is_secret(str(name)) and not (value[:1] == "<" and value[-1:] == ">"):
            result[name] = f"<{name.upper()}>"
        else:
            result[name] = value
    return result


def masked_arguments(argv: Sequence[str]) -> list[str]:
    """A command line without the values of secret flags: wandb records it."""
    result: list[str] = []
    hides_next = False
    for token in argv:
        flag, equals, _ = token.partition("=")
        secret = flag.startswith("--") and is_secret(flag[2:].replace("-", "_").lower())
        result.append("<SECRET>" if hides_next else f"{flag}=<SECRET>" if secret and equals else token)
        hides_next = secret and not equals
    return result


def is_dumb_terminal() -> bool:
    """Whether the terminal can't go back to the beginning of a line."""
    return os.environ.get("TERM") == "dumb"


def plain(value: Any) -> Any:
    """The value in JSON types."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return str(value)
