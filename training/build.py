"""From a configuration and training rows to an untrained ensemble."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

from config import LearnConfig
from utils import InputError

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    from data.trajectories import Transitions
    from dynamics_model import DynamicsEnsemble


def build_ensemble(config: LearnConfig, transitions: Transitions) -> DynamicsEnsemble:
    """Builds the members, each from its own stream, with the normalisation of the training rows, and stacks them.

    Raises:
        InputError: If there is nothing to learn in the training rows.
    """
    from deterministic_model import DeterministicModel
    from dynamics_model import Architecture, DynamicsEnsemble, Normalisation, random_stream
    from probabilistic_model import ProbabilisticModel

    architecture = Architecture(
        state_dim=transitions.states.shape[1],
        action_dim=transitions.actions.shape[1],
        hidden_size=config.hidden_size,
        activation_fn=config.activation_fn,
        layer_norm=config.layer_norm,
        reward_hidden_size=config.reward_hidden_size if config.learn_reward else None,
        beta_nll=config.beta_nll,
        beta_nll_decay=config.beta_nll_decay,
    )
    check_size(config, architecture.state_dim, architecture.action_dim)
    try:
        normalisation = Normalisation.from_transitions(transitions)
    except ValueError as error:
        raise InputError(f"{error}; give a dataset in which states move") from None
    member_class = ProbabilisticModel if config.probabilistic else DeterministicModel
    members = [
        member_class(
            architecture,
            normalisation,
            random_stream(config.seed, member, "initialisation"),
            random_stream(config.seed, member, "reward"),
        )
        for member in range(config.ensemble_size)
    ]
    return DynamicsEnsemble(members, config.seed)


def check_size(config: LearnConfig, state_dim: int, action_dim: int) -> None:
    """Refuses an ensemble whose training cannot fit into this machine's memory, such as a typing error makes.

    Raises:
        InputError: If parameters, gradients, Adam's two moments, best weights and a checkpoint take more than there is.
    """
    widths = [state_dim + action_dim, *config.hidden_size, (1 + config.probabilistic) * state_dim]
    weights = sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    needed = 4 * 6 * weights * config.ensemble_size  # bytes
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise InputError(
            f"{config.ensemble_size} members with layers {list(config.hidden_size)} need {needed / 2**30:.3g} GiB to "
            f"train, this machine has {available / 2**30:.3g}; lower ensemble_size or hidden_size"
        )
