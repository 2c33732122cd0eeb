"""Validation errors with other settings than ours, those that lost included.

    python -m benchmarks.recipes_tried
    python -m benchmarks.recipes_tried --groups hopper_dnn --variants ours relu
    python -m benchmarks.recipes_tried --quick

Each variant is a file of ``configs/`` with one thing changed (two where one calls for the other), trained on the data
of ``time_to_quality.py`` with the same trajectories held out: one member for a quarter of the epochs, or for the whole
training where the question is how it ends. There is one seed, so differences of a few per cent mean nothing. Finished
variants are skipped when the command is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks import harness
from benchmarks.prepare import DATA, prepare
from config import LearnConfig, load_config
from data.sources import load_dataset
from data.trajectories import Dataset
from dynamics_model import DynamicsEnsemble
from reporting.page import markdown_table
from training.loop import train_ensemble
from training.optimisation import build_optimizer
from training.precision import reduced_epochs
from training.scores import mean_scores, score_members


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        params: Settings, as ``--params`` takes them.
        initial_scale: Factor of the hidden layers' initial weights.
        change_optimizer: Changes the optimiser; its second argument is the number of steps that it will take.
    """

    params: tuple[str, ...] = ()
    initial_scale: float = 1.0
    change_optimizer: Callable[[Optimizer, int], None] | None = None


def set_beta2(optimizer: Optimizer, steps: int) -> None:
    """Makes Adam's second moment forget ten times as fast."""
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.99)


def average_weights(optimizer: Optimizer, steps: int) -> None:
    """Replaces the last weights by their exponential moving average over some 200 steps."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    averages: list[torch.Tensor] = []
    taken = 0

    @torch.no_grad()
    def after_step(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if not averages:
            averages.extend(parameter.clone() for parameter in parameters)
        torch._foreach_lerp_(averages, parameters, 1 / 200)
        if taken == steps:
            torch._foreach_copy_(parameters, averages)

    optimizer.register_step_post_hook(after_step)


@dataclass(frozen=True)
class Group:
    """Variants that are compared with each other.

    Attributes:
        config: A file of ``configs/``.
        share: Of its epochs.
        variants: By name, ``ours`` among them.
        base: Settings of all variants, before their own.
        members: Trained for each variant; their mean is shown.
    """

    config: str
    share: float
    variants: dict[str, Variant]
    base: tuple[str, ...] = ()
    members: int = 1

    @property
    def environment(self) -> str:
        """Key of ``time_to_quality.DATA``."""
        return self.config.partition("_")[0]


GROUPS = {
    "hopper_dnn": Group(
        "hopper_dnn",
        0.25,
        {
            "ours": Variant(),
            "relu": Variant(("activation_fn=relu",)),
            "published schedule: exponential from 5e-4": Variant(("scheduler=exponential", "fit_lr=5e-4")),
            "cosine without warm-up": Variant(("scheduler=cosine",)),
            "half the peak rate": Variant(("fit_lr=4e-3",)),
            "peak rate of the whole training, 0.005": Variant(("fit_lr=5e-3",)),
            "1.5 times the peak rate": Variant(("fit_lr=1.2e-2",)),
            "batch 128": Variant(("batch_size=128",)),
            "batch 512": Variant(("batch_size=512",)),
            "batch 1024": Variant(("batch_size=1024",)),
            "layer normalisation": Variant(("layer_norm=true",)),
            "gradients clipped at 0.3": Variant(("grad_clip=0.3",)),
            "weight decay 0.01": Variant(("weight_decay=0.01",)),
            "4x200": Variant(("hidden_size=200,200,200,200",)),
            "2x512": Variant(("hidden_size=512,512",)),
            "initial weights times sqrt(3)": Variant(initial_scale=math.sqrt(3)),
            "Adam's beta2 0.99": Variant(change_optimizer=set_beta2),
            "averaged weights": Variant(change_optimizer=average_weights),
        },
        base=("reduced_precision=0", "fit_lr=8e-3"),  # so short a training needs a higher rate
    ),
    "hopper_pnn": Group(
        "hopper_pnn",
        0.25,
        {
            "ours": Variant(),
            "plain likelihood": Variant(("beta_nll=0", "beta_nll_decay=0")),
            "beta-NLL 0.5 to the end": Variant(("beta_nll=0.5", "beta_nll_decay=0")),
            "beta-NLL 1 to the end": Variant(("beta_nll=1", "beta_nll_decay=0")),
            "beta-NLL falling by half of training": Variant(("beta_nll_decay=0.5",)),
            "beta-NLL falling to the end": Variant(("beta_nll_decay=1",)),
            "twice the peak rate": Variant(("fit_lr=8e-3",)),
        },
        base=("reduced_precision=0",),
    ),
    "hopper_pnn, precision of products": Group(
        "hopper_pnn",
        1.0,
        {
            "ours": Variant(),
            "full precision": Variant(("reduced_precision=0",)),
            "rounded to the end": Variant(("reduced_precision=1",)),
        },
        members=3,
    ),
    "halfcheetah_pnn, whole training": Group(
        "halfcheetah_pnn",
        1.0,
        {
            "ours": Variant(),
            "twice the epochs": Variant(("fit_epochs=80",)),
            "twice the epochs, a quarter of the peak rate": Variant(("fit_epochs=80", "fit_lr=1e-3")),
            "a quarter of the peak rate": Variant(("fit_lr=1e-3",)),
            "4x512": Variant(("hidden_size=512,512,512,512",)),
            "4x512, a quarter of the peak rate": Variant(("hidden_size=512,512,512,512", "fit_lr=1e-3")),
            "weight decay 0.1": Variant(("weight_decay=0.1",)),
            "batch 128": Variant(("batch_size=128",)),
            "beta-NLL falling by half of training": Variant(("beta_nll_decay=0.5",)),
            "beta-NLL falling to the end": Variant(("beta_nll_decay=1",)),
            "relu": Variant(("activation_fn=relu",)),
        },
    ),
}
# Of variants that differ in their settings only, two.
QUICK_VARIANTS = ["ours", "relu", "initial weights times sqrt(3)", "Adam's beta2 0.99", "averaged weights"]


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing, then makes the table and the figure."""
    args = parse_arguments(argv)
    results = harness.open_results("recipes_tried", args.quick, is_timed=False)
    if not args.tables:
        torch.set_num_threads(args.threads)
        paths = DATA | {"hopper": args.data}
        datasets: dict[str, Dataset] = {}
        wanted = [(title, name) for title in args.groups for name in GROUPS[title].variants if name in args.variants]
        for title, name in tqdm(wanted, unit="variant"):
            group, variant = GROUPS[title], GROUPS[title].variants[name]
            path = "hopper-random-demo" if args.quick else paths[group.environment]
            dataset = datasets[path] = datasets.get(path) or load_dataset(path, quiet=True)
            key = {"group": title, "variant": name, "data": dataset.sha256[:12]}
            if results.finished(**key).empty:
                config = load_config(harness.ROOT / "configs" / f"{group.config}.yaml", (*group.base, *variant.params))
                epochs = int(config.fit_epochs * group.share)
                config = dataclasses.replace(config, ensemble_size=group.members, fit_epochs=epochs)
                if args.quick:
                    config = dataclasses.replace(config, fit_epochs=2, hidden_size=(16,), batch_size=4096)
                results.append([key | train(config, dataset, variant)])
    publish(results)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    names = list(dict.fromkeys(name for group in GROUPS.values() for name in group.variants))
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help="groups of variants (all)"
    )
    parser.add_argument("--variants", nargs="+", choices=names, metavar="NAME", help="which (all)")
    parser.add_argument("--data", default=DATA["hopper"], help=f"the hopper data ({DATA['hopper']})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (PyTorch's own choice)")
    args = parser.parse_args(argv)
    if args.quick:
        args.threads = 1  # networks this small gain nothing from a second one
    args.variants = args.variants or (QUICK_VARIANTS if args.quick else names)
    return args


def train(config: LearnConfig, dataset: Dataset, variant: Variant) -> dict[str, float | int]:
    """Trains a variant and scores the weights of its lowest validation errors.

    Returns:
        The row of the CSV, beside ``group``, ``variant`` and ``data`` (the dataset's checksum): ``epochs``,
        ``rounded_epochs``, those of them whose products rounded their operands, ``members``, and the means over
        members of ``val_mse`` and ``nll``, which is NaN where members predict points.
    """
    ensemble, rows, holdout = prepare(config, dataset)
    with torch.no_grad():
        for weight in list(ensemble.dynamics.weights)[:-1]:
            weight.mul_(variant.initial_scale)
    steps = config.fit_epochs * math.ceil(len(rows.inputs) / config.batch_size)

    def build_changed(members: DynamicsEnsemble, config: LearnConfig) -> Optimizer:
        optimizer = build_optimizer(members, config)
        if variant.change_optimizer is not None:
            variant.change_optimizer(optimizer, steps)
        return optimizer

    for _ in train_ensemble(ensemble, config, rows, holdout, score_every=None, optimizer=build_changed):
        pass
    scores = mean_scores(score_members(ensemble, rows, holdout))
    return {
        "epochs": config.fit_epochs,
        "rounded_epochs": reduced_epochs(config, is_cuda=False),
        "members": len(ensemble),
        "val_mse": scores["val_mse"],
        "nll": scores.get("nll", math.nan),
    }


# --- The tables and the figure ---


def publish(results: harness.ResultsFile) -> None:
    """Makes tables and figure."""
    rows = results.rows_to_show()
    results.publish(tables(rows), draw(rows))


def tables(rows: pd.DataFrame) -> str:
    """Returns a table per group: a line per variant, the best first, and its error as a multiple of ours."""
    parts = [
        "One seed: differences of a few per cent mean nothing. Where training is a quarter of the configuration's "
        "epochs, products do not round, and `hopper_dnn` has a peak learning rate of 0.008, which suits so short a "
        "training."
    ]
    for title, of_group in rows.groupby("group", sort=False):
        own = of_group.loc[of_group["variant"] == "ours", "val_mse"]
        lines = []
        for _, row in of_group.sort_values("val_mse").iterrows():
            ratio = f"{row['val_mse'] / own.iloc[0]:.2f}" if len(own) else "-"
            nll = "-" if math.isnan(row["nll"]) else f"{row['nll']:.2f}"
            sizes = [f"{row[name]:.0f}" for name in ("epochs", "rounded_epochs", "members")]
            lines.append([row["variant"], *sizes, f"{row['val_mse']:.5f}", ratio, nll])
        header = [title, "epochs", "of them rounded", "members", "validation MSE", "x of ours", "NLL"]
        parts.append(markdown_table(header, lines))
    return "\n\n".join(parts)


def draw(rows: pd.DataFrame) -> Figure:
    """Draws validation errors, a panel per group, a point per variant."""
    groups = list(rows.groupby("group", sort=False))
    sizes = [len(of_group) for _, of_group in groups]
    figure = harness.new_figure(columns=2, lines=1 + sum(sizes) // 10)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (title, of_group) in zip(panels, groups, strict=True):
        of_group = of_group.sort_values("val_mse", ascending=False)
        colours = ["tab:blue" if name == "ours" else "tab:grey" for name in of_group["variant"]]
        axes.hlines(range(len(of_group)), of_group["val_mse"].min(), of_group["val_mse"], color="lightgrey")
        axes.scatter(of_group["val_mse"], range(len(of_group)), color=colours, zorder=2)
        axes.set_yticks(range(len(of_group)), of_group["variant"])
        axes.set(title=title, xlabel="validation MSE", xscale="log", ylim=(-0.6, len(of_group) - 0.4))
        lowest, highest = of_group["val_mse"].min(), of_group["val_mse"].max()
        axes.set_xlim(0.97 * lowest, 1.03 * max(highest, 1.5 * lowest))  # small differences look small
        axes.grid(alpha=0.3, axis="x", which="both")
    return figure


if __name__ == "__main__":
    main()
