"""Writes the numbers of README.md's section "Results" from the tables of the published studies.

    python -m study.publish results/tier1 results/tier2_doubled

puts, between two marker comments, the answer of the first study with its table and three figures, and below it the
tables of every other study that there is. What ``make study`` has made is published by ``make results``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from cli import CommandLine, exit_on_input_error
from reporting.page import replace_section
from study.analysis import POOLED
from study.report import ANSWERS_INTRO, CAPTIONS, answers, markdown_table, rates_at_the_edge, side_by_side
from utils import InputError

README = Path(__file__).resolve().parent.parent / "README.md"
FIGURES = ("horizon", "calibration", "stability")


def main(argv: list[str] | None = None) -> int:
    """Replaces the section's numbers."""
    args = parse_arguments(argv)
    with exit_on_input_error():
        main_study, *others = args.studies
        parts = [main_part(main_study, args.readme.parent), *(other_part(folder) for folder in others)]
        try:
            replace_section(args.readme, "results", "\n\n".join(parts))
        except ValueError as error:
            raise InputError(str(error)) from None
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandLine(description="Write the numbers of README.md's section Results from studies' tables.")
    parser.add_argument(
        "studies", nargs="+", type=Path, help="folders that compare_models.py wrote, the main one first"
    )
    parser.add_argument("--readme", type=Path, default=README, help="the file that has the section (README.md)")
    return parser.parse_args(argv)


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """Reads a table of a finished study.

    Raises:
        InputError: If there is none.
    """
    path = folder / f"{name}.csv"
    if not path.exists():
        raise InputError(f"{path} does not exist; expected the folder of a study that compare_models.py has finished")
    return pd.read_csv(path)


def main_part(folder: Path, root: Path) -> str:
    """Returns the answer of the main study: sentences, table, figures, limits and origin."""
    paired = read_table(folder, "paired")
    shown = folder.resolve().relative_to(root.resolve())
    figures = [f"![{name}]({shown / f'{name}.png'})\n\n{CAPTIONS[name]}" for name in FIGURES]
    edge = rates_at_the_edge(read_table(folder, "learning_rates"))
    return "\n\n".join(
        [
            ANSWERS_INTRO,
            markdown_table(answers(paired)),
            by_dataset(paired),
            *figures,
            *([edge] if edge else []),
            f"Everything else, failed trainings and what this does not show included: [report]({shown}/report.md). "
            f"Written by `python -m study.publish` from what `{command(folder)}` made.",
        ]
    )


def other_part(folder: Path) -> str:
    """Returns the answer of a further study."""
    paired = read_table(folder, "paired")
    return f"**`{command(folder)}`**\n\n{markdown_table(answers(paired))}\n\n{by_dataset(paired)}"


def by_dataset(paired: pd.DataFrame) -> str:
    """Returns ratios with their intervals, folded away: a line per metric and dataset, a column per pair of arms."""
    ratios = side_by_side(paired[paired.dataset != POOLED], "ratio", paired.arm + " / " + paired.reference)
    return f"<details><summary>Dataset by dataset</summary>\n\n{markdown_table(ratios)}\n\n</details>"


def command(folder: Path) -> str:
    """Returns the command that made a study."""
    return json.loads((folder / "study.json").read_text(encoding="utf-8"))["command"]


if __name__ == "__main__":
    sys.exit(main())
