"""What the README promises is so: its ten lines run as written, its commands exist, its table lists the chapters."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_lit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    "The fenced blocks of one language."
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def recipe(target: str) -> list[str]:
    "The commands of a target of the Makefile, with its own names for programs and for how to run tests taken out."
    (body,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    own = re.compile(r"\$\(BIN\)/python -m |\$\(BIN\)/|\$\(SIDE_BY_SIDE\) ")
    return [own.sub("", line.strip()) for line in body.splitlines()]


def run_program(program: str, folder: Path) -> str:
    "Run a program in `folder`, in a process of its own, and return what it printed; its errors are shown."
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.processes
def test_the_ten_lines_run_as_written(tmp_path):
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    look = """
from pathlib import Path
samples = trainer.ema.sample(36, steps=25)
assert samples.shape == (36, 1, 8, 8)
assert again.s.T == 1000 and Path("digits-model/model_index.json").is_file()
lightness = [x.float().mean().item() / 255 for x in (digits.pixels, samples)]
assert abs(lightness[0] - lightness[1]) < 0.15, lightness  # noise has 0.5, the digits 0.3
assert (samples < 32).float().mean() > 0.2  # so much of it is the black around a digit; 0.1 of noise
"""
    run_program(code + look, tmp_path)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "digits-model"}


FEWER = {"10_000": "2, batch_size=4", "20_000": "3, batch_size=4", "n=500, calls=50": "n=8, calls=3"}
FEWER |= {"sample(16)": "sample(4, steps=2)", "sample(500)": "sample(40, steps=2)"}


@pytest.mark.slow
@pytest.mark.processes
def test_each_of_the_five_tasks_takes_at_most_five_lines_and_runs(tmp_path):
    "As written, but for the numbers in `FEWER`, on a folder of six photographs."
    tasks = blocks("python")[1:]
    assert len(tasks) == 5 and all(len(task.splitlines()) <= 5 for task in tasks)
    program = """
import numpy as np, torch
from pathlib import Path
from PIL import Image
from doubles import OwnNet as MyNet, tiny_model
Path("photos/sea").mkdir(parents=True)
for i in range(6):
    colours = np.random.default_rng(i).integers(256, size=(40, 50, 3), dtype=np.uint8)
    Image.fromarray(colours).save(f"photos/sea/{i}.png")
"""
    looks = {
        0: 'assert Path("run/model/model_index.json").is_file() and Path("samples.png").stat().st_size > 100',
        1: 'assert m.image_shape == (1, 8, 8) and Path("samples.png").is_file()',
        2: "",  # it prints the scores, see below
        3: 'assert m.s.T == 1000 and m.predicts == "v" and m.sample(2, steps=2).shape == (2, 1, 8, 8)',
        4: "",  # nor need these be computed again
    }
    for i, task in enumerate(tasks):
        for large, small in FEWER.items():
            task = task.replace(large, small)
        program += f"{task}\n{looks[i]}\n"
        if i == 1:
            program += "tiny = m\n"
        if i == 3:
            program += "m = tiny\n"
    program += 'labels = {"class_labels": torch.arange(10)}\n'
    program += "assert tiny_model(num_class_embeds=10).sample(10, steps=2, cond=labels).shape == (10, 1, 8, 8)\n"
    printed = run_program(program, tmp_path)
    assert re.search(r"'frechet_distance': \d+\.", printed) and re.search(r"'total': \d+\.", printed), printed


def test_the_table_lists_exactly_the_chapters():
    rows = re.findall(r"^\| \[(\w+)\]\(nbs/(\w+)\.ipynb\) \| `?(\w+|—)`? \| (.+) \|$", README, re.M)
    chapters = sorted((ROOT / "nbs").glob("*.ipynb"))
    assert [row[0] for row in rows] == [path.stem for path in chapters]
    for (name, link, module, holds), path in zip(rows, chapters, strict=True):
        assert name == link and len(holds) > 10
        (exported,) = re.findall(r"#\| *default_exp (\w+)", path.read_text(encoding="utf-8")) or ["—"]
        assert module == exported


def test_every_command_exists():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
    assert {"demo", "test"} <= set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.M)) <= targets
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {"install", "notebooks", "test"} <= set(re.findall(r"(?:^|`)make ([a-z]+)", contributing, re.M)) <= targets
    programs = {Path(command.split()[0]).name for command in re.findall(r"(\.venv/bin/\w+)", "\n".join(blocks("sh")))}
    assert {"pip", "ruff", "pytest", "ddpm_lit"} <= programs
    assert all((Path(sys.executable).parent / name).exists() for name in programs)
    named = set(re.findall(r"`(?:ddpm_lit )?(demo|train|sample|evaluate)`", README)) | {"demo"}
    usage = subprocess.run([sys.executable, "-m", "ddpm_lit", "--help"], capture_output=True, text=True).stdout
    assert all(re.search(rf"\b{name}\b", usage) for name in named), usage


def test_continuous_integration_runs_the_readmes_test_command():
    ci = ROOT / ".ci" / "run"
    commands = [line for line in ci.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
    assert os.access(ci, os.X_OK)
    assert commands == ["set -eu", 'cd "$(dirname "$0")/.."', "make test"]
    assert any(line.startswith("make test ") for block in blocks("sh") for line in block.splitlines())


def test_the_plain_lines_are_those_of_make():
    (plain,) = (block for block in blocks("sh") if "-m venv" in block)
    lines = [part.strip() for line in plain.splitlines() for part in line.replace(".venv/bin/", "").split("&&")]
    assert lines[-3:] == recipe("lint") + recipe("test")
    assert "-m venv .venv" in MAKEFILE and "-m ddpm_lit demo" in MAKEFILE and lines[2] == "ddpm_lit demo"
    short = {"--constraint": "-c", "--editable": "-e"}
    install = [short.get(word, word) for word in shlex.split(recipe(".venv/installed")[1])]
    assert shlex.split(lines[1]) == install


def test_what_is_linked_is_there():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), f"{name}: {link}"


def test_the_version_is_in_the_changelog():
    assert f"## {ddpm_lit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nothing_is_left_to_fill_in():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert not re.search(r"@[A-Z_]+@|TODO|FIXME|XXX", (ROOT / name).read_text(encoding="utf-8")), name
