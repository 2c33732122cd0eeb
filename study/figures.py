"""Figures of a study, from the tables of ``study.analysis`` and ``study.tuning``; an arm has one colour in all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from reporting.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE, png
from study.analysis import POOLED, Tables, against_first
from study.metrics import find_metrics

_IN_CURVES = ("nrmse", "median_error", "nll", "rollout_mean")
SHOWN = ("nrmse", "median_error", "nll", "rollout_mean", "rollout_tsinf", "spearman")  # of the metrics, in figures
CAPTIONS = {
    "effects": "Each arm against the first one, with 95 % intervals: ratios of errors, or differences (of NLL in "
    "nats, and of rank correlations). The band is the margin within which a difference does not matter. There is no "
    "interval from fewer than six pairs.",
    "horizon": "Skill of open-loop rollouts along recorded actions against predicting the mean training state: of the "
    "ensemble's mean (solid) and of TSinf (dashed), mean over runs. The vertical line is the horizon at which arms are "
    "compared, chosen on validation trajectories.",
    "calibration": "How often the truth falls in the central interval that promises to hold it. Below the dotted line "
    "intervals are too narrow; solid as predicted, dashed after cross-fitted isotonic recalibration.",
    "stability": "Above, the robust spread over members of the log of their one-step error; below, the share of "
    "members that are stray, more than twice the median off. 95 % intervals; the members of all seeds count.",
    "sensitivity": "Validation error of the median member against the learning rate, one trial each; the filled marker "
    "is the rate that was chosen. A flat curve forgives.",
    "values": "What each policy returns in the models of an arm (TSinf, mean over runs) against what it returns in the "
    "simulator. On the dotted line the models are right.",
    "foreseen": "Rank correlation, over models, of each metric with the error of policies' values: the mean over "
    "datasets with its 95 % interval (filled), each dataset (grey), and the same within arms (hollow). A metric that "
    "is to be trusted lies far from 0; where less is worse, as for skill, it lies to the left.",
}
_COLOURS = {
    "dnn": BLUE,
    "dnn_huber": SKY,
    "dnn_posthoc": "#44598C",
    "pnn": ORANGE,
    "pnn_beta": RED,
    "pnn_decay": "#A6761D",
    "faithful": GREEN,
    "faithful_huber": PURPLE,
}
_FURTHER = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, "#44598C", "#A6761D")
_MARKERS = "osD^vPX<"
_COLUMNS = 4  # of panels, at most


def arm_colours(arms: Iterable[str]) -> dict[str, str]:
    """Returns the colour of each arm: those of ``configs/study`` have theirs, others get what is left in turn."""
    arms = list(dict.fromkeys(arms))
    free = [colour for colour in _FURTHER if colour not in {_COLOURS.get(arm) for arm in arms}]
    others = [arm for arm in arms if arm not in _COLOURS]
    further = {arm: (free or _FURTHER)[place % len(free or _FURTHER)] for place, arm in enumerate(others)}
    return {arm: _COLOURS.get(arm) or further[arm] for arm in arms}


def draw_figures(tables: Tables) -> dict[str, bytes]:
    """Draws every figure: PNG files by name.

    Args:
        tables: Those of ``analyse``, with ``learning_rates`` and ``horizons``.
    """
    with matplotlib.rc_context(STYLE):
        figures = {
            "horizon": draw_horizon(tables["horizon"], tables["horizons"]),
            "calibration": draw_calibration(tables["reliability"]),
            "stability": draw_stability(tables["stability"]),
        }
        if len(tables["paired"]):  # else no two arms have trainings that did not fail
            figures["effects"] = draw_effects(against_first(tables["paired"]))
        if "val_mse" in tables["learning_rates"]:
            figures["sensitivity"] = draw_sensitivity(tables["learning_rates"])
        if "policies" in tables:
            figures["values"] = draw_values(tables["policies_values"])
            if len(tables["policies_foreseen"]):
                figures["foreseen"] = draw_foreseen(tables["policies_foreseen"])
        return {name: png(figure, dpi=150) for name, figure in figures.items()}


def draw_effects(paired: pd.DataFrame) -> Figure:
    """Forest plot: a panel per shown metric, a line per dataset, a marker per arm against its reference."""
    paired = paired[paired.dataset != POOLED]
    metrics = find_metrics(name for name in SHOWN if name in set(paired.metric))
    datasets, colours = list(dict.fromkeys(paired.dataset)), arm_colours([paired.reference.iloc[0], *paired.arm])
    arms = list(dict.fromkeys(paired.arm))
    height = 1.4 + len(datasets) * (0.3 + 0.1 * len(arms))
    figure, panels = _panels(len(metrics), height=height, columns=3, sharey=True)
    for axes, metric in zip(panels, metrics.values(), strict=True):
        centre = float(metric.is_ratio)
        axes.axvspan(centre - metric.margin, centre + metric.margin, color=GREY, alpha=0.2, lw=0)
        for place, arm in enumerate(arms):
            rows = paired[(paired.metric == metric.name) & (paired.arm == arm)]
            at = np.array([datasets.index(name) for name in rows.dataset])
            at = at + 0.7 * ((place + 0.5) / len(arms) - 0.5)
            axes.hlines(at, rows.low, rows.high, color=colours[arm], lw=1.4)
            axes.plot(rows.effect, at, _MARKERS[place % len(_MARKERS)], color=colours[arm], ms=4, label=arm)
        axes.set(title=metric.label, xlabel="ratio (log axis)" if metric.is_ratio else "difference")
        if metric.is_ratio:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
    panels[0].set_yticks(range(len(datasets)), datasets)
    panels[0].set_ylim(len(datasets) - 0.5, -0.5)
    _share_legend(figure, panels[0])
    return figure


def draw_horizon(table: pd.DataFrame, horizons: pd.DataFrame) -> Figure:
    """Skill of rollouts against horizon, a panel per dataset, a line per arm and propagation."""
    groups, colours = list(table.groupby("dataset", sort=False)), arm_colours(table.arm)
    chosen = horizons.set_index("dataset").horizon
    figure, panels = _panels(len(groups))
    for axes, (dataset, rows) in zip(panels, groups, strict=True):
        axes.axhline(0, color=DARK, lw=1, ls=":")
        for propagation, style in (("mean", "-"), ("tsinf", "--")):
            for arm, line in rows[rows.propagation == propagation].groupby("arm", sort=False):
                label = arm if propagation == "mean" else None
                axes.plot(line.horizon, line.skill, style, color=colours[arm], label=label)
        if dataset in chosen.index:
            axes.axvline(chosen[dataset], color=GREY, lw=0.8)
        axes.set(title=dataset, xlabel="steps", xscale="log", ylim=(-0.5, 1.02))
        _plain_ticks(axes.xaxis)
    _label_left(panels, "skill")
    _share_legend(figure, panels[0])
    return figure


def draw_calibration(table: pd.DataFrame) -> Figure:
    """Observed against promised coverage, a panel per dataset, a colour per arm."""
    groups, colours = list(table.groupby("dataset", sort=False)), arm_colours(table.arm)
    figure, panels = _panels(len(groups))
    for axes, (dataset, rows) in zip(panels, groups, strict=True):
        axes.plot([0, 1], [0, 1], ":", color=DARK, lw=1, label="calibrated")
        for arm, lines in rows.groupby("arm", sort=False):
            for variant, style in (("raw", "-"), ("isotonic", "--")):
                line = lines[lines.variant == variant]
                label = arm if variant == "raw" else None
                axes.plot(line.promised, line.observed, style, color=colours[arm], label=label)
        axes.set(title=dataset, xlabel="promised coverage")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    _label_left(panels, "observed coverage")
    _share_legend(figure, panels[0])
    return figure


def draw_stability(table: pd.DataFrame) -> Figure:
    """Spread of members and share of stray ones, a group of columns per dataset, a colour per arm."""
    datasets, colours = list(dict.fromkeys(table.dataset)), arm_colours(table.arm)
    figure = Figure(figsize=(max(1.6 * len(datasets) + 1, 4.5), 5.6))
    spread, stray = figure.subplots(2, 1, sharex=True)
    for axes, value, prefix in ((spread, "member_spread", "member"), (stray, "stray_share", "stray")):
        for place, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
            at = np.array([datasets.index(name) for name in rows.dataset])
            at = at + 0.8 * ((place + 0.5) / len(colours) - 0.5)
            axes.vlines(at, rows[f"{prefix}_low"], rows[f"{prefix}_high"], color=colours[arm], lw=1.4)
            axes.plot(at, rows[value], _MARKERS[place % len(_MARKERS)], color=colours[arm], ms=4.5, label=arm)
        axes.set_ylim(bottom=0)
    spread.set_title("Spread of members")
    stray.set_title("Stray members")
    stray.yaxis.set_major_formatter(PercentFormatter(1))
    stray.set_xticks(range(len(datasets)), datasets, rotation=20 if len(datasets) > 3 else 0)
    _share_legend(figure, spread)
    return figure


def draw_sensitivity(rates: pd.DataFrame) -> Figure:
    """Validation error against learning rate, a panel per dataset, a line per arm; failed trainings leave a gap."""
    groups, colours = list(rates.groupby("dataset", sort=False)), arm_colours(rates.arm)
    figure, panels = _panels(len(groups))
    for axes, (dataset, rows) in zip(panels, groups, strict=True):
        for arm, line in rows.groupby("arm", sort=False):
            error = np.sqrt(line.val_mse.where(np.isfinite(line.val_mse)))
            axes.plot(line.fit_lr, error, "o-", color=colours[arm], mfc="white", ms=4.5, label=arm)
            axes.plot(line.fit_lr[line.is_chosen], error[line.is_chosen], "o", color=colours[arm], ms=5.5)
        axes.set(title=dataset, xlabel="learning rate", xscale="log", yscale="log")
        axes.set_xticks(sorted(rows.fit_lr.unique()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_ticks(axes.yaxis)
    _label_left(panels, "validation nRMSE")
    _share_legend(figure, panels[0])
    return figure


def draw_values(values: pd.DataFrame) -> Figure:
    """Predicted against true values of policies, a panel per dataset, a marker per policy and arm."""
    groups, colours = list(values.groupby("dataset", sort=False)), arm_colours(values.arm)
    figure, panels = _panels(len(groups))
    for axes, (dataset, rows) in zip(panels, groups, strict=True):
        limits = rows.true.min(), rows.true.max()
        axes.plot(limits, limits, ":", color=DARK, lw=1, label="right")
        for place, (arm, points) in enumerate(rows.groupby("arm", sort=False)):
            marker = _MARKERS[place % len(_MARKERS)]
            axes.plot(points.true, points.predicted, marker, color=colours[arm], ms=3.5, mfc="none", label=arm)
        axes.set(title=dataset, xlabel="true return")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
    _label_left(panels, "predicted return")
    _share_legend(figure, panels[0])
    return figure


def draw_foreseen(foreseen: pd.DataFrame) -> Figure:
    """Dot plot: a line per metric, the strongest above, with the correlation of all datasets and that of each."""
    pooled = foreseen[foreseen.dataset == POOLED]
    single = foreseen[foreseen.dataset != POOLED]
    at = {metric: place for place, metric in enumerate(pooled.metric)}
    labels = find_metrics(pooled.metric)
    figure = Figure(figsize=(6.4, 0.25 * len(pooled) + 1.5))
    axes = figure.subplots()
    axes.axvline(0, color=DARK, lw=1, ls=":")
    axes.plot(single.rho, single.metric.map(at), "o", color=GREY, alpha=0.6, ms=3, label="a dataset")
    axes.hlines(pooled.metric.map(at), pooled.low, pooled.high, color=BLUE, lw=1.6)
    axes.plot(pooled.rho, pooled.metric.map(at), "o", color=BLUE, ms=5.5, label="mean over datasets")
    axes.plot(pooled.within_arms, pooled.metric.map(at), "D", color=ORANGE, mfc="white", ms=5, label="within arms")
    axes.set_yticks(range(len(at)), [labels[metric].label for metric in at])
    axes.set(ylim=(len(at) - 0.5, -0.5), xlim=(-1, 1), xlabel="rank correlation with the error of values")
    _share_legend(figure, axes)
    return figure


def draw_splits(cells: pd.DataFrame) -> bytes:
    """Draws metrics on several splits: a row per metric, a panel per dataset, a line per arm from split to split.

    Args:
        cells: Table ``analysis.cells_table`` of studies, one below the other; seeds of a split are averaged.

    Returns:
        A PNG file.
    """
    names = [name for name in _IN_CURVES if name in cells]
    rows = cells.groupby(["arm", "dataset", "split"], sort=False)[names].mean().reset_index()
    rows = rows.melt(["arm", "dataset", "split"], var_name="metric").assign(low=np.nan, high=np.nan)
    return draw_curves(rows, "split", "split", is_amount=False)


def draw_twins(twins: pd.DataFrame) -> bytes:
    """Draws what a setting changes, from ``analysis.twins_table``: as ``draw_effects``, each arm against its twin.

    Returns:
        A PNG file.
    """
    with matplotlib.rc_context(STYLE):
        return png(draw_effects(twins.assign(arm=twins.reference)), dpi=150)


def draw_curves(values: pd.DataFrame, setting: str, label: str, *, is_amount: bool = True) -> bytes:
    """Draws metrics against a setting in which studies differ: a row per metric, a panel per dataset, a line per arm.

    Args:
        values: Tables ``values`` of these studies, one below the other.
        setting: Column of the setting.
        label: What to call it.
        is_amount: Whether it is an amount, and its axis logarithmic; else its values are names.

    Returns:
        A PNG file.
    """
    names = [name for name in _IN_CURVES if name in set(values.metric)]
    metrics, datasets = find_metrics(names), list(dict.fromkeys(values.dataset))
    colours = arm_colours(values.arm)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(3.0 * len(datasets), 4.5), 2.6 * len(metrics) + 0.6))
        panels = figure.subplots(len(metrics), len(datasets), squeeze=False, sharex=True)
        for row, metric in zip(panels, metrics.values(), strict=True):
            row[0].set_ylabel(metric.label)
            for axes, dataset in zip(row, datasets, strict=True):
                rows = values[(values.metric == metric.name) & (values.dataset == dataset)]
                for arm, line in rows.sort_values(setting).groupby("arm", sort=False):
                    axes.vlines(line[setting], line.low, line.high, color=colours[arm], lw=1)
                    axes.plot(line[setting], line.value, "o-", color=colours[arm], ms=4, label=arm)
                if is_amount:
                    axes.set_xscale("log")
                    axes.set_xticks(sorted(values[setting].unique()))
                    axes.xaxis.set_major_formatter(FuncFormatter(_short_amount))
                    axes.xaxis.set_minor_locator(NullLocator())
                else:
                    axes.set_xticks(sorted(values[setting].unique()))
                if metric.is_ratio:
                    axes.set_yscale("log")
                    _plain_ticks(axes.yaxis)
        for axes, dataset in zip(panels[0], datasets, strict=True):
            axes.set_title(dataset)
        for axes in panels[-1]:
            axes.set_xlabel(label)
        _share_legend(figure, panels[0, 0])
        return png(figure, dpi=150)


# --- Axes ---


def _short_amount(value: float, _: object) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _panels(
    count: int, height: float = 2.9, columns: int = _COLUMNS, sharey: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure with so many panels in rows, and the panels; ``height`` is that of a row in inches."""
    across = min(count, columns)
    down = -(-count // across)
    figure = Figure(figsize=(max(3.1 * across, 4.5), height * down + 0.4))
    panels = figure.subplots(down, across, squeeze=False, sharey=sharey).ravel()
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _label_left(panels: Sequence[Axes], label: str) -> None:
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel(label)


def _plain_ticks(axis: Axis) -> None:
    """Labels a log axis with plain numbers, evenly spaced ones where it spans less than a power of ten."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    elif high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _share_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    across = max(1, int(figure.get_figwidth() // 1.3))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), across))
