"""Analyses of made-up tables of policies, whose numbers can be worked out."""

import numpy as np
import pandas as pd
import pytest

from study.cells import CellKey
from study.policy_analysis import (
    paired_propagations,
    paired_values,
    predictors_of_values,
    values_of_arms,
    values_of_models,
)

TRUE = np.array([0.0, 2.0, 4.0, 6.0, 8.0, 10.0])
ERRORS = np.array([1.0, -2.0, 1.0, -1.0, 2.0, -1.0])  # mean magnitude 4 / 3, a share of .4 / 3 of the range


def made_up(scale, ts1=1.0):
    parts = []
    for propagation, factor in (("simulator", 0.1), ("ts1", ts1 * scale), ("tsinf", scale)):
        for horizon in ("truncated", "discounted"):
            named = {"policy": list("uvwxyz"), "propagation": propagation, "horizon": horizon}
            parts.append(pd.DataFrame(named | {"true": TRUE, "predicted": TRUE + factor * ERRORS, "escaped": 0.25}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def tables():
    """Two arms, the errors of ``b`` twice those of ``a``, on two datasets; ts1 half as wrong as tsinf."""
    return {
        CellKey(arm, dataset, seed): made_up(factor * (1 + 0.1 * seed), ts1=0.5)
        for arm, factor in (("a", 0.5), ("b", 1.0))
        for dataset in ("one", "two")
        for seed in range(6)
    }


def test_each_model_is_scored(tables):
    table = values_of_models(tables)
    row = table.query("arm == 'b' and dataset == 'two' and seed == 0 and propagation == 'tsinf'").iloc[0]
    assert row.error == pytest.approx(0.4 / 3)
    # Predicted are 1, 0, 5, 5, 10, 9: ranks 2, 1, 3.5, 3.5, 6, 5.
    assert row.spearman == pytest.approx(np.corrcoef([1, 2, 3, 4, 5, 6], [2, 1, 3.5, 3.5, 6, 5])[0, 1])
    assert row.regret == 0.2  # 8 + 2 is more than 10 - 1
    assert row.escaped == 0.25
    assert len(table) == 24 * 6


def test_arms_have_geometric_means_with_intervals_that_hold_them(tables):
    table = values_of_arms(tables)
    row = table.query("arm == 'a' and dataset == 'one' and propagation == 'tsinf' and horizon == 'truncated'").iloc[0]
    assert row.error == pytest.approx(0.2 / 3 * np.prod(1 + 0.1 * np.arange(6)) ** (1 / 6))
    assert row.low < row.error < row.high
    assert (row.seeds, row.policies) == (6, 6)


def test_errors_of_arms_are_compared_in_pairs(tables):
    table = paired_values(tables)
    assert "simulator" not in set(table.propagation)
    assert set(zip(table.arm, table.reference, strict=True)) == {("b", "a")}
    assert table.effect.tolist() == pytest.approx([2.0] * len(table))
    # Each policy's error is twice as large in every seed: nothing is uncertain.
    assert table.high.tolist() == pytest.approx([2.0] * len(table))
    whole = table[table.dataset == "all datasets"]
    assert (whole.pairs == 12).all()
    assert (whole.least == whole.most).all()
    assert set(table.verdict) == {"worse"}


def test_interval_of_a_comparison_is_wider_where_policies_disagree(tables):
    uneven = dict(tables)
    for key, table in tables.items():
        if key.arm == "b":
            changed = table.copy()
            changed.loc[changed.policy == "u", "predicted"] += 3
            uneven[key] = changed
    row = paired_values(uneven).query("dataset == 'one' and propagation == 'tsinf'").iloc[0]
    assert row.low < row.effect < row.high
    assert row.high / row.low > 1.2


def test_ts1_is_compared_with_tsinf_of_the_same_models(tables):
    table = paired_propagations(tables)
    assert table.effect.tolist() == pytest.approx([0.5] * len(table))
    assert set(table.arm) == {"a", "b"}


def test_metric_that_orders_models_like_their_errors_predicts_them(tables):
    random = np.random.default_rng(0)
    cells = pd.DataFrame([key._asdict() for key in tables])
    errors = [
        table.query("propagation == 'tsinf'").pipe(lambda t: (t.true - t.predicted).abs().mean())
        for table in tables.values()
    ]
    cells = cells.assign(nothing=random.normal(size=len(cells)), same=np.log(errors), constant=1.0, name="text")
    cells["by_arm"] = (cells.arm == "b") + 1e-3 * random.normal(size=len(cells))
    table = predictors_of_values(tables, cells)
    assert table.metric.iloc[0] == "same"
    assert set(table.metric) == {"same", "by_arm", "nothing"}
    whole = table[table.dataset == "all datasets"].set_index("metric")
    assert whole.rho["same"] > 0.99
    assert whole.within_arms["same"] == pytest.approx(1)
    assert whole.low["nothing"] < 0 < whole.high["nothing"]
    assert whole.rho["by_arm"] > 0.7 > abs(whole.within_arms["by_arm"])
    assert (whole.models == 24).all()


def test_without_enough_models_nothing_is_said_of_predictors(tables):
    few = {key: table for key, table in tables.items() if key.seed == 0}
    cells = pd.DataFrame([key._asdict() | {"nrmse": 1.0 + (key.arm == "b")} for key in few])
    assert predictors_of_values(few, cells).empty


def test_splits_of_one_seed_are_averaged(tables):
    both = dict(tables) | {
        key._replace(split=1): made_up(2 * (1 + 0.1 * key.seed) * (0.5 if key.arm == "a" else 3)) for key in tables
    }
    table = paired_values(both).query("dataset == 'one' and propagation == 'tsinf'")
    assert set(table.pairs) == {6}
    assert table.effect.tolist() == pytest.approx([(2 * 6) ** 0.5] * len(table))
    assert set(values_of_arms(both).seeds) == {6}


def test_fewer_than_six_seeds_have_no_interval(tables):
    few = {key: table for key, table in tables.items() if key.seed < 5}
    table = paired_values(few)
    assert table.low.isna().all()
    assert set(table.verdict) == {"too few runs"}
    assert values_of_arms(few).high.isna().all()
