"""A planner as published iCEM code has it: bare pickle, elites on held-out rows, a threshold, batches that shrink.

python icem_planner.py DATASET MODEL [MODEL ...] prints a line of JSON per model.
"""

import json
import pickle
import sys

import numpy as np
import torch

ELITES, POPULATION, HORIZON = 4, 60, 12


class FakeEnv:
    """The pessimistic model that the planner rolls its candidates out in."""

    def __init__(self, models):
        self.models = models
        self.model = models[0]
        self.device = self.model.device

    def setup(self, dataset, metadata, coefficient):
        self.obs_mask = metadata["obs_mask"]
        s = np.concatenate([p["observations"][:-1] for p in dataset])
        a = np.concatenate([p["actions"][:-1] for p in dataset])
        sp = np.concatenate([p["observations"][1:] for p in dataset])
        self.losses, best = None, np.arange(len(self.models))
        if len(self.models) > ELITES and hasattr(self.model, "holdout_idx"):
            held_out = self.model.holdout_idx
            s_val, a_val, sp_val = s[held_out], a[held_out], sp[held_out]
            s, a = np.delete(s, held_out, axis=0), np.delete(a, held_out, axis=0)
            self.losses = [m.compute_loss_batched(s_val, a_val, sp_val) for m in self.models]
            best = np.argsort(np.array(self.losses))
        self.elites = best[:ELITES].tolist()
        self.models = [self.models[i] for i in self.elites]
        delta = np.zeros(s.shape[0])
        for i, first in enumerate(self.models):
            prediction = first.predict_batched(s, a)
            for second in self.models[i + 1 :]:
                difference = prediction - second.predict_batched(s, a)
                delta = np.maximum(delta, np.linalg.norm(difference, axis=-1))
        self.threshold = float(np.mean(delta) + coefficient * np.std(delta))

    @torch.no_grad()
    def simulate(self, acts, s, every_member):
        """Rolls out action sequences; those of too much disagreement leave, so that the others' batch shrinks."""
        s = s * self.obs_mask
        s = torch.Tensor(s).expand((acts.shape[0], s.shape[0])).to(self.device).float()
        if every_member:
            s = s.repeat(len(self.models), 1, 1)  # (members, population, state_dim)
        acts = torch.from_numpy(acts).to(self.device).float()
        sizes, first_mean = [], None
        for step in range(acts.shape[1]):
            predictions = []
            for j, model in enumerate(self.models):
                prediction = model.forward(s[j] if every_member else s, acts[:, step])
                predictions.append(prediction[0] if type(prediction) is tuple else prediction)
            disagreement = torch.zeros(predictions[0].shape[0]).to(self.device)
            for i in range(len(self.models)):
                for j in range(i + 1, len(self.models)):
                    disagreement = torch.max(disagreement, (predictions[i] - predictions[j]).norm(dim=-1))
            known = torch.where(disagreement <= self.threshold)[0]
            predictions = torch.stack(predictions)
            first_mean = predictions.mean(dim=(0, 1)) if first_mean is None else first_mean
            acts, predictions = acts[known], predictions[:, known]
            s = predictions if every_member else predictions.mean(dim=0)
            sizes.append(len(known))
            if s.numel() == 0:
                break
        return sizes, first_mean.cpu().numpy().tolist()


with open(sys.argv[1], "rb") as file:
    dataset, dataset_metadata = pickle.load(file)
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        models = pickle.load(file)
    if type(models) is tuple and len(models) == 2:
        (models, metadata) = models
    env = FakeEnv(models)
    env.setup(dataset, dataset_metadata, coefficient=1.0)
    acts = np.random.default_rng(0).normal(size=(POPULATION, HORIZON, dataset[0]["actions"].shape[1]))
    start = dataset[0]["observations"][0]
    shared, first_mean = env.simulate(acts, start, every_member=False)
    separate, _ = env.simulate(acts, start, every_member=True)
    told = {"types": [type(models).__name__, type(metadata).__name__], "holdout_idx": hasattr(models[0], "holdout_idx")}
    told |= {"losses": env.losses, "elites": env.elites, "threshold": env.threshold, "first_mean": first_mean}
    print(json.dumps(told | {"shared": shared, "separate": separate, "numpy": np.__version__}))
