"""The trainer: same seed same weights, killed or not; valid checkpoints; labels; bad steps; several processes."""

import contextlib
import copy
import errno
import gc
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import OwnNet, rng
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from ddpm_lit.claims import FolderClaim, start_time
from ddpm_lit.ddpm import DDPM
from ddpm_lit.files import Checkpoints, atomic_folder, checksum, find_damage, model_folder, writable_folder
from ddpm_lit.forward import cosine_schedule, linear_schedule
from ddpm_lit.images import Images, to_network
from ddpm_lit.loading import ImageBatches, load_images
from ddpm_lit.objective import bound_loss, simple_loss
from ddpm_lit.processes import Stopped, this_process
from ddpm_lit.trainer import TrainConfig, Trainer, ema_update, save_checkpoint
from ddpm_lit.unet import UNet

TINY = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


def tiny(seed=0, **changes):
    return DDPM(UNet.from_preset("digits", generator=rng(seed), **TINY | changes), linear_schedule())


def config(**changes):
    return TrainConfig(**dict(steps=6, batch_size=8, lr=1e-2, warmup=2, track="none", progress=False) | changes)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def everything(trainer):
    "All that a run ends with, by name: both networks, Adam's averages, losses, generators, counts."
    state = trainer.state_dict()
    return torch.cat([torch.as_tensor(state[name]).double().flatten() for name in sorted(state)])


def test_same_seed_same_weights_bit_for_bit_even_with_dropout_and_flips(digits):
    def trained(seed):
        trainer = Trainer(tiny(dropout=0.3), digits, config(seed=seed, flip=True))
        losses = trainer.fit()
        return weights(trainer.net), weights(trainer.ema.net), losses

    first = trained(1)
    torch.rand(5)  # what others draw in between must not matter
    for a, b, other in zip(first, trained(1), trained(2), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, other)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_is_the_plain_loop(digits, accumulate):
    c = config(clip_grad=0.05, ema=0.5, decay=True, accumulate=accumulate)
    trainer = Trainer(tiny(), digits, c)
    losses = trainer.fit()
    m, generator, mean, history = tiny(), rng(0), None, []
    optimizer, batches = torch.optim.Adam(m.net.parameters()), iter(ImageBatches(digits, 8, seed=0))
    for k in range(6):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (k + 1) / 2) * (1 - k / 6)
        loss = sum(simple_loss(m, next(batches), generator) for _ in range(accumulate)) / accumulate
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in m.net.parameters()]
        norm = sum(g.square().sum() for g in grads).sqrt()
        assert norm > 0.05, "the clipping must have something to do"
        for g in grads:
            g *= 0.05 / (norm + 1e-6)
        optimizer.step()
        d = min(0.5, (1 + k) / (10 + k))
        mean = weights(m.net) if k == 0 else d * mean + (1 - d) * weights(m.net)
        history.append(loss.detach())
    torch.testing.assert_close(losses, torch.stack(history), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights(trainer.ema.net), mean, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(weights(trainer.net), mean, rtol=1e-2, atol=1e-3)
    assert trainer.seen == 6 * 8 * accumulate


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_the_average_is_the_one_made_by_hand(decay):
    net = torch.nn.Linear(3, 2).double()
    average, mean = AveragedModel(net, multi_avg_fn=ema_update(decay)), None
    for n in range(40):
        with torch.no_grad():
            for p in net.parameters():
                p += torch.randn(p.shape, generator=rng(n), dtype=p.dtype)
        average.update_parameters(net)
        d = min(decay, (1 + n) / (10 + n))
        mean = weights(net) if n == 0 else d * mean + (1 - d) * weights(net)
    torch.testing.assert_close(weights(average.module), mean, rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss(digits):
    losses = Trainer(tiny(), digits, config(steps=40, batch_size=16)).fit()
    assert len(losses) == 40 and losses[-10:].mean() < 0.8 * losses[0]


def learning(seed=0):
    "A model whose network has a variance to learn."
    net = UNet.from_preset("digits", generator=rng(seed), **TINY, out_channels=2)
    return DDPM(net, linear_schedule(50, 0.002, 0.2), variance="learned")


def test_the_bound_teaches_the_network_and_the_variance(digits):
    trainer = Trainer(learning(), digits, config(steps=30, batch_size=32, objective="bound"))
    last, gradients = trainer.net.conv_out, []
    trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(last.weight.grad.flatten(1).norm(dim=1)))
    start = last.weight.detach().clone()
    losses = trainer.fit()
    assert trainer.log.skipped == 0 and losses[-10:].mean() < 0.8 * losses[:5].mean()
    assert len(gradients) == 30 and min(g[1] for g in gradients) > 0, "the second channel is that of the variance"
    assert ((last.weight - start).flatten(1).norm(dim=1) > 1e-3).all()


def test_the_objective_is_the_one_that_is_configured(digits):
    for name, function in (("simple", simple_loss), ("bound", bound_loss)):
        losses = Trainer(tiny(), digits, config(steps=1, objective=name)).fit()
        expected = function(tiny(), next(iter(ImageBatches(digits, 8, seed=0))), rng(0))
        torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-5, atol=0)


def test_an_objective_that_does_not_fit_is_refused_before_anything_is_written(digits, tmp_path):
    with pytest.raises(ValueError, match="^objective must not be 'hybrid' for a fixed variance"):
        Trainer(tiny(), digits, config(out=str(tmp_path / "run"), objective="hybrid"))
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_objective_is_logged(digits, tmp_path, caplog):
    Trainer(tiny(), digits, config(out=str(tmp_path))).fit()
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        Trainer(tiny(), digits, config(out=str(tmp_path), steps=9, resume=True, objective="bound"))
    assert "resumed with objective bound; before it was simple" in caplog.text


def test_two_halves_of_a_run_by_the_bound_are_one_run(digits, tmp_path):
    def run(place, **changes):
        trainer = Trainer(learning(), digits, config(out=str(tmp_path / place), objective="bound", **changes))
        trainer.fit()
        return everything(trainer)

    run("halves", steps=3)
    assert torch.equal(run("halves", steps=6, resume=True), run("straight", steps=6))


def test_channels_last_and_bf16_train_the_same_network_nearly(digits):
    plain = Trainer(tiny(), digits, config()).fit()
    torch.testing.assert_close(Trainer(tiny(), digits, config(channels_last=True)).fit(), plain, rtol=1e-3, atol=1e-3)
    coarse = Trainer(tiny(), digits, config(precision="bf16"))
    torch.testing.assert_close(coarse.fit(), plain, rtol=0.1, atol=0.05)
    assert next(coarse.net.parameters()).dtype == torch.float32


def test_the_callers_network_is_trained_in_place_and_the_average_is_another(digits):
    m = tiny(dropout=0.5)
    raw, before = m.net, weights(m.net)
    trainer = Trainer(m, digits, config())
    trainer.fit()
    assert trainer.m is m and trainer.net is m.net is raw and not torch.equal(weights(raw), before)
    assert isinstance(trainer.ema, DDPM) and trainer.ema.net is not raw and not trainer.ema.net.training
    assert not torch.equal(weights(raw), weights(trainer.ema.net))
    kinds = ("predicts", "variance", "clip", "image_shape")
    assert all(getattr(trainer.ema, kind) == getattr(m, kind) for kind in kinds) and trainer.ema.s.T == m.s.T


@pytest.mark.parametrize("fails", [False, True])
def test_the_modes_of_the_callers_network_are_restored_also_after_an_error(digits, fails):
    m = tiny(dropout=0.5).eval()
    m.net.mid_block.train()
    before, inside = [part.training for part in m.modules()], []

    def look(step, loss):
        inside.extend(part.training for part in m.net.modules())
        assert not fails or step < 3

    trainer = Trainer(m, digits, config(), on_step=look)
    if fails:
        with pytest.raises(AssertionError):
            trainer.fit()
    else:
        trainer.fit()
    assert all(inside) and [part.training for part in m.modules()] == before


def test_on_step_gets_every_step_from_1_on_and_its_loss_on_the_device(digits, tmp_path):
    seen = []

    def note(step, loss):
        assert torch.is_tensor(loss) and not loss.requires_grad and loss.device == trainer.device
        seen.append((step, loss.item(), trainer.step, weights(trainer.ema.net).sum().item()))

    trainer = Trainer(tiny(), digits, config(steps=3, out=str(tmp_path)), on_step=note)
    losses = trainer.fit()
    assert [(step, loss) for step, loss, *_ in seen] == list(enumerate(losses.tolist(), start=1))
    assert [done for _, _, done, _ in seen] == [1, 2, 3] and seen[-1][3] == weights(trainer.ema.net).sum().item()
    trainer = Trainer(tiny(), digits, config(steps=5, out=str(tmp_path), resume=True), on_step=note)
    trainer.fit()
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kept_in", ["memory", "file"])
def test_the_state_of_an_interrupted_run_is_taken_over_bit_for_bit(digits, tmp_path, kept_in):
    def build(**kwargs):
        return Trainer(tiny(dropout=0.2), digits, config(steps=8, flip=True, accumulate=2), **kwargs)

    class Interrupted(Exception):
        pass

    def interrupt(step, loss):
        inside.append(first.state_dict()["random.cpu"].clone())
        if step == 5:
            raise Interrupted

    first, second, straight, inside = build(on_step=interrupt), build(), build(), []
    straight.fit()
    with pytest.raises(Interrupted):
        first.fit()
    torch.rand(7)
    state = first.state_dict()
    assert state["step"] == 5 and state["seen"] == 5 * 16 and torch.equal(state["random.cpu"], inside[-1])
    assert not torch.equal(inside[0], inside[-1]), "dropout has drawn in between"
    if kept_in == "file":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    before = copy.deepcopy(state)
    second.load_state_dict(state)
    second.fit()
    assert torch.equal(everything(second), everything(straight))
    changed = [name for name, value in before.items() if torch.is_tensor(value) and not torch.equal(state[name], value)]
    assert not changed, "the state that was given is left alone"
    first.on_step = None
    first.fit()
    assert torch.equal(everything(first), everything(straight)), "the first, too, continues where it was"


def test_a_run_leaves_checkpoints_a_model_and_pictures(digits, tmp_path):
    run = tmp_path / "a" / "run"
    pictures = lambda m: digits.pixels[:4]  # noqa: E731
    trainer = Trainer(tiny(), digits, config(out=str(run), save_every=2, keep_every=4), draw=pictures)
    losses = trainer.fit()
    assert (
        Checkpoints(run).steps() == [4, 6]
        and sorted(p.name for p in (run / "samples").iterdir())[-1] == "step-00000006.png"
    )
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "model", "samples"]
    for folder in (model_folder(run), run / "model"):
        assert torch.equal(weights(DDPM.from_pretrained(folder).net), weights(trainer.ema.net))
    state = load_file(model_folder(run) / "training.safetensors")
    assert torch.equal(state["losses"], losses)
    assert torch.equal(state["net.conv_in.weight"], trainer.net.conv_in.weight)
    facts = json.loads((model_folder(run) / "training.json").read_text())
    assert facts["step"] == 6 and facts["seen"] == 48 and facts["config"]["save_every"] == 2
    assert not any(name.startswith("ema.") for name in state) and state.keys() >= {"norms", "noise", "random.cpu"}


@pytest.mark.parametrize("keep, every, left", [(1, 0, [9]), (2, 0, [8, 9]), (2, 3, [3, 6, 8, 9]), (1, 4, [4, 8, 9])])
def test_the_last_k_and_every_nth_are_kept(tmp_path, keep, every, left):
    checkpoints = Checkpoints(tmp_path, keep, every)
    for step in range(1, 10):
        checkpoints.write(step, lambda folder: (folder / "x").write_text("x"))
    assert checkpoints.steps() == left and not list(checkpoints.folder.glob(".*"))


# -- killed, cut, full


def resumed(digits, run, **changes):
    "Begin the run in a folder, or resume it where it was begun."
    changes |= dict(resume=Checkpoints(run).folder.is_dir())
    trainer = Trainer(tiny(dropout=0.2), digits, config(out=str(run), save_every=2, flip=True, **changes))
    return trainer, trainer.fit()


def straight(digits, tmp_path, steps):
    trainer = Trainer(tiny(dropout=0.2), digits, config(out=str(tmp_path / "straight"), steps=steps, flip=True))
    trainer.fit()
    return everything(trainer)


def test_two_halves_are_one_run_bit_for_bit(digits, tmp_path):
    resumed(digits, tmp_path / "run", steps=4)
    torch.rand(3), np.random.rand(3)
    trainer, losses = resumed(digits, tmp_path / "run", steps=8)
    assert len(losses) == 8 and torch.equal(everything(trainer), straight(digits, tmp_path, 8))


def test_a_finished_run_that_is_resumed_does_nothing(digits, tmp_path):
    first, losses = resumed(digits, tmp_path / "run", steps=4)
    second, again = resumed(digits, tmp_path / "run", steps=4)
    assert torch.equal(again, losses) and torch.equal(everything(second), everything(first))


KILLED = """
import sys, torch
from test_trainer import *
torch.set_num_threads(1)
changes = dict(out=sys.argv[1], steps=40, save_every=2, resume=Checkpoints(sys.argv[1]).folder.is_dir(), flip=True)
trainer = Trainer(tiny(dropout=0.2), load_images("digits"), config(**changes))
print("begins at", trainer.step, flush=True)
trainer.fit()
torch.save(everything(trainer), sys.argv[2])
"""


def started(tmp_path, *launcher, extra=()):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]), OMP_NUM_THREADS="1")
    words = [*launcher, str(tmp_path / "run"), str(tmp_path / "end.pt"), *extra]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_steps(process, run, step):
    while process.poll() is None and max(Checkpoints(run).steps(), default=0) < step:
        time.sleep(0.005)


def test_a_resumed_run_with_channels_last_keeps_adams_averages_in_their_place(digits, tmp_path):
    "Fused Adam goes through memory as it lies: averages laid out otherwise than the weights would meet others."

    def run(place, **changes):
        trainer = Trainer(tiny(), digits, config(out=str(tmp_path / place), channels_last=True, **changes))
        trainer.fit()
        return everything(trainer)

    run("halves", steps=3)
    assert torch.equal(run("halves", steps=6, resume=True), run("straight", steps=6))


@pytest.mark.slow
@pytest.mark.processes
def test_killed_at_random_moments_it_ends_where_the_undisturbed_run_does(digits, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    draw, run = random.Random(0), tmp_path / "run"
    for target in (10,):
        process = started(tmp_path, sys.executable, str(tmp_path / "killed.py"))
        wait_for_steps(process, run, target)
        time.sleep(0.2 * draw.random())
        process.kill()
        out, _ = process.communicate()
        assert "begins at" in out and not (tmp_path / "end.pt").exists()
    process = started(tmp_path, sys.executable, str(tmp_path / "killed.py"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert int(out.split()[2]) >= 10, "it went on"
    undisturbed = Trainer(tiny(dropout=0.2), digits, config(steps=40, flip=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    undisturbed.fit()
    torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "end.pt", weights_only=True), everything(undisturbed))


def test_a_checkpoint_cut_or_changed_anywhere_is_recognised_and_the_one_before_it_used(digits, tmp_path, caplog):
    resumed(digits, tmp_path / "run", steps=4)
    newest, draw = Checkpoints(tmp_path / "run").path(4), random.Random(1)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        for size in {0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(6))}:
            path.write_bytes(content[:size])
            assert find_damage(newest) is not None, (path.name, size)
        path.unlink()
        assert find_damage(newest) is not None
        path.write_bytes(content)
        assert find_damage(newest) is None
        if path.name != "manifest.json":
            i = draw.randrange(len(content))
            path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            assert path.name in find_damage(newest)
            path.write_bytes(content)
    (newest / "training.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        assert model_folder(tmp_path / "run").name == "step-00000002"
    assert "step-00000004 is damaged (training.safetensors has 0 bytes" in caplog.text
    trainer, _ = resumed(digits, tmp_path / "run", steps=6)
    assert torch.equal(everything(trainer), straight(digits, tmp_path, 6))
    assert Checkpoints(tmp_path / "run").newest().name == "step-00000006"


def test_where_all_checkpoints_are_damaged_nothing_is_trained_over_them(digits, tmp_path):
    resumed(digits, tmp_path / "run", steps=4)
    for step in (2, 4):
        (Checkpoints(tmp_path / "run").path(step) / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no .*checkpoint"):
        resumed(digits, tmp_path / "run", steps=6)


class Killed(BaseException):
    "What a kill looks like from inside: no handler may swallow it."


@pytest.mark.parametrize("moment", ["save_file", "flush", "rename"])
def test_a_save_that_breaks_off_leaves_the_checkpoint_before_it(digits, tmp_path, monkeypatch, moment):
    def kill(*_, **__):
        raise Killed

    trainer, _ = resumed(digits, tmp_path / "run", steps=4)
    target = {"save_file": "safetensors.torch.save_file", "flush": "os.fsync", "rename": "pathlib.Path.rename"}
    monkeypatch.setattr(target[moment], kill)
    trainer.step = 5
    with pytest.raises(Killed):
        save_checkpoint(trainer)
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run").newest().name == "step-00000004"
    save_checkpoint(trainer)
    assert Checkpoints(tmp_path / "run").newest().name == "step-00000005"


def test_an_older_folder_is_replaced_only_by_a_complete_one(tmp_path):
    def write(word, fail=False):
        def into(folder):
            (folder / "x").write_text(word)
            if fail:
                raise OSError(errno.ENOSPC, "No space left on device")

        return into

    atomic_folder(tmp_path / "model", write("a"))
    with pytest.raises(OSError):
        atomic_folder(tmp_path / "model", write("b", fail=True))
    assert (tmp_path / "model" / "x").read_text() == "a" and find_damage(tmp_path / "model") is None
    atomic_folder(tmp_path / "model", write("c"))
    assert (tmp_path / "model" / "x").read_text() == "c" and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_stops_the_run_with_a_line_and_the_last_good_checkpoint_intact(digits, tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from safetensors import torch as safe

    save, calls = safe.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:  # two of them make the first checkpoint
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(*args, **kwargs)

    monkeypatch.setattr(safe, "save_file", full)
    with pytest.raises(OSError, match="checkpoint of step 4 could not be written.*No space left") as error:
        resumed(digits, tmp_path / "run", steps=6)
    monkeypatch.undo()
    left = Checkpoints(tmp_path / "run")
    assert left.steps() == [2] and left.newest() and not list(left.folder.glob(".*"))
    assert str(left.path(2)) in error.value.__notes__[0]
    trainer, _ = resumed(digits, tmp_path / "run", steps=6)
    assert torch.equal(everything(trainer), straight(digits, tmp_path, 6))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(digits, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(OSError, match="could not be written.*[Nn]o space left") as error:
            Trainer(tiny(), digits, config(steps=40, save_every=1, keep=99, out=str(tmp_path / "run"))).fit()
        assert Checkpoints(tmp_path / "run").newest() and "last good checkpoint" in error.value.__notes__[0]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# -- resuming with something else


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: tiny(layers_per_block=2), "layers_per_block must be 1, as in the run to be resumed, got 2"),
        (lambda: DDPM(tiny().net, linear_schedule(), predicts="v"), "predicts must be 'eps'"),
        (lambda: DDPM(tiny().net, linear_schedule(), variance="beta"), "variance must be 'beta_tilde'"),
        (lambda: DDPM(tiny().net, linear_schedule(beta_T=0.03)), "schedule must be that of the run"),
    ],
)
def test_another_model_cannot_resume_the_run(digits, tmp_path, other, message):
    Trainer(tiny(), digits, config(out=str(tmp_path))).fit()
    with pytest.raises(ValueError, match=message):
        Trainer(other(), digits, config(out=str(tmp_path), steps=9, resume=True))


def test_other_settings_are_logged(digits, tmp_path, caplog):
    Trainer(tiny(), digits, config(out=str(tmp_path))).fit()
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        Trainer(tiny(), digits, config(out=str(tmp_path), steps=9, lr=0.5, resume=True, workers=0))
    assert "resumed with lr 0.5; before it was 0.01" in caplog.text and "leaps from 0.01 to 0.5" in caplog.text
    assert not any(word in caplog.text for word in ("steps ", "images", "workers"))


def test_a_run_is_not_begun_over_another_one(digits, tmp_path):
    Trainer(tiny(), digits, config(out=str(tmp_path))).fit()
    with pytest.raises(ValueError, match="out must be another folder, or resume be set.*holds a run of 6 steps"):
        Trainer(tiny(), digits, config(out=str(tmp_path)))
    with pytest.raises(ValueError, match="steps must be at least the 6 that are done, got 5"):
        Trainer(tiny(), digits, config(out=str(tmp_path), steps=5, resume=True))


# -- bad steps


def broken_in(trainer, bad):
    "The network answers with NaN in the steps `bad`, counted from 1."
    trainer.net.register_forward_hook(lambda net, x, out: out * math.nan if trainer.step + 1 in bad else None)
    return trainer


def test_bad_steps_are_skipped_counted_and_leave_no_trace(digits, caplog):
    trainer = broken_in(Trainer(tiny(), digits, config(steps=30, log_every=10)), {4, 5, 17})
    before = {}
    trainer.optimizer.register_step_pre_hook(lambda *_: before.update({trainer.step: weights(trainer.net).clone()}))
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        losses = trainer.fit()
    assert losses.isfinite().logical_not().nonzero().flatten().tolist() == [3, 4, 16] and trainer.log.skipped == 3
    assert torch.equal(before[3], before[5]) and not torch.equal(before[5], before[6])
    assert weights(trainer.net).isfinite().all() and weights(trainer.ema.net).isfinite().all()
    assert "step 10: 2 of the last 10 updates skipped" in caplog.text and "step 20: 1 of" in caplog.text


@pytest.mark.parametrize("first, log_every", [(7, 1), (9, 25)])
def test_twenty_bad_steps_in_a_row_stop_the_run_and_the_last_good_model_stays(digits, tmp_path, first, log_every):
    settings = config(steps=60, save_every=2, log_every=log_every, out=str(tmp_path))
    trainer = broken_in(Trainer(tiny(), digits, settings), range(first, 60))
    with pytest.raises(FloatingPointError, match=f"20 steps in a row, from step {first} on") as error:
        trainer.fit()
    assert "last good checkpoint" in error.value.__notes__[1] and "lr below 0.01" in error.value.__notes__[0]
    assert weights(DDPM.from_pretrained(model_folder(tmp_path)).net).isfinite().all()


def test_nineteen_in_a_row_do_not_stop_it(digits):
    assert broken_in(Trainer(tiny(), digits, config(steps=30)), range(3, 22)).fit()[-1].isfinite()


def test_weights_that_are_not_finite_are_not_saved(digits, tmp_path):
    trainer = Trainer(tiny(), digits, config(out=str(tmp_path)))
    trainer.fit()
    with torch.no_grad():
        trainer.net.conv_in.weight.fill_(math.nan)
    trainer.step = 7
    with pytest.raises(FloatingPointError, match="weights are not finite in step 7"):
        save_checkpoint(trainer)
    assert Checkpoints(tmp_path).steps() == [6]


@pytest.mark.parametrize("log_every, bad, count", [(10, {2, 6}, 2), (10, {6, 7, 9}, 3), (4, {3, 8, 9, 11}, 4)])
def test_a_run_resumed_between_two_readings_counts_every_bad_step_once(digits, tmp_path, log_every, bad, count):
    settings = dict(out=str(tmp_path), log_every=log_every, save_every=7)
    first = broken_in(Trainer(tiny(), digits, config(steps=7, **settings)), bad)
    first.fit()
    assert first.log.skipped == len([step for step in bad if step <= 7])
    second = broken_in(Trainer(tiny(), digits, config(steps=12, resume=True, **settings)), bad)
    assert second.log.skipped == first.log.skipped, "what the checkpoint tells"
    second.fit()
    assert second.log.skipped == count == int((~second.log.losses.isfinite()).sum())


def test_a_row_of_bad_steps_is_found_across_a_resumption(digits, tmp_path):
    settings = dict(out=str(tmp_path), log_every=10, save_every=13)
    broken_in(Trainer(tiny(), digits, config(steps=13, **settings)), range(4, 99)).fit()
    again = broken_in(Trainer(tiny(), digits, config(steps=60, resume=True, **settings)), range(4, 99))
    with pytest.raises(FloatingPointError, match="20 steps in a row, from step 4 on"):
        again.fit()


# -- signals


@pytest.fixture
def heeded():
    "Ctrl-C has its usual effect, also where the tests run in the background of a shell, which turns it off."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(heeded, digits, tmp_path, number, code):
    def build(on_step=None, **changes):
        c = config(steps=8, out=str(tmp_path / "run"), flip=True, **changes)
        return Trainer(tiny(dropout=0.2), digits, c, on_step=on_step)

    trainer = build(lambda step, loss: step == 3 and signal.raise_signal(number))
    before = signal.getsignal(number)
    message = f"stopped by {code} after step 3: all is saved, resume with --resume --out"
    with pytest.raises(Stopped, match=message) as error:
        trainer.fit()
    assert error.value.signal == number and signal.getsignal(number) == before
    assert Checkpoints(tmp_path / "run").steps() == [3]
    second = build(resume=True)
    second.fit()
    assert torch.equal(everything(second), straight(digits, tmp_path, 8))


def test_a_second_ctrl_c_does_not_wait(heeded, digits):
    def twice(step, loss):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = Trainer(tiny(), digits, config(), on_step=twice)
    with pytest.raises(KeyboardInterrupt) as error:
        trainer.fit()
    assert not isinstance(error.value, Stopped)


# -- several processes

TOGETHER = """
import sys, torch
from test_trainer import *
torch.set_num_threads(1)
place, ends = Path(sys.argv[1]), {}
ends["two"] = together(place / "two")
ends["early"] = together(place / "stopped", stop=True)
ends["late"] = together(place / "stopped", resume=True)
if this_process().is_main_process:
    torch.save(ends, sys.argv[2])
    claim = FolderClaim(place / "stopped" / "checkpoints")
    claim.path.write_text(json.dumps(claim.mine | dict(process=os.getppid(), start=start_time(os.getppid()))))
this_process().wait_for_everyone()
try:
    together(place / "stopped", resume=True)
except ValueError as error:
    print(error, flush=True)
"""


def together(run, stop=False, resume=False):
    "Take 8 steps of 16 images, all processes together, or stop after five; return losses and weights at the end."
    here = this_process()

    def on_step(step, loss):
        if stop and here.process_index == here.num_processes - 1 and step == 5:
            signal.raise_signal(signal.SIGTERM)

    changes = dict(steps=8, lr=1e-4, batch_size=16 // here.num_processes, save_every=4, flip=True, drop_labels=0.5)
    c = config(**changes, out=str(run), resume=resume)
    trainer = Trainer(tiny(num_class_embeds=11), load_images("digits"), c, on_step=on_step)
    try:
        trainer.fit()
    except Stopped as stopped:
        print(stopped, flush=True)
    mine = torch.cat([weights(trainer.net), weights(trainer.ema.net)])
    for got in trainer.accelerator.gather(mine[None]):
        assert torch.equal(got, mine), "the processes differ"
    return torch.cat([trainer.log.losses, mine])


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_agree_and_are_one_with_the_double_batch_stopped_or_not(tmp_path):
    "Also in the labels that they drop, and in what they refuse; one launch for all."
    (tmp_path / "run").mkdir()
    (tmp_path / "together.py").write_text(TOGETHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = started(tmp_path, *torchrun, str(tmp_path / "together.py"))
    one = together(tmp_path / "one")
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    ends = torch.load(tmp_path / "end.pt", weights_only=True)
    torch.testing.assert_close(ends["two"][:8], one[:8], rtol=1e-5, atol=1e-6)  # the losses
    torch.testing.assert_close(ends["two"], one, rtol=1e-4, atol=1e-5)
    moved = one[8:] - weights(tiny(num_class_embeds=11).net).repeat(2)
    assert moved.abs().median() > 1e-4, "they have moved further than that"
    assert printed.count("stopped by SIGTERM after step 5") == 2
    assert Checkpoints(tmp_path / "run" / "stopped").steps() == [5, 8]
    assert not torch.equal(ends["early"], ends["two"])
    assert torch.equal(ends["late"], ends["two"]), "stopped on one process, resumed on both"
    assert printed.count("out must be the folder of one run: process") == 2, "refused on both, and nobody waits"


# -- labels


class Labelled(torch.nn.Module):
    "A network that answers with the x_0 of the label it is given, and notes the labels."

    def __init__(self, rows):
        super().__init__()
        self.config, self.given = dict(num_class_embeds=rows), []
        self.answers = torch.nn.Embedding(rows, 1)

    def forward(self, x_t, t, class_labels):
        self.given.append(class_labels.clone())
        return self.answers(class_labels)[:, :, None, None] + 0 * x_t


def black_and_white(n=40):
    labels = torch.arange(n) % 2
    return Images((255 * labels)[:, None, None, None].expand(-1, 1, 8, 8).to(torch.uint8), labels)


def test_the_network_is_given_the_label_of_each_image():
    images, net = black_and_white(), Labelled(2)
    trainer = Trainer(DDPM(net, linear_schedule(), predicts="x0"), images, config(steps=10, flip=True, accumulate=2))
    trainer.fit()
    batches = iter(ImageBatches(images, 8, seed=0, flip=True))
    for labels in net.given:
        assert torch.equal(next(batches)[:, 0, 0, 0], 2 * labels - 1.0) and labels.dtype == torch.int64
    assert len(net.given) == 20 and trainer.ema.image_shape == (1, 8, 8)


def test_a_fraction_of_the_labels_is_dropped_and_the_rest_of_the_run_is_what_it_was():
    def labels_of(drop):
        net = Labelled(3 if drop else 2)
        c = config(steps=50, batch_size=40, drop_labels=drop)
        Trainer(DDPM(net, linear_schedule(), predicts="x0"), black_and_white(), c).fit()
        return torch.cat(net.given)

    plain, dropped = labels_of(0.0), labels_of(0.3)
    assert plain.max() == 1 and torch.equal(dropped[dropped < 2], plain[dropped < 2])
    assert abs((dropped == 2).double().mean() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_with_its_label_an_image_is_predicted_better_than_without():
    images, losses = black_and_white(), {}
    x0, y = to_network(images.pixels), images.labels
    for name, changes, cond in (("none", {}, None), ("labels", dict(num_class_embeds=2), dict(class_labels=y))):
        m = DDPM(tiny(**changes).net, linear_schedule(), predicts="x0")
        trainer = Trainer(m, images, config(steps=50, batch_size=16))
        trainer.fit()
        with torch.no_grad():
            losses[name] = simple_loss(trainer.ema, x0, rng(1), cond=cond).item()
            if cond:
                losses["swapped"] = simple_loss(trainer.ema, x0, rng(1), cond=dict(class_labels=1 - y)).item()
    assert losses["labels"] < 0.5 * losses["none"] < losses["swapped"]


def test_two_halves_of_a_run_on_labels_are_one_run(digits, tmp_path):
    def run(place, **changes):
        c = config(out=str(tmp_path / place), drop_labels=0.4, **changes)
        trainer = Trainer(tiny(num_class_embeds=11, dropout=0.1), digits, c)
        trainer.fit()
        return everything(trainer)

    run("halves", steps=3)
    assert torch.equal(run("halves", steps=6, resume=True), run("straight", steps=6))


def test_labels_that_are_not_there_or_do_not_fit_are_refused_when_the_trainer_is_made(digits):
    def refused(message, images=digits, drop=0.0, **changes):
        with pytest.raises(ValueError, match=message):
            Trainer(tiny(**changes), images, config(drop_labels=drop))

    refused("^images must have labels", Images(digits.pixels), num_class_embeds=10)
    refused("^labels must lie in 0 … 8 for num_class_embeds=9, got 0 … 9", num_class_embeds=9)
    refused("^labels must lie in 0 … 9", Images(digits.pixels, digits.labels - 1), num_class_embeds=10)
    refused("^drop_labels must be above 0 for num_class_embeds=11 and 10 classes", num_class_embeds=11)
    refused("^drop_labels must be 0 for a network without num_class_embeds", drop=0.1)
    refused("^drop_labels must be 0 unless num_class_embeds is 10 . 1", drop=0.1, num_class_embeds=10)
    few = Images(digits.pixels[:9], digits.labels[:9], classes=tuple("0123456789"))
    refused("^drop_labels must be 0 unless num_class_embeds is 10 . 1", few, drop=0.1, num_class_embeds=10)
    Trainer(tiny(num_class_embeds=11), few, config(drop_labels=0.1))


# -- networks of one's own


def own(seed=0):
    torch.manual_seed(seed)
    return DDPM(OwnNet(), cosine_schedule(100), predicts="v")


def test_any_module_is_trained_and_its_model_knows_the_images(digits):
    trainer = Trainer(own(), digits, config(steps=60, batch_size=32))
    losses = trainer.fit()
    assert losses[-15:].mean() < 0.9 * losses[:5].mean()
    assert trainer.m.image_shape == trainer.ema.image_shape == (1, 8, 8)


def test_any_module_is_saved_and_resumed_bit_for_bit(digits, tmp_path):
    def run(place, seed, **changes):
        trainer = Trainer(own(seed), digits, config(out=str(tmp_path / place), **changes))
        trainer.fit()
        return trainer

    try:
        own().save_pretrained(tmp_path / "model")
    except ValueError as error:
        pytest.skip(str(error))
    run("halves", 0, steps=3)
    resumed, straight = run("halves", 1, steps=6, resume=True), run("straight", 0, steps=6)
    assert torch.equal(everything(resumed), everything(straight))
    again = DDPM.from_pretrained(model_folder(tmp_path / "halves"), net=OwnNet())
    assert torch.equal(weights(again.net), weights(straight.ema.net))


@pytest.mark.parametrize("net", [lambda x_t, t: x_t, torch.nn.Identity(), OwnNet().requires_grad_(False)])
def test_what_has_no_parameters_to_train_is_refused(digits, net):
    with pytest.raises(ValueError, match=f"^m.net must be an nn.Module with param.*, got {type(net).__name__}"):
        Trainer(DDPM(net, linear_schedule()), digits, config())


# -- settings


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=0), dict(batch_size=0), dict(accumulate=0), dict(lr=0.0), dict(lr=math.inf), dict(warmup=-1),
        dict(clip_grad=0.0), dict(ema=1.0), dict(ema=-0.1), dict(seed=-1), dict(save_every=0), dict(keep=0),
        dict(keep_every=-1), dict(log_every=0), dict(drop_labels=1.0), dict(drop_labels=-0.1),
        dict(objective="vlb"), dict(precision="fp8"), dict(track="paper"),
        dict(resume=True), dict(workers=-1), dict(steps=2.0), dict(steps=True), dict(seed=2**64), dict(lr="fast"),
        dict(lr=None), dict(ema=np.zeros(2)), dict(flip="no"), dict(progress=1), dict(out=3), dict(out=""),
        dict(out=b"x"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} must"):
        TrainConfig(**changes)


def test_images_that_do_not_fit_and_folders_that_cannot_be_written_are_refused_before_training(digits, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        Trainer(tiny(), Images(digits.pixels.expand(-1, 3, -1, -1)), config())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder"):
        Trainer(tiny(), digits, config(out=str(tmp_path / "file")))
    with pytest.raises(ValueError, match="out must be a folder"):
        writable_folder(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="does not exist"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model"):
        model_folder(tmp_path)


def test_the_settings_have_their_names_in_the_order_of_before():
    names = "steps batch_size accumulate objective lr warmup decay clip_grad ema flip seed precision channels_last"
    names += " compile out resume save_every keep keep_every log_every track progress workers"
    assert [name for name in vars(TrainConfig()) if name != "drop_labels"] == names.split()


def test_curves_and_pictures_are_written_for_tensorboard(digits, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    c = config(out=str(tmp_path), track="tensorboard", log_every=2)
    losses = Trainer(tiny(), digits, c, draw=lambda m: digits.pixels[:4]).fit()
    events = reader.EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert {"loss", "gradient", "skipped", "images/s", "learning rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert events.Scalars("loss")[0].value == pytest.approx(losses[:2].mean().item(), rel=1e-5)
    assert len(events.Images("samples/image/0" if "samples/image/0" in events.Tags()["images"] else "samples")) == 1


# -- what a config holds


@pytest.mark.parametrize(
    "given, plain",
    [
        (dict(out=Path("run")), "run"), (dict(out="~/run"), str(Path("~/run").expanduser())),
        (dict(lr=np.float32(0.5)), 0.5), (dict(lr=torch.tensor(0.5)), 0.5), (dict(lr=1), 1.0),
        (dict(steps=np.int64(6)), 6), (dict(seed=np.uint8(3)), 3), (dict(batch_size=torch.tensor(4)), 4),
        (dict(workers=np.int32(0)), 0), (dict(flip=np.bool_(True)), True), (dict(decay=torch.tensor(False)), False),
    ],
)  # fmt: skip
def test_settings_are_plain_python_whatever_they_came_as(given, plain):
    ((name, _),) = given.items()
    value = getattr(TrainConfig(**given), name)
    assert value == plain and type(value) is type(plain)
    json.dumps(asdict(TrainConfig(**given)))


def with_lock():
    net = OwnNet()
    net.lock = threading.Lock()
    return net


def test_what_cannot_be_saved_or_trained_is_refused_before_anything_is_written(digits, tmp_path):
    lazy = torch.nn.Sequential(torch.nn.LazyConv2d(1, 3))
    complex_one = torch.nn.Sequential()
    complex_one.register_parameter("weight", torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    extra = OwnNet()
    extra.get_extra_state = lambda: "a word"
    extra._register_state_dict_hook(lambda net, state, *_: state.update(word="a word"))
    for m, message in (
        (DDPM(lazy, linear_schedule()), "lazy"),
        (DDPM(complex_one, linear_schedule()), "float32 or float64.*complex64"),
        (DDPM(OwnNet().half(), linear_schedule()), "float32 or float64.*float16 at time.weight"),
        (DDPM(tiny().net.bfloat16(), linear_schedule()), "float32 or float64.*bfloat16 at"),
        (DDPM(extra, linear_schedule()), "tensors to be saved, got str at word"),
        (DDPM(torch.compile(tiny().net), linear_schedule()), "the network itself.*OptimizedModule"),
        (DDPM(OwnNet().to("meta"), linear_schedule()), "meta"),
        (DDPM(with_lock(), linear_schedule()), "a network that copy.deepcopy can copy"),
        (tiny().net, "^m must be a DDPM, got UNet"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(m, digits, config(out=str(tmp_path / "run")))
    assert not list(tmp_path.rglob("*.*")), "not even a claim is left"
    with pytest.raises(ValueError, match="^config must be a TrainConfig, got dict"):
        Trainer(tiny(), digits, dict(steps=3))


@pytest.mark.parametrize("images", [torch.utils.data.TensorDataset(torch.rand(4, 1, 8, 8)), torch.rand(4, 1, 8, 8), []])
def test_images_of_other_libraries_are_refused(images):
    with pytest.raises(ValueError, match=f"^images must be Images.*, got {type(images).__name__}"):
        Trainer(tiny(), images, config())


class Doubled(UNet):
    "A `UNet` that computes something else."

    def forward(self, x_t, t, **cond):
        return 2 * super().forward(x_t, t, **cond)


def frozen():
    m = tiny()
    m.net.conv_in.requires_grad_(False)
    return m


def tied():
    net = OwnNet()
    net.second = torch.nn.Conv2d(1, 8, 3, padding=1)
    net.second.weight = net.first.weight
    net.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
    return DDPM(net.double(), linear_schedule())


@pytest.mark.parametrize("make", [lambda: DDPM(Doubled(**tiny().net.config), linear_schedule()), frozen, tied])
def test_whatever_is_trained_is_saved_resumed_and_read_back(digits, tmp_path, make):
    def run(place, **changes):
        torch.manual_seed(0)
        trainer = Trainer(make(), digits, config(out=str(tmp_path / place), **changes))
        trainer.fit()
        return trainer

    run("halves", steps=3)
    trainer = run("halves", steps=6, resume=True)
    assert torch.equal(everything(trainer), everything(run("straight", steps=6)))
    kind = type(trainer.net)
    again = DDPM.from_pretrained(model_folder(tmp_path / "halves"), net=None if kind is UNet else make().net)
    x = torch.randn(2, 1, 8, 8, generator=rng(3))
    assert torch.equal(again.p_step(x, 7).mean, trainer.ema.p_step(x, 7).mean)


# -- what a resumed run verifies


def test_other_pictures_under_the_same_name_are_refused_and_the_same_under_another_are_not(digits, tmp_path, caplog):
    Trainer(tiny(), digits, config(out=str(tmp_path))).fit()
    more = config(out=str(tmp_path), steps=9, resume=True)
    for pixels in (255 - digits.pixels, digits.pixels[:99], digits.pixels.flip(-1)):
        with pytest.raises(ValueError, match="^images must be those of the run to be resumed.*the pixels are others"):
            Trainer(tiny(), Images(pixels, name=digits.name), more)
    edit_json(tmp_path, "training.json", lambda facts: facts.pop("data"))  # a run of before, which holds no digest
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        assert Trainer(tiny(), Images(digits.pixels, name="moved"), more).step == 6
    assert "resumed with images" in caplog.text


def edit_json(run, name, change):
    "Change a JSON file of the newest checkpoint, and its manifest."
    newest = Checkpoints(run).newest()
    facts = json.loads((newest / name).read_text())
    change(facts)
    (newest / name).write_text(json.dumps(facts))
    sign(newest, name)


def sign(checkpoint, name):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {name: checksum(checkpoint / name)}))


@pytest.mark.parametrize(
    "before, after, leap",
    [
        (
            dict(steps=9, decay=True, warmup=0),
            dict(steps=18, decay=True, warmup=0),
            "from 0.00111 to 0.005 after step 9",
        ),
        (dict(steps=5, warmup=0), dict(steps=9, lr=1e-3, warmup=0), "from 0.01 to 0.001 after step 5"),
        (dict(steps=5, warmup=0), dict(steps=9, warmup=100), "from 0.01 to 0.0006 after step 5"),
        (dict(steps=5, warmup=9), dict(steps=9, warmup=9), None),
        (dict(steps=5, warmup=0), dict(steps=9, warmup=0), None),
    ],
)
def test_a_learning_rate_that_would_leap_is_said(digits, tmp_path, caplog, before, after, leap):
    Trainer(tiny(), digits, config(out=str(tmp_path), **before)).fit()
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        Trainer(tiny(), digits, config(out=str(tmp_path), resume=True, **after))
    assert f"leaps {leap}" in caplog.text if leap else "leaps" not in caplog.text


@pytest.mark.parametrize("noise, random", [(16, dict(cuda=16)), (16, {}), (44, dict(mps=44))])
def test_a_run_of_another_kind_of_device_is_resumed_with_one_warning(digits, tmp_path, caplog, noise, random):
    "Files as a GPU leaves them: other generators have other states."
    Trainer(tiny(dropout=0.2), digits, config(out=str(tmp_path))).fit()
    file = Checkpoints(tmp_path).newest() / "training.safetensors"
    others = {f"random.{kind}": torch.zeros(1, n, dtype=torch.uint8) for kind, n in random.items()}
    save_file(load_file(file) | {"noise": torch.zeros(noise, dtype=torch.uint8)} | others, file)
    sign(file.parent, file.name)
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        trainer = Trainer(tiny(dropout=0.2), digits, config(out=str(tmp_path), steps=9, resume=True))
    assert trainer.fit().isfinite().all() and trainer.seen == 9 * 8
    assert [r.getMessage() for r in caplog.records if "device" in r.getMessage()] == [
        "resumed on another kind of device (cpu): its random numbers begin anew"
    ]
    assert not torch.equal(trainer.noise.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize("place", ["nowhere", "empty", "other"])
def test_a_folder_to_be_resumed_holds_a_run(digits, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "model").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="^out must be the folder of a run to be resumed.*holds none"):
        Trainer(tiny(), digits, config(out=str(tmp_path / place), resume=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_is_resumed_from_step_0(digits, tmp_path):
    Trainer(tiny(), digits, config(out=str(tmp_path)))  # claimed, and then nothing
    trainer = Trainer(tiny(), digits, config(out=str(tmp_path), resume=True))
    assert trainer.step == 0 and torch.equal(trainer.fit(), Trainer(tiny(), digits, config()).fit())


# -- interrupted, and then again


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["on_step", "gradient", "signal"])
def test_fit_after_an_interrupt_goes_on_with_the_next_batches(heeded, digits, where):
    used, hit = [], []

    def once(now):
        if where == now and trainer.step == 5 and not hit:
            hit.append(True)
            if where != "signal":
                raise Interrupted
            signal.raise_signal(signal.SIGINT)

    class Watched(Trainer):
        def gradient(self, model, batches):
            pair = next(batches)
            loss = super().gradient(model, iter([pair]))
            once("gradient")  # when the gradient is there, and the step is not done
            used.append(pair[0].sum().item())
            return loss

    trainer = Watched(tiny(), digits, config(steps=10), on_step=lambda *_: (once("on_step"), once("signal")))
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        trainer.fit()
    losses = trainer.fit()
    batches = iter(ImageBatches(digits, 8, seed=0))
    assert used == [next(batches).sum().item() for _ in range(10)] and trainer.seen == 80 and (losses > 0).all()
    if where != "gradient":  # there the noise of the lost step is drawn
        assert torch.equal(losses, Trainer(tiny(), digits, config(steps=10)).fit())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_callers_objects_come_back_as_they_were(digits, tmp_path, precision):
    m = tiny()
    for p in m.net.parameters():
        p.grad = torch.ones_like(p)  # what the caller has left
    draws = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    trainer = Trainer(m, digits, config(precision=precision, out=str(tmp_path)))
    first = trainer.fit()
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert "forward" not in vars(m.net) and m.net(torch.zeros(1, 1, 8, 8), torch.tensor([3])).dtype == torch.float32
    assert torch.equal(first, Trainer(tiny(), digits, config(precision=precision)).fit())
    first.zero_()
    assert trainer.fit().all(), "the record is not the tensor that was returned"


# -- one run in one folder


def test_a_second_run_in_a_folder_is_refused_while_the_first_trains(digits, tmp_path):
    refused = []

    def try_it(step, loss):
        for changes in (dict(), dict(resume=True)):
            with pytest.raises(ValueError) as error:
                Trainer(tiny(), digits, config(out=str(tmp_path), **changes))
            refused.append(str(error.value))

    Trainer(tiny(), digits, config(steps=2, out=str(tmp_path)), on_step=try_it).fit()
    assert len(refused) == 4 and all(f"process {os.getpid()} on " in text and "\n" not in text for text in refused)
    assert not (tmp_path / "checkpoints" / "running.json").exists()
    assert Trainer(tiny(), digits, config(out=str(tmp_path), resume=True)).step == 2


@pytest.mark.parametrize("fault", ["fit", "constructor", "forgotten"])
def test_a_folder_is_free_again_after_an_error(digits, tmp_path, fault):
    if fault == "constructor":
        Trainer(tiny(), digits, config(out=str(tmp_path))).fit()
    claim = tmp_path / "checkpoints" / "running.json"
    with contextlib.suppress(ZeroDivisionError, ValueError):
        trainer = Trainer(tiny(), digits, config(out=str(tmp_path)), on_step=lambda *_: 1 / 0)
        assert claim.exists() and fault != "constructor"
        if fault == "fit":
            trainer.fit()
    trainer = None
    gc.collect()
    assert not claim.exists()


def test_the_claim_of_another_process_is_respected_until_it_is_killed(digits, tmp_path):
    process = subprocess.Popen(["sleep", "60"])  # stands for a run
    claim = FolderClaim(writable_folder(tmp_path / "checkpoints"))
    claim.path.write_text(json.dumps(claim.mine | dict(process=process.pid, start=start_time(process.pid))))
    with pytest.raises(ValueError, match=f"^out must be the folder of one run: process {process.pid} on .* trains in"):
        Trainer(tiny(), digits, config(out=str(tmp_path)))
    process.kill()
    while start_time(process.pid) is not None and process.poll() is None:  # also while nobody has waited for it
        time.sleep(0.01)
    Trainer(tiny(), digits, config(steps=1, out=str(tmp_path))).fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("age, content, free", [(10, "{}", False), (10, "", False), (500, "{}", True), (500, "", True)])
def test_a_claim_from_elsewhere_counts_as_long_as_it_gives_signs_of_life(digits, tmp_path, age, content, free):
    claim = tmp_path / "checkpoints" / "running.json"
    claim.parent.mkdir()
    claim.write_text(content)
    os.utime(claim, (time.time() - age,) * 2)
    with contextlib.nullcontext() if free else pytest.raises(ValueError, match="^out must be the folder of one run"):
        Trainer(tiny(), digits, config(out=str(tmp_path)))


def test_a_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_lit.claims.HEARTBEAT", 0.01)
    claim = FolderClaim(tmp_path)
    with claim:
        os.utime(claim.path, (0, 0))
        deadline = time.monotonic() + 20
        while claim.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert claim.path.stat().st_mtime > 0
    FolderClaim(None).take()  # a run without a folder


# -- the environment, the disk, the picture


@pytest.mark.parametrize(
    "name, value",
    [("GRADIENT_ACCUMULATION_STEPS", "4"), ("GRADIENT_ACCUMULATION_STEPS", "x"), ("DYNAMO_BACKEND", "INDUCTOR"),
     ("MIXED_PRECISION", "bf16")],
)  # fmt: skip
def test_the_configuration_decides_and_not_the_environment(digits, monkeypatch, caplog, name, value):
    def norms():
        trainer = Trainer(tiny(), digits, config(steps=2))
        trainer.fit()
        return trainer.log.norms

    alone = norms()
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        assert torch.equal(norms(), alone)
    assert f"ACCELERATE_{name}={value} has no effect" in caplog.text


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_another_kind_of_training_is_refused(digits, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "True")
    with pytest.raises(ValueError, match=f"^ACCELERATE_USE_{name} must not be set"):
        Trainer(tiny(), digits, config())


def test_what_a_launcher_always_sets_is_no_matter(digits, monkeypatch, caplog):
    for name, value in (("MIXED_PRECISION", "no"), ("DYNAMO_BACKEND", "NO"), ("USE_CPU", "False"), ("USE_FSDP", "")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        Trainer(tiny(), digits, config())
    assert caplog.text == ""


def test_a_picture_that_fails_costs_no_run(digits, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        Trainer(tiny(), digits, config(out=str(tmp_path)), draw=lambda m: 1 / 0).fit()
    assert "no picture of step 6: division by zero" in caplog.text and Checkpoints(tmp_path).steps() == [6]


def test_workers_reach_the_batches(digits):
    assert Trainer(tiny(), digits, config(workers=3)).batches.workers == 3
