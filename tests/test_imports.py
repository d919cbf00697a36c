"""A training loads what it uses: libraries of data, scores and adapters stay out where nobody asked for them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.inputs import SENTENCES, TINY_GPT, save_gpt_tokenizer

ROOT = Path(__file__).parent.parent
HARNESS = ROOT / "harness"
HEAVY = {"PIL", "datasets", "deepspeed", "pandas", "peft", "scipy", "sklearn", "wandb"}
# The tasks that read rows with `datasets`, and what a caller imports once it knows that it wants one of them.
READ_ROWS = {
    *(f"tasks/{name}.py" for name in ("arrow_cache", "delimited", "image/classification", "json_rows", "quickstart")),
    *("tasks/image_rows.py", "tasks/rows.py", "tasks/splits.py"),
}

# What Accelerate and Transformers load by themselves: the last two lines are what every training has from them, and
# load peft (the schedules, the alignment of special tokens) and DeepSpeed (to save a model) where these are installed.
REFERENCE = """
import sys
import accelerate, torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
import transformers.trainer_utils
accelerate.utils.extract_model_from_parallel(torch.nn.Identity())
print(*{name.partition(".")[0] for name in sys.modules})
"""
# No garbage is collected while the libraries are loaded, and what they are made of is not looked through again.
TRAINING = """
import gc, sys
from harness.train import main
collected = []
is_loading = lambda: "torch" in sys.modules and not hasattr(sys.modules.get("harness.execute"), "run_command")
gc.callbacks.append(lambda phase, found: collected.append(found) if is_loading() else None)
main(sys.argv[1:])
assert not collected, collected
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000, gc.get_freeze_count()
print(*{name.partition(".")[0] for name in sys.modules})
"""


def loaded(code: str, *arguments: str) -> set[str]:
    """The heavy libraries that a process has loaded when it ends."""
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    return HEAVY & set(ended.stdout.splitlines()[-1].split())


def test_trainings_import_no_more_than_their_libraries_and_data(tmp_path: Path) -> None:
    text, noted = tmp_path / "text.txt", tmp_path / "noted"
    text.write_text("\n".join(SENTENCES * 8), encoding="utf-8")
    common = ["--report_to", "none", "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--use_cpu"]
    own = ["--task", "tests.support.tasks.noting_task:build", "--task_args", json.dumps({"file": str(noted)})]
    model = ["--model_type", "gpt2", "--config_overrides", TINY_GPT, "--block_size", "8"]
    rows = ["--tokenizer_name", str(save_gpt_tokenizer(tmp_path / "tokenizer")), "--train_file", str(text), *model]
    with ThreadPoolExecutor() as at_once:
        reference = at_once.submit(loaded, REFERENCE)
        without = at_once.submit(loaded, TRAINING, *own, *common, "--output_dir", str(tmp_path / "own"))
        with_rows = at_once.submit(loaded, TRAINING, *rows, *common, "--output_dir", str(tmp_path / "rows"))
    theirs = reference.result()
    # When all is over Transformers' model card names the version of `datasets`, and loads it for that.
    assert without.result() - theirs <= {"datasets", "pandas"}
    assert HEAVY & set(noted.read_text(encoding="utf-8").split()) - theirs == set()
    assert with_rows.result() - theirs == {"datasets", "pandas"}  # the rows are read by one, which loads the other


@pytest.mark.slow
def test_a_tracked_start_imports_wandb_first_and_nothing_of_it_later(tmp_path: Path) -> None:
    """Its public API takes half a second where torch is loaded, a tenth of one where it is not."""
    own = ["--task", "tests.support.tasks.noting_task:build", "--task_args", json.dumps({"file": str(tmp_path / "n")})]
    code = """
import sys
from harness.train import main
assert not main(sys.argv[1:])
names = list(sys.modules)
assert max(map(names.index, ("wandb", "wandb.apis.public"))) < names.index("torch")
print("done")
"""
    options = ["--max_steps", "1", "--use_cpu", "--save_strategy", "no", "--wandb_mode", "offline"]
    assert loaded(code, *own, *options, "--output_dir", str(tmp_path / "out")) == set()


@pytest.mark.parametrize("path", sorted(HARNESS.rglob("*.py")), ids=lambda path: str(path.relative_to(HARNESS)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    allowed = {"datasets"} if str(path.relative_to(HARNESS)) in READ_ROWS else set()
    assert found & HEAVY <= allowed
