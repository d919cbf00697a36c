"""
Hold signals that arrive during start-up until the training listens for them, instead of losing them.

A job script ignores SIGUSR1 and SIGTERM so that they don't kill the launcher, and its children inherit that. SLURM
sends --signal up to a minute early, and start-up takes time: imports, data, W&B. This file imports nothing slow.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send; with SLURM's --signal the user chooses


def hold() -> None:
    """Block those of SIGNALS that are ignored: Linux keeps a blocked signal pending until it is unblocked."""
    ignored = {each for each in SIGNALS if signal.getsignal(each) == signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
