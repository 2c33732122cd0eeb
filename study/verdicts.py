"""What the protocol expected, what it would say in each case, and what earlier studies seemed to show, as claims.

They are written like the claims of others in ``replication.py`` and judged by the same rule. Their words are those of
``results/PROTOCOL.md``, which is fixed, and of the reports in ``results/exploratory``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

from study.replication import (
    CLAIMS,
    LONG,
    ArmsCompared,
    Claim,
    Evidence,
    Expected,
    MetricForesees,
    Tables,
    replicate,
)

ARMS = ("dnn", "dnn_huber", "dnn_posthoc", "pnn", "pnn_beta", "pnn_decay", "faithful", "faithful_huber")
PNN = ("pnn", "pnn_beta", "pnn_decay")
TYPE = (("faithful", "dnn"), ("faithful_huber", "dnn_huber"))  # pairs that differ in the type alone
LOSS = (("dnn_huber", "dnn"), ("faithful_huber", "faithful"))  # and in the loss alone
_NOISY = ("noisy",)
_NO_PLAIN_HOPPER = ("noisy", "halfcheetah", "walker2d", "ant-")


def _each(
    metrics: Sequence[str], pairs: Sequence[tuple[str, str]], expected: Expected, **more: tuple[str, ...]
) -> tuple[Evidence, ...]:
    return tuple(ArmsCompared(metric, *pair, expected, **more) for metric in metrics for pair in pairs)


def _ours(source: str, claim: str, evidence: tuple[Evidence, ...]) -> Claim:
    return Claim(source, "all of it", claim, "exploratory datasets", evidence)


def _against(arms: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    return list(itertools.product(arms, others))


_OTHERS = tuple(arm for arm in ARMS if arm not in PNN)
_LONGER = _each(["rollout_mean"], [("dnn_huber", "dnn")], "lower", without=_NO_PLAIN_HOPPER)
_LONGER += _each(["rollout_mean"], _against(["dnn_huber"], ("pnn", "pnn_beta")), "not higher", without=_NO_PLAIN_HOPPER)
_SAME_MEANS = _each(["nrmse", "median_error", "rollout_mean"], TYPE, "same")

_EXPECTED = (
    (
        "`dnn_huber` has a lower median error than `dnn`, at an nRMSE that is no better.",
        (
            ArmsCompared("median_error", "dnn_huber", "dnn", "lower"),
            ArmsCompared("nrmse", "dnn_huber", "dnn", "not lower"),
        ),
    ),
    (
        "`dnn_huber` has a lower error in long rollouts than `dnn` on the Hopper datasets without noise, and no higher "
        "one than `pnn` and `pnn_beta`.",
        _LONGER,
    ),
    ("`faithful` equals `dnn`, and `faithful_huber` equals `dnn_huber`, in errors of means.", _SAME_MEANS),
    (
        "`pnn`, `pnn_beta` and `pnn_decay` have a lower NLL and a higher Spearman than every other arm on data without "
        "noise; `dnn_posthoc` lies between `dnn` and these.",
        _each(["nll"], _against(PNN, _OTHERS), "lower", without=_NOISY)
        + _each(["spearman"], _against(PNN, _OTHERS), "higher", without=_NOISY)
        + _each(["nll"], [("dnn_posthoc", "dnn")], "lower", without=_NOISY)
        + _each(["spearman"], [("dnn_posthoc", "dnn")], "higher", without=_NOISY),
    ),
    (
        "On the noisy Hopper the means tie.",
        _each(["nrmse", "median_error", "rollout_mean"], _against(ARMS[1:], ARMS[:1]), "same", only=_NOISY),
    ),
    (
        "`pnn` has a larger spread of members than the others.",
        _each(["member_spread"], _against(["pnn"], [arm for arm in ARMS if arm != "pnn"]), "higher"),
    ),
    (
        "The error of policies' values follows the error of long rollouts and the median error rather than the nRMSE.",
        (MetricForesees("rollout_mean"), MetricForesees("median_error"), MetricForesees("nrmse", "not higher")),
    ),
)
_SAID = (
    ("For long rollouts the loss matters, not the type", _LONGER + _SAME_MEANS),
    (
        "The likelihood itself helps long rollouts",
        _each(["rollout_mean"], _against(PNN, ("dnn_huber", "faithful_huber")), "lower"),
    ),
    (
        "A faithful head gives the uncertainty without touching the mean",
        _each(["nll"], _against(("faithful", "faithful_huber"), PNN), "not higher")
        + _each(["spearman"], _against(("faithful", "faithful_huber"), PNN), "not lower"),
    ),
    (
        "The type makes no difference to what policies are worth that counts",
        tuple(
            ArmsCompared("value_error", arm, other, "same", "policies_paired", LONG)
            for other, arm in itertools.combinations(ARMS, 2)
        ),
    ),
)
_EXPLORATORY = (
    ("A plain `pnn` predicts one step worse than `dnn`.", _each(["nrmse"], [("pnn", "dnn")], "higher")),
    (
        "`pnn_beta` predicts one step as well as `dnn`, or better.",
        _each(["nrmse"], [("pnn_beta", "dnn")], "not higher"),
    ),
    (
        "The uncertainty of a plain `pnn` is hardly better than that of `dnn`.",
        _each(["nll"], [("pnn", "dnn")], "not lower") + _each(["spearman"], [("pnn", "dnn")], "not higher"),
    ),
    (
        "The uncertainty of `pnn_beta` is worth more than that of `pnn` and of `dnn`.",
        _each(["nll"], _against(["pnn_beta"], ("pnn", "dnn")), "lower"),
    ),
    (
        "In long sampled rollouts `dnn` is ahead of `pnn_beta` on noisy data and on HalfCheetah.",
        _each(["rollout_tsinf"], [("dnn", "pnn_beta")], "lower", only=("noisy", "halfcheetah")),
    ),
    (
        "In long sampled rollouts `pnn_beta` is ahead of `dnn` on the hopper of a deterministic simulator.",
        _each(["rollout_tsinf"], [("pnn_beta", "dnn")], "lower", without=_NO_PLAIN_HOPPER),
    ),
    (
        "`dnn` is steadier than `pnn` and `pnn_beta`.",
        _each(["member_spread"], _against(("pnn", "pnn_beta"), ["dnn"]), "higher"),
    ),
)
GROUPS: Mapping[str, Sequence[Claim]] = {
    "others": CLAIMS,
    "expected": [_ours(f"expectation {place}", *claim) for place, claim in enumerate(_EXPECTED, 1)],
    "said": [_ours("what will be said", *claim) for claim in _SAID],
    "exploratory": [_ours("exploratory studies", *claim) for claim in _EXPLORATORY],
}


def judge_claims(tables: Tables) -> pd.DataFrame:
    """Holds all claims against a study.

    Args:
        tables: As ``replication.replicate`` takes them.

    Returns:
        group (``others``, ``expected``, ``said``, ``exploratory``), and the columns of ``replication.replicate``.
    """
    parts = [replicate(tables, claims).assign(group=group) for group, claims in GROUPS.items()]
    table = pd.concat(parts, ignore_index=True)
    return table[["group", *(name for name in table if name != "group")]]


def summarise_claims(claims: pd.DataFrame) -> pd.DataFrame:
    """Counts, for each claim, the intervals of all its parts on all its datasets.

    Args:
        claims: Table of ``judge_claims``, or some of its rows.

    Returns:
        claim, source, verdict, holds, against, open (how many intervals), against_on (names of datasets).
    """
    records = []
    for (claim, source), parts in claims.groupby(["claim", "source"], sort=False):
        counts = {name: sum(map(_count, parts[name])) for name in ("holds", "against", "open")}
        names = dict.fromkeys(name for cell in parts.against.fillna("") for name in cell.split(", ") if name)
        verdict = parts.verdict.iloc[0]
        records.append({"claim": claim, "source": source, "verdict": verdict, **counts, "against_on": ", ".join(names)})
    columns = ["claim", "source", "verdict", "holds", "against", "open", "against_on"]
    return pd.DataFrame(records, columns=columns)


def _count(names: object) -> int:
    return len(names.split(", ")) if isinstance(names, str) and names else 0
