"""Our samplers against diffusers' pipelines, and against the bare network: the same weights, digits, on the CPU.

    python benchmarks/sampling.py [rounds]

Per step, in milliseconds: the network called as often as a sampler calls it and nothing else; our samplers; diffusers'
`UNet2DModel` in the loop of its pipeline (`scheduler.step`). All take turns; medians and ranges, and two ratios, taken
turn by turn (the range is that of the middle half): ours over the bare network, and ours over diffusers.
"""

import sys
import time
from statistics import median

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.sampler import ancestral_sample, ddim_sample
from ddpm_lit.unet import UNet

BATCH, STEPS = 64, 100


def networks() -> tuple[UNet, UNet2DModel]:
    "The digits network of ours and of diffusers, with the same random weights."
    ours = UNet.from_preset("digits", torch.Generator().manual_seed(0)).eval()
    for p in ours.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    theirs = UNet2DModel(**ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def works() -> dict:
    "What is timed: for both samplers the bare network, ours, and diffusers'; each makes STEPS calls of the network."
    net, theirs = networks()
    m, shape = DDPM(net, linear_schedule()), (BATCH, 1, 8, 8)
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def bare():
        with torch.inference_mode():
            for t in torch.arange(STEPS)[:, None].expand(-1, BATCH):
                net(x_T, t)

    def pipeline(scheduler):
        scheduler.set_timesteps(STEPS)
        x, generator = x_T, torch.Generator().manual_seed(2)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(theirs(x, t).sample, t, x, generator=generator).prev_sample
        return x

    draw = torch.Generator().manual_seed(2)
    return {
        "ancestral": (
            bare,
            lambda: ancestral_sample(m, shape, x_T, draw, steps=STEPS),
            lambda: pipeline(DDPMScheduler(1000, 1e-4, 0.02)),
        ),
        "DDIM": (
            bare,
            lambda: ddim_sample(m, shape, STEPS, x_T=x_T),
            lambda: pipeline(DDIMScheduler(1000, 1e-4, 0.02)),
        ),
    }


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(args: list[str]) -> None:
    rounds = int(args[0]) if args else 9
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {BATCH} digits, {STEPS} steps, ms per step")
    for sampler, three in works().items():
        took = [[] for _ in three]
        for turn in range(rounds + 1):
            for i in (range(3), range(2, -1, -1))[turn % 2]:
                took[i].append(1000 * seconds(three[i]) / STEPS)
        bare, ours, theirs = (values[1:] for values in took)  # the first turn warms up
        for name, values in (("bare network", bare), ("ours", ours), ("diffusers", theirs)):
            print(f"{sampler:<12}{name:<18}{median(values):.3f} ({min(values):.3f} to {max(values):.3f})", flush=True)
        for name, below in (("ours / bare", bare), ("ours / diffusers", theirs)):
            ratios = sorted(a / b for a, b in zip(ours, below, strict=True))
            middle = ratios[rounds // 4 : rounds - rounds // 4]
            print(f"{sampler:<12}{name:<18}{median(ratios):.3f} ({middle[0]:.3f} to {middle[-1]:.3f})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
