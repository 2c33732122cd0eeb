"""data.nested: which entries of nested observations make the state, in which order."""

from pathlib import Path

import numpy as np
import pytest

from data.columns import Stretch, Wanted, read_columns
from data.limits import Budget
from data.nested import MAX_DEPTH
from utils import InputError


def column(value, width, rows=4):
    return np.full((rows, width), value, np.float32)


GOAL = {"observation": column(1, 3), "desired_goal": {"kettle": column(2, 2), "burner": column(3, 1)}}


def read(observations, keys=(), **others):
    entries = {"observations": observations, "actions": column(0, 1), "dones": np.zeros(4), **others}
    columns, findings = read_columns(
        [Stretch("a", entries)], "a", Wanted(observation_keys=keys), Budget(Path("a")), stretches_are_episodes=True
    )
    return columns, {found.name: found for found in findings if found.name != "flags"}


def test_entries_are_side_by_side_in_the_order_of_their_keys_and_that_is_told():
    columns, findings = read(GOAL)
    np.testing.assert_array_equal(columns["observations"][0], [3, 2, 2, 1, 1, 1])
    found = findings["nested observations"]
    assert found.where == "desired_goal/burner 0:1, desired_goal/kettle 1:3, observation 3:6"
    assert found.matters


def test_the_order_is_gymnasium_s():
    spaces = pytest.importorskip("gymnasium").spaces
    box = spaces.Box(-1, 1, (2,), np.float32)
    space = spaces.Dict({"z": box, "a": spaces.Dict({"y": box, "B": box}), "tuple": spaces.Tuple([box] * 11)})
    space.seed(0)
    samples = [space.sample() for _ in range(4)]

    def stacked(values):
        if isinstance(values[0], tuple):  # as Minari stores tuples
            return {f"_index_{i}": stacked([value[i] for value in values]) for i in range(len(values[0]))}
        if isinstance(values[0], dict):
            return {key: stacked([value[key] for value in values]) for key in values[0]}
        return np.stack(values)

    columns, _ = read(stacked(samples))
    np.testing.assert_array_equal(columns["observations"], [spaces.flatten(space, sample) for sample in samples])


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        (("observation",), [1, 1, 1]),
        (("observation", "desired_goal"), [1, 1, 1, 3, 2, 2]),
        (("desired_goal/kettle", "observation"), [2, 2, 1, 1, 1]),
    ],
)
def test_keys_choose_entries_and_their_order(keys, state):
    columns, _ = read(GOAL, keys, next_observations=GOAL)
    np.testing.assert_array_equal(columns["observations"][0], state)
    np.testing.assert_array_equal(columns["next_observations"][0], state)


def test_images_and_whole_numbers_are_left_out_and_named():
    others = {"camera": np.zeros((4, 8, 8, 3), np.uint8), "depth": np.zeros((4, 8, 8)), "mode": np.zeros(4, int)}
    columns, findings = read({"height": np.full(4, 7.0), **others, "x": column(1, 2)})
    np.testing.assert_array_equal(columns["observations"][0], [7, 1, 1])
    assert findings["observations left out"].where == "camera, depth, mode"
    _, findings = read({"height": np.full(4, 7.0), **others}, ("height",))
    assert "observations left out" not in findings


@pytest.mark.parametrize(
    ("observations", "keys", "words"),
    [
        (GOAL, ("observations",), ["no key 'observations'", "did you mean 'observation'", "desired_goal/kettle"]),
        (column(1, 3), ("observation",), ["is one array", "leave '::observation' out"]),
        ({"camera": np.zeros((4, 8, 8, 3), np.uint8)}, (), ["no float vector", "camera", "image"]),
        ({"camera": np.zeros((4, 8, 8, 3), np.uint8)}, ("camera",), ["image observations/camera"]),
        ({"mode": np.zeros(4, int)}, ("mode",), ["observations/mode holds int64"]),
        ({}, (), ["no float vector but none"]),
        ({"a": column(1, 2), "b": column(1, 2, rows=3)}, (), ["observations/b has 3 rows"]),
    ],
)
def test_what_cannot_be_learned_is_named(observations, keys, words):
    with pytest.raises(InputError) as caught:
        read(observations, keys)
    for expected in words:
        assert expected in str(caught.value)


def test_next_observations_are_made_of_the_same_entries():
    with pytest.raises(InputError, match=r"next_observations has shape observation .* expected that of observations"):
        read(GOAL, next_observations={"observation": GOAL["observation"]})


def test_a_dictionary_in_itself_is_refused():
    endless = {}
    endless["observations"] = endless
    with pytest.raises(InputError, match=f"deeper than {MAX_DEPTH} levels"):
        read(endless)
