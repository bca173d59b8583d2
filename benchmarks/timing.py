"""How the benchmarks time, and how they name the machine they ran on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version


def seconds(function: Callable[[], object], repeats: int = 5) -> list[float]:
    """Seconds of `repeats` calls, after one that does not count."""
    return interleaved([function], repeats)[0]


def interleaved(functions: list[Callable[[], object]], repeats: int = 5) -> list[list[float]]:
    """Seconds of each function's calls, taken in turn, so that a slow minute hits them all."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                own.append(time.perf_counter() - start)
    return times


def spread(times: list[float], unit: float = 1e3, name: str = "ms") -> str:
    """Median and, in brackets, least and most."""
    low, middle, high = (unit * value for value in (min(times), statistics.median(times),
                                                    max(times)))
    return f"{middle:,.3g} {name} ({low:,.3g} to {high:,.3g})"


def ratio(times: list[float], others: list[float]) -> str:
    """The median of the ratios pair by pair."""
    pairs = [own / other for own, other in zip(times, others, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def installed(package: str) -> str:
    """A package's version, or '' where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def machine() -> str:
    """Date, processor and versions, for the head of a table."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    packages = ", ".join(f"{p} {installed(p)}" for p in ("torch", "numpy", "pillow"))
    return (f"{date.today()}, {name}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"{packages}")
