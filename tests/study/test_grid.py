import h5py
import numpy as np
import pytest

from config import LearnConfig
from study.cells import split_dataset, training_rows
from study.grid import TRIAL_SEED, Grid, check_split, load_arms, load_datasets
from utils import InputError

ARMS = {"a": LearnConfig(fit_lr=0.01), "b": LearnConfig(fit_lr=0.02, probabilistic=True, beta_nll=0.5, seed=7)}


@pytest.fixture
def grid():
    """Two arms, two datasets, two seeds."""
    return Grid(ARMS, ["x", "data/y.hdf5"], seeds=[7, 8], split_seeds=[5], device="cpu", threads=1)


def test_cells_come_seed_by_seed_with_the_rates_of_their_arms_and_datasets(grid):
    cells = grid.cells({("a", "x"): 0.1, ("a", "y"): 0.2, ("b", "x"): 0.3, ("b", "y"): 0.4})
    assert len(cells) == len(grid) == 8
    assert [tuple(cell.key) for cell in cells[:5]] == [
        ("a", "x", 7, 5),
        ("b", "x", 7, 5),
        ("a", "y", 7, 5),
        ("b", "y", 7, 5),
        ("a", "x", 8, 5),
    ]
    rates = {(cell.arm, cell.key.dataset, cell.config.fit_lr) for cell in cells}
    assert rates == {("a", "x", 0.1), ("a", "y", 0.2), ("b", "x", 0.3), ("b", "y", 0.4)}
    assert {(cell.device, cell.threads, cell.is_trial) for cell in cells} == {("cpu", 1, False)}
    assert {cell.config.beta_nll for cell in cells if cell.arm == "b"} == {0.5}


def test_every_seed_trains_on_every_split():
    grid = Grid(ARMS, ["x"], seeds=[7, 8], split_seeds=[5, 9], device="cpu", threads=1, simulator=True)
    cells = grid.cells({("a", "x"): 0.1, ("b", "x"): 0.1})
    assert len(cells) == len(grid) == 8
    assert {(cell.key.seed, cell.key.split) for cell in cells} == {(7, 5), (7, 9), (8, 5), (8, 9)}
    assert all(cell.simulator for cell in cells)
    assert {(trial.config.split_seed, trial.simulator) for trial in grid.trials([0.1])} == {(5, False)}


def test_trials_try_every_rate_with_a_seed_outside_the_study(grid):
    trials = grid.trials([0.1, 0.2])
    assert len(trials) == 8
    assert {trial.config.seed for trial in trials} == {TRIAL_SEED}
    assert [trial.name for trial in trials[:3]] == ["trials/a/x/rate-0.1", "trials/a/x/rate-0.2", "trials/b/x/rate-0.1"]
    assert all(trial.is_trial and trial.config.split_seed == 5 for trial in trials)


def test_arms_differ_in_settings_other_than_seeds(grid):
    assert grid.differences() == {
        "probabilistic": {"a": False, "b": True},
        "fit_lr": {"a": 0.01, "b": 0.02},
        "beta_nll": {"a": 0.0, "b": 0.5},
    }


def test_arms_are_named_by_their_files_and_checked(tmp_path):
    (tmp_path / "point.yaml").write_text("fit_lr: 0.01")
    arms = load_arms([tmp_path / "point.yaml"], ["fit_epochs=3"])
    assert arms == {"point": LearnConfig(fit_lr=0.01, fit_epochs=3)}
    with pytest.raises(InputError, match=r"beta_nll is 0\.5"):  # a setting of another kind's loss
        load_arms([tmp_path / "point.yaml"], ["beta_nll=0.5"])


def test_without_candidates_every_arm_tries_its_own_rate(grid):
    assert {(trial.arm, trial.config.fit_lr) for trial in grid.trials([])} == {("a", 0.01), ("b", 0.02)}


# --- Datasets ---


def test_what_was_found_about_a_dataset_is_told_before_it_is_trained_on(dataset, tmp_path, capsys):
    path, doubled = str(tmp_path / "doubled.hdf5"), [*dataset.trajectories, *dataset.trajectories[:3]]
    with h5py.File(path, "w") as file:
        for key in ("observations", "actions", "rewards", "next_observations"):
            file[key] = np.concatenate([getattr(trajectory, key) for trajectory in doubled])
        file["terminals"] = np.concatenate([np.arange(len(t)) == len(t) - 1 for t in doubled])
    load_datasets([path], split_seeds=[0], simulator=False, quiet=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: copies of trajectories: 3 (")


def test_a_part_of_a_dataset_shares_what_validates_and_tests(dataset):
    split = split_dataset(dataset, 0)
    few, more = (training_rows(dataset, split, rows, 0) for rows in (50, 100))
    assert (len(few), len(more)) == (50, 100)
    assert (few.states == more.states[:50]).all()
    every = training_rows(dataset, split, None, 0)
    assert {tuple(row) for row in more.states} < {tuple(row) for row in every.states}
    with pytest.raises(InputError, match="'one:5000' has 240 rows to train on; ask for fewer"):
        check_split("one:5000", dataset, 0)
