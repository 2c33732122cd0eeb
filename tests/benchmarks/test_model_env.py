import importlib.util
import tempfile

import pandas as pd
import pytest
import torch

from benchmarks import harness, model_env
from benchmarks.step_arms import NEEDS, Case


def test_a_quick_trial_measures_all_arms_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    published = (harness.FOLDER / "README.md").read_bytes()

    model_env.main(["--quick"])

    [folder] = tmp_path.glob("bench-model_env-*")
    rows = pd.read_csv(folder / "results" / "model_env.csv")
    assert set(rows) == {*model_env.CASE, "started", "round", "arm", "ms", "commit", "machine"}
    ours = {"ours", *model_env.OTHERS} - {"mbrl"}
    assert set(rows[rows["environments"] == 1]["arm"]) == ours, "one environment is no multiple of seven members"
    section = (folder / "README.md").read_text().partition("<!-- begin model_env -->")[2].partition("<!-- end")[0]
    assert "| 1 |" in section and "| 7 |" in section and "plots/model_env.png" in section
    assert (harness.FOLDER / "README.md").read_bytes() == published


@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDS["mbrl"])), reason="needs mbrl-lib")
@pytest.mark.parametrize("kind", model_env.KINDS)
def test_mbrl_lib_has_the_same_weights_and_starts_each_step_from_the_same_states(kind):
    case = Case(kind, "2x8", batch=1, size="hopper", threads=1, rounds=0)
    states, actions = torch.zeros(14, 11), torch.zeros(14, 3)
    with torch.no_grad():
        step = model_env.mbrl_step(case.ensemble, states, actions)
        changes = [step()[0].abs().max() for _ in range(30)]
    assert max(changes) < 20 * min(changes)
