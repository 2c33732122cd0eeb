"""The state from which an interrupted training goes on, and the check of one that was read from a file.

A checkpoint is a dictionary of tensors and plain Python types::

    epochs      how many are done
    network     the ensemble's state_dict
    optimizer   state of the optimiser of all members: by parameter its moments and its number of steps
    best        the state of ``BestWeights``
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import DynamicsEnsemble
from training.best_weights import BestWeights, finite_members
from training.member_threads import MemberThreads
from training.optimisation import build_optimizer


def checkpoint_state(
    epochs: int, ensemble: DynamicsEnsemble, threads: MemberThreads, best: BestWeights
) -> dict[str, Any]:
    """Returns what it takes to resume training after so many epochs."""
    return {
        "epochs": epochs,
        "network": ensemble.state_dict(),
        "optimizer": threads.optimizer_state(),
        "best": best.state_dict(),
    }


def check_checkpoint(state: Any, ensemble: DynamicsEnsemble, config: LearnConfig, rows: int) -> None:
    """Checks that training can go on from what a file holds, however it came to be there.

    PyTorch's fused optimisers write past the end of moments that are too short, so shapes are checked, too.

    Args:
        state: What was read.
        ensemble: What is trained.
        config: Settings.
        rows: Number of training rows.

    Raises:
        ValueError: If it is not what ``checkpoint_state`` returns in such a training.
    """
    size, parameters = len(ensemble), list(ensemble.parameters())
    _check_keys("it", state, {"epochs", "network", "optimizer", "best"})
    epochs, best = state["epochs"], state["best"]
    _check(type(epochs) is int and 1 <= epochs <= config.fit_epochs, f"epochs are not from 1 to {config.fit_epochs}")

    _check_keys("best", best, {"scores", "epochs_since_best", "failed", "weights"})
    for name, kind in (("scores", float), ("epochs_since_best", int), ("failed", bool)):
        values = best[name]
        _check(_is_list(values, kind, size), f"{name} are not {size} of {kind.__name__}")
    _check(not any(map(math.isnan, best["scores"])), "a score is not a number")
    _check(all(0 <= count <= epochs for count in best["epochs_since_best"]), "epochs_since_best are not epochs")
    _check(_is_list(best["weights"], Tensor, len(parameters)), f"best weights are not {len(parameters)} tensors")
    for kept, parameter in zip(best["weights"], parameters, strict=True):
        _check_tensor("best weights", kept, parameter, [False] * size)

    own = ensemble.state_dict()
    _check_keys("network", state["network"], set(own))
    learned = {name for name, _ in ensemble.named_parameters()}
    for name, expected in own.items():
        _check_tensor(name, state["network"][name], expected, best["failed"] if name in learned else None)
        # The normalisation may differ in its last digits where another machine began the training.
        same = name in learned or torch.allclose(state["network"][name], expected, rtol=1e-4, atol=1e-30)
        _check(same, f"{name} is that of other data")

    optimizer = build_optimizer(ensemble, config)
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check(isinstance(state["optimizer"], dict), "the optimiser's state is no dictionary")
    moments = state["optimizer"].get("state")
    _check(isinstance(moments, dict) and moments.keys() <= set(range(len(stepped))), "moments are of other parameters")
    # A kind with a second phase has parameters that take no step in the first one.
    complete = ensemble.holdout_losses is not None or len(moments) == len(stepped)
    _check(bool(moments) and complete, "moments of a parameter are missing")
    steps = epochs * math.ceil(rows / config.batch_size)
    for index, values in moments.items():
        _check_keys("moments", values, {"step", "exp_avg", "exp_avg_sq"})
        for name in ("exp_avg", "exp_avg_sq"):
            _check_tensor(name, values[name], stepped[index], best["failed"])
        _check(not (values["exp_avg_sq"] < 0).any(), "a mean of squares is negative")
        _check(isinstance(values["step"], Tensor) and values["step"].numel() == 1, "step is no number")
        _check(values["step"].item() == steps, f"it took {values['step'].item():g} steps, expected {steps}")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_keys(name: str, value: Any, keys: set[str]) -> None:
    _check(isinstance(value, dict), f"{name} is {type(value).__name__}, expected dict")
    if different := sorted(map(repr, value.keys() ^ keys)):
        raise ValueError(f"{name} has a missing or unknown entry {different[0][:80]}")


def _check_tensor(name: str, value: Any, expected: Tensor, failed: Iterable[bool] | None) -> None:
    """Checks a tensor against one of the same place; members that have failed may have numbers that are not finite.

    Args:
        name: Of the tensor.
        value: The tensor, supposedly.
        expected: One with the right shape and type.
        failed: Which members have failed; None for a tensor without an axis of members.
    """
    _check(isinstance(value, Tensor) and value.layout == torch.strided, f"{name} is no tensor")
    _check(value.shape == expected.shape, f"{name} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    _check(value.dtype == expected.dtype, f"{name} is of {value.dtype}, expected {expected.dtype}")
    if failed is not None:
        finite = finite_members([value])
        _check(all(map(bool.__or__, finite, failed)), f"{name} has numbers that are not finite")


def _is_list(values: Any, kind: type, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(isinstance(value, kind) for value in values)
