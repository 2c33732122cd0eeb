"""Peak memory of a ``learn_model.py`` run, printed as JSON: a process of its own for ``around_training.py``.

    python -m benchmarks.memory_probe data/bundled/hopper-medium-demo.hdf5 7

The whole command runs, up to an optimiser step after which memory does not grow any more; then rows are scored as at
the end of an epoch, and the run is left. Peaks: after importing PyTorch, before the first step, and at the end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dynamics_model import DynamicsEnsemble, NormalisedRows

STEPS = 20
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "hopper_pnn.yaml"


def main(argv: list[str]) -> None:
    """Trains on a file with a number of members, and prints the peaks in MiB."""
    import torch  # noqa: F401 - what the other peaks are compared with

    peaks = {"torch": peak_mib()}

    import learn_model
    from benchmarks.step_arms import EnoughRounds
    from dynamics_model import NormalisedRows

    path, members = Path(argv[0]).resolve(), argv[1]
    ensembles: list[DynamicsEnsemble] = []
    steps = 0
    build, select = learn_model.build_ensemble, NormalisedRows.select

    def keep_ensemble(*arguments: Any) -> DynamicsEnsemble:
        ensembles.append(build(*arguments))
        return ensembles[0]

    def stop_in_time(rows: NormalisedRows, indices: Tensor) -> NormalisedRows:
        nonlocal steps
        peaks.setdefault("ready", peak_mib())
        steps += 1
        if steps > STEPS:
            ensembles[0].network.score(NormalisedRows(*(part if part is None else part[:10_000] for part in rows)))
            raise EnoughRounds
        return select(rows, indices)

    learn_model.build_ensemble, NormalisedRows.select = keep_ensemble, stop_in_time
    command = ["--dataset", str(path), "--config", str(CONFIG), "--params", f"ensemble_size={members}"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            learn_model.main([*command, "--holdout_ratio", "0.1", "--quiet", "--cpu"])
        except EnoughRounds:
            peaks["training"] = peak_mib()
        os.chdir("/")
    print(json.dumps(peaks))


def peak_mib() -> float:
    """Returns the largest resident size so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands its getrusage on from the parent process
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main(sys.argv[1:])
