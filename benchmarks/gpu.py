"""The table of `make bench-gpu`: the paper's CIFAR-10 network at batch 128 in bf16, and sampling from it, on a GPU.

    python benchmarks/gpu.py [cuda]

Beside the peers stand the paper's own numbers, on a TPU v3-8: 21 steps of training in a second, and 17 s for 256 images
by 1000 steps. Model FLOP utilisation counts 36.3 GFLOP for an image and step of training (three forward passes),
against the peak in bf16 that is given by the environment variable PEAK_TFLOPS (989 for an H100 or H200).
"""

import contextlib
import functools
import os
import sys

import torch
from compare import header, line, lines, take_turns
from cpu import quiet
from peers import NAMES, PEERS, SHAPES

GFLOP, PEAK = 36.3, float(os.environ.get("PEAK_TFLOPS", "989"))


def training(device: str, batch: int, rounds: int) -> None:
    "Ten steps at a time, eager and compiled."
    autocast = functools.partial(torch.autocast, device, torch.bfloat16)
    draw = torch.Generator(device).manual_seed(1)
    x, eps = torch.randn(2, batch, *SHAPES["cifar10"], generator=draw, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.randint(1000, (batch,), generator=draw, device=device)
    works = {}
    for name in NAMES:
        peer = PEERS[name]("cifar10", device)
        peer.net.to(memory_format=torch.channels_last)
        if name == "ddpm_lit":
            peer.predict = torch.compile(peer.net)
        step = peer.training(x, t, eps, autocast)
        works[name] = lambda step=step: [step() for _ in range(10)]
    took = take_turns(works, rounds, waiting(device))
    lines(f"10 training steps of batch {batch}, bf16, channels-last; ours compiled", took)
    steps = 10 / sorted(took["ddpm_lit"])[rounds // 2]
    used = f"{steps * batch * GFLOP / 10 / PEAK:.0f} % of {PEAK:.0f} TFLOP/s"
    line("the same", "ddpm_lit", f"{steps:.1f} steps/s, {used}", f"{steps / 21:.2f} times the paper's")


def waiting(device: str):
    "What waits for the device."
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def sampling(device: str, n: int, kinds, rounds: int) -> None:
    x_T = torch.randn(n, *SHAPES["cifar10"], device=device)
    for sampler, steps in kinds:
        with quiet(), torch.autocast(device, torch.bfloat16):
            peers = {name: PEERS[name]("cifar10", device) for name in NAMES}
            works = {name: functools.partial(peer.sample, x_T, sampler, steps) for name, peer in peers.items()}
            took = take_turns(works, rounds, waiting(device))
        lines(f"{n} CIFAR-10 images, {sampler}, {steps} steps, bf16", took)


def memory(device: str, batch: int) -> None:
    "Peak memory of a training step of each."
    autocast = functools.partial(torch.autocast, device, torch.bfloat16)
    for name in NAMES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        x, eps = torch.randn(2, batch, *SHAPES["cifar10"], device=device)
        t = torch.zeros(batch, dtype=torch.long, device=device)
        PEERS[name]("cifar10", device).training(x, t, eps, autocast)()
        shown = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
        line(f"peak memory of a training step of batch {batch}, bf16", name, shown)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: there is no GPU here; `make bench` measures on the CPU")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    header()
    with contextlib.suppress(KeyboardInterrupt):
        training("cuda", 128, 9)
        memory("cuda", 128)
        sampling("cuda", 256, [("ddim", 50), ("ancestral", 1000)], 1)
