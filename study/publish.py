"""Publishes studies: writes what they have shown into README.md and results/further.md, and packs their cells.

    python -m study.publish

writes between two marker comments of README.md's section "Results" the answer of the study in ``results/confirmation``:
a paragraph, which to pick for what, three figures, the command, and which claims of earlier studies fell. All of it is
composed by rule; where trainings are missing, it says so. ``further.md`` has what the protocol expected, the claims of
others, and how far the answer reaches: curves over epochs (folders ``budget_*``) and training rows (``sizes``), splits
(``splits``), and layer normalisation (``layer_norm``).

Then it writes the condensed cells of each study into its ``cells.parquet``, which git keeps; their folders stay. No
command may be working on these studies meanwhile. Cells that were made while files differed from their commit are not
published: nobody could make them again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from cli import CommandLine, exit_on_input_error
from reporting.page import markdown_figure, markdown_table, replace_section
from study.analysis import tables_of_claims, twins_table
from study.answer import PICKS_RULE, answer_text, first_arm, picks_table, primary_pairs
from study.cells import CellKey, Result, read_record, short_name
from study.condensed import condense
from study.figures import CAPTIONS, draw_curves, draw_splits, draw_twins
from study.report import CLAIMS_INTRO, is_unclean, rates_at_the_edge, save_table
from study.store import CellStore, pack, read_packed
from study.tracker import check_study, study_command
from study.verdicts import judge_claims, summarise_claims
from utils import ROOT, InputError, atomic_write

README = ROOT / "README.md"
MAIN, FURTHER = "confirmation", "further.md"
SPLITS, TWINS = "splits", "layer_norm"
FIGURES = ("effects", "horizon", "foreseen")
RUNNING = (
    "The confirmation is running: its protocol is fixed, its results are not in. Until they are, this section claims "
    "nothing; what earlier studies seemed to show, and what was wrong with them, is in "
    "[results/exploratory](results/exploratory/README.md)."
)
CURVES = {
    "budget": ("fit_epochs", "epochs", "Error and likelihood against the number of epochs, with 95 % intervals."),
    "sizes": ("rows", "training rows", "Error and likelihood against the number of training rows."),
}
SPLITS_CAPTION = "The same on three splits into trajectories: lines that cross change the order of arms."
TWINS_CAPTION = (
    "What layer normalisation changes: each arm with it against the same arm without it, in pairs of the same seed. "
    "Fewer than six pairs give no interval."
)


def main(argv: list[str] | None = None) -> int:
    """Writes the section and the further page, and packs the studies."""
    args = parse_arguments(argv)
    with exit_on_input_error():
        studies = find_studies(args.results)
        for folder in studies.values():
            check_study(folder)
            check_origins(folder)
        kept = {name: kept_horizons(folder, studies.get(MAIN)) for name, folder in studies.items()}
        section = main_part(studies[MAIN], args.readme.parent) if MAIN in studies else RUNNING
        further = further_parts(args.results, studies, kept)
        try:
            replace_section(args.readme, "results", section)
        except ValueError as error:
            raise InputError(str(error)) from None
        if further:
            with atomic_write(args.results / FURTHER, "w") as file:
                file.write("\n\n".join(["# How far the answer reaches", *further]) + "\n")
    for name, folder in studies.items():
        pack_condensed(folder, kept[name])
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandLine(
        description="Write what finished studies have shown into README.md's section Results and results/further.md, "
        "and the cells of each study, condensed, into its cells.parquet."
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results", help="folder of the studies' folders (default: results)"
    )
    parser.add_argument("--readme", type=Path, default=README, help="the file that has the section (README.md)")
    return parser.parse_args(argv)


# --- Studies and their cells ---


def find_studies(results: Path) -> dict[str, Path]:
    """Returns the folders of finished studies by name."""
    return {path.parent.name: path.parent for path in sorted(results.glob("*/paired.csv"))}


def kept_horizons(folder: Path, main: Path | None) -> dict[str, set[int]]:
    """Returns the horizons that the cells of a study keep, by dataset: their own, and that of the main study."""
    tables = [read_table(place, "horizons") for place in (folder, main) if place is not None]
    found = pd.concat(tables)
    return {dataset: set(rows.horizon) for dataset, rows in found.groupby("dataset")}


def cell_names(folder: Path) -> list[str]:
    """Returns the names of all cells of a study, trials included."""
    names = {path.parent.relative_to(folder).as_posix() for path in folder.glob("*/*/*/*/cell.json")}
    packed = folder / "cells.parquet"
    return sorted(names | set(read_packed(packed) if packed.exists() else ()))


def read_cells(folder: Path, horizons: Mapping[str, set[int]]) -> dict[CellKey, Result]:
    """Reads all cells of a study but the trials, condensed."""
    store, results = CellStore(folder), {}
    for name in cell_names(folder):
        if name.startswith("cells/"):
            result = store.read(name)
            request = result.record.request
            key = CellKey(request.arm, short_name(request.dataset), request.config.seed, request.config.split_seed)
            results[key] = condense(result, horizons[key.dataset])
    return results


def pack_condensed(folder: Path, horizons: Mapping[str, set[int]]) -> None:
    """Writes the condensed cells of a study into its ``cells.parquet``; the folders of cells stay as they are."""
    if not any(folder.glob("*/*/*/*/cell.json")):
        return
    store = CellStore(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pack.") as scratch:
        condensed = CellStore(Path(scratch))
        for name in cell_names(folder):
            result = store.read(name)
            condensed.write(name, condense(result, horizons[short_name(result.record.request.dataset)]))
        pack(condensed.folder)
        (condensed.folder / "cells.parquet").replace(folder / "cells.parquet")


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


# --- The section of the README ---


def main_part(folder: Path, root: Path) -> str:
    """Returns the answer of the main study: paragraph, table, figures, command, and claims that fell.

    Args:
        folder: Folder of the study.
        root: Folder of the document that shows it.
    """
    shown = folder.resolve().relative_to(root.resolve())
    pairs, claims = primary_pairs(read_table(folder, "paired"), values_paired(folder)), read_table(folder, "claims")
    picks, earlier = picks_table(pairs), exploratory_table(claims)
    parts = [answer_text(pairs, claims, read_table(folder, "extent"))]
    parts += ["**Which to pick for what**", markdown_table(picks, picks.itertuples(index=False))]
    parts += [PICKS_RULE.format(reference=first_arm(pairs))]
    parts += [
        markdown_figure(shown / f"{name}.png", CAPTIONS[name]) for name in FIGURES if (folder / f"{name}.png").exists()
    ]
    parts += [rates_at_the_edge(read_table(folder, "sensitivity"))]
    parts += ["**What earlier studies seemed to show**", markdown_table(earlier, earlier.itertuples(index=False))]
    parts.append(
        f"Everything else, failed trainings and what this does not show included: [report]({shown}/report.md). What "
        "was expected, what others have claimed, other budgets, data sizes, splits and layer normalisation: "
        f"[further]({shown.parent}/{FURTHER}). Written by `python -m study.publish` from what "
        f"`{study_command(folder)}` made."
    )
    return "\n\n".join(filter(None, parts))


def values_paired(folder: Path) -> pd.DataFrame | None:
    """Reads the comparisons of policies' values; None where no policy was evaluated."""
    return read_table(folder, "policies_paired") if (folder / "policies_paired.csv").exists() else None


def exploratory_table(claims: pd.DataFrame) -> pd.DataFrame:
    """Says what became of the claims of earlier studies, those that fell first.

    Args:
        claims: Table of ``verdicts.judge_claims``.

    Returns:
        claim, verdict, for it, against it, undecided (how many intervals), against it on (datasets).
    """
    summary = summarise_claims(claims[claims.group == "exploratory"])
    said = {"disagree": "fell", "cannot tell": "cannot be told", "agree": "stands"}
    summary = summary.assign(verdict=pd.Categorical(summary.verdict.map(said), list(said.values())))
    return _shown(summary.sort_values("verdict", kind="stable").astype({"verdict": str}))


def _shown(summary: pd.DataFrame) -> pd.DataFrame:
    names = {"holds": "for it", "against": "against it", "open": "undecided", "against_on": "against it on"}
    table = summary[["claim", "verdict", *names]].rename(columns=names)
    return table.assign(**{"against it on": table["against it on"].replace("", "-")})


# --- The further page ---


def further_parts(results: Path, studies: Mapping[str, Path], kept: Mapping[str, Mapping[str, set[int]]]) -> list[str]:
    """Draws the figures of the further page, and returns its paragraphs.

    Args:
        results: Folder of the page.
        studies: Folders of the studies by name.
        kept: Horizons that the cells of each keep.
    """
    parts = curve_parts(results, studies)
    if SPLITS in studies:
        _write(results / "splits.png", draw_splits(read_table(studies[SPLITS], "cells")))
        parts += _figure_parts("Splits", "splits", SPLITS_CAPTION, [studies[SPLITS]])
    claims = read_table(studies[MAIN], "claims") if MAIN in studies else None
    if MAIN in studies and TWINS in studies:
        cells, twins = (read_cells(studies[name], kept[name]) for name in (MAIN, TWINS))
        compared = twins_table(cells, twins, read_table(studies[MAIN], "horizons").set_index("dataset").horizon)
        save_table(compared, studies[TWINS] / "twins.csv")
        _write(results / "layer_norm.png", draw_twins(compared))
        parts += _figure_parts("Layer normalisation", "layer_norm", TWINS_CAPTION, [studies[TWINS]])
        paired = pd.concat([read_table(studies[MAIN], "paired"), compared], ignore_index=True)
        policies = {path.stem: pd.read_csv(path) for path in studies[MAIN].glob("policies*.csv")}
        claims = judge_claims(tables_of_claims(cells, paired, policies))
    return parts + (claims_parts(claims) if claims is not None else [])


def curve_parts(results: Path, studies: Mapping[str, Path]) -> list[str]:
    """Draws the curves over settings in which studies differ, and returns the text that shows them."""
    parts = []
    for name, (setting, label, caption) in CURVES.items():
        folders = [folder for study, folder in studies.items() if study.startswith(name)]
        if not folders:
            continue
        values = pd.concat([read_table(folder, "values") for folder in folders], ignore_index=True)
        values = values.dropna(subset=[setting])
        if name == "sizes":  # its datasets are the sizes of one
            values["dataset"] = values.dataset.str.replace(r"-\d+$", "", regex=True)
        _write(results / f"{name}.png", draw_curves(values, setting, label))
        parts += _figure_parts(label.capitalize(), name, caption, folders)
    return parts


def claims_parts(claims: pd.DataFrame) -> list[str]:
    """Returns what became of the protocol's expectations and of the claims of others."""
    expected = _shown(summarise_claims(claims[claims.group == "expected"]))
    others = claims[claims.group == "others"]
    columns = ["claim", "source", "setting", "measure", "holds", "against", "open", "verdict"]
    return [
        "## What was expected",
        "Counted are the intervals of all parts of a claim on all its datasets.",
        markdown_table(expected, expected.itertuples(index=False)),
        "## Claims of others",
        CLAIMS_INTRO,
        markdown_table(columns, others[columns].itertuples(index=False)),
    ]


def _figure_parts(title: str, name: str, caption: str, folders: Sequence[Path]) -> list[str]:
    commands = "; ".join(f"`{study_command(folder)}`" for folder in folders)
    return [f"## {title}", markdown_figure(Path(f"{name}.png"), caption), f"From what these commands made: {commands}"]


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


if __name__ == "__main__":
    sys.exit(main())
