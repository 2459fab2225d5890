"""Rows of JSON lines, Parquet and functions; what is wrong is told with its file and line."""

from __future__ import annotations

import gzip
import pathlib

import pytest

from tasks import sources
from tasks.sources import Function, HuggingFace, JsonLines


def test_json_lines_in_shards(tmp_path: pathlib.Path):
    (tmp_path / "a-0.jsonl").write_text('{"x": 1}\n\n{"x": 2}\n')
    with gzip.open(tmp_path / "a-1.jsonl.gz", "wt") as file:
        file.write('{"x": 3}\n')
    source = JsonLines(files={"train": "a-*.jsonl*"}, splits=("train",))
    assert [row["x"] for row in sources.rows(source, "train", folder=tmp_path)] == [1, 2, 3]
    assert len(sources.files(source, folder=tmp_path)) == 2


def test_rows_that_say_their_split(tmp_path: pathlib.Path):
    (tmp_path / "a.jsonl").write_text(
        '{"split": "train", "fields": {"x": 1}, "target": "a"}\n{"split": "validation", "fields": {"x": 2}}\n'
    )
    source = JsonLines(files="a.jsonl", columns="fields")
    assert sources.rows(source, "train", folder=tmp_path) == [
        {"split": "train", "x": 1, "target": "a"}
    ]
    assert [row["x"] for row in sources.rows(source, "validation", folder=tmp_path)] == [2]


def test_parquet_as_the_hub_lays_it_out(tmp_path: pathlib.Path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "owner/name@refs/convert/parquet/default/train"
    folder.mkdir(parents=True)
    for shard in (0, 1):
        table = pyarrow.table({"x": [2 * shard, 2 * shard + 1], "y": [["a"], ["b", "c"]]})
        pyarrow.parquet.write_table(table, folder / f"{shard:04}.parquet")
    source = HuggingFace(
        repository="owner/name",
        splits={"train": "train[:75%]", "validation": "train[75%:]"},
        sizes={"train": 3, "validation": 1},
        root=str(tmp_path),
    )
    rows = sources.rows(source, "train")
    assert [rows[i]["x"] for i in range(len(rows))] == [0, 1, 2]
    assert sources.rows(source, "validation")[0] == {"x": 3, "y": ["b", "c"]}


def test_a_function():
    source = Function(rows=lambda split: [{"of": split}], splits=("train",))
    assert sources.rows(source, "train") == [{"of": "train"}]
    with pytest.raises(ValueError, match="function has no split 'test'; it has train"):
        sources.rows(source, "test")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"x": 1}\n{"x": \n', "a.jsonl, line 2 can't be read as a row"),
        ('{"x": 1}\n\n[1]\n', "a.jsonl, line 3 .* found list, wanted an object"),
        ('{"columns": {}}\n{"x": 1}\n', "a.jsonl, line 2 .* there is no 'columns' in it"),
    ],
)
def test_a_malformed_line(tmp_path: pathlib.Path, lines: str, message: str):
    (tmp_path / "a.jsonl").write_text(lines)
    columns = "columns" if "columns" in lines else None
    source = JsonLines(files={"train": "a.jsonl"}, splits=("train",), columns=columns)
    with pytest.raises(ValueError, match=message):
        sources.rows(source, "train", folder=tmp_path)


def test_a_file_cut_short(tmp_path: pathlib.Path):
    whole = gzip.compress(b'{"x": 1}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    source = JsonLines(files={"train": "a.jsonl.gz"}, splits=("train",))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line \d+ can't be read"):
        sources.rows(source, "train", folder=tmp_path)


def test_a_missing_file(tmp_path: pathlib.Path):
    source = JsonLines(files={"train": "none*.jsonl"}, splits=("train",))
    with pytest.raises(ValueError, match=r"there is no file .*none\*\.jsonl"):
        sources.rows(source, "train", folder=tmp_path)
    missing = HuggingFace(repository="o/n", splits={"train": "train"}, sizes={}, root=str(tmp_path))
    with pytest.raises(ValueError, match="o/n@refs/convert/parquet/default/train.* can't be read"):
        sources.rows(missing, "train")
