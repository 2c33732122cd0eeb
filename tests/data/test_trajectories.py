"""data.trajectories: splits by whole trajectory, and what becomes a transition."""

import re

import numpy as np
import pytest

from data.trajectories import Dataset, Trajectory, gather_transitions, holdout_rows, split_trajectories
from utils import InputError


@pytest.fixture
def make(columns):
    """Returns a function that makes a dataset of trajectories of these lengths; coded as ``columns``."""

    def build(lengths, *, next_observations=True):
        content = columns(lengths, next_observations=next_observations)
        ends = np.cumsum(lengths)
        trajectories = []
        for start, end in zip(ends - lengths, ends, strict=True):
            states, actions, rewards = (content[key][start:end] for key in ("observations", "actions", "rewards"))
            following = content["next_observations"][start:end] if next_observations else None
            trajectories.append(Trajectory(states, actions, rewards, following, terminated=False))
        return Dataset("made", None, "", trajectories)

    return build


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"holdout_ratio": 0.2},
        {"holdout_samples": 40},
        {"test_ratio": 0.1},
        {"holdout_ratio": 0.3, "test_ratio": 0.3},
    ],
)
def test_a_split_is_disjoint_complete_and_sorted(make, options):
    made = make([5, 17, 1, 30, 8, 9, 2, 11, 25, 14], next_observations=False)
    for seed in range(20):
        split = split_trajectories(made, seed, **options)
        np.testing.assert_array_equal(np.sort(np.concatenate([split.train, split.holdout, split.test])), np.arange(10))
        for part in (split.train, split.holdout, split.test):
            assert part.dtype == np.int64
            np.testing.assert_array_equal(part, np.sort(part))
        assert (len(split.holdout) > 0) == ("holdout_ratio" in options or "holdout_samples" in options)
        assert (len(split.test) > 0) == ("test_ratio" in options)


def test_a_split_is_as_documented(make):
    # default_rng(3).permutation(5) is the order; the holdout is taken from its back, the test set from its front.
    order = np.random.default_rng(3).permutation(5).tolist()
    split = split_trajectories(make([10] * 5), 3, holdout_ratio=0.4, test_ratio=0.2)
    assert split.test.tolist() == order[:1]
    assert split.holdout.tolist() == sorted(order[3:])
    assert split.train.tolist() == sorted(order[1:3])
    others = [split_trajectories(make([10] * 5), seed, holdout_ratio=0.4).holdout.tolist() for seed in range(10)]
    assert len(set(map(tuple, others))) > 1


def test_test_and_holdout_do_not_depend_on_each_other(make):
    made = make([5, 17, 12, 30, 8, 9, 2, 11, 25, 14])
    splits = [split_trajectories(made, 0, holdout_ratio=h, test_ratio=t) for h, t in ((0, 0.2), (0.3, 0.2), (0.3, 0))]
    np.testing.assert_array_equal(splits[0].test, splits[1].test)
    np.testing.assert_array_equal(splits[1].holdout, splits[2].holdout)


def test_the_ratio_counts_transitions_not_trajectories(make):
    made = make([10] * 9 + [110])  # 200 transitions, of which 0.2 is 40, in four small trajectories
    # By how many small ones come before the large one, from the back of the order: 20 is nearer to 40 than 20 + 110.
    nearest = [110, 10, 20, 30, 40, 40, 40, 40, 40, 40]
    before = [np.random.default_rng(seed).permutation(10)[::-1].tolist().index(9) for seed in range(20)]
    assert len(set(before)) > 4
    for seed in range(20):
        holdout = split_trajectories(made, seed, holdout_ratio=0.2).holdout
        assert len(gather_transitions(made, holdout)) == nearest[before[seed]]


def test_a_small_ratio_holds_out_one_trajectory_and_a_large_one_leaves_one(make):
    assert len(split_trajectories(make([10] * 5), 0, holdout_ratio=0.001).holdout) == 1
    assert len(split_trajectories(make([10] * 5), 0, holdout_ratio=0.999).train) == 1


def test_a_trajectory_without_transitions_is_never_alone_on_a_side(make):
    made = make([1, 1, 1, 1, 10, 10], next_observations=False)
    for seed in range(50):
        split = split_trajectories(made, seed, holdout_ratio=0.1)
        assert len(gather_transitions(made, split.holdout)) == len(gather_transitions(made, split.train)) == 9


@pytest.mark.parametrize(("samples", "trajectories"), [(1, 1), (10, 1), (11, 2), (20, 2), (40, 4)])
def test_holdout_samples_is_reached_by_whole_trajectories(make, samples, trajectories):
    split = split_trajectories(make([10] * 5), 0, holdout_samples=samples)
    assert len(split.holdout) == trajectories


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([10] * 5, {"holdout_ratio": 1.0}, "holdout_ratio is 1.0"),
        ([10] * 5, {"holdout_ratio": -0.1}, "holdout_ratio is -0.1"),
        ([10] * 5, {"holdout_ratio": float("nan")}, "holdout_ratio is nan"),
        ([10] * 5, {"test_ratio": 1.5}, "test_ratio is 1.5"),
        ([10] * 5, {"holdout_ratio": 0.2, "holdout_samples": 5}, "give one of them"),
        ([10] * 5, {"holdout_samples": 0}, "holdout_samples is 0"),
        ([10] * 5, {"holdout_samples": 50}, "fewer than the dataset's 50"),
        ([10] * 5, {"holdout_samples": 41}, "leaves none to train on"),
        ([10] * 4, {"holdout_ratio": 0.5, "test_ratio": 0.5}, "leaves none to train on"),
        ([10], {"holdout_ratio": 0.2}, "of 1 trajectories leaves none"),
        ([10], {"test_ratio": 0.2}, "of 1 trajectories leaves none"),
    ],
)
def test_splits_that_cannot_be_are_refused(make, lengths, options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        split_trajectories(make(lengths), 0, **options)


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


@pytest.mark.parametrize("next_observations", [True, False])
def test_holdout_rows_index_the_published_concatenation(make, next_observations):
    made = make([3, 1, 2, 4], next_observations=next_observations)
    # observations[:-1] has 2, 0, 1 and 3 rows: trajectory 0 is rows 0-1, 2 is row 2 and 3 is rows 3-5.
    assert holdout_rows(made, np.array([0, 1])).tolist() == [0, 1]
    assert holdout_rows(made, np.array([2, 3])).tolist() == [2, 3, 4, 5]
    assert holdout_rows(made, np.array([], np.int64)).tolist() == []
    published = np.concatenate([t.observations[:-1] for t in made.trajectories])
    np.testing.assert_array_equal(published[holdout_rows(made, np.array([3])), 0], [300, 301, 302])
