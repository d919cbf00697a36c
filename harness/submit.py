"""`python -m harness.submit`: a training into SLURM's queue; see harness/commands/submit.py."""

from __future__ import annotations

import sys

from harness.commands.submit import main

if __name__ == "__main__":
    sys.exit(main())
