"""The command line end to end on a tiny run: what it writes, what it refuses, with which exit code."""

import json
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lit import cli
from ddpm_lit.ddpm import DDPM
from ddpm_lit.evaluation import evaluate_bpd
from ddpm_lit.files import Checkpoints, model_folder
from ddpm_lit.images import Images, save_grid
from ddpm_lit.loading import load_images
from ddpm_lit.metrics import ClassifierFeatures, FeatureStatistics, inception_score, precision_recall
from ddpm_lit.sampler import ancestral_sample, ddim_sample

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


def test_one_batch_is_drawn_by_the_sampler_with_the_seed_itself(demo):
    m = sampler.load_run(demo)
    generator = torch.Generator(sampler.device_of(m)).manual_seed(3)
    expected = images.to_pixels(ddim_sample(m, (5, 1, 8, 8), 4, 0.5, generator=generator)).cpu()
    assert torch.equal(sampler.Sampling("ddim", 4, 0.5, seed=3, progress=False).draw(m, 5), expected)
    generator = torch.Generator(sampler.device_of(m)).manual_seed(3)
    expected = images.to_pixels(ancestral_sample(m, (5, 1, 8, 8), generator=generator, steps=4)).cpu()
    drawing = sampler.Sampling("ancestral", 4, seed=3, progress=False)
    assert torch.equal(drawing.draw(m, 5), expected)
    assert not torch.equal(drawing.draw(m, 5, batch=1), expected)
    assert not torch.equal(drawing.draw(m, 5, batch=1), replace(drawing, seed=4).draw(m, 5))


@pytest.fixture
def lively():
    "A network as `train` makes it, but with weights that answer; on the CPU."
    m = cli.Train(cli.UncheckedTrainConfig(**cli.RECIPES["digits"]), layers=1).model(load_images("digits"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return m


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_mixed_precision_is_that_of_the_network_and_the_images_are_nearly_the_same(lively, sampler):
    exact, steps = sampler.Sampling(sampler, 8, seed=3, progress=False), []
    within = []
    lively.net.conv_in.register_forward_hook(lambda layer, x, out: within.append((x[0].dtype, out.dtype)))
    expected = exact.draw(lively, 4)
    rough = replace(exact, precision="bf16").draw(lively, 4, look=lambda k, x: steps.append(x))
    assert within == 8 * [(torch.float32, torch.float32)] + 8 * [(torch.float32, torch.bfloat16)]
    assert [x.dtype for x in steps] == 9 * [torch.float32]
    off = (rough.int() - expected.int()).abs().float()
    assert not torch.equal(rough, expected) and off.mean() < 3 < expected.float().std()
    assert not torch.is_autocast_enabled("cpu")


def test_a_layout_in_memory_and_a_compiled_step_change_the_images_by_rounding(lively, monkeypatch):
    from ddpm_lit import sampler

    plain, graphs = sampler.Sampling(steps=5, eta=0.5, progress=False), []
    expected = plain.draw(lively, 4)
    step = torch.compile(sampler.one_step, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    monkeypatch.setattr(sampler, "compiled_step", lambda: step)
    compiled = replace(plain, compile=True).draw(lively, 4)
    assert len(graphs) == 1
    beside = replace(plain, channels_last=True).draw(lively, 4)
    weight = lively.net.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    for drawn in (compiled, beside):
        assert (drawn.int() - expected.int()).abs().max() <= 1


def test_a_precision_that_cannot_be_is_refused(lively, demo, monkeypatch, capsys):
    with pytest.raises(ValueError, match="^precision must be one of no, bf16, fp16; got 'fp8'"):
        sampler.Sampling(precision="fp8").calls(lively)
    monkeypatch.setattr(cli, "open_run", lambda run: DDPM.from_pretrained(model_folder(run)))
    assert "precision must be no or bf16 on a CPU" in refused(capsys, "sample", str(demo), "--precision", "fp16")
    assert "precision must be no or bf16 on a CPU" in refused(capsys, "evaluate", str(demo), "--precision", "fp16")


# An interrupted request. Ten images in batches of 4, 3 steps each: 9 calls of the network.

TEN = ["-n", "10", "--batch-size", "4", "--steps", "3"]
OUTPUT_FORMATS = {"npz": "ten.npz", "grid": "ten.png", "png": "ten"}


@pytest.fixture
def counting(monkeypatch):
    "A function that runs a command; it returns the exit code and how often the network was called."
    whole = sampler.load_run

    def count(*words, event=None, at=None):
        calls = 0

        def called(net, args, out):
            nonlocal calls
            calls += 1
            return event(out) if calls == at else out

        def opened(folder):
            m = atomic_write(folder)
            m.net.register_forward_hook(called)
            return m

        monkeypatch.setattr(cli, "open_run", opened)
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


@pytest.mark.parametrize("form", OUTPUT_FORMATS)
def test_what_is_drawn_is_kept_and_never_drawn_again(form, asking, tmp_path, capsys):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / OUTPUT_FORMATS[form]
    undisturbed.mkdir()
    assert asking(undisturbed / OUTPUT_FORMATS[form], form=form) == (0, 9)
    parts = out if form == "png" else tmp_path / f"{OUTPUT_FORMATS[form]}.parts"

    assert asking(OUTPUT_FORMATS[form], form=form, event=nan, at=7) == (2, 9)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "not finite" in told
    assert f"8 of 10 images are kept in {parts}; the same command goes on there" in told
    assert len(list(parts.glob("*.png" if form == "png" else "*.npy"))) == (8 if form == "png" else 2)
    assert form == "png" or not out.exists()

    assert asking(OUTPUT_FORMATS[form], form=form, event=fail_with(KeyboardInterrupt()), at=2) == (130, 2)
    told = capsys.readouterr().err
    assert told.startswith("ddpm_lit: interrupted; 8 of 10 images are kept") and len(told.splitlines()) == 1

    assert asking(OUTPUT_FORMATS[form], form=form) == (0, 3)
    assert content(out) == content(undisturbed / OUTPUT_FORMATS[form])
    assert form == "png" or not parts.exists()


def test_nothing_is_said_to_be_kept_where_nothing_is(asking, tmp_path, capsys):
    assert asking("x.npz", event=nan, at=2) == (2, 3)
    assert "kept" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error,said",
    [(OSError("the disk is full"), "the disk is full"), (torch.OutOfMemoryError("no room"), "a --batch-size below 4")],
)
def test_a_machine_that_gives_in_ends_with_1_and_what_is_kept(error, said, asking, capsys):
    assert asking("x.npz", event=fail_with(error), at=4) == (1, 4)
    told = capsys.readouterr().err
    assert said in told and "4 of 10 images are kept" in told and len(told.splitlines()) == 1


def test_a_batch_cut_short_is_drawn_again(asking, tmp_path):
    assert asking("whole.npz") == (0, 9)
    for length in (None, 0, 40, -1):
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
        "seed 0 and not 1": ["--seed", "1"],
        "steps 3 and not 4": ["--steps", "4"],
        "eta 0.0 and not 1.0": ["--eta", "1"],
        "sampler ddim and not ancestral": ["--sampler", "ancestral"],
        "batch_size 4 and not 3": ["--batch-size", "3"],
        "n 10 and not 9": ["-n", "9"],
        "steps 3 and not 4, seed 0 and not 1": ["--seed", "1", "--steps", "4"],
        "precision no and not bf16": ["--precision", "bf16"],
    }
    for name, form in (("x.npz", None), ("pictures", "png")):
        asking(name, form=form, event=nan, at=7)
        folder = tmp_path / ("pictures" if form else "x.npz.parts")
        before = content(folder)
        capsys.readouterr()
        for differs, words in others.items():
            assert asking(name, *words, form=form) == (2, 0)
            told = capsys.readouterr().err
            assert f"{folder} holds images drawn with {differs}: delete it" in told and len(told.splitlines()) == 1
            assert content(folder) == before
        assert asking(name, form=form) == (0, 3)


def test_a_request_goes_on_faster_but_not_on_another_kind_of_device(asking, tmp_path, capsys):
    "There the noise of a seed is another. A layout in memory is not a matter of the request, nor is the progress bar."
    asking("x.npz", event=nan, at=7)
    record = tmp_path / "x.npz.parts" / "request.json"
    told, here = record.read_text(), processes.this_process().device.type
    assert json.loads(told)["device"] == here and not {"compile", "channels_last"} & json.loads(told).keys()
    record.write_text(told.replace(f'"device": "{here}"', '"device": "abacus"'))
    capsys.readouterr()
    assert asking("x.npz") == (2, 0)
    assert f"holds images drawn with device abacus and not {here}: delete it" in capsys.readouterr().err
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
    assert "holds images drawn with model " in capsys.readouterr().err
    (tmp_path / "copy" / "model" / "training.json").write_text("{}")
    assert asking("x.npz", run=tmp_path / "copy") == (0, 3), "the same model in another place is the same"


@pytest.mark.parametrize("record", ["", "[]", "3", '{"n": "ten"}'])
def test_a_record_that_is_none_is_refused(record, asking, tmp_path, capsys):
    asking("x.npz", event=nan, at=7)
    (tmp_path / "x.npz.parts" / "request.json").write_text(record)
    assert asking("x.npz") == (2, 0)
    assert "x.npz.parts holds images drawn with" in capsys.readouterr().err


def test_a_folder_of_other_pictures_is_left_alone(asking, tmp_path, capsys):
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "00000.png").write_bytes(b"the sea")
    assert asking("holiday", form="png") == (2, 0)
    assert "of unknown origin" in capsys.readouterr().err
    assert content(folder) == [("00000.png", b"the sea")]


def test_a_larger_n_goes_on(asking, tmp_path):
    assert asking("more", form="png") == (0, 9)
    assert asking("more", "-n", "13", form="png") == (0, 6), "the third batch was not full"
    assert asking("once", "-n", "13", form="png") == (0, 12)
    assert content(tmp_path / "more") == content(tmp_path / "once")
    asking("x.npz", event=nan, at=7)
    assert asking("x.npz", "-n", "13") == (0, 6)
    few = files.CachedSamples(tmp_path / "parts", dict(n=10, batch_size=4))
    few.keep(2, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert few.missing() == [0, 1] and files.CachedSamples(few.folder, dict(n=11, batch_size=4)).missing() == [0, 1, 2]
    images = [np.asarray(Image.open(tmp_path / "once" / f"{k:05d}.png")) for k in range(13)]
    assert torch.equal(load_images(tmp_path / "x.npz").pixels[:, 0], torch.from_numpy(np.stack(images)))


def test_pictures_in_colour_are_the_images(tmp_path):
    pixels = torch.randint(256, (3, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = files.CachedPictures(tmp_path / "new", dict(n=3, batch_size=3))
    pictures.keep(0, pixels)
    for k in range(3):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / f"{k:05d}.png")), pixels[k].permute(1, 2, 0))


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


def test_joining_needs_the_memory_of_few_parts(tmp_path):
    parts = files.CachedSamples(tmp_path / "parts", dict(n=20, batch_size=1))
    for i in range(20):
        parts.keep(i, torch.full((1, 1, 1000, 1000), i, dtype=torch.uint8))
    tracemalloc.start()
    files.save_npz(tmp_path / "x.npz", parts)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5e6, "of 20 million bytes"
    assert torch.equal(load_images(tmp_path / "x.npz").pixels[:, 0, 999, 0], torch.arange(20, dtype=torch.uint8))


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
    device = processes.this_process().device
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator(device).manual_seed(0), device=device).cpu()
    save_grid(tmp_path / "noise.png", images.to_pixels(noise))
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
    assert sampler.image_shape(m) == (3, 4, 6)
    told = json.loads((model_folder(tmp_path / "run") / "training.json").read_text())
    assert told["config"]["lr"] == 1e-5 and told["config"]["batch_size"] == 4 and told["step"] == 2
    drawn = str(tmp_path / "s.npz")
    assert cli.main(["sample", str(tmp_path / "run"), "-n", "2", "--steps", "2", "--out", drawn, *QUIET]) == 0
    assert load_images(tmp_path / "s.npz").pixels.shape == (2, 3, 4, 6)


SHORT = ["--layers", "1", "--batch-size", "4", "--T", "20", "--beta-T", "0.3", "--track", "none", *QUIET]


def final(run):
    return torch.cat([p.flatten() for p in DDPM.from_pretrained(model_folder(run)).net.parameters()])


def test_resume_takes_its_settings_from_the_run_and_pictures_go_with_the_checkpoints(tmp_path, capsys):
    assert cli.main(["train", "--steps", "4", "--out", str(tmp_path / "a"), "--seed", "3", *SHORT]) == 0
    assert cli.main(["train", "--steps", "2", "--out", str(tmp_path / "b"), "--seed", "3", *SHORT]) == 0
    assert cli.main(["train", "--resume", f"--out={tmp_path / 'b'}", "--steps", "4"]) == 0
    assert "goes on with" not in capsys.readouterr().err
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))
    names = [p.name for p in sorted((tmp_path / "b" / "samples").iterdir())]
    assert names == ["step-00000002.png", "step-00000004.png"]
    words = ["train", "--resume", "--out", str(tmp_path / "b")]
    assert "layers_per_block must be 1" in refused_last(capsys, *words, "--layers", "2")
    assert "holds a run of 4 steps" in refused_last(capsys, "train", "--out", str(tmp_path / "b"), *SHORT)
    (tmp_path / "b" / "train.json").write_text("{")
    assert "train.json cannot be read" in refused_last(capsys, *words)


def refused_last(capsys, *words):
    capsys.readouterr()
    return refused(capsys, *words)


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
    assert f"ddpm_lit: stopped by SIGTERM after step {step}: all is saved, go on with --resume --out" in last
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", str(step + 1)]) == 0


# Evaluating. A model of five steps, ten images in batches of 4: bits/dim take 15 calls of the network, samples 6.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A run folder with a network of five steps, trained for one."
    run = tmp_path_factory.mktemp("tiny") / "run"
    words = ["--steps", "1", "--T", "5", "--beta-T", "0.5", "--layers", "1", "--track", "none", "--out", str(run)]
    assert cli.main(["train", *words, *QUIET]) == 0
    return run


@pytest.fixture
def measuring(tiny, tmp_path, counting):
    "A function that runs `ddpm_lit evaluate`; it returns the exit code and how often the network was called."

    def measure(name, *words, run=tiny, n=10, **event):
        few = ["-n", n, "--batch-size", 4, "--steps", 2]
        return counting("evaluate", run, *few, "--out", tmp_path / f"{name}.json", *QUIET, *words, **event)

    return measure


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
    assert [samples["precision"], samples["recall"]] == pytest.approx(precision_recall(*both))
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


def test_an_evaluation_finds_the_numbers_of_the_demonstration(demo, tmp_path, counting):
    told = ["-n", 12, "--sampler", "ancestral", "--steps", 4, "--bpd-calls", 50, *QUIET]
    assert counting("evaluate", demo, *told, "--out", tmp_path / "e.json") == (0, 54)
    found, metrics = numbers(tmp_path / "e"), json.loads((demo / "metrics.json").read_text())
    assert found["bits_per_dim"].keys() == metrics["bits_per_dim"].keys()
    assert found["bits_per_dim"]["total"] == pytest.approx(metrics["bits_per_dim"]["total"], rel=1e-5)
    same = found["samples"].keys() & metrics.keys() - {"steps"}
    assert len(same) == 12
    for name in same:
        assert found["samples"][name] == metrics[name] or found["samples"][name] == pytest.approx(metrics[name], 1e-5)


def test_an_interrupted_evaluation_goes_on_and_finds_the_same(measuring, tmp_path, capsys):
    interrupt = dict(event=fail_with(KeyboardInterrupt))
    assert measuring("undisturbed") == (0, 21)
    assert measuring("x", **interrupt, at=7) == (130, 7)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("ddpm_lit: interrupted; the bits/dim of 4 of 10 images are kept in ")
    assert not (tmp_path / "x.json").exists()
    assert measuring("x", **interrupt, at=13) == (130, 13)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("ddpm_lit: interrupted; 4 of 10 images are kept in ")
    assert numbers(tmp_path / "x").keys() == {"model", "bits_per_dim"}, "a number that is found is written"
    assert measuring("x") == (0, 4)
    assert numbers(tmp_path / "x") == numbers(tmp_path / "undisturbed")
    assert content(tmp_path / "x") == content(tmp_path / "undisturbed"), "and nothing else is left"
    assert measuring("x") == (0, 21), "what is finished is measured anew when it is asked for"


def test_sums_cut_short_and_sums_not_finite_are_computed_again(measuring, tmp_path, capsys):
    assert measuring("whole", "--bpd") == (0, 15)
    assert measuring("x", "--bpd", event=nan, at=7) == (1, 15)
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the bound is not finite" in told and "the bits/dim of 6 of 10 images are kept" in told
    part = tmp_path / "x" / "bits.parts" / "00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert measuring("x", "--bpd") == (0, 10)
    assert numbers(tmp_path / "x") == numbers(tmp_path / "whole")


def test_what_another_request_has_left_does_not_stand_in_the_way(measuring, tmp_path, capsys):
    interrupt = dict(event=fail_with(KeyboardInterrupt))
    assert measuring("one", "--seed", 1) == (0, 21)
    for calls in (7, 19):  # in the bits/dim, in the samples
        assert measuring("x", **interrupt, at=calls) == (130, calls)
        assert measuring("x", "--seed", 1) == (0, 21)
        assert numbers(tmp_path / "x") == numbers(tmp_path / "one")
    (tmp_path / "x" / "samples.parts").mkdir()
    (tmp_path / "x" / "samples.parts" / "00000.npy").write_bytes(b"of unknown origin")
    assert measuring("x", "--seed", 1, "--fd") == (0, 6)
    assert numbers(tmp_path / "x") == numbers(tmp_path / "one")


def test_a_larger_n_goes_on_in_both(measuring, tmp_path):
    interrupt = dict(event=fail_with(KeyboardInterrupt))
    assert measuring("x", **interrupt, at=11) == (130, 11)
    assert measuring("x", n=12) == (0, 5 + 6), "two batches of 4 are there"
    assert measuring("y", **interrupt, at=18) == (130, 18)
    assert measuring("y", n=12) == (0, 5 + 4), "and one of 2, which is too small now"
    assert measuring("once", n=12) == (0, 21)
    assert numbers(tmp_path / "x") == numbers(tmp_path / "y") == numbers(tmp_path / "once")


def test_sums_of_other_data_are_not_mixed_in(measuring, tmp_path):
    pixels = torch.randint(256, (30, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    words = ["--bpd", "--data", tmp_path / "a.npz"]
    np.savez(tmp_path / "a.npz", images=pixels)
    assert measuring("x", *words, event=fail_with(KeyboardInterrupt()), at=7)[0] == 130
    np.savez(tmp_path / "a.npz", images=255 - pixels)
    assert measuring("x", *words) == (0, 15)
    assert measuring("fresh", *words) == (0, 15)
    assert numbers(tmp_path / "x") == numbers(tmp_path / "fresh")


def test_one_measurement_keeps_the_other_of_the_same_model(tiny, measuring, tmp_path):
    assert measuring("x", "--bpd") == (0, 15)
    bits = numbers(tmp_path / "x")
    assert bits.keys() == {"model", "bits_per_dim"}
    assert measuring("x", "--fd") == (0, 6)
    both = numbers(tmp_path / "x")
    assert both["bits_per_dim"] == bits["bits_per_dim"] and "samples" in both
    assert measuring("both", "--bpd", "--fd") == (0, 21)
    assert numbers(tmp_path / "both") == both
    m = DDPM.from_pretrained(model_folder(tiny))
    m.clip = False
    m.save_pretrained(tmp_path / "other")
    assert measuring("x", "--bpd", run=tmp_path / "other") == (0, 15)
    assert numbers(tmp_path / "x").keys() == {"model", "bits_per_dim"}
    for broken in ("{", "[]"):
        (tmp_path / "x.json").write_text(broken)
        assert measuring("x", "--bpd") == (0, 15)
        assert numbers(tmp_path / "x") == bits


def test_samples_drawn_faster_are_measured_as_such(measuring, tmp_path):
    assert measuring("plain", "--fd") == measuring("fast", "--fd", "--precision", "bf16", "--channels-last") == (0, 6)
    plain, fast = (numbers(tmp_path / name)["samples"] for name in ("plain", "fast"))
    assert (plain["mixed_precision"], fast["mixed_precision"]) == ("no", "bf16")
    assert fast["frechet_distance"] == pytest.approx(plain["frechet_distance"], rel=0.1)


def test_a_model_without_a_run_is_measured_in_its_own_folder(tiny, tmp_path, counting):
    folder = tmp_path / "model"
    DDPM.from_pretrained(model_folder(tiny)).save_pretrained(folder)
    words = ["evaluate", folder, "-n", 4, "--steps", 2, *QUIET]
    assert counting(*words, "--bpd") == (0, 5) and counting(*words, "--fd") == (0, 2)
    assert numbers(folder / "evaluation").keys() == {"model", "bits_per_dim", "samples"}, "it has not become another"


def test_few_calls_estimate_the_bound(measuring, tmp_path):
    assert measuring("all", "--bpd", n=200) == (0, 250)
    assert measuring("some", "--bpd", "--bpd-calls", 3, n=200) == (0, 150)
    exact, estimate = (numbers(tmp_path / name)["bits_per_dim"] for name in ("all", "some"))
    assert estimate["calls"] == 3
    assert abs(estimate["total"] - exact["total"]) < 4 * (estimate["standard_error"] + exact["standard_error"])
    assert np.asarray(Image.open(tmp_path / "some" / "bits.png")).shape[:2] == (340, 500)


def test_statistics_of_the_real_images_are_kept_and_used(measuring, tmp_path, capsys):
    reference = tmp_path / "new" / "real.npz"
    assert measuring("first", "--fd", "--reference", reference) == (0, 6)
    written = reference.read_bytes()
    assert measuring("second", "--fd", "--reference", reference) == (0, 6)
    first, second = (numbers(tmp_path / name)["samples"] for name in ("first", "second"))
    assert second["frechet_distance"] == pytest.approx(first["frechet_distance"], rel=1e-9)
    assert second["frechet_distance_noise"] == pytest.approx(first["frechet_distance_noise"], rel=1e-9)
    assert set(first) - set(second) == {"precision", "recall", "precision_recall_n", "frechet_distance_real"}
    assert second["data"] == str(reference) and reference.read_bytes() == written

    digits, other = load_images("digits"), tmp_path / "other.npz"
    np.savez(other, images=digits.pixels[:1500, 0].numpy(), labels=digits.labels[:1500].numpy())
    named, short, text = (tmp_path / f"{name}.npz" for name in ("inception", "short", "text"))
    FeatureStatistics(torch.zeros(32).double(), torch.eye(32).double(), 100, "inception-2015-12-05").save(named)
    FeatureStatistics(torch.zeros(5).double(), torch.eye(5).double()).save(short)
    text.write_text("no statistics")
    for path, said, words in (
        (reference, "reference must hold statistics of 'classifier", ["--data", other]),  # other images, other features
        (named, f"{named} holds some of 'inception-2015-12-05'", []),
        (short, f"must hold statistics of 32 features, {short} holds some of 5", []),
        (text, f"{text} holds no statistics", []),
        (other, f"{other} holds no statistics", []),
    ):
        capsys.readouterr()
        assert measuring("third", "--fd", "--reference", path, *words) == (2, 0)
        told = capsys.readouterr().err
        assert said in told and len(told.splitlines()) == 1, told


class TwoPixels:
    "Features, as the network of published FIDs has them, without a network."

    name = "two pixels"

    def __init__(self, path, device):
        self.path = path

    def __call__(self, pixels):
        return pixels.flatten(1)[:, :2].double()

    def probabilities(self, features):
        return torch.nn.functional.one_hot(features[:, 0].long() % 4, 4).double()


@pytest.fixture
def pictures(tmp_path):
    "A folder of twelve grey pictures, of two classes, one after the other."
    for k, image in enumerate(load_images("digits").pixels[:12, 0].numpy()):
        (tmp_path / "pictures" / "ab"[k // 6]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pictures" / "ab"[k // 6] / f"{k}.png")
    return tmp_path / "pictures"


def test_features_of_a_network_need_no_labels_no_memory_and_with_statistics_no_images(
    measuring, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "InceptionFeatures", TwoPixels)
    monkeypatch.setattr(cli, "MOST", 5)
    monkeypatch.setattr(cli, "load_images", lambda *args, **told: load_images(*args, **told | dict(memory=0)))
    words = ["--features", "inception", "--reference", tmp_path / "real.npz", "--data"]
    assert measuring("stored", *words, pictures) == (0, 21)
    found = numbers(tmp_path / "stored")
    assert found["samples"]["precision_recall_n"] == [5, 4], "every second of 10, every third of 12"
    assert found["samples"]["features"] == "two pixels" and found["samples"]["data"].startswith("StoredImages(")
    assert found["bits_per_dim"]["n"] == 10
    assert measuring("again", "--fd", *words, "/nowhere") == (0, 6)
    again = numbers(tmp_path / "again")["samples"]
    assert again["frechet_distance"] == pytest.approx(found["samples"]["frechet_distance"], rel=1e-9)
    capsys.readouterr()
    assert measuring("x", "--data", pictures) == (2, 0)
    assert "data must fit into memory for the classifier" in capsys.readouterr().err
    assert measuring("x", "--bpd", "--data", pictures, n=100) == (0, 15)
    assert numbers(tmp_path / "x")["bits_per_dim"]["n"] == 12, "all, where they are less"


def test_images_are_taken_from_all_over_a_data_set(pictures):
    images = load_images(pictures, memory=0)
    which = torch.tensor([7, 0])
    assert torch.equal(loading.select_images(images, which).read([0, 1]), images.read([7, 0]))
    inside = load_images(pictures)
    assert torch.equal(loading.select_images(inside, which).pixels, inside.pixels[which])
    assert loading.select_images(inside, which).labels.tolist() == [1, 0]
    assert (
        loading.data_digest(images)
        == loading.data_digest(load_images(pictures, memory=0))
        != loading.data_digest(inside)
    )


def test_a_learned_variance_is_trained_drawn_and_measured(tmp_path, counting):
    run = tmp_path / "run"
    words = ["--objective", "bound", "--variance", "learned", "--steps", 3, "--batch-size", 4, "--T", 5]
    words += ["--beta-T", 0.5, "--layers", 1, "--track", "none", "--out", run, *QUIET]
    assert counting("train", *words)[0] == 0
    m = DDPM.from_pretrained(model_folder(run))
    assert m.variance == "learned" and m.net.config["out_channels"] == 2 and sampler.image_shape(m) == (1, 8, 8)
    assert counting("sample", run, "-n", 2, "--sampler", "ancestral", "--out", tmp_path / "a.npz", *QUIET) == (0, 5)
    assert load_images(tmp_path / "a.npz").pixels.shape == (2, 1, 8, 8)
    assert counting("evaluate", run, "-n", 4, "--steps", 2, *QUIET) == (0, 7)
    assert numbers(run / "evaluation")["bits_per_dim"]["total"] > 0


def test_two_processes_share_a_request_and_an_evaluation(tiny, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ddpm_lit"]
    words = ["sample", str(tiny), "-n", "7", "--batch-size", "2", "--steps", "3", *QUIET, "--out"]
    measure = ["evaluate", str(tiny), "-n", "50", "--batch-size", "18", "--steps", "3", *QUIET]
    measure += ["--reference", str(tmp_path / "real.npz"), "--out"]
    for name, command in (("two.npz", words), ("two.json", measure)):
        done = subprocess.run([*torchrun, *command, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("in " + str(tmp_path)) == 1 + ("json" in name), done.stderr
    (tmp_path / "real.npz").unlink()
    assert cli.main([*words, str(tmp_path / "one.npz")]) == cli.main([*measure, str(tmp_path / "one.json")]) == 0
    assert torch.equal(load_images(tmp_path / "two.npz").pixels, load_images(tmp_path / "one.npz").pixels)
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    for part in ("bits_per_dim", "samples"):
        assert one[part].keys() == two[part].keys()
        for name in one[part]:
            words = name in ("features", "sampler", "mixed_precision", "data")
            assert two[part][name] == (one[part][name] if words else pytest.approx(one[part][name], rel=1e-5)), name
    assert dict(content(tmp_path / "two"))["samples.png"] == dict(content(tmp_path / "one"))["samples.png"]


@pytest.mark.parametrize(
    "words,said",
    [
        (["-n", "3"], "n must be at least 4, got 3"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--bpd-calls", "1"], "bpd_calls must be from 2 to T = 5, got 1"),
        (["--bpd-calls", "6"], "bpd_calls must be from 2 to T = 5, got 6"),
        (["--steps", "6"], "steps must be a whole number from 1 to T = 5"),
        (["--seed", "-1"], "seed must"),
        (["--data", "mnist5k"], "data must be images like the model's, (1, 8, 8), got Images(mnist5k: 5000 of 28×28"),
        (["--data", "FEW"], "data must be at least 1,000 images for the classifier, got Images(few: 300 of 8×8"),
        (["--data", "NO_LABELS"], "data must have labels for the classifier, got Images(no_labels: 1200 of 8×8"),
        (["--data", "THREE", "--bpd"], "data must be at least 4 images, got Images(three: 3 of 8×8"),
        (["--data", "RGB"], "data must be images like the model's, (1, 8, 8), got Images(rgb: 4 of 8×8, RGB"),
        (["--data", "digitz"], "did you mean 'digits'"),
        (["--features", "inception", "--inception-file", "FEW"], "few.npz must be the file of https://"),
        (["--features", "inception", "--inception-file", "none.pt"], "none.pt does not exist"),
        (["--inception-file", "FEW"], "inception_file must come with --features inception"),
        (["--reference", "stats.txt"], "reference must be a file that ends in .npz, got 'stats.txt'"),
        (["--reference", "FEW"], "few.npz holds no statistics"),
        (["--reference", "/dev/null/x/r.npz"], "must be a folder"),
        (["--out", "table.txt"], "out must be a file that ends in .json, got 'table.txt'"),
        (["--out", "/dev/null/x/e.json"], "must be a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_network_is_asked(
    words, said, tiny, capsys, tmp_path, tmp_path_factory, monkeypatch, counting
):
    digits, data = load_images("digits"), tmp_path_factory.mktemp("data")
    pixels, labels = digits.pixels[:, 0].numpy(), digits.labels.numpy()
    np.savez(data / "few.npz", images=pixels[:300], labels=labels[:300])
    np.savez(data / "no_labels.npz", images=pixels[:1200])
    np.savez(data / "three.npz", images=pixels[:3])
    np.savez(data / "rgb.npz", images=np.stack([pixels[:4]] * 3, -1))
    monkeypatch.chdir(tmp_path)
    words = [str(data / f"{word.lower()}.npz") if word.isupper() else word for word in words]
    before = sorted(tiny.rglob("*"))
    assert counting("evaluate", tiny, *words, *QUIET) == (2, 0)
    told = capsys.readouterr()
    assert said in told.err and len(told.err.splitlines()) == 1 and told.out == ""
    assert list(tmp_path.iterdir()) == [] and sorted(tiny.rglob("*")) == before, "it leaves nothing behind"


@pytest.mark.parametrize(
    "words,said",
    [
        (["train", "--data", "digitz"], "did you mean 'digits'"),
        (["train", "--T", "1"], "T must be at least 2"),
        (["train", "--preset", "celebahq256"], "data must be named for the preset celebahq256"),
        (["train", "--accumulate", "0"], "accumulate must be at least 1"),
        (["train", "--beta-1", "0"], "beta_1 must lie in (0, 1)"),
        (["train", "--beta-T", "1"], "beta_T must lie in (0, 1)"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--ema", "1"], "ema must lie in [0, 1)"),
        (["train", "--out", "/dev/null/run"], "out must be a folder"),
        (["demo", "--out", "/dev/null/run"], "out must be a folder"),
        (["train", "--variance", "learned"], "objective must be 'bound' for a learned variance"),
        (["demo", "--samples", "3"], "samples must be at least 4"),
        (["demo", "--steps", "0"], "steps must be at least 1"),
        (["demo", "--sampling-steps", "1001"], "sampling_steps must"),
        (["demo", "--seed", "-1"], "seed must not be negative"),
        (["sample", "/nowhere"], "does not exist"),
        (["evaluate", "/nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: pytest.fail("training began"))
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
        (["sample", "--sampler", "ancestral", "--eta", "0.5"], "eta is for ddim"),
        (["sample", "--eta", "nan"], "eta must lie in [0, 1]"),
        (["sample", "--batch-size", "0"], "batch_size must be at least 1"),
        (["sample", "-n", "4097"], "--format npz or png"),
        (["sample", "-n", "4097", "--out", "grid.png"], "n must be at most 4096"),
        (["sample", "--out", "grid.bmp"], "must be a file that ends in .png or .npz"),
        (["sample", "--out", "film.gif"], "must be a file that ends in .png or .npz"),
        (["sample", "--format", "npz", "--out", "grid.png"], "must be a file that ends in .npz, got 'grid.png'"),
        (["sample", "--format", "grid", "--out", "all.npz"], "must be a file that ends in .png, got 'all.npz'"),
        (["sample", "--format", "png", "--out", "grid.png"], "out must be a folder"),
        (["sample", "--format", "png", "--out", "/dev/null/x"], "out must be a folder"),
        (["sample", "--every", "2", "--format", "png", "--out", "x"], "cannot go with png"),
        (["sample", "--every", "2", "--out", "x.npz"], "cannot go with npz"),
        (["sample", "--every", "2", "--out", "x.jpg"], "must be a file that ends in .gif or .png"),
        (["sample", "--every", "2", "-n", "65"], "n must be at most 64 for a film"),
        (["sample", "--every", "0"], "every must be from 1 to the number of steps, 50"),
        (["sample", "--every", "6", "--steps", "5"], "every must be from 1 to the number of steps, 5"),
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

    monkeypatch.setattr(trainer.Trainer, "fit", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path / "d"), *QUIET]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "ddpm_lit: interrupted"


def test_a_run_that_breaks_ends_with_one_line_and_1(capsys, monkeypatch, tmp_path):
    def burst(self):
        raise FloatingPointError("the loss is nan in step 3: try an lr below 1")

    monkeypatch.setattr(trainer.Trainer, "fit", burst)
    assert cli.main(["demo", "--out", str(tmp_path / "d"), *QUIET]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ddpm_lit: the loss is nan in step 3: try an lr below 1"


def test_python_m_shows_progress_with_the_loss(tmp_path):
    words = ["demo", "--steps", "3", "--samples", "4", "--sampling-steps", "2", "--out", str(tmp_path / "d")]
    done = subprocess.run([sys.executable, "-m", "ddpm_lit", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stderr for word in ("loss=", "img/s", "sampling", "bits/dim"))
    assert "Try next" in done.stdout
