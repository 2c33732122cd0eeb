"""The answer of a study, composed by rule from its tables: every sentence names its number, and none is typed in.

What is said of whole questions follows ``results/PROTOCOL.md``, section "What will be said", whose claims
``verdicts.py`` judges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from reporting.page import format_cell
from study.analysis import POOLED
from study.metrics import PRIMARY, Metric, find_metrics
from study.policy_analysis import PRIMARY as PRIMARY_VALUES
from study.policy_analysis import VALUE_ERROR
from study.verdicts import LOSS, TYPE, summarise_claims

PLANNED = {"arms": 8, "datasets": 8, "seeds": 6}  # by the protocol
PURPOSES = {
    "nrmse": "one step, root mean square",
    "median_error": "one step, typical row",
    "rollout_mean": "long rollouts",
    "nll": "a likely distribution",
    "spearman": "knowing where it errs",
    "value_error": "what policies are worth",
    "member_spread": "members that are alike",
}
PICKS_RULE = (
    "The pick is the arm with the most verdicts *better*, less those *worse*, against all other arms on all datasets; "
    "where several have as many, the first of them. As good are the arms that it does not beat on more than half of "
    "the datasets. Ratios (of NLL and Spearman: differences) are against `{reference}`: the mean over datasets, and "
    "the range over them."
)
_CERTAINTIES = ("better", "tie", "worse", "undecided", "too few runs")


# --- Tables to read from ---


def primary_pairs(paired: pd.DataFrame, policies: pd.DataFrame | None) -> pd.DataFrame:
    """Returns the comparisons of primary metrics, each both ways round.

    Args:
        paired: Table of ``analysis.paired_table``.
        policies: Table of ``policy_analysis.paired_values``; None where no policy was evaluated.

    Returns:
        metric, dataset (or ``all datasets``), arm, reference, pairs, effect, low, high, least, most, verdict.
    """
    columns = ["metric", "dataset", "arm", "reference", "pairs", "effect", "low", "high", "least", "most", "verdict"]
    parts = [paired[paired.metric.isin(PRIMARY)]]
    if policies is not None:
        parts.append(policies[np.logical_and.reduce([policies[k] == v for k, v in PRIMARY_VALUES.items()])])
    rows = pd.concat([part.reindex(columns=columns) for part in parts if len(part)], ignore_index=True)
    is_ratio = rows.metric.map(lambda name: find_metric(name).is_ratio)
    turned = rows.rename(columns={"arm": "reference", "reference": "arm"})
    for name, source in {"effect": "effect", "low": "high", "high": "low", "least": "most", "most": "least"}.items():
        turned[name] = np.where(is_ratio, 1 / rows[source], -rows[source])
    turned["verdict"] = rows.verdict.replace({"better": "worse", "worse": "better"})
    return pd.concat([rows, turned[columns]], ignore_index=True)


def find_metric(name: str) -> Metric:
    """Returns a primary metric."""
    return VALUE_ERROR if name == VALUE_ERROR.name else find_metrics([name])[name]


# --- Which to pick for what ---


def picks_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """Returns the table "which to pick for what", as text.

    Args:
        pairs: Table of ``primary_pairs``.

    Returns:
        for, metric, pick, by how much (against the first arm), how sure (verdicts against it), not on (datasets on
        which another arm is better, and which), as good (other arms).
    """
    reference = first_arm(pairs)
    records = []
    for name, purpose in PURPOSES.items():
        rows = pairs[(pairs.metric == name) & (pairs.dataset != POOLED)]
        if rows.empty:
            continue
        metric, pick = find_metric(name), pick_arm(rows)
        record = {"for": purpose, "metric": metric.label, "pick": "none: no arm is better than another"}
        if pick is not None:
            own = rows[rows.arm == pick]
            record["pick"] = pick
            record |= _against(pairs, name, pick, reference) if pick != reference else {}
            record["not on"] = _list(
                f"{row.dataset} ({row.reference})" for row in own[own.verdict == "worse"].itertuples()
            )
            beaten = own[own.verdict == "better"].groupby("reference").dataset.nunique()
            others = [arm for arm in dict.fromkeys(own.reference) if 2 * beaten.get(arm, 0) <= own.dataset.nunique()]
            record["as good"] = _list(others)
        records.append(record)
    columns = ["for", "metric", "pick", "by how much", "how sure", "not on", "as good"]
    return pd.DataFrame(records, columns=columns, dtype=object).fillna("-")


def first_arm(pairs: pd.DataFrame) -> str:
    """Returns the arm that others are compared with: the first one of the study."""
    return pairs.reference.iloc[0]


def pick_arm(rows: pd.DataFrame) -> str | None:
    """Returns the arm with the most verdicts better, less those worse; None where no arm has any.

    Args:
        rows: Those of ``primary_pairs`` of one metric, without those of all datasets.
    """
    order = dict.fromkeys([*rows.reference, *rows.arm])
    score = dict.fromkeys(order, 0)
    for arm, of_arm in rows.groupby("arm"):
        score[arm] = int((of_arm.verdict == "better").sum() - (of_arm.verdict == "worse").sum())
    best = max(score, key=score.__getitem__)  # the first one of these
    return best if score[best] > 0 else None


def _against(pairs: pd.DataFrame, name: str, pick: str, reference: str) -> dict[str, str]:
    rows = pairs[(pairs.metric == name) & (pairs.arm == pick) & (pairs.reference == reference)]
    (pooled,) = rows[rows.dataset == POOLED].to_dict("records")
    counts = rows[rows.dataset != POOLED].verdict.value_counts()
    total = counts.sum()
    said = ", ".join(f"{verdict} on {counts[verdict]}" for verdict in _CERTAINTIES if verdict in counts)
    number, least, most = (format_cell(pooled[column]) for column in ("effect", "least", "most"))
    return {"by how much": f"{number} ({least} to {most})", "how sure": f"{said} of {total} datasets"}


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "-"


# --- The paragraph ---


def answer_text(pairs: pd.DataFrame, claims: pd.DataFrame, extent: pd.DataFrame) -> str:
    """Returns the paragraph that answers.

    Args:
        pairs: Table of ``primary_pairs``.
        claims: Table of ``verdicts.judge_claims``.
        extent: Table of ``report.extent_table``.
    """
    sentences = [extent_text(extent), *said_texts(claims), *loss_and_type_texts(pairs), turns_text(pairs)]
    return " ".join([*sentences, undecided_text(pairs)])


def extent_text(extent: pd.DataFrame) -> str:
    """Says how many of the planned trainings there are, and what follows where some are missing."""
    row, planned = extent.iloc[0], math.prod(PLANNED.values())
    failed = f", {row.failed} of which failed" if row.failed else ", none of which failed"
    said = f"{row.done} of the {planned} trainings that the protocol plans are in{failed}"
    if row.done < planned:
        return f"**Preliminary: {said}; what follows may change, and is no result until all are.**"
    return f"{said}."


def said_texts(claims: pd.DataFrame) -> list[str]:
    """Says what became of the sentences that the protocol has prepared, with the intervals behind them."""
    summary = summarise_claims(claims[claims.group == "said"])
    verdicts = {"agree": "this holds", "disagree": "this does not hold", "cannot tell": "the study cannot tell"}
    return [
        f"*{row.claim}*: {verdicts[row.verdict]} ({row.holds} intervals for it, {row.against} against it, "
        f"{row.open} undecided)."
        for row in summary.itertuples()
    ]


def loss_and_type_texts(pairs: pd.DataFrame) -> list[str]:
    """Says what the loss alone and the type alone change, in long rollouts and in likelihood."""
    sentences = []
    for name in ("rollout_mean", "nll"):
        metric, parts = find_metric(name), []
        for what, of_what in (("loss", LOSS), ("type", TYPE)):
            found = [_effect_text(pairs, name, arm, reference) for arm, reference in of_what]
            if all(found):
                parts.append(f"the {what} alone changes it {'by the factors' if metric.is_ratio else 'by'} ")
                parts[-1] += " and ".join(found)
        if parts:
            unit = "" if metric.is_ratio else ", in nats per dimension"
            sentences.append(f"{PURPOSES[name].capitalize()} (`{name}`{unit}): {', '.join(parts)}.")
    return sentences


def _effect_text(pairs: pd.DataFrame, name: str, arm: str, reference: str) -> str | None:
    rows = pairs[(pairs.metric == name) & (pairs.arm == arm) & (pairs.reference == reference)]
    for pooled in rows[rows.dataset == POOLED].itertuples():
        limits = f"{format_cell(pooled.least)} to {format_cell(pooled.most)}"
        return f"{format_cell(pooled.effect)} ({limits}; `{arm}` / `{reference}`)"
    return None


def turns_text(pairs: pd.DataFrame) -> str:
    """Says how many pairs of arms change their order between datasets, metric by metric."""
    said = []
    for name, rows in pairs[pairs.dataset != POOLED].groupby("metric", sort=False):
        verdicts = rows.groupby(["arm", "reference"]).verdict.agg(set)
        turned = sum({"better", "worse"} <= found for found in verdicts) // 2
        said += [f"{turned} in `{name}`"] if turned else []
    total = pairs.groupby(["arm", "reference"]).ngroups // 2
    if not said:
        return f"Of {total} pairs of arms, none changes its order between datasets, in any primary metric."
    where = f"of {total} pairs, {', '.join(said)}"
    return f"No overall winner is named where arms change their order between datasets: {where}."


def undecided_text(pairs: pd.DataFrame) -> str:
    """Says how many comparisons are undecided, and how many runs would decide half of these."""
    rows = pairs[pairs.dataset != POOLED]
    total = len(rows) // 2  # each stands both ways round
    unclear, few = (int((rows.verdict == verdict).sum()) // 2 for verdict in ("undecided", "too few runs"))
    text = f"Of {total} comparisons of primary metrics, {unclear} are undecided"
    if few:
        text += f" and {few} rest on too few runs to tell"
    needed = _runs_needed(rows[(rows.verdict == "undecided") & ~rows.metric.eq("member_spread")])
    text += f"; some {needed} seeds would decide half of the undecided ones" if needed else ""
    return ("**The study cannot tell** most differences: " if 2 * (unclear + few) > total else "") + text + "."


def _runs_needed(undecided: pd.DataFrame) -> int | None:
    """Returns how many seeds make the interval of half of these as narrow as the margin, if seeds are what varies."""
    if undecided.empty:
        return None
    metrics = [find_metric(name) for name in undecided.metric]
    is_ratio = np.array([metric.is_ratio for metric in metrics])
    margin = np.array([np.log1p(metric.margin) if metric.is_ratio else metric.margin for metric in metrics])
    with np.errstate(invalid="ignore", divide="ignore"):
        width = np.where(is_ratio, np.log(undecided.high / undecided.low), undecided.high - undecided.low)
    return math.ceil(np.median(undecided.pairs * np.square(width / 2 / margin)))
