"""data.audit: every kind of finding, its count, where it is, and whether it matters; and that sound data have none."""

import dataclasses

import numpy as np
import pytest

from data.audit import audit, moves_rarely, to_markdown
from data.sources import bundled_names, load_dataset
from data.trajectories import Dataset, Finding, Trajectory

FOUND = Finding("rows that do not follow", 2, "behind rows 3, 9", "a trajectory ends there", "nothing to do", True)


def trajectory(states, actions, following=None, rewards=None):
    states, actions = np.asarray(states, np.float32), np.asarray(actions, np.float32)
    return Trajectory(states, actions, rewards, following, terminated=False)


def random_walks(lengths, state_dim=3, seed=0):
    """Returns trajectories of a random walk, one state more than that long, paired."""
    random = np.random.default_rng(seed)
    return [
        trajectory(np.cumsum(random.normal(size=(n + 1, state_dim)), axis=0), random.uniform(-1, 1, (n + 1, 2)))
        for n in lengths
    ]


def found_in(trajectories, findings=()):
    """Returns by name what is found in trajectories."""
    found = audit(Dataset("made", None, "", trajectories, tuple(findings)))
    assert len({finding.name for finding in found}) == len(found)
    return {finding.name: finding for finding in found}


def replace_rows(original, rows, **changes):
    """Returns a trajectory with other values in some rows."""
    arrays = {}
    for field, values in changes.items():
        arrays[field] = getattr(original, field).copy()
        arrays[field][rows] = values
    return dataclasses.replace(original, **arrays)


# --- Sound data ---


def test_nothing_is_found_in_sound_data():
    assert found_in(random_walks([200] * 6)) == {}


@pytest.mark.parametrize("name", bundled_names())
def test_nothing_that_matters_is_found_in_bundled_datasets(name):
    assert audit(load_dataset(name)) == []


def test_what_was_found_while_reading_comes_first():
    assert list(found_in(random_walks([200] * 6), [FOUND]).values()) == [FOUND]


# --- Rows ---


def test_copies_are_counted_with_their_originals():
    walks = random_walks([50, 60, 70, 80, 90])
    (found,) = found_in([*walks, walks[1], walks[4], walks[1]]).values()
    assert (found.name, found.count, found.matters) == ("copies of trajectories", 3, True)
    assert found.where == "trajectories 5 (of 1), 6 (of 4), 7 (of 1)"
    assert "210 of 560 transitions" in found.effect


def test_repeated_transitions_are_counted_inside_a_trajectory():
    walks = random_walks([100] * 6)
    for field in ("observations", "actions"):
        getattr(walks[2], field)[[20, 30, 40]] = getattr(walks[2], field)[10]
        getattr(walks[3], field)[5] = getattr(walks[4], field)[5]  # of another trajectory
        getattr(walks[5], field)[0] = getattr(walks[5], field)[100]  # the last row makes no transition
    found = found_in(walks)["repeated transitions"]
    assert (found.count, found.where) == (3, "trajectory 2 step 20, trajectory 2 step 30, trajectory 2 step 40")
    assert not found.matters
    tiled = [trajectory(*(np.tile(getattr(w, field), (2, 1)) for field in ("observations", "actions"))) for w in walks]
    assert found_in(tiled)["repeated transitions"].matters
    assert found_in(tiled)["repeated transitions"].count > 590


def test_the_same_state_with_another_action_is_no_repeat():
    walks = random_walks([100] * 6)
    walks[0].observations[50] = walks[0].observations[10]
    assert found_in(walks) == {}


def test_jumps_are_counted_and_those_that_look_like_resets():
    walks = random_walks([300] * 6)
    walks[1].observations[100:] += 200  # and never comes back
    walks[2] = replace_rows(walks[2], slice(0, 150), observations=walks[2].observations[:150] + 500)
    walks[2].observations[150:] -= walks[2].observations[150]
    found = found_in(walks)["jumps"]
    assert (found.count, found.matters) == (2, True)
    assert found.where == "trajectory 1 step 99, trajectory 2 step 149"
    assert "1 of them look like resets" in found.effect


def test_rows_of_a_buffer_that_was_not_filled_are_found():
    walks = random_walks([100] * 6)
    zeros = np.zeros(30)[:, None]
    walks[3] = replace_rows(walks[3], slice(71, 101), observations=zeros, actions=zeros)
    found = found_in(walks)["empty rows"]
    assert (found.count, found.matters) == (29, True)
    assert found.where.startswith("trajectory 3 step 71")
    walks = random_walks([100] * 6)
    walks[0] = replace_rows(walks[0], 0, observations=0, actions=0)
    assert "empty rows" not in found_in(walks), "a start at rest"


# --- Dimensions ---


def test_constant_dimensions_are_named_and_constant_actions_matter():
    walks = random_walks([100] * 6, state_dim=4)
    for walk in walks:
        walk.observations[:, [0, 3]] = 2.5
        walk.actions[:, 1] = 0
    found = found_in(walks)
    states, actions = found["constant state dimensions"], found["constant action dimensions"]
    assert (states.count, states.where, states.matters) == (2, "dimensions 0, 3", False)
    assert (actions.count, actions.where, actions.matters) == (1, "dimension 1", True)


def test_a_dimension_that_moves_once_in_many_rows_is_not_constant():
    walks = random_walks([5000] * 6)
    for walk in walks:
        walk.observations[:, 1], walk.actions[:, 1] = 1, 1
    walks[4].observations[4001:, 1], walks[5].actions[17, 1] = 1.25, 0.5
    found = found_in(walks)
    assert {"constant state dimensions", "constant action dimensions"}.isdisjoint(found)
    rare = found["dimensions with rare large moves"]
    assert (rare.count, rare.where, rare.matters) == (1, "state dimension 1 (1 of 30,000 transitions)", True)


def test_a_door_that_opens_once_moves_rarely():
    walks = random_walks([400] * 6)
    for index, walk in enumerate(walks):
        walk.observations[:, 2] = 0.3 * (np.arange(401) > 100 + 30 * index)
    assert found_in(walks)["dimensions with rare large moves"].where == "state dimension 2 (6 of 2,400 transitions)"


@pytest.mark.parametrize(
    ("draw", "is_rare"),
    [
        (lambda random: random.normal(size=20_000), False),
        (lambda random: random.laplace(size=20_000), False),
        (lambda random: random.standard_t(5, size=20_000), False),
        (lambda random: random.uniform(size=20_000) < 0.05, False),
        (lambda random: random.uniform(size=20_000) < 0.01, True),
        (lambda random: np.zeros(5), False),
    ],
)
def test_what_moves_rarely(draw, is_rare):
    values = draw(np.random.default_rng(0)).astype(float)
    assert moves_rarely(values.std(), np.abs(values - values.mean()).mean()) == is_rare


@pytest.mark.parametrize("field", ["paired", "next_observations"])
def test_dimensions_that_float32_does_not_resolve_are_named(field):
    walks = []
    for walk in random_walks([200] * 6):
        positions = walk.observations.astype(np.float64) * (1, 0.1, 1) + (0, 5e5, 0)
        rows = trajectory(positions, walk.actions)
        if field == "next_observations":
            rows = trajectory(positions[:-1], walk.actions[:-1], positions[1:].astype(np.float32))
        walks.append(rows)
    found = found_in(walks)["dimensions that float32 does not resolve"]
    assert (found.count, found.where, found.matters) == (1, "dimension 1", True)
    assert "float32 has steps of 0.031 near 5e+05" in found.effect


def test_states_in_float64_are_resolved():
    walks = [
        dataclasses.replace(w, observations=w.observations.astype(np.float64) + 1e7) for w in random_walks([200] * 6)
    ]
    assert found_in(walks) == {}


# --- The whole ---


def test_rows_that_were_shuffled_are_seen_without_next_observations():
    walks = random_walks([200] * 6)
    order = np.random.default_rng(0).permutation(201)
    shuffled = [
        replace_rows(w, slice(None), observations=w.observations[order], actions=w.actions[order]) for w in walks
    ]
    assert found_in(shuffled)["rows without visible order"].matters
    half = [*walks[:3], *shuffled[3:]]
    assert "rows without visible order" not in found_in(half)


@pytest.mark.parametrize(("lengths", "distinct"), [([500], 1), ([100] * 4, 4), ([100] * 5, None)])
def test_few_trajectories_are_told(lengths, distinct):
    walks = random_walks(lengths)
    found = found_in([*walks, walks[0]]).get("few trajectories")
    assert (found and found.count) == distinct
    assert found is None or not found.matters


def test_short_data_are_no_trouble():
    for lengths in ([1], [1, 1, 2], [3] * 10):
        found_in(random_walks(lengths))
        one_row = trajectory([[1.0, 2.0, 3.0]], [[0.0, 0.0]])  # which makes no transition
        found_in([one_row, *random_walks(lengths), one_row])


def test_long_trajectories_are_looked_at_in_pieces():
    (walk,) = random_walks([20_000])
    walk.observations[15_001:] += 300
    found = found_in([walk, *random_walks([10] * 5, seed=1)])["jumps"]
    assert found.where == "trajectory 0 step 15000"


# --- Words ---


def test_a_finding_is_one_line_and_all_of_them_are_a_table():
    assert str(FOUND) == "rows that do not follow: 2 (behind rows 3, 9); a trajectory ends there; nothing to do"
    minor = dataclasses.replace(FOUND, name="few", count=1234, where="a | b", matters=False)
    assert to_markdown([FOUND, minor]).splitlines() == [
        "| finding | count | where | what it does | what to do |",
        "| --- | --- | --- | --- | --- |",
        "| **rows that do not follow** | 2 | behind rows 3, 9 | a trajectory ends there | nothing to do |",
        r"| few | 1,234 | a \| b | a trajectory ends there | nothing to do |",
    ]
    assert to_markdown([]) == "Nothing was found.\n"
