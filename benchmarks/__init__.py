"""Timings and memory. `python -m benchmarks` runs every table; the results are in README.md."""
