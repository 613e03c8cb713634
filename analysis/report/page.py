"""Write the report as one HTML file: tables sort on a click, figures are embedded, no other file is loaded."""

import base64
import html
import math
from collections.abc import Mapping, Sequence

from dyndit.analysis.report.cells import TEXT_COLUMNS, Cell, Table

CSS = """
:root { --ink: #222; --faint: #6b6b6b; --line: #e2e2e2; --mark: #0072B2; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1360px; margin: 1rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
p, ul { max-width: 66rem; }
em { font-style: normal; }
p.lead { font-size: 1.22rem; line-height: 1.35; margin: .5rem 0 0; }
p.note, figcaption, p.caption { color: var(--faint); font-size: .87rem; margin: .2rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; line-height: 1.25; }
th.text, td.text { text-align: left; }
td { white-space: nowrap; }
td.note { white-space: normal; min-width: 11rem; color: var(--faint); }
td.value { white-space: normal; word-break: break-word; }
tr.full td { color: var(--faint); }
tbody tr:hover { background: #f5f8fb; }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--mark); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; height: auto; }
figure.first { margin: .6rem 0; }
figure.first img { max-height: 20rem; width: auto; }
h1 + h2 { border-top: none; margin: .4rem 0; padding-top: 0; }
li, h2, figcaption { overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; }
  h1 { font-size: 1.3rem; }
  p.lead { font-size: 1.08rem; }
  ul { padding-left: 1.1rem; }
}
details { margin-top: 1rem; }
"""

JS = """
for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("th").forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.v;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // empty cells last, either way
      const less = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -less : less;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }));
}
"""


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole file. body: parts made by the functions below."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + f"\n<script>{JS}</script>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def lead(sentence: str, detail: str = "") -> str:
    """Return a sentence of the answer, and its detail in small print."""
    small = f'<p class="note"><em>{html.escape(detail)}</em></p>' if detail else ""
    return f'<p class="lead"><em>{html.escape(sentence)}</em></p>{small}'


def note(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def bullets(items: Sequence[str]) -> str:
    """Return a list of findings, a sentence each."""
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>" if items else ""


def sortable(table: Table, headed: bool = True, caption_first: bool = True) -> str:
    """Return a table that sorts on a click on a heading; `data-v` of a cell holds its sort key."""
    head = "".join(
        f'<th class="{_class(name)}"><button type="button" title="sort">{html.escape(name)}</button></th>'
        for name in table.columns
    )
    kinds = table.kinds or ("",) * len(table.rows)
    body = "\n".join(
        f'<tr class="{html.escape(kind)}">{"".join(map(_cell, row, table.columns))}</tr>'
        for row, kind in zip(table.rows, kinds, strict=True)
    )
    parts = [
        f'<p class="caption">{html.escape(table.caption)}</p>',
        f'<div class="wide"><table class="sort"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>',
    ]
    title = f"<h3>{html.escape(table.name.capitalize())}</h3>" if headed else ""
    return title + "".join(parts if caption_first else reversed(parts))


def _class(column: str) -> str:
    return " ".join((["text"] if column in TEXT_COLUMNS else []) + (["note"] if column == "note" else []))


def _cell(cell: Cell, column: str) -> str:
    value = "" if isinstance(cell.rank, float) and math.isnan(cell.rank) else str(cell.rank)
    if isinstance(cell.rank, float) and math.isinf(cell.rank):
        value = "1e308" if cell.rank > 0 else "-1e308"  # JavaScript does not parse "inf"
    return f'<td class="{_class(column)}" data-v="{html.escape(value)}">{html.escape(cell.text)}</td>'


def figure(png: bytes, caption: str, kind: str = "") -> str:
    """Return a figure embedded in the page.  kind: "first" on the first screen."""
    text = html.escape(caption)
    data = base64.b64encode(png).decode()
    opened = f'<figure class="{kind}">' if kind else "<figure>"
    return f'{opened}<img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def folded(summary: str, facts: Mapping[str, str]) -> str:
    """Return names and values, hidden behind a line that opens on a click."""
    cells = "</td><td class='text value'>"
    lines = [f"<tr><td class='text'>{html.escape(k)}{cells}{html.escape(v)}</td></tr>" for k, v in facts.items()]
    table = f"<table><tbody>{''.join(lines)}</tbody></table>"
    return f"<details><summary>{html.escape(summary)}</summary>{table}</details>"
