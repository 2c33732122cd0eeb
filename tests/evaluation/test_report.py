import numpy as np
import pandas as pd

from evaluation import figures
from evaluation.report import CAPTIONS, headline_cards


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
