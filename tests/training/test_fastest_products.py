"""fastest_products: which way is taken, what a trial may cost, and that it changes nothing else."""

import copy

import pytest
import torch

from config import LearnConfig
from training import fastest_products as module
from training.batches import normalise_rows
from training.build import build_ensemble
from training.fastest_products import fastest_products
from training.products import Products, default_products, possible_products

CONFIG = LearnConfig(ensemble_size=3, hidden_size=(16,), batch_size=32, fit_epochs=1000)


@pytest.fixture
def prepare(linear_system):
    """Returns a function that gives ensemble and rows, 320 of them; PyTorch has two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def prepare_it(config=CONFIG):
        ensemble = build_ensemble(config, linear_system(320))
        return ensemble, config, normalise_rows(ensemble, linear_system(320))

    yield prepare_it
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """Returns a function that sets how long a step takes with each way; it gives the list of trials, filled later."""

    def set_it(seconds):
        trials = []

        def trial(ensemble, config, train, way, steps):
            trials.append((way, steps))
            return seconds(way)

        monkeypatch.setattr(module, "_seconds_per_step", trial)
        return trials

    return set_it


@pytest.mark.parametrize("fastest", range(3))
def test_the_fastest_way_is_taken(prepare, clock, fastest):
    way = possible_products(3)[fastest]
    clock(lambda tried: 0.001 if tried == way else 0.002)
    assert fastest_products(*prepare()) == way


def test_the_default_stays_where_nothing_is_clearly_faster(prepare, clock):
    clock(lambda way: 0.001 if way == default_products() else 0.00098)
    assert fastest_products(*prepare()) == default_products()


def test_short_runs_are_not_held_up(prepare, clock):
    trials = clock(lambda way: 0.001)
    ways, config = len(possible_products(3)), LearnConfig(ensemble_size=3, hidden_size=(16,), batch_size=32)
    assert fastest_products(*prepare(config)) == default_products()  # 40 epochs of 10 steps
    assert trials == []
    fastest_products(*prepare())
    assert sum(steps for _, steps in trials) <= 0.01 * 1000 * 10
    assert len(trials) == 1 + ways


@pytest.mark.parametrize("seconds", [1e-4, 0.01, 1.0])
def test_trials_take_two_seconds_at_most_unless_a_few_steps_take_longer(prepare, clock, seconds):
    trials = clock(lambda way: seconds)
    ensemble, config, rows = prepare(LearnConfig(ensemble_size=3, hidden_size=(16,), batch_size=32, fit_epochs=10**6))
    fastest_products(ensemble, config, rows)
    steps = sum(steps for _, steps in trials)
    assert steps * seconds <= 2 or steps == 6 * len(trials)


def test_a_way_that_is_given_is_taken_untried(prepare, clock):
    trials = clock(lambda way: 0.001)
    config = LearnConfig(ensemble_size=3, hidden_size=(16,), batch_size=32, fit_epochs=1000, products="onednn/apart/3")
    assert fastest_products(*prepare(config)) == Products("onednn", "apart", 3)
    assert trials == []


def test_trials_leave_weights_streams_and_threads_as_they_are(prepare, assert_same_weights):
    ensemble, config, rows = prepare()
    before, random = copy.deepcopy(ensemble), torch.get_rng_state()

    assert fastest_products(ensemble, config, rows) in possible_products(3)

    assert_same_weights(before, ensemble)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == 2
