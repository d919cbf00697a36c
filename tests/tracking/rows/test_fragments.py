"""What the lives of an offline run leave: counted, sealed, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.tracking.rows.fragments import collect, read_fragment
from harness.tracking.rows.wandb_file import read_log
from tests.support.wandb.file import read
from tests.support.wandb.written import records_of, written


def folder(root: Path, name: str) -> Path:
    return root / f"offline-run-{name}-abc" / "run-abc.wandb"


@pytest.mark.parametrize("torn_bytes", [0, 3, 40, 150])
@pytest.mark.parametrize("size", [10, 20_000])
def test_a_torn_fragment_keeps_its_whole_rows_and_gets_an_end(tmp_path: Path, torn_bytes: int, size: int) -> None:
    path = written(folder(tmp_path, "1"), records_of("abc", start=5, rows=4, size=size)[:-1], torn_bytes=torn_bytes)
    before = read_log(path)
    assert before is not None
    (fragment,) = collect([path.parent], "abc")
    assert fragment.rows == len(before.rows)
    sealed = read(path)  # which raises for a torn one
    assert (sealed.exit_code, len(sealed.rows)) == (1, fragment.rows)
    content = path.read_bytes()
    collect([path.parent], "abc")
    assert path.read_bytes() == content, "a second time changes nothing"


@pytest.mark.parametrize("left", range(40))
def test_an_end_is_whole_wherever_in_a_block_it_falls(tmp_path: Path, left: int) -> None:
    empty = written(tmp_path / "empty", records_of("abc", start=5, rows=1, size=0)[:-1]).stat().st_size
    size = 32768 - empty - left
    path = written(folder(tmp_path, "1"), records_of("abc", start=5, rows=1, size=size)[:-1])
    collect([path.parent], "abc")
    found = read_log(path)
    assert found is not None
    assert (found.exit_code, len(found.rows)) == (1, 1)
    assert read_fragment(path).has_ended


def test_fragments_come_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    later = written(folder(tmp_path, "1"), records_of("abc", start=9, rows=2))
    earlier = written(folder(tmp_path, "2"), records_of("abc", start=5, rows=3))
    assert [each.rows for each in collect([later.parent, earlier.parent], "abc")] == [3, 2]


@pytest.mark.parametrize("beginning", [None, b"", b":W", bytes(7)])
def test_a_fragment_that_names_no_run_is_moved_away(beginning: bytes | None, tmp_path: Path) -> None:
    nameless = written(folder(tmp_path, "1"), [] if beginning is None else records_of("abc", start=5, rows=2))
    if beginning is not None:  # as a loss of power leaves it
        nameless.write_bytes(beginning + (nameless.read_bytes()[7:] if len(beginning) == 7 else b""))
    assert collect([nameless.parent], "abc") == []
    assert not nameless.parent.exists()
    assert (tmp_path / "torn-offline-run-1-abc" / "run-abc.wandb").is_file()
