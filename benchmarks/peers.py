"""What a user would otherwise pick, on the same work: diffusers, and denoising-diffusion-pytorch.

Each has a network for "cifar10" and for "digits", and its own loop of sampling. The network of diffusers has the
weights of ours. That of denoising-diffusion-pytorch is another U-Net, of the nearest size; the package imports
torchvision, for a data set that is not used here, and torchvision does not import beside the CPU build of torch: an
empty module stands in for it.
"""

import contextlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.images import Images
from ddpm_lit.loading import ImageBatches
from ddpm_lit.sampler import ancestral_sample, ddim_sample
from ddpm_lit.trainer import TrainConfig
from ddpm_lit.unet import UNet

NAMES = ("ddpm_lit", "diffusers", "denoising-diffusion-pytorch")
SHAPES = {"cifar10": (3, 32, 32), "digits": (1, 8, 8)}
BETAS = dict(beta_start=1e-4, beta_end=0.02)


def their_package():
    "denoising-diffusion-pytorch, with an empty module for a torchvision that is missing or does not import."
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        stand_in = types.ModuleType("torchvision")
        stand_in.transforms = stand_in.utils = None
        sys.modules["torchvision"] = stand_in
    import denoising_diffusion_pytorch

    return denoising_diffusion_pytorch


class Answer(nn.Module):
    "A network of diffusers, called as ours is."

    def __init__(self, net: UNet2DModel):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t).sample


def fresh(name: str, case: str, seed: int = 0) -> nn.Module:
    """The network as its own library initialises it, to be trained; called as `net(x_t, t)`.

    denoising-diffusion-pytorch has 35.7 and 1.03 million parameters where ours has 35.7 and 0.70.
    """
    torch.manual_seed(seed)
    if name == "ddpm_lit":
        return UNet.from_preset(case, torch.Generator().manual_seed(seed))
    if name == "diffusers":
        return Answer(UNet2DModel(**UNet.from_preset(case).config))
    told = dict(dim=64) if case == "cifar10" else dict(dim=36, dim_mults=(1, 2))
    return their_package().Unet(**told, channels=SHAPES[case][0])


@dataclass
class Peer:
    "A network, called as ours is, and `sample(x_T, sampler, steps)`, where sampler is ancestral or ddim."

    net: nn.Module
    sample: Callable[[Tensor, str, int], Tensor]

    def training(self, x: Tensor, t: Tensor, eps: Tensor, autocast=contextlib.nullcontext) -> Callable:
        "A step of training: forward, backward, Adam; with the same batch each time."
        adam = torch.optim.Adam(self.net.parameters(), lr=1e-6)

        def step():
            self.net.train()
            adam.zero_grad()
            with autocast():
                out = self.net(x, t)
            F.mse_loss(out.float(), eps).backward()
            adam.step()

        return step

    def forward(self, x: Tensor, t: Tensor, autocast=contextlib.nullcontext) -> Callable:
        "A forward pass without gradients."

        def work():
            self.net.eval()
            with torch.inference_mode(), autocast():
                self.net(x, t)

        return work


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

    return Peer(m.net, sample)


def diffusers(case: str, device: str = "cpu") -> Peer:
    "`UNet2DModel` with our weights, and the loop of its pipelines, at our times and with what we do after clipping."
    same = random_unet(case)
    net = Answer(UNet2DModel(**same.config))
    net.net.load_state_dict(same.state_dict())
    net.to(device).eval()

    def sample(x, sampler, steps):
        kind = {"ancestral": DDPMScheduler, "ddim": DDIMScheduler}[sampler]
        told = {"ancestral": {}, "ddim": dict(use_clipped_model_output=True)}[sampler]
        betas = BETAS | (dict(variance_type="fixed_large") if sampler == "ancestral" else {})
        scheduler, draw = kind(1000, **betas, timestep_spacing="trailing"), torch.Generator(x.device).manual_seed(0)
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t), t, x, generator=draw, **told).prev_sample
        return x

    return Peer(net, sample)


def denoising_diffusion_pytorch(case: str, device: str = "cpu") -> Peer:
    "Its own U-Net and its own loops (which have no strided ancestral sampling)."
    net, size = fresh("denoising-diffusion-pytorch", case), SHAPES[case][1]
    told = dict(image_size=size, timesteps=1000, objective="pred_noise", beta_schedule="linear")
    loop = their_package().GaussianDiffusion
    loops = nn.ModuleDict({str(n): loop(net, sampling_timesteps=n, **told) for n in (50, 1000)})
    loops.to(device).eval()

    def sample(x_T, sampler, steps):
        return loops[str(steps)].sample(batch_size=len(x_T))

    return Peer(net, sample)


PEERS = dict(zip(NAMES, (ours, diffusers, denoising_diffusion_pytorch), strict=True))


class PlainLoop:
    """The loop of training that users of diffusers write: its scheduler and its average, around the network of `name`.

    The settings are those of our `TrainConfig`, the batches those of our `ImageBatches`, on the device as ours are.
    """

    def __init__(
        self, name: str, case: str, images: Images, c: TrainConfig, beta_schedule: str = "linear", device="cpu"
    ):  # fmt: skip
        self.net, self.shown = (fresh(name, case, c.seed).to(device) for _ in range(2))
        if c.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.called = torch.compile(self.net) if c.compile else self.net
        self.c, self.done, self.device = c, 0, torch.device(device)
        self.scheduler = DDPMScheduler(1000, **BETAS, beta_schedule=beta_schedule, variance_type="fixed_large")
        self.batches = iter(ImageBatches(images, c.batch_size, device, c.seed, c.flip))
        self.adam = torch.optim.Adam(self.net.parameters(), c.lr)
        self.average = EMAModel(self.net.parameters(), c.ema, foreach=self.device.type == "cuda")

    def step(self) -> None:
        x0, bf16 = next(self.batches), self.c.precision == "bf16"
        t, eps = torch.randint(1000, (len(x0),), device=self.device), torch.randn_like(x0)
        for group in self.adam.param_groups:
            group["lr"] = self.c.lr_at(self.done)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            out = self.called(self.scheduler.add_noise(x0, eps, t), t)
        F.mse_loss(out.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.c.clip_grad)
        self.adam.step()
        self.adam.zero_grad()
        self.average.step(self.net.parameters())
        self.done += 1

    def averaged(self) -> nn.Module:
        self.average.copy_to(self.shown.parameters())
        return self.shown.eval()
