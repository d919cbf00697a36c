"""
`python -m tests.faults --kills 200 --seed 1`: kill trainings, compare what becomes of them, print a table.

Ends with 1 if anything is wrong. Run again with the same folder it goes on where it was ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from tests.faults.compare import VERDICTS
from tests.faults.laboratory import Laboratory, Result, append, results_in
from tests.faults.plan import configurations, draw_case


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, required=True, help="go on until so many kills have struck")
    parser.add_argument("--seed", type=int, default=None, help="default: the time; it is printed")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="default: both, in turn")
    parser.add_argument("--launch", default="ddp", help="launch config of two processes: ddp, zero2, fsdp2 ...")
    parser.add_argument("--tracking", choices=("none", "offline", "online"), help="default: all, in turn")
    parser.add_argument("--trainer", action="store_true", help="kill transformers.Trainer instead, for its figures")
    parser.add_argument("--packing", action="store_true", help="documents in packed rows, of data and of a stream")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/harness-faults"), help="results.jsonl is there")  # noqa: S108
    parser.add_argument("--case", type=int, help="play the case of this number alone, and print what it came to")
    parser.add_argument("--pin_run_id", action="store_true", help="give our run its id in W&B, as the Trainer's")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = parse(argv)
    signal.signal(signal.SIGTERM, _end)
    # A shell's background job ignores Ctrl-C, and so would the trainings.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = int(time.time()) if asked.seed is None else asked.seed
    processes = 2 if asked.launch != "ddp" else asked.processes
    among = configurations(
        processes=processes,
        tracking=asked.tracking,
        trainer=asked.trainer,
        launch=asked.launch,
        packing=asked.packing,
    )
    print(f"seed {seed}: {', '.join(each.label for each in among)}; in {asked.folder}", flush=True)
    results_path = asked.folder / "results.jsonl"
    labels = {each.label for each in among}
    with Laboratory(asked.folder, pins_run_id=asked.pin_run_id) as laboratory:
        if asked.case is not None:
            result = laboratory.run(draw_case(seed, asked.case, among))
            print(result)
            return 1 if result.verdicts else 0
        done = {each.name: each for each in results_in(results_path) if each.seed == seed}
        kills = index = 0
        while kills < asked.kills:
            case = draw_case(seed, index, among)
            if case.name not in done:
                done[case.name] = laboratory.run(case)
                append(results_path, done[case.name])
                print(line(done[case.name]), flush=True)
            kills += len(done[case.name].kills)
            index += 1
    return summary([each for each in done.values() if each.configuration in labels])


def _end(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def line(result: Result) -> str:
    """A case in a line, and what is wrong with it in more."""
    killed = ", ".join(f"{kill['kind']}@{kill['moment']}:{kill['step']}" for kill in result.kills)
    verdict = "fine" if not result.verdicts else f"WRONG {result.verdicts}, kept in {result.kept}"
    more = "".join(f"\n    {detail}" for detail in result.details)
    return f"{result.name}: {killed}; {result.attempts} attempts, {result.seconds:.0f} s; {verdict}{more}"


def summary(results: list[Result]) -> int:
    """Print the tables; returns the exit code."""
    print("\nby configuration")
    print(f"{'':28}{'cases':>6}{'kills':>6}{'s/kill':>7}  verdicts that are not 0")
    for label in [*sorted({each.configuration for each in results}), "all"]:
        chosen = [each for each in results if label in ("all", each.configuration)]
        kills, seconds = sum(len(each.kills) for each in chosen), sum(each.seconds for each in chosen)
        wrong = sum((Counter(each.verdicts) for each in chosen), Counter())
        shown = ", ".join(f"{name} {wrong[name]}" for name in VERDICTS if wrong[name]) or "none"
        print(f"{label:28}{len(chosen):6}{kills:6}{seconds / max(kills, 1):7.1f}  {shown}")
    for name in ("kind", "moment"):
        print(f"\nby {name}{'':20}kills, of these in cases that went wrong")
        counted = Counter(_of_kills(results, name))
        wrong = Counter(_of_kills([each for each in results if each.verdicts], name))
        for each, number in sorted(counted.items()):
            print(f"{each:28}{number:6}{wrong[each]:6}")
    return 1 if any(each.verdicts for each in results) else 0


def _of_kills(results: list[Result], name: str) -> Iterable[str]:
    return (kill[name] for each in results for kill in each.kills)


if __name__ == "__main__":
    sys.exit(main())
