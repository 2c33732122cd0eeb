import json
from pathlib import Path

import pandas as pd
import pytest

from study.analysis import POOLED
from study.cells import FORMAT
from study.publish import main
from study.store import CellStore

BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"


@pytest.fixture
def make_folder(tmp_path: Path):
    """Returns a function that makes the tables of a study, in the folder of a README with a section to fill."""
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}outdated\n{END}\nafter\n")
    (tmp_path / "results").mkdir()

    def make(name: str, epochs: int = 30) -> Path:
        folder = tmp_path / "results" / name
        folder.mkdir()
        common = {"metric": "nrmse", "arm": "pnn", "reference": "dnn", "low": 1.1, "high": 1.5, "verdict": "worse"}
        rows = [
            common | {"dataset": "hopper", "effect": 1.25},
            common | {"dataset": POOLED, "effect": 1.3, "least": 1.25, "most": 1.25},
        ]
        pd.DataFrame(rows).to_csv(folder / "paired.csv", index=False)
        edge = {"arm": ["pnn"], "dataset": ["hopper"], "fit_lr": [0.005], "is_edge": [True]}
        pd.DataFrame(edge).to_csv(folder / "sensitivity.csv", index=False)
        values = {"metric": ["nrmse"], "dataset": ["hopper"], "arm": ["pnn"], "fit_epochs": [epochs], "rows": [None]}
        pd.DataFrame(values | {"value": [1.0], "low": [0.9], "high": [1.1]}).to_csv(folder / "values.csv", index=False)
        study = {"format": FORMAT, "command": f"python compare_models.py --output {name}"}
        (folder / "study.json").write_text(json.dumps(study))
        return folder

    return make


def publish(root: Path) -> str:
    """Runs the command, and returns what the README then says."""
    assert main(["--results", str(root / "results"), "--readme", str(root / "README.md")]) == 0
    return (root / "README.md").read_text()


def test_the_section_has_answers_figures_rates_at_the_edge_and_the_command(tmp_path, make_folder):
    make_folder("confirmation")
    text = publish(tmp_path)

    assert text.startswith(f"# Title\n\n{BEGIN}")
    assert text.endswith(f"{END}\nafter\n")
    assert "outdated" not in text and "is running" not in text
    assert "| nRMSE | worse 1; 1.3 (1.25 to 1.25) |" in text
    assert "1.25 [1.1, 1.5] worse" in text
    for name in ("effects", "horizon", "stability"):
        assert f"](results/confirmation/{name}.png)" in text
    assert "may lie: pnn on hopper 0.005." in text
    assert "`python compare_models.py --output confirmation`" in text
    assert publish(tmp_path) == text


def test_without_a_confirmation_nothing_is_claimed(tmp_path, make_folder):
    text = publish(tmp_path)
    assert "The confirmation is running" in text and "results/exploratory/README.md" in text
    assert "nRMSE" not in text


def test_further_studies_follow_and_budgets_make_a_curve(tmp_path, make_folder):
    for name, epochs in (("layer_norm", 30), ("confirmation", 30), ("budget_15", 15), ("budget_60", 60)):
        make_folder(name, epochs)
    text = publish(tmp_path)
    assert text.count("1.25 [1.1, 1.5] worse") == 2  # those of the budgets are in the figure
    assert text.index("--output confirmation") < text.index("--output layer_norm")
    assert "](results/budget.png)" in text
    assert (tmp_path / "results" / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_published_studies_are_packed(tmp_path, make_folder, make_cell, make_result):
    study = make_folder("confirmation")
    cells, store = [make_cell(), make_cell(is_trial=True)], CellStore(study)
    for cell in cells:
        store.write(cell.name, make_result(cell))
    publish(tmp_path)
    assert not (study / "cells").exists() and not (study / "trials").exists()
    for cell in cells:
        assert CellStore(study).read(cell.name).record == make_result(cell).record
    publish(tmp_path)


@pytest.mark.parametrize("missing", ["table", "markers", "format", "commit", "commit of a packed cell"])
def test_what_is_wrong_is_named_and_nothing_is_written(missing, tmp_path, make_folder, capsys, make_cell, make_result):
    study, readme, cell = make_folder("confirmation"), tmp_path / "README.md", make_cell()
    unclean = missing.startswith("commit")
    CellStore(study).write(cell.name, make_result(cell, commit="c0ffee+" if unclean else "c0ffee"))
    said = {"table": "sensitivity.csv does not exist", "markers": "has no lines", "format": "made by another version"}
    if missing == "table":
        (study / "sensitivity.csv").unlink()
    elif missing == "markers":
        readme.write_text("# Title\n")
    elif missing == "format":
        (study / "study.json").write_text(json.dumps({"command": ""}))
    elif missing == "commit of a packed cell":
        from study.store import pack

        pack(study)
    before = readme.read_text()
    with pytest.raises(SystemExit) as ended:
        publish(tmp_path)

    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said.get(missing, f"{cell.name} were made while files differed") in error
    assert readme.read_text() == before
    assert (study / cell.name).exists() == (missing != "commit of a packed cell")
