"""Publishes studies: writes their numbers into README.md's section "Results", and packs their cells.

    python -m study.publish

writes between two marker comments what the folders in ``results`` have shown: the answer of ``confirmation``, with its
tables and three figures, and below it the curves over budgets (``budget_*``) and data sizes (``sizes*``) and the
answers of all other studies. Without a confirmation it says that there is none yet. Then it moves the cells of each
study from their folders into one file, its ``cells.parquet``: no command may be working on these studies meanwhile.

Cells that were made while files differed from their commit are not published: nobody could make them again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cli import CommandLine, exit_on_input_error
from reporting.page import markdown_details, markdown_figure, markdown_table, replace_section
from study.cells import read_record
from study.figures import CAPTIONS, draw_curves
from study.report import ANSWERS_INTRO, answers, by_dataset, is_unclean, rates_at_the_edge
from study.store import pack, read_packed
from study.tracker import check_study, study_command
from utils import ROOT, InputError, atomic_write

README = ROOT / "README.md"
MAIN, FIGURES = "confirmation", ("effects", "horizon", "stability")
RUNNING = (
    "The confirmation is running: its protocol is fixed, its results are not in. Until they are, this section claims "
    "nothing; what earlier studies seemed to show, and what was wrong with them, is in "
    "[results/exploratory](results/exploratory/README.md)."
)
CURVES = {
    "budget": ("fit_epochs", "epochs", "Error and likelihood against the number of epochs."),
    "sizes": ("rows", "training rows", "Error and likelihood against the number of training rows."),
}


def main(argv: list[str] | None = None) -> int:
    """Replaces the section's numbers and packs the studies."""
    args = parse_arguments(argv)
    with exit_on_input_error():
        studies = find_studies(args.results)
        for folder in studies:
            check_study(folder)
            check_origins(folder)
        is_main = bool(studies) and studies[0].name == MAIN
        parts = [main_part(studies[0], args.readme.parent)] if is_main else [RUNNING]
        parts += curve_parts(args.results, studies[is_main:], args.readme.parent)
        parts += [other_part(folder) for folder in studies[is_main:] if curve_of(folder) is None]
        try:
            replace_section(args.readme, "results", "\n\n".join(parts))
        except ValueError as error:
            raise InputError(str(error)) from None
    for folder in studies:
        pack(folder)
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandLine(
        description="Write the numbers of finished studies into README.md's section Results, and pack the cells of "
        "each study into its cells.parquet."
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results", help="folder of the studies' folders (default: results)"
    )
    parser.add_argument("--readme", type=Path, default=README, help="the file that has the section (README.md)")
    return parser.parse_args(argv)


def find_studies(results: Path) -> list[Path]:
    """Returns the folders of finished studies, the main one first."""
    finished = sorted(path.parent for path in results.glob("*/paired.csv"))
    return sorted(finished, key=lambda folder: folder.name != MAIN)


def check_origins(folder: Path) -> None:
    """Checks that every cell was made by code that a commit has.

    Raises:
        InputError: If one was not.
    """
    packed = folder / "cells.parquet"
    records = {name: result.record for name, result in read_packed(packed).items()} if packed.exists() else {}
    for path in folder.glob("*/*/*/*/cell.json"):
        records[path.parent.relative_to(folder).as_posix()] = read_record(path.parent)
    unclean = sorted(name for name, record in records.items() if is_unclean(record.origin))
    if unclean:
        shown = ", ".join(unclean[:3]) + (f" and {len(unclean) - 3} more" if len(unclean) > 3 else "")
        raise InputError(
            f"{folder}: {shown} were made while files differed from their commit; make them again from a clean checkout"
        )


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
    """Returns the answer of the main study: sentences, tables, figures, limits and origin.

    Args:
        folder: Folder of the study.
        root: Folder of the document that shows it.
    """
    shown = folder.resolve().relative_to(root.resolve())
    parts = [ANSWERS_INTRO, *answer_parts(folder)]
    parts += [markdown_figure(shown / f"{name}.png", CAPTIONS[name]) for name in FIGURES]
    parts += [
        rates_at_the_edge(read_table(folder, "sensitivity")),
        f"Everything else, failed trainings and what this does not show included: [report]({shown}/report.md). "
        f"Written by `python -m study.publish` from what `{study_command(folder)}` made.",
    ]
    return "\n\n".join(filter(None, parts))


def curve_of(folder: Path) -> str | None:
    """Returns the name of the curve that a study is a part of, if it is one."""
    return next((name for name in CURVES if folder.name.startswith(name)), None)


def curve_parts(results: Path, studies: Sequence[Path], root: Path) -> list[str]:
    """Draws the curves over settings in which studies differ, and returns the text that shows them."""
    parts = []
    for name, (setting, label, caption) in CURVES.items():
        tables = [read_table(folder, "values") for folder in studies if curve_of(folder) == name]
        if not tables:
            continue
        values = pd.concat(tables, ignore_index=True).dropna(subset=[setting])
        if name == "sizes":  # its datasets are the sizes of one
            values["dataset"] = values.dataset.str.replace(r"-\d+$", "", regex=True)
        with atomic_write(results / f"{name}.png") as file:
            file.write(draw_curves(values, setting, label))
        parts.append(markdown_figure(results.resolve().relative_to(root.resolve()) / f"{name}.png", caption))
    return parts


def other_part(folder: Path) -> str:
    """Returns the answer of a further study."""
    return "\n\n".join([f"**`{study_command(folder)}`**", *answer_parts(folder)])


def answer_parts(folder: Path) -> list[str]:
    """Returns what a study found dataset by dataset, folded away, behind the counts of it."""
    paired = read_table(folder, "paired")
    answer, single = answers(paired), by_dataset(paired)
    return [
        markdown_table(answer, answer.itertuples(index=False)),
        markdown_details("Dataset by dataset", markdown_table(single, single.itertuples(index=False))),
    ]


if __name__ == "__main__":
    sys.exit(main())
