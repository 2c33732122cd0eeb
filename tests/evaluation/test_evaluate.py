import numpy as np
import pandas as pd
import pytest

from data.trajectories import Dataset, Trajectory, gather_transitions
from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble
from evaluation.evaluate import PROPAGATIONS, evaluate, summarise
from evaluation.predictions import gather_rows
from probabilistic_model import ProbabilisticModel

OPTIONS = {"horizons": [1, 3], "max_starts": 20, "seed": 0}


def everything(dataset):
    return np.arange(len(dataset.trajectories))


# --- Truths that are known ---


def test_a_model_that_knows_the_noise_is_found_calibrated(knowing_ensemble, noisy_dataset, overall):
    data = noisy_dataset()
    tables = evaluate(knowing_ensemble(members=3), data, everything(data), **OPTIONS)
    deviation = np.array([0.5, 2.0])  # of the noise, in the model's units
    for variant in ("raw", "recalibrated", "isotonic"):
        row = overall(tables["calibration"], variant=variant)
        assert row["mean_z2"] == pytest.approx(1.0, abs=0.03)
        assert row["ece"] < 0.01
        for level in (50, 80, 90, 95):
            assert row[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.015)
    for prediction in ("mixture", "gaussian", "recalibrated", "isotonic"):
        row = overall(tables["likelihood"], prediction=prediction)
        assert row["sharpness"] == pytest.approx(deviation.mean(), rel=0.02)
        assert row["crps"] == pytest.approx((deviation / np.sqrt(np.pi)).mean(), rel=0.02)
        assert row["crps_raw"] == pytest.approx((deviation * (1, 10) / np.sqrt(np.pi)).mean(), rel=0.02)
        if prediction == "isotonic":
            continue  # has no density
        entropy = 0.5 * np.log(2 * np.pi * np.e * deviation**2)
        assert row["nll"] == pytest.approx(entropy.mean(), abs=0.02)
        assert row["nll_raw"] == pytest.approx((entropy + np.log([1, 10])).mean(), abs=0.02)
    np.testing.assert_allclose(tables["pit"].density, 1.0, atol=0.15)
    np.testing.assert_allclose(tables["reliability"].observed, tables["reliability"].promised, atol=0.02)
    # Who expects nothing errs like the baseline of no change.
    ours, nothing = (overall(tables["one_step"], predictor=name) for name in ("ensemble", "no_change"))
    assert ours["rmse"] == pytest.approx(nothing["rmse"]) == pytest.approx(np.sqrt((0.5**2 + 2**2) / 2), rel=0.03)
    assert ours["rmse_raw"] == pytest.approx(np.sqrt((0.5**2 + 20**2) / 2), rel=0.03)
    assert ours["r2"] == pytest.approx(0.0, abs=0.01)
    predictors = ["ensemble", "member_0", "member_1", "member_2", "linear", "no_change"]
    assert list(tables["one_step"].predictor.unique()) == predictors


def test_recalibration_mends_an_overconfident_model(knowing_ensemble, noisy_dataset):
    data = noisy_dataset()
    tables = evaluate(knowing_ensemble(variance=(0.25 / 4, 4.0)), data, everything(data), **OPTIONS)
    table = tables["calibration"].set_index(["variant", "dimension"])
    assert table.mean_z2["raw", "0"] == pytest.approx(4.0, rel=0.05)
    assert table.coverage_90["raw", "0"] < 0.65
    assert table.scale["recalibrated", "0"] == pytest.approx(2.0, rel=0.02)
    assert table.scale["recalibrated", "1"] == pytest.approx(1.0, rel=0.02)
    assert table.coverage_90["recalibrated", "0"] == pytest.approx(0.9, abs=0.015)


def test_members_that_predict_points_answer_with_their_training_residuals(knowing_ensemble, noisy_dataset, overall):
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
    spread = tables["rollout"].query("propagation == 'tsinf'").spread
    np.testing.assert_allclose(spread, np.sqrt((0.5**2 + 2**2) / 2), rtol=0.03)


def test_dimensions_that_change_by_a_constant_are_left_out(constant_member, noisy_dataset, overall):
    ensemble = DynamicsEnsemble.from_members([constant_member(DeterministicModel, [0.0], delta_scale=[0.0, 10.0])])
    data = noisy_dataset()
    tables = evaluate(ensemble, data, everything(data), **OPTIONS)
    assert tables["one_step"].dimension.unique().tolist() == ["all", "1"]
    assert overall(tables["one_step"], predictor="ensemble")["rmse_raw"] == pytest.approx(20, rel=0.03)
    assert tables["rollout_dimensions"].dimension.unique().tolist() == ["1"]


# --- The whole ---


def test_trajectories_add_up_to_the_whole(knowing_ensemble, noisy_dataset, overall):
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


def test_rollouts_go_as_far_as_the_longest_trajectory(constant_ensemble, walks):
    ensemble, data = constant_ensemble(DeterministicModel, [1.0, 1.0]), walks(30, 30)
    tables = evaluate(ensemble, data, everything(data), horizons=[1, 5, 100], max_starts=10)
    names = ["no_change", "mean_state", "mean", "mean_clamped", "ts1", "tsinf", "tsinf_clamped"]
    assert tables["rollout"].propagation.unique().tolist() == [*names, "member_0", "member_1"]
    assert 5 < tables["rollout"].horizon.max() <= 30
    assert set(tables["starts"].horizon) == set(tables["rollout_dimensions"].horizon) == {1, 5}
    assert tables["starts"].propagation.unique().tolist() == names
    assert len(tables["rollout_dimensions"]) == 3 * 2 * 2
    assert set(tables["rollout_coverage"].propagation) == {"ts1", "tsinf"}


def test_a_single_trajectory_is_evaluated_but_not_recalibrated(knowing_ensemble, noisy_dataset):
    data = noisy_dataset(trajectories=1)
    tables = evaluate(knowing_ensemble(), data, [0], **OPTIONS)
    assert set(tables["likelihood"].prediction) == {"mixture", "gaussian"}
    assert set(tables["calibration"].variant) == set(tables["rollout_coverage"].variant) == {"raw"}
    assert tables["trajectories"].crps_recalibrated.isna().all()
    summary = summarise(tables, [1, 3])
    assert "crps_recalibrated" not in summary
    assert "nrmse_linear" not in summary  # there is no other fold to fit it on
    assert summary["calibrated_horizon_tsinf_raw"] == 0  # its standard error is unknown


def test_the_same_seed_gives_the_same_tables(random_member, member_class):
    ensemble = DynamicsEnsemble.from_members([random_member(member_class, index) for index in range(3)])
    random = np.random.default_rng(0)
    made = [Trajectory(*random.normal(size=(4, 40, 3)).astype(np.float32)[:, :, :3], False) for _ in range(4)]
    made = [Trajectory(t.observations, t.actions[:, :2], t.rewards[:, 0], t.next_observations, False) for t in made]
    data = Dataset("", None, "", made)
    first, second = (evaluate(ensemble, data, everything(data), **OPTIONS) for _ in range(2))
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name])
    other = evaluate(ensemble, data, everything(data), **OPTIONS | {"seed": 1})
    assert not other["starts"].equals(first["starts"])


def test_summary_holds_the_numbers_of_the_tables(knowing_ensemble, noisy_dataset, overall):
    data = noisy_dataset()
    rows = gather_rows(data, everything(data))
    others = {"ood_rows": {"same": rows}, "probes": {"again": rows}}
    tables = evaluate(knowing_ensemble(), data, everything(data), **others, **OPTIONS)
    assert tables["uncertainty"].rows.tolist() == ["test"] * 8 + ["again"] * 8
    summary = summarise(tables, [1, 3])
    assert summary["nrmse"] == overall(tables["one_step"], predictor="ensemble")["rmse"]
    assert summary["median_error"] == overall(tables["one_step"], predictor="ensemble")["median"]
    assert summary["sharpness_mixture"] == overall(tables["likelihood"], prediction="mixture")["sharpness"]
    assert summary["crps_recalibrated"] == overall(tables["likelihood"], prediction="recalibrated")["crps"]
    assert summary["coverage_90_raw"] == overall(tables["calibration"], variant="raw")["coverage_90"]
    tsinf = tables["rollout"].query("propagation == 'tsinf'").set_index("horizon")
    assert summary["error_tsinf_3"] == tsinf["median"][3]
    assert summary["skill_tsinf_3"] == tsinf.skill[3]
    assert summary["energy_score_tsinf_3"] == tsinf.energy_score[3]
    assert summary["auroc_same_total_std"] == 0.5  # members who are always as unsure cannot tell anything apart
    assert "spearman_total_std" not in summary  # a correlation with a constant is none
    assert all(np.isfinite(value) and isinstance(value, float) for value in summary.values())


def test_headline_numbers_bear_the_published_names(random_member, linear_system):
    ensemble = DynamicsEnsemble.from_members([random_member(ProbabilisticModel, index) for index in range(2)])
    parts = [linear_system(rows=40, seed=seed) for seed in range(2)]
    made = [Trajectory(p.states, p.actions, p.rewards, p.next_states, False) for p in parts]
    summary = summarise(evaluate(ensemble, Dataset("", None, "", made), np.arange(2), **OPTIONS), [1, 3])
    errors = ["nrmse", "rmse_raw", "r2", "median_error"]
    errors += [f"nrmse_{of}" for of in ("member_median", "member_worst", "linear", "no_change")]
    scores = ["mean_z2", "ece", "coverage_50", "coverage_80", "coverage_90", "coverage_95"]
    measures = ["max_pairwise", "ensemble_std", "max_aleatoric", "total_std"]
    names = {
        *errors,
        *(f"{score}_{of}" for score in ("nll", "crps", "sharpness") for of in ("mixture", "gaussian", "recalibrated")),
        *(f"{score}_isotonic" for score in ("crps", "sharpness")),
        *(f"{score}_{variant}" for score in scores for variant in ("raw", "recalibrated", "isotonic")),
        *(f"{score}_{of}" for score in ("spearman", "auroc_worst", "risk_reduction") for of in measures),
        *(f"{score}_{of}_{k}" for score in ("error", "skill", "exploded") for of in PROPAGATIONS for k in (1, 3)),
        *(f"energy_score_{of}_{k}" for of in ("ts1", "tsinf", "tsinf_clamped") for k in (1, 3)),
        *(f"half_skill_horizon_{of}" for of in PROPAGATIONS),
        *(f"calibrated_horizon_{of}_{variant}" for of in ("ts1", "tsinf") for variant in ("raw", "recalibrated")),
    }
    assert set(summary) == names
