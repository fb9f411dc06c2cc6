"""Train the small models that ship with the package and pack them into models/: `make models ARGS="digits"`.

A run lies in build/models/NAME and resumes where it was stopped. models/NAME holds the averaged weights in half
precision, `recipe.json` (command, seed, commit, seconds, machine, losses, metrics) and a model card.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ddpm_lit import DDPM, TrainConfig, Trainer, UNet, cosine_schedule, evaluate_samples, load_images
from ddpm_lit.files import atomic_folder, model_folder, write_json
from ddpm_lit.forward import scaled_linear_schedule

ROOT = Path(__file__).parents[1]
FIRST = 60  # steps that a chapter takes anew, to compare its losses with those of the recipe


@dataclass(frozen=True)
class Recipe:
    "How a model on the digits is trained: what differs from the preset's network, the model, the training."

    what: str
    net: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    schedule: str = "scaled_linear"
    training: dict = field(default_factory=dict)

    def make(self, seed: int) -> DDPM:
        "Return the untrained model."
        schedule = dict(scaled_linear=scaled_linear_schedule, cosine=lambda: cosine_schedule(1000))[self.schedule]()
        net = UNet.from_preset("digits", torch.Generator().manual_seed(seed), **NETWORK | self.net)
        return DDPM(net, schedule, **self.model)

    def config(self, **changes) -> TrainConfig:
        "Return the settings of the training."
        return TrainConfig(**TRAINING | self.training | changes)


NETWORK = dict(block_out_channels=(16, 32))
TRAINING = dict(steps=3000, batch_size=64, lr=4e-3, warmup=30, ema=0.99, decay=True, track="none", progress=False)
RECIPES = {
    "digits": Recipe("scikit-learn's 8×8 digits, without labels: the DDPM of Ho et al. (2020) in small"),
    "digits-labels": Recipe(
        "scikit-learn's 8×8 digits by label, with the null label 10, for classifier-free guidance",
        net=dict(num_class_embeds=11),
        training=dict(drop_labels=0.15),
    ),
    "digits-improved": Recipe(
        "scikit-learn's 8×8 digits with learned variances and the cosine schedule, after Nichol & Dhariwal (2021)",
        net=dict(out_channels=2),
        model=dict(predicts="v", variance="learned"),
        schedule="cosine",
    ),
}


def first_losses(recipe: Recipe, seeds=(0, 1, 2)) -> list[list[float]]:
    "Return the mean losses of the three thirds of the first `FIRST` steps, for each seed."
    losses = []
    for seed in seeds:
        config = recipe.config(seed=seed, steps=FIRST, decay=False)
        trainer = Trainer(recipe.make(seed), load_images("digits"), config)
        losses.append(trainer.fit().unflatten(0, (3, -1)).mean(1).tolist())
    return losses


def measured(m: DDPM, n: int = 1000) -> dict:
    "Return the scores of `n` samples by 50 steps of DDIM and by 100 ancestral steps."
    classes = m.net.config["num_class_embeds"]
    cond = classes and dict(class_labels=torch.arange(n) % (classes - 1))
    results = {}
    for sampler, steps in (("ddim", 50), ("ancestral", 100)):
        pixels = m.sample(n, steps, sampler, cond=cond, generator=torch.Generator().manual_seed(1))
        results[f"{sampler} {steps}"] = evaluate_samples(pixels, load_images("digits"))
    return results


def commit() -> str:
    "Return the commit of the working tree."
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True).stdout.strip()


def pack(name: str, m: DDPM, what: str, recipe: dict, licence: str) -> Path:
    "Write `m` in half precision, its recipe and its model card into models/NAME; return the folder."
    folder = ROOT / "models" / name

    def write(temporary: Path) -> None:
        write_json(temporary / "recipe.json", recipe)
        (temporary / "README.md").write_text(card(name, what, recipe, licence), encoding="utf-8")

    m.half().save_pretrained(folder)
    atomic_folder(folder, write, last="recipe.json")
    return folder


def card(name: str, what: str, recipe: dict, licence: str) -> str:
    "Return the model card: what the model is, how it was made, how it is used."
    return f"""---
license: apache-2.0
library_name: ddpm_lit
---

# {name}

A small model of {what}. It ships with `ddpm_lit`, and is made anew by

    {recipe["command"]}

in {recipe["seconds"] / 60:.0f} minutes on {recipe["machine"]} (seed {recipe["seed"]}); `recipe.json` says the rest.

    ddpm_lit sample {name} -n 64

{licence}
"""


DIGITS = "The digits are scikit-learn's copy of a UCI data set (E. Alpaydin and C. Kaynak, CC BY 4.0)."


def build(name: str, steps: int | None) -> None:
    "Train the model `name`, or resume its run, and pack it; a packed model is left as it is."
    recipe, out, seed = RECIPES[name], ROOT / "build" / "models" / name, 0
    if (ROOT / "models" / name / "recipe.json").exists():
        return print(f"models/{name} is there already")
    changes = {} if steps is None else dict(steps=steps)
    resume = (out / "checkpoints").is_dir()
    config = recipe.config(seed=seed, out=str(out), resume=resume, save_every=500, **changes)
    trainer = Trainer(recipe.make(seed), load_images("digits"), config)
    print(f"{name}: step {trainer.step} of {config.steps}", flush=True)
    clock, start = out / "seconds.json", time.perf_counter()
    before = json.loads(clock.read_text()) if clock.exists() else 0
    trainer.fit()
    seconds = before + time.perf_counter() - start
    clock.write_text(json.dumps(seconds))
    m = DDPM.from_pretrained(model_folder(out))
    about = dict(command=f'make models ARGS="{name}"', seed=seed, commit=commit(), seconds=round(seconds))
    about |= dict(machine=f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} {platform.machine()} cores")
    about |= dict(
        training=TRAINING | recipe.training | dict(steps=config.steps),
        first_losses=first_losses(recipe),
        metrics=measured(m),
    )
    print(pack(name, m, recipe.what, about, DIGITS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models to build, all by default")
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe's, for a try")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are fastest on one thread
    for name in arguments.names or RECIPES:
        if name not in RECIPES:
            raise SystemExit(f"names must be of {', '.join(RECIPES)}; got {name}")
        build(name, arguments.steps)
