import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from reporting.learning_curves import plot_learning_curves


@pytest.fixture
def plot(tmp_path, monkeypatch):
    """Returns a function that draws a table, and returns the figure; the file it was written to is checked."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **named: (drawn.append(self), save(self, *given, **named))
    )

    def draw(table):
        table.to_csv(tmp_path / "metrics.csv", index=False)
        written = plot_learning_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
        assert written == tmp_path / "curves.png"
        assert written.read_bytes().startswith(b"\x89PNG")
        return drawn[-1]

    return draw


def test_learning_curves_have_a_panel_per_metric_and_a_line_per_member(plot):
    rows = [(epoch, member, 1 / epoch, None, 0.5 / epoch, 1 - epoch) for epoch in (1, 2, 3) for member in (0, 1)]
    figure = plot(pd.DataFrame(rows, columns=["step", "model_id", "mse_loss", "train_mse", "val_mse", "nll"]))
    panels = {axes.get_title(): axes for axes in figure.axes}
    measured = ["training loss (mse)", "validation MSE", "validation NLL (nats)"]
    assert list(panels) == measured  # train_mse was never measured
    lines = panels["validation MSE"].lines
    assert [line.get_label() for line in lines] == ["member 0", "member 1"]
    np.testing.assert_allclose(lines[0].get_ydata(), [0.5, 0.25, 0.5 / 3])
    assert panels["validation MSE"].get_yscale() == "log"
    assert panels["validation NLL (nats)"].get_yscale() == "linear"  # not all values are positive
    assert figure.axes[0].get_legend() is not None


def test_the_loss_of_any_kind_of_ensemble_has_a_panel(plot):
    figure = plot(pd.DataFrame({"step": [0, 1], "model_id": 0, "student_t_loss": [2.0, 1.0], "val_mse": [4.0, 3.0]}))
    assert [axes.get_title() for axes in figure.axes] == ["training loss (student_t)", "validation MSE"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [2.0, 1.0])


def test_a_legend_of_many_members_is_left_out(plot):
    figure = plot(pd.DataFrame({"step": 0, "model_id": range(11), "val_mse": 1.0}))
    assert len(figure.axes[0].lines) == 11
    assert figure.axes[0].get_legend() is None
