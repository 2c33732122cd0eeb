r"""Collect a D4RL-format dataset from a Gymnasium environment: a policy acts, every transition is kept.

    python collect_dataset.py --env Hopper-v5 --policy random --steps 2000 --output results/hopper-random.hdf5

A `medium` dataset is made the way D4RL (Fu et al. 2020, https://arxiv.org/abs/2004.07219) made its own: a soft
actor-critic policy is trained until it returns --target_return, training stops, and its stochastic actions fill the
dataset (training takes minutes to an hour; stable-baselines3 is needed):

    python collect_dataset.py --env Hopper-v5 --policy sac --target_return 1500 --steps 50000 \
        --output results/hopper-medium.hdf5 --save_policy results/hopper-medium.npz

The trained policy is a small NumPy file. Collecting from it again (--policy results/hopper-medium.npz) needs neither
training nor stable-baselines3 and, with the same seed on the same machine, gives the same transitions bit for bit.

Datasets that exist already, in any format that learn_model.py reads, are described or written for other programs: as
D4RL-format HDF5 or as a pickle of paths, by the ending of --output.

    python collect_dataset.py --describe hopper-medium-demo
    python collect_dataset.py --convert hopper-medium-demo --output results/hopper-medium.pkl

A file that was collected holds, with one row per transition and float32 unless noted:

    observations, actions, rewards    what the policy saw, what it intended, what it was paid
    next_observations                 what it saw next (left out by --drop_next_observations)
    terminals (bool)                  the environment ended the episode
    timeouts (bool)                   the episode was cut: by its time limit or, in the last row, by the file's end
    infos/qpos, infos/qvel            MuJoCo only: the simulator's state in which `observations` was seen

Two rows belong to the same episode exactly when no terminal or timeout stands between them. Differences from D4RL:
the last row always ends its episode (D4RL leaves it open), and the file's attributes say how it was made.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import pickle
import platform
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from cli import CommandLine, check_output_file, exit_on_input_error
from utils import InputError, atomic_write, did_you_mean

if TYPE_CHECKING:
    import gymnasium

    from data.trajectories import Dataset

# Soft actor-critic with the settings of its paper, but half as wide and one CPU thread: twice the steps per second,
# and enough for medium performance.
SAC_SETTINGS: dict[str, Any] = {
    "policy": "MlpPolicy",
    "policy_kwargs": {"net_arch": [128, 128]},
    "learning_rate": 3e-4,
    "batch_size": 256,
    "buffer_size": 1_000_000,
    "learning_starts": 5_000,
}
MAX_TRAIN_STEPS = 500_000
EVALUATE_EVERY = 5_000  # training steps between two evaluations
EVALUATION_EPISODES = 10
LOG_STD_RANGE = (-20.0, 2.0)  # stable-baselines3 clips the actor's log standard deviation to this

HDF5_ENDINGS, PICKLE_ENDINGS = (".hdf5", ".h5"), (".pkl", ".pickle")

POLICY_STREAM, NOISE_STREAM = 0, 1  # each purpose draws from its own random stream

# Takes an observation, ``(observation_dim,)``, and a random generator; returns the intended action, ``(action_dim,)``.
Policy = Callable[[np.ndarray, np.random.Generator], np.ndarray]


# --- Policies ---


class RandomPolicy:
    """Draws actions uniformly from the action space."""

    description = "random: uniform over the action space"

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self.low, self.high = low, high

    def __call__(self, observation: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns an action, ``(action_dim,)`` float32, whatever the observation."""
        return random.uniform(self.low, self.high).astype(np.float32)


class SquashedGaussianPolicy:
    """The actor of soft actor-critic in NumPy: a Gaussian squashed by tanh, its mean and deviation given by an MLP.

    Args:
        arrays: ``weight_I`` (out, in) and ``bias_I`` (out,) of the hidden layers; ``mean_weight``, ``mean_bias``,
            ``log_std_weight`` and ``log_std_bias`` of the two heads; ``low`` and ``high``, the action space's bounds.
        description: What the policy is and how it was trained.
    """

    def __init__(self, arrays: dict[str, np.ndarray], description: str) -> None:
        self.arrays, self.description = arrays, description
        self.depth = sum(name.startswith("weight_") for name in arrays)

    def __call__(self, observation: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns an action drawn for ``observation`` ``(observation_dim,)``, as ``(action_dim,)`` float32."""
        mean, log_std = self.gaussian(observation)
        noise = random.standard_normal(len(mean), dtype=np.float32)
        low, high = self.arrays["low"], self.arrays["high"]
        action = low + 0.5 * (np.tanh(mean + np.exp(log_std) * noise) + 1.0) * (high - low)
        return np.clip(action, low, high)

    def gaussian(self, observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and log standard deviation before squashing, each ``(action_dim,)``."""
        hidden = observation.astype(np.float32)
        for layer in range(self.depth):
            hidden = np.maximum(self.arrays[f"weight_{layer}"] @ hidden + self.arrays[f"bias_{layer}"], 0.0)
        mean = self.arrays["mean_weight"] @ hidden + self.arrays["mean_bias"]
        log_std = self.arrays["log_std_weight"] @ hidden + self.arrays["log_std_bias"]
        return mean, np.clip(log_std, *LOG_STD_RANGE)

    @classmethod
    def from_actor(cls, actor: Any, low: np.ndarray, high: np.ndarray, description: str) -> SquashedGaussianPolicy:
        """Copies the weights of a stable-baselines3 SAC actor."""
        hidden = [layer for layer in actor.latent_pi if hasattr(layer, "weight")]
        arrays = {"low": low, "high": high}
        for index, layer in enumerate(hidden):
            arrays[f"weight_{index}"], arrays[f"bias_{index}"] = numpy_weights(layer)
        arrays["mean_weight"], arrays["mean_bias"] = numpy_weights(actor.mu)
        arrays["log_std_weight"], arrays["log_std_bias"] = numpy_weights(actor.log_std)
        return cls(arrays, description)

    def save(self, path: Path, env_id: str) -> None:
        """Writes the policy as ``.npz``, without pickles.

        Args:
            path: The file.
            env_id: The environment the policy was trained in, the only one it can be loaded for.
        """
        with atomic_write(path) as file:
            np.savez(file, env_name=env_id, description=self.description, **self.arrays)

    @classmethod
    def load(cls, path: Path, env: gymnasium.Env) -> SquashedGaussianPolicy:
        """Reads a policy that ``save`` wrote for the same environment.

        Raises:
            InputError: If the file is missing, is no such policy, or was trained in another environment.
        """
        if not path.is_file():
            raise InputError(
                f"policy {str(path)!r} is not a file; --policy takes 'sac', 'random' or the .npz file that an earlier "
                "--policy sac saved"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            trained_in, description = str(arrays.pop("env_name")), str(arrays.pop("description"))
            policy = cls(arrays, description)
            if trained_in == env.spec.id:
                policy(np.zeros(env.observation_space.shape), np.random.default_rng(0))  # every array is there and fits
        except (KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise InputError(
                f"policy {str(path)!r} cannot be read ({error}); expected the .npz file that --policy sac saves"
            ) from error
        if trained_in != env.spec.id:
            raise InputError(
                f"policy {str(path)!r} was trained in {trained_in!r}, not in {env.spec.id!r}; give --env {trained_in} "
                "or another policy"
            )
        return policy


def numpy_weights(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns copies of a linear layer's weight ``(out, in)`` and bias ``(out,)``."""
    return layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()


# --- Acting ---


def make_env(env_id: str) -> gymnasium.Env:
    """Makes the environment and checks that its observations and actions are vectors of numbers."""
    try:
        import gymnasium
    except ImportError:
        raise InputError(
            'environments need Gymnasium, which is not installed: pip install "gymnasium[mujoco]"'
        ) from None

    if env_id.startswith("AdroitHand"):
        if importlib.util.find_spec("gymnasium_robotics") is None:
            raise InputError(f"environment {env_id!r} needs gymnasium-robotics: pip install gymnasium-robotics")
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
    if env_id not in gymnasium.registry:
        raise InputError(
            f"environment {env_id!r} is unknown{did_you_mean(env_id, gymnasium.registry)}; expected a name registered "
            "with Gymnasium, such as Hopper-v5"
        )
    try:
        env = gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError) as error:
        raise InputError(f"environment {env_id!r} cannot be made: {error}") from error
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"environment {env_id!r} has the {name} space {space}; expected a vector of floats (Box)")
    if not env.action_space.is_bounded():
        raise InputError(f"environment {env_id!r} has unbounded actions; expected finite bounds to sample between")
    return env


def transitions(env: gymnasium.Env, policy: Policy, seed: int, process_noise: float = 0.0) -> Iterator[dict[str, Any]]:
    """Yields transitions without end, episode after episode, each as a row of the dataset by key.

    Args:
        env: The environment to act in.
        policy: Who acts.
        seed: Fixes start states, the policy's draws and the process noise.
        process_noise: Standard deviation, in action units, of Gaussian noise on the executed action, which is clipped
            to the action space. The row keeps the intended action, so the dynamics it shows are truly stochastic.
    """
    policy_random = np.random.default_rng([seed, POLICY_STREAM])
    noise_random = np.random.default_rng([seed, NOISE_STREAM])
    low, high = env.action_space.low, env.action_space.high
    data = getattr(env.unwrapped, "data", None)  # MuJoCo's simulation state
    observation, _ = env.reset(seed=seed)
    while True:
        state = {f"infos/{name}": getattr(data, name).copy() for name in ("qpos", "qvel") if hasattr(data, name)}
        action = policy(observation, policy_random)
        noise = process_noise * noise_random.standard_normal(action.shape)
        executed = np.clip(action + noise, low, high).astype(np.float32)
        next_observation, reward, terminated, truncated, _ = env.step(executed)
        yield {
            "observations": observation,
            "actions": action,
            "rewards": reward,
            "next_observations": next_observation,
            "terminals": bool(terminated),
            "timeouts": bool(truncated and not terminated),
            **state,
        }
        observation = next_observation
        if terminated or truncated:
            observation, _ = env.reset()


def collect(
    env: gymnasium.Env, policy: Policy, steps: int, seed: int, process_noise: float = 0.0
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Acts for ``steps`` steps; the other arguments are those of ``transitions``.

    Returns:
        The dataset's columns by key, ``(steps, ...)`` each, float32 or bool, with the last row marked as the end of its
        episode; and the returns of the episodes that ended before that.
    """
    columns: dict[str, np.ndarray] = {}
    returns, episode_return = [], 0.0
    rows = itertools.islice(transitions(env, policy, seed, process_noise), steps)
    for index, row in enumerate(tqdm(rows, total=steps, desc="collecting", unit="step")):
        for key, value in row.items():
            if index == 0:
                columns[key] = np.zeros((steps, *np.shape(value)), bool if isinstance(value, bool) else np.float32)
            columns[key][index] = value
        episode_return += float(row["rewards"])
        if row["terminals"] or row["timeouts"]:
            returns.append(episode_return)
            episode_return = 0.0
    columns["timeouts"][-1] = not columns["terminals"][-1]
    return columns, returns


def evaluate(env: gymnasium.Env, policy: Policy, episodes: int, seed: int) -> float:
    """Returns the mean return of the policy's stochastic actions over whole episodes."""
    rows = transitions(env, policy, seed)
    total, ended = 0.0, 0
    while ended < episodes:
        row = next(rows)
        total += float(row["rewards"])
        ended += row["terminals"] or row["timeouts"]
    return total / episodes


# --- Training ---


def train_sac(env_id: str, target_return: float, max_steps: int, seed: int, path: Path) -> None:
    """Trains soft actor-critic until its stochastic actions return ``target_return``, keeping the best policy on disk.

    Args:
        env_id: The environment's registered name.
        target_return: Mean return over ``EVALUATION_EPISODES`` episodes that ends training.
        max_steps: Environment steps after which training gives up.
        seed: Fixes training and evaluation.
        path: Where the best policy is written, after every evaluation that improves on it.

    Raises:
        InputError: If the target is not reached in ``max_steps``; the best policy stays at ``path``.
    """
    try:
        import stable_baselines3
    except ImportError as error:
        raise InputError(
            "--policy sac trains with stable-baselines3, which is not installed; pip install stable-baselines3, or "
            "give --policy random or a saved policy"
        ) from error
    import torch

    torch.set_num_threads(1)
    env, evaluation_env = make_env(env_id), make_env(env_id)
    model = stable_baselines3.SAC(env=env, seed=seed, device="cpu", **SAC_SETTINGS)
    best = -np.inf
    with tqdm(total=max_steps, desc="training", unit="step") as bar:

        def advance(_locals: dict, _globals: dict) -> bool:
            bar.update()
            return True

        while best < target_return and model.num_timesteps < max_steps:
            chunk = min(EVALUATE_EVERY, max_steps - model.num_timesteps)
            model.learn(chunk, callback=advance, reset_num_timesteps=False)
            policy = SquashedGaussianPolicy.from_actor(
                model.actor, env.action_space.low, env.action_space.high, description=""
            )
            achieved = evaluate(evaluation_env, policy, EVALUATION_EPISODES, seed)
            if achieved > best:
                best = achieved
                policy.description = (
                    f"sac: stochastic actions after {model.num_timesteps} training steps (seed {seed}, evaluation "
                    f"return {achieved:.0f} over {EVALUATION_EPISODES} episodes, stable-baselines3 "
                    f"{stable_baselines3.__version__})"
                )
                policy.save(path, env_id)
            bar.set_postfix({"return": f"{achieved:.0f}", "best": f"{best:.0f}"})
    if best < target_return:
        raise InputError(
            f"training reached a return of {best:.0f} in {max_steps} steps, expected {target_return:g}; the best "
            f"policy is in {str(path)!r}: collect with --policy {path}, or train longer with --max_train_steps"
        )


# --- Datasets that exist already ---


def convert(names: list[str], output: Path, command: str) -> Dataset:
    """Writes datasets, joined to one, as a file that other programs read.

    Args:
        names: What to read, as ``learn_model.py`` does.
        output: The file; its ending says which kind.
        command: The command line, for the file's attributes.

    Raises:
        InputError: If a dataset cannot be read.
    """
    from data.hdf5 import to_columns, write_hdf5
    from data.pickles import to_paths
    from data.sources import load_datasets, source_attributes

    dataset = load_datasets(names, simulator_states=True)
    if output.suffix in PICKLE_ENDINGS:
        with atomic_write(output) as file:
            pickle.dump(to_paths(dataset), file, protocol=4)
        return dataset
    known = source_attributes(names[0]) if len(names) == 1 else {}
    attributes = {name: value for name, value in known.items() if isinstance(value, str | bytes | np.generic | float)}
    attributes |= {"dataset": dataset.name, "sha256": dataset.sha256, "command": command, **versions()}
    if dataset.env_name is not None:
        attributes["env_name"] = dataset.env_name
    write_hdf5(output, to_columns(dataset), attributes)
    return dataset


def describe(names: list[str]) -> str:
    """Returns a Markdown table with one row per dataset, and what its audit found; ``-`` stands for what is unknown.

    Raises:
        InputError: If one cannot be read.
    """
    from data.audit import audit, to_markdown
    from data.sources import load_dataset
    from reporting.page import markdown_table

    header = ("file", "environment", "policy", "process noise", "mean return", "episodes", "transitions", "MB", "keys")
    rows, audits = [], []
    for name in names:
        dataset = load_dataset(name, simulator_states=True)
        rows.append(describe_dataset(dataset))
        audits.append(f"\nAudit of `{rows[-1][0]}`:\n\n{to_markdown(audit(dataset)).rstrip()}")
    return "\n".join([markdown_table(header, rows), *audits])


def describe_dataset(dataset: Dataset) -> list[str]:
    """Returns a dataset's row of ``describe``, by the columns of its table."""
    from data.hdf5 import to_columns
    from data.sources import existing_file, source_attributes

    file, made = existing_file(dataset.name), source_attributes(dataset.name)
    mean_return = f"{made['mean_return']:.0f}" if "mean_return" in made else "-"
    policy, noise = (str(made.get(name, "-")) for name in ("policy", "process_noise"))
    episodes = str(made.get("episodes", len(dataset.trajectories)))
    size = f"{file.stat().st_size / 1e6:.1f}" if file else "-"
    keys = " ".join(sorted(to_columns(dataset)))
    shown = file.name if file else dataset.name
    environment = dataset.env_name or "-"
    return [shown, environment, policy, noise, mean_return, episodes, str(dataset.num_rows), size, keys]


# --- The command ---


def check_output(path: Path, flag: str, overwrite: bool) -> None:
    """Checks that a file can be written and does not exist yet, unless it may be overwritten.

    Raises:
        InputError: If not.
    """
    check_output_file(path, flag)
    if path.exists() and not overwrite:
        raise InputError(f"{str(path)!r} exists already; give another path, or --overwrite to replace it")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the data depend on, by the name of the file's attribute.

    A package that is not installed is left out.
    """
    found = {"python_version": platform.python_version()}
    for package in ("gymnasium", "mujoco", "numpy", "stable-baselines3"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"{package.replace('-', '_')}_version"] = importlib.metadata.version(package)
    return found


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env",
        help="Gymnasium environment to act in, e.g. Hopper-v5 or HalfCheetah-v5; or a D4RL id, for its environment",
    )
    parser.add_argument(
        "--policy",
        default="random",
        help="who acts: 'random' (uniform actions, the default), 'sac' (train one first, needs stable-baselines3), or "
        "the .npz file that an earlier 'sac' saved",
    )
    parser.add_argument("--steps", type=int, default=50_000, help="transitions to collect (default 50000)")
    parser.add_argument("--output", type=Path, help="HDF5 file to write; its folder is made where it is missing")
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes training, start states, actions and noise (default 0)"
    )
    parser.add_argument(
        "--process_noise",
        type=float,
        default=0.0,
        help="standard deviation, in action units, of Gaussian noise on the executed action; the dataset keeps the "
        "intended one, so its dynamics become truly stochastic (default 0: deterministic)",
    )
    parser.add_argument(
        "--target_return",
        type=float,
        help="with --policy sac: stop training once the mean return of an evaluation reaches this. A third of an "
        "expert's return makes a 'medium' dataset: 1000 to 1500 in Hopper, 4000 in HalfCheetah",
    )
    parser.add_argument(
        "--max_train_steps",
        type=int,
        help=f"with --policy sac: give up after this many steps (default {MAX_TRAIN_STEPS}); the best policy is kept",
    )
    parser.add_argument(
        "--save_policy",
        type=Path,
        help="with --policy sac: where to keep the trained policy (default: --output with the ending .npz); after "
        "every evaluation it holds the best so far, so that training may be interrupted",
    )
    parser.add_argument(
        "--drop_next_observations",
        action="store_true",
        help="leave next_observations out, as the oldest D4RL files do: readers must then pair rows, and what follows "
        "a terminal row is lost",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist already")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--describe",
        nargs="+",
        metavar="NAME",
        help="print a Markdown table of these datasets and what their audit finds, and stop; names as for "
        "learn_model.py --dataset",
    )
    other.add_argument(
        "--convert",
        nargs="+",
        metavar="NAME",
        help="write this dataset, or several joined to one, to --output for other programs, and stop: as D4RL-format "
        "HDF5 (.hdf5, .h5) or as a pickle of (paths, metadata) (.pkl, .pickle)",
    )
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Checks flags and outputs before any work is done.

    Raises:
        InputError: If a flag is missing, makes no sense or would have no effect, or a file cannot be written.
    """
    for flag in ("env", "output"):
        if getattr(args, flag) is None:
            raise InputError(f"--{flag} is missing; see --help for a command that runs as it stands")
    if args.steps < 1:
        raise InputError(f"--steps {args.steps} is too few; expected at least 1")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is negative; expected 0 or more")
    if not (math.isfinite(args.process_noise) and args.process_noise >= 0):
        raise InputError(f"--process_noise {args.process_noise} is no standard deviation; expected 0 or more")
    check_output(args.output, "--output", args.overwrite)
    if args.policy == "sac":
        if args.target_return is None or not math.isfinite(args.target_return):
            raise InputError("--policy sac needs --target_return, the return that ends training, e.g. 1500 in Hopper")
        if args.max_train_steps is not None and args.max_train_steps < 1:
            raise InputError(f"--max_train_steps {args.max_train_steps} is too few; expected at least 1")
        if trained_policy(args) == args.output:
            raise InputError(f"the dataset and the policy would both be {str(args.output)!r}; give two different files")
        check_output(trained_policy(args), "--save_policy", args.overwrite)
    else:
        for flag in ("target_return", "max_train_steps", "save_policy"):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag} is for --policy sac, but --policy is {args.policy!r}; leave it out")


def check_conversion(args: argparse.Namespace) -> None:
    """Checks flags and output of ``--convert``.

    Raises:
        InputError: If the output is missing, cannot be written, is a source, or has another ending.
    """
    from data.sources import existing_file

    if args.output is None:
        raise InputError("--output is missing: the file to write, ending in .hdf5 or .pkl")
    if args.env is not None:
        raise InputError("--env is for collecting, but --convert was given; leave one of them out")
    if args.output.suffix not in (*HDF5_ENDINGS, *PICKLE_ENDINGS):
        endings = ", ".join((*HDF5_ENDINGS, *PICKLE_ENDINGS))
        raise InputError(f"--output {str(args.output)!r} has the ending {args.output.suffix!r}; expected {endings}")
    for name in args.convert:
        source = existing_file(name)
        if source is not None and source.resolve() == args.output.resolve():
            raise InputError(f"--output {str(args.output)!r} is what --convert reads; give another path")
    check_output(args.output, "--output", args.overwrite)


def find_environment(name: str) -> str:
    """Returns the Gymnasium environment of a D4RL id; every other name as it is.

    Raises:
        InputError: If it is a D4RL id without one.
    """
    from data.d4rl_registry import bundled_table, gymnasium_id

    if name not in bundled_table():
        return name
    env_id = gymnasium_id(name)
    if env_id is None:
        raise InputError(
            f"D4RL's {name!r} has no environment of the same states in Gymnasium; give one by its own name"
        )
    return env_id


def trained_policy(args: argparse.Namespace) -> Path:
    """Returns where ``--policy sac`` keeps the policy it trains."""
    return args.save_policy or args.output.with_suffix(".npz")


def main(argv: list[str] | None = None) -> None:
    """Collects one dataset, or describes or converts some."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "collect_dataset.py", *(sys.argv[1:] if argv is None else argv)])
    with exit_on_input_error():
        if args.describe:
            print(describe(args.describe))
            return
        if args.convert:
            check_conversion(args)
            dataset = convert(args.convert, args.output, command)
            for finding in dataset.findings:
                if finding.matters:
                    print(f"note: {finding}", file=sys.stderr)
            print(f"{args.output}: {dataset.num_rows} rows of {len(dataset.trajectories)} trajectories")
            return
        check_arguments(args)
        args.env = find_environment(args.env)
        env = make_env(args.env)
        if args.policy == "random":
            policy = RandomPolicy(env.action_space.low, env.action_space.high)
        elif args.policy == "sac":
            max_steps = args.max_train_steps or MAX_TRAIN_STEPS
            train_sac(args.env, args.target_return, max_steps, args.seed, trained_policy(args))
            policy = SquashedGaussianPolicy.load(trained_policy(args), env)
        else:
            policy = SquashedGaussianPolicy.load(Path(args.policy), env)
        from data.hdf5 import write_hdf5

        columns, returns = collect(env, policy, args.steps, args.seed, args.process_noise)
        if args.drop_next_observations:
            del columns["next_observations"]
        attributes = {
            "env_name": args.env,
            "policy": policy.description,
            "seed": args.seed,
            "process_noise": args.process_noise,
            "episodes": len(returns),
            **({"mean_return": np.mean(returns)} if returns else {}),
            "command": command,
            **versions(),
        }
        write_hdf5(args.output, columns, attributes, compression=9)
        mean_return = f", mean return {np.mean(returns):.0f}" if returns else ""
        print(f"{args.output}: {args.steps} transitions, {len(returns)} whole episodes{mean_return}")


if __name__ == "__main__":
    main()
