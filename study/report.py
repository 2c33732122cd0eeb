"""The report of a study: figures, Markdown and one self-contained HTML page from the tables of ``study_analysis``."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from reporting.page import CSS, PAGE, Section, format_cell, html_table
from reporting.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE
from study.analysis import POOLED, PRIMARY, Tables
from utils import atomic_write

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
LIMITS = (
    "Datasets are fixed effects: each has its own interval, and a mean over them claims nothing beyond them.",
    "Intervals hold seeds and test trajectories to be crossed random factors (bootstrap of both, t quantiles with "
    "Satterthwaite's degrees of freedom); with few seeds they rest on few degrees of freedom, and on the log errors "
    "being roughly normal over seeds.",
    "All seeds share one split into trajectories: another split would move the errors, of all arms alike.",
    "p-values are adjusted by Holm's method over all datasets and pairs of arms of one metric, not over metrics.",
    "The spread over seeds is compared by Pitman's and Morgan's test, which needs large differences at five seeds.",
    "A training that failed counts as the worst in the probability of improvement and the interquartile mean, has its "
    "column in the table of stability, and has no ratio.",
)
_ALPHA = 0.05
ANSWERS_INTRO = (
    "Ratios of paired errors, mean over datasets with 95 % interval, below 1 where the first of the two is better; and "
    f"on how many datasets it is clearly better or worse (Holm-adjusted p < {_ALPHA})."
)
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
_MARKERS = "osD^vP"
_WIDE_FIGURES = (
    "figure { overflow-x: auto; } figure img, figcaption { max-width: 1100px; } figure img { min-width: 640px; }"
)
_LEAST_SPAN = 1.5  # of the axis of a figure about spread


def write_report(folder: Path, facts: dict[str, Any], tables: Tables) -> list[Path]:
    """Writes ``report.html``, ``report.md`` and one PNG per figure.

    Args:
        folder: Where they go.
        facts: ``title``, ``lead`` and ``command`` as text; ``differences``, ``datasets`` and ``origin`` as tables.
        tables: Of ``study_analysis.analyse``, and ``learning_rates``.

    Returns:
        The files.
    """
    figures, sections = draw_figures(tables), build_sections(facts, tables)
    files = {f"{name}.png": image for name, image in figures.items()}
    files["report.md"] = markdown_page(facts, tables, sections).encode()
    files["report.html"] = html_page(facts, tables, sections, figures).encode()
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]


# --- What it says ---


def answers(paired: pd.DataFrame) -> pd.DataFrame:
    """Returns mean ratios and on how many datasets they show: a line per primary metric, a column per pair of arms."""
    lines = []
    for metric, of_metric in paired.groupby("metric", sort=False):
        line = {"": LABELS[metric]}
        for (arm, reference), rows in of_metric.groupby(["arm", "reference"], sort=False):
            is_clear = rows.p_holm < _ALPHA
            better, worse = (is_clear & (rows.ratio < 1)).sum(), (is_clear & (rows.ratio > 1)).sum()
            ratio = interval_text(rows.iloc[-1].drop("p_holm"), "ratio")  # the mean over datasets is the last line
            line[f"{arm} / {reference}"] = f"{ratio}; better on {better}, worse on {worse} of {len(rows) - 1}"
        lines.append(line)
    return pd.DataFrame(lines)


def build_sections(facts: dict[str, Any], tables: Tables) -> list[Section]:
    """Returns the parts of the report in reading order."""
    primary = " ".join(f"({number}) {text}." for number, text in enumerate(PRIMARY.values(), 1))
    errors = side_by_side(tables["values"], "value", tables["values"].arm)
    ratios = side_by_side(tables["paired"], "ratio", tables["paired"].arm + " / " + tables["paired"].reference)
    edge = rates_at_the_edge(tables["learning_rates"])
    return [
        Section(
            "What is compared",
            f"Primary metrics, named before any figure: {primary} All in normalised units, lower is better.",
            [],
            {"Settings in which arms differ": facts["differences"], "Datasets": facts["datasets"]},
            {"Learning rates and their trials": tables["learning_rates"]},
        ),
        Section(
            "Which is better, and by how much",
            "Ratios are of paired runs (same seed, same trajectories): below 1 the arm is better than its reference. "
            f"Brackets are 95 % intervals, * a Holm-adjusted p below {_ALPHA}.",
            ["ratios"],
            {"Ratios": ratios, "Errors: geometric mean over seeds; SD over seeds": errors},
            {"Ratios, one by one": tables["paired"]},
        ),
        Section("Long rollouts", "", ["horizon"], {}, {}),
        Section("Calibration", "", ["calibration"], {}, {}),
        Section(
            "Stability",
            "jitter: mean rise of log validation error from one epoch to the next, falls counting 0. worst to median: "
            "errors of single members. exploded: share of tsinf paths that by the horizon of the primary metric have "
            "left the data's range by more than its width.",
            ["stability"],
            {"Means over seeds": tables["stability"]},
            {},
        ),
        Section(
            "Over all runs",
            "Unpaired, as rliable defines them (Agarwal et al. 2021): the interquartile mean of errors, each over its "
            "dataset's geometric mean, and the probability that a run of the arm beats a run of the reference.",
            [],
            {
                "Interquartile mean": side_by_side(tables["aggregates"], "iqm", tables["aggregates"].arm),
                "Probability of improvement": side_by_side(
                    tables["improvement"],
                    "probability",
                    tables["improvement"].arm + " over " + tables["improvement"].reference,
                ),
            },
            {},
        ),
        Section("What this does not show", " ".join(filter(None, (*LIMITS, edge))), [], {}, {}),
        Section("How it was made", facts["command"], [], {"Origin of the cells": facts["origin"]}, {}),
    ]


def rates_at_the_edge(trials: pd.DataFrame) -> str:
    """Says which arms learn at the lowest or the highest of their candidate rates: a better one may lie beyond."""
    chosen = trials[trials["is_chosen"]].groupby("arm", sort=False)["fit_lr"].first()
    candidates = trials.groupby("arm", sort=False)["fit_lr"]
    at_edge = chosen.index[(chosen == candidates.min()[chosen.index]) | (chosen == candidates.max()[chosen.index])]
    if at_edge.empty:
        return ""
    rates = ", ".join(f"{arm} {chosen[arm]:g}" for arm in at_edge)
    return f"Learning rates at the edge of the candidates, beyond which a better one may lie: {rates}."


def side_by_side(table: pd.DataFrame, name: str, columns: pd.Series) -> pd.DataFrame:
    """Returns values with their intervals as text: a line per metric and dataset, a column per arm or pair of arms."""
    text = table.apply(lambda row: interval_text(row, name), axis=1) if len(table) else []
    rows = [place for place in ("metric", "dataset") if place in table]
    wide = table.assign(metric=table.metric.map(LABELS), text=text, column=columns).pivot_table(
        index=rows, columns="column", values="text", aggfunc="first", sort=False
    )
    return wide.rename_axis(columns=None).reset_index()


def interval_text(row: pd.Series, name: str) -> str:
    """Formats a value, its interval where it has one, and a star where it is significant."""
    text = format_cell(row[name])
    if not np.isnan(row.get("low", np.nan)):
        text += f" [{format_cell(row.low)}, {format_cell(row.high)}]"
    return text + (" *" if row.get("p_holm", np.nan) < _ALPHA else "")


# --- Figures ---


def draw_figures(tables: Tables) -> dict[str, bytes]:
    """Draws every figure, by name, as PNG."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "ratios": draw_ratios(tables["paired"]),
            "horizon": draw_horizon(tables["horizon"], tables["paired"]),
            "calibration": draw_calibration(tables["reliability"]),
            "stability": draw_stability(tables["cells"]),
        }
        return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


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
        axes.set_ylim(top=min(axes.get_ylim()[1], 30 * still.error.max()))  # what has exploded runs out of the picture
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
        widening = max(1, np.sqrt(_LEAST_SPAN * low / high))  # so that what is close looks close
        axes.set_ylim(low / widening, high * widening)
        _plain_ticks(axes.yaxis)
    panels[0].set_ylabel("one-step nRMSE (log axis)")
    return figure


def _panels(count: int, height: float = 3.2, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(max(3.0 * count, 4.5), height))
    return figure, figure.subplots(1, count, squeeze=False, sharey=sharey)[0]


def _plain_ticks(axis: Axis) -> None:
    """Labels a log axis with plain numbers, evenly spaced ones where it spans no power of ten."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _share_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


# --- Pages ---


def markdown_page(facts: dict[str, Any], tables: Tables, sections: Sequence[Section]) -> str:
    """Returns the report as Markdown; tables that HTML folds away are in the CSV files only."""
    parts = [
        f"# {facts['title']}",
        facts["lead"],
        ANSWERS_INTRO,
        markdown_table(answers(tables["paired"])),
    ]
    for section in sections:
        parts += [f"## {section.title}", section.text]
        parts += [f"![{name}]({name}.png)\n\n{CAPTIONS[name]}" for name in section.figures]
        for title, table in section.tables.items():
            parts += [f"**{title}**", markdown_table(table)]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(table: pd.DataFrame) -> str:
    """Returns a table as Markdown."""
    rows = [[str(name) for name in table], ["---"] * len(table.columns)]
    rows += [[format_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def html_page(facts: dict[str, Any], tables: Tables, sections: Sequence[Section], figures: dict[str, bytes]) -> str:
    """Returns the report as one page that needs nothing but itself."""
    title = html.escape(facts["title"])
    table = html_table(answers(tables["paired"]))
    lead, intro = html.escape(facts["lead"]), html.escape(ANSWERS_INTRO)
    parts = [f'<h1>{title}</h1><p class="lead">{lead}</p><p>{intro}</p>{table}']
    for section in sections:
        parts.append(f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        for name in section.figures:
            image = base64.b64encode(figures[name]).decode()
            caption = f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption>"
            parts.append(f'<figure><img alt="{name}" src="data:image/png;base64,{image}">{caption}</figure>')
        parts += [f"<h3>{html.escape(name)}</h3>{html_table(table)}" for name, table in section.tables.items()]
        parts += [
            f"<details><summary>{html.escape(name)}</summary>{html_table(table)}</details>"
            for name, table in section.details.items()
        ]
        parts.append("</section>")
    return PAGE.format(title=title, style=CSS + _WIDE_FIGURES, body="\n".join(parts))
