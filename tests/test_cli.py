"""The command line end to end on a tiny run: what it writes, what it refuses, with which exit code."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lit import cli
from ddpm_lit.data import load_images, save_grid
from ddpm_lit.ddpm import DDPM
from ddpm_lit.evaluate import ClassifierFeatures

QUIET = ["--no-progress"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A run folder made by a demonstration of five steps."
    out = tmp_path_factory.mktemp("run") / "demo"
    words = ["--steps", "5", "--samples", "12", "--sampling-steps", "4", "--out", str(out)]
    assert cli.main(["demo", *words, *QUIET]) == 0
    return out


def refused(capsys, *words):
    "The one line that `words` get, with exit code 2."
    assert cli.main(list(words)) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.strip().splitlines()) == 1 and "Traceback" not in told.err
    return told.err


def test_the_demonstration_writes_what_it_says(demo):
    assert sorted(p.name for p in demo.iterdir()) == ["loss.png", "metrics.json", "model", "samples.png"]
    metrics = json.loads((demo / "metrics.json").read_text())
    assert metrics["steps"] == 5 and metrics["n"] == 12 and metrics["seed"] == 0
    m = DDPM.from_pretrained(demo / "model")
    assert metrics["parameters"] == sum(p.numel() for p in m.net.parameters())
    assert 0.5 < metrics["loss"] < 1.5
    assert metrics["frechet_distance_real"] < 1 < metrics["frechet_distance"] < 1000
    assert metrics["frechet_distance_noise"] > 100
    assert metrics["versions"]["torch"] == torch.__version__
    for name in ("samples.png", "loss.png"):
        assert np.asarray(Image.open(demo / name).convert("L")).std() > 5, "a picture must show something"


def test_the_distance_in_the_metrics_is_that_of_the_samples(demo, tmp_path):
    "The samples of the demonstration, drawn again from what it saved, give the number that it wrote."
    words = ["--sampler", "ancestral", "--steps", "4", "-n", "12", "--out", str(tmp_path / "a.npz"), *QUIET]
    assert cli.main(["sample", str(demo), *words]) == 0
    digits, again = load_images("digits"), load_images(tmp_path / "a.npz")
    metrics = json.loads((demo / "metrics.json").read_text())
    found = ClassifierFeatures(digits).distance(again.pixels, digits.pixels)
    assert metrics["frechet_distance"] == pytest.approx(found, rel=1e-6)


def test_sampling_is_reproducible_and_heeds_its_options(demo, tmp_path):
    def drawn(*words):
        out = tmp_path / "x.npz"
        assert cli.main(["sample", str(demo), "-n", "3", "--steps", "3", "--out", str(out), *QUIET, *words]) == 0
        return load_images(out).pixels

    first = drawn()
    assert first.shape == (3, 1, 8, 8) and torch.equal(first, drawn())
    for other in (["--seed", "1"], ["--eta", "1"], ["--sampler", "ancestral"]):
        assert not torch.equal(first, drawn(*other)), other
    assert cli.main(["sample", str(demo), "--steps", "1001", "--out", str(tmp_path / "y.npz"), *QUIET]) == 2


def test_sample_writes_a_grid_into_a_new_folder(demo, tmp_path):
    out = tmp_path / "new" / "grid.png"
    for path in (out, tmp_path / "same.npz"):
        assert cli.main(["sample", str(demo), "-n", "4", "--steps", "2", "--out", str(path), *QUIET]) == 0
    save_grid(tmp_path / "expected.png", load_images(tmp_path / "same.npz").pixels)
    assert out.read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_evaluate_writes_and_shows_its_numbers(tmp_path, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "e.json"
    assert cli.main(["train", "--steps", "1", "--T", "5", "--beta-T", "0.5", "--out", run, *QUIET]) == 0
    assert cli.main(["evaluate", run, "-n", "20", "--steps", "2", "--bpd", "2", "--out", str(out), *QUIET]) == 0
    told, shown = json.loads(out.read_text()), capsys.readouterr().out
    bits = told["bits_per_dim"]
    assert told["n"] == 20 and bits["n"] == 2
    assert bits["total"] == pytest.approx(bits["prior"] + bits["kl"] + bits["decoder"], rel=1e-5)
    assert f"{told['frechet_distance']:.4g}" in shown and f"{bits['total']:.4g}" in shown and str(out) in shown


def test_train_trains_what_it_is_told(tmp_path):
    pixels = torch.randint(256, (30, 4, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez(tmp_path / "rgb.npz", images=pixels.numpy())
    words = ["--data", str(tmp_path / "rgb.npz"), "--steps", "2", "--batch-size", "4", "--T", "20", "--beta-T", "0.3"]
    words += ["--predicts", "v", "--variance", "beta", "--out", str(tmp_path / "run"), "--lr", "1e-5", *QUIET]
    assert cli.main(["train", *words]) == 0
    m = DDPM.from_pretrained(tmp_path / "run" / "model")
    assert (m.s.T, m.predicts, m.variance) == (20, "v", "beta") and m.s.beta[-1] == pytest.approx(0.3)
    assert cli.image_shape(m) == (3, 4, 6)
    told = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert told["config"]["lr"] == 1e-5 and told["config"]["batch_size"] == 4 and told["step"] == 2
    drawn = str(tmp_path / "s.npz")
    assert cli.main(["sample", str(tmp_path / "run"), "-n", "2", "--steps", "2", "--out", drawn, *QUIET]) == 0
    assert load_images(tmp_path / "s.npz").pixels.shape == (2, 3, 4, 6)


@pytest.mark.parametrize(
    "words,said",
    [
        (["train", "--data", "digitz"], "did you mean 'digits'"),
        (["train", "--T", "1"], "T must be at least 2"),
        (["train", "--beta-1", "0"], "beta_1 must lie in (0, 1)"),
        (["train", "--beta-T", "1"], "beta_T must lie in (0, 1)"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--ema", "1"], "ema must lie in [0, 1)"),
        (["train", "--out", "/dev/null/run"], "out must be a folder"),
        (["demo", "--out", "/dev/null/run"], "out must be a folder"),
        (["demo", "--samples", "1"], "samples must be at least 2"),
        (["demo", "--steps", "0"], "steps must be at least 1"),
        (["demo", "--sampling-steps", "1001"], "sampling_steps must"),
        (["demo", "--seed", "-1"], "seed must not be negative"),
        (["sample", "/nowhere"], "does not exist"),
        (["evaluate", "/nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.Trainer, "fit", lambda self: pytest.fail("training began"))
    assert said in refused(capsys, *words)


@pytest.mark.parametrize(
    "words,said",
    [
        (["sample", "--steps", "1001"], "steps must be a whole number from 1 to T = 1000"),
        (["sample", "--steps", "0"], "steps must be a whole number"),
        (["sample", "--sampler", "ancestral", "--steps", "1"], "steps must be a whole number from 2"),
        (["sample", "--eta", "1.5"], "eta must lie in [0, 1]"),
        (["sample", "-n", "0"], "n must be at least 1"),
        (["sample", "--seed", "-1"], "seed must"),
        (["sample", "--out", "grid.bmp"], "must end in .png or .npz"),
        (["sample", "--out", "/dev/null/x/grid.png"], "must be a folder"),
        (["evaluate", "-n", "1"], "n must be at least 2"),
        (["evaluate", "--bpd", "-1"], "bpd must"),
        (["evaluate", "--bpd", "1"], "bpd must"),
        (["evaluate", "--data", "mnist5k"], "data must be images like the model's"),
        (["evaluate", "--out", "/dev/null/x/e.json"], "must be a folder"),
    ],
)
def test_bad_requests_to_a_run_are_refused_before_drawing(capsys, demo, monkeypatch, words, said):
    monkeypatch.setattr("ddpm_lit.sampler.sample_steps", lambda *_: pytest.fail("sampling began"))
    assert said in refused(capsys, words[0], str(demo), *words[1:], *QUIET)


def test_a_broken_checkpoint_is_named(capsys, demo, tmp_path):
    import shutil

    shutil.copytree(demo, tmp_path / "run")
    weights = next((tmp_path / "run" / "model" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert weights.name in refused(capsys, "sample", str(tmp_path / "run"))


@pytest.mark.parametrize("words", [["smaple"], ["train", "--stepz", "3"], ["train", "--predicts", "epsilon"], []])
def test_mistyped_words_give_exit_code_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert not words or words[-1] in capsys.readouterr().err or words[-2] in capsys.readouterr().err


def test_help_explains_every_option_with_the_defaults_of_the_preset(capsys):
    def helped(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--help"])
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    assert all(command in helped() for command in ("demo", "train", "sample", "evaluate"))
    assert "800000" in helped("train", "--preset", "cifar10") and "800000" not in helped("train")
    for command in ("demo", "train", "sample", "evaluate"):
        assert "seed" in helped(command)


def test_an_interrupt_ends_with_one_line_and_130(capsys, monkeypatch, tmp_path):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Trainer, "fit", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path / "d"), *QUIET]) == 130
    assert capsys.readouterr().err.strip() == "ddpm_lit: interrupted"


def test_a_run_that_breaks_ends_with_one_line_and_1(capsys, monkeypatch, tmp_path):
    def burst(self):
        raise FloatingPointError("the loss is nan in step 3: try an lr below 1")

    monkeypatch.setattr(cli.Trainer, "fit", burst)
    assert cli.main(["demo", "--out", str(tmp_path / "d"), *QUIET]) == 1
    assert capsys.readouterr().err.strip() == "ddpm_lit: the loss is nan in step 3: try an lr below 1"


def test_python_m_shows_progress_with_the_loss(tmp_path):
    words = ["demo", "--steps", "3", "--samples", "2", "--sampling-steps", "2", "--out", str(tmp_path / "d")]
    done = subprocess.run([sys.executable, "-m", "ddpm_lit", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss=" in done.stderr and "img/s" in done.stderr and "sampling" in done.stderr
    assert "Try next" in done.stdout
