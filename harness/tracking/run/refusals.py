"""What W&B's server refuses for good, and what to change: not an outage, which passes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Of the answers that begin with 4: too slow, too early, too often.
PASSING = (408, 425, 429)
NO_MESSAGE = "<no message>"
STATUS = re.compile(r"(?:returned error|HTTP) (\d{3}): ?(.*)")
MESSAGE = re.compile(r'"message": ?"((?:[^"\\]|\\.)*)"')
OF_THE_KEY = ("logged in", "log in", "api key", "api_key", "unauthorized", "authentication")
OF_ITS_PLACE = ("permission", "forbidden", "not found", "entity", "access")


def why_refused(error: Exception, init_kwargs: Mapping[str, Any]) -> str | None:
    """
    Say what W&B has refused when `wandb.init` was called, and what to change; None if it may be an outage.

    wandb repeats what may pass until its time is up; a 409, of a run that was deleted, too.
    """
    from wandb.errors import AuthenticationError, CommError

    text, status = str(error), None
    if (found := STATUS.search(" ".join(text.split()))) is not None:
        status, text = int(found[1]), found[2].partition(" Consider increasing")[0]
        if not 400 <= status < 500 or status in PASSING:
            return None
        if (message := MESSAGE.search(text)) is not None:
            text = message[1]
    elif isinstance(error, AuthenticationError):
        status = 401
    elif not isinstance(error, CommError) or _is_outage(text):
        return None
    said = "" if text == NO_MESSAGE else " ".join(text.split())[:300]
    return f"W&B refuses the run ({said or 'without a reason'}); {_remedy(said, status, init_kwargs)}"


def _is_outage(text: str) -> bool:
    # wandb raises the same error for both. With a status it has been judged by that.
    return text.startswith("Failed to get resume status") or any(
        words in text.lower() for words in ("timed out", "deadline exceeded", "giving up", "connection")
    )


def _remedy(said: str, status: int | None, init_kwargs: Mapping[str, Any]) -> str:
    words = said.lower()
    if status == 409 or "deleted" in words:
        return (
            f"give another --wandb_run_id (WANDB_RUN_ID) than {init_kwargs.get('id')}, or none; a training that "
            "resumes goes on as a new run with --wandb_fork"
        )
    if status == 401 or any(word in words for word in OF_THE_KEY):
        return "run `wandb login --relogin`, or put WANDB_API_KEY right"
    place = (
        f"--wandb_entity={init_kwargs.get('entity') or '(your own)'} (WANDB_ENTITY) must be you or a team of yours, "
        f"and let you write to --wandb_project={init_kwargs.get('project')} (WANDB_PROJECT)"
    )
    if status in (403, 404) or any(word in words for word in OF_ITS_PLACE):
        return place
    return "put right what it names" if said else f"{place}; and its key must be good: `wandb login --relogin`"
