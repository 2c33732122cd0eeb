"""Ensembles as files without pickles: weights in safetensors, everything else in JSON.

    python -m model_export model.pkl hopper      # writes the folder hopper
    python -m model_export hopper model.pkl      # and back: the same members to the bit

Nothing in such a folder can run code, and programs without PyTorch or Python can read it:

- ``model.safetensors`` holds the tensors, under the names that ``DynamicsEnsemble`` gives them. Weights of members are
  stacked: ``dynamics.weights.0`` is ``(ensemble, in, out)``, ``dynamics.biases.0`` is ``(ensemble, 1, out)``. Members
  share the shifts and scales, which ``Normalisation`` explains, and ``holdout_idx``, which is there if rows were held
  out. State dimensions with a ``delta_scale`` of 0 are no outputs of the networks.
- ``model.json`` holds the format's version, the kind of ensemble, its architecture, and the metadata of ``model.pkl``.

``import_model`` also reads ensembles that the thesis which this project continues published as folders:
``metadata.yaml``, and per member ``model_0/state_dict.pt`` (``layers.0.weight``, ``(out, in)``, ...; bounds of the
log-variance there or in ``extra_params.pt``) and ``model_0/normalization.pt`` (``s_shift``, ``s_scale``, ``a_shift``,
``a_scale``, ``out_shift``, ``out_scale``, ``mask``). Each of these files may be JSON or safetensors instead, under the
same name. Means are those that the thesis's code predicts, up to rounding. Variances differ: that code scaled the
log-variance as if it were a mean, and here it is scaled as one.

Both ways need the libraries of the extra ``export``: safetensors, and PyYAML for ``metadata.yaml``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dynamics_model import (
    FORMAT_VERSION,
    Architecture,
    DynamicsEnsemble,
    DynamicsModel,
    Normalisation,
    load_models,
    member_class,
    random_stream,
)

_WEIGHTS, _DESCRIPTION = "model.safetensors", "model.json"
_MOST_VALUES = 10_000  # of a published metadata.yaml, which has some 50
_EPSILON = 1e-8  # what the thesis's code adds to every scale


def main(argv: list[str] | None = None) -> int:
    """Converts a ``model.pkl`` to a folder, or a folder to a ``model.pkl``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model_export", description="Convert models without pickles.")
    parser.add_argument("source", type=Path, help="a model.pkl, or the folder of an exported or published model")
    parser.add_argument("target", type=Path, help="the folder, or the model.pkl, to make; it must not exist")
    args = parser.parse_args(argv)
    try:
        if args.source.is_dir():
            _write_pickle(*import_model(args.source), args.target)
        else:
            export_model(*load_models(args.source), args.target)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export_model(models: Sequence[DynamicsModel], metadata: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Writes the contents of a ``model.pkl``, as ``load_models`` gives them, to a folder that appears whole or not.

    Raises:
        FileExistsError: If something is at that path already.
        ValueError: If the members cannot be stacked, or the metadata holds something that JSON has not.
        ImportError: If safetensors is not installed.
    """
    safetensors, folder = _library("safetensors.torch", "safetensors"), Path(folder)
    _check_free(folder)
    ensemble = DynamicsEnsemble.from_members(models)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in ensemble.state_dict().items()}
    if ensemble.holdout_idx is not None:
        tensors["holdout_idx"] = torch.as_tensor(ensemble.holdout_idx)
    description = {
        "format_version": FORMAT_VERSION,
        "kind": ensemble.kind,
        "architecture": dataclasses.asdict(ensemble.architecture),
        "metadata": metadata,
    }
    try:
        text = json.dumps(description, indent=2)
    except TypeError as error:
        raise ValueError(f"the model's metadata cannot be written as JSON: {error}") from error
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    (temporary / _WEIGHTS).write_bytes(safetensors.save(tensors))  # its save_file makes a file that is private
    (temporary / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    temporary.rename(folder)


def import_model(folder: str | os.PathLike[str]) -> tuple[list[DynamicsModel], dict[str, Any]]:
    """Reads a folder that ``export_model`` wrote, or that the thesis published, and runs nothing that it holds.

    Returns:
        Members and metadata, as ``load_models`` gives them. Those of a published ensemble have its settings as
        ``config``; which rows it was trained on and which were held out is not known, and every member is an elite.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds no model, or a damaged one.
        ImportError: If safetensors or PyYAML is needed and not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder; give that of an exported or published model")
    try:
        return (_read_export if (folder / _DESCRIPTION).exists() else _read_published)(folder)
    except ImportError:
        raise
    except Exception as error:  # files of strangers can hold anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        expected = f"expected {_DESCRIPTION} and {_WEIGHTS}, or metadata.yaml and model_0, model_1, ..."
        raise ValueError(f"{str(folder)!r} holds no model that can be read ({reason}); {expected}") from error


def _read_export(folder: Path) -> tuple[list[DynamicsModel], dict[str, Any]]:
    description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    if (version := description["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"it has format version {version}, expected {FORMAT_VERSION}")
    metadata = description["metadata"]
    random_stream(metadata["seed"], 0, "sampling")  # the seed is one
    tensors = _read_tensors(folder / _WEIGHTS)
    holdout_idx = tensors.pop("holdout_idx", None)
    normalisation = Normalisation(**{name: tensors[name] for name in Normalisation.names()})
    ensemble_size = len(tensors["dynamics.weights.0"])
    architecture = {
        name: tuple(value) if isinstance(value, list) else value for name, value in description["architecture"].items()
    }
    ensemble_class = member_class(description["kind"]).ensemble_class
    with torch.device("meta"):  # an architecture that the tensors do not fit takes no memory
        ensemble = ensemble_class(Architecture(**architecture), normalisation, ensemble_size)
    ensemble.load_state_dict(tensors, assign=True)
    ensemble.requires_grad_(False)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("it has weights that are not finite")
    if holdout_idx is not None:
        ensemble.holdout_idx = holdout_idx.numpy()
    return [member.eval() for member in ensemble.members()], metadata


def _read_published(folder: Path) -> tuple[list[DynamicsModel], dict[str, Any]]:
    if (settings := folder / "metadata.json").exists():
        config = json.loads(settings.read_text(encoding="utf-8"))
    else:
        text = (folder / "metadata.yaml").read_text(encoding="utf-8")
        yaml = _library("yaml", "PyYAML")
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if (
                isinstance(event, yaml.AliasEvent) or number > _MOST_VALUES
            ):  # with which a few lines stand for gigabytes
                raise ValueError(f"metadata.yaml has aliases, or more than {_MOST_VALUES} values")
        config = yaml.safe_load(text)
    kind = "probabilistic" if config["probabilistic"] else "deterministic"
    # That code knows two activations, and takes the second where a name is not the first one's.
    default = "swish" if config["probabilistic"] else "relu"
    activation = "swish" if config.get("activation_fn", default) == "swish" else "relu"
    members = [
        _read_published_member(folder / f"model_{index}", kind, activation) for index in range(config["ensemble_size"])
    ]
    if not members:
        raise ValueError("its ensemble_size is 0")
    return members, {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": config,
        "dataset": {"name": config.get("dataset") or "unknown", "env_name": None, "sha256": None, "split": {}},
        "scores": [{} for _ in members],
        "elites": list(range(len(members))),
        "seed": int(config.get("base_seed", config.get("seed", 0))),
    }


def _read_published_member(folder: Path, kind: str, activation: str) -> DynamicsModel:
    """Reads a member of the thesis: layers as ``torch.nn.Linear`` has them, one output per head and dimension."""
    weights, scaling = _read_tensors(folder / "state_dict"), _read_tensors(folder / "normalization")
    if any(folder.glob("extra_params.*")):
        weights |= _read_tensors(folder / "extra_params")
    varies = scaling["mask"].bool()  # elsewhere that code predicts no change
    normalisation = Normalisation(
        input_shift=torch.cat((scaling["s_shift"], scaling["a_shift"])),
        input_scale=torch.cat((scaling["s_scale"], scaling["a_scale"])) + _EPSILON,
        delta_shift=torch.where(varies, scaling["out_shift"], 0.0),
        delta_scale=torch.where(varies, scaling["out_scale"] + _EPSILON, 0.0),
        reward_shift=torch.zeros(1),
        reward_scale=torch.ones(1),
    )
    depth = sum(name.endswith(".weight") for name in weights)
    layers = [(weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]) for layer in range(depth)]
    state_dim, action_dim = len(scaling["s_shift"]), len(scaling["a_shift"])
    hidden_size = tuple(len(bias) for _, bias in layers[:-1])
    member = member_class(kind)(Architecture(state_dim, action_dim, hidden_size, activation), normalisation)

    learned = varies.nonzero().flatten()
    outputs = torch.cat([learned + head * state_dim for head in range(member.network.heads)])
    layers[-1] = tuple(values[outputs] for values in layers[-1])
    state = {name: getattr(normalisation, name) for name in Normalisation.names()}
    for layer, (weight, bias) in enumerate(layers):
        state[f"dynamics.weights.{layer}"] = weight.T[None]  # (1, in, out)
        state[f"dynamics.biases.{layer}"] = bias[None, None]
    state |= {name: weights[name][None, :, learned] for name in ("max_logvar", "min_logvar") if name in weights}
    member.network.load_state_dict(state)
    return member.requires_grad_(False).eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads tensors by name, from safetensors or from what ``torch.save`` wrote; without a suffix, from what is there.

    Raises:
        ValueError: If this PyTorch cannot read its own format without running what it holds (CVE-2025-32434).
    """
    if not path.suffix:
        path = next((found for suffix in (".safetensors", ".pt") if (found := path.with_suffix(suffix)).exists()), path)
    if path.suffix == ".safetensors":
        return _library("safetensors.torch", "safetensors").load_file(path)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ValueError(f"PyTorch {torch.__version__} does not read {path.name} safely; use 2.6 or newer")
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _write_pickle(models: list[DynamicsModel], metadata: dict[str, Any], path: Path) -> None:
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(pickle.dumps((models, metadata)))
    temporary.rename(path)


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists already; give another path, or remove it")


def _library(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {package}, which is not installed: pip install {package}") from error


if __name__ == "__main__":
    sys.exit(main())
