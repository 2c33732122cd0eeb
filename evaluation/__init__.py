"""What a trained ensemble is worth on trajectories that it never saw."""
