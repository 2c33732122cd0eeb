"""probabilistic_model: a Gaussian in raw units, soft-clamped log-variance, the losses of PETS and beta-NLL by hand."""

import math

import numpy as np
import pytest
import torch

from config import LearnConfig
from deterministic_model import DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble
from probabilistic_model import (
    FaithfulEnsemble,
    FaithfulModel,
    PosthocEnsemble,
    PosthocModel,
    ProbabilisticEnsemble,
    ProbabilisticModel,
)

# --- Prediction in raw units ---


def test_mean_and_variance_come_back_in_raw_units(constant_member):
    # mean: s + scale * mu + shift: 1 + 10 * 0.5 + 3 = 9 and -4 + 0.5 * 2 - 1 = -4;
    # variance: scale^2 * var: 100 * 0.04 = 4 and 0.25 * 9 = 2.25
    scales = {"delta_scale": [10.0, 0.5], "delta_shift": [3.0, -1.0]}
    member = constant_member(ProbabilisticModel, [0.5, 2.0], [0.04, 9.0], **scales)

    prediction = member(np.array([1.0, -4.0]), np.array([0.0]))

    assert type(prediction) is tuple and len(prediction) == 2
    torch.testing.assert_close(prediction[0], torch.tensor([9.0, -4.0]))
    torch.testing.assert_close(prediction[1], torch.tensor([4.0, 2.25]), rtol=1e-5, atol=0)


def test_predicted_moments_are_those_of_samples(random_member):
    members = [random_member(ProbabilisticModel, member) for member in range(2)]
    ensemble, draws = DynamicsEnsemble.from_members(members), 40_000
    state, action = np.array([1.0, -2.0, 10.0]), np.array([0.3, -1.0])

    mean, variance = ensemble.predict(state, action)
    samples = ensemble.sample(np.tile(state, (draws, 1)), np.tile(action, (draws, 1))).double()

    assert samples.shape == (2, draws, 3)
    # Five standard errors: of a mean sigma / sqrt(n), of a variance sigma^2 * sqrt(2 / n).
    assert ((samples.mean(dim=1) - mean).abs() < 5 * (variance / draws).sqrt()).all()
    assert ((samples.var(dim=1) / variance - 1).abs() < 5 * math.sqrt(2 / draws)).all()


def test_noise_of_the_data_is_learned_in_raw_units(linear_system, train):
    """The noise is 0.5 mean absolute deviations of each dimension's own change."""
    clean, noisy = linear_system(3000, noise=0.0), linear_system(3000, noise=0.5)
    expected = (noisy.next_states.astype(np.float64) - clean.next_states).var(axis=0)
    assert expected.max() / expected.min() > 1000, "one scale for all dimensions would be far off"
    config = LearnConfig(
        probabilistic=True, ensemble_size=2, hidden_size=(), fit_epochs=12, batch_size=100, fit_lr=0.05
    )

    ensemble, _ = train(config, noisy)

    with torch.no_grad():
        mean, variance = ensemble.predict(noisy.states, noisy.actions)
    np.testing.assert_allclose(variance.mean(dim=1), np.tile(expected, (2, 1)), rtol=0.15)
    off = (mean.numpy() - clean.next_states) / np.sqrt(expected)
    assert np.abs(off).mean() < 0.2, "the mean is that of the clean system, within a fifth of the noise"


# --- Log-variance ---


def with_bounds(unit_normalisation, max_logvar, min_logvar):
    ensemble = ProbabilisticModel(Architecture(1, 1, hidden_size=()), unit_normalisation(1, 1)).network
    with torch.no_grad():
        ensemble.max_logvar.fill_(max_logvar)
        ensemble.min_logvar.fill_(min_logvar)
    return ensemble


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("raw", [-12.0, -3.0, -1.0, 0.0, 0.5, 2.0, 12.0])
def test_log_variance_is_clamped_softly_from_above_and_then_from_below(unit_normalisation, raw):
    ensemble = with_bounds(unit_normalisation, max_logvar=0.5, min_logvar=-2.0)

    mean, log_variance = ensemble.interpret(torch.tensor([[[7.0, raw]]]))

    from_above = 0.5 - softplus(0.5 - raw)
    assert log_variance.item() == pytest.approx(-2.0 + softplus(from_above + 2.0), rel=1e-5)
    assert mean.item() == 7.0, "the mean is not clamped"


@pytest.mark.parametrize("raw", [-1e6, -100.0, 0.0, 100.0, 1e6])
def test_log_variance_stays_within_its_bounds(unit_normalisation, raw):
    ensemble = with_bounds(unit_normalisation, max_logvar=0.5, min_logvar=-10.0)

    _, log_variance = ensemble.interpret(torch.tensor([[[0.0, raw]]]))

    # The second clamp lifts the upper bound by log(1 + exp(-(max - min))), 2.8e-5 here, as in PETS.
    assert -10.0 <= log_variance.item() <= 0.5 + 1.01 * softplus(-10.5)


def test_log_variance_far_from_its_bounds_is_left_alone(unit_normalisation):
    ensemble = with_bounds(unit_normalisation, max_logvar=20.0, min_logvar=-20.0)
    _, log_variance = ensemble.interpret(torch.tensor([[[0.0, 1.5]]]))
    assert log_variance.item() == pytest.approx(1.5, abs=1e-5)


def test_bounds_start_where_the_papers_code_has_them_and_are_learned(random_member):
    ensemble = random_member(ProbabilisticModel).network

    assert ensemble.max_logvar.tolist() == [[[0.5] * 3]]
    assert ensemble.min_logvar.tolist() == [[[-10.0] * 3]]
    assert {"max_logvar", "min_logvar"} <= dict(ensemble.named_parameters()).keys()


# --- Losses ---

# Two rows of two dimensions: the member predicts mu = (1, -1) and var = (4, 0.25) whatever it is given.
MEAN, VARIANCE = (1.0, -1.0), (4.0, 0.25)
TARGETS = ((3.0, -1.0), (1.0, 0.0))
SQUARED_ERRORS = ((4.0, 0.0), (0.0, 1.0))


def two_rows():
    """Inputs and targets of one member."""
    return torch.zeros(1, 2, 3), torch.tensor([TARGETS])


@pytest.fixture
def example(constant_member):
    return constant_member(ProbabilisticModel, MEAN, VARIANCE).network.requires_grad_(True)


def test_reported_loss_is_error_over_variance_plus_log_variance_by_hand(example):
    # Row 1: 4/4 + log 4 and 0 + log 1/4; row 2: 0 + log 4 and 1/0.25 + log 1/4. Logarithms cancel: (1 + 4) / 4.
    _, reported = example.losses(*two_rows())

    assert reported.item() == pytest.approx(1.25, rel=1e-5)
    assert not reported.requires_grad


def test_objective_adds_a_hundredth_of_the_sum_of_distances_between_bounds(example):
    objective, reported = example.losses(*two_rows())

    # Bounds are 40 and -40 in both dimensions: 0.01 * (80 + 80). It is a sum over dimensions, not a mean.
    assert (objective - reported).item() == pytest.approx(1.6, rel=1e-5)


def test_regulariser_draws_the_bounds_together(example):
    example.losses(*two_rows())[0].sum().backward()

    # The bounds are too far from the log-variance for the likelihood to reach them.
    torch.testing.assert_close(example.max_logvar.grad, torch.full((1, 1, 2), 0.01))
    torch.testing.assert_close(example.min_logvar.grad, torch.full((1, 1, 2), -0.01))


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_beta_nll_weighs_each_term_by_the_variance_to_beta_by_hand(example, beta):
    objective, reported = example.losses(*two_rows(), beta_nll=beta)

    terms = [
        VARIANCE[dim] ** beta * (row[dim] / VARIANCE[dim] + math.log(VARIANCE[dim]))
        for row in SQUARED_ERRORS
        for dim in range(2)
    ]
    bounds = 0.01 * 80 * sum(VARIANCE[dim] ** beta for dim in range(2))  # weighed like the terms of their dimension
    assert objective.item() == pytest.approx(sum(terms) / 4 + bounds, rel=1e-4)
    assert reported.item() == pytest.approx(1.25, rel=1e-5), "what is reported is the plain likelihood whatever beta is"


def test_bounds_do_not_close_while_small_variances_weigh_little(example):
    """The pull on the bounds keeps its proportion to that of the likelihood, which beta-NLL makes small."""
    example.losses(*two_rows(), beta_nll=1.0)[0].sum().backward()

    expected = 0.01 * torch.tensor([[VARIANCE]])
    torch.testing.assert_close(example.max_logvar.grad, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(example.min_logvar.grad, -expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients_treat_the_weights_of_beta_nll_as_constants(example, beta):
    example.losses(*two_rows(), beta_nll=beta)[0].sum().backward()

    expected = []
    for dim in range(2):  # d/d mu of one term: var^beta * 2 (mu - y) / var, mean over 4 terms
        errors = [MEAN[dim] - row[dim] for row in TARGETS]
        expected.append(VARIANCE[dim] ** beta * sum(2 * error / VARIANCE[dim] for error in errors) / 4)
    for dim in range(2):  # d/d logvar of one term: var^beta * (1 - error^2 / var)
        ratios = [row[dim] / VARIANCE[dim] for row in SQUARED_ERRORS]
        expected.append(VARIANCE[dim] ** beta * sum(1 - ratio for ratio in ratios) / 4)
    torch.testing.assert_close(example.dynamics.biases[0].grad.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_beta_of_one_gives_the_mean_the_gradient_of_squared_error(example):
    example.losses(*two_rows(), beta_nll=1.0)[0].sum().backward()

    # 2 * (mu - y) summed over rows, over 4 terms: (1-3 + 0, 0 - 1) / 2
    torch.testing.assert_close(example.dynamics.biases[0].grad.flatten()[:2], torch.tensor([-1.0, -0.5]))


@pytest.mark.parametrize(
    ("decay", "progress", "beta_then"),
    [(0.0, 0.9, 0.8), (0.5, 0.0, 0.8), (0.5, 0.25, 0.4), (0.5, 0.5, 0.0), (0.5, 0.9, 0.0), (1.0, 0.75, 0.2)],
)
def test_beta_falls_linearly_to_the_plain_likelihood_over_its_share_of_training(example, decay, progress, beta_then):
    objective, reported = example.losses(*two_rows(), progress, beta_nll=0.8, beta_nll_decay=decay)
    constant, _ = example.losses(*two_rows(), beta_nll=beta_then)

    assert objective.item() == pytest.approx(constant.item(), rel=1e-5)
    assert reported.item() == pytest.approx(1.25, rel=1e-5)


def test_training_tells_the_loss_how_far_it_is_and_its_settings(linear_system, monkeypatch, train):
    """Of 2 epochs of 2 steps, of 60 and 40 of 100 rows, the steps begin at 0, 0.3, 0.5 and 0.8 of training."""
    seen, losses = [], ProbabilisticEnsemble.losses

    def watched(self, inputs, targets, progress=0.0, *, beta_nll=0.0, beta_nll_decay=0.0):
        seen.append((progress, beta_nll, beta_nll_decay))
        return losses(self, inputs, targets, progress, beta_nll=beta_nll, beta_nll_decay=beta_nll_decay)

    monkeypatch.setattr(ProbabilisticEnsemble, "losses", watched)
    settings = {"beta_nll": 0.5, "beta_nll_decay": 0.75, "hidden_size": (), "fit_epochs": 2, "batch_size": 60}

    train(LearnConfig(probabilistic=True, ensemble_size=2, **settings), linear_system(100))

    assert [progress for progress, *_ in seen] == pytest.approx([0, 0.3, 0.5, 0.8])
    assert {tuple(settings) for _, *settings in seen} == {(0.5, 0.75)}


def test_losses_are_of_each_member_alone(constant_member):
    variances = ([1.0, 1.0], [4.0, 4.0])
    members = [constant_member(ProbabilisticModel, [0.0, 0.0], variance) for variance in variances]

    _, reported = DynamicsEnsemble.from_members(members).losses(torch.zeros(2, 1, 3), torch.full((2, 1, 2), 2.0))

    assert reported.tolist() == pytest.approx([4.0, 1 + math.log(4)], rel=1e-5)


# --- Likelihood, draws, and what variances say ---


def test_likelihood_is_that_of_the_normal_distribution(random_member):
    truth, mean = torch.linspace(-4, 4, 9, dtype=torch.float64), torch.full((9,), 0.5, dtype=torch.float64)
    log_variance = torch.linspace(-2, 2, 9, dtype=torch.float64)

    ensemble = random_member(ProbabilisticModel).network
    expected = -torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(truth)

    torch.testing.assert_close(ensemble.nll(truth, mean, log_variance), expected)
    terms = ensemble.score_terms(truth, mean, log_variance)
    torch.testing.assert_close(terms, {"mse": (truth - mean) ** 2, "nll": expected})


def test_draws_have_the_moments_given_and_come_from_the_generator_given(random_member):
    ensemble, mean = random_member(ProbabilisticModel).network, torch.tensor([3.0, -1.0]).expand(40_000, 2)
    variance = torch.tensor([4.0, 0.01]).expand(40_000, 2)

    drawn, again = (ensemble.draw(mean, variance, torch.Generator().manual_seed(0)) for _ in range(2))

    assert torch.equal(drawn, again)
    assert ((drawn - mean).mean(dim=0).abs() < 5 * (variance[0] / 40_000).sqrt()).all()
    assert ((drawn.var(dim=0) / variance[0] - 1).abs() < 5 * math.sqrt(2 / 40_000)).all()


@pytest.mark.parametrize(("members", "wanted", "each"), [(1, 5, 5), (3, 6, 2), (3, 7, 3), (7, 1, 1)])
def test_members_draw_evenly_at_least_as_many_as_wanted(random_member, members, wanted, each):
    ensemble = DynamicsEnsemble.from_members([random_member(ProbabilisticModel)] * members)
    assert ensemble.draws_per_member(wanted) == each


def test_a_distribution_needs_no_completion(random_member):
    def residuals():
        raise AssertionError("nobody should have measured them")

    assert random_member(ProbabilisticModel).network.completion(residuals) == 0


def test_shares_of_variances_at_the_bounds_by_hand(constant_member):
    """Two members of one dimension, with bounds 1 and -2, and 0 and -3: a tenth of a nat counts as being there."""
    members = [constant_member(ProbabilisticModel, [0.0]) for _ in range(2)]
    for member, upper, lower in zip(members, (1.0, 0.0), (-2.0, -3.0), strict=True):
        with torch.no_grad():
            member.network.max_logvar.fill_(upper)
            member.network.min_logvar.fill_(lower)
    log_variance = torch.tensor([[0.95, 0.85, -1.95, 0.0], [-0.05, -0.5, -2.0, -2.95]], dtype=torch.float64)

    shares = DynamicsEnsemble.from_members(members).share_at_bounds(log_variance.exp().unsqueeze(-1))

    assert shares["at_max"].tolist() == [2 / 8]
    assert shares["at_min"].tolist() == [2 / 8]


# --- Kinds whose mean the likelihood has no say in ---


@pytest.fixture(params=[FaithfulModel, PosthocModel], ids=["faithful", "posthoc"])
def apart(request, random_member):
    """A member of each such kind as an ensemble that can learn, with some rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 20, 5, generator=generator), torch.randn(1, 20, 3, generator=generator)
    return random_member(request.param).network.requires_grad_(True), *rows


def gradients(ensemble, objective):
    """Gradients of an objective by parameter, zeros where there are none."""
    names, parameters = zip(*ensemble.named_parameters(), strict=True)
    found = torch.autograd.grad(objective.sum(), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("huber_width", [None, 0.1])
def test_gradients_of_the_mean_are_those_of_a_deterministic_member(apart, huber_width, random_member):
    ensemble, *rows = apart
    point = random_member(DeterministicModel).network.requires_grad_(True)

    found = gradients(ensemble, ensemble.losses(*rows, huber_width=huber_width)[0])

    expected = gradients(point, point.losses(*rows, huber_width=huber_width)[0])
    assert {name for name in found if name.startswith("dynamics.")} == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(point.get_parameter(name), ensemble.get_parameter(name)), "both start alike"
        assert torch.equal(found[name], gradient) and gradient.any(), name


def test_variance_learns_from_the_likelihood_of_residuals_that_stand_still(apart):
    ensemble, inputs, targets = apart
    learn = ensemble.losses if isinstance(ensemble, FaithfulEnsemble) else ensemble.holdout_losses

    objective, reported = learn(inputs, targets)

    mean, log_variance = ensemble.predict_change(inputs)
    likelihood = ((mean.detach() - targets).square() / log_variance.exp() + log_variance).mean()
    assert reported.item() == pytest.approx(likelihood.item(), rel=1e-5) and not reported.requires_grad
    bounds = 0.01 * (ensemble.max_logvar - ensemble.min_logvar).sum()
    found, expected = gradients(ensemble, objective), gradients(ensemble, likelihood + bounds)
    for name in found:
        if not name.startswith("dynamics."):
            torch.testing.assert_close(found[name], expected[name])
            assert found[name].any(), name


def test_second_phase_is_none_of_the_means_business(random_member):
    ensemble = random_member(PosthocModel).network.requires_grad_(True)
    rows = torch.randn(1, 20, 5), torch.randn(1, 20, 3)

    second, first = (gradients(ensemble, losses(*rows)[0]) for losses in (ensemble.holdout_losses, ensemble.losses))

    for name in second:
        assert second[name].any() != first[name].any() == name.startswith("dynamics."), name


def test_predicted_variance_is_differentiable_by_states_and_actions(apart):
    """Only training stops gradients: planners follow them through the variance, too."""
    ensemble, inputs, _ = apart
    (gradient,) = torch.autograd.grad(ensemble.predict_change(inputs.requires_grad_(True))[1].sum(), inputs)
    assert (gradient != 0).all()


@pytest.mark.parametrize("hidden_size", [(), (8, 6)], ids=str)
def test_variance_has_a_head_or_a_network_of_its_own(hidden_size, random_member):
    faithful, posthoc = (random_member(kind, hidden_size=hidden_size).network for kind in (FaithfulModel, PosthocModel))

    widths = [5, *hidden_size]
    assert [tuple(weight.shape[1:]) for weight in faithful.variance.weights] == [(widths[-1], 3)]
    assert [weight.shape for weight in posthoc.variance.weights] == [
        weight.shape for weight in posthoc.dynamics.weights
    ]
    head = random_member(ProbabilisticModel, hidden_size=hidden_size).network.dynamics.weights[-1][..., 3:]
    assert torch.equal(faithful.variance.weights[0], head), "it starts as the second head of a probabilistic member"


# --- The kind ---


def test_names_that_files_and_trackers_use():
    assert (FaithfulEnsemble.loss_name, PosthocEnsemble.loss_name) == ("gauss_loss", "mse_loss")
    assert ProbabilisticEnsemble.kind == "probabilistic"
    assert ProbabilisticEnsemble.loss_name == "gauss_loss"
    assert ProbabilisticModel.__module__ == "probabilistic_model", "pickles name it; planners have it on their path"
