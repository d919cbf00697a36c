"""
What messages, logs and records go through before they leave the process: `masked` hides keys and passwords.

A value that is masked is only shown and recorded; the training goes on with the value itself. Of a masked value nothing
can be found out again, so a resume takes it for equal (`agree`). What gives a secret away stands in `signs.py`.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from harness.masking.signs import MASK, SHORTEST, is_secret, is_secret_name, may_name_a_key, remember, without_forms

__all__ = ["agree", "is_masked", "is_secret_name", "masked", "masked_words", "tracebacks_masked"]

# Most texts hold none of these, and are searched no further.
HINT = re.compile(r"(?i)token|secret|key|passw|passphrase|auth|jwt|cookie|credential")
# Lengths are bounded, so that long texts take no long time.
# name=value, name: value, and the same in JSON and in Python, also inside a text that has escaped its quotes.
PAIR = re.compile(
    r"(?i)(?P<before>(?P<q>\\{0,4}[\"']?)(?<![\w-])(?P<name>[\w-]*(?:token|secrets?|keys?|password|passwd|passphrase|"
    r"authorization|auth|jwt|cookie|credentials?))(?P=q)(?P<sign>\s*(?:=>|[:=])\s*))"
    r"(?:(?P<q2>\\{0,4}[\"'])(?P<quoted>.{0,20000}?)(?<!\\)(?P=q2)|(?P<bare>[^\s,;&\"'<>(){}\[\]\\]+))",
    re.DOTALL,
)
FLAG = re.compile(r"(?P<before>(?<![\w-])--(?P<name>[\w-]+)\s+[\"']?)(?P<value>[^\s\"'<>]+)")


def masked(value: Any, name: str = "") -> Any:
    """
    Return a value as it may be shown and recorded: without keys and passwords, in mappings, lists and texts.

    A secret is what its `name` says is one, what has the form of one, a login in an address, and what stands in a
    variable of the environment that is called like a secret. What a mapping or a command line has called a secret is
    hidden in each text that follows.
    """
    if isinstance(value, Mapping):
        return {key: masked(item, _telling(str(key), name)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(masked(item, name) for item in value)
    if isinstance(value, str):
        return _masked_text(value, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_hidden = is_number and is_secret_name(name) and not name.lower().endswith("token")
    return f"<{name.upper()}>" if is_hidden else value


def masked_words(words: Sequence[str]) -> list[str]:
    """Return a command line as it may be shown and recorded."""
    result: list[str] = []
    hides_next = False
    for word in words:
        flag, equals, value = word.partition("=")
        is_flag = flag.startswith("--")
        names_secret = is_flag and is_secret_name(flag[2:])
        if hides_next or (names_secret and equals):
            remember(word if hides_next else value)
            result.append(MASK if hides_next else f"{flag}={MASK}")
        else:
            result.append(f"{flag}={masked(value)}" if is_flag and equals else masked(word))
        hides_next = names_secret and not equals
    return result


def is_masked(value: Any, name: str = "") -> bool:
    """Whether a value, or a part of it, is what `masked` has put into a secret's place."""
    if isinstance(value, Mapping):
        return any(is_masked(item, _telling(str(key), name)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(is_masked(item, name) for item in value)
    names_secret = is_secret_name(name) or may_name_a_key(name)
    return isinstance(value, str) and (MASK in value or (names_secret and value == f"<{name.upper()}>"))


def agree(one: Any, other: Any, name: str = "") -> bool:
    """Whether two values are equal but for their secrets: what is masked in one may be anything in the other."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(agree(one[key], other[key], _telling(str(key), name)) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(agree(a, b, name) for a, b in zip(one, other, strict=True))
    if isinstance(one, str) and isinstance(other, str):
        return one == other or _fits(one, other, name) or _fits(other, one, name)
    return bool(one == other)


@contextmanager
def tracebacks_masked() -> Iterator[None]:
    """Of an error that leaves the block, and that nobody catches, let Python print the traceback without secrets."""

    def show(_: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        print(_masked_traceback(error, at), end="", file=sys.stderr, flush=True)

    try:
        yield
    except Exception:
        sys.excepthook = show  # only now: wandb puts one of its own into its place when a run opens
        raise


def _masked_traceback(error: BaseException, at: TracebackType | None) -> str:
    """Return an error's traceback; its lines of source keep what looks like a name and its value: `token=token`."""
    lines = "".join(traceback.format_exception(type(error), error, at)).splitlines(keepends=True)
    return "".join(without_forms(line) if line.startswith("  ") else masked(line) for line in lines)


def _telling(name: str, of_all: str) -> str:
    """Return the name that says whether a value is a secret: its own, or that of the mapping it stands in."""
    return name if is_secret_name(name) or (may_name_a_key(name) and not of_all) else of_all


def _masked_text(text: str, name: str) -> str:
    if is_secret(name, text):
        if is_secret_name(name):
            remember(text)
        return f"<{name.upper()}>"
    if text[:1] + text[-1:] in ("{}", "[]"):
        with suppress(ValueError, RecursionError):  # no JSON, or too many lists in lists: by its words
            if (hidden := masked(values := json.loads(text))) != values:
                return json.dumps(hidden)
    text = without_forms(text)
    if HINT.search(text) is None:
        return text
    return FLAG.sub(_without_word, PAIR.sub(_without_value, text))


def _without_value(found: re.Match[str]) -> str:
    """Return a pair of a name and its value with the value hidden if it is a secret."""
    value = found["bare"] if found["quoted"] is None else found["quoted"]
    is_prose = not found["q"] and found["quoted"] is None and ":" in found["sign"]
    if not (_is_given if is_prose else is_secret)(found["name"], value):
        return found[0]
    mark = found["q2"] or ""
    return f"{found['before']}{mark}{MASK}{mark}"


def _without_word(found: re.Match[str]) -> str:
    """Return a flag and the word that follows it, which is hidden if it is a secret."""
    return found["before"] + MASK if _is_given(found["name"], found["value"]) else found[0]


def _is_given(name: str, word: str) -> bool:
    """Whether the word behind a name is its value, and not the sentence that goes on: `--token for downloads`."""
    looks_like_one = len(word) >= SHORTEST and (any(letter.isdigit() for letter in word) or len(word) >= 20)
    return looks_like_one and is_secret(name, word)


def _fits(pattern: str, text: str, name: str) -> bool:
    """Whether a masked text may stand for another."""
    if not is_masked(pattern, name):
        return False
    parts = map(re.escape, pattern.split(MASK))
    return MASK not in pattern or re.fullmatch(".*".join(parts), text, re.DOTALL) is not None
