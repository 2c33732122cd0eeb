"""Where the numbers of a training go (CSV, MLflow, progress), and the folder that a run owns on disk."""
