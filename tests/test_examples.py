"""Examples: each runs by the command in its docstring, here with a small model, little data and tiny settings."""

import re
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import learn_model

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

ROOT = Path(learn_model.__file__).parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TINY = {
    "load_model": [],
    "plan": ["--episodes", "2", "--steps", "3", "--population", "4", "--horizon", "2"],
    "train_policy": ["--steps", "40", "--horizon", "5", "--evaluations", "2", "--episodes", "1", "--width", "8"],
    "evaluate_policies": ["--episodes", "3", "--steps", "80", "--noise", "0", "4", "--perturbation", "0", "0.5"],
}


@pytest.fixture(scope="module")
def clone(empty_store, tmp_path_factory):
    """A folder that looks like the repository, with a ``model.pkl`` and the data that it was trained on."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "data", "examples"):
        (folder / name).symlink_to(ROOT / name)
    columns = ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations"]
    with h5py.File(ROOT / "data" / "bundled" / "hopper-medium-demo.hdf5") as demo:
        for file, names in (("few.hdf5", columns), ("few-without-next.hdf5", columns[:-1])):
            with h5py.File(folder / file, "w") as few:
                few.attrs["env_name"] = demo.attrs["env_name"]
                for name in names:
                    few[name] = demo[name][:3000]
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        tiny = ["--params", "fit_epochs=2", "hidden_size=16", "ensemble_size=2", "num_elites=2", "batch_size=512"]
        command = ["--dataset", "few.hdf5", "--config", "configs/hopper_pnn.yaml", "--holdout_ratio", "0.2"]
        assert learn_model.main([*command, "--quiet", *tiny]) == 0
    return folder


@pytest.fixture
def run(clone, monkeypatch, start_script):
    """Returns a function that runs an example by its own command, with tiny settings and more arguments.

    It returns what the example printed.
    """
    monkeypatch.chdir(clone)

    def run_it(name, *more):
        text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        (command,) = re.findall(r"^python (.*)", text, flags=re.MULTILINE)
        script, *arguments = shlex.split(command)
        little = ["--dataset", "few.hdf5"] if "--dataset" in arguments else []
        process, printed = start_script(script, *arguments, *little, *TINY[name], *more)
        process.join(120)
        assert process.exitcode == 0, printed.read_text()
        return printed.read_text()

    return run_it


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_begins_with_its_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100
    assert lines[2].startswith(f"python examples/{path.name} model.pkl")
    assert path.stem in TINY, "it is run by a test"


def test_a_model_is_loaded(run):
    assert run("load_model").startswith("2 members; mean (2, 5, 11), variance (2, 5, 11)")


def test_planners_are_compared_in_the_real_environment(run):
    found = dict(re.findall(r"^(\w.*?) +(-?\d+)   episodes", run("plan"), flags=re.MULTILINE))
    assert list(found) == [
        "random",
        "behaviour, cloned",
        "free planning",
        "guided planning",
        "guided, in the simulator",
    ]
    # Hopper is paid 1 for each of 3 steps, and its speed: whatever acts, it has just begun to fall.
    assert all(1 <= int(earned) <= 6 for earned in found.values()), found


@pytest.mark.parametrize("pessimism", ["morel", "mopo", "none"])
def test_a_policy_is_trained_in_the_model_and_tried_in_the_real_environment(run, pessimism):
    pytest.importorskip("stable_baselines3")
    printed = run("train_policy", "--pessimism", pessimism)
    assert {"morel": "MOReL(", "mopo": "MOPO(", "none": "pessimism None"}[pessimism] in printed
    assert "the data's policy: 4" in printed  # hundred steps
    tried = re.findall(r"^(\d+) steps in the model; real: (\d+) steps, return (-?\d+)", printed, flags=re.MULTILINE)
    assert [steps for steps, *_ in tried] == ["20", "40"]
    assert all(1 <= int(length) <= 1000 for _, length, _ in tried)


def test_a_policy_learns_from_data_that_leave_out_next_observations(run):
    pytest.importorskip("stable_baselines3")
    assert "40 steps in the model; real:" in run("train_policy", "--dataset", "few-without-next.hdf5")


def test_policies_are_ranked_by_the_model_and_by_the_simulator(run):
    printed = run("evaluate_policies")
    table = np.array(re.findall(r"^ +" + r" +".join([r"(-?[\d.]+)"] * 6) + "$", printed, flags=re.MULTILINE), float)
    assert table[:, :2].tolist() == [[0, 0], [0, 0.5], [4, 0], [4, 0.5]]
    for name, real, model in (("truncated", 2, 3), ("discounted", 4, 5)):
        rank, regret, error = map(
            float, re.search(rf"{name}: .* (\S+), regret (\S+), .* (\S+)$", printed, re.M).groups()
        )
        real, model = table[:, real], table[:, model]
        width, ranks = np.ptp(real), [values.argsort().argsort() for values in (real, model)]
        assert rank == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=0.01)
        near = {"rel": 0.05, "abs": 0.02}  # the table has one decimal
        assert regret == pytest.approx((real.max() - real[model.argmax()]) / width, **near)
        assert error == pytest.approx(np.abs(real - model).mean() / width, **near)
    assert (table[:, 4] < table[:, 2]).all(), "discounted returns are lower"
