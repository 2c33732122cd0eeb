"""data.episodes: where episodes end by flags, by the rules of a data set, and by what the data show."""

import numpy as np
import pytest

from data.episodes import EpisodeRules, cut_episodes, find_jumps, find_resets, find_rules, rows_text

EVERY_STEP = np.float32([0.1, 0.2, -0.1])


def walk(rows, start=0.0, seed=0):
    """Returns states ``(rows, 3)`` that go their way from ``start``, with small steps."""
    steps = EVERY_STEP + 0.05 * np.random.default_rng(seed).normal(size=(rows, 3))
    return (start + np.vstack([np.zeros(3), np.cumsum(steps[:-1], axis=0)])).astype(np.float32)


def columns_of(states, *, following=None, terminals=(), timeouts=None):
    """Returns columns of these states; flags are given by their rows."""
    rows = len(states)
    columns = {
        "observations": states,
        "actions": np.zeros((rows, 1), np.float32),
        "rewards": np.arange(rows, dtype=np.float32),
        "terminals": np.isin(np.arange(rows), terminals),
    }
    if following is not None:
        columns["next_observations"] = following
    if timeouts is not None:
        columns["timeouts"] = np.isin(np.arange(rows), timeouts)
    return columns


def lengths(trajectories):
    return [len(trajectory) for trajectory in trajectories]


@pytest.fixture
def recorded():
    """States and the states that followed of three episodes of 20, 30 and 25 rows, which start at 0, 5 and -5."""
    walks = [walk(length + 1, start, seed) for seed, (length, start) in enumerate([(20, 0), (30, 5), (25, -5)])]
    return np.concatenate([states[:-1] for states in walks]), np.concatenate([states[1:] for states in walks])


# --- Flags ---


def test_episodes_end_at_terminals_at_timeouts_and_with_the_data():
    columns = columns_of(walk(10), terminals=[2], timeouts=[5])
    trajectories, findings = cut_episodes(columns)
    assert lengths(trajectories) == [3, 3, 4]
    assert [t.terminated for t in trajectories] == [True, False, False]
    assert findings == []
    assert np.shares_memory(trajectories[1].observations, columns["observations"])
    assert trajectories[1].rewards.tolist() == [3, 4, 5]
    assert all(t.next_observations is None and t.in_order for t in trajectories)


def test_rewards_may_be_missing():
    columns = columns_of(walk(10), timeouts=[4])
    del columns["rewards"]
    assert [t.rewards for t in cut_episodes(columns)[0]] == [None, None]


@pytest.mark.parametrize(
    ("timeouts", "expected", "ends"),
    [([19, 39], [20, 20], "timeouts"), (None, [16, 20, 4], "the last terminal of each")],
)
def test_terminals_one_behind_the_other_mark_a_state(timeouts, expected, ends):
    trajectories, (found,) = cut_episodes(
        columns_of(walk(40), terminals=[*range(10, 16), *range(30, 36)], timeouts=timeouts)
    )
    assert lengths(trajectories) == expected
    assert (found.name, found.count, found.matters) == ("terminals inside episodes", 12 if timeouts else 10, True)
    assert ends in found.effect


def test_a_few_episodes_of_one_row_are_believed():
    trajectories, findings = cut_episodes(columns_of(walk(40), terminals=[4, 5, 19, 29, 39], timeouts=[]))
    assert (lengths(trajectories), findings) == ([5, 1, 14, 10, 10], [])


# --- Rows that do not follow ---


def test_without_timeouts_an_episode_ends_where_the_next_row_is_another_state(recorded):
    states, following = recorded
    trajectories, (found,) = cut_episodes(columns_of(states, following=following, terminals=[49]), limit=10)
    assert lengths(trajectories) == [20, 30, 25]
    assert [t.terminated for t in trajectories] == [False, True, False]
    assert (found.name, found.count, found.where, found.matters) == (
        "rows that do not follow",
        1,
        "behind row 19",
        True,
    )


def test_rows_that_were_dropped_inside_an_episode_end_it_too(recorded):
    states, following = (np.delete(part, [7, 8, 60], axis=0) for part in recorded)
    trajectories, (found,) = cut_episodes(columns_of(states, following=following, timeouts=[17, 47]))
    assert lengths(trajectories) == [7, 11, 30, 10, 14]
    assert (found.count, found.where) == (2, "behind rows 6, 57")


def test_rounding_is_no_end(recorded):
    states, following = (part + np.float32(1000) for part in recorded)
    noisy = following + np.float32(1e-4) * np.random.default_rng(0).choice([-1, 0, 1], following.shape)
    trajectories, (found,) = cut_episodes(columns_of(states, following=noisy.astype(np.float32)))
    assert lengths(trajectories) == [20, 30, 25]
    assert found.count == 2


@pytest.mark.parametrize("kind", ["shuffled", "interleaved"])
def test_rows_in_no_order_are_kept_in_groups(recorded, kind):
    order = np.random.default_rng(0).permutation(75) if kind == "shuffled" else np.arange(75).reshape(5, 15).T.ravel()
    states, following = (part[order] for part in recorded)
    trajectories, (found,) = cut_episodes(columns_of(states, following=following, terminals=[3]))
    assert (found.name, found.matters) == ("rows in no order", True)
    assert "rollouts of more than one step are refused" in found.effect
    assert not any(t.in_order or t.terminated for t in trajectories)
    np.testing.assert_array_equal(np.concatenate([t.observations for t in trajectories]), states)
    assert len(trajectories) == 75
    many = [np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32) for _ in range(2)]
    assert lengths(cut_episodes(columns_of(many[0], following=many[1]))[0]) == [10] * 100


# --- Rules of data sets ---


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("antmaze-large-play-v0", EpisodeRules(terminals_end=False)),
        ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed", EpisodeRules(terminals_end=False)),
        ("maze2d-eval-umaze-dense-v1", EpisodeRules(repeats_last_row=True)),
        ("bullet-maze2d-open-v0", EpisodeRules(repeats_last_row=True)),
        ("door-human-v0", EpisodeRules(ends_at_limit=False, starts_alike=True)),
        ("pen-v0_demos_clipped", EpisodeRules(ends_at_limit=False, starts_alike=True)),
        ("door-human-v1", EpisodeRules(starts_alike=True)),
        ("hammer-cloned-v0", EpisodeRules(starts_alike=True)),
        ("halfcheetah-medium-v0", EpisodeRules(starts_alike=True)),
        ("walker_mixed", EpisodeRules(starts_alike=True)),
        ("ant-medium-v0", EpisodeRules(starts_alike=True)),
        ("kitchen-complete-v0", EpisodeRules()),
        ("mine", EpisodeRules()),
        (None, EpisodeRules()),
    ],
)
def test_rules_are_found_by_id_or_file(name, rules):
    assert find_rules(name) == rules


def test_in_antmaze_terminals_end_nothing():
    rules = find_rules("antmaze-umaze-v2")
    trajectories, (found,) = cut_episodes(columns_of(walk(40), terminals=[10, 15, 19], timeouts=[19, 39]), 700, rules)
    assert lengths(trajectories) == [20, 20]
    assert not any(t.terminated for t in trajectories)
    assert (found.count, found.where, found.matters) == (2, "rows 10, 15", False)


def test_the_stale_row_behind_each_goal_of_maze2d_is_dropped():
    """The state moves on while the row is written again: what is recorded next is two steps on."""
    states = walk(30)
    stale = np.insert(np.delete(states, [11, 21], axis=0), [11, 20], states[[10, 20]], axis=0)
    assert (stale[10] == stale[11]).all() and (stale[20] == stale[21]).all(), "the test's own rows are as it says"
    rules = find_rules("maze2d-umaze-v1")
    for timeouts in ([10, 20], []):
        trajectories, (found,) = cut_episodes(columns_of(stale, timeouts=timeouts), 300, rules)
        assert lengths(trajectories) == [11, 9, 8]
        assert (found.name, found.count, found.where, found.matters) == ("stale rows", 2, "rows 11, 21", False)
    assert lengths(cut_episodes(columns_of(stale, timeouts=[]))[0]) == [30], "elsewhere a state may stay"


# --- Resets that the data show ---


def resetting(*lengths, noise=0.02):
    """Returns episodes that all start near zero."""
    starts = np.random.default_rng(9).normal(size=(len(lengths), 3)) * noise
    return np.concatenate([walk(n, start, seed) for seed, (n, start) in enumerate(zip(lengths, starts, strict=True))])


def test_without_timeouts_episodes_end_at_the_limit_where_the_data_agree():
    trajectories, (found,) = cut_episodes(columns_of(resetting(50, 50, 50, 20)), 50, find_rules("hopper-medium-v0"))
    assert lengths(trajectories) == [50, 50, 50, 20]
    assert (found.name, found.count, found.matters) == ("episode ends from the limit", 3, False)
    assert "3 of these ends look like resets" in found.effect


@pytest.mark.parametrize("name", ["halfcheetah-medium-v0", "mine"])
def test_where_the_data_disagree_episodes_end_at_resets(name):
    trajectories, (found,) = cut_episodes(columns_of(resetting(49, 49, 49, 49)), 50, find_rules(name))
    assert lengths(trajectories) == [49] * 4
    assert (found.name, found.count, found.matters) == ("episode ends from resets", 3, True)
    assert "of the ends after every 50 steps, 0 of 3 do" in found.effect


def test_steps_are_counted_anew_from_terminals_and_resets():
    columns = columns_of(resetting(30, 49, 49, 120), terminals=[29])
    assert lengths(cut_episodes(columns, 50, find_rules("hopper-medium-v0"))[0]) == [30, 49, 49, 50, 50, 20]


def test_where_no_reset_can_be_seen_the_limit_is_a_guess_that_is_told():
    trajectories, (found,) = cut_episodes(columns_of(walk(120)), 50)
    assert lengths(trajectories) == [50, 50, 20]
    assert (found.count, found.where, found.matters) == (2, "behind rows 49, 99", True)
    assert "no reset can be seen" in found.effect


def test_demonstrations_longer_than_the_limit_stay_whole():
    columns = columns_of(resetting(60, 75, 80))
    trajectories, (found,) = cut_episodes(columns, 50, find_rules("door-human-v0"))
    assert lengths(trajectories) == [60, 75, 80]
    assert "demonstrations may be longer" in found.effect
    flagged = columns_of(resetting(60, 75, 80), terminals=[59, 134, 214])
    assert lengths(cut_episodes(flagged, 50, find_rules("door-human-v0"))[0]) == [60, 75, 80]


def test_timeouts_and_next_observations_leave_nothing_to_guess():
    states = resetting(50, 70)
    timed = columns_of(states, timeouts=[49])
    assert lengths(cut_episodes(timed, 40, find_rules("hopper-medium-v0"))[0]) == [50, 70]
    following = np.vstack([states[1:], states[-1:]])
    assert lengths(cut_episodes(columns_of(states, following=following), 40)[0]) == [120]


def test_resets_are_seen_where_all_episodes_start_alike():
    """Not by their size: these states move by large steps, as large as those back to the start."""
    random = np.random.default_rng(0)
    states = random.normal(size=(400, 8)) + 3 * np.sin(np.arange(400) / 3)[:, None]
    starts = np.array([0, 90, 210, 300])
    states[starts] = 0.1 * random.normal(size=(4, 8)) + 3 * np.tile([1, -1], 4)
    is_end = np.arange(400) == 399
    assert find_resets(states.astype(np.float32), is_end, starts_alike=True).tolist() == [89, 209, 299]
    assert find_resets(states.astype(np.float32), is_end, starts_alike=False).size == 0


# --- Jumps ---


def test_jumps_are_changes_that_a_gap_separates_from_all_others():
    changes = np.random.default_rng(0).normal(size=(1000, 3))
    assert find_jumps(changes).size == 0
    changes[[10, 500], [0, 2]] = 100, -80
    assert find_jumps(changes).tolist() == [10, 500]
    changes[700:720, 1] = np.geomspace(10, 100, 20)  # a tail without a gap
    assert find_jumps(changes).size == 0
    assert find_jumps(changes[:0]).size == 0


def test_dimensions_that_mostly_stay_have_no_jumps():
    changes = np.random.default_rng(0).normal(size=(1000, 2))
    changes[:, 1] = 0
    changes[::50, 1] = 1000
    assert find_jumps(changes).size == 0


@pytest.mark.parametrize(
    ("rows", "text"), [([7], "row 7"), ([1, 2, 3], "rows 1, 2, 3"), (range(2000), "rows 0, 1, 2 and 1,997 more")]
)
def test_rows_in_words(rows, text):
    assert rows_text(rows) == text
