"Works that take turns, and the lines of a table about them."

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def wait() -> None:
    "Until a GPU has done what it was told."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(works: dict[str, Callable], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each of `works` in `rounds` rounds, after `warm` that do not count.

    In every round all of them run, in turn forwards and backwards, so that whatever else the machine does hits all.
    """
    took = {name: [] for name in works}
    for turn in range(warm + rounds):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            wait()
            began = time.perf_counter()
            works[name]()
            wait()
            took[name].append(time.perf_counter() - began)
    return {name: values[warm:] for name, values in took.items()}


def spread(values: list[float], unit: str, scale: float = 1.0) -> str:
    "Median and range."
    middle, low, high = (f(values) * scale for f in (statistics.median, min, max))
    return f"{middle:.3g} {unit} ({low:.3g}–{high:.3g})"


def seconds(values: list[float]) -> str:
    "Median and range, in seconds or milliseconds."
    return spread(values, "s") if statistics.median(values) >= 0.1 else spread(values, "ms", 1000)


def read_header(machine: str) -> None:
    "Print what was measured on, and the head of the table."
    print(f"{machine}\n\n| work | whose | median (range) | ours / theirs |\n| --- | --- | --- | --- |", flush=True)


def line(work: str, who: str, shown: str, ratio: str = "") -> None:
    "Print one line of the table."
    print(f"| {work} | {who} | {shown} | {ratio} |", flush=True)


def lines(work: str, took: dict[str, list[float]], show: Callable[[list[float]], str] = seconds) -> None:
    "The lines of one work: ours, then each peer with the median over the rounds of ours over theirs, and its range."
    ours = next(iter(took))
    for who, values in took.items():
        ratios = sorted(a / b for a, b in zip(took[ours], values, strict=True))
        told = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f})" if who != ours else ""
        line(work, who, show(values), told)


@contextlib.contextmanager
def quiet():
    "Without the progress bars of a peer that has no switch for them."
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def processor() -> str:
    "The name of the processor, and how many cores this process may use."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        told = Path("/proc/cpuinfo").read_text()
        name = told.split("model name")[1].split(":")[1].split("\n")[0].strip()
        kinds = [kind for kind in ("avx512f", "avx512_bf16", "amx_bf16") if kind in told]
    except (OSError, IndexError):
        name, kinds = platform.processor() or platform.machine(), []
    return f"{name}, {cores} cores{', ' if kinds else ''}{' '.join(kinds)}"
