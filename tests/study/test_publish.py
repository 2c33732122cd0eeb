"""Publishing small studies, from their cells to the README: nothing but the networks is made up."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from config import LearnConfig
from study.analysis import analyse
from study.cells import FORMAT
from study.grid import Grid
from study.publish import cell_names, main
from study.report import save_table, write_study
from study.store import CellStore
from study.tuning import Tuning

BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"
ARMS = {"a": LearnConfig(), "b": LearnConfig(probabilistic=True)}
RATES = ["arm", "dataset", "fit_lr", "val_mse", "best", "worst", "stray", "is_chosen"]


def make_study_folder(folder, results, names, horizon=5, dataset=None):
    """Writes a study as ``compare_models.py`` leaves it, cells included; without a dataset there is no report."""
    store = CellStore(folder)
    for key, result in results.items():
        store.write(f"cells/{key.arm}/{key.dataset}/split-{key.split}-seed-{key.seed}", result)
    rates = [(arm, name, 0.1, 1.0, 1.0, 1.0, 0, True) for arm in ARMS for name in names]
    horizons = pd.DataFrame({"dataset": names, "horizon": horizon, "arm": "a", "skill": 0.6})
    tuning = Tuning(pd.DataFrame(rates, columns=RATES), horizons)
    tuning.rates.to_csv(folder / "learning_rates.csv", index=False)
    tuning.horizons.to_csv(folder / "horizons.csv", index=False)
    command = f"python compare_models.py --output results/{folder.name}"
    (folder / "study.json").write_text(json.dumps({"format": FORMAT, "command": command}))
    if dataset is None:
        tables = analyse(results, tuning.horizon)
        for name in ("cells", "values", "paired"):
            save_table(tables[name], folder / f"{name}.csv")
        return
    grid = Grid(ARMS, names, range(6), [0], device="cpu", threads=1)
    write_study(folder, results, tuning, grid, dict.fromkeys(names, dataset), command)


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_study, make_cell, make_result, dataset):
    """A folder with a README and five studies that are published; the main one has one trial."""
    root = tmp_path_factory.mktemp("published")
    (root / "README.md").write_text(f"# Title\n\n{BEGIN}outdated\n{END}\nafter\n")
    results = root / "results"
    main_study = make_study(seeds=6, policies=True)
    make_study_folder(results / "confirmation", main_study, ["x"], dataset=dataset)
    trial = make_cell("a", "x", is_trial=True)
    CellStore(results / "confirmation").write(trial.name, make_result(trial))
    make_study_folder(results / "splits", make_study(seeds=1, splits=(0, 1)), ["x"])
    make_study_folder(results / "layer_norm", make_study(seeds=6), ["x"], horizon=10)
    for epochs in (10, 20):
        make_study_folder(results / f"budget_{epochs}", make_study(seeds=1), ["x"])
    publish(root)
    return root


def publish(root: Path) -> str:
    """Runs the command, and returns what the README then says."""
    assert main(["--results", str(root / "results"), "--readme", str(root / "README.md")]) == 0
    return (root / "README.md").read_text()


def test_the_section_has_the_answer_the_picks_three_figures_and_the_command(root):
    text = (root / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}")
    assert text.endswith(f"{END}\nafter\n")
    assert "outdated" not in text and "is running" not in text
    assert "**Preliminary: 12 of the 384 trainings that the protocol plans are in, none of which failed;" in text
    assert "| one step, root mean square | nRMSE | a |" in text
    for name in ("effects", "horizon", "foreseen"):
        assert f"](results/confirmation/{name}.png)" in text
    assert text.count("![") == 3
    assert "`python compare_models.py --output results/confirmation`" in text
    assert "| A plain `pnn` predicts one step worse than `dnn`. | cannot be told |" in text


def test_the_further_page_has_curves_splits_layer_normalisation_and_claims(root):
    text = (root / "results" / "further.md").read_text()
    for name in ("budget", "splits", "layer_norm"):
        assert f"]({name}.png)" in text
        assert (root / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "`python compare_models.py --output results/budget_10`; `python" in text
    assert text.index("## What was expected") < text.index("## Claims of others")
    assert "Kégl, Hurtado and Thomas 2021" in text and "Layer normalisation in the world model" in text


def test_twins_are_compared_in_pairs_at_the_horizon_of_the_main_study(root):
    twins = pd.read_csv(root / "results" / "layer_norm" / "twins.csv")
    assert set(zip(twins.arm, twins.reference, strict=True)) == {("a_ln", "a"), ("b_ln", "b")}
    rollout = twins[(twins.metric == "rollout_mean") & (twins.dataset == "x")]
    assert rollout.horizon.tolist() == [5, 5] and rollout.pairs.tolist() == [6, 6]
    assert rollout.verdict.tolist() == ["tie", "tie"]


def test_cells_are_packed_condensed_and_their_folders_stay(root):
    folder = root / "results" / "layer_norm"
    name = "cells/a/x/split-0-seed-0"
    full = CellStore(folder).read(name)
    shutil.copytree(folder, root / "clone", ignore=shutil.ignore_patterns("cells", "trials"))
    packed = CellStore(root / "clone").read(name)
    assert set(packed.tables["starts"].horizon) == {5, 10} < set(full.tables["starts"].horizon)
    assert packed.record.request == full.record.request
    names = cell_names(root / "results" / "confirmation")
    assert len(names) == 13 and any(name.startswith("trials/a/x/") for name in names)


def test_publishing_again_changes_no_byte_with_or_without_the_folders(root, tmp_path):
    def contents(place):
        return {
            p.relative_to(place): p.read_bytes() for p in place.rglob("*") if p.is_file() and "cells/" not in str(p)
        }

    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    for name in ("confirmation", "layer_norm"):  # as in a clone
        shutil.rmtree(tmp_path / "results" / name / "cells")
    publish(tmp_path)
    assert contents(tmp_path) == before


def test_without_a_confirmation_nothing_is_claimed(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(BEGIN + END)
    text = publish(tmp_path)
    assert "The confirmation is running" in text and "results/exploratory/README.md" in text
    assert not (tmp_path / "results" / "further.md").exists()


@pytest.mark.parametrize("missing", ["table", "markers", "format", "commit", "commit of a packed cell"])
def test_what_is_wrong_is_named_and_nothing_is_written(missing, root, tmp_path, capsys, make_cell, make_result):
    study, readme, cell = tmp_path / "results" / "confirmation", tmp_path / "README.md", make_cell()
    shutil.copytree(root / "results" / "confirmation", study)
    shutil.copy(root / "README.md", readme)
    said = {"table": "claims.csv does not exist", "markers": "has no lines", "format": "made by another version"}
    if missing == "table":
        (study / "claims.csv").unlink()
    elif missing == "markers":
        readme.write_text("# Title\n")
    elif missing == "format":
        (study / "study.json").write_text(json.dumps({"command": ""}))
    else:
        CellStore(study).write(cell.name, make_result(cell, commit="c0ffee+"))
        if missing == "commit of a packed cell":
            from study.store import pack

            pack(study)
    before, packed = readme.read_text(), (study / "cells.parquet").read_bytes()
    with pytest.raises(SystemExit) as ended:
        publish(tmp_path)

    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said.get(missing, f"{cell.name} were made while files differed") in error
    assert readme.read_text() == before
    assert (study / "cells.parquet").read_bytes() == packed
    assert not (tmp_path / "results" / "further.md").exists()
