"""Figures of an evaluation, drawn from its tables: one panel each, readable when small."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.rollout_tables import half_skill_horizon
from reporting.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE, png

PROPAGATIONS = {"tsinf": (BLUE, "-"), "ts1": (ORANGE, "--"), "mean": (GREEN, "-.")}
VARIANTS = {
    "raw": (RED, "-", "as predicted"),
    "recalibrated": (BLUE, "--", "recalibrated by a scale"),
    "isotonic": (GREEN, "-.", "by isotonic regression"),
}
MEASURES = {
    "max_pairwise": (BLUE, "o"),
    "ensemble_std": (ORANGE, "s"),
    "max_aleatoric": (GREEN, "^"),
    "total_std": (RED, "D"),
}


def draw_figures(tables: dict[str, pd.DataFrame]) -> dict[str, bytes]:
    """Draws every figure that the tables of an evaluation have numbers for: PNG files by name."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "one_step": draw_one_step(tables["one_step"]),
            "ensemble_size": draw_ensemble_size(tables["ensemble_size"]),
            "rollout_error": draw_rollout_error(tables["rollout"]),
            "rollout_skill": draw_rollout_skill(tables["rollout"]),
            "rollout_astray": draw_rollout_astray(tables["rollout"]),
            "rollout_coverage": draw_rollout_coverage(tables["rollout_coverage"]),
            "reliability": draw_reliability(tables["reliability"]),
            "pit": draw_pit(tables["pit"]),
            "coverage": draw_coverage(tables["calibration"]),
            "usefulness": draw_usefulness(tables["uncertainty"]),
            "risk_coverage": draw_risk_coverage(tables["risk_coverage"]),
            "parts": draw_parts(tables["parts"]),
        }
        if "ood" in tables:
            figures["ood"] = draw_ood(tables["ood"])
        if "oracle" in tables:
            figures["oracle"] = draw_oracle(tables["oracle"])
        if "oracle_noise" in tables:
            figures["oracle_noise"] = draw_oracle_noise(tables["oracle_noise"])
        if "cross_dataset" in tables:
            figures["cross_dataset"] = draw_cross_dataset(tables["cross_dataset"])
        return {name: png(figure, dpi=200) for name, figure in figures.items()}


def _panel(title: str, xlabel: str, ylabel: str, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, height))
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


# --- One step ---


def draw_one_step(table: pd.DataFrame) -> Figure:
    """Error of the ensemble, the range of its members and the baselines, per dimension."""
    figure, axes = _panel("One-step error by state dimension", "state dimension", "nRMSE")
    table = table[table.dimension != "all"]
    errors = table.pivot(index="dimension", columns="predictor", values="rmse").loc[table.dimension.unique()]
    members = errors.filter(like="member_")
    position = np.arange(len(errors))
    axes.vlines(position, members.min(axis=1), members.max(axis=1), color=SKY, lw=5, alpha=0.6, label="members")
    axes.plot(position, errors["ensemble"], "o", ms=4, color=BLUE, label="ensemble")
    if "linear" in errors:
        axes.plot(position, errors["linear"], "x", ms=5, color=PURPLE, label="linear")
    axes.plot(position, errors["no_change"], "_", ms=9, mew=2, color=DARK, label="no change")
    axes.set_yscale("log")
    _name_dimensions(axes, list(errors.index))
    _legend_above(axes, columns=4)
    return figure


def draw_ensemble_size(table: pd.DataFrame) -> Figure:
    """Expected error against the number of members."""
    figure, axes = _panel("More members, less error?", "members averaged", "nRMSE")
    axes.plot(table.members, table.rmse, "o-", color=BLUE, ms=4)
    for _, row in table.iloc[[0, -1]].iterrows():
        axes.annotate(
            f"{row.rmse:.3g}", (row.members, row.rmse), textcoords="offset points", xytext=(0, 7), ha="center"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, len(table) + 0.5)
    axes.set_ylim(0, table.rmse.max() * 1.25)  # from 0, so that what is flat looks flat
    return figure


# --- Open loop ---


def draw_rollout_error(table: pd.DataFrame) -> Figure:
    """Median error against the horizon for every propagation, with the middle half of tsinf."""
    figure, axes = _panel("Open-loop error against horizon", "steps", "normalised error (median)")
    by_name = dict(list(table.groupby("propagation")))
    members = [rows for name, rows in by_name.items() if name.startswith("member_")]
    for index, rows in enumerate(members):
        axes.plot(
            rows.horizon, rows["median"], color=GREY, lw=0.7, alpha=0.7, label=None if index else "single members"
        )
    middle = by_name["tsinf"]
    axes.fill_between(
        middle.horizon, middle.q25, middle.q75, color=BLUE, alpha=0.15, lw=0, label="middle half of tsinf"
    )
    for name, (colour, line) in PROPAGATIONS.items():
        axes.plot(by_name[name].horizon, by_name[name]["median"], line, color=colour, label=name)
    axes.plot(by_name["no_change"].horizon, by_name["no_change"]["median"], ":", color=DARK, label="no change")
    axes.set(xscale="log", yscale="log")
    _plain_log_ticks(axes, table.horizon.max())
    _cap_height(axes, table["median"])
    axes.legend(ncols=2)
    return figure


def draw_rollout_skill(table: pd.DataFrame) -> Figure:
    """Skill against the mean training state, free and clamped, with the steps for which half of it is kept."""
    figure, axes = _panel("How long does the skill last?", "steps", "skill against the mean state")
    by_name = dict(list(table.groupby("propagation")))
    for name, (colour, line) in PROPAGATIONS.items():
        rows, kept = by_name[name], half_skill_horizon(by_name[name].skill)
        axes.plot(rows.horizon, rows.skill, line, color=colour, label=f"{name}: half kept for {kept}")
        if kept:
            axes.plot(kept, rows.skill.iloc[kept - 1], "o", ms=5, color=colour)
        if f"{name}_clamped" in by_name:
            clamped = by_name[f"{name}_clamped"]
            axes.plot(clamped.horizon, clamped.skill, ":", lw=1.2, color=colour, label=f"{name}, clamped")
    axes.plot(by_name["no_change"].horizon, by_name["no_change"].skill, color=GREY, lw=1, label="no change")
    axes.axhline(0, color=DARK, lw=1)
    axes.set(xscale="log", ylim=(-0.55, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _plain_log_ticks(axes, table.horizon.max())
    _legend_above(axes, columns=3)
    return figure


def draw_rollout_astray(table: pd.DataFrame) -> Figure:
    """Share of the simulated paths that left the data's range, thin, and that exploded."""
    figure, axes = _panel("Rollouts that leave the data or explode", "steps", "share of paths")
    for name, (colour, line) in PROPAGATIONS.items():
        rows = table[table.propagation == name]
        axes.plot(rows.horizon, rows.left_range, line, color=colour, lw=0.8, alpha=0.7, label=f"{name}: left the range")
        axes.plot(rows.horizon, rows.exploded, line, color=colour, lw=2.2, label=f"{name}: exploded")
    axes.set(xscale="log", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _plain_log_ticks(axes, table.horizon.max())
    axes.legend()
    return figure


def draw_rollout_coverage(table: pd.DataFrame) -> Figure:
    """Coverage of the 90 % band of tsinf against the horizon, with two standard errors."""
    figure, axes = _panel("Does the 90 % band keep its promise?", "steps", "coverage (tsinf)")
    for variant in ("raw", "recalibrated"):
        colour, line, label = VARIANTS[variant]
        rows = table[(table.propagation == "tsinf") & (table.variant == variant)]
        error = 2 * rows.standard_error
        axes.fill_between(rows.horizon, rows.coverage - error, rows.coverage + error, color=colour, alpha=0.15, lw=0)
        axes.plot(rows.horizon, rows.coverage, line, color=colour, label=label)
    axes.axhline(0.9, color=DARK, lw=1, ls=":", label="promised")
    axes.set(xscale="log", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _plain_log_ticks(axes, table.horizon.max())
    axes.legend(loc="lower left")
    return figure


# --- Calibration ---


def draw_reliability(table: pd.DataFrame) -> Figure:
    """Observed against promised coverage."""
    figure, axes = _panel("Reliability of intervals", "promised coverage", "observed coverage")
    axes.plot([0, 1], [0, 1], ":", color=DARK, lw=1, label="calibrated")
    for variant, (colour, line, label) in VARIANTS.items():
        rows = table[table.variant == variant]
        if len(rows):
            axes.plot(rows.promised, rows.observed, line, color=colour, label=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.legend()
    return figure


def draw_pit(table: pd.DataFrame) -> Figure:
    """Histogram of the probability integral transform."""
    figure, axes = _panel("Where truths fall in the predicted distribution", "predicted probability below", "density")
    axes.axhline(1, color=DARK, lw=1, ls=":", label="calibrated")
    for variant, (colour, line, label) in VARIANTS.items():
        rows = table[table.variant == variant]
        if len(rows):
            edges = [*rows.lower, rows.upper.iloc[-1]]
            axes.stairs(rows.density, edges, color=colour, ls=line, lw=1.6, label=label)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def draw_coverage(table: pd.DataFrame) -> Figure:
    """Coverage of the 90 % interval per dimension."""
    figure, axes = _panel("Coverage of the 90 % interval by dimension", "state dimension", "coverage")
    table = table[table.dimension != "all"]
    dimensions = list(table.dimension.unique())
    axes.axhline(0.9, color=DARK, lw=1, ls=":", label="promised")
    for (variant, (colour, _, label)), marker, shift in zip(VARIANTS.items(), "os^", (-0.2, 0.0, 0.2), strict=True):
        rows = table[table.variant == variant]
        if len(rows):
            axes.plot(np.arange(len(rows)) + shift, rows.coverage_90, marker, ms=4, color=colour, label=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _name_dimensions(axes, dimensions)
    _legend_above(axes, columns=2)
    return figure


# --- Usefulness of uncertainty ---


def draw_usefulness(table: pd.DataFrame) -> Figure:
    """Three scores of every measure of disagreement, side by side."""
    figure, axes = _panel("Which measure finds the errors?", "score (1 is best)", "")
    table = table[(table.rows == "test") & (table.units == "normalised")]
    scores = {
        "spearman": "rank correlation",
        "auroc_worst": "AUROC of the worst 10 %",
        "risk_reduction": "risk reduction",
    }
    for position, (score, _) in enumerate(scores.items()):
        for shift, (_, row) in zip(np.linspace(-0.22, 0.22, len(table)), table.iterrows(), strict=True):
            colour, marker = MEASURES[row.measure]
            label = None if position else row.measure
            axes.plot(row[score], position - shift, marker, color=colour, ms=6, label=label)
    axes.set_yticks(range(len(scores)), scores.values())
    axes.invert_yaxis()
    axes.set_xlim(min(-0.02, axes.get_xlim()[0]), 1.02)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.axvline(0.5, color=GREY, lw=0.8, ls=":")
    _legend_above(axes, columns=4)
    return figure


def draw_risk_coverage(table: pd.DataFrame) -> Figure:
    """Mean error of the most certain share of rows."""
    figure, axes = _panel(
        "Error of the rows the model trusts most", "share of rows kept, most certain first", "mean error"
    )
    table = table[table.units == "normalised"]
    for measure, rows in table.groupby("measure", sort=False):
        if measure == "error":
            axes.plot(rows.share, rows.risk, ":", color=DARK, label="best possible order")
        else:
            axes.plot(rows.share, rows.risk, color=MEASURES[measure][0], label=measure)
    axes.axhline(table.risk[table.share == 1].iloc[0], color=GREY, lw=1, ls="--", label="random order")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def draw_parts(table: pd.DataFrame) -> Figure:
    """The two parts of the predicted standard deviation beside the error, per dimension."""
    figure, axes = _panel("What the uncertainty is made of", "state dimension", "normalised units")
    table = table[table.dimension != "all"]
    styles = {"aleatoric": (GREEN, "^"), "epistemic": (ORANGE, "s"), "error": (DARK, "_")}
    for part, (colour, marker) in styles.items():
        size = 9 if marker == "_" else 5
        axes.plot(np.arange(len(table)), table[part], marker, ms=size, mew=1.5, color=colour, label=part)
    if (table.epistemic > 0).all():
        axes.set_yscale("log")
    _name_dimensions(axes, list(table.dimension))
    _legend_above(axes, columns=3)
    return figure


def draw_ood(table: pd.DataFrame) -> Figure:
    """AUROC of telling every other dataset from the evaluated rows."""
    table = table[table.units == "normalised"]
    datasets = list(table.dataset.unique())
    figure, axes = _panel("Telling other data by its uncertainty", "AUROC", "", height=1.9 + 0.6 * len(datasets))
    for position, dataset in enumerate(datasets):
        rows = table[table.dataset == dataset]
        for shift, (_, row) in zip(np.linspace(-0.2, 0.2, len(rows)), rows.iterrows(), strict=True):
            colour, marker = MEASURES[row.measure]
            axes.plot(row.auroc, position + shift, marker, color=colour, ms=6, label=None if position else row.measure)
    axes.axvline(0.5, color=GREY, lw=1, ls=":")
    axes.set_yticks(range(len(datasets)), [_shortened(name) for name in datasets])
    axes.set(xlim=(min(0.3, table.auroc.min() - 0.02), 1.02), ylim=(len(datasets) - 0.5, -0.5))
    _legend_above(axes, columns=4)
    return figure


# --- The simulator ---


def draw_oracle(table: pd.DataFrame) -> Figure:
    """Error and predicted deviation for actions on and off the data."""
    figure, axes = _panel("Actions the data never took", "actions", "normalised units")
    position = np.arange(len(table))
    width = 0.38
    axes.bar(position - width / 2, table.rmse, width, color=DARK, label="true error")
    axes.bar(position + width / 2, table.predicted_std, width, color=SKY, label="predicted standard deviation")
    for x, coverage in zip(position, table.coverage_90, strict=True):
        height = table[["rmse", "predicted_std"]].iloc[x].max()
        axes.annotate(f"90 % band\ncovers {coverage:.0%}", (x, height), ha="center", va="bottom", fontsize=8.5)
    axes.set_xticks(position, table.actions)
    axes.margins(y=0.22)
    axes.grid(axis="x", visible=False)
    _legend_above(axes, columns=2)
    return figure


def draw_oracle_noise(table: pd.DataFrame) -> Figure:
    """Predicted aleatoric deviation beside the true one, per dimension."""
    figure, axes = _panel("Is the predicted noise the true noise?", "state dimension", "standard deviation")
    position = np.arange(len(table))
    axes.plot(position, table.true, "_", ms=10, mew=2, color=DARK, label="simulator")
    axes.plot(position, table.predicted, "^", ms=5, color=GREEN, label="predicted (aleatoric)")
    axes.set_yscale("log")
    _name_dimensions(axes, list(table.dimension))
    _legend_above(axes, columns=2)
    return figure


# --- Several models and datasets ---


def draw_cross_dataset(table: pd.DataFrame) -> Figure:
    """Error of every model on every dataset; cells of the training dataset are framed."""
    models, datasets = list(table.model.unique()), list(table.dataset.unique())
    figure, axes = _panel("Every model on every dataset", "", "", height=1.7 + 0.45 * len(models))
    errors = table.pivot(index="model", columns="dataset", values="rmse").loc[models, datasets].to_numpy(dtype=float)
    shades = np.log10(np.where(errors > 0, errors, np.nan))
    axes.imshow(shades, cmap="cividis", aspect="auto")
    middle = np.nanmean([np.nanmin(shades), np.nanmax(shades)]) if np.isfinite(shades).any() else 0.0
    for (row, column), error in np.ndenumerate(errors):
        text = "seen" if np.isnan(error) else f"{error:.3g}"
        colour = "white" if np.isnan(error) or shades[row, column] <= middle else "black"
        axes.text(column, row, text, ha="center", va="center", color=DARK if np.isnan(error) else colour)
    for _, cell in table[table.trained_on].iterrows():
        corner = datasets.index(cell.dataset) - 0.46, models.index(cell.model) - 0.46
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, ec=RED, lw=2))
    axes.set_xticks(range(len(datasets)), [_shortened(name) for name in datasets], rotation=20, ha="right")
    axes.set_yticks(range(len(models)), [_shortened(name) for name in models])
    axes.grid(visible=False)
    return figure


# --- Axes ---


def _name_dimensions(axes: Axes, names: list[str]) -> None:
    """Labels positions by dimension, leaving some out where there are many."""
    every = -(-len(names) // 20)
    axes.set_xticks(range(0, len(names), every), names[::every])


def _plain_log_ticks(axes: Axes, largest: int) -> None:
    """Labels a logarithmic axis of steps with whole numbers."""
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if tick <= largest]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()


def _cap_height(axes: Axes, values: pd.Series) -> None:
    """Ends a log axis at a million, so that exploded rollouts do not flatten all others."""
    finite = values[np.isfinite(values) & (values > 0)]
    if len(finite):
        axes.set_ylim(finite.min() / 2, min(finite.max() * 2, 1e6))


def _legend_above(axes: Axes, columns: int) -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.4,
    )


def _shortened(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"
