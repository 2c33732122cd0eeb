"""The trained ensemble as an MLflow model, with which ``mlflow.pyfunc.load_model("runs:/RUN_ID/model")`` predicts.

A copy of this file goes with every logged model, beside ``model.pkl`` and the model modules, so that the model loads
where nothing of this project is installed. It therefore imports the model modules, and nothing else of this project.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamics_model import KINDS, DynamicsEnsemble, load_ensemble


class EnsemblePredictor:
    """The object that ``mlflow.pyfunc.load_model`` wraps: predicts the next state with all members together."""

    def __init__(self, ensemble: DynamicsEnsemble) -> None:
        self.ensemble = ensemble

    @torch.no_grad()
    def predict(self, rows: dict[str, np.ndarray], params: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Predicts the distribution of the next state, a mixture of what the members predict.

        Args:
            rows: ``states`` ``(rows, state_dim)`` and ``actions`` ``(rows, action_dim)``, float32, raw units.
            params: MLflow's; there are none.

        Returns:
            ``mean`` and ``std`` (standard deviation) of the mixture, both ``(rows, state_dim)``, raw units. Members
            that predict a point have no variance of their own: ``std`` is then the spread of the points.
        """
        mean, variance = self.ensemble.moments(rows["states"], rows["actions"])  # (ensemble, rows, state_dim)
        std = (variance.mean(dim=0) + mean.var(dim=0, correction=0)).sqrt()
        return {"mean": mean.mean(dim=0).numpy(), "std": std.numpy()}


def _load_pyfunc(path: str) -> EnsemblePredictor:
    """Loads a logged ``model.pkl``; MLflow calls a function of this name with the path."""
    return EnsemblePredictor(load_ensemble(path))


def save_mlflow_model(path: Path, folder: Path, run_id: str, model_id: str) -> None:
    """Writes a ``model.pkl`` as an MLflow model to a new folder.

    Args:
        path: The ``model.pkl``.
        folder: Where it goes.
        run_id: The ensemble's run.
        model_id: Id that MLflow has given to the model.

    Raises:
        ValueError: If the file is no model.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    ensemble = load_ensemble(path)
    sizes = {"states": ensemble.state_dim, "actions": ensemble.action_dim}
    sizes |= {"mean": ensemble.state_dim, "std": ensemble.state_dim}
    states, actions, *outputs = (TensorSpec(np.dtype("float32"), (-1, size), name) for name, size in sizes.items())
    modules = ["dynamics_model", *{module: None for module, _ in KINDS.values()}]  # each once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an example of inputs, which it asks for, would add nothing
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module="mlflow_model",
            data_path=str(path),
            code_paths=[__file__, *(importlib.import_module(module).__file__ for module in modules)],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            signature=ModelSignature(Schema([states, actions]), Schema(outputs)),
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
        )
