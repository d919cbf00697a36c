"""What gives a secret away: its name, its form, its place in an address, and that this process was given it."""

from __future__ import annotations

import functools
import json
import os
import re
from urllib.parse import quote, unquote

MASK = "<SECRET>"
SHORTEST = 8  # a shorter value stands in other words by chance
WORDS = {"true", "false", "none", "null"}
# Names are compared in small letters, with `_`.
SECRET_NAME = re.compile(
    r"(^|_)(token|secrets?|secret_key|access_key|private_key|password|passwd|passphrase|authorization|auth|jwt|cookie|"
    r"credentials?)$|api_?keys?$"
)
# What is called like these is a secret only if it looks like one: a `key` is a column's name, too.
KEY_NAME = re.compile(
    r"^key$|(^|_)(wandb|openai|anthropic|azure|aws|hf|ssh|account|storage|encryption|signing|license|subscription|"
    r"service|user|admin|master|client|deploy)_key$"
)
LOOKS_LIKE_A_KEY = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=.-]{20,}")
NAMES_AN_ADDRESS = ("url", "uri", "proxy", "endpoint", "dsn")
# 40 hexadecimal digits are no form of a secret: a commit and a digest have it, too.
FORMS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{24,}"
    r"|wandb_v\d+_[A-Za-z0-9_-]{20,}|local-[0-9a-f]{40}"
    r"|sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|xox[a-z]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|nvapi-[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"
    r")",
    re.DOTALL,
)
SCHEME = re.compile(r"(?i)\b(bearer|basic)\s+(?=[A-Za-z_-]*[\d=])[\w.~+/=-]{8,}")
# The part before @ is hidden as a whole: a token stands in the place of the user as well. Without a password it is a
# user's name where that is usual: ssh://git@host.
LOGIN = re.compile(
    r"(?i)(https?://)[^\s/@\"'<>]{1,4000}@"
    r"|(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{1,20}://)[^\s/@:\"'<>]{0,400}:[^\s/@\"'<>]{0,4000}@"
    r"|(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{1,20}://)[^\s/@:\"'<>]{1,400}:(?!\d+/)[^\s@\"'<>]{1,400}@"
)
SIGNATURE = re.compile(r"(?i)([?&](?:[\w-]*signature|x-amz-credential|sig|key)=)[^&\s\"'<>]+")
# The secrets that the process was given by a mapping or a command line which calls them so.
_remembered: set[str] = set()


@functools.cache
def is_secret_name(name: str) -> bool:
    """Whether what is called like this is a secret: WANDB_API_KEY, accessToken, db_password."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
    return SECRET_NAME.search(snake) is not None


@functools.cache
def may_name_a_key(name: str) -> bool:
    """Whether what is called like this may be a secret, which its look decides."""
    return KEY_NAME.search(name.replace("-", "_").lower()) is not None


def is_secret(name: str, value: str) -> bool:
    """Whether a text of this name is one. `<image>` and `[PAD]` are a model's special tokens, or masked already."""
    if may_name_a_key(name):
        return LOOKS_LIKE_A_KEY.fullmatch(value) is not None
    is_special = value[:1] + value[-1:] in ("<>", "[]")
    return is_secret_name(name) and bool(value) and not is_special and value.lower() not in WORDS


def remember(secret: str) -> None:
    """Hide this text from here on, wherever it stands; one that stands everywhere by chance is not hidden."""
    if _is_telling(secret):
        _remembered.add(secret)


def without_forms(text: str) -> str:
    """Return a text without what is known, or shows without a name, to be a secret."""
    if "://" in text:
        text = LOGIN.sub(lambda found: f"{found[1] or found[2] or found[3]}{MASK}@", text)
    for secret in _known():
        text = text.replace(secret, MASK)
    text = FORMS.sub(MASK, text)
    text = SCHEME.sub(rf"\1 {MASK}", text)
    return SIGNATURE.sub(rf"\1{MASK}", text)


def _known() -> list[str]:
    secrets = tuple(os.environ.get(name, "") for name in os.environ if is_secret_name(name))
    addresses = tuple(os.environ.get(name, "") for name in os.environ if _names_an_address(name))
    return _written_forms(secrets, addresses, frozenset(_remembered))


@functools.cache
def _names_an_address(name: str) -> bool:
    return name.lower().endswith(NAMES_AN_ADDRESS)


@functools.lru_cache(maxsize=4)
def _written_forms(secrets: tuple[str, ...], addresses: tuple[str, ...], remembered: frozenset[str]) -> list[str]:
    """Return secrets, those in addresses too, in the forms that texts have them in; the longest first."""
    found = set(remembered)
    for value in secrets:
        found |= {value, value.strip(), *value.split()}
    for value in addresses:
        if (login := re.search(r"(?:://|^)[^/@]*:([^/@]+)@", value)) is not None:
            found |= {login[1], unquote(login[1])}
    telling = {secret for secret in found if _is_telling(secret)}
    written = {form for secret in telling for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""))}
    return sorted(written, key=len, reverse=True)


def _is_telling(secret: str) -> bool:
    """Whether a text is a secret wherever it stands: it is no word, no number and no path."""
    if len(secret) < SHORTEST or secret.isdigit() or MASK in secret:
        return False
    is_path = secret[0] in "/~" and os.path.exists(os.path.expanduser(secret))  # noqa: PTH110, PTH111 - a text
    return not is_path and (len(secret) >= 2 * SHORTEST or any(letter.isdigit() for letter in secret))
