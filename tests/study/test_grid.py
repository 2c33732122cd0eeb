import math

import h5py
import numpy as np
import pandas as pd
import pytest

from config import LearnConfig
from study.grid import TRIAL_SEED, Grid, choose_rates, earlier_rates, given_rates, load_arms, load_datasets
from study.store import CellStore
from utils import InputError

ARMS = {"a": LearnConfig(fit_lr=0.01), "b": LearnConfig(fit_lr=0.02, probabilistic=True, beta_nll=0.5, seed=7)}


@pytest.fixture
def grid():
    """Two arms, two datasets, two seeds."""
    return Grid(ARMS, ["x", "data/y.hdf5"], seeds=2, split_seed=5, device="cpu", threads=1)


def test_cells_come_seed_by_seed_with_the_rates_of_their_arms(grid):
    rates = pd.DataFrame(
        [("a", 0.1, False), ("a", 0.2, True), ("b", 0.1, True), ("b", 0.2, False)],
        columns=["arm", "fit_lr", "is_chosen"],
    )
    cells = grid.cells(pd.concat([rates.assign(dataset=name) for name in ("x", "y")]))
    assert len(cells) == len(grid) == 8
    assert [tuple(cell.key) for cell in cells[:5]] == [
        ("a", "x", 0),
        ("b", "x", 0),
        ("a", "y", 0),
        ("b", "y", 0),
        ("a", "x", 1),
    ]
    assert {(cell.arm, cell.config.fit_lr) for cell in cells} == {("a", 0.2), ("b", 0.1)}
    assert {(cell.config.split_seed, cell.device, cell.threads, cell.is_trial) for cell in cells} == {
        (5, "cpu", 1, False)
    }
    assert {cell.config.beta_nll for cell in cells if cell.arm == "b"} == {0.5}


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


# --- Learning rates ---


def test_rates_are_chosen_by_the_geometric_mean_over_datasets(tmp_path, make_cell, make_result):
    errors = {("a", 0.1): (1.0, 100.0), ("a", 0.2): (4.0, 9.0), ("b", 0.1): (5.0, 5.0), ("b", 0.2): (0.1, None)}
    store = CellStore(tmp_path)
    trials = []
    for (arm, rate), both in errors.items():
        for dataset, error in zip(("x", "y"), both, strict=True):
            trials.append(make_cell(arm, dataset, is_trial=True, fit_lr=rate))
            store.write(trials[-1].name, make_result(trials[-1], failure=None if error else "diverged", val_mse=error))
    rates = choose_rates(trials, store)
    assert list(rates) == ["arm", "fit_lr", "dataset", "val_mse", "is_chosen"]
    assert set(rates[rates.is_chosen][["arm", "fit_lr"]].itertuples(index=False, name=None)) == {("a", 0.2), ("b", 0.1)}
    assert math.isinf(rates.val_mse.iloc[-1])
    with pytest.raises(FloatingPointError, match="arm b has diverged with every learning rate"):
        choose_rates(trials[-2:], store)


def test_given_rates_are_one_for_all_or_each_its_own():
    assert given_rates(ARMS, 0.5).to_dict("list") == {
        "arm": ["a", "b"],
        "fit_lr": [0.5, 0.5],
        "is_chosen": [True, True],
    }
    assert given_rates(ARMS, None).fit_lr.tolist() == [0.01, 0.02]


def test_rates_of_an_earlier_study_are_those_of_arms_of_the_same_names(tmp_path):
    rates = [("a", 0.1, False), ("a", 0.2, True), ("b", 0.3, True), ("c", 0.4, True), ("d", 0.5, False)]
    pd.DataFrame(rates, columns=["arm", "fit_lr", "is_chosen"]).to_csv(tmp_path / "learning_rates.csv", index=False)
    assert earlier_rates(tmp_path, ARMS).fit_lr.tolist() == [0.1, 0.2, 0.3]
    with pytest.raises(InputError, match=r"learning_rates\.csv' has no rate for the arm 'd'"):
        earlier_rates(tmp_path, {"a": ARMS["a"], "d": ARMS["b"]})
    with pytest.raises(InputError, match=r"has no learning_rates\.csv"):
        earlier_rates(tmp_path / "nowhere", ARMS)


def test_what_was_found_about_a_dataset_is_told_before_it_is_trained_on(dataset, tmp_path, capsys):
    path, doubled = str(tmp_path / "doubled.hdf5"), [*dataset.trajectories, *dataset.trajectories[:3]]
    with h5py.File(path, "w") as file:
        for key in ("observations", "actions", "rewards", "next_observations"):
            file[key] = np.concatenate([getattr(trajectory, key) for trajectory in doubled])
        file["terminals"] = np.concatenate([np.arange(len(t)) == len(t) - 1 for t in doubled])
    load_datasets([path], split_seed=0, quiet=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: copies of trajectories: 3 (")
