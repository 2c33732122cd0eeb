"""Trains members side by side: on CPUs, a core takes some of the members rather than a part of every matrix product.

No member's training depends on another's, so threads need to meet at the end of an epoch only, while cores that share
every product wait for each other after each. How members are grouped changes what they learn by rounding only, and the
same number of threads gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import DynamicsEnsemble, Linear
from training.batches import NormalisedRows
from training.hardware import Multiplication
from training.scores import Scores, score_rows

Result = TypeVar("Result")

_PIECES = 8  # of an epoch; between two, a thread may take another member, so that all threads end at about one time


@dataclass(frozen=True)
class MemberGroup:
    """Members that take each step together.

    Attributes:
        members: Which of the ensemble.
        ensemble: These members, in the memory of the whole ensemble.
        optimizer: Steps ``ensemble``.
    """

    members: slice
    ensemble: DynamicsEnsemble
    optimizer: torch.optim.Optimizer


class MemberThreads:
    """Groups of an ensemble's members, and the threads that train and score them; a context that ends the threads.

    Args:
        ensemble: All members; its memory is that of the groups.
        config: Settings of the optimiser, and the size of a minibatch.
        take_step: Takes a gradient step: gets a group, the minibatch of each of its members ``(ensemble, batch)`` and
            the time in epochs; returns the reported loss of each, ``(ensemble,)``.
        build_optimizer: Builds the optimiser of a group.
        multiplication: How to multiply, and from which size on threads take members of their own.
    """

    def __init__(
        self,
        ensemble: DynamicsEnsemble,
        config: LearnConfig,
        take_step: Callable[[MemberGroup, Tensor, float], Tensor],
        build_optimizer: Callable[[DynamicsEnsemble, LearnConfig], torch.optim.Optimizer],
        multiplication: Multiplication,
    ) -> None:
        self._batch_size, self._take_step = config.batch_size, take_step
        self._threads = torch.get_num_threads()
        size = len(ensemble)
        share = size  # of each thread; members that are left over make groups of their own, which threads take in turn
        multiply_adds = config.batch_size * sum(weight[0].numel() for weight in ensemble.dynamics.weights)
        if not ensemble.input_shift.is_cuda and multiply_adds >= multiplication.members_apart_from:
            share = max(1, size // self._threads)
        self.groups = []
        for start in range(0, size, share):
            members = slice(start, min(start + share, size))
            view = view_members(ensemble, members, multiplication.linear)
            self.groups.append(MemberGroup(members, view, build_optimizer(view, config)))
        workers = min(self._threads, len(self.groups))
        self._pool = None
        if workers > 1:
            threads_each = (max(1, self._threads // workers),)
            self._pool = ThreadPoolExecutor(workers, "members", torch.set_num_threads, threads_each)

    def __enter__(self) -> MemberThreads:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # the workers' number would be that of threads to come

    def take_epoch(self, order: Tensor, epoch: int) -> list[float]:
        """Takes the gradient steps of an epoch with every member.

        Args:
            order: Rows in the order in which each member sees them, ``(ensemble, rows)`` of indices.
            epoch: Which one, from 0.

        Returns:
            The reported loss of each member, a mean over rows.
        """
        rows = order.shape[1]
        starts = range(0, rows, self._batch_size)
        size = math.ceil(len(starts) / (1 if self._pool is None else _PIECES))
        pieces = [starts[piece : piece + size] for piece in range(0, len(starts), size)]
        losses = self._run(partial(self._take_piece, order, epoch), pieces)
        return (torch.cat([sum(of_group) for of_group in losses]) / rows).tolist()

    def score(self, rows: NormalisedRows) -> Scores:
        """Scores every row, per member, as ``score_rows`` does."""
        of_groups = self._run(lambda group, _: score_rows(group.ensemble, rows), [range(1)])
        return {name: [value for (scores,) in of_groups for value in scores[name]] for name in of_groups[0][0]}

    def _take_piece(self, order: Tensor, epoch: int, group: MemberGroup, starts: range) -> Tensor:
        """Takes some of an epoch's steps with a group; returns each member's loss, summed over rows."""
        loss_sum = torch.zeros(len(group.ensemble), device=order.device)  # stays there: no wait for the device
        for start in starts:
            rows = order[group.members, start : start + self._batch_size]
            loss_sum += self._take_step(group, rows, epoch + start / order.shape[1]) * rows.shape[1]
        return loss_sum

    def _run(self, function: Callable[[MemberGroup, range], Result], pieces: list[range]) -> list[list[Result]]:
        """Calls a function with every group and, one after the other, every piece: results by group and piece."""
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


def view_members(ensemble: DynamicsEnsemble, members: slice, linear: Linear) -> DynamicsEnsemble:
    """Returns some members as an ensemble that shares their memory: to train it is to train them.

    Args:
        ensemble: Whose members they are.
        members: Which ones.
        linear: What multiplies in the view.
    """
    size = len(range(*members.indices(len(ensemble))))
    view = type(ensemble)(ensemble.architecture, ensemble.normalisation, size).to(ensemble.device)
    for own, stacked in zip(view.parameters(), ensemble.parameters(), strict=True):
        own.data = stacked.data[members]
    for network in (view.dynamics, view.reward):
        if network is not None:
            network.linear = linear
    return view


def _take(value: Tensor, members: slice) -> Tensor:
    """Returns some members' moments, or the number of steps: a copy, as optimisers change in place what they load."""
    return (value[members] if value.ndim else value).clone()


def _stack(values: list[Tensor]) -> Tensor:
    """Puts members' moments together; the number of steps is the same for all."""
    return torch.cat(values) if values[0].ndim else values[0]
