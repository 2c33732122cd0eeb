"""Compares ensembles: trains and evaluates configurations on datasets with several seeds, and analyses them paired.

    python compare_models.py --configs configs/study/dnn.yaml configs/study/pnn.yaml --datasets hopper-medium-demo \
        --seeds 5 --output reports/first

ends with ``report.html``, ``report.md``, CSV tables and PNG figures in the folder. Every cell of the grid (arm x
dataset x seed) is kept as soon as it is finished: stop the command at any moment, and the same command goes on. Start
it more than once, also on other machines that share the folder, and the processes share the cells.

Comparisons are paired: every arm and seed has the same trajectories for training, validation and test (60/20/20), and
arms with the same seed have the same initial weights, bootstrap draws and minibatch orders, as far as their networks
have equal shapes. Beforehand, with a seed outside the study, each arm chooses its learning rate on each dataset among
the same candidates, and each dataset gets the horizon of its rollouts, both on validation trajectories.

On a Ray cluster (``pip install -r requirements-ray.txt``) cells run side by side, with the same results if processors
are of one kind. In a SLURM allocation, whose nodes share nothing but this script::

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
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cli import CommandLine, check_output_folder, choose_device, exit_on_input_error, exit_when_out_of_memory
from utils import InputError

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    from study.cells import Cell
    from study.engines import Engine, Finished
    from study.grid import Arms, Grid
    from study.tuning import Tuning

LEARNING_RATES = (2e-3, 5e-3, 1.2e-2)  # where the best one is at an edge, trials go on beyond it


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    args = parse_arguments(argv)
    with exit_when_out_of_memory("lower ensemble_size, hidden_size or batch_size; what is finished is kept"):
        return compare(args)


def compare(args: argparse.Namespace) -> int:
    """Compares and writes the report: everything a user can get wrong is checked before the first file is written.

    Returns:
        The exit code.
    """
    from reporting.escape import encodable
    from study.engines import run_missing
    from study.grid import Grid, check_done, check_places, load_arms, load_datasets
    from study.report import save_table, write_study
    from study.store import CellStore
    from study.tracker import check_study, open_study
    from study.tuning import Tuning, further_trials

    with exit_on_input_error():
        check_arguments(args)
        arms = load_arms(args.configs, args.params)
        is_ours = os.path.lexists(args.output / "study.json")
        check_output_folder(args.output, is_ours, expected="a study")
        check_study(args.output)
        tuning = known_tuning(args, arms)
        device = args.device if args.engine == "ray" else choose_device(args.device)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        grid = Grid(arms, args.datasets, seeds, args.split_seeds, device, args.threads, args.simulator)
        store = CellStore(args.output)
        check_places(grid, store)
        datasets = load_datasets(args.datasets, args.split_seeds, args.simulator, args.quiet)
        trials = grid.trials(args.learning_rates) if tuning is None else []
        check_done(trials if tuning is None else grid.cells(tuning.chosen), datasets, store)
        engine = choose_engine(args)

    if not args.quiet:
        print(plan_text(grid, len(trials)), file=sys.stderr, flush=True)
    params = {"arms": ", ".join(arms), "datasets": ", ".join(args.datasets), "seeds": args.seeds}
    progress = Progress(len(trials) + len(grid), args.quiet)

    def run(cells: list[Cell]) -> None:
        for finished in run_missing(cells, datasets, store, engine):
            tracker.log(finished.cell, finished.result)
            progress.count(finished)

    try:
        tracker = open_study(store, command_line(), params)
        run(trials)
        while further := further_trials(trials, store, grid, len(args.learning_rates)):
            progress.extend(further)
            run(further)
            trials += further
        tuning = tuning or Tuning.of(trials, store)
        cells = grid.cells(tuning.chosen)
        check_done(cells, datasets, store)
        with store.hold("study"):
            save_table(tuning.rates, args.output / "learning_rates.csv")
            save_table(tuning.horizons, args.output / "horizons.csv")
        run(cells)
        results = {cell.key: store.read(cell.name) for cell in cells if store.has(cell)}
        with store.hold("study"):
            store.remove_leftovers()
            files = write_study(args.output, results, tuning, grid, datasets, command_line())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except InputError as error:  # what another process has left meanwhile
        with exit_on_input_error():
            raise InputError(f"{error}; what is finished is kept") from None
    except (OSError, FloatingPointError) as error:
        print(f"error: {error}; what is finished is kept, the same command goes on", file=sys.stderr)
        return 1
    tracker.finish(files)
    store.remove_locks()
    if not args.quiet:
        print((args.output / "report.md").read_text(encoding="utf-8").partition("\n## ")[0])
        print(f"report {encodable(str(args.output / 'report.html'))}")
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
    parser.add_argument(
        "--datasets",
        nargs="+",
        required=True,
        metavar="NAME[:ROWS]",
        help="named as for learn_model.py; :ROWS trains on so many rows only, and validates and tests as without",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="train with so many seeds (default: 5)")
    parser.add_argument(
        "--first_seed", type=int, default=0, metavar="SEED", help="the first one; the others follow it (default: 0)"
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
        help="candidates, among which each arm gets on each dataset the one at which its median member has the lowest "
        "validation error; where that is the lowest or highest one, up to two more are tried beyond it "
        f"(default: {' '.join(f'{rate:g}' for rate in LEARNING_RATES)}); one is given to all arms, and with none every "
        "arm keeps its own fit_lr",
    )
    parser.add_argument(
        "--learning_rates_of",
        type=Path,
        metavar="FOLDER",
        help="take the rates and horizons that an earlier study has chosen for arms and datasets of these names",
    )
    parser.add_argument(
        "--split_seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="SEED",
        help="seeds of splits into trajectories; every seed trains on every split (default: 0, one split)",
    )
    parser.add_argument(
        "--simulator",
        action="store_true",
        help="test in the simulators of the datasets' environments, too: uncertainty about states and actions that the "
        "data does not hold, and the values of policies, which takes some two minutes a training",
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


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what can be checked without reading a file.

    Raises:
        InputError: If something cannot be used.
    """
    from reporting.escape import encodable
    from study.cells import short_name
    from study.grid import TRIAL_SEED

    for flag, value, lowest, highest in (
        ("--seeds", args.seeds, 1, TRIAL_SEED),
        ("--first_seed", args.first_seed, 0, TRIAL_SEED - args.seeds),
        ("--threads", args.threads, 1, 1024),
        *(("--split_seeds", seed, 0, 2**32 - 1) for seed in args.split_seeds),
    ):
        if not lowest <= value <= highest:
            raise InputError(f"{flag} is {value}; expected a whole number from {lowest} to {highest}")
    if not all(0 < rate < math.inf for rate in args.learning_rates):
        raise InputError(f"--learning_rates got {args.learning_rates}; expected positive numbers")
    if args.ray_address is not None and args.engine != "ray":
        raise InputError("--ray_address is given without --engine ray; add it")
    for flag, names in (
        ("--configs", [path.stem for path in args.configs]),
        ("--datasets", [short_name(name) for name in args.datasets]),
        ("--split_seeds", args.split_seeds),
        ("--learning_rates", [float(f"{rate:g}") for rate in args.learning_rates]),
    ):
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{flag} names {repeated!r} twice; give each once, and files different names")
        if odd := next((name for name in names if str(name) != encodable(str(name))), None):
            raise InputError(f"{flag} names {odd!r}, which is no text; give the file another name")
    if len(args.configs) < 2:
        raise InputError(f"--configs names one arm, {str(args.configs[0])!r}; expected at least two to compare")


def known_tuning(args: argparse.Namespace, arms: Arms) -> Tuning | None:
    """Returns the learning rates and horizons that an earlier study has chosen; None where trials must choose.

    Raises:
        InputError: If an earlier study is to be followed that does not have them.
    """
    from study.tuning import Tuning

    earlier = args.learning_rates_of or (args.output if args.analyse_only else None)
    return None if earlier is None else Tuning.read(earlier, arms, args.datasets)


def choose_engine(args: argparse.Namespace) -> Engine:
    """Returns the engine that runs cells; if it is Ray's, connects to the cluster.

    Raises:
        InputError: If the cluster cannot be reached.
    """
    from study.engines import connect_ray, run_locally, run_nothing

    if args.analyse_only:
        return run_nothing
    return run_locally if args.engine == "local" else connect_ray(args.ray_address, args.threads)


def command_line() -> str:
    """Returns the command as it was given."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


# --- What is said on the way ---


def plan_text(grid: Grid, trials: int) -> str:
    """Returns what is compared, and how many cells that takes."""
    lines = [f"arms: {', '.join(grid.arms)}; they differ in"]
    lines += [
        f"  {key}: " + ", ".join(f"{arm} {value}" for arm, value in by_arm.items())
        for key, by_arm in grid.differences().items()
    ]
    lines += [
        f"{len(grid)} cells ({len(grid.arms)} arms x {len(grid.datasets)} datasets x {len(grid.split_seeds)} splits x "
        f"{len(grid.seeds)} seeds) and {trials} trials that choose learning rates and horizons; what is finished is "
        "not run again, and the first ones tell how long the rest takes"
    ]
    return "\n".join(lines)


class Progress:
    """Shows a line per finished cell and the time that is left, on stderr; in a terminal a bar, too.

    Args:
        total: How many cells there are, trials included.
        quiet: Shows nothing.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._is_quiet, self._start, self._left, self._finished = quiet, time.monotonic(), total, 0
        self._bar = tqdm(
            total=total, unit="cell", desc="study", dynamic_ncols=True, disable=quiet or not sys.stderr.isatty()
        )

    def extend(self, trials: list[Cell]) -> None:
        """Says which trials have come to be needed beyond the edges of the candidates, and adds them to the total."""
        self._left += len(trials)
        self._bar.total += len(trials)
        for trial in () if self._is_quiet else trials:
            self._bar.write(
                f"{trial.arm} on {trial.dataset} is best at an edge: trying {trial.config.fit_lr:g}", sys.stderr
            )

    def count(self, finished: Finished) -> None:
        """Counts a cell; if it has run just now, shows its result and how long the rest may take."""
        self._left -= 1
        self._bar.update()
        if not finished.is_new:
            self._bar.unpause()  # the time left is counted from cells that take time
            return
        self._finished += 1
        if self._is_quiet:
            return
        cell, outcome = finished.cell, finished.result.record.outcome
        if outcome.failure is not None:
            found = f"FAILED: {outcome.failure}"
        elif cell.is_trial:
            found = f"validation MSE of the median member {outcome.val_mse:.4g}"
        else:
            found = f"test nRMSE {outcome.metrics['nrmse']:.4g}"
        left = self._bar.format_interval(self._left * (time.monotonic() - self._start) / self._finished)
        self._bar.write(
            f"{cell.name}: {found} in {finished.result.record.seconds:.0f} s; {self._left} to go, {left}", sys.stderr
        )


if __name__ == "__main__":
    sys.exit(main())
