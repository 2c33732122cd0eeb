from functools import partial

import numpy as np
import pytest
from scipy import stats

from study.paired_statistics import (
    Estimate,
    compare_spreads,
    crossed_interval,
    holm,
    interquartile_mean,
    pool,
    probability_of_improvement,
    resample_counts,
    satterthwaite,
    stratified_interval,
    weighted_mean,
    weighted_median,
)

# --- Estimates ---


def test_estimate_is_the_textbooks_t_interval():
    values = np.array([0.1, 0.4, 0.2, 0.7, -0.1])
    textbook = stats.ttest_1samp(values, 0)
    estimate = Estimate(values.mean(), stats.sem(values), degrees=4)
    interval = textbook.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.p_value == pytest.approx(textbook.pvalue)


def test_estimate_without_spread_is_certain():
    assert Estimate(0.0, 0.0, 4).p_value == 1
    assert Estimate(0.2, 0.0, 4).p_value == 0


# --- Resampling ---


def test_counts_draw_one_item_less_than_there_are():
    counts = resample_counts(6, 3000, seed=0)
    assert counts.shape == (3000, 6)
    assert (counts.sum(axis=1) == 5).all()
    assert counts.mean(axis=0) == pytest.approx(np.full(6, 5 / 6), abs=0.05)


def test_resampled_variance_of_a_mean_is_unbiased():
    values = np.array([1.0, 2.0, 4.0, 9.0, 3.0])
    means = weighted_mean(values, resample_counts(5, 20_000, seed=1))
    assert means.var() == pytest.approx(values.var(ddof=1) / 5, rel=0.05)


def test_weighted_mean_by_hand():
    weights = np.array([[1.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    assert weighted_mean(np.array([2.0, 4.0, 5.0]), weights) == pytest.approx([4.0, 4.25])


def test_weighted_median_by_hand():
    values = np.array([5.0, 1.0, np.inf, 3.0])
    weights = np.array([[1, 1, 1, 1], [0, 1, 3, 1], [4, 1, 1, 1]], dtype=float)
    assert weighted_median(values, weights).tolist() == [3.0, np.inf, 5.0]


@pytest.mark.parametrize("size", [5, 8])
def test_weighted_median_with_equal_weights_is_numpys(size):
    values = np.random.default_rng(0).normal(size=size)
    expected = np.quantile(values, 0.5, method="inverted_cdf")
    assert weighted_median(values, np.ones((1, size))) == pytest.approx([expected])


# --- Seeds crossed with trajectories ---


def simulated_interval(random, seeds, trajectories, of_seed, of_trajectory, of_both, mean=0.0):
    values = mean + of_seed * random.normal(size=(seeds, 1)) + of_trajectory * random.normal(size=(1, trajectories))
    values = values + of_both * random.normal(size=(seeds, trajectories))
    counts = resample_counts(trajectories, 400, seed=int(random.integers(2**31)))
    replicates = counts @ values.T / (trajectories - 1)
    return crossed_interval(values.mean(axis=1), replicates, trajectories, seed=int(random.integers(2**31)))


@pytest.mark.parametrize(
    ("seeds", "trajectories", "of_seed", "of_trajectory", "of_both"),
    [(5, 20, 1.0, 1.0, 1.0), (5, 20, 1.0, 0.1, 0.1), (5, 20, 0.1, 1.0, 0.1), (3, 10, 1.0, 1.0, 0.5)],
)
def test_crossed_interval_covers_what_it_promises(seeds, trajectories, of_seed, of_trajectory, of_both):
    random = np.random.default_rng(0)
    draws = [simulated_interval(random, seeds, trajectories, of_seed, of_trajectory, of_both, 0.3) for _ in range(800)]
    coverage = np.mean([draw.low <= 0.3 <= draw.high for draw in draws])
    assert 0.93 <= coverage <= 0.985  # 95 % promised; seeds times trajectories makes it a little careful


def test_crossed_interval_of_seeds_alone_is_the_t_interval():
    by_seed = np.array([0.1, 0.4, 0.2, 0.7, -0.1])
    replicates = np.tile(by_seed, (20_000, 1))  # trajectories make no difference
    estimate = crossed_interval(by_seed, replicates, trajectories=20)
    assert estimate.mean == pytest.approx(by_seed.mean())
    assert estimate.degrees == pytest.approx(4)
    assert estimate.standard_error == pytest.approx(stats.sem(by_seed), rel=0.02)


def test_crossed_interval_needs_two_of_both():
    one_seed = crossed_interval(np.array([0.5]), np.zeros((10, 1)), trajectories=9)
    one_trajectory = crossed_interval(np.array([0.5, 0.7]), np.zeros((10, 2)), trajectories=1)
    assert (one_seed.mean, one_trajectory.mean) == pytest.approx((0.5, 0.6))
    assert np.isnan([one_seed.low, one_seed.p_value, one_trajectory.high]).all()
    assert np.isnan(crossed_interval(np.empty(0), np.empty((10, 0)), 9).mean)


def test_satterthwaite_by_hand():
    assert satterthwaite([2.0, 1.0], [4, 10]) == pytest.approx(9 / (4 / 4 + 1 / 10))
    assert satterthwaite([2.0, 0.0], [4, 10]) == pytest.approx(4)
    assert satterthwaite([0.0, 0.0], [4, 10]) == 14


def test_pool_by_hand():
    pooled = pool([Estimate(0.2, 0.3, 4), Estimate(0.6, 0.4, 6)])
    assert pooled.mean == pytest.approx(0.4)
    assert pooled.standard_error == pytest.approx(0.25)  # the root of (0.3^2 + 0.4^2) / 4
    assert pooled.degrees == pytest.approx(0.0625**2 / (0.0225**2 / 4 + 0.04**2 / 6))


# --- Spread ---


def test_spreads_are_pitmans_and_morgans_test():
    random = np.random.default_rng(3)
    first, second = random.normal(size=(2, 8)) * [[2.0], [1.0]]
    found = compare_spreads(first, second)
    assert found.ratio == pytest.approx(first.std(ddof=1) / second.std(ddof=1))
    assert found.p_value == pytest.approx(stats.pearsonr(first + second, first - second).pvalue)
    assert found.low * found.high == pytest.approx(found.ratio**2)
    for limit in (found.low, found.high):  # a ratio at the limit is just not refused
        assert stats.pearsonr(first + limit * second, first - limit * second).pvalue == pytest.approx(0.05)


def simulated_spreads(random, ratio, scale=1.0):
    shared = random.normal(size=5)
    return compare_spreads(*(scale * (shared + random.normal(size=(2, 5))) * [[ratio], [1.0]]))


def test_spreads_interval_covers_what_it_promises():
    random = np.random.default_rng(5)
    draws = [simulated_spreads(random, ratio=3) for _ in range(1000)]
    assert np.mean([draw.low <= 3 <= draw.high for draw in draws]) == pytest.approx(0.95, abs=0.015)


def test_pooled_spreads_cover_what_they_promise():
    random = np.random.default_rng(6)
    draws = [pool([simulated_spreads(random, 3, 10**k).log for k in range(4)]) for _ in range(700)]
    assert np.mean([draw.low <= np.log(3) <= draw.high for draw in draws]) == pytest.approx(0.95, abs=0.02)


def test_spreads_need_three_pairs():
    found = compare_spreads(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    assert found.ratio == pytest.approx(2)
    assert np.isnan([found.low, found.high, found.p_value]).all()


# --- Many tests ---


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (no smaller than the one before), 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_holm_is_no_more_than_one_and_leaves_out_what_was_not_tested():
    assert holm([0.9, np.nan, 0.6]) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    assert holm([]).shape == (0,)


# --- Aggregates ---


def test_interquartile_mean_by_hand():
    # of 1 ... 8, the middle half is 3, 4, 5, 6
    assert interquartile_mean(np.array([[8.0, 1.0, 6.0, 3.0], [2.0, 7.0, 4.0, 5.0]])) == 4.5
    assert interquartile_mean(np.array([[8.0, 1.0, 6.0, 3.0], [2.0, np.inf, 4.0, 5.0]])) == pytest.approx(4.5)


def test_probability_of_improvement_by_hand():
    errors, reference = np.array([[1.0, 3.0], [2.0, np.inf]]), np.array([[2.0, 3.0], [2.0, np.inf]])
    # first task: 1 beats both, 3 loses to 2 and ties 3: 2.5 of 4; second: a tie, a win, a loss, a tie: 2 of 4
    assert probability_of_improvement(errors, reference) == pytest.approx((2.5 / 4 + 2 / 4) / 2)


def test_aggregates_of_many_replicates_are_those_of_each():
    random = np.random.default_rng(8)
    errors, reference = random.normal(size=(2, 7, 3, 5)).round(1)
    means, probabilities = interquartile_mean(errors), probability_of_improvement(errors, reference)
    assert means.shape == probabilities.shape == (7,)
    for index in range(7):
        assert means[index] == interquartile_mean(errors[index])
        assert probabilities[index] == probability_of_improvement(errors[index], reference[index])


def test_probability_of_improvement_is_mann_whitneys_statistic():
    random = np.random.default_rng(6)
    errors, reference = random.normal(size=(3, 5)), random.normal(size=(3, 4))
    per_task = [stats.mannwhitneyu(r, e).statistic / 20 for e, r in zip(errors, reference, strict=True)]
    assert probability_of_improvement(errors, reference) == pytest.approx(np.mean(per_task))


def test_stratified_interval_resamples_within_tasks():
    scores = np.array([[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]])  # no task varies
    mean = partial(np.mean, axis=(-2, -1))
    assert stratified_interval(mean, [scores]) == (3.0, 3.0)
    random = np.random.default_rng(7)
    many = random.normal(size=(1, 400))
    low, high = stratified_interval(mean, [many])
    assert high - low == pytest.approx(2 * 1.96 * many.std() / 20, rel=0.1)
