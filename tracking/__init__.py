"""Where the numbers of a training go: progress, CSV, MLflow, and the folder of a run."""
