"""data.splits: splits by whole trajectory, copies on one side, recordings in blocks, and what is kept of a division."""

import dataclasses
import json
import re

import numpy as np
import pytest

from data.splits import (
    BLOCKS,
    Division,
    Piece,
    Split,
    divide,
    find_copies,
    fingerprints,
    row_keys,
    split_trajectories,
    take_pieces,
    unlike,
)
from data.trajectories import Dataset, Trajectory, gather_transitions
from utils import InputError

# --- Whole trajectories ---


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


# --- Copies ---


def join(*datasets):
    return Dataset("joined", None, "", [trajectory for dataset in datasets for trajectory in dataset.trajectories])


def shorten(trajectory, rows):
    """Returns the beginning of a trajectory."""
    return take_pieces(Dataset("", None, "", [trajectory]), [Piece(0, 0, rows)]).trajectories[0]


@pytest.fixture
def walks():
    """Returns a function that draws a dataset of random trajectories of these lengths; seeds differ in every value."""

    def draw(*lengths, seed=0):
        random = np.random.default_rng(seed)
        columns = [random.normal(size=(sum(lengths), width)).astype(np.float32) for width in (3, 2, 1)]
        ends = np.cumsum(lengths)
        parts = [[column[end - length : end] for column in columns] for length, end in zip(lengths, ends, strict=True)]
        rows = [Trajectory(states, actions, rewards[:, 0], None, False) for states, actions, rewards in parts]
        return Dataset("walks", None, "", rows)

    return draw


def test_copies_are_equal_trajectories_and_beginnings(walks):
    data = walks(8, 5, 6)
    first, second, third = data.trajectories
    other_action = dataclasses.replace(second, actions=second.actions + 1)
    same_start = dataclasses.replace(third, observations=np.vstack([third.observations[:1], second.observations]))
    in_float64 = dataclasses.replace(second, observations=second.observations.astype(np.float64))
    rewarded = dataclasses.replace(first, rewards=first.rewards + 1)
    made = [shorten(first, 3), first, second, other_action, third, same_start, in_float64, rewarded, shorten(first, 5)]
    assert find_copies(made).tolist() == [0, 0, 2, 3, 4, 5, 2, 0, 0]


def test_beginnings_that_go_on_differently_belong_together(walks):
    data = walks(6)
    (whole,) = data.trajectories
    turned = dataclasses.replace(whole, actions=np.vstack([whole.actions[:4], -whole.actions[4:]]))
    assert find_copies([turned, whole]).tolist() == [0, 1]
    assert find_copies([turned, whole, shorten(whole, 4)]).tolist() == [0, 0, 0]


def test_copies_go_where_their_original_goes(walks):
    data = walks(*[10] * 6)
    tiled = join(data, data, data)
    for seed in range(10):
        split = split_trajectories(tiled, seed, holdout_ratio=0.3, test_ratio=0.2)
        sides = [set((part % 6).tolist()) for part in (split.train, split.holdout, split.test)]
        assert list(map(len, sides)) == [3, 2, 1]
        assert len(set.union(*sides)) == 6
        assert sorted([*split.train, *split.holdout, *split.test]) == list(range(18))


def test_a_split_without_copies_is_the_published_one(walks):
    order = np.random.default_rng(3).permutation(5).tolist()
    split = split_trajectories(walks(*[10] * 5), 3, holdout_ratio=0.4, test_ratio=0.2)
    assert (split.test.tolist(), split.holdout.tolist()) == (order[:1], sorted(order[3:]))


def test_fingerprints_know_trajectories_again(walks):
    data = walks(4, 5)
    wide = dataclasses.replace(data.trajectories[0], observations=data.trajectories[0].observations.astype(np.float64))
    known = fingerprints(data.trajectories)
    assert fingerprints([wide])[0] == known[0] != known[1]
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in known)
    assert unlike([*walks(5, seed=1).trajectories, *data.trajectories], known[:1]).tolist() == [0, 2]
    assert unlike([], known).tolist() == []


def test_equal_rows_have_equal_keys(walks):
    (walk,) = walks(2000).trajectories
    states, actions = walk.observations.copy(), walk.actions.copy()
    states[7], actions[7] = states[3], actions[3]
    states[8] = states[3]
    keys = row_keys(states, actions)
    assert len(np.unique(keys)) == 1999
    assert keys[7] == keys[3] != keys[8]
    np.testing.assert_array_equal(row_keys(states[3:4].astype(np.float64), actions[3:4]), keys[3:4])


# --- Blocks ---


def rows_of(division, side):
    """Returns by recording the rows that a side has."""
    found = {}
    for index in getattr(division.split, side).tolist():
        trajectory, start, stop = division.pieces[index]
        found.setdefault(trajectory, []).extend(range(start, stop))
    return {trajectory: set(rows) for trajectory, rows in found.items()}


@pytest.mark.parametrize(("options", "given"), [({}, None), ({"blocks": BLOCKS}, BLOCKS), ({"blocks": 20}, 20)])
def test_one_recording_is_divided_in_blocks_with_gaps(walks, options, given):
    data = walks(2000)
    for seed in range(10):
        division = divide(data, seed, holdout_ratio=0.2, test_ratio=0.1, **options)
        train, holdout, test = (rows_of(division, side)[0] for side in ("train", "holdout", "test"))
        block = 2000 // (given or BLOCKS)
        assert not train & holdout and not train & test and not holdout & test
        borders = [(a, b) for a, b in zip(division.pieces[:-1], division.pieces[1:], strict=True)]
        assert all(b.start - a.stop == block // 10 for a, b in borders)
        assert len(train | holdout | test) == 2000 - len(borders) * block // 10
        assert 0.2 * 2000 - 2 * block < len(holdout) <= 0.2 * 2000
        assert 0.1 * 2000 - block < len(test) <= 0.1 * 2000
        for piece, cut in zip(division.pieces, division.dataset.trajectories, strict=True):
            np.testing.assert_array_equal(cut.observations, data.trajectories[0].observations[piece.start : piece.stop])
        (found,) = division.findings()
        assert found.matters and found.count == len(division.pieces)


def test_blocks_are_drawn_by_the_seed(walks):
    drawn = [rows_of(divide(walks(1000), seed, holdout_ratio=0.2), "holdout")[0] for seed in range(10)]
    assert len(set(map(frozenset, drawn))) > 3


def test_whole_trajectories_are_preferred_and_blocks_taken_where_they_are_asked_for(walks):
    assert divide(walks(500, 500), 0, holdout_ratio=0.2).pieces is None
    assert divide(walks(500, 500), 0, holdout_ratio=0.2, test_ratio=0.2).pieces is not None
    twice = join(walks(500), walks(500))
    assert divide(twice, 0, holdout_ratio=0.2).pieces is not None, "a copy is no second recording"
    asked = divide(walks(500, 500, 30), 0, holdout_ratio=0.2, blocks=5)
    assert [piece for piece in asked.pieces if piece.trajectory == 2] == [Piece(2, 0, 30)], "too short for blocks"
    assert divide(walks(500), 0).pieces is None, "nothing is to be held out"


def test_blocks_of_copies_stay_together(walks):
    data = walks(500)
    beginning = Dataset("", None, "", [shorten(data.trajectories[0], 320)])
    division = divide(join(data, data, beginning), 1, holdout_ratio=0.3)
    train, holdout = (rows_of(division, side) for side in ("train", "holdout"))
    assert (train[0], holdout[0]) == (train[1], holdout[1])
    assert not set.union(*train.values()) & set.union(*holdout.values())
    assert {*train, *holdout} == {0, 1, 2}


@pytest.mark.parametrize(
    ("length", "options", "words"),
    [
        (500, {"blocks": 1}, "holdout_blocks is 1; expected"),
        (500, {"blocks": 51}, "the longest trajectory has 500 rows; a block needs at least 10"),
        (99, {}, "leaves none to train on"),
    ],
)
def test_blocks_that_cannot_be_are_refused(walks, length, options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        divide(walks(length), 0, holdout_ratio=0.2, **options)


# --- Divisions ---


@pytest.mark.parametrize("next_observations", [True, False])
def test_holdout_rows_index_the_published_concatenation(make, next_observations):
    made = make([3, 1, 2, 4], next_observations=next_observations)
    published = np.concatenate([t.observations[:-1] for t in made.trajectories])
    # observations[:-1] has 2, 0, 1 and 3 rows: trajectory 0 is rows 0-1, 2 is row 2 and 3 is rows 3-5.
    for held_out, expected in (([0, 1], [0, 1]), ([2, 3], [2, 3, 4, 5]), ([1], None), ([], None)):
        split = Split(*(np.array(part, np.int64) for part in ([], held_out, [])))
        rows = Division(made, made, split).holdout_rows()
        assert rows is None if expected is None else rows.tolist() == expected
    groups = [dataclasses.replace(trajectory, in_order=False) for trajectory in made.trajectories]
    whole = Dataset("groups", None, "", groups)
    assert Division(whole, whole, Split(*(np.array([index]) for index in range(3)))).holdout_rows() is None
    pieces = (Piece(3, 0, 1), Piece(3, 1, 4))
    cut = Division(made, take_pieces(made, pieces), Split(np.array([0]), np.array([1]), np.array([])), pieces)
    assert published[cut.holdout_rows(), 0].tolist() == [301, 302]


def test_pieces_end_in_a_terminal_where_the_whole_does(make):
    made = make([6])
    made.trajectories[0] = dataclasses.replace(made.trajectories[0], terminated=True, qpos=np.arange(6)[:, None])
    first, last = take_pieces(made, [Piece(0, 0, 3), Piece(0, 4, 6)]).trajectories
    assert (first.terminated, last.terminated) == (False, True)
    assert (last.qpos[:, 0].tolist(), last.rewards.tolist()) == ([4, 5], [-4, -5])


def test_another_dataset_validates_less_its_copies(walks):
    division = divide(walks(5, 6, 7), 0)
    other = join(walks(4, seed=1), walks(5, 6, 7))
    held_out = division.with_holdout(other)
    assert [len(t) for t in held_out.holdout_dataset.trajectories] == [4]
    assert (len(held_out.holdout()), len(held_out.training()), held_out.holdout_rows()) == (3, 15, None)
    (found,) = held_out.findings()
    assert (found.name, found.count) == ("copies in the holdout dataset", 3)
    assert division.findings() == []
    with pytest.raises(InputError, match="nothing but copies of trajectories of"):
        division.with_holdout(Dataset("copies", None, "", other.trajectories[1:]))


def test_another_dataset_of_other_dimensions_is_refused(walks):
    data = walks(5)
    wide = dataclasses.replace(data.trajectories[0], observations=np.zeros((5, 4), np.float32))
    with pytest.raises(InputError, match="other has 4 state and 2 action dimensions, but walks has 3 state"):
        divide(data, 0).with_holdout(Dataset("other", None, "", [wide]))


def test_a_division_comes_back_from_what_is_kept_of_it(walks):
    data = dataclasses.replace(walks(300), sha256="a")
    for division in (divide(data, 2, holdout_ratio=0.3), divide(dataclasses.replace(walks(*[9] * 5), sha256="b"), 2)):
        kept = json.loads(json.dumps(division.to_dict()))
        again = Division.restore(division.whole, kept)
        for mine, others in ((division.training(), again.training()), (division.holdout(), again.holdout())):
            assert (mine is None) == (others is None)
            if mine is not None:
                np.testing.assert_array_equal(mine.states, others.states)
        assert kept["fingerprints"]["train"] == sorted(fingerprints(division.whole.trajectories))
        assert Division.restore(dataclasses.replace(data, sha256="c"), kept) is None
