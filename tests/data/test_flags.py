"""data.flags: where episodes end, under every name and in every type that files use."""

import numpy as np
import pytest

from data.flags import join_flags, read_flags
from utils import InputError

END = np.array([0, 0, 1, 0, 0, 1])


def read(is_episode=False, **entries):
    flags = read_flags(entries, 6, "a.hdf5", is_episode=is_episode)
    return join_flags([flags], stretches_are_episodes=is_episode)


def ends_of(columns):
    return np.flatnonzero(columns["terminals"] | columns["timeouts"]).tolist()


TYPES = {
    "bool": END.astype(bool),
    "bytes": END.astype(np.uint8),
    "0 and 255": (255 * END).astype(np.uint8),
    "int64": END,
    "float32": END.astype(np.float32),
    "float64": END.astype(np.float64),
    "0 and 255 as floats": 255.0 * END,
    "a column": END[:, None].astype(bool),
    "a column of bytes": (255 * END[:, None]).astype(np.uint8),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["terminals", "timeouts", "episode_terminals", "truncations", "terminations", "dones"])
def test_flags_of_every_name_and_type_end_episodes(name, kind):
    columns, _ = read(**{"timeouts": np.zeros(6, bool), name: TYPES[kind]})
    assert ends_of(columns) == [2, 5]
    is_terminal = name in ("terminals", "terminations", "dones")
    assert columns["terminals"].any() == is_terminal
    assert columns["timeouts"].any() != is_terminal
    assert columns["terminals"].dtype == columns["timeouts"].dtype == bool


@pytest.mark.parametrize(
    ("others", "terminals", "timeouts"),
    [
        ({}, [2, 5], None),  # nothing says which ends are time limits
        ({"timeouts": [0, 0, 0, 0, 0, 1]}, [2], [5]),
        ({"truncated": [0, 0, 0, 0, 0, 1]}, [2], [5]),
        ({"terminals": [0, 0, 1, 0, 0, 0]}, [2], [5]),
        ({"terminals": [0, 0, 1, 0, 0, 0], "timeouts": [1, 0, 0, 0, 0, 0]}, [2], [0, 5]),
    ],
)
def test_done_means_what_the_other_flags_leave_open(others, terminals, timeouts):
    columns, _ = read(dones=END, **{name: np.array(flags, bool) for name, flags in others.items()})
    assert np.flatnonzero(columns["terminals"]).tolist() == terminals
    assert (np.flatnonzero(columns["timeouts"]).tolist() if "timeouts" in columns else None) == timeouts


def test_what_other_names_set_is_reported():
    _, (found,) = read(terminals=np.zeros(6), episode_terminals=END.astype(np.float32))
    assert (found.name, found.count, found.matters) == ("flags", 2, False)
    assert found.where == "episode_terminals (true in 2 rows)"
    _, (found,) = read(dones=END)
    assert found.matters
    assert "time limits" in found.effect
    assert read(terminals=END, timeouts=END)[1] == []


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("dones", np.zeros(4), "has 4 rows, but observations has 6"),
        ("truncations", np.zeros((6, 2)), "has shape (6, 2)"),
        ("dones", np.array([0, 1, -1, 0, 0, 0]), "is -1 in row 2"),
        ("episode_terminals", np.array(["a"] * 6), "holds <U1 values"),
        ("dones", {"a": END}, "is a group"),
        ("truncated", np.float32(1), "has shape ()"),
        ("masks", np.ones(6), "not known"),
        ("episode_id", np.arange(6), "not known"),
        ("is_last", END[:, None], "not known"),
        ("time_limits", END, "not known"),
        ("traj_ends", END, "not known"),
    ],
)
def test_what_is_not_read_is_named_and_never_ignored(name, flags, reason):
    columns, (found,) = read(**{"terminals": END, name: flags})
    assert np.flatnonzero(columns["terminals"]).tolist() == [2, 5]
    assert "timeouts" not in columns
    assert (found.name, found.matters) == ("flags not read", True)
    assert found.where.startswith(f"{name}: ")
    assert reason in found.where


@pytest.mark.parametrize("name", ["infos", "metadata", "discrete_action", "terminal_observations", "version", "masks"])
def test_what_is_no_flag_is_not_mistaken_for_one(name):
    assert read(**{"terminals": END, name: np.zeros((6, 3))})[1] == []


@pytest.mark.parametrize("name", ["terminals", "timeouts"])
@pytest.mark.parametrize("flags", [np.zeros(4), np.zeros((6, 2)), np.array([0, 0, 3, 0, 0, 0]), {"a": END}])
def test_d4rl_s_own_flags_must_be_right(name, flags):
    with pytest.raises(InputError, match=rf"a\.hdf5: {name} "):
        read(**{name: flags})


def test_no_flags_are_no_columns():
    assert read() == ({}, [])


@pytest.mark.parametrize("flag", [True, np.True_, 1])
def test_an_episode_may_have_one_flag_for_its_last_row(flag):
    columns, _ = read(is_episode=True, terminated=np.asarray(flag))
    assert columns["terminals"].tolist() == [False] * 5 + [True]
    assert not columns["timeouts"].any()
    columns, _ = read(is_episode=True, terminated=np.asarray(False))
    assert not columns["terminals"].any()
    assert ends_of(columns) == [5]


def test_flags_that_only_some_stretches_have_are_joined():
    first = read_flags({"dones": np.array([0, 1])}, 2, "", is_episode=True)
    second, empty = read_flags({}, 3, "", is_episode=True), read_flags({}, 0, "", is_episode=True)
    columns, _ = join_flags([first, empty, second], stretches_are_episodes=True)
    assert columns["terminals"].tolist() == [False, True, False, False, False]
    assert columns["timeouts"].tolist() == [False, False, False, False, True]
