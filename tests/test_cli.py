"""The command line end to end on a tiny run: what it writes, what it refuses, with which exit code."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from doubles import tiny_model
from PIL import Image

from ddpm_lit import cli, metrics
from ddpm_lit.ddpm import DDPM
from ddpm_lit.evaluation import evaluate_bpd
from ddpm_lit.files import Checkpoints, model_folder
from ddpm_lit.images import Images, save_grid, to_pixels
from ddpm_lit.loading import load_images
from ddpm_lit.metrics import ClassifierFeatures, inception_score
from ddpm_lit.neighbours import precision_recall
from ddpm_lit.processes import this_process
from ddpm_lit.trainer import Trainer

QUIET = ["--no-progress"]


@pytest.fixture(scope="module", autouse=True)
def one_classifier():
    "The same classifier is trained once for all tests."
    patch, cache, train = pytest.MonkeyPatch(), {}, metrics.train_classifier

    def cached(x, y, *rest):
        key = (len(x), x.sum().item(), rest)
        if key not in cache:
            cache[key] = train(x, y, *rest)
        return cache[key]

    patch.setattr(metrics, "train_classifier", cached)
    yield
    patch.undo()


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
    assert 0 <= metrics["precision"] <= 1 and 0 <= metrics["recall"] <= 1 and 1 <= metrics["inception_score"] <= 10
    assert (metrics["sampler"], metrics["sampling_steps"]) == ("ancestral", 4)
    assert metrics["precision_recall_n"] == [12, 1797] and metrics["features"].startswith("classifier ")
    bits = metrics["bits_per_dim"]
    assert (bits["n"], bits["calls"], bits["seed"]) == (12, 50, 0) and "digits" in bits["data"]
    assert bits["total"] == pytest.approx(bits["prior"] + bits["kl"] + bits["decoder"]) and bits["standard_error"] > 0
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


def test_a_precision_that_cannot_be_is_refused(demo, monkeypatch, capsys):
    monkeypatch.setattr("ddpm_lit.pretrained.this_process", lambda: type("CPU", (), dict(device=torch.device("cpu"))))
    assert "precision must be no or bf16 on a CPU" in refused(capsys, "sample", str(demo), "--precision", "fp16")
    assert "precision must be no or bf16 on a CPU" in refused(capsys, "evaluate", str(demo), "--precision", "fp16")


# An interrupted request. Ten images in batches of 4, 3 steps each: 9 calls of the network.

TEN = ["-n", "10", "--batch-size", "4", "--steps", "3"]
FORMS = {"npz": "ten.npz", "grid": "ten.png", "png": "ten"}


@pytest.fixture
def counting(monkeypatch):
    "Return a function that runs a command; it returns the exit code and how often the network was called."
    from_pretrained = DDPM.from_pretrained

    def count(*words, event=None, at=None):
        calls = 0

        def called(net, args, out):
            nonlocal calls
            calls += 1
            return event(out) if calls == at else out

        def loaded(*args):
            m = from_pretrained(*args)
            m.net.register_forward_hook(called)
            return m

        with monkeypatch.context() as patch:
            patch.setattr(DDPM, "from_pretrained", loaded)
            return cli.main([str(word) for word in words]), calls

    return count


@pytest.fixture
def asking(demo, tmp_path, counting):
    "The same for `ddpm_lit sample`."

    def ask(name, *words, form=None, run=demo, ten=TEN, quiet=QUIET, **event):
        forms = ["--format", form] if form else []
        return counting("sample", run, *ten, "--out", tmp_path / name, *forms, *quiet, *words, **event)

    return ask


def nan(out):
    return out * float("nan")


def fail_with(error):
    def fail(out):
        raise error

    return fail


def content(path):
    "The bytes of a file, or of all files in a folder, by name; no draft is among them."
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    assert not [file for file in files if file.name.startswith(".")]
    return [(file.name if path.is_dir() else "", file.read_bytes()) for file in files]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_drawn_is_kept_and_never_drawn_again(form, asking, tmp_path, capsys):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / FORMS[form]
    undisturbed.mkdir()
    assert asking(undisturbed / FORMS[form], form=form) == (0, 9)
    parts = out if form == "png" else tmp_path / f"{FORMS[form]}.parts"

    assert asking(FORMS[form], form=form, event=nan, at=7) == (2, 9)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "not finite" in told
    assert f"8 of 10 images are cached in {parts}; the same command resumes there" in told
    assert len(list(parts.glob("*.png" if form == "png" else "*.npy"))) == (8 if form == "png" else 2)
    assert form == "png" or not out.exists()

    assert asking(FORMS[form], form=form, event=fail_with(KeyboardInterrupt()), at=2) == (130, 2)
    told = capsys.readouterr().err
    assert told.startswith("ddpm_lit: interrupted; 8 of 10 images are cached") and len(told.splitlines()) == 1

    assert asking(FORMS[form], form=form) == (0, 3)
    assert content(out) == content(undisturbed / FORMS[form])
    assert form == "png" or not parts.exists()


def test_nothing_is_said_to_be_kept_where_nothing_is(asking, tmp_path, capsys):
    assert asking("x.npz", event=nan, at=2) == (2, 3)
    assert "cached" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error,said",
    [(OSError("the disk is full"), "the disk is full"), (torch.OutOfMemoryError("no room"), "a --batch-size below 4")],
)
def test_a_machine_that_gives_in_ends_with_1_and_what_is_kept(error, said, asking, capsys):
    assert asking("x.npz", event=fail_with(error), at=4) == (1, 4)
    told = capsys.readouterr().err
    assert said in told and "4 of 10 images are cached" in told and len(told.splitlines()) == 1


def test_a_batch_cut_short_is_drawn_again(asking, tmp_path):
    assert asking("whole.npz") == (0, 9)
    for length in (None, 40):
        assert asking("x.npz", event=nan, at=7)[0] == 2
        part = tmp_path / "x.npz.parts" / "00001.npy"
        part.unlink() if length is None else part.write_bytes(part.read_bytes()[:length])
        assert asking("x.npz") == (0, 6)
        assert content(tmp_path / "x.npz") == content(tmp_path / "whole.npz")

    assert asking("pictures", form="png") == (0, 9)
    expected = content(tmp_path / "pictures")
    for name in ("00000", "00009"):
        picture = tmp_path / "pictures" / f"{name}.png"
        picture.write_bytes(picture.read_bytes()[:-1])
    assert asking("pictures", form="png") == (0, 6)
    assert content(tmp_path / "pictures") == expected
    assert asking("pictures", form="png") == (0, 0)


def test_images_of_another_request_are_not_mixed_in(asking, tmp_path, capsys):
    others = {
        "seed 0, not 1": ["--seed", "1"],
        "steps 3, not 4": ["--steps", "4"],
        "eta 0.0, not 1.0": ["--eta", "1"],
        "sampler ddim, not ancestral": ["--sampler", "ancestral"],
        "batch_size 4, not 3": ["--batch-size", "3"],
        "n 10, not 9": ["-n", "9"],
        "steps 3, not 4, seed 0, not 1": ["--seed", "1", "--steps", "4"],
        "precision no, not bf16": ["--precision", "bf16"],
    }
    for name, form in (("x.npz", None), ("pictures", "png")):
        asking(name, form=form, event=nan, at=7)
        folder = tmp_path / ("pictures" if form else "x.npz.parts")
        before = content(folder)
        capsys.readouterr()
        for differs, words in others.items():
            assert asking(name, *words, form=form) == (2, 0)
            told = capsys.readouterr().err
            assert (
                f"{folder} holds a cache of another request: {differs}; delete it" in told
                and len(told.splitlines()) == 1
            )
            assert content(folder) == before
        assert asking(name, form=form) == (0, 3)


def test_a_request_goes_on_faster_but_not_on_another_kind_of_device(asking, tmp_path, capsys):
    "There the noise of a seed is another. A layout in memory is not a matter of the request, nor is the progress bar."
    asking("x.npz", event=nan, at=7)
    record = tmp_path / "x.npz.parts" / "request.json"
    told, here = record.read_text(), this_process().device.type
    assert json.loads(told)["device"] == here and not {"compile", "channels_last"} & json.loads(told).keys()
    record.write_text(told.replace(f'"device": "{here}"', '"device": "abacus"'))
    capsys.readouterr()
    assert asking("x.npz") == (2, 0)
    assert f"holds a cache of another request: device abacus, not {here}; delete it" in capsys.readouterr().err
    record.write_text(told)
    assert asking("x.npz", "--channels-last", quiet=[]) == (0, 3)


def test_images_of_another_model_are_not_mixed_in(demo, asking, tmp_path, capsys):
    asking("x.npz", event=nan, at=7)
    shutil.copytree(demo, tmp_path / "copy")
    shutil.copytree(demo, tmp_path / "trained")
    m = DDPM.from_pretrained(tmp_path / "trained" / "model")
    with torch.no_grad():
        next(m.net.parameters()).add_(1e-3)
    m.save_pretrained(tmp_path / "trained" / "model")
    capsys.readouterr()
    assert asking("x.npz", run=tmp_path / "trained") == (2, 0)
    assert "holds a cache of another request: model " in capsys.readouterr().err
    (tmp_path / "copy" / "model" / "training.json").write_text("{}")
    assert asking("x.npz", run=tmp_path / "copy") == (0, 3), "the same model in another place is the same"


@pytest.mark.parametrize("record", ["", "[]", "3", '{"n": "ten"}'])
def test_a_record_that_is_none_is_refused(record, asking, tmp_path, capsys):
    asking("x.npz", event=nan, at=7)
    (tmp_path / "x.npz.parts" / "request.json").write_text(record)
    assert asking("x.npz") == (2, 0)
    assert "x.npz.parts holds a cache of another request" in capsys.readouterr().err


def test_a_folder_of_other_pictures_is_left_alone(asking, tmp_path, capsys):
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "00000.png").write_bytes(b"the sea")
    assert asking("holiday", form="png") == (2, 0)
    assert "of unknown origin" in capsys.readouterr().err
    assert content(folder) == [("00000.png", b"the sea")]


def test_a_larger_n_goes_on(asking, tmp_path):
    assert asking("more", form="png") == (0, 9)
    before = dict(content(tmp_path / "more"))
    assert asking("more", "-n", "13", form="png") == (0, 3), "the third batch was not full, and stays"
    assert {name: dict(content(tmp_path / "more"))[name] for name in before if "png" in name} == {
        name: value for name, value in before.items() if "png" in name
    }
    assert asking("once", "-n", "13", form="png") == (0, 12)
    assert asking("full", "-n", "8", form="png") == (0, 6) and asking("full", "-n", "13", form="png") == (0, 6)
    assert content(tmp_path / "full") == content(tmp_path / "once"), "a batch that was full is followed by the next"
    asking("x.npz", event=nan, at=7)
    assert asking("x.npz", "-n", "13") == (0, 6)
    images = [np.asarray(Image.open(tmp_path / "once" / f"{k:05d}.png")) for k in range(13)]
    assert torch.equal(load_images(tmp_path / "x.npz").pixels[:, 0], torch.from_numpy(np.stack(images)))


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_process_loses_only_the_batch_that_it_was_drawing(demo, asking, tmp_path):
    many = ["-n", "24", "--batch-size", "1", "--steps", "10"]
    words = ["sample", str(demo), *many, "--out", str(tmp_path / "x.npz"), *QUIET]
    process, parts = subprocess.Popen([sys.executable, "-m", "ddpm_lit", *words]), tmp_path / "x.npz.parts"
    while process.poll() is None and len(list(parts.glob("0*.npy"))) < 3:
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = len(list(parts.glob("0*.npy")))
    assert 3 <= kept < 24 and not (tmp_path / "x.npz").exists()
    assert asking("x.npz", ten=many) == (0, 10 * (24 - kept))
    assert asking("undisturbed.npz", ten=many) == (0, 240)
    assert content(tmp_path / "x.npz") == content(tmp_path / "undisturbed.npz")


def test_the_bar_counts_the_steps_that_are_left(asking, capsys):
    asking("x.npz", event=nan, at=7)
    capsys.readouterr()
    assert asking("x.npz", quiet=[]) == (0, 3)
    assert "3/3" in capsys.readouterr().err
    assert asking("y.npz", "--steps", "0", quiet=[]) == (2, 0)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_film_shows_the_way_from_the_noise_to_the_grid(asking, tmp_path):
    four = ["-n", "4", "--steps", "7"]
    assert asking("grid.png", ten=four) == (0, 7)
    assert asking("way.gif", "--every", "3", ten=four) == (0, 7)
    assert asking("way.png", "--every", "3", ten=four) == (0, 7)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    with Image.open(tmp_path / "way.gif") as film:
        seen = []
        for k in range(film.n_frames):
            film.seek(k)
            seen.append((film.info["duration"], np.array(film.convert("L"))))
        assert film.info["loop"] == 0
    assert [duration for duration, _ in seen] == [100, 100, 100, 2000], "steps 0, 3, 6 and 7"
    assert np.array_equal(seen[-1][1], grid)
    device = this_process().device
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator(device).manual_seed(0), device=device).cpu()
    save_grid(tmp_path / "noise.png", to_pixels(noise))
    assert np.array_equal(seen[0][1], np.asarray(Image.open(tmp_path / "noise.png")))

    strip = np.asarray(Image.open(tmp_path / "way.png"))
    cell = 9 * 8  # eight pixels and a line, enlarged by eight
    assert strip.shape == (4 * cell - 8, 4 * cell - 8)
    for i in range(4):
        for k in range(4):
            there = strip[i * cell : i * cell + 64, k * cell : k * cell + 64]
            row, column = divmod(i, 2)
            assert np.array_equal(there, seen[k][1][row * cell :, column * cell :][:64, :64]), (i, k)


def test_a_film_in_batches_shows_the_images_of_the_batches(asking, tmp_path):
    assert asking("ten.npz") == (0, 9)
    assert asking("ten.png", "--every", "3") == (0, 9)
    save_grid(tmp_path / "last.png", load_images(tmp_path / "ten.npz").pixels, columns=1)
    strip, last = (np.asarray(Image.open(tmp_path / name)) for name in ("ten.png", "last.png"))
    assert np.array_equal(strip[:, -64:], last)


@pytest.mark.parametrize("form,name", [("png", "samples"), ("npz", "samples.npz"), ("grid", "samples.png")])
def test_without_out_the_name_is_that_of_the_format(form, name, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", str(demo), "-n", "2", "--steps", "1", "--format", form, *QUIET]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_train_trains_what_it_is_told(tmp_path):
    pixels = torch.randint(256, (30, 4, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez(tmp_path / "rgb.npz", images=pixels.numpy())
    words = ["--data", str(tmp_path / "rgb.npz"), "--steps", "2", "--batch-size", "4", "--T", "20", "--beta-T", "0.3"]
    words += ["--predicts", "v", "--variance", "beta", "--out", str(tmp_path / "run"), "--lr", "1e-5", *QUIET]
    assert cli.main(["train", *words]) == 0
    m = DDPM.from_pretrained(tmp_path / "run" / "model")
    assert (m.s.T, m.predicts, m.variance) == (20, "v", "beta") and m.s.beta[-1] == pytest.approx(0.3)
    assert m.image_shape == (3, 4, 6)
    told = json.loads((model_folder(tmp_path / "run") / "training.json").read_text())
    assert told["config"]["lr"] == 1e-5 and told["config"]["batch_size"] == 4 and told["step"] == 2
    drawn = str(tmp_path / "s.npz")
    assert cli.main(["sample", str(tmp_path / "run"), "-n", "2", "--steps", "2", "--out", drawn, *QUIET]) == 0
    assert load_images(tmp_path / "s.npz").pixels.shape == (2, 3, 4, 6)


SHORT = ["--layers", "1", "--batch-size", "4", "--T", "20", "--beta-T", "0.3", "--track", "none", *QUIET]


def final(run):
    return torch.cat([p.flatten() for p in DDPM.from_pretrained(model_folder(run)).net.parameters()])


def test_resume_takes_its_settings_from_the_run_and_pictures_go_with_the_checkpoints(tmp_path, capsys):
    short = ["--seed", "3", "--schedule", "scaled_linear", *SHORT]
    assert cli.main(["train", "--steps", "4", "--out", str(tmp_path / "a"), *short]) == 0
    assert cli.main(["train", "--steps", "2", "--out", str(tmp_path / "b"), *short]) == 0
    options = json.loads((tmp_path / "b" / "train.json").read_text())
    options["training"].pop("drop_labels")  # earlier versions did not know it, and called the schedule quadratic
    (tmp_path / "b" / "train.json").write_text(json.dumps(options | dict(schedule="quadratic")))
    assert cli.main(["train", "--resume", f"--out={tmp_path / 'b'}", "--steps", "4"]) == 0
    assert "resumed with" not in capsys.readouterr().err
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))
    names = [p.name for p in sorted((tmp_path / "b" / "samples").iterdir())]
    assert names == ["step-00000002.png", "step-00000004.png"]
    words = ["train", "--resume", "--out", str(tmp_path / "b")]
    assert "--layers must be 1" in refused_last(capsys, *words, "--layers", "2")
    assert "holds a run of 4 steps" in refused_last(capsys, "train", "--out", str(tmp_path / "b"), *SHORT)
    (tmp_path / "b" / "train.json").write_text("{")
    assert "train.json cannot be read" in refused_last(capsys, *words)


def refused_last(capsys, *words):
    capsys.readouterr()
    return refused(capsys, *words)


@pytest.mark.processes
@pytest.mark.slow
def test_a_terminated_training_saves_says_so_and_goes_on(tmp_path):
    words = [sys.executable, "-m", "ddpm_lit", "train", "--out", str(tmp_path / "run"), *SHORT]
    process = subprocess.Popen([*words, "--steps", "100000", "--save-every", "5"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("run/checkpoints/step-*")):
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    last = err.strip().splitlines()[-1]
    step = Checkpoints(tmp_path / "run").steps()[-1]
    assert f"ddpm_lit: stopped by SIGTERM after step {step}: all is saved, resume with --resume --out" in last
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", str(step + 1)]) == 0


# Evaluating. A model of five steps, ten images in batches of 4: bits/dim take 15 calls of the network, samples 6.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A run folder with a network of five steps, trained for one."
    run = tmp_path_factory.mktemp("tiny") / "run"
    words = ["--steps", "1", "--T", "5", "--beta-T", "0.5", "--layers", "1", "--track", "none", "--out", str(run)]
    assert cli.main(["train", *words, *QUIET]) == 0
    return run


def numbers(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_evaluate_measures_both_and_shows_what_it_found(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "run")
    words = ["evaluate", str(tmp_path / "run"), "-n", "40", "--batch-size", "16", "--steps", "2", *QUIET]
    assert cli.main(words) == 0
    shown, found = capsys.readouterr().out, numbers(tmp_path / "run" / "evaluation")
    bits, samples = found["bits_per_dim"], found["samples"]

    digits, m = load_images("digits"), DDPM.from_pretrained(model_folder(tiny))
    generator = torch.Generator().manual_seed(0)
    some = Images(digits.pixels[torch.randperm(1797, generator=generator)[:40]])
    expected = evaluate_bpd(m, some, batch_size=16, generator=generator)
    assert bits["total"] == pytest.approx(expected.total, rel=1e-6)
    assert bits["standard_error"] == pytest.approx(expected.error, rel=1e-6)
    assert bits["total"] == pytest.approx(bits["prior"] + bits["kl"] + bits["decoder"])
    assert (bits["n"], bits["calls"], bits["seed"]) == (40, 5, 0)

    same = ["--batch-size", "16", "--steps", "2", "--out", str(tmp_path / "same.npz"), *QUIET]
    assert cli.main(["sample", str(tiny), "-n", "40", *same]) == 0
    drawn, features = load_images(tmp_path / "same.npz").pixels, ClassifierFeatures(digits)
    both = features(drawn), features(digits.pixels)
    assert samples["frechet_distance"] == pytest.approx(features.distance(drawn, digits.pixels), rel=1e-6)
    assert [samples["precision"], samples["recall"]] == pytest.approx(precision_recall(samples=both[0], real=both[1]))
    assert samples["inception_score"] == pytest.approx(inception_score(features.probabilities(both[0]))[0])
    real = features.distance(digits.pixels[features.test], digits.pixels)
    assert samples["frechet_distance_real"] == pytest.approx(real, rel=1e-6) and real < 1
    assert samples["frechet_distance_noise"] > 100
    expected = dict(n=40, seed=0, sampler="ddim", steps=2, eta=0, precision_recall_n=[40, 1797], features=features.name)
    assert samples == samples | expected | dict(mixed_precision="no") and "digits" in samples["data"]

    for value in (bits["total"], samples["frechet_distance"], samples["precision"]):
        assert f"{value:.4g}" in shown
    assert str(tmp_path / "run" / "evaluation.json") in shown
    save_grid(tmp_path / "grid.png", drawn)
    pictures = dict(content(tmp_path / "run" / "evaluation"))
    assert pictures["samples.png"] == (tmp_path / "grid.png").read_bytes()
    assert sorted(pictures) == ["bits.png", "samples.png"]
    picture = np.asarray(Image.open(tmp_path / "run" / "evaluation" / "bits.png").convert("L"))
    assert picture.shape == (340, 900) and picture.std() > 5


def test_labels_choose_the_classes_of_a_network_that_has_them(tmp_path, capsys):
    m = tiny_model(num_class_embeds=4)
    m.save_pretrained(tmp_path / "m")

    def sampled(*words, name="x.npz"):
        words = ["-n", "4", "--steps", "3", "--batch-size", "3", "--out", str(tmp_path / name), *QUIET, *words]
        assert cli.main(["sample", str(tmp_path / "m"), *words]) == 0
        return load_images(tmp_path / name).pixels

    turns = sampled("--labels", "3,1")
    assert torch.equal(turns, sampled("--labels", "3,1,3,1")) and not torch.equal(turns, sampled("--labels", "3"))
    assert torch.equal(sampled(), sampled("--labels", "0,1,2,3"))
    labels = dict(class_labels=torch.tensor([3, 1, 3]))
    expected = m.sample(3, 3, cond=labels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turns[:3], expected)
    capsys.readouterr()
    for words, line in ((["--labels", "4"], "labels must be from 0 to 3"), (["--labels", "a"], "labels must be whole")):
        assert line in refused(capsys, "sample", str(tmp_path / "m"), "--out", str(tmp_path / "y.npz"), *words)


def test_a_network_without_classes_takes_no_labels(demo, tmp_path, capsys):
    assert "labels must not be given" in refused(capsys, "sample", str(demo), "--labels", "3")


def test_a_learned_variance_is_trained_drawn_and_measured(tmp_path, counting):
    run = tmp_path / "run"
    words = ["--objective", "bound", "--variance", "learned", "--steps", 3, "--batch-size", 4, "--T", 5]
    words += ["--beta-T", 0.5, "--layers", 1, "--track", "none", "--out", run, *QUIET]
    assert counting("train", *words)[0] == 0
    m = DDPM.from_pretrained(model_folder(run))
    assert m.variance == "learned" and m.net.config["out_channels"] == 2 and m.image_shape == (1, 8, 8)
    assert counting("sample", run, "-n", 2, "--sampler", "ancestral", "--out", tmp_path / "a.npz", *QUIET) == (0, 5)
    assert load_images(tmp_path / "a.npz").pixels.shape == (2, 1, 8, 8)
    assert counting("evaluate", run, "-n", 4, "--steps", 2, *QUIET) == (0, 7)
    assert numbers(run / "evaluation")["bits_per_dim"]["total"] > 0


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_share_a_request(tiny, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ddpm_lit"]
    words = ["sample", str(tiny), "-n", "7", "--batch-size", "2", "--steps", "3", *QUIET, "--out"]
    done = subprocess.run([*torchrun, *words, str(tmp_path / "two.npz")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("in " + str(tmp_path)) == 1, done.stderr
    assert cli.main([*words, str(tmp_path / "one.npz")]) == 0
    assert torch.equal(load_images(tmp_path / "two.npz").pixels, load_images(tmp_path / "one.npz").pixels)


@pytest.mark.parametrize(
    "words,said",
    [
        (["train", "--data", "digitz"], "did you mean 'digits'"),
        (["train", "--T", "1"], "--T must be at least 2"),
        (["train", "--preset", "celebahq256"], "--data must be given for the preset celebahq256"),
        (["train", "--accumulate", "0"], "--accumulate must be at least 1"),
        (["train", "--beta-1", "0"], "--beta-1 must lie in (0, 1)"),
        (["train", "--beta-T", "1"], "--beta-T must lie in (0, 1)"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--ema", "1"], "ema must lie in [0, 1)"),
        (["train", "--out", "/dev/null/run"], "out must be a folder"),
        (["demo", "--out", "/dev/null/run"], "out must be a folder"),
        (["train", "--objective", "hybrid"], "objective must not be 'hybrid' for a fixed variance"),
        (["demo", "--samples", "3"], "samples must be at least 4"),
        (["demo", "--steps", "0"], "steps must be at least 1"),
        (["demo", "--sampling-steps", "1001"], "--sampling-steps must"),
        (["demo", "--seed", "-1"], "seed must be at least 0"),
        (["sample", "/nowhere"], "does not exist"),
        (["evaluate", "/nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("training began"))
    assert said in refused(capsys, *words)


@pytest.mark.parametrize(
    "words,said",
    [
        (["sample", "--steps", "1001"], "steps must be a whole number from 1 to T = 1000"),
        (["sample", "--steps", "0"], "steps must be a whole number"),
        (["sample", "--sampler", "ancestral", "--steps", "1"], "steps must be a whole number from 2"),
        (["sample", "--eta", "1.5"], "eta must lie in [0, 1]"),
        (["sample", "-n", "0"], "-n must be at least 1"),
        (["sample", "--seed", "-1"], "seed must"),
        (["sample", "--sampler", "ancestral", "--eta", "0.5"], "eta is for ddim"),
        (["sample", "--eta", "nan"], "eta must lie in [0, 1]"),
        (["sample", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["sample", "-n", "4097"], "--format npz or png"),
        (["sample", "-n", "4097", "--out", "grid.png"], "n must be at most 4096"),
        (["sample", "--out", "grid.bmp"], "must be a file that ends in .png or .npz"),
        (["sample", "--out", "film.gif"], "must be a file that ends in .png or .npz"),
        (["sample", "--format", "npz", "--out", "grid.png"], "must be a file that ends in .npz, got 'grid.png'"),
        (["sample", "--format", "grid", "--out", "all.npz"], "must be a file that ends in .png, got 'all.npz'"),
        (["sample", "--format", "png", "--out", "grid.png"], "out must be a folder"),
        (["sample", "--format", "png", "--out", "/dev/null/x"], "out must be a folder"),
        (
            ["sample", "--every", "2", "--format", "png", "--out", "x"],
            "got the format png",
        ),
        (
            ["sample", "--every", "2", "--out", "x.npz"],
            "got the format npz",
        ),
        (["sample", "--every", "2", "--out", "x.jpg"], "must be a file that ends in .gif or .png"),
        (["sample", "--every", "2", "-n", "65"], "n must be at most 64 for one animation"),
        (["sample", "--every", "0"], "--every must be from 1 to the number of steps, 50"),
        (["sample", "--every", "6", "--steps", "5"], "--every must be from 1 to the number of steps, 5"),
        (["sample", "--out", "/dev/null/x/grid.png"], "must be a folder"),
    ],
)
def test_bad_requests_to_a_run_are_refused_before_drawing(capsys, demo, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm_lit.sampler.sample_steps", lambda *_: pytest.fail("sampling began"))
    assert said in refused(capsys, words[0], str(demo), *words[1:])
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_a_broken_checkpoint_is_named(capsys, demo, tmp_path):
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

    monkeypatch.setattr(Trainer, "fit", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path / "d"), *QUIET]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "ddpm_lit: interrupted"


def test_a_run_that_breaks_ends_with_one_line_and_1(capsys, monkeypatch, tmp_path):
    def burst(self):
        raise FloatingPointError("the loss is nan in step 3: try an lr below 1")

    monkeypatch.setattr(Trainer, "fit", burst)
    assert cli.main(["demo", "--out", str(tmp_path / "d"), *QUIET]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ddpm_lit: the loss is nan in step 3: try an lr below 1"


@pytest.mark.processes
@pytest.mark.slow
def test_python_m_shows_progress_with_the_loss(tmp_path):
    words = ["demo", "--steps", "3", "--samples", "4", "--sampling-steps", "2", "--out", str(tmp_path / "d")]
    done = subprocess.run([sys.executable, "-m", "ddpm_lit", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stderr for word in ("loss=", "img/s", "sampling", "bits/dim"))
    assert "Try next" in done.stdout


# Classes and guidance.


@pytest.fixture(scope="module")
def by_label(tmp_path_factory):
    "A run of two steps on twelve pictures, in the folders cat and dog."
    folder, digits = tmp_path_factory.mktemp("pets"), load_images("digits").pixels[:12, 0].numpy()
    for i, pixels in enumerate(digits):
        (folder / "data" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "data" / ("cat", "dog")[i % 2] / f"{i}.png")
    words = ["--data", str(folder / "data"), "--out", str(folder / "run"), "--steps", "2", "--batch-size", "4"]
    assert cli.main(["train", *words, "--classes", "--layers", "1", "--warmup", "0", "--lr", "0.01", *QUIET]) == 0
    return folder / "run"


def test_a_run_with_classes_knows_their_names_and_resumes(by_label):
    saved, m = json.loads((by_label / "train.json").read_text()), DDPM.from_pretrained(model_folder(by_label))
    assert saved["class_names"] == ["cat", "dog"] and saved["classes"] and m.net.config["num_class_embeds"] == 3
    metadata = json.loads((Checkpoints(by_label).newest() / "training.json").read_text())
    assert metadata["config"]["drop_labels"] == 0.1
    assert cli.main(["train", "--resume", "--steps", "3", "--out", str(by_label), *QUIET]) == 0
    assert Checkpoints(by_label).steps()[-1] == 3


def test_guided_samples_stand_in_a_row_for_each_label(by_label, tmp_path):
    def sampled(name, *words):
        words = ["-n", "4", "--steps", "2", "--out", str(tmp_path / name), *words]
        assert cli.main(["sample", str(by_label), *words, *QUIET]) == 0
        return tmp_path / name

    guided = load_images(sampled("a.npz", "--labels", "cat,dog", "--guidance", "3")).pixels
    assert torch.equal(guided, load_images(sampled("b.npz", "--labels", "0-1", "--guidance", "3")).pixels)
    assert torch.equal(guided, load_images(sampled("c.npz", "--guidance", "3")).pixels), "all but the null label"
    plain = load_images(sampled("d.npz", "--labels", "0-1")).pixels
    assert torch.equal(plain, load_images(sampled("e.npz", "--labels", "0-1", "--guidance", "1")).pixels)
    assert not torch.equal(plain, guided)
    save_grid(tmp_path / "rows.png", guided[[0, 2, 1, 3]], columns=2)
    drawn = sampled("grid.png", "--labels", "cat,dog", "--guidance", "3")
    assert np.array_equal(np.array(Image.open(drawn)), np.array(Image.open(tmp_path / "rows.png")))


def test_what_guidance_cannot_do_is_refused(by_label, demo, capsys):
    unknown = refused(capsys, "sample", str(by_label), "--labels", "cow")
    assert "names (cat, dog)" in unknown
    assert "guidance must not be given" in refused(capsys, "sample", str(demo), "--guidance", "2")
    assert "labels must be from 0 to 1" in refused(capsys, "sample", str(by_label), "--labels", "2", "--guidance", "2")
    assert "--guidance must be a finite number" in refused(capsys, "sample", str(by_label), "--guidance", "nan")
