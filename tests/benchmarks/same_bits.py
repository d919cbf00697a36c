"""
Whether a change that should not alter numbers does not: ten trainings by two checkouts, compared to the last bit.

`python -m tests.benchmarks.same_bits OTHER_CHECKOUT [NAME ...]`, here the checkout with the change. Each training is
run by the code of both from the same files: weights, optimizer, history and the rows of an offline W&B run are
compared. Then this checkout goes on from a checkpoint of the other's, and must come to the same end. Prints a line a
training; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.inputs import (
    TINY_BERT,
    label_flags,
    labelled,
    save_bert_tokenizer,
    save_gpt,
    save_gpt_tokenizer,
    text_flags,
    write_rows,
    write_text,
)
from tests.support.parity import TIMING
from tests.support.wandb.file import read_all

HERE = Path(__file__).parents[2]
STEPS, SAVED = 12, 6
COMMON = [
    *(f"--max_steps={STEPS}", f"--save_steps={SAVED}", "--logging_steps=1", "--per_device_train_batch_size=2"),
    *("--learning_rate=1e-2", "--seed=3"),
]
EVALUATES = ["--eval_strategy=steps", "--eval_steps=4"]
# Of the clock, or of the code's version.
OWN = ("_timestamp", "_runtime", "timestamp", "_wandb")


@dataclass(frozen=True)
class Training:
    name: str
    flags: Callable[[Path], list[str]]
    launch: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def words(folder: Path) -> list[str]:
    return text_flags(folder / "gpt", folder / "text.txt")


def labels(folder: Path) -> list[str]:
    return [*label_flags(folder / "bert", folder / "labelled.csv"), f"--validation_file={folder / 'labelled.csv'}"]


def masked(folder: Path) -> list[str]:
    flags = ["--task=masked-lm", "--model_type=bert", f"--config_overrides={TINY_BERT}", "--line_by_line"]
    return [*flags, f"--tokenizer_name={folder / 'bert'}", f"--train_file={folder / 'text.txt'}", *EVALUATES]


def tagged(folder: Path) -> list[str]:
    flags = ["--task=token-classification", "--model_type=bert", f"--config_overrides={TINY_BERT}"]
    data = [f"--{name}_file={folder / 'tagged.json'}" for name in ("train", "validation")]
    return [*flags, f"--tokenizer_name={folder / 'bert'}", *data, *EVALUATES]


def adapted(folder: Path) -> list[str]:
    flags = [f"--model_name_or_path={folder / 'model'}", f"--train_file={folder / 'text.txt'}", "--block_size=8"]
    return [*flags, "--use_peft", "--lora_r=2", "--lora_dropout=0.1"]


TWO = ("--num_processes=2", "--main_process_port=0")
TRAININGS = (
    Training("quickstart", lambda _: ["--config=quickstart", "--eval_steps=6"]),
    Training("accumulated", lambda at: [*words(at), "--gradient_accumulation_steps=3", "--max_grad_norm=0.1"]),
    Training(
        "bf16 and checkpointed activations",
        lambda at: [*words(at), "--bf16", "--activation_checkpointing", "--lr_scheduler_type=cosine", *EVALUATES],
    ),
    Training("masked words", masked),
    Training("labels", lambda at: [*labels(at), *EVALUATES, "--load_best_model_at_end", "--save_steps=4"]),
    Training("tags", tagged),
    Training("adapter", adapted),
    Training(
        "watched, by length",
        lambda at: [*labels(at), "--train_sampling_strategy=group_by_length", "--wandb_eval_samples=4", *EVALUATES],
        variables=(("WANDB_WATCH", "all"), ("WANDB_LOG_MODEL", "checkpoint")),
    ),
    Training("two processes", words, (*TWO, "--config_file=launch_configs/cpu_2.yaml")),
    Training("two processes, sharded", words, (*TWO, "--config_file=launch_configs/fsdp2.yaml")),
)


def write_inputs(folder: Path) -> None:
    save_gpt_tokenizer(folder / "gpt")
    save_bert_tokenizer(folder / "bert")
    save_gpt(folder / "model")
    write_text(folder / "text.txt")
    write_rows(folder / "labelled.csv", labelled(4))
    tags = [{"tokens": ["the", "old", "cat"], "ner_tags": ["O", "B-a", "B-b"]}] * 30
    (folder / "tagged.json").write_text("\n".join(map(json.dumps, tags)), encoding="utf-8")


def train(checkout: Path, training: Training, inputs: Path, out: Path, *more: str) -> None:
    command = [sys.executable, str(checkout / "harness" / "train.py")]
    if training.launch:
        launch = [flag.replace("launch_configs", str(checkout / "launch_configs")) for flag in training.launch]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *command[1:]]
    given = [flag for flag in COMMON if flag.partition("=")[0] not in str(training.flags(inputs))]
    command += [*training.flags(inputs), *given, f"--output_dir={out}", "--run_name=same", "--use_cpu", *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    environment |= {"PYTHONPATH": str(checkout), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_DATASETS_CACHE": str(out.parent / "cache"), **dict(training.variables)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{checkout}: {training.name} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")


def comparable(value: Any) -> Any:
    """Numbers as they are, tensors as bytes, nothing that the clock or a folder's name decides."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {
            name: comparable(item)
            for name, item in value.items()
            if name not in OWN and not TIMING.search(str(name)) and name != "best_model_checkpoint"
        }
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    return value


def found_in(out: Path) -> dict[str, Any]:
    """What is compared, by name."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if name.startswith("wandb") or "/.wandb" in name or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            found[name] = comparable(load_file(path))
        elif path.suffix == ".pt" or path.name.startswith(("optimizer", "scheduler")):
            found[name] = comparable(torch.load(path, weights_only=True))
        elif path.name == "trainer_state.json":
            found[name] = comparable(json.loads(path.read_text(encoding="utf-8")))
        elif path.name == "harness_state.json":
            state = json.loads(path.read_text(encoding="utf-8"))
            found[name] = comparable({key: state[key] for key in ("state", "data", "optim", "world_size")})
    runs = read_all(out)
    found["rows of W&B"] = comparable([row for run in runs for row in run.rows])
    found["configuration in W&B"] = sorted(comparable(runs[0].config))
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


def main() -> int:
    other, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    wrong = 0
    for training in [each for each in TRAININGS if not names or each.name in names]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_inputs(folder)
            outs = {}
            for side, checkout in {"other": other, "here": HERE}.items():
                outs[side] = folder / side / "out"
                outs[side].parent.mkdir()
                train(checkout, training, folder, outs[side])
            found = {side: found_in(out) for side, out in outs.items()}
            differ = differences(found["here"], found["other"])
            # From the other's checkpoint to the same end, in its folder and its W&B run.
            saved = min(outs["other"].glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            train(HERE, training, folder, outs["other"], f"--resume_from_checkpoint={saved}")
            last = f"checkpoint-{STEPS}/"
            after = {name: value for name, value in found_in(outs["other"]).items() if name.startswith(last)}
            before = {name: value for name, value in found["other"].items() if name.startswith(last)}
            went_on = differences(after, before)
        count = len(found["here"])
        print(
            f"{training.name}: {count} compared, differ: {differ or 'none'}; went on: {went_on or 'the same'}",
            flush=True,
        )
        wrong += bool(differ or went_on)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
