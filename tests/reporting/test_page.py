import base64
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reporting.page import (
    Section,
    format_cell,
    html_page,
    html_table,
    markdown_details,
    markdown_figure,
    markdown_page,
    markdown_table,
    replace_section,
)

TABLE = pd.DataFrame({"dataset": ["<b>&"], "rmse_raw": [0.51234], "left_range": [1]})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("tsinf", "tsinf"),
        (256, "256"),
        (np.int64(12345), "12,345"),
        (0.123456, "0.123"),
        (np.float64(12345.6), "12,346"),
        (1.5e6, "1.5e+06"),
        (np.inf, "inf"),
        (np.nan, "-"),
        (None, "-"),
        (True, "yes"),
        (np.bool_(False), "no"),
    ],
)
def test_cells_are_made_to_be_read(value, text):
    assert format_cell(value) == text


# --- HTML ---


def test_tables_escape_what_they_show_and_name_columns_in_words():
    table = html_table(TABLE, {"rmse_raw": "RMSE, raw"})
    assert "&lt;b&gt;&amp;" in table
    assert "<b>" not in table
    assert ">RMSE, raw</th>" in table
    assert ">left range</th>" in table
    assert '<td class="text">' in table
    assert "<td>0.512</td>" in table


@pytest.fixture
def sections():
    """A section with everything and one with nothing but its title."""
    full = Section("How <far>?", "Some & text.", ["one_step"], {"Shown": TABLE}, {"Folded": TABLE})
    return [full, Section("Empty")]


def test_an_html_page_holds_everything_itself(sections):
    page = html_page(
        "A < B", "<p>first</p>", sections, {"one_step": b"\x89PNG"}, {"one_step": "A & B"}, headings={}, style="i {}"
    )
    assert "<title>A &lt; B</title>" in page and "<h1>A &lt; B</h1>\n<p>first</p>" in page
    assert page.index("first") < page.index("<h2>How &lt;far&gt;?</h2><p>Some &amp; text.</p>") < page.index("Empty")
    (image,) = re.findall(r'<img alt="one step" src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(image) == b"\x89PNG"
    assert "<figcaption>A &amp; B</figcaption>" in page
    assert "<h3>Shown</h3><div" in page and "<details><summary>Folded</summary><div" in page
    assert "<section><h2>Empty</h2></section>" in page
    assert "i {}</style>" in page
    assert "http" not in page and "<script" not in page


# --- Markdown ---


def test_a_markdown_page_leaves_out_what_html_folds_away(sections):
    page = markdown_page("A < B", ["first", ""], sections, {"one_step": "A & B"})
    assert page.startswith(
        "# A < B\n\nfirst\n\n## How &lt;far>?\n\nSome & text.\n\n![one_step](one_step.png)\n\nA & B\n\n"
    )
    assert "**Shown**\n\n| dataset | rmse_raw | left_range |\n| --- | --- | --- |\n| &lt;b>& | 0.512 | 1 |" in page
    assert "Folded" not in page
    assert page.endswith("\n\n## Empty\n")


def test_markdown_tables_take_rows_of_any_kind():
    assert (
        markdown_table(["a", "b"], [("x", 0.12345), ["y", None]])
        == "| a | b |\n| --- | --- |\n| x | 0.123 |\n| y | - |"
    )
    assert markdown_table(["a"], []) == "| a |\n| --- |"


def test_markdown_figures_and_details():
    assert markdown_figure(Path("plots") / "speed.png", "Fast.") == "![speed](plots/speed.png)\n\nFast."
    assert markdown_details("More", "text") == "<details><summary>More</summary>\n\ntext\n\n</details>"


def test_a_section_of_a_document_is_replaced_and_nothing_else(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- begin x -->\nold\n<!-- end x -->\nafter\n<!-- begin y -->\n<!-- end y -->\n")
    replace_section(document, "x", "new\n")
    assert document.read_text() == (
        "before\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nafter\n<!-- begin y -->\n<!-- end y -->\n"
    )


@pytest.mark.parametrize("text", ["no lines\n", "<!-- begin x -->\n", "<!-- end x -->\n<!-- begin x -->\n"])
def test_a_document_without_the_section_is_left_alone(tmp_path, text):
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(ValueError, match="has no lines '<!-- begin x -->' and '<!-- end x -->'"):
        replace_section(document, "x", "new")
    assert document.read_text() == text
