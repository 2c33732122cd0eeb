import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("mujoco")

from benchmarks import planning
from benchmarks.harness import ResultsFile
from benchmarks.real_environments import DOMAINS, Simulator, squashed_gaussian
from data.behaviour import SquashedGaussianPolicy
from model_env import ModelState, ModelStep


def test_a_quick_trial_measures_draws_and_leaves_what_is_published_alone(check_quick_trial):
    folder = check_quick_trial("planning")
    planned, evaluated = (pd.read_csv(folder / "results" / f"{name}.csv") for name in ("planning", "policy_evaluation"))
    assert set(planned["arm"]) == set(planning.ARMS)
    assert (planned.groupby(["kind", "arm"])["episode"].nunique() == 2).all()
    assert len(evaluated) == 2 * 12, "of the simulator and of a model"


def test_published_tables_are_those_of_the_results(check_published):
    check_published(planning.publish, planning=False, policy_evaluation=False)


@pytest.fixture
def bench(tmp_path):
    """The first environment with random actions alone."""
    args = planning.parse_arguments(["--quick", "--arms", "random"])
    results = [ResultsFile(name, tmp_path, is_timed=False) for name in ("planning", "policy_evaluation")]
    return planning.Bench(DOMAINS["hopper"], planning.QUICK, args, *results)


def test_what_is_there_is_skipped_and_what_is_missing_is_measured_again_alone(bench):
    assert len(list(bench.play("-", 0, "random"))) == 1
    assert len(list(bench.evaluate_policies("simulator", 0))) == 12
    planned, evaluated = bench.planned.rows(), bench.evaluated.rows()
    assert planned["episode"].tolist() == [0, 1]

    assert list(bench.play("-", 0, "random")) == list(bench.evaluate_policies("simulator", 0)) == []
    bench.planned.discard(episode=0)
    bench.evaluated.discard(noise=2, perturbation=0.1)
    assert len(list(bench.play("-", 0, "random"))) == len(list(bench.evaluate_policies("simulator", 0))) == 1
    again = bench.planned.rows()
    assert again["episode"].tolist() == [1, 0]
    assert again["earned"][0] == planned["earned"][1], "what was there is as it was"
    in_order = bench.evaluated.rows().sort_values(["noise", "perturbation"], ignore_index=True)
    pd.testing.assert_frame_equal(in_order, evaluated)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_simulator_steps_like_the_real_environment(name):
    domain, actions, seen = DOMAINS[name], [], []
    simulator, random = Simulator(domain), torch.Generator().manual_seed(0)

    def act(states):
        """Steps the simulator from the real environment's state, two at a time."""
        drawn = torch.rand(len(states), domain.task.action_dim, generator=random) * 2 - 1
        actions.append(drawn)
        seen.append((states, simulator.step(simulator.start(states, None), drawn, None)))
        return drawn

    paid = domain.play(act, episodes=[0, 1], steps=8, in_simulator=True).paid
    assert seen[0][1].state.states.shape == seen[0][0].shape
    for (_, step), (states, _), rewards in zip(seen, seen[1:], paid, strict=False):
        torch.testing.assert_close(step.state.states, states, atol=2e-3, rtol=2e-3)
        assert step.reward.numpy() == pytest.approx(rewards, abs=0.6 if name == "halfcheetah" else 0.05)
        assert not step.terminated.any()
    # What is observed is what policies see there.
    starts = torch.as_tensor(domain.starts([0, 1]), dtype=torch.float32)
    torch.testing.assert_close(simulator.observe(seen[0][0]), starts)


def test_episodes_that_have_ended_pay_no_more():
    paid, lengths = DOMAINS["hopper"].play(lambda states: torch.ones(len(states), 3), episodes=[0, 1, 2], steps=60)
    assert (lengths < 60).all()
    for episode, length in enumerate(lengths):
        assert (paid[:length, episode] != 0).all() and (paid[length:, episode] == 0).all()


def test_policies_are_those_that_collect_data():
    weights = DOMAINS["hopper"].weights
    states = torch.as_tensor(DOMAINS["hopper"].starts(range(5)), dtype=torch.float32)
    arrays = {name: values.numpy() for name, values in weights.items()}
    own = SquashedGaussianPolicy(arrays, "")
    means = np.stack([np.tanh(own.gaussian(state)[0]) for state in states.numpy()])
    still = squashed_gaussian(weights, noise=0, perturbation=0, seed=0)(states)
    assert still.numpy() == pytest.approx(means, abs=1e-5)

    noisy = squashed_gaussian(weights, noise=1, perturbation=0, seed=0)
    drawn = torch.stack([noisy(states) for _ in range(300)]).atanh()
    deviations = np.exp([own.gaussian(state)[1] for state in states.numpy()])
    assert drawn.std(dim=0).numpy() == pytest.approx(deviations, rel=0.25)
    perturbed = [squashed_gaussian(weights, noise=0, perturbation=0.2, seed=seed)(states) for seed in (0, 1)]
    assert torch.equal(*perturbed) and not torch.allclose(perturbed[0], still, atol=0.01)


def test_in_a_model_an_ended_path_is_paid_no_more():
    """Each step pays the state, to which the action is added; above 3 the episode ends."""

    class Core:
        def start(self, states):
            return ModelState(torch.as_tensor(states), None)

        def step(self, state, actions):
            states, never = state.states + actions, torch.zeros(len(actions), dtype=torch.bool)
            reward = states[:, 0]
            return ModelStep(ModelState(states, None), reward, reward, states[:, 0] > 3, never, never, None)

    paid = planning.imagine(Core(), lambda states: torch.ones_like(states), np.array([[0.0], [2.0]]), steps=5)
    assert paid.T.tolist() == [[1, 2, 3, 4, 0]] * planning.MODEL_PATHS + [[3, 4, 0, 0, 0]] * planning.MODEL_PATHS


def test_measures_of_policy_evaluation():
    """Ranks 1 3 4 2 against 1 2 3 4; the model's best earns 30 of up to 40; errors of 0, 10, 10 and 20."""
    found = planning.measures(pd.Series([10.0, 30.0, 40.0, 20.0]), pd.Series([10.0, 20.0, 30.0, 40.0]))
    assert found["rank"] == pytest.approx(1 - 6 * (0 + 1 + 1 + 4) / (4 * 15))
    assert found["regret"] == pytest.approx((40 - 30) / 30)
    assert found["error"] == pytest.approx((0 + 10 + 10 + 20) / 4 / 30)
