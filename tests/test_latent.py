"""Latent diffusion: a DDPM of an autoencoder's latents, cached, trained, guided, saved, and opened by diffusers."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from doubles import lively, rng

from ddpm_lit.autoencoder import Autoencoder
from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.guidance import classifier_free
from ddpm_lit.images import Images, to_pixels
from ddpm_lit.latent import LatentDDPM, Latents, cached_latents, standard_latents
from ddpm_lit.objective import simple_loss
from ddpm_lit.sampler import Sampling, ancestral_sample, ddim_invert, ddim_sample, sample_pixels
from ddpm_lit.solvers import dpm_sample, heun_sample
from ddpm_lit.trainer import TrainConfig, Trainer
from ddpm_lit.unet import UNet

LEVELS = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def autoencoder(channels: int = 3, **changes) -> Autoencoder:
    c = dict(in_channels=channels, out_channels=channels, block_out_channels=(8, 8), norm_num_groups=4, **LEVELS)
    return lively(Autoencoder(**c | changes))


def unet(**changes) -> UNet:
    c = dict(in_channels=4, out_channels=4, sample_size=4, block_out_channels=(8, 16), layers_per_block=1)
    c |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return lively(UNet(**c | dict(norm_num_groups=4, attention_head_dim=None) | changes))


def model(T: int = 20, predicts: str = "v", ae: Autoencoder | None = None, **changes) -> LatentDDPM:
    return LatentDDPM(DDPM(unet(**changes), linear_schedule(T, 1e-3, 0.3), predicts, clip=False), ae or autoencoder())


def images(n: int = 12, channels: int = 3) -> Images:
    pixels = (torch.rand(n, channels, 8, 8, generator=rng(1)) * 255).to(torch.uint8)
    return Images(pixels, torch.arange(n) % 3, "some", ("a", "b", "c"))


@pytest.mark.parametrize("sample", [ancestral_sample, ddim_sample, dpm_sample, heun_sample])
def test_every_sampler_draws_latents_and_sample_decodes_them(sample):
    m, name = model(), sample.__name__.removesuffix("_sample")
    z = sample(m, (3, *m.sample_shape), steps=5, generator=rng(0))
    pixels = m.sample(3, 5, name, generator=rng(0))
    assert pixels.shape == (3, 3, 8, 8) == (3, *m.image_shape) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, to_pixels(m.decode(z)))
    assert torch.equal(pixels, Sampling(name, 5, progress=False).draw(m, 3))


def test_the_published_scale_is_undone_before_decoding():
    ae = autoencoder(scaling_factor=0.18215, shift_factor=0.3)
    m = model(ae=ae)
    z = ddim_sample(m, (2, 4, 4, 4), 5, generator=rng(0))
    with torch.no_grad():
        assert torch.equal(m.decode(z), ae.decode(z / 0.18215 + 0.3))
    assert not torch.equal(m.sample(2, 5, generator=rng(0)), model().sample(2, 5, generator=rng(0)))


def test_guidance_inversion_and_losses_are_those_of_any_model():
    m, y = model(num_class_embeds=4), torch.arange(3)
    guided = classifier_free(m, 3.0, dict(class_labels=3))
    assert isinstance(guided, LatentDDPM) and guided.autoencoder is m.autoencoder
    pixels = [g.sample(3, 5, cond=dict(class_labels=y), generator=rng(0)) for g in (m, guided)]
    assert pixels[0].shape == pixels[1].shape and not torch.equal(*pixels)
    plain = DDPM(m.net, m.s, "v", clip=False)
    x = torch.randn(3, 4, 4, 4, generator=rng(2))
    losses = [simple_loss(d, x, rng(3), cond=dict(class_labels=y)) for d in (m, plain)]
    assert torch.equal(*losses)
    assert ddim_invert(m, x, 5, cond=dict(class_labels=y)).shape == x.shape
    assert torch.equal(m.to("cpu").double().decode(x), m.decode(x.double()))


def test_a_callback_sees_latents_and_a_trajectory_shows_images(tmp_path):
    seen, m = [], model()
    sample_pixels(m, 2, 4, generator=rng(0), callback=lambda k, x: seen.append(tuple(x.shape)))
    assert seen == [(2, 4, 4, 4)] * 5
    m.save_pretrained(tmp_path / "model")
    from ddpm_lit.cli import main

    words = ["sample", str(tmp_path / "model"), "-n", "2", "--steps", "4", "--every", "2", "--no-progress"]
    assert main([*words, "--out", str(tmp_path / "film.gif")]) == 0 and (tmp_path / "film.gif").stat().st_size


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LatentDDPM(DDPM(unet(), linear_schedule(9)), autoencoder()), "m must have clip=False"),
        (lambda: LatentDDPM(unet(), autoencoder()), "m must be of type DDPM, got UNet"),
        (lambda: LatentDDPM(DDPM(unet(), linear_schedule(9), clip=False), unet()), "must be of type Autoencoder"),
        (lambda: model(ae=autoencoder(latent_channels=8)), "must have 4 latent_channels, as the model, got 8"),
        (lambda: model().p_step(torch.zeros(1, 3, 8, 8), 0), "no bits/dim of images"),
        (lambda: model().autoencoder.encode(torch.zeros(1, 3, 9, 8)), "divisible by 2, got .9, 8."),
        (lambda: Latents(torch.zeros(3, 4, 4)), "latents must be floating point"),
        (lambda: Latents(torch.zeros(3, 4, 4, 4), torch.zeros(2)), "labels must be one for each of 3"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_latents_are_cached_for_images_weights_and_seed(tmp_path):
    ae, data, folder = autoencoder(), images(), tmp_path / "latents"
    first = cached_latents(ae, data, folder)
    flat = first.pixels.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.std(1), torch.ones(4), rtol=1e-4, atol=0)
    assert first.labels.equal(data.labels) and first.classes == data.classes
    with mock.patch.object(Autoencoder, "encode", side_effect=AssertionError):
        assert cached_latents(ae, data, folder).pixels.equal(first.pixels)
        for other in ((ae, images(11), 0), (lively(autoencoder(), 5), data, 0), (ae, data, 1)):
            with pytest.raises(AssertionError):
                cached_latents(other[0], other[1], folder, other[2])
    (folder / "latents.safetensors").write_bytes(b"")
    assert cached_latents(ae, data, folder).pixels.equal(first.pixels)
    decoded = first.autoencoder.decode(first.pixels)
    z = standard_latents(ae, data).autoencoder.encode(data.pixels / 127.5 - 1)
    assert decoded.shape == (12, 3, 8, 8) and (first.pixels - z.mean).abs().max() < 8 * z.var.sqrt().max()


def test_captions_go_with_the_latents():
    data = Images(images(4).pixels, captions=tuple("abcd"))
    latents = standard_latents(autoencoder(), data).select([2, 0])
    assert latents.captions == ("c", "a") and len(latents) == 2


def test_constant_latents_have_no_scale():
    data = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    ae = autoencoder()
    for parameter in ae.parameters():
        parameter.data.zero_()
    with mock.patch("ddpm_lit.latent.encode_images", lambda *_: torch.ones(4, 4, 4, 4)):
        with pytest.raises(ValueError, match="images must differ in every channel of their latents"):
            standard_latents(ae, data)


def fit(tmp_path, steps=4, latents=None, **changes):
    latents = latents or standard_latents(autoencoder(), images())
    options = dict(batch_size=4, lr=1e-3, warmup=0, save_every=2, track="none", progress=False)
    m = LatentDDPM(DDPM(unet(), linear_schedule(20, 1e-3, 0.3), "v", clip=False), latents.autoencoder)
    return Trainer(m, latents, TrainConfig(steps=steps, out=str(tmp_path), **options | changes))


def test_an_interrupted_training_continues_bit_for_bit(tmp_path):
    straight = fit(tmp_path / "a")
    losses = straight.fit()
    fit(tmp_path / "b", steps=2).fit()
    resumed = fit(tmp_path / "b", resume=True)
    assert torch.equal(resumed.fit(), losses)
    m = DDPM.from_pretrained(tmp_path / "b" / "model")
    assert isinstance(m, LatentDDPM) and not m.clip
    assert torch.equal(m.sample(2, 4, generator=rng(0)), straight.ema.sample(2, 4, generator=rng(0)))


def test_only_what_can_be_trained_on_latents_is(tmp_path):
    with pytest.raises(ValueError, match="objective must be one of simple; got 'bound'"):
        fit(tmp_path / "a", objective="bound")
    with pytest.raises(ValueError, match="flip must be False for latents"):
        fit(tmp_path / "b", flip=True).fit()
    learned = LatentDDPM(DDPM(unet(out_channels=8), linear_schedule(9), variance="learned", clip=False), autoencoder())
    with pytest.raises(ValueError, match="variance must be fixed to train on latents, got 'learned'"):
        Trainer(learned, standard_latents(autoencoder(), images()), TrainConfig(steps=1))


@pytest.mark.slow
def test_diffusers_opens_what_is_saved(tmp_path):
    from diffusers import DDIMScheduler, DiffusionPipeline

    m = model(T=20, predicts="eps")
    m.save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline).__name__ == "LDMPipeline" and type(pipeline.vqvae).__name__ == "AutoencoderKL"
    x_T = torch.randn(2, 4, 4, 4, generator=rng(0))
    ours = m.decode(ddim_sample(m, x_T.shape, 20, x_T=x_T))
    pipeline.scheduler, drawn = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True), x_T
    pipeline.scheduler.set_timesteps(20)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            drawn = pipeline.scheduler.step(pipeline.unet(drawn, t).sample, t, drawn).prev_sample
        theirs = pipeline.vqvae.decode(drawn / pipeline.vqvae.config.scaling_factor).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=3, output_type="np").images.shape == (2, 8, 8, 3)


class Own(torch.nn.Module):
    "A network of a user's own, of latents."

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x_t, t):
        return self.layer(x_t)


def test_a_network_of_ones_own(tmp_path):
    plain = DDPM(lively(Own()), linear_schedule(9), clip=False)
    plain.image_shape = (4, 4, 6)
    m = LatentDDPM(plain, autoencoder())
    assert m.image_shape == (3, 8, 12)
    m.save_pretrained(tmp_path)
    again = DDPM.from_pretrained(tmp_path, net=Own())
    assert torch.equal(again.sample(2, 3, generator=rng(0)), m.sample(2, 3, generator=rng(0)))


def test_train_latent_on_the_command_line(tmp_path, capsys):
    from ddpm_lit.cli import main

    ae = autoencoder(1)
    ae.save_pretrained(tmp_path / "ae")
    run, quiet = str(tmp_path / "run"), ["--no-progress", "--track", "none"]
    words = ["train", "--latent", str(tmp_path / "ae"), "--data", "digits", "--predicts", "v", "--classes", "--T", "20"]
    words += ["--widths", "8", "--batch-size", "4", "--out", run, *quiet]
    assert main([*words, "--steps", "2"]) == 0, capsys.readouterr().err
    settings = json.loads((Path(run) / "train.json").read_text())
    assert settings["latent"] == str(tmp_path / "ae") and settings["widths"] == [8]
    with mock.patch.object(Autoencoder, "encode", side_effect=AssertionError):  # the cache is there
        assert main(["train", "--resume", "--out", run, "--steps", "3", *quiet]) == 0
    samples = ["sample", run, "-n", "20", "--steps", "3", "--guidance", "2", "--no-progress"]
    assert main([*samples, "--out", str(tmp_path / "s.npz")]) == 0
    assert np.load(tmp_path / "s.npz")["images"].shape[0] == 20
    capsys.readouterr()
    assert main(["evaluate", run, "--bpd", "--no-progress"]) == 2
    assert "a model of latents, 4×4×4, and has no bits/dim of images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--latent AE --flip", "--flip must be False for latents"),
        ("--latent AE --variance learned", "--variance must be fixed to train on latents, got 'learned'"),
        ("--latent AE --size 9", "height and width of x must be divisible by 2, got (9, 9)"),
        ("--latent AE --size 6", "--size must be a multiple of 2 for the preset digits; the images are 3×3"),
        ("--latent NOTHING", "run must be the folder of a training run, but"),
        ("--widths 8", "widths must come with --latent"),
        ("--latent COLOUR", "x must be (b, 3, h, w) for this autoencoder, got (1, 1, 8, 8)"),
    ],
)
def test_one_line_for_each_misuse(tmp_path, capsys, words, message):
    from ddpm_lit.cli import main

    autoencoder(1).save_pretrained(tmp_path / "AE")
    autoencoder(3).save_pretrained(tmp_path / "COLOUR")
    words = [str(tmp_path / word) if word.isupper() else word for word in words.split()]
    out = ["--out", str(tmp_path / "run"), "--no-progress", "--track", "none", "--steps", "1"]
    assert main(["train", "--data", "digits", *words, *out]) == 2
    assert message in capsys.readouterr().err.strip().split("\n")[-1]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, capsys):
    from ddpm_lit.cli import main

    autoencoder(1).save_pretrained(tmp_path / "AE")
    (tmp_path / "file").touch()
    words = ["train", "--data", "digits", "--latent", str(tmp_path / "AE"), "--out", str(tmp_path / "file" / "run")]
    assert main([*words, "--no-progress"]) == 2
    assert "out must be a folder that can be written to" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    "A pipeline with the configuration of Stable Diffusion 1 at small widths, written by diffusers, and its folder."
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pipeline")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1)
    parts = dict(
        vae=AutoencoderKL(
            block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=2, sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(vocab_size=len(words), max_position_embeddings=12, **sizes, **ends)
        ),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12),
        unet=lively(UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16, 16, 16), norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=2,
        )),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
            set_alpha_to_one=False, steps_offset=1,
        ),
    )  # fmt: skip
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made = StableDiffusionPipeline(**parts, **none)
    made.save_pretrained(folder / "sd")
    return made, folder / "sd"


@pytest.mark.slow
def test_a_stable_diffusion_pipeline_draws_the_same_here_and_there(pipeline, tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    theirs, folder = pipeline
    m, texts = DDPM.from_pretrained(folder), ["a red cat", "two dogs"]
    assert isinstance(m, LatentDDPM) and (m.sample_shape, m.image_shape) == ((4, 8, 8), (3, 64, 64))
    assert not m.clip and m.predicts == "eps" and m.s.alpha_bar[-1].item() == pytest.approx(0.00466, rel=2e-3)
    cond = m.prompts(texts)
    torch.testing.assert_close(cond["encoder_hidden_states"], theirs.encode_prompt(texts, "cpu", 1, False)[0])
    guided = classifier_free(m, 7.5, dict(encoder_hidden_states=m.prompts([""])["encoder_hidden_states"][0]))
    x_T = torch.randn(2, 4, 8, 8, generator=rng(0))
    ours = guided.decode(ddim_sample(guided, x_T.shape, 10, x_T=x_T, cond=cond))
    guided.with_net(m.net).save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    changes = dict(set_alpha_to_one=True, steps_offset=0, timestep_spacing="trailing", clip_sample=False)
    again.scheduler = DDIMScheduler.from_config(again.scheduler.config, **changes)
    again.set_progress_bar_config(disable=True)
    drawn = again(texts, num_inference_steps=10, guidance_scale=7.5, latents=x_T, output_type="np").images
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), drawn, rtol=0, atol=1e-4)


def test_a_pipeline_whose_text_encoder_is_damaged_says_so(pipeline, tmp_path):
    import shutil

    shutil.copytree(pipeline[1], tmp_path / "sd")
    (tmp_path / "sd" / "text_encoder" / "model.safetensors").unlink()
    m = DDPM.from_pretrained(tmp_path / "sd")  # the images need no words
    assert m.sample(1, 1, cond=dict(encoder_hidden_states=torch.zeros(1, 12, 16))).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="must hold a tokenizer and a text_encoder"):
        m.prompts(["a cat"])
    (tmp_path / "sd" / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="must describe an AutoencoderKL, got VQModel"):
        DDPM.from_pretrained(tmp_path / "sd")
