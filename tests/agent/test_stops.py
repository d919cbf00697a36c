"""What a signal means under a sweep agent: W&B is asked, by rank zero, and all ranks stop for the same reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from accelerate import Accelerator

from harness.training.stopping import Agent, Stop, StopReason, stopped
from tests.support.launching import ROOT, free_port


def reason(*, wants_a_stop: bool | None, orphan: bool = False, sends: bool = True) -> StopReason:
    agent = None
    if wants_a_stop is not None or orphan:
        agent = Agent(is_gone=lambda: orphan, was_stopped=lambda: bool(wants_a_stop))
    stop = Stop(Accelerator(cpu=True), requested=lambda: False, agent=agent)
    with stop.listening():
        if sends:
            os.kill(os.getpid(), signal.SIGTERM)
        return stop.agreed()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"wants_a_stop": None}, StopReason.PREEMPTED),
        ({"wants_a_stop": False}, StopReason.PREEMPTED),
        ({"wants_a_stop": True}, StopReason.REQUESTED),
        ({"wants_a_stop": True, "sends": False}, StopReason.NONE),
        ({"wants_a_stop": False, "sends": False, "orphan": True}, StopReason.ORPHANED),
        ({"wants_a_stop": True, "sends": False, "orphan": True}, StopReason.REQUESTED),
        ({"wants_a_stop": False, "orphan": True}, StopReason.ORPHANED),
    ],
)
def test_a_signal_is_a_stop_from_the_app_where_w_and_b_says_so(
    given: dict[str, bool | None], expected: StopReason
) -> None:
    assert reason(**given) == expected  # type: ignore[arg-type]


def test_who_lost_the_agent_wants_to_be_started_again() -> None:
    ended = stopped(StopReason.ORPHANED, at="step 3 of 9", saved_in=ROOT, until=9)
    assert (ended.exit_code, ended.was_preempted) == (85, True)
    assert str(ended).startswith("The sweep agent, or the launcher under it, has ended: stopped at step 3 of 9: saved")


RANK = """
import os, signal
from accelerate import Accelerator
from harness.training.stopping import Agent, Stop
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
is_main = accelerator.is_main_process
stop = Stop(accelerator, requested=lambda: False, agent=Agent(was_stopped=lambda: is_main))
with stop.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    print([stop.agreed().name for _ in range(2)], flush=True)
    stop.settled()
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
def test_all_ranks_hear_what_w_and_b_says_to_rank_zero() -> None:
    port = str(free_port())
    ranks = []
    for rank in range(2):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        env = {**os.environ, **names, **meet}
        ranks.append(subprocess.Popen([sys.executable, "-c", RANK], env=env, stdout=subprocess.PIPE, text=True))
    assert [rank.communicate(timeout=250)[0] for rank in ranks] == ["['NONE', 'REQUESTED']\n"] * 2
    assert [rank.returncode for rank in ranks] == [0, 0]
