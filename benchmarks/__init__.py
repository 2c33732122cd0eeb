"""Benchmarks: each script measures to a CSV, draws from the CSV, and rewrites its tables in ``README.md``."""
