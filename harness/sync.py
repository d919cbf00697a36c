"""`python -m harness.sync`: offline runs go to W&B from a machine with internet; see harness/commands/sync.py."""

from __future__ import annotations

import sys

from harness.commands.sync import main

if __name__ == "__main__":
    sys.exit(main())
