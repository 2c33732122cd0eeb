"""Evaluates a learned ensemble on trajectories it never saw, and writes a report.

    python evaluate_model.py --model model.pkl --dataset hopper-medium-demo --ood_dataset hopper-random-demo

scores the test trajectories that ``learn_model.py --test_ratio`` kept apart (or the holdout, which the report then
says), one step ahead and open loop, and ends with ``report.html``, ``metrics.json``, CSV tables and PNG figures in
``reports/``. ``evaluate_and_report`` loads everything and passes it on; what is measured is in the package
``evaluation``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli import (
    CommandLine,
    check_output_folder,
    check_outputs,
    choose_device,
    dataset_paths,
    exit_on_input_error,
    exit_when_out_of_memory,
)
from utils import InputError

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    from data.trajectories import Dataset, Transitions
    from evaluation.oracle import Oracle
    from evaluation.report import EvaluationFacts
    from evaluation.selection import Model, Selection

REPORTS = Path("reports")
LONGEST = 100  # characters of a name that a folder is called after
HORIZONS = (1, 5, 10, 25, 50, 100, 200)
MOST_STEPS = 10_000_000  # of a rollout: more than any trajectory has
MAX_STARTS = 128  # start points of one trajectory tell much the same: more of them cost time and say little more


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "evaluate_model.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        with exit_when_out_of_memory("lower --max_starts, or give less data"):
            return evaluate_and_report(args, command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def evaluate_and_report(args: argparse.Namespace, command: str) -> int:
    """Evaluates and writes the report: everything a user can get wrong is checked before the first file is written.

    Args:
        args: The command line.
        command: The same as it was typed.

    Returns:
        The exit code.
    """
    with exit_on_input_error():
        check_arguments(args)
        device = choose_device("cpu" if args.cpu else args.device)

        from data.audit import audit
        from data.sources import load_dataset, load_datasets
        from evaluation import selection as select
        from evaluation.report import slug

        models = select.load_models(args.model, device)
        datasets = [load_datasets(args.dataset, simulator_states=args.oracle, quiet=args.quiet)]
        datasets += [load_dataset(name, quiet=args.quiet) for name in args.ood_dataset]
        select.check_fit(models, datasets)
        model, whole = models[0], datasets[0]
        findings = audit(whole)
        for finding in findings:
            if finding.matters:
                print(f"warning: {finding}", file=sys.stderr)
        selection = select.select_trajectories(model, whole, select.MAX_ROWS, args.seed, args.split, args.keep_copies)
        dataset = selection.dataset
        ood_rows = {other.name: select.unseen_rows(model, other, args.seed) for other in datasets[1:]}
        training = select.find_training_rows(model, whole, args.quiet)
        check_length(args.horizons, selection)
        check_residuals(model, selection, training)
        folder = args.output or REPORTS / f"{slug(model.name)[:LONGEST]}-on-{slug(dataset.name)[:LONGEST]}"
        check_report(folder, args)
        oracle = find_oracle(model, dataset, selection, args.seed) if args.oracle else None

    from evaluation.evaluate import evaluate, summarise
    from evaluation.figures import draw_figures
    from evaluation.oracle import evaluate_oracle
    from evaluation.predictions import gather_rows
    from evaluation.report import EvaluationFacts, html_report, write_report
    from evaluation.tables import cross_dataset_table
    from reporting.escape import encodable

    facts = EvaluationFacts.of(
        model,
        selection,
        findings,
        known_rows=select.count_known_rows(selection, training),
        has_training_rows=training is not None,
        seed=args.seed,
        command=command,
    )
    if not args.quiet:
        for finding in findings:
            if not finding.matters:
                print(f"note: {finding}", file=sys.stderr)
        counted = f"{facts.rows} rows of {facts.trajectories} trajectories"
        print(f"{facts.model} on {facts.dataset}: {counted}", file=sys.stderr)
    tables = evaluate(
        model.ensemble,
        dataset,
        selection.indices,
        training,
        elites=model.metadata["elites"],
        ood_rows=ood_rows,
        horizons=args.horizons,
        max_starts=args.max_starts,
        seed=args.seed,
    )
    if oracle is not None:
        rows = gather_rows(dataset, selection.indices) if training is None else training
        tables |= evaluate_oracle(model.ensemble, oracle, rows, args.seed)
    if len(models) * len(datasets) > 1:
        tables["cross_dataset"] = cross_dataset_table(models, datasets, args.seed)
    summary = summarise(tables, args.horizons)
    figures = draw_figures(tables)
    page = html_report(facts, summary, tables, figures, args.horizons)
    try:
        files = write_report(folder, facts, summary, tables, figures, page)
    except OSError as error:
        print(f"error: {error}; the report in {folder} is not complete", file=sys.stderr)
        return 1
    if model.metadata.get("mlflow_run_id"):
        from tracking.mlflow_tracker import log_evaluation

        log_evaluation(model.metadata["mlflow_run_id"], slug(dataset.name), summary, files)
    if not args.quiet:
        print(encodable(results_text(facts, summary, args.horizons, folder)))
    return 0


# --- The command line ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; every flag is explained by ``--help``."""
    parser = CommandLine(
        description="Evaluate a learned ensemble on trajectories it never saw, and write a report.",
        epilog="Try: python evaluate_model.py --model model.pkl --dataset hopper-medium-demo "
        "--ood_dataset hopper-random-demo",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        type=Path,
        metavar="PKL",
        help="the model.pkl to evaluate; more of them join the matrix of models and datasets",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        metavar="NAME",
        help="what to evaluate on, named as for learn_model.py; only trajectories that the model was not trained on, "
        "whichever file they are in",
    )
    parser.add_argument(
        "--ood_dataset",
        nargs="+",
        default=[],
        metavar="NAME",
        help="other datasets of the same environment: can the model's uncertainty tell them from the first?",
    )
    parser.add_argument(
        "--split",
        choices=("test", "holdout", "train"),
        help="which part of the model's own dataset (default: test where there is one, else holdout)",
    )
    parser.add_argument(
        "--keep_copies",
        action="store_true",
        help="evaluate on trajectories that equal training ones, too; without it they are left out, and either way the "
        "report says how many there are",
    )
    parser.add_argument(
        "--horizons",
        nargs="+",
        type=int,
        default=list(HORIZONS),
        metavar="K",
        help=f"steps at which open-loop rollouts are reported (default: {' '.join(map(str, HORIZONS))})",
    )
    parser.add_argument(
        "--max_starts",
        type=int,
        default=MAX_STARTS,
        metavar="N",
        help=f"start points of rollouts, spread evenly over the rows (default: {MAX_STARTS})",
    )
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="ask the simulator for the truth about actions that the dataset never took (needs gymnasium[mujoco], and "
        "a dataset with infos/qpos and infos/qvel)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where the report goes (default: reports/MODEL-on-DATASET)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of folds, start points and sampling (default: 0)")
    parser.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda|cuda:N", help="where to compute (default: auto)"
    )
    parser.add_argument("--cpu", action="store_true", help="shorthand for --device cpu")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser.parse_args(argv)


# --- Checks ---


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses numbers that make no sense and names given twice; sorts the horizons.

    Raises:
        InputError: If there is one.
    """
    for horizon in args.horizons:
        if not 1 <= horizon <= MOST_STEPS:
            raise InputError(f"--horizons got {horizon}; expected numbers of steps from 1 to {MOST_STEPS:,}")
    args.horizons = sorted(set(args.horizons))
    if args.max_starts < 1:
        raise InputError(f"--max_starts is {args.max_starts}; expected at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {args.seed}; expected a whole number from 0 to 2^32 - 1")
    names = [*args.dataset, *args.ood_dataset]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"dataset {repeated!r} is given twice; give every dataset once")


def check_report(folder: Path, args: argparse.Namespace) -> None:
    """Checks that a report can be written to a folder, and that nothing in it which must live is replaced or removed.

    Raises:
        InputError: If not.
    """
    from evaluation.report import earlier_files
    from tracking.mlflow_store import store_files, tracking_uri

    earlier = earlier_files(folder)
    check_output_folder(folder, is_ours=bool(earlier), expected="a report")
    kept = [("--model", path) for path in args.model]
    kept += [(flag, path) for flag in ("--dataset", "--ood_dataset") for path in dataset_paths(getattr(args, flag[2:]))]
    kept += [("the MLflow store", path) for path in store_files(tracking_uri())]
    check_outputs([("--output", folder / name) for name in {*earlier, "report.html", "metrics.json"}], kept)


def check_length(horizons: list[int], selection: Selection) -> None:
    """Checks that rollouts of some horizon can be compared with a recorded trajectory.

    Raises:
        InputError: If all horizons are longer, or rows do not follow each other.
    """
    trajectories = [selection.dataset.trajectories[index] for index in selection.indices]
    if min(horizons) > 1 and not any(trajectory.in_order for trajectory in trajectories):
        raise InputError(
            f"--horizons begins at {min(horizons)} steps, but the rows of {selection.dataset.name} do not follow one "
            "another, so rollouts of more than one step are refused; give 1 as well"
        )
    longest = max(trajectory.num_transitions for trajectory in trajectories)
    if min(horizons) > longest:
        raise InputError(
            f"--horizons begins at {min(horizons)} steps, but no trajectory has more than {longest} transitions; give "
            "a smaller number as well"
        )


def check_residuals(model: Model, selection: Selection, training: Transitions | None) -> None:
    """Checks that there are enough trajectories to estimate residuals from, where the model's members need them.

    Raises:
        InputError: If there are not.
    """

    def residuals() -> float:
        if training is None and len(selection.indices) < 2:
            raise InputError(
                f"the dataset {model.name} was trained on, {model.metadata['dataset']['name']!r}, is not here, and one "
                "trajectory is not enough to estimate the residuals of deterministic members; give a dataset of two or "
                "more"
            )
        return 0.0

    model.ensemble.completion(residuals)


def find_oracle(model: Model, dataset: Dataset, selection: Selection, seed: int) -> Oracle:
    """Makes the simulator of a dataset and checks that it reproduces the data.

    Raises:
        InputError: If it does not.
    """
    from data.sources import source_attributes
    from evaluation.oracle import prepare_oracle
    from evaluation.predictions import Scale

    process_noise = float(source_attributes(dataset.name).get("process_noise", 0.0))
    return prepare_oracle(dataset, selection.indices, Scale.of(model.ensemble), process_noise, seed)


# --- What is printed ---


def results_text(facts: EvaluationFacts, summary: dict[str, float], horizons: list[int], folder: Path) -> str:
    """Returns the headline numbers, and what to open next, as text."""
    lines = [
        f"one step   nRMSE {summary['nrmse']:.3f} (no change {summary['nrmse_no_change']:.3f}), R2 {summary['r2']:.3f}",
        f"           a typical row is off by {summary['median_error']:.3f}",
        f"likelihood NLL {summary['nll_mixture']:.3f} nats, CRPS {summary['crps_mixture']:.4f}",
        f"90% band   covers {summary['coverage_90_raw']:.1%} as predicted",
    ]
    reached = [step for step in horizons if f"error_tsinf_{step}" in summary]
    errors = ", ".join(f"{summary[f'error_tsinf_{step}']:.3g} at {step}" for step in reached)
    lines.append(f"open loop  median tsinf error {errors} steps")
    kept = summary["half_skill_horizon_tsinf"]
    lines.append(f"           half of the skill against the mean training state is kept for {kept:.0f} steps")
    lines += ["errors in units of each dimension's typical change per step in the training rows", *facts.notes]
    return "\n".join([*lines, f"report {folder / 'report.html'}"])


if __name__ == "__main__":
    sys.exit(main())
