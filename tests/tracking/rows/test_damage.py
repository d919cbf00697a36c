"""A damaged file of tracking costs no training, and what was lost is said."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.tracking import damage as limits
from harness.tracking.rows import journal as journal_module
from harness.tracking.rows.journal import Journal, decoded
from harness.tracking.run.identity import IDENTITY_FILE, IS_VALID, Identity, parse, read, write
from harness.train import main
from tests.support.parity import TASK, TRAINING, as_flags, reset
from tests.support.wandb.damaged import JSON, PLACES, damage

HISTOGRAM = {"_type": "histogram", "values": [1, 2], "bins": [0.0, 0.5, 1.0]}


def made(path: Path, rows: int = 4) -> Journal:
    journal = Journal(path)
    journal.begin(0)
    for number in range(rows):
        journal.append(number, number, 1.5, {"train/loss": 1.0, "h": HISTOGRAM})
    journal.close()
    return journal


def numbers(journal: Journal) -> list[int]:
    return [line["_row"] for line, _ in journal.lines()]


@pytest.mark.parametrize("kind", [*JSON, *PLACES])
def test_a_damaged_journal_has_the_rows_that_are_whole_and_goes_on(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(made(tmp_path / "metrics.jsonl").path, kind)
    journal = Journal(tmp_path / "metrics.jsonl")
    kept = {"cut": [0, 1], "NULs": [1, 2, 3], "bytes": [1, 2, 3], "nested": [0, 1, 2, 3], "numbers": [1, 2, 3]}
    with caplog.at_level(logging.WARNING):
        assert numbers(journal) == kept.get(kind, [])
        assert ("metrics.jsonl: " in caplog.text) == (kind not in ("cut", "empty"))
    end = max((end for _, end in journal.lines()), default=0)
    journal.begin(end)
    journal.append(9, 9, 2.5, {"train/loss": 0.5, "h": HISTOGRAM})
    copied = tmp_path / "copy.jsonl"
    journal.copier()(copied)
    journal.close()
    if kind != "folder":  # nothing takes its place, so the row is kept until it can be written
        assert numbers(journal) == [*kept.get(kind, []), 9]
        assert numbers(Journal(copied)) == numbers(journal)
        assert b'"_type"' not in b"".join(line for line in copied.read_bytes().splitlines() if b'"_row": 9' in line)


@pytest.mark.parametrize(
    "damaged", ['{"_row": null, "_step": 1, "_timestamp": 1}', '{"_row": 1, "_step": 1.5, "_timestamp": 1}',
                '{"_row": 1, "_step": 1, "_timestamp": NaN}', '{"_row": true, "_step": 1, "_timestamp": 1}',
                '{"_row": 1, "_step": -1, "_timestamp": 1}', '{"_row": 1, "_step": 1, "_timestamp": "1"}'],
)  # fmt: skip
def test_a_line_whose_columns_are_of_another_type_is_no_row(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(damaged + "\n" + '{"_row": 5, "_step": 5, "_timestamp": 1}\n')
    assert numbers(Journal(tmp_path / "metrics.jsonl")) == [5]


def test_a_line_that_is_too_long_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MOST_BYTES", 1000)
    monkeypatch.setattr(limits, "MOST_BYTES", 1000)
    journal = made(tmp_path / "metrics.jsonl", rows=2)
    whole = journal.path.read_bytes()
    first = whole.index(b"\n") + 1
    journal.path.write_bytes(whole[:first] + b"9" * 5500 + b"\n" + whole[first:])
    found = list(journal.lines())
    assert [line["_row"] for line, _ in found] == [0, 1]
    assert found[-1][1] == len(whole) + 5501
    journal.begin(found[-1][1])
    journal.copier()(tmp_path / "copy.jsonl")
    journal.close()
    assert numbers(Journal(tmp_path / "copy.jsonl")) == [0, 1]
    assert max(map(len, journal._raw_lines())) < 1100


@pytest.mark.parametrize(
    "value", [{"_type": "histogram"}, {"_type": "histogram", "values": "x", "bins": 3}, {"_type": "table"},
              {"_type": "chart", "spec_name": [], "table": None}, {"_type": "histogram", "values": [1], "bins": [1]}],
)  # fmt: skip
def test_a_damaged_histogram_or_table_is_left_out_of_its_row(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert decoded({"_row": 1, "_step": 1, "_timestamp": 1.0, "a": value, "b": 2}) == {"b": 2}
    assert "a in a row that was recorded is damaged and left out" in caplog.text


WHOLE = Identity(
    run_id="r", project="p", offline_folders={"wandb/offline-run-1-r": 3}, first_step=0, mode="offline",
    processes={"host": "h", "owner": [1, 2.5], "cores": [[2, "boot 3"]]}, exit_code=1,
)  # fmt: skip


@pytest.mark.parametrize("kind", [*JSON, *PLACES])
def test_a_damaged_identity_is_none_and_said_in_a_line(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, WHOLE)
    assert read(tmp_path) == WHOLE
    damage(tmp_path / IDENTITY_FILE, kind)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) is None
    if kind != "null":  # there is no id in it, as if it were not there
        (record,) = caplog.records
        assert IDENTITY_FILE in record.getMessage()
        assert len(record.getMessage()) < 600


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Identity)])
def test_each_value_of_an_identity_is_checked(name: str, caplog: pytest.LogCaptureFixture) -> None:
    values = dataclasses.asdict(WHOLE) | {"fragments": WHOLE.offline_folders}
    assert parse(values) == WHOLE
    for wrong in ([1], {"a": "b"}, 1.5, True, -1, 10**30):
        assert parse(values | {name: wrong, **({"fragments": wrong} if name == "offline_folders" else {})}) is None
    assert "can't be read from the checkpoint" in caplog.text
    assert str(next(each.type for each in dataclasses.fields(Identity) if each.name == name)) in IS_VALID
    assert parse([1]) is parse(None) is parse("x") is None


SAVING = {**TRAINING, "task": TASK, "save_strategy": "steps", "save_steps": 5, "logging_steps": 2, "max_steps": 15}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    reset()
    assert main([*as_flags({**SAVING, "output_dir": out, "report_to": "wandb"}), "--use_cpu"]) == 0
    return out


@pytest.mark.parametrize("kind", ["NULs", "types", "nested", "folder"])
def test_a_training_goes_on_from_its_checkpoint_whatever_its_tracking_is_like(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    damage(out / "metrics.jsonl", kind)
    damage(out / IDENTITY_FILE, kind)
    if kind == "NULs":  # the id of the run is left, and its rows
        shutil.copy(trained / IDENTITY_FILE, out / IDENTITY_FILE)
    staged = out / "wandb-artifacts" / "1-x"
    staged.mkdir(parents=True)
    (staged / "artifact.json").write_text(json.dumps({"format_version": 1, "name": "x"}), encoding="utf-8")
    damage(staged / "artifact.json", kind)
    reset()
    flags = {**SAVING, "output_dir": out, "report_to": "wandb", "wandb_log_model": "checkpoint"}
    flags |= {"max_steps": 20, "resume_from_checkpoint": out / "checkpoint-10", "lr_scheduler_type": "constant"}
    assert main([*as_flags({**flags, "allow_changed_arguments": True, "wandb_fork": True}), "--use_cpu"]) == 0
    said = capsys.readouterr().err
    assert "metrics.jsonl: " in said
    assert said.count("Passed over") == 1
    assert "Traceback" not in said
    assert (out / "checkpoint-20" / "harness_state.json").is_file()
    if kind != "folder":
        assert numbers(Journal(out / "checkpoint-20" / "metrics.jsonl"))[-1] >= 9
