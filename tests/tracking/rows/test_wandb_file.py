"""The file that an attempt leaves: read whole and torn, counted, sealed, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2 as pb

from harness.tracking.rows.server import online_logs
from harness.tracking.rows.wandb_file import (
    FORMAT,
    HEADER_BYTES,
    MARK,
    READER,
    LogReader,
    encode,
    read_log,
    read_records,
    seal_all,
)
from tests.support.wandb.artifact_processes import command, ended, start
from tests.support.wandb.file import read, records_of, written
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


@pytest.mark.parametrize("size", [10, 5000, 40_000])
def test_a_file_that_grows_is_read_on_from_where_it_was_read_to(tmp_path: Path, size: int) -> None:
    whole = written(tmp_path / "whole", records_of("a", start=5, rows=40, size=size)).read_bytes()
    path = tmp_path / "run-a.wandb"
    path.write_bytes(whole[:HEADER_BYTES])
    reader = LogReader(path)
    assert reader.read() is None
    for share in (0.3, 0.301, 0.8, 1.0):  # torn anywhere: wandb writes blocks
        known = b"".join([whole[:HEADER_BYTES], bytes(reader._end - HEADER_BYTES)]) if reader._end else b""
        upto = int(share * len(whole))
        path.write_bytes(known + whole[len(known) : upto])  # what was read is lost: nobody reads it again
        found = reader.read()
        (tmp_path / "plain").write_bytes(whole[:upto])
        expected = read_log(tmp_path / "plain")
        assert found == expected
    assert found is not None
    assert (len(found.rows), found.exit_code) == (40, 3)
    whole_again = written(tmp_path / "other", records_of("b", start=6, rows=2)).rename(path)
    assert reader.read() == read_log(whole_again), "another file in its place is read from its beginning"


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


def with_items(path: Path, *items: pb.HistoryItem, header: bytes = b"\xe1\xbe\0") -> Path:
    run, *_ = records_of("abc", start=5, rows=0)
    written(path, [run, pb.Record(history=pb.HistoryRecord(item=items))])
    path.write_bytes(b":W&B" + header + path.read_bytes()[7:])
    return path


def test_values_that_wandb_writes_typed_as_well_are_read(tmp_path: Path) -> None:
    typed = [
        pb.HistoryItem(nested_key=["a"], number=1.5, value_json="1.5"),
        pb.HistoryItem(nested_key=["b", "c"], integer=3),
        pb.HistoryItem(key="d", none=0),
        pb.HistoryItem(key="e", json='{"f": 1}'),
        pb.HistoryItem(key="g", boolean=False),
    ]
    log = read_log(with_items(tmp_path / "run-abc.wandb", *typed))
    assert log is not None
    assert log.rows == [{"a": 1.5, "b": {"c": 3}, "d": None, "e": {"f": 1}, "g": False}]


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"header": b"\xe1\xbe\1"}, "its format is 1; known is that of wandb 0.31, 0"),
    "value": ({"items": [pb.HistoryItem(key="a")]}, "x_history_value_encoding"),
    "nested": ({"items": [pb.HistoryItem(key="a", value_json="[" * 10_000)]}, "a in it can't be read: it is nested"),
    "key": ({"items": [pb.HistoryItem(nested_key=["a"] * 10_000, value_json="1")]}, "a in it is nested too deep"),
    "json": ({"items": [pb.HistoryItem(key="a", value_json="\0")]}, "a in it can't be read"),
    "number": ({"items": [pb.HistoryItem(key="a", value_json="9" * 10_000)]}, "a in it can't be read"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_file_of_an_unknown_form_is_said_in_a_line_and_left_as_it_is(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, message = UNKNOWN[what]
    path = with_items(
        folder(tmp_path, "1"), *given.get("items", []), **{name: given[name] for name in given if name != "items"}
    )
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_log(path)
    assert len(str(raised.value)) < 300
    before = path.read_bytes()
    seal_all([path.parent], "abc")
    assert path.parent.is_dir(), "it is not taken for a torn one"
    assert path.read_bytes()[: len(before)] == before
    logs, problems = online_logs(path.parent)
    assert (logs, problems) == ([], []), "offline"


def test_a_file_for_newer_readers_is_not_counted_and_not_renamed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = pb.Record(header=pb.HeaderRecord())
    header.header.version_info.producer, header.header.version_info.min_consumer = "0.99.0", "0.71.0"
    path = written(folder(tmp_path, "1"), [header, *records_of("abc", start=5, rows=2)])
    before = path.read_bytes()
    assert seal_all([path.parent], "abc") == {}
    assert "wandb 0.99.0 wrote it for readers from 0.71.0 on; known are files of wandb 0.31" in caplog.text
    assert path.read_bytes() == before
    header.header.version_info.min_consumer = "0.70.0"
    written(path, [header, *records_of("abc", start=5, rows=2)])
    assert seal_all([path.parent], "abc") == {path.parent: 2}


def test_what_is_no_record_and_kinds_that_are_new_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = records_of("abc", start=5, rows=2)
    new = pb.Record(num=3)
    new.MergeFromString(b"\xaa\x06\x02hi")  # field 101, which no kind has
    path = written(tmp_path / "run-abc.wandb", [*records[:2], new, *records[2:]])
    log = read_log(path)
    assert log is not None
    assert len(log.rows) == 2
    assert "1 records are of kinds that wandb 0.31 does not have, and passed over" in caplog.text
    path.write_bytes(path.read_bytes() + encode([b"\xff\xff\xff\xff"], start=path.stat().st_size))
    with pytest.raises(ValueError, match=r"a record in it is none of wandb 0\.31's"):
        read_log(path)


def test_the_form_that_is_known_is_the_one_that_the_installed_wandb_writes(tmp_path: Path) -> None:
    code = (
        "import wandb\n"
        "run = wandb.init(project='p', dir='.', settings=wandb.Settings(x_history_value_encoding='json,typed'))\n"
        "run.log({'a': 1.5, 'b': None, 'c': {'d': 2}})\n"
        "run.finish()\n"
    )
    ended(start("-c", f"import os; os.environ['WANDB_MODE'] = 'offline'\n{code}", folder=tmp_path))
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    log = read_log(path)
    assert log is not None
    assert [{name: row[name] for name in "abc"} for row in log.rows] == [{"a": 1.5, "b": None, "c": {"d": 2}}]
    assert path.read_bytes()[:7] == b":W&B" + MARK + bytes([FORMAT])
    header, _ = next(read_records(path.read_bytes()))
    needed = header.header.version_info.min_consumer
    assert tuple(map(int, needed.split("."))) == READER, "wandb writes for newer readers: see whether that is read here"
