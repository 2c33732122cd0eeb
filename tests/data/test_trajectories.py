"""data.trajectories: what becomes a transition."""

import dataclasses

import numpy as np

from data.trajectories import gather_transitions


def test_with_next_observations_every_row_is_a_transition(make):
    transitions = gather_transitions(make([3, 1, 2]), np.array([2, 0]))
    assert len(transitions) == 5
    np.testing.assert_array_equal(transitions.states[:, 0], [200, 201, 0, 1, 2])
    np.testing.assert_array_equal(transitions.next_states[:, 0], [201, 202, 1, 2, 3])  # 202 and 3: the last rows' own
    np.testing.assert_array_equal(transitions.actions[:, 0], [200.125, 201.125, 0.125, 1.125, 2.125])
    np.testing.assert_array_equal(transitions.rewards, [-200, -201, 0, -1, -2])


def test_without_next_observations_rows_are_paired_inside_an_episode(make):
    made = make([3, 1, 2, 4], next_observations=False)
    transitions = gather_transitions(made, np.arange(4))
    assert len(transitions) == made.num_transitions == 6
    np.testing.assert_array_equal(transitions.states[:, 0], [0, 1, 200, 300, 301, 302])
    np.testing.assert_array_equal(transitions.next_states[:, 0], [1, 2, 201, 301, 302, 303])
    np.testing.assert_array_equal(transitions.actions[:, 1], [0.125, 1.125, 200.125, 300.125, 301.125, 302.125])
    np.testing.assert_array_equal(transitions.rewards, [0, -1, -200, -300, -301, -302])


def test_no_trajectories_make_no_transitions(make):
    transitions = gather_transitions(make([3, 2]), np.array([], np.int64))
    assert (transitions.states.shape, transitions.actions.shape, transitions.rewards.shape) == ((0, 3), (0, 2), (0,))
    assert transitions.next_states.dtype == np.float32


def test_trajectories_of_both_kinds_stand_together(make):
    made = make([3, 2])
    made.trajectories[1] = dataclasses.replace(made.trajectories[1], next_observations=None)
    assert gather_transitions(made, np.array([1, 0])).next_states[:, 0].tolist() == [101, 1, 2, 3]


def test_a_dataset_without_rewards_has_transitions_without(make):
    made = make([3, 2])
    made.trajectories[:] = [dataclasses.replace(trajectory, rewards=None) for trajectory in made.trajectories]
    assert gather_transitions(made, np.array([1])).rewards is None
