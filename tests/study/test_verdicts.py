"""Claims of our own: that each can be judged, and is what the protocol says."""

import re

import pandas as pd
import pytest

from study.verdicts import ARMS, GROUPS, judge_claims, summarise_claims
from utils import ROOT

PROTOCOL = (ROOT / "results" / "PROTOCOL.md").read_text()


def paired(metric, arm, reference, limits, dataset="hopper-medium-b"):
    return {
        "metric": metric,
        "arm": arm,
        "reference": reference,
        "dataset": dataset,
        "low": limits[0],
        "high": limits[1],
    }


def verdict_on(claim, rows):
    summary = summarise_claims(judge_claims({"paired": pd.DataFrame(rows)}))
    (found,) = summary[summary.claim.str.contains(claim, regex=False)].to_dict("records")
    return found


def test_every_claim_is_judged_in_its_group():
    claims = judge_claims({})
    assert list(dict.fromkeys(claims.group)) == list(GROUPS) == ["others", "expected", "said", "exploratory"]
    assert set(claims.verdict) == {"cannot tell"}
    assert len(summarise_claims(claims)) == sum(map(len, GROUPS.values()))


def test_arms_and_sentences_are_those_of_the_protocol():
    table = re.findall(r"^\| `(\w+)` \| (?:det|prob)", PROTOCOL, flags=re.MULTILINE)
    assert tuple(table) == ARMS
    for claim in GROUPS["said"]:
        assert f'"{claim.claim}"' in " ".join(PROTOCOL.split())
    expectations = PROTOCOL.partition("## What is expected")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\d\. ", expectations, flags=re.MULTILINE)) == len(GROUPS["expected"])


@pytest.mark.parametrize(
    ("limits", "verdict"), [((0.5, 0.8), "disagree"), ((1.2, 1.3), "agree"), ((0.9, 1.3), "cannot tell")]
)
def test_an_exploratory_claim_stands_or_falls_by_the_interval(limits, verdict):
    found = verdict_on("A plain `pnn` predicts one step worse", [paired("nrmse", "pnn", "dnn", limits)])
    assert found["verdict"] == verdict
    assert found["against_on"] == ("hopper-medium-b" if verdict == "disagree" else "")
    assert found["holds"] + found["against"] + found["open"] == 1


def test_claims_about_some_datasets_look_at_no_others():
    rows = [paired("rollout_tsinf", "dnn", "pnn_beta", (0.5, 0.6), name) for name in ("x-noisy", "hopper-medium-b")]
    assert verdict_on("ahead of `pnn_beta` on noisy data", rows)["holds"] == 1
    assert verdict_on("`pnn_beta` is ahead of `dnn`", rows)["against"] == 1


def test_means_that_are_the_same_tie_within_the_margin():
    rows = [paired("nrmse", *pair, (0.98, 1.02)) for pair in (("faithful", "dnn"), ("faithful_huber", "dnn_huber"))]
    found = verdict_on("`faithful` equals `dnn`", rows)
    assert (found["holds"], found["against"]) == (2, 0)
    rows[0] |= {"low": 1.1, "high": 1.2}
    assert verdict_on("`faithful` equals `dnn`", rows)["verdict"] == "disagree"
