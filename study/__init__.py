"""Comparing ensembles: a grid of trainings, its paired statistics and its report."""
