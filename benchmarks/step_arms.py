"""Ways to take an optimiser step of a 7-member ensemble, each run as a process of its own by ``step_throughput.py``.

    python -m benchmarks.step_arms ours '{"kind": "probabilistic", "hidden": "4x200", "batch": 256, "size": "hopper",
                                          "threads": 1, "rounds": 5}'

An arm goes from row indices to updated parameters with the same network, loss, batch and data; a round is a fixed
number of such steps. The process prints how long one step took, as JSON, after an unmeasured round and then once for
each line that it reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

MEMBERS = 7
SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6)}  # state_dim, action_dim
_ROUND_FLOPS = 80e9  # a round takes as many steps as these pay for, within the next two
_MOST_STEPS, _FEWEST_STEPS = 32, 8


@dataclass(frozen=True)
class Case:
    """What is measured, but for the arm.

    Attributes:
        kind: ``deterministic`` or ``probabilistic``.
        hidden: Layers and width, such as ``4x200``.
        batch: Rows per member and step.
        size: Key of ``SIZES``.
        threads: Cores and threads that an arm may use.
        rounds: Rounds after the unmeasured one.
        members: In the ensemble.
    """

    kind: str
    hidden: str
    batch: int
    size: str
    threads: int
    rounds: int
    members: int = MEMBERS

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of a network's layers, input and output included."""
        layers, width = map(int, self.hidden.split("x"))
        state_dim, action_dim = SIZES[self.size]
        heads = 2 if self.kind == "probabilistic" else 1
        return (state_dim + action_dim, *[width] * layers, state_dim * heads)

    @property
    def flops(self) -> int:
        """Matrix-multiply FLOPs of a step."""
        from benchmarks.plain_loop import training_flops

        return self.members * self.batch * training_flops(self.sizes)

    @property
    def steps(self) -> int:
        """Steps of a round."""
        return min(_MOST_STEPS, max(_FEWEST_STEPS, int(_ROUND_FLOPS / self.flops)))

    @property
    def rows(self) -> int:
        """Rows of data: no epoch ends while steps are timed."""
        return max(100_000, self.batch * self.steps * (self.rounds + 1))

    @cached_property
    def config(self) -> Any:
        """The product's defaults, with this case's sizes; the plain likelihood, as everywhere else."""
        from config import LearnConfig

        options = {"probabilistic": self.kind == "probabilistic", "ensemble_size": self.members}
        return LearnConfig(**options, hidden_size=self.sizes[1:-1], batch_size=self.batch)

    @cached_property
    def transitions(self) -> Any:
        """Rows of noise: speed depends on their size only."""
        import numpy as np

        from data.trajectories import Transitions

        random = np.random.default_rng(0)
        state_dim, action_dim = SIZES[self.size]
        states, actions, next_states = (
            random.standard_normal((self.rows, width), dtype=np.float32) for width in (state_dim, action_dim, state_dim)
        )
        return Transitions(states, actions, next_states, np.zeros(self.rows, np.float32))

    @cached_property
    def ensemble(self) -> Any:
        """The product's ensemble, from which every arm takes sizes and normalised rows."""
        from training.build import build_ensemble

        return build_ensemble(self.config, self.transitions)


class EnoughRounds(Exception):  # noqa: N818 - no error
    """Ends a training of which some rounds were wanted."""


class Pace:
    """Lets an arm run round by round: it calls ``tick`` before its steps, which waits where a round has ended.

    Args:
        steps: Steps of a round.
        report: Gets milliseconds per step, and returns when the next round may begin.
    """

    def __init__(self, steps: int, report: Callable[..., None]) -> None:
        self.steps = steps
        self.report = report
        self._left = steps
        self._start = time.perf_counter()

    def tick(self, steps: int = 1) -> None:
        """Takes note that so many steps follow, never more than are left of the round."""
        if self._left == 0:
            self.report((time.perf_counter() - self._start) / self.steps * 1e3)
            self._left = self.steps
            self._start = time.perf_counter()
        self._left -= steps


# --- The arms ---


def ours(case: Case, pace: Pace, **settings: Any) -> None:
    """The product's own training loop; a round is an epoch, of rows from all over the data.

    Args:
        case: What to train.
        pace: Of the rounds.
        **settings: Of ``LearnConfig``, where they are not the defaults. These epochs are the first of many, whose
            products may round their operands (``reduced_precision``).
    """
    import torch

    from dynamics_model import NormalisedRows
    from tracking.trackers import NullTracker
    from training.loop import train_ensemble

    ensemble = case.ensemble
    every = ensemble.normalise(case.transitions)
    rows_of_round = case.steps * case.batch

    class FewRows(NormalisedRows):
        def select(self, rows: torch.Tensor) -> NormalisedRows:
            return every.select(rows * (case.rows // rows_of_round))

    class Rounds(NullTracker):
        def log_epoch(self, epoch: int, rows: list[dict[str, Any]]) -> None:
            pace.tick(case.steps)

    pace.tick(case.steps)
    few = FewRows(*(part if part is None else part[:rows_of_round] for part in every))
    train_ensemble(ensemble, dataclasses.replace(case.config, fit_epochs=1000, **settings), few, None, Rounds())


def plain(case: Case, pace: Pace) -> None:
    """A loop over members with ``nn.Linear`` and Adam, the published way; a member takes a round's steps in one go."""
    import torch

    from benchmarks.plain_loop import plain_member, train_steps
    from training.batches import draw_order

    rows = case.ensemble.normalise(case.transitions)
    members = [plain_member(case.config, case.ensemble.network, index) for index in range(case.members)]
    optimizers = [torch.optim.Adam(member.parameters(), lr=case.config.fit_lr) for member in members]
    order = draw_order(0, case.members, case.rows, epoch=0)
    for batches in order.split(case.steps * case.batch, dim=1):
        pace.tick(case.steps)
        for member, optimizer, own in zip(members, optimizers, batches, strict=True):
            train_steps(member, optimizer, rows, own, case.batch)


def mbrl(case: Case, pace: Pace) -> None:
    """The ``GaussianMLP`` of mbrl-lib (Pineda et al. 2021) and its own ``update``."""
    import torch
    from mbrl.models.gaussian_mlp import GaussianMLP

    from training.batches import draw_order

    rows = case.ensemble.normalise(case.transitions)
    model = GaussianMLP(
        in_size=rows.inputs.shape[1],
        out_size=rows.targets.shape[1],
        device="cpu",
        num_layers=len(case.config.hidden_size),
        ensemble_size=case.members,
        hid_size=case.config.hidden_size[0],
        deterministic=case.kind == "deterministic",
        learn_logvar_bounds=True,
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=case.config.fit_lr)
    for batch in draw_order(0, case.members, case.rows, epoch=0).split(case.batch, dim=1):
        pace.tick()
        inputs, targets, _ = rows.select(batch)
        model.update(inputs, optimizer, targets)


def jax(case: Case, pace: Pace) -> None:
    """JAX: ``vmap`` over members, ``scan`` over the batches of a round, Flax layers and Optax's Adam."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen

    from training.batches import draw_order

    rows = case.ensemble.normalise(case.transitions)
    inputs, targets = jnp.asarray(rows.inputs.numpy()), jnp.asarray(rows.targets.numpy())

    class Network(linen.Module):
        @linen.compact
        def __call__(self, hidden: jax.Array) -> jax.Array:
            for width in case.config.hidden_size:
                hidden = linen.silu(linen.Dense(width)(hidden))
            return linen.Dense(case.sizes[-1])(hidden)

    network = Network()

    def loss(params: dict[str, Any], batch: jax.Array) -> jax.Array:
        outputs = network.apply(params["network"], inputs[batch])
        if case.kind == "deterministic":
            return jnp.square(outputs - targets[batch]).mean()
        mean, log_variance = jnp.split(outputs, 2, axis=-1)
        log_variance = params["max"] - jax.nn.softplus(params["max"] - log_variance)
        log_variance = params["min"] + jax.nn.softplus(log_variance - params["min"])
        likelihood = jnp.square(mean - targets[batch]) * jnp.exp(-log_variance) + log_variance
        return likelihood.mean() + 0.01 * (params["max"].sum() - params["min"].sum())

    def initialise(key: jax.Array) -> dict[str, Any]:
        bound = jnp.zeros(targets.shape[1])
        return {"network": network.init(key, inputs[:1]), "max": bound + 0.5, "min": bound - 10}

    optimizer = optax.adam(case.config.fit_lr)

    def step(state: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, moments = state
        updates, moments = optimizer.update(jax.vmap(jax.grad(loss))(params, batch), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    @partial(jax.jit, donate_argnums=0)
    def run(state: tuple[Any, Any], batches: jax.Array) -> tuple[Any, Any]:
        return jax.lax.scan(step, state, batches)[0]

    params = jax.vmap(initialise)(jax.random.split(jax.random.key(0), case.members))
    state = (params, optimizer.init(params))
    order = draw_order(0, case.members, case.rows, epoch=0).numpy()
    for start in range(0, case.rows, case.steps * case.batch):
        pace.tick(case.steps)
        batches = order[:, start : start + case.steps * case.batch].reshape(case.members, case.steps, case.batch)
        state = jax.block_until_ready(run(state, batches.swapaxes(0, 1)))


def rounded(arm: Callable[[Case, Pace], None], case: Case, pace: Pace) -> None:
    """Another way to take the step with PyTorch's own switch for products that round, which its users may find, too."""
    import torch

    torch.set_float32_matmul_precision("medium")
    arm(case, pace)


def products(case: Case, pace: Pace) -> None:
    """The step's matrix products alone, rounded as ours are: batched, or oneDNN's by threads, member after member."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from dynamics_model import USES_ONEDNN, stacked_linear
    from training.hardware import product_precision

    threads, share = (case.threads, 1) if USES_ONEDNN else (1, case.members)
    layers = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(case.sizes)):
        hidden, weight, gradient = (
            torch.randn(case.members, *shape)
            for shape in ((case.batch, fan_in), (fan_in, fan_out), (case.batch, fan_out))
        )
        layers.append((index > 0, hidden, weight, gradient))

    @torch.no_grad()
    def steps(first: int) -> None:
        own = slice(first, first + share)
        for _ in range(case.steps):
            for _, hidden, weight, _ in layers:
                stacked_linear(hidden[own], weight[own])
            for has_input_gradient, hidden, weight, gradient in reversed(layers):
                stacked_linear(hidden[own].mT, gradient[own])
                if has_input_gradient:
                    stacked_linear(gradient[own], weight[own].mT)

    threads_each = (case.threads // threads,)
    with (
        product_precision(case.config, epoch=0, is_cuda=False),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=threads_each) as pool,
    ):
        while True:
            pace.tick(case.steps)
            list(pool.map(steps, range(0, case.members, share)))


def floor(case: Case, pace: Pace, reduced_precision: float = 0.0) -> None:
    """What no step can beat: its FLOPs at the speed of a large product, and Adam's traffic at the speed of a copy.

    The product is that of the faster of PyTorch's two libraries, MKL and oneDNN, which may differ twofold; it rounds
    its operands as the first epoch of a training with this ``reduced_precision`` does. Adam has to read parameters,
    gradients and two moments and to write all but the gradients. The copy is of as much memory as these take, so that
    it profits from caches as the optimiser may.
    """
    import torch

    from training.hardware import product_precision

    config = dataclasses.replace(case.config, reduced_precision=reduced_precision)
    large = torch.randn(2048, 2048)
    libraries = [lambda: large @ large]
    if torch.backends.mkldnn.is_available():
        libraries.append(lambda: torch.ops.mkldnn._linear_pointwise(large, large, None, "none", [], ""))
    parameters = case.members * sum(fan_out * (fan_in + 1) for fan_in, fan_out in itertools.pairwise(case.sizes))
    traffic = 7 * 4 * parameters  # bytes
    source = torch.randn(2 * parameters)
    copy = torch.empty_like(source)
    copies = max(1, int(2e9 / (8 * len(source))))

    def seconds(function: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            function()
        return (time.perf_counter() - start) / times

    while True:
        with product_precision(config, epoch=0, is_cuda=False):
            flops_per_s = 2 * len(large) ** 3 / min(seconds(library, 3) for library in libraries)
        bytes_per_s = 2 * 4 * len(source) / seconds(lambda: copy.copy_(source), copies)
        ms = (case.flops / flops_per_s + traffic / bytes_per_s) * 1e3
        pace.report(ms, gflops_per_s=flops_per_s / 1e9, gbytes_per_s=bytes_per_s / 1e9)


def ours_by(uses_onednn: bool, small_step: float, case: Case, pace: Pace) -> None:
    """The product's loop with a library and a grouping of members that it may not have chosen here.

    Args:
        uses_onednn: Whether large products go through oneDNN, member by member, rather than batched through MKL.
        small_step: The size of a step from which on threads take members of their own.
        case: What to train.
        pace: Of the rounds.
    """
    import dynamics_model
    from training import member_threads

    dynamics_model.USES_ONEDNN, member_threads._SMALL_STEP = uses_onednn, small_step
    ours(case, pace)


OWN = {  # what the product chooses among, by library and by what cores share
    "MKL, products shared": partial(ours_by, False, math.inf),
    "MKL, members shared": partial(ours_by, False, 0),
    "oneDNN, products shared": partial(ours_by, True, math.inf),
    "oneDNN, members shared": partial(ours_by, True, 0),
}
ARMS: dict[str, Callable[[Case, Pace], None]] = {
    "ours": ours,
    "full precision": partial(ours, reduced_precision=0.0),
    "plain": plain,
    "plain, rounded": partial(rounded, plain),
    "mbrl": mbrl,
    "mbrl, rounded": partial(rounded, mbrl),
    "jax": jax,
    "products": products,
    "floor": floor,
    "rounded floor": partial(floor, reduced_precision=1.0),
    **OWN,
}
MBRL = ("mbrl", "hydra", "omegaconf", "gymnasium")
NEEDS = {"mbrl": MBRL, "mbrl, rounded": MBRL, "jax": ("jax", "flax", "optax")}  # packages


def main(argv: list[str]) -> None:
    """Runs one arm until standard input ends."""
    arm, case = argv[0], Case(**json.loads(argv[1]))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error

    def report(ms: float, **also: float) -> None:
        print(json.dumps({"ms": ms, **also}), file=answers, flush=True)
        if not sys.stdin.readline():
            raise SystemExit

    import torch

    torch.set_num_threads(case.threads)
    ARMS[arm](case, Pace(case.steps, report))


def arguments(arm: str, case: Case) -> list[str]:
    """Returns the command that runs an arm."""
    return [sys.executable, "-m", "benchmarks.step_arms", arm, json.dumps(dataclasses.asdict(case))]


if __name__ == "__main__":
    main(sys.argv[1:])
