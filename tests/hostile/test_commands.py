"""Odd flags, paths and outputs of three commands: one line, exit code 2, nothing written."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest

import collect_dataset
import compare_models
import evaluate_model
import learn_model

LONG, PATH = "n" * 300, "/".join(["x" * 200] * 25)
DIGITS = "9" * 5000


@pytest.fixture(scope="module")
def made(tmp_path_factory, empty_store):
    """A folder with what the commands read, things that are no files, and other names of what must live."""
    folder = tmp_path_factory.mktemp("commands")
    draw = np.random.default_rng(0)
    states = draw.normal(size=(8, 13, 3)).cumsum(axis=1).astype(np.float32)
    for name in ("d.hdf5", "other.hdf5"):
        with h5py.File(folder / name, "w") as file:
            file["observations"], file["next_observations"] = (
                states[:, :-1].reshape(-1, 3),
                states[:, 1:].reshape(-1, 3),
            )
            file["actions"] = draw.normal(size=(96, 2)).astype(np.float32)
            file["rewards"], file["terminals"] = np.zeros(96, np.float32), np.zeros(96, bool)
            file["timeouts"] = np.tile(np.arange(12) == 11, 8)
    (folder / "a.yaml").write_text("{fit_epochs: 1, ensemble_size: 1, hidden_size: []}")
    (folder / "b.yaml").write_text("{fit_epochs: 1, ensemble_size: 1, hidden_size: [], probabilistic: true}")
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    (folder / "folder" / "precious.txt").write_text("precious")
    os.mkfifo(folder / "pipe")
    (folder / "circle").symlink_to("circle")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers: this saves a run that nobody needs
        learn = ["--dataset", "d.hdf5", "--config", "a.yaml", "--test_ratio", "0.3", "--cpu", "--quiet"]
        assert learn_model.main(learn) == 0
    (folder / "policy.npz").write_bytes(b"no policy")
    for name in ("d.hdf5", "model.pkl", "mlflow.db", "policy.npz"):
        (folder / f"hard-{name}").hardlink_to(folder / name)
        (folder / f"soft-{name}").symlink_to(name)
    return folder


def snapshot(folder):
    """What is in a folder: of files their bytes, of links where they lead."""
    found = {path: str(path.readlink()) for path in folder.rglob("*") if path.is_symlink()}
    for path in folder.rglob("*"):
        if path not in found:
            found[path] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


@pytest.fixture
def stopped(made, monkeypatch, capsys):
    """Returns a function that checks that a command ends with code 2 and one line, and writes nothing: that line."""
    monkeypatch.chdir(made)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def check(main, *arguments):
        before = snapshot(made)
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2, error
        lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 12_000
        assert snapshot(made) == before
        return lines[0]

    return check


FOLDERS = {  # that no results can be written to
    **{name: name for name in ("file", "pipe", "circle", "circle/new", "file/new", "folder", "/dev/null", "/proc/new")},
    **{name: name for name in (".", "", "d.hdf5", "model.pkl", "mlflow.db", "hard-d.hdf5", "soft-model.pkl")},
    "long": LONG,
    "long below": f"new/{LONG}",
    "a long path": PATH,
}

# --- evaluate_model.py ---

GOOD = {"--model": ["model.pkl"], "--dataset": ["d.hdf5"], "--cpu": [], "--quiet": []}


def evaluate(**changes):
    flags = GOOD | {f"--{name}": [str(each) for each in values] for name, values in changes.items()}
    return [part for flag, values in flags.items() for part in (flag, *values)]


ODD = [
    *(("horizons", [value]) for value in ("0", "-1", "1.5", "nan", 10**12, DIGITS, "x", "")),
    *(("max_starts", [value]) for value in ("0", "-1", "1.5", "x", "")),
    *(("seed", [value]) for value in ("-1", 2**32, "1e3", DIGITS, "")),
    *(("device", [value]) for value in ("gpu", "cuda:99999999999999999999", "", "cpu:0")),
    *(("split", [value]) for value in ("all", "", "holdout")),
    *(
        ("model", [value])
        for value in ("none.pkl", "", "folder", "pipe", "circle", "file", "d.hdf5", "file/x", LONG, PATH)
    ),
    *(("model", [value]) for value in ("/dev/zero", "/dev/null", "a.yaml", "mlflow.db", "policy.npz")),
    ("model", ["model.pkl", "model.pkl"]),
    ("model", ["model.pkl", "soft-model.pkl"]),
    *(
        ("dataset", [value])
        for value in ("none", "", "folder", "pipe", "circle", "file", "file/x", LONG, PATH, "model.pkl")
    ),
    *(("dataset", [value]) for value in ("bad\udcff.hdf5", "../../x/y-v0", "http://127.0.0.1:9/x.hdf5", "d.hdf5::x")),
    ("dataset", ["d.hdf5", "d.hdf5"]),
    ("ood_dataset", ["d.hdf5"]),
    ("ood_dataset", ["none"]),
    ("horizons", []),
    ("output", []),
    ("unknown", []),
]


@pytest.mark.parametrize(("flag", "values"), ODD)
def test_odd_flags_of_an_evaluation(stopped, flag, values):
    stopped(evaluate_model.main, *[part for part in evaluate(**{flag: values}) if flag != "device" or part != "--cpu"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_that_no_report_can_be_in(stopped, folder):
    stopped(evaluate_model.main, *evaluate(output=[FOLDERS[folder]]))


@pytest.fixture
def report(made):
    """Returns a function that makes a folder that says to be an earlier report, whose files are these."""
    folder = made / "earlier"

    def make(names):
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"files": names}))
        return folder

    yield make
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    "names",
    [
        *([name] for name in ("../file", "../folder/precious.txt", "/etc/hostname", "..", ".", "", "a\nb", "x/y.csv")),
        *(["../model.pkl"], ["notes.txt"], [3], [None], [["report.html"]], {"report.html": 1}, "report.html", 7, None),
    ],
)
def test_a_forged_report_names_nothing_to_remove(stopped, report, names):
    (report(names) / "notes.txt").write_text("precious")
    assert "holds other files than a report" in stopped(evaluate_model.main, *evaluate(output=["earlier"]))


@pytest.mark.parametrize(
    "kept", ["model.pkl", "d.hdf5", "mlflow.db", "hard-model.pkl", "hard-mlflow.db", "soft-d.hdf5"]
)
@pytest.mark.parametrize("name", ["report.html", "one_step.csv"])
def test_a_report_replaces_nothing_that_must_live(stopped, report, made, kept, name):
    (report(["report.html", "one_step.csv"]) / name).hardlink_to((made / kept).resolve())
    assert "which it would overwrite" in stopped(evaluate_model.main, *evaluate(output=["earlier"]))


@pytest.mark.parametrize("name", ["x" * 250, "=1+1 <b> a$b^{$ it's"])
def test_a_report_is_written_inside_reports_whatever_the_run_is_called(made, monkeypatch, name):
    import pickle

    monkeypatch.chdir(made)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    members, metadata = pickle.loads((made / "model.pkl").read_bytes())
    (made / "named.pkl").write_bytes(pickle.dumps((members, metadata | {"run_name": name, "mlflow_run_id": None})))
    before = snapshot(made)
    try:
        assert evaluate_model.main(evaluate(model=["named.pkl"], horizons=["1"], max_starts=["2"])) == 0
        new = snapshot(made).keys() - before.keys()
        assert new and all(path.is_relative_to(made / "reports") for path in new)
    finally:
        shutil.rmtree(made / "reports", ignore_errors=True)
        (made / "named.pkl").unlink()


# --- compare_models.py ---


def compare(**changes):
    flags = {
        "--configs": ["a.yaml", "b.yaml"],
        "--datasets": ["d.hdf5"],
        "--seeds": ["1"],
        "--output": ["new"],
        "--quiet": [],
    }
    flags |= {f"--{name}": [str(each) for each in values] for name, values in changes.items()}
    return [part for flag, values in flags.items() for part in (flag, *values)]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        *(("seeds", [value]) for value in ("0", "-1", "1.5", 10**9, DIGITS, "x", "")),
        *(("first_seed", [value]) for value in ("-1", 10**9, "x")),
        *(("split_seeds", [value]) for value in ("-1", 2**32, "x", DIGITS)),
        *(("threads", [value]) for value in ("0", "-1", 10**9, "x")),
        *(("learning_rates", [value]) for value in ("0", "-1", "nan", "inf", "1e400", "1e12", "x", "")),
        ("learning_rates", ["0.01", "0.0100000001"]),
        *(
            ("params", [value])
            for value in ("", "=", "fit_epochs", "fit_epochs=0", "fit_epochs=[1", "epochs=3", "seed=-1")
        ),
        *(
            ("configs", ["a.yaml", value])
            for value in ("", "none.yaml", "folder", "pipe", "circle", "d.hdf5", LONG, PATH)
        ),
        ("configs", ["a.yaml", "bad\udcff.yaml"]),
        ("datasets", ["bad\udcff.hdf5"]),
        *(("configs", value) for value in (["a.yaml"], ["a.yaml", "a.yaml"], ["a.yaml", "folder/../a.yaml"])),
        *(("datasets", [value]) for value in ("", "none", "folder", "pipe", "circle", "file", LONG, PATH, "model.pkl")),
        *(("datasets", [value]) for value in (f"d.hdf5:{DIGITS}", "d.hdf5:0", "d.hdf5:10000", "d.hdf5:-1", "d.hdf5:x")),
        *(("datasets", value) for value in (["d.hdf5", "d.hdf5"], ["d.hdf5", "./d.hdf5"])),
        *(("learning_rates_of", [value]) for value in ("", "none", "file", "pipe", "circle", "folder", LONG, PATH)),
        *(("device", [value]) for value in ("gpu", "", "cuda:0")),
        *(("engine", [value]) for value in ("", "slurm")),
        ("ray_address", ["127.0.0.1:9"]),
        ("analyse_only", []),
        ("simulator", []),
        ("unknown", []),
    ],
)
def test_odd_flags_of_a_study(stopped, flag, values):
    stopped(compare_models.main, *compare(**{flag: values}))


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_that_no_study_can_be_in(stopped, folder):
    stopped(compare_models.main, *compare(output=[FOLDERS[folder]]))


# --- collect_dataset.py ---


def collect(**changes):
    flags = {"--env": ["Hopper-v5"], "--steps": ["10"], "--output": ["new.hdf5"]}
    flags |= {f"--{name}": [str(each) for each in values] for name, values in changes.items()}
    return [part for flag, values in flags.items() for part in (flag, *values)]


FILES = {  # that must live, or cannot be
    **{name: name for name in ("folder", "pipe", "circle", "circle/new.hdf5", "file/new.hdf5", "/dev/null", "/proc/x")},
    **{name: name for name in (".", "", "new/", "mlflow.db", "hard-mlflow.db", "soft-mlflow.db")},
    "long": LONG,
    "250": "n" * 250,
    "a long path": f"{PATH}/new.hdf5",
}


@pytest.mark.parametrize("file", FILES)
def test_files_that_no_collection_can_be_in(stopped, file):
    stopped(collect_dataset.main, *collect(output=[FILES[file]], overwrite=[]))


@pytest.mark.parametrize("file", FILES)
def test_files_that_no_policy_can_be_in(stopped, file):
    sac = {"policy": ["sac"], "target_return": ["1000"], "overwrite": []}
    stopped(collect_dataset.main, *collect(save_policy=[FILES[file]], **sac))


@pytest.mark.parametrize("ending", ["hdf5", "pkl"])
@pytest.mark.parametrize("file", ["{}", "hard.{}", "soft.{}", "folder/../{}"])
@pytest.mark.parametrize("source", ["{}", "{}::observations"])
def test_a_conversion_replaces_no_source(stopped, made, file, ending, source):
    name = f"source.{ending}"
    shutil.copy(made / "d.hdf5", made / name)
    (made / f"hard.{name}").hardlink_to(made / name)
    (made / f"soft.{name}").symlink_to(name)
    output = file.format(name)
    try:
        stopped(collect_dataset.main, "--convert", source.format(name), "--output", output, "--overwrite")
    finally:
        for path in (made / name, made / f"hard.{name}", made / f"soft.{name}"):
            path.unlink()


@pytest.mark.parametrize("file", ["policy.npz", "hard-policy.npz", "soft-policy.npz"])
def test_a_collection_does_not_replace_its_policy(stopped, file):
    said = stopped(collect_dataset.main, *collect(policy=["policy.npz"], output=[file], overwrite=[]))
    assert "is the file of --policy" in said


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        *(("steps", [value]) for value in ("0", "-1", "1.5", 10**12, DIGITS, "x", "")),
        *(("seed", [value]) for value in ("-1", 2**32, "x")),
        *(("process_noise", [value]) for value in ("-1", "nan", "inf", "1e300", "x")),
        *(("target_return", [value]) for value in ("nan", "inf", "1000", "x")),
        *(("max_train_steps", [value]) for value in ("0", "-1", "5", "x")),
        *(
            ("policy", value)
            for value in (["random", "sac"], ["sac"], ["none.npz"], ["folder"], ["pipe"], ["file"], [""])
        ),
        *(("policy", [value]) for value in (LONG, PATH, "circle", "model.pkl")),
        *(("env", [value]) for value in ("", "None-v0", "CartPole-v1", "../x", "carla-lane-v0", LONG)),
        *(("describe", [value]) for value in ("", "none", "folder", "pipe", "circle", "file", LONG, PATH)),
        *(("save_snapshots", [value]) for value in ("folder", "new")),
        ("save_policy", ["new.npz"]),
        ("unknown", []),
    ],
)
def test_odd_flags_of_a_collection(stopped, flag, values):
    pytest.importorskip("gymnasium")
    stopped(collect_dataset.main, *collect(**{flag: values}))


@pytest.mark.parametrize("folder", [*FOLDERS])
def test_folders_that_no_snapshots_can_be_in(stopped, folder):
    sac = {"policy": ["sac"], "target_return": ["1000"]}
    stopped(collect_dataset.main, *collect(save_snapshots=[FOLDERS[folder]], **sac))
