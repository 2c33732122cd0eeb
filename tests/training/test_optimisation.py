"""optimisation: schedules, orders, clipping, decay and best weights, with the expected numbers worked out here."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from config import LearnConfig
from dynamics_model import DynamicsEnsemble
from probabilistic_model import ProbabilisticModel
from training import hardware
from training.batches import draw_bootstrap, draw_order
from training.best_weights import BestWeights
from training.hardware import product_precision, reduced_epochs
from training.optimisation import build_optimizer, clip_gradients, learning_rate

# --- Precision of products ---

NEEDS_PRECISIONS = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch rounds no products on CPUs"
)


def precisions(config: LearnConfig, is_cuda: bool = False) -> list[str]:
    """What PyTorch may round the operands of matrix products to in each epoch."""
    backend, found = torch.backends.cuda.matmul if is_cuda else torch.backends.mkldnn.matmul, []
    for epoch in range(config.fit_epochs):
        with product_precision(config, epoch, is_cuda):
            found.append(backend.fp32_precision)
    return found


@NEEDS_PRECISIONS
@pytest.mark.parametrize(("share", "epochs"), [(0, 0), (0.4, 2), (0.8, 4), (1, 5)])
def test_products_round_in_the_first_share_of_the_epochs(share, epochs, monkeypatch):
    monkeypatch.setattr(hardware, "MULTIPLIES_BFLOAT16", True)
    config = LearnConfig(fit_epochs=5, reduced_precision=share)

    assert precisions(config) == ["bf16"] * epochs + ["ieee"] * (5 - epochs)
    assert reduced_epochs(config, is_cuda=False) == epochs


@NEEDS_PRECISIONS
def test_products_round_only_where_the_processor_has_instructions_for_it(monkeypatch):
    monkeypatch.setattr(hardware, "MULTIPLIES_BFLOAT16", False)
    config = LearnConfig(fit_epochs=2, reduced_precision=1)

    assert precisions(config) == ["ieee"] * 2
    for capability, expected in (((7, 5), "ieee"), ((8, 0), "tf32"), ((12, 0), "tf32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert precisions(config, is_cuda=True) == [expected] * 2


@NEEDS_PRECISIONS
@pytest.mark.parametrize(("before", "epoch"), [("highest", 0), ("medium", 39)])
def test_precision_is_as_before_when_an_epoch_fails(before, epoch, monkeypatch):
    monkeypatch.setattr(hardware, "MULTIPLIES_BFLOAT16", True)
    torch.set_float32_matmul_precision(before)
    outside = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with pytest.raises(KeyboardInterrupt), product_precision(LearnConfig(fit_epochs=40), epoch, is_cuda=False):
            assert torch.backends.mkldnn.matmul.fp32_precision != outside
            raise KeyboardInterrupt
        assert torch.backends.mkldnn.matmul.fp32_precision == outside
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_pytorch_without_the_setting_trains_in_its_own_precision(monkeypatch):
    monkeypatch.setattr(hardware, "_CPU_PRODUCTS", None)
    monkeypatch.setattr(hardware, "MULTIPLIES_BFLOAT16", False)
    before = torch.get_float32_matmul_precision()
    with product_precision(LearnConfig(reduced_precision=1), 0, is_cuda=False):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not hardware.MULTIPLIES_BFLOAT16, reason="this processor has no instructions for bfloat16")
def test_rounded_products_are_near_but_not_equal():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 64, 64, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    with product_precision(LearnConfig(reduced_precision=1), 0, is_cuda=False):
        rounded = left @ right

    error = (rounded - exact).std() / exact.std()
    assert 1e-4 < error < 1e-2
    torch.testing.assert_close((left @ right).double(), exact, rtol=1e-4, atol=1e-4)


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


# --- Order and bootstrap ---


def test_order_is_a_permutation_for_each_member_and_epoch():
    first, second = draw_order(0, 3, 50, epoch=0), draw_order(0, 3, 50, epoch=1)

    for order in (*first, *second):
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in (*first, *second)}) == 6, "no two members or epochs share an order"


@pytest.mark.parametrize(
    "draw", [draw_bootstrap, lambda *sizes: draw_order(*sizes, epoch=4)], ids=["bootstrap", "order"]
)
def test_draws_depend_on_the_seed_and_not_on_the_number_of_members(draw):
    seven = draw(5, 7, 40)

    assert torch.equal(seven, draw(5, 7, 40))
    assert torch.equal(seven[:2], draw(5, 2, 40))
    assert not torch.equal(seven, draw(6, 7, 40))


def test_bootstrap_draws_as_many_rows_with_replacement_for_each_member():
    drawn = draw_bootstrap(0, 3, 10_000)

    assert drawn.shape == (3, 10_000)
    assert drawn.min() >= 0 and drawn.max() < 10_000
    assert not torch.equal(drawn[0], drawn[1])
    for rows in drawn:  # a row is missed with probability (1 - 1/n)^n = 1/e; standard deviation of the share: 0.003
        assert len(rows.unique()) / 10_000 == pytest.approx(1 - math.exp(-1), abs=0.015)


def test_bootstrap_is_not_the_order():
    assert not torch.equal(draw_bootstrap(0, 1, 50), draw_order(0, 1, 50, epoch=0))


# --- Clipping ---


def parameter_with_gradient(values):
    parameter = torch.nn.Parameter(torch.zeros(torch.tensor(values).shape))
    parameter.grad = torch.tensor(values)
    return parameter


def test_gradients_are_clipped_for_each_member_over_all_of_its_parameters():
    # Member 0 has (3, 0) and 4: norm 5, cut to 1. Member 1 has (0.3, 0) and 0.4: norm 0.5, left alone.
    weight = parameter_with_gradient([[[3.0, 0.0]], [[0.3, 0.0]]])
    bias = parameter_with_gradient([[[4.0]], [[0.4]]])

    clip_gradients([weight, bias], max_norm=1.0)

    torch.testing.assert_close(weight.grad, torch.tensor([[[0.6, 0.0]], [[0.3, 0.0]]]))
    torch.testing.assert_close(bias.grad, torch.tensor([[[0.8]], [[0.4]]]))


def test_clipping_one_member_agrees_with_pytorch():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(1, size, 3)) for size in (4, 2, 1)]
    references = [torch.nn.Parameter(torch.zeros(1, size, 3)) for size in (4, 2, 1)]
    for parameter, reference in zip(parameters, references, strict=True):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        reference.grad = parameter.grad.clone()

    clip_gradients(iter(parameters), max_norm=0.7)
    torch.nn.utils.clip_grad_norm_(references, 0.7)

    for parameter, reference in zip(parameters, references, strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


def test_member_whose_gradient_is_not_finite_leaves_the_others_alone():
    weight = parameter_with_gradient([[[math.nan]], [[math.inf]], [[0.5]], [[2.0]]])

    clip_gradients([weight], max_norm=1.0)

    torch.testing.assert_close(weight.grad[2:], torch.tensor([[[0.5]], [[1.0]]]))


def test_no_gradient_is_no_division_by_zero():
    weight = parameter_with_gradient([[[0.0]]])
    clip_gradients([weight], max_norm=1.0)
    assert weight.grad.item() == 0


# --- Optimiser and weight decay ---


@pytest.fixture
def network(random_member):
    """Three probabilistic members with layer normalisation and reward: every kind of parameter there is."""
    members = [random_member(ProbabilisticModel, member, reward=True, layer_norm=True) for member in range(3)]
    network = DynamicsEnsemble(members).network
    network.requires_grad_(True)
    return network


def step_without_gradient(network, **settings):
    """Takes one step on gradients of zero; returns parameters before and after by name."""
    config = LearnConfig(hidden_size=(8, 6), fit_lr=0.1, **settings)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = build_optimizer(network, config)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return before, dict(network.named_parameters())


def test_decoupled_decay_shrinks_each_layers_weights_by_rate_times_its_decay(network):
    before, after = step_without_gradient(network, weight_decay=(0.1, 0.2, 0.5))

    for layer, decay in enumerate((0.1, 0.2, 0.5)):
        name = f"dynamics.weights.{layer}"
        torch.testing.assert_close(after[name].detach(), before[name] * (1 - 0.1 * decay))


def test_coupled_decay_is_the_gradient_of_half_the_decay_times_the_squared_weights(network):
    weights = [weight.detach().clone() for weight in network.dynamics.weights]

    step_without_gradient(network, weight_decay=(0.1, 0.2, 0.5), weight_decay_mode="coupled")

    for weight, decayed, decay in zip(weights, network.dynamics.weights, (0.1, 0.2, 0.5), strict=True):
        reference = torch.nn.Parameter(weight)
        plain_adam = torch.optim.Adam([reference], lr=0.1)
        (0.5 * decay * reference.square().sum()).backward()
        plain_adam.step()
        torch.testing.assert_close(decayed, reference)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_only_weights_of_the_dynamics_layers_decay(network, mode):
    before, after = step_without_gradient(network, weight_decay=0.5, weight_decay_mode=mode)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"dynamics.weights.{layer}" for layer in range(3)}
    assert {"max_logvar", "dynamics.gains.0", "reward.weights.0"} <= set(before), "the fixture has what must not decay"


def test_every_parameter_is_optimised_once(network):
    optimizer = build_optimizer(network, LearnConfig(hidden_size=(8, 6)))
    optimised = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(id(parameter) for parameter in network.parameters())


# --- Best weights ---


@pytest.fixture
def pair(constant_member):
    """A network of two members whose outputs, and so their one bias, can be set."""
    return DynamicsEnsemble([constant_member(ProbabilisticModel, [0.0])] * 2).network


def set_biases(network, *values):
    with torch.no_grad():
        for member, value in enumerate(values):
            network.dynamics.biases[0][member, 0, 0] = value


def biases(network):
    return network.dynamics.biases[0][:, 0, 0].tolist()


def run_epochs(best, network, scores):
    """Gives epoch e, counted from 1, the biases (e, -e) and the scores given for it."""
    for epoch, of_members in enumerate(scores, start=1):
        set_biases(network, epoch, -epoch)
        best.update(network, of_members)


def test_each_member_gets_the_weights_of_its_own_best_epoch(pair):
    best = BestWeights(pair, patience=None)
    run_epochs(best, pair, [(3.0, 1.0), (2.0, 2.0), (2.5, 0.5), (2.0, 4.0)])
    best.restore(pair)

    assert biases(pair) == [2, -3], "a tie, in epoch 4, is no improvement"
    assert best.scores == [2.0, 0.5]
    assert best.epochs_since_best == [2, 1]
    assert best.stopped == [False, False]


def test_member_stops_when_its_patience_ends_and_no_sooner(pair):
    best = BestWeights(pair, patience=2)
    stopped = []
    for scores in [(1.0, 1.0), (2.0, 0.9), (2.0, 0.8), (2.0, 0.9)]:
        best.update(pair, scores)
        stopped.append(best.stopped)

    assert stopped == [[False, False], [False, False], [True, False], [True, False]]


def test_stopped_member_keeps_its_weights_though_a_later_epoch_is_better(pair):
    best = BestWeights(pair, patience=1)
    run_epochs(best, pair, [(1.0, 1.0), (2.0, 0.9), (0.1, 0.8), (0.01, 0.7)])
    best.restore(pair)

    assert biases(pair) == [1, -4]
    assert best.scores == [1.0, 0.7]
    assert best.stopped == [True, False]


def test_nan_never_improves(pair):
    best = BestWeights(pair, patience=None)
    run_epochs(best, pair, [(math.nan, 1.0), (3.0, math.nan), (math.nan, math.nan)])
    best.restore(pair)

    assert biases(pair) == [2, -1]
    assert best.scores == [3.0, 1.0]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_member_without_a_finite_error_has_diverged_and_is_named(pair, score):
    best = BestWeights(pair, patience=None)
    run_epochs(best, pair, [(1.0, score), (0.5, score)])

    with pytest.raises(FloatingPointError, match=r"member 1 diverged.*lower fit_lr or set grad_clip"):
        best.restore(pair)


def test_kept_weights_are_copies(pair):
    set_biases(pair, 1, 2)
    best = BestWeights(pair, patience=None)
    best.update(pair, (1.0, 1.0))
    set_biases(pair, 5, 6)
    best.restore(pair)
    assert biases(pair) == [1, 2]

    set_biases(pair, 9, 9)
    best.restore(pair)
    assert biases(pair) == [1, 2], "restoring does not hand the copies out"


def test_going_on_from_a_saved_state_ends_like_never_having_stopped(pair, tmp_path):
    scores = [(3.0, 3.0), (2.0, 4.0), (2.5, 2.5), (1.0, 1.0)]
    whole = BestWeights(pair, patience=1)
    run_epochs(whole, pair, scores)

    first = BestWeights(pair, patience=1)
    run_epochs(first, pair, scores[:2])
    torch.save(first.state_dict(), tmp_path / "checkpoint")
    second = BestWeights(pair, patience=1)
    second.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    for epoch, of_members in enumerate(scores[2:], start=3):
        set_biases(pair, epoch, -epoch)
        second.update(pair, of_members)

    assert dataclasses.astuple(snapshot(second, pair)) == dataclasses.astuple(snapshot(whole, pair))
    assert biases(pair) == [2, -1]


@dataclasses.dataclass
class Snapshot:
    scores: list
    epochs_since_best: list
    biases: list


def snapshot(best, network):
    best.restore(network)
    return Snapshot(best.scores, best.epochs_since_best, biases(network))
