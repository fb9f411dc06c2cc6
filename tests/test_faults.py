"""What users do to the command line, by kinds: paths, numbers, streams, labels, pictures, machines; and a fuzz of it.

Each kind has the case that was reported, and others like it. Every command ends with an exit code that says whose turn
it is, and with at most one line about an error, in the words that the user typed.
"""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints
from unittest import mock

import numpy as np
import pytest
import torch
from doubles import TINY, rng, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_lit import cli, drawing, evaluation, metrics, options, sampler, trainer
from ddpm_lit.bound import vlb_terms
from ddpm_lit.ddpm import DDPM
from ddpm_lit.evaluation import evaluate_bpd
from ddpm_lit.forward import linear_schedule
from ddpm_lit.images import Images, to_network
from ddpm_lit.loading import load_images
from ddpm_lit.metrics import ClassifierFeatures, evaluate_samples, feature_statistics, inception_score, label_obstacle
from ddpm_lit.processes import Stopped, spawn_generators
from ddpm_lit.unet import UNet

QUIET = ["--no-progress"]
LITTLE = ["--steps", "1", "--batch-size", "4", "--T", "5", "--layers", "1", "--track", "none", *QUIET]
NOT_UTF8 = "K\udcf6nig"  # as Python decodes a name in Latin-1
ODD_NAMES = [NOT_UTF8, "Кёниг", "two\nlines \x1b[31mred", "a b's"]


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: torch.zeros(1))


def refused(capsys, *words, code=2):
    "Return the one line that `words` get, with this exit code."
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ddpm_lit: "), (out, err)
    return err.removeprefix("ddpm_lit: ").strip()


# ------------------------------------------------------------------------------------------------------------ streams


@contextlib.contextmanager
def encoded(encoding):
    "Let stdout and stderr be files in an encoding, strict as Python makes them; yield what was written."
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with mock.patch.multiple(sys, stdout=streams[0], stderr=streams[1]):
        yield lambda: [stream.flush() or stream.buffer.getvalue().decode(encoding) for stream in streams]


@pytest.mark.parametrize("name,encoding", list(zip(ODD_NAMES, ["utf-8", "ascii", "cp1251", "ascii"], strict=True)))
def test_a_name_that_a_stream_cannot_encode_costs_nothing(encoding, name, run, tmp_path):
    with encoded(encoding) as written:
        words = ["sample", str(run), "-n", "2", "--steps", "1", *QUIET, "--out"]
        assert cli.main([*words, str(tmp_path / name / "x.npz")]) == 0
        assert cli.main([*words, str(tmp_path / name / "x.tiff")]) == 2
    out, err = written()
    assert (tmp_path / name / "x.npz").is_file() and out.startswith("2 images are in ")
    assert out.count("\n") == err.count("\n") == 1 and "must be a file that ends in" in err


@pytest.mark.parametrize("words,encoding", [(["evaluate", "--help"], "cp1251"), (["train", "--help"], "ascii")])
def test_help_is_written_in_any_encoding(encoding, words):
    with encoded(encoding) as written, pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0 and "usage: ddpm_lit" in written()[0]


def test_the_streams_are_the_same_afterwards(capsys):
    before = sys.stdout, sys.stderr
    assert cli.main(["--version"]) == 0 and (sys.stdout, sys.stderr) == before
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert (sys.stdout, sys.stderr) == before
    with mock.patch.multiple(sys, stdout=None, stderr=None):  # as under pythonw, or behind >&-
        assert cli.main(["--version"]) == 0 and cli.main(["sample", "/dev/null/x"]) == 2


def test_a_reader_who_has_left_is_no_error_and_a_full_disk_is_one(capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, mock.patch.object(sys, "stdout", pipe):
        assert cli.main(["--version"]) == 0
    with open(os.open(os.devnull, os.O_WRONLY), "w") as pipe, mock.patch.object(sys, "stderr", pipe):
        assert cli.main(["sample", "/dev/null/x"]) == 2
    if Path("/dev/full").exists():
        capsys.readouterr()
        with open("/dev/full", "w") as full, mock.patch.object(sys, "stdout", full):
            assert cli.main(["--version"]) == 1
        assert capsys.readouterr().err == "ddpm_lit: No space left on device\n"


# -------------------------------------------------------------------------------------------------------- exit codes


def foreign(name, module, kind=RuntimeError):
    return type(name, (kind,), dict(__module__=module))


ERRORS = [
    (
        foreign("InductorError", "torch._inductor.exc")("InvalidCxxCompiler: none\n\nSet TORCHDYNAMO_VERBOSE=1"),
        2,
        "--comp",
    ),
    (foreign("BackendCompilerFailed", "torch._dynamo.exc")("no triton"), 2, "--compile must be left out"),
    (ImportError("track='wandb' needs wandb: pip install wandb"), 2, "--track='wandb' needs"),
    (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "Permission denied: /root/x"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "File name too long: xxx"),
    (OverflowError("int too large to convert to C long"), 2, "int too large"),
    (RuntimeError("Overflow when unpacking long"), 2, "Overflow"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 1, "there is not enough memory: CUDA"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "there is not enough memory: Def"),
    (MemoryError(), 1, "a smaller --batch-size or -n takes less"),
    (KeyError("in_channels"), 1, "KeyError: 'in_channels' (DDPM_LIT_TRACEBACK=1 shows where)"),
    (TypeError("unhashable\ntype"), 1, "TypeError: unhashable (DDPM"),
    (AssertionError(), 1, "AssertionError: "),
    (FloatingPointError("the loss is nan"), 1, "the loss is nan"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (Stopped(15, 3, "out"), 143, "stopped by SIGTERM after step 3"),
]


@pytest.mark.parametrize("error,code,text", ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_ends_in_one_line_and_a_code(error, code, text, monkeypatch, capsys, tmp_path):
    def fail(self):
        raise error

    monkeypatch.setattr(options.Train, "work", fail)
    line = refused(capsys, "train", "--out", tmp_path / "x", code=code)
    assert line.startswith(text) or text in line


def test_a_traceback_is_there_for_developers(monkeypatch, capsys):
    monkeypatch.setenv("DDPM_LIT_TRACEBACK", "1")
    assert cli.main(["sample", "/dev/null/x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("ddpm_lit: run must be")
    assert "DDPM_LIT_TRACEBACK" not in lines[-1]


@pytest.mark.parametrize(
    "words,line",
    [
        (["sample", "RUN", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["sample", "RUN", "-n", "0"], "-n must be at least 1, got 0"),
        (["sample", "RUN", "-n", "99999999999"], "-n must be at most 10000000, got 99999999999"),
        (["sample", "RUN", "--seed", str(2**70)], "--seed must be at most"),
        (["train", "--data", "digitz"], "--data must be digits"),
        (["train", "--beta-1", "0"], "--beta-1 must lie in (0, 1)"),
        (
            ["train", "--data", "digits", "--size", "7"],
            "--size must be a multiple of 2 for the preset digits; the image",
        ),
        (["train", "--size", "0"], "--size must be at least 1, got 0"),
        (["train", "--size", "1000000"], "--size must be at most 16384"),
        (["train", "--layers", "10000"], "--layers must be at most 100"),
        (["train", "--T", str(10**12)], "--T must be at most 1000000"),
        (["evaluate", "RUN", "--bpd-calls", "9"], "--bpd-calls must be from 2 to T = 5"),
        (["evaluate", "RUN", "--inception-file", "x"], "--inception-file must come with --features inception"),
        (["demo", "--sampling-steps", "1"], "--sampling-steps must be from 2"),
    ],
)
def test_messages_are_in_the_words_that_were_typed(words, line, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *[run if word == "RUN" else word for word in words]).startswith(line)


def test_the_version_and_what_the_package_is(capsys):
    import ddpm_lit

    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"ddpm_lit {ddpm_lit.__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Train denoising diffusion models on images" in text and "Example: ddpm_lit train --data photos" in text


# ------------------------------------------------------------------------------------------------------------- paths


def test_a_tilde_is_the_home_folder_in_every_path(run, tmp_path, monkeypatch, no_training, capsys):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    tiny_model(linear_schedule(5, 1e-4, 0.5)).save_pretrained(home / "run")
    np.save(home / "few.npy", np.zeros((8, 8, 8), np.uint8))
    few = ["-n", "4", "--steps", "1", *QUIET]
    assert cli.main(["train", "--data=~/few.npy", "--out=~/t", *LITTLE]) == 0
    assert cli.main(["sample", "~/run", *few, "--out=~/x.npz"]) == 0
    assert cli.main(["evaluate", "~/run", "--data=~/few.npy", "--bpd", "--bpd-calls=2", *few, "--out=~/e.json"]) == 0
    assert {"t", "x.npz", "e.json", "e"} <= {path.name for path in home.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert json.loads((home / "t" / "train.json").read_text())["data"] == str(home / "few.npy")
    expanded = options.expand_paths(cli.Evaluate(Path("~/r"), inception_file=Path("~/i"), reference=Path("~/s")))
    assert [expanded.run_folder, expanded.inception_file, expanded.reference] == [home / "r", home / "i", home / "s"]
    assert options.expand_paths(cli.Demo()).out == Path("demo")
    for words in (["train", "--out=~nobody-is-called-so/t"], ["sample", "~nobody-is-called-so/r"]):
        assert "must be a path" in refused(capsys, *words)


def test_local_data_are_written_with_their_full_path(tmp_path, monkeypatch, no_training, capsys):
    pixels = np.zeros((4, 8, 8), np.uint8)
    monkeypatch.chdir(tmp_path)
    for name in (f"{NOT_UTF8}.npy", "pics.npy", "./pics.npy"):
        np.save(name, pixels)
        assert cli.main(["train", "--data", name, "--out", "run", *LITTLE]) == 0
        assert options.default_train(["train", "--resume", "--out=run"]).data == str(tmp_path / name)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    np.save("pics.npy", 255 - pixels)
    seen = []
    monkeypatch.setattr(options, "load_images_once", lambda data, *_: seen.append(data) or load_images(data))
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), *QUIET]) == 0
    assert seen == [str(tmp_path / "pics.npy")]
    Path("cifar10").mkdir(), Path("mnist").touch(), Path("digits").mkdir()
    assert options.full_path("cifar10") == str(tmp_path / "else" / "cifar10") and options.full_path("mnist") == "mnist"
    assert options.full_path("digits") == "digits" and options.full_path("owner/name:config") == "owner/name:config"


@pytest.mark.parametrize("out", ["runs/photo", NOT_UTF8, "file/run", "empty"])
def test_a_run_that_is_not_there_is_not_resumed_and_makes_no_folder(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch(), Path("empty").mkdir()
    assert refused(capsys, "train", "--resume", "--out", out, *QUIET).startswith("--resume must name a run, but ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


@pytest.mark.parametrize(
    "change", [dict(T="many"), dict(colour="red"), dict(beta_1=None), {"training": {"steps": "x"}}]
)
def test_a_train_json_of_other_kinds_is_named(change, tmp_path, no_training, capsys):
    assert cli.main(["train", "--out", str(tmp_path / "run"), *LITTLE]) == 0
    saved = tmp_path / "run" / "train.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | change))
    assert f"{saved} cannot be read: " in refused(capsys, "train", "--resume", "--out", tmp_path / "run", *QUIET)


def test_what_is_in_the_way_is_found_before_the_work(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "sample_pixels", lambda *_, **__: pytest.fail("sampling began"))
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: pytest.fail("training began"))
    for name in ("e", "x.npz.parts", "demo/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d" / "metrics.json").mkdir(parents=True), (tmp_path / "f.json").mkdir()
    few = ["-n", "4", "--steps", "1", *QUIET, "--out"]
    for words in (
        ["evaluate", run, *few, tmp_path / "e.json"],
        ["evaluate", run, *few, tmp_path / "f.json"],
        ["sample", run, *few, tmp_path / "x.npz"],
        ["demo", "--out", tmp_path / "demo"],
        ["demo", "--out", tmp_path / "d"],
        ["sample", run, *few, tmp_path / "e" / "x.png"],
    ):
        assert "must be" in refused(capsys, *words)


def test_a_request_that_is_refused_makes_no_folder(run, tmp_path, capsys):
    for words in (["sample", "/dev/null/x"], ["sample", run, "--steps", "99"], ["sample", run, "--labels", "1"]):
        refused(capsys, *words, "--out", tmp_path / "new" / "x.png")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ models and devices


@pytest.mark.parametrize("change", [dict(sample_size=None), {}])
def test_a_network_without_a_size_is_named(change, tmp_path, capsys):
    config = {name: value for name, value in TINY.items() if name != "sample_size"} | change
    DDPM(UNet(**config), linear_schedule(5)).save_pretrained(tmp_path / "m")
    for words in (["sample", "-n", "4"], ["evaluate", "--bpd", "-n", "8"], ["evaluate", "--fd"]):
        line = refused(capsys, words[0], tmp_path / "m", *words[1:], "--out", tmp_path / "x")
        assert "sample_size is not set" in line or "must be a file that ends" in line
    assert "sample_size is not set" in refused(capsys, "sample", tmp_path / "m", "--out", tmp_path / "x.png")
    assert "sample_size is not set" in refused(capsys, "evaluate", tmp_path / "m", "--out", tmp_path / "x.json")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_bits_are_computed_in_the_precision_of_the_network(dtype, digits):
    m, other = tiny_model(linear_schedule(5, 0.01, 0.5)), tiny_model(linear_schedule(5, 0.01, 0.5)).to(dtype)
    bits = evaluate_bpd(other, digits, 12, generator=rng(1)).total
    if dtype == torch.float64:
        x0 = to_network(digits.pixels[:12], dtype)
        assert bits == pytest.approx(vlb_terms(other, x0, *spawn_generators(rng(1), 1)).total.mean().item())
    else:
        assert bits == pytest.approx(evaluate_bpd(m, digits, 12, generator=rng(1)).total, rel=0.03)
    classes = tiny_model(linear_schedule(5, 0.01, 0.5), num_class_embeds=10).to(dtype)
    assert np.isfinite(evaluate_bpd(classes, digits, 12, calls=3, generator=rng(1)).total)
    assert other.net.conv_in.weight.dtype == dtype, "and the network stays as it is"


def test_bits_are_computed_where_the_network_is(digits, monkeypatch):
    "The schedule may lie elsewhere: here the images must come to `m.device`, which is not asked of the schedule."
    m, seen = tiny_model(linear_schedule(5, 0.01, 0.5)), []
    m.net.register_forward_pre_hook(lambda net, args: seen.append(args[0].device))
    expected = evaluate_bpd(m, digits, 6, calls=3, generator=rng(1))
    terms = list(evaluation.sample_terms(m.s, 3, 2, None, torch.device("meta")))
    assert {x.device.type for t, coefficient, _ in terms for x in (t, coefficient)} == {"meta"}
    m.s = m.s.to("cpu")
    assert evaluate_bpd(m, digits, 6, calls=3, generator=rng(1)).total == expected.total
    classes = tiny_model(num_class_embeds=10)
    torch.set_default_device("meta")  # stands for a GPU: what is drawn on the CPU must say so
    try:
        assert metrics.noise_statistics(lambda x: x.flatten(1)[:, :2].double(), (1, 8, 8), 4, 0, 4).n == 4
        assert evaluation.sample_labels(classes, digits, 4, 0).device.type == "cpu"
    finally:
        torch.set_default_device(None)


# ----------------------------------------------------------------------------------------------- labels and distances


def with_labels(digits, **changed):
    labels = digits.labels.clone()
    for label, indices in changed.items():
        labels[indices] = int(label[1:])
    return Images(digits.pixels, labels, "rare")


RARE = {
    "class 10 has 1": dict(_10=slice(0, 1)),
    "all are of class 3": dict(_3=slice(None)),
    "class 12 has 2": dict(_3=slice(None), _12=slice(5, 7)),
    "there are 600": None,
}


@pytest.mark.parametrize("text", RARE)
def test_labels_are_looked_at_before_anything_is_fitted(text, digits, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "train_classifier", lambda *_: pytest.fail("a classifier was fitted"))
    images = with_labels(digits, **RARE[text] or {})
    if RARE[text] is None:
        images = Images(digits.pixels, torch.arange(1797) % 600, "rare")
    np.savez(tmp_path / "rare.npz", images=images.pixels[:, 0].numpy(), labels=images.labels.numpy())
    few = ["-n", "16", "--steps", "2", "--out", tmp_path / "x.json", *QUIET]
    line = refused(capsys, "evaluate", run, "--fd", "--data", tmp_path / "rare.npz", *few)
    assert line.startswith("--data must have ") and text in line and "--features inception takes any" in line
    for call in (lambda: ClassifierFeatures(images), lambda: evaluate_samples(digits.pixels[:9], images)):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("counts", [(3, 1794), (4, 996), (2, 900, 98), (4,) * 400])
def test_the_rarest_labels_that_are_taken_can_be_fitted(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = torch.rand(len(labels), 4, generator=rng(0)).double()
    assert label_obstacle(labels, 500) is None
    with mock.patch("sklearn.neural_network.MLPClassifier.max_iter", 2, create=True):
        assert len(metrics.train_classifier(x, labels, (2,), 500, 0)[2]) == 500


@pytest.mark.filterwarnings("ignore")
def test_a_distance_to_itself_is_not_below_zero():
    for seed in range(20, 24):
        s = feature_statistics(torch.randn(20, 64, generator=rng(seed)))
        assert f"{s.distance(s):.2f}" == "0.00"
    score, std = inception_score(torch.full((40, 10), 0.1).double())
    assert score >= 1 and std >= 0
    assert cli.format_table(dict(frechet_distance=-0.0, bits=dict(prior=-0.0))).count("-") == 0


# -------------------------------------------------------------------------------------------- numbers, then pictures


def test_a_picture_that_fails_costs_no_number(run, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(evaluation, "plot_bits", fail), monkeypatch.setattr(evaluation, "save_grid", fail)
    monkeypatch.setattr(cli, "plot_losses", fail), monkeypatch.setattr(cli, "save_grid", fail)
    features = type("Two", (), dict(name="two", __call__=lambda self, x: x.flatten(1)[:, 27:29].double()))()
    monkeypatch.setattr(evaluation, "make_features", lambda *_: features)
    few = ["-n", "4", "--batch-size", "4", "--steps", "1", *QUIET]
    assert cli.main(["evaluate", str(run), *few, "--out", str(tmp_path / "e.json")]) == 0
    assert {"bits_per_dim", "samples"} < json.loads((tmp_path / "e.json").read_text()).keys()
    err = capsys.readouterr().err
    assert err.count("png could not be drawn: no font") == 2
    monkeypatch.setattr(cli, "scorecard", lambda *_: dict(frechet_distance_real=0.0, n=4) | SCORES)
    words = ["demo", "--steps", "1", "--samples", "4", "--sampling-steps", "2", *QUIET]
    assert cli.main([*words, "--out", str(tmp_path / "d")]) == 0
    out, err = capsys.readouterr()
    assert (tmp_path / "d" / "metrics.json").is_file() and err.count("could not be drawn") == 2 and "Try next" in out


SCORES = dict(frechet_distance=1.0, frechet_distance_noise=9.0, precision=0.0, recall=0.0, inception_score=1.0)
SCORES["bits_per_dim"] = dict(total=1.0, standard_error=0.1, n=4)


@pytest.mark.processes
def test_matplotlib_is_imported_whatever_the_environment_names():
    program = "import os; from ddpm_lit.processes import import_matplotlib; import_matplotlib()\n"
    program += "from matplotlib.figure import Figure; Figure().savefig(os.devnull, format='png')\n"
    program += "print(os.environ['MPLBACKEND'])"
    env = os.environ | dict(MPLBACKEND="nope")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout == "nope\n", done.stderr


# ---------------------------------------------------------------------------------------------------- a growing folder


def shown(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("numbers,batch_size", [((4, 8), 256), ((3, 5, 12), 4), ((4, 8, 9), 4), ((1, 2), 1)])
def test_pictures_stay_when_more_are_drawn(numbers, batch_size, run, tmp_path):
    words = ["sample", str(run), "--sampler", "ancestral", "--format", "png", "--out", str(tmp_path / "a"), *QUIET]
    words += ["--batch-size", str(batch_size), "-n"]
    before, times = [], {}
    for n in numbers:
        assert cli.main([*words, str(n)]) == 0
        after = shown(tmp_path / "a")
        assert len(after) == n and all(map(np.array_equal, before, after))
        assert {path: path.stat().st_mtime_ns for path in times} == times, "they are not even written again"
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.png")}
        before = after
    assert len({image.tobytes() for image in after}) == n, "no two images are alike"
    assert cli.main([*words, str(n)]) == 0 and all(map(np.array_equal, before, shown(tmp_path / "a")))


def test_a_batch_that_was_interrupted_is_no_end(run, tmp_path):
    words = ["sample", str(run), "--sampler", "ancestral", "--format", "png", "--batch-size", "4", *QUIET]
    assert cli.main([*words, "--out", str(tmp_path / "once"), "-n", "8"]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "a"), "-n", "6"]) == 0
    (tmp_path / "a" / "00005.png").unlink()
    assert cli.main([*words, "--out", str(tmp_path / "a"), "-n", "8"]) == 0
    assert all(map(np.array_equal, shown(tmp_path / "a"), shown(tmp_path / "once")))


# -------------------------------------------------------------------------------------------------------------- a fuzz

INTEGERS = st.one_of(st.integers(-2, 12), st.integers(-2, 2000), st.integers(), st.sampled_from([2**31, 2**63, 10**25]))
FLOATS = st.one_of(st.floats(0, 1), st.floats(-10, 10), st.floats())
NAMES = ["", "0", "nan", "digits", "1,2", "7,x", "~", ".", "..", "/dev/null", "/dev/null/x", "/proc/x", "~nobody/x"]
NAMES += [
    "run",
    "run/model",
    "empty",
    "half",
    "file",
    "file/x",
    "x" * 300,
    "e.json",
    "s.npz",
    "x.png",
    "x.npz",
    "x.gif",
]
NAMES += ["few.npy", "few.npz", "odd\0name", "new/x.png", "new/e.json", "-n", "--", "--resume", "None", *ODD_NAMES]
TEXTS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.text(st.characters(exclude_characters="/"), max_size=8),
    st.text(st.characters(categories=["Cs", "Cc"]), max_size=4),
)


def values(kind):
    "Return a strategy for the value of an option, as text, by its type; None for a flag."
    kinds = [kind, *get_args(kind), *(inner for part in get_args(kind) for inner in get_args(part))]
    if bool in kinds:
        return None
    if words := [word for word in kinds if isinstance(word, str) and word != "run"]:
        return st.sampled_from(words)
    return (INTEGERS if int in kinds else FLOATS if float in kinds else TEXTS).map(str)


def table_of_options(kind):
    "Return the options of a command, with the strategies for their values."
    hints = get_type_hints(kind, include_extras=True)
    for name, inner in (("training", trainer.TrainConfig), ("sampling", sampler.Sampling)):
        hints |= get_type_hints(inner) if name in hints else {}
    names = hints.keys() - {"training", "sampling", "run_folder"}
    table = {f"--{name.replace('_', '-')}": values(hints[name]) for name in names}
    return table | ({"-n": INTEGERS.map(str)} if "n" in names else {})


TABLES = {name: table_of_options(kind) for name, kind in cli.COMMANDS.items()}


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(sorted(TABLES)))
    args = [name] if name in ("demo", "train") else [name, draw(st.one_of(st.just("run"), st.just("run"), TEXTS))]
    for option in draw(st.lists(st.sampled_from(sorted(TABLES[name])), max_size=4)):
        strategy = TABLES[name][option] if draw(st.integers(0, 9)) else TEXTS
        if strategy is None:
            args.append(draw(st.sampled_from([option, f"--no-{option[2:]}"])))
        else:
            args += [f"{option}={draw(strategy)}"] if draw(st.booleans()) else [option, draw(strategy)]
    return args + draw(st.sampled_from([[], [], [], ["--no-progress"], ["--no-progress"], ["--help"]]))


@pytest.fixture(scope="module")
def playground(tmp_path_factory, run):
    "A folder with a run, half a run, an empty folder, a file and data; what takes long is left out, and home is here."
    folder, patch = tmp_path_factory.mktemp("fuzz"), pytest.MonkeyPatch()
    tiny_model(linear_schedule(5, 1e-4, 0.5)).save_pretrained(folder / "run" / "model")
    (folder / "half" / "model").mkdir(parents=True), (folder / "empty").mkdir(), (folder / "file").touch()
    (folder / "half" / "model" / "model_index.json").write_text("{}")
    np.save(folder / "few.npy", np.zeros((8, 8, 8), np.uint8))
    np.savez(folder / "few.npz", images=np.zeros((8, 8, 8, 3), np.uint8), labels=np.arange(8))
    feature_statistics(torch.rand(9, 3)).save(folder / "s.npz")
    small, real = dict(block_out_channels=(8, 16), norm_num_groups=4), UNet.from_preset
    patch.setattr(
        UNet, "from_preset", lambda name, *args, **kw: real("digits", *args, **kw | small | dict(layers_per_block=1))
    )
    patch.setattr(trainer.Trainer, "fit", lambda self: torch.zeros(min(60, self.config.steps)))
    patch.setattr(drawing.Sample, "write", lambda self, *_: print(self.n))
    patch.setattr(sampler.Sampling, "draw", lambda self, m, n, *_: torch.zeros(n, 1, 8, 8, dtype=torch.uint8))
    (
        patch.setattr(evaluation, "measure_bits", lambda work: None),
        patch.setattr(evaluation, "measure_samples", lambda work: None),
    )
    patch.setattr(cli, "scorecard", lambda *_: dict(frechet_distance_real=0.0, n=4) | SCORES)
    patch.setattr(metrics, "train_classifier", lambda *_: ([(torch.zeros(64, 1), torch.zeros(1))] * 2, None, None, 0))
    patch.setattr("torch.hub.download_url_to_file", mock.Mock(side_effect=OSError("no network")))
    patch.setenv("HOME", str(folder)), patch.chdir(folder), patch.setattr(cli.Demo, "steps", 1)
    yield folder
    patch.undo()


def outcome(args):
    "Return the exit code of a command line, and what it writes on stderr."
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            return cli.main(args), err.getvalue()
        except SystemExit as stop:
            return f"parser {stop.code}", err.getvalue()


EXAMPLES = int(os.environ.get("DDPM_LIT_EXAMPLES", "25"))


@given(command_lines())
@settings(derandomize=EXAMPLES == 25, max_examples=EXAMPLES, deadline=None, database=None)
def test_whatever_is_typed_ends_in_one_line_and_a_code(playground, args):
    code, err = outcome(args)
    assert code in (0, 1, 2, 130, 143, "parser 0", "parser 2"), (args, code)
    assert "Traceback" not in err and "DDPM_LIT_TRACEBACK" not in err, (args, err)
    if not str(code).startswith("parser"):
        lines = err.splitlines()
        assert all(line.startswith("ddpm_lit: ") for line in lines) and (code == 0 or lines), (args, err)
