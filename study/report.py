"""The report of a study, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data.audit import audit
from reporting.page import Section, format_cell, html_page, html_table, markdown_page, markdown_table
from study.analysis import PRIMARY, Results, Tables, analyse
from study.cells import short_name, split_dataset
from study.figures import CAPTIONS, LABELS, draw_figures
from study.grid import Datasets, Grid
from utils import atomic_write

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
_HEADINGS = {"horizon": "steps"}
_WIDE_FIGURES = """.figures { display: block; }
figure { overflow-x: auto; } figure img, figcaption { max-width: 1100px; } figure img { min-width: 640px; }
"""


@dataclass(frozen=True)
class StudyFacts:
    """What a report says of a study beside its numbers.

    Attributes:
        title: Names of the arms and datasets.
        lead: How many runs there are, how many of them failed, and the time they took.
        command: Command line that made the study.
        differences: The settings in which arms differ: setting, and a column per arm with its value as text.
        datasets: dataset, transitions, sha256 (its first 16 digits); as text, how many transitions in how many
            trajectories training, validation and test have, and what the audit found.
        origin: code (commit), python, torch, numpy (versions), and cells: how many of them these have made.
    """

    title: str
    lead: str
    command: str
    differences: pd.DataFrame
    datasets: pd.DataFrame
    origin: pd.DataFrame


# --- From cells to files ---


def write_study(
    folder: Path, results: Results, rates: pd.DataFrame, grid: Grid, datasets: Datasets, command: str
) -> list[Path]:
    """Analyses the cells that are done, and writes tables, figures and report into the folder of the study.

    Args:
        folder: Folder of the study.
        results: Results of the cells that are done.
        rates: Learning rates, as ``grid.choose_rates`` returns them.
        grid: The grid that was asked for.
        datasets: Datasets by name.
        command: Command line that made the study.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If no training has succeeded, so that there is nothing to analyse.
    """
    if all(result.failure is not None for result in results.values()):
        raise FileNotFoundError(f"{folder} has no cell whose training has succeeded: nothing to compare")
    tables = analyse(results)
    files = [save_table(table, folder / f"{name}.csv") for name, table in tables.items()]
    facts = gather_facts(results, grid, datasets, command)
    return files + write_report(folder, facts, tables | {"learning_rates": rates})


def save_table(table: pd.DataFrame, path: Path) -> Path:
    """Writes a table as CSV, to six digits, and returns its path."""
    with atomic_write(path, "w") as file:
        table.to_csv(file, index=False, float_format="%.6g")
    return path


def gather_facts(results: Results, grid: Grid, datasets: Datasets, command: str) -> StudyFacts:
    """Returns what the report says of the study beside its numbers; arguments are those of ``write_study``."""
    names = [short_name(name) for name in datasets]
    outcomes = [result.record.outcome for result in results.values()]
    failed = sum(outcome.failure is not None for outcome in outcomes)
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    settings = [
        {"setting": key} | {arm: str(value) for arm, value in by_arm.items()}
        for key, by_arm in grid.differences().items()
    ]
    origins = [result.record.origin for result in results.values()]
    origin = pd.DataFrame([{"code": origin.git_commit, **origin.versions} for origin in origins])
    return StudyFacts(
        title=f"{', '.join(grid.arms)} on {', '.join(names)}",
        lead=f"{len(results)} of {len(grid)} runs ({len(grid.arms)} arms, {len(names)} datasets, {grid.seeds} seeds), "
        f"{failed} of which failed; {hours:.1f} hours of training and evaluation with {grid.threads} threads.",
        command=command,
        differences=pd.DataFrame(settings, columns=["setting", *grid.arms]),
        datasets=datasets_table(datasets, grid.split_seed),
        origin=origin.value_counts(dropna=False).rename("cells").reset_index(),
    )


def datasets_table(datasets: Datasets, split_seed: int) -> pd.DataFrame:
    """Returns one row per dataset, with the columns that ``StudyFacts`` names."""
    rows = []
    for name, dataset in datasets.items():
        split = split_dataset(dataset, split_seed)
        row = {"dataset": short_name(name), "transitions": dataset.num_transitions, "sha256": dataset.sha256[:16]}
        for part, indices in (("training", split.train), ("validation", split.holdout), ("test", split.test)):
            size = sum(dataset.trajectories[index].num_transitions for index in indices)
            row[part] = f"{size} in {len(indices)} trajectories"
        row["audit"] = ", ".join(f"{found.name}: {found.count:,}" for found in audit(dataset)) or "nothing found"
        rows.append(row)
    return pd.DataFrame(rows)


def write_report(folder: Path, facts: StudyFacts, tables: Tables) -> list[Path]:
    """Writes ``report.html``, ``report.md`` and one PNG per figure.

    Args:
        folder: Folder that the files go to.
        facts: What the report says of the study beside its numbers.
        tables: Tables of ``analyse``, and ``learning_rates``.

    Returns:
        The files.
    """
    figures, sections, answer = draw_figures(tables), build_sections(facts, tables), answers(tables["paired"])
    summary = [facts.lead, ANSWERS_INTRO, markdown_table(answer, answer.itertuples(index=False))]
    lead = f'<p class="lead">{html.escape(facts.lead)}</p><p>{html.escape(ANSWERS_INTRO)}</p>'
    opening = lead + html_table(answer, _HEADINGS)
    page = html_page(facts.title, opening, sections, figures, CAPTIONS, headings=_HEADINGS, style=_WIDE_FIGURES)
    files = {f"{name}.png": image for name, image in figures.items()}
    files["report.md"] = markdown_page(facts.title, summary, sections, CAPTIONS).encode()
    files["report.html"] = page.encode()
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]


# --- What it says ---


def answers(paired: pd.DataFrame) -> pd.DataFrame:
    """Returns the answer of a study as a table of text: a line per primary metric, a column per pair of arms.

    Each entry has the mean ratio over datasets with its interval, and on how many datasets the difference is clear.

    Args:
        paired: Table of ``analysis.paired_table``.
    """
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


def build_sections(facts: StudyFacts, tables: Tables) -> list[Section]:
    """Returns the parts of the report in reading order."""
    primary = " ".join(f"({number}) {text}." for number, text in enumerate(PRIMARY.values(), 1))
    errors = side_by_side(tables["values"], "value", tables["values"].arm)
    ratios = side_by_side(tables["paired"], "ratio", tables["paired"].arm + " / " + tables["paired"].reference)
    edge = rates_at_the_edge(tables["learning_rates"])
    improvement = tables["improvement"]
    return [
        Section(
            "What is compared",
            f"Primary metrics, named before any figure: {primary} All in normalised units, lower is better.",
            tables={"Settings in which arms differ": facts.differences, "Datasets": facts.datasets},
            details={"Learning rates and their trials": tables["learning_rates"]},
        ),
        Section(
            "Which is better, and by how much",
            "Ratios are of paired runs (same seed, same trajectories): below 1 the arm is better than its reference. "
            f"Brackets are 95 % intervals, * a Holm-adjusted p below {_ALPHA}.",
            figures=["ratios"],
            tables={"Ratios": ratios, "Errors: geometric mean over seeds; SD over seeds": errors},
            details={"Ratios, one by one": tables["paired"]},
        ),
        Section("Long rollouts", figures=["horizon"]),
        Section("Calibration", figures=["calibration"]),
        Section(
            "Stability",
            "jitter: mean rise of log validation error from one epoch to the next, falls counting 0. worst to median: "
            "errors of single members. exploded: share of tsinf paths that by the horizon of the primary metric have "
            "left the data's range by more than its width.",
            figures=["stability"],
            tables={"Means over seeds": tables["stability"]},
        ),
        Section(
            "Over all runs",
            "Unpaired, as rliable defines them (Agarwal et al. 2021): the interquartile mean of errors, each over its "
            "dataset's geometric mean, and the probability that a run of the arm beats a run of the reference.",
            tables={
                "Interquartile mean": side_by_side(tables["aggregates"], "iqm", tables["aggregates"].arm),
                "Probability of improvement": side_by_side(
                    improvement, "probability", improvement.arm + " over " + improvement.reference
                ),
            },
        ),
        Section("What this does not show", " ".join(filter(None, (*LIMITS, edge)))),
        Section("How it was made", facts.command, tables={"Origin of the cells": facts.origin}),
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
    """Returns values with their intervals as text: a line per metric and dataset, a column per arm or pair of arms.

    Args:
        table: metric, dataset (may be missing), low, high, p_holm (may be missing), and the value.
        name: Name of the value's column.
        columns: For each row of the table, the name of the column that it goes to.
    """
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
