import re

import pandas as pd
import pytest

from config import LearnConfig
from study.analysis import POOLED
from study.cells import CellKey
from study.grid import Grid
from study.report import answers, interval_text, rates_at_the_edge, side_by_side, write_study

ARMS = {"a": LearnConfig(fit_lr=0.1), "b": LearnConfig(fit_lr=0.1, probabilistic=True)}
RATES = pd.DataFrame({"arm": ["a", "b"], "fit_lr": 0.1, "is_chosen": True})


@pytest.fixture
def grid():
    """Two arms on the dataset ``one`` with four seeds."""
    return Grid(ARMS, ["data/one.hdf5"], seeds=4, split_seed=0, device="cpu", threads=2)


def paired_rows():
    common = {"metric": "nrmse", "arm": "b", "reference": "a", "low": 1.1, "high": 1.5}
    rows = [("x", 1.25, 0.02), ("y", 0.8, 0.01), ("z", 0.7, 0.9), (POOLED, 1.3, None)]
    return pd.DataFrame([common | {"dataset": name, "ratio": ratio, "p_holm": p} for name, ratio, p in rows])


def test_a_study_leaves_tables_figures_and_reports(tmp_path, make_study, dataset, grid):
    results = make_study(datasets=("one",), seeds=3, failing=[CellKey("b", "one", 2)])
    command = "python compare_models.py --seeds 4"
    files = write_study(tmp_path, results, RATES, grid, {"data/one.hdf5": dataset}, command)
    tables = ["cells", "values", "paired", "aggregates", "improvement", "stability", "horizon", "reliability"]
    names = [f"{name}.csv" for name in tables] + [
        f"{name}.png" for name in ("ratios", "horizon", "calibration", "stability")
    ]
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
    assert command in text and command in page
    assert page.count("data:image/png") == 4
    assert ">steps</th>" in page
    assert "http" not in page.partition("How it was made")[0]
    sections = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert sections == re.findall(r"<h2>(.*?)</h2>", page)
    assert sections[0] == "What is compared" and sections[-1] == "How it was made"


def test_a_study_whose_trainings_all_failed_cannot_be_analysed(tmp_path, make_study, dataset, grid):
    results = make_study(datasets=("one",), seeds=1, failing=[CellKey("a", "one", 0), CellKey("b", "one", 0)])
    with pytest.raises(FileNotFoundError, match="no cell whose training has succeeded"):
        write_study(tmp_path, results, RATES, grid, {"one": dataset}, "")
    assert list(tmp_path.iterdir()) == []


def test_answers_count_datasets_on_which_an_arm_is_clearly_better_or_worse():
    (line,) = answers(paired_rows()).to_dict("records")
    assert line == {"": "one-step nRMSE", "b / a": "1.3 [1.1, 1.5]; better on 1, worse on 1 of 3"}


def test_values_stand_side_by_side_with_their_intervals():
    paired = paired_rows()
    wide = side_by_side(paired, "ratio", paired.arm + " / " + paired.reference)
    assert list(wide) == ["metric", "dataset", "b / a"]
    assert wide["b / a"].tolist() == ["1.25 [1.1, 1.5] *", "0.8 [1.1, 1.5] *", "0.7 [1.1, 1.5]", "1.3 [1.1, 1.5]"]
    assert interval_text(pd.Series({"value": 0.5}), "value") == "0.5"


def test_rates_at_the_edge_of_the_candidates_are_said():
    chosen = {"low": 0.1, "middle": 0.2, "high": 0.3}
    rows = [(arm, rate, rate == best) for arm, best in chosen.items() for rate in (0.1, 0.2, 0.3)]
    text = rates_at_the_edge(pd.DataFrame(rows, columns=["arm", "fit_lr", "is_chosen"]))
    assert text.endswith("may lie: low 0.1, high 0.3.")
    assert (
        rates_at_the_edge(pd.DataFrame([r for r in rows if r[0] == "middle"], columns=["arm", "fit_lr", "is_chosen"]))
        == ""
    )
