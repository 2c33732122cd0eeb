"""Evaluates a learned ensemble on trajectories it never saw, and writes a report.

    python evaluate_model.py --model model.pkl --dataset hopper-medium-demo --ood_dataset hopper-random-demo

scores the test trajectories that ``learn_model.py --test_ratio`` kept apart (or the holdout, which the report then
says), one step ahead and open loop, and ends with ``report.html``, ``metrics.json``, CSV tables and PNG figures in
``reports/``. ``main`` loads everything and passes it on; what is measured is in the package
``evaluation``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import CommandLine, check_output_folder, choose_device, exit_on_input_error
from utils import InputError, atomic_write, git_commit

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    import numpy as np
    import pandas as pd

    from data.trajectories import Dataset, Transitions
    from dynamics_model import DynamicsEnsemble
    from evaluation.oracle import Oracle
    from evaluation.predictions import Rows

REPORTS = Path("reports")
MAX_ROWS = 50_000  # of the evaluated dataset; more are drawn from in whole trajectories
MAX_OTHER_ROWS = 10_000  # of every other dataset, and of every cell of the cross-dataset matrix
HORIZONS = (1, 5, 10, 25, 50, 100, 200)
MAX_STARTS = 256
_PARTS = {
    "test": "test trajectories, which neither trained the model nor selected anything",
    "holdout": "the selection holdout: its error chose the members' weights and elites, so these scores flatter the "
    "model; train with --test_ratio for a test",
    "train": "training trajectories: the scores say how well the model fits what it has seen, not how well it predicts",
    "unseen": "a dataset other than the one the model was trained on: all of it is unseen",
}


@dataclass(frozen=True)
class Model:
    """A ``model.pkl``, loaded."""

    name: str
    ensemble: DynamicsEnsemble
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """Trajectories to evaluate on, and what they are to the model.

    Attributes:
        indices: Sorted indices of trajectories.
        part: ``test``, ``holdout``, ``train`` or ``unseen``.
        available: Number of trajectories of that part, of which more than enough were drawn from.
    """

    indices: np.ndarray
    part: str
    available: int


def main(argv: list[str] | None = None) -> int:
    """Runs the command: everything a user can get wrong is checked before the first file is written."""
    args = parse_arguments(argv)
    with exit_on_input_error():
        check_arguments(args)
        device = choose_device("cpu" if args.cpu else args.device)
        models = load_models(args.model, device)
        datasets = load_datasets(args, models)
        model, dataset = models[0], datasets[0]
        selection = select_trajectories(model, dataset, MAX_ROWS, args.seed, args.split)
        ood_rows = {other.name: unseen_rows(model, other, args.seed) for other in datasets[1:]}
        training = find_training_rows(model, dataset, args.quiet)
        check_enough(model, selection, training)
        folder = args.output or REPORTS / f"{slug(model.name)}-on-{slug(dataset.name)}"
        check_output_folder(folder, is_ours=bool(earlier_files(folder)), expected="a report")
        oracle = find_oracle(model, dataset, selection, args.seed) if args.oracle else None

    from evaluation.figures import draw_figures
    from evaluation.report import html_report

    facts = describe(model, dataset, selection, training, args.seed, sys.argv[1:] if argv is None else argv)
    if not args.quiet:
        print("{model} on {dataset}: {rows} rows of {trajectories} trajectories".format(**facts), file=sys.stderr)
    tables, summary = measure(model, dataset, selection, training, ood_rows, oracle, args)
    if len(models) * len(datasets) > 1:
        tables["cross_dataset"] = cross_dataset_table(models, datasets, args.seed)
    figures = draw_figures(tables)
    page = html_report(facts, summary, tables, figures, args.horizons)
    try:
        files = write_results(folder, facts | {"metrics": summary}, tables, figures, page)
    except OSError as error:
        print(f"error: {error}; the report in {folder} is not complete", file=sys.stderr)
        return 1
    if model.metadata.get("mlflow_run_id"):
        from tracking.mlflow_tracker import log_evaluation

        log_evaluation(model.metadata["mlflow_run_id"], slug(dataset.name), summary, files)
    if not args.quiet:
        print(results_text(facts, summary, args.horizons, folder))
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
        help="what to evaluate on, named as for learn_model.py; of the model's own dataset only trajectories that it "
        "did not train on",
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


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses numbers that make no sense and names given twice; sorts the horizons.

    Raises:
        InputError: If there is one.
    """
    if min(args.horizons) < 1:
        raise InputError(f"--horizons got {min(args.horizons)}; expected numbers of steps, at least 1")
    args.horizons = sorted(set(args.horizons))
    if args.max_starts < 1:
        raise InputError(f"--max_starts is {args.max_starts}; expected at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {args.seed}; expected a whole number from 0 to 2^32 - 1")
    names = [args.dataset, *args.ood_dataset]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"dataset {repeated!r} is given twice; give every dataset once")


# --- Inputs ---


def load_models(paths: list[Path], device: str) -> list[Model]:
    """Loads every ``model.pkl``, each known by the name of its run.

    Raises:
        InputError: If one does not exist or is something else, or two have one name.
    """
    models = [load_model(path, device) for path in paths]
    names = [model.name for model in models]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two of the models are of the run {repeated!r}; give every model once")
    return models


def load_model(path: Path, device: str) -> Model:
    """Loads one ``model.pkl``."""
    import dynamics_model

    try:
        members, metadata = dynamics_model.load_models(path)
    except FileNotFoundError:
        raise InputError(f"model {str(path)!r} does not exist; train one with learn_model.py") from None
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    ensemble = dynamics_model.DynamicsEnsemble(members, metadata["seed"]).to(device)
    return Model(metadata.get("run_name") or path.stem, ensemble, metadata)


def load_datasets(args: argparse.Namespace, models: list[Model]) -> list[Dataset]:
    """Loads the dataset to evaluate on, then the others, and checks that every model fits every one.

    Raises:
        InputError: If there is no such dataset, or a model does not fit.
    """
    from data.sources import load_dataset

    first = load_dataset(args.dataset, simulator_states=args.oracle, quiet=args.quiet)
    datasets = [first, *(load_dataset(name, quiet=args.quiet) for name in args.ood_dataset)]
    for dataset in datasets:
        for path, model in zip(args.model, models, strict=True):
            expected, found = (
                f"{part.state_dim} state and {part.action_dim} action dimensions" for part in (model.ensemble, dataset)
            )
            if found != expected:
                raise InputError(
                    f"{dataset.name} has {found}, but {str(path)!r} was trained on {expected}; give a dataset of "
                    f"{model.metadata['dataset']['env_name'] or model.metadata['dataset']['name']}"
                )
    return datasets


def is_own(model: Model, dataset: Dataset) -> bool:
    """Whether a dataset is the one that a model was trained on."""
    return dataset.sha256 == model.metadata["dataset"]["sha256"]


def select_trajectories(
    model: Model, dataset: Dataset, max_rows: int, seed: int, split: str | None = None
) -> Selection:
    """Chooses the cleanest trajectories there are, or those asked for, and draws from them if they are too many.

    Raises:
        InputError: If there are none.
    """
    import numpy as np

    from evaluation.predictions import draw_trajectories

    if is_own(model, dataset):
        part, indices = choose_part(model, dataset.name, split)
    elif split is None:
        part, indices = "unseen", np.arange(len(dataset.trajectories))
    else:
        raise InputError(
            f"--split {split} is for the dataset the model was trained on, {model.metadata['dataset']['name']!r}; all "
            f"of {dataset.name!r} is unseen: leave --split out"
        )
    return Selection(draw_trajectories(dataset, indices, max_rows, seed), part, available=len(indices))


def choose_part(model: Model, name: str, split: str | None) -> tuple[str, list[int]]:
    """Chooses a part of the model's own dataset: the one asked for, else test, else the holdout."""
    parts = {part: indices for part, indices in model.metadata["dataset"]["split"].items() if indices}
    chosen = split or next((part for part in ("test", "holdout") if part in parts), None)
    if chosen is None:
        raise InputError(
            f"{model.name} was trained on all of {name!r}; train with --test_ratio 0.2, give another dataset, or look "
            "at what it has seen with --split train"
        )
    if chosen not in parts:
        raise InputError(f"--split {split}: {model.name} has no such part of {name!r}, only {', '.join(parts)}")
    return chosen, parts[chosen]


def unseen_rows(model: Model, dataset: Dataset, seed: int) -> Rows:
    """Returns rows of another dataset that a model did not see.

    Raises:
        InputError: If it has seen all.
    """
    from evaluation.predictions import gather_rows

    return gather_rows(dataset, select_trajectories(model, dataset, MAX_OTHER_ROWS, seed).indices)


def find_training_rows(model: Model, dataset: Dataset, quiet: bool) -> Transitions | None:
    """Returns the rows that a model was trained on, or None where that dataset is not here any more.

    They give deterministic members their variance and the linear baseline its coefficients.
    """
    import numpy as np

    from data.sources import load_dataset
    from data.trajectories import gather_transitions

    if not is_own(model, dataset):
        try:
            dataset = load_dataset(model.metadata["dataset"]["name"], quiet=quiet)
        except InputError:
            return None
    if not is_own(model, dataset):
        return None
    return gather_transitions(dataset, np.asarray(model.metadata["dataset"]["split"]["train"], dtype=np.int64))


def check_enough(model: Model, selection: Selection, training: Transitions | None) -> None:
    """Checks that deterministic members can be given a variance.

    Raises:
        InputError: If they cannot.
    """
    if training is None and model.metadata["kind"] == "deterministic" and len(selection.indices) < 2:
        raise InputError(
            f"the dataset {model.name} was trained on, {model.metadata['dataset']['name']!r}, is not here, and one "
            "trajectory is not enough to estimate the residuals of deterministic members; give a dataset of two or more"
        )


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


# --- What is measured ---


def measure(
    model: Model,
    dataset: Dataset,
    selection: Selection,
    training: Transitions | None,
    ood_rows: dict[str, Rows],
    oracle: Oracle | None,
    args: argparse.Namespace,
) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """Evaluates one model on one dataset in full.

    Returns:
        The tables of ``evaluation.evaluate`` and ``oracle.evaluate_oracle``, and their headline numbers.
    """
    from evaluation.evaluate import evaluate, residual_variance, summarise
    from evaluation.oracle import evaluate_oracle
    from evaluation.predictions import gather_rows

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
        residuals = None
        if model.metadata["kind"] == "deterministic":
            residuals = residual_variance(model.ensemble, training or gather_rows(dataset, selection.indices))
        tables |= evaluate_oracle(model.ensemble, oracle, residuals, args.seed)
    return tables, summarise(tables, args.horizons)


def cross_dataset_table(models: list[Model], datasets: list[Dataset], seed: int) -> pd.DataFrame:
    """Error of every model on every dataset, on rows it has not seen; nan where it has seen all."""
    import pandas as pd

    from evaluation.evaluate import cross_dataset_error

    records = []
    for model in models:
        for dataset in datasets:
            record = {"model": model.name, "dataset": dataset.name, "trained_on": is_own(model, dataset)}
            with contextlib.suppress(InputError):
                rows = unseen_rows(model, dataset, seed)
                record |= cross_dataset_error(model.ensemble, dataset, rows)
            records.append(record)
    return pd.DataFrame(records, columns=["model", "dataset", "trained_on", "rows", "rmse", "rmse_raw"])


def describe(
    model: Model, dataset: Dataset, selection: Selection, training: Transitions | None, seed: int, arguments: list[str]
) -> dict[str, Any]:
    """Returns what was evaluated on what, in plain Python types."""
    rows = sum(dataset.trajectories[index].num_transitions for index in selection.indices)
    notes = [f"Evaluated on {_PARTS[selection.part]}."]
    if len(selection.indices) < selection.available:
        notes.append(
            f"{len(selection.indices)} of {selection.available} trajectories were drawn at random, for about "
            f"{MAX_ROWS} rows."
        )
    if training is None:
        notes.append(
            f"The training dataset {model.metadata['dataset']['name']} is not here in the version that was trained on: "
            "the linear baseline (and the variance of deterministic members) is fitted on the evaluated trajectories, "
            "each fold on the others."
        )
    if len(selection.indices) < 2:
        notes.append("With a single trajectory nothing can be recalibrated, and standard errors are unknown.")
    return {
        "model": model.name,
        "kind": model.metadata["kind"],
        "members": len(model.ensemble),
        "trained_on": model.metadata["dataset"]["name"],
        "title": f"{model.name} on {slug(dataset.name)}",
        "dataset": dataset.name,
        "environment": dataset.env_name,
        "sha256": dataset.sha256,
        "part": selection.part,
        "rows": rows,
        "trajectories": len(selection.indices),
        "notes": notes,
        "seed": seed,
        "config": model.metadata["config"],
        "command": shlex.join(["python", "evaluate_model.py", *arguments]),
        "git_commit": git_commit(),
    }


# --- Results ---


def slug(name: str) -> str:
    """Makes a name into one that files and MLflow take: of a path the last part, without its ending."""
    return re.sub(r"[^\w.-]+", "-", re.sub(r"\.(hdf5|h5|pkl|pickle)$", "", Path(name).name if "/" in name else name))


def earlier_files(folder: Path) -> list[str]:
    """Names of the files of an earlier report in a folder; empty where there is none."""
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_results(
    folder: Path,
    facts: dict[str, Any],
    tables: dict[str, pd.DataFrame],
    figures: dict[str, bytes],
    page: str,
) -> list[Path]:
    """Writes the report, its tables and its figures; those of an earlier report are removed.

    Returns:
        The files, ``metrics.json`` last: where it is, the report is whole.
    """
    for name in earlier_files(folder):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    for name, image in figures.items():
        (folder / f"{name}.png").write_bytes(image)
    with atomic_write(folder / "report.html", "w") as file:
        file.write(page)
    names = ["report.html", *(f"{name}.csv" for name in tables), *(f"{name}.png" for name in figures), "metrics.json"]
    with atomic_write(folder / "metrics.json", "w") as file:
        json.dump(facts | {"files": names}, file, indent=2)
    return [folder / name for name in names]


def results_text(facts: dict[str, Any], summary: dict[str, float], horizons: list[int], folder: Path) -> str:
    """Returns the headline numbers, and what to open next, as text."""
    lines = [
        f"one step   nRMSE {summary['nrmse']:.3f} (no change {summary['nrmse_no_change']:.3f}), R2 {summary['r2']:.3f}",
        f"likelihood NLL {summary['nll_mixture']:.3f} nats, CRPS {summary['crps_mixture']:.4f}",
        f"90% band   covers {summary['coverage_90_raw']:.1%} as predicted",
    ]
    reached = [step for step in horizons if f"error_tsinf_{step}" in summary]
    errors = ", ".join(f"{summary[f'error_tsinf_{step}']:.3g} at {step}" for step in reached)
    lines.append(f"open loop  median tsinf error {errors} steps")
    lines += ["errors in units of each dimension's typical change per step in the training rows", *facts["notes"]]
    return "\n".join([*lines, f"report {folder / 'report.html'}"])


if __name__ == "__main__":
    sys.exit(main())
