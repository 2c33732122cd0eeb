"""Names out of data and files, written so that each target shows them as they are: one function per target.

Names of datasets, arms and runs are chosen by whoever made the data. To figures, pages and spreadsheets some characters
are more than text: a formula, a tag, the end of a cell.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogFormatter, ScalarFormatter

_FORMULA = ("=", "+", "-", "@")


def encodable(text: str) -> str:
    """Returns text that UTF-8 can express: names of files may hold bytes that are no text, which are shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """Returns text on one line, in which what cannot be seen is shown escaped."""
    text = " ".join(encodable(text).split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def html_text(text: str) -> str:
    """Returns text for a page."""
    return html.escape(one_line(text))


def markdown_text(text: str) -> str:
    """Returns text for a heading or a cell; emphasis and code are left as they are, tags and ends of cells are not."""
    return re.sub(r"(?<!\\)\|", r"\\|", markdown_paragraphs(one_line(text)))


def markdown_paragraphs(text: str) -> str:
    """Returns text that may have several paragraphs; as ``markdown_text``, but bars are left as they are."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", encodable(text))


def figure_text(text: str) -> str:
    """Returns text for a figure: a dollar is a dollar, not the begin of a formula."""
    return re.sub(r"(?<!\\)\$", r"\\$", encodable(text))


def spreadsheet_table(table: pd.DataFrame) -> pd.DataFrame:
    """Returns a table whose CSV no spreadsheet takes for formulas: text that would begin one gets an apostrophe."""
    columns = [name for name in table if pd.api.types.is_string_dtype(table[name]) or table[name].dtype == object]
    return table.assign(
        **{
            name: table[name].map(lambda value: spreadsheet_text(value) if isinstance(value, str) else value)
            for name in columns
        }
    )


def spreadsheet_text(text: str) -> str:
    """Returns text as it stands in the tables of ``spreadsheet_table``."""
    text = one_line(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


@contextmanager
def plain_texts(figure: Figure) -> Iterator[None]:
    """Makes every text of a figure show what it says, whoever set it, for the block that draws the figure."""
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    ticks = [tick for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks)]
    set_when_drawn = {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if id(text) not in set_when_drawn:
            text.set_text(figure_text(text.get_text()))
    for axis in axes:
        formatter = axis.get_major_formatter()
        if not isinstance(formatter, (ScalarFormatter, LogFormatter)):  # these write numbers, the others names
            axis.set_major_formatter(FuncFormatter(lambda value, at, inner=formatter: figure_text(inner(value, at))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it is drawn as a box
        yield
