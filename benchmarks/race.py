"""Training on digits against the clock: how long until the samples are as near to real digits as a given distance.

All train with the recipe of the preset `digits` (batches, learning rate, warm-up, average, noise schedule): we by our
`Trainer`, a peer by the loop that its users write of its parts. The clock stands still while 250 samples of the
averaged network, of 20 DDIM steps and always from the same noise, are drawn by our sampler and measured.
"""

import time
from collections.abc import Callable

import torch
from peers import BETAS, SHAPES, PlainLoop, fresh
from torch import nn

from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import scaled_linear_schedule
from ddpm_lit.images import Images, to_pixels
from ddpm_lit.metrics import ClassifierFeatures
from ddpm_lit.sampler import ddim_sample
from ddpm_lit.trainer import TrainConfig, Trainer
from ddpm_lit.unet import PRESETS

SCHEDULE = scaled_linear_schedule(1000, *BETAS.values())


class Reached(Exception):
    "Ends a training that has reached its goal."


class Clock:
    """Seconds and steps of a training, and the distance of what it draws; ends it where that is at most `goal`.

    It looks at every `every`-th step, from step `first` on.
    """

    def __init__(self, images: Images, features: ClassifierFeatures, goal: float, every: int = 25, first: int = 200):
        self.images, self.features, self.goal, self.every, self.first = images, features, goal, every, first
        self.steps, self.seconds, self.distance = 0, 0.0, float("inf")
        self.began = time.perf_counter()

    def step(self, network: Callable[[], nn.Module]) -> None:
        "To be called after each step; `network()` is the averaged network."
        self.steps += 1
        if self.steps >= self.first and self.steps % self.every == 0:
            self.seconds += time.perf_counter() - self.began
            self.look(network())
            self.began = time.perf_counter()

    def look(self, net: nn.Module) -> None:
        m, draw = DDPM(net, SCHEDULE), torch.Generator().manual_seed(3)
        pixels = to_pixels(ddim_sample(m, (250, *SHAPES["digits"]), 20, generator=draw))
        self.distance = self.features.distance(pixels, self.images.pixels)
        if self.distance <= self.goal:
            raise Reached


def race(name: str, images: Images, features: ClassifierFeatures, goal: float, seed: int, **settings) -> Clock:
    "The clock of a training with the parts of `name` that has reached the goal, or all its steps."
    config = TrainConfig(**PRESETS["digits"].training | dict(seed=seed, progress=False) | settings)
    if name == "ddpm_lit":
        m = DDPM(fresh(name, "digits", seed), SCHEDULE)
        trainer = Trainer(m, images, config, on_step=lambda *_: clock.step(lambda: trainer.ema.net))
    else:
        loop = PlainLoop(name, "digits", images, config, "scaled_linear")
    clock = Clock(images, features, goal)
    try:
        if name == "ddpm_lit":
            trainer.fit()
        else:
            while loop.done < config.steps:
                loop.step()
                clock.step(loop.averaged)
    except Reached:
        pass
    return clock
