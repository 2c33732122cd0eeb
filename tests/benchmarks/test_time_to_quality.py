import math
import subprocess
import sys
import time

import pandas as pd
import pytest

from benchmarks import time_to_quality
from benchmarks.harness import ROOT, ResultsFile
from benchmarks.time_to_quality import Run, train
from config import LearnConfig
from data.sources import load_dataset


def test_a_quick_trial_measures_draws_and_leaves_what_is_published_alone(check_quick_trial):
    folder = check_quick_trial("time_to_quality")

    times = pd.read_csv(folder / "results" / "epoch_times.csv")
    assert times["recipe"].nunique() == 6  # ours, in full precision, and published, of both kinds
    table = pd.read_csv(folder / "results" / "time_to_quality.csv")
    assert table["is_last"].sum() == 6  # two seeds of ours and one published, of both kinds
    assert not [*folder.glob("time_to_quality/*")]  # finished runs leave no checkpoint


def test_published_tables_are_those_of_the_results(check_published):
    check_published(time_to_quality.publish, time_to_quality=False, epoch_times=True)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("hopper-random-demo", quiet=True)


@pytest.fixture(params=["ours/hopper_pnn", "published/hopper_pnn", "published/hopper_dnn"])
def run(request, dataset):
    size = 1 if request.param.startswith("published") else 2
    is_probabilistic = request.param.endswith("pnn")
    settings = {"probabilistic": is_probabilistic, "ensemble_size": size, "fit_epochs": 3}
    return Run(request.param, LearnConfig(**settings, hidden_size=(8,), batch_size=4096), dataset)


def numbers(results):
    return results.rows().drop(columns=["commit", "machine"])


def test_a_training_that_is_stopped_again_and_again_gives_the_same_rows(run, tmp_path):
    whole, parts = (ResultsFile("time_to_quality", tmp_path / name, is_timed=False) for name in ("whole", "parts"))
    for results in (whole, parts):
        results.csv.parent.mkdir(parents=True)
    assert train(whole, run, deadline=math.inf)

    ended = [train(parts, Run(run.recipe, run.config, run.dataset), deadline=time.monotonic()) for _ in range(4)]

    assert ended == [False, False, True, True]
    pd.testing.assert_frame_equal(numbers(parts), numbers(whole))
    table = numbers(whole)
    assert table["epoch"].tolist() == [1, 2, 3] and table["is_last"].tolist() == [False, False, True]
    assert (table["kept_mse"] <= table["val_mse"].cummin() * 1.00001).all()
    assert table["nll"].isna().all() != run.config.probabilistic


def test_rows_without_a_checkpoint_to_go_on_from_are_measured_anew(run, tmp_path):
    results = ResultsFile("time_to_quality", tmp_path, is_timed=False)
    assert not train(results, run, deadline=time.monotonic())
    (checkpoint,) = (tmp_path / "time_to_quality").glob("*.checkpoint")
    checkpoint.unlink()
    assert train(results, Run(run.recipe, run.config, run.dataset), deadline=math.inf)
    assert numbers(results)["epoch"].tolist() == [1, 2, 3]


def test_an_unknown_environment_is_one_line_and_exit_code_two():
    command = [sys.executable, "-m", "benchmarks.time_to_quality", "--data", "walker=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data got 'walker=x'; expected hopper=DATASET or halfcheetah=DATASET;")
    assert done.stderr.count("\n") == 1


def test_an_unknown_recipe_is_one_line_and_exit_code_two(capsys):
    with pytest.raises(SystemExit) as exit_:
        time_to_quality.main(["--recipes", "ours/ant_dnn"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
