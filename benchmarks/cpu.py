"""The table of `make bench`: this package beside what a user would otherwise pick, on the CPU.

    python benchmarks/cpu.py [part ...]

The parts are network, sampling, likelihood, digits, memory, import and book. Without any of them all but the last are
done, in less than ten minutes on two cores; the book alone takes four. README.md beside this file says how the table is
to be read.
"""

import contextlib
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from compare import line, lines, processor, quiet, read_header, spread, take_turns
from peers import NAMES, PEERS, SHAPES

from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.images import to_network
from ddpm_lit.loading import load_images
from ddpm_lit.processes import peak_memory

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
        for work in ("forward", "training step"):
            took = take_turns({name: both[work] for name, both in works.items()}, 4)
            lines(f"CIFAR-10 network, batch {BATCH}, {work}, {precision}", took)


def bare(net: torch.nn.Module, x: torch.Tensor, calls: int) -> None:
    "The network as often as a sampler calls it, and nothing else."
    with torch.inference_mode():
        for t in torch.arange(calls)[:, None].expand(-1, len(x)):
            net(x, t)


def sampling() -> None:
    for case, n, sampler, steps, rounds in (
        ("cifar10", 1, "ddim", 50, 2),
        ("digits", 64, "ddim", 50, 3),
        ("digits", 4, "ancestral", 1000, 2),
    ):
        x_T = torch.randn(n, *SHAPES[case], generator=torch.Generator().manual_seed(2))
        peers = {name: PEERS[name](case) for name in NAMES}
        works = {name: partial(peer.sample, x_T, sampler, steps) for name, peer in peers.items()}
        works["our bare network, called as often"] = partial(bare, peers["ddpm_lit"].net, x_T, steps)
        with quiet():
            took = take_turns(works, rounds, warm=int(rounds > 2))
        lines(f"{n} × {case}, {sampler}, {steps} steps", took, partial(spread, unit="ms a step", scale=1000 / steps))


def likelihood() -> None:
    "All T terms of the bound; no peer offers them, so beside T calls of the bare network."
    from ddpm_lit.bound import vlb_terms

    net, x0 = PEERS["ddpm_lit"]("digits").net, to_network(load_images("digits").pixels[:16])
    m, draw = DDPM(net, linear_schedule(), variance="beta"), torch.Generator().manual_seed(0)

    def terms():
        with torch.inference_mode():
            vlb_terms(m, x0, draw)

    took = take_turns({"ddpm_lit": terms, "our bare network, called as often": partial(bare, net, x0, 1000)}, 1, warm=0)
    lines("`vlb_terms` of 16 digits, all 1000 of each", took)


GOAL, SEEDS = 8.0, (0,)  # more seeds are worth their time: see README.md


def digits() -> None:
    "Ours and diffusers' parts; the third takes three times as long for a step of its larger network."
    from race import ClassifierFeatures, race

    images = load_images("digits")
    features = ClassifierFeatures(images)
    for precision, flags in (("float32", {}), ("bf16, channels-last", dict(precision="bf16", channels_last=True))):
        clocks = {name: [race(name, images, features, GOAL, seed, **flags) for seed in SEEDS] for name in NAMES[:2]}
        work = f"digits, {precision}: training until samples are within a Fréchet distance of {GOAL:g}"
        lines(f"{work}; seeds: {len(SEEDS)}", {name: [clock.seconds for clock in of] for name, of in clocks.items()})
        lines("a step of these", {name: [clock.seconds / clock.steps for clock in of] for name, of in clocks.items()})
        told = [", ".join(f"{clock.steps} to {clock.distance:.1f}" for clock in of) for of in clocks.values()]
        line("the steps of these, and the distances", "; ".join(clocks), "; ".join(told))


def memory() -> None:
    "The largest resident set (VmHWM, Linux) of a process of its own that does two training steps."
    for precision in PRECISIONS:
        peaks = {}
        for name in NAMES:
            words = [sys.executable, __file__, "--peak", name, precision]
            peaks[name] = [float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)]
        lines(f"peak memory of training, batch {BATCH}, {precision}", peaks, lambda values: f"{values[0]:.0f} MB")


def peak(name: str, precision: str) -> None:
    step = network_works(name, precision)["training step"]
    for _ in range(2):
        step()
    print(peak_memory(torch.device("cpu")) / 2**20)


NEEDED = "DDPM, TrainConfig, Trainer, UNet, ddim_sample, linear_schedule, load_images, save_grid, to_pixels"
IMPORTS = {
    "import, nothing used": dict(ddpm_lit="import ddpm_lit", torch="import torch"),
    "import of what the README's ten lines use": dict(
        ddpm_lit=f"from ddpm_lit import {NEEDED}",
        torch="import torch",
        diffusers="from diffusers import DDIMScheduler, UNet2DModel",
    ),
}


def imports() -> None:
    "Python itself takes a part of each."
    for work, told in IMPORTS.items():
        words = {name: [sys.executable, "-c", code] for name, code in told.items()}
        works = {name: partial(subprocess.run, command, check=True) for name, command in words.items()}
        lines(work, take_turns(works, 2))


def book() -> None:
    "One chapter after the other, as a reader runs it; checked, so that a book that fails has no time."
    root, began, calm = Path(__file__).parents[1], time.perf_counter(), os.environ | dict(OMP_WAIT_POLICY="PASSIVE")
    words = [sys.executable, "-m", "pytest", "--nbval", "nbs/"]
    subprocess.run(words, cwd=root, env=calm, check=True, capture_output=True)
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
    read_header(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {processor()}")
    for part in sys.argv[1:] or list(PARTS)[:-1]:
        PARTS[part]()
    print(f"\n{time.perf_counter() - began:.0f} s in all")
