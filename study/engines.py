"""Engines, which run the cells of a study: here, one after another, or side by side on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from filelock import Timeout

from study.cells import Cell, Result, run_cell
from study.grid import Datasets
from study.store import CellStore
from utils import ROOT, InputError

Engine = Callable[[Sequence[Cell], Datasets, CellStore], Iterator[Cell]]
"""Runs cells, keeps their results in the store, and yields each cell whose result is there."""

# What Ray does not send to its workers: they get datasets as objects, and need no tests, results or logs.
_NOT_SHIPPED = ["/.git/", "/.venv/", "/data/bundled/", "/data/policies/", "/logs/", "/mlruns/", "/mlflow.db*"]
_NOT_SHIPPED += ["/reports/", "/results/", "/tests/", "*.hdf5", "*.pkl"]
_RETRIES = 5  # how often a cell runs again whose worker was lost


class Finished(NamedTuple):
    """A cell with its result.

    Attributes:
        cell: The cell.
        result: Its result.
        is_new: Whether it has run just now; False if it was done before.
    """

    cell: Cell
    result: Result
    is_new: bool


def run_missing(cells: Sequence[Cell], datasets: Datasets, store: CellStore, engine: Engine) -> Iterator[Finished]:
    """Runs the cells that are not done yet, and yields all cells with their results: first those that were done.

    Raises:
        InputError: If what is kept of a cell is damaged, or the result of another request.
    """
    is_done = {cell: store.has(cell) for cell in cells}
    for cell in (cell for cell in cells if is_done[cell]):
        yield Finished(cell, store.read(cell.name), is_new=False)
    for cell in engine([cell for cell in cells if not is_done[cell]], datasets, store):
        store.check_request(cell, datasets[cell.dataset].sha256)  # another process may have been asked for another
        yield Finished(cell, store.read(cell.name), is_new=True)


def run_nothing(cells: Sequence[Cell], datasets: Datasets, store: CellStore) -> Iterator[Cell]:
    """Runs no cell: what is missing stays missing."""
    return iter(())


def run_locally(cells: Sequence[Cell], datasets: Datasets, store: CellStore) -> Iterator[Cell]:
    """Runs cells one after another; those that another process is running come last, and are waited for."""
    held = []
    for cell in cells:
        try:
            with store.lock(cell.name).acquire(timeout=0):
                _run_here(cell, datasets, store)
        except Timeout:
            held.append(cell)
            continue
        yield cell
    for cell in held:
        with store.hold(cell.name):
            _run_here(cell, datasets, store)
        yield cell


def _run_here(cell: Cell, datasets: Datasets, store: CellStore) -> None:
    """Runs a cell, whose lock is held, unless another process has done so."""
    if not store.has(cell):
        store.write(cell.name, run_cell(cell, datasets[cell.dataset]))


def connect_ray(address: str | None, threads: int) -> Engine:
    """Connects to a Ray cluster and returns the engine that runs cells on it.

    Args:
        address: The cluster's address, as ``HOST:PORT``; None takes that in ``RAY_ADDRESS``, or this machine's.
        threads: Threads of a cell.

    Raises:
        InputError: If Ray or the cluster is missing, or has no node with as many threads.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray; pip install -r requirements-ray.txt") from None
    code = {"working_dir": str(ROOT), "excludes": _NOT_SHIPPED}
    try:
        ray.init(address or "auto", runtime_env=code, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = address or "RAY_ADDRESS and this machine"
        raise InputError(f"no Ray cluster at {where} ({error}); start one: ray start --head") from None
    if threads > max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]):
        raise InputError(f"--threads is {threads}, and no node of the Ray cluster has as many; give fewer")
    return _run_on_ray


def _run_on_ray(cells: Sequence[Cell], datasets: Datasets, store: CellStore) -> Iterator[Cell]:
    """Runs cells side by side; a cell whose worker is lost runs again elsewhere, a few times at most."""
    import ray

    remote = ray.remote(run_cell)
    shared = {name: ray.put(dataset) for name, dataset in datasets.items()}
    pending = {
        remote.options(max_retries=_RETRIES, num_cpus=cell.threads, num_gpus=int(cell.device == "cuda")).remote(
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
        with store.hold(cell.name):
            if not store.has(cell):
                store.write(cell.name, result)
        yield cell
