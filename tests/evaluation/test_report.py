import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from evaluation import figures
from evaluation.report import CAPTIONS, headline_cards
from reporting.learning_curves import plot_learning_curves
from reporting.page import format_cell, html_table


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


def test_tables_escape_what_they_show_and_name_columns_in_words():
    table = html_table(pd.DataFrame({"dataset": ["<b>&"], "rmse_raw": [0.5], "left_range": [1]}))
    assert "&lt;b&gt;&amp;" in table
    assert "<b>" not in table
    assert ">RMSE, raw</th>" in table
    assert ">left range</th>" in table
    assert '<td class="text">' in table


def test_cards_show_the_last_horizon_up_to_25_and_leave_out_what_is_unknown():
    summary = {
        "nrmse": 0.5,
        "nrmse_no_change": 1.0,
        "crps_mixture": 0.1,
        "nll_mixture": -1.0,
        "coverage_90_raw": 0.876,
        "ece_raw": 0.1,
        "calibrated_horizon_tsinf_raw": 7.0,
        **{f"error_tsinf_{step}": float(step) for step in (1, 10, 50)},
        **{f"diverged_tsinf_{step}": 0.25 for step in (1, 10, 50)},
    }
    cards = {name: (value, reading) for name, value, reading in headline_cards(summary, [1, 10, 50])}
    assert cards["error after 10 steps"] == ("10", "tsinf, median; 25% diverged")
    assert cards["90 % interval covers"][0] == "87.6%"
    assert "recalibrated -" in cards["90 % interval covers"][1]
    assert "linear regression -" in cards["one-step nRMSE"][1]
    assert not any("finds" in name for name in cards)


def test_every_figure_has_a_caption():
    drawn = {name.removeprefix("draw_") for name in vars(figures) if name.startswith("draw_")} - {"figures"}
    assert drawn == set(CAPTIONS)


def test_exploded_rollouts_do_not_flatten_the_figure():
    table = pd.DataFrame({"horizon": [1, 2, 3], "median": [0.1, 10.0, 1e30]})
    names = ["tsinf", "ts1", "mean", "no_change", "member_0"]
    table = pd.concat([table.assign(propagation=name) for name in names])
    table["q25"], table["q75"] = table["median"] / 2, table["median"] * 2
    (axes,) = figures.draw_rollout_error(table).axes
    assert axes.get_ylim()[1] == 1e6
    table["median"] = np.inf
    figures.draw_rollout_error(table)  # nothing finite to draw is no error


def test_many_dimensions_are_labelled_sparsely():
    _, axes = figures._panel("", "", "")
    figures._name_dimensions(axes, list(map(str, range(111))))
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) <= 20
    assert labels[:2] == ["0", "6"]


def test_unseen_cells_are_numbers_and_seen_ones_are_said():
    table = pd.DataFrame(
        {"model": ["a", "a"], "dataset": ["x", "y"], "trained_on": [True, False], "rmse": [np.nan, 0.25]}
    )
    (axes,) = figures.draw_cross_dataset(table).axes
    assert [text.get_text() for text in axes.texts] == ["seen", "0.25"]
    assert len(axes.patches) == 1


def test_learning_curves_have_a_panel_per_metric_and_a_line_per_member(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: (drawn.append(self), save(self, *args)))
    rows = [(epoch, member, 1 / epoch, None, 0.5 / epoch) for epoch in (1, 2, 3) for member in (0, 1)]
    table = pd.DataFrame(rows, columns=["step", "model_id", "mse_loss", "train_mse", "val_mse"])
    table.to_csv(tmp_path / "metrics.csv", index=False)
    written = plot_learning_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert written == tmp_path / "curves.png"
    assert written.read_bytes().startswith(b"\x89PNG")
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    assert list(panels) == ["training loss (squared error)", "validation MSE"]  # train_mse was never measured
    lines = panels["validation MSE"].lines
    assert [line.get_label() for line in lines] == ["member 0", "member 1"]
    np.testing.assert_allclose(lines[0].get_ydata(), [0.5, 0.25, 0.5 / 3])
    assert panels["validation MSE"].get_yscale() == "log"
