"""Small models that stand for large ones in tests. The one place for them."""

import torch
from torch import Tensor, nn

from ddpm_lit.ddpm import DDPM, two_points  # noqa: F401 (for tests, beside the other doubles)
from ddpm_lit.forward import Schedule, linear_schedule
from ddpm_lit.unet import UNet

# The smallest U-Net for digits that has every kind of layer.
TINY = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=None,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    "Give all parameters random values, so that no zero-initialised layer hides what lies before it."
    draw = rng(seed)
    for name, parameter in net.named_parameters():
        middle = float(parameter.ndim == 1 and name.endswith("weight"))
        spread = 0.1 if parameter.ndim == 1 else (1 / parameter[0].numel()) ** 0.5
        parameter.data = middle + spread * torch.randn(parameter.shape, generator=draw)
    return net.eval()


def tiny_model(s: Schedule | None = None, seed: int = 0, spread: float = 0.1, **changes) -> DDPM:
    "Return a DDPM with a tiny U-Net; `changes` are for DDPM or the network, `spread` is noise on its weights."
    words = {key: changes.pop(key) for key in ("predicts", "variance", "clip") if key in changes}
    if words.get("variance") == "learned":
        changes = dict(out_channels=2) | changes
    draw = rng(seed)
    net = UNet(**(TINY | changes), generator=draw)
    for parameter in net.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=draw)
    return DDPM(net, s or linear_schedule(20), **words).eval()


def mixing_model(predicts: str = "eps", variance: str = "beta_tilde", T: int = 1000, clip: bool = True) -> DDPM:
    "Return a model of 8×8 images whose network is cheap and not linear, mixes the pixels and depends on t."
    weights = torch.randn(64, 64, generator=rng(0), dtype=torch.float64) / 8

    def net(x, t):
        mixed = torch.tanh((x.flatten(1) @ weights.to(x)) + torch.sin(t / 100)[:, None].to(x)).view(x.shape)
        return torch.cat([mixed, -mixed], dim=1) if variance == "learned" else mixed

    return DDPM(net, linear_schedule(T), predicts, variance, clip)


class OwnNet(nn.Module):
    "A network that is no `UNet`, of a user's own: it has parameters, reads x_t and t, and returns the shape of x_t."

    def __init__(self, channels: int = 1, width: int = 8):
        super().__init__()
        self.time = nn.Embedding(1000, width)
        self.first, self.last = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x_t) + self.time(t)[:, :, None, None]))


def importance_steps(rank: int, processes: int):
    "Return the losses of five steps of the importance-sampled bound, of one process of several, and its history."
    from ddpm_lit.improved import ImportanceBound

    loss, draws = ImportanceBound(4, size=3), rng(7)
    m = tiny_model(linear_schedule(4, 1e-3, 0.2), variance="learned")
    batches = [torch.randint(256, (8, 1, 8, 8), generator=rng(seed)).float() / 127.5 - 1 for seed in range(5)]
    parts = [x0.split(8 // processes)[rank] for x0 in batches]
    return [loss(m, x0, draws, (rank, processes)).item() for x0 in parts], loss.state_dict()


def train_autoencoder(out, batch_size: int) -> int:
    "Train an autoencoder of digits for three steps on the command line; return the exit code."
    from ddpm_lit.cli import main

    words = ["train-autoencoder", "--data", "digits", "--widths", "8", "8", "--groups", "4", "--steps", "3"]
    words += ["--warmup", "0", "--no-progress", "--track", "none", "--batch-size", str(batch_size), "--out", str(out)]
    return main(words)
