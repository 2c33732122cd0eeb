"""Kinds end to end: a new one is one file and one entry in the list, and those that are there evaluate alike."""

import json
import sys

import pytest
import torch

import dynamics_model
import evaluate_model
import learn_model

STUDENT_T = '''
"""Student-t ensembles: members predict a mean and a scale, with five degrees of freedom."""

import math
from typing import ClassVar

import torch

from dynamics_model import DynamicsEnsemble, DynamicsModel

DEGREES = 5.0
_LOG_SHRINK = math.log((DEGREES - 2) / DEGREES)  # log of the squared scale over the variance


class StudentTEnsemble(DynamicsEnsemble):
    """Members with two heads: mean and log-variance."""

    kind: ClassVar[str] = "student_t"
    heads: ClassVar[int] = 2
    loss_name: ClassVar[str] = "student_t_loss"

    def interpret(self, outputs):
        mean, log_variance = outputs.chunk(2, dim=-1)
        return mean, log_variance.clamp(-12, 4)

    def losses(self, inputs, targets, progress=0.0):
        loss = self.nll(targets, *self.predict_change(inputs)).mean(dim=(1, 2))
        return loss, loss.detach()

    def nll(self, truth, mean, log_variance):
        log_scale = (log_variance + _LOG_SHRINK) / 2
        square = ((truth - mean) * (-log_scale).exp()).square()
        constant = math.lgamma(DEGREES / 2) - math.lgamma((DEGREES + 1) / 2) + math.log(DEGREES * math.pi) / 2
        return (DEGREES + 1) / 2 * torch.log1p(square / DEGREES) + log_scale + constant

    def noise(self, shape, generator):
        normal, *normals = torch.randn((1 + int(DEGREES), *shape), generator=generator)
        chi_square = torch.stack(normals).square().sum(dim=0)
        return normal * (DEGREES / chi_square).sqrt() * math.exp(_LOG_SHRINK / 2)


class StudentTModel(DynamicsModel):
    """A member that predicts a Student-t distribution."""

    ensemble_class = StudentTEnsemble

    def forward(self, states, actions):
        mean, variance = self.network.predict(states, actions)
        return mean[0], variance[0]
'''


@pytest.fixture
def student_t(tmp_path, monkeypatch):
    """The file of the kind on the path, and its entry in the list."""
    (tmp_path / "student_t_model.py").write_text(STUDENT_T)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(dynamics_model.KINDS, "student_t", ("student_t_model", "StudentTModel"))
    yield
    sys.modules.pop("student_t_model", None)


def test_the_file_of_a_kind_is_short():
    assert len(STUDENT_T.strip().splitlines()) < 60


def test_a_new_kind_trains_pickles_loads_evaluates_and_rolls_out(student_t, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "student.yaml").write_text("kind: student_t\nfit_epochs: 3\nhidden_size: [32]\nensemble_size: 2\n")
    shares = ["--holdout_ratio", "0.2", "--test_ratio", "0.2", "--run_name", "student", "--quiet"]
    assert learn_model.main(["--dataset", "hopper-medium-demo", "--config", "student.yaml", *shares]) == 0

    rows = (tmp_path / "logs" / "student" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,model_id,student_t_loss,")
    losses = [float(row.split(",")[2]) for row in rows[1:]]
    assert losses[-1] < losses[0], "it has learned"

    ensemble = dynamics_model.load_ensemble("model.pkl")
    models, metadata = dynamics_model.load_models("model.pkl")
    assert (ensemble.kind, metadata["kind"], len(models)) == ("student_t", "student_t", 2)
    states, actions = ensemble.input_shift[:11].expand(40, 11), ensemble.input_shift[11:].expand(40, 5, 3)
    assert ensemble.rollout(states, actions, "ts1").shape == (40, 6, 11)
    assert ensemble.disagreement(states, actions[:, 0], "max_aleatoric").gt(0).all()

    arguments = ["--dataset", "hopper-medium-demo", "--horizons", "1", "5", "--max_starts", "20", "--quiet"]
    assert evaluate_model.main(["--model", "model.pkl", *arguments, "--output", "report"]) == 0
    facts = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert facts["kind"] == "student_t"
    assert facts["metrics"]["nrmse"] < facts["metrics"]["nrmse_no_change"]
    assert {"nll_mixture", "error_tsinf_5", "auroc_worst_max_aleatoric"} <= facts["metrics"].keys()


@pytest.mark.parametrize("kind", ["faithful", "posthoc"])
def test_kinds_with_a_mean_apart_train_by_a_file_and_evaluate_as_distributions(kind, workplace):
    (workplace / "arm.yaml").write_text(f"kind: {kind}\nfit_epochs: 3\nhidden_size: [32]\nensemble_size: 2\n")
    shares = ["--holdout_ratio", "0.2", "--test_ratio", "0.2", "--run_name", "apart", "--quiet"]
    assert learn_model.main(["--dataset", "hopper-medium-demo", "--config", "arm.yaml", *shares]) == 0

    ensemble = dynamics_model.load_ensemble("model.pkl")
    assert (ensemble.kind, ensemble.metadata["kind"]) == (kind, kind)
    assert all(member["nll"] < 1.5 for member in ensemble.metadata["scores"]), "of a variance that has learned"
    states, actions = ensemble.input_shift[:11].expand(40, 11), ensemble.input_shift[11:].expand(40, 5, 3)
    assert not torch.equal(*(ensemble.rollout(states, actions, "ts1") for _ in range(2))), "states are drawn"

    arguments = ["--dataset", "hopper-medium-demo", "--horizons", "1", "5", "--max_starts", "20", "--quiet"]
    assert evaluate_model.main(["--model", "model.pkl", *arguments, "--output", "report"]) == 0
    metrics = json.loads((workplace / "report" / "metrics.json").read_text())["metrics"]
    assert metrics["nrmse"] < metrics["nrmse_no_change"]
    assert {"nll_mixture", "error_tsinf_5", "auroc_worst_max_aleatoric"} <= metrics.keys()


def test_likelihood_and_draws_of_the_new_kind_are_its_own(student_t, unit_normalisation):
    from scipy import stats

    kind = dynamics_model.member_class("student_t")
    ensemble = kind(dynamics_model.Architecture(2, 1, hidden_size=()), unit_normalisation()).network
    truth, mean = torch.linspace(-4, 4, 9, dtype=torch.float64), torch.full((9,), 0.5, dtype=torch.float64)
    found = ensemble.nll(truth, mean, torch.full((9,), 2.0, dtype=torch.float64).log())
    expected = -stats.t.logpdf(truth.numpy(), df=5, loc=0.5, scale=(2 * 3 / 5) ** 0.5)
    assert found.numpy() == pytest.approx(expected)

    noise = ensemble.noise((200_000,), torch.Generator().manual_seed(0))
    assert stats.kstest(noise.numpy(), stats.t(df=5, scale=(3 / 5) ** 0.5).cdf).pvalue > 1e-3
    assert stats.kstest(noise.numpy(), "norm").pvalue < 1e-3
