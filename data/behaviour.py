"""Behaviour policies: those that collect datasets, in NumPy alone, and the files they are kept in.

``data/policies/`` holds the policies of the bundled datasets, and twelve of each training from its beginning to its
end, from bad to good.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.npz import read_arrays
from data.trajectories import printable
from utils import InputError, atomic_write

LOG_STD_RANGE = (-20.0, 2.0)  # stable-baselines3 clips the actor's log standard deviation to this

# Takes an observation, ``(observation_dim,)``, and a random generator; returns the intended action, ``(action_dim,)``.
Policy = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class RandomPolicy:
    """Draws actions uniformly from the action space."""

    description = "random: uniform over the action space"

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self.low, self.high = low, high

    def __call__(self, observation: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns an action, ``(action_dim,)`` float32, whatever the observation."""
        return random.uniform(self.low, self.high).astype(np.float32)


class SquashedGaussianPolicy:
    """The actor of soft actor-critic in NumPy: a Gaussian squashed by tanh, its mean and deviation given by an MLP.

    Args:
        arrays: ``weight_I`` (out, in) and ``bias_I`` (out,) of the hidden layers; ``mean_weight``, ``mean_bias``,
            ``log_std_weight`` and ``log_std_bias`` of the two heads; ``low`` and ``high``, the action space's bounds.
        description: What the policy is and how it was trained.
        evaluation_return: Mean return of its episodes when training ended; NaN where that is not known.
    """

    def __init__(self, arrays: dict[str, np.ndarray], description: str, evaluation_return: float = np.nan) -> None:
        self.arrays, self.description, self.evaluation_return = arrays, description, evaluation_return
        # In float32, products of matrices end in other digits on other processors, and episodes soon in other states.
        # In float64 they do too, but what is left of that after rounding actions to float32 is next to nothing.
        self.weights = {name: array.astype(np.float64) for name, array in arrays.items()}
        self.depth = sum(name.startswith("weight_") for name in arrays)

    def __call__(self, observation: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns an action drawn for ``observation`` ``(observation_dim,)``, as ``(action_dim,)`` float32."""
        mean, log_std = self.gaussian(observation)
        noise = random.standard_normal(len(mean), dtype=np.float32)
        low, high = self.weights["low"], self.weights["high"]
        action = low + 0.5 * (np.tanh(mean + np.exp(log_std) * noise) + 1.0) * (high - low)
        return np.clip(action, low, high).astype(np.float32)

    def gaussian(self, observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and log standard deviation before squashing, each ``(action_dim,)``."""
        hidden = observation.astype(np.float32).astype(np.float64)  # as datasets hold it
        for layer in range(self.depth):
            hidden = np.maximum(self.weights[f"weight_{layer}"] @ hidden + self.weights[f"bias_{layer}"], 0.0)
        mean = self.weights["mean_weight"] @ hidden + self.weights["mean_bias"]
        log_std = self.weights["log_std_weight"] @ hidden + self.weights["log_std_bias"]
        return mean, np.clip(log_std, *LOG_STD_RANGE)

    @classmethod
    def from_actor(cls, actor: Any, low: np.ndarray, high: np.ndarray) -> SquashedGaussianPolicy:
        """Copies the weights of a stable-baselines3 SAC actor, rounded so that the file is half as large."""
        hidden = [layer for layer in actor.latent_pi if hasattr(layer, "weight")]
        arrays = {"low": low, "high": high}
        for index, layer in enumerate(hidden):
            arrays[f"weight_{index}"], arrays[f"bias_{index}"] = numpy_weights(layer)
        arrays["mean_weight"], arrays["mean_bias"] = numpy_weights(actor.mu)
        arrays["log_std_weight"], arrays["log_std_bias"] = numpy_weights(actor.log_std)
        return cls(arrays, description="sac")

    def save(self, path: Path, env_id: str) -> None:
        """Writes the policy as ``.npz``, without pickles.

        Args:
            path: The file.
            env_id: The environment the policy was trained in, the only one it can be loaded for.
        """
        with atomic_write(path) as file:
            made = {"description": self.description, "evaluation_return": self.evaluation_return}
            np.savez_compressed(file, env_name=env_id, **made, **self.arrays)

    @classmethod
    def load(cls, path: Path, env_id: str, observation_dim: int) -> SquashedGaussianPolicy:
        """Reads a policy that ``save`` wrote for the same environment.

        Args:
            path: The file.
            env_id: The environment to act in.
            observation_dim: Length of its observations.

        Raises:
            InputError: If the file is missing, is no such policy, or was trained in another environment.
        """
        if not os.path.isfile(path):  # noqa: PTH113 (a Path's raises where the name is too long)
            raise InputError(
                f"policy {str(path)!r} is not a file; --policy takes 'sac', 'random' or .npz files that an earlier "
                "--policy sac saved"
            )
        try:
            arrays = read_arrays(path)
            trained_in, description = (printable(str(arrays.pop(name)))[:200] for name in ("env_name", "description"))
            evaluation_return = float(arrays.pop("evaluation_return", np.nan))
            policy = cls(arrays, description, evaluation_return)
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise ValueError("its weights are not finite")
            if trained_in == env_id:
                policy(np.zeros(observation_dim), np.random.default_rng(0))  # every array is there and fits
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"policy {str(path)!r} cannot be read ({reason}); expected the .npz file that --policy sac saves"
            ) from error
        if trained_in != env_id:
            raise InputError(
                f"policy {str(path)!r} was trained in {trained_in!r}, not in {env_id!r}; give --env {trained_in} or "
                "another policy"
            )
        return policy


def numpy_weights(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns a linear layer's weight ``(out, in)`` and bias ``(out,)``: the values of float16, as float32."""
    weight, bias = (values.detach().half().float().numpy() for values in (layer.weight, layer.bias))
    return weight, bias


class Snapshots:
    """Keeps some policies of a training, as files in a folder, such that their returns are spread evenly.

    Files are named by training step. The worst and the best policy so far are always among them.

    Args:
        folder: The folder, made where it is missing.
        count: How many to keep, at least 2.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.kept: list[tuple[float, Path]] = []

    def add(self, policy: SquashedGaussianPolicy, env_id: str, training_step: int) -> None:
        """Keeps a policy; once there are too many, the one between the closest neighbours goes."""
        path = self.folder / f"{training_step:07d}.npz"
        policy.save(path, env_id)
        self.kept = sorted([*self.kept, (policy.evaluation_return, path)])
        if len(self.kept) > self.count:
            returns = np.array([value for value, _ in self.kept])
            _, left_out = self.kept.pop(1 + int(np.argmin(returns[2:] - returns[:-2])))
            left_out.unlink()
