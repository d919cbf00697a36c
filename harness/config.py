"""The parser: command line and YAML to frozen sections, each of which stands in a `flags.py` of its package."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import math
import os
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from harness.errors import ConfigError

RECIPES_DIR = Path(__file__).parent / "recipes"
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")

T = TypeVar("T")
Section = TypeVar("Section", bound=type)
# What a resume makes of another value than the checkpoint's:
# - unrelated: where a run is kept, who watches it, what one command asks for; no value that it computes hangs on it.
# - free: told, and taken: when something is logged, evaluated or saved, and how the same batches are computed.
# - checked: told, and judged by what it comes to: the global batch, precision, device, length.
# - refused: the run would go on with other numbers, and nothing would show it.
OnResume = Literal["unrelated", "free", "checked", "refused"]
PathKind = Literal["file", "folder", "model"]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """
    All that is known of a flag. Each is a field of a section, made by `arg`.

    - type: of its value without None: bool, int, float, str, list[str], or Json.
    - group: where `--help` shows it; is_common: whether `--help` alone does.
    - env: the variable that gives it where neither the command line nor anything else does.
    - mutable: whether --change_on_resume may give it another value in the middle of a training.
    - bare: its value where the flag is given without one.
    - path: what must be there if it is given: a file, a folder, or a model: what looks like a path and not the Hub.
    """

    name: str
    type: Any
    default: Any
    help: str
    group: str
    on_resume: OnResume
    mutable: bool = False
    env: str | None = None
    bare: Any = None
    path: PathKind | None = None
    is_common: bool

    def value_of(self, raw: Any) -> Any:
        """A value from a command line, a file or a variable in the flag's type. Raises ConfigError."""
        try:
            if self.type == list[str]:
                texts = [str(item) for item in raw] if isinstance(raw, list) else [str(raw)]
                return [at_home(text) for text in texts] if self.path else texts
            if isinstance(raw, list) and not issubclass(self.type, dict):
                raise ValueError(f"takes one value, not {len(raw)}")
            if issubclass(self.type, dict):
                return self.type(raw)
            text = json.dumps(raw) if isinstance(raw, dict) else str(raw)
            if self.path:
                return at_home(text)
            return _switch(text) if self.type is bool else _number_or_text(self.type, text)
        except ValueError as error:
            raise ConfigError(f"Argument --{self.name}: {error}. See --help {self.name}.") from error


def at_home(path: str) -> str:
    """Return a path with the home in place of its ~, which a shell leaves in `--flag=~/path`."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # the home of a user who is not known here
        return path


def _switch(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE


def _number_or_text(kind: Callable[[str], T], text: str) -> T:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"invalid {getattr(kind, '__name__', kind)} value: {text!r}") from error


def arg(
    default: Any = None,
    help: str = "",  # noqa: A002 - as in argparse
    *,
    on_resume: OnResume | None = None,
    mutable: bool = False,
    env: str | None = None,
    bare: Any = None,
    path: PathKind | None = None,
    common: bool = False,
) -> Any:
    """A flag as a field of a section: see Flag. What a resume makes of it may be said by the section for all."""
    facts = {"help": help, "on_resume": on_resume, "mutable": mutable, "env": env, "bare": bare, "path": path}
    facts["is_common"] = common
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


def section(group: str, *, on_resume: OnResume = "refused") -> Callable[[Section], Section]:
    """
    Put a dataclass of flags into a group of the help.

    `on_resume` holds for those that don't say it themselves: where nobody has judged a change, it is refused.
    """

    def stamp(cls: Section) -> Section:
        for field in dataclasses.fields(cls):
            own = {name: value for name, value in field.metadata.items() if value is not None}
            field.metadata = types.MappingProxyType({"group": group, "on_resume": on_resume, **own})
        return cls

    return stamp


@functools.cache
def flags_of(*sections: type) -> Mapping[str, Flag]:
    """The flags of some sections by name, in their order."""
    found: dict[str, Flag] = {}
    for each in sections:
        hints = typing.get_type_hints(each)
        for field in dataclasses.fields(each):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            kind = _without_none(hints[field.name])
            found[field.name] = Flag(name=field.name, type=kind, default=default, **field.metadata)
    return found


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) is not types.UnionType:
        return hint
    return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)


def release(package: str) -> tuple[int, int]:
    """Return (2, 13) for an installed package of version 2.13.0+cpu, without importing it."""
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


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


def together(checks: Iterable[Callable[[], object]]) -> None:
    """Run all checks. Raises one ConfigError of all that they refuse."""
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)


class _Parser(argparse.ArgumentParser):
    """An argparse that raises ConfigError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ". See --help.")


def build_parser(flags: Mapping[str, Flag]) -> argparse.ArgumentParser:
    """An argparse parser of the flags, which gives the texts of those that are there."""
    parser = _Parser(prog="harness train", allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for name, flag in flags.items():
        options: dict[str, Any] = {"dest": name, "help": flag.help.replace("%", "%%")}
        bare = True if flag.type is bool else flag.bare
        if flag.type == list[str]:
            options["nargs"] = "+"
        elif bare is not None:
            options |= {"nargs": "?", "const": bare}
        parser.add_argument(*_spellings(name), **options)
        if flag.default is True:
            parser.add_argument(*_spellings(f"no_{name}"), dest=name, action="store_const", const=False)
    return parser


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def read_argv(
    argv: Sequence[str], flags: Mapping[str, Flag], refused: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """
    What a command line gives, still as text, by flag; and what is wrong with it.

    That is flags which are unknown, misspelt, repeated, in `refused` (which says why), or without the value they need.
    """
    problems: list[str] = []
    known: list[str] = []
    given: Counter[str] = Counter()
    takes = True
    for token in argv:
        if token.startswith("--"):
            name = _name_of(token, flags)
            given[name] += 1
            fault = why_unknown(name, f"--{name}", flags, refused)
            problems += [fault] if fault and given[name] == 1 else []
            takes = fault is None and given[name] == 1
        if takes:
            known.append(token)
    problems += [f"--{name} is given {n} times; give it once." for name, n in given.items() if n > 1 and name in flags]
    try:
        namespace, rest = build_parser(flags).parse_known_args(known)
    except ConfigError as error:
        return {}, [*problems, *error.problems]
    problems += [f"{rest[0]} belongs to no flag; values follow their flag: --flag value."] if rest else []
    return vars(namespace), problems


def build_sections(sections: Sequence[type], raw: Mapping[str, Any]) -> list[Any]:
    """Each section from the values, in its flags' types; None: the default. Raises one ConfigError for all of them."""
    built: list[Any] = []

    def build(cls: type) -> None:
        flags = [flag for name, flag in flags_of(cls).items() if raw.get(name) is not None]
        values: dict[str, Any] = {}
        together(functools.partial(_put_value, values, flag, raw[flag.name]) for flag in flags)
        built.append(cls(**values))

    together(functools.partial(build, cls) for cls in sections)
    return built


def _put_value(values: dict[str, Any], flag: Flag, raw: Any) -> None:
    values[flag.name] = flag.value_of(raw)


def read_yaml(
    source: str, flags: Mapping[str, Flag], *, refused: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """
    What a YAML file, or a shipped recipe by its name, gives by flag; and what is wrong with it.

    That is a missing file, broken YAML, or keys that are repeated, unknown or in `refused` (which says why).
    """
    path = Path(source)
    if not path.is_file():
        if not (RECIPES_DIR / f"{source}.yaml").is_file() or source != Path(source).name:
            known = ", ".join(recipe_names())
            return {}, [f"--config={source}: no such file, and no shipped recipe of that name; recipes: {known}."]
        path = RECIPES_DIR / f"{source}.yaml"
    try:
        values = load_yaml(path)
    except ValueError as error:
        return {}, [f"--config={source} is not valid YAML: {error}"]
    if not isinstance(values, dict):
        return {}, [f"--config={source} holds no mapping; write one `flag: value` a line."]
    if is_sweep(values):
        return {}, [f"--config={source} is the file of a sweep: harness sweep {source}."]
    faults = {str(key): why_unknown(str(key), f"{path.name}: {key}", flags, refused) for key in values}
    good = {name: value for name, value in values.items() if faults[str(name)] is None}
    return good, [fault for fault in faults.values() if fault is not None]


def recipe_names() -> list[str]:
    """The names of the shipped recipes; the files of sweeps that stand beside them are none."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml") if not is_sweep(load_yaml(path)))


def is_sweep(values: Any) -> bool:
    """Whether what a YAML file holds is a sweep, not the flags of a training."""
    return isinstance(values, dict) and {"method", "parameters"} <= values.keys()


def load_yaml(path: Path) -> Any:
    """What a YAML file holds; a key that is given twice is an error. Raises ValueError that says what is wrong."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_NoDuplicates)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(_without_source(error)) from None


def _without_source(error: Exception) -> str:
    """Return what is wrong and where; not the line itself, which may hold a password."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'it can not be read'}"


class _NoDuplicates(yaml.SafeLoader):
    """YAML lets a later key win silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value)
        for key, count in keys.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given {count} times", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def _name_of(token: str, flags: Mapping[str, Flag]) -> str:
    name = token[2:].split("=", 1)[0].replace("-", "_")
    positive = name.removeprefix("no_")
    return positive if name not in flags and positive in flags else name


def why_unknown(name: str, shown: str, flags: Mapping[str, Flag], refused: Mapping[str, str]) -> str | None:
    """Say why a name is no flag; `shown` is how it was written. None if it is one."""
    if name in flags:
        return None
    if name in refused:
        return f"{shown} is not supported: {refused[name]}."
    near = difflib.get_close_matches(name, flags, n=1)
    hint = f" Did you mean {near[0]}?" if near else " See --help for all flags."
    return f"{shown} is not a known flag.{hint}"


def is_first_rank() -> bool:
    """Whether this process speaks for all, also before there is an Accelerator."""
    return int(os.environ.get("RANK", "0")) == 0


def variable(name: str) -> str:
    """Return what an environment variable holds; an empty text if it is not set."""
    return os.environ.get(name, "")


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
