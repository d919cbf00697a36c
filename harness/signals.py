"""
Signals that came too early: held until the training listens, instead of being lost.

A job script ignores SIGUSR1 and SIGTERM so that they don't kill the launcher, and its children inherit that. SLURM
sends --signal up to a minute early, and a start takes its time: imports, data, W&B. This file imports nothing slow.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send; SLURM's --signal is one's own choice


def hold() -> None:
    """Block those of SIGNALS that are ignored: Linux keeps a blocked signal until it is unblocked."""
    ignored = {each for each in SIGNALS if signal.getsignal(each) == signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
