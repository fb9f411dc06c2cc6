"""The table of `make bench`: this package beside what a user would otherwise pick, on the CPU.

    python benchmarks/cpu.py [part ...]

The parts are network, sampling, likelihood, digits, memory and import; without any of them all are done, in less than
ten minutes on two cores. Works take turns; a line gives the median and the range, and behind a peer's the ratio of our
time to theirs, taken turn by turn, below 1 where we are faster.
"""

import contextlib
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from compare import header, line, lines, take_turns
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from peers import BETAS, NAMES, PEERS, SHAPES, fresh
from torch.nn import functional as F

from ddpm_lit.data import ImageBatches, load_images, to_pixels
from ddpm_lit.ddpm import DDPM
from ddpm_lit.evaluate import ClassifierFeatures, evaluate_bpd
from ddpm_lit.forward import linear_schedule
from ddpm_lit.sampler import ddim_sample
from ddpm_lit.trainer import TrainConfig, Trainer
from ddpm_lit.unet import TRAINING

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
            took = take_turns({name: both[work] for name, both in works.items()}, 7)
            lines(f"CIFAR-10 network, batch {BATCH}, {work}, {precision}", took)


def sampling() -> None:
    for case, n, sampler, steps, rounds in (
        ("cifar10", BATCH, "ddim", 50, 1),
        ("digits", 64, "ddim", 50, 7),
        ("digits", 64, "ancestral", 1000, 3),
    ):
        x_T = torch.randn(n, *SHAPES[case], generator=torch.Generator().manual_seed(2))
        with quiet():
            took = take_turns({name: partial(PEERS[name](case).sample, x_T, sampler, steps) for name in NAMES}, rounds)
        lines(f"{n} images like {case}, {sampler}, {steps} steps", took)


@contextlib.contextmanager
def quiet():
    "Without the progress bars of a peer that has no switch for them."
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def likelihood() -> None:
    "All T terms of the bound; no peer offers them, so beside T calls of the bare network."
    peer, images = PEERS["ddpm_lit"]("digits"), load_images("digits")
    m, x = DDPM(peer.net, linear_schedule(), variance="beta"), torch.randn(64, *SHAPES["digits"])

    def bare():
        with torch.inference_mode():
            for t in torch.arange(1000)[:, None].expand(-1, 64):
                peer.net(x, t)

    took = take_turns({"ddpm_lit": lambda: evaluate_bpd(m, images, 64), "1000 calls of our bare network": bare}, 3)
    lines("all 1000 terms of the bound of 64 digits", took)


GOAL, LOOKS = 5.0, range(200, 901, 50)


class Watch:
    "Seconds of training until the samples of the averaged network are as near as `GOAL`; looking costs nothing."

    def __init__(self, images, features):
        self.images, self.features, self.steps, self.found = images, features, 0, None
        self.took, self.began = 0.0, time.perf_counter()

    def look(self, net) -> bool:
        "To be called after each step; says whether the goal is reached, and training may end."
        self.steps += 1
        if self.steps in LOOKS:
            self.took += time.perf_counter() - self.began
            m = DDPM(net.eval(), linear_schedule(), variance="beta")
            x = ddim_sample(m, (500, *SHAPES["digits"]), 25, generator=torch.Generator().manual_seed(3))
            self.found = self.features.distance(to_pixels(x), self.images.pixels)
            self.began = time.perf_counter()
        return self.found is not None and self.found <= GOAL


class Reached(Exception):
    "Ends a training that has reached its goal."


def by_trainer(images, config: TrainConfig, watch: Watch) -> None:
    "Our `Trainer`."
    trainer = Trainer(DDPM(fresh("ddpm_lit", "digits"), linear_schedule()), images, config)

    def after_step(*_):
        if watch.look(trainer.m.net):
            raise Reached

    trainer.optimizer.register_step_post_hook(after_step)
    with contextlib.suppress(Reached):
        trainer.fit()


def by_plain_loop(name: str, images, config: TrainConfig, watch: Watch) -> None:
    "A plain loop of the parts of a peer, with the settings of ours."
    net, scheduler, draw = fresh(name, "digits"), DDPMScheduler(1000, **BETAS), torch.Generator().manual_seed(0)
    average, adam = EMAModel(net.parameters(), config.ema), torch.optim.Adam(net.parameters(), config.lr)
    shown = fresh(name, "digits")

    def predict(net, x, t):
        out = net(x, t)
        return out.sample if name == "diffusers" else out

    for step, x0 in zip(range(config.steps), ImageBatches(images, config.batch_size), strict=False):
        t, eps = torch.randint(1000, (len(x0),), generator=draw), torch.randn(x0.shape, generator=draw)
        for group in adam.param_groups:
            group["lr"] = config.lr_at(step)
        adam.zero_grad()
        F.mse_loss(predict(net, scheduler.add_noise(x0, eps, t), t), eps).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_grad)
        adam.step()
        average.step(net.parameters())
        if step + 2 in LOOKS or step + 1 in LOOKS:
            average.copy_to(shown.parameters())
        if watch.look(Shown(shown, predict)):
            return


class Shown(torch.nn.Module):
    "A network of a peer, called as ours is."

    def __init__(self, net, predict):
        super().__init__()
        self.net, self.predict = net, predict

    def forward(self, x, t):
        return self.predict(self.net, x, t)


def digits() -> None:
    images = load_images("digits")
    features = ClassifierFeatures(images)
    config = TrainConfig(**TRAINING["digits"] | dict(steps=LOOKS[-1]), progress=False)
    took = {}
    for name in NAMES:
        watch = Watch(images, features)
        by_trainer(images, config, watch) if name == "ddpm_lit" else by_plain_loop(name, images, config, watch)
        reached = f"{watch.took:.1f} s, {watch.steps} steps, distance {watch.found:.2f}"
        took[name] = watch.took
        ratio = f"**{took['ddpm_lit'] / watch.took:.2f}** (one run)" if name != "ddpm_lit" else ""
        line(f"training on digits to a Fréchet distance of {GOAL:g}", name, reached, ratio)


def imports() -> None:
    def importing(name):
        return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True)

    named = {"ddpm_lit": "ddpm_lit", "torch": "torch", "diffusers": "diffusers"}
    lines("import", take_turns({who: importing(name) for who, name in named.items()}, 7))


def memory() -> None:
    "The largest resident set (VmHWM, Linux) of a process of its own that does three training steps."
    for precision in PRECISIONS:
        peaks = {}
        for name in NAMES:
            words = [sys.executable, __file__, "--peak", name, precision]
            peaks[name] = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            ratio = f"**{peaks['ddpm_lit'] / peaks[name]:.2f}**" if name != "ddpm_lit" else ""
            line(f"peak memory of a training step, {precision}", name, f"{peaks[name]:.0f} MB", ratio)


def peak(name: str, precision: str) -> None:
    step = network_works(name, precision)["training step"]
    for _ in range(3):
        step()
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


PARTS = dict(
    network=network, sampling=sampling, likelihood=likelihood, digits=digits, memory=memory, **{"import": imports}
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:])
        raise SystemExit
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    header()
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
