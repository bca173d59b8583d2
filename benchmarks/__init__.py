"""Time and memory measurements. `python -m benchmarks` prints all tables; see README.md."""
