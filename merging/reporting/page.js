"use strict";
// Tables marked data-interactive: a click on a header sorts, a choice above shows the rows that have it.
for (const table of document.querySelectorAll("table[data-interactive]")) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const shown = (row, i) => row.cells[i].textContent.trim();

  const sort = (i) => {
    const ascending = headers[i].getAttribute("aria-sort") !== "ascending";
    headers.forEach((header) => header.removeAttribute("aria-sort"));
    headers[i].setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const number = (row) => Number(row.cells[i].dataset.value ?? NaN);
    const compare = (a, b) => {
      const [x, y] = [number(a), number(b)];
      if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
      return shown(a, i).localeCompare(shown(b, i), "en", { numeric: true });
    };
    const isEmpty = (row) => shown(row, i) === "–"; // stays last either way
    rows.sort((a, b) => isEmpty(a) - isEmpty(b) || (ascending ? compare(a, b) : compare(b, a)));
    body.append(...rows);
  };
  headers.forEach((header, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sort(i));
    header.replaceChildren(button);
  });

  const chooser = document.createElement("form");
  chooser.className = "chooser";
  chooser.setAttribute("aria-label", `Choose rows of: ${table.caption.textContent}`);
  chooser.addEventListener("submit", (event) => event.preventDefault());
  const add = (label, control) => {
    const element = document.createElement("label");
    element.append(label, control);
    chooser.append(element);
  };
  const selects = headers.flatMap((header, i) => {
    if (!("choices" in header.dataset)) return [];
    const select = document.createElement("select");
    select.name = header.textContent;
    select.append(new Option("all", ""));
    for (const value of new Set(rows.map((row) => shown(row, i)))) select.append(new Option(value, value));
    add(header.textContent, select);
    return [[i, select]];
  });
  const search = document.createElement("input");
  search.type = "search";
  search.name = "search";
  add("any text", search);
  const reset = document.createElement("button");
  reset.type = "reset";
  reset.textContent = "show all";
  const count = document.createElement("output");
  chooser.append(reset, count);

  const choose = () => {
    const wanted = search.value.trim().toLowerCase();
    let number = 0;
    for (const row of rows) {
      const isChosen = selects.every(([i, select]) => !select.value || shown(row, i) === select.value)
        && row.textContent.toLowerCase().includes(wanted);
      row.hidden = !isChosen;
      number += isChosen;
    }
    count.textContent = `${number} of ${rows.length} rows`;
  };
  chooser.addEventListener("input", choose);
  chooser.addEventListener("reset", () => setTimeout(choose));
  table.parentElement.before(chooser);
  choose();
}
