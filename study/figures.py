"""Figures of a study, from the tables of ``study.analysis``; an arm (or a pair of arms) keeps its colour in all."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from reporting.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE, png
from study.analysis import POOLED, Tables

LABELS = {
    "nrmse": "one-step nRMSE",
    "rollout_error": "rollout error (tsinf)",
    "crps_recalibrated": "recalibrated CRPS",
    "sd_log_nrmse": "SD over seeds of log nRMSE",
}
CAPTIONS = {
    "ratios": "Error of an arm over that of its reference: left of the line the arm is better. Points with 95 % "
    "intervals; the diamond is the mean over these datasets and says nothing of others.",
    "horizon": "Median error of open-loop tsinf rollouts along recorded actions: geometric mean over seeds, with the "
    "smallest and the largest seed. The vertical line is the horizon of the primary metric.",
    "calibration": "How often the truth falls in the central interval that promises to hold it. Below the dotted line "
    "intervals are too narrow; solid as predicted, dashed after cross-fitted recalibration.",
    "stability": "One point per seed, so that the height of a column is the spread over seeds; the bar is the "
    "geometric mean. A cross at the top is a training that failed.",
}
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
_MARKERS = "osD^vP"
_LEAST_SPAN = 1.5  # least ratio of the limits of an axis that shows spreads, so that close values look close


def draw_figures(tables: Tables) -> dict[str, bytes]:
    """Draws every figure: PNG files by name."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "ratios": draw_ratios(tables["paired"]),
            "horizon": draw_horizon(tables["horizon"], tables["paired"]),
            "calibration": draw_calibration(tables["reliability"]),
            "stability": draw_stability(tables["cells"]),
        }
        return {name: png(figure, dpi=150) for name, figure in figures.items()}


def draw_ratios(paired: pd.DataFrame) -> Figure:
    """Forest plot: a panel per primary metric, a line per dataset, a marker per pair of arms."""
    datasets = list(dict.fromkeys(paired.dataset))
    figure, panels = _panels(len(LABELS), height=1.2 + 0.55 * len(datasets), sharey=True)
    pairs = list(dict.fromkeys(zip(paired.arm, paired.reference, strict=True)))
    for axes, metric in zip(panels, LABELS, strict=True):
        axes.axvline(1, color=DARK, lw=1, ls=":")
        for place, (arm, reference) in enumerate(pairs):
            rows = paired[(paired.metric == metric) & (paired.arm == arm) & (paired.reference == reference)]
            height = np.array([datasets.index(name) for name in rows.dataset]) + 0.2 * (place - (len(pairs) - 1) / 2)
            colour = _COLOURS[place % len(_COLOURS)]
            axes.hlines(height, rows.low, rows.high, color=colour, lw=1.4)
            pooled = rows.dataset == POOLED
            axes.plot(rows.ratio[~pooled], height[~pooled], "o", color=colour, ms=4, label=f"{arm} / {reference}")
            axes.plot(rows.ratio[pooled], height[pooled], "D", color=colour, ms=6)
        axes.set(title=LABELS[metric], xlabel="ratio (log axis)", xscale="log")
        _plain_ticks(axes.xaxis)
    panels[0].set_yticks(range(len(datasets)), datasets)
    panels[0].set_ylim(max(len(datasets), 1) - 0.5, -0.5)
    _share_legend(figure, panels[0])
    return figure


def draw_horizon(table: pd.DataFrame, paired: pd.DataFrame) -> Figure:
    """Error of tsinf rollouts against horizon, a panel per dataset, a line per arm."""
    primary = paired.dropna(subset=["horizon"]).groupby("dataset").horizon.first()
    groups = list(table.groupby("dataset", sort=False))
    figure, panels = _panels(len(groups))
    for axes, (dataset, rows) in zip(panels, groups, strict=True):
        for place, (arm, line) in enumerate(rows[rows.propagation == "tsinf"].groupby("arm", sort=False)):
            colour = _COLOURS[place % len(_COLOURS)]
            axes.fill_between(line.horizon, line.low, line.high, color=colour, alpha=0.15, lw=0)
            axes.plot(line.horizon, line.error, color=colour, ls=("-", "--", "-.")[place % 3], label=arm)
        still = rows[rows.propagation == "no_change"].drop_duplicates("horizon")
        axes.plot(still.horizon, still.error, ":", color=DARK, label="no change")
        if dataset in primary.index:
            axes.axvline(primary[dataset], color=GREY, lw=0.8)
        axes.set(title=dataset, xlabel="steps", xscale="log", yscale="log")
        axes.set_ylim(top=min(axes.get_ylim()[1], 30 * still.error.max()))  # diverged rollouts leave the picture
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
    panels[0].set_ylabel("error (median over starts)")
    _share_legend(figure, panels[0])
    return figure


def draw_calibration(table: pd.DataFrame) -> Figure:
    """Observed against promised coverage, a panel per dataset, a colour per arm."""
    groups = list(table.groupby("dataset", sort=False))
    figure, panels = _panels(len(groups))
    for axes, (dataset, rows) in zip(panels, groups, strict=True):
        axes.plot([0, 1], [0, 1], ":", color=DARK, lw=1, label="calibrated")
        for place, (arm, lines) in enumerate(rows.groupby("arm", sort=False)):
            for variant, style in (("raw", "-"), ("recalibrated", "--")):
                line = lines[lines.variant == variant]
                label = arm if variant == "raw" else None
                axes.plot(line.promised, line.observed, style, color=_COLOURS[place % len(_COLOURS)], label=label)
        axes.set(title=dataset, xlabel="promised coverage")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel("observed coverage")
    _share_legend(figure, panels[0])
    return figure


def draw_stability(cells: pd.DataFrame) -> Figure:
    """One-step error of every run, a panel per dataset, a column per arm."""
    arms = list(dict.fromkeys(cells.arm))
    groups = list(cells.groupby("dataset", sort=False))
    figure, panels = _panels(len(groups))
    for axes, (dataset, rows) in zip(panels, groups, strict=True):
        for place, arm in enumerate(arms):
            errors = rows[rows.arm == arm].sort_values("seed").nrmse.to_numpy()
            offset = np.linspace(-0.2, 0.2, len(errors)) if len(errors) > 1 else np.zeros(1)
            colour, failed = _COLOURS[place % len(_COLOURS)], np.isnan(errors)
            marker = _MARKERS[place % len(_MARKERS)]
            axes.plot(place + offset[~failed], errors[~failed], marker, color=colour, ms=4.5, alpha=0.8)
            if failed.any():
                top = np.full(failed.sum(), 0.97)
                axes.plot(place + offset[failed], top, "x", color=colour, transform=axes.get_xaxis_transform())
            if not failed.all():
                axes.hlines(np.exp(np.log(errors[~failed]).mean()), place - 0.3, place + 0.3, color=colour, lw=1.4)
        axes.set(title=dataset, yscale="log", xlim=(-0.6, len(arms) - 0.4))
        axes.set_xticks(range(len(arms)), arms)
        low, high = axes.get_ylim()
        widening = max(1, np.sqrt(_LEAST_SPAN * low / high))
        axes.set_ylim(low / widening, high * widening)
        _plain_ticks(axes.yaxis)
    panels[0].set_ylabel("one-step nRMSE (log axis)")
    return figure


# --- Axes ---


def _panels(count: int, height: float = 3.2, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(max(3.0 * count, 4.5), height))
    return figure, figure.subplots(1, count, squeeze=False, sharey=sharey)[0]


def _plain_ticks(axis: Axis) -> None:
    """Labels a log axis with plain numbers, evenly spaced ones where it spans less than a power of ten."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _share_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
