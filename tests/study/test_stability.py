import math

import numpy as np
import pandas as pd
import pytest

from study.stability import (
    deviation_interval,
    ensemble_interval,
    is_stray,
    jackknife_variance,
    jitter,
    member_logs,
    product_matrix,
    robust_spread,
    share_interval,
    spread_interval,
    spread_ratio,
    stability_table,
)

# --- Members ---


def test_robust_spread_is_the_standard_deviation_of_normal_values_and_ignores_a_stray_one():
    values = np.random.default_rng(0).normal(0, 0.2, 4000)
    assert robust_spread(values) == pytest.approx(0.2, rel=0.05)
    assert robust_spread(np.append(values, 1e6)) == pytest.approx(robust_spread(values), rel=0.01)


def test_interval_of_the_spread_covers_what_it_promises():
    random = np.random.default_rng(0)
    intervals = [spread_interval(random.normal(0, 0.3, 42)) for _ in range(200)]
    assert 0.88 <= np.mean([found.low <= 0.3 <= found.high for found in intervals]) <= 0.99


def test_too_few_members_have_no_interval():
    assert np.isnan(spread_interval(np.arange(5.0)).low)
    assert np.isfinite(spread_interval(np.arange(6.0)).low)
    ratio, logs = spread_ratio(np.arange(5.0), np.arange(9.0))
    assert np.isnan([ratio.low, ratio.high]).all() and np.isnan(logs).all()


def test_spreads_are_compared_by_their_ratio():
    random = np.random.default_rng(0)
    ratio, logs = spread_ratio(random.normal(0, 0.6, 70), random.normal(0, 0.2, 70))
    assert ratio.low < 3 < ratio.high and ratio.low > 1.5
    assert np.exp(np.median(logs)) == pytest.approx(ratio.value, rel=0.2)


def test_stray_members_are_more_than_twice_the_median_off():
    assert is_stray(np.array([1.0, 1.1, 0.9, 2.0, 2.1, np.nan])).tolist() == [True] * 6  # no median with nan
    assert is_stray(np.array([1.0, 1.0, 0.1, 2.0, 2.1])).tolist() == [False, False, False, False, True]


def test_share_has_the_exact_binomial_interval():
    assert share_interval(0, 35) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 35)))
    assert share_interval(35, 35) == pytest.approx((1, 0.025 ** (1 / 35), 1))
    low, high = share_interval(2, 35)[1:]
    tail = lambda p, upto: sum(math.comb(35, k) * p**k * (1 - p) ** (35 - k) for k in range(upto + 1))  # noqa: E731
    assert (tail(high, 2), 1 - tail(low, 1)) == pytest.approx((0.025, 0.025))


# --- Ensembles ---


def test_jackknife_leaves_out_each_member_once():
    errors = np.random.default_rng(0).normal(0.3, 1, (7, 500))
    logs = [np.log(np.sqrt(np.mean(np.delete(errors, i, axis=0).mean(axis=0) ** 2))) for i in range(7)]
    expected = 6 / 7 * np.square(np.array(logs) - np.mean(logs)).sum()
    assert jackknife_variance(errors @ errors.T / 500) == pytest.approx(expected)


def test_jackknife_finds_the_spread_of_ensembles():
    random, shared = np.random.default_rng(0), np.random.default_rng(1).normal(size=400)
    spread, variances = [], []
    for _ in range(300):
        # Members share most of their error, and differ in how much of it they have.
        errors = shared * random.normal(1, 0.3, (7, 1)) + 0.2 * random.normal(size=(7, 400))
        spread.append(np.log(np.sqrt(np.mean(errors.mean(axis=0) ** 2))))
        variances.append(jackknife_variance(errors @ errors.T / 400))
    found = ensemble_interval(np.array(variances))
    assert found.value == pytest.approx(np.std(spread), rel=0.15)
    assert found.low < found.value < found.high


def test_products_are_read_back_as_a_matrix():
    table = pd.DataFrame({"first": [0, 0, 1], "second": [0, 1, 1], "product": [1.0, 0.5, 4.0]})
    assert product_matrix(table).tolist() == [[1.0, 0.5], [0.5, 4.0]]


def test_deviation_has_the_chi_square_interval():
    values = [0.1, 0.4, 0.2, 0.7, -0.1, 0.3]
    found = deviation_interval(values)
    assert found.value == pytest.approx(np.std(values, ddof=1))
    assert (found.low / found.value, found.high / found.value) == pytest.approx((0.6242, 2.4526), rel=1e-3)
    assert np.isnan(deviation_interval(values[:5]).high)


# --- Of a study ---


def test_stability_by_hand(make_study):
    study = make_study(seeds=2, splits=(0, 1))
    errors = {key: float(key.seed + 10 * key.split) for key in study}
    row = stability_table(study, errors).set_index("arm").loc["a"]
    assert (row.runs, row.failed, row.members) == (4, 0, 12)
    assert row.member_spread == pytest.approx(1.4826 * math.log(1.5))  # the logs of 1/2, 1 and 3/2 times the median
    assert (row.stray, row.stray_share, row.with_stray) == (0, 0, 0)
    assert row.seed_spread == pytest.approx(math.sqrt(0.5))  # 0 and 1, whatever the split
    assert row.split_spread == pytest.approx(math.sqrt(50))
    assert row.jitter == pytest.approx(1 / 4)  # one rise of log error by 1, from 1 to e, and three falls


def test_stray_members_are_counted_within_their_split(make_study):
    study = make_study(seeds=2, splits=(0, 1))
    for key, result in study.items():
        if key.arm == "a" and key.split == 1:
            result.tables["member_products"]["product"] *= 100  # a harder split makes no member stray
            if key.seed == 0:
                result.tables["member_products"].loc[5, "product"] *= 9
    assert len(member_logs(study, "a", "x")) == 12
    row = stability_table(study, dict.fromkeys(study, 0.0)).set_index("arm").loc["a"]
    assert row.stray == 1
    assert row.with_stray == pytest.approx(1 - (11 / 12) ** 3)


def test_jitter_counts_rises_only():
    curve = pd.DataFrame({"step": [0, 1, 2], "model_id": 0, "val_mse": [1.0, math.e, 1.0]})
    assert jitter(curve) == pytest.approx(0.5)
