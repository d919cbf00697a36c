"""Files as wandb writes them, made of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

from harness.tracking.rows.wandb_file import encode


def written(path: Path, records: list[Any], *, torn_bytes: int = 0) -> Path:
    """A .wandb file of these records, whose last bytes a kill has torn off."""
    data = b":W&B\xe1\xbe\x00" + encode(record.SerializeToString() for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: len(data) - torn_bytes])
    return path


def records_of(run_id: str, *, start: int, rows: int, size: int = 10) -> list[Any]:
    """What an attempt that began at `start` (seconds) leaves: a run, rows with a text of `size`, exit code 3."""
    records = [pb.Record(run=pb.RunRecord(run_id=run_id, project="p"))]
    records[0].run.start_time.seconds = start
    for step in range(rows):
        items = {"_step": step, "text": "x" * size}
        history = [pb.HistoryItem(nested_key=[name], value_json=json.dumps(value)) for name, value in items.items()]
        summary = [pb.SummaryItem(nested_key=["nested", "step"], value_json=str(step))]
        records += [
            pb.Record(history=pb.HistoryRecord(item=history)),
            pb.Record(summary=pb.SummaryRecord(update=summary)),
        ]
    return [*records, pb.Record(exit=pb.RunExitRecord(exit_code=3))]
