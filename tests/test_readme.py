"""Every command in the README runs: long ones with tiny settings, D4RL ids with a small stand-in in D4RL's folder.

A command is a process of its own, but one that has imported what takes seconds already. The file tree is the tree.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

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


def python_commands(script):
    return [command for command in COMMANDS if command.startswith(f"python {script}")]


@pytest.fixture(scope="module")
def clone(processes, empty_store, tmp_path_factory):
    """A folder that looks like the repository, with a stand-in for D4RL's hopper-medium-v0."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "data", "examples"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(empty_store, folder)
    cache = folder / "d4rl"
    cache.mkdir()
    with (
        h5py.File(ROOT / "data" / "bundled" / "hopper-medium-demo.hdf5") as demo,
        h5py.File(cache / "hopper_medium.hdf5", "w") as file,
    ):
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file[key] = demo[key][:5000]
    return folder


@pytest.fixture
def run(clone, monkeypatch, start_script):
    """Returns a function that runs a command, with more arguments, in the clone."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(clone / "d4rl"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(clone)

    def run_it(command, *more):
        _, script, *arguments = shlex.split(command)
        process, printed = start_script(ROOT / script, *arguments, *more)
        process.join(300)
        assert process.exitcode == 0, printed.read_text()

    return run_it


@pytest.fixture
def trained(clone, run):
    """The clone with a ``model.pkl`` from the command that the README has before those which take one."""
    if not (clone / "trained.pkl").exists():
        (command,) = (command for command in python_commands("learn_model.py") if "--test_ratio" in command)
        run(command, *TINY["learn_model.py"], "--output", "trained.pkl")
    shutil.copy(clone / "trained.pkl", clone / "model.pkl")
    return clone


def test_every_kind_of_command_is_known_here():
    scripts = ("learn_model.py", "evaluate_model.py", "compare_models.py", "collect_dataset.py", "examples/")
    known = (*(f"python {script}" for script in scripts), "pip install -r", "mlflow ui", "make ")
    assert len(COMMANDS) >= 10
    assert [command for command in COMMANDS if not command.startswith(known)] == []


@pytest.mark.parametrize("command", python_commands("learn_model.py"))
def test_training_commands_run(clone, run, command):
    output = clone / ("pnn.pkl" if "pnn.pkl" in command else "model.pkl")
    output.unlink(missing_ok=True)
    shutil.rmtree(clone / "logs", ignore_errors=True)

    run(command, *TINY["learn_model.py"])

    assert len(load_ensemble(output)) == 2
    assert (clone / "logs" / "hopper_dnn.csv").exists() == ("--csv" in command)


@pytest.mark.parametrize("command", python_commands("collect_dataset.py"))
def test_collection_commands_run(clone, run, command):
    pytest.importorskip("gymnasium")
    training = "--policy sac" in command
    if training:
        pytest.importorskip("stable_baselines3")
    run(command, *(TINY["collect_dataset.py"] if training else ["--steps", "300"]))
    made = shlex.split(command)[shlex.split(command).index("--output") + 1]
    assert load_dataset(str(clone / made)).num_rows == 300


def test_the_evaluation_command_runs(trained, run):
    (command,) = python_commands("evaluate_model.py")
    run(command, "--max_starts", "20", "--horizons", "1", "5")
    (report,) = (trained / "reports").glob("*/report.html")
    assert report.stat().st_size > 10_000


def test_the_comparison_command_runs(clone, run):
    (command,) = python_commands("compare_models.py")
    run(command, "--seeds", "2", "--learning_rates", "0.004", *TINY["learn_model.py"])
    assert (clone / "reports" / "first" / "report.html").exists()


def test_the_example_loads_a_model(trained):
    """In a process that finds our modules only where the example looks for them."""
    (command,) = python_commands("examples/")
    _, script, *arguments = shlex.split(command)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(
        [sys.executable, script, *arguments], cwd=trained, env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("2 members; mean (2, 5, 11), variance (2, 5, 11)")


def test_the_downstream_code_runs_as_printed(trained, monkeypatch):
    monkeypatch.chdir(trained)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

    names = {"states": torch.zeros(5, 11), "actions": torch.zeros(5, 3), "action_sequences": torch.zeros(5, 4, 3)}
    exec(code, names)
    assert names["mean"].shape == names["variance"].shape == (2, 5, 11)
    assert names["penalty"].shape == (5,)
    assert names["imagined"].shape == (5, 5, 11)


def test_using_the_model_runs_as_printed(trained, monkeypatch, capsys):
    """From model.pkl to acting in the real environment, and to learning in the model; both in a few steps."""
    pytest.importorskip("gymnasium")
    pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(trained)
    section = README.split("### Use the model")[1].split("\n**Evaluate**")[0]
    acting, learning = re.findall(r"```py\n(.*?)```", section, flags=re.DOTALL)

    names = {}
    exec(acting.replace("max_episode_steps=250", "max_episode_steps=5"), names)
    assert re.search(r"^earned \d", capsys.readouterr().out)
    exec(learning.replace("learn(1000)", "learn(24)"), names)
    assert names["policy"].num_timesteps == 24


def test_make_targets_named_are_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert set(named) <= set(targets)
    assert {"run", "test"} <= set(named)


def test_links_lead_to_files_that_are_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def modules_of_tree():
    """Modules that the README's file tree names, as paths: packages end with a slash, their files are indented."""
    tree, package, found = README.split("## Where things are")[1].split("```")[1], "", []
    for line in tree.splitlines():
        names = re.split(r" {2,}", line.strip())[0]
        if not line.startswith(" "):
            package = names if names.endswith("/") else ""
        found += [package + module for module in re.findall(r"\w+\.py", names)]
    return found


def test_the_file_tree_names_every_module():
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "benchmarks"]
    paths = [path for folder in (ROOT, *packages) for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(packages) == 6
    assert sorted(modules_of_tree()) == sorted(str(path.relative_to(ROOT)) for path in paths)
