"""Judge what the quickstart left: `python .ci/check_quickstart.py RUNS_DIR`, where RUNS_DIR holds that one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

MOST_TRAINING_SECONDS = 180


def faults(output_dir: Path) -> list[str]:
    """What is wrong with the run in this folder; empty if all is well."""
    found = []
    AutoModelForCausalLM.from_pretrained(output_dir)  # raises if the folder holds no model
    seconds = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))["train_runtime"]
    if seconds > MOST_TRAINING_SECONDS:
        found.append(f"the training took {seconds:.0f} s, more than {MOST_TRAINING_SECONDS}")
    last = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if len(losses) < 2 or not losses[-1] < losses[0]:
        found.append(f"eval_loss in {last.name} does not fall: {losses}")
    print(f"{output_dir.name}: {seconds:.1f} s of training, eval_loss {losses}")
    return found


def main() -> int:
    """Returns the exit code: 0 if there is one run and nothing is wrong with it."""
    runs = sorted(Path(sys.argv[1]).iterdir())
    if len(runs) != 1:
        print(f"{sys.argv[1]} should hold one run, not {len(runs)}", file=sys.stderr)
        return 1
    found = faults(runs[0])
    for fault in found:
        print(f"{runs[0].name}: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
