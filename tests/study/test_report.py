import re

import pandas as pd
import pytest

from config import LearnConfig
from study.analysis import POOLED
from study.cells import CellKey
from study.grid import Grid
from study.report import (
    answers,
    by_dataset,
    claim_sections,
    interval_text,
    rates_at_the_edge,
    time_by_part,
    write_study,
)
from study.tuning import Tuning
from study.verdicts import judge_claims

ARMS = {"a": LearnConfig(fit_lr=0.1), "b": LearnConfig(fit_lr=0.1, probabilistic=True)}
RATES = [(arm, "one", rate, rate, rate, rate, 0, rate == 0.1) for arm in "ab" for rate in (0.1, 0.2)]
COLUMNS = ["arm", "dataset", "fit_lr", "val_mse", "best", "worst", "stray", "is_chosen"]
TUNING = Tuning(
    pd.DataFrame(RATES, columns=COLUMNS),
    pd.DataFrame({"dataset": ["one"], "horizon": [10], "arm": ["a"], "skill": [0.6]}),
)


@pytest.fixture
def grid():
    """Two arms on the dataset ``one`` with four seeds."""
    return Grid(ARMS, ["data/one.hdf5"], seeds=range(4), split_seeds=[0], device="cpu", threads=2)


def paired_rows():
    common = {"metric": "nrmse", "arm": "b", "reference": "a", "low": 1.1, "high": 1.5, "least": None, "most": None}
    rows = [("x", 1.25, "worse"), ("y", 0.8, "better"), ("z", 0.7, "better")]
    lines = [common | {"dataset": name, "effect": effect, "verdict": verdict} for name, effect, verdict in rows]
    lines.append(common | {"dataset": POOLED, "effect": 1.3, "least": 0.7, "most": 1.25, "verdict": "worse"})
    return pd.DataFrame(lines)


def test_a_study_leaves_tables_figures_and_reports(tmp_path, make_study, dataset, grid):
    results = make_study(datasets=("one",), seeds=3, failing=[CellKey("b", "one", 2)])
    command = "python compare_models.py --seeds 4"
    files = write_study(tmp_path, results, TUNING, grid, {"data/one.hdf5": dataset}, command)
    tables = "cells values paired stability uncertainty claims horizon reliability sensitivity extent"
    figures = "horizon calibration stability effects sensitivity"
    names = [f"{name}.csv" for name in tables.split()] + ["timings.json"] + [f"{name}.png" for name in figures.split()]
    assert [path.name for path in files] == [*names, "report.md", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)

    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert text.startswith(
        "# a, b on one\n\n6 of 8 runs (2 arms, 1 datasets, 4 seeds), 1 of which failed; 6.0 hours of training and "
        "evaluation with 2 threads."
    )
    assert "| probabilistic | False | True |" in text
    assert (
        "| one | 360 | d1ge57 | 240 in 8 trajectories | 60 in 2 trajectories | 60 in 2 trajectories | nothing found |"
        in text
    )
    assert "| c0ffee | 3.11 | 2.9 | 2.1 | 6 |" in text
    assert "| one | 10 | a | 0.6 |" in text
    assert command in text and command in page
    assert page.count("data:image/png") == 5
    assert "http" not in page.partition("How it was made")[0]
    sections = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert sections == re.findall(r"<h2>(.*?)</h2>", page)
    assert sections[:2] == ["What is compared", "Dataset by dataset"] and sections[-1] == "How it was made"


def test_a_report_of_unclean_cells_says_so(tmp_path, make_study, make_cell, make_result, dataset, grid):
    results = make_study(datasets=("one",), seeds=1)
    key = CellKey("a", "one", 0)
    results[key] = make_result(make_cell("a", seed=0), results[key].tables, commit="c0ffee+")
    write_study(tmp_path, results, TUNING, grid, {"data/one.hdf5": dataset}, "")
    assert "Not for publication: 1 cells are of code that no commit has." in (tmp_path / "report.md").read_text()


def test_a_study_whose_trainings_all_failed_cannot_be_analysed(tmp_path, make_study, dataset, grid):
    results = make_study(datasets=("one",), seeds=1, failing=[CellKey("a", "one", 0), CellKey("b", "one", 0)])
    with pytest.raises(FileNotFoundError, match="no cell whose training has succeeded"):
        write_study(tmp_path, results, TUNING, grid, {"one": dataset}, "")
    assert list(tmp_path.iterdir()) == []


def test_answers_count_datasets_and_give_a_mean_with_its_range():
    (line,) = answers(paired_rows()).to_dict("records")
    assert line == {"": "nRMSE", "b / a": "worse 1, better 2; 1.3 (0.7 to 1.25)"}


def test_effects_stand_side_by_side_with_what_they_mean():
    wide = by_dataset(paired_rows())
    assert list(wide) == ["metric", "dataset", "b / a"]
    assert wide["b / a"].tolist() == ["1.25 [1.1, 1.5] worse", "0.8 [1.1, 1.5] better", "0.7 [1.1, 1.5] better"]
    assert interval_text({"value": 0.5, "low": float("nan"), "high": float("nan")}, "value") == "0.5"


def test_the_time_of_trainings_is_told_by_part():
    rows = [("a", "x", "training", 2, 30.0), ("a", "x", "test", 2, 10.0), ("b", "x", "training", 1, 90.0)]
    timings = pd.DataFrame(rows, columns=["arm", "dataset", "part", "runs", "seconds"])
    training, test = time_by_part(timings).to_dict("records")
    assert training == {"part": "training", "seconds": "50.0", "share": "88%", "least": "30.0 a", "most": "90.0 b"}
    assert (test["seconds"], test["share"]) == ("6.7", "12%")


def test_only_claims_that_the_study_speaks_to_are_shown():
    pnn = {"metric": "nrmse", "arm": "pnn_beta", "reference": "pnn", "dataset": "x", "low": 0.5, "high": 0.6}
    (section,) = claim_sections(judge_claims({"paired": pd.DataFrame([pnn])}))
    (table,) = section.tables.values()
    assert table["holds on"].tolist() == ["x"] and table.verdict.tolist() == ["cannot tell"]  # NLL is missing
    assert claim_sections(judge_claims({})) == []


def test_rates_at_the_edge_of_what_was_tried_are_said():
    table = pd.DataFrame({"arm": ["low", "mid"], "dataset": "x", "fit_lr": [0.1, 0.2], "is_edge": [True, False]})
    assert rates_at_the_edge(table).endswith("may lie: low on x 0.1.")
    assert rates_at_the_edge(table[1:]) == ""
