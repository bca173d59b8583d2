"""How the benchmarks time, and how they name the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
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


def one_process_each(
    module: str, contenders: list[str], repeats: int, flags: list[str]
) -> dict[str, list[dict]]:
    """What `python -m MODULE --one CONTENDER FLAGS` reports, in turn, `repeats` times.

    A process of its own for each, since one's memory allocator, threads and caches would change
    the other's time. The report is the last line of output, in JSON.

    Returns:
        contender -> its reports. One that lacks a package reports {"missing": its name}.
    """
    reports: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name in contenders:
            done = subprocess.run([sys.executable, "-m", module, "--one", name, *flags],
                                  stdout=subprocess.PIPE, text=True, check=True)
            reports[name].append(json.loads(done.stdout.splitlines()[-1]))
    return reports


class PeakMemory:
    """The most memory in use while the block runs, without the page cache's.

    Attributes:
        bytes: peak of the process's own pages, seen every 10 ms; where the kernel does not tell
            them apart, all of its pages.
    """

    def __enter__(self) -> PeakMemory:
        self.bytes = self._now()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self.bytes = max(self.bytes, self._now())

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, self._now())

    @staticmethod
    def _now() -> int:
        try:
            with open("/proc/self/status", encoding="ascii") as file:
                return next(1024 * int(line.split()[1]) for line in file
                            if line.startswith("RssAnon"))
        except (OSError, StopIteration):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else 1024 * peak
