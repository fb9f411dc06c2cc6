"Works that take turns, and the lines of a table about them."

import statistics
import time
from collections.abc import Callable


def take_turns(works: dict[str, Callable], rounds: int, wait: Callable = lambda: None) -> dict[str, list[float]]:
    """Seconds of each of `works` in `rounds` rounds, after one that does not count.

    In every round all of them run, in turn forwards and backwards, so that whatever else the machine does hits all.
    `wait` is called before the clock is read (on a GPU, it waits for it).
    """
    took = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            wait()
            began = time.perf_counter()
            works[name]()
            wait()
            took[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in took.items()}


def seconds(values: list[float]) -> str:
    "Median and range, in seconds or milliseconds."
    scale, unit = (1, "s") if statistics.median(values) >= 0.1 else (1000, "ms")
    middle, low, high = (scale * f(values) for f in (statistics.median, min, max))
    return f"{middle:.3g} {unit} ({low:.3g}–{high:.3g})"


def line(work: str, who: str, shown: str, ratio: str = "") -> None:
    "Print one line of the table."
    print(f"| {work} | {who} | {shown} | {ratio} |", flush=True)


def header() -> None:
    print("| work | whose | median (range) | ours / theirs |")
    print("| --- | --- | --- | --- |", flush=True)


def lines(work: str, took: dict[str, list[float]]) -> None:
    "The lines of one work: ours, then each peer with the median over the rounds of ours over theirs, and its range."
    for who, values in took.items():
        ratios = sorted(a / b for a, b in zip(took["ddpm_lit"], values, strict=True))
        told = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f})" if who != "ddpm_lit" else ""
        line(work, who, seconds(values), told)
