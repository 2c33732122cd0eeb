r"""Collect a D4RL-format dataset from a Gymnasium environment: a policy acts, every transition is kept.

    python collect_dataset.py --env Hopper-v5 --policy random --steps 2000 --output results/hopper-random.hdf5

A `medium` dataset is made the way D4RL (Fu et al. 2020, https://arxiv.org/abs/2004.07219) made its own: a soft
actor-critic policy is trained until it returns --target_return, training stops, and its stochastic actions fill the
dataset (training takes minutes to an hour; stable-baselines3 is needed):

    python collect_dataset.py --env Hopper-v5 --policy sac --target_return 1500 --steps 50000 \
        --output results/hopper-medium.hdf5 --save_policy results/hopper-medium.npz

The trained policy is a small NumPy file. Collecting from it again (--policy results/hopper-medium.npz) needs neither
training nor stable-baselines3 and, with the same seed and versions of packages, gives the same file byte for byte.
--save_snapshots FOLDER keeps policies of the whole training too, from bad to good. Several policies collect one after
the other, as in D4RL's `replay` datasets: the file's attribute `policy_rows` says how many rows each has, in the order
of `policies`.

    python collect_dataset.py --env Hopper-v5 --policy data/policies/hopper/*.npz --steps 2000 \
        --output results/hopper-replay.hdf5

Datasets that exist already, in any format that learn_model.py reads, are described or written for other programs: as
D4RL-format HDF5 or as a pickle of paths, by the ending of --output.

    python collect_dataset.py --describe hopper-medium-demo
    python collect_dataset.py --convert hopper-medium-demo --output results/hopper-medium.pkl

A file that was collected holds, with one row per transition and float32 unless noted:

    observations, actions, rewards    what the policy saw, what it intended, what it was paid
    next_observations                 what it saw next (left out by --drop_next_observations)
    terminals (bool)                  the environment ended the episode
    timeouts (bool)                   the episode was cut: by its time limit or, in a policy's last row, by its end
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
import os
import pickle
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from cli import (
    CommandLine,
    check_output_file,
    check_output_folder,
    check_outputs,
    dataset_paths,
    exit_on_input_error,
    exit_when_out_of_memory,
    output_path,
)
from data.behaviour import Policy, RandomPolicy, Snapshots, SquashedGaussianPolicy
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
MOST_STEPS, MOST_NOISE = 10**9, 1e6  # beyond what anybody collects
EVALUATE_EVERY = 5_000  # training steps between two evaluations
EVALUATION_EPISODES = 10
SNAPSHOTS = 12  # policies of a training that are kept

HDF5_ENDINGS, PICKLE_ENDINGS = (".hdf5", ".h5"), (".pkl", ".pickle")

POLICY_STREAM, NOISE_STREAM = 0, 1  # each purpose draws from its own random stream


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


def transitions(
    env: gymnasium.Env, shares: Sequence[tuple[Policy, int]], seed: int, process_noise: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Yields transitions, episode after episode, each as a row of the dataset by key.

    Args:
        env: The environment to act in.
        shares: Who acts, and for how many steps before the next one begins an episode.
        seed: Fixes start states, the policies' draws and the process noise.
        process_noise: Standard deviation, in action units, of Gaussian noise on the executed action, which is clipped
            to the action space. The row keeps the intended action, so the dynamics it shows are truly stochastic.
    """
    policy_random = np.random.default_rng([seed, POLICY_STREAM])
    noise_random = np.random.default_rng([seed, NOISE_STREAM])
    low, high = env.action_space.low, env.action_space.high
    data = getattr(env.unwrapped, "data", None)  # MuJoCo's simulation state
    for index, (policy, steps) in enumerate(shares):
        observation, _ = env.reset(seed=None if index else seed)
        for _ in range(steps):
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
    env: gymnasium.Env, shares: Sequence[tuple[Policy, int]], seed: int, process_noise: float = 0.0
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Acts; the arguments are those of ``transitions``.

    Returns:
        The dataset's columns by key, ``(rows, ...)`` each, float32 or bool, with the last row of each policy marked as
        the end of its episode; and the returns of the episodes that ended before that.
    """
    cuts = set(itertools.accumulate(steps for _, steps in shares))
    rows = max(cuts)
    columns: dict[str, np.ndarray] = {}
    returns, episode_return = [], 0.0
    collected = tqdm(transitions(env, shares, seed, process_noise), total=rows, desc="collecting", unit="step")
    for index, row in enumerate(collected):
        for key, value in row.items():
            if index == 0:
                columns[key] = np.zeros((rows, *np.shape(value)), bool if isinstance(value, bool) else np.float32)
            columns[key][index] = value
        episode_return += float(row["rewards"])
        if row["terminals"] or row["timeouts"]:
            returns.append(episode_return)
            episode_return = 0.0
        elif index + 1 in cuts:
            columns["timeouts"][index] = True
            episode_return = 0.0
    return columns, returns


def position_count(env: gymnasium.Env) -> int:
    """Returns how many entries of an observation are positions, where all others, behind them, are velocities.

    Raises:
        InputError: If the environment does not say that its observations are made so.
    """
    structure = getattr(env.unwrapped, "observation_structure", {})
    entries = {name: size for name, size in structure.items() if size and not name.startswith("skipped")}
    if list(entries) != ["qpos", "qvel"]:
        made_of = f"are made of {', '.join(entries)}" if entries else "are not described"
        raise InputError(
            f"--hide_velocities needs observations of positions, then velocities, and nothing else; those of "
            f"{env.spec.id} {made_of}; use Hopper-v5, Walker2d-v5, HalfCheetah-v5, Swimmer-v5 or InvertedPendulum-v5"
        )
    return entries["qpos"]


def even_shares(policies: Sequence[Policy], steps: int) -> list[tuple[Policy, int]]:
    """Divides steps among policies as evenly as whole numbers can be; who comes first has one more, if any."""
    fewest, more = divmod(steps, len(policies))
    return [(policy, fewest + (index < more)) for index, policy in enumerate(policies)]


def evaluate(env: gymnasium.Env, policy: Policy, episodes: int, seed: int) -> float:
    """Returns the mean return of the policy's stochastic actions over whole episodes."""
    rows = transitions(env, [(policy, sys.maxsize)], seed)
    total, ended = 0.0, 0
    while ended < episodes:
        row = next(rows)
        total += float(row["rewards"])
        ended += row["terminals"] or row["timeouts"]
    return total / episodes


# --- Training ---


def train_sac(
    env_id: str, target_return: float, max_steps: int, seed: int, path: Path, snapshots: Snapshots | None = None
) -> None:
    """Trains soft actor-critic until its stochastic actions return ``target_return``, keeping the best policy on disk.

    Args:
        env_id: The environment's registered name.
        target_return: Mean return over ``EVALUATION_EPISODES`` episodes that ends training.
        max_steps: Environment steps after which training gives up.
        seed: Fixes training and evaluation.
        path: Where the best policy is written, after every evaluation that improves on it.
        snapshots: Keeps some of the evaluated policies, if given.

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
            policy = SquashedGaussianPolicy.from_actor(model.actor, env.action_space.low, env.action_space.high)
            policy.evaluation_return = achieved = evaluate(evaluation_env, policy, EVALUATION_EPISODES, seed)
            policy.description = (
                f"sac: stochastic actions after {model.num_timesteps} training steps (seed {seed}, evaluation "
                f"return {achieved:.0f} over {EVALUATION_EPISODES} episodes, stable-baselines3 "
                f"{stable_baselines3.__version__})"
            )
            if achieved > best:
                best = achieved
                policy.save(path, env_id)
            if snapshots is not None:
                snapshots.add(policy, env_id, model.num_timesteps)
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
    if "hidden" in made:
        environment += f" without its {made['hidden']}"
    return [shown, environment, policy, noise, mean_return, episodes, str(dataset.num_rows), size, keys]


# --- The command ---


def check_files(outputs: Sequence[tuple[str, Path]], sources: Sequence[tuple[str, Path]], overwrite: bool) -> None:
    """Checks that files can be written and do not exist yet, unless they may be overwritten.

    Args:
        outputs: Flags and their paths.
        sources: What is read, which no output replaces, whatever it is called.
        overwrite: Whether other files may be replaced.

    Raises:
        InputError: If one cannot be written.
    """
    from tracking.mlflow_store import store_files, tracking_uri

    check_outputs(outputs, [*sources, *(("the MLflow store", path) for path in store_files(tracking_uri()))])
    for _, path in outputs:
        if path.exists() and not overwrite:
            raise InputError(f"{str(path)!r} exists already; give another path, or --overwrite to replace it")


def versions() -> dict[str, str]:
    """Returns the versions of the packages that the data depend on, by the name of the file's attribute.

    A package that is not installed is left out. So is what the data do not depend on, Python itself and what trained
    the policy: where these packages are the same, the same command should write the same bytes.
    """
    found = {}
    for package in ("gymnasium", "mujoco", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"{package}_version"] = importlib.metadata.version(package)
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
        nargs="+",
        default=["random"],
        help="who acts: 'random' (uniform actions, the default), 'sac' (train one first, needs stable-baselines3), or "
        "the .npz file that an earlier 'sac' saved; several files act one after the other, for equal numbers of steps",
    )
    parser.add_argument("--steps", type=int, default=50_000, help="transitions to collect (default 50000)")
    parser.add_argument("--output", type=output_path, help="HDF5 file to write; its folder is made where it is missing")
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
        type=output_path,
        help="with --policy sac: where to keep the trained policy (default: --output with the ending .npz); after "
        "every evaluation it holds the best so far, so that training may be interrupted",
    )
    parser.add_argument(
        "--save_snapshots",
        type=Path,
        metavar="FOLDER",
        help=f"with --policy sac: also keep {SNAPSHOTS} policies of the way, one file each, named by training step and "
        "spread evenly over the returns reached",
    )
    parser.add_argument(
        "--hide_velocities",
        action="store_true",
        help="leave the velocities out of the observations in the file, though the policy sees them: what follows is "
        "then no function of what is seen (MuJoCo environments of positions and velocities)",
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
    check_output_file(args.output, "--output")
    outputs = [("--output", args.output)]
    if args.steps < 1:
        raise InputError(f"--steps {args.steps} is too few; expected at least 1")
    if args.steps > MOST_STEPS:
        raise InputError(f"--steps {args.steps} is too many; expected at most {MOST_STEPS:,}")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {args.seed}; expected 0 or more, below 2^32")
    if not 0 <= args.process_noise <= MOST_NOISE:
        raise InputError(
            f"--process_noise {args.process_noise} is no standard deviation; expected 0 or more, at most {MOST_NOISE:g}"
        )
    if len(args.policy) > args.steps:
        raise InputError(f"--steps {args.steps} is too few for {len(args.policy)} policies; expected one each at least")
    if len(args.policy) > 1 and {"sac", "random"} & set(args.policy):
        raise InputError(f"several policies must be .npz files, but --policy is {' '.join(args.policy)!r}")
    if args.policy == ["sac"]:
        if args.target_return is None or not math.isfinite(args.target_return):
            raise InputError("--policy sac needs --target_return, the return that ends training, e.g. 1500 in Hopper")
        if args.max_train_steps is not None and args.max_train_steps < 1:
            raise InputError(f"--max_train_steps {args.max_train_steps} is too few; expected at least 1")
        outputs.append(("--save_policy", trained_policy(args)))
        if args.save_snapshots is not None:
            if os.path.lexists(args.save_snapshots):
                raise InputError(f"--save_snapshots {str(args.save_snapshots)!r} exists already; give a new folder")
            check_output_folder(args.save_snapshots, is_ours=False, expected="policies", flag="--save_snapshots")
    else:
        for flag in ("target_return", "max_train_steps", "save_policy", "save_snapshots"):
            if getattr(args, flag) is not None:
                raise InputError(
                    f"--{flag} is for --policy sac, but --policy is {' '.join(args.policy)!r}; leave it out"
                )
    check_files(outputs, [("--policy", Path(name)) for name in args.policy], args.overwrite)


def check_conversion(args: argparse.Namespace) -> None:
    """Checks flags and output of ``--convert``.

    Raises:
        InputError: If the output is missing, cannot be written, is a source, or has another ending.
    """
    if args.output is None:
        raise InputError("--output is missing: the file to write, ending in .hdf5 or .pkl")
    if args.env is not None:
        raise InputError("--env is for collecting, but --convert was given; leave one of them out")
    if args.output.suffix not in (*HDF5_ENDINGS, *PICKLE_ENDINGS):
        endings = ", ".join((*HDF5_ENDINGS, *PICKLE_ENDINGS))
        raise InputError(f"--output {str(args.output)!r} has the ending {args.output.suffix!r}; expected {endings}")
    sources = [("--convert", path) for path in dataset_paths(args.convert)]
    folders = [path for _, path in sources if os.path.isdir(path)]  # noqa: PTH112 (it may be no path)
    sources += [("--convert", path) for folder in folders for path in folder.rglob("*")]
    check_files([("--output", args.output)], sources, args.overwrite)


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


def choose_policies(args: argparse.Namespace, env: gymnasium.Env) -> list[Policy]:
    """Returns who acts, trained first if need be.

    Raises:
        InputError: If a file is no policy of the environment, or training does not reach its target.
    """
    if args.policy == ["random"]:
        return [RandomPolicy(env.action_space.low, env.action_space.high)]
    files = [Path(name) for name in args.policy]
    if args.policy == ["sac"]:
        files = [trained_policy(args)]
        snapshots = Snapshots(args.save_snapshots, SNAPSHOTS) if args.save_snapshots else None
        train_sac(args.env, args.target_return, args.max_train_steps or MAX_TRAIN_STEPS, args.seed, files[0], snapshots)
    return [SquashedGaussianPolicy.load(file, args.env, env.observation_space.shape[0]) for file in files]


def describe_policies(shares: Sequence[tuple[Policy, int]]) -> dict[str, Any]:
    """Returns the attributes of a file that say who acted, and in which of its rows."""
    if len(shares) == 1:
        return {"policy": shares[0][0].description}
    return {
        "policy": f"mixture: {len(shares)} policies, one after the other",
        "policies": [policy.description for policy, _ in shares],
        "policy_rows": [rows for _, rows in shares],
    }


def main(argv: list[str] | None = None) -> int:
    """Collects one dataset, or describes or converts some."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "collect_dataset.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        with exit_on_input_error(), exit_when_out_of_memory("lower --steps, or give less data"):
            said = run(args, command)
    except OSError as error:
        print(f"error: {error}; mend it and give the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(said.encode("utf-8", "backslashreplace").decode())
    return 0


def run(args: argparse.Namespace, command: str) -> str:
    """Describes, converts or collects, and returns what to print.

    Args:
        args: The command line.
        command: The same as it was typed.

    Raises:
        InputError: If something given cannot be used.
    """
    if args.describe:
        return describe(args.describe)
    if args.convert:
        check_conversion(args)
        dataset = convert(args.convert, args.output, command)
        for finding in dataset.findings:
            if finding.matters:
                print(f"note: {finding}", file=sys.stderr)
        return f"{args.output}: {dataset.num_rows} rows of {len(dataset.trajectories)} trajectories"
    check_arguments(args)
    args.env = find_environment(args.env)
    env = make_env(args.env)
    shown = position_count(env) if args.hide_velocities else None
    shares = even_shares(choose_policies(args, env), args.steps)
    columns, returns = collect(env, shares, args.seed, args.process_noise)
    for key in ("observations", "next_observations"):
        columns[key] = columns[key][:, :shown]
    if args.drop_next_observations:
        del columns["next_observations"]
    attributes = {
        "env_name": args.env,
        **({"hidden": "velocities"} if args.hide_velocities else {}),
        **describe_policies(shares),
        "seed": args.seed,
        "process_noise": args.process_noise,
        "episodes": len(returns),
        **({"mean_return": np.mean(returns)} if returns else {}),
        "command": command,
        **versions(),
    }
    from data.hdf5 import write_hdf5

    write_hdf5(args.output, columns, attributes, compression=9)
    mean_return = f", mean return {np.mean(returns):.0f}" if returns else ""
    return f"{args.output}: {args.steps} transitions, {len(returns)} whole episodes{mean_return}"


if __name__ == "__main__":
    sys.exit(main())
