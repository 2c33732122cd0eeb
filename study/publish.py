"""Publishes studies: writes their numbers into README.md's section "Results", and packs their cells.

    python -m study.publish results/tier1 results/tier2_doubled

writes between two marker comments the answer of the first study, with its table and three figures, and below it the
tables of every further study. Then it moves the cells of each study from their folders into one file, its
``cells.parquet``: no command may be working on these studies meanwhile. ``make results`` publishes in this way what
``make study`` has made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from cli import CommandLine, exit_on_input_error
from reporting.page import markdown_details, markdown_figure, markdown_table, replace_section
from study.analysis import POOLED
from study.figures import CAPTIONS
from study.report import ANSWERS_INTRO, answers, rates_at_the_edge, side_by_side
from study.store import pack
from study.tracker import study_command
from utils import ROOT, InputError

README = ROOT / "README.md"
FIGURES = ("horizon", "calibration", "stability")


def main(argv: list[str] | None = None) -> int:
    """Replaces the section's numbers and packs the studies."""
    args = parse_arguments(argv)
    with exit_on_input_error():
        main_study, *others = args.studies
        parts = [main_part(main_study, args.readme.parent), *(other_part(folder) for folder in others)]
        try:
            replace_section(args.readme, "results", "\n\n".join(parts))
        except ValueError as error:
            raise InputError(str(error)) from None
    for folder in args.studies:
        pack(folder)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandLine(
        description="Write the numbers of studies into README.md's section Results, and pack the cells of each study "
        "into its cells.parquet."
    )
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
    """Returns the answer of the main study: sentences, table, figures, limits and origin.

    Args:
        folder: Folder of the study.
        root: Folder of the document that shows it.
    """
    shown = folder.resolve().relative_to(root.resolve())
    parts = [ANSWERS_INTRO, *answer_parts(folder)]
    parts += [markdown_figure(shown / f"{name}.png", CAPTIONS[name]) for name in FIGURES]
    parts += [
        rates_at_the_edge(read_table(folder, "learning_rates")),
        f"Everything else, failed trainings and what this does not show included: [report]({shown}/report.md). "
        f"Written by `python -m study.publish` from what `{study_command(folder)}` made.",
    ]
    return "\n\n".join(filter(None, parts))


def other_part(folder: Path) -> str:
    """Returns the answer of a further study."""
    return "\n\n".join([f"**`{study_command(folder)}`**", *answer_parts(folder)])


def answer_parts(folder: Path) -> list[str]:
    """Returns the table of a study's answer and, folded away, its ratios dataset by dataset."""
    paired = read_table(folder, "paired")
    answer = answers(paired)
    ratios = side_by_side(paired[paired.dataset != POOLED], "ratio", paired.arm + " / " + paired.reference)
    by_dataset = markdown_table(ratios, ratios.itertuples(index=False))
    return [markdown_table(answer, answer.itertuples(index=False)), markdown_details("Dataset by dataset", by_dataset)]


if __name__ == "__main__":
    sys.exit(main())
