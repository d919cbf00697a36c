"""metrics.jsonl: whole lines only, read by pandas, and no obstacle to a training."""

from __future__ import annotations

import json
import logging
import math
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wandb

from harness.tracking.rows.journal import Journal, RowCount, decoded, encoded


def test_a_torn_line_is_no_row_and_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.begin(0)
    for number in range(3):
        journal.append(number, number, 1.5, {"train/loss": 1.0})
    whole = journal.path.stat().st_size
    with journal.path.open("ab") as file:
        file.write(b'{"_row": 3, "_step": 3, "_time')
    again = Journal(journal.path)
    *_, (last, end) = again.lines()
    assert (last["_row"], end) == (2, whole)
    again.begin(end)
    again.append(3, 3, 2.5, {"train/loss": 2.0})
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [line["_row"] for line in lines] == [0, 1, 2, 3]


def test_the_rows_of_a_journal_that_grows_are_counted_once_each(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    count = RowCount(Journal(journal.path), first_row=2, first_step=0)
    assert count.read() == 0
    journal.begin(0)
    for number in range(5):
        journal.append(number, number, float(number), {"train/loss": math.nan})
    assert count.read() == 3
    with journal.path.open("r+b") as file:  # what was counted is lost: nobody reads it again, but for the last line
        file.write(b"#" * (journal.size // 2))
    journal.append(5, 5, 5.0, {})
    with journal.path.open("ab") as file:
        file.write(b'{"_row": 6, "_step": 6, "_time')
    assert [count.read(), count.read()] == [4, 4]
    again = Journal(journal.path)  # an attempt that goes on from a checkpoint, and from then on makes other rows
    again.begin(0)
    for number in range(9):
        again.append(number, number, 10.0 + number, {"train/loss": 1.0})
    assert count.read() == 7


def test_what_a_process_that_was_shut_out_still_writes_is_seen_by_nobody(tmp_path: Path) -> None:
    old, new = Journal(tmp_path / "metrics.jsonl"), Journal(tmp_path / "metrics.jsonl")
    old.begin(0)
    old.append(0, 0, 0.0, {"a": 1})
    new.begin(old.path.stat().st_size)
    old.append(1, 1, 0.0, {"a": "old"})
    new.append(1, 1, 0.0, {"a": "new"})
    assert [line["a"] for line, _ in new.lines()] == [1, "new"]


def test_pandas_reads_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.begin(0)
    journal.append(0, 0, 1.5, encoded({"train/loss": float("nan"), "train/global_step": 1}))
    journal.append(1, 1, 2.5, encoded({"train/loss": 0.25, "train/global_step": 2}))
    frame = pd.read_json(journal.path, lines=True)
    assert frame["train/loss"].tolist()[1] == 0.25
    assert math.isnan(frame["train/loss"][0])
    assert frame["train/global_step"].tolist() == [1, 2]


def test_a_full_disk_costs_no_row_when_there_is_room_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.begin(0)
    journal.append(0, 0, 0.0, {"a": "x" * 100})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 20, before[1]))
        try:
            journal.append(1, 1, 0.0, {"a": "y" * 100})
            journal.append(2, 2, 0.0, {"a": "z" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("can't be written, the training goes on") == 1
    assert [line["_row"] for line, _ in journal.lines()] == [0]
    journal.append(3, 3, 0.0, {"a": ""})
    assert [line["_row"] for line, _ in journal.lines()] == [0, 1, 2, 3]


def test_what_is_no_number_is_kept_and_comes_back() -> None:
    histogram = wandb.Histogram(np_histogram=(np.array([1, 2]), np.array([0.0, 0.5, 1.0])))
    table = wandb.Table(columns=["text", "label"], data=[["a", 1], ["b", 2]])
    chart = wandb.plot.confusion_matrix(y_true=[0, 1], preds=[0, 0], class_names=["no", "yes"])
    row = {"h": histogram, "t": table, "c": chart, "n": np.float32(0.5), "x": torch.tensor(2), "s": "text"}
    values = json.loads(json.dumps(encoded(row)))
    assert values["h"] == {"_type": "histogram", "values": [1, 2], "bins": [0.0, 0.5, 1.0]}
    assert (values["n"], values["x"], values["s"]) == (0.5, 2, "text")
    back = decoded({"_row": 1, "_step": 1, "_timestamp": 0.0, **values})
    assert list(back) == list(row)
    assert (back["h"].histogram, back["h"].bins) == ([1, 2], [0.0, 0.5, 1.0])
    assert (back["t"].columns, back["t"].data) == (table.columns, table.data)
    assert back["c"].spec == chart.spec
    assert back["c"].table.data == chart.table.data
