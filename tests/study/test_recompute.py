"""The published comparisons, computed again from the published cells by other code: NumPy alone, no module of ours.

What is here follows the description in the report, not the analysis: seeds and test trajectories are drawn together,
each one time less often than there are, and limits are quantiles of Student's distribution with Satterthwaite's degrees
of freedom. Random draws are others, so that limits agree roughly; the estimates agree in every digit that is kept.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

RESULTS = Path(__file__).parent.parent.parent / "results"
DRAWS = 1500


def published_studies():
    return sorted(path.parent for path in RESULTS.glob("*/cells.parquet"))


def read_cells(folder):
    """Every cell that was tested: (arm, dataset, seed, split) and its tables, from the rows of the Parquet file."""
    rows = pd.read_parquet(folder / "cells.parquet")
    cells = {}
    for name, of_cell in rows[rows.cell.str.startswith("cells/")].groupby("cell", sort=False):
        _, arm, dataset, place = name.split("/")
        _, split, _, seed = place.split("-")
        record = json.loads(of_cell.record.dropna().iloc[0])["record"]
        if record["outcome"]["failure"] is None:
            cells[arm, dataset, int(seed), int(split)] = dict(iter(of_cell.groupby("table")))
    return cells


def of_trajectories(column, root):
    def compute(tables, counts, horizon):
        table = tables["trajectories"]
        weight = counts[table.trajectory.astype(int)] * table.rows.to_numpy(float)[:, None]  # (T, B)
        means = (table[column].to_numpy()[:, None] * weight).sum(axis=0) / weight.sum(axis=0)
        return np.sqrt(means) if root else means

    return compute


def lower_median(values, weight):
    """Smallest value with half of the weight at or below it: ``(N,)`` and ``(N, B)`` to ``(B,)``."""
    order = np.argsort(values)
    share = np.cumsum(weight[order], axis=0) / weight.sum(axis=0)
    return values[order][(share < 0.5 - 1e-12).sum(axis=0)]


def of_rows(tables, counts, horizon):
    table = tables["row_errors"]
    return lower_median(table.error.to_numpy(), counts[table.trajectory.astype(int)])


def of_starts(propagation):
    def compute(tables, counts, horizon):
        table = tables["starts"]
        table = table[(table.propagation == propagation) & (table.horizon == horizon)]
        return lower_median(np.minimum(table.error.to_numpy(), 1e6), counts[table.trajectory.astype(int)])

    return compute


METRICS = {
    "nrmse": (of_trajectories("mse", root=True), True),
    "median_error": (of_rows, True),
    "nll": (of_trajectories("nll", root=False), False),
    "crps": (of_trajectories("crps", root=False), True),
    "rollout_mean": (of_starts("mean"), True),
    "rollout_tsinf": (of_starts("tsinf"), True),
}


def compare(cells, metric, arm, reference, dataset, horizon):
    """Effect, low and high of one comparison, and how many seeds it rests on."""
    compute, is_ratio = METRICS[metric]
    places = [key[2:] for key in cells if key[:2] == (arm, dataset) and (reference, *key[1:]) in cells]
    tested = sorted(
        {t for place in places for t in cells[(arm, dataset, *place)]["trajectories"].trajectory.astype(int)}
    )
    random = np.random.default_rng(12345)
    counts = np.zeros((max(tested) + 1, 1 + DRAWS))
    counts[tested, 0] = 1
    for draw in range(1, 1 + DRAWS):
        np.add.at(counts[:, draw], random.choice(tested, len(tested) - 1), 1)
    by_seed = {}
    for seed, split in places:
        values = [compute(cells[name, dataset, seed, split], counts, horizon) for name in (arm, reference)]
        values = np.log(values) if is_ratio else np.array(values)
        by_seed.setdefault(seed, []).append(values[0] - values[1])
    differences = np.array([np.mean(parts, axis=0) for parts in by_seed.values()])  # (S, 1 + DRAWS)
    seeds, effect = len(differences), differences[:, 0].mean()
    low = high = np.nan
    if seeds >= 6:
        crossed = [differences[random.integers(seeds, size=seeds - 1), draw].mean() for draw in range(1, 1 + DRAWS)]
        parts = differences[:, 0].var(ddof=1) / seeds, differences[:, 1:].mean(axis=0).var(ddof=1)
        freedom = seeds - 1, len(tested) - 1
        total = sum(parts)
        degrees = 1 / sum((v / total) ** 2 / f for v, f in zip(parts, freedom, strict=True)) if total else sum(freedom)
        half = student.ppf(0.975, degrees) * np.std(crossed, ddof=1)
        low, high = effect - half, effect + half
    return (*(np.exp([effect, low, high]) if is_ratio else (effect, low, high)), seeds)


def check(folder, most=None):
    """Compares the table that a study has published with what its cells give."""
    cells, paired = read_cells(folder), pd.read_csv(folder / "paired.csv")
    horizons = pd.read_csv(folder / "horizons.csv").set_index("dataset").horizon
    lines = paired[paired.metric.isin(METRICS) & (paired.dataset != "all datasets")]
    lines = lines if most is None or len(lines) <= most else lines.sample(most, random_state=0)
    assert len(lines)
    for line in lines.itertuples():
        found = compare(cells, line.metric, line.arm, line.reference, line.dataset, horizons[line.dataset])
        effect, low, high, seeds = found
        name = f"{line.metric}, {line.arm} / {line.reference} on {line.dataset}"
        assert seeds == line.pairs, name
        assert effect == pytest.approx(line.effect, rel=2e-5, abs=1e-7), name
        assert np.isnan(low) == np.isnan(line.low), name
        if not np.isnan(low):
            width = line.high - line.low
            assert abs(low - line.low) <= 0.15 * width + 1e-6 and abs(high - line.high) <= 0.15 * width + 1e-6, name
    return len(lines)


# --- Other tables, from the same cells ---


def check_values(folder):
    """Compares the published value of each metric with the mean over seeds of those of the cells."""
    cells, values = read_cells(folder), pd.read_csv(folder / "values.csv")
    horizons = pd.read_csv(folder / "horizons.csv").set_index("dataset").horizon
    checked = 0
    for line in values[values.metric.isin(METRICS)].itertuples():
        compute, is_ratio = METRICS[line.metric]
        by_seed = {}
        for (arm, dataset, seed, _), tables in cells.items():
            if (arm, dataset) == (line.arm, line.dataset):
                once = np.ones((int(tables["trajectories"].trajectory.max()) + 1, 1))
                value = compute(tables, once, horizons[dataset])[0]
                by_seed.setdefault(seed, []).append(np.log(value) if is_ratio else value)
        mean = np.mean([np.mean(parts) for parts in by_seed.values()])
        name = f"{line.metric} of {line.arm} on {line.dataset}"
        assert (np.exp(mean) if is_ratio else mean) == pytest.approx(line.value, rel=2e-5, abs=1e-7), name
        assert len(by_seed) == line.seeds, name
        checked += 1
    return checked


def check_stability(folder):
    """Compares spread and stray members with what the products of members' errors give."""
    cells, stability = read_cells(folder), pd.read_csv(folder / "stability.csv")
    for line in stability.itertuples():
        by_split = {}
        for (arm, dataset, _, split), tables in cells.items():
            if (arm, dataset) == (line.arm, line.dataset):
                products = tables["member_products"]
                own = products[products["first"] == products["second"]]
                by_split.setdefault(split, []).extend(0.5 * np.log(own["product"]))
        logs = np.concatenate([np.array(part) - np.median(part) for part in by_split.values()])
        name = f"{line.arm} on {line.dataset}"
        assert len(logs) == line.members, name
        assert 1.4826 * np.median(np.abs(logs - np.median(logs))) == pytest.approx(line.member_spread, rel=1e-4), name
        assert (np.exp(logs) > 2).sum() == line.stray, name
    return len(stability)


def check_members(folder):
    """Checks the cells themselves: the squared error of a mean is the mean of all products of its members' errors."""
    for name, tables in read_cells(folder).items():
        products, rows = tables["member_products"], tables["trajectories"]
        both_ways = np.where(products["first"] == products["second"], 1, 2)
        of_members = np.average(products["product"], weights=both_ways)
        assert of_members == pytest.approx(np.average(rows.mse, weights=rows.rows), rel=1e-4), name
        median = np.median(tables["row_errors"].error)
        assert median <= np.sqrt(of_members) * 1.01, name  # as errors have long tails
        assert len(tables["row_errors"]) == rows.rows.sum(), name


def check_uncertainty(folder):
    """Compares published rank correlations and AUROC with the means over cells."""
    published = pd.read_csv(folder / "uncertainty.csv")
    rows = [
        tables["uncertainty"].assign(arm=arm, dataset=dataset)
        for (arm, dataset, *_), tables in read_cells(folder).items()
    ]
    place = ["arm", "dataset", "rows", "measure"]
    rows = (
        pd.concat(rows)
        .rename(columns={"rows_text": "rows"})
        .loc[:, lambda table: ~table.columns.duplicated(keep="last")]
    )
    found = rows.groupby(place)[["spearman", "auroc_worst"]].mean()
    wanted = published.set_index(place)
    np.testing.assert_allclose(found.spearman.loc[wanted.index], wanted.spearman, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found.auroc_worst.loc[wanted.index], wanted.auroc, rtol=2e-5, atol=1e-7)
    return len(published)


@pytest.mark.parametrize("folder", published_studies(), ids=lambda folder: folder.name)
def test_published_comparisons_follow_from_published_cells(folder):
    check(folder, most=150)


@pytest.mark.parametrize("folder", published_studies(), ids=lambda folder: folder.name)
def test_published_values_stability_and_uncertainty_follow_from_published_cells(folder):
    check_members(folder)
    assert min(check_values(folder), check_stability(folder), check_uncertainty(folder)) > 0


def test_a_small_studys_other_tables_follow_from_its_cells(small_study):
    assert check_values(small_study) == 4 * len(METRICS)
    assert check_stability(small_study) == 4
    assert check_uncertainty(small_study) == 4


@pytest.mark.parametrize(
    ("table", "column", "check_it"),
    [
        ("values", "value", check_values),
        ("stability", "member_spread", check_stability),
        ("stability", "stray", check_stability),
        ("uncertainty", "auroc", check_uncertainty),
    ],
)
def test_other_wrong_tables_are_found_out(table, column, check_it, small_study):
    path = small_study / f"{table}.csv"
    changed = pd.read_csv(path)
    changed.loc[0, column] += 1
    changed.to_csv(path, index=False)
    with pytest.raises(AssertionError):
        check_it(small_study)


def test_a_small_studys_comparisons_follow_from_its_cells(small_study):
    assert check(small_study) == 2 * len(METRICS)


def test_a_wrong_table_is_found_out(small_study):
    path = small_study / "paired.csv"
    table = pd.read_csv(path)
    table.loc[table.metric == "nll", "effect"] += 0.01
    table.to_csv(path, index=False)
    with pytest.raises(AssertionError, match="nll, b / a on"):
        check(small_study)


# --- A small study ---


@pytest.fixture
def small_study(made_study, tmp_path):
    """A copy of the study, to be changed."""
    return shutil.copytree(made_study, tmp_path / "study")


@pytest.fixture(scope="module")
def made_study(tmp_path_factory):
    """A packed study of made-up cells: two arms, two splits, and six seeds on one dataset, three on the other."""
    tmp_path = tmp_path_factory.mktemp("made")
    from config import LearnConfig
    from study.analysis import analyse
    from study.cells import Cell, CellOutcome, CellRecord, Result
    from study.report import save_table
    from study.store import CellStore, pack
    from utils import Origin

    store, results = CellStore(tmp_path), {}
    for dataset, seeds in (("x", 6), ("y", 3)):
        for arm, seed, split in ((arm, seed, split) for arm in "ab" for seed in range(seeds) for split in (0, 4)):
            cell = Cell(arm, dataset, LearnConfig(seed=seed, split_seed=split), False, "cpu", 1)
            tables = random_tables(
                np.random.default_rng([seed, split, arm == "b"]), trajectories=range(split, split + 12)
            )
            origin = Origin("c0ffee", {})
            record = CellRecord(cell.request("d1ge57"), CellOutcome(None, 1.0, {}), {"test": 1.0}, origin)
            store.write(cell.name, Result(record, tables))
            results[cell.key] = store.read(cell.name)
    tables = analyse(results, {"x": 5, "y": 1})
    for name in ("paired", "values", "stability", "uncertainty"):
        save_table(tables[name], tmp_path / f"{name}.csv")
    save_table(pd.DataFrame({"dataset": ["x", "y"], "horizon": [5, 1]}), tmp_path / "horizons.csv")
    pack(tmp_path)
    return tmp_path


def random_tables(random, trajectories):
    trajectory = np.array(trajectories)
    rows = random.integers(3, 9, len(trajectory))
    starts = [(p, t, h, random.lognormal()) for p in ("mean", "tsinf") for t in trajectory for h in (1, 5)]
    first, second = np.triu_indices(3)
    step = np.arange(1, 6)
    rollout = {"horizon": step, "median": random.lognormal(size=5), "skill": 0.5, "exploded": 0.0}
    return {
        "trajectories": pd.DataFrame(
            {
                "trajectory": trajectory,
                "rows": rows,
                "mse": random.lognormal(size=len(rows)),
                "nll": random.normal(size=len(rows)),
                "crps": random.lognormal(size=len(rows)),
                "sharpness": random.lognormal(size=len(rows)),
            }
        ),
        "row_errors": pd.DataFrame(
            {"trajectory": np.repeat(trajectory, rows), "error": random.lognormal(size=rows.sum())}
        ),
        "member_products": pd.DataFrame(
            {"first": first, "second": second, "product": (first == second) * random.lognormal(size=6)}
        ),
        "starts": pd.DataFrame(starts, columns=["propagation", "trajectory", "horizon", "error"]),
        "training": pd.DataFrame({"step": [0, 1], "model_id": 0, "val_mse": [2.0, 1.0], "train_mse": 1.0}),
        "rollout": pd.concat([pd.DataFrame({"propagation": p, **rollout}) for p in ("mean", "tsinf")]),
        "uncertainty": pd.DataFrame(
            {"rows": ["test"], "measure": ["total_std"], "spearman": [0.5], "auroc_worst": [0.7]}
        ),
        "calibration": pd.DataFrame({"variant": ["raw"], "dimension": ["all"], "ece": [0.1]}),
        "reliability": pd.DataFrame({"variant": ["raw"], "promised": [0.5], "observed": [0.4]}),
    }
