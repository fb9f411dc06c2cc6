"""CIFAR-10 for some minutes on one GPU: this package and diffusers' parts, and one yardstick for both.

    python benchmarks/cifar10.py train ddpm_lit --data DIR --minutes 20
    python benchmarks/cifar10.py train diffusers --data DIR --minutes 20
    python benchmarks/cifar10.py score --data DIR

DIR holds train.parquet and test.parquet of the Hub's data set `cifar10`. Ours is the command line itself,
`ddpm_lit train --preset cifar10`, which is stopped by SIGTERM when its minutes are over; theirs is the plain loop of
peers.py with the paper's settings. Asked again, a training goes on for so many minutes more. `score` trains a
classifier on the training set, once, and prints its accuracy; and for each model how long it has trained, the Fréchet
distance of 5,000 samples to the training set in the classifier's features, and bits/dim of 1,000 test images. Samples
lie beside the models. `--try` is a small run of it all, on the CPU if need be, to see that it works.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from compare import line, processor, read_header
from diffusers import DDPMPipeline
from peers import PlainLoop
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lit.ddpm import DDPM
from ddpm_lit.evaluation import evaluate_bpd
from ddpm_lit.files import model_folder
from ddpm_lit.images import Images, save_grid, to_network, to_pixels
from ddpm_lit.loading import load_images
from ddpm_lit.metrics import FeatureStatistics, image_statistics
from ddpm_lit.sampler import ancestral_sample
from ddpm_lit.trainer import TrainConfig
from ddpm_lit.unet import PRESETS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Settings:
    data: Path
    """folder with train.parquet and test.parquet"""
    out: Path = Path("build/cifar10")
    """folder for the models, the classifier and the samples"""
    small: Annotated[bool, tyro.conf.arg(name="try")] = False
    """a small run, to see that it works"""

    def images(self, part: str) -> Images:
        return load_images(self.data / f"{part}.parquet", n=500 if self.small else None)


@dataclass
class Train:
    """Train for some minutes, or for some more."""

    who: Annotated[Literal["ddpm_lit", "diffusers"], tyro.conf.Positional]
    settings: tyro.conf.OmitArgPrefixes[Settings]
    minutes: float = 20.0

    def run(self) -> None:
        folder = self.settings.out / self.who
        folder.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        ours(self, folder) if self.who == "ddpm_lit" else theirs(self, folder)
        record = folder / "minutes.json"
        before = json.loads(record.read_text()) if record.exists() else 0.0
        record.write_text(json.dumps(before + (time.perf_counter() - began) / 60))


def ours(asked: Train, folder: Path) -> None:
    "The command line, with the data in memory and a limit to its time."
    words = [sys.executable, "-m", "ddpm_lit", "train", "--out", str(folder), "--variance", "beta", "--track", "none"]
    words += ["--data", str(asked.settings.data / ("test.parquet" if asked.settings.small else "train.parquet"))]
    if asked.settings.small:
        words += ["--preset", "digits", "--steps", "100000", "--lr", "0.001"]
    else:
        words += ["--preset", "cifar10", "--precision", "bf16", "--channels-last", "--compile"]
    if (folder / "train.json").exists():
        words = words[:6] + ["--resume"]
    process = subprocess.Popen(words)
    try:
        code = process.wait(60 * asked.minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        sys.exit(f"ddpm_lit train ended with code {code}")


def theirs(asked: Train, folder: Path) -> None:
    "diffusers' parts, with bf16 autocast and the paper's settings; the pipeline is written, and all that goes on."
    small, state = asked.settings.small, folder / "state.pt"
    case = PRESETS["cifar10"].training | (dict(batch_size=4, steps=100_000) if small else dict(precision="bf16"))
    c, began = TrainConfig(**case, channels_last=True), time.perf_counter()
    loop = PlainLoop("diffusers", "cifar10", asked.settings.images("train"), c, device=DEVICE)
    parts = dict(net=loop.net, adam=loop.adam, average=loop.average)
    if state.exists():
        kept = torch.load(state, weights_only=True, map_location=DEVICE)
        loop.done = kept.pop("done")
        for name, part in parts.items():
            part.load_state_dict(kept[name])
    while time.perf_counter() - began < 60 * asked.minutes:
        loop.step()
        if loop.done % 50 == 0 and DEVICE == "cuda":
            torch.cuda.synchronize()  # or the clock would be that of the queue
    DDPMPipeline(loop.averaged().net, loop.scheduler).save_pretrained(folder)
    torch.save({name: part.state_dict() for name, part in parts.items()} | dict(done=loop.done), state)
    print(f"diffusers' parts: {loop.done} steps")


def convolution(channels: int, out: int, pool: bool = False) -> nn.Sequential:
    "3×3, batch norm, ReLU, and half the size where `pool`."
    layers = [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvolutionFeatures:
    """The 8·`width` features before the last layer of a residual classifier, trained on `train`; see `accuracy`.

    Called on pixels (n, 3, 32, 32) it gives (n, 8·width) features. It is trained for `epochs` with mirrored and shifted
    images, SGD and one cycle of the learning rate, or read from `file` where that exists.
    """

    def __init__(self, train: Images, test: Images, file: Path, width: int = 64, epochs: int = 20):
        w = width
        self.net = nn.Sequential(
            convolution(3, w),
            convolution(w, 2 * w, pool=True),
            Residual(convolution(2 * w, 2 * w), convolution(2 * w, 2 * w)),
            convolution(2 * w, 4 * w, pool=True),
            convolution(4 * w, 8 * w, pool=True),
            Residual(convolution(8 * w, 8 * w), convolution(8 * w, 8 * w)),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        ).to(DEVICE, memory_format=torch.channels_last)
        self.last = nn.Linear(8 * w, 10).to(DEVICE)
        parts = nn.ModuleList([self.net, self.last])
        if file.exists():
            parts.load_state_dict(torch.load(file, weights_only=True, map_location=DEVICE))
        else:
            self.fit(parts, train, epochs)
            torch.save(parts.state_dict(), file)
        parts.eval()
        self.name = f"residual classifier of CIFAR-10, width {width}, {epochs} epochs"
        with torch.no_grad():
            said = torch.cat([self.last(self(x)).argmax(1).cpu() for x in test.pixels.split(1000)])
        self.accuracy = (said == test.labels).double().mean().item()

    def fit(self, parts: nn.Module, train: Images, epochs: int, batch: int = 512) -> None:
        torch.manual_seed(0)
        pixels, labels = train.pixels.to(DEVICE), train.labels.to(DEVICE)
        steps = epochs * -(-len(labels) // batch)
        sgd = torch.optim.SGD(parts.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
        cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.2, total_steps=steps)
        for _ in range(epochs):
            for which in torch.randperm(len(labels), device=DEVICE).split(batch):
                x = F.pad(to_network(pixels[which]), (4, 4, 4, 4))
                dy, dx = torch.randint(9, (2,)).tolist()
                x = x[:, :, dy : dy + 32, dx : dx + 32]
                mirrored = torch.rand(len(x), 1, 1, 1, device=DEVICE) < 0.5
                with torch.autocast(DEVICE, torch.bfloat16):
                    out = self.last(self.net(torch.where(mirrored, x.flip(3), x)))
                F.cross_entropy(out.float(), labels[which], label_smoothing=0.1).backward()
                sgd.step()
                sgd.zero_grad()
                cycle.step()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.net(to_network(pixels.to(DEVICE)))


def measured(folder: Path, features: ConvolutionFeatures, real: FeatureStatistics, test: Images, c: "Score") -> None:
    "Draw from the model in `folder`, and print the lines about it."
    m, who = DDPM.from_pretrained(model_folder(folder)).to(DEVICE), folder.name
    m.net.to(memory_format=torch.channels_last)
    draw, size, pixels = torch.Generator(DEVICE).manual_seed(0), min(c.samples, 250), []
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        while len(pixels) * size < c.samples:
            told = dict(generator=draw, steps=c.steps, compile=DEVICE == "cuda")
            pixels.append(to_pixels(ancestral_sample(m, (size, *test.pixels.shape[1:]), **told)).cpu())
    pixels = torch.cat(pixels)[: c.samples]
    save_grid(folder.with_suffix(".png"), pixels[:100], columns=10)
    bits = evaluate_bpd(m, test, c.test_images, generator=torch.Generator().manual_seed(0), calls=min(100, m.s.T))
    line("minutes of training", who, f"{json.loads((folder / 'minutes.json').read_text()):.1f}")
    distance = image_statistics(features, Images(pixels)).distance(real)
    line(f"Fréchet distance of {c.samples} samples of {c.steps} steps", who, f"{distance:.3g}")
    line(f"bits/dim of {c.test_images} test images", who, f"{bits.total:.3f} ± {2 * bits.error:.3f}")


@dataclass
class Score:
    """Measure what was trained."""

    settings: tyro.conf.OmitArgPrefixes[Settings]
    steps: int = 1000
    """of ancestral sampling"""
    samples: int = 5000
    test_images: int = 1000

    def run(self) -> None:
        small, out, told = self.settings.small, self.settings.out, {}
        if small:
            self.steps, self.samples, self.test_images, told = 5, 60, 4, dict(width=4, epochs=1)
        train, test = self.settings.images("train"), self.settings.images("test")
        out.mkdir(parents=True, exist_ok=True)
        features = ConvolutionFeatures(train, test, out / f"classifier{'-try' if small else ''}.pt", **told)
        real = image_statistics(features, train)
        read_header(f"{processor() if DEVICE == 'cpu' else torch.cuda.get_device_name()}; {features.name}")
        line("accuracy of the classifier on the test set", "", f"{features.accuracy:.1%}")
        distance = image_statistics(features, Images(test.pixels[: self.samples])).distance(real)
        line(f"Fréchet distance of {self.samples} test images", "real", f"{distance:.3g}")
        for folder in (out / "ddpm_lit", out / "diffusers"):
            if folder.exists():
                measured(folder, features, real, test, self)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": Train, "score": Score}).run()
