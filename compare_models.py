"""Compares ensembles: trains and evaluates configurations on datasets with several seeds, and analyses them paired.

    python compare_models.py --configs configs/study/dnn.yaml configs/study/pnn.yaml --datasets hopper-medium-demo \
        --seeds 5 --output reports/first

ends with ``report.html``, ``report.md``, CSV tables and PNG figures in the folder. Every cell of the grid (arm x
dataset x seed) is kept as soon as it is finished: the command can be stopped at any moment, and given again it goes on.
Given a second time while the first is at work, also on another machine that shares the folder, it takes part.

Comparisons are paired: every arm and seed has the same trajectories for training, validation and test (60/20/20), and
arms with the same seed have the same initial weights, bootstrap draws and minibatch orders, as far as their networks
agree. Each arm's learning rate is chosen beforehand among the same candidates, by validation error, with a seed outside
the study.

On a Ray cluster (``pip install -r requirements-ray.txt``) cells run side by side, with the same results
if processors are of one kind. In a SLURM allocation, whose nodes share nothing but this script::

    #!/bin/bash
    #SBATCH --nodes=4 --ntasks-per-node=1 --cpus-per-task=16 --time=04:00:00
    head=$(hostname --ip-address | cut -d' ' -f1)
    srun --nodes=1 --ntasks=1 --exact -w "$(hostname)" ray start --head --port=6379 --block &
    sleep 20
    srun --nodes=3 --ntasks=3 --exact -x "$(hostname)" ray start --address="$head:6379" --block &
    sleep 20
    python compare_models.py --engine ray --ray_address "$head:6379" --configs ... --datasets ... --output reports/NAME
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import CommandLine, check_output_folder, choose_device, exit_on_input_error
from config import LearnConfig, load_config
from utils import InputError, atomic_write

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    import pandas as pd

    from data.trajectories import Dataset
    from study.cells import Cell, Result
    from study.tracker import StudyTracker

LEARNING_RATES = (2e-3, 5e-3, 1.2e-2, 3e-2)  # around the defaults of both kinds, 4e-3 and 5e-3
TRIAL_SEED = 10_000  # of the choice of learning rates; seeds of a study are smaller
Arms = dict[str, LearnConfig]
Datasets = dict[str, "Dataset"]
Engine = Callable[["list[Cell]", Datasets, Path], "Iterator[Cell]"]
"""Runs the cells that are not done into a folder, and yields each one when it is there."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command: everything a user can get wrong is checked before the first file is written."""
    args = parse_arguments(argv)
    with exit_on_input_error():
        arms = load_arms(args)
        is_ours = (args.output / "study.json").exists()
        check_output_folder(args.output, is_ours, expected="a study")
        rates = known_rates(args, arms)
        device = args.device if args.engine == "ray" else choose_device(args.device)
        datasets = load_datasets(args)
        trials = plan_trials(arms, args, device) if rates is None else []
        check_done(trials if rates is None else plan_cells(arms, rates, args, device), datasets, args.output)
        engine = choose_engine(args)
        number = len(arms) * len(datasets) * args.seeds

    print_plan(arms, args, len(trials), number)
    tracker = open_study(args, arms)
    progress = Progress(len(trials) + number, args.quiet)
    try:
        run_cells(trials, datasets, args.output, engine, tracker, progress)
        rates = choose_rates(trials, args.output) if rates is None else rates
        with exit_on_input_error():
            cells = plan_cells(arms, rates, args, device)
            check_done(cells, datasets, args.output)
        save_table(rates, args.output / "learning_rates.csv")
        run_cells(cells, datasets, args.output, engine, tracker, progress)
        files = report(cells, rates, arms, datasets, args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (OSError, FloatingPointError) as error:
        print(f"error: {error}; what is finished is kept, the same command goes on", file=sys.stderr)
        return 1
    tracker.finish(files)
    return 0


# --- The command line ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; every flag is explained by ``--help``."""
    parser = CommandLine(
        description="Compare ensembles: train and evaluate configurations on datasets with several seeds, and analyse "
        "them paired. Stopped at any moment, the same command goes on.",
        epilog="Try: python compare_models.py --configs configs/study/dnn.yaml configs/study/pnn.yaml --datasets "
        "hopper-medium-demo --seeds 3 --params fit_epochs=5 --output reports/first",
    )
    parser.add_argument(
        "--configs",
        nargs="+",
        required=True,
        type=Path,
        metavar="YAML",
        help="the arms, at least two, named by their files; the first ones are the references of the later ones",
    )
    parser.add_argument("--datasets", nargs="+", required=True, metavar="NAME", help="named as for learn_model.py")
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="train with the seeds 0 to N - 1 (default: 5)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where cells and report go, such as reports/NAME"
    )
    parser.add_argument(
        "--params",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override those of every arm, such as fit_epochs=10",
    )
    parser.add_argument(
        "--learning_rates",
        nargs="*",
        type=float,
        default=list(LEARNING_RATES),
        metavar="RATE",
        help="candidates, among which each arm gets the one with the lowest validation error over all datasets "
        f"(default: {' '.join(f'{rate:g}' for rate in LEARNING_RATES)}); one is given to all arms, and with none every "
        "arm keeps its own fit_lr",
    )
    parser.add_argument(
        "--learning_rates_of",
        type=Path,
        metavar="FOLDER",
        help="take the rates that an earlier study has chosen for arms of these names",
    )
    parser.add_argument(
        "--split_seed", type=int, default=0, help="seed of the split into trajectories, for every cell (default: 0)"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where cells run: here, one after another (local, the default), or on a Ray cluster, side by side",
    )
    parser.add_argument(
        "--ray_address",
        metavar="HOST:PORT",
        help="the Ray cluster (default: the one that RAY_ADDRESS names or that runs on this machine)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of every cell, part of what decides its last bits; more cores are better used by giving the "
        "command more than once, or by Ray (default: 1)",
    )
    parser.add_argument(
        "--analyse_only", action="store_true", help="train nothing; write the report of the cells that are there"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser.parse_args(argv)


def load_arms(args: argparse.Namespace) -> Arms:
    """Reads the arms by name, seeds and rates still their own, and checks the numbers of the grid.

    Raises:
        InputError: If something cannot be used.
    """
    for flag, value, lowest, highest in (
        ("--seeds", args.seeds, 1, TRIAL_SEED),
        ("--threads", args.threads, 1, 1024),
        ("--split_seed", args.split_seed, 0, 2**32 - 1),
    ):
        if not lowest <= value <= highest:
            raise InputError(f"{flag} is {value}; expected a whole number from {lowest} to {highest}")
    if not all(0 < rate < math.inf for rate in args.learning_rates):
        raise InputError(f"--learning_rates got {args.learning_rates}; expected positive numbers")
    if args.ray_address is not None and args.engine != "ray":
        raise InputError("--ray_address is given without --engine ray; add it")
    for flag, names in (
        ("--configs", [path.stem for path in args.configs]),
        ("--datasets", [Path(name).stem for name in args.datasets]),
        ("--learning_rates", args.learning_rates),
    ):
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{flag} names {repeated!r} twice; give each once, and files different names")
    if len(args.configs) < 2:
        raise InputError(f"--configs names one arm, {str(args.configs[0])!r}; expected at least two to compare")
    return {
        path.stem: dataclasses.replace(load_config(path, args.params), split_seed=args.split_seed)
        for path in args.configs
    }


def load_datasets(args: argparse.Namespace) -> Datasets:
    """Loads every dataset and checks that it can be split and learned.

    Raises:
        InputError: If one cannot be used.
    """
    from data.sources import load_dataset
    from data.trajectories import gather_transitions, split_trajectories
    from study.cells import HOLDOUT_RATIO, TEST_RATIO
    from training.build import build_ensemble

    datasets = {name: load_dataset(name, quiet=args.quiet) for name in args.datasets}
    for name, dataset in datasets.items():
        split = split_trajectories(dataset, args.split_seed, holdout_ratio=HOLDOUT_RATIO, test_ratio=TEST_RATIO)
        if len(split.test) < 2 or len(split.holdout) < 1:
            raise InputError(
                f"dataset {name!r} leaves {len(split.test)} trajectories to test on, expected at least 2, as errors "
                f"vary between them; give a dataset of more than its {len(dataset.trajectories)}"
            )
        build_ensemble(LearnConfig(ensemble_size=1, hidden_size=()), gather_transitions(dataset, split.train))
    return datasets


# --- The grid ---


def plan_trials(arms: Arms, args: argparse.Namespace, device: str) -> list[Cell]:
    """Lists the trainings that choose learning rates: every arm, candidate and dataset, with the trial seed."""
    from study.cells import Cell

    return [
        Cell(arm, dataset, dataclasses.replace(config, seed=TRIAL_SEED, fit_lr=rate), True, device, args.threads)
        for dataset in args.datasets
        for arm, config in arms.items()
        for rate in args.learning_rates
    ]


def plan_cells(arms: Arms, rates: pd.DataFrame, args: argparse.Namespace, device: str) -> list[Cell]:
    """Lists the cells of the study; seed by seed, so that a study cut short has whole ones."""
    from study.cells import Cell

    chosen = rates[rates.is_chosen].drop_duplicates("arm").set_index("arm").fit_lr
    return [
        Cell(
            arm, dataset, dataclasses.replace(config, seed=seed, fit_lr=float(chosen[arm])), False, device, args.threads
        )
        for seed in range(args.seeds)
        for dataset in args.datasets
        for arm, config in arms.items()
    ]


def check_done(cells: list[Cell], datasets: Datasets, output: Path) -> None:
    """Checks that cells which are there already are those asked for.

    Raises:
        InputError: If the result of another request is in a cell's place.
    """
    from study.cells import check_request

    for cell in cells:
        check_request(output / cell.name, cell.request(datasets[cell.dataset].sha256))


def run_cells(
    cells: list[Cell], datasets: Datasets, output: Path, engine: Engine, tracker: StudyTracker, progress: Progress
) -> None:
    """Runs the cells that are not done, and tells tracker and progress of all."""
    from study.cells import Result

    is_old = [(output / cell.name).exists() for cell in cells]
    for cell in [cell for cell, old in zip(cells, is_old, strict=True) if old]:
        tracker.log(cell, Result.read(output / cell.name))
        progress.skip()
    for cell in engine([cell for cell, old in zip(cells, is_old, strict=True) if not old], datasets, output):
        result = Result.read(output / cell.name)
        tracker.log(cell, result)
        progress.show(cell, result)


class Progress:
    """A line per finished cell and the time that is left, on stderr; in a terminal a bar, too."""

    def __init__(self, total: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._is_quiet, self._start, self._finished = quiet, time.monotonic(), 0
        self._bar = tqdm(
            total=total, unit="cell", desc="study", dynamic_ncols=True, disable=quiet or not sys.stderr.isatty()
        )
        self._left = total

    def skip(self) -> None:
        """Counts a cell that was there before."""
        self._left -= 1
        self._bar.update()
        self._bar.unpause()  # the time left is that of cells which take time

    def show(self, cell: Cell, result: Result) -> None:
        """Says what a cell has given, and how long the rest may take."""
        self._left, self._finished = self._left - 1, self._finished + 1
        self._bar.update()
        if self._is_quiet:
            return
        outcome = result.record["outcome"]
        if result.failure is not None:
            found = f"FAILED: {result.failure}"
        elif cell.is_trial:
            found = f"validation MSE {outcome['val_mse']:.4g}"
        else:
            found = f"test nRMSE {outcome['metrics']['nrmse']:.4g}"
        left = self._bar.format_interval(self._left * (time.monotonic() - self._start) / self._finished)
        self._bar.write(f"{cell.name}: {found} in {outcome['seconds']:.0f} s; {self._left} to go, {left}", sys.stderr)


# --- Engines ---


def choose_engine(args: argparse.Namespace) -> Engine:
    """Returns what runs cells; connects to the cluster where it is to be Ray."""
    if args.analyse_only:
        return lambda cells, datasets, output: iter(())
    return run_locally if args.engine == "local" else connect_ray(args)


def run_locally(cells: list[Cell], datasets: Datasets, output: Path) -> Iterator[Cell]:
    """Runs cells one after another; those that another process is running are waited for in the end."""
    from filelock import FileLock, Timeout

    from study.cells import run_cell

    for waits in (False, True):
        held = []
        for cell in cells:
            try:
                with FileLock(lock_path(output, cell.name), timeout=-1 if waits else 0):
                    if not (output / cell.name).exists():
                        run_cell(cell, datasets[cell.dataset]).write(output / cell.name)
            except Timeout:
                held.append(cell)
                continue
            yield cell
        cells = held


def lock_path(output: Path, name: str) -> Path:
    """Returns the file by which processes that share a study's folder agree who does what; released when one dies."""
    locks = output / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{name.replace('/', '.')}.lock"


def connect_ray(args: argparse.Namespace) -> Engine:
    """Connects to a Ray cluster and returns the engine that runs cells on it.

    Raises:
        InputError: If Ray or the cluster is missing, or too small for a cell.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray; pip install -r requirements-ray.txt") from None
    code = {
        "working_dir": str(Path(__file__).parent),
        "excludes": ["/data/bundled/", "/data/policies/", "/results/", "/tests/", "/.git/", "*.pkl"],
    }
    try:
        ray.init(args.ray_address or "auto", runtime_env=code, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = args.ray_address or "RAY_ADDRESS and this machine"
        raise InputError(f"no Ray cluster at {where} ({error}); start one: ray start --head") from None
    if args.threads > max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]):
        raise InputError(f"--threads is {args.threads}, and no node of the Ray cluster has as many; give fewer")
    return run_on_ray


def run_on_ray(cells: list[Cell], datasets: Datasets, output: Path) -> Iterator[Cell]:
    """Runs cells side by side; one whose worker is lost runs again elsewhere, five times at most."""
    import ray

    from study.cells import run_cell

    remote = ray.remote(run_cell)
    shared = {name: ray.put(dataset) for name, dataset in datasets.items()}
    pending = {
        remote.options(max_retries=5, num_cpus=cell.threads, num_gpus=int(cell.device == "cuda")).remote(
            cell, shared[cell.dataset]
        ): cell
        for cell in cells
    }
    while pending:
        (finished,), _ = ray.wait(list(pending))
        cell = pending.pop(finished)
        try:
            result = ray.get(finished)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
            raise ChildProcessError(f"cell {cell.name} has lost its worker again and again ({error})") from None
        if not (output / cell.name).exists():
            result.write(output / cell.name)
        yield cell


# --- Learning rates ---


def known_rates(args: argparse.Namespace, arms: Arms) -> pd.DataFrame | None:
    """Returns the learning rates that need no choice; None where trials must choose.

    Raises:
        InputError: If an earlier study is to be followed which does not have them.
    """
    import pandas as pd

    earlier = args.learning_rates_of or (args.output if args.analyse_only else None)
    if earlier is not None:
        try:
            rates = pd.read_csv(earlier / "learning_rates.csv")
        except OSError:
            raise InputError(f"{str(earlier)!r} has no learning_rates.csv; give the folder of a study") from None
        if missing := [arm for arm in arms if arm not in set(rates.arm[rates.is_chosen])]:
            raise InputError(f"{str(earlier / 'learning_rates.csv')!r} has no rate for the arm {missing[0]!r}")
        return rates[rates.arm.isin(arms)]
    if len(args.learning_rates) > 1:
        return None
    own = {name: args.learning_rates[0] if args.learning_rates else config.fit_lr for name, config in arms.items()}
    return pd.DataFrame([{"arm": arm, "fit_lr": rate, "is_chosen": True} for arm, rate in own.items()])


def choose_rates(trials: list[Cell], output: Path) -> pd.DataFrame:
    """Chooses each arm's rate: the lowest geometric mean over datasets of the members' mean validation error.

    Returns:
        arm, fit_lr, dataset, val_mse (infinite for a training that failed), is_chosen.

    Raises:
        FloatingPointError: If an arm has failed somewhere with every rate.
    """
    import numpy as np
    import pandas as pd

    from study.cells import Result

    records = []
    for trial in trials:
        error = Result.read(output / trial.name).record["outcome"]["val_mse"]
        records.append((trial.arm, trial.config.fit_lr, trial.dataset, math.inf if error is None else error))
    table = pd.DataFrame(records, columns=["arm", "fit_lr", "dataset", "val_mse"])
    score = np.log(table.val_mse).groupby([table.arm, table.fit_lr]).mean()
    for arm, best in score.groupby("arm").min().items():
        if best == math.inf:
            raise FloatingPointError(f"arm {arm} has diverged with every learning rate; give lower --learning_rates")
    chosen = score.groupby("arm").idxmin().tolist()
    return table.assign(is_chosen=[pair in chosen for pair in zip(table.arm, table.fit_lr, strict=True)])


# --- What is written and said ---


def open_study(args: argparse.Namespace, arms: Arms) -> StudyTracker:
    """Makes the study's folder, known by its ``study.json``, and its run in MLflow; or goes on with both."""
    from filelock import FileLock

    from study.tracker import StudyTracker

    path = args.output / "study.json"
    with FileLock(lock_path(args.output, "study")):
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        params = {"arms": ", ".join(arms), "datasets": ", ".join(args.datasets), "seeds": args.seeds}
        tracker = StudyTracker(args.output.name, record.get("mlflow_run_id"), params)
        with atomic_write(path, "w") as file:
            json.dump({"command": command_line(), "mlflow_run_id": tracker.run_id}, file, indent=2)
    return tracker


def command_line() -> str:
    """Returns the command as it was given."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def save_table(table: pd.DataFrame, path: Path) -> Path:
    """Writes a table as CSV and returns its path."""
    with atomic_write(path, "w") as file:
        table.to_csv(file, index=False, float_format="%.6g")
    return path


def differences(arms: Arms) -> dict[str, dict[str, Any]]:
    """Returns the settings in which arms differ, each arm's value by name; seeds and rates are the study's."""
    settings = {name: config.to_dict() for name, config in arms.items()}
    keys = [key for key in next(iter(settings.values())) if key not in ("seed", "split_seed")]
    values = {key: {name: setting[key] for name, setting in settings.items()} for key in keys}
    return {key: by_arm for key, by_arm in values.items() if len({str(value) for value in by_arm.values()}) > 1}


def print_plan(arms: Arms, args: argparse.Namespace, trials: int, cells: int) -> None:
    """Says what is compared and what it takes."""
    if args.quiet:
        return
    lines = [f"arms: {', '.join(arms)}; they differ in"]
    lines += [
        f"  {key}: " + ", ".join(f"{arm} {value}" for arm, value in by_arm.items())
        for key, by_arm in differences(arms).items()
    ]
    lines += [
        f"{cells} cells ({len(arms)} arms x {len(args.datasets)} datasets x {args.seeds} seeds) and {trials} trials "
        "that choose learning rates; what is finished is not run again, and the first ones tell how long the rest takes"
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def report(
    cells: list[Cell], rates: pd.DataFrame, arms: Arms, datasets: Datasets, args: argparse.Namespace
) -> list[Path]:
    """Analyses the cells that are there, writes tables, figures and reports, and prints the answer.

    Raises:
        FileNotFoundError: If there is nothing to analyse.
    """
    from study.analysis import analyse
    from study.cells import Result
    from study.report import write_report

    there = [cell for cell in cells if (args.output / cell.name).exists()]
    results = {
        (cell.arm, Path(cell.dataset).stem, cell.config.seed): Result.read(args.output / cell.name) for cell in there
    }
    if all(result.failure is not None for result in results.values()):
        raise FileNotFoundError(f"{args.output} has no cell whose training has succeeded: nothing to compare")
    tables = analyse(results)
    files = [save_table(table, args.output / f"{name}.csv") for name, table in tables.items()]
    facts = describe(results, len(cells), arms, datasets, args)
    files += write_report(args.output, facts, tables | {"learning_rates": rates})
    shutil.rmtree(args.output / ".locks", ignore_errors=True)
    if not args.quiet:
        print((args.output / "report.md").read_text(encoding="utf-8").partition("\n## ")[0])
        print(f"report {args.output / 'report.html'}")
    return files


def describe(
    results: dict[tuple[str, str, int], Result], planned: int, arms: Arms, datasets: Datasets, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns what the report says of the study beside its numbers."""
    import pandas as pd

    from data.trajectories import split_trajectories
    from study.cells import HOLDOUT_RATIO, TEST_RATIO

    rows = []
    for name, dataset in datasets.items():
        split = split_trajectories(dataset, args.split_seed, holdout_ratio=HOLDOUT_RATIO, test_ratio=TEST_RATIO)
        parts = {"training": split.train, "validation": split.holdout, "test": split.test}
        rows.append({"dataset": Path(name).stem, "transitions": dataset.num_transitions, "sha256": dataset.sha256[:16]})
        for part, indices in parts.items():
            size = sum(dataset.trajectories[index].num_transitions for index in indices)
            rows[-1][part] = f"{size} in {len(indices)} trajectories"
    origins = [
        {"code": result.record["origin"]["git_commit"], **result.record["origin"]["versions"]}
        for result in results.values()
    ]
    failed = sum(result.failure is not None for result in results.values())
    hours = sum(result.record["outcome"]["seconds"] for result in results.values()) / 3600
    return {
        "title": f"{', '.join(arms)} on {', '.join(Path(name).stem for name in datasets)}",
        "lead": f"{len(results)} of {planned} runs ({len(arms)} arms, {len(datasets)} datasets, {args.seeds} seeds), "
        f"{failed} of which failed; {hours:.1f} hours of training and evaluation with {args.threads} threads.",
        "command": command_line(),
        "differences": pd.DataFrame(
            [
                {"setting": key} | {arm: str(value) for arm, value in values.items()}
                for key, values in differences(arms).items()
            ],
            columns=["setting", *arms],
        ),
        "datasets": pd.DataFrame(rows),
        "origin": pd.DataFrame(origins).value_counts(dropna=False).rename("cells").reset_index(),
    }


if __name__ == "__main__":
    sys.exit(main())
