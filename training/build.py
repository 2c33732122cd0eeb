"""Builds an untrained ensemble from a configuration and training rows."""

from __future__ import annotations

import inspect
import itertools
import os
import resource
from pathlib import Path
from typing import Any

from config import LearnConfig
from data.trajectories import Transitions
from dynamics_model import (
    KINDS,
    Architecture,
    DynamicsEnsemble,
    DynamicsModel,
    member_class,
    random_stream,
)
from training.batches import measure_normalisation
from utils import InputError, did_you_mean

JUDGED_BY = 5  # a kind that learns from held-out rows is judged by the last one in so many of them


def find_kind(config: LearnConfig) -> type[DynamicsModel]:
    """Returns the class of the members that a configuration asks for.

    Raises:
        InputError: If there is no such kind, or a setting was changed that only another kind's loss takes.
    """
    kind = config.kind_of_ensemble
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    own = loss_settings(member_class(kind).ensemble_class, config)
    defaults = LearnConfig()
    for other in KINDS:
        for name, value in loss_settings(member_class(other).ensemble_class, config).items():
            if name not in own and value != (default := getattr(defaults, name)):
                expected = "null" if default is None else f"{default:g}"
                raise InputError(f"{name} is {value!r}; expected {expected} for a {kind} ensemble")
    return member_class(kind)


def check_holdout(ensemble_class: type[DynamicsEnsemble], rows: int) -> None:
    """Checks that a kind that learns from held-out rows has some to learn from, and some to judge by.

    Raises:
        InputError: If there are too few.
    """
    if ensemble_class.holdout_losses is not None and rows < JUDGED_BY:
        raise InputError(
            f"a {ensemble_class.kind} ensemble learns its variance from held-out rows, of which there are {rows}; "
            f"expected at least {JUDGED_BY}, such as by --holdout_ratio 0.2"
        )


def loss_settings(ensemble_class: type[DynamicsEnsemble], config: LearnConfig) -> dict[str, Any]:
    """Returns the settings that a kind's loss takes, by name: those called like its keyword-only arguments."""
    parameters = inspect.signature(ensemble_class.losses).parameters.values()
    return {each.name: getattr(config, each.name) for each in parameters if each.kind is each.KEYWORD_ONLY}


def build_ensemble(config: LearnConfig, transitions: Transitions) -> DynamicsEnsemble:
    """Builds members, each from a random stream of its own, with the normalisation of the training rows; stacks them.

    Raises:
        InputError: If the kind is unknown, the ensemble is too large, or there is nothing to learn in the rows.
    """
    architecture = Architecture(
        state_dim=transitions.states.shape[1],
        action_dim=transitions.actions.shape[1],
        hidden_size=config.hidden_size,
        activation_fn=config.activation_fn,
        layer_norm=config.layer_norm,
        reward_hidden_size=config.reward_hidden_size if config.learn_reward else None,
    )
    kind = find_kind(config)
    check_size(config, architecture, kind.ensemble_class.heads)
    normalisation = measure_normalisation(transitions)
    members = [
        kind(
            architecture,
            normalisation,
            random_stream(config.seed, member, "initialisation"),
            random_stream(config.seed, member, "reward"),
        )
        for member in range(config.ensemble_size)
    ]
    return DynamicsEnsemble.from_members(members, config.seed)


def check_size(config: LearnConfig, architecture: Architecture, heads: int) -> None:
    """Refuses an ensemble that is too large to train in this machine's memory, such as one with a mistyped size.

    Raises:
        InputError: If parameters, gradients, Adam's two moments, best weights and a checkpoint take more than there is.
    """
    in_dim = architecture.state_dim + architecture.action_dim
    widths = [in_dim, *architecture.hidden_size, heads * architecture.state_dim]
    weights = sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    needed = 4 * 6 * weights * config.ensemble_size  # bytes
    available = available_memory()
    if needed > available:
        raise InputError(
            f"{config.ensemble_size} members with layers {list(config.hidden_size)} need {needed / 2**30:.3g} GiB to "
            f"train, this process may have {available / 2**30:.3g}; lower ensemble_size or hidden_size"
        )


def available_memory() -> int:
    """Returns how many bytes this process may have: the machine's, or fewer by ``ulimit``, a container or Slurm."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [soft for soft, _ in map(resource.getrlimit, (resource.RLIMIT_AS, resource.RLIMIT_DATA)) if soft >= 0]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, versions 2 and 1
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (limit := file.read_text().strip()).isdecimal():
            limits.append(int(limit))
    return min(limits)
