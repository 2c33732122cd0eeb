"""Pages that need nothing but themselves: sections of text, figures and tables, as HTML."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd

from utils import atomic_write


@dataclass(frozen=True)
class Section:
    """A part of the page: what it asks, its figures by name, tables to show and tables to open by title."""

    title: str
    text: str
    figures: Sequence[str]
    tables: dict[str, pd.DataFrame]
    details: dict[str, pd.DataFrame]


def html_table(table: pd.DataFrame) -> str:
    """Returns a table as HTML, with numbers to three digits; it scrolls by itself where the screen is narrow."""
    names = [HEADINGS.get(name, str(name).replace("_", " ")) for name in table]
    kinds = [' class="text"' if pd.api.types.is_string_dtype(table[name]) else "" for name in table]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    rows = []
    for row in table.itertuples(index=False):
        cells = (f"<td{kind}>{html.escape(format_cell(value))}</td>" for kind, value in zip(kinds, row, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def format_cell(value: object) -> str:
    """Formats a value for reading: whole numbers whole, others to three digits, what is missing as a dash."""
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return "-"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Integral) or 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


PAGE = """<!DOCTYPE html>
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
CSS = """
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
HEADINGS = {
    "rmse": "nRMSE",
    "rmse_raw": "RMSE, raw",
    "r2": "R²",
    "nll": "NLL (nats)",
    "nll_raw": "NLL, raw",
    "crps": "CRPS",
    "crps_raw": "CRPS, raw",
    "mean_z2": "mean z²",
    "ece": "calibration error",
    **{f"coverage_{level}": f"in {level} % interval" for level in (50, 80, 90, 95)},
    "auroc": "AUROC",
    "auroc_worst": "AUROC, worst 10 %",
    "q10": "10 %",
    "q25": "25 %",
    "q75": "75 %",
    "q90": "90 %",
    "no_change": "no change",
    "horizon": "steps",
}


def replace_section(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Replaces what a document has between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, each a line of its own.

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
