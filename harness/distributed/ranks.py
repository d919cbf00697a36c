"""Communication among ranks: share rank zero's answer, agree on an error, and prepare data one rank after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from harness.errors import ConfigError, RankError

Answer = TypeVar("Answer")

# `init_process_group(init_method=...)`: torch's "env://", with keys of its own for each process group.
OWN_KEYS = "harness-env://"

# Time for the failing rank to print its traceback before the other ranks end and the launcher kills all.
SECONDS_FOR_TRACEBACK = 3.0


_stores: list[Store] = []  # kept: without an agent, rank zero's has the server in it


def _meet(url: str, **kwargs: Any) -> Iterator[tuple[Store, int, int]]:
    # A launcher's store outlives the process group. A second run of the same processes would find the addresses of the
    # first there, if rank zero ends that one later than the others, and connect to what is closed.
    store, rank, world_size = next(rendezvous("env:" + url.partition(":")[2], **kwargs))
    _stores.append(store)
    yield PrefixStore(f"group{len(_stores)}", store), rank, world_size


register_rendezvous_handler(OWN_KEYS.removesuffix("://"), _meet)  # type: ignore[no-untyped-call]


def ranks_of(accelerator: Accelerator) -> tuple[int, int]:
    """Return the index of this rank, and the number of ranks."""
    return accelerator.process_index, accelerator.num_processes


def settle() -> None:
    """
    Local: let gloo's threads free the tensors of the last collective; call it before a process may end.

    They need the interpreter's lock for that, and torch's destructor of the process group waits for them while it holds
    the lock: a rank that ends right after a collective then hangs for ever (seen with torch 2.13).
    """
    if torch.distributed.is_initialized():
        time.sleep(0.1)


def close_group(*, together: bool) -> None:
    """
    Close the process groups, before the process may end. Collective if `together`, else local.

    Closing waits for the collectives under way, so a rank that fails alone must not: it aborts NCCL's, as torch's own
    destructor does at the exit, in an order that is left to chance. Gloo's end with the process.
    """
    if not torch.distributed.is_initialized():
        return
    settle()
    if together:
        torch.distributed.destroy_process_group()
    elif "nccl" in torch.distributed.get_backend_config():
        torch.distributed.distributed_c10d._abort_process_group()


def gloo_group(accelerator: Accelerator) -> torch.distributed.ProcessGroup:
    """Collective: make a process group of all ranks that needs no device, with the timeout of the Accelerator's own."""
    own = accelerator.init_handler
    timeout = None if own is None else own.timeout
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=timeout)
    return group


def tell_all(accelerator: Accelerator, answer: Callable[[], Answer]) -> Answer:
    """
    Collective: run `answer` on rank zero only; every rank returns its result, or raises its ConfigError.

    The result must be picklable: it goes through torch.distributed's object broadcast among our own ranks.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = answer()
        except ConfigError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ConfigError(outcome[1])
    result: Answer = outcome[0]
    return result


def agree(accelerator: Accelerator, error: BaseException | None) -> str | None:
    """Collective: return the first error message of any rank, the same on all; None if no rank has one."""
    message = None if error is None else f"{error}" or type(error).__name__
    if accelerator.num_processes == 1:
        return message
    messages: list[str | None] = gather_object([message])
    return next((found for found in messages if found is not None), None)


def is_first(accelerator: Accelerator, *, local: bool) -> bool:
    """Whether this is the first rank of its node (`local`), or of all."""
    return bool(accelerator.is_local_main_process if local else accelerator.is_main_process)


def main_process_first(
    accelerator: Accelerator, build: Callable[[], Answer], *, local: bool = True, at_once: bool = False
) -> Answer:
    """
    Collective: run `build` on the first rank of each node, then on the others, which find its caches filled.

    If not `local`, it runs first on rank zero only; with `at_once` on all ranks together, where `build` is collective
    itself. An error of one rank ends all of them, on every node: a ConfigError is raised on all, another error on its
    own rank, and a RankError on the others.
    """
    if at_once:
        return build()  # a rank that fails must end: the others may wait inside until the launcher kills them
    results: list[Answer] = []
    for turn in (True, False):
        failure: Exception | None = None
        if is_first(accelerator, local=local) == turn:
            try:
                results.append(build())
            except Exception as error:  # raised after all ranks know of it
                failure = error
        _raise_together(accelerator, failure)
    return results[0]


def _raise_together(accelerator: Accelerator, failure: Exception | None) -> None:
    crash = None if isinstance(failure, ConfigError) else failure
    crashed = agree(accelerator, crash)
    message = agree(accelerator, failure if crash is None else None)
    if crash is not None:
        raise crash
    if crashed is not None:
        time.sleep(SECONDS_FOR_TRACEBACK)
        raise RankError(f"Another rank has failed: {crashed}")
    if message is not None:
        raise ConfigError(message) from failure
