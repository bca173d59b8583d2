"""Print all tables, `python -m benchmarks`, or some, `python -m benchmarks captions search`."""

from __future__ import annotations

import subprocess
import sys

TABLES = ("captions", "search", "page", "input", "train", "embed", "export", "memory", "gpu")

if __name__ == "__main__":
    for table in sys.argv[1:] or TABLES:
        print(f"\n== {table}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{table}"], check=True)
