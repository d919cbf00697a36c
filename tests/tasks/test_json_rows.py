"""Json files: each value as it stands there, each column of one type, whatever block of the file it is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.errors import ConfigError
from harness.tasks import TaskConfig
from harness.tasks.labels import read_labels
from harness.tasks.rows import load_splits
from harness.tasks.splits import texts_of

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
DATES = ["2024-01-01", "2024-02-01", "2024-03-01"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def data(*files: Path, **flags: Any) -> Any:
    return load_splits(TaskConfig(train_file=[str(file) for file in files], **flags))["train"].rows


def rows(*files: Path, **flags: Any) -> list[dict[str, Any]]:
    return list(data(*files, **flags))


def refusal(*files: Path, **flags: Any) -> str:
    with pytest.raises(ConfigError) as error:
        rows(*files, **flags)
    (line,) = str(error.value).splitlines()
    return line


@BOTH
def test_texts_that_look_like_dates_and_numbers_stay_texts(tmp_path: Path, streaming: bool) -> None:
    for values in (
        DATES,
        ["2024-01-01T10:00:00", "2024-01-01T11:00:00Z"],
        ["1", "2"],
        ["1e5", "nan"],
        ["true", "null"],
    ):
        path = write(tmp_path / "a.jsonl", lines(*({"text": value} for value in values)))
        assert rows(path, streaming=streaming) == [{"text": value} for value in values]


@BOTH
def test_values_of_every_kind_are_what_stands_there(tmp_path: Path, streaming: bool) -> None:
    row = {
        "text": "ä\u2028\t\\",
        "whole": -3,
        "number": 0.1,
        "truth": False,
        "words": ["a", "b"],
        "ids": [1, 2**40],
        "numbers": [1.5, 2.0],
        "lists": [[1], []],
        "messages": [{"role": "user", "content": "2024-01-01"}],
        "none": None,
    }
    expected = {**row, "none": None}
    path = write(tmp_path / "a.jsonl", lines(row, {**row, "text": ""}))
    assert rows(path, streaming=streaming) == [expected, {**expected, "text": ""}]


@BOTH
@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\n [\n  {"text":\n "a"},\n{"text": "b"}]\n ',
        '["a", "b"]',
        '{\n "text": "a"\n}\n{\n "text": "b"\n}\n',
        '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
        '\n\n{"text": "a"}\n{"text": "b"}',
        '\ufeff[{"text": "a"}, {"text": "b"}]',
    ],
    ids=["a list", "over lines", "of texts", "objects over lines", "BOM and CRLF", "no last newline", "BOM and list"],
)
def test_a_file_may_be_laid_out_in_any_way(tmp_path: Path, streaming: bool, content: str) -> None:
    path = write(tmp_path / "a.json", content)
    assert rows(path, streaming=streaming) == [{"text": "a"}, {"text": "b"}]


def test_a_column_has_one_type_over_blocks_and_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = [{"text": "x", "id": number, "share": number, "late": None} for number in range(3000)]
    first = write(tmp_path / "1.jsonl", lines(*many))
    second = write(tmp_path / "2.jsonl", lines({"text": "y", "id": "a7", "share": 0.5, "late": "z"}))
    found = data(first, second)
    assert found.features["id"] == datasets.Value("string")
    assert found.features["share"] == datasets.Value("float64")
    assert (found[0]["id"], found[3000]["id"]) == ("0", "a7")
    assert (found[1]["share"], found[3000]["share"]) == (1.0, 0.5)
    assert (found[0]["late"], found[3000]["late"]) == (None, "z")
    assert "column 'id' holds texts beside numbers" in caplog.text
    assert "'share'" not in caplog.text


def test_numbers_beside_texts_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"v": 1.50}\n{"v": 1e5}\n{"v": true}\n{"v": 7}\n{"v": "x"}\n{"v": null}\n')
    assert [row["v"] for row in rows(path)] == ["1.50", "1e5", "true", "7", "x", None]


def test_whole_numbers_beyond_64_bits_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "a", "id": 2**64}, {"text": "b", "id": 1}))
    assert [row["id"] for row in rows(path)] == [str(2**64), "1"]


def test_a_column_that_some_rows_lack_is_empty_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "a"}, {"text": "b", "label": 1}, {"label": 2}))
    assert rows(path) == [{"text": "a", "label": None}, {"text": "b", "label": 1}, {"text": None, "label": 2}]


def test_a_column_of_lists_and_texts_is_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = ["a", ["b", 1], {"c": [2]}, None, 5]
    found = data(write(tmp_path / "a.jsonl", lines(*({"text": "x", "other": value} for value in values))))
    assert found["other"] == values
    assert "column 'other' holds lists or objects beside other values" in caplog.text
    with pytest.raises(ConfigError, match=r"Column 'other' holds \['b', 1\], of type list, where a text is needed"):
        texts_of(found[:], ["other"], " ")
    nested = write(tmp_path / "b.jsonl", lines({"text": "x", "tags": [1, {"a": 1}]}, {"text": "y", "tags": ["O"]}))
    assert [row["tags"] for row in rows(nested)] == [[1, {"a": 1}], ["O"]]


def test_a_stream_whose_type_changes_names_file_line_and_column(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", lines(*({"text": "x", "label": 1} for _ in range(1500))))
    second = write(tmp_path / "2.jsonl", lines({"text": "x", "label": 1}, {"text": "x", "label": "one"}))
    said = refusal(first, second, streaming=True)
    assert (
        f"{second}, line 2: column 'label' holds a text where the first rows of the stream have a whole number" in said
    )
    assert "--streaming" in said
    third = write(tmp_path / "3.jsonl", lines({"text": "x", "label": 1, "weight": 2}))
    assert f"{third}, line 1, has a column 'weight'" in refusal(first, third, streaming=True)
    texts = write(tmp_path / "4.jsonl", lines({"text": "x"}, {"text": 5}))
    assert [row["text"] for row in rows(texts, streaming=True)] == ["x", "5"]


@BOTH
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2, can't be read"),
        (b'{"text": "a"}\n{"text": "b"} x\n', "line 2, can't be read: Extra data"),
        (b'{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2, can't be read: the key 'text' stands there twice"),
        (b'{"text": "a"}\n5\n', "line 2, is a whole number and no object"),
        (b'{"text": "a"}\n["b"]\n', "line 2, is a list and no object"),
        (b'[{"text": "a"}, 5]', "row 2, is a whole number and no object"),
        (b'[{"text": "a"}\n, {"text": }]', "line 2, can't be read"),
        (b'[{"text": "a"}', "can't be read"),
        ('{"text": "ä"}\n'.encode("utf-16"), "is not UTF-8"),
        ('{"text": "ä"}\n'.encode("latin-1"), "is not UTF-8"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2, holds one half of a character"),
        (b'{"text": "a"}\n' + bytes(100), "line 2, can't be read"),
        (b" \n\n", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"{}", "holds no rows"),
        (b"text\n", "can't be read"),
    ],
)
def test_what_is_malformed_is_refused_with_its_place(
    tmp_path: Path, streaming: bool, content: bytes, what: str
) -> None:
    path = write(tmp_path / "a.jsonl", content)
    said = refusal(path, streaming=streaming)
    assert what in said
    assert str(path) in said


def test_a_resumed_stream_goes_on_at_the_next_row(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", lines(*({"n": n * 2000 + i} for i in range(2000)))) for n in range(2)]
    stream = data(*files, streaming=True)
    rest = iter(stream)
    for _ in range(2500):
        next(rest)
    again = data(*files, streaming=True)
    again.load_state_dict(stream.state_dict())
    assert next(iter(again)) == next(rest) == {"n": 2500}
    assert again.num_shards == 2


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "a"}))
    assert rows(path) == [{"text": "a"}]
    write(path, lines({"text": "a"}, {"text": "b"}))
    assert rows(path) == [{"text": "a"}, {"text": "b"}]


def test_types_are_those_that_arrow_finds_where_nothing_changes(tmp_path: Path) -> None:
    given = [{"text": "a", "label": 1, "score": 0.5, "ok": True, "ids": [1], "tags": ["a"], "meta": {"k": 1}}] * 3
    found = data(write(tmp_path / "a.jsonl", lines(*given)))
    assert found.features == datasets.Features.from_arrow_schema(pa.Table.from_pylist(given).schema)


class TestFilesOfOtherFormats:
    """What was silently something else, or refused by words that helped nobody."""

    @BOTH
    def test_a_mark_of_the_byte_order_is_no_text(self, tmp_path: Path, streaming: bool) -> None:
        path = write(tmp_path / "a.txt", "\ufeffa\r\nb\u2028c\r\n")
        assert rows(path, streaming=streaming) == [{"text": "a"}, {"text": "b\u2028c"}]

    def test_texts_of_every_type_of_arrow_are_texts(self, tmp_path: Path) -> None:
        for kind in (pa.string(), pa.large_string(), pa.string_view()):
            table = pa.table({"n": [1, 2], "body": pa.array(["x", "y"], kind)})
            pq.write_table(table, tmp_path / "a.parquet")
            config = TaskConfig(train_file=[str(tmp_path / "a.parquet")])
            assert load_splits(config).text_columns(config) == ["body"]

    @BOTH
    def test_parquet_without_rows_is_refused_as_empty(self, tmp_path: Path, streaming: bool) -> None:
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
        assert "holds no rows; give data with at least one" in refusal(tmp_path / "a.parquet", streaming=streaming)

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    def test_an_empty_label_is_a_missing_one_in_every_format(self, tmp_path: Path, suffix: str) -> None:
        given = [{"text": "x", "label": "a"}, {"text": "y", "label": ""}, {"text": "z", "label": "b"}]
        content = "text,label\nx,a\ny,\nz,b\n" if suffix == "csv" else lines(*given)
        path = write(tmp_path / f"a.{suffix}", content)
        with pytest.raises(ConfigError, match="has rows without a value in 'label'"):
            read_labels(load_splits(TaskConfig(train_file=[str(path)])), "label", None)
