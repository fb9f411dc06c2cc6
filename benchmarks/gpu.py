"""The table of `make bench-gpu`: the paper's CIFAR-10 network trained and sampled from in bf16, on one GPU.

    python benchmarks/gpu.py [part ...] [--try]

The parts are training, sampling, memory and profile; all of them take about eight minutes, most of it compilation. Ours
is what `ddpm_lit train --preset cifar10 --precision bf16 --channels-last --compile` does. The images are random: no
speed depends on what they show. `--try` runs every line of this file on a small network, on the CPU if need be, to see
that it works before a GPU is rented; its numbers mean nothing.

Beside the peers stand the paper's own numbers, of a TPU v3-8: 21 steps of training in a second, and 17 s for 256 images
of 1000 steps. Model FLOP utilisation counts 36.3 GFLOP for an image and a step of training (three forward passes),
against a peak in bf16 of 989 TFLOP/s (H100 SXM, H200), or of what the environment variable PEAK_TFLOPS says.
"""

import contextlib
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from compare import line, lines, quiet, read_header, spread, take_turns, wait
from peers import NAMES, PEERS, SHAPES, PlainLoop, fresh
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.images import Images
from ddpm_lit.processes import peak_memory, reset_peak_memory
from ddpm_lit.sampler import ancestral_sample, ddim_sample
from ddpm_lit.trainer import TrainConfig, Trainer
from ddpm_lit.unet import PRESETS

TRY = "--try" in sys.argv
CASE, BATCH, MANY = ("digits", 8, 4) if TRY else ("cifar10", 128, 256)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GFLOP, PEAK = 36.3, float(os.environ.get("PEAK_TFLOPS", "989"))
WARM, STEPS, ROUNDS = (2, 2, 2) if TRY else (40, 40, 9)  # steps before the clock starts, in a round, and rounds
PRODUCTS = re.compile("conv|gemm|matmul|cutlass|cudnn|xmma|wgrad|dgrad|flash|fmha|::mm|bmm|nvjet", re.IGNORECASE)


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


def images() -> Images:
    "As many random images as CIFAR-10 has for training."
    n = 64 if TRY else 50_000
    draw = torch.Generator().manual_seed(0)
    return Images(torch.randint(256, (n, *SHAPES[CASE]), dtype=torch.uint8, generator=draw))


def config(steps: int) -> TrainConfig:
    "The settings of the preset, with the flags for a GPU."
    recipe = PRESETS[CASE].training | dict(steps=steps, batch_size=BATCH, progress=False, track="none")
    return TrainConfig(**recipe, precision="bf16", channels_last=True, compile=True)


def our_trainer(steps: int, on_step: Callable | None = None) -> Trainer:
    return Trainer(DDPM(fresh("ddpm_lit", CASE), linear_schedule()), images(), config(steps), on_step=on_step)


def their_step(name: str, compiled: bool) -> Callable:
    "A step of training by diffusers' parts around the network of `name`, on batches that lie on the device as ours do."
    return PlainLoop(name, CASE, images(), replace(config(1), compile=compiled), device=DEVICE).step


def training() -> None:
    """`STEPS` steps of each in turn; ours are those of a real `fit`, which waits while the others have theirs.

    Before the clock starts, each has `WARM` steps: what is compiled is compiled in these.
    """
    others = {f"parts of {name}": their_step(name, False) for name in NAMES[1:]}
    others["parts of diffusers, compiled"] = their_step("diffusers", True)
    took, began = defaultdict(list), 0.0
    for step in others.values():
        for _ in range(WARM):
            step()

    def between(done: int, loss: torch.Tensor) -> None:
        nonlocal began
        if done >= WARM and (done - WARM) % STEPS == 0:
            wait()
            if done > WARM:
                took["ddpm_lit"].append(time.perf_counter() - began)
                for name, step in others.items():
                    began = time.perf_counter()
                    for _ in range(STEPS):
                        step()
                    wait()
                    took[name].append(time.perf_counter() - began)
            began = time.perf_counter()

    our_trainer(WARM + STEPS * ROUNDS, between).fit()
    show = partial(spread, unit="ms a step", scale=1000 / STEPS)
    lines(f"training step, batch {BATCH}, bf16, channels-last; `Trainer.fit` compiled", took, show)
    rate = STEPS / median(took["ddpm_lit"])
    used = f"{rate * BATCH * GFLOP / 10 / PEAK:.0f} % of {PEAK:.0f} TFLOP/s"
    line("the same", "ddpm_lit", f"{rate:.1f} steps/s, {used}", f"{21 / rate:.2f} of the paper's time on 8 TPU cores")


def our_sampling(sampler: str, steps: int, x_T) -> Callable:
    "Our samplers with the loop compiled."
    net = PEERS["ddpm_lit"](CASE, DEVICE).net.to(memory_format=torch.channels_last)
    m, shape = DDPM(net, linear_schedule(), variance="beta").to(DEVICE), tuple(x_T.shape)
    draw = torch.Generator(DEVICE).manual_seed(0)

    def work() -> None:
        with autocast():
            if sampler == "ddim":
                ddim_sample(m, shape, steps, x_T=x_T, compile=True)
            else:
                ancestral_sample(m, shape, x_T, draw, steps=steps, compile=True)

    return work


def their_sampling(name: str, sampler: str, steps: int, x_T) -> Callable:
    peer = PEERS[name](CASE, DEVICE)
    peer.net.to(memory_format=torch.channels_last)

    def work() -> None:
        with quiet(), autocast():
            peer.sample(x_T, sampler, steps)

    return work


def sampling() -> None:
    x_T = torch.randn(MANY, *SHAPES[CASE], device=DEVICE).contiguous(memory_format=torch.channels_last)
    for sampler, steps, rounds, paper in (("ddim", 50, 5, None), ("ancestral", 1000, 1, 17)):
        works = {"ddpm_lit": our_sampling(sampler, steps, x_T)}
        works |= {name: their_sampling(name, sampler, steps, x_T) for name in NAMES[1:]}
        took = take_turns(works, rounds)
        lines(f"{MANY} × {CASE}, {sampler}, {steps} steps, bf16; our loop compiled", took)
        if paper:
            line("the same", "the paper, 8 TPU cores", f"{paper} s", f"{median(took['ddpm_lit']) / paper:.2f}")


def memory() -> None:
    "The most that the device's allocator has held (on the CPU: this process), in a few steps of training of each."

    def measured(work: Callable) -> float:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        reset_peak_memory(torch.device(DEVICE))
        work()
        return peak_memory(torch.device(DEVICE)) / 2**30

    def theirs(name: str) -> None:
        step = their_step(name, False)
        for _ in range(3):
            step()

    peaks = {"ddpm_lit": [measured(lambda: our_trainer(3).fit())]}
    peaks |= {f"parts of {name}": [measured(partial(theirs, name))] for name in NAMES[1:]}
    lines(f"peak memory of training, batch {BATCH}, bf16", peaks, lambda values: f"{values[0]:.2f} GiB")


def kernels(profiled) -> dict[str, float]:
    "Microseconds of each kernel of the device (on the CPU: of each operation), without what only brackets others."
    kind, spent = (DeviceType.CUDA, "device") if DEVICE == "cuda" else (DeviceType.CPU, "cpu")
    events = [event for event in profiled.key_averages() if event.device_type == kind and not event.is_user_annotation]
    return {event.key: getattr(event, f"self_{spent}_time_total") for event in events}


def profiling() -> None:
    "Where the time of ten steps of `fit` goes: products (convolutions, matrices, attention), and the largest others."
    warm, active = (1, 1) if TRY else (WARM, 10)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=kinds, schedule=schedule(wait=warm, warmup=1, active=active, repeat=1)) as profiled:
        our_trainer(warm + active + 2, on_step=lambda *_: profiled.step()).fit()
    found = kernels(profiled)
    total, products = sum(found.values()), sum(us for name, us in found.items() if PRODUCTS.search(name))
    shown = f"{products / active / 1000:.2f} of {total / active / 1000:.2f} ms a step"
    line("kernels: convolutions, matrix products, attention", "ddpm_lit", shown, f"{products / total:.0%}")
    rest = sorted((us, name) for name, us in found.items() if not PRODUCTS.search(name))
    for us, name in rest[:-11:-1]:
        shown = f"{us / active / 1000:.2f} ms a step"
        line(f"kernels: `{name[:60].replace('|', ' ')}`", "ddpm_lit", shown, f"{us / total:.0%}")


PARTS = dict(training=training, sampling=sampling, memory=memory, profile=profiling)

if __name__ == "__main__":
    asked = [word for word in sys.argv[1:] if word != "--try"]
    if set(asked) - set(PARTS):
        sys.exit(f"parts must be among {', '.join(PARTS)}; got {', '.join(asked)}")
    if DEVICE == "cpu" and not TRY:
        sys.exit("bench-gpu: there is no GPU here. `make bench` measures on the CPU; --try only tries this script out")
    read_header(f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}")
    with contextlib.suppress(KeyboardInterrupt):
        for part in asked or PARTS:
            PARTS[part]()
