"""What tests of the benchmarks share: quick trials, published tables made again, results that are still empty."""

import importlib
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.harness import ResultsFile

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def read_section(folder, name):
    return (folder / "README.md").read_text().partition(f"<!-- begin {name} -->")[2].partition("<!-- end")[0]


@pytest.fixture
def check_quick_trial(tmp_path, monkeypatch):
    """Returns a function that checks that ``--quick`` measures, draws and leaves what is published alone.

    It returns the folder with what the trial has written.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no://store")  # not to be used

    def check(name):
        files = [PUBLISHED / "README.md", PUBLISHED / "results" / f"{name}.csv", PUBLISHED / "plots" / f"{name}.png"]
        before = [path.read_bytes() for path in files]
        importlib.import_module(f"benchmarks.{name}").main(["--quick"])
        (folder,) = tmp_path.glob(f"bench-{name}-*")
        assert set(pd.read_csv(folder / "results" / f"{name}.csv")) == set(pd.read_csv(files[1]))
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "| --- |" in read_section(folder, name)
        assert read_section(folder, name) != read_section(PUBLISHED, name)
        assert before == [path.read_bytes() for path in files]
        return folder

    return check


@pytest.fixture
def check_published(tmp_path):
    """Returns a function that checks that the published section of README.md is made of the published results.

    It takes the benchmark's ``publish``, and the names of its results files, each with whether its rows are timed.
    """

    def check(publish, **files):
        for part in ("results", "plots"):
            shutil.copytree(PUBLISHED / part, tmp_path / part)
        name = next(iter(files))
        (tmp_path / "README.md").write_text(f"<!-- begin {name} -->\n<!-- end {name} -->\n")
        publish(*(ResultsFile(file, tmp_path, is_timed) for file, is_timed in files.items()))
        assert read_section(tmp_path, name) == read_section(PUBLISHED, name)

    return check


@pytest.fixture
def results(tmp_path):
    """Results of a benchmark called ``speed``, which has measured nothing yet, with a README that has its section."""
    (tmp_path / "README.md").write_text("before\n<!-- begin speed -->\nold\n<!-- end speed -->\nafter\n")
    return ResultsFile("speed", tmp_path)
