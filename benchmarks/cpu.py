"""The table of `make bench`: this package beside what a user would otherwise pick, on the CPU.

    python benchmarks/cpu.py [part ...]

The parts are network, sampling, likelihood, digits, memory, import and book; without any of them all are done, in less
than ten minutes on two cores. README.md beside this file says how the table is to be read.
"""

import contextlib
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from compare import header, line, lines, processor, quiet, spread, take_turns
from peers import NAMES, PEERS, SHAPES

from ddpm_lit.data import load_images, to_network
from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule

BATCH = 8
PRECISIONS = {
    "float32": (torch.contiguous_format, contextlib.nullcontext),
    "bf16, channels-last": (torch.channels_last, lambda: torch.autocast("cpu", torch.bfloat16)),
}


def network_works(name: str, precision: str) -> dict:
    "Forward and training step of the paper's CIFAR-10 network."
    layout, autocast = PRECISIONS[precision]
    peer, draw = PEERS[name]("cifar10"), torch.Generator().manual_seed(1)
    peer.net.to(memory_format=layout)
    x, eps = (y.contiguous(memory_format=layout) for y in torch.randn(2, BATCH, 3, 32, 32, generator=draw))
    t = torch.randint(1000, (BATCH,), generator=draw)
    return {"forward": peer.forward(x, t, autocast), "training step": peer.training(x, t, eps, autocast)}


def network() -> None:
    for precision in PRECISIONS:
        works = {name: network_works(name, precision) for name in NAMES}
        for work, rounds in (("forward", 9), ("training step", 7)):
            took = take_turns({name: both[work] for name, both in works.items()}, rounds)
            lines(f"CIFAR-10 network, batch {BATCH}, {work}, {precision}", took)


def sampling() -> None:
    for case, n, sampler, steps, rounds in (
        ("cifar10", 1, "ddim", 50, 3),
        ("digits", 64, "ddim", 50, 5),
        ("digits", 64, "ancestral", 1000, 1),
    ):
        x_T = torch.randn(n, *SHAPES[case], generator=torch.Generator().manual_seed(2))
        with quiet():
            took = take_turns({name: partial(PEERS[name](case).sample, x_T, sampler, steps) for name in NAMES}, rounds)
        lines(f"{n} × {case}, {sampler}, {steps} steps", took, partial(spread, unit="ms a step", scale=1000 / steps))


def likelihood() -> None:
    "All T terms of the bound; no peer offers them, so beside T calls of the bare network."
    from ddpm_lit.bound import vlb_terms

    net, x0 = PEERS["ddpm_lit"]("digits").net, to_network(load_images("digits").pixels[:64])
    m, draw = DDPM(net, linear_schedule(), variance="beta"), torch.Generator().manual_seed(0)

    def terms():
        with torch.inference_mode():
            vlb_terms(m, x0, draw)

    def bare():
        with torch.inference_mode():
            for t in torch.arange(1000)[:, None].expand(-1, len(x0)):
                net(x0, t)

    took = take_turns({"ddpm_lit": terms, "1000 calls of our bare network": bare}, 1)
    lines("`vlb_terms` of 64 digits, all 1000 of each", took)


GOAL, SEEDS = 5.0, (0, 1)


def digits() -> None:
    from race import ClassifierFeatures, race

    images = load_images("digits")
    features = ClassifierFeatures(images)
    clocks = {name: [race(name, images, features, GOAL, seed) for seed in SEEDS] for name in NAMES}
    lines(
        f"training on digits until 500 samples are within a Fréchet distance of {GOAL:g}, {len(SEEDS)} seeds",
        {name: [clock.seconds for clock in found] for name, found in clocks.items()},
    )
    for name, found in clocks.items():
        steps = ", ".join(f"{clock.steps} ({clock.distance:.1f})" for clock in found)
        line("the steps of these, and the distances", name, steps)


def memory() -> None:
    "The largest resident set (VmHWM, Linux) of a process of its own that does three training steps."
    for precision in PRECISIONS:
        peaks = {}
        for name in NAMES:
            words = [sys.executable, __file__, "--peak", name, precision]
            peaks[name] = [float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)]
        lines(f"peak memory of training, batch {BATCH}, {precision}", peaks, lambda values: f"{values[0]:.0f} MB")


def peak(name: str, precision: str) -> None:
    step = network_works(name, precision)["training step"]
    for _ in range(3):
        step()
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def imports() -> None:
    def importing(name):
        return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True)

    lines("import", take_turns({name: importing(name) for name in ("ddpm_lit", "torch", "diffusers")}, 7))


def book() -> None:
    root, began = Path(__file__).parents[1], time.perf_counter()
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--nbval", "nbs/"], cwd=root, check=True, capture_output=True)
    line("`pytest --nbval nbs/`, all the book", "ddpm_lit", f"{time.perf_counter() - began:.0f} s")


PARTS = {
    "network": network,
    "sampling": sampling,
    "likelihood": likelihood,
    "digits": digits,
    "memory": memory,
    "import": imports,
    "book": book,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        sys.exit(peak(*sys.argv[2:]))
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        sys.exit(f"parts must be among {', '.join(PARTS)}; got {', '.join(unknown)}")
    began = time.perf_counter()
    header(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {processor()}")
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
    print(f"\n{time.perf_counter() - began:.0f} s in all")
