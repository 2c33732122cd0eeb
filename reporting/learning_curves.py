"""Learning curves of a run, from its CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure  # no pyplot: no global state, no display

from reporting.style import png
from utils import atomic_write

_TITLES = {
    "train_mse": "training MSE",
    "val_mse": "validation MSE",
    "nll": "validation NLL (nats)",
    "lr": "learning rate",
    "reward_val_mse": "reward, validation MSE",
}
_MOST_LABELS = 10  # a legend with more members would hide the lines


def plot_learning_curves(metrics_csv: Path, figure_png: Path) -> Path:
    """Draws a panel per metric and a line per member, on a log axis where all values are positive.

    Args:
        metrics_csv: What a run logged; errors are in normalised units.
        figure_png: Where the figure goes.

    Returns:
        ``figure_png``, now written.

    Raises:
        OSError: If the CSV is not there, or is that of something else, as the run's could not be written.
    """
    try:
        table = pd.read_csv(metrics_csv)
    except ValueError as error:
        raise OSError(f"{metrics_csv} has no metrics to draw") from error
    losses = [name for name in table if name.endswith("_loss")]  # each kind of ensemble has its own
    titles = {name: f"training loss ({name.removesuffix('_loss')})" for name in losses} | _TITLES
    names = [name for name in titles if name in table and table[name].notna().any()]
    if not names:
        raise OSError(f"{metrics_csv} has no metrics to draw")
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        for member, rows in table.dropna(subset=[name]).groupby("model_id"):
            marker = "." if len(rows) < 40 else None
            axes.plot(rows["step"] + 1, rows[name], marker=marker, lw=1, label=f"member {member}")
        axes.set(xlabel="epoch", title=titles[name])
        if (table[name].dropna() > 0).all():
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    if len(figure.axes[0].lines) <= _MOST_LABELS:
        figure.axes[0].legend(fontsize="x-small")
    for axes in figure.axes[len(names) :]:
        axes.set_visible(False)
    with atomic_write(figure_png) as file:
        file.write(png(figure, dpi=120))
    return figure_png
