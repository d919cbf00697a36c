"""The file that an attempt leaves: read whole and torn, counted, sealed, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.tracking.rows.wandb_file import read_log, seal_all
from tests.support.wandb.artifact_processes import command
from tests.support.wandb.file import read
from tests.support.wandb.written import records_of, written
from tests.support.wandb_server import WandbServer


def folder(root: Path, name: str) -> Path:
    return root / f"offline-run-{name}-abc" / "run-abc.wandb"


def test_a_log_longer_than_a_block_has_all_its_rows(tmp_path: Path) -> None:
    log = read_log(written(tmp_path / "run-a.wandb", records_of("a", start=5, rows=20, size=5000)))
    assert log is not None
    assert log.rows == [{"_step": step, "text": "x" * 5000} for step in range(20)]
    assert (log.run_id, log.project, log.started_at, log.exit_code) == ("a", "p", 5.0, 3)
    assert log.summary == {"nested": {"step": 19}}


def test_a_log_torn_by_a_kill_gives_what_is_whole(tmp_path: Path) -> None:
    log = read_log(written(tmp_path / "run-a.wandb", records_of("a", start=5, rows=4), torn_bytes=30))
    assert log is not None
    assert (len(log.rows), log.exit_code) == (4, None)
    empty = tmp_path / "run-b.wandb"
    empty.write_bytes(b":W&B" + bytes(3))
    assert read_log(empty) is None


@pytest.mark.parametrize("torn_bytes", [0, 3, 40, 150])
@pytest.mark.parametrize("size", [10, 20_000])
def test_a_torn_file_keeps_its_whole_rows_and_gets_an_end(tmp_path: Path, torn_bytes: int, size: int) -> None:
    path = written(folder(tmp_path, "1"), records_of("abc", start=5, rows=4, size=size)[:-1], torn_bytes=torn_bytes)
    before = read_log(path)
    assert before is not None
    assert seal_all([path.parent], "abc") == {path.parent: len(before.rows)}
    sealed = read(path)  # which raises for a torn one
    assert (sealed.exit_code, len(sealed.rows)) == (1, len(before.rows))
    content = path.read_bytes()
    seal_all([path.parent], "abc")
    assert path.read_bytes() == content, "a second time changes nothing"


@pytest.mark.parametrize("left", range(40))
def test_an_end_is_whole_wherever_in_a_block_it_falls(tmp_path: Path, left: int) -> None:
    empty = written(tmp_path / "empty", records_of("abc", start=5, rows=1, size=0)[:-1]).stat().st_size
    size = 32768 - empty - left
    path = written(folder(tmp_path, "1"), records_of("abc", start=5, rows=1, size=size)[:-1])
    seal_all([path.parent], "abc")
    found = read_log(path)
    assert found is not None
    assert (found.exit_code, len(found.rows)) == (1, 1)


@pytest.mark.slow
def test_wandb_reads_what_is_sealed_wherever_in_a_block_its_end_falls(tmp_path: Path) -> None:
    ids = [f"left-{left}" for left in range(0, 40, 2)]
    folders = [tmp_path / f"offline-run-20260101_000000-{run_id}" for run_id in ids]
    rows = 20  # two updates each: wandb-core 0.31 may drop a run that has no more than 32, see `sync_without_rows`
    for left, (run_id, folder) in enumerate(zip(ids, folders, strict=True)):
        path = folder / f"run-{run_id}.wandb"
        records = records_of(run_id, start=5, rows=rows - 1)[:-1]
        empty = written(path, [*records, *records_of(run_id, start=5, rows=rows, size=0)[-3:-1]]).stat().st_size
        last = records_of(run_id, start=5, rows=rows, size=32768 - empty - 2 * left)[-3:-1]
        written(path, [*records, *last])
        assert seal_all([folder], run_id) == {folder: rows}
    with WandbServer(tmp_path / "server") as server:
        synced = command(f"wandb sync {' '.join(map(str, folders))}", tmp_path, server)
        assert synced.returncode == 0, synced.stderr
        assert [(run.exit_code, len(run.rows)) for run in map(server.run, ids)] == [(1, rows)] * len(ids), (
            f"{synced.stdout}{synced.stderr}{server.requests()}"
        )


def test_folders_come_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    later = written(folder(tmp_path, "1"), records_of("abc", start=9, rows=2))
    earlier = written(folder(tmp_path, "2"), records_of("abc", start=5, rows=3))
    assert list(seal_all([later.parent, earlier.parent], "abc").items()) == [(earlier.parent, 3), (later.parent, 2)]


@pytest.mark.parametrize("beginning", [None, b"", b":W", bytes(7)])
def test_a_file_that_names_no_run_is_moved_away(beginning: bytes | None, tmp_path: Path) -> None:
    nameless = written(folder(tmp_path, "1"), [] if beginning is None else records_of("abc", start=5, rows=2))
    if beginning is not None:  # as a loss of power leaves it
        nameless.write_bytes(beginning + (nameless.read_bytes()[7:] if len(beginning) == 7 else b""))
    assert seal_all([nameless.parent], "abc") == {}
    assert not nameless.parent.exists()
    assert (tmp_path / "torn-offline-run-1-abc" / "run-abc.wandb").is_file()
