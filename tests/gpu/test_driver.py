"""What `tests/gpu/run.sh` does with parts that end, fail, hang or are not there, and when it is called again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import __main__ as driver

CONFTEST = """
from tests.conftest import pytest_addoption
from tests.gpu.conftest import device, needs_card
"""
TESTS = """
import time
from pathlib import Path
import pytest
pytestmark = pytest.mark.gpu

def test_first(record_property):
    record_property("tokens/s", 3)

def test_that_fails():
    assert 1 == 2, "this"

def test_not_here(needs_card):
    needs_card("fp16")

def test_that_hangs():
    if Path(__file__).with_name("hangs").exists():
        time.sleep(100)

def test_last():
    pass
"""
PARTS = (
    driver.Part("hangs", 8, ["test_hanging.py"]),
    driver.Part("absent", 20, ["test_absent.py"]),
    driver.Part("can't be imported", 30, ["test_broken.py", "test_fine.py"]),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parts of three files in a folder of their own, the second of which is not there."""
    files = {
        "conftest.py": CONFTEST,
        "test_hanging.py": TESTS,
        "test_broken.py": "import this_is_not_installed\n",
        "test_fine.py": "import pytest\n@pytest.mark.gpu\ndef test_fine(): pass\n",
        "hangs": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, value in {
        "HERE": tmp_path,
        "RESULTS": tmp_path / "results.json",
        "TABLE": tmp_path / "results.md",
    }.items():
        monkeypatch.setattr(driver, name, value)
    monkeypatch.setattr(driver, "PARTS", PARTS)
    return tmp_path


def outcomes(folder: Path, part: str) -> dict[str, str]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {row["name"].rpartition(": ")[2]: row["outcome"] for row in results["parts"][part]}


def test_each_part_leaves_what_it_reached_and_a_second_call_goes_on(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reached = {"first": "passed", "that fails": "failed", "not here": "not tried"}
    assert driver.main(["100", "--device=cpu"]) == 1
    assert outcomes(folder, "hangs") == {**reached, "that hangs": "not reached", "last": "not reached"}
    assert outcomes(folder, "absent") == {"absent": "not reached"}
    assert outcomes(folder, "can't be imported") == {"broken.py": "failed", "fine": "passed"}
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert "| hangs | hanging: first | passed | " in table
    assert " | tokens/s 3 |" in table
    assert " s of 8, with exit code 2 |" in table
    assert "In all: 2 passed, 2 failed, 1 not tried, 3 not reached." in table
    (folder / "hangs").unlink()
    capfd.readouterr()
    assert driver.main(["100", "--device=cpu"]) == 1
    assert "== can't be imported: stands in results.json" in capfd.readouterr().out
    assert outcomes(folder, "hangs") == {**reached, "that hangs": "passed", "last": "passed"}
    assert outcomes(folder, "absent") == {"absent": "not reached"}
    text = (folder / "results.json").read_text(encoding="utf-8")
    (folder / "results.json").write_text(text.replace(driver.digest(), "another"), encoding="utf-8")
    assert driver.main(["0", "--device=cpu"]) == 1
    assert "== hangs: no time left" in capfd.readouterr().out, "results of other code are none"


def test_a_test_that_answers_the_word_to_stop_was_not_reached(folder: Path) -> None:
    source = """
import time
import pytest
pytestmark = pytest.mark.gpu

def test_that_answers():
    try:
        time.sleep(100)
    except KeyboardInterrupt:  # as a training does, which saves and ends with an exit code
        pytest.fail("it was stopped")
"""
    (folder / "test_answering.py").write_text(source, encoding="utf-8")
    (row,) = driver.Runner("cpu").run(driver.Part("answers", 8, ["test_answering.py"]), 8)
    assert row["outcome"] == "not reached"
    assert row["why"].endswith(" s of 8, with exit code 1")
