"""The report of an evaluation: what was evaluated on what, the HTML page with the results, and the files."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from data.trajectories import Finding
from evaluation.selection import MAX_ROWS, Model, Selection
from evaluation.tables import LEVELS, Tables
from reporting.escape import spreadsheet_table
from reporting.page import Section, format_cell, html_page
from utils import atomic_write, git_commit, read_file

# --- What was evaluated on what ---

_PARTS = {
    "test": "test trajectories, which neither trained the model nor selected anything",
    "holdout": "the selection holdout: its error chose the members' weights and elites, so these scores flatter the "
    "model; train with --test_ratio for a test",
    "train": "training trajectories: the scores say how well the model fits what it has seen, not how well it predicts",
    "other holdout": "the dataset that was held out for selection: its error chose the members' weights and elites, so "
    "these scores flatter the model",
    "unseen": "a dataset other than the one the model was trained on: no whole trajectory of it trained the model or "
    "selected anything",
}


@dataclass(frozen=True)
class EvaluationFacts:
    """What was evaluated on what, as ``metrics.json`` and the page say it.

    Attributes:
        model: Name of the model's run.
        kind: Its kind of ensemble.
        members: How many there are.
        trained_on: Name of the dataset that the model was trained on.
        title: Title of the report.
        dataset: Name of the dataset that it was evaluated on.
        environment: That dataset's environment, as far as it is known.
        sha256: That dataset's digest.
        part: What its trajectories were in the model's training, as in ``Selection``.
        rows: How many transitions were evaluated.
        trajectories: How many trajectories they are of.
        notes: What a reader must know to judge the scores, in sentences.
        seed: Seed of folds, start points and sampling.
        findings: Findings of the audit of that dataset.
        training_findings: Findings about the dataset that the model was trained on, if that is another one.
        config: The model's settings.
        command: The command line that made the report.
        git_commit: The commit of the code that made it; None if unknown.
    """

    model: str
    kind: str
    members: int
    trained_on: str
    title: str
    dataset: str
    environment: str | None
    sha256: str
    part: str
    rows: int
    trajectories: int
    notes: list[str]
    seed: int
    findings: list[Finding]
    training_findings: list[Finding]
    config: dict[str, Any]
    command: str
    git_commit: str | None

    @classmethod
    def of(
        cls,
        model: Model,
        selection: Selection,
        findings: Sequence[Finding],
        *,
        known_rows: int,
        has_training_rows: bool,
        seed: int,
        command: str,
    ) -> EvaluationFacts:
        """Gathers the facts of an evaluation.

        Args:
            model: The model that was evaluated.
            selection: What it was evaluated on.
            findings: Findings of the audit of that dataset.
            known_rows: How many of its rows equal training rows although their trajectories do not.
            has_training_rows: Whether the training rows were at hand.
            seed: Seed of folds, start points and sampling.
            command: The command line that makes the report.
        """
        dataset = selection.dataset
        trained_on = model.metadata["dataset"]["name"]
        notes = [f"Evaluated on {_PARTS[selection.part]}."]
        if selection.copies:
            total = selection.available + (0 if selection.keeps_copies else selection.copies)
            known = "trained the model or selected its weights" if selection.part == "unseen" else "trained the model"
            fate = (
                "are counted all the same, so these scores flatter the model."
                if selection.keeps_copies
                else "were left out (--keep_copies counts them)."
            )
            notes.append(f"{selection.copies} of {total} trajectories equal some that {known} and {fate}")
        rows = sum(dataset.trajectories[index].num_transitions for index in selection.indices)
        if known_rows:
            notes.append(
                f"{known_rows} of {rows} rows equal training rows, in trajectories that are cut or ordered otherwise: "
                "these scores flatter the model."
            )
        if selection.part == "unseen" and "fingerprints" not in model.metadata["dataset"]:
            notes.append("The model is of an older version: copies of its training trajectories cannot be told here.")
        if not all(dataset.trajectories[index].in_order for index in selection.indices):
            notes.append("Its rows do not follow one another: rollouts of more than one step are refused.")
        if len(selection.indices) < selection.available:
            notes.append(
                f"{len(selection.indices)} of {selection.available} trajectories were drawn at random, for about "
                f"{MAX_ROWS} rows."
            )
        if not has_training_rows:
            notes.append(
                f"The training dataset {trained_on} is not here in the version that was trained on: the linear "
                "baseline (and the variance of deterministic members) is fitted on the evaluated trajectories, each "
                "fold on the others."
            )
        if len(selection.indices) < 2:
            notes.append("With a single trajectory nothing can be recalibrated, and standard errors are unknown.")
        is_other = selection.part in ("unseen", "other holdout")
        other_findings = model.metadata["dataset"].get("findings", []) if is_other else []
        return cls(
            model=model.name,
            kind=model.metadata["kind"],
            members=len(model.ensemble),
            trained_on=trained_on,
            title=f"{model.name} on {slug(dataset.name)}",
            dataset=dataset.name,
            environment=dataset.env_name,
            sha256=dataset.sha256,
            part=selection.part,
            rows=rows,
            trajectories=len(selection.indices),
            notes=notes,
            seed=seed,
            findings=list(findings),
            training_findings=[Finding(**found) for found in other_findings],
            config=model.metadata["config"],
            command=command,
            git_commit=git_commit(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the facts as JSON keeps them."""
        return dataclasses.asdict(self)


def slug(name: str) -> str:
    """Turns a name into one that files and MLflow accept; a path becomes the file's name without its ending."""
    parts = [Path(part).name if "/" in part else part for part in name.split(" + ")]
    return re.sub(r"[^\w.-]+", "-", "-".join(re.sub(r"\.(hdf5|h5|pkl|pickle)$", "", part) for part in parts))


# --- The page ---

UNITS = (
    "Errors are in normalised units unless marked raw: each state dimension is divided by the mean absolute deviation "
    "of its change per step in the training data (by the standard deviation where it moves in a handful of rows only), "
    "so 1 is a typical step, in every dimension alike. Dimensions that change by a constant are left out."
)

_CARD_HORIZON = 25
_SHOWN_PROPAGATIONS = ("tsinf", "tsinf_clamped", "ts1", "mean", "mean_clamped", "mean_state", "no_change")

HEADINGS = {
    "rmse": "nRMSE",
    "rmse_raw": "RMSE, raw",
    "r2": "R²",
    "nll": "NLL (nats)",
    "nll_raw": "NLL, raw",
    "crps": "CRPS",
    "crps_raw": "CRPS, raw",
    "mean_z2": "mean z²",
    "ece": "calibration error",
    **{f"coverage_{100 * level:.0f}": f"in {100 * level:.0f} % interval" for level in LEVELS},
    "auroc": "AUROC",
    "auroc_worst": "AUROC, worst 10 %",
    "q10": "10 %",
    "q25": "25 %",
    "q75": "75 %",
    "q90": "90 %",
    "no_change": "no change",
    "horizon": "steps",
    "skill_no_change": "skill, no change",
    "energy_score": "energy score",
    "left_range": "left the range",
}
CAPTIONS = {
    "one_step": "Root mean squared error of the predicted next state; lower is better. The bar spans the single "
    "members. A model that is no better than the cross has learned nothing that a straight line would not know.",
    "ensemble_size": "Error when the means of this many members are averaged, in expectation over all subsets of that "
    "size. A flat line says that fewer members would do; a falling one, that more would help.",
    "rollout_error": "The model is fed its own predictions along recorded actions; the record is the truth. tsinf "
    "keeps one member per path, ts1 changes it every step, mean feeds back the average; a grey line is one member by "
    "itself. Where a line crosses 'no change', guessing that nothing moves is as good. Start points whose trajectory "
    "has ended drop out: see their number in the table.",
    "rollout_skill": "Share of the error of predicting the mean training state that is spared: 100 % is perfect; at 0 "
    "the forecast knows no more of where it is, and below it misleads. Dots end the steps for which half of the first "
    "step's skill is kept. Clamped: each state is kept within the data's range, widened by half its width.",
    "rollout_astray": "Share of simulated paths that have left the range of the recorded states by more than a "
    "twentieth of its width, in any dimension (thin), or exploded: gone farther out than it is wide (thick).",
    "rollout_coverage": "Share of true states inside the 90 % band of the forecast, over dimensions and start points, "
    "with two standard errors (clustered by trajectory). Below the dotted line the model is surer than it may be. "
    "Recalibrated: one factor per dimension and horizon, fitted on other trajectories.",
    "reliability": "How often the truth falls in the central interval that promises to hold it. Below the dotted "
    "line intervals are too narrow (overconfident), above it too wide. Recalibrated: by one factor per dimension, or "
    "by isotonic regression, which mends any shape (Kuleshov et al. 2018), each fitted on other trajectories.",
    "pit": "Each truth is placed in its predicted distribution. Flat is calibrated; a hump in the middle means too "
    "wide, a U shape too narrow, a slope means a bias.",
    "coverage": "The same at one level, dimension by dimension: a good average can hide dimensions that are too sure "
    "and others that are too careful.",
    "usefulness": "Does larger uncertainty mean larger error? Rank correlation; probability of ranking one of the "
    "worst tenth of errors above another row (0.5 is chance); and how much of the possible gain is reached when rows "
    "are trusted in order of certainty.",
    "risk_coverage": "Mean error when only the most certain rows are kept. The faster a line drops towards the left, "
    "the better a planner can avoid errors by avoiding uncertainty.",
    "parts": "Root mean square of the two parts of the predicted variance: what members expect as noise (aleatoric) "
    "and what they disagree about (epistemic). On deterministic physics, which has no noise, 'aleatoric' is misfit.",
    "ood": "Probability that a row of the other dataset is given more uncertainty than a held-out row of this one. 0.5 "
    "is chance, 1 is perfect. A dataset that resembles this one should not be told apart.",
    "oracle": "From the same recorded states the simulator takes recorded actions, perturbed ones (30 % of half the "
    "action range), mirrored ones and random ones. An honest model's predicted deviation grows with its true error.",
    "oracle_noise": "The data was collected with noise on the executed action, and the simulator was asked 64 times "
    "for each state what follows. This is the only place where aleatoric uncertainty has a truth to compare with.",
    "cross_dataset": "One-step error in units of each dataset's own typical change per step, so that a column compares "
    "models. A red frame marks the dataset a model was trained on, where only rows it did not train on count.",
}


class Card(NamedTuple):
    """A number at the top of the page: its name, its value, and what to compare it with."""

    name: str
    value: str
    reading: str


def headline_cards(summary: Mapping[str, float], horizons: Sequence[int]) -> list[Card]:
    """Returns the numbers at the top of the page, from those of ``evaluate.summarise``."""
    shown = {name: format_cell(value) for name, value in summary.items()}
    cards = [
        Card(
            "one-step nRMSE",
            shown["nrmse"],
            f"a typical row {shown['median_error']}; linear regression {shown.get('nrmse_linear', '-')}, "
            f"no change {shown['nrmse_no_change']}",
        ),
        Card("CRPS of the mixture", shown["crps_mixture"], f"NLL {shown['nll_mixture']} nats"),
        Card(
            "90 % interval covers",
            f"{summary['coverage_90_raw']:.1%}",
            f"calibration error {shown['ece_raw']}, recalibrated {shown.get('ece_recalibrated', '-')}",
        ),
    ]
    for step in [step for step in horizons if f"error_tsinf_{step}" in shown and step <= _CARD_HORIZON][-1:]:
        skill, exploded = (f"{summary[f'{name}_tsinf_{step}']:.0%}" for name in ("skill", "exploded"))
        reading = f"tsinf, median; skill {skill}; {exploded} of paths exploded"
        cards.append(Card(f"error after {step} steps", shown[f"error_tsinf_{step}"], reading))
    reading = "steps at which the 90 % band of tsinf holds"
    cards.append(Card("calibrated horizon", shown["calibrated_horizon_tsinf_raw"], reading))
    if "auroc_worst_total_std" in shown:
        cards.append(Card("finds its errors", shown["auroc_worst_total_std"], "AUROC of the worst 10 % by total_std"))
    return cards


def measured_sections(tables: Tables, horizons: Sequence[int]) -> list[Section]:
    """Returns the sections of the page that there are tables for, in reading order."""
    overall = {
        name: tables[name].query("dimension == 'all'").drop(columns="dimension")
        for name in ("one_step", "likelihood", "calibration")
    }
    rollout, coverage = (tables[name][tables[name].horizon.isin(horizons)] for name in ("rollout", "rollout_coverage"))
    by_name = dict(list(rollout.groupby("propagation")))
    shown = pd.concat([by_name[name] for name in _SHOWN_PROPAGATIONS]).drop(columns=["trajectories", "q10", "q90"])
    sections = [
        Section(
            "One step ahead",
            "How far is the predicted next state from the true one, and what would simpler predictors have done?",
            ["one_step", "ensemble_size"],
            {"Errors over all dimensions": overall["one_step"]},
            {"Errors by dimension": tables["one_step"], "Errors by ensemble size": tables["ensemble_size"]},
        ),
        Section(
            "Open-loop rollouts",
            "How far ahead can the model be trusted? The calibrated horizon counts the steps for which the 90 % band "
            "covers at least 90 % minus two standard errors.",
            ["rollout_error", "rollout_skill", "rollout_astray", "rollout_coverage"],
            {"Calibrated horizon": tables["calibrated_horizon"], "Error by horizon": shown},
            {
                "Single members": rollout[rollout.propagation.str.startswith("member_")],
                "Median absolute error by dimension": tables["rollout_dimensions"],
                "Coverage of the 90 % band": coverage,
            },
        ),
        Section(
            "Likelihood and calibration",
            "Is the uncertainty of the right size? Deterministic members are given the variance of their training "
            "residuals. Mixture: over members; gaussian: of the same mean and variance; recalibrated: that Gaussian "
            "with one factor per dimension, fitted on other trajectories than it is scored on; isotonic: by isotonic "
            "regression, likewise, which leaves no density and so no NLL. Sharpness: predicted deviation.",
            ["reliability", "pit", "coverage"],
            {"Likelihood": overall["likelihood"], "Calibration": overall["calibration"]},
            {
                "Likelihood by dimension": tables["likelihood"],
                "Calibration by dimension": tables["calibration"],
                **({"Log-variances at their learned bounds": tables["bounds"]} if "bounds" in tables else {}),
            },
        ),
        Section(
            "Is the uncertainty useful?",
            "A planner needs uncertainty that is large where errors are large. Measures: max_pairwise (MOReL), "
            "ensemble_std, max_aleatoric (MOPO), total_std.",
            ["usefulness", "risk_coverage", "parts"],
            {"Measures of disagreement against the true error": tables["uncertainty"].drop(columns="rows")},
            {"Parts of the uncertainty by dimension": tables["parts"]},
        ),
    ]
    if "ood" in tables:
        text = "Does the model notice that it is asked about other data?"
        sections.append(Section("Other data", text, ["ood"], {"Telling datasets apart": tables["ood"]}, {}))
    if "oracle" in tables:
        noise = {"Noise by dimension": tables["oracle_noise"]} if "oracle_noise" in tables else {}
        drawn = ["oracle", "oracle_noise"] if noise else ["oracle"]
        text = "The simulator was first checked to reproduce recorded transitions."
        shown = tables["oracle"].set_index("actions").T.rename_axis("score").reset_index()
        sections.append(
            Section("Against the simulator", text, drawn, {"Actions on and off the data": shown} | noise, {})
        )
    if "cross_dataset" in tables:
        table = {"Errors": tables["cross_dataset"]}
        sections.append(Section("Across datasets", "", ["cross_dataset"], table, {}))
    return sections


def html_report(
    facts: EvaluationFacts,
    summary: Mapping[str, float],
    tables: Tables,
    figures: Mapping[str, bytes],
    horizons: Sequence[int],
) -> str:
    """Returns the page of an evaluation.

    Args:
        facts: What was evaluated on what.
        summary: Headline numbers, of ``evaluate.summarise``.
        tables: Of ``evaluate.evaluate`` and those that go with them.
        figures: PNG files by name, of ``figures.draw_figures``.
        horizons: Steps that tables of rollouts show.
    """
    settings = pd.DataFrame({"setting": list(facts.config), "value": list(map(str, facts.config.values()))})
    origin = f"Seed {facts.seed}; code {facts.git_commit or 'unknown'}; data {facts.sha256[:16]}."
    sections = [
        *measured_sections(tables, horizons),
        audit_section(facts),
        Section("How it was made", f"{facts.command}. {origin}", [], {}, {"Configuration of the model": settings}),
    ]
    members = "member" if facts.members == 1 else "members"
    lead = (
        f"{facts.members} {facts.kind} {members}, trained on {facts.trained_on}; evaluated on {facts.rows:,} "
        f"transitions of {facts.trajectories} trajectories of {facts.dataset}."
    )
    opening = [f'<p class="lead">{html.escape(lead)}</p>']
    opening += [f"<p>{html.escape(note)}</p>" for note in facts.notes]
    opening.append(f'<div class="cards">{"".join(map(_html_card, headline_cards(summary, horizons)))}</div>')
    opening.append(f'<p class="units">{html.escape(UNITS)}</p>')
    return html_page(facts.title, "\n".join(opening), sections, figures, CAPTIONS, headings=HEADINGS)


def audit_section(facts: EvaluationFacts) -> Section:
    """Returns what was found about the datasets, as tables."""
    tables = {}
    for name, findings in ((facts.dataset, facts.findings), (facts.trained_on, facts.training_findings)):
        if findings:
            tables[name] = pd.DataFrame([dataclasses.asdict(finding) for finding in findings]).drop(columns="matters")
    text = "What was found about the data before anything was computed." if tables else "Nothing was found."
    return Section("What the data say", text, [], tables, {})


def _html_card(card: Card) -> str:
    name, value, reading = map(html.escape, card)
    return f'<div class="card"><div>{name}</div><strong>{value}</strong><small>{reading}</small></div>'


# --- Files ---


def earlier_files(folder: Path) -> list[str]:
    """Names of the files of an earlier report in a folder; empty where there is none.

    They are removed before the next one is written, so names that no report writes are none of them.
    """
    try:
        names = json.loads(read_file(folder / "metrics.json"))["files"]
        if not isinstance(names, list):
            raise TypeError("it names no files")
        return [name for name in names if re.fullmatch(r"[A-Za-z_0-9]+\.(csv|png|html|json)", name)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def write_report(
    folder: Path,
    facts: EvaluationFacts,
    summary: Mapping[str, float],
    tables: Tables,
    figures: Mapping[str, bytes],
    page: str,
) -> list[Path]:
    """Writes the page, the tables and the figures; those of an earlier report are removed first.

    Returns:
        The files, ``metrics.json`` last: where it is, the report is whole.
    """
    for name in earlier_files(folder):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        with atomic_write(folder / f"{name}.csv", "w") as file:
            spreadsheet_table(table).to_csv(file, index=False)
    for name, image in figures.items():
        with atomic_write(folder / f"{name}.png") as file:
            file.write(image)
    with atomic_write(folder / "report.html", "w") as file:
        file.write(page)
    names = ["report.html", *(f"{name}.csv" for name in tables), *(f"{name}.png" for name in figures), "metrics.json"]
    with atomic_write(folder / "metrics.json", "w") as file:
        json.dump({**facts.to_dict(), "metrics": summary, "files": names}, file, indent=2)
    return [folder / name for name in names]
