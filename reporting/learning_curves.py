"""Learning curves of a run, from its CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

_LABELS = {
    "mse_loss": "training loss (squared error)",
    "gauss_loss": "training loss (Gaussian)",
    "train_mse": "training MSE",
    "val_mse": "validation MSE",
    "nll": "validation NLL (nats)",
    "lr": "learning rate",
    "reward_val_mse": "reward, validation MSE",
}


def plot_learning_curves(metrics_csv: Path, figure_png: Path) -> Path:
    """Draws one panel per metric, one line per member, from the CSV of a run; errors are normalised, on a log axis.

    Returns:
        ``figure_png``, now written.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    table = pd.read_csv(metrics_csv)
    names = [name for name in _LABELS if name in table and table[name].notna().any()]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * lines), layout="constrained")
    for axes, name in zip(figure.subplots(lines, columns, squeeze=False).flat, names, strict=False):
        for member, rows in table.dropna(subset=[name]).groupby("model_id"):
            axes.plot(
                rows["step"] + 1, rows[name], marker="." if len(rows) < 40 else None, lw=1, label=f"member {member}"
            )
        axes.set(xlabel="epoch", title=_LABELS[name])
        if (table[name].dropna() > 0).all():
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    handles = figure.axes[0].get_legend_handles_labels()
    if len(handles[0]) <= 10:
        figure.axes[0].legend(fontsize="x-small")
    for axes in figure.axes[len(names) :]:
        axes.set_visible(False)
    figure.savefig(figure_png, dpi=120)
    return figure_png
