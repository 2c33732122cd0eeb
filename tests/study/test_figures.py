import numpy as np
import pandas as pd
import pytest

from study import figures
from study.analysis import against_first, analyse
from study.cells import CellKey
from study.figures import CAPTIONS, arm_colours, draw_curves, draw_figures


@pytest.fixture(scope="module")
def tables(make_study):
    """Tables of two arms on two datasets, one training of which failed."""
    study = make_study(datasets=("x", "y"), seeds=7, failing=[CellKey("b", "y", 1)], policies=True)
    rates = [(arm, name, rate, rate, rate == 0.1) for arm in "ab" for name in "xy" for rate in (0.1, 0.2)]
    rates = pd.DataFrame(rates, columns=["arm", "dataset", "fit_lr", "val_mse", "is_chosen"])
    horizons = pd.DataFrame({"dataset": ["x", "y"], "horizon": [10, 5]})
    return analyse(study, {"x": 10, "y": 5}) | {"learning_rates": rates, "horizons": horizons}


def test_every_figure_has_a_caption(tables):
    images = draw_figures(tables)
    assert images.keys() == CAPTIONS.keys()
    assert all(image.startswith(b"\x89PNG") for image in images.values())


def test_rates_that_were_given_have_no_figure(tables):
    given = tables | {"learning_rates": tables["learning_rates"].drop(columns="val_mse")}
    assert CAPTIONS.keys() - draw_figures(given).keys() == {"sensitivity"}


def test_an_arm_has_one_colour_whatever_the_others_are():
    both = arm_colours(["dnn", "pnn"]), arm_colours(["pnn", "mine", "dnn", "dnn"])
    assert both[0]["pnn"] == both[1]["pnn"] and both[0]["dnn"] == both[1]["dnn"]
    assert len(set(both[1].values())) == 3
    assert len(set(arm_colours(f"arm{n}" for n in range(8)).values())) == 8


def test_effects_have_a_panel_per_metric_a_line_per_dataset_and_the_margin(tables):
    panels = figures.draw_effects(against_first(tables["paired"])).axes
    assert [axes.get_title() for axes in panels][:3] == ["nRMSE", "median error", "NLL"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["x", "y"]
    (points,) = [line for line in panels[0].lines if line.get_label() == "b"]
    np.testing.assert_allclose(points.get_xdata(), [2.0, 2.0])
    band = panels[0].patches[0].get_extents().transformed(panels[0].transData.inverted())
    np.testing.assert_allclose([band.x0, band.x1], [0.95, 1.05])


def test_the_chosen_horizon_is_marked(tables):
    axes = figures.draw_horizon(tables["horizon"], tables["horizons"]).axes
    for panel, horizon in zip(axes, (10, 5), strict=True):
        assert any(np.allclose(line.get_xdata(), horizon) for line in panel.lines)


def test_calibration_has_a_line_per_arm(tables):
    (first, _) = figures.draw_calibration(tables["reliability"]).axes
    named = [line for line in first.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == ["calibrated", "a", "b"]
    np.testing.assert_allclose(named[1].get_ydata(), [0.4, 0.8])


def test_stability_shows_members_and_stray_ones(tables):
    spread, stray = figures.draw_stability(tables["stability"]).axes
    assert [len(line.get_xdata()) for line in spread.lines] == [len(line.get_xdata()) for line in stray.lines] == [2, 2]
    assert spread.lines[0].get_color() != spread.lines[1].get_color()


def test_sensitivity_fills_the_marker_of_the_chosen_rate(tables):
    axes = figures.draw_sensitivity(tables["learning_rates"]).axes[0]
    chosen = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in chosen] == [0.1, 0.1]


def test_values_have_a_marker_per_policy(tables):
    first = figures.draw_values(tables["policies_values"]).axes[0]
    lines = {line.get_label(): line for line in first.lines}
    assert lines.keys() == {"right", "a", "b"}
    np.testing.assert_allclose(lines["b"].get_xdata(), range(6))
    np.testing.assert_allclose(lines["b"].get_ydata()[0], 0.4 * 1.3)  # the mean over seven seeds


def test_the_metric_that_foresees_best_stands_first(tables):
    foreseen = tables["policies_foreseen"]
    (axes,) = figures.draw_foreseen(foreseen).axes
    first = foreseen[foreseen.dataset == "all datasets"].iloc[0]
    (points,) = [line for line in axes.lines if line.get_label() == "mean over datasets"]
    assert points.get_xdata()[0] == first.rho and points.get_ydata()[0] == 0
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_splits_and_twins_are_drawn(tables):
    cells = pd.concat([tables["cells"].assign(split=split) for split in (0, 1, 2)])
    twins = tables["paired"].assign(arm="a_ln", reference="a")
    assert all(image.startswith(b"\x89PNG") for image in (figures.draw_splits(cells), figures.draw_twins(twins)))


def test_titles_fit_their_panels(tables):
    for draw, name in ((figures.draw_effects, "paired"), (figures.draw_calibration, "reliability")):
        figure = draw(against_first(tables[name]) if name == "paired" else tables[name])
        figure.draw_without_rendering()
        for axes in figure.axes:
            width = axes.title.get_window_extent().width
            assert width <= axes.get_window_extent().width


def test_curves_have_a_row_per_metric(tables):
    values = pd.concat([tables["values"].assign(fit_epochs=epochs) for epochs in (10, 20)])
    assert draw_curves(values, "fit_epochs", "epochs").startswith(b"\x89PNG")
