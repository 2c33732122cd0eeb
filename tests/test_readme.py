"""Every command in the README runs: long ones with tiny settings, D4RL ids with a small stand-in in D4RL's folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

import learn_model
from data.sources import load_dataset
from dynamics_model import load_ensemble

ROOT = Path(learn_model.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
TINY = {
    "learn_model.py": ["--params", "fit_epochs=1", "hidden_size=8", "ensemble_size=2", "batch_size=4096"],
    "collect_dataset.py": ["--steps", "300", "--max_train_steps", "1200", "--target_return", "-1000"],
}


def python_commands(script: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(f"python {script}")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def clone(tmp_path, monkeypatch, store):
    """A current directory that looks like the repository, with a stand-in for D4RL's hopper-medium-v0."""
    for name in ("configs", "data", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    cache = tmp_path / "d4rl"
    cache.mkdir()
    with (
        h5py.File(ROOT / "data" / "bundled" / "hopper-medium-demo.hdf5") as demo,
        h5py.File(cache / "hopper_medium.hdf5", "w") as file,
    ):
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file[key] = demo[key][:5000]
    monkeypatch.setenv("D4RL_DATASET_DIR", str(cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, *more: str) -> None:
    _, script, *arguments = shlex.split(command)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments, *more], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_every_kind_of_command_is_known_here():
    scripts = ("learn_model.py", "evaluate_model.py", "compare_models.py", "collect_dataset.py", "examples/")
    known = (*(f"python {script}" for script in scripts), "pip install -r", "mlflow ui", "make ")
    assert len(COMMANDS) >= 10
    assert [command for command in COMMANDS if not command.startswith(known)] == []


@pytest.mark.parametrize("command", python_commands("learn_model.py"))
def test_training_commands_run(clone, command):
    run(command, *TINY["learn_model.py"])
    output = "pnn.pkl" if "pnn.pkl" in command else "model.pkl"
    assert len(load_ensemble(clone / output)) == 2
    assert (clone / "logs" / "hopper_dnn.csv").exists() == ("--csv" in command)


@pytest.mark.parametrize("command", python_commands("collect_dataset.py"))
def test_collection_commands_run(clone, command):
    pytest.importorskip("gymnasium")
    training = "--policy sac" in command
    if training:
        pytest.importorskip("stable_baselines3")
    run(command, *(TINY["collect_dataset.py"] if training else ["--steps", "300"]))
    (made,) = clone.glob("*.hdf5")
    assert load_dataset(str(made)).num_rows == 300


def test_the_evaluation_command_runs(clone):
    trained = next(command for command in python_commands("learn_model.py") if "--test_ratio" in command)
    run(trained, *TINY["learn_model.py"])
    (command,) = python_commands("evaluate_model.py")
    run(command, "--max_starts", "20", "--horizons", "1", "5")
    (report,) = (clone / "reports").glob("*/report.html")
    assert report.stat().st_size > 10_000


def test_the_comparison_command_runs(clone):
    (command,) = python_commands("compare_models.py")
    run(command, "--seeds", "2", "--learning_rates", "0.004", *TINY["learn_model.py"])
    assert (clone / "reports" / "first" / "report.html").exists()


def test_the_example_loads_a_model(clone):
    run(python_commands("learn_model.py")[0], *TINY["learn_model.py"])
    (command,) = python_commands("examples/")
    run(command)


def test_the_downstream_code_runs_as_printed(clone):
    run(python_commands("learn_model.py")[1], *TINY["learn_model.py"])
    shutil.copy("pnn.pkl", "model.pkl")
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    import torch

    names = {"states": torch.zeros(5, 11), "actions": torch.zeros(5, 3), "action_sequences": torch.zeros(5, 4, 3)}
    exec(code, names)
    assert names["mean"].shape == names["variance"].shape == (2, 5, 11)
    assert names["penalty"].shape == (5,)
    assert names["imagined"].shape == (5, 5, 11)


def test_make_targets_named_are_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert set(named) <= set(targets)
    assert {"run", "test"} <= set(named)


def test_the_file_tree_names_every_module():
    tree = README.split("## Where things are")[1].split("```")[1]
    modules = {path.name for path in ROOT.glob("*.py")}
    assert {name for name in modules if name not in tree} == set()
    assert {name for name in re.findall(r"^ *(\w+\.py)", tree, flags=re.MULTILINE) if name not in modules} == set()
