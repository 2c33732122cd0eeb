"""Verdicts on claims, from made-up tables."""

import re

import numpy as np
import pandas as pd
import pytest

from study.replication import CLAIMS, ArmsCompared, Claim, Interval, MeasureUseful, MetricForesees, reading, replicate

RATIOS = (0.95, 1.05)


def paired(rows, **more):
    table = pd.DataFrame(rows, columns=["arm", "reference", "dataset", "low", "high"])
    return table.assign(metric="nrmse", **more)


def judge(evidence, **tables):
    claim = Claim("someone", "abstract", "it is so", "elsewhere", evidence)
    return replicate(tables, [claim])


@pytest.mark.parametrize(
    ("low", "high", "expected", "result"),
    [
        (0.5, 0.9, "lower", "holds"),
        (0.9, 0.99, "lower", "open"),
        (0.97, 1.03, "lower", "against"),
        (1.1, 1.2, "lower", "against"),
        (0.5, 1.04, "not higher", "holds"),
        (0.5, 1.2, "not higher", "open"),
        (1.06, 1.2, "not higher", "against"),
        (1.06, 1.2, "higher", "holds"),
        (0.97, 1.03, "higher", "against"),
        (0.5, 0.9, "different", "holds"),
        (1.06, 1.2, "different", "holds"),
        (0.97, 1.03, "different", "against"),
        (0.97, 1.2, "not lower", "holds"),
        (0.5, 0.9, "not lower", "against"),
        (0.5, 1.2, "not lower", "open"),
        (0.97, 1.03, "same", "holds"),
        (1.06, 1.2, "same", "against"),
        (0.97, 1.2, "same", "open"),
        (np.nan, np.nan, "not higher", "open"),
    ],
)
def test_interval_is_read_by_the_margin(low, high, expected, result):
    assert reading(Interval("one", low, high), RATIOS, expected) == result


def test_claim_that_holds_on_more_than_half_of_the_datasets_agrees():
    rows = [("b", "a", name, 0.5, 0.8) for name in ("one", "two")]
    rows += [("b", "a", "three", 0.8, 1.3), ("b", "a", "all datasets", 1.2, 1.3)]
    row = judge((ArmsCompared("nrmse", "b", "a", "lower"),), paired=paired(rows)).iloc[0]
    assert (row.holds, row.against, row.open) == ("one, two", "", "three")
    assert row.verdict == row.part == "agree"
    assert row.measure == "nrmse: b lower than a"


def test_half_of_the_datasets_is_not_enough():
    rows = [("b", "a", "one", 0.5, 0.8), ("b", "a", "two", 1.2, 1.3)]
    assert judge((ArmsCompared("nrmse", "b", "a", "lower"),), paired=paired(rows)).verdict.item() == "cannot tell"


def test_pair_is_found_the_other_way_round():
    ratio = paired([("a", "b", "one", 1.25, 2.0)])
    assert judge((ArmsCompared("nrmse", "b", "a", "lower"),), paired=ratio).verdict.item() == "agree"
    difference = paired([("a", "b", "one", 0.2, 0.4)]).assign(metric="nll")
    evidence = ArmsCompared("nll", "b", "a", "lower")
    assert judge((evidence,), paired=difference).verdict.item() == "agree"
    assert evidence.intervals({"paired": difference}) == [Interval("one", -0.4, -0.2)]


def test_rows_are_chosen_by_further_columns_and_datasets_can_be_left_out():
    rows = [("a", "a", "one", 1.2, 1.3), ("a", "a", "two-hidden", 0.99, 1.01)]
    tables = pd.concat([paired(rows, propagation="ts1"), paired(rows, propagation="mean")])
    evidence = ArmsCompared("nrmse", "a", "a", "different", where={"propagation": "ts1"}, without=("hidden",))
    assert judge((evidence,), paired=tables).holds.item() == "one"
    only = ArmsCompared("nrmse", "a", "a", "same", where={"propagation": "ts1"}, only=("hidden",))
    assert judge((only,), paired=tables).holds.item() == "two-hidden"


def test_claim_of_several_parts_agrees_only_where_all_do():
    tables = paired([("b", "a", "one", 0.5, 0.8), ("c", "a", "one", 0.8, 1.3), ("d", "a", "one", 1.2, 1.3)])
    good, unclear, bad = (ArmsCompared("nrmse", arm, "a", "lower") for arm in "bcd")
    assert set(judge((good, good), paired=tables).verdict) == {"agree"}
    assert set(judge((good, unclear), paired=tables).verdict) == {"cannot tell"}
    assert set(judge((good, bad, unclear), paired=tables).verdict) == {"disagree"}


def uncertainty(scores):
    rows = [
        ("pnn", "one", seed, 0, "visited", measure, value)
        for measure, values in scores.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["arm", "dataset", "seed", "split", "rows", "measure", "spearman"])


def test_measure_is_compared_with_another_in_the_same_runs():
    table = uncertainty(
        {"x": [0.8, 0.5, 0.3, 0.8, 0.5, 0.3], "y": [0.6, 0.3, 0.1, 0.6, 0.3, 0.1]}
    )  # always 0.2 more, however runs differ
    evidence = MeasureUseful("pnn", "x", "spearman", "visited", "higher", "y")
    assert judge((evidence,), uncertainty_of_cells=table).verdict.item() == "agree"
    elsewhere = MeasureUseful("pnn", "x", "spearman", "test", "higher", "y")
    assert judge((elsewhere,), uncertainty_of_cells=table).verdict.item() == "cannot tell"


def test_measure_is_compared_with_knowing_nothing():
    useful = MeasureUseful("pnn", "x", "spearman", "visited", "higher", 0.5)
    assert judge((useful,), uncertainty_of_cells=uncertainty({"x": [0.8, 0.81, 0.82] * 2})).verdict.item() == "agree"
    assert judge((useful,), uncertainty_of_cells=uncertainty({"x": [0.5, 0.51, 0.52] * 2})).verdict.item() == "disagree"


def test_fewer_than_six_seeds_tell_nothing():
    useful = MeasureUseful("pnn", "x", "spearman", "visited", "higher", 0.5)
    assert judge((useful,), uncertainty_of_cells=uncertainty({"x": [0.8] * 5})).open.item() == "one"


def test_metric_that_does_not_foresee_errors_disagrees():
    table = pd.DataFrame({"metric": "nll", "dataset": ["one", "all datasets"], "low": [-0.6, 0.5], "high": [-0.2, 0.7]})
    assert judge((MetricForesees("nll"),), policies_foreseen=table).verdict.item() == "disagree"


def test_nothing_can_be_told_without_tables_and_every_claim_is_listed():
    table = replicate({})
    assert set(table.verdict) == {"cannot tell"}
    assert table.claim.nunique() == len(CLAIMS)
    assert set(table) == {
        *("source", "read", "claim", "setting"),
        *("measure", "holds", "against", "open", "part", "verdict"),
    }


def test_no_claim_quotes_a_number():
    assert not [claim.claim for claim in CLAIMS if re.search(r"\d", claim.claim.replace("TS1", ""))]


def test_metrics_of_the_claims_are_those_of_the_study():
    for claim in CLAIMS:
        for evidence in claim.evidence:
            assert len(evidence.neutral) == 2  # which looks the metric up
