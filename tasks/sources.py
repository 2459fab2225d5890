"""Where rows come from: TensorFlow Datasets, Hugging Face, JSON lines, or a function.

A source here is a description; reading begins when `rows` (or `row_source.data_source`, which makes a seqio DataSource
of it) is called. Splits are called train and validation whatever their origin calls them.

JSON lines are read into memory, Hugging Face sets are memory-mapped Arrow, both with random access; TFDS is read in
order.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A set of TensorFlow Datasets.

    Attributes:
      name: with its version: "super_glue/copa:1.0.2".
      splits: {our name: its name, slices allowed}.
      sizes: rows of each split, so that mixing rates and listings need no download.
    """

    name: str
    splits: Mapping[str, str]
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        return f"tfds {self.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A set of the Hugging Face hub, as Parquet.

    Every set on the hub has a branch `refs/convert/parquet`, made by the hub, with files `<config>/<split>/*.parquet`.
    It is the one layout that serves sets which once were Python scripts (which `datasets` no longer runs) and all
    others.

    Attributes:
      repository: "owner/name".
      config: the configuration; "default" where there is one only.
      splits: {our name: its name}; `train[:90%]` takes a part.
      sizes: rows of each split, so that mixing rates and listings need no download.
      revision: a branch, tag or commit that holds that layout.
      root: where repositories lie.
    """

    repository: str
    splits: Mapping[str, str]
    sizes: Mapping[str, int]
    config: str = "default"
    revision: str = "refs/convert/parquet"
    root: str = "hf://datasets"

    def __str__(self) -> str:
        config = "" if self.config == "default" else f"/{self.config}"
        return f"hf {self.repository}{config}@{self.revision}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Files of one JSON object a line, gzipped if they end with .gz.

    Attributes:
      files: {split: pattern of files}, relative to the folder given to `rows`; or one pattern for all splits, whose
        rows say theirs under "split".
      columns: the key under which a row holds its columns; what else it holds is added to them. None: the row itself.
    """

    files: Mapping[str, str] | str
    columns: str | None = None
    splits: Sequence[str] = ("train", "validation")

    def __str__(self) -> str:
        files = self.files if isinstance(self.files, str) else ", ".join(self.files.values())
        return f"jsonl {files}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """Rows that a function makes.

    Attributes:
      rows: split -> its rows, the same at every call; they are JSON: strings, numbers, lists, dicts.
      splits: their names.
      description: what listings print.
    """

    rows: Callable[[str], Sequence[Row]]
    splits: Sequence[str] = ("train", "validation")
    description: str = "function"

    def __str__(self) -> str:
        return self.description


Source = Tfds | HuggingFace | JsonLines | Function


def rows(source: Source, split: str, *, folder: str | pathlib.Path | None = None) -> Sequence[Row]:
    """All rows of a split, with random access.

    Args:
      source: any but Tfds, which has none.
      split: one of the source's.
      folder: where JSON lines lie.

    Raises:
      ValueError: for a split it lacks, a missing file, or a line that is no JSON object, named by file and line.
    """
    if split not in source.splits:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(source.splits)}")
    if isinstance(source, HuggingFace):
        return _parquet(source, split)
    if isinstance(source, JsonLines):
        return _json_lines(source, split, pathlib.Path(folder or "."))
    if isinstance(source, Function):
        return source.rows(split)
    raise TypeError(f"{source} is read in order only: use row_source.data_source")


def place(source: Source, found: Sequence[Row], number: int) -> str:
    """Where one of the `rows` of a source stands: file and line of JSON lines, its number in others."""
    if isinstance(found, _Lines):
        file, line = found.places[number]
        return f"{file}, line {line}"
    return f"{source}, row {number}"


def files(source: Source, *, folder: str | pathlib.Path | None = None) -> list[pathlib.Path]:
    """The files of JSON lines, of all splits; none for other sources."""
    if not isinstance(source, JsonLines):
        return []
    patterns = [source.files] if isinstance(source.files, str) else source.files.values()
    return [file for pattern in patterns for file in _found(pathlib.Path(folder or "."), pattern)]


def _found(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"there is no file {folder / pattern}")
    return found


def _parquet(source: HuggingFace, split: str) -> Sequence[Row]:
    import datasets

    name, _, part = source.splits[split].partition("[")
    files = f"{source.root}/{source.repository}@{source.revision}/{source.config}/{name}/*.parquet"
    try:
        return datasets.load_dataset(
            "parquet", data_files={name: files}, split=f"{name}[{part}" if part else name
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(f"{files} can't be read: {error}") from error


def _json_lines(source: JsonLines, split: str, folder: pathlib.Path) -> Sequence[Row]:
    pattern = source.files if isinstance(source.files, str) else source.files[split]
    found = _Lines()
    for file in _found(folder, pattern):
        for number, row in _objects(file, source.columns):
            if isinstance(source.files, str) and row.get("split") != split:
                continue
            found.append(row)
            found.places.append((file, number))
    return found


class _Lines(list):
    """Rows, and of each the file and the number of its line."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[pathlib.Path, int]] = []


def _objects(file: pathlib.Path, columns: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with the numbers of their lines, from 1."""
    is_gzipped = file.suffix == ".gz"
    number = 0
    with gzip.open(file, "rb") if is_gzipped else file.open("rb") as lines:
        try:
            for line in lines:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"found {type(row).__name__}, wanted an object")
                    if columns is not None:
                        if columns not in row:
                            raise ValueError(f"there is no {columns!r} in it")
                        row |= row.pop(columns)
                    yield number, row
        except (ValueError, EOFError, gzip.BadGzipFile) as error:
            where = f"{file}, line {max(number, 1)}"
            raise ValueError(f"{where} can't be read as a row: {error}") from error
