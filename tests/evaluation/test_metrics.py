import itertools

import numpy as np
import pytest
from scipy import integrate, stats

from evaluation import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- Errors ---


def test_rmse_over_everything_and_per_dimension():
    error = np.array([[3.0, 0.0], [4.0, 2.0]])
    assert metrics.rmse(error) == pytest.approx(np.sqrt(29 / 4))
    np.testing.assert_allclose(metrics.rmse(error, axis=0), [np.sqrt(12.5), np.sqrt(2)])


def test_r2_is_one_minus_the_share_of_squares_left_and_nan_for_a_constant_truth():
    truth = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])  # the squares around the mean sum to 2 and to 0
    error = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(metrics.r2(error, truth), [0.5, np.nan])
    np.testing.assert_allclose(metrics.r2(truth - truth.mean(axis=0), truth)[0], 0.0)


def test_subset_mse_equals_the_mean_over_every_subset(rng):
    error = rng.normal(size=(5, 3))
    for size, expected in enumerate(metrics.subset_mse(error), start=1):
        subsets = [np.square(error[list(chosen)].mean(axis=0)) for chosen in itertools.combinations(range(5), size)]
        np.testing.assert_allclose(expected, np.mean(subsets, axis=0))


def test_subset_mse_of_one_member_is_its_squared_error():
    np.testing.assert_array_equal(metrics.subset_mse(np.array([[2.0, -3.0]])), [[4.0, 9.0]])


def test_observed_quantiles_are_values_of_those_that_there_are(rng):
    values = rng.normal(size=(4, 11))
    expected = np.quantile(values, [0.1, 0.5, 0.9], axis=-1, method="inverted_cdf")
    np.testing.assert_array_equal(metrics.observed_quantiles(values, [0.1, 0.5, 0.9]), expected)
    ended = np.array([[3.0, np.nan, 1.0, np.inf, np.inf], [np.nan, np.nan, np.nan, np.nan, 7.0]])
    np.testing.assert_array_equal(metrics.observed_quantiles(ended, [0.25, 0.5]), [[1.0, 7.0], [3.0, 7.0]])
    assert np.isnan(metrics.observed_quantiles(np.full(3, np.nan), [0.5])).all()


# --- Predictive distributions ---


def test_moment_match_by_hand():
    mean, variance = metrics.moment_match(np.array([[0.0], [4.0]]), np.array([[1.0], [3.0]]))
    assert mean == [2.0]
    assert variance == [2.0 + 4.0]  # mean of the variances plus variance of the means
    assert metrics.moment_match(np.array([[0.0], [4.0]]))[1] == [4.0]


def test_gaussian_nll_is_minus_the_log_density():
    value = metrics.gaussian_nll(np.array(1.3), np.array(0.4), np.array(2.0))
    assert value == pytest.approx(-stats.norm(0.4, np.sqrt(2.0)).logpdf(1.3))


def test_mixture_nll_is_minus_the_log_of_the_mean_density():
    members = stats.norm(0, 1), stats.t(5, loc=3, scale=0.5)  # whatever their densities
    density = 0.5 * members[0].pdf(2.0) + 0.5 * members[1].pdf(2.0)
    nll = np.array([-member.logpdf(2.0) for member in members])
    assert metrics.mixture_nll(nll) == pytest.approx(-np.log(density))


def test_crps_of_a_gaussian_at_its_mean():
    # Gneiting and Raftery 2007: at z = 0 the score is sigma * (sqrt(2) - 1) / sqrt(pi).
    expected = 3.0 * (np.sqrt(2) - 1) / np.sqrt(np.pi)
    assert metrics.gaussian_crps(np.array(7.0), np.array(7.0), np.array(9.0)) == pytest.approx(expected)


def test_crps_of_a_nearly_certain_gaussian_is_the_absolute_error():
    assert metrics.gaussian_crps(np.array(2.0), np.array(5.0), np.array(1e-12)) == pytest.approx(3.0, rel=1e-5)


def test_mean_crps_of_a_calibrated_gaussian_is_sigma_over_root_pi(rng):
    truth = rng.normal(2.0, 0.5, size=200_000)
    score = metrics.gaussian_crps(truth, np.full_like(truth, 2.0), np.full_like(truth, 0.25))
    assert score.mean() == pytest.approx(0.5 / np.sqrt(np.pi), rel=0.01)


def test_mixture_crps_equals_the_integral_that_defines_it():
    means, variances, truth = np.array([-1.0, 0.5, 2.0]), np.array([0.3, 1.0, 0.1]), 0.2

    def squared_gap(x):
        return (stats.norm.cdf(x, means, np.sqrt(variances)).mean() - (x >= truth)) ** 2

    expected = sum(integrate.quad(squared_gap, *span)[0] for span in ((-12, truth), (truth, 12)))
    assert metrics.mixture_crps(np.array(truth), means, variances) == pytest.approx(expected, rel=1e-6)


def test_mixture_of_equal_gaussians_scores_as_one(rng):
    truth, mean, variance = rng.normal(size=(4, 2)), rng.normal(size=(4, 2)), rng.uniform(0.1, 2, size=(4, 2))
    three = np.stack([mean] * 3), np.stack([variance] * 3)
    np.testing.assert_allclose(metrics.mixture_crps(truth, *three), metrics.gaussian_crps(truth, mean, variance))
    nll = metrics.gaussian_nll(truth, mean, variance)
    np.testing.assert_allclose(metrics.mixture_nll(np.stack([nll] * 3)), nll)


def test_crps_of_many_quantiles_is_that_of_the_distribution():
    truth, quantiles = np.array([-3.0, 0.0, 0.4, 5.0]), stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    expected = metrics.gaussian_crps(truth, np.zeros(4), np.ones(4))
    np.testing.assert_allclose(metrics.quantile_crps(truth, quantiles), expected, atol=1e-3)


def test_crps_of_few_quantiles_is_that_of_as_many_equally_likely_values(rng):
    truth, quantiles = rng.normal(size=6), np.sort(rng.normal(size=5))
    distance = np.abs(truth[:, None] - quantiles).mean(axis=1)
    expected = distance - np.abs(quantiles[:, None] - quantiles).mean() / 2
    np.testing.assert_allclose(metrics.quantile_crps(truth, quantiles), expected)
    np.testing.assert_allclose(metrics.quantile_crps(truth, np.array([2.0])), np.abs(truth - 2))


# --- Energy score ---


def test_energy_score_equals_the_means_over_particles_and_pairs(rng):
    particles, truth = rng.normal(size=(5, 3, 4)), rng.normal(size=(3, 4))
    for at, score in enumerate(metrics.energy_score(particles, truth)):
        distances = [metrics.rmse(particle - truth[at]) for particle in particles[:, at]]
        pairs = [metrics.rmse(one - other) for one, other in itertools.permutations(particles[:, at], 2)]
        assert score == pytest.approx(np.mean(distances) - np.mean(pairs) / 2)


def test_energy_score_is_that_of_another_library(rng):
    scoringrules = pytest.importorskip("scoringrules")
    particles, truth = rng.normal(size=(20, 8, 11)), rng.normal(size=(8, 11))
    expected = scoringrules.es_ensemble(truth, particles, m_axis=0, estimator="fair", backend="numpy")
    np.testing.assert_allclose(metrics.energy_score(particles, truth), expected / np.sqrt(11))


def test_energy_score_of_a_point_is_its_error_and_of_one_dimension_the_crps(rng):
    particles, truth = rng.normal(size=(1, 6, 3)), rng.normal(size=(6, 3))
    np.testing.assert_allclose(metrics.energy_score(particles, truth), metrics.rmse(particles[0] - truth, axis=-1))
    truth = np.array([-2.0, 0.0, 1.0])
    drawn = metrics.energy_score(rng.normal(size=(2000, 3, 1)), truth[:, None])
    np.testing.assert_allclose(drawn, metrics.gaussian_crps(truth, np.zeros(3), np.ones(3)), atol=0.05)


def test_energy_score_of_few_particles_is_that_of_many_on_average(rng):
    truth = np.tile([0.5, -1.0], (40_000, 1))
    few, many = (
        metrics.energy_score(rng.normal(size=(count, 40_000 // count, 2)), truth[: 40_000 // count]).mean()
        for count in (2, 100)
    )
    assert few == pytest.approx(many, abs=0.02)


def test_energy_score_of_particles_that_exploded_is_infinite():
    particles = np.zeros((3, 2, 2))
    particles[1, 1] = [np.nan, 0.0]
    assert metrics.energy_score(particles, np.zeros((2, 2))).tolist() == [0.0, np.inf]


# --- Calibration ---


def test_a_calibrated_gaussian_scores_as_such(rng):
    z = rng.normal(size=(50_000, 2))
    for level in (0.5, 0.8, 0.9, 0.95):
        assert metrics.interval_coverage(z, level) == pytest.approx(level, abs=0.01)
    assert metrics.expected_calibration_error(z) < 0.005
    assert np.ptp(np.histogram(metrics.probability_integral_transform(z), bins=10, range=(0, 1))[0]) < 0.05 * z.size


def test_an_overconfident_gaussian_is_found_out(rng):
    z = 2 * rng.normal(size=50_000)  # half the true standard deviation was predicted
    assert metrics.interval_coverage(z, 0.9) == pytest.approx(2 * stats.norm.cdf(1.645 / 2) - 1, abs=0.01)
    # The mean over levels p of |2 Phi(ppf((1 + p) / 2) / 2) - 1 - p|, by integration.
    gap, _ = integrate.quad(lambda p: p - (2 * stats.norm.cdf(stats.norm.ppf(0.5 + p / 2) / 2) - 1), 0, 1)
    assert metrics.expected_calibration_error(z) == pytest.approx(gap, abs=0.01)


def test_coverage_per_dimension_counts_what_is_not_a_number_as_outside():
    z = np.array([[0.0, np.nan], [10.0, 0.1]])
    np.testing.assert_array_equal(metrics.interval_coverage(z, 0.9, axis=0), [0.5, 0.5])


def test_clustered_mean_by_hand():
    # Clusters (0, 2) and (4,): mean 2, sums of deviations -2 and 2, so SE = sqrt(2 / 1 * 8) / 3.
    mean, error = metrics.clustered_mean(np.array([0.0, 2.0, 4.0]), np.array(["a", "a", "b"]))
    assert (mean, error) == (2.0, pytest.approx(4 / 3))


def test_clustered_error_is_the_usual_one_where_every_value_is_its_own_cluster(rng):
    values = rng.normal(size=50)
    assert metrics.clustered_mean(values, np.arange(50))[1] == pytest.approx(stats.sem(values))


def test_clustered_error_matches_the_spread_of_repeated_samples(rng):
    def sample():
        return np.repeat(rng.normal(size=40), 10) + rng.normal(size=400)  # the rows of a trajectory share an offset

    clusters = np.repeat(np.arange(40), 10)
    means, errors = np.array([metrics.clustered_mean(sample(), clusters) for _ in range(400)]).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.1)


def test_clustered_error_of_one_cluster_is_unknown():
    assert np.isnan(metrics.clustered_mean(np.ones(3), np.zeros(3))[1])


@pytest.mark.parametrize(
    ("coverage", "error", "steps"),
    [
        ([0.95, 0.92, 0.91], [0.01] * 3, 3),
        ([0.95, 0.881, 0.91], [0.01] * 3, 3),  # 0.881 >= 0.9 - 2 * 0.01
        ([0.95, 0.879, 0.91], [0.01] * 3, 1),  # a later recovery does not count
        ([0.5, 0.95], [0.01] * 2, 0),
        ([0.95, 0.95], [0.01, np.nan], 1),
        ([], [], 0),
    ],
)
def test_calibrated_horizon(coverage, error, steps):
    assert metrics.calibrated_horizon(coverage, error) == steps


# --- Usefulness of uncertainty ---


def test_correlations_of_a_monotonous_but_bent_relation():
    uncertainty = np.array([1.0, 2.0, 3.0, 4.0])
    assert metrics.spearman(uncertainty, uncertainty**3) == pytest.approx(1.0)
    assert metrics.pearson(uncertainty, uncertainty**3) == pytest.approx(np.corrcoef(uncertainty, uncertainty**3)[0, 1])
    assert np.isnan(metrics.spearman(np.ones(4), uncertainty))
    assert np.isnan(metrics.pearson(np.ones(4), uncertainty))


def test_correlations_ranks_and_auroc_are_those_of_other_libraries(rng):
    first, second = rng.normal(size=(2, 200)).round(1)  # with ties
    second += first
    np.testing.assert_array_equal(metrics.ranks(first), stats.rankdata(first))
    assert metrics.spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert metrics.pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic)
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    expected = roc_auc_score(np.arange(200) < 50, first)
    assert metrics.auroc(first[:50], first[50:]) == pytest.approx(expected)


def test_auroc_counts_pairs():
    # Of the six pairs (positive, negative), two are in order and one is a tie.
    assert metrics.auroc(np.array([2.0, 5.0]), np.array([1.0, 5.0, 6.0])) == pytest.approx(2.5 / 6)
    assert np.isnan(metrics.auroc(np.array([]), np.array([1.0])))


def test_auroc_of_worst_finds_the_largest_errors():
    error = np.arange(100.0)
    assert metrics.auroc_of_worst(error, error) == 1.0
    assert metrics.auroc_of_worst(-error, error) == 0.0
    uncertainty = np.where(error >= 95, 1.0, 0.0)  # marks half of the worst tenth; the others tie with the good rows
    assert metrics.auroc_of_worst(uncertainty, error) == pytest.approx(0.5 + 0.5 * 0.5)


def test_risk_coverage_by_hand():
    uncertainty, error = np.array([3.0, 1.0, 2.0]), np.array([6.0, 0.0, 3.0])
    np.testing.assert_allclose(metrics.risk_coverage(uncertainty, error), [0.0, 1.5, 3.0])
    np.testing.assert_allclose(metrics.risk_coverage(-uncertainty, error), [6.0, 4.5, 3.0])


def test_risk_reduction_is_one_for_the_best_order_and_nothing_for_chance(rng):
    error = rng.exponential(size=20_000)
    assert metrics.risk_reduction(error**2, error) == pytest.approx(1.0)
    assert metrics.risk_reduction(rng.normal(size=20_000), error) == pytest.approx(0.0, abs=0.03)
    assert metrics.risk_reduction(-error, error) < -1
    assert np.isnan(metrics.risk_reduction(np.arange(3.0), np.ones(3)))


def test_scores_agree_with_uncertainty_toolbox(rng):
    toolbox = pytest.importorskip("uncertainty_toolbox")
    mean, std = rng.normal(size=500), rng.uniform(0.2, 2, size=500)
    truth = mean + 1.4 * std * rng.standard_t(5, size=500)
    ours = metrics.gaussian_crps(truth, mean, std**2).mean()
    assert ours == pytest.approx(toolbox.crps_gaussian(mean, std, truth))
    ours = metrics.gaussian_nll(truth, mean, std**2).mean()
    assert ours == pytest.approx(toolbox.nll_gaussian(mean, std, truth))
    ours = metrics.expected_calibration_error((truth - mean) / std)
    assert ours == pytest.approx(toolbox.mean_absolute_calibration_error(mean, std, truth))
