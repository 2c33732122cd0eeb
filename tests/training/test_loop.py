"""loop: what is learned, from which draws, what an epoch says, and how training goes on from a checkpoint."""

import threading

import numpy as np
import pytest
import torch

import dynamics_model
from config import LearnConfig
from data.trajectories import Transitions
from deterministic_model import DeterministicModel
from dynamics_model import KINDS, random_stream
from probabilistic_model import PosthocModel, ProbabilisticModel
from training.batches import NormalisedRows, normalise_rows
from training.best_weights import BestWeights
from training.build import build_ensemble
from training.loop import train_ensemble
from training.scores import score_rows
from utils import InputError


@pytest.fixture(params=["deterministic", "probabilistic", "faithful"])
def member_class(request):
    """The members of each kind that needs no held-out rows in turn."""
    return dynamics_model.member_class(request.param)


def small_config(member_class, **settings):
    defaults = {"ensemble_size": 7, "hidden_size": (16, 16), "fit_epochs": 4, "batch_size": 64, "fit_lr": 1e-3}
    defaults["reduced_precision"] = 0  # so that trainings that differ in a last bit only stay as close as that
    return LearnConfig(**defaults | {"kind": member_class.ensemble_class.kind} | settings)


# --- What is learned ---


def test_linear_system_is_learned_to_near_zero_error(member_class, linear_system, train):
    transitions, holdout = linear_system(400), linear_system(200, seed=1)
    settings = {"ensemble_size": 2, "hidden_size": (), "fit_epochs": 30, "batch_size": 20, "fit_lr": 0.05}
    config = small_config(member_class, **settings)
    untrained = build_ensemble(config, transitions)

    ensemble, _ = train(config, transitions)

    held_out = normalise_rows(ensemble, holdout)
    assert min(score_rows(untrained, held_out)["mse"]) > 0.1
    assert max(score_rows(ensemble, held_out)["mse"]) < 1e-8
    for member in ensemble.members():  # in raw units too, dimension by dimension
        error = np.abs(member.predict(holdout.states, holdout.actions) - holdout.next_states).mean(axis=0)
        assert (error < 1e-3 * np.abs(holdout.next_states - holdout.states).mean(axis=0)).all()


def test_deep_networks_learn_it_too_and_the_reward(member_class, linear_system, train):
    transitions, holdout = linear_system(1000), linear_system(200, seed=1)
    settings = {"hidden_size": (32, 32), "ensemble_size": 2, "fit_epochs": 30, "learn_reward": True, "fit_lr": 0.01}
    config = small_config(member_class, batch_size=32, reward_hidden_size=(32,), **settings)

    ensemble, _ = train(config, transitions, holdout)

    score = score_rows(ensemble, normalise_rows(ensemble, holdout))
    assert max(score["mse"]) < 0.01
    assert max(score["reward_mse"]) < 0.02
    for member in ensemble.members():
        predicted = member.predict_reward(holdout.states, holdout.actions, holdout.next_states)
        assert np.abs(predicted - holdout.rewards).mean() < 0.25 < np.abs(holdout.rewards).mean()


# --- Members and seeds ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_clip": 0.5, "bootstrap": True, "layer_norm": True, "weight_decay": 0.01, "learn_reward": True},
        {"patience": 1, "fit_lr": 0.02},  # with a holdout: best weights of each member
    ],
    ids=["plain", "clipped_bootstrapped", "selected"],
)
def test_member_trained_in_a_stack_of_seven_equals_the_same_trained_alone(
    member_class, settings, linear_system, monkeypatch, train
):
    transitions = linear_system(200, noise=0.3)
    holdout = linear_system(50, noise=0.3, seed=1) if "patience" in settings else None
    stacked = train(small_config(member_class, **settings), transitions, holdout)[0].members()

    for index in (0, 5):

        def shifted(seed, member, purpose, epoch=0, index=index):
            return random_stream(seed, member + index, purpose, epoch)

        with monkeypatch.context() as patch:  # the only member of a stack of one draws as the one of that index would
            patch.setattr("training.build.random_stream", shifted)
            patch.setattr("training.batches.random_stream", shifted)
            one = small_config(member_class, ensemble_size=1, **settings)
            (alone,) = train(one, transitions, holdout)[0].members()
        for name, weight in alone.state_dict().items():
            torch.testing.assert_close(stacked[index].state_dict()[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    first, other = (member.network.dynamics.weights[0] for member in (stacked[0], stacked[5]))
    assert (first - other).abs().mean() > 0.05, "members are far apart compared with the tolerance"


def test_members_do_not_depend_on_how_many_there_are(member_class, linear_system, train):
    transitions = linear_system(200)
    settings = {"bootstrap": True, "grad_clip": 0.5}
    two = train(small_config(member_class, ensemble_size=2, **settings), transitions)[0].members()
    four = train(small_config(member_class, ensemble_size=4, **settings), transitions)[0].members()

    for fewer, more in zip(two, four[:2], strict=True):
        for name, weight in fewer.state_dict().items():
            torch.testing.assert_close(more.state_dict()[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_same_seed_gives_the_same_model_to_the_bit(member_class, linear_system, assert_same_weights, train):
    transitions = linear_system(200)
    config = small_config(member_class, bootstrap=True)
    torch.manual_seed(1)
    first, _ = train(config, transitions)
    torch.manual_seed(2)
    torch.rand(3)
    second, _ = train(config, transitions)

    assert_same_weights(first, second)


def test_another_seed_gives_another_model(member_class, linear_system, train):
    transitions = linear_system(100)
    first, second = (train(small_config(member_class, fit_epochs=1, seed=seed), transitions)[0] for seed in (0, 1))
    for ours, others in zip(first.dynamics.weights, second.dynamics.weights, strict=True):
        assert (ours != others).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("grad_clip", [None, 0.1])
def test_dynamics_are_the_same_with_and_without_a_reward(member_class, grad_clip, linear_system, train):
    transitions = linear_system(200)
    without, _ = train(small_config(member_class, grad_clip=grad_clip), transitions)
    with_reward, _ = train(small_config(member_class, grad_clip=grad_clip, learn_reward=True), transitions)

    names = without.state_dict().keys()
    assert {name.split(".")[0] for name in names} >= {"dynamics", "delta_scale"}
    for name in names:
        assert torch.equal(without.state_dict()[name], with_reward.state_dict()[name]), name


def test_a_step_is_that_of_the_optimiser_on_the_sum_of_the_members_objectives(member_class, linear_system, train):
    """One step of plain gradient descent on all rows is worked out here."""
    transitions = linear_system(50)
    config = small_config(member_class, fit_epochs=1, batch_size=50, fit_lr=0.1, scheduler=None, learn_reward=True)
    expected = build_ensemble(config, transitions).requires_grad_(True)
    rows = normalise_rows(expected, transitions).select(torch.arange(50).expand(7, 50))
    objective, _ = expected.losses(rows.inputs, rows.targets)
    (objective + expected.reward_loss(*rows)).sum().backward()

    def descend(ensemble, config):
        return torch.optim.SGD(ensemble.parameters(), lr=config.fit_lr)

    stepped, _ = train(config, transitions, optimizer=descend)

    for parameter, before in zip(stepped.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, before - 0.1 * before.grad, rtol=1e-4, atol=1e-6)


# --- Selection by validation error ---


def test_weights_kept_are_those_that_scored_best_for_each_member(linear_system, train):
    """A rate that ends far too high: later epochs are worse, and each member goes back to its own best one."""
    transitions, holdout = linear_system(100, noise=0.5), linear_system(50, noise=0.5, seed=1)
    config = small_config(DeterministicModel, fit_epochs=12, fit_lr=0.03, scheduler=None, batch_size=25)

    ensemble, epochs = train(config, transitions, holdout)

    scores = np.array([epoch.holdout_scores["mse"] for epoch in epochs])
    assert len(set(scores.argmin(axis=0))) > 1 and (scores.argmin(axis=0) < 11).any()
    kept = score_rows(ensemble, normalise_rows(ensemble, holdout))["mse"]
    np.testing.assert_allclose(kept, scores.min(axis=0), rtol=1e-6)


def test_training_ends_when_all_members_have_lost_patience(linear_system, train):
    # A rate this high spoils weights soon: the best validation error lies early.
    settings = {"ensemble_size": 3, "fit_epochs": 200, "patience": 2, "fit_lr": 0.3, "scheduler": None}
    transitions, holdout = linear_system(100, noise=0.5), linear_system(50, noise=0.5, seed=1)

    ensemble, epochs = train(small_config(DeterministicModel, **settings), transitions, holdout)

    assert 3 <= len(epochs) < 200
    assert epochs[-1].train_scores, "the last epoch is scored, wherever it comes"
    history = np.array([epoch.holdout_scores["mse"] for epoch in epochs])  # (epoch, member)
    kept = score_rows(ensemble, normalise_rows(ensemble, holdout))["mse"]
    for member, errors in enumerate(history.T):
        until = next(e for e in range(2, len(errors)) if min(errors[: e - 1]) <= min(errors[e - 1 : e + 1]))
        assert kept[member] == pytest.approx(min(errors[: until + 1]), rel=1e-6)


def test_training_of_which_no_member_had_a_finite_error_fails(linear_system, train):
    config = small_config(DeterministicModel, fit_lr=1e9, scheduler=None)
    with pytest.raises(FloatingPointError, match="every member diverged"):
        train(config, linear_system(100), linear_system(50))


# --- What an epoch says ---


def test_losses_are_means_over_the_epochs_rows_and_members_apart(linear_system, train):
    """At a rate of next to nothing every minibatch, the small last one too, scores the weights of the start."""
    transitions = linear_system(100)
    config = small_config(DeterministicModel, ensemble_size=3, fit_epochs=2, fit_lr=1e-12)

    _, epochs = train(config, transitions)

    untrained = build_ensemble(config, transitions)
    expected = score_rows(untrained, normalise_rows(untrained, transitions))["mse"]
    assert [epoch.index for epoch in epochs] == [0, 1]
    for epoch in epochs:
        assert epoch.losses == pytest.approx(expected, rel=1e-4)
        assert epoch.train_scores["mse"] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    ("score_every", "scored"), [(None, []), (1, [0, 1, 2, 3, 4]), (2, [0, 1, 3, 4]), (3, [0, 2, 4]), (50, [0, 4])]
)
def test_training_rows_are_scored_as_often_as_asked_and_held_out_ones_always(score_every, scored, linear_system, train):
    config = small_config(ProbabilisticModel, ensemble_size=2, fit_epochs=5)

    _, epochs = train(config, linear_system(70), linear_system(50, seed=1), score_every=score_every)

    assert [epoch.index for epoch in epochs if epoch.train_scores] == scored
    assert [len(epoch.holdout_scores["nll"]) for epoch in epochs] == [2] * 5


def test_scores_are_those_of_the_weights_at_the_epochs_end(member_class, linear_system):
    transitions, holdout = linear_system(100), linear_system(50, seed=1)
    config = small_config(member_class, ensemble_size=2, fit_epochs=3)
    ensemble = build_ensemble(config, transitions)
    rows, held_out = normalise_rows(ensemble, transitions), normalise_rows(ensemble, holdout)

    for epoch in train_ensemble(ensemble, config, rows, held_out, score_every=1):
        assert epoch.train_scores == score_rows(ensemble, rows)
        assert epoch.holdout_scores == score_rows(ensemble, held_out)


def test_no_holdout_is_no_score_of_one(linear_system, train):
    _, epochs = train(small_config(DeterministicModel, ensemble_size=2), linear_system(70))
    assert [epoch.holdout_scores for epoch in epochs] == [{}] * 4


# --- Whoever takes the epochs may stop ---


@pytest.fixture
def start_training(linear_system):
    """Returns a function that begins a training in two threads, each with members of its own: ensemble, rows, epochs.

    PyTorch has as many threads afterwards as before.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    config = small_config(DeterministicModel, fit_epochs=100, products="torch/apart/2")

    def start():
        transitions = linear_system(100)
        ensemble = build_ensemble(config, transitions)
        rows = normalise_rows(ensemble, transitions)
        return ensemble, rows, train_ensemble(ensemble, config, rows, rows)

    yield start
    torch.set_num_threads(before)


def member_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("members")]


def threads_of_products():
    """How many threads multiply, here and in a thread that starts now."""
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return [torch.get_num_threads(), *later]


def test_leaving_the_loop_ends_training_and_its_threads(start_training):
    ensemble, rows, epochs = start_training()
    assert member_threads() == [], "nothing begins before the first epoch is asked for"

    for epoch in epochs:
        assert len(member_threads()) == 2
        if epoch.index == 1:
            break
    epochs.close()

    assert member_threads() == []
    assert threads_of_products() == [2, 2]
    now = score_rows(ensemble, rows)["mse"]
    assert epoch.holdout_scores["mse"] == pytest.approx(now), "the weights are those of the epoch that was left"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_of_whoever_takes_the_epochs_ends_the_threads_at_once(start_training, error):
    with pytest.raises(error):  # the loop lets go of the generator where the error leaves it
        for _ in start_training()[-1]:
            raise error

    assert member_threads() == []
    assert threads_of_products() == [2, 2]


# --- Kinds whose mean is that of a deterministic ensemble ---


@pytest.fixture
def noisy_system():
    """Returns a function that draws rows whose change has noise of a deviation that is exp of the first state."""

    def draw(rows, seed=0):
        random = np.random.default_rng(seed)
        states, actions = random.uniform(-1, 1, size=(rows, 2)), random.normal(size=(rows, 1))
        change = 5 * np.sin(3 * states[:, :1]) + np.exp(states[:, :1]) * random.normal(size=(rows, 2))
        return Transitions(*(part.astype(np.float32) for part in (states, actions, states + change, states[:, 0])))

    return draw


@pytest.mark.parametrize("huber_width", [None, 0.1])
@pytest.mark.parametrize("kind", ["faithful", "posthoc"])
def test_means_are_those_of_a_deterministic_ensemble_to_the_last_bit(kind, huber_width, noisy_system, train):
    """Gradients are clipped, weights decay and the best ones are kept: the variance has a part in nothing of it."""
    transitions, holdout = noisy_system(300), noisy_system(100, seed=1)
    settings = {"ensemble_size": 2, "grad_clip": 0.05, "weight_decay": 0.1, "learn_reward": True, "layer_norm": True}
    kinds = [dynamics_model.member_class(name) for name in ("deterministic", kind)]
    configs = [small_config(each, huber_width=huber_width, **settings) for each in kinds]

    (point, points), (gaussian, gaussians) = (train(config, transitions, holdout) for config in configs)

    assert torch.equal(*(each.predict(holdout.states, holdout.actions)[0] for each in (point, gaussian)))
    assert [epoch.holdout_scores["mse"] for epoch in points] == [epoch.holdout_scores["mse"] for epoch in gaussians]
    for own, other in zip(point.dynamics.parameters(), gaussian.dynamics.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("kind", ["probabilistic", "faithful", "posthoc"])
def test_variances_learn_where_the_noise_is(kind, noisy_system, train):
    settings = {"ensemble_size": 2, "fit_epochs": 20, "fit_lr": 0.01}
    config = small_config(dynamics_model.member_class(kind), **settings)

    ensemble, _ = train(config, noisy_system(1000), noisy_system(400, seed=1))

    tested = noisy_system(1000, seed=2)
    _, variance = ensemble.predict(tested.states, tested.actions)
    log_deviation, true = variance.detach().log() / 2, torch.as_tensor(tested.states[:, 0])
    for values in log_deviation.movedim(-1, 1).flatten(0, 1):  # of each member and dimension
        assert torch.corrcoef(torch.stack([values, true]))[0, 1] > 0.8
        assert (values - true).mean().abs() < 0.2


def test_variances_end_with_the_weights_that_rows_apart_judged_best(noisy_system, train, monkeypatch):
    """Of 40 held-out rows, 32 are learned by heart at this rate, and the last 8 tell so."""
    judged = []

    class Watched(BestWeights):
        def update(self, ensemble, *scores):
            judged.append(scores[-1])
            super().update(ensemble, *scores)

    monkeypatch.setattr("training.loop.BestWeights", Watched)
    config = small_config(PosthocModel, ensemble_size=2, fit_epochs=60, fit_lr=0.02, scheduler=None, batch_size=8)
    holdout = noisy_system(40, seed=1)

    ensemble, epochs = train(config, noisy_system(200), holdout)

    rows = normalise_rows(ensemble, holdout)
    found = score_rows(ensemble, NormalisedRows(rows.inputs[32:], rows.targets[32:], None))["nll"]
    by_member = list(zip(*judged[len(epochs) :], strict=True))
    assert len(by_member[0]) == 60
    assert found == pytest.approx(list(map(min, by_member)), rel=1e-6)
    assert min(scores[-1] - min(scores) for scores in by_member) > 0.1, "the last epoch was no good one"


def test_a_second_phase_is_repeated_by_the_seed_and_leaves_mean_and_reward_alone(
    noisy_system, train, assert_same_weights
):
    config = small_config(PosthocModel, ensemble_size=3, learn_reward=True)
    rows = noisy_system(200), noisy_system(50, seed=1)
    (first, _), (same, _) = train(config, *rows), train(config, *rows)
    assert_same_weights(first, same)

    begun = build_ensemble(config, rows[0])
    train_rows, held_out = (normalise_rows(begun, each) for each in rows)
    for epoch in train_ensemble(begun, config, train_rows, held_out):
        best = [weights.clone() for weights in epoch.checkpoint()["best"]["weights"]]
    for (name, parameter), kept in zip(begun.named_parameters(), best, strict=True):
        is_variance = name.partition(".")[0] in ("variance", "max_logvar", "min_logvar")
        assert torch.equal(parameter, kept) != is_variance, name


def test_kind_that_needs_held_out_rows_says_so_before_it_trains(noisy_system, train):
    with pytest.raises(InputError, match="learns its variance from held-out rows, of which there are 0"):
        train(small_config(PosthocModel), noisy_system(50))


# --- Going on from a checkpoint ---


RESUMED = [(kind, holds_out) for kind in KINDS for holds_out in (False, True) if holds_out or kind != "posthoc"]


@pytest.mark.parametrize(("kind", "holds_out"), RESUMED)
def test_training_resumed_from_any_checkpoint_ends_in_the_same_bits(
    kind, holds_out, linear_system, tmp_path, train, assert_same_weights
):
    settings = {"bootstrap": True, "weight_decay": 1e-3, "grad_clip": 1, "learn_reward": True, "fit_lr": 0.02}
    config = small_config(dynamics_model.member_class(kind), ensemble_size=3, scheduler="exponential", **settings)
    transitions, holdout = linear_system(150, noise=0.3), linear_system(50, noise=0.3, seed=1)
    whole = build_ensemble(config, transitions)
    rows = normalise_rows(whole, transitions)
    held_out = normalise_rows(whole, holdout) if holds_out else None
    epochs = []
    for epoch in train_ensemble(whole, config, rows, held_out):
        torch.save(epoch.checkpoint(), tmp_path / f"{epoch.index}")
        epochs.append(epoch)

    for index in range(4):  # after the last epoch, too: nothing is left to do but to take the best weights
        checkpoint = torch.load(tmp_path / f"{index}", weights_only=True)
        assert checkpoint["epochs"] == index + 1
        resumed, later = train(config, transitions, holdout if holds_out else None, checkpoint=checkpoint)
        assert_same_weights(resumed, whole)
        numbers = [[(e.index, e.losses, e.train_scores, e.holdout_scores) for e in of] for of in (later, epochs)]
        assert numbers[0] == numbers[1][index + 1 :]
