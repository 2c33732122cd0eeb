"""Pessimistic policy optimisation as published MOReL code has it: frozen members, Jacobians, a rollout per member.

python morel.py DATASET MODEL [MODEL ...] prints a line of JSON per model.
"""

import json
import pickle
import sys

import numpy as np
import torch
from torch.func import jacrev, vmap

ELITES, STEPS, BATCH = 4, 5, 256


def load_ensemble(path, device):
    with open(path, "rb") as file:
        ensemble = pickle.load(file)
    assert type(ensemble) is tuple, "the model must come with metadata"
    (ensemble, metadata) = ensemble
    for model in ensemble:
        model.to(device)
    if "obs_mask" in metadata.keys():
        metadata.pop("obs_mask")
    for model in ensemble:
        model.nn.eval()
        for parameter in model.nn.parameters():
            parameter.requires_grad = False
    return ensemble, metadata


def select_elites(ensemble, s, a, sp):
    best = range(len(ensemble))
    if len(ensemble) > ELITES and hasattr(ensemble[0], "holdout_idx"):
        losses = []
        if ensemble[0].holdout_idx is not None:
            held_out = ensemble[0].holdout_idx
            s_val, a_val, sp_val = s[held_out], a[held_out], sp[held_out]
            s, a, sp = (np.delete(part, held_out, axis=0) for part in (s, a, sp))
            for model in ensemble:
                losses.append(model.compute_loss_batched(s_val, a_val, sp_val))
        else:
            for model in ensemble:
                losses.append(model.compute_loss_batched(s, a, sp))
        best = np.argsort(np.array(losses)).tolist()
    return list(best)[:ELITES], s, a, sp


def jacobian_scale(models, s, a):
    """One over the root of the summed squares of each row of the Jacobian, over members and a first batch of rows."""

    def wrap(model):
        def predict(s, a):
            prediction = model.nn(s.reshape(1, -1), a.reshape(1, -1))
            return prediction[0] if type(prediction) is tuple else prediction

        return predict

    s = torch.Tensor(s[:BATCH]).to(models[0].device).requires_grad_(True)
    a = torch.Tensor(a[:BATCH]).to(models[0].device).detach()
    squares = []
    for model in models:
        jacobians = vmap(jacrev(wrap(model), argnums=0))(s, a)
        squares.append((jacobians**2).sum(dim=-1).reshape(len(s), -1))
    variance = torch.stack(squares).mean(dim=0).mean(dim=0).detach()
    return np.array((1.0 / torch.sqrt(variance + 1e-8)).cpu())


def rollout(model, policy, starts):
    s = torch.from_numpy(np.array(starts)).float().to(model.device)
    observations = []
    for _ in range(STEPS):
        sp = model.forward(s, torch.clamp(policy(s), -1.0, 1.0))
        if type(sp) is tuple:
            mean, _ = sp
            sp = mean
        observations.append(s.to("cpu").data.numpy())
        s = torch.clamp(sp, -1e3, 1e3).detach()
    return np.swapaxes(np.array(observations), 0, 1)  # (starts, steps, state_dim)


with open(sys.argv[1], "rb") as file:
    paths, dataset_metadata = pickle.load(file)
s = np.concatenate([p["observations"][:-1] for p in paths])
a = np.concatenate([p["actions"][:-1] for p in paths])
sp = np.concatenate([p["observations"][1:] for p in paths])
weight = torch.linspace(-1, 1, s.shape[1] * a.shape[1]).reshape(s.shape[1], a.shape[1]) / 10
for path in sys.argv[2:]:
    ensemble, metadata = load_ensemble(path, "cpu")
    elites, s_train, a_train, sp_train = select_elites(ensemble, s, a, sp)
    models = [ensemble[i] for i in elites]
    scale = jacobian_scale(models, s_train, a_train)
    predictions = [model.predict_batched(s_train, a_train, 64) for model in models]
    delta = np.zeros(len(s_train))
    for i, first in enumerate(predictions):
        for second in predictions[i + 1 :]:
            error = first - second
            error *= scale
            delta = np.maximum(delta, np.linalg.norm(error, axis=-1))
    starts = [p["observations"][0] for p in paths]
    told = {
        "elites": elites,
        "rows": len(s_train),
        "loss": [float(model.compute_loss_batched(s_train, a_train, sp_train)) for model in models],
        "scale": scale.tolist(),
        "threshold": float(delta.mean() + 2 * delta.std()),
        "rollout": rollout(models[0], lambda s: s @ weight, starts)[:, -1].tolist(),
        "frozen": not any(parameter.requires_grad for model in ensemble for parameter in model.nn.parameters()),
        "metadata": {name: str(value) for name, value in metadata.items()},
        "env_name": dataset_metadata["env_name"],
    }
    print(json.dumps(told))
