import json
from pathlib import Path

import pandas as pd
import pytest

from study.analysis import POOLED
from study.publish import main
from study.store import CellStore

BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The tables of a study of two arms on one dataset, in the folder of a README with a section to fill."""
    folder = tmp_path / "results" / "first"
    folder.mkdir(parents=True)
    common = {"metric": "nrmse", "arm": "pnn", "reference": "dnn", "low": 1.1, "high": 1.5, "p_value": 0.01}
    rows = [
        common | {"dataset": "hopper", "ratio": 1.25, "p_holm": 0.02},
        common | {"dataset": POOLED, "ratio": 1.3, "p_holm": None},
    ]
    pd.DataFrame(rows).to_csv(folder / "paired.csv", index=False)
    rates = [("dnn", 0.001, False), ("dnn", 0.002, True), ("dnn", 0.005, False)]
    rates += [("pnn", 0.001, False), ("pnn", 0.002, False), ("pnn", 0.005, True)]
    pd.DataFrame(rates, columns=["arm", "fit_lr", "is_chosen"]).to_csv(folder / "learning_rates.csv", index=False)
    (folder / "study.json").write_text(json.dumps({"command": "python compare_models.py --seeds 5"}))
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}outdated\n{END}\nafter\n")
    return folder


def publish(study: Path, *more: str) -> str:
    """Runs the command on the README beside the results, and returns what it then says."""
    readme = study.parent.parent / "README.md"
    assert main([str(study), *more, "--readme", str(readme)]) == 0
    return readme.read_text()


def test_the_section_has_ratios_figures_rates_at_the_edge_and_the_command(study):
    text = publish(study)

    assert text.startswith(f"# Title\n\n{BEGIN}")
    assert text.endswith(f"{END}\nafter\n")
    assert "outdated" not in text
    assert "| one-step nRMSE | 1.3 [1.1, 1.5]; better on 0, worse on 1 of 1 |" in text
    assert "1.25 [1.1, 1.5] *" in text
    for name in ("horizon", "calibration", "stability"):
        assert f"](results/first/{name}.png)" in text
    assert "may lie: pnn 0.005." in text
    assert "`python compare_models.py --seeds 5`" in text


def test_publishing_again_changes_nothing(study):
    assert publish(study) == publish(study)


def test_published_studies_are_packed(study, make_cell, make_result):
    cells, store = [make_cell(), make_cell(is_trial=True)], CellStore(study)
    for cell in cells:
        store.write(cell.name, make_result(cell))
    publish(study)
    assert sorted(path.name for path in study.iterdir()) == [
        "cells.parquet",
        "learning_rates.csv",
        "paired.csv",
        "study.json",
    ]
    for cell in cells:
        assert CellStore(study).read(cell.name).record == make_result(cell).record


def test_further_studies_follow_with_their_ratios(study):
    text = publish(study, str(study))

    assert text.count("1.25 [1.1, 1.5] *") == 2
    assert text.count("horizon.png") == 1


@pytest.mark.parametrize("missing", ["study", "markers"])
def test_what_is_missing_is_named_and_nothing_is_written(study, missing, capsys, make_cell, make_result):
    readme = study.parent.parent / "README.md"
    if missing == "study":
        (study / "paired.csv").unlink()
    else:
        readme.write_text("# Title\n")
    before, cell = readme.read_text(), make_cell()
    CellStore(study).write(cell.name, make_result(cell))
    with pytest.raises(SystemExit) as ended:
        main([str(study), "--readme", str(readme)])

    assert ended.value.code == 2
    assert ("paired.csv does not exist" if missing == "study" else "has no lines") in capsys.readouterr().err
    assert readme.read_text() == before
    assert (study / cell.name).exists()
    assert not (study / "cells.parquet").exists()
