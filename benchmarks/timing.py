"""Measure time and memory, and describe the machine."""

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
    """Return the seconds of `repeats` calls, after a first one to warm up."""
    return interleaved([function], repeats)[0]


def interleaved(functions: list[Callable[[], object]], repeats: int = 5) -> list[list[float]]:
    """Return the seconds of the calls of each function, called in turn, after one to warm up.

    Calling in turn spreads a slow minute of the machine over all functions.
    """
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                own.append(time.perf_counter() - start)
    return times


def spread(times: list[float], unit: float = 1e3, name: str = "ms") -> str:
    """Format the median, and in brackets the minimum and the maximum."""
    low, middle, high = (unit * value for value in (min(times), statistics.median(times),
                                                    max(times)))
    return f"{middle:,.3g} {name} ({low:,.3g} to {high:,.3g})"


def ratio(times: list[float], others: list[float]) -> str:
    """Format the median, minimum and maximum of the ratios of pairs."""
    pairs = [own / other for own, other in zip(times, others, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def installed(package: str) -> str:
    """Return the version of a package, or '' if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def machine() -> str:
    """Return date, processor and versions, to print above a table."""
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
    """Run `python -m MODULE --one CONTENDER FLAGS` for each contender in turn, `repeats` times.

    Each runs in a new process, so that the memory allocator, threads and caches of one do not
    change the time of another. A report is the last line of output, in JSON.

    Returns:
        The reports of each contender; {"missing": name} if a package is not installed.
    """
    reports: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name in contenders:
            done = subprocess.run([sys.executable, "-m", module, "--one", name, *flags],
                                  stdout=subprocess.PIPE, text=True, check=True)
            reports[name].append(json.loads(done.stdout.splitlines()[-1]))
    return reports


class PeakMemory:
    """Measure the peak memory of the process while the block runs, without the page cache.

    Attributes:
        bytes: peak of the anonymous memory, read every 10 ms; or of the resident memory if the
            kernel does not report that.
    """

    def __enter__(self) -> PeakMemory:
        self.bytes = self._now()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()
        self.bytes = max(self.bytes, self._now())

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
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
