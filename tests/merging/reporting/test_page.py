"""A report in headless Chromium: nothing in the console, no request, tables sort and filter, figures are told in words."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from merging.report import report
from tests.merging.grid.synthetic import IS_HELD_OUT, IT, PT, World, write_vectors
from tests.merging.reporting import browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """index.html of a report with every kind of figure and table."""
    world = World(
        merged=lambda s, b, m, n, seed, d: (
            (1.0 if d in IS_HELD_OUT else 0.9) + 0.02 * s - 0.01 * n + 0.01 * seed + len(m) / 999
        ),
        loss=lambda s, b, k: 2.0 - 0.2 * s + 1 / (k + 1),
        sizes=("xs", "s"),
        methods=("averaging", "ties"),
        num_experts=(2, 4, 8),
        seeds=(0, 1),
        is_there=lambda size, base, model: (size, base, model) != ("s", PT, "ties_n2_s1"),
    )
    folder = world.write(tmp_path_factory.mktemp("page") / "study")
    write_vectors(folder, "xs", IT)
    return report(folder, draws=100).page


@pytest.fixture(scope="module")
def chromium(page: pathlib.Path) -> Iterator[browser.Browser]:
    executable = browser.program()
    if executable is None:
        pytest.skip(f"no Chromium here ({', '.join(browser.PROGRAMS)}): apt-get install chromium")
    opened = browser.Browser(executable)
    try:
        opened.show(width=1280)
        opened.open(page)
        yield opened
    finally:
        opened.close()


def test_the_console_stays_empty_and_nothing_is_asked_of_the_network(chromium: browser.Browser):
    told = [
        event
        for event in chromium.events
        if event[0] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    ]
    assert told == []
    asked = [p["request"]["url"] for m, p in chromium.events if m == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == asked[:1]  # the page itself
    assert asked[0].startswith("file:") and asked[0].endswith("index.html")


def test_figures_are_told_in_words(chromium: browser.Browser):
    figures = chromium.run(
        """[...document.querySelectorAll("figure")].map((figure) => {
          const svg = figure.querySelector("svg");
          const told = svg.getAttribute("aria-labelledby").split(" ").map((id) => document.getElementById(id).textContent);
          return {name: figure.id, role: svg.getAttribute("role"), told, rows: figure.querySelectorAll("tbody tr").length};
        })"""
    )
    assert {each["name"] for each in figures} >= {"held_in_by_base", "scaling_law", f"cosines_{IT}"}
    for each in figures:
        assert each["role"] == "img"
        title, words = each["told"]
        assert title and len(words) > 40
        assert each["rows"] > 0
    ids = chromium.run("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    unknown = chromium.run(
        """[...document.querySelectorAll("svg use")].filter((use) => !document.querySelector(use.getAttribute("xlink:href"))).length"""
    )
    assert unknown == 0


COLUMN = """(i) => [...document.querySelectorAll("[data-interactive=cells] tbody tr")]
  .filter((row) => !row.hidden).map((row) => row.cells[i].textContent)"""


def test_the_table_of_cells_sorts_by_keyboard_and_keeps_what_is_missing_last(
    chromium: browser.Browser,
):
    header = "document.querySelectorAll('[data-interactive=cells] th')[6]"
    assert chromium.run(f"{header}.textContent") == "held-in"
    chromium.run(f"{header}.querySelector('button').focus()")
    for direction, ascending in (("ascending", True), ("descending", False)):
        chromium.press("Enter", 13)
        assert chromium.run(f"{header}.getAttribute('aria-sort')") == direction
        shown = chromium.run(f"({COLUMN})(6)")
        numbers = [float(text.split()[0]) for text in shown if text != "–"]
        assert len(numbers) > 30
        assert numbers == sorted(numbers, reverse=not ascending)
        assert shown[-1] == "–" and shown.index("–") == len(numbers)


def test_the_table_of_cells_filters_and_shows_all_again(chromium: browser.Browser):
    form = "document.querySelector('form.chooser')"
    every = len(chromium.run(f"({COLUMN})(0)"))
    assert every == 2 * 2 * 2 * 3 * 3  # sizes, bases, methods, N, two seeds and their mean
    for name, value in (("size", "s"), ("method", "ties"), ("seed", "mean")):
        chromium.run(
            f"""(() => {{ const chosen = {form}.elements["{name}"]; chosen.value = "{value}";
            chosen.dispatchEvent(new Event("input", {{bubbles: true}})); }})()"""
        )
    assert chromium.run(f"({COLUMN})(2)") == ["ties"] * 6
    assert chromium.run(f"{form}.querySelector('output').textContent") == f"6 of {every} rows"
    chromium.run(
        f"""(() => {{ const search = {form}.elements.search; search.value = "INSTRUCT";
        search.dispatchEvent(new Event("input", {{bubbles: true}})); }})()"""
    )
    assert chromium.run(f"({COLUMN})(1)") == [IT] * 3
    chromium.run(
        f"new Promise((done) => {{ {form}.querySelector('[type=reset]').click(); setTimeout(done, 50); }})"
    )
    assert len(chromium.run(f"({COLUMN})(0)")) == every


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_is_no_wider_than_the_screen(chromium: browser.Browser, width: int):
    chromium.show(width=width)
    assert chromium.run("document.documentElement.scrollWidth") <= width


def test_light_and_dark_differ_in_figures_too(chromium: browser.Browser):
    colors = []
    for scheme in ("light", "dark"):
        chromium.show(width=1280, scheme=scheme)
        colors.append(
            chromium.run(
                """["body", "figure svg text"].map((what) => {
                  const style = getComputedStyle(document.querySelector(what));
                  return what === "body" ? style.backgroundColor : style.fill;
                })"""
            )
        )
    (light_page, light_ink), (dark_page, dark_ink) = colors
    assert light_page == dark_ink or (light_page != dark_page and light_ink != dark_ink)
