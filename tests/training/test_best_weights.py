"""best_weights: every member ends with its own best weights, which patience may settle early."""

import dataclasses
import math

import pytest
import torch

from dynamics_model import DynamicsEnsemble
from probabilistic_model import ProbabilisticModel
from training.best_weights import BestWeights

LOSSES = (1.0, 1.0)  # nobody has failed


@pytest.fixture
def pair(constant_member):
    """Two members whose outputs, and so their one bias, can be set."""
    return DynamicsEnsemble.from_members([constant_member(ProbabilisticModel, [0.0])] * 2)


def set_biases(ensemble, *values):
    with torch.no_grad():
        for member, value in enumerate(values):
            ensemble.dynamics.biases[0][member, 0, 0] = value


def biases(ensemble):
    return ensemble.dynamics.biases[0][:, 0, 0].tolist()


def run_epochs(best, ensemble, scores):
    """Gives epoch e, counted from 1, the biases (e, -e) and the scores given for it."""
    for epoch, of_members in enumerate(scores, start=1):
        set_biases(ensemble, epoch, -epoch)
        best.update(ensemble, LOSSES, of_members)


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
        best.update(pair, LOSSES, scores)
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
def test_member_without_a_finite_error_has_failed_and_keeps_the_weights_it_began_with(pair, score):
    set_biases(pair, 0, 7)
    best = BestWeights(pair, patience=None)
    run_epochs(best, pair, [(1.0, score), (0.5, score)])

    assert best.restore(pair) == [0]
    assert biases(pair) == [2, 7]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_member_whose_loss_is_not_finite_keeps_its_last_good_weights_for_good(pair, loss):
    best = BestWeights(pair, patience=None)
    for epoch, second in enumerate([1.0, 1.0, loss, 1.0], start=1):
        set_biases(pair, epoch, -epoch)
        best.update(pair, (1.0, second))

    assert best.failed == [False, True]
    assert best.restore(pair) == [0]
    assert biases(pair) == [4, -2], "the first goes on to the end; without a validation error, the latest counts"


@pytest.mark.parametrize("scores", [None, (1.0, 0.1)])
@pytest.mark.parametrize("weight", [math.nan, -math.inf])
def test_member_one_of_whose_weights_is_not_finite_has_failed(pair, weight, scores):
    best = BestWeights(pair, patience=None)
    set_biases(pair, 1, 1)
    best.update(pair, LOSSES, scores and (2.0, 2.0))
    set_biases(pair, 2, weight)
    best.update(pair, LOSSES, scores)

    assert best.stopped == [False, True], "it waits for nobody"
    assert best.restore(pair) == [0]
    assert biases(pair) == [2, 1]


def test_all_members_failed_is_an_error_that_says_what_to_do(pair):
    best = BestWeights(pair, patience=None)
    best.update(pair, (math.nan, math.inf))
    assert best.stopped == [True, True]
    with pytest.raises(FloatingPointError, match=r"every member diverged.*lower fit_lr or set grad_clip"):
        best.restore(pair)


def test_kept_weights_are_copies(pair):
    set_biases(pair, 1, 2)
    best = BestWeights(pair, patience=None)
    best.update(pair, LOSSES, (1.0, 1.0))
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
        second.update(pair, LOSSES, of_members)

    assert dataclasses.astuple(snapshot(second, pair)) == dataclasses.astuple(snapshot(whole, pair))
    assert biases(pair) == [2, -1]


@dataclasses.dataclass
class Snapshot:
    scores: list
    epochs_since_best: list
    biases: list


def snapshot(best, ensemble):
    best.restore(ensemble)
    return Snapshot(best.scores, best.epochs_since_best, biases(ensemble))
