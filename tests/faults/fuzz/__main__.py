"""
`python -m tests.faults.fuzz --cases 2000 --seed 0`: damage what a resume reads, resume, and compare what comes of it.

A training of 6 steps has left checkpoint-2 and checkpoint-4. A case damages one file of checkpoint-4 and goes on, by
`auto` or by its path, in a process that is forked from one with all libraries loaded, so that a crash is seen. It must

- end with 0, with the numbers of a resume from the whole checkpoint-4 or from checkpoint-2, or
- end with 2 and one line, without a traceback.

What is damaged: bytes (flipped, zeroed), the length (cut, empty, gone, longer), or what is inside (JSON, torch's files,
the headers of safetensors: types, names, shapes changed, entries removed or added). In half of the cases the manifest
and the checksums are made to fit again, as somebody would do who means harm.

No schema can know that a number is another one than was saved. Where digests fit, or there are none, a case may come to
other numbers if the damaged file has the same structure as before: the same names, types, shapes and dtypes, and
differs in values alone. Such cases are counted as `values`; they too must end with 0 or with 2 and one line.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import harness.execute  # noqa: F401 - before the first fork
from harness.checkpoint.manifest import STATE_FILE, digest_of_manifest
from harness.files import digest_of
from harness.train import main as train
from tests.faults.fuzz.damage import damaged, same_structure
from tests.support.parity import TASK, TRAINING, as_flags, history, run_trainer

STEPS, OLDER, NEWER = 6, 2, 4
VERDICTS = ("older", "refused", "no harm", "values", "WRONG")
SECONDS, GIBIBYTES = 90, 12
SETTINGS: dict[str, Any] = {**TRAINING, "max_steps": STEPS, "save_strategy": "steps", "report_to": "none"}
# By name: the flags, and what is made of the folder of a checkpoint afterwards.
LAYOUTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "trainer": {},
    "adafactor": {"optim": "adafactor"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "parts": {},
    "adapter": {"use_peft": True},
}


@dataclass(frozen=True)
class Case:
    """One damage: of which layout, whether it is made to fit again, and how the training is told to go on."""

    number: int
    seed: int
    layout: str
    how: str
    fits: bool


def draw(seed: int, number: int, layouts: list[str]) -> Case:
    """Return the case of a number; each is drawn on its own."""
    chance = random.Random(f"{seed}/{number}")
    return Case(
        number=number,
        seed=chance.randrange(2**32),
        layout=layouts[number % len(layouts)],
        how=chance.choice(("auto", "auto", "path")),
        fits=chance.random() < 0.5,
    )


def forked(act: Callable[[], int], out: Path) -> int:
    """Return the exit code of a function in a process of its own, negative for a signal; it writes into `out`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(descriptor, number)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
            faulthandler.enable(file=2)
            resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS)
            torch.set_num_threads(1)
            code = act()
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Fuzzer:
    """The folders with the whole checkpoints, and the numbers that a resume from each of them comes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, dict[int, Any]] = {}

    def flags(self, layout: str, output_dir: Path, how: str) -> list[str]:
        settings = {**SETTINGS, **LAYOUTS[layout], "save_steps": STEPS, "resume_from_checkpoint": how}
        return as_flags({"task": TASK, "output_dir": output_dir, **settings, "use_cpu": True})

    def prepare(self, layout: str) -> None:
        """Make the checkpoints of a layout, and the numbers that follow from each."""
        made, whole = self.folder / f"{layout}-made", self.folder / layout
        assert forked(lambda: self._train(layout, made), self.folder / "out") == 0, (self.folder / "out").read_text()
        for step in (OLDER, NEWER):
            shutil.copytree(made / f"checkpoint-{step}", whole / f"checkpoint-{step}")
        self.expected[layout] = {}
        for step in (OLDER, NEWER):
            target = self.folder / f"{layout}-{step}"
            shutil.copytree(whole, target)
            flags = self.flags(layout, target, str(target / f"checkpoint-{step}"))
            assert forked(lambda flags=flags: train(flags), self.folder / "out") == 0, (self.folder / "out").read_text()
            self.expected[layout][step] = numbers(target, step)

    def _train(self, layout: str, folder: Path) -> int:
        settings = {**SETTINGS, **LAYOUTS[layout], "save_steps": OLDER}
        if layout == "trainer":
            run_trainer(folder, {name: value for name, value in settings.items() if name != "report_to"})
            return 0
        code = train(as_flags({"task": TASK, "output_dir": folder, **settings, "use_cpu": True}))
        if layout == "parts":
            for step in (OLDER, NEWER):
                in_parts(folder / f"checkpoint-{step}")
        return code

    def play(self, case: Case) -> tuple[str, str]:
        """Return what a case came to, and what was damaged."""
        target, out = self.folder / "case", self.folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.folder / case.layout, target)
        checkpoint = target / f"checkpoint-{NEWER}"
        told = self.folder / "told"

        def act() -> int:
            told.write_text(damaged(checkpoint, random.Random(case.seed), fits=case.fits), encoding="utf-8")
            if case.fits:
                make_fit(checkpoint)
            return train(self.flags(case.layout, target, str(checkpoint) if case.how == "path" else case.how))

        code = forked(act, out)
        shown, what = out.read_text(encoding="utf-8", errors="replace"), told.read_text(encoding="utf-8")
        return self._judge(case, code, shown, told=what), what

    def _judge(self, case: Case, code: int, shown: str, *, told: str) -> str:
        if code not in (0, 2):
            return f"WRONG: {'hangs' if code == -signal.SIGALRM else f'exit code {code}'}"
        if "Traceback" in shown:
            return "WRONG: a traceback"
        lines = shown.strip().splitlines()
        if code == 2:
            said = [i for i, line in enumerate(lines) if line.startswith("harness train: ")]
            return "refused" if said == [len(lines) - 1] else "WRONG: not one line"
        target = self.folder / "case"
        source = next((step for step in (OLDER, NEWER) if f"checkpoint-{step}, step {step} of" in shown), 0)
        if source and numbers(target, source) == self.expected[case.layout][source]:
            return "older" if source == OLDER else "no harm"
        if case.layout == "trainer" and "has no random state for this rank" in shown and "rng" in told:
            return "values"  # as in the Trainer, which warns too
        whole = self.folder / case.layout / f"checkpoint-{NEWER}"
        checks = case.fits or case.layout == "trainer"
        act = lambda: 0 if same_structure(whole, target / f"checkpoint-{NEWER}", torn=not case.fits) else 3  # noqa: E731
        if source == NEWER and checks and forked(act, self.folder / "compared") == 0:
            return "values"
        return f"WRONG: other numbers than from checkpoint-{source}"


def numbers(folder: Path, step: int) -> Any:
    """Return what a training that went on from a step has come to: its history since, and digests of its weights."""
    weights = {file.name: digest_of(file) for file in folder.glob("*model*.safetensors")}
    return json.dumps([row for row in history(folder) if row.get("step", 0) > step], sort_keys=True), weights


def make_fit(checkpoint: Path) -> None:
    """Write the sizes and digests of the files into the manifest, if there is one that can be read."""
    manifest = checkpoint / STATE_FILE
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        listed = content["files"]
        names = {name for name in listed if (checkpoint / name).is_file()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    content["files"] = {
        name: {"size": (checkpoint / name).stat().st_size, "sha256": digest_of(checkpoint / name)} for name in names
    }
    content["sha256"] = digest_of_manifest(content)
    manifest.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def in_parts(checkpoint: Path) -> None:
    """Make of a checkpoint one with weights in two files and an index, and with the optimizer in FSDP2's shards."""
    weights = load_file(checkpoint / "model.safetensors")
    half = len(weights) // 2
    index: dict[str, str] = {}
    for i, names in enumerate((list(weights)[:half], list(weights)[half:]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, checkpoint / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for rank in (0, 1):
        state = {
            index: {name: _rows(value, rank) for name, value in values.items()}
            for index, values in optimizer["state"].items()
        }
        torch.save({**optimizer, "state": state}, checkpoint / f"optimizer_rank_{rank}.pt")
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    content["files"] = dict.fromkeys(file.name for file in checkpoint.iterdir() if file.name != STATE_FILE)
    (checkpoint / STATE_FILE).write_text(json.dumps(content), encoding="utf-8")
    make_fit(checkpoint)


def _rows(value: torch.Tensor, rank: int) -> Any:
    if value.dim() == 0:
        return value
    a_part = -(-len(value) // 2)
    start = min(rank * a_part, len(value))
    return {"rows": value[start : start + a_part].clone(), "start": start, "shape": list(value.shape)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__.splitlines()[1])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="play the case of this number alone, and print all of it")
    parser.add_argument("--layouts", nargs="+", choices=sorted(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--folder", type=Path, help="kept afterwards; by default a temporary one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = parse(argv)
    with tempfile.TemporaryDirectory(prefix="harness-fuzz-") as temporary:
        folder = Path(temporary) / "cases" if asked.folder is None else asked.folder
        folder.mkdir(parents=True)
        return _play_all(asked, folder)


def _play_all(asked: argparse.Namespace, folder: Path) -> int:
    began, fuzzer = time.monotonic(), Fuzzer(folder)
    chosen = range(asked.cases) if asked.case is None else [asked.case]
    cases = [draw(asked.seed, number, asked.layouts) for number in chosen]
    for layout in dict.fromkeys(case.layout for case in cases):
        fuzzer.prepare(layout)
    print(f"seed {asked.seed}, {len(cases)} cases, {', '.join(asked.layouts)}", flush=True)
    counted: dict[str, Counter[str]] = {}
    for case in cases:
        verdict, told = fuzzer.play(case)
        counted.setdefault(case.layout, Counter())[verdict.partition(":")[0]] += 1
        if verdict == "values":
            print(f"case {case.number}: {told}: values", flush=True)
        if verdict.startswith("WRONG") or asked.case is not None:
            shown = (folder / "out").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            print(f"case {case.number}: {case}\n  {told}\n  {verdict}\n    " + "\n    ".join(shown[-12:]), flush=True)
    print("\n" + f"{'':12}{'cases':>9}" + "".join(f"{verdict:>9}" for verdict in VERDICTS))
    total: Counter[str] = sum(counted.values(), Counter())
    for layout, each in (*counted.items(), ("all", total)):
        print(f"{layout:12}{each.total():9}" + "".join(f"{each[verdict]:9}" for verdict in VERDICTS))
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if total["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
