"""A table of plain values, as Markdown and as CSV; `page` shows it as HTML."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

# What stands where there is no number.
NONE = "–"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number and what it may well be; NaN where not known. Three columns of a CSV."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Mark:
    """A word that stands out: `kind` is "good", "bad" or "open", and a sign says the same as the colour."""

    text: str
    kind: str

    @property
    def sign(self) -> str:
        return {"good": "✓", "bad": "✗", "open": "?"}[self.kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Attributes:
      title: of a reader's table.
      key: of a CSV.
      digits: of numbers that are not whole.
      choices: readers may choose rows by its values.
    """

    title: str
    key: str
    digits: int = 3
    choices: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values: text, bool, int, float, None, Interval, Mark, or a tuple of them, which are lines of one cell.

    Attributes:
      name: of its file and its place in a page.
      title, caption: what it is, and how to read it.
      spans: of so many leading columns a cell is shared by neighbouring rows with equal first values.
      as_cards: on a narrow screen such a group is a card; else the table is scrolled.
      interactive: rows can be sorted and chosen.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    spans: int = 0
    as_cards: bool = False
    interactive: bool = False

    def __post_init__(self) -> None:
        wrong = [i for i, row in enumerate(self.rows) if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(
                f"table {self.name}: row {wrong[0]} has {len(self.rows[wrong[0]])} values for {len(self.columns)} columns"
            )

    def groups(self) -> list[list[Sequence[Any]]]:
        """Rows that share their leading cells; each alone where nothing is shared."""
        if not self.spans:
            return [[row] for row in self.rows]
        return [list(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row[0])]


def text(value: Any, digits: int = 3) -> str:
    """A value as a reader sees it, on one line."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    if isinstance(value, Mark):
        return f"{value.sign} {value.text}"
    if isinstance(value, Interval):
        if math.isnan(value.low):
            return text(value.value, digits)
        return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    if isinstance(value, tuple):
        return "; ".join(text(each, digits) for each in value)
    return str(value)


def markdown(table: Table) -> str:
    """A pipe table, numbers to the right."""

    def line(cells: Iterator[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    is_number = [all(is_numeric(row[i]) for row in table.rows) for i in range(len(table.columns))]
    lines = [
        line(_escaped(column.title) for column in table.columns),
        line("---:" if right else "---" for right in is_number),
    ]
    for group in table.groups():
        for i, row in enumerate(group):
            row = ["" if i and j < table.spans else value for j, value in enumerate(row)]
            cells = zip(row, table.columns, strict=True)
            lines.append(line(_escaped(_lines(value, column.digits)) for value, column in cells))
    return "\n".join(lines)


def _lines(value: Any, digits: int) -> str:
    if isinstance(value, tuple):
        return "<br>".join(text(each, digits) for each in value)
    return text(value, digits)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def is_numeric(value: Any) -> bool:
    """Whether a value is aligned as numbers are."""
    return value is None or isinstance(value, int | float | Interval)


def to_csv(table: Table) -> str:
    """Full precision; an interval takes three columns, and what is unknown is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    has_interval = [
        any(isinstance(row[i], Interval) for row in table.rows) for i in range(len(table.columns))
    ]
    header = []
    for column, three in zip(table.columns, has_interval, strict=True):
        header += [column.key, *((f"{column.key}_low", f"{column.key}_high") if three else ())]
    writer.writerow(header)
    for row in table.rows:
        cells: list[Any] = []
        for value, three in zip(row, has_interval, strict=True):
            if isinstance(value, Interval):
                cells += map(_plain, (value.value, value.low, value.high))
            else:
                cells += [_plain(value), *(("", "") if three else ())]
        writer.writerow(cells)
    return out.getvalue()


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return (
        repr(value)
        if isinstance(value, float)
        else text(value)
        if isinstance(value, tuple | Mark)
        else value
    )
