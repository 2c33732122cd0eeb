import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "benchmarks"


@pytest.mark.parametrize(
    "name", ["around_training", "prediction", "recipes_tried", "step_throughput", "time_to_quality"]
)
def test_a_quick_trial_measures_draws_and_leaves_what_is_published_alone(name, tmp_path):
    published = [PUBLISHED / "README.md", PUBLISHED / "results" / f"{name}.csv", PUBLISHED / "plots" / f"{name}.png"]
    before = [path.read_bytes() for path in published]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob(f"bench-{name}-*")
    assert (folder / "results" / f"{name}.csv").exists()
    assert (folder / "plots" / f"{name}.png").exists()
    _, _, written = (folder / "README.md").read_text().partition(f"<!-- begin {name} -->")
    assert "| --- |" in written.partition("<!-- end")[0]
    assert before == [path.read_bytes() for path in published]


@pytest.mark.parametrize("arguments", [["--data", "walker=x"], ["--recipes", "ours/ant_dnn"]])
def test_a_wrong_flag_is_one_line_and_exit_code_two(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.time_to_quality", *arguments], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert "error" in done.stderr
