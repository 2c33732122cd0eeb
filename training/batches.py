"""Minibatches: which rows each member sees, and in which order."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamics_model import random_stream


def draw_bootstrap(seed: int, ensemble_size: int, rows: int) -> Tensor:
    """Draws each member's own training rows with replacement: ``(ensemble, rows)`` row indices."""
    streams = (random_stream(seed, member, "bootstrap") for member in range(ensemble_size))
    return torch.stack([torch.randint(rows, (rows,), generator=stream) for stream in streams])


def draw_order(seed: int, ensemble_size: int, rows: int, epoch: int) -> Tensor:
    """Draws the order in which each member sees its rows in one epoch: ``(ensemble, rows)``, a permutation each."""
    streams = (random_stream(seed, member, "order", epoch) for member in range(ensemble_size))
    return torch.stack([torch.randperm(rows, generator=stream) for stream in streams])
