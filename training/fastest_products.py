"""Finds the fastest way to multiply by trying each for a moment on the run's own shapes.

Rules by the processor's name do not hold: libraries differ between generations of one maker, and the best grouping of
members depends on what else the machine does.
"""

from __future__ import annotations

import copy
import math
import time
from functools import partial

import torch

from config import LearnConfig
from dynamics_model import DynamicsEnsemble
from training.batches import NormalisedRows
from training.build import loss_settings
from training.loop import take_step
from training.member_threads import MemberThreads
from training.optimisation import build_optimizer
from training.precision import product_precision, reduced_epochs
from training.products import Products, possible_products

_SHARE, _SECONDS = 0.006, 1.2  # of a run, and at most, that trials would take if all ways were as fast as the default
_FEWEST, _MOST = 6, 32  # steps of a trial
_GAIN = 0.97  # another way is taken only if it needs less than this share of the default's time, so that runs repeat


def fastest_products(ensemble: DynamicsEnsemble, config: LearnConfig, train: NormalisedRows) -> Products:
    """Tries the ways to multiply and returns the fastest.

    Each takes some steps on copies of the members, as many as fit into a small share of the run's time. Runs in which
    hardly any fit keep the default, and so do runs on GPUs.

    Args:
        ensemble: The untrained ensemble; it is left as it is, and so are all random streams.
        config: Settings; ``config.products`` is returned where it is given.
        train: Training rows.
    """
    if config.products is not None:
        return Products.parse(config.products)
    ways = possible_products(len(ensemble))
    steps = config.fit_epochs * math.ceil(len(train.inputs) / config.batch_size)
    affordable = int(_SHARE * steps / len(ways))  # steps of each way
    if train.inputs.is_cuda or affordable < _FEWEST:
        return ways[0]
    is_rounded = 2 * reduced_epochs(config, is_cuda=False) > config.fit_epochs
    with product_precision(is_rounded, is_cuda=False):
        first = _seconds_per_step(ensemble, config, train, ways[0], _FEWEST)
        trial = max(_FEWEST, min(affordable, _MOST, int(_SECONDS / (first * len(ways)))))
        seconds = {way: _seconds_per_step(ensemble, config, train, way, trial) for way in ways}
    best = min(ways, key=seconds.__getitem__)
    return best if seconds[best] < _GAIN * seconds[ways[0]] else ways[0]


def _seconds_per_step(
    ensemble: DynamicsEnsemble, config: LearnConfig, train: NormalisedRows, way: Products, steps: int
) -> float:
    """Takes some steps with copies of the members, after one that warms up; returns the time of one."""
    trained = copy.deepcopy(ensemble).requires_grad_(True)
    losses = partial(type(ensemble).losses, **loss_settings(type(ensemble), config))
    step = partial(take_step, config, losses, train)
    size = min(config.batch_size, len(train.inputs))
    order = torch.arange((1 + steps) * size).remainder(len(train.inputs)).expand(len(ensemble), -1)
    with MemberThreads(trained, config, step, build_optimizer, way) as threads:
        threads.take_epoch(order[:, :size], epoch=0)
        start = time.perf_counter()
        threads.take_epoch(order[:, size:], epoch=0)
        return (time.perf_counter() - start) / steps
