"""Files as wandb writes them, made of records."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb


def written(path: Path, records: list[Any], *, torn_bytes: int = 0) -> Path:
    """A .wandb file: 7 bytes of header, then chunks in blocks of 32 KiB."""
    data = bytearray(b":W&B" + bytes(3))
    for record in records:
        body = record.SerializeToString()
        begun = False
        while body or not begun:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += bytes(left)
                continue
            chunk, body = body[: left - 7], body[left - 7 :]
            kind = bytes([(3 if body else 4) if begun else (2 if body else 1)])
            data += struct.pack("<IHB", zlib.crc32(chunk, zlib.crc32(kind)), len(chunk), kind[0]) + chunk
            begun = True
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(data[: len(data) - torn_bytes]))
    return path


def records_of(run_id: str, *, start: int, rows: int, size: int = 10) -> list[Any]:
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
