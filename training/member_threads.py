"""Trains members side by side: on CPUs, a core takes some of the members rather than a part of every matrix product.

No member's training depends on another's, so threads need to meet at the end of an epoch only, while cores that share
every product wait for each other after each. Python runs one thread at a time, though, so that small steps are better
taken by all members together. How members are grouped changes their training by rounding only, and the same number of
threads gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from config import LearnConfig
from dynamics_model import USES_ONEDNN, DynamicsNetwork, NormalisedRows
from training.optimisation import build_optimizer

Result = TypeVar("Result")

_PIECES = 8  # of an epoch; between two, a thread may take another member, so that all threads end at about one time
# Multiply-adds of one member's forward pass below which all members go through each call together, as Python runs one
# thread at a time: where calling PyTorch takes longer than the products, or batched products share cores well enough.
_SMALL_STEP = 2e7 if USES_ONEDNN else 8e7


@dataclass(frozen=True)
class MemberGroup:
    """Members that go through each call together.

    Attributes:
        members: Which of the ensemble.
        network: These members, in the ensemble's memory.
        optimizer: Steps ``network``.
    """

    members: slice
    network: DynamicsNetwork
    optimizer: torch.optim.Optimizer


class MemberThreads:
    """Groups of an ensemble's members, and the threads that train and score them; a context that ends the threads.

    Args:
        network: All members; its memory is that of the groups.
        config: Settings of the optimiser, and the size of a step.
    """

    def __init__(self, network: DynamicsNetwork, config: LearnConfig) -> None:
        self._threads = torch.get_num_threads()
        size = network.ensemble_size
        share = size  # of each thread; members that are left over make groups of their own, which threads take in turn
        if not network.input_shift.is_cuda and _step_products(network, config) >= _SMALL_STEP:
            share = max(1, size // self._threads)
        members = [slice(start, min(start + share, size)) for start in range(0, size, share)]
        views = [network.view(own) for own in members]
        self.groups = [
            MemberGroup(own, view, build_optimizer(view, config)) for own, view in zip(members, views, strict=True)
        ]
        workers = min(self._threads, len(self.groups))
        self._pool = None
        if workers > 1:
            share = (max(1, self._threads // workers),)
            self._pool = ThreadPoolExecutor(workers, "members", torch.set_num_threads, share)

    def __enter__(self) -> MemberThreads:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # the workers' number would be that of threads to come

    def map_rows(
        self, function: Callable[[MemberGroup, range], Result], rows: int, batch_size: int
    ) -> list[list[Result]]:
        """Calls a function with every group and, one after the other, with pieces of an epoch.

        Args:
            function: Gets a group and the first rows of its minibatches.
            rows: Rows of an epoch.
            batch_size: Rows of a minibatch.

        Returns:
            Per group, what the function returned for each piece.
        """
        starts = range(0, rows, batch_size)
        size = math.ceil(len(starts) / (1 if self._pool is None else _PIECES))
        return self._run(function, *(starts[piece : piece + size] for piece in range(0, len(starts), size)))

    def score(self, rows: NormalisedRows) -> dict[str, list[float]]:
        """Scores every row, per member, as ``DynamicsNetwork.score`` does."""
        scores = [pieces[0] for pieces in self._run(lambda group, _: group.network.score(rows), range(1))]
        return {name: [value for score in scores for value in score[name]] for name in scores[0]}

    def _run(self, function: Callable[[MemberGroup, range], Result], *pieces: range) -> list[list[Result]]:
        if self._pool is None:
            return [[function(group, piece) for piece in pieces] for group in self.groups]

        def after(previous: Future[Result] | None, group: MemberGroup, piece: range) -> Result:
            if previous is not None:
                previous.result()  # it has begun, as tasks begin in order: there is little or nothing to wait for
            return function(group, piece)

        futures: list[list[Future[Result]]] = [[] for _ in self.groups]
        for piece in pieces:
            for group, own in zip(self.groups, futures, strict=True):
                own.append(self._pool.submit(after, own[-1] if own else None, group, piece))
        return [[future.result() for future in own] for own in futures]

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the optimisers' state as one optimiser of all members would have it."""
        states = [group.optimizer.state_dict() for group in self.groups]
        stacked = {
            parameter: {name: _stack([state["state"][parameter][name] for state in states]) for name in names}
            for parameter, names in states[0]["state"].items()
        }
        return states[0] | {"state": stacked}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Goes on from what ``optimizer_state`` returned, however members were grouped then."""
        for group in self.groups:
            own = {
                parameter: {name: _take(value, group.members) for name, value in values.items()}
                for parameter, values in state["state"].items()
            }
            group.optimizer.load_state_dict(state | {"state": own})


def _take(value: torch.Tensor, members: slice) -> torch.Tensor:
    """Returns some members' moments, or the number of steps: a copy, as optimisers change in place what they load."""
    return (value[members] if value.ndim else value).clone()


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    """Puts members' moments together; the number of steps is the same for all."""
    return torch.cat(values) if values[0].ndim else values[0]


def _step_products(network: DynamicsNetwork, config: LearnConfig) -> int:
    """Returns the multiply-adds of one member's forward pass of a minibatch."""
    return config.batch_size * sum(weight[0].numel() for weight in network.dynamics.weights)
