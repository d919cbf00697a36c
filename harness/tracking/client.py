"""W&B's public interface, for what is asked of the server outside a run. It never prompts."""

from __future__ import annotations

from typing import Any

from harness.errors import UnreachableError
from harness.tracking.run.open import one_line, server_answers

API_TIMEOUT_SECONDS = 30


def open_api(source: str, *, silent: bool = False) -> Any:
    """
    The `wandb.Api` of the user; `source` is who asks. `silent` holds for all that this process does with wandb.

    Raises UnreachableError without credentials or server.
    """
    import wandb
    from wandb.sdk.lib.wbauth import HostUrl, authenticate_session

    settings = (wandb.setup(wandb.Settings(silent=True)) if silent else wandb.setup()).settings
    host = HostUrl(settings.base_url, app_url=settings.app_url)
    if not (settings.api_key or authenticate_session(host=host, source=source, prompt=False, update_session=False)):
        raise UnreachableError("No W&B credentials found: run `wandb login`, or set WANDB_API_KEY.")
    if not server_answers(settings.base_url):
        raise UnreachableError(f"W&B can't be reached at {settings.base_url}.")
    try:
        return wandb.Api(timeout=API_TIMEOUT_SECONDS)
    except wandb.Error as error:
        raise UnreachableError(f"W&B refuses the credentials: {one_line(error)}") from error
