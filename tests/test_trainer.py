"""The trainer: same seed same weights, the average, checkpoints that are whole, runs that break."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

import ddpm_lit.trainer as module
from ddpm_lit.data import ImageBatches, Images, load_images
from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.objective import simple_loss
from ddpm_lit.trainer import TrainConfig, Trainer, ema_update, model_folder, swap_in, writable_folder
from ddpm_lit.unet import UNet

TINY = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def rng(seed):
    return torch.Generator().manual_seed(seed)


def tiny(seed=0, **changes):
    return DDPM(UNet.from_preset("digits", generator=rng(seed), **TINY | changes), linear_schedule())


def config(**changes):
    return TrainConfig(**dict(steps=6, batch_size=8, lr=1e-2, warmup=2, progress=False) | changes)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_same_seed_same_weights_bit_for_bit_even_with_dropout_and_flips(digits):
    def trained(seed):
        trainer = Trainer(tiny(dropout=0.3), digits, config(seed=seed, flip=True))
        losses = trainer.fit()
        return weights(trainer.net), weights(trainer.m.net), losses

    first = trained(1)
    torch.rand(5)  # what others draw in between must not matter
    for a, b, other in zip(first, trained(1), trained(2), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, other)


def test_the_trainer_is_the_plain_loop(digits):
    c = config(clip_grad=0.05, ema=0.5, decay=True)
    trainer = Trainer(tiny(), digits, c)
    losses = trainer.fit()
    m, generator, mean, history = tiny(), rng(0), None, []
    optimizer = torch.optim.Adam(m.net.parameters())
    for k, x0 in zip(range(6), ImageBatches(digits, 8, seed=0), strict=False):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (k + 1) / 2) * (1 - k / 6)
        loss = simple_loss(m, x0, generator)
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
    torch.testing.assert_close(weights(trainer.m.net), mean, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(weights(trainer.net), mean, rtol=1e-2, atol=1e-3)


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
    losses = Trainer(tiny(), digits, config(steps=60, batch_size=32)).fit()
    assert len(losses) == 60 and losses[-15:].mean() < 0.8 * losses[0]


def test_m_holds_the_average_in_evaluation_mode_and_the_raw_network_is_kept(digits):
    m = tiny(dropout=0.5)
    raw = m.net
    trainer = Trainer(m, digits, config())
    trainer.fit()
    assert trainer.net is raw and raw.training and m.net is not raw and not m.net.training
    assert not torch.equal(weights(raw), weights(m.net))


def test_a_checkpoint_holds_average_raw_weights_losses_and_settings(digits, tmp_path):
    trainer = Trainer(tiny(), digits, config(out=str(tmp_path / "a" / "run"), save_every=4))
    losses = trainer.fit()
    folder = model_folder(tmp_path / "a" / "run")
    assert torch.equal(weights(DDPM.from_pretrained(folder).net), weights(trainer.m.net))
    state = load_file(folder / "training.safetensors")
    assert torch.equal(state["losses"], losses)
    assert torch.equal(state["net.conv_in.weight"], trainer.net.conv_in.weight)
    told = json.loads((folder / "training.json").read_text())
    assert told["step"] == 6 and told["config"]["save_every"] == 4
    assert sorted(p.name for p in (tmp_path / "a" / "run").iterdir()) == ["model"]


@pytest.mark.parametrize("moment", ["save_pretrained", "save_file", "swap_in", "rename", "rmtree"])
def test_a_save_that_is_killed_leaves_a_whole_model(digits, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    trainer = Trainer(tiny(), digits, config(out=str(tmp_path)))
    trainer.fit()
    old = weights(DDPM.from_pretrained(model_folder(tmp_path)).net)
    with torch.no_grad():
        for p in trainer.m.net.parameters():
            p += 1

    def at_the_old_one(folder):
        return folder.name == "model.old" and folder.exists()

    if moment == "save_pretrained":
        monkeypatch.setattr(DDPM, "save_pretrained", kill)
    elif moment == "save_file":
        monkeypatch.setattr("safetensors.torch.save_file", kill)
    elif moment == "swap_in":
        monkeypatch.setattr(module, "swap_in", kill)
    elif moment == "rename":  # the old model has been moved aside, the new one is not yet in its place
        rename = module.Path.rename
        monkeypatch.setattr(module.Path, "rename", lambda *a: kill() if a[0].name == ".model.draft" else rename(*a))
    else:  # both are there, the old one is about to be removed
        rmtree = shutil.rmtree
        monkeypatch.setattr(shutil, "rmtree", lambda *a, **_: kill() if at_the_old_one(a[0]) else rmtree(*a, True))
    with pytest.raises(Killed):
        trainer.save()
    monkeypatch.undo()
    found = weights(DDPM.from_pretrained(model_folder(tmp_path)).net)
    assert torch.equal(found, old if moment != "rmtree" else weights(trainer.m.net))
    trainer.save()
    assert torch.equal(weights(DDPM.from_pretrained(model_folder(tmp_path)).net), weights(trainer.m.net))


def test_swap_in_never_leaves_the_place_empty_handed(tmp_path):
    for word in "ab":
        (tmp_path / "draft").mkdir()
        (tmp_path / "draft" / "model_index.json").write_text(word)
        swap_in(tmp_path / "draft", tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model_index.json").read_text() == "b"


@pytest.mark.parametrize(
    ("broken_after", "log_every", "message", "kept"),
    [
        (5, 1, "nan in step 6.*last good checkpoint", 4),
        (4, 100, "the weights are not finite in step 4", 2),  # no loss has shown it yet
    ],
)
def test_what_is_not_finite_stops_the_run_and_the_last_good_model_stays(
    broken_after, log_every, message, kept, digits, tmp_path
):
    settings = config(steps=20, save_every=2, log_every=log_every, out=str(tmp_path))
    trainer = Trainer(tiny(), digits, settings)

    def poison(*_):
        if trainer.step == broken_after:
            with torch.no_grad():
                trainer.net.conv_in.weight.fill_(math.nan)

    trainer.optimizer.register_step_post_hook(poison)
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit()
    assert json.loads((model_folder(tmp_path) / "training.json").read_text())["step"] == kept
    assert weights(DDPM.from_pretrained(model_folder(tmp_path)).net).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=0), dict(batch_size=0), dict(lr=0.0), dict(lr=math.inf), dict(warmup=-1), dict(clip_grad=0.0),
        dict(ema=1.0), dict(ema=-0.1), dict(seed=-1), dict(save_every=0), dict(log_every=0), dict(precision="fp8"),
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
