"""The autoencoder: the same numbers as diffusers' with the same weights, and every misuse refused in one line."""

import json

import pytest
import torch
from doubles import lively, rng

from ddpm_lit.autoencoder import Autoencoder, AutoencoderLoss, colour_differences, reconstruct, reconstruction_error
from ddpm_lit.files import model_folder
from ddpm_lit.gaussian import Gaussian
from ddpm_lit.images import Images
from ddpm_lit.latent_options import TrainAutoencoder, default_autoencoder
from ddpm_lit.options import UncheckedTrainConfig
from ddpm_lit.trainer import TrainConfig, Trainer


def config(*widths: int, **changes) -> dict:
    n = len(widths)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n)
    return dict(block_out_channels=widths, norm_num_groups=4) | kinds | changes


CONFIGS = [
    config(8, 16),
    config(8),
    config(8, 16, 16, norm_num_groups=8, layers_per_block=2, latent_channels=3),
    config(8, 16, in_channels=1, out_channels=1),
    config(8, 16, mid_block_add_attention=False),
    config(8, 16, use_quant_conv=False, use_post_quant_conv=False, latent_channels=8),
    config(16, 8, scaling_factor=0.3611, shift_factor=0.1159),
    config(8, 8, 8, 8, sample_size=[32, 64], force_upcast=False),
]


def images(n: int = 8, channels: int = 3, size: int = 8) -> Images:
    return Images((torch.rand(n, channels, size, size, generator=rng(1)) * 255).to(torch.uint8), torch.arange(n) % 3)


@pytest.mark.parametrize("c", CONFIGS, ids=range(len(CONFIGS)))
def test_it_equals_diffusers(c):
    "Forwards, and the gradient of every weight; the weights move both ways, in float64."
    from diffusers import AutoencoderKL

    ours, theirs = lively(Autoencoder(**c)).double(), AutoencoderKL(**c).double().eval()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert {name for name in ours.config} >= {name for name in theirs.config if name[0] != "_"}
    x = torch.rand(2, ours.config["in_channels"], 16, 24, generator=rng(0), dtype=torch.float64) * 2 - 1
    q, p = ours.encode(x), theirs.encode(x).latent_dist
    x_hat, other = ours.decode(q.mean + q.var.sqrt()), theirs.decode(p.mean + p.std).sample
    for a, b in ((q.mean, p.mean), (q.var, p.var), (x_hat, other)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.kl(Gaussian(0 * q.mean, torch.ones_like(q.var))).sum((1, 2, 3)), p.kl())
    weights = torch.randn(x.shape, generator=rng(2), dtype=torch.float64)
    (x_hat * weights).sum().backward(), (other * weights).sum().backward()
    of_theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, of_theirs[name].grad, rtol=1e-6, atol=1e-8, msg=name)


def test_diffusers_opens_what_is_saved_and_the_other_way_round(tmp_path):
    from diffusers import AutoencoderKL

    ours, x = lively(Autoencoder(**CONFIGS[0])), torch.rand(2, 3, 8, 8, generator=rng(0))
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = Autoencoder.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x).latent_dist.mean, ours.encode(x).mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(x)[0], ours(x)[0], rtol=0, atol=0)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "theirs").rename(tmp_path / "pipeline" / "vae")
    assert not Autoencoder.from_pretrained(tmp_path / "pipeline").training
    ours.half().save_pretrained(tmp_path / "half")
    assert next(Autoencoder.from_pretrained(tmp_path / "half").parameters()).dtype == torch.float32


@pytest.mark.slow
def test_compilation_meets_no_break_and_layout_changes_nothing():
    ae, x = lively(Autoencoder(**CONFIGS[0])), torch.rand(2, 3, 32, 32, generator=rng(0))
    with torch.no_grad():
        assert torch._dynamo.explain(lambda x: ae.decode(ae.encode(x).mean))(x).graph_break_count == 0
        before = ae(x)[0]
        after = ae.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(block_out_channels=(8, 6)), "divisible by norm_num_groups=4, got 6"),
        (dict(latent_channels=0), "latent_channels must be at least 1, got 0"),
        (dict(layers_per_block=1.5), "layers_per_block must be"),
        (dict(up_block_types=("UpDecoderBlock2D",)), "up_block_types must be"),
        (dict(down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D")), "down_block_types must be"),
        (dict(latents_mean=[0.0] * 4), "latents_mean=.* is not implemented, only None"),
        (dict(width=3), "Autoencoder has no keyword width; it takes in_channels"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder(**config(8, 16) | changes)


def test_colours_need_three_channels_and_errors_are_those_of_pixels():
    with pytest.raises(ValueError, match="three channels"):
        colour_differences(torch.zeros(1, 1, 2, 2))
    pixels = images().pixels
    red = pixels.clone()
    red[:, 0] ^= 1  # one grey level, up or down
    assert reconstruction_error(red, pixels)["red_green"] == pytest.approx(1)
    assert "red_green" not in reconstruction_error(pixels[:, :1], red[:, :1])
    assert reconstruct(Autoencoder(**config(8, 16)), images(5), batch_size=2).shape == (5, 3, 8, 8)


def test_features_may_be_compared_too():
    x, x_hat = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    q = Gaussian(torch.zeros(2, 4), torch.ones(2, 4))
    terms = AutoencoderLoss(feature_weight=2.0, features=lambda x: x.mean((2, 3))).terms(x, x_hat, q)
    assert terms["features"] == pytest.approx(0.5) and terms["kl"] == 0


def run(tmp_path, steps=4, net=None, **changes):
    options = dict(steps=steps, batch_size=4, lr=1e-3, warmup=0, out=str(tmp_path), save_every=2, track="none")
    c = TrainConfig(**options | dict(progress=False) | changes)
    return Trainer(net or Autoencoder(generator=rng(0), **config(8, 16)), images(), c)


def test_an_interrupted_training_continues_bit_for_bit(tmp_path):
    straight = run(tmp_path / "a")
    losses = straight.fit()
    run(tmp_path / "b", steps=2).fit()
    resumed = run(tmp_path / "b", resume=True)
    assert torch.equal(resumed.fit(), losses)
    for trainer in (straight, resumed):
        ae = Autoencoder.from_pretrained(model_folder(trainer.config.out))
        for name, value in ae.state_dict().items():
            assert torch.equal(value, straight.ema.state_dict()[name]), name
    with pytest.raises(ValueError, match="latent_channels must be 4, as in the run to be resumed, got 3"):
        run(tmp_path / "b", net=Autoencoder(**config(8, 16, latent_channels=3)), resume=True)


@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(accumulate=2), dict(channels_last=True)])
def test_other_ways_to_train(tmp_path, changes):
    losses = run(tmp_path, **changes).fit()
    assert losses.isfinite().all() and len(losses) == 4


def test_a_part_of_a_batch_gets_its_part_of_the_draws():
    ae, x = lively(Autoencoder(**config(8, 16))), torch.rand(4, 3, 8, 8, generator=rng(0))
    loss = ae.objective()
    both = [loss(ae, half, rng(5), (i, 2)) for i, half in enumerate(x.chunk(2))]
    torch.testing.assert_close(sum(both) / 2, loss(ae, x, rng(5)))


def test_train_autoencoder_on_the_command_line(tmp_path, capsys):
    from ddpm_lit.cli import main

    words = ["train-autoencoder", "--data", "digits", "--widths", "8", "8", "--groups", "4", "--hold-out", "10"]
    words += ["--batch-size", "8", "--track", "none", "--no-progress", "--out", str(tmp_path / "run")]
    assert main([*words, "--steps", "2"]) == 0
    assert "psnr" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n"] == 180 and metrics["held_out"]
    resumed = ["train-autoencoder", "--resume", "--out", str(tmp_path / "run")]
    command = default_autoencoder(resumed)
    assert command.widths == (8, 8) and command.training.resume and command.training.batch_size == 8
    assert main([*resumed, "--steps", "3"]) == 0 and "3 steps" in capsys.readouterr().out
    (tmp_path / "run" / "train.json").write_text('{"widths": 3}')
    assert main(resumed) == 2 and "train.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--widths 8 8 8 8 8 --groups 4", "height and width of x must be divisible by 16, got (8, 8)"),
        ("--colour-weight 1", "--colour-weight must be 0 for grey images, got 1"),
        ("--hold-out -1", "--hold-out must be at least 0, got -1"),
        ("--objective bound", "--objective must be one of simple; got 'bound'"),
        ("--drop-labels 0.1", "--drop-labels must be 0 for a network without num_class_embeds"),
        ("--resume", "--resume must name a run"),
    ],
)
def test_one_line_for_each_misuse(tmp_path, capsys, words, message):
    from ddpm_lit.cli import main

    out = ["--out", str(tmp_path / "run"), "--no-progress", "--track", "none"]
    assert main(["train-autoencoder", "--data", "digits", *words.split(), *out]) == 2
    error = capsys.readouterr().err.strip().split("\n")
    assert message in error[-1]


def test_the_defaults_of_the_command_are_a_configuration():
    assert isinstance(TrainAutoencoder(UncheckedTrainConfig()).model((3, 32, 32)), Autoencoder)
