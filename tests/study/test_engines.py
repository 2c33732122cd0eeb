from pathlib import Path

import pytest

from study.engines import connect_ray, run_locally, run_missing, run_nothing
from study.store import CellStore
from utils import ROOT, InputError


def test_what_is_done_comes_first_and_is_not_run_again(tmp_path, dataset, make_cell, make_result, trial_tables):
    cells, store = [make_cell(seed=seed, is_trial=True, fit_lr=1 + seed) for seed in range(3)], CellStore(tmp_path)
    store.write(cells[1].name, make_result(cells[1], trial_tables, val_mse=0.125))
    finished = list(run_missing(cells, {"one": dataset}, store, run_locally))
    assert [(done.cell, done.is_new) for done in finished] == [(cells[1], False), (cells[0], True), (cells[2], True)]
    assert finished[0].result.record.outcome.val_mse == 0.125
    assert finished[1].result.record == store.read(cells[0].name).record
    assert finished[1].result.record.request == cells[0].request(dataset.sha256)


def test_nothing_runs_where_a_study_is_only_analysed(tmp_path, dataset, make_cell):
    assert list(run_missing([make_cell()], {"one": dataset}, CellStore(tmp_path), run_nothing)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_another_process_is_running_comes_last(tmp_path, dataset, make_cell, make_result, trial_tables):
    held, free = make_cell(is_trial=True, fit_lr=1.0), make_cell(is_trial=True, fit_lr=0.5)
    store = CellStore(tmp_path)
    lock = CellStore(tmp_path).lock(held.name)  # as if it were another process's
    lock.acquire()
    running = run_locally([held, free], {"one": dataset}, store)
    assert next(running) == free
    CellStore(tmp_path).write(held.name, make_result(held, trial_tables, val_mse=0.125))
    lock.release()
    assert list(running) == [held]
    assert store.read(held.name).record.outcome.val_mse == 0.125  # it was waited for, not run again


# --- Ray ---


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=r"no Ray cluster at RAY_ADDRESS and this machine .* ray start --head"):
        connect_ray(None, threads=1)


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of one node with one core."""
    ray = pytest.importorskip("ray")
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(True, head_node_args={"num_cpus": 1})
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def test_ray_runs_cells_and_ships_the_code_they_need(cluster, tmp_path, dataset, make_cell):
    import ray

    def shipped():
        return {str(path) for path in Path().rglob("*") if path.is_file() and path.parent.name != "__pycache__"}

    engine, store, cell = connect_ray(cluster, threads=1), CellStore(tmp_path), make_cell(is_trial=True)
    try:
        assert list(engine([cell], {"one": dataset}, store)) == [cell]
        assert store.read(cell.name).failure is None
        files = ray.get(ray.remote(shipped).remote())
    finally:
        ray.shutdown()
    modules = {str(path.relative_to(ROOT)) for folder in ("data", "study") for path in (ROOT / folder).glob("*.py")}
    assert files >= modules | {"config.py", "data/d4rl_registry.csv", "training/loop.py"}
    unwanted = (
        ".git/",
        ".venv/",
        "data/bundled/",
        "data/policies/",
        "logs/",
        "mlruns/",
        "reports/",
        "results/",
        "tests/",
    )
    assert not [name for name in files if name.startswith(unwanted) or name.endswith((".pkl", ".hdf5"))]


def test_a_cell_that_no_node_can_run_is_refused(cluster):
    import ray

    try:
        with pytest.raises(InputError, match="--threads is 2, and no node of the Ray cluster has as many"):
            connect_ray(cluster, threads=2)
    finally:
        ray.shutdown()
