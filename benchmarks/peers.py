"""What a user would otherwise pick, on the same work: diffusers, and denoising-diffusion-pytorch.

Each peer has a network for "cifar10" and for "digits", a step of training with it, and its own loop of sampling. That
of diffusers has the weights of ours. denoising-diffusion-pytorch has another U-Net; it gets the nearest size. It
imports torchvision, for a data set that is not used here; torchvision does not import beside the CPU build of torch, so
an empty module takes its place.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.sampler import ancestral_sample, ddim_sample
from ddpm_lit.unet import UNet

NAMES = ("ddpm_lit", "diffusers", "denoising-diffusion-pytorch")
SHAPES = {"cifar10": (3, 32, 32), "digits": (1, 8, 8)}
BETAS = dict(beta_start=1e-4, beta_end=0.02)


@dataclass
class Peer:
    "A network, called as `predict(x_t, t)`, and `sample(x_T, sampler, steps)`, where sampler is ancestral or ddim."

    net: nn.Module
    predict: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, str, int], Tensor]

    def training(self, x: Tensor, t: Tensor, eps: Tensor, autocast) -> Callable:
        "A step of training: forward, backward, Adam; with the same batch each time."
        adam = torch.optim.Adam(self.net.parameters(), lr=1e-6)

        def step():
            self.net.train()
            adam.zero_grad()
            with autocast():
                out = self.predict(x, t)
            F.mse_loss(out.float(), eps).backward()
            adam.step()

        return step

    def forward(self, x: Tensor, t: Tensor, autocast) -> Callable:
        "A forward pass without gradients."

        def work():
            self.net.eval()
            with torch.inference_mode(), autocast():
                self.predict(x, t)

        return work


def fresh(name: str, case: str) -> nn.Module:
    "The network as its own library initialises it, to be trained."
    if name == "ddpm_lit":
        return UNet.from_preset(case, torch.Generator().manual_seed(0))
    if name == "diffusers":
        return UNet2DModel(**UNet.from_preset(case).config)
    return their_unet(case)


def random_unet(case: str) -> UNet:
    "Ours, with weights that leave nothing at zero."
    net = UNet.from_preset(case, torch.Generator().manual_seed(0))
    for p in net.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return net


def ours(case: str, device: str = "cpu") -> Peer:
    m = DDPM(random_unet(case), linear_schedule(), variance="beta").to(device).eval()

    def sample(x_T, sampler, steps):
        draw = torch.Generator(x_T.device).manual_seed(0)
        if sampler == "ddim":
            return ddim_sample(m, tuple(x_T.shape), steps, x_T=x_T)
        return ancestral_sample(m, tuple(x_T.shape), x_T, draw, steps=steps)

    return Peer(m.net, m.net, sample)


def diffusers(case: str, device: str = "cpu") -> Peer:
    "`UNet2DModel` with our weights, and the loop of its pipelines."
    same = random_unet(case)
    net = UNet2DModel(**same.config)
    net.load_state_dict(same.state_dict())
    net.to(device).eval()

    def sample(x, sampler, steps):
        kinds = {"ancestral": (DDPMScheduler, dict(variance_type="fixed_large")), "ddim": (DDIMScheduler, {})}
        kind, told = kinds[sampler]
        scheduler, draw = kind(1000, **BETAS, **told), torch.Generator(x.device).manual_seed(0)
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t).sample, t, x, generator=draw).prev_sample
        return x

    return Peer(net, lambda x, t: net(x, t).sample, sample)


def their_package():
    "denoising-diffusion-pytorch, imported without torchvision."
    if "torchvision" not in sys.modules:
        stand_in = types.ModuleType("torchvision")
        stand_in.transforms = stand_in.utils = None
        sys.modules["torchvision"] = stand_in
    import denoising_diffusion_pytorch

    return denoising_diffusion_pytorch


def their_unet(case: str) -> nn.Module:
    "The U-Net of denoising-diffusion-pytorch whose size is nearest to ours: 35.7 and 1.0 million parameters."
    told = dict(dim=64) if case == "cifar10" else dict(dim=36, dim_mults=(1, 2))
    return their_package().Unet(**told, channels=SHAPES[case][0])


def denoising_diffusion_pytorch(case: str, device: str = "cpu") -> Peer:
    "Its own U-Net and its own loops (which have no strided ancestral sampling)."
    net, size = their_unet(case), SHAPES[case][1]
    told = dict(image_size=size, timesteps=1000, objective="pred_noise", beta_schedule="linear")
    loop = their_package().GaussianDiffusion
    loops = nn.ModuleDict({str(n): loop(net, sampling_timesteps=n, **told) for n in (50, 1000)})
    loops.to(device).eval()

    def sample(x_T, sampler, steps):
        return loops[str(steps)].sample(batch_size=len(x_T))

    return Peer(net, net, sample)


PEERS = dict(zip(NAMES, (ours, diffusers, denoising_diffusion_pytorch), strict=True))
