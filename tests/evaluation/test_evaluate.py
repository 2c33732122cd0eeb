import numpy as np
import pandas as pd
import pytest
import torch

from data.trajectories import Dataset, Trajectory, Transitions, gather_transitions
from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble
from evaluation import metrics
from evaluation.evaluate import (
    bounds_table,
    complete_variances,
    cross_dataset_error,
    disagreements,
    evaluate,
    ood_table,
    residual_variance,
    summarise,
)
from evaluation.predictions import Scale, gather_rows, predict_one_step
from probabilistic_model import ProbabilisticModel

OPTIONS = {"horizons": [1, 3], "max_starts": 20, "seed": 0}


def noisy_dataset(trajectories=12, length=300, deviation=(0.5, 20.0), seed=0):
    """Trajectories whose states change by Gaussian noise of these deviations, whatever is done."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(trajectories):
        change = random.normal(size=(length, 2)) * deviation
        states = random.normal(size=(length, 2))
        actions, rewards = random.normal(size=(length, 1)), np.zeros(length)
        parts = (part.astype(np.float32) for part in (states, actions, rewards, states + change))
        made.append(Trajectory(*parts, terminated=False))
    return Dataset("noise", None, "0" * 64, made)


def everything(dataset):
    return np.arange(len(dataset.trajectories))


@pytest.fixture
def knowing_ensemble(constant_member):
    """Returns a function that builds members who expect no change, in units of (1, 10), with variances as given."""

    def build(kind=ProbabilisticModel, members=2, variance=(0.25, 4.0)):
        options = {"variance": list(variance)} if kind is ProbabilisticModel else {}
        made = [constant_member(kind, [0.0, 0.0], **options, delta_scale=[1.0, 10.0]) for _ in range(members)]
        return DynamicsEnsemble(made)

    return build


def overall(table, **chosen):
    for column, value in {"dimension": "all", **chosen}.items():
        table = table[table[column] == value]
    (row,) = table.to_dict("records")
    return row


# --- Truths that are known ---


def test_a_model_that_knows_the_noise_is_found_calibrated(knowing_ensemble):
    data = noisy_dataset()
    tables = evaluate(knowing_ensemble(), data, everything(data), **OPTIONS)
    deviation = np.array([0.5, 2.0])  # of the noise, in the model's units
    for variant in ("raw", "recalibrated"):
        row = overall(tables["calibration"], variant=variant)
        assert row["mean_z2"] == pytest.approx(1.0, abs=0.03)
        assert row["ece"] < 0.01
        for level in (50, 80, 90, 95):
            assert row[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.015)
    for prediction in ("mixture", "gaussian", "recalibrated"):
        row = overall(tables["likelihood"], prediction=prediction)
        assert row["crps"] == pytest.approx((deviation / np.sqrt(np.pi)).mean(), rel=0.02)
        assert row["crps_raw"] == pytest.approx((deviation * (1, 10) / np.sqrt(np.pi)).mean(), rel=0.02)
        entropy = 0.5 * np.log(2 * np.pi * np.e * deviation**2)
        assert row["nll"] == pytest.approx(entropy.mean(), abs=0.02)
        assert row["nll_raw"] == pytest.approx((entropy + np.log([1, 10])).mean(), abs=0.02)
    np.testing.assert_allclose(tables["pit"].density, 1.0, atol=0.15)
    observed = tables["reliability"]
    np.testing.assert_allclose(observed.observed, observed.promised, atol=0.02)


def test_recalibration_mends_an_overconfident_model(knowing_ensemble):
    data = noisy_dataset()
    tables = evaluate(knowing_ensemble(variance=(0.25 / 4, 4.0)), data, everything(data), **OPTIONS)
    table = tables["calibration"].set_index(["variant", "dimension"])
    assert table.mean_z2["raw", "0"] == pytest.approx(4.0, rel=0.05)
    assert table.coverage_90["raw", "0"] < 0.65
    assert table.scale["recalibrated", "0"] == pytest.approx(2.0, rel=0.02)
    assert table.scale["recalibrated", "1"] == pytest.approx(1.0, rel=0.02)
    assert table.coverage_90["recalibrated", "0"] == pytest.approx(0.9, abs=0.015)


def test_deterministic_members_answer_with_their_training_residuals(knowing_ensemble):
    data = noisy_dataset()
    training = gather_transitions(data, np.arange(6))
    tables = evaluate(knowing_ensemble(DeterministicModel), data, np.arange(6, 12), training, **OPTIONS)
    row = overall(tables["calibration"], variant="raw")
    assert row["mean_z2"] == pytest.approx(1.0, abs=0.05)
    assert row["coverage_90"] == pytest.approx(0.9, abs=0.02)
    parts = tables["parts"].set_index("dimension")
    np.testing.assert_allclose(parts.aleatoric[["0", "1"]], [0.5, 2.0], rtol=0.03)
    assert parts.epistemic["all"] == 0.0
    assert "bounds" not in tables


def test_without_training_rows_residuals_come_from_the_other_folds(knowing_ensemble):
    ensemble, data = knowing_ensemble(DeterministicModel), noisy_dataset(trajectories=2, length=50)
    rows = gather_rows(data, everything(data))
    one_step = predict_one_step(ensemble, rows.states, rows.actions, rows.next_states)
    variances = complete_variances(ensemble, one_step, rows.trajectory, training=None)
    of_second = residual_variance(ensemble, gather_transitions(data, np.array([1])))
    np.testing.assert_allclose(variances[:, :50], np.broadcast_to(of_second, (2, 50, 2)))
    with pytest.raises(ValueError, match="two trajectories"):
        complete_variances(ensemble, one_step, np.zeros(100), training=None)


def test_errors_of_a_model_that_expects_nothing_are_those_of_no_change(knowing_ensemble):
    data = noisy_dataset()
    table = evaluate(knowing_ensemble(members=3), data, everything(data), **OPTIONS)["one_step"]
    ours, nothing = overall(table, predictor="ensemble"), overall(table, predictor="no_change")
    assert ours["rmse"] == pytest.approx(nothing["rmse"]) == pytest.approx(np.sqrt((0.5**2 + 2**2) / 2), rel=0.03)
    assert ours["rmse_raw"] == pytest.approx(np.sqrt((0.5**2 + 20**2) / 2), rel=0.03)
    assert ours["r2"] == pytest.approx(0.0, abs=0.01)
    assert list(table.predictor.unique()) == ["ensemble", "member_0", "member_1", "member_2", "linear", "no_change"]


def test_the_mean_of_members_who_err_in_opposite_directions_is_right(constant_member):
    members = [constant_member(DeterministicModel, [off, 0.0], delta_scale=[1.0, 10.0]) for off in (0.0, 3.0, -3.0)]
    data = noisy_dataset(deviation=(1e-6, 1e-6))
    tables = evaluate(
        DynamicsEnsemble(members), data, everything(data), gather_transitions(data, [0]), elites=[0, 1], **OPTIONS
    )
    rmse = tables["one_step"].query("dimension == '0'").set_index("predictor").rmse
    expected = {"ensemble": 0.0, "elites": 1.5, "member_0": 0.0, "member_1": 3.0, "member_2": 3.0}
    assert rmse[list(expected)].to_dict() == pytest.approx(expected, abs=1e-5)
    # Subsets of one: mean square 6 of one of two dimensions; of two: (1.5, 1.5, 0); of three: 0.
    np.testing.assert_allclose(tables["ensemble_size"].rmse, [np.sqrt(6 / 2), np.sqrt(1.5 / 2), 0], atol=1e-5)


def test_linear_regression_is_exact_on_a_linear_system(linear_system, random_member, member_class):
    ensemble = DynamicsEnsemble([random_member(member_class, index) for index in range(2)])
    parts = [linear_system(rows=80, seed=seed) for seed in range(3)]
    data = Dataset(
        "linear", None, "", [Trajectory(p.states, p.actions, p.rewards, p.next_states, False) for p in parts]
    )
    for training in (parts[0], None):
        table = evaluate(ensemble, data, np.array([1, 2]), training, **OPTIONS)["one_step"]
        assert overall(table, predictor="linear")["rmse"] < 1e-3 * overall(table, predictor="no_change")["rmse"]


def test_dimensions_that_change_by_a_constant_are_left_out(constant_member):
    member = constant_member(DeterministicModel, [0.0], delta_scale=[0.0, 10.0])
    data = noisy_dataset()
    tables = evaluate(DynamicsEnsemble([member]), data, everything(data), **OPTIONS)
    assert tables["one_step"].dimension.unique().tolist() == ["all", "1"]
    assert overall(tables["one_step"], predictor="ensemble")["rmse_raw"] == pytest.approx(20, rel=0.03)
    assert tables["rollout_dimensions"].dimension.unique().tolist() == ["1"]


# --- Usefulness of uncertainty ---


def test_disagreements_are_those_of_the_ensemble(random_member, member_class):
    ensemble = DynamicsEnsemble([random_member(member_class, index) for index in range(4)])
    states, actions = np.random.default_rng(0).normal(size=(2, 30, 3)).astype(np.float32) * 3
    one_step = predict_one_step(ensemble, states, actions[:, :2], states)
    scale = Scale.of(ensemble)
    for normalised, factor in ((True, 1.0), (False, scale.factor)):
        variances = None if one_step.variances is None else one_step.variances * np.square(factor)
        ours = disagreements(one_step.means * factor, variances)
        assert set(ours) == set(metrics.DISAGREEMENTS) - ({"max_aleatoric"} if variances is None else set())
        for kind, values in ours.items():
            expected = ensemble.disagreement(states, actions[:, :2], kind, normalised).numpy()
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_far_away_data_is_told_apart_and_the_same_data_is_not(random_member):
    ensemble = DynamicsEnsemble([random_member(ProbabilisticModel, index) for index in range(4)])
    random = np.random.default_rng(0)

    def rows(width):
        states, actions = (random.normal(size=(500, size)).astype(np.float32) * width for size in (3, 2))
        return gather_rows(Dataset("", None, "", [Trajectory(states, actions, states[:, 0], states, False)]), [0])

    near, far = rows(1), rows(100)
    one_step = predict_one_step(ensemble, near.states, near.actions, near.next_states)
    table = ood_table(ensemble, one_step, {"near": near, "far": far}, Scale.of(ensemble))
    table = table.set_index(["dataset", "measure", "units"]).auroc
    assert table["far", "ensemble_std", "normalised"] > 0.95
    np.testing.assert_allclose(table["near"], 0.5)


def test_risk_coverage_curves_end_at_the_mean_error(random_member, linear_system):
    ensemble = DynamicsEnsemble([random_member(ProbabilisticModel, index) for index in range(3)])
    part = linear_system(rows=200)
    data = Dataset("", None, "", [Trajectory(part.states, part.actions, part.rewards, part.next_states, False)] * 2)
    table = evaluate(ensemble, data, everything(data), **OPTIONS)["risk_coverage"]
    last = table[table.share == 1].groupby("units").risk
    assert (last.max() - last.min() < 1e-9).all()
    best = table[table.measure == "error"].set_index(["units", "share"]).risk
    for _, rows in table.groupby("measure"):
        assert (rows.set_index(["units", "share"]).risk >= best - 1e-12).all()


def test_log_variances_at_their_bounds_are_counted(constant_member):
    member = constant_member(ProbabilisticModel, [0.0, 0.0, 0.0])  # log-variances of 0
    with torch.no_grad():
        member.network.max_logvar[0, 0] = torch.tensor([-9.0, 40.0, 40.0])
        member.network.min_logvar[0, 0] = torch.tensor([-40.0, -40.0, 9.0])
    ensemble, states = DynamicsEnsemble([member]), np.zeros((5, 3), np.float32)
    one_step = predict_one_step(ensemble, states, states[:, :1], states)
    table = bounds_table(ensemble, one_step.variances, Scale.of(ensemble)).set_index("dimension")
    assert table.at_max.to_dict() == pytest.approx({"all": 1 / 3, "0": 1, "1": 0, "2": 0})
    assert table.at_min.to_dict() == pytest.approx({"all": 1 / 3, "0": 0, "1": 0, "2": 1})


# --- The whole ---


def test_trajectories_add_up_to_the_whole(knowing_ensemble):
    data = noisy_dataset(trajectories=7)
    chosen = np.array([1, 2, 4, 6])
    tables = evaluate(knowing_ensemble(), data, chosen, **OPTIONS)
    table = tables["trajectories"]
    assert table.trajectory.tolist() == chosen.tolist()
    assert table.rows.tolist() == [300] * 4
    mean = (table[["mse", "crps", "crps_recalibrated"]].mul(table.rows, axis=0)).sum() / table.rows.sum()
    assert np.sqrt(mean.mse) == pytest.approx(overall(tables["one_step"], predictor="ensemble")["rmse"])
    likelihood = tables["likelihood"]
    assert mean.crps == pytest.approx(overall(likelihood, prediction="mixture")["crps"])
    assert mean.crps_recalibrated == pytest.approx(overall(likelihood, prediction="recalibrated")["crps"])
    assert set(tables["starts"].trajectory) <= set(chosen)


def test_a_single_trajectory_is_evaluated_but_not_recalibrated(knowing_ensemble):
    data = noisy_dataset(trajectories=1)
    tables = evaluate(knowing_ensemble(), data, [0], **OPTIONS)
    assert set(tables["calibration"].variant) == set(tables["rollout_coverage"].variant) == {"raw"}
    assert tables["trajectories"].crps_recalibrated.isna().all()
    summary = summarise(tables, [1, 3])
    assert "crps_recalibrated" not in summary
    assert "nrmse_linear" not in summary  # there is no other fold to fit it on
    assert summary["calibrated_horizon_tsinf_raw"] == 0  # its standard error is unknown


def test_the_same_seed_gives_the_same_tables(random_member, member_class):
    ensemble = DynamicsEnsemble([random_member(member_class, index) for index in range(3)])
    random = np.random.default_rng(0)
    made = [Trajectory(*random.normal(size=(4, 40, 3)).astype(np.float32)[:, :, :3], False) for _ in range(4)]
    made = [Trajectory(t.observations, t.actions[:, :2], t.rewards[:, 0], t.next_observations, False) for t in made]
    data = Dataset("", None, "", made)
    first, second = (evaluate(ensemble, data, everything(data), **OPTIONS) for _ in range(2))
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name])
    other = evaluate(ensemble, data, everything(data), **OPTIONS | {"seed": 1})
    assert not other["starts"].equals(first["starts"])


def test_summary_holds_the_numbers_of_the_tables(knowing_ensemble):
    data = noisy_dataset()
    rows = gather_rows(data, everything(data))
    tables = evaluate(knowing_ensemble(), data, everything(data), ood_rows={"same": rows}, **OPTIONS)
    summary = summarise(tables, [1, 3])
    assert summary["nrmse"] == overall(tables["one_step"], predictor="ensemble")["rmse"]
    assert summary["crps_recalibrated"] == overall(tables["likelihood"], prediction="recalibrated")["crps"]
    tsinf = tables["rollout"].query("propagation == 'tsinf'").set_index("horizon")
    assert summary["error_tsinf_3"] == tsinf["median"][3]
    assert summary["auroc_same_total_std"] == 0.5  # members who are always as unsure cannot tell anything apart
    assert "spearman_total_std" not in summary  # a correlation with a constant is none
    assert all(np.isfinite(value) and isinstance(value, float) for value in summary.values())


def test_cross_dataset_errors_are_in_units_of_the_dataset(knowing_ensemble):
    data = noisy_dataset(deviation=(0.5, 20.0))
    found = cross_dataset_error(knowing_ensemble(), data, gather_rows(data, np.array([0, 1, 2])))
    # A Gaussian's root mean square is sqrt(pi / 2) times its mean absolute deviation, in whatever units.
    assert found["rmse"] == pytest.approx(np.sqrt(np.pi / 2), rel=0.03)
    assert found["rmse_raw"] == pytest.approx(np.sqrt((0.5**2 + 20**2) / 2), rel=0.05)
    assert found["rows"] == 900


def test_predictions_in_chunks_are_those_in_one(random_member, member_class, monkeypatch):
    ensemble = DynamicsEnsemble([random_member(member_class, index) for index in range(3)])
    states = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    whole = predict_one_step(ensemble, states, states[:, :2], states + 1)
    monkeypatch.setattr("evaluation.predictions._MEMBER_ROWS_PER_CALL", 21)
    chunked = predict_one_step(ensemble, states, states[:, :2], states + 1)
    np.testing.assert_allclose(chunked.means, whole.means, rtol=1e-4, atol=1e-5)
    mean, variance = ensemble.predict(states, states[:, :2])
    scale = Scale.of(ensemble)
    np.testing.assert_allclose(whole.means * scale.factor, mean.detach().numpy() - states, rtol=1e-3, atol=1e-5)
    if variance is not None:
        raw = chunked.variances * np.square(scale.factor)
        np.testing.assert_allclose(raw, variance.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(whole.change * scale.factor, 1.0, rtol=1e-5)


def test_residuals_of_many_rows_are_taken_from_all_over(knowing_ensemble, monkeypatch):
    monkeypatch.setattr("evaluation.evaluate._RESIDUAL_ROWS", 3)
    states = np.zeros((101, 2), np.float32)
    following = np.zeros((101, 2), np.float32)
    following[[0, 50, 100], 0] = [1, 2, 3]
    ensemble = knowing_ensemble(DeterministicModel)
    variance = residual_variance(ensemble, Transitions(states, states[:, :1], following, states[:, 0]))
    np.testing.assert_allclose(variance[:, 0, 0], 14 / 3)
