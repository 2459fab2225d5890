"""A page: sections of text, tables and figures, as one HTML file that needs nothing else, and as Markdown.

The HTML asks the network for nothing, works from a keyboard, follows the reader's light or dark, and fits a phone. Tables can be read
without the script, which only sorts them and chooses rows.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from merging.reporting import tables
from merging.reporting.figures import Drawn
from merging.reporting.tables import Interval, Mark, Table

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens when wanted; left out of the Markdown."""

    title: str
    blocks: Sequence[Block]


Block = Text | Table | Drawn | Folded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks under a heading.

    Attributes:
      name: of its place in the page.
    """

    name: str
    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """All of it.

    Attributes:
      lead: what stands under the title.
      foot: the last line.
    """

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    foot: str


# ---- HTML ---------------------------------------------------------------------------------------------------------


def to_html(page: Page) -> str:
    """One self-contained file."""
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in page.sections)
    lead = "".join(f"<p>{escape(each)}</p>" for each in page.lead)
    sections = "\n".join(_section(each) for each in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#{page.sections[0].name}">To the results</a>
<header>
<h1>{escape(page.title)}</h1>
{lead}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
<footer><p>{escape(page.foot)}</p></footer>
<script>
{script}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return (
        f'<section id="{section.name}" aria-labelledby="{section.name}-heading">\n'
        f'<h2 id="{section.name}-heading">{escape(section.title)}</h2>\n{blocks}\n</section>'
    )


def _block(block: Block) -> str:
    match block:
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case Table():
            return _table(block)
        case Drawn():
            return _figure(block)
        case Folded():
            inside = "\n".join(map(_block, block.blocks))
            return f"<details><summary>{escape(block.title)}</summary>\n{inside}\n</details>"


def _figure(drawn: Drawn) -> str:
    figure = drawn.figure
    # A scroller takes the focus, so that the arrow keys can move it.
    return (
        f'<figure id="{figure.name}"><h3>{escape(figure.title)}</h3>\n'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(figure.title)}">'
        f'<div style="width: 100%; min-width: {round(0.75 * drawn.width)}px; max-width: {drawn.width}px">'
        f"{drawn.inline}</div></div>\n"
        f"<figcaption>{escape(figure.caption)}</figcaption>\n"
        f"<details><summary>Its numbers</summary>{_table(figure.table(), is_titled=False)}</details></figure>"
    )


def _table(table: Table, *, is_titled: bool = True) -> str:
    kind = " ".join(["scroll"] + ["cards"] * table.as_cards)
    inner = f"<thead><tr>{''.join(_headers(table))}</tr></thead>\n{_rows(table)}"
    caption = f"<caption>{escape(table.title)}</caption>"
    if is_titled:
        note = f'<p class="note">{escape(table.caption)}</p>' if table.caption else ""
    else:
        note = ""
    interactive = f' data-interactive="{escape(table.name)}"' if table.interactive else ""
    return (
        f'{note}<div class="{kind}" tabindex="0" role="group" aria-label="{escape(table.title)}">'
        f"<table{interactive}>{caption}\n{inner}</table></div>"
    )


def _headers(table: Table) -> Iterator[str]:
    for i, column in enumerate(table.columns):
        right = ' class="number"' if _is_right(table, i) else ""
        choices = " data-choices" if column.choices else ""
        yield f'<th scope="col"{right}{choices}>{escape(column.title)}</th>'


def _is_right(table: Table, column: int) -> bool:
    return all(tables.is_numeric(row[column]) for row in table.rows)


def _rows(table: Table) -> str:
    """The bodies: one for each group that shares cells, or one for all."""
    right = [_is_right(table, i) for i in range(len(table.columns))]

    def cell(group: Sequence[Any], row: int, column: int) -> str:
        if row and column < table.spans:
            return ""
        value, of = group[row][column], table.columns[column]
        attributes = f' data-title="{escape(of.title)}"' if table.as_cards else ""
        attributes += ' class="number"' if right[column] else ""
        if column < table.spans and len(group) > 1:
            attributes += f' rowspan="{len(group)}"'
        number = _sort_value(value) if table.interactive else ""
        attributes += f' data-value="{number}"' if number else ""
        return f"<td{attributes}>{_cell(value, of.digits)}</td>"

    bodies = []
    for group in table.groups():
        rows = ("".join(cell(group, i, j) for j in range(len(right))) for i in range(len(group)))
        bodies.append("".join(f"<tr>{row}</tr>\n" for row in rows))
    if not table.spans:
        bodies = ["".join(bodies)]
    return "".join(f"<tbody>\n{body}</tbody>\n" for body in bodies)


def _sort_value(value: Any) -> str:
    """A number that rows are sorted by; empty: by the text."""
    number = value.value if isinstance(value, Interval) else value
    return repr(number) if isinstance(number, int | float) else ""


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, tuple):
        return "".join(f"<div>{_cell(each, digits)}</div>" for each in value)
    if isinstance(value, Mark):
        return f'<span class="mark {value.kind}"><span aria-hidden="true">{value.sign}</span> {escape(value.text)}</span>'
    told = escape(tables.text(value, digits))
    if isinstance(value, Interval) and "[" in told:
        number, _, interval = told.partition(" ")
        return f'{number} <span class="interval">{interval}</span>'
    return told


# ---- Markdown -----------------------------------------------------------------------------------------------------


def to_markdown(page: Page, *, figures: str) -> str:
    """The same for a reader of files; `figures` is the folder of the PNGs, relative to the file."""
    parts = [f"# {page.title}", *page.lead]
    for section in page.sections:
        parts.append(f"## {section.title}")
        parts.extend(part for block in section.blocks for part in _markdown(block, figures))
    return "\n\n".join([*parts, page.foot]) + "\n"


def _markdown(block: Block, figures: str) -> Iterator[str]:
    match block:
        case Text():
            yield block.text
        case Table():
            if block.interactive:  # too long to be read without choosing
                yield f"{block.title}: {block.name}.csv."
                return
            yield f"### {block.title}"
            if block.caption:
                yield block.caption
            yield tables.markdown(block)
        case Drawn():
            figure = block.figure
            yield f"### {figure.title}"
            yield f"![{figure.described()}]({figures}/{figure.name}.png)"
            yield figure.caption
        case Folded():
            pass
