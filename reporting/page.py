"""Pages of reports, made of sections with text, figures and tables, as HTML or as Markdown."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd

from reporting.escape import encodable, html_text, markdown_paragraphs, markdown_text
from utils import atomic_write


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        text: A paragraph below the heading.
        figures: Names of the figures to show.
        tables: Tables to show, by title.
        details: Tables that HTML folds away and Markdown leaves out, by title.
    """

    title: str
    text: str = ""
    figures: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    details: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def format_cell(value: object) -> str:
    """Formats a value for reading: integers in full, other numbers to three digits, a missing value as a dash."""
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return "-"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Integral) or 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


# --- HTML ---


def html_page(
    title: str,
    opening: str,
    sections: Iterable[Section],
    images: Mapping[str, bytes],
    captions: Mapping[str, str],
    *,
    headings: Mapping[str, str],
    style: str = "",
) -> str:
    """Returns a self-contained page: figures are embedded, and there is no script, font or address to load.

    Args:
        title: Title of the page, as text.
        opening: What comes before the first section, as HTML.
        sections: In reading order.
        images: PNG files, by the names that sections use.
        captions: Text below each figure, by the same names.
        headings: Column names that tables show under another name.
        style: CSS to add to that of all pages.
    """
    body = [f"<h1>{html_text(title)}</h1>", opening]
    body += [_html_section(section, images, captions, headings) for section in sections]
    return encodable(_PAGE.format(title=html_text(title), style=_CSS + style, body="\n".join(body)))


def _html_section(
    section: Section, images: Mapping[str, bytes], captions: Mapping[str, str], headings: Mapping[str, str]
) -> str:
    parts = [f"<section><h2>{html_text(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html_text(section.text)}</p>")
    if section.figures:
        figures = "".join(_html_figure(name, images[name], captions[name]) for name in section.figures)
        parts.append(f'<div class="figures">{figures}</div>')
    for title, table in section.tables.items():
        parts.append(f"<h3>{html_text(title)}</h3>{html_table(table, headings)}")
    for title, table in section.details.items():
        summary = f"<summary>{html_text(title)}</summary>"
        parts.append(f"<details>{summary}{html_table(table, headings)}</details>")
    return "".join([*parts, "</section>"])


def _html_figure(name: str, image: bytes, caption: str) -> str:
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{html_text(name.replace("_", " "))}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html_text(caption)}</figcaption></figure>"
    )


def html_table(table: pd.DataFrame, headings: Mapping[str, str]) -> str:
    """Returns a table as HTML, in a box of its own that scrolls where the screen is narrow.

    Args:
        table: What to show.
        headings: Column names to show under another name; the others are shown with spaces for underscores.
    """
    names = [headings.get(name, str(name).replace("_", " ")) for name in table]
    kinds = [' class="text"' if pd.api.types.is_string_dtype(table[name]) else "" for name in table]
    head = "".join(f"<th{kind}>{html_text(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    rows = []
    for row in table.itertuples(index=False):
        cells = (f"<td{kind}>{html_text(format_cell(value))}</td>" for kind, value in zip(kinds, row, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_CSS = """
:root { color-scheme: light; --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--accent); font-size: 1.3rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p { max-width: 75ch; margin: .4rem 0; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; }
.units { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr)); gap: .75rem;
  margin: 1.5rem 0; }
.card { padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 8px; }
.card div { color: var(--soft); font-size: .85rem; }
.card strong { display: block; font-size: 1.5rem; color: var(--accent); }
.card small { color: var(--soft); line-height: 1.35; display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.5rem 2rem;
  margin: 1.25rem 0; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 620px; height: auto; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .9rem; line-height: 1.45; max-width: 620px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .text { text-align: left; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 520px) {
  main { padding: 1.25rem .9rem 3rem; }
  h1 { font-size: 1.35rem; }
  th, td { padding: .3rem .45rem; }
}
@media print { details { break-inside: avoid; } figure { break-inside: avoid; } }
"""


# --- Markdown ---


def markdown_page(title: str, opening: Iterable[str], sections: Iterable[Section], captions: Mapping[str, str]) -> str:
    """Returns a report as Markdown that shows the figures from PNG files beside it.

    Args:
        title: Title of the page.
        opening: Paragraphs before the first section.
        sections: In reading order.
        captions: Text below each figure, by name.
    """
    parts = [f"# {markdown_text(title)}", *opening]
    for section in sections:
        parts += [f"## {markdown_text(section.title)}", markdown_paragraphs(section.text)]
        parts += [markdown_figure(Path(f"{name}.png"), captions[name]) for name in section.figures]
        for name, table in section.tables.items():
            parts += [f"**{markdown_text(name)}**", markdown_table(table, table.itertuples(index=False))]
    return encodable("\n\n".join(filter(None, parts)) + "\n")


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table; values that are not text yet are formatted by ``format_cell``."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *([format_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)


def markdown_figure(path: Path, caption: str) -> str:
    """Returns a figure with its caption below; the file's name is its alternative text."""
    return f"![{path.stem}]({path.as_posix()})\n\n{caption}"


def markdown_details(title: str, text: str) -> str:
    """Returns Markdown that is folded away below its title."""
    return f"<details><summary>{html_text(title)}</summary>\n\n{text}\n\n</details>"


def replace_section(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Replaces the text between the lines ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of a document.

    Raises:
        ValueError: If the document lacks one of these lines.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    before, found, rest = Path(path).read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"{path} has no lines {begin.strip()!r} and {end.strip()!r} to write between")
    with atomic_write(path, "w") as file:
        file.write(f"{before}{begin}\n{text.strip()}\n\n{end}{after}")
