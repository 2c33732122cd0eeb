"""Writes what the project's README says of speed, from the other benchmarks' results; measures nothing.

    python -m benchmarks.headline

Minutes are those of the machine that timed epochs last; steps are shown for every machine.
"""

from __future__ import annotations

import pandas as pd

from benchmarks import harness, step_throughput, time_to_quality
from cli import CommandLine
from reporting.page import markdown_table, replace_section

STEPS = (("probabilistic", "4x200"), ("deterministic", "4x256"))
ARMS = {
    "full precision": "ours in full precision",
    "plain": "loop over members",
    "plain, rounded": "loop, rounded",
    "mbrl": "mbrl-lib",
    "mbrl, rounded": "mbrl-lib, rounded",
    "jax": "JAX, vmap and scan",
}


def main(argv: list[str] | None = None) -> None:
    """Replaces the section."""
    CommandLine(description=__doc__.split("\n\n")[0]).parse_args(argv)
    text = section()
    replace_section(harness.ROOT / "README.md", "speed", text)
    print(text)


def section() -> str:
    """Returns the section: texts, tables and the figure."""
    quality = harness.ResultsFile("time_to_quality", is_timed=False).rows_to_show()
    timed = harness.ResultsFile("epoch_times").rows_to_show()
    return "\n\n".join(
        [
            "Written by `python -m benchmarks.headline`. "
            "Wall time of 7 members until they reach the best validation error of the published recipe's whole "
            f"schedule, on {timed['machine'].iloc[-1].partition(' (')[0]}; for probabilistic ensembles, also until "
            "they reach the likelihood of the same weights. Medians over seeds, and range. x: how many times as long "
            "the whole published schedule takes; in brackets, the schedule up to its best epoch.",
            quality_table(time_to_quality.with_seconds(quality, timed)),
            "![Validation error against wall time](benchmarks/plots/time_to_quality.png)",
            "Time of one optimiser step of 7 members (hopper sizes, batch 256, 2 threads). x: the others' time as a "
            "multiple of it. Floor: what the step's float32 matrix products and the optimiser's memory traffic take at "
            "the machine's full speed. On processors with AMX, products round their operands in the first 80 % of "
            "training (`reduced_precision`; 0 never rounds): ours is then such a step, and a step of the last 20 % is "
            "shown beside it, as ours in full precision. The others compute in float32, or, rounded, with PyTorch's "
            "own switch for products that round.",
            *precision_sentence(harness.ResultsFile("recipes_tried", is_timed=False).rows_to_show()),
            step_table(harness.ResultsFile("step_throughput")),
        ]
    )


def quality_table(rows: pd.DataFrame) -> str:
    """Returns when ours reaches the published recipe's best errors.

    A line per environment and kind, for probabilistic members one per target: minutes of the whole published schedule,
    seeds of ours, minutes until ours is there, the former as a multiple of the latter, and the lowest validation error
    of each.

    Args:
        rows: What ``time_to_quality.with_seconds`` returns.
    """
    lines = []
    for name, of_name in rows.groupby("name", sort=False):
        published = of_name[of_name["recipe"] == f"published/{name}"]
        ours = time_to_quality.finished(of_name[of_name["recipe"] == f"ours/{name}"])
        if ours.empty or published.empty:
            continue
        errors = published["val_mse"].min(), ours.groupby("seed")["kept_mse"].last().median()
        minutes, seeds = f"{published['seconds'].iloc[-1] / 60:.0f}", str(ours["seed"].nunique())
        for goal, *reached in time_to_quality.target_lines(published, ours):
            if goal.startswith(("1 x MSE", "both")):
                aim = "MSE and NLL" if goal.startswith("both") else "MSE"
                lines.append([name, aim, minutes, seeds, *reached, *(f"{error:.5f}" for error in errors)])
    header = [
        "",
        "target",
        "published, minutes",
        "seeds of ours",
        "ours, minutes",
        "x",
        "published, validation MSE",
        "ours, at its end",
    ]
    return markdown_table(header, lines)


def precision_sentence(rows: pd.DataFrame) -> list[str]:
    """Says what rounding costs, in one sentence; none until all trainings that it compares have come to their end."""
    of_group = rows[rows["group"] == "hopper_pnn, precision of products"].drop_duplicates("variant", keep="last")
    of_group = of_group.sort_values("rounded_epochs")
    if len(of_group) < 3 or not of_group["rounded_epochs"].is_unique:
        return []
    parts = [
        f"{row.rounded_epochs:.0f} of {row.epochs} epochs rounded, {row.val_mse:.5f} and {row.nll:.2f}"
        for row in of_group.itertuples()
    ]
    members = of_group["members"].iloc[0]
    return [f"What rounding costs: MSE and NLL of {members} members of hopper_pnn are, with {'; '.join(parts)}."]


def step_table(results: harness.ResultsFile) -> str:
    """Returns a line per machine and kind: milliseconds of ours, ours / floor, each arm as a multiple of ours."""
    lines = []
    for machine in results.machines():
        summary = harness.compare(results.rows(machine), step_throughput.CASE, base="ours").sort_index()
        for kind, hidden in STEPS:
            case = summary.loc[kind, hidden, 256, "hopper", 2]
            ratios = [f"{case['ratio'][arm]:.2f}" if arm in case.index else "-" for arm in ARMS]
            own = f"{case['median']['ours']:.3g}", f"{1 / case['ratio']['floor']:.2f}"
            lines.append([machine.partition(" (")[0], f"{kind} {hidden}", *own, *ratios])
    header = ["processor", "", "ours, ms", "ours / floor", *(f"{name}, x" for name in ARMS.values())]
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
