import pytest
import torch

from benchmarks import prediction
from benchmarks.step_arms import Case


def test_a_quick_trial_measures_draws_and_leaves_what_is_published_alone(check_quick_trial):
    check_quick_trial("prediction")


def test_published_tables_are_those_of_the_results(check_published):
    check_published(prediction.publish, prediction=True)


@pytest.mark.parametrize("kind", ["deterministic", "probabilistic"])
def test_ways_that_predict_otherwise_are_not_timed(kind):
    case = Case(kind, "1x8", batch=1, size="hopper", threads=1, rounds=0, members=2)
    ensemble = case.ensemble.requires_grad_(False)
    plain = prediction.plain_loop(ensemble, case)
    states, actions = (torch.as_tensor(part[:5]) for part in (case.transitions.states, case.transitions.actions))
    prediction.check_equal(ensemble, ensemble.members(), plain, states, actions)

    ensemble.dynamics.biases[-1][1] += 0.1
    with pytest.raises(AssertionError):
        prediction.check_equal(ensemble, ensemble.members(), plain, states, actions)
