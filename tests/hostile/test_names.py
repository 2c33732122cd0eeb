"""Names out of data and files: text wherever they are shown, and never the end of a command."""

import csv
import html
import io
import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from evaluate_model import main as evaluate_main
from learn_model import main
from reporting.escape import figure_text, markdown_text, one_line, spreadsheet_table
from reporting.page import Section, html_page, markdown_page, markdown_table
from reporting.style import png
from tracking.mlflow_store import find_experiment, mlflow_text, open_client, tracking_uri
from tracking.run_folder import claim_name

NAMES = [
    *("$", "$$", "$^{", "$\\frac{1}{2}$", "a$b$c", "\\$", "$\\mathdefault{", "_^_", "\\", "\\n", "%s{}{0}"),
    *("'", '"', "`", "a'b\"c", "'; DROP TABLE runs; --", "|", "a|b|c", "\\|", "||", "*a*", "[a](b)", "# a", "---"),
    *("<script>alert(1)</script>", "<b>", "</td>", "<!--", "a < b", "a & b", "&lt;", "<img src=x onerror=y>"),
    *("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "\n=1"),
    *("a\nb", "a\r\nb", "a\tb", "\0", "\x1b[2J", "\x7f", "\u202eabc", "\u2028", "\udcff", "a\udc80b", "\ufeff"),
    *("", " ", "x" * 300, "é" * 300, "\u6f22\u5b57", "\U0001f600", "..", "../../x", "/etc/passwd", "con", ".", "-x"),
]
IDS = [f"{index}: {ascii(name)[:20]}" for index, name in enumerate(NAMES)]
named = pytest.mark.parametrize("name", NAMES, ids=IDS)


@named
def test_figures_show_it(name):
    """As title, label, legend, tick labels, categories and annotation: it draws, and shows no formula."""
    figure = Figure(figsize=(2, 2), layout="constrained")
    axes, categories = figure.subplots(1, 2)
    axes.plot([1, 10, 1000], label=name or "empty")
    axes.set(yscale="log", title=name, xlabel=name)
    axes.set_xticks([0, 1], [name, "plain"])
    axes.annotate(name, (0, 1))
    axes.legend()
    categories.bar([name, "plain"], [1, 2])
    figure.suptitle(name)
    assert png(figure, dpi=30).startswith(b"\x89PNG")
    shown = [text.get_text() for text in (axes.title, axes.xaxis.label, figure._suptitle)]
    assert shown == [figure_text(name)] * 3
    assert len(re.findall(r"(?<!\\)\$", figure_text(name))) == 0
    assert categories.get_xticklabels()[0].get_text() == figure_text(name)


@named
def test_pages_show_it_as_text(name):
    table = pd.DataFrame({"name": pd.Series([name], dtype=object), "value": [1.0]})
    table.columns = pd.Index(["name", name or "column"], dtype=object)
    page = html_page(name, "", [Section(name, name, tables={name: table})], {}, {}, headings={})
    page.encode()
    shown = html.escape(one_line(name))
    assert f"<h1>{shown}</h1>" in page and f"<h2>{shown}</h2>" in page and f'<td class="text">{shown}</td>' in page
    assert "<script" not in page and "<img" not in page and "<!--" not in page


@named
def test_markdown_shows_it_in_one_cell(name):
    table = markdown_table(["a", name], [[name, "b"], ["c", name]])
    lines = table.encode().decode().split("\n")
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}
    assert not re.search(r"<[a-z/!]", table)
    assert markdown_page(name, [], [Section(name)], {}).encode().count(b"\n") == 3


@named
def test_spreadsheets_calculate_nothing(name):
    frame = pd.DataFrame({"name": pd.Series([name, "plain"], dtype=object), "value": [-1.0, 2.0], "count": [-1, 2]})
    text = io.StringIO()
    spreadsheet_table(frame).to_csv(text, index=False)
    text.getvalue().encode()
    read = list(csv.reader(io.StringIO(text.getvalue(), newline="")))
    assert not read[1][0].startswith(("=", "+", "-", "@", " ", "\t"))
    assert read[1][1:] == ["-1.0", "-1"], "numbers are left alone"


@named
def test_runs_are_called_so_that_a_folder_may_be(name, tmp_path):
    claimed = claim_name(tmp_path / "logs", name)
    assert re.fullmatch(r"[\w-][\w.+-]*", claimed)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [claimed]


def test_mlflow_takes_and_finds_every_name(empty_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, "mlflow.db")
    client = open_client(tracking_uri())
    experiment = find_experiment(client, "names")
    for name in filter(None, map(mlflow_text, NAMES)):
        run_id = client.create_run(experiment, run_name=name, tags={"dataset": name}).info.run_id
        found = client.search_runs([experiment], f"attributes.run_name = '{name}' and tags.dataset = '{name}'")
        assert run_id in [run.info.run_id for run in found], ascii(name)


def test_lines_stay_lines():
    assert all(one_line(name).isprintable() for name in NAMES)
    assert markdown_text("a < b <0.01 `c`") == "a < b <0.01 `c`", "only tags and ends of cells are in the way"


def dataset(path):
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(320, 2)).astype("f4")
        file["actions"] = random.normal(size=(320, 1)).astype("f4")
        file["rewards"], file["terminals"] = np.zeros(320, "f4"), np.zeros(320, bool)
        file["timeouts"] = np.arange(320) % 40 == 39
    return path


@pytest.mark.parametrize("name", ["$^{", "=1+1|<b>'", "a\udcffb\n"], ids=ascii)
def test_a_dataset_of_any_name_is_learned_from_and_evaluated(workplace, capfd, name):
    path = dataset(f"{name}.hdf5")
    Path("c.yaml").write_text("fit_epochs: 2\nensemble_size: 2\nhidden_size: [8]\n")
    learning = ["--dataset", path, "--config", "c.yaml", "--cpu", "--quiet", "--holdout_ratio", "0.3"]
    assert main([*learning, "--test_ratio", "0.3"]) == 0
    (run,) = Path("logs").iterdir()
    assert re.fullmatch(r"[\w-][\w.+-]*", run.name)
    run_id = json.loads((run / "run.json").read_text())["mlflow_run_id"]
    assert open_client(tracking_uri()).get_run(run_id).data.tags["dataset"] == mlflow_text(path)
    capfd.readouterr()
    evaluating = ["--model", "model.pkl", "--dataset", path, "--cpu", "--output", "report", "--horizons", "1", "5"]
    assert evaluate_main(evaluating) == 0
    assert "Traceback" not in capfd.readouterr().err
    page = Path("report/report.html").read_text()
    assert "<b>'" not in page
