"""Figures as data, and their drawing by matplotlib, which is imported only here and only when something is drawn.

A figure is panels with lines over an ordered axis, or heat maps. From one drawing come a PNG and an SVG file on white, and an SVG to
stand inside a page, whose colours are the page's: each colour of the palette becomes a CSS variable, so that light and dark are the
style sheet's matter. What is drawn is also told in words and as a table.
"""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from merging.reporting.tables import Column, Interval, Table

# Told apart also in grey and by colour-blind readers, as the markers and dashes are. `page.css` has them again, for light and dark.
PALETTE = {
    "ink": "#1b1f24",
    "muted": "#5d6672",
    "rule": "#d5dae1",
    # What has no order: bases, methods.
    "kind-0": "#0a5fb4",
    "kind-1": "#c8501e",
    "kind-2": "#14866b",
    "kind-3": "#8a4bb0",
    "kind-4": "#9a7400",
    "kind-5": "#b3306b",
    # What has one: sizes, numbers of experts.
    "step-0": "#7fb2e5",
    "step-1": "#4690d6",
    "step-2": "#1f6ab5",
    "step-3": "#10457f",
    "step-4": "#071f3d",
}
KINDS = tuple(name for name in PALETTE if name.startswith("kind"))
STEPS = tuple(name for name in PALETTE if name.startswith("step"))
MARKERS = ("o", "s", "^", "D", "v", "P")

Look = Literal["line", "reference", "marks", "hollow"]

# Inches of a panel where there are more than two in a row, and where not: a hundredth is a pixel of a page.
_PANEL, _WIDE_PANEL = (3.0, 2.5), (4.4, 2.7)
_HEAT = 3.0
_DODGE = 0.07  # of the distance of two ticks, between the bars of neighbouring lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Values over the axis.

    Attributes:
      values: of each tick; NaN where there is none.
      legend: what the legend says of it, and of others alike; default the label.
      low, high: their intervals, or empty.
      color: a name of the palette.
      look: "line"; "reference", dashed, what others are compared with; "marks" alone; "hollow" marks alone.
    """

    label: str
    values: Sequence[float]
    color: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marker: str = "o"
    legend: str = ""
    look: Look = "line"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of lines."""

    title: str
    lines: Sequence[Line]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """Panels that share the horizontal axis, and in a row the vertical one.

    Attributes:
      name: of its files.
      title: what it asks.
      caption: how to read it.
      ticks: of the horizontal axis, in order, evenly spaced.
      level: where a line marks what counts as equal.
    """

    name: str
    title: str
    caption: str
    x: str
    y: str
    ticks: Sequence[str]
    panels: Sequence[Panel]
    columns: int = 4
    level: float | None = None

    def described(self) -> str:
        """In words: each line from its first number to its last."""
        told = [f"{self.y} over {self.x}."]
        for panel in self.panels:
            lines = [f"{line.label} {self._course(line)}" for line in panel.lines]
            told.append(f"{panel.title}: {'; '.join(lines)}.")
        return " ".join(told)

    def _course(self, line: Line) -> str:
        there = [i for i, value in enumerate(line.values) if math.isfinite(value)]
        if not there:
            return "has no number yet"
        first, last = there[0], there[-1]
        if first == last:
            return f"{line.values[first]:.2f} at {self.ticks[first]}"
        return (
            f"from {line.values[first]:.2f} at {self.ticks[first]}"
            f" to {line.values[last]:.2f} at {self.ticks[last]}"
        )

    def table(self) -> Table:
        """All its numbers."""
        rows = []
        for panel in self.panels:
            for line in panel.lines:
                has_interval = len(line.low) > 0
                values: list[Any] = [
                    Interval(v, line.low[i], line.high[i]) if has_interval else float(v)
                    for i, v in enumerate(line.values)
                ]
                rows.append([panel.title, line.label, *values])
        ticks = [Column(title=f"{self.x} {tick}", key=tick) for tick in self.ticks]
        columns = [Column(title="panel", key="panel"), Column(title="line", key="line"), *ticks]
        return Table(name=self.name, title=self.title, caption="", columns=columns, rows=rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heat:
    """One heat map: values [rows, columns] between low and high; NaN is left empty."""

    title: str
    values: np.ndarray
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heats:
    """Heat maps over the same labels."""

    name: str
    title: str
    caption: str
    labels: Sequence[str]
    maps: Sequence[Heat]
    columns: int = 4

    def described(self) -> str:
        """In words: the range and mean off the diagonal of each map."""
        told = [f"Pairs of {', '.join(self.labels)}."]
        for each in self.maps:
            pairs = each.values[~np.eye(len(each.values), dtype=bool)]
            pairs = pairs[np.isfinite(pairs)]
            if len(pairs):
                told.append(
                    f"{each.title}: between {pairs.min():.2f} and {pairs.max():.2f}, mean {pairs.mean():.2f}."
                )
        return " ".join(told)

    def table(self) -> Table:
        """All its numbers."""
        rows = [
            [each.title, label, *map(float, row)]
            for each in self.maps
            for label, row in zip(self.labels, each.values, strict=True)
        ]
        columns = [Column(title="map", key="map"), Column(title="expert", key="expert")]
        columns += [Column(title=label, key=label) for label in self.labels]
        return Table(name=self.name, title=self.title, caption="", columns=columns, rows=rows)


Figure = Lines | Heats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure as files and as part of a page.

    Attributes:
      svg, png: on white.
      inline: an svg element with text alternatives, in the colours of the page.
      width: of the drawing, in pixels of a page.
    """

    figure: Figure
    svg: str
    png: bytes
    inline: str
    width: int


def draw(figure: Figure) -> Drawn:
    """Draws a figure; the same data give the same bytes."""
    import matplotlib

    with matplotlib.rc_context(_style(figure.name)):
        drawing = _draw_lines(figure) if isinstance(figure, Lines) else _draw_heats(figure)
        png, svg = io.BytesIO(), io.StringIO()
        drawing.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        drawing.set_layout_engine("none")  # laid out above: once is enough
        drawing.savefig(
            svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    plain = _pruned(svg.getvalue())
    width = round(drawing.get_figwidth() * 100)
    return Drawn(
        figure=figure,
        svg=_on_white(plain),
        png=png.getvalue(),
        inline=_inline(plain, figure),
        width=width,
    )


# ---- drawing ------------------------------------------------------------------------------------------------------


def _style(name: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and has the page's font
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.edgecolor": PALETTE["muted"],
        "axes.labelcolor": PALETTE["ink"],
        "axes.titlecolor": PALETTE["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": PALETTE["rule"],
        "grid.linewidth": 0.7,
        "xtick.color": PALETTE["muted"],
        "ytick.color": PALETTE["muted"],
        "xtick.labelcolor": PALETTE["ink"],
        "ytick.labelcolor": PALETTE["ink"],
        "text.color": PALETTE["ink"],
        "legend.frameon": False,
        "lines.linewidth": 1.7,
        "lines.markersize": 5,
    }


def _panels(
    count: int, columns: int, width: float, height: float, **shared: Any
) -> tuple[Any, Any]:
    """A figure, and its axes in reading order."""
    from matplotlib.figure import Figure as Drawing

    columns = min(columns, count)
    rows = -(-count // columns)
    drawing = Drawing(
        figsize=(max(width * columns, 4.6), height * rows + 0.55), layout="constrained"
    )
    axes = drawing.subplots(rows, columns, squeeze=False, **shared).ravel()
    for unused in axes[count:]:
        unused.remove()
    return drawing, axes[:count]


def _draw_lines(figure: Lines) -> Any:
    columns = min(figure.columns, len(figure.panels))
    shape = _PANEL if columns > 2 else _WIDE_PANEL
    drawing, axes = _panels(len(figure.panels), columns, *shape, sharey="row", sharex=True)
    x = np.arange(len(figure.ticks), dtype=float)
    for axis, panel in zip(axes, figure.panels, strict=True):
        if figure.level is not None:
            axis.axhline(figure.level, color=PALETTE["muted"], linewidth=1, linestyle=(0, (1, 2)))
        barred = [line for line in panel.lines if len(line.low)]
        for line in panel.lines:
            shift = (barred.index(line) - (len(barred) - 1) / 2) * _DODGE if line in barred else 0
            _draw_line(axis, x + shift, line)
        axis.set_title(panel.title, loc="left")
        axis.set_xticks(x, figure.ticks)
        axis.tick_params(labelbottom=True)
        axis.set_xlim(-0.5, len(x) - 0.5)
    drawing.supxlabel(figure.x, fontsize=9)
    drawing.supylabel(figure.y, fontsize=9)
    found = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    lines = sorted(
        (line for panel in figure.panels for line in panel.lines),
        key=lambda line: line.look == "reference",
    )
    handles = {name: found[name] for name in (line.legend or line.label for line in lines)}
    drawing.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=max(1, min(len(handles), 2 * columns + 1)),
        handlelength=2.6,
        columnspacing=1.5,
    )
    return drawing


def _draw_line(axis: Any, x: np.ndarray, line: Line) -> None:
    values = np.asarray(line.values, float)
    look: dict[str, Any] = {
        "color": PALETTE[line.color],
        "label": line.legend or line.label,
        "marker": line.marker,
    }
    if line.look == "reference":
        look |= {"linestyle": (0, (5, 2)), "marker": "", "linewidth": 1.3}
        if np.isfinite(values).sum() == 1:  # a line of one point can't be seen
            look |= {"marker": "_", "markersize": 16}
    if line.look in ("marks", "hollow"):
        look |= {"linestyle": ""}
    if line.look == "hollow":
        look |= {"markerfacecolor": "none"}
    if not len(line.low):
        axis.plot(x, values, **look)
        return
    bars = np.stack([values - line.low, line.high - values])
    bars = np.nan_to_num(bars)  # nothing where there is no interval
    axis.errorbar(x, values, yerr=bars, elinewidth=1, capsize=0, **look)


def _draw_heats(figure: Heats) -> Any:
    import matplotlib

    drawing, axes = _panels(
        len(figure.maps), figure.columns, _HEAT, _HEAT, sharey=True, sharex=True
    )
    n = len(figure.labels)
    for axis, each in zip(axes, figure.maps, strict=True):
        is_signed = each.low < 0
        colors = matplotlib.colormaps["RdBu_r" if is_signed else "Blues"]
        scaled = (each.values - each.low) / (each.high - each.low)
        axis.pcolormesh(
            np.ma.masked_invalid(each.values), vmin=each.low, vmax=each.high, cmap=colors
        )
        for row, column in np.argwhere(np.isfinite(each.values)):
            red, green, blue, _ = colors(scaled[row, column])
            is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
            number = f"{each.values[row, column]:.2f}".replace("0.", ".")
            axis.text(
                column + 0.5, row + 0.5, number, ha="center", va="center", fontsize=6.5,
                color="#ffffff" if is_dark else "#000000",
            )  # fmt: skip
        axis.set_title(each.title, loc="left")
        axis.set_aspect("equal")
        axis.grid(visible=False)
        axis.set_xticks(np.arange(n) + 0.5, figure.labels, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(np.arange(n) + 0.5, figure.labels, fontsize=7)
        axis.tick_params(length=0)
    axes[0].invert_yaxis()  # shared by all
    return drawing


# ---- svg ----------------------------------------------------------------------------------------------------------


def _pruned(svg: str) -> str:
    """The svg element alone, without size: a viewer gives it one."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg


def _on_white(svg: str) -> str:
    head = svg.index(">") + 1
    background = '\n <rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:head]}{background}{svg[head:]}'


def _inline(svg: str, figure: Figure) -> str:
    """As part of a page: its ids are its own, its colours the page's, and it is told to who can't see it."""
    name = figure.name
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, value in PALETTE.items():
        svg = svg.replace(value, f"var(--{color})")
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 inherit", svg)
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view} role="img"'
        f' aria-labelledby="{name}-title {name}-told">'
        f'<title id="{name}-title">{html.escape(figure.title)}</title>'
        f'<desc id="{name}-told">{html.escape(figure.described())}</desc>'
    )
    return head + svg[svg.index(">") + 1 :]
