"""What a gradient step needs beside the loss: optimiser, learning-rate schedules, clipping.

Parameters have a leading ensemble axis, and nothing here mixes members: no member's step depends on another's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import DynamicsEnsemble

_ONECYCLE_START = 1 / 25  # of the peak rate, as in PyTorch's scheduler; onecycle is Smith and Topin 2019


def build_optimizer(ensemble: DynamicsEnsemble, config: LearnConfig) -> torch.optim.Optimizer:
    """Returns Adam with a parameter group for each weight decay; only weights of the dynamics layers decay."""
    decays = dict(zip(ensemble.dynamics.weights, config.layer_decays, strict=True))
    groups: dict[float, list[Tensor]] = {}
    for parameter in ensemble.parameters():
        groups.setdefault(decays.get(parameter, 0.0), []).append(parameter)
    adam = torch.optim.AdamW if config.weight_decay_mode == "decoupled" else torch.optim.Adam
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    fused = ensemble.input_shift.is_cuda or release >= (2, 4)  # older ones have it on CUDA only
    parameters = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    return adam(parameters, lr=config.fit_lr, fused=fused)


def learning_rate(config: LearnConfig, epoch: float) -> float:
    """Returns the learning rate at a time in epochs, such as 2.5 in the middle of the third.

    The exponential and multistep schedules change between epochs; cosine and onecycle change at every step, and reach
    zero at the end of the last epoch.
    """
    progress = epoch / config.fit_epochs
    if config.scheduler == "exponential":
        return config.fit_lr * config.scheduler_gamma ** int(epoch)
    if config.scheduler == "multistep":
        passed = sum(milestone <= int(epoch) for milestone in config.scheduler_milestones)
        return config.fit_lr * config.scheduler_gamma**passed
    if config.scheduler == "cosine":
        return config.fit_lr * _half_cosine(progress)
    if config.scheduler == "onecycle":
        warmup = config.warmup_fraction
        if progress < warmup:
            return config.fit_lr * (1 - (1 - _ONECYCLE_START) * _half_cosine(progress / warmup))
        return config.fit_lr * _half_cosine((progress - warmup) / (1 - warmup) if warmup < 1 else 1.0)
    return config.fit_lr


def _half_cosine(progress: float) -> float:
    """Falls from 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(ensemble: DynamicsEnsemble, max_norm: float) -> None:
    """Scales each member's gradient down to a norm; networks that the kind names are clipped by themselves."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in ensemble.named_parameters():
        network = name.partition(".")[0]
        if parameter.grad is not None:
            parts.setdefault(network if network in ensemble.clipped_apart else "", []).append(parameter.grad)
    for gradients in parts.values():
        squares = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients])
        norm = squares.sum(dim=0).sqrt()  # (ensemble,)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, 1, 1))
