import numpy as np
import pytest
from scipy import stats

from study.paired_statistics import (
    Estimate,
    crossed_interval,
    holm,
    pool,
    resample_counts,
    satterthwaite,
    seed_interval,
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


def test_seed_interval_is_the_t_interval():
    values = np.array([0.1, 0.4, 0.2, 0.7, -0.1])
    estimate, textbook = seed_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((textbook.low, textbook.high))
    assert np.isnan(seed_interval(values[:1]).low) and np.isnan(seed_interval(np.empty(0)).mean)


def test_satterthwaite_by_hand():
    assert satterthwaite([2.0, 1.0], [4, 10]) == pytest.approx(9 / (4 / 4 + 1 / 10))
    assert satterthwaite([2.0, 0.0], [4, 10]) == pytest.approx(4)
    assert satterthwaite([0.0, 0.0], [4, 10]) == 14


def test_pool_by_hand():
    pooled = pool([Estimate(0.2, 0.3, 4), Estimate(0.6, 0.4, 6)])
    assert pooled.mean == pytest.approx(0.4)
    assert pooled.standard_error == pytest.approx(0.25)  # the root of (0.3^2 + 0.4^2) / 4
    assert pooled.degrees == pytest.approx(0.0625**2 / (0.0225**2 / 4 + 0.04**2 / 6))


# --- Many tests ---


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (no smaller than the one before), 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_holm_is_no_more_than_one_and_leaves_out_what_was_not_tested():
    assert holm([0.9, np.nan, 0.6]) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    assert holm([]).shape == (0,)
