"""The report of an evaluation: what its HTML page says, from tidy tables and figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd

from reporting.page import Section, format_cell, html_page

# --- What the page says ---

UNITS = (
    "Errors are in normalised units unless marked raw: each state dimension is divided by the mean absolute deviation "
    "of its change per step in the training data, so 1 is a typical step, in every dimension alike. Dimensions that "
    "change by a constant are left out."
)

_CARD_HORIZON = 25

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
    **{f"coverage_{level}": f"in {level} % interval" for level in (50, 80, 90, 95)},
    "auroc": "AUROC",
    "auroc_worst": "AUROC, worst 10 %",
    "q10": "10 %",
    "q25": "25 %",
    "q75": "75 %",
    "q90": "90 %",
    "no_change": "no change",
    "horizon": "steps",
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
    "rollout_astray": "Share of simulated paths that have left the range of the recorded states (by more than a "
    "twentieth of its width, in any dimension), and of those that have gone farther outside than the range is wide.",
    "rollout_coverage": "Share of true states inside the 90 % band of the forecast, over dimensions and start points, "
    "with two standard errors (clustered by trajectory). Below the dotted line the model is surer than it may be. "
    "Recalibrated: one factor per dimension and horizon, fitted on other trajectories.",
    "reliability": "How often the truth falls in the central interval that promises to hold it. Below the dotted "
    "line intervals are too narrow (overconfident), above it too wide.",
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


def headline_cards(summary: dict[str, float], horizons: Sequence[int]) -> list[tuple[str, str, str]]:
    """Returns the numbers to see first: name, value, how to read it."""
    shown = {name: format_cell(value) for name, value in summary.items()}
    cards = [
        (
            "one-step nRMSE",
            shown["nrmse"],
            f"linear regression {shown.get('nrmse_linear', '-')}, no change {shown['nrmse_no_change']}",
        ),
        ("CRPS of the mixture", shown["crps_mixture"], f"NLL {shown['nll_mixture']} nats"),
        (
            "90 % interval covers",
            f"{summary['coverage_90_raw']:.1%}",
            f"calibration error {shown['ece_raw']}, recalibrated {shown.get('ece_recalibrated', '-')}",
        ),
    ]
    for step in [step for step in horizons if f"error_tsinf_{step}" in shown and step <= _CARD_HORIZON][-1:]:
        diverged = summary[f"diverged_tsinf_{step}"]
        cards.append(
            (f"error after {step} steps", shown[f"error_tsinf_{step}"], f"tsinf, median; {diverged:.0%} diverged")
        )
    cards.append(
        ("calibrated horizon", shown["calibrated_horizon_tsinf_raw"], "steps at which the 90 % band of tsinf holds")
    )
    if "auroc_worst_total_std" in shown:
        cards.append(("finds its errors", shown["auroc_worst_total_std"], "AUROC of the worst 10 % by total_std"))
    return cards


def measured_sections(tables: dict[str, pd.DataFrame], horizons: Sequence[int]) -> list[Section]:
    """Returns the sections of the page, in reading order, as far as there are tables for them."""
    overall = {
        name: tables[name].query("dimension == 'all'").drop(columns="dimension")
        for name in ("one_step", "likelihood", "calibration")
    }
    rollout, coverage = (tables[name][tables[name].horizon.isin(horizons)] for name in ("rollout", "rollout_coverage"))
    by_name = dict(list(rollout.groupby("propagation")))
    shown = pd.concat([by_name[name] for name in ("tsinf", "ts1", "mean", "no_change")])
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
            ["rollout_error", "rollout_astray", "rollout_coverage"],
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
            "with one factor per dimension, fitted on other trajectories than it is scored on.",
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
            {"Measures of disagreement against the true error": tables["uncertainty"]},
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


# --- HTML ---


def html_report(
    facts: dict[str, Any],
    summary: dict[str, float],
    tables: dict[str, pd.DataFrame],
    figures: dict[str, bytes],
    horizons: Sequence[int],
) -> str:
    """Returns the page of an evaluation.

    Args:
        facts: What was evaluated on what, as ``evaluate_model.describe`` says it.
        summary: Headline numbers, as ``evaluation.summarise`` gives them.
        tables: Of ``evaluation.evaluate``.
        figures: PNG files by name, of ``figures.draw_figures``.
        horizons: Steps that tables of rollouts show.
    """
    settings = pd.DataFrame({"setting": list(facts["config"]), "value": [str(v) for v in facts["config"].values()]})
    origin = f"Seed {facts['seed']}; code {facts['git_commit'] or 'unknown'}; data {facts['sha256'][:16]}."
    sections = [
        *measured_sections(tables, horizons),
        Section("How it was made", f"{facts['command']}. {origin}", [], {}, {"Configuration of the model": settings}),
    ]
    members = "member" if facts["members"] == 1 else "members"
    lead = (
        f"{facts['members']} {facts['kind']} {members}, trained on {facts['trained_on']}; evaluated on "
        f"{facts['rows']:,} transitions of {facts['trajectories']} trajectories of {facts['dataset']}."
    )
    opening = [f'<p class="lead">{html.escape(lead)}</p>']
    opening += [f"<p>{html.escape(note)}</p>" for note in facts["notes"]]
    opening.append(f'<div class="cards">{"".join(_card(*card) for card in headline_cards(summary, horizons))}</div>')
    opening.append(f'<p class="units">{html.escape(UNITS)}</p>')
    return html_page(facts["title"], "\n".join(opening), sections, figures, CAPTIONS, headings=HEADINGS)


def _card(name: str, value: str, reading: str) -> str:
    name, value, reading = map(html.escape, (name, value, reading))
    return f'<div class="card"><div>{name}</div><strong>{value}</strong><small>{reading}</small></div>'
