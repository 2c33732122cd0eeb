"""Learns an ensemble of dynamics models from an offline dataset.

    python learn_model.py --dataset hopper-medium-demo --config configs/hopper_dnn.yaml --holdout_ratio 0.2

ends with ``model.pkl`` (a list of members and their metadata, which planners load), a folder in ``logs/`` and a run to
look at in ``mlflow ui --port 5000``. ``main`` builds every object and passes it on; ``train_ensemble`` is the one
training loop.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import LearnConfig, load_config
from errors import CommandLine, InputError, exit_on_input_error
from utils import atomic_write, choose_device, git_commit

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    from torch import Tensor

    from dataset import Dataset, Split, Transitions
    from dynamics_model import DynamicsEnsemble, NormalisedRows
    from member_threads import MemberGroup
    from run_folder import RunFolder
    from tracking import NullTracker

LOGS = Path("logs")
_TRAIN_SCORE_EVERY = 50  # epochs, where train_mse is not tracked every epoch


def main(argv: list[str] | None = None) -> int:
    """Runs the command: everything a user can get wrong is checked before training, and before the run is written."""
    args = parse_arguments(argv)
    try:
        with interruptible() as raise_if_interrupted:
            return learn(args, raise_if_interrupted)
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130


def learn(args: argparse.Namespace, raise_if_interrupted: Callable[[], None]) -> int:
    """Checks, trains and saves; returns the exit code."""
    with exit_on_input_error():
        config = load_config(args.config, args.params)
        if args.seed is not None:
            config = dataclasses.replace(config, seed=args.seed)
        holds_out = args.holdout_ratio > 0 or args.holdout_samples is not None
        if config.patience is not None and not holds_out:
            raise InputError(f"patience is {config.patience}, which needs validation errors; add --holdout_ratio 0.2")
        check_outputs(args)
        device = find_device(args.device)

        from dataset import check_shares, gather_transitions, holdout_rows, load_dataset, split_trajectories

        check_shares(args.holdout_ratio, args.holdout_samples, args.test_ratio)
        dataset = load_dataset(args.dataset, args.dataset_path, quiet=args.quiet)
        split = split_trajectories(
            dataset,
            config.seed if config.split_seed is None else config.split_seed,
            holdout_ratio=args.holdout_ratio,
            holdout_samples=args.holdout_samples,
            test_ratio=args.test_ratio,
        )
        transitions = gather_transitions(dataset, split.train)
        ensemble = build_ensemble(config, transitions).to(device)
        run = open_run(args, config, dataset)
        checkpoint = run.load_checkpoint(device)
        tracker = open_trackers(args, dataset, ensemble, run, checkpoint)

    def save_checkpoint(state: dict[str, Any]) -> None:
        run.save_checkpoint(state)
        raise_if_interrupted()

    try:
        with tracker:
            train = ensemble.normalise(transitions)
            holdout = ensemble.normalise(gather_transitions(dataset, split.holdout)) if holds_out else None
            if holds_out:
                ensemble.holdout_idx = holdout_rows(dataset, split.holdout)
            if not args.quiet:
                print(describe(config, dataset, split, len(train.inputs), device, run), file=sys.stderr)
            train_ensemble(ensemble, config, train, holdout, tracker, args.track_training, checkpoint, save_checkpoint)
            scores = score_members(ensemble, train, holdout)
            elites = rank_elites(scores, config.num_elites)
            metadata = build_metadata(config, dataset, split, scores, elites, run)
            with atomic_write(args.output) as file:
                pickle.dump((ensemble.members(), metadata), file)

            from report import plot_learning_curves

            curves = plot_learning_curves(run.metrics_csv, run.path / "learning_curves.png")
            tracker.finish(summarise(scores, elites), [run.config_yaml, run.metrics_csv, curves, args.output])
    except FloatingPointError as error:
        print(f"error: {error}; its metrics are in {run.metrics_csv}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; run {run.name} is kept: mend it and go on with --resume", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; go on with the same command and --resume --run_name {run.name}", file=sys.stderr)
        return 130
    run.finish({"output": str(args.output), "scores": scores, "elites": elites})
    if not args.quiet:
        print(results_table(scores, elites, args.output, run))
    return 0


def train_ensemble(
    ensemble: DynamicsEnsemble,
    config: LearnConfig,
    train: NormalisedRows,
    holdout: NormalisedRows | None,
    tracker: NullTracker,
    track_training: bool = False,
    checkpoint: dict[str, Any] | None = None,
    save_checkpoint: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains all members at once, in place; with a holdout, each ends with its best weights.

    Args:
        ensemble: What to train; its device is where ``train`` and ``holdout`` are.
        config: Settings.
        train: Training rows, normalised.
        holdout: Rows that select weights and stop training, normalised; None trains to the end.
        tracker: Receives one row of numbers per epoch and member.
        track_training: Whether to score the training rows after every epoch rather than every now and then.
        checkpoint: What training goes on from, to end in the same bits as if it had never stopped; None starts anew.
        save_checkpoint: Called with such a checkpoint after every epoch.
    """
    import torch

    from member_threads import MemberThreads
    from optimisation import BestWeights, draw_bootstrap, draw_order, product_precision

    network, rows = ensemble.network, len(train.inputs)
    network.requires_grad_(True)
    best = BestWeights(network, config.patience) if holdout is not None else None
    bootstrap = draw_bootstrap(config.seed, len(ensemble), rows) if config.bootstrap else None

    with MemberThreads(network, config) as threads:
        if checkpoint is not None:
            network.load_state_dict(checkpoint["network"])
            threads.load_optimizer_state(checkpoint["optimizer"])
            if best is not None:
                best.load_state_dict(checkpoint["best"])
        for epoch in range(checkpoint["epochs"] if checkpoint is not None else 0, config.fit_epochs):
            if best is not None and all(best.stopped):
                break
            order = draw_order(config.seed, len(ensemble), rows, epoch)  # (ensemble, rows)
            if bootstrap is not None:
                order = bootstrap.gather(1, order)
            order = order.to(ensemble.device)
            with product_precision(config, epoch, order.is_cuda):
                losses = threads.map_rows(partial(take_steps, config, train, order, epoch), rows, config.batch_size)

            holdout_scores = threads.score(holdout) if holdout is not None else {}
            if best is not None:
                best.update(network, holdout_scores["mse"])
            is_last = epoch == config.fit_epochs - 1 or (best is not None and all(best.stopped))
            is_scored = track_training or epoch == 0 or is_last or (epoch + 1) % _TRAIN_SCORE_EVERY == 0
            train_scores = threads.score(train) if is_scored else {}
            mean_losses = (torch.cat([sum(pieces) for pieces in losses]) / rows).tolist()
            tracker.log_epoch(epoch, metric_rows(ensemble, config, epoch, mean_losses, train_scores, holdout_scores))
            if save_checkpoint is not None:
                save_checkpoint(
                    {
                        "epochs": epoch + 1,
                        "network": network.state_dict(),
                        "optimizer": threads.optimizer_state(),
                        "best": None if best is None else best.state_dict(),
                    }
                )
    if best is not None:
        best.restore(network)


def take_steps(
    config: LearnConfig, train: NormalisedRows, order: Tensor, epoch: int, group: MemberGroup, starts: range
) -> Tensor:
    """Takes the steps of one epoch, or of a piece of it, with a group of members.

    Args:
        config: Settings.
        train: Training rows, normalised.
        order: Rows in the order in which each member of the ensemble sees them, ``(ensemble, rows)``.
        epoch: Which one, from 0.
        group: Members that go through each step together, with their optimiser.
        starts: Where in ``order`` each minibatch starts.

    Returns:
        The reported loss of each member of the group, summed over rows.
    """
    import torch

    from optimisation import clip_gradients, learning_rate

    network, optimizer = group.network, group.optimizer
    loss_sum = torch.zeros(network.ensemble_size, device=order.device)  # stays there: no wait for the device
    for start in starts:
        time = epoch + start / len(train.inputs)  # in epochs
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(config, time)
        batch = train.select(order[group.members, start : start + config.batch_size])  # (ensemble, batch, ...)
        objective, reported = network.losses(batch, time / config.fit_epochs)  # (ensemble,)
        if network.reward is not None:
            objective = objective + network.reward_loss(batch)
        optimizer.zero_grad(set_to_none=True)
        objective.sum().backward()  # members share no parameter: each gets its own gradient
        for part in network.parts() if config.grad_clip is not None else ():
            clip_gradients(part, config.grad_clip)
        optimizer.step()
        loss_sum += reported * batch.inputs.shape[1]
    return loss_sum


def metric_columns(ensemble: DynamicsEnsemble) -> list[str]:
    """Returns the columns of ``metrics.csv``, the published ones first."""
    columns = ["step", "model_id", ensemble.member_class.loss_name, "lr", "train_mse", "val_mse", "nll"]
    return columns if ensemble.network.reward is None else [*columns, "reward_train_mse", "reward_val_mse"]


def metric_rows(
    ensemble: DynamicsEnsemble,
    config: LearnConfig,
    epoch: int,
    losses: list[float],
    train_scores: dict[str, list[float]],
    holdout_scores: dict[str, list[float]],
) -> list[dict[str, float | int | None]]:
    """Returns one row of ``metrics.csv`` per member: errors in normalised units, None for what was not measured.

    ``train_mse``, ``val_mse`` and ``nll`` (nats, on the holdout) are those of the epoch's final weights; the loss is
    the mean over the epoch's minibatches, and ``lr`` the rate at the epoch's first step.
    """
    from optimisation import learning_rate

    missing = [None] * len(ensemble)
    columns = {
        "step": [epoch] * len(ensemble),
        "model_id": range(len(ensemble)),
        ensemble.member_class.loss_name: losses,
        "lr": [learning_rate(config, epoch)] * len(ensemble),
        "train_mse": train_scores.get("mse", missing),
        "val_mse": holdout_scores.get("mse", missing),
        "nll": holdout_scores.get("nll", missing),
        "reward_train_mse": train_scores.get("reward_mse", missing),
        "reward_val_mse": holdout_scores.get("reward_mse", missing),
    }
    names = metric_columns(ensemble)
    return [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]


# --- The command line ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; every flag is explained by ``--help``."""
    parser = CommandLine(
        description="Learn an ensemble of dynamics models from an offline dataset.",
        epilog="Try: python learn_model.py --dataset hopper-medium-demo --config configs/hopper_dnn.yaml "
        "--holdout_ratio 0.2",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="a bundled name (hopper-medium-demo, ...), a D4RL id (hopper-medium-v0), a Minari id, a D4RL-format .hdf5 "
        "file, or a pickle of (paths, metadata)",
    )
    parser.add_argument(
        "--config", required=True, type=Path, help="YAML file of settings; what it leaves out keeps its default"
    )
    parser.add_argument(
        "--params",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override the file, such as fit_epochs=100 hidden_size=256,256; config.py lists them all",
    )
    parser.add_argument("--seed", type=int, help="seed of every random stream; overrides the configuration's")
    parser.add_argument(
        "--output", type=Path, default=Path("model.pkl"), help="where the trained model goes (default: model.pkl)"
    )
    parser.add_argument(
        "--holdout_ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="share of the rows, in whole trajectories, to hold out: their error selects each member's best weights, "
        "elites and early stopping (default: 0, train to the end)",
    )
    parser.add_argument(
        "--holdout_samples", type=int, metavar="N", help="hold out whole trajectories until N rows are held out"
    )
    parser.add_argument(
        "--test_ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="share of the rows, in whole trajectories, that neither trains nor selects anything: evaluate_model.py "
        "finds it in model.pkl and reports on it (default: 0)",
    )
    parser.add_argument(
        "--track_training",
        action="store_true",
        help="score the training rows after every epoch; without it, which saves up to a third of the time, train_mse "
        f"is measured after the first, every {_TRAIN_SCORE_EVERY}th and the last epoch only",
    )
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write metrics here rather than to the run's folder")
    parser.add_argument("--run_name", metavar="NAME", help="name of the run in logs/ and MLflow (default: made up)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that was cut off: the one named by --run_name, or the latest that asked for the same; "
        "it ends as if it had never stopped, and starts anew where there is none",
    )
    parser.add_argument(
        "--dataset_path",
        type=Path,
        metavar="PATH",
        help="keep the prepared dataset here as a (paths, metadata) pickle, and reuse it if it is the one asked for",
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda|cuda:N",
        help="where to compute (default: auto, CUDA if there)",
    )
    device.add_argument("--cpu", action="store_const", const="cpu", dest="device", help="shorthand for --device cpu")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser.parse_args(argv)


def check_outputs(args: argparse.Namespace) -> None:
    """Checks that what the run will write can be written where it was asked for, without writing it.

    Raises:
        InputError: If a path is no file, is that of another flag, or its nearest existing folder takes no file, or if
            the run's name is no plain name.
    """
    if args.run_name is not None and not re.fullmatch(r"[\w-][\w.+-]*", args.run_name):
        raise InputError(
            f"--run_name got {args.run_name!r}; expected letters, digits and . + - _: it becomes a folder in logs/"
        )
    written = {"--output": args.output, "--csv": args.csv, "--dataset_path": args.dataset_path}
    bundled = Path(__file__).resolve().parent / "data" / f"{args.dataset}.hdf5"
    taken = {bundled: "--dataset", Path(args.dataset).resolve(): "--dataset", args.config.resolve(): "--config"}
    for flag, path in written.items():
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise InputError(f"{flag} {str(path)!r} is a folder or a device; give the name of a file")
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise InputError(
                f"{flag} {str(path)!r} is the file of {other}, which it would overwrite; give another path"
            )
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            reason = f"{existing}: {error.strerror}"
            raise InputError(f"{flag} {str(path)!r} cannot be written ({reason}); give another path") from None


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Lets SIGTERM, as schedulers send it, end the block like Ctrl-C does: by a KeyboardInterrupt.

    Yields:
        A function that raises it again. Python drops an exception that a signal raises inside a finaliser.
    """
    received = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def raise_again() -> None:
        if received:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield raise_again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_device(name: str) -> str:
    """Returns the device asked for, or turns its absence into an input error."""
    try:
        return choose_device(name)
    except ValueError as error:
        raise InputError(str(error)) from None


# --- Building what is trained ---


def build_ensemble(config: LearnConfig, transitions: Transitions) -> DynamicsEnsemble:
    """Builds the members, each from its own stream, with the normalisation of the training rows, and stacks them.

    Raises:
        InputError: If there is nothing to learn in the training rows.
    """
    from deterministic_model import DeterministicModel
    from dynamics_model import Architecture, DynamicsEnsemble, Normalisation, random_stream
    from probabilistic_model import ProbabilisticModel

    architecture = Architecture(
        state_dim=transitions.states.shape[1],
        action_dim=transitions.actions.shape[1],
        hidden_size=config.hidden_size,
        activation_fn=config.activation_fn,
        layer_norm=config.layer_norm,
        reward_hidden_size=config.reward_hidden_size if config.learn_reward else None,
        beta_nll=config.beta_nll,
        beta_nll_decay=config.beta_nll_decay,
    )
    check_size(config, architecture.state_dim, architecture.action_dim)
    try:
        normalisation = Normalisation.from_transitions(transitions)
    except ValueError as error:
        raise InputError(f"{error}; give a dataset in which states move") from None
    member_class = ProbabilisticModel if config.probabilistic else DeterministicModel
    members = [
        member_class(
            architecture,
            normalisation,
            random_stream(config.seed, member, "initialisation"),
            random_stream(config.seed, member, "reward"),
        )
        for member in range(config.ensemble_size)
    ]
    return DynamicsEnsemble(members, config.seed)


def check_size(config: LearnConfig, state_dim: int, action_dim: int) -> None:
    """Refuses an ensemble whose training cannot fit into this machine's memory, such as a typing error makes.

    Raises:
        InputError: If parameters, gradients, Adam's two moments, best weights and a checkpoint take more than there is.
    """
    widths = [state_dim + action_dim, *config.hidden_size, (1 + config.probabilistic) * state_dim]
    weights = sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    needed = 4 * 6 * weights * config.ensemble_size  # bytes
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise InputError(
            f"{config.ensemble_size} members with layers {list(config.hidden_size)} need {needed / 2**30:.3g} GiB to "
            f"train, this machine has {available / 2**30:.3g}; lower ensemble_size or hidden_size"
        )


def open_run(args: argparse.Namespace, config: LearnConfig, dataset: Dataset) -> RunFolder:
    """Finds the run to resume, or makes a new one."""
    from run_folder import RunFolder, unique_name

    request = {
        "dataset": dataset.name,
        "sha256": dataset.sha256,
        "holdout_ratio": args.holdout_ratio,
        "holdout_samples": args.holdout_samples,
        "test_ratio": args.test_ratio,
        "track_training": args.track_training,
        "config": config.to_dict(),
    }
    run = RunFolder.find_unfinished(LOGS, args.run_name, request) if args.resume else None
    if run is None:
        stem = f"{Path(dataset.name).stem}-{args.config.stem}-s{config.seed}"
        origin = {
            "command": shlex.join(sys.argv),
            "git_commit": git_commit(Path(__file__).parent),
            "versions": versions(),
        }
        run = RunFolder.create(LOGS, args.run_name or unique_name(LOGS, stem), request, origin, args.csv)
    elif args.csv is not None and args.csv.resolve() != run.metrics_csv.resolve():
        raise InputError(f"run {run.name!r} has its metrics in {run.metrics_csv}, not in {args.csv}; leave --csv out")
    run.hold(config.to_yaml())
    return run


def open_trackers(
    args: argparse.Namespace,
    dataset: Dataset,
    ensemble: DynamicsEnsemble,
    run: RunFolder,
    checkpoint: dict[str, Any] | None,
) -> NullTracker:
    """Opens CSV, MLflow and the progress bar; those of a resumed run go on from its checkpoint."""
    from tracking import CsvTracker, MlflowTracker, ProgressTracker, Trackers

    request = run.record["request"]
    config = request["config"]
    epochs = None if checkpoint is None else checkpoint["epochs"]
    try:
        csv_tracker = CsvTracker(run.metrics_csv, metric_columns(ensemble), resume_epoch=epochs)
        mlflow_tracker = MlflowTracker(
            run_name=run.name,
            params=config | {name: request[name] for name in ("holdout_ratio", "holdout_samples", "test_ratio")},
            dataset={
                "name": dataset.name,
                "sha256": dataset.sha256,
                "rows": dataset.num_rows,
                "trajectories": len(dataset.trajectories),
            },
            ensemble_size=len(ensemble),
            resume_run_id=run.record["mlflow_run_id"],
            resume_rows=csv_tracker.kept_rows,
        )
    except InputError:
        if checkpoint is None:
            run.discard()
        raise
    run.update(mlflow_run_id=mlflow_tracker.run_id)
    return Trackers([csv_tracker, mlflow_tracker, ProgressTracker(config["fit_epochs"], epochs or 0, args.quiet)])


# --- Results ---


def score_members(
    ensemble: DynamicsEnsemble, train: NormalisedRows, holdout: NormalisedRows | None
) -> list[dict[str, float | None]]:
    """Scores each member's final weights: the ones that are saved.

    Returns:
        Per member ``train_mse``, ``val_mse`` and ``nll`` (of the holdout, in nats), normalised units; None for what
        does not exist.

    Raises:
        FloatingPointError: If a member's error is not finite.
    """
    train_scores = ensemble.network.score(train)
    holdout_scores = ensemble.network.score(holdout) if holdout is not None else {}
    none = [None] * len(ensemble)
    columns = {
        "train_mse": train_scores["mse"],
        "val_mse": holdout_scores.get("mse", none),
        "nll": holdout_scores.get("nll", none),
    }
    scores = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for member, score in enumerate(scores):
        if not all(value is None or math.isfinite(value) for value in score.values()):
            raise FloatingPointError(
                f"member {member} diverged: its error is not finite; lower fit_lr or set grad_clip"
            )
    rewards = train_scores.get("reward_mse", []) + holdout_scores.get("reward_mse", [])
    if not all(map(math.isfinite, rewards)):
        raise FloatingPointError("the reward network diverged: its error is not finite; lower fit_lr or set grad_clip")
    return scores


def rank_elites(scores: list[dict[str, float | None]], num_elites: int | None) -> list[int]:
    """Returns the members with the lowest validation errors, best first; all of them in order without a holdout."""
    members = list(range(len(scores)))
    if scores[0]["val_mse"] is None:
        return members
    return sorted(members, key=lambda member: scores[member]["val_mse"])[:num_elites]


def build_metadata(
    config: LearnConfig,
    dataset: Dataset,
    split: Split,
    scores: list[dict[str, float | None]],
    elites: list[int],
    run: RunFolder,
) -> dict[str, Any]:
    """Returns what ``model.pkl`` says of itself, in plain Python types."""
    from dynamics_model import FORMAT_VERSION

    return {
        "format_version": FORMAT_VERSION,
        "kind": "probabilistic" if config.probabilistic else "deterministic",
        "config": config.to_dict(),
        "dataset": {
            "name": dataset.name,
            "env_name": dataset.env_name,
            "sha256": dataset.sha256,
            "rows": dataset.num_rows,
            "trajectories": len(dataset.trajectories),
            "split": {field.name: getattr(split, field.name).tolist() for field in dataclasses.fields(split)},
        },
        "scores": scores,
        "elites": elites,
        "seed": config.seed,
        "run_name": run.name,
        "mlflow_run_id": run.record["mlflow_run_id"],
        "git_commit": run.record["origin"]["git_commit"],
        "versions": run.record["origin"]["versions"],
    }


def versions() -> dict[str, str]:
    """Returns the versions that results can depend on."""
    packages = ("torch", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def summarise(scores: list[dict[str, float | None]], elites: list[int]) -> dict[str, Any]:
    """Returns the final scores as trackers take them: their means over members, and each member's."""
    means = {
        name: sum(score[name] for score in scores) / len(scores) for name in scores[0] if scores[0][name] is not None
    }
    return {"metrics": means, "members": scores, "elites": elites}


def describe(config: LearnConfig, dataset: Dataset, split: Split, rows: int, device: str, run: RunFolder) -> str:
    """Returns what is about to happen, in two lines."""
    from optimisation import reduced_epochs

    rounded = reduced_epochs(config, device.startswith("cuda"))
    precision = f" (products rounded in {rounded} of {config.fit_epochs} epochs)" if rounded else ""
    kind = "probabilistic" if config.probabilistic else "deterministic"
    widths = "x".join(map(str, config.hidden_size))
    return (
        f"{dataset.name}: {rows} training rows of {len(split.train)} trajectories, {len(split.holdout)} held out\n"
        f"{config.ensemble_size} {kind} members, layers {widths}, on {device}{precision}; run {run.name}"
    )


def results_table(scores: list[dict[str, float | None]], elites: list[int], output: Path, run: RunFolder) -> str:
    """Returns the final scores per member, and what to do next, as text."""
    names = [name for name in scores[0] if scores[0][name] is not None]
    lines = ["member  " + "  ".join(f"{name:>10}" for name in names)]
    for member, score in enumerate(scores):
        mark = "*" if member in elites else " "
        lines.append(f"{member:>5} {mark} " + "  ".join(f"{score[name]:>10.5f}" for name in names))
    lines += [
        "* elite; errors in units of each dimension's mean absolute deviation (squared), nll in nats",
        "",
        f"model   {output}   (load it: dynamics_model.load_ensemble({str(output)!r}))",
        f"metrics {run.metrics_csv}",
        f"look    mlflow ui --port 5000   (run {run.name})",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
