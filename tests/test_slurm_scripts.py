"""The scripts in slurm/ as far as they can be read without a SLURM; tests/slurm runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.flags import FLAGS

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("slurm/*.sbatch"), *ROOT.glob("slurm/*.sh"), *ROOT.glob("tests/slurm/*.sh")])
README = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "slurm" / "cluster.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("pip install -e '.[dev]' brings shellcheck")
    done = subprocess.run([shellcheck, "--external-sources", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_scripts_are_there_and_named_in_their_page() -> None:
    names = [path.name for path in SCRIPTS if path.parent.name == "slurm" and path.suffix == ".sbatch"]
    assert names == ["array.sbatch", "debug.sbatch", "multi_node.sbatch", "single_node.sbatch"]
    assert not [name for name in [*names, "cluster.sh"] if name not in README]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_is_not_for_debugging_is_requeued_and_warned(path: Path) -> None:
    if path.suffix != ".sbatch":
        return
    text = path.read_text(encoding="utf-8")
    requeued = {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=USR1@120"}
    assert (path.stem == "debug") != (requeued <= set(text.splitlines()))


def test_the_page_names_only_flags_and_variables_that_exist() -> None:
    of_others = {"array", "deepspeed_multinode_launcher", "me", "nodes", "requeue", "signal", "time"}
    named = set(re.findall(r"--([a-z][a-z0-9_]+)(?![-a-z0-9_])", README))
    assert not named - set(FLAGS) - of_others
    variables = re.findall(r"^\| `([A-Z_]+)`", README, flags=re.MULTILINE)
    sources = SETTINGS + "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    assert variables
    assert not [name for name in variables if name not in sources]
