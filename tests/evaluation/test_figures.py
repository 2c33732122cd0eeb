import numpy as np
import pandas as pd

from evaluation import figures
from evaluation.report import CAPTIONS


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


def test_the_skill_that_is_half_kept_is_marked():
    table = pd.DataFrame({"horizon": [1, 2, 3], "skill": [0.8, 0.5, 0.1]})
    names = ["tsinf", "ts1", "mean", "no_change", "tsinf_clamped"]
    (axes,) = figures.draw_rollout_skill(pd.concat([table.assign(propagation=name) for name in names])).axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == [
        "tsinf: half kept for 2",
        "tsinf, clamped",
        "ts1: half kept for 2",
        "mean: half kept for 2",
        "no change",
    ]
    marks = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert marks == [[[2, 0.5]]] * 3


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
