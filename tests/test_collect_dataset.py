"""collect_dataset: what the file holds, what makes it reproducible, what is refused; and the bundled datasets."""

import dataclasses
import hashlib
import pickle
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import collect_dataset
from collect_dataset import collect, main, make_env
from data.behaviour import RandomPolicy, Snapshots, SquashedGaussianPolicy
from data.sources import load_dataset
from evaluation.oracle import prepare_oracle
from evaluation.predictions import Scale
from utils import InputError

pytest.importorskip("mujoco")
gymnasium = pytest.importorskip("gymnasium")
h5py = pytest.importorskip("h5py")

KEYS = {"observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "infos/qpos", "infos/qvel"}
DATA = Path(__file__).parent.parent / "data"
BUNDLED = {
    "walker2d-medium-demo": ("Walker2d-v5", KEYS - {"next_observations"}),
    "hopper-hidden-demo": ("Hopper-v5", KEYS),
    "hopper-replay-demo": ("Hopper-v5", KEYS),
    "hopper-medium-demo": ("Hopper-v5", KEYS),
    "hopper-random-demo": ("Hopper-v5", KEYS),
    "hopper-medium-noisy-demo": ("Hopper-v5", KEYS),
    "halfcheetah-medium-demo": ("HalfCheetah-v5", KEYS - {"next_observations"}),
}
OLDER = {"hopper-medium-demo", "hopper-medium-noisy-demo", "halfcheetah-medium-demo"}  # policies acted in float32


def read(path):
    """Returns the columns and the attributes of a dataset."""
    columns = {}
    with h5py.File(path) as file:
        file.visititems(lambda key, item: columns.update({key: item[:]}) if isinstance(item, h5py.Dataset) else None)
        return columns, dict(file.attrs)


def collect_file(path, *flags, env="Hopper-v5", steps=200):
    main(["--env", env, "--steps", str(steps), "--output", str(path), *flags])
    return read(path)


def small_policy(env, seed=0):
    """A policy of the saved kind with random weights: 8 hidden units."""
    random = np.random.default_rng(seed)
    observation_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    arrays = {"low": env.action_space.low, "high": env.action_space.high}
    arrays |= {"weight_0": draw(8, observation_dim), "bias_0": draw(8)}
    arrays |= {"mean_weight": draw(action_dim, 8), "mean_bias": draw(action_dim)}
    arrays |= {"log_std_weight": draw(action_dim, 8) / 8, "log_std_bias": draw(action_dim)}
    return SquashedGaussianPolicy(arrays, "small: random weights")


@pytest.fixture(scope="module")
def hopper():
    return make_env("Hopper-v5")


@pytest.fixture
def policy_file(tmp_path, hopper):
    path = tmp_path / "policy.npz"
    small_policy(hopper).save(path, "Hopper-v5")
    return path


# ------------------------------------------------------------------------------------------------ the file


def test_file_holds_d4rl_keys_and_how_it_was_made(tmp_path):
    columns, attributes = collect_file(tmp_path / "new" / "random.hdf5", "--seed", "3", "--process_noise", "0.5")

    assert set(columns) == KEYS
    widths = {"observations": 11, "next_observations": 11, "actions": 3, "infos/qpos": 6, "infos/qvel": 6}
    for key, column in columns.items():
        assert column.shape == ((200, widths[key]) if key in widths else (200,)), key
        assert column.dtype == (bool if key in ("terminals", "timeouts") else np.float32), key
        assert np.isfinite(column).all()
    assert attributes["env_name"] == "Hopper-v5"
    assert attributes["policy"].startswith("random")
    assert (attributes["seed"], attributes["process_noise"]) == (3, 0.5)
    assert "--process_noise 0.5" in attributes["command"]
    assert {f"{name}_version" for name in ("gymnasium", "mujoco", "numpy")} <= set(attributes)


def test_mean_return_is_over_whole_episodes(tmp_path):
    columns, attributes = collect_file(tmp_path / "random.hdf5")

    ends = np.flatnonzero(columns["terminals"])  # 200 random Hopper steps fall often and never reach the time limit
    returns = [part.sum() for part in np.split(columns["rewards"].astype(np.float64), ends + 1)[:-1]]
    assert attributes["episodes"] == len(returns) > 1
    assert attributes["mean_return"] == pytest.approx(np.mean(returns), rel=1e-5)


def test_rows_of_an_episode_follow_each_other_and_no_others_do(tmp_path):
    columns, _ = collect_file(tmp_path / "random.hdf5")

    ends = columns["terminals"] | columns["timeouts"]
    follows = (columns["next_observations"][:-1] == columns["observations"][1:]).all(axis=1)
    np.testing.assert_array_equal(follows, ~ends[:-1])
    assert ends[-1], "the last row ends its episode, so that files can be concatenated"


def test_time_limit_is_a_timeout_and_not_a_terminal(tmp_path):
    columns, attributes = collect_file(tmp_path / "cheetah.hdf5", env="HalfCheetah-v5", steps=1500)

    assert not columns["terminals"].any()
    np.testing.assert_array_equal(np.flatnonzero(columns["timeouts"]), [999, 1499])
    assert attributes["episodes"] == 1, "the second was cut by the end of the file"


def test_environment_without_mujoco_has_no_simulator_state(tmp_path):
    columns, _ = collect_file(tmp_path / "pendulum.hdf5", env="Pendulum-v1", steps=10)

    assert set(columns) == {key for key in KEYS if not key.startswith("infos/")}
    assert np.abs(columns["actions"]).max() > 1, "Pendulum's actions span -2 to 2"


def test_oldest_layout_lacks_next_observations_only(tmp_path):
    full, _ = collect_file(tmp_path / "full.hdf5")
    oldest, _ = collect_file(tmp_path / "oldest.hdf5", "--drop_next_observations")

    assert set(full) - set(oldest) == {"next_observations"}
    for key, column in oldest.items():
        np.testing.assert_array_equal(column, full[key])


@pytest.mark.parametrize(("env_id", "tolerance"), [("Hopper-v5", 1e-5), ("HalfCheetah-v5", 1e-3)])
def test_simulator_reset_to_a_row_reproduces_what_followed(env_id, tolerance):
    env = make_env(env_id)
    columns, _ = collect(env, [(RandomPolicy(env.action_space.low, env.action_space.high), 300)], seed=0)
    simulator = make_env(env_id)
    simulator.reset(seed=1)

    for row in range(300):
        simulator.unwrapped.set_state(*(columns[f"infos/{name}"][row].astype(np.float64) for name in ("qpos", "qvel")))
        observation = simulator.unwrapped.step(columns["actions"][row])[0]
        # Changes per step are of the order of 1; the differences come from keeping the state in float32.
        np.testing.assert_allclose(observation, columns["next_observations"][row], atol=tolerance)


# ------------------------------------------------------------------------------------------------ reproducible


def test_seed_decides_everything(tmp_path):
    first, _ = collect_file(tmp_path / "first.hdf5", "--seed", "1", "--process_noise", "0.1")
    again, _ = collect_file(tmp_path / "again.hdf5", "--seed", "1", "--process_noise", "0.1")
    other, _ = collect_file(tmp_path / "other.hdf5", "--seed", "2", "--process_noise", "0.1")

    for key, column in first.items():
        np.testing.assert_array_equal(column, again[key])
    assert not np.array_equal(first["actions"], other["actions"])
    assert not np.array_equal(first["observations"][0], other["observations"][0])


def test_process_noise_changes_what_happens_but_not_what_was_intended(tmp_path):
    calm, _ = collect_file(tmp_path / "calm.hdf5", steps=1)
    noisy, _ = collect_file(tmp_path / "noisy.hdf5", "--process_noise", "0.3", steps=1)

    np.testing.assert_array_equal(calm["observations"], noisy["observations"])
    np.testing.assert_array_equal(calm["actions"], noisy["actions"])
    assert np.abs(calm["next_observations"] - noisy["next_observations"]).max() > 1e-3


def test_executed_action_stays_in_the_action_space(hopper):
    class Recorder(gymnasium.Wrapper):
        executed: list = []  # noqa: RUF012 - one recorder, one list

        def step(self, action):
            self.executed.append(action)
            return super().step(action)

    recorder = Recorder(hopper)
    policy = RandomPolicy(*[np.full(3, value) for value in (-1.0, 1.0)])
    columns, _ = collect(recorder, [(policy, 500)], 0, 0.5)

    executed = np.array(recorder.executed)
    inside = np.abs(executed) < 1
    assert np.abs(executed).max() == 1.0
    # Standard deviation of the noise where clipping did not cut it, for intended actions near zero: 0.5 within 20%.
    central = inside & (np.abs(columns["actions"]) < 0.1)
    assert (executed - columns["actions"])[central].std() == pytest.approx(0.45, rel=0.2)


def test_saved_policy_acts_as_before(tmp_path, hopper, policy_file):
    policy = small_policy(hopper)
    loaded = SquashedGaussianPolicy.load(policy_file, "Hopper-v5", 11)
    observation = np.linspace(-1, 1, 11)

    np.testing.assert_array_equal(
        loaded(observation, np.random.default_rng(5)), policy(observation, np.random.default_rng(5))
    )
    assert loaded.description == policy.description

    first, attributes = collect_file(tmp_path / "first.hdf5", "--policy", str(policy_file))
    again, _ = collect_file(tmp_path / "again.hdf5", "--policy", str(policy_file))
    for key, column in first.items():
        np.testing.assert_array_equal(column, again[key])
    assert attributes["policy"] == "small: random weights"


def test_the_same_command_writes_the_same_bytes(tmp_path, policy_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digests = set()
    for _ in range(2):
        collect_file(
            "data.hdf5", "--policy", str(policy_file), str(policy_file), "--process_noise", "0.1", "--overwrite"
        )
        digests.add(load_dataset("data.hdf5").sha256)
    assert len(digests) == 1


def test_actions_hardly_depend_on_how_the_processor_adds(hopper):
    """The same network with its hidden units in another order adds other sums of rounded products."""
    policy = small_policy(hopper)
    order = np.random.default_rng(0).permutation(8)
    arrays = policy.arrays | {name: policy.arrays[name][order] for name in ("weight_0", "bias_0")}
    arrays |= {name: policy.arrays[name][:, order] for name in ("mean_weight", "log_std_weight")}
    shuffled = SquashedGaussianPolicy(arrays, "")

    observations = np.random.default_rng(1).standard_normal((1000, 11))
    first, again = (
        np.array([each(seen, np.random.default_rng(2)) for seen in observations]) for each in (policy, shuffled)
    )
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)


def test_squashed_gaussian_follows_its_formula():
    one, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    arrays = {"weight_0": one, "bias_0": zero, "mean_weight": one, "mean_bias": zero}
    arrays |= {"log_std_weight": 0 * one, "log_std_bias": zero - 100, "low": zero, "high": zero + 4}
    policy = SquashedGaussianPolicy(arrays, "")

    # A negative observation is cut to 0 by the ReLU: tanh(0) = 0 is the middle of 0 to 4.
    assert policy(np.array([-3.0]), np.random.default_rng(0)) == pytest.approx([2.0], abs=1e-6)
    # 0.5 passes: 2 + 2 tanh(0.5); the log standard deviation of -100 is clipped to -20, next to no noise.
    assert policy(np.array([0.5]), np.random.default_rng(0)) == pytest.approx([2 + 2 * np.tanh(0.5)], abs=1e-6)


# ------------------------------------------------------------------------------------------------ several policies


class Constant:
    """Takes one action, which tells who acted."""

    def __init__(self, value):
        self.value, self.description = value, f"always {value}"

    def __call__(self, observation, random):
        return np.full(3, self.value, np.float32)


def test_several_policies_act_one_after_the_other_in_episodes_of_their_own(hopper):
    columns, returns = collect(hopper, [(Constant(0.1), 45), (Constant(0.2), 65)], seed=0)

    np.testing.assert_array_equal(columns["actions"][:, 0], np.float32([0.1] * 45 + [0.2] * 65))
    ends = columns["terminals"] | columns["timeouts"]
    assert ends[[44, 109]].all() and columns["timeouts"].sum() == 2, "cut where a policy's share ends"
    follows = (columns["next_observations"][:-1] == columns["observations"][1:]).all(axis=1)
    np.testing.assert_array_equal(follows, ~ends[:-1])
    assert np.abs(columns["infos/qvel"][45]).max() < 0.01, "the second begins where episodes do"
    assert not np.array_equal(columns["observations"][45], columns["observations"][0]), "but not in the same state"
    # Episodes that were cut are not counted, not even those of the first policy.
    whole = [part.sum() for part in np.split(columns["rewards"], np.flatnonzero(ends) + 1)[:-1]]
    kept = columns["terminals"][np.flatnonzero(ends)]
    assert len(returns) == kept.sum()
    np.testing.assert_allclose(returns, np.array(whole)[kept], rtol=1e-5)


def test_a_mixture_says_whose_rows_are_whose(tmp_path, hopper):
    paths = [tmp_path / f"{seed}.npz" for seed in range(3)]
    for seed, path in enumerate(paths):
        policy = small_policy(hopper, seed)
        policy.description = f"number {seed}"
        policy.save(path, "Hopper-v5")

    columns, attributes = collect_file(tmp_path / "mixture.hdf5", "--policy", *map(str, paths))
    assert attributes["policy"] == "mixture: 3 policies, one after the other"
    assert list(attributes["policies"]) == ["number 0", "number 1", "number 2"]
    assert list(attributes["policy_rows"]) == [67, 67, 66]
    assert columns["timeouts"][[66, 133, 199]].sum() + columns["terminals"][[66, 133, 199]].sum() == 3
    alone, _ = collect_file(tmp_path / "alone.hdf5", "--policy", str(paths[0]), steps=67)
    for key, column in alone.items():
        np.testing.assert_array_equal(column, columns[key][:67])


# ------------------------------------------------------------------------------------------------ hidden velocities


def test_hidden_velocities_are_all_that_is_left_out(tmp_path, policy_file, capsys):
    seen, _ = collect_file(tmp_path / "seen.hdf5", "--policy", str(policy_file))
    hidden, attributes = collect_file(tmp_path / "hidden.hdf5", "--policy", str(policy_file), "--hide_velocities")

    assert set(hidden) == KEYS
    for key, column in hidden.items():
        whole = seen[key][:, :5] if key.endswith("observations") else seen[key]  # Hopper shows 5 positions of 6
        np.testing.assert_array_equal(column, whole)
    np.testing.assert_array_equal(hidden["observations"], hidden["infos/qpos"][:, 1:])
    assert attributes["hidden"] == "velocities"
    capsys.readouterr()
    main(["--describe", str(tmp_path / "hidden.hdf5")])
    assert "| Hopper-v5 without its velocities |" in capsys.readouterr().out


def test_the_simulator_is_no_oracle_where_velocities_are_hidden(tmp_path):
    collect_file(tmp_path / "hidden.hdf5", "--hide_velocities")
    dataset = load_dataset(str(tmp_path / "hidden.hdf5"), simulator_states=True)
    with pytest.raises(InputError, match=r"\(6, 6, 3, 5\), expected \(6, 6, 3, 11\)"):
        prepare_oracle(dataset, np.arange(3), Scale(np.arange(5), np.ones(5)), process_noise=0.0, seed=0)


# ------------------------------------------------------------------------------------------------ soft actor-critic


@pytest.fixture
def short_training(monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setitem(collect_dataset.SAC_SETTINGS, "learning_starts", 50)
    monkeypatch.setitem(collect_dataset.SAC_SETTINGS, "policy_kwargs", {"net_arch": [8, 8]})
    monkeypatch.setitem(collect_dataset.SAC_SETTINGS, "batch_size", 8)
    monkeypatch.setitem(collect_dataset.SAC_SETTINGS, "train_freq", 10)
    monkeypatch.setattr(collect_dataset, "EVALUATE_EVERY", 100)
    monkeypatch.setattr(collect_dataset, "EVALUATION_EPISODES", 2)


def test_sac_trains_saves_and_collects_what_its_file_collects_again(tmp_path, short_training):
    trained, attributes = collect_file(tmp_path / "sac.hdf5", "--policy", "sac", "--target_return", "-1000000")
    again, _ = collect_file(tmp_path / "again.hdf5", "--policy", str(tmp_path / "sac.npz"))

    assert attributes["policy"].startswith("sac: stochastic actions after 100 training steps")
    for key, column in trained.items():
        np.testing.assert_array_equal(column, again[key])


def test_snapshots_are_of_the_whole_training_and_spread_over_returns(tmp_path, short_training, hopper, monkeypatch):
    monkeypatch.setattr(collect_dataset, "SNAPSHOTS", 3)
    flags = ["--policy", "sac", "--target_return", "1e9", "--max_train_steps", "500"]
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / "sac.hdf5", *flags, "--save_snapshots", str(tmp_path / "all"))

    files = sorted((tmp_path / "all").iterdir())
    assert len(files) == 3
    assert {path.name for path in files} <= {f"0000{step}.npz" for step in (100, 200, 300, 400, 500)}
    kept = [SquashedGaussianPolicy.load(path, "Hopper-v5", 11) for path in files]
    best = SquashedGaussianPolicy.load(tmp_path / "sac.npz", "Hopper-v5", 11)
    assert max(policy.evaluation_return for policy in kept) == best.evaluation_return
    for path, policy in zip(files, kept, strict=True):
        steps = int(path.stem)
        described = f"after {steps} training steps (seed 0, evaluation return {policy.evaluation_return:.0f} over 2"
        assert described in policy.description
        assert collect_dataset.evaluate(hopper, policy, 2, seed=0) == policy.evaluation_return, "of what was saved"
    collect_file(tmp_path / "replay.hdf5", "--policy", *map(str, files))


def test_the_policy_between_the_closest_neighbours_goes(tmp_path, hopper):
    policy, snapshots = small_policy(hopper), Snapshots(tmp_path / "kept", count=4)
    for step, value in enumerate([0.0, 10.0, 100.0, 30.0, 31.0, -20.0, 200.0]):
        policy.evaluation_return = value
        snapshots.add(policy, "Hopper-v5", step)

    # 30 goes, as its neighbours 10 and 31 are the closest; then 0, between -20 and 10; then 10, between -20 and 31.
    assert [value for value, _ in snapshots.kept] == [-20.0, 31.0, 100.0, 200.0]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {f"000000{step}.npz" for step in (5, 4, 2, 6)}


def test_target_out_of_reach_keeps_the_best_policy(tmp_path, short_training, capsys):
    flags = ["--policy", "sac", "--target_return", "1e9", "--max_train_steps", "250"]
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / "sac.hdf5", *flags, "--save_policy", str(tmp_path / "best.npz"))

    assert "--policy" in capsys.readouterr().err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["best.npz"]
    collect_file(tmp_path / "from_best.hdf5", "--policy", str(tmp_path / "best.npz"))


def test_policy_copied_from_an_actor_agrees_with_it(hopper):
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    model = stable_baselines3.SAC("MlpPolicy", hopper, policy_kwargs={"net_arch": [8, 8]}, buffer_size=1, seed=0)
    policy = SquashedGaussianPolicy.from_actor(model.actor, hopper.action_space.low, hopper.action_space.high)

    for observation in np.random.default_rng(0).standard_normal((20, 11)).astype(np.float32):
        mean, log_std = policy.gaussian(observation)
        expected_mean, expected_log_std, _ = model.actor.get_action_dist_params(
            model.policy.obs_to_tensor(observation)[0]
        )
        np.testing.assert_allclose(mean, expected_mean.detach().numpy()[0], atol=2e-3)  # weights have 11 bits
        np.testing.assert_allclose(log_std, expected_log_std.detach().numpy()[0], atol=2e-3)
        # Without noise the squashed mean is what stable-baselines3 calls the deterministic action.
        np.testing.assert_allclose(np.tanh(mean), model.predict(observation, deterministic=True)[0], atol=2e-3)


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env", "Hoper-v5"], "did you mean 'Hopper-v5'?"),
        (["--env", "CartPole-v1"], "expected a vector of floats"),
        (["--policy", "nowhere.npz"], "'nowhere.npz' is not a file"),
        (["--steps", "0"], "expected at least 1"),
        (["--steps", "-5"], "expected at least 1"),
        (["--seed", "-1"], "expected 0 or more"),
        (["--process_noise", "-0.1"], "expected 0 or more"),
        (["--process_noise", "nan"], "expected 0 or more"),
        (["--policy", "sac"], "needs --target_return"),
        (["--policy", "sac", "--target_return", "nan"], "needs --target_return"),
        (["--policy", "sac", "--target_return", "1", "--max_train_steps", "0"], "expected at least 1"),
        (["--policy", "sac", "--target_return", "1", "--output", "same.npz"], "is the file of --output"),
        (["--policy", "sac", "--target_return", "1", "--output", "."], "--output '.' is a folder"),
        (["--target_return", "100"], "is for --policy sac"),
        (["--save_snapshots", "all"], "is for --policy sac"),
        (["--policy", "sac", "--target_return", "1", "--save_snapshots", str(DATA)], "give a new folder"),
        (["--policy", "sac", "random"], "several policies must be .npz files"),
        (["--policy", *["nowhere.npz"] * 11], "too few for 11 policies"),
        (["--policy", str(DATA / "policies" / "hopper-medium.npz"), "nowhere.npz"], "'nowhere.npz' is not a file"),
        (["--env", "Ant-v5", "--hide_velocities"], "those of Ant-v5 are made of qpos, qvel, cfrc_ext"),
        (["--env", "Pendulum-v1", "--hide_velocities"], "those of Pendulum-v1 are not described"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        main(["--env", "Hopper-v5", "--steps", "10", "--output", str(tmp_path / "data.hdf5"), *flags])

    assert_one_line(capsys, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"), [([], "--env is missing"), (["--env", "Hopper-v5"], "--output is missing")]
)
def test_missing_flag_is_named(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert_one_line(capsys, message)


def test_existing_output_is_kept_unless_told(tmp_path, capsys):
    path = tmp_path / "data.hdf5"
    path.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        collect_file(path)

    assert_one_line(capsys, "--overwrite")
    assert path.read_text() == "precious"
    columns, _ = collect_file(path, "--overwrite", steps=5)
    assert len(columns["rewards"]) == 5


def test_existing_policy_is_kept_unless_told(tmp_path, capsys):
    path = tmp_path / "data.npz"
    path.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / "data.hdf5", "--policy", "sac", "--target_return", "1")

    assert_one_line(capsys, "--overwrite")
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["file/data.hdf5", "folder"])
def test_output_that_cannot_be_written_is_refused(tmp_path, capsys, name):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / name)

    assert_one_line(capsys, name)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder"}


def test_policy_of_another_environment_or_format_is_refused(tmp_path, capsys, policy_file):
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / "data.hdf5", "--policy", str(policy_file), env="HalfCheetah-v5")
    assert_one_line(capsys, "was trained in 'Hopper-v5'")

    text, pickled, partial = tmp_path / "text.npz", tmp_path / "pickled.npz", tmp_path / "partial.npz"
    text.write_text("no archive")
    np.savez(pickled, env_name=np.array({"a": 1}, dtype=object))
    np.savez(partial, env_name="Hopper-v5", description="no weights", low=np.zeros(3), high=np.ones(3))
    for path in (text, pickled, partial):
        with pytest.raises(SystemExit, match="2"):
            collect_file(tmp_path / "data.hdf5", "--policy", str(path))
        assert_one_line(capsys, "cannot be read")
    assert not (tmp_path / "data.hdf5").exists()


def test_sac_without_stable_baselines3_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / "data.hdf5", "--policy", "sac", "--target_return", "1")
    assert_one_line(capsys, "pip install stable-baselines3")


def assert_one_line(capsys, message):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


# ------------------------------------------------------------------------------------------------ D4RL's ids


def test_a_d4rl_id_stands_for_its_environment(tmp_path):
    _, attributes = collect_file(tmp_path / "data.hdf5", env="hopper-medium-v2", steps=5)
    assert attributes["env_name"] == "Hopper-v4"


def test_a_d4rl_id_without_an_environment_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / "data.hdf5", env="ant-medium-v2")
    assert_one_line(capsys, "'ant-medium-v2' has no environment of the same states in Gymnasium")


def test_adroit_s_environments_say_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(SystemExit, match="2"):
        collect_file(tmp_path / "data.hdf5", env="door-human-v1")
    assert_one_line(capsys, "pip install gymnasium-robotics")


# ------------------------------------------------------------------------------------------------ converted


def convert(output, *names, flags=()):
    main(["--convert", *map(str, names), "--output", str(output), *flags])
    return load_dataset(str(output), simulator_states=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file that was collected, with process noise."""
    path = tmp_path_factory.mktemp("source") / "source.hdf5"
    collect_file(path, "--process_noise", "0.2")
    return path


@pytest.mark.parametrize("ending", [".hdf5", ".h5", ".pkl", ".pickle"])
def test_what_was_read_is_written_for_other_programs(tmp_path, source, ending):
    original = load_dataset(str(source), simulator_states=True)
    written = convert(tmp_path / f"clean{ending}", source)

    assert written.env_name == original.env_name == "Hopper-v5"
    for one, other in zip(written.trajectories, original.trajectories, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_a_converted_file_says_what_it_was_made_of(tmp_path, source):
    convert(tmp_path / "clean.hdf5", source)
    _, attributes = read(tmp_path / "clean.hdf5")
    assert (attributes["env_name"], attributes["process_noise"]) == ("Hopper-v5", 0.2)
    assert attributes["dataset"] == str(source)
    assert attributes["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "--convert" in attributes["command"]


def test_several_datasets_become_one_file(tmp_path, capsys):
    paths = []
    for index in range(2):
        states = np.random.default_rng(index).normal(size=(7, 3))
        paths.append(tmp_path / f"{index}.pkl")
        paths[-1].write_bytes(
            pickle.dumps([{"observations": states, "actions": states[:, :1], "dones": np.arange(7) > 5}])
        )
    written = convert(tmp_path / "both.hdf5", *paths)
    assert [len(trajectory) for trajectory in written.trajectories] == [7, 7]
    assert written.trajectories[0].rewards is None
    printed = capsys.readouterr()
    assert "both.hdf5: 14 rows of 2 trajectories" in printed.out
    assert "dones" in printed.err, "what matters is said"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--output is missing"),
        (["--output", "data.npz"], "has the ending '.npz'; expected .hdf5, .h5, .pkl, .pickle"),
        (["--output", "data.hdf5", "--env", "Hopper-v5"], "--env is for collecting"),
        (["--output", "precious.pkl"], "give another path, or --overwrite"),
        (["--output", "nowhere.pkl", "--describe", "hopper-medium-demo"], "not allowed with argument --convert"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("precious.pkl").write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        main(["--convert", "hopper-medium-demo", *flags])
    assert_one_line(capsys, message)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.pkl"]


def test_a_conversion_onto_its_source_is_refused(source, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["--convert", str(source), "--output", str(source), "--overwrite"])
    assert_one_line(capsys, "is the file of --convert, which it would overwrite")


# ------------------------------------------------------------------------------------------------ described, bundled


def test_describe_prints_a_table_of_any_datasets_and_what_their_audits_find(tmp_path, capsys):
    collect_file(tmp_path / "ours.hdf5")
    states = np.random.default_rng(0).normal(size=(7, 3))
    path = {"observations": states, "actions": states[:, :1], "init_state_dict": {"qpos": states[0]}}
    (tmp_path / "theirs.pkl").write_bytes(pickle.dumps([path]))
    (tmp_path / "text.hdf5").write_text("no dataset")
    capsys.readouterr()

    main(["--describe", str(tmp_path / "ours.hdf5"), str(tmp_path / "theirs.pkl")])
    table, ours_audit, theirs_audit = capsys.readouterr().out.strip().split("\nAudit of ")
    header, _, ours, theirs = table.strip().splitlines()
    assert header.startswith("| file | environment | policy |")
    assert ours.startswith("| ours.hdf5 | Hopper-v5 | random")
    assert ours.endswith(f"| {' '.join(sorted(KEYS))} |")
    assert theirs.startswith("| theirs.pkl | - | - | - | - | 1 | 7 |")
    assert theirs.endswith("| actions observations terminals timeouts |")
    assert ours_audit.startswith("`ours.hdf5`:")
    assert "| entries not read | 1 | init_state_dict/qpos |" in theirs_audit
    with pytest.raises(SystemExit, match="2"):
        main(["--describe", str(tmp_path / "text.hdf5")])
    assert_one_line(capsys, "text.hdf5")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_dataset_is_whole(name):
    env_id, keys = BUNDLED[name]
    columns, attributes = read(DATA / "bundled" / f"{name}.hdf5")

    assert set(columns) == keys
    assert attributes["env_name"] == env_id
    assert {len(column) for column in columns.values()} == {50_000}
    assert all(np.isfinite(column).all() for column in columns.values())
    ends = columns["terminals"] | columns["timeouts"]
    if "next_observations" in keys:
        follows = (columns["next_observations"][:-1] == columns["observations"][1:]).all(axis=1)
        np.testing.assert_array_equal(follows, ~ends[:-1])
    assert 0 <= int(ends.sum()) - attributes["episodes"] <= len(attributes.get("policies", "1"))


@pytest.mark.parametrize("name", sorted(BUNDLED.keys() - OLDER))
def test_the_command_of_a_bundled_dataset_makes_its_rows_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(DATA.parent)
    columns, attributes = read(DATA / "bundled" / f"{name}.hdf5")
    if different := {key: found for key, found in collect_dataset.versions().items() if attributes[key] != found}:
        pytest.skip(f"it was made with other versions than {different}")
    _, _, *flags = shlex.split(attributes["command"])

    main([*flags, "--steps", "300", "--output", str(tmp_path / "again.hdf5")])
    again, _ = read(tmp_path / "again.hdf5")
    for key, column in again.items():
        np.testing.assert_array_equal(column[:40], columns[key][:40])  # a share of 300 rows for each of the policies


def test_bundled_policies_fit_and_everything_is_small():
    envs = {}
    for path in (DATA / "policies").glob("**/*.npz"):
        with np.load(path) as file:
            env_id = str(file["env_name"])
        env = envs.setdefault(env_id, make_env(env_id))
        policy = SquashedGaussianPolicy.load(path, env_id, env.observation_space.shape[0])
        assert policy.description.startswith("sac: ")
    size = sum(
        path.stat().st_size for pattern in ("bundled/*.hdf5", "policies/**/*.npz") for path in DATA.glob(pattern)
    )
    assert size < 45e6


def test_table_of_snapshots_says_what_each_returned():
    table = (DATA / "README.md").read_text()
    for folder in (path for path in (DATA / "policies").iterdir() if path.is_dir()):
        returns = []
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as file:
                returns.append(f"{int(path.stem) // 1000}: {file['evaluation_return']:.0f}")
        assert len(returns) == 12
        assert f"| policies/{folder.name} | " in table and f" | {', '.join(returns)} |\n" in table


def test_table_of_the_bundled_datasets_is_what_describe_prints(capsys):
    main(["--describe", *(str(path) for path in sorted(DATA.glob("bundled/*-demo.hdf5")))])
    assert capsys.readouterr().out in (DATA / "README.md").read_text()
