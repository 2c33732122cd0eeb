"""Learns an ensemble of dynamics models from an offline dataset.

    python learn_model.py --dataset hopper-medium-demo --config configs/hopper_dnn.yaml --holdout_ratio 0.2

ends with ``model.pkl`` (a list of members and their metadata, which planners load), a folder in ``logs/`` and a run to
look at in ``mlflow ui --port 5000``. ``learn`` builds every object and passes it on; ``training/loop.py`` is the one
training loop, which it takes through its epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import (
    CommandLine,
    check_outputs,
    choose_device,
    dataset_paths,
    exit_on_input_error,
    exit_when_out_of_memory,
    interruptible,
    output_path,
)
from config import LearnConfig, load_config
from utils import InputError, atomic_write

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    from collections.abc import Sequence

    from data.splits import Division
    from data.trajectories import Dataset, Finding, Transitions
    from dynamics_model import DynamicsEnsemble
    from tracking.run_folder import RunFolder
    from tracking.trackers import Tracker

LOGS = Path("logs")
MEMORY_ADVICE = "lower ensemble_size, hidden_size or batch_size, or give less data"
TRAIN_SCORE_EVERY = 50  # epochs, where train_mse is not tracked every epoch
SUMMARY_ROWS, SUMMARY_STARTS = 4096, 100  # that model.pkl tells of, at most
QUANTILES = ("0.5", "0.9", "0.95", "0.99", "1")


def main(argv: list[str] | None = None) -> int:
    """Runs the command: everything a user can get wrong is checked before training, and before the run is written."""
    args = parse_arguments(argv)
    try:
        with interruptible() as signals, exit_when_out_of_memory(MEMORY_ADVICE):
            return learn(args, signals)
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130


def learn(args: argparse.Namespace, signals: list[int]) -> int:
    """Checks, trains and saves.

    Args:
        args: The command line.
        signals: Those to stop that have been received.

    Returns:
        The exit code.
    """
    with exit_on_input_error():
        config = load_config(args.config, args.params)
        if args.seed is not None:
            config = dataclasses.replace(config, seed=args.seed)
        holds_out = args.holdout_ratio > 0 or args.holdout_samples is not None or args.holdout_dataset is not None
        if config.patience is not None and not holds_out:
            raise InputError(f"patience is {config.patience}, which needs validation errors; add --holdout_ratio 0.2")
        check_paths(args)
        device = choose_device(args.device)

        from data.audit import audit
        from data.sources import load_datasets
        from tracking.trackers import warn
        from training.batches import normalise_rows
        from training.build import build_ensemble, check_holdout, find_kind
        from training.checkpoint import check_checkpoint

        kind = find_kind(config)
        check_division(args)
        dataset = load_datasets(args.dataset, args.dataset_path, quiet=args.quiet)
        division = divide_dataset(args, config, dataset)
        findings = [*audit(dataset), *division.findings()]
        for finding in findings:
            if finding.matters:
                warn(str(finding))
        transitions, held_out = division.training(), division.holdout() if holds_out else None
        check_holdout(kind.ensemble_class, 0 if held_out is None else len(held_out))
        check_rewards(config, division)
        ensemble = build_ensemble(config, transitions).to(device)
        run = open_run(args, config, division, findings)
        if run.record.products is not None:
            config = dataclasses.replace(config, products=run.record.products)
        check = partial(check_checkpoint, ensemble=ensemble, config=config, rows=len(transitions))
        checkpoint = run.checkpoints.load(device, check)
        tracker = open_trackers(args, dataset, ensemble, run, checkpoint, findings)

    from reporting.learning_curves import plot_learning_curves
    from tracking.run_folder import RunOutcome
    from tracking.trackers import Summary
    from training.fastest_products import fastest_products
    from training.loop import train_ensemble
    from training.scores import failed_members, mean_scores, metric_rows, rank_elites, score_members

    try:
        with tracker:
            train = normalise_rows(ensemble, transitions)
            holdout = None if held_out is None else normalise_rows(ensemble, held_out)
            ensemble.holdout_idx = division.holdout_rows()
            products = str(fastest_products(ensemble, config, train))
            config = dataclasses.replace(config, products=products)
            run.settle(products, config.to_yaml())
            if not args.quiet:
                print(describe(config, division, len(train.inputs), device, run), file=sys.stderr)
            score_every = 1 if args.track_training else TRAIN_SCORE_EVERY
            for epoch in train_ensemble(
                ensemble, config, train, holdout, score_every=score_every, checkpoint=checkpoint
            ):
                tracker.log_epoch(epoch.index, metric_rows(ensemble, config, epoch))
                run.checkpoints.save(epoch.checkpoint())
                if signals:
                    raise KeyboardInterrupt

            scores = score_members(ensemble, train, holdout)
            elites = rank_elites(scores, config.num_elites)
            run.update(mlflow_run_id=tracker.run_id)  # a server may have answered since
            metadata = build_metadata(config, ensemble, transitions, division, findings, scores, elites, run)
            with atomic_write(args.output) as file:
                pickle.dump((ensemble.members(), metadata), file)
            plot_learning_curves(run.metrics_csv, run.learning_curves)
            summary = Summary(mean_scores(scores), scores, elites, failed_members(scores))
            tracker.finish(summary, [*run.artifacts, args.output])
        run.finish(RunOutcome(str(args.output.absolute()), scores, elites, summary.failed))
    except FloatingPointError as error:
        print(f"error: {error}; its metrics are in {run.metrics_csv}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; mend it and go on with the same command and {resume_flags(run)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; go on with the same command and {resume_flags(run)}", file=sys.stderr)
        return 130
    for member in summary.failed:
        warn(f"member {member} failed, its numbers are not finite; it has its last good weights and is no elite")
    if not args.quiet:
        print(results_table(scores, elites, args.output, run))
    return 3 if summary.failed else 0


def resume_flags(run: RunFolder) -> str:
    """Returns what goes on with a run, behind the command that began it."""
    return f"--resume --run_name {run.name}"


# --- The command line ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; every flag is explained by ``--help``."""
    parser = CommandLine(
        description="Learn an ensemble of dynamics models from an offline dataset.",
        epilog="Try: python learn_model.py --dataset hopper-medium-demo --config configs/hopper_dnn.yaml "
        "--holdout_ratio 0.2. Exit codes: 0 success, 1 failed, 2 wrong input, 3 success but for members that failed, "
        "130 interrupted.",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        metavar="NAME",
        help="a bundled name (hopper-medium-demo, ...), a D4RL id (hopper-medium-v0), a Minari id, or a file in one of "
        "the formats that the README lists; several are learned from together",
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
        "--output",
        type=output_path,
        default=Path("model.pkl"),
        help="where the trained model goes (default: model.pkl)",
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
        "--holdout_blocks",
        type=int,
        metavar="N",
        help="cut every trajectory into N contiguous blocks, and hold out (and test on) whole blocks, with a gap to "
        "the rows that train (default: 10 where there are too few trajectories to hold out whole ones, else none)",
    )
    parser.add_argument(
        "--holdout_dataset",
        metavar="NAME",
        help="hold out this dataset, less copies of trajectories of --dataset, instead of a share of that",
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
        f"is measured after the first, every {TRAIN_SCORE_EVERY}th and the last epoch only",
    )
    parser.add_argument(
        "--csv", type=output_path, metavar="PATH", help="write metrics here rather than to the run's folder"
    )
    parser.add_argument("--run_name", metavar="NAME", help="name of the run in logs/ and MLflow (default: made up)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that was cut off: the one named by --run_name, or the latest that asked for the same; "
        "it ends as if it had never stopped, and starts anew where there is none",
    )
    parser.add_argument(
        "--dataset_path",
        type=output_path,
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


def check_paths(args: argparse.Namespace) -> None:
    """Checks that what the run will write can be written where it was asked for, without writing it.

    Raises:
        InputError: If it cannot, it would replace what must stay, or the run's name is no plain name.
    """
    from tracking.mlflow_store import store_files, tracking_uri
    from tracking.run_folder import OWN_FILES

    if args.run_name is not None and not re.fullmatch(r"[\w-][\w.+-]*", args.run_name):
        raise InputError(
            f"--run_name got {args.run_name!r}; expected letters, digits and . + - _: it becomes a folder in logs/"
        )
    kept = [("--config", args.config)]
    for flag, names in (("--dataset", args.dataset), ("--holdout_dataset", [args.holdout_dataset or "."])):
        kept += [(flag, path) for path in dataset_paths(names)]
    kept += [("the MLflow store", path) for path in store_files(tracking_uri())]
    outputs = [("--output", args.output), ("--csv", args.csv), ("--dataset_path", args.dataset_path)]
    for folder in {Path(os.path.realpath(path)).parent for _, path in outputs if path is not None}:
        if folder.parent == LOGS.resolve():
            named = None if args.csv is None or folder.name != args.run_name else Path(os.path.realpath(args.csv))
            own = named if named == folder / "metrics.csv" else None  # --csv may name what is so anyway
            kept += [(f"run {folder.name!r}", folder / name) for name in OWN_FILES if folder / name != own]
    check_outputs(outputs, kept)


# --- The data ---


def check_division(args: argparse.Namespace) -> None:
    """Checks what is asked to be held out, as far as that can be done before a dataset is loaded.

    Raises:
        InputError: If it cannot be.
    """
    from data.splits import check_shares

    check_shares(args.holdout_ratio, args.holdout_samples, args.test_ratio, args.holdout_blocks)
    if args.holdout_dataset is not None and (args.holdout_ratio or args.holdout_samples is not None):
        raise InputError(
            "--holdout_dataset holds out all that it names; leave --holdout_ratio and --holdout_samples out"
        )
    if args.holdout_blocks is not None and not (args.holdout_ratio or args.holdout_samples or args.test_ratio):
        raise InputError("--holdout_blocks says how rows are held out, not how many; add --holdout_ratio 0.2")
    if repeated := next((name for name in args.dataset if args.dataset.count(name) > 1), None):
        raise InputError(f"dataset {repeated!r} is given twice; give every dataset once")


def divide_dataset(args: argparse.Namespace, config: LearnConfig, dataset: Dataset) -> Division:
    """Divides a dataset into what trains, what validates and what tests."""
    from data.sources import load_dataset
    from data.splits import divide

    division = divide(
        dataset,
        config.seed if config.split_seed is None else config.split_seed,
        holdout_ratio=args.holdout_ratio,
        holdout_samples=args.holdout_samples,
        test_ratio=args.test_ratio,
        blocks=args.holdout_blocks,
    )
    if args.holdout_dataset is not None:
        division = division.with_holdout(load_dataset(args.holdout_dataset, quiet=args.quiet))
    return division


def check_rewards(config: LearnConfig, division: Division) -> None:
    """Checks that there are rewards where they are to be learned.

    Raises:
        InputError: If there are not.
    """
    for dataset in (division.dataset, division.holdout_dataset):
        if config.learn_reward and dataset is not None and dataset.trajectories[0].rewards is None:
            raise InputError(
                f"learn_reward is true, but {dataset.name} has no rewards; give learn_reward=false or other data"
            )


# --- The run ---


def open_run(
    args: argparse.Namespace, config: LearnConfig, division: Division, findings: Sequence[Finding]
) -> RunFolder:
    """Finds the run to resume, or makes a new one."""
    from data.audit import to_markdown
    from tracking.run_folder import RunFolder, RunOrigin, RunRequest, claim_name

    dataset, held_out = division.whole, division.holdout_dataset
    request = RunRequest(
        dataset=dataset.name,
        sha256=dataset.sha256,
        holdout_ratio=args.holdout_ratio,
        holdout_samples=args.holdout_samples,
        test_ratio=args.test_ratio,
        track_training=args.track_training,
        config=config.to_dict(),
        holdout_blocks=args.holdout_blocks,
        holdout_dataset=None if held_out is None else held_out.name,
        holdout_sha256=None if held_out is None else held_out.sha256,
    )
    run = None
    if args.resume:
        run = RunFolder.find_unfinished(LOGS, args.run_name, request, defaults=LearnConfig().to_dict())
    if run is None:
        names = "+".join(Path(name).stem for name in args.dataset)
        stem = f"{names}-{args.config.stem}-s{config.seed}"
        run_name = args.run_name or claim_name(LOGS, stem)
        run = RunFolder.create(LOGS, run_name, request, RunOrigin.here(), args.csv, map(dataclasses.asdict, findings))
    elif args.csv is not None and args.csv.resolve() != run.metrics_csv.resolve():
        raise InputError(f"run {run.name!r} has its metrics in {run.metrics_csv}, not in {args.csv}; leave --csv out")
    run.hold(config.to_yaml(), to_markdown(findings))
    return run


def open_trackers(
    args: argparse.Namespace,
    dataset: Dataset,
    ensemble: DynamicsEnsemble,
    run: RunFolder,
    checkpoint: dict[str, Any] | None,
    findings: Sequence[Finding],
) -> Tracker:
    """Opens CSV, MLflow and the progress bar; those of a resumed run go on from its checkpoint."""
    from tracking.csv_tracker import CsvTracker
    from tracking.run_folder import RunShown
    from tracking.run_tracker import open_run_tracker
    from tracking.trackers import ProgressTracker, Trackers
    from training.scores import metric_columns

    epochs = None if checkpoint is None else checkpoint["epochs"]
    tags = {"kind": ensemble.kind, "audit": ", ".join(f"{each.name}: {each.count}" for each in findings)}
    try:
        run.update(shown=RunShown(tags, dataset.num_rows, len(dataset.trajectories), len(ensemble)))
        csv_tracker = CsvTracker(run.metrics_csv, metric_columns(ensemble), resume_epoch=epochs)
        mlflow_tracker = open_run_tracker(run, csv_tracker.kept_rows)
        run.update(mlflow_run_id=mlflow_tracker.run_id)
    except (InputError, OSError) as error:
        if checkpoint is None:
            run.discard()
        if isinstance(error, InputError):
            raise
        raise InputError(f"the folder {run.path} cannot be written ({error.strerror}); free space") from None
    progress = ProgressTracker(run.record.request.config["fit_epochs"], epochs or 0, args.quiet)
    return Trackers([csv_tracker, mlflow_tracker, progress])


# --- Results ---


def build_metadata(
    config: LearnConfig,
    ensemble: DynamicsEnsemble,
    transitions: Transitions,
    division: Division,
    findings: Sequence[Finding],
    scores: list[dict[str, float | None]],
    elites: list[int],
    run: RunFolder,
) -> dict[str, Any]:
    """Returns what ``model.pkl`` says of itself, in plain Python types; the transitions are those that trained."""
    from dynamics_model import FORMAT_VERSION
    from training.scores import failed_members, stray_members

    dataset = division.whole
    return {
        "format_version": FORMAT_VERSION,
        "kind": ensemble.kind,
        "config": config.to_dict(),
        "dataset": {
            "name": dataset.name,
            "env_name": dataset.env_name,
            "rows": dataset.num_rows,
            **division.to_dict(),
            "findings": [dataclasses.asdict(finding) for finding in findings],
        },
        "data": summarise_data(ensemble, transitions, division, elites),
        "scores": scores,
        "elites": elites,
        "failed": failed_members(scores),
        "stray": sorted(stray_members(scores)),
        "seed": config.seed,
        "run_name": run.name,
        "mlflow_run_id": run.record.mlflow_run_id,
        "git_commit": run.record.origin.git_commit,
        "versions": run.record.origin.versions,
    }


def summarise_data(
    ensemble: DynamicsEnsemble, transitions: Transitions, division: Division, elites: list[int]
) -> dict[str, Any]:
    """Returns what environments inside the model need to know of the training data, raw units.

    The lowest and highest states and actions, the lowest reward (None without rewards), states in which trajectories
    start, and over a sample of rows, the quantiles of each disagreement of the elites.
    """
    import numpy as np

    def span(*parts: np.ndarray) -> dict[str, list[float]]:
        low, high = [part.min(axis=0) for part in parts], [part.max(axis=0) for part in parts]
        return {"low": np.min(low, axis=0).tolist(), "high": np.max(high, axis=0).tolist()}

    def sample(count: int, at_most: int) -> np.ndarray:
        return np.linspace(0, count - 1, min(count, at_most)).astype(int)

    rows = sample(len(transitions), SUMMARY_ROWS)
    members = ensemble.select(elites).requires_grad_(False)
    moments = members.moments(transitions.states[rows], transitions.actions[rows])
    measured = {kind: members.disagreement_of(*moments, kind).cpu().numpy() for kind in members.disagreements}
    trained = [(index, division.dataset.trajectories[index]) for index in division.split.train]
    pieces = division.pieces
    starts = [t for index, t in trained if t.in_order and (pieces is None or pieces[index].start == 0)]
    return {
        "states": span(transitions.states, transitions.next_states),
        "actions": span(transitions.actions),
        "lowest_reward": None if transitions.rewards is None else float(transitions.rewards.min()),
        "initial_states": [starts[index].observations[0].tolist() for index in sample(len(starts), SUMMARY_STARTS)],
        "disagreement": {
            kind: {name: float(np.quantile(values, float(name))) for name in QUANTILES}
            for kind, values in measured.items()
        },
    }


def describe(config: LearnConfig, division: Division, rows: int, device: str, run: RunFolder) -> str:
    """Returns what is about to happen, in two lines."""
    from training.precision import reduced_epochs

    rounded = reduced_epochs(config, device.startswith("cuda"))
    precision = f" in {rounded} of {config.fit_epochs} epochs rounded" if rounded else ""
    kind, widths = config.kind_of_ensemble, "x".join(map(str, config.hidden_size))
    split, unit = division.split, "trajectories" if division.pieces is None else "pieces"
    held_out = f"{len(split.holdout)} held out"
    if division.holdout_dataset is not None:
        held_out = f"{len(division.holdout_dataset.trajectories)} of {division.holdout_dataset.name} held out"
    return (
        f"{division.whole.name}: {rows} training rows of {len(split.train)} {unit}, {held_out}\n"
        f"{config.ensemble_size} {kind} members, layers {widths}, on {device}; products by {config.products}"
        f"{precision}; run {run.name}"
    )


def results_table(scores: list[dict[str, float | None]], elites: list[int], output: Path, run: RunFolder) -> str:
    """Returns the final scores per member, and what to do next, as text."""
    from training.scores import STRAY, stray_members

    names = [name for name in scores[0] if scores[elites[0]][name] is not None]
    lines = ["member  " + "  ".join(f"{name:>10}" for name in names)]
    for member, score in enumerate(scores):
        mark = "*" if member in elites else " "
        cells = ["failed" if score[name] is None else f"{score[name]:.5f}" for name in names]
        lines.append(f"{member:>5} {mark} " + "  ".join(f"{cell:>10}" for cell in cells))
    lines.append("* elite; errors in units of each dimension's mean absolute deviation (squared), nll in nats")
    lines += [
        f"member {member} is stray: its error is {times:.0f} times the median's (more than {STRAY:g} times is stray)"
        for member, times in stray_members(scores).items()
    ]
    lines += [
        "",
        f"model   {output}   (load it: dynamics_model.load_ensemble({str(output)!r}))",
        f"metrics {run.metrics_csv}",
        f"look    mlflow ui --port 5000   (run {run.name})",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
