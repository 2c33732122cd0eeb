"""What other settings than ours give: validation error of one member at equal epochs, what lost included.

    python -m benchmarks.recipes_tried
    python -m benchmarks.recipes_tried --kind dnn --variants ours relu
    python -m benchmarks.recipes_tried --quick

Each variant is ``configs/hopper_dnn.yaml`` or ``configs/hopper_pnn.yaml`` with a quarter of its epochs and one thing
changed, trained on the hopper data of ``time_to_quality.py`` with the same trajectories held out. Deterministic ones
have a peak rate of 0.008, which so short a training wants. One seed: differences of a few per cent say nothing.
Finished variants are skipped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import member_threads
from benchmarks import harness
from benchmarks.time_to_quality import DATA, Run
from config import load_config
from dataset import load_dataset
from learn_model import score_members, train_ensemble
from tracking import NullTracker

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        params: Settings, as ``--params`` takes them.
        initial_scale: Factor of the hidden layers' initial weights.
        on_optimizer: Changes the optimiser; gets the number of steps, too.
    """

    params: tuple[str, ...] = ()
    initial_scale: float = 1.0
    on_optimizer: Callable[[Optimizer, int], None] | None = None


def set_beta2(optimizer: Optimizer, steps: int) -> None:
    """Lets Adam's second moment forget ten times as fast."""
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.99)


def average_weights(optimizer: Optimizer, steps: int) -> None:
    """Ends with the exponential moving average of the weights, over some 200 steps, rather than with the last ones."""
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


BASE = {"dnn": ("fit_lr=8e-3",), "pnn": ()}  # before a variant's own settings
VARIANTS = {
    "dnn": {
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
        "Adam's beta2 0.99": Variant(on_optimizer=set_beta2),
        "averaged weights": Variant(on_optimizer=average_weights),
    },
    "pnn": {
        "ours": Variant(),
        "plain likelihood": Variant(("beta_nll=0", "beta_nll_decay=0")),
        "beta-NLL 0.5 to the end": Variant(("beta_nll=0.5", "beta_nll_decay=0")),
        "beta-NLL 1 to the end": Variant(("beta_nll=1", "beta_nll_decay=0")),
        "beta-NLL falling by half of training": Variant(("beta_nll_decay=0.5",)),
        "beta-NLL falling to the end": Variant(("beta_nll_decay=1",)),
        "twice the peak rate": Variant(("fit_lr=8e-3",)),
    },
}


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing, then draws the table and the figure."""
    args = parse_arguments(argv)
    study = harness.open_study("recipes_tried", args.quick, is_timed=False)
    if not args.tables:
        torch.set_num_threads(args.threads)
        wanted = [(kind, name) for kind in args.kind for name in VARIANTS[kind] if name in args.variants]
        dataset = load_dataset("hopper-random-demo" if args.quick else args.data, quiet=True)
        for kind, name in tqdm(wanted, unit="variant"):
            key = {"kind": kind, "variant": name, "data": dataset.sha256[:12]}
            if study.finished(**key).empty:
                params = (*BASE[kind], *VARIANTS[kind][name].params)
                config = load_config(harness.ROOT / "configs" / f"hopper_{kind}.yaml", params)
                config = dataclasses.replace(config, ensemble_size=1, fit_epochs=config.fit_epochs // 4)
                if args.quick:
                    config = dataclasses.replace(config, fit_epochs=2, hidden_size=(16,), batch_size=512)
                study.append([key | train(Run(name, config, dataset), VARIANTS[kind][name])])
    rows = study.shown()
    study.save_figure(figure(rows))
    study.write_table(table(rows))


def parse_arguments(argv: list[str] | None) -> Any:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    names = list(dict.fromkeys(name for variants in VARIANTS.values() for name in variants))
    parser.add_argument("--kind", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="kinds of ensemble (all)")
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME", help="which (all)")
    parser.add_argument("--data", default=DATA["hopper"], help=f"the hopper data ({DATA['hopper']})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (PyTorch's own choice)")
    return parser.parse_args(argv)


def train(run: Run, variant: Variant) -> dict[str, float | int]:
    """Trains one member and scores the weights of its lowest validation error."""
    ensemble, rows, holdout = run.rows
    with torch.no_grad():
        for weight in list(ensemble.network.dynamics.weights)[:-1]:
            weight.mul_(variant.initial_scale)
    steps = run.config.fit_epochs * math.ceil(len(rows.inputs) / run.config.batch_size)
    with changed_optimizer(variant, steps):
        train_ensemble(ensemble, run.config, rows, holdout, NullTracker())
    (score,) = score_members(ensemble, rows, holdout)
    return {"epochs": run.config.fit_epochs, "val_mse": score["val_mse"], "nll": score["nll"]}


@contextmanager
def changed_optimizer(variant: Variant, steps: int) -> Iterator[None]:
    """Has the training loop build its optimiser with the variant's change."""
    build = member_threads.build_optimizer

    def build_changed(*arguments: Any) -> Optimizer:
        optimizer = build(*arguments)
        if variant.on_optimizer is not None:
            variant.on_optimizer(optimizer, steps)
        return optimizer

    member_threads.build_optimizer = build_changed
    try:
        yield
    finally:
        member_threads.build_optimizer = build


def table(rows: pd.DataFrame) -> str:
    """Returns a line per variant, the best first, and how its error compares with ours."""
    parts = [
        "One member, one seed, a quarter of the epochs of `configs/hopper_*.yaml`, one thing changed; `ours` of "
        "`hopper_dnn` has a peak rate of 0.008, which so short a training wants."
    ]
    for kind, of_kind in rows.groupby("kind", sort=False):
        own = of_kind.loc[of_kind["variant"] == "ours", "val_mse"]
        lines = []
        for _, row in of_kind.sort_values("val_mse").iterrows():
            ratio = f"{row['val_mse'] / own.iloc[0]:.2f}" if len(own) else "-"
            nll = "-" if math.isnan(row["nll"]) else f"{row['nll']:.2f}"
            lines.append([row["variant"], str(row["epochs"]), f"{row['val_mse']:.5f}", ratio, nll])
        header = [f"hopper_{kind}", "epochs", "validation MSE", "x of ours", "NLL"]
        parts.append(harness.markdown(header, lines))
    return "\n\n".join(parts)


def figure(rows: pd.DataFrame) -> Any:
    """Draws validation errors, a panel per kind, a bar per variant."""
    kinds = list(rows.groupby("kind", sort=False))
    drawn = harness.new_figure(columns=2 * len(kinds), lines=1 + rows.groupby("kind").size().max() // 10)
    for axes, (kind, of_kind) in zip(drawn.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        of_kind = of_kind.sort_values("val_mse", ascending=False)
        colours = ["tab:blue" if name == "ours" else "tab:grey" for name in of_kind["variant"]]
        axes.hlines(range(len(of_kind)), of_kind["val_mse"].min(), of_kind["val_mse"], color="lightgrey")
        axes.scatter(of_kind["val_mse"], range(len(of_kind)), color=colours, zorder=2)
        axes.set_yticks(range(len(of_kind)), of_kind["variant"])
        axes.set(title=f"hopper_{kind}", xlabel="validation MSE", xscale="log")
        axes.grid(alpha=0.3, axis="x", which="both")
    return drawn


if __name__ == "__main__":
    main()
