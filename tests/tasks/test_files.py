"""Data as it stands in the files: which files are read, and what their cells are."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from harness.checkpoint.arguments import compare, recorded
from harness.data.digest import digest_of_samples
from harness.errors import ConfigError
from harness.flags import FLAGS, parse, read
from harness.tasks import TaskConfig
from harness.tasks.files import data_files
from harness.tasks.rows import load_splits
from harness.tasks.splits import Split
from tests.support.launching import run

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])


def zst(content: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` and parallel compressors make them."""
    half = len(content) // 2
    return b"".join(pa.Codec("zstd").compress(part).to_pybytes() for part in (content[:half], content[half:]))


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def train(*files: Path | str, **flags: Any) -> Split:
    return load_splits(TaskConfig(train_file=[str(file) for file in files], **flags))["train"]


def rows(*files: Path | str, **flags: Any) -> list[dict[str, Any]]:
    return list(train(*files, **flags).rows)


def texts(*files: Path | str, **flags: Any) -> list[str]:
    return [row["text"] for row in rows(*files, **flags)]


def refusal(*files: Path | str, **flags: Any) -> str:
    with pytest.raises(ConfigError) as error:
        rows(*files, **flags)
    return str(error.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: str) -> str:
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


@BOTH
def test_cells_are_the_texts_that_stand_there(tmp_path: Path, streaming: bool) -> None:
    cells = ["null", "NA", "nan", "None", "n/a", "007", "1.50", "1e5", "true", "-", " spaced ", "NULL", "<NA>", "Ö"]
    content = "text,label\n" + "".join(f"{cell},{cell}\n" for cell in cells)
    found = rows(write(tmp_path / "a.csv", content), streaming=streaming)
    assert found == [{"text": cell, "label": cell} for cell in cells]


@BOTH
def test_what_csv_writers_write_is_read_back(tmp_path: Path, streaming: bool) -> None:
    content = '\ufefftext,label\r\n"a ""b"", c\r\nd",x\r\n\r\n,y\r\nlast,z'
    assert rows(write(tmp_path / "a.csv", content), streaming=streaming) == [
        {"text": 'a "b", c\r\nd', "label": "x"},
        {"text": None, "label": "y"},
        {"text": "last", "label": "z"},
    ]


@BOTH
def test_a_quote_at_the_beginning_of_a_line_of_tsv_is_text(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"hello\tx\nworld\ty\nthe "end"\tz\n')
    assert texts(path, streaming=streaming) == ['"hello', "world", 'the "end"']


def test_quoting_delimiter_and_header_are_flags(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quoted = write(tmp_path / "q.tsv", 'text\tlabel\n"a\tb"\tx\n')
    assert rows(quoted, csv_quoting="minimal") == [{"text": "a\tb", "label": "x"}]
    assert texts(write(tmp_path / "n.csv", 'text,label\n"a,x\n'), csv_quoting="none") == ['"a']
    semicolons = write(tmp_path / "s.csv", "text;label\na,b;x\n")
    assert rows(semicolons, csv_delimiter=";") == [{"text": "a,b", "label": "x"}]
    assert "--csv_delimiter ';'" in refusal(semicolons)
    assert texts(write(tmp_path / "t.csv", "text\tlabel\na\tx\n"), csv_delimiter="tab") == ["a"]
    bare = write(tmp_path / "b.csv", "text,label\na,x\n")
    assert rows(bare, csv_header=False) == [{"column1": "text", "column2": "label"}, {"column1": "a", "column2": "x"}]
    assert "--csv_quoting minimal" not in caplog.text
    assert texts(write(tmp_path / "w.tsv", 'text\tlabel\n"a"\tx\n')) == ['"a"']
    assert "w.tsv: the quotes around some cells are taken as text" in caplog.text
    assert "--csv_quoting minimal" in caplog.text


@BOTH
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,label\na,x\nb,y,z\n", r"a\.csv, line 3: 3 cells where the first row has 2"),
        ("text,label\na,x\n\n\nb\n", r"a\.csv, line 5: 1 cells"),
        ("text,label\n1,a,x\n2,b,y\n", r"a\.csv, line 2: 3 cells"),  # each row, which pandas takes for an index
        ('text,label\n"a\nb",x\nb,y,z\n', r"a\.csv, line 4: 3 cells"),
        ('text,label\n"a,x\nb,y\n', r"a\.csv, line 2, can't be read: unexpected end of data"),
        ('text,label\n"a"b,x\n', r"a\.csv, line 2, can't be read: ',' expected after '\"'"),
        ("text,text\na,b\n", r"several columns 'text'"),
        ("\n\n", r"is empty"),
    ],
)
def test_malformed_rows_are_refused_with_file_and_line(
    tmp_path: Path, content: str, expected: str, streaming: bool
) -> None:
    assert re.search(expected, refusal(write(tmp_path / "a.csv", content), streaming=streaming))


def test_a_line_far_down_is_named_too(tmp_path: Path) -> None:
    content = "text,label\n" + "a,x\n" * 25_000 + "a\n"
    assert "line 25002: 1 cells" in refusal(write(tmp_path / "a.csv", content))


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    assert "not UTF-8" in refusal(write(tmp_path / "a.csv", "text,label\nö,x\n".encode("latin-1")))


def test_a_column_may_turn_to_text_after_ten_thousand_rows(tmp_path: Path) -> None:
    content = "id,text\n" + "".join(f"{n},a\n" for n in range(10_500)) + "x17,b\n"
    split = train(write(tmp_path / "a.csv", content))
    assert split.rows[10_500] == {"id": "x17", "text": "b"}
    assert split.rows[7] == {"id": "7", "text": "a"}


def test_a_cell_may_be_longer_than_pythons_limit_which_stays_as_it_was(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    assert texts(write(tmp_path / "a.csv", f"text,label\n{'a' * 300_000},x\n")) == ["a" * 300_000]
    assert csv.field_size_limit() == before


def test_columns_of_numbers_are_no_texts_to_choose_from(tmp_path: Path) -> None:
    split = train(write(tmp_path / "a.csv", "id,flag,body,label\n1,true,hello,x\n2.5,false,7,y\n"))
    assert split.columns == ["id", "flag", "body", "label"]
    assert split.string_columns == ["body", "label"]


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,x\n")
    first = train(path).rows
    assert train(path).rows._fingerprint == first._fingerprint
    assert [file["filename"] for file in train(path).rows.cache_files] == [first.cache_files[0]["filename"]]
    write(path, "text,label\nb,x\n")
    os.utime(path, ns=(1, 1))
    assert texts(path) == ["b"]


@pytest.mark.parametrize(
    "name",
    ["data[1].csv", "data[1].tsv", "data[1].jsonl", "a*.jsonl", "w?.txt", "h#1.parquet", "x::y.jsonl", "50%.txt"],
)
@BOTH
def test_a_path_is_a_path_whatever_its_characters(tmp_path: Path, name: str, streaming: bool) -> None:
    def content(value: str) -> str:
        return {".txt": f"{value}\n", ".jsonl": lines(value)}.get(Path(name).suffix, f"text\n{value}\n")

    for file, value in ((name, "right"), (re.sub(r"[\[\]*?#%:]", "", name), "wrong"), ("abc.jsonl", "wrong")):
        if name.endswith(".parquet"):
            datasets.Dataset.from_dict({"text": [value]}).to_parquet(tmp_path / file)
        elif file.endswith(Path(name).suffix):
            write(tmp_path / file, content(value))
    assert texts(tmp_path / name, streaming=streaming) == ["right"]


@BOTH
def test_several_files_come_as_given_and_those_of_patterns_and_folders_in_natural_order(
    tmp_path: Path, streaming: bool
) -> None:
    for number in (10, 9, 1, 2):
        write(tmp_path / "parts" / f"part-{number}.jsonl", lines(f"p{number}"))
    write(tmp_path / "parts" / "_SUCCESS", "")
    write(tmp_path / "parts" / ".part-1.jsonl.crc", "x")
    write(tmp_path / "parts" / "below" / "z.jsonl", lines("z"))
    b, a = write(tmp_path / "b.jsonl", lines("b")), write(tmp_path / "a.json", lines("a"))
    assert texts(b, a, streaming=streaming) == ["b", "a"]
    assert texts(tmp_path / "parts" / "part-*.jsonl", streaming=streaming) == ["p1", "p2", "p9", "p10"]
    assert texts(tmp_path / "parts", streaming=streaming) == ["z", "p1", "p2", "p9", "p10"]
    assert texts(tmp_path / "**" / "part-[12].jsonl", b, streaming=streaming) == ["p1", "p2", "b"]


@BOTH
def test_several_csv_files_have_the_same_columns(tmp_path: Path, streaming: bool) -> None:
    a, b = write(tmp_path / "a.csv", "text,label\na,01\n"), write(tmp_path / "b.tsv", "label\ttext\n0A\tb\n")
    assert rows(a, b, streaming=streaming) == [{"text": "a", "label": "01"}, {"text": "b", "label": "0A"}]
    other = write(tmp_path / "c.csv", "text,tag\nc,1\n")
    assert "c.csv has the columns text, tag" in refusal(a, other, streaming=streaming)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".txt"])
@BOTH
def test_compressed_files_are_read_to_their_end(tmp_path: Path, kind: str, suffix: str, streaming: bool) -> None:
    values = [f"row {number}" for number in range(200)]
    content = {".csv": "text\n" + "\n".join(values), ".jsonl": lines(*values), ".txt": "\n".join(values)}[kind]
    path = write(tmp_path / f"data[1]{kind}{suffix}", COMPRESS[suffix](content.encode()))
    assert texts(path, streaming=streaming) == values


@BOTH
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, streaming: bool) -> None:
    content = gzip.compress(("text\n" + "\n".join(f"row {n * n}" for n in range(3000))).encode())
    assert "a.csv.gz can't be read after line" in refusal(
        write(tmp_path / "a.csv.gz", content[: len(content) // 2]), streaming=streaming
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["gone.csv"], "--train_file=gone.csv: no such file"),
        (["gone-*.csv"], "none that matches it as a pattern"),
        (["a.csv", "b.jsonl"], "b.jsonl are of several formats"),
        (["empty"], "is a folder without files of data"),
        (["a.docx"], r"unknown format '\.docx'; use one of \.csv"),
        (["a.parquet.gz"], "parquet is compressed within"),
    ],
)
def test_what_names_no_data_is_refused(
    given: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "b.jsonl", "a.docx", "a.parquet.gz"):
        write(tmp_path / name, "text\na\n")
    with pytest.raises(ConfigError, match=expected):
        data_files("train_file", given)
    with pytest.raises(ConfigError, match=expected):  # before torch is loaded
        read(["--task=causal-lm", "--train_file", *given]).checked()


def test_a_folder_of_a_data_set_is_not_taken_as_a_pattern(tmp_path: Path) -> None:
    for name in ("set1", "set[1]"):
        write(tmp_path / name / "train.jsonl", lines(name))
    with pytest.raises(ConfigError, match="would read other folders"):
        load_splits(TaskConfig(dataset_name=str(tmp_path / "set[1]")))
    assert texts(tmp_path / "set[1]") == ["set[1]"]


def test_flags_of_csv_do_something_or_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines("a"))
    assert "--csv_delimiter=; is of csv and tsv files" in refusal(path, csv_delimiter=";")
    assert "--csv_header=False is of csv and tsv files" in refusal(path, csv_header=False)
    with pytest.raises(ConfigError, match="--csv_quoting=all is not known; use one of: minimal, none"):
        TaskConfig(csv_quoting="all")
    with pytest.raises(ConfigError, match="--csv_delimiter=;;: give one character, or tab"):
        TaskConfig(csv_delimiter=";;")


def test_several_files_stand_in_the_configuration_and_one_as_before(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", lines("a")), write(tmp_path / "b.jsonl", lines("b"))
    alone, both = parse([f"--train_file={one}"]), parse(["--train_file", str(one), str(two)])
    assert alone.task.train_file == [str(one)]
    assert alone.flat()["train_file"] == str(one)  # as checkpoints of the version before have it
    assert both.flat()["train_file"] == [str(one), str(two)]
    changes = compare(recorded(alone.flat(), total_steps=1), recorded(both.flat(), total_steps=1), FLAGS)
    assert changes.refused == (f"train_file {one} -> {[str(one), str(two)]}",)
    for config in (alone, both):
        written = write(tmp_path / "again.yaml", config.as_yaml())
        assert parse([f"--config={written}"]).task == config.task


@BOTH
def test_rows_that_look_like_an_agents_trace_are_rows(tmp_path: Path, streaming: bool) -> None:
    events = [{"type": "user", "message": {"a": 1}, "text": "x"}, {"type": "user", "message": "b", "text": "y"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    assert texts(path, streaming=streaming) == ["x", "y"]


def test_the_digest_tells_other_content_in_the_same_files(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", "text,label\na,x\n"), write(tmp_path / "b.csv", "text,label\nb,y\n")
    before = digest_of_samples(train(a, b).rows)
    assert digest_of_samples(train(a, b).rows) == before
    assert digest_of_samples(train(b, a).rows) != before


@BOTH
def test_a_stream_of_csv_goes_on_where_it_was(tmp_path: Path, streaming: bool) -> None:
    if not streaming:
        return
    files = [write(tmp_path / f"{n}.csv", "text\n" + "".join(f"{n}-{i}\n" for i in range(50))) for n in range(2)]
    stream = train(*files, streaming=True).rows
    seen = []
    for row in stream:
        seen.append(row["text"])
        if len(seen) == 70:
            state = stream.state_dict()
            break
    again = train(*files, streaming=True).rows
    again.load_state_dict(state)
    assert seen + [row["text"] for row in again] == texts(*files)
    assert again.num_shards == 2


def test_preparation_of_csv_is_found_again_by_another_process(tmp_path: Path) -> None:
    path = write(tmp_path / "numbers.csv", "number\n1\n2\n3\n")
    script = (
        "import sys\n"
        "from harness.tasks import TaskConfig\n"
        "from harness.tasks.rows import load_splits\n"
        "config = TaskConfig(train_file=sys.argv[1], cache_dir=sys.argv[2])\n"
        "def doubled(batch): return {'number': [2 * number for number in batch['number']]}\n"
        "rows = load_splits(config)['train'].transform(doubled, config).rows\n"
        "print(rows.cache_files[0]['filename'], rows['number'][:])\n"
    )
    file = write(tmp_path / "prepare.py", script)
    done = [
        run([sys.executable, str(file), str(path), str(tmp_path / "cache")], forked=False).out.split()[0]
        for _ in range(2)
    ]
    assert done[0] == done[1]
