import numpy as np
import pytest

from study import figures
from study.analysis import PRIMARY, analyse
from study.cells import CellKey
from study.figures import CAPTIONS, LABELS, draw_figures


@pytest.fixture(scope="module")
def tables(make_study):
    """Tables of two arms on two datasets, one training of which failed."""
    return analyse(make_study(datasets=("x", "y"), failing=[CellKey("b", "y", 1)]))


def test_every_figure_has_a_caption_and_every_metric_a_label(tables):
    images = draw_figures(tables)
    assert images.keys() == CAPTIONS.keys()
    assert LABELS.keys() == PRIMARY.keys()
    assert all(image.startswith(b"\x89PNG") for image in images.values())


def test_ratios_have_a_panel_per_metric_and_a_line_per_dataset(tables):
    panels = figures.draw_ratios(tables["paired"]).axes
    assert [axes.get_title() for axes in panels] == list(LABELS.values())
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["x", "y", "all datasets"]
    points = next(line for line in panels[0].lines if line.get_label() == "b / a")
    np.testing.assert_allclose(points.get_xdata(), [2.0, 2.0])


def test_stability_shows_every_run_and_marks_what_failed(tables):
    panels = figures.draw_stability(tables["cells"]).axes
    assert [axes.get_title() for axes in panels] == ["x", "y"]
    of_arms = [[line for line in axes.lines if line.get_marker() != "x"] for axes in panels]
    assert [[len(line.get_xdata()) for line in lines] for lines in of_arms] == [[3, 3], [3, 2]]
    crosses = [[line for line in axes.lines if line.get_marker() == "x"] for axes in panels]
    assert [len(lines) for lines in crosses] == [0, 1]
    assert crosses[1][0].get_color() == of_arms[1][1].get_color()  # an arm has one colour
    assert of_arms[1][0].get_color() != of_arms[1][1].get_color()


def test_what_is_close_looks_close(make_study):
    cells = analyse(make_study(seeds=1))["cells"]
    cells["nrmse"] = [1.0, 1.001]
    (axes,) = figures.draw_stability(cells).axes
    low, high = axes.get_ylim()
    assert high / low >= 1.49


def test_exploded_rollouts_leave_the_picture(tables):
    table = tables["horizon"].copy()
    table.loc[table.propagation == "tsinf", ["error", "high"]] = 1e6
    axes = figures.draw_horizon(table, tables["paired"]).axes[0]
    assert axes.get_ylim()[1] <= 30 * 500.1  # "no change" errs by 500 after 50 steps
    assert any(np.allclose(line.get_xdata(), 10) for line in axes.lines)  # the horizon of the primary metric


def test_calibration_has_a_line_per_arm_and_variant(tables):
    (first, _) = figures.draw_calibration(tables["reliability"]).axes
    named = [line for line in first.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == ["calibrated", "a", "b"]
    np.testing.assert_allclose(named[1].get_ydata(), [0.4, 0.8])
