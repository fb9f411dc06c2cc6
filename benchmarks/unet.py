"""Our U-Net against diffusers' `UNet2DModel`: the same weights, the CIFAR-10 network of the paper, batch 8, on the CPU.

    python benchmarks/unet.py [rounds]

Times in seconds, median and range: forward without gradients in evaluation mode, and a training step (forward,
backward, Adam) with the preset's dropout, in float32 and in channels-last memory with bfloat16 autocast. The two take
turns, so that whatever else the machine does hits both; the ratio is taken turn by turn, and its range is that of the
middle half. Memory: the largest resident set of a process of its own that does three training steps, as Linux counts
it (VmHWM); both kinds of process import both libraries.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from diffusers import UNet2DModel
from torch.nn import functional as F

from ddpm_lit.unet import UNet

BATCH = 8
PRECISIONS = ("float32", "channels-last, bf16 autocast")


def network(name: str, precision: str) -> torch.nn.Module:
    "One of the two networks; both have the same random weights."
    net = UNet.from_preset("cifar10", torch.Generator().manual_seed(0))
    for p in net.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    if name == "diffusers":
        net, ours = UNet2DModel(**net.config), net
        net.load_state_dict(ours.state_dict())
    return net.to(memory_format=torch.contiguous_format if precision == "float32" else torch.channels_last)


def works(net: torch.nn.Module, precision: str):
    "Two functions: one forward pass without gradients, and one training step."
    draw = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, BATCH, 3, 32, 32, generator=draw)
    if precision != "float32":
        x, eps = (y.to(memory_format=torch.channels_last) for y in (x, eps))
    t = torch.randint(1000, (BATCH,), generator=draw)
    adam = torch.optim.Adam(net.parameters(), lr=1e-6)

    def predict():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            out = net(x, t)
        return out if torch.is_tensor(out) else out.sample

    def forward():
        net.eval()
        with torch.no_grad():
            return predict()

    def training():
        net.train()
        adam.zero_grad()
        loss = F.mse_loss(predict().float(), eps)
        loss.backward()
        adam.step()
        return loss.detach()

    return forward, training


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(precision: str, rounds: int) -> None:
    "Print one line for each kind of work: medians, ranges, and the ratio of ours to theirs."
    both = {name: works(network(name, precision), precision) for name in ("ours", "diffusers")}
    for i, kind in enumerate(("forward", "training step")):
        took = {name: [] for name in both}
        for turn in range(rounds + 2):
            for name in sorted(both, reverse=bool(turn % 2)):
                took[name].append(seconds(both[name][i]))
        took = {name: values[2:] for name, values in took.items()}  # the first two warm up
        ratios = [ours / theirs for ours, theirs in zip(took["ours"], took["diffusers"], strict=True)]
        took["ratio"] = sorted(ratios)[rounds // 4 : rounds - rounds // 4]
        told = [f"{name} {median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for name, v in took.items()]
        print(f"{precision:<30}{kind:<15}{'   '.join(told)}", flush=True)


def peak(name: str, precision: str) -> float:
    "The largest resident set, in MB, of a process that does three training steps with one of the two."
    words = [sys.executable, __file__, "--peak", name, precision]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main(args: list[str]) -> None:
    if args[:1] == ["--peak"]:
        _, training = works(network(args[1], args[2]), args[2])
        for _ in range(3):
            training()
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for precision in PRECISIONS:
        compare(precision, int(args[0]) if args else 10)
    for precision in PRECISIONS:
        ours, theirs = (peak(name, precision) for name in ("ours", "diffusers"))
        print(f"{precision:<30}peak memory    ours {ours:.0f} MB, diffusers {theirs:.0f} MB, ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
