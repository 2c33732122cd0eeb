"""Evaluation: how good a trained ensemble is on trajectories that it never saw."""
