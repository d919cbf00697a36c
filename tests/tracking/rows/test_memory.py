"""A resume takes no more memory where very many rows lie beyond its checkpoint: they are read one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COUNTED = 10
RESUME = """
import json, resource, sys
from pathlib import Path

from harness.tracking.rows.beyond import Source
from harness.tracking.rows.history import History
from harness.tracking.rows.journal import Journal

path, have, counted = Path(sys.argv[1]), int(sys.argv[2]), 10
with path.open() as file:
    rows = [json.loads(next(file)) for _ in range(counted + 100)]
source = Source(read=lambda first, end: iter([{"_step": first, "_timestamp": float(first)}]), is_shared=True)
history = History(Journal(path), rows=counted, first_row=0, first_step=0, have=have, source=source)
for row in rows[counted:]:
    history.log({name: value for name, value in row.items() if not name.startswith("_")})
assert history.rows == counted + 100
history.close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(path: Path, count: int) -> int:
    """The memory of a resume with so many rows beyond the checkpoint, of 1 KB each."""
    values = ", ".join(f'"train/metric_{number}": {number / 7}' for number in range(24))
    with path.open("w") as file:
        for number in range(COUNTED + count):
            columns = f'"_row": {number}, "_step": {number}, "_timestamp": {float(number)}'
            file.write(f'{{{columns}, "train/epoch": {number / 10}, "train/global_step": {number + 1}, {values}}}\n')
    assert path.stat().st_size > 950 * count
    done = subprocess.run(
        [sys.executable, "-c", RESUME, path, str(COUNTED + count)],
        capture_output=True,
        text=True,
        check=False,
    )
    path.unlink()
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


@pytest.mark.slow
def test_a_resume_with_a_hundred_times_the_rows_takes_no_more_memory(tmp_path: Path) -> None:
    assert peak(tmp_path / "metrics.jsonl", 300_000) <= 1.1 * peak(tmp_path / "metrics.jsonl", 3_000)
