"""What the training loop steps with: optimiser, schedules, precision, minibatch order, clipping, best weights.

Everything here treats members apart: parameters carry a leading ensemble axis, and no member's step depends on another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import DynamicsNetwork, processor_says, random_stream

_CPU_PRODUCTS = getattr(torch.backends.mkldnn, "matmul", None)
# Intel's AMX multiplies bfloat16 many times as fast as float32; AVX-512's instructions for it gain nothing here.
MULTIPLIES_BFLOAT16 = _CPU_PRODUCTS is not None and processor_says("amx_bf16")
_ONECYCLE_START = 1 / 25  # of the peak rate; Smith and Topin 2019, with the ratio that PyTorch's scheduler has


def build_optimizer(network: DynamicsNetwork, config: LearnConfig) -> torch.optim.Optimizer:
    """Returns Adam, with a group for each weight decay; only weights of dynamics layers decay."""
    decays = dict(zip(network.dynamics.weights, config.layer_decays, strict=True))
    groups: dict[float, list[Tensor]] = {}
    for parameter in network.parameters():
        groups.setdefault(decays.get(parameter, 0.0), []).append(parameter)
    adam = torch.optim.AdamW if config.weight_decay_mode == "decoupled" else torch.optim.Adam
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    fused = network.input_shift.is_cuda or release >= (2, 4)  # older ones have it on CUDA only
    parameters = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    return adam(parameters, lr=config.fit_lr, fused=fused)


def learning_rate(config: LearnConfig, epoch: float) -> float:
    """Returns the learning rate at a time in epochs, such as 2.5 in the middle of the third.

    The exponential and multistep schedules move between epochs, cosine and onecycle at every step; the latter two end
    at zero, where the last epoch ends.
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


def reduced_epochs(config: LearnConfig, is_cuda: bool) -> int:
    """Returns for how many epochs, from the first, matrix products round their operands on this machine."""
    can_round = MULTIPLIES_BFLOAT16
    if is_cuda:  # TF32 came with Ampere, and the setting with PyTorch 2.9
        has_setting = hasattr(torch.backends.cuda.matmul, "fp32_precision")
        can_round = has_setting and torch.cuda.get_device_capability() >= (8, 0)
    return round(config.reduced_precision * config.fit_epochs) if can_round else 0


@contextlib.contextmanager
def product_precision(config: LearnConfig, epoch: int, is_cuda: bool) -> Iterator[None]:
    """Lets matrix products of an epoch round their operands, where ``config.reduced_precision`` says so.

    Sums, weights, moments and everything but products stay in float32. Rounding adds noise (bfloat16: some 0.2 % of a
    product), which hides behind that of minibatches until training is about to end: the smallest errors, on which the
    likelihood of confident predictions depends, are learned in full precision. Mixed precision is Micikevicius et al.
    2018, with bfloat16 Kalamkar et al. 2019; that training ends without it is ours.

    Args:
        config: Settings.
        epoch: Which one, from 0.
        is_cuda: Whether training is on a GPU.
    """
    backend, rounded = (torch.backends.cuda.matmul, "tf32") if is_cuda else (_CPU_PRODUCTS, "bf16")
    if not hasattr(backend, "fp32_precision"):  # before PyTorch 2.9
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = rounded if epoch < reduced_epochs(config, is_cuda) else "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def draw_bootstrap(seed: int, ensemble_size: int, rows: int) -> Tensor:
    """Draws each member's own training rows with replacement: ``(ensemble, rows)`` row indices."""
    streams = (random_stream(seed, member, "bootstrap") for member in range(ensemble_size))
    return torch.stack([torch.randint(rows, (rows,), generator=stream) for stream in streams])


def draw_order(seed: int, ensemble_size: int, rows: int, epoch: int) -> Tensor:
    """Draws the order in which each member sees its rows in one epoch: ``(ensemble, rows)``, a permutation each."""
    streams = (random_stream(seed, member, "order", epoch) for member in range(ensemble_size))
    return torch.stack([torch.randperm(rows, generator=stream) for stream in streams])


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scales each member's gradient, over all of its parameters, down to ``max_norm``."""
    gradients = [parameter.grad for parameter in parameters]
    squares = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients])  # (parameter, ensemble)
    scale = (max_norm / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, 1, 1))


class BestWeights:
    """Each member's weights at its lowest validation error, and how long that has been.

    A member whose patience has ended keeps its best weights, whatever later epochs bring.

    Args:
        network: The network whose weights are watched.
        patience: Epochs without improvement after which a member stops; None never stops one.

    Attributes:
        scores: Lowest validation error of each member, infinite before the first.
        epochs_since_best: Epochs since then, per member.
    """

    def __init__(self, network: DynamicsNetwork, patience: int | None) -> None:
        self.patience = patience
        self.scores = [math.inf] * network.ensemble_size
        self.epochs_since_best = [0] * network.ensemble_size
        self._weights = [parameter.detach().clone() for parameter in network.parameters()]

    @property
    def stopped(self) -> list[bool]:
        """Whether each member's patience has ended."""
        return [self.patience is not None and epochs >= self.patience for epochs in self.epochs_since_best]

    def update(self, network: DynamicsNetwork, scores: Sequence[float]) -> None:
        """Keeps the weights of the members that have just improved.

        Args:
            network: Holds the weights that were scored.
            scores: Validation error of each member; a NaN is no improvement.
        """
        improved = [
            score < best and not stopped for score, best, stopped in zip(scores, self.scores, self.stopped, strict=True)
        ]
        for member, (score, better) in enumerate(zip(scores, improved, strict=True)):
            self.scores[member] = score if better else self.scores[member]
            self.epochs_since_best[member] = 0 if better else self.epochs_since_best[member] + 1
        mask = torch.tensor(improved, device=self._weights[0].device).view(-1, 1, 1)
        for kept, parameter in zip(self._weights, network.parameters(), strict=True):
            kept.copy_(torch.where(mask, parameter.detach(), kept))

    def restore(self, network: DynamicsNetwork) -> None:
        """Gives every member its best weights back.

        Raises:
            FloatingPointError: If a member never had a finite validation error.
        """
        for member, score in enumerate(self.scores):
            if not math.isfinite(score):
                raise FloatingPointError(
                    f"member {member} diverged: it never had a finite validation error; lower fit_lr or set grad_clip"
                )
        with torch.no_grad():
            for kept, parameter in zip(self._weights, network.parameters(), strict=True):
                parameter.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint needs to go on."""
        return {"scores": self.scores, "epochs_since_best": self.epochs_since_best, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.scores, self.epochs_since_best = list(state["scores"]), list(state["epochs_since_best"])
        for kept, saved in zip(self._weights, state["weights"], strict=True):
            kept.copy_(saved)
