"""What others have claimed, beside what a study finds: claim by claim, agree, disagree or cannot tell.

Claims are data, in words, and say what was read of their source. Verdicts are computed from the study's tables by one
rule, fixed before the study:

- Of each dataset, an interval says whether what is claimed ``holds``, goes ``against`` the data, or stays ``open``. A
  difference counts where its interval lies beyond the practical margin, and a tie where it lies within.
- What holds on more than half of the datasets agrees, what goes against more than half of them disagrees; else the
  study cannot tell.
- A claim with several parts agrees where all of them do, and disagrees where one of them does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pandas as pd

from study.metrics import RANK_MARGIN, Metric, find_metrics
from study.paired_statistics import FEWEST_PAIRS, Estimate
from study.policy_analysis import POOLED, VALUE_ERROR

Expected = Literal["lower", "not higher", "higher", "not lower", "different", "same"]
Tables = dict[str, pd.DataFrame]


class Interval(NamedTuple):
    """Limits of what was measured on one dataset."""

    dataset: str
    low: float
    high: float


class Evidence(Protocol):
    """A part of a claim: what is measured, and what is expected of it."""

    expected: Expected

    @property
    def measure(self) -> str:
        """What is measured, in words."""

    @property
    def neutral(self) -> tuple[float, float]:
        """Between these, there is no difference that counts."""

    def intervals(self, tables: Tables) -> list[Interval]:
        """Returns what the study measured, dataset by dataset; nothing where it did not."""


# --- Kinds of evidence ---


@dataclass(frozen=True)
class ArmsCompared:
    """A metric of two arms in paired runs.

    Attributes:
        metric: Of ``metrics.py``, or the error of values.
        arm: The one that is spoken of.
        reference: The one that it is compared with; the table may hold the two the other way round.
        expected: Of the metric's ratio or difference.
        table: Name of the table: metric, arm, reference, dataset, low, high, and more.
        where: Values of further columns.
        without: Datasets with one of these words in their name are not what the claim is about.
        only: Where there are any, only datasets with one of these words in their name are.
    """

    metric: str
    arm: str
    reference: str
    expected: Expected
    table: str = "paired"
    where: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def measure(self) -> str:
        """As ``Evidence`` has it."""
        where = "".join(f", {value}" for value in self.where.values())
        return f"{self.metric}{where}: {self.arm} {_than(self.expected)} {self.reference}"

    @property
    def neutral(self) -> tuple[float, float]:
        """As ``Evidence`` has it."""
        margin = self._metric.margin
        return (1 - margin, 1 + margin) if self._metric.is_ratio else (-margin, margin)

    @property
    def _metric(self) -> Metric:
        return VALUE_ERROR if self.metric == VALUE_ERROR.name else find_metrics([self.metric])[self.metric]

    def intervals(self, tables: Tables) -> list[Interval]:
        """As ``Evidence`` has it."""
        table = _chosen(tables.get(self.table), {"metric": self.metric, **self.where})
        found = _chosen(table, {"arm": self.arm, "reference": self.reference})
        if found.empty:
            turned = _chosen(table, {"arm": self.reference, "reference": self.arm})
            low, high = (turned.get(limit, pd.Series(dtype=float)) for limit in ("low", "high"))
            found = (
                turned.assign(low=1 / high, high=1 / low)
                if self._metric.is_ratio
                else turned.assign(low=-high, high=-low)
            )
        rows = [Interval(row.dataset, row.low, row.high) for row in found.itertuples() if row.dataset != POOLED]
        return [row for row in rows if self._is_meant(row.dataset)]

    def _is_meant(self, dataset: str) -> bool:
        is_chosen = not self.only or any(word in dataset for word in self.only)
        return is_chosen and not any(word in dataset for word in self.without)


@dataclass(frozen=True)
class MeasureUseful:
    """A measure of uncertainty of an arm, on some rows: against another measure, or against knowing nothing.

    Attributes:
        arm: Whose uncertainty it is.
        measure_name: Of the uncertainty.
        score: Column of the table ``uncertainty_of_cells``: arm, dataset, seed, split, rows, measure, and scores.
        rows: Value of its column ``rows``.
        expected: Of the score, less that of the reference.
        reference: Another measure, or what the score is of a measure that knows nothing.
    """

    arm: str
    measure_name: str
    score: str
    rows: str
    expected: Expected
    reference: str | float

    @property
    def measure(self) -> str:
        """As ``Evidence`` has it."""
        return f"{self.score} on {self.rows}, {self.arm}: {self.measure_name} {_than(self.expected)} {self.reference}"

    @property
    def neutral(self) -> tuple[float, float]:
        """As ``Evidence`` has it."""
        return -RANK_MARGIN, RANK_MARGIN

    def intervals(self, tables: Tables) -> list[Interval]:
        """As ``Evidence`` has it; seeds, each the mean over splits, are the random factor."""
        table = _chosen(tables.get("uncertainty_of_cells"), {"arm": self.arm, "rows": self.rows})
        own = self._by_run(table, self.measure_name)
        if own.empty:
            return []
        values = own - (self._by_run(table, self.reference) if isinstance(self.reference, str) else self.reference)
        found = []
        for dataset, runs in values.dropna().groupby("dataset", sort=False):
            seeds = runs.groupby("seed").mean()
            estimate = Estimate(seeds.mean(), seeds.sem(), len(seeds) - 1)
            limits = (estimate.low, estimate.high) if len(seeds) >= FEWEST_PAIRS else (math.nan, math.nan)
            found.append(Interval(dataset, *limits))
        return found

    def _by_run(self, table: pd.DataFrame, measure: str) -> pd.Series:
        if table.empty:
            return pd.Series(dtype=float)
        return _chosen(table, {"measure": measure}).set_index(["dataset", "seed", "split"])[self.score]


@dataclass(frozen=True)
class MetricForesees:
    """The rank correlation, over models, of a metric with the error of policies' values.

    Attributes:
        metric: In the table ``policies_foreseen``: metric, dataset, low, high.
        expected: ``higher``: a larger metric goes with a larger error.
    """

    metric: str
    expected: Expected = "higher"

    @property
    def measure(self) -> str:
        """As ``Evidence`` has it."""
        return f"rank correlation of {self.metric} with the error of policies' values: {self.expected} than 0"

    @property
    def neutral(self) -> tuple[float, float]:
        """As ``Evidence`` has it."""
        return -RANK_MARGIN, RANK_MARGIN

    def intervals(self, tables: Tables) -> list[Interval]:
        """As ``Evidence`` has it."""
        found = _chosen(tables.get("policies_foreseen"), {"metric": self.metric})
        return [Interval(row.dataset, row.low, row.high) for row in found.itertuples() if row.dataset != POOLED]


def _than(expected: Expected) -> str:
    return {"different": "different from", "same": "the same as"}.get(expected, f"{expected} than")


def _chosen(table: pd.DataFrame | None, where: dict[str, str]) -> pd.DataFrame:
    """Returns the rows with these values; none where there is no such table or column."""
    if table is None or not set(where) <= set(table):
        return pd.DataFrame()
    return table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]


# --- Claims ---


@dataclass(frozen=True)
class Claim:
    """What a paper says.

    Attributes:
        source: Authors, year, title.
        read: What of the source these words rest on.
        claim: In words; no number that is not in what was read.
        setting: Theirs, as far as it was read.
        evidence: What of this study speaks to it.
    """

    source: str
    read: str
    claim: str
    setting: str
    evidence: tuple[Evidence, ...]


KEGL = "Kégl, Hurtado and Thomas 2021, Model-based micro-data reinforcement learning (arXiv:2107.11587)"
SEITZER = "Seitzer et al. 2022, On the pitfalls of heteroscedastic uncertainty estimation (arXiv:2203.09168)"
STIRN = "Stirn et al. 2023, Faithful heteroscedastic regression with neural networks (arXiv:2212.09184)"
LU = "Lu et al. 2022, Revisiting design choices in offline model-based reinforcement learning"
MOPO = "Yu et al. 2020, MOPO: model-based offline policy optimization (arXiv:2005.13239)"
MOREL = "Kidambi et al. 2020, MOReL: model-based offline reinforcement learning (arXiv:2005.05951)"
CHUA = "Chua et al. 2018, Deep reinforcement learning in a handful of trials (arXiv:1805.12114)"
NI = "Ni et al. 2025, Long-horizon model-based offline reinforcement learning without conservatism (arXiv:2512.04341)"
BENECHEHAB = "Benechehab, Thomas and Kégl 2024, Deep autoregressive density nets vs neural ensembles (arXiv:2402.02858)"

_HIDDEN = ("hidden",)
LONG = {"propagation": "tsinf", "horizon": "truncated"}
_VISITED = "other_policies"

CLAIMS = (
    Claim(
        KEGL,
        "abstract",
        "Where the next state needs no multimodal prediction, deterministic models are on par with probabilistic ones.",
        "control of Acrobot by random shooting, little data",
        (
            ArmsCompared("rollout_mean", "dnn", "pnn", "not higher", without=_HIDDEN),
            ArmsCompared("value_error", "dnn", "pnn", "not higher", "policies_paired", LONG, without=_HIDDEN),
        ),
    ),
    Claim(
        KEGL,
        "abstract",
        "Training with a variance that depends on the input improves predictions at longer horizons.",
        "as above",
        (ArmsCompared("rollout_mean", "pnn", "dnn", "lower"),),
    ),
    Claim(
        SEITZER,
        "abstract",
        "Weighing the likelihood by a power of the variance (beta-NLL) improves on the plain likelihood, both in root "
        "mean squared error and in likelihood.",
        "regression, a range of domains and tasks",
        (
            ArmsCompared("nrmse", "pnn_beta", "pnn", "lower"),
            ArmsCompared("nll", "pnn_beta", "pnn", "lower"),
        ),
    ),
    Claim(
        STIRN,
        "abstract",
        "A variance head that passes no gradients back leaves the mean as accurate as that of squared error alone.",
        "regression, a variety of networks and tasks",
        (ArmsCompared("nrmse", "faithful", "dnn", "not higher"),),
    ),
    Claim(
        STIRN,
        "abstract",
        "Its variances are as well calibrated as those of the best other ways to train them.",
        "as above",
        (
            ArmsCompared("ece_raw", "faithful", "pnn", "not higher"),
            ArmsCompared("ece_raw", "faithful", "pnn_beta", "not higher"),
        ),
    ),
    Claim(
        LU,
        "abstract",
        "Measures of uncertainty that serve as penalties differ in how well they follow the model's error on what "
        "policies visit.",
        "offline policy optimisation with probabilistic models",
        (MeasureUseful("pnn", "ensemble_std", "spearman", _VISITED, "different", "max_aleatoric"),),
    ),
    Claim(
        MOPO,
        "abstract, and its published code for the measure",
        "The largest standard deviation that a member predicts tells where the model is wrong.",
        "offline policy optimisation on benchmarks and two tasks of control",
        (MeasureUseful("pnn", "max_aleatoric", "auroc_worst", _VISITED, "higher", 0.5),),
    ),
    Claim(
        MOREL,
        "abstract, and its published code for the measure",
        "The largest distance between members' predictions tells where the model is wrong.",
        "offline policy optimisation on benchmarks",
        (MeasureUseful("dnn", "max_pairwise", "auroc_worst", _VISITED, "higher", 0.5),),
    ),
    Claim(
        CHUA,
        "abstract, and a published summary of the method",
        "Control needs models that know what they do not know: hence ensembles, and of probabilistic networks.",
        "control by planning, four MuJoCo tasks",
        (ArmsCompared("value_error", "pnn", "dnn", "lower", "policies_paired", LONG),),
    ),
    Claim(
        CHUA,
        "a published summary of the method; that it matters is a question here, not their claim",
        "Whether particles keep their member (TSinf) or are dealt one anew in each step (TS1) matters.",
        "as above",
        (
            ArmsCompared(
                "value_error",
                "pnn",
                "pnn",
                "different",
                "policies_propagations",
                {"propagation": "ts1", "horizon": "truncated"},
            ),
        ),
    ),
    Claim(
        NI,
        "abstract",
        "Layer normalisation in the world model mitigates compounding errors.",
        "offline policy optimisation on D4RL and NeoRL, rollouts of several hundred steps",
        (
            ArmsCompared("rollout_mean", "pnn_ln", "pnn", "lower"),
            ArmsCompared("rollout_mean", "dnn_ln", "dnn", "lower"),
        ),
    ),
    Claim(
        BENECHEHAB,
        "abstract, and a summary of its results",
        "How likely and how well calibrated one-step predictions are foresees what the model is worth for policies.",
        "offline policy optimisation on D4RL; what is foreseen is the performance of the agent",
        (MetricForesees("nll"), MetricForesees("ece_raw")),
    ),
)


# --- The rule ---


def reading(interval: Interval, neutral: tuple[float, float], expected: Expected) -> str:
    """Says whether what is expected ``holds``, goes ``against`` the data or stays ``open``."""
    low, high = interval.low, interval.high
    if math.isnan(low) or math.isnan(high):
        return "open"
    is_lower, is_higher = high < neutral[0], low > neutral[1]
    is_tie = neutral[0] <= low and high <= neutral[1]
    holds = {
        "lower": is_lower,
        "higher": is_higher,
        "not higher": high <= neutral[1],
        "not lower": low >= neutral[0],
        "different": is_lower or is_higher,
        "same": is_tie,
    }
    against = {
        "lower": is_tie or is_higher,
        "higher": is_tie or is_lower,
        "not higher": is_higher,
        "not lower": is_lower,
        "different": is_tie,
        "same": is_lower or is_higher,
    }
    return "holds" if holds[expected] else "against" if against[expected] else "open"


def verdict(readings: Sequence[str]) -> str:
    """Returns the verdict on one part of a claim, from the readings of its datasets."""
    if 2 * readings.count("holds") > len(readings):
        return "agree"
    return "disagree" if 2 * readings.count("against") > len(readings) else "cannot tell"


def replicate(tables: Tables, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """Holds claims against a study.

    Args:
        tables: Of ``analysis.py``, and ``uncertainty_of_cells``: the table ``uncertainty`` of every cell, one below the
            other, with the cell's place. Those that are missing tell nothing.
        claims: What to judge.

    Returns:
        One row per part of a claim: source, read (what of it), claim, setting (theirs), measure (ours), holds, against,
        open (names of datasets), part (its verdict), verdict (on the whole claim: agree, disagree or cannot tell).
    """
    records = []
    for claim in claims:
        parts = []
        for evidence in claim.evidence:
            found = {"holds": [], "against": [], "open": []}
            intervals = evidence.intervals(tables)
            readings = [reading(interval, evidence.neutral, evidence.expected) for interval in intervals]
            for interval, result in zip(intervals, readings, strict=True):
                found[result].append(interval.dataset)
            named = {"measure": evidence.measure, **{name: ", ".join(where) for name, where in found.items()}}
            parts.append(named | {"part": verdict(readings)})
        verdicts = {part["part"] for part in parts}
        whole = "disagree" if "disagree" in verdicts else "agree" if verdicts == {"agree"} else "cannot tell"
        said = {name: getattr(claim, name) for name in ("source", "read", "claim", "setting")}
        records += [said | part | {"verdict": whole} for part in parts]
    return pd.DataFrame(records)
