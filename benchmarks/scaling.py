"""How cost grows: images a second against batch, resolution and steps, in one figure; and several GPUs, on paper.

    python benchmarks/scaling.py [--try]

Runs on a GPU where there is one (bf16, channels-last), else on the CPU (float32). Batches: training and forward passes
of the paper's CIFAR-10 network. Resolution: its network for 256×256, which halves five times, on smaller images too.
Steps: DDIM with the CIFAR-10 network on a GPU, with that of the digits on a CPU. Memory is measured for each batch;
where it ends is read off a straight line through the last two. The figure is scaling.png beside this file.

Nothing about several GPUs is measured: the last table follows from the size of the gradient, the published speeds of
links, and a time per step.
"""

import contextlib
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
from compare import processor, take_turns
from peers import PEERS, SHAPES, Peer

from ddpm_lit.processes import peak_memory, reset_peak_memory
from ddpm_lit.unet import UNet

TRY = "--try" in sys.argv
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BATCHES = (1, 2) if TRY else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if CUDA else (1, 2, 4, 8, 16, 32)
SIZES = (32, 64) if TRY else (32, 64, 128, 256)
STEPS = (2, 4) if TRY else (10, 50, 250, 1000)
AT_ONCE, DRAWN = (8 if CUDA else 1), (256 if CUDA else 64)  # images of each resolution, and images drawn
LINKS = {  # bytes a second in each direction
    "NVLink 4 (H100 SXM: 900 GB/s in both directions together)": 450e9,
    "PCIe 5.0 ×16 (64 GB/s each way)": 64e9,
    "one 400 Gb/s network port for each": 50e9,
}
GOAL = 42.0  # steps a second of one GPU that the table on paper assumes: benchmarks/README.md


def head(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")


def autocast():
    return torch.autocast("cuda", torch.bfloat16) if CUDA else contextlib.nullcontext()


def all_memory() -> int:
    "Bytes of the device."
    if CUDA:
        return torch.cuda.get_device_properties(0).total_memory
    return 1024 * int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])


def rates(net: torch.nn.Module, batch: int, size: int, rounds: int = 2) -> tuple[float, float, int]:
    "Images a second in forward passes and in training, and the peak memory of training."
    x, eps = torch.randn(2, batch, 3, size, size, device=DEVICE)
    t, peer = torch.zeros(batch, dtype=torch.long, device=DEVICE), Peer(net, None)
    works = {"forward": peer.forward(x, t, autocast), "training": peer.training(x, t, eps, autocast)}
    reset_peak_memory(torch.device(DEVICE))
    took = take_turns(works, rounds)
    return batch / median(took["forward"]), batch / median(took["training"]), peak_memory(torch.device(DEVICE))


def measured(net: torch.nn.Module, cases: list[tuple[int, int]], named: int) -> list[tuple]:
    "A table with a line for each (batch, size); it ends where memory does."
    found = []
    head("batch", "size", "forward, images/s", "training, images/s", "peak memory of training")
    net = net.to(DEVICE, memory_format=torch.channels_last if CUDA else torch.contiguous_format)
    for case in cases:
        try:
            forward, training, peak = rates(net, *case)
        except torch.OutOfMemoryError:
            print(f"| {case[0]} | {case[1]}×{case[1]} | out of memory | | |")
            break
        found.append((case[named], forward, training, peak))
        told = f"{forward:.3g} | {training:.3g} | {peak / 2**30:.2f} GiB"
        print(f"| {case[0]} | {case[1]}×{case[1]} | {told} |", flush=True)
    return found


def sampling() -> list[tuple[int, float]]:
    "Images a second for each number of DDIM steps."
    name = "cifar10" if CUDA and not TRY else "digits"
    x_T, found = torch.randn(DRAWN, *SHAPES[name], device=DEVICE), []
    sample = PEERS["ddpm_lit"](name, DEVICE).sample
    print()
    head(f"steps of DDIM, {DRAWN} × {name} at once", "images/s")
    for steps in STEPS:
        with autocast():
            took = take_turns({"": partial(sample, x_T, "ddim", steps)}, 1 if steps > 100 else 3)[""]
        found.append((steps, DRAWN / median(took)))
        print(f"| {steps} | {found[-1][1]:.3g} |", flush=True)
    return found


def on_paper(parameters: int) -> None:
    "What several GPUs would give: a ring sends 2 (n - 1) / n of the gradient through each link, before or during work."
    step, gradient = 1 / GOAL, 4 * parameters
    print(f"\nOn paper, not measured: {1000 * step:.1f} ms a step assumed, {gradient / 1e6:.0f} MB of gradient.\n")
    head("link", "GPUs", "to send", "speed-up with none of it hidden behind the backward pass", "with all of it hidden")
    for link, speed in LINKS.items():
        for n in (1, 2, 8):
            sent = 2 * (n - 1) / n * gradient / speed
            hidden = n * step / max(step, sent)
            print(f"| {link} | {n} | {1000 * sent:.2f} ms | {n * step / (step + sent):.2f} | {hidden:.2f} |")


def draw(batches: list[tuple], sizes: list[tuple], steps: list[tuple], limit: float, path: Path) -> None:
    "The figure: three panels in logarithmic scales, and where memory ends."
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(11, 3.4), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3)
    for ax, rows, xlabel in (
        (panels[0], batches, "batch (32×32)"),
        (panels[1], sizes, f"height and width ({AT_ONCE} at a time)"),
    ):
        for k, (name, colour) in enumerate((("forward", "steelblue"), ("training", "crimson")), start=1):
            ax.plot([row[0] for row in rows], [row[k] for row in rows], "o-", color=colour, label=name)
        ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="images/s")
    panels[0].axvline(limit, color="black", ls=":", label=f"training fills the memory at {limit:,.0f}")
    panels[2].plot(*zip(*steps, strict=True), "o-", color="steelblue", label=f"DDIM, {DRAWN} at once")
    panels[2].set(xscale="log", yscale="log", xlabel="steps of sampling", ylabel="images/s")
    for ax, rows in zip(panels, (batches, sizes, steps), strict=True):
        ax.set_xticks([row[0] for row in rows], [str(row[0]) for row in rows], minor=False)
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter())
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else processor()}\n")
    cifar, large = (UNet.from_preset(name) for name in ("cifar10", "celebahq256"))
    batches = measured(cifar, [(batch, 32) for batch in BATCHES], 0)
    (few, *_, less), (many, *_, more) = batches[-2:]
    limit = many + (all_memory() - more) * (many - few) / (more - less)
    print(f"\nBy a line through the last two, {all_memory() / 2**30:.0f} GiB are full at a batch of {limit:,.0f}.\n")
    sizes = measured(large, [(AT_ONCE, size) for size in SIZES], 1)
    steps = sampling()
    on_paper(sum(p.numel() for p in cifar.parameters()))
    draw(batches, sizes, steps, limit, Path(__file__).with_name("scaling-try.png" if TRY else "scaling.png"))


if __name__ == "__main__":
    main()
