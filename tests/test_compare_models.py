import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

import compare_models
from compare_models import main
from study import engines
from study.store import pack

ROOT = Path(compare_models.__file__).parent
LENGTH, EPISODES = 30, 12
SMALL = ["ensemble_size=2", "hidden_size=8,8", "fit_epochs=2", "batch_size=64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, empty_store):
    """A folder with datasets ``one`` and ``single``, arms ``point``, ``gauss`` and ``wild``, and a tracking store."""
    folder = tmp_path_factory.mktemp("studies")
    for name, episodes in (("one", EPISODES), ("single", 1)):
        random = np.random.default_rng(episodes)
        states = [random.normal(size=(episodes, 3))]
        actions = random.uniform(-1, 1, (LENGTH, episodes, 2))
        for action in actions:
            noise = 0.05 * random.normal(size=(episodes, 3))
            states.append(0.9 * states[-1] + action.sum(axis=1, keepdims=True) * [0.1, 0.2, 0.3] + noise)
        states = np.stack(states, axis=1)  # (episodes, LENGTH + 1, 3)
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            file["observations"] = states[:, :-1].reshape(-1, 3).astype(np.float32)
            file["next_observations"] = states[:, 1:].reshape(-1, 3).astype(np.float32)
            file["actions"] = actions.swapaxes(0, 1).reshape(-1, 2).astype(np.float32)
            file["rewards"] = np.zeros(episodes * LENGTH, np.float32)
            file["terminals"] = np.zeros(episodes * LENGTH, bool)
            file["timeouts"] = np.tile(np.arange(LENGTH) == LENGTH - 1, episodes)
    (folder / "point.yaml").write_text("fit_lr: 0.01")
    (folder / "gauss.yaml").write_text("{fit_lr: 0.02, probabilistic: true}")
    (folder / "wild.yaml").write_text("{fit_lr: 1.0e+9, hidden_size: [8, 8]}")
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    """Commands run in the folder and log to its store."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


def arguments(output, *more, arms=("point", "gauss"), seeds=2, rates=("0.01",), quiet=True):
    configs = ["--configs", *(f"{arm}.yaml" for arm in arms), "--datasets", "one.hdf5", "--seeds", str(seeds)]
    options = ["--params", *SMALL, "--learning_rates", *rates, "--output", str(output), *more]
    return [*configs, *options, *(["--quiet"] if quiet else [])]


@pytest.fixture(scope="module")
def printed():
    """What the command that made the whole study has printed: stdout and stderr, once it has run."""
    return io.StringIO(), io.StringIO()


@pytest.fixture(scope="module")
def whole(folder, printed):
    """A study that ran in one go."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed[0]):
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        with contextlib.redirect_stderr(printed[1]):
            assert main(arguments("whole", quiet=False)) == 0
    return folder / "whole"


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the whole study, to change."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def cell_tables(study):
    """The bytes of all tables of all cells; ``cell.json`` tells what they took, too."""
    return {str(path.relative_to(study)): path.read_bytes() for path in sorted(study.glob("*/*/*/*/*.csv"))}


def tables(study):
    """The bytes of the study's own tables."""
    return {path.name: path.read_bytes() for path in study.glob("*.csv")}


@pytest.fixture
def no_training(monkeypatch):
    """Cells must not run."""

    def fail(*_):
        raise AssertionError("a cell was run again")

    monkeypatch.setattr(engines, "run_cell", fail)


# --- From the command to the report ---


def test_study_leaves_cells_tables_figures_and_reports(whole):
    assert len(list(whole.glob("cells/*/one/split-0-seed-*/cell.json"))) == 4
    assert len(list(whole.glob("trials/*/one/rate-*/cell.json"))) == 2
    names = {path.name for path in whole.iterdir()}
    expected = "cells values paired stability uncertainty horizon reliability sensitivity"
    expected += " learning_rates horizons claims extent"
    files = {"report.html", "report.md", "study.json", "timings.json"}
    files |= {f"{name}.png" for name in ("effects", "horizon", "calibration", "stability", "sensitivity")}
    assert names == {f"{name}.csv" for name in expected.split()} | files | {"cells", "trials"}
    assert "| probabilistic | False | True |" in (whole / "report.md").read_text()


def test_a_study_says_what_it_compares_and_how_far_it_is(whole, printed):
    out, err = (text.getvalue() for text in printed)
    assert err.startswith("arms: point, gauss; they differ in\n  probabilistic: point False, gauss True\n  fit_lr: ")
    assert (
        "4 cells (2 arms x 1 datasets x 1 splits x 2 seeds) and 2 trials that choose learning rates and horizons" in err
    )
    assert (err.count(": validation MSE "), err.count(": test nRMSE ")) == (2, 4)
    lines = err.splitlines()
    assert lines[-6].startswith("trials/point/one/rate-0.01: validation MSE ") and "; 5 to go, 00:" in lines[-6]
    assert lines[-1].startswith("cells/gauss/one/split-0-seed-1: test nRMSE ") and lines[-1].endswith(
        "; 0 to go, 00:00"
    )
    assert (
        out.startswith("# point, gauss on one\n\n")
        and "4 of 4 runs (2 arms, 1 datasets, 2 seeds), 0 of which failed;" in out
    )
    assert "| nRMSE | " in out and "## " not in out
    assert out.endswith("report whole/report.html\n")


def test_errors_are_those_of_the_evaluation(whole):
    cells = pd.read_csv(whole / "cells.csv")
    assert list(cells.arm) == ["point", "gauss", "point", "gauss"]
    horizon = int(pd.read_csv(whole / "horizons.csv").horizon[0])
    for row in cells.itertuples():
        cell = whole / f"cells/{row.arm}/one/split-0-seed-{row.seed}"
        found = json.loads((cell / "cell.json").read_text())["outcome"]["metrics"]
        assert row.nrmse == pytest.approx(found["nrmse"], rel=1e-5)
        assert row.median_error == pytest.approx(found["median_error"], rel=0.02)
        assert row.rollout_tsinf == pytest.approx(found[f"error_tsinf_{horizon}"], rel=1e-3)  # condensed
        likelihood = pd.read_csv(cell / "likelihood.csv").set_index("prediction")
        assert row.nll == pytest.approx(likelihood.nll["mixture"], rel=1e-5)


def test_every_run_has_the_same_split(whole):
    starts = [pd.read_csv(path / "starts.csv") for path in whole.glob("cells/*/one/split-0-seed-*")]
    starts = [table[["trajectory", "start", "horizon"]] for table in starts]
    assert len(starts) == 4 and all(table.equals(starts[0]) for table in starts)


def test_each_arm_has_the_rate_of_its_best_trial_and_trials_go_beyond_the_edge(tmp_path):
    study = tmp_path / "study"
    assert main(arguments(study, seeds=1, rates=("1e-5", "1e-4"))) == 0
    rates = pd.read_csv(study / "learning_rates.csv")
    assert rates.groupby("arm").fit_lr.apply(list).tolist() == [[1e-5, 1e-4, 1e-3, 1e-2]] * 2  # far too low at first
    best = rates.loc[rates.groupby("arm").val_mse.idxmin()]
    assert best.is_chosen.all() and rates.is_chosen.sum() == 2
    cells = pd.read_csv(study / "cells.csv").set_index("arm")
    assert (cells.fit_lr[best.arm].to_numpy() == best.fit_lr.to_numpy()).all()
    assert "Rates at the edge" in (study / "report.md").read_text()


def test_parts_of_a_dataset_and_several_splits_are_one_study(tmp_path):
    study = tmp_path / "study"
    given = arguments(study, "--split_seeds", "3", "8", "--datasets", "one.hdf5:60", "one.hdf5", seeds=1)
    assert main(given) == 0
    cells = pd.read_csv(study / "cells.csv")
    assert set(zip(cells.dataset, cells.split, strict=True)) == {(d, s) for d in ("one-60", "one") for s in (3, 8)}
    assert cells.rows.dropna().eq(60).all() and cells.rows.notna().sum() == 4
    assert pd.read_csv(study / "values.csv").query("metric == 'nrmse'").seeds.eq(1).all()


def test_mlflow_has_one_run_per_cell_under_the_studys(whole, folder):
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    parent = json.loads((whole / "study.json").read_text())["mlflow_run_id"]
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    folders = [str(path.parent.relative_to(whole)) for path in whole.glob("*/*/*/*/cell.json")]
    assert sorted(run.info.run_name for run in children) == sorted(folders)
    assert {"report.html", "paired.csv", "effects.png"} <= {file.path for file in client.list_artifacts(parent)}


# --- Going on ---


def test_a_killed_process_leaves_its_cell_to_the_other(whole, folder, start_script):
    killed, other = (start_script(ROOT / "compare_models.py", *arguments("killed"))[0] for _ in range(2))
    while len(list(folder.glob("killed/*/*/one/*/cell.json"))) < 3:
        assert killed.is_alive() and other.is_alive()
        time.sleep(0.01)
    killed.kill()
    other.join(300)
    assert other.exitcode == 0
    assert cell_tables(folder / "killed") == cell_tables(whole)
    assert tables(folder / "killed").keys() == tables(whole).keys()
    for name in ("paired.csv", "values.csv", "stability.csv", "learning_rates.csv", "horizons.csv", "cells.csv"):
        assert (folder / "killed" / name).read_bytes() == (whole / name).read_bytes()


def test_a_study_that_was_cut_off_goes_on_to_the_same_result(whole, copied):
    for name in ("trials/gauss/one/rate-0.01", "cells/point/one/split-0-seed-0", "cells/gauss"):
        shutil.rmtree(copied / name)
    (copied / "paired.csv").unlink()
    kept = {path: path.stat().st_mtime_ns for path in copied.glob("*/*/*/*/*")}
    assert main(arguments(copied)) == 0
    assert cell_tables(copied) == cell_tables(whole)
    assert (copied / "paired.csv").read_bytes() == (whole / "paired.csv").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # what is done was not run again


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on\n"),
        (OSError("no space left"), 1, "error: no space left; what is finished is kept, the same command goes on\n"),
    ],
)
def test_what_ends_a_study_is_one_line(error, code, said, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(engines, "run_cell", fail)
    assert main(arguments(tmp_path / "ended")) == code
    assert capsys.readouterr().err == said


def test_rates_of_an_earlier_study(whole, tmp_path):
    followed = tmp_path / "followed"
    assert main(arguments(followed, "--learning_rates_of", "whole", seeds=1)) == 0
    assert not (followed / "trials").exists()
    training = "cells/gauss/one/split-0-seed-0/training.csv"
    assert (whole / training).read_bytes() == (followed / training).read_bytes()


# --- Packed ---


@pytest.fixture
def packed(copied):
    """The whole study, packed."""
    pack(copied)
    assert not (copied / "cells").exists() and not (copied / "trials").exists()
    return copied


def test_a_packed_study_goes_on(whole, packed):
    assert main(arguments(packed, seeds=3)) == 0
    assert sorted(str(path.parent.relative_to(packed)) for path in packed.glob("*/*/*/*/cell.json")) == [
        "cells/gauss/one/split-0-seed-2",  # only these have been run
        "cells/point/one/split-0-seed-2",
    ]
    cells, before = (pd.read_csv(study / "cells.csv") for study in (packed, whole))
    assert cells.seed.tolist() == [0, 0, 1, 1, 2, 2]
    pd.testing.assert_frame_equal(cells[:4], before)
    assert (packed / "learning_rates.csv").read_bytes() == (whole / "learning_rates.csv").read_bytes()


def test_analysis_of_a_study_cut_short(copied, no_training):
    for path in copied.glob("cells/*/one/split-0-seed-1"):
        shutil.rmtree(path)
    shutil.move(copied / "cells" / "gauss", copied / "aside")
    pack(copied)
    shutil.move(copied / "aside", copied / "cells" / "gauss")  # one cell in the file, one in a folder
    assert main(arguments(copied, "--analyse_only", seeds=5)) == 0
    paired = pd.read_csv(copied / "paired.csv")
    assert {"nrmse", "median_error", "nll", "rollout_tsinf", "spearman", "member_spread"} <= set(paired.metric)
    assert paired[["low", "high"]].isna().all(axis=None)
    assert "2 of 10 runs" in (copied / "report.md").read_text()


def test_another_studys_cells_are_refused(whole, packed, capsys):
    for study, before in (("whole", cell_tables(whole)), (packed, {})):
        with pytest.raises(SystemExit) as stopped:
            main(arguments(study, "--params", "fit_epochs=4"))
        assert stopped.value.code == 2
        assert "was made with fit_epochs 2, asked for is 4" in capsys.readouterr().err
        assert cell_tables(Path(study)) == before


def test_a_study_of_another_version_is_refused(copied, capsys):
    record = json.loads((copied / "study.json").read_text())
    (copied / "study.json").write_text(json.dumps(record | {"format": 1}))
    with pytest.raises(SystemExit) as stopped:
        main(arguments(copied))
    assert stopped.value.code == 2
    assert "was made by another version (format 1, expected 2)" in capsys.readouterr().err


# --- Trainings that fail ---


def test_a_training_that_fails_is_recorded(tmp_path):
    failed, decided = tmp_path / "failed", tmp_path / "decided"
    decided.mkdir()
    rates = {"arm": ["point", "wild"], "dataset": "one", "fit_lr": [0.01, 1e9], "is_chosen": True}
    pd.DataFrame(rates | {"val_mse": 1.0, "stray": 0}).to_csv(decided / "learning_rates.csv", index=False)
    pd.DataFrame({"dataset": ["one"], "horizon": [5]}).to_csv(decided / "horizons.csv", index=False)
    assert main(arguments(failed, "--learning_rates_of", str(decided), arms=("point", "wild"))) == 0
    cells = pd.read_csv(failed / "cells.csv").set_index(["arm", "seed"])
    assert "diverged" in cells.failure["wild", 0]
    assert np.isnan(cells.nrmse["wild", 1])
    assert cells.fit_lr["point", 0] == 0.01
    stability = pd.read_csv(failed / "stability.csv").set_index("arm")
    assert stability.failed.to_dict() == {"point": 0, "wild": 2}
    assert "2 of which failed" in (failed / "report.md").read_text()


def test_arms_that_fail_with_every_rate_end_the_study(tmp_path, capsys):
    assert main(arguments(tmp_path / "hopeless", rates=("1e9",))) == 1
    assert "has diverged on one with every learning rate" in capsys.readouterr().err


# --- Ray ---


def test_ray_gives_the_same_cells(whole, tmp_path):
    ray = pytest.importorskip("ray")
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(True, head_node_args={"num_cpus": 1})
    try:
        assert main(arguments(tmp_path / "ray", "--engine", "ray", "--ray_address", cluster.address)) == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert cell_tables(tmp_path / "ray") == cell_tables(whole)


# --- What a user can get wrong ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seeds", "0"], "--seeds is 0; expected a whole number from 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--split_seeds", "0", "-1"], "--split_seeds is -1"),
        (["--split_seeds", "3", "3"], "--split_seeds names 3 twice"),
        (["--datasets", "one.hdf5:5000"], "has 240 rows to train on; ask for fewer"),
        (["--simulator"], "probes need to know the environment"),
        (["--configs", "point.yaml"], "expected at least two to compare"),
        (["--configs", "point.yaml", "point.yaml"], "--configs names 'point' twice"),
        (["--configs", "point.yaml", "gaus.yaml"], "did you mean 'gauss.yaml'?"),
        (["--datasets", "one.hdf5", "./one.hdf5"], "--datasets names 'one' twice"),
        (["--datasets", "hopper-medium-dem"], "did you mean 'hopper-medium-demo'?"),
        (["--datasets", "single.hdf5"], "leaves none to train on"),
        (["--learning_rates", "0.01", "0"], "expected positive numbers"),
        (["--learning_rates", "0.01", "0.01"], "names 0.01 twice"),
        (["--learning_rates_of", "nowhere"], "has no learning_rates.csv"),
        (["--ray_address", "127.0.0.1:6379"], "without --engine ray"),
        (["--device", "tpu"], "--device"),
        (["--params", "beta_nll=2"], "beta_nll is 2.0"),
        (["--params", "beta_nll=0.5"], "beta_nll is 0.5; expected 0 for a deterministic ensemble"),
        (["--output", "one.hdf5"], "is a file"),
        (["--output", "."], "holds other files than a study"),
        (["--analyse_only"], "has no learning_rates.csv"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(change, message, capsys):
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main([*arguments("new"), *change])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert sorted(Path().rglob("*")) == before


def test_rates_for_unknown_arms_are_refused(whole, capsys):
    with pytest.raises(SystemExit):
        main(arguments("new", "--learning_rates_of", "whole", arms=("point", "wild")))
    assert "has no rate for the arm 'wild' on 'one'" in capsys.readouterr().err


def test_help_needs_no_heavy_imports():
    code = "import sys, compare_models\ntry: compare_models.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'pandas', 'numpy', 'mlflow', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
