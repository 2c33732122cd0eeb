"""The simulator as oracle: the true next state for actions that the dataset never took.

A MuJoCo environment is set to recorded simulator states (``infos/qpos`` and ``infos/qvel``) and makes one step from
each. A dataset cannot say how good predictions are for actions that it does not hold; the simulator can. For data that
was collected with process noise it also gives the true aleatoric uncertainty: the variance of the next state itself.

Letters in shapes and units as in ``predictions.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.trajectories import Dataset, Trajectory, Transitions
from dynamics_model import DynamicsEnsemble
from evaluation import metrics
from evaluation.calibration import residual_variances
from evaluation.predictions import Rows, Scale, predict_one_step
from evaluation.tables import Tables, oracle_noise_table, oracle_table
from utils import InputError

if TYPE_CHECKING:
    from data.behaviour import Policy

ROWS = 512
PROBE_ROWS = 1000  # of each kind of actions
POLICY_ROWS = 2000  # of all other policies together
DRAWS = 64  # next states drawn for each row, where the data is noisy
TOLERANCE = 0.01  # root mean square difference allowed between simulator and record, in typical one-step changes
PERTURBATION = 0.3  # standard deviation of perturbed actions, in half widths of the action space


class Simulator:
    """One MuJoCo environment that can be put into any state.

    Args:
        env_name: The environment's registered Gymnasium name.

    Attributes:
        low: Smallest action, ``(action_dim,)``.
        high: Largest action, ``(action_dim,)``.
        sizes: Numbers of positions, velocities, action dimensions and state dimensions.

    Raises:
        InputError: If there is no such environment here, or it is not MuJoCo.
    """

    def __init__(self, env_name: str) -> None:
        try:
            import gymnasium

            env = gymnasium.make(env_name)
        except ImportError as error:
            raise InputError(f"--oracle needs the simulator ({error}); pip install 'gymnasium[mujoco]'") from None
        except gymnasium.error.Error as error:
            raise InputError(f"--oracle cannot make the environment {env_name!r}: {error}; leave it out") from None
        if not hasattr(env.unwrapped, "set_state"):
            raise InputError(f"--oracle needs a MuJoCo environment, {env_name!r} is none; leave it out")
        env.reset(seed=0)
        self._env, self._time_limit = env.unwrapped, env.spec.max_episode_steps  # the bare environment has no limit
        self.low, self.high = env.action_space.low, env.action_space.high
        self.sizes = (self._env.model.nq, self._env.model.nv, *env.action_space.shape, *env.observation_space.shape)

    def step(self, recorded: RecordedStates, executed: np.ndarray) -> np.ndarray:
        """Makes one step from each recorded state with the actions ``(N, action_dim)``: next states ``(N, D)``."""
        following = []
        for qpos, qvel, action in zip(recorded.qpos, recorded.qvel, executed, strict=True):
            self._env.set_state(qpos.astype(np.float64), qvel.astype(np.float64))
            following.append(self._env.step(action)[0])
        return np.array(following)

    def run(self, policy: Policy, rows: int, process_noise: float, seed: int) -> Rows:
        """Runs a policy for so many steps, in episodes that end where the environment's task or time limit says so.

        Args:
            policy: Takes an observation and a random generator, and returns an action.
            rows: How many steps.
            process_noise: Standard deviation of the noise on executed actions.
            seed: Seed of initial states, of the policy's own draws and of the noise.
        """
        random = np.random.default_rng(seed)
        made, episode, step, done = [], -1, 0, True
        for _ in range(rows):
            if done:
                observation = self._env.reset(seed=None if made else seed)[0]
                episode, step = episode + 1, 0
            action = np.asarray(policy(observation, random), dtype=np.float32)
            following, _, terminated, *_ = self._env.step(self.add_noise(action, process_noise, random))
            made.append((observation, action, following, episode, step))
            observation, step = following, step + 1
            done = terminated or step == self._time_limit
        *moved, episodes, steps = map(np.array, zip(*made, strict=True))
        return Rows(*(part.astype(np.float32) for part in moved), episodes, steps, _steps_left(episodes))

    def add_noise(self, actions: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
        """Returns the actions that are executed for intended ones: with noise added as ``collect_dataset.py`` does."""
        noise = deviation * random.standard_normal(actions.shape)
        return np.clip(actions + noise, self.low, self.high).astype(np.float32)


@dataclass(frozen=True)
class RecordedStates:
    """Rows of a dataset with the simulator's state, ``(N, ...)`` each."""

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    qpos: np.ndarray
    qvel: np.ndarray

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of positions, velocities, action dimensions and state dimensions."""
        return tuple(part.shape[1] for part in (self.qpos, self.qvel, self.actions, self.states))

    @classmethod
    def spread_over(cls, dataset: Dataset, indices: np.ndarray, wanted: int) -> RecordedStates:
        """Takes so many rows at most, evenly spread, from some trajectories.

        Raises:
            InputError: If the dataset has no simulator states.
        """
        chosen = [dataset.trajectories[index] for index in indices]
        if any(trajectory.qpos is None or trajectory.qvel is None for trajectory in chosen):
            raise InputError(
                f"--oracle needs the simulator's states, but {dataset.name} has no infos/qpos and infos/qvel; collect "
                "data with collect_dataset.py, or leave it out"
            )
        count = sum(trajectory.num_transitions for trajectory in chosen)
        at = np.linspace(0, count - 1, min(wanted, count)).astype(np.int64)

        def rows(values: Callable[[Trajectory], np.ndarray]) -> np.ndarray:
            return np.concatenate([values(trajectory)[: trajectory.num_transitions] for trajectory in chosen])[at]

        return cls(
            rows(lambda t: t.observations),
            rows(lambda t: t.actions),
            rows(lambda t: t.observations[1:] if t.next_observations is None else t.next_observations),
            rows(lambda t: t.qpos),
            rows(lambda t: t.qvel),
        )


@dataclass(frozen=True)
class Oracle:
    """A simulator that was found to reproduce the dataset.

    Attributes:
        simulator: Computes true next states.
        recorded: Recorded states to start from.
        process_noise: Standard deviation of the noise on executed actions that the data was collected with.
        drawn: Next states of the recorded rows, drawn with that noise, ``(DRAWS, N, D)``; None without noise.
    """

    simulator: Simulator
    recorded: RecordedStates
    process_noise: float
    drawn: np.ndarray | None


def prepare_oracle(dataset: Dataset, indices: np.ndarray, scale: Scale, process_noise: float, seed: int) -> Oracle:
    """Makes the simulator and checks that it reproduces recorded transitions.

    Raises:
        InputError: If it does not, or cannot be tried.
    """
    if dataset.env_name is None:
        raise InputError(f"--oracle needs to know the environment, which {dataset.name} does not name; leave it out")
    recorded = RecordedStates.spread_over(dataset, indices, ROWS)
    simulator = Simulator(dataset.env_name)
    drawn = None
    if simulator.sizes != recorded.sizes:
        complaint = f"sizes of (qpos, qvel, action, state) are {recorded.sizes}, expected {simulator.sizes}"
    elif process_noise:
        random = np.random.default_rng(seed)
        executed = (simulator.add_noise(recorded.actions, process_noise, random) for _ in range(DRAWS))
        drawn = np.stack([simulator.step(recorded, actions) for actions in executed])
        complaint = _improbable(recorded.next_states, drawn, scale)
    else:
        complaint = _mismatch(recorded.next_states, simulator.step(recorded, recorded.actions), scale)
    if complaint is not None:
        raise InputError(
            f"--oracle: {dataset.env_name}, set to recorded states of {dataset.name}, does not reproduce its "
            f"transitions: {complaint}; install the version of MuJoCo that made them, or leave it out"
        )
    return Oracle(simulator, recorded, process_noise, drawn)


def _mismatch(recorded: np.ndarray, simulated: np.ndarray, scale: Scale) -> str | None:
    """Says how far recorded and simulated next states ``(N, D)`` differ, if that is too far; else None."""
    difference = float(metrics.rmse(scale.divide(simulated - recorded)))
    if difference <= TOLERANCE:
        return None
    return f"they differ by {difference:.2g} typical changes (root mean square), expected at most {TOLERANCE}"


def _improbable(recorded: np.ndarray, drawn: np.ndarray, scale: Scale) -> str | None:
    """Says how many recorded values lie within the extremes of those drawn, ``(DRAWS, N, D)``, if too few; else None.

    A value from the same distribution as ``n`` drawn ones lies between their extremes with probability ``(n - 1) /
    (n + 1)``, whatever the distribution.
    """
    value, low, high = (scale.divide(states) for states in (recorded, drawn.min(axis=0), drawn.max(axis=0)))
    inside = float(np.mean((value >= low - TOLERANCE) & (value <= high + TOLERANCE)))
    expected = (len(drawn) - 1) / (len(drawn) + 1)
    if inside >= expected - 0.05:
        return None
    return f"{inside:.0%} of their values lie within the extremes of {len(drawn)} noisy steps, expected {expected:.0%}"


def evaluate_oracle(ensemble: DynamicsEnsemble, oracle: Oracle, rows: Transitions | Rows, seed: int) -> Tables:
    """Compares predictions with the simulator, on and off the data, from the same recorded states.

    Args:
        ensemble: The ensemble to evaluate.
        oracle: The simulator, and recorded states.
        rows: Rows to take residuals from, where members predict points.
        seed: Seed of the actions and of process noise.

    Returns:
        ``oracle`` and, for noisy data, ``oracle_noise``: see ``tables.py``.
    """
    simulator, recorded, random = oracle.simulator, oracle.recorded, np.random.default_rng(seed)
    completion = ensemble.completion(lambda: residual_variances(ensemble, rows))
    predictions = {}
    for kind, actions in off_data_actions(recorded.actions, simulator, random).items():
        executed = simulator.add_noise(actions, oracle.process_noise, random)
        predictions[kind] = predict_one_step(ensemble, recorded.states, actions, simulator.step(recorded, executed))
    tables = {"oracle": oracle_table(ensemble, predictions, completion)}
    if oracle.drawn is not None:
        scale = Scale.of(ensemble)
        one_step = predict_one_step(ensemble, recorded.states, recorded.actions, recorded.next_states)
        variance = scale.divide(oracle.drawn).var(axis=0, ddof=1)  # (N, L)
        tables["oracle_noise"] = oracle_noise_table(one_step, completion, variance, scale)
    return tables


def off_data_actions(recorded: np.ndarray, simulator: Simulator, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns actions by kind, ``(N, action_dim)`` float32: the recorded ones, and three that are not in the data."""
    low, high = simulator.low, simulator.high
    perturbed = recorded + PERTURBATION * (high - low) / 2 * random.standard_normal(recorded.shape)
    kinds = {
        "recorded": recorded,
        "perturbed": np.clip(perturbed, low, high),
        "mirrored": low + high - recorded,
        "random": random.uniform(low, high, recorded.shape),
    }
    return {kind: actions.astype(np.float32) for kind, actions in kinds.items()}


# --- Probes: rows that the dataset does not hold ---


def make_probes(
    dataset: Dataset,
    indices: np.ndarray,
    seed: int,
    *,
    policies: Sequence[Policy] = (),
    process_noise: float = 0.0,
) -> dict[str, Rows]:
    """Makes rows from the dataset's simulator, whose errors a model's uncertainty should order.

    They are the same for every model. Where the dataset's states are the first entries of the simulator's observations,
    as in data without velocities, the rows' states are, too.

    Args:
        dataset: The dataset, with simulator states.
        indices: Trajectories of it from whose states actions are taken.
        seed: Seed of actions, initial states and noise.
        policies: Policies other than the dataset's. They see the simulator's observations.
        process_noise: Standard deviation of the noise on executed actions that the data was collected with.

    Returns:
        ``random_actions`` and ``perturbed_actions``, as in ``off_data_actions``, from recorded states; with policies
        ``other_policies``, rows of each in equal numbers.

    Raises:
        InputError: If there is no such simulator here, or the dataset does not name it or has no states of it.
    """
    if dataset.env_name is None:
        raise InputError(f"probes need to know the environment, which {dataset.name} does not name")
    recorded = RecordedStates.spread_over(dataset, indices, PROBE_ROWS)
    simulator, random = Simulator(dataset.env_name), np.random.default_rng(seed)
    *given, shown = recorded.sizes
    *expected, state_dim = simulator.sizes
    if given != expected or shown > state_dim:
        raise InputError(
            f"sizes of (qpos, qvel, action, state) in {dataset.name} are {recorded.sizes}, but those of "
            f"{dataset.env_name} are {simulator.sizes}"
        )
    actions = off_data_actions(recorded.actions, simulator, random)
    probes = {}
    for kind in ("random", "perturbed"):
        executed = simulator.add_noise(actions[kind], process_noise, random)
        following = simulator.step(recorded, executed)[:, :shown].astype(np.float32)
        each = np.arange(len(following))  # rows that do not follow one another
        probes[f"{kind}_actions"] = Rows(recorded.states, actions[kind], following, each, 0 * each, 0 * each + 1)
    if policies:
        runs = [
            simulator.run(policy, POLICY_ROWS // len(policies), process_noise, seed + index)
            for index, policy in enumerate(policies)
        ]
        probes["other_policies"] = _joined(runs, shown)
    return probes


def _joined(runs: Sequence[Rows], state_dim: int) -> Rows:
    """Puts rows one after the other, episodes counted on, with the first dimensions of their states."""
    first = np.cumsum([0, *(run.trajectory[-1] + 1 for run in runs)])
    episodes = np.concatenate([run.trajectory + offset for run, offset in zip(runs, first, strict=False)])
    states, actions, next_states, steps, steps_left = (
        np.concatenate([getattr(run, name) for run in runs])
        for name in ("states", "actions", "next_states", "step", "steps_left")
    )
    return Rows(states[:, :state_dim], actions, next_states[:, :state_dim], episodes, steps, steps_left)


def _steps_left(episodes: np.ndarray) -> np.ndarray:
    """Rows from each to the end of its episode, its own included, of episodes that are numbered from 0."""
    lengths = np.bincount(episodes)
    return np.concatenate([np.arange(length, 0, -1) for length in lengths])
