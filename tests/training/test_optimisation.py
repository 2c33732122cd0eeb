"""optimisation: schedules, clipping and decay, with the expected numbers worked out here."""

import math

import numpy as np
import pytest
import torch

import dynamics_model
from config import LearnConfig
from deterministic_model import DeterministicEnsemble
from dynamics_model import Architecture, DynamicsEnsemble
from probabilistic_model import ProbabilisticModel
from training.optimisation import build_optimizer, clip_gradients, learning_rate

# --- Learning rate ---


@pytest.mark.parametrize("epoch", [0, 0.5, 9.99])
def test_rate_is_constant_without_a_scheduler(epoch):
    assert learning_rate(LearnConfig(fit_lr=3e-3, scheduler=None, fit_epochs=10), epoch) == 3e-3


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (0.9, 1), (1, 0.5), (1.5, 0.5), (2, 0.25), (9.9, 0.5**9)])
def test_exponential_applies_its_factor_after_each_epoch(epoch, share):
    config = LearnConfig(fit_lr=8.0, scheduler="exponential", scheduler_gamma=0.5, fit_epochs=10)
    assert learning_rate(config, epoch) == pytest.approx(8 * share)


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (1.9, 1), (2, 0.1), (4.9, 0.1), (5, 0.01), (9, 0.01)])
def test_multistep_applies_its_factor_after_each_milestone(epoch, share):
    milestones = {"scheduler_milestones": (2, 5), "scheduler_gamma": 0.1}
    config = LearnConfig(fit_lr=4.0, scheduler="multistep", fit_epochs=10, **milestones)
    assert learning_rate(config, epoch) == pytest.approx(4 * share)


@pytest.mark.parametrize(
    ("epoch", "share"), [(0, 1), (2.5, (1 + math.sqrt(0.5)) / 2), (5, 0.5), (7.5, (1 - math.sqrt(0.5)) / 2), (10, 0)]
)
def test_cosine_falls_from_the_rate_to_zero_at_the_end(epoch, share):
    config = LearnConfig(fit_lr=2.0, scheduler="cosine", fit_epochs=10)
    assert learning_rate(config, epoch) == pytest.approx(2 * share)


@pytest.mark.parametrize(
    ("epoch", "share"),
    [
        (0, 1 / 25),  # the start
        (1, (1 + 1 / 25) / 2),  # half of the climb: half-way between start and peak
        (2, 1),  # a fifth of 10 epochs
        (6, 0.5),  # half of the descent
        (10, 0),
    ],
)
def test_onecycle_climbs_from_a_25th_to_the_rate_and_ends_at_zero(epoch, share):
    config = LearnConfig(fit_lr=2.0, scheduler="onecycle", warmup_fraction=0.2, fit_epochs=10)
    assert learning_rate(config, epoch) == pytest.approx(2 * share)


@pytest.mark.parametrize(("warmup", "shares"), [(0.0, (1, 0.5, 0)), (1.0, (1 / 25, 0.52, 0))])
def test_onecycle_with_no_warmup_or_nothing_else(warmup, shares):
    config = LearnConfig(fit_lr=1.0, scheduler="onecycle", warmup_fraction=warmup, fit_epochs=4)
    assert [learning_rate(config, epoch) for epoch in (0, 2, 4)] == pytest.approx(shares)


@pytest.mark.parametrize("scheduler", [None, "exponential", "multistep", "cosine", "onecycle"])
def test_rate_is_never_negative_nor_above_the_setting(scheduler):
    config = LearnConfig(fit_lr=1e-3, scheduler=scheduler, scheduler_milestones=(3,), fit_epochs=7)
    rates = [learning_rate(config, epoch) for epoch in np.linspace(0, 7, 1000, endpoint=False)]
    assert min(rates) > 0
    assert max(rates) <= 1e-3 * (1 + 1e-12)


# --- Clipping ---


@pytest.fixture
def ensemble(random_member):
    """Three probabilistic members with layer normalisation and reward: every kind of parameter there is."""
    members = [random_member(ProbabilisticModel, member, reward=True, layer_norm=True) for member in range(3)]
    return DynamicsEnsemble.from_members(members).requires_grad_(True)


@pytest.fixture
def with_gradients(unit_normalisation):
    """Returns a function that builds linear members of one state and action, and gives each the gradients named."""

    def build(weight, bias, reward_weight=None, reward_bias=None):
        sizes = Architecture(1, 1, hidden_size=(), reward_hidden_size=None if reward_weight is None else ())
        ensemble = DeterministicEnsemble(sizes, unit_normalisation(1, 1), len(weight))
        given = [weight, bias] if reward_weight is None else [weight, bias, reward_weight, reward_bias]
        for parameter, gradient in zip(ensemble.parameters(), given, strict=True):
            parameter.grad = torch.tensor(gradient).view(parameter.shape)
        return ensemble

    return build


def gradients(network):
    """The gradients of a network's weights and biases, one list per member."""
    return torch.cat([network.weights[0].grad.flatten(1), network.biases[0].grad.flatten(1)], dim=1).tolist()


def test_gradients_are_clipped_for_each_member_over_all_of_its_parameters(with_gradients):
    # Member 0 has (3, 0) and 4: norm 5, cut to 1. Member 1 has (0.3, 0) and 0.4: norm 0.5, left alone.
    ensemble = with_gradients([[3.0, 0.0], [0.3, 0.0]], [4.0, 0.4])

    clip_gradients(ensemble, max_norm=1.0)

    assert gradients(ensemble.dynamics) == [pytest.approx([0.6, 0, 0.8]), pytest.approx([0.3, 0, 0.4])]


def test_dynamics_and_reward_are_clipped_apart(with_gradients):
    # Dynamics: norms 5 and 0.5; reward: (0, 6, 0) and 8, norm 10, and 0.5 again.
    reward = [[0.0, 6.0, 0.0], [0.0, 0.3, 0.0]], [8.0, 0.4]
    ensemble = with_gradients([[3.0, 0.0], [0.3, 0.0]], [4.0, 0.4], *reward)

    clip_gradients(ensemble, max_norm=1.0)

    assert gradients(ensemble.dynamics) == [pytest.approx([0.6, 0, 0.8]), pytest.approx([0.3, 0, 0.4])]
    assert gradients(ensemble.reward) == [pytest.approx([0, 0.6, 0, 0.8]), pytest.approx([0, 0.3, 0, 0.4])]


@pytest.mark.parametrize("kind", ["faithful", "posthoc"])
def test_networks_that_a_kind_names_are_clipped_apart_and_parameters_without_gradients_left_out(kind, random_member):
    ensemble = random_member(dynamics_model.member_class(kind), reward=True).network
    for parameter in (*ensemble.dynamics.parameters(), *ensemble.variance.parameters(), ensemble.max_logvar):
        parameter.grad = torch.ones_like(parameter)

    clip_gradients(ensemble, max_norm=0.5)

    of_variance = [*ensemble.variance.parameters(), ensemble.max_logvar]
    for part in (list(ensemble.dynamics.parameters()), of_variance):
        norm = sum(parameter.numel() for parameter in part) ** 0.5
        for parameter in part:
            torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 0.5 / norm))
    assert ensemble.min_logvar.grad is None and ensemble.reward.weights[0].grad is None


def test_every_parameter_of_a_kind_is_clipped_with_the_dynamics(ensemble):
    sizes = {}
    for name, parameter in ensemble.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        is_reward = name.startswith("reward.")
        sizes[is_reward] = sizes.get(is_reward, 0) + parameter[0].numel()

    clip_gradients(ensemble, max_norm=0.5)

    for name, parameter in ensemble.named_parameters():
        norm = sizes[name.startswith("reward.")] ** 0.5
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 0.5 / norm))
    assert {"max_logvar", "dynamics.gains.0"} <= dict(ensemble.named_parameters()).keys()


def test_clipping_one_member_agrees_with_pytorch(random_member):
    ours, reference = (random_member(ProbabilisticModel).network for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for parameter, other in zip(ours.parameters(), reference.parameters(), strict=True):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        other.grad = parameter.grad.clone()

    clip_gradients(ours, max_norm=0.7)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.7)

    for parameter, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_member_whose_gradient_is_not_finite_leaves_the_others_alone(with_gradients):
    ensemble = with_gradients([[math.nan, 0.0], [math.inf, 0.0], [0.5, 0.0], [2.0, 0.0]], [0.0] * 4)

    clip_gradients(ensemble, max_norm=1.0)

    assert gradients(ensemble.dynamics)[2:] == [pytest.approx([0.5, 0, 0]), pytest.approx([1, 0, 0])]


def test_no_gradient_is_no_division_by_zero(with_gradients):
    ensemble = with_gradients([[0.0, 0.0]], [0.0])
    clip_gradients(ensemble, max_norm=1.0)
    assert gradients(ensemble.dynamics) == [[0, 0, 0]]


# --- Optimiser and weight decay ---


def step_without_gradient(ensemble, **settings):
    """Takes one step on gradients of zero; returns parameters before and after by name."""
    config = LearnConfig(hidden_size=(8, 6), fit_lr=0.1, **settings)
    before = {name: parameter.detach().clone() for name, parameter in ensemble.named_parameters()}
    optimizer = build_optimizer(ensemble, config)
    for parameter in ensemble.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return before, dict(ensemble.named_parameters())


def test_decoupled_decay_shrinks_each_layers_weights_by_rate_times_its_decay(ensemble):
    before, after = step_without_gradient(ensemble, weight_decay=(0.1, 0.2, 0.5))

    for layer, decay in enumerate((0.1, 0.2, 0.5)):
        name = f"dynamics.weights.{layer}"
        torch.testing.assert_close(after[name].detach(), before[name] * (1 - 0.1 * decay))


def test_coupled_decay_is_the_gradient_of_half_the_decay_times_the_squared_weights(ensemble):
    weights = [weight.detach().clone() for weight in ensemble.dynamics.weights]

    step_without_gradient(ensemble, weight_decay=(0.1, 0.2, 0.5), weight_decay_mode="coupled")

    for weight, decayed, decay in zip(weights, ensemble.dynamics.weights, (0.1, 0.2, 0.5), strict=True):
        reference = torch.nn.Parameter(weight)
        plain_adam = torch.optim.Adam([reference], lr=0.1)
        (0.5 * decay * reference.square().sum()).backward()
        plain_adam.step()
        torch.testing.assert_close(decayed, reference)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_only_weights_of_the_dynamics_layers_decay(ensemble, mode):
    before, after = step_without_gradient(ensemble, weight_decay=0.5, weight_decay_mode=mode)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"dynamics.weights.{layer}" for layer in range(3)}
    assert {"max_logvar", "dynamics.gains.0", "reward.weights.0"} <= set(before), "the fixture has what must not decay"


def test_every_parameter_is_optimised_once(ensemble):
    optimizer = build_optimizer(ensemble, LearnConfig(hidden_size=(8, 6)))
    optimised = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(id(parameter) for parameter in ensemble.parameters())
