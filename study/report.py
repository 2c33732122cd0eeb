"""The report of a study, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data.audit import audit
from reporting.escape import spreadsheet_table
from reporting.page import Section, format_cell, html_page, html_table, markdown_page, markdown_table
from study.analysis import POOLED, Tables, against_first, analyse
from study.cells import parse_name, short_name, split_dataset, training_rows
from study.condensed import condense
from study.figures import CAPTIONS, draw_figures
from study.grid import Datasets, Grid
from study.horizons import RULE
from study.metrics import Results, find_metrics
from study.tuning import Tuning, sensitivity_table
from utils import Origin, atomic_write

LIMITS = (
    "Datasets are fixed effects: each has its own interval, and a mean over them claims nothing beyond them.",
    "Intervals of errors hold seeds and test trajectories to be crossed random factors (bootstrap of both, t quantiles "
    "with Satterthwaite's degrees of freedom). Those of rank correlations, AUROC, calibration and shares hold for "
    "these very test trajectories: only seeds are random.",
    "Verdicts are dataset by dataset and metric by metric, and are not adjusted for how many there are.",
    "Learning rates and horizons are chosen with one trial each, on the validation trajectories of the first split; "
    "with further splits these may be among those that test.",
    "A training that failed has no ratio: it is counted in the table of stability, and takes its pair with it.",
)
ANSWERS_INTRO = (
    "On how many datasets an arm is better than the first one, worse, or tied with it: a difference counts when its "
    "95 % interval leaves the margin (5 % of an error; see the metrics), a tie when the interval stays inside. Behind "
    "it the mean over datasets and its range over them; ratios below 1 are lower errors."
)
CLAIMS_INTRO = (
    "Of each dataset an interval makes a claim hold, goes against it or stays open, by the margin of the metric; what "
    "holds on more than half of the datasets agrees, what goes against more than half disagrees, all else cannot be "
    "told. A claim with several parts agrees where all of them do, and disagrees where one does."
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
    folder: Path, results: Results, tuning: Tuning, grid: Grid, datasets: Datasets, command: str
) -> list[Path]:
    """Analyses the cells that are done, condensed, and writes tables, figures and report into the folder of the study.

    Args:
        folder: Folder of the study.
        results: Results of the cells that are done.
        tuning: Learning rates and horizons.
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
    results = {key: condense(result, [tuning.horizon[key.dataset]]) for key, result in results.items()}
    tables = analyse(results, tuning.horizon) | {"sensitivity": sensitivity_table(tuning.rates)}
    tables["extent"] = extent_table(results, grid)
    files = [save_table(table, folder / f"{name}.csv") for name, table in tables.items() if name != "timings"]
    files.append(save_timings(tables["timings"], folder / "timings.json"))
    facts = gather_facts(results, grid, datasets, command)
    return files + write_report(folder, facts, tables | {"learning_rates": tuning.rates, "horizons": tuning.horizons})


def save_table(table: pd.DataFrame, path: Path) -> Path:
    """Writes a table as CSV, to six digits, and returns its path."""
    with atomic_write(path, "w") as file:
        spreadsheet_table(table).to_csv(file, index=False, float_format="%.6g")
    return path


def save_timings(timings: pd.DataFrame, path: Path) -> Path:
    """Writes what trainings took as JSON, a record per row, and returns its path: all CSV files are results."""
    with atomic_write(path, "w") as file:
        timings.to_json(file, orient="records", indent=2)
    return path


def extent_table(results: Results, grid: Grid) -> pd.DataFrame:
    """Says how much of a study there is.

    Returns:
        One row: arms, datasets, splits, seeds (how many were asked for), planned, done, failed (trainings; those that
        failed are among those that are done).
    """
    failed = sum(result.failure is not None for result in results.values())
    sizes = {"arms": len(grid.arms), "datasets": len(grid.datasets), "splits": len(grid.split_seeds)}
    done = {"seeds": len(grid.seeds), "planned": len(grid), "done": len(results), "failed": failed}
    return pd.DataFrame([sizes | done])


def gather_facts(results: Results, grid: Grid, datasets: Datasets, command: str) -> StudyFacts:
    """Returns what the report says of the study beside its numbers; arguments are those of ``write_study``."""
    names = [short_name(name) for name in datasets]
    failed = sum(result.failure is not None for result in results.values())
    hours = sum(result.record.seconds for result in results.values()) / 3600
    splits = f"{len(grid.split_seeds)} splits, " if len(grid.split_seeds) > 1 else ""
    settings = [
        {"setting": key} | {arm: str(value) for arm, value in by_arm.items()}
        for key, by_arm in grid.differences().items()
    ]
    origins = [result.record.origin for result in results.values()]
    origin = pd.DataFrame([{"code": origin.git_commit, **origin.versions} for origin in origins])
    return StudyFacts(
        title=f"{', '.join(grid.arms)} on {', '.join(names)}",
        lead=unclean_text(results)
        + f"{len(results)} of {len(grid)} runs ({len(grid.arms)} arms, {len(names)} datasets, {splits}"
        f"{len(grid.seeds)} seeds), "
        f"{failed} of which failed; {hours:.1f} hours of training and evaluation with {grid.threads} threads.",
        command=command,
        differences=pd.DataFrame(settings, columns=["setting", *grid.arms]),
        datasets=datasets_table(datasets, grid.split_seeds[0]),
        origin=origin.value_counts(dropna=False).rename("cells").reset_index(),
    )


def is_unclean(origin: Origin) -> bool:
    """Whether a result was made while files differed from their commit, or outside a repository."""
    return origin.git_commit is None or origin.git_commit.endswith("+")


def unclean_text(results: Results) -> str:
    """Says how many cells cannot be published; empty where all can."""
    unclean = sum(is_unclean(result.record.origin) for result in results.values())
    return f"Not for publication: {unclean} cells are of code that no commit has. " if unclean else ""


def datasets_table(datasets: Datasets, split_seed: int) -> pd.DataFrame:
    """Returns one row per dataset, with the columns that ``StudyFacts`` names."""
    rows = []
    for name, dataset in datasets.items():
        split = split_dataset(dataset, split_seed)
        row = {"dataset": short_name(name), "transitions": dataset.num_transitions, "sha256": dataset.sha256[:16]}
        train = training_rows(dataset, split, parse_name(name).rows, split_seed)
        row["training"] = (
            f"{len(train)} in {len(split.train)} trajectories" if parse_name(name).rows is None else f"{len(train)}"
        )
        for part, indices in (("validation", split.holdout), ("test", split.test)):
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
        tables: Tables of ``analyse``, ``sensitivity``, ``learning_rates`` and ``horizons``.

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
    """Returns the answer of a study as a table of text: a line per metric, a column per arm against the first one.

    Args:
        paired: Table of ``analysis.paired_table``.
    """
    lines, metrics = [], find_metrics(paired.metric)
    for name, metric in metrics.items():
        of_metric = against_first(paired[paired.metric == name])
        line = {"": metric.label}
        for (arm, reference), rows in of_metric.groupby(["arm", "reference"], sort=False):
            counts = rows[rows.dataset != POOLED].verdict.value_counts(sort=False)
            said = ", ".join(f"{verdict} {count}" for verdict, count in counts.items())
            (pooled,) = rows[rows.dataset == POOLED].to_dict("records")
            numbers = [format_cell(pooled[column]) for column in ("effect", "least", "most")]
            line[f"{arm} / {reference}"] = f"{said}; {numbers[0]} ({numbers[1]} to {numbers[2]})"
        lines.append(line)
    return pd.DataFrame(lines).fillna("-")


def by_dataset(paired: pd.DataFrame) -> pd.DataFrame:
    """Returns what was found as a table of text: a line per metric and dataset, a column per arm against the first one.

    Args:
        paired: Table of ``analysis.paired_table``.
    """
    rows = against_first(paired)
    rows = rows[rows.dataset != POOLED]
    return side_by_side(rows, "effect", rows.arm + " / " + rows.reference)


def build_sections(facts: StudyFacts, tables: Tables) -> list[Section]:
    """Returns the parts of the report in reading order."""
    paired, values = tables["paired"], tables["values"]
    margins = pd.DataFrame(
        [
            {"metric": metric.label, "is": metric.meaning, "compared by": "ratio" if metric.is_ratio else "difference"}
            | {"margin": metric.margin, "better": {-1: "lower", 1: "higher", 0: "neither"}[metric.better]}
            for metric in find_metrics(paired.metric).values()
        ]
    )
    return [
        Section(
            "What is compared",
            "Errors are in normalised units (1 is a typical change in one step).",
            tables={"Settings in which arms differ": facts.differences, "Datasets": facts.datasets, "Metrics": margins},
        ),
        Section(
            "Dataset by dataset",
            "Each arm against the first one, in pairs of runs with the same seed and trajectories: ratio or "
            "difference, 95 % interval, and what it means.",
            figures=["effects"] if len(paired) else [],
            tables={"Effects": by_dataset(paired), "Values": side_by_side(values, "value", values.arm)},
            details={"All pairs of arms": paired},
        ),
        Section(
            "Long rollouts",
            f"Horizons were chosen before any test: {RULE}.",
            figures=["horizon"],
            tables={"Horizons": tables["horizons"]},
        ),
        Section(
            "Uncertainty",
            "How well measures of uncertainty order rows by their error: means over runs.",
            figures=["calibration"],
            details={"Every measure": tables["uncertainty"]},
        ),
        Section(
            "Stability",
            "Spread is of logs: 0.05 is 5 %. Of members it is robust; of ensembles it follows from their members by "
            "the jackknife, and over seeds it is as observed. A stray member errs more than twice the median. jitter: "
            "mean rise of log validation error from one epoch to the next, falls counting 0.",
            figures=["stability"],
            tables={"Stability": tables["stability"]},
        ),
        Section(
            "Learning rates",
            "below and above: validation error at the neighbouring candidates over that at the chosen rate. "
            + rates_at_the_edge(tables["sensitivity"]),
            figures=["sensitivity"] if "val_mse" in tables["learning_rates"] else [],
            tables={"How forgiving each arm is": tables["sensitivity"]},
            details={"All trials": tables["learning_rates"]},
        ),
        *policy_sections(tables),
        *claim_sections(tables["claims"]),
        Section("What this does not show", " ".join(LIMITS)),
        Section(
            "How it was made",
            facts.command,
            tables={"Where the time goes": time_by_part(tables["timings"]), "Origin of the cells": facts.origin},
            details={"What each training took": tables["timings"]},
        ),
    ]


def policy_sections(tables: Tables) -> list[Section]:
    """Returns the part about policies; none where no cell has evaluated any."""
    if "policies" not in tables:
        return []
    return [
        Section(
            "Does it matter downstream?",
            "What policies are worth in the models beside what they earn in the simulator: errors of values over the "
            "range of true ones. The propagation simulator shows what the shared reward model alone is to blame for.",
            figures=["values", "foreseen"] if len(tables["policies_foreseen"]) else ["values"],
            tables={"By arm": tables["policies"], "Which metric foresees the error": tables["policies_foreseen"]},
            details={
                "Arms in pairs": tables["policies_paired"],
                "TS1 against TSinf": tables["policies_propagations"],
            },
        )
    ]


def claim_sections(claims: pd.DataFrame) -> list[Section]:
    """Returns the part about what others have claimed; none where the study says nothing about any of it.

    Args:
        claims: Table of ``verdicts.judge_claims``.
    """
    claims = claims[(claims.group == "others") & claims[["holds", "against", "open"]].any(axis=1)]
    if claims.empty:
        return []
    names = {"setting": "their setting", "measure": "our measure", "holds": "holds on", "against": "goes against"}
    table = claims[["claim", "source", "setting", "measure", "holds", "against", "open", "verdict"]]
    return [Section("Claims of others", CLAIMS_INTRO, tables={"Verdicts": table.rename(columns=names)})]


def time_by_part(timings: pd.DataFrame) -> pd.DataFrame:
    """Says where the time of a training goes.

    Args:
        timings: Table of ``analysis.timings_table``.

    Returns:
        part, seconds (mean over trainings), share (of the whole), least, most (means of the arm that takes the least
        and of the one that takes the most, named).
    """
    total = timings.assign(total=timings.runs * timings.seconds).groupby("part", sort=False).total.sum()
    trainings = timings.groupby(["arm", "dataset"]).runs.max().sum()
    of_arm = timings.groupby(["part", "arm"], sort=False).seconds.mean()
    records = []
    for part, seconds in total.items():
        arms = of_arm[part].sort_values()
        ends = {name: f"{arms.iloc[at]:.1f} {arms.index[at]}" for name, at in (("least", 0), ("most", -1))}
        share = f"{seconds / total.sum():.0%}"
        records.append({"part": part, "seconds": f"{seconds / trainings:.1f}", "share": share, **ends})
    return pd.DataFrame(records, columns=["part", "seconds", "share", "least", "most"])


def rates_at_the_edge(sensitivity: pd.DataFrame) -> str:
    """Says which arms learn at the lowest or the highest of their candidate rates: a better one may lie beyond."""
    rows = sensitivity[sensitivity.is_edge]
    rates = ", ".join(f"{row.arm} on {row.dataset} {row.fit_lr:g}" for row in rows.itertuples())
    return f"Rates at the edge of what was tried, beyond which a better one may lie: {rates}." if rates else ""


def side_by_side(table: pd.DataFrame, name: str, columns: pd.Series) -> pd.DataFrame:
    """Returns numbers with their intervals as text: a line per metric and dataset, a column per arm or pair of arms.

    Args:
        table: metric, dataset, low, high, verdict (may be missing), and the number.
        name: Name of the number's column.
        columns: For each row of the table, the name of the column that it goes to.
    """
    labels = {metric: found.label for metric, found in find_metrics(table.metric).items()}
    text = table.apply(lambda row: interval_text(row, name), axis=1) if len(table) else []
    wide = table.assign(metric=table.metric.map(labels), text=text, column=columns).pivot_table(
        index=["metric", "dataset"], columns="column", values="text", aggfunc="first", sort=False
    )
    return wide.rename_axis(columns=None).reset_index()


def interval_text(row: Mapping[str, object], name: str) -> str:
    """Formats a number, its interval where it has one, and what that means."""
    text = format_cell(row[name])
    if not np.isnan(row["low"]):
        text += f" [{format_cell(row['low'])}, {format_cell(row['high'])}]"
    return " ".join(filter(None, (text, row.get("verdict", ""))))
