"""Datasets: a name or a file in, validated trajectories and their transitions out."""
