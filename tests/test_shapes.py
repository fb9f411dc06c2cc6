"""The annotations of the library hold: every public function and method runs once under a run-time checker.

jaxtyping's import hook has to be in place before the library is imported, so this file is also a script that the test
starts in a process of its own. The script records which functions were entered; one that was not is a failure, so that
a new chapter cannot forget its line here.
"""

import functools
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from beartype import BeartypeConf, beartype

# As for every static checker, 1 will do where a float is asked for.
checker = beartype(conf=BeartypeConf(is_pep484_tower=True))

# Needs the network; is slow.
NOT_CALLED = {"ddpm_lit.pretrained.download_model", "ddpm_lit.images.load_mnist5k"}
NOT_CALLED |= {"ddpm_lit.latent.PromptEncoder.read"}  # imports transformers; tests/test_latent.py calls it
# Abstract.
NOT_CALLED |= {f"ddpm_lit.sources.ImageSource.{name}" for name in ("name_of", "open", "select")}


def test_annotations_hold_under_a_run_time_checker():
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # all is small here
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, encoding="utf-8", env=os.environ | one
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].startswith("every annotation held")


# ---------------------------------------------------------------------------------------------- the script


class Names:
    "Every name that a module of the library defines, as one namespace."

    def __init__(self, modules):
        self.modules = modules

    def __getattr__(self, name: str):
        for module in self.modules:
            value = vars(module).get(name)
            if value is not None and getattr(value, "__module__", module.__name__) == module.__name__:
                return value
        raise AttributeError(f"no module defines {name}")


def calls(d: Names, folder: Path) -> None:
    "Call every function of the library, public or not, as its users do."
    import matplotlib
    import numpy as np
    import sympy
    import torch

    matplotlib.use("Agg")
    draw = d.rng(0)
    s = d.linear_schedule(6)
    x0 = torch.rand(2, 1, 8, 8, generator=draw) * 2 - 1
    eps = torch.randn(2, 1, 8, 8, generator=draw)
    t = torch.tensor([1, 5])

    # 00 checks
    d.symbolic("symbolic", sympy.Symbol("x") - sympy.Symbol("x"))
    d.identity("identity", x0, x0)
    d.expectation("expectation", torch.randn(1000, generator=draw), 0.0)
    d.rejects("rejects", lambda: d.identity("no", 1.0, 2.0))
    d.report("report", "detail")
    d.raises("raises", ValueError, "T must", lambda: d.linear_schedule(1))
    d.two_points(s)(x0, t)

    # 01 gaussian
    g = d.Gaussian(x0, torch.ones(()))
    g.log_prob(eps), g.entropy(), g.kl(g.affine(2.0, 1.0, 0.5)), g.sample(draw), g.sample()
    d.bayes(g, eps, 2.0), d.randn((2, 3), x0, draw)

    # 02 forward, 03 posterior: one step for all, and one for each; float32 and float64
    d.Schedule(s.beta), d.Schedule([0.1, 0.2]), repr(s), s.T, s.to("cpu")
    for step in (3, t):
        for x, e in ((x0, eps), (x0.double(), eps.double())):
            d.q_step(s, x, step), d.q_marginal(s, x, step), d.at(s.beta, step, x)
            x_t = d.q_sample(s, x, step, e)
            d.q_posterior(s, x, x_t, step), d.mean_from_x0(s, x_t, step, x), d.x0_from_mean(s, x_t, step, x)
            d.x0_from_eps(s, x_t, step, e), d.eps_from_x0(s, x_t, step, x)
            d.x0_from_v(s, x_t, step, e), d.v_from_x0(s, x_t, step, x)
    d.itself(s, x0, 1, x0), d.beta_tilde(s), d.posterior_coefficients(s), d.first_step_patched(s)

    # 04 reverse, 05 bound, 06 objective: every word that a model can be told
    d.one_of("word", "a", ("a", "b"))
    for predicts in d.PREDICTS:
        for variance in d.VARIANCES:
            copies = 2 if variance == "learned" else 1
            m = d.DDPM(lambda x, t, n=copies: 0.1 * torch.cat([x] * n, dim=1), s, predicts, variance).to("cpu")
            m.p_step(x0, 0), m.p_step(x0, t, clip=False), m.x0_hat(x0, t, x0), m.target(x0, t, eps)
            d.simple_loss(m, x0, draw), d.simple_loss(m, x0[:, :, :4]), d.vlb_terms(m, x0, draw), m.reverse(x0, t)
            d.bound_loss(m, x0, draw), d.bound_loss(m, x0.double(), draw, (1, 2)), d.noised(s, x0, None, (0, 1))
    d.kl_term(m, x0, eps, 3), d.kl_term(m, x0, eps, t), d.decoder_term(m, x0, eps), d.prior_term(s, x0)
    d.vlb_weight(s), d.vlb_weight(s, "v", "beta"), d.error_factor(s, "mean")
    d.bits_per_dim(d.per_image(x0), x0), d.discretized_log_prob(g, x0)

    # 07 exact: one law, many laws, flat laws
    eye = torch.eye(64, dtype=torch.float64)
    law = d.MixtureData([0.5, 0.5], x0.flatten(1), torch.stack([eye, 0.1 * eye])).to("cpu")
    flat, step, x = d.GaussianData(x0[0].flatten(), 0.0), law.reverse_step(s, eps, t), eps.flatten(1)
    step.sample(generator=draw), step.mean(), step.mean_variance(), flat.sample(3), flat.posterior(s, eps, 3).mean()
    seen = law.affine(2.0).given(x, 1.0, 0.1)
    for some in (law, law.marginal(s, 3), law.marginal(s, t), law.posterior(s, eps, t), seen):
        some.log_prob(x), some.nll(x), some.score(x), some.responsibilities(x), some.need_density()
        some.back(some.along(x)) if some.weights.ndim == 1 else some.log_parts(x)
    d.level(s.beta, t), d.level(s.beta, 3), law.eps(s, eps, t), law.eps(s, eps.double(), 3)
    floor = d.error_floor(law, s, 5, draw)
    d.expected_bound(law, s, floor, d.optimal_variance(s, floor))
    for variance, known in (("beta", None), ("learned", floor)):
        d.exact_ddpm(law, s, "v", variance, known).p_step(eps, t)

    # 09b conditional: tokens, with and without a mask
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    reads = dict(down_block_types=down, up_block_types=up, cross_attention_dim=6, attention_head_dim=2)
    reads |= dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, in_channels=1, out_channels=1)
    net, tokens = d.ConditionalUNet(**reads, generator=draw), torch.zeros(len(x0), 3, 6)
    net(x0, t, tokens), net(x0, 3, tokens, encoder_attention_mask=torch.ones(len(x0), 3, dtype=torch.bool))
    d.check_conditional(d.CONDITIONAL_DEFAULTS), d.build_cross_attention(net.config, "CrossAttnDownBlock2D", 0)
    d.build_self_attention(d.UNET_DEFAULTS, "DownBlock2D", 0)

    # 08 layers, 09 unet, 12 pretrained: the smallest network with every part, each variance; read back
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    (
        d.sinusoidal(t, 8),
        d.sinusoidal(t / 2, 8),
        d.zero_init(torch.nn.Linear(2, 2)),
        d.avg_pool_2x(x0),
        d.nearest_2x(x0),
        d.silu(x0),
    )
    resnet = {"down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2}
    for kind, labels in (("timestep", t), ("identity", torch.zeros(2, 32)), (None, t)):
        changes = resnet | small | dict(class_embed_type=kind, num_class_embeds=10, dropout=0.1)
        net = d.UNet.from_preset("digits", draw, **changes, resnet_time_scale_shift="scale_shift")
        net.gradient_checkpointing = True
        net(x0, t, labels).sum().backward()
    d.Upsample(8)(torch.zeros(1, 8, 16, 16)), [d.schedule_by_name(kind, 9, 0.1, 0.2) for kind in d.SCHEDULES]
    (
        d.scaled_attention(*torch.zeros(3, 1, 2, 4, 8)),
        d.scaled_attention(*torch.zeros(3, 1, 2, 4, 8, dtype=torch.bfloat16)),
    )
    for variance in d.VARIANCES:
        net = d.UNet.from_preset("digits", draw, **small, out_channels=2 if variance == "learned" else 1)
        net(x0, t), net(x0, 3), net.double()(x0.double(), t), net.float()
        m = d.DDPM(net, s, variance=variance)
        m.save_pretrained(folder / variance)
        d.simple_loss(d.DDPM.from_pretrained(folder / variance), x0, draw), d.load_run(folder / variance), m.device
    classes = d.DDPM(d.UNet.from_preset("digits", draw, **small, num_class_embeds=10), s)
    y = dict(class_labels=t)
    d.class_condition(classes.net, t), d.vlb_terms(classes, x0, draw, cond=y), d.simple_loss(classes, x0, draw, cond=y)
    own = d.DDPM(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), s).with_net(OneLayer())
    own.image_shape = (1, 8, 8)
    own.save_pretrained(folder / "own"), d.DDPM.from_pretrained(folder / "own", net=OneLayer())

    # 13 images, 14 decoding and sources, 15 loading
    digits, path = d.load_digits(), folder / "images.npz"
    np.savez(path, images=digits.pixels[:100, 0].numpy(), labels=digits.labels[:100].numpy())
    few = d.load_images(path)
    len(few), repr(few), d.image_grid(few), d.image_grid(few.pixels, 4), d.describe_value(few)
    d.save_grid(folder / "grid.png", few), d.show(few, title="digits")
    d.to_pixels(d.to_network(few.pixels)), d.to_network(few.pixels, torch.float64)
    folder_of_images(folder, d, digits.pixels[:6, 0].numpy())
    for images in (few, d.load_images(folder / "pictures", memory=0)):
        for resident in (None, False):
            batches = d.ImageBatches(images, 8, flip=True, resident=resident, workers=0, process=(1, 2))
            next(iter(batches)), batches.batch(1), batches.describe(), images.read([1, 0]), len(images), repr(images)
            next(iter(d.ImageBatches(images, 8, resident=resident, workers=0, labels=True))), images.select([1, 0])

    # 14b emoji, on four drawings
    emoji, drawings = importlib.import_module("ddpm_lit.emoji"), d.named_drawings()[:4]
    with (
        mock.patch.object(emoji, "named_drawings", lambda: drawings),
        mock.patch("torch.hub.get_dir", lambda: str(folder)),
    ):
        d.emoji_attributes(d.load_emoji(8, "train")), d.emoji_attributes(["a penguin"]), d.load_images("emoji", 8)

    # 10 files, 11 processes, 16 training
    config = dict(batch_size=4, out=str(folder / "run"), progress=False, objective="bound")
    again = d.TrainConfig(steps=3, resume=True, **config)
    config = d.TrainConfig(steps=2, accumulate=2, save_every=1, **config)
    trainer = d.Trainer(m, few, config, draw=lambda m: few.pixels[:4])
    trainer.fit(), d.DDPM.from_pretrained(d.model_folder(folder / "run"))
    trainer = d.Trainer(d.DDPM.from_pretrained(folder / "run" / "model"), few, again)
    trainer.fit(), trainer.log.add(1, torch.tensor(0.5), torch.tensor(1.0)), d.import_accelerate()
    repr(d.Stopped(15, 3, None))
    claim = d.FolderClaim(folder / "run")
    claim.path.write_text("{}")  # of a run elsewhere
    d.is_alive(claim.path, claim.holder(), claim.mine), claim.path.unlink(), d.as_plain(folder), d.printable(folder)
    with d.fork_rng(0, torch.device("cpu")), d.error_advice(config, None):
        d.end_processes()
    (
        d.reset_peak_memory(torch.device("cpu")),
        d.peak_memory(torch.device("cpu")),
        trainer.load_state_dict(trainer.state_dict()),
    )
    d.drop_labels(t, 9, 0.5, draw), d.drop_labels(t, 9, 0.5, draw, (1, 2))
    labelled = d.Trainer(classes, digits, d.TrainConfig(steps=2, batch_size=4, progress=False), on_step=print_nothing)
    labelled.fit()

    # 17 sampling
    for variance in d.VARIANCES:
        m = d.DDPM.from_pretrained(folder / variance)
        d.ancestral_sample(m, x0.shape, generator=draw), d.ancestral_sample(m, x0.shape, eps, steps=3)
    d.ddim_sample(m, x0.shape, 3), d.ddim_sample(m, x0.shape, 3, 1.0, eps, draw, clip=0.9, batch_size=1)
    d.ddim_invert(d.DDPM.from_pretrained(folder / "beta"), x0, 3, 2), d.limiter(True)(x0), d.limiter(0.9)(x0)
    m, plan, sampler = d.DDPM(lambda x, t: 0.1 * x, s), d.ancestral_plan(s), importlib.import_module("ddpm_lit.sampler")
    row, step = d.step_table(m, plan, x0)[0], d.compiled_step()  # the checker cannot be compiled, so it is left out:
    sampler.compiled_step = lambda: d.sampler_step
    d.sampler_step(m, x0, t, row), d.sampler_step(m, x0.double(), t, row.double(), eps.double(), 0.9)
    d.replayed_step(m, x0, t, row, eps, False), list(d.sample_steps(m, plan, x0, draw, True))
    d.ddim_sample(m, x0.shape, 3, 1.0, compile=True), callable(step)
    classes.sample(2, 2, cond=y, generator=draw), d.ddim_invert(classes, x0, 2, cond=y)
    d.Sampling(steps=2, progress=False).draw(classes, 2, cond=y)

    # 30 improved, 31 solvers
    m = d.DDPM(lambda x, t: 0.1 * torch.cat([x, x], dim=1), s, variance="learned")
    history = d.make_objective(m, "importance")
    history(m, x0, draw), history.load_state_dict(history.state_dict()), d.hybrid_loss(m, x0, draw)
    d.dpm_sample(m, x0.shape, 3), d.heun_sample(classes, x0.shape, 2, cond=y, spacing="log_snr")
    d.dpm_plan(s, d.solver_times(s, 3)), d.heun_plan(s, d.solver_times(s, 3))
    d.flow_log_prob(m, x0[..., :2, :2].double(), 2), d.flow_log_prob(classes, x0, 2, y)

    # 18 metrics, 19 evaluation: images in memory, in files, as bare pixels, in batches; all terms and some
    features, pixels = d.ClassifierFeatures(few, held_out=30), digits.pixels[:50]
    known = features(pixels)
    features.distance(pixels, few.pixels), features.flat(pixels), features.probabilities(known)
    for some in (few, pixels, [pixels[:20], pixels[20:]]):
        list(d.extract_features(features, some, 30)), d.image_statistics(features, some, 40).save(folder / "known.npz")
    running, stored = d.RunningStatistics("words"), d.load_images(folder / "pictures", memory=0)
    running.add(known), running.join(50, *d.feature_statistics(known.float(), "words")[:2])
    running.result().distance(d.FeatureStatistics(torch.zeros(32).double(), torch.eye(32).double()))
    (
        d.frechet_distance(*d.FeatureStatistics.load(folder / "known.npz")[:2], np.zeros(32), np.eye(32)),
        d.matrix_sqrt(d.matrix_sqrt(eye)),
    )
    for x in (known, known.float()):
        (
            d.precision_recall(samples=x, real=x[:30]),
            d.density_coverage(samples=x, real=x[:30]),
            d.kernel_distance(samples=x, real=x[:30], size=5, subsets=2),
            d.nearest_ratio(samples=x[:9], train=x, held_out=x[:9]),
            d.kth_neighbour_distance(x, 1, 20),
            d.fraction_within(x, x[:9], torch.ones(9).to(x)),
        )
        d.inception_score(features.probabilities(x.double()).to(x), 5)
    inception = d.InceptionFeatures(folder / "net.pt", "cpu", *inception_like(folder / "net.pt"))
    inception.probabilities(inception(pixels[:3]))
    m, any_size, cache = d.DDPM.from_pretrained(folder / "learned"), d.DDPM(lambda x, t: x, s), {}
    bits = d.evaluate_bpd(m, few, 4, 3, draw, cache=cache), d.evaluate_bpd(any_size, stored, calls=2)
    bits[0].decoder, bits[1].kl, d.rate_distortion(bits[0]), d.bound_sums(any_size, x0.double()), d.shard_batches(5, 2)
    d.means_and_errors(d.bound_sums(m, x0, 3, draw), 2, 3), [d.all_reduce_sum(x) for x in d.zero_sums(3).values()]
    d.spawn_generators(None, 2), [list(d.sample_terms(s, k, 2, None)) for k in (None, 2, 6)]
    d.progress_bar(disable=True, desc="x", total=1, unit="call").close()
    d.evaluate_samples(pixels, digits, n_reference=60), d.evaluate_model(m, few, n=4, calls=2)

    # 32 guidance: the exact classes of a mixture, and a network with labels
    members, y = torch.tensor([[True, False], [False, True], [True, True]]), dict(class_labels=torch.tensor([0, 1]))
    of_class, by_label = d.class_log_prob(law, s, members), d.conditional_ddpm(law, s, members)
    d.classifier_guided(d.exact_ddpm(law, s), of_class, 2.0).p_step(x0, t, **y)
    for net, null in ((by_label, 2), (classes, 9)):
        guided = d.classifier_free(net, torch.linspace(0, 2, 6), dict(class_labels=null)).to("cpu")
        guided.p_step(x0, t, **y), guided.p_step(x0, 3, **y), d.simple_loss(guided, x0, draw, cond=y)
        d.classifier_guided(guided, of_class, 1, conditional=True).p_step(x0, t, **y)
    d.scale_table(1, 6), d.check_null(None, y), d.null_rows("y", 3, y["class_labels"])

    # 33 autoencoders, and diffusion in their latents
    levels = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    grey = dict(block_out_channels=(4, 4), norm_num_groups=2, in_channels=1, out_channels=1)
    ae, red = d.Autoencoder(**grey, **levels), torch.zeros(2, 3, 4, 4)
    d.AutoencoderLoss(colour_weight=1.0).terms(red, red + 1, d.Gaussian(red, red + 1))
    ae.objective()(ae, x0, draw), ae.decode(ae.encode(x0).sample(draw)), d.PlainBlock(4, 8, 2)(torch.zeros(1, 4, 4, 4))
    d.reconstruction_error(d.reconstruct(ae, few), few.pixels), ae.save_pretrained(folder / "coder")
    latents = d.cached_latents(d.Autoencoder.from_pretrained(folder / "coder"), digits, folder / "latents")
    net = d.UNet.from_preset("digits", in_channels=4, out_channels=4, sample_size=4)
    latents.try_read(torch.arange(2)), latents.read([0])
    lm = d.LatentDDPM(d.DDPM(net, s, clip=False), latents.select([0, 1]).autoencoder)
    lm.save_pretrained(folder / "both"), d.DDPM.from_pretrained(folder / "both").sample(2, 2), lm.with_net(net)
    d.Trainer(lm, latents, d.TrainConfig(steps=1, batch_size=4, progress=False)).fit()
    lm.text_encoder = lambda texts, device: torch.zeros(len(texts), 3, 4)
    lm.prompts(["a", "b"]), lm.objective(), d.PromptEncoder(folder)

    # 34 captions and a network that reads them, 35 pictures completed, CLIP; tables and models of the package
    words = ("a thin zero leaning left", "a bold nine upright")
    captioned, x = d.Images(digits.pixels[:2], digits.labels[:2], captions=words), d.to_network(digits.pixels[:2])
    reads = d.TextUNet.from_captions(words, "digits", block_out_channels=(8, 16))
    reads.tokenize.decode(reads.tokenize.encode(words[0])), d.caption_rows(reads, captioned)
    by_words = d.DDPM(reads, d.linear_schedule(20), "v")
    by_words.save_pretrained(folder / "text"), d.DDPM.from_pretrained(folder / "text")
    ruler = d.Ruler(digits)
    ruler.agreement(captioned.pixels, ruler.captions(digits)[:2])
    seeing, mask = d.DDPM(d.InpaintNet(reads), by_words.s, "v"), d.random_masks(2, 8, 8)
    seeing.save_pretrained(folder / "seeing"), d.DDPM.from_pretrained(folder / "seeing")
    d.inpaint(seeing, x, mask, steps=2, resample=2), d.reads_mask(seeing.net)
    d.given_known(d.MixtureData([1.0], [[0.0, 1.0]], 0.1), torch.tensor([True, False]), torch.zeros(2))
    d.info_nce(x.flatten(1), x.flatten(1)), d.NoisedClip(["a"], 4, 64)(x, torch.zeros(2, dtype=torch.int64), ["a", "a"])
    d.save_grid(folder / "one.png", captioned.pixels[:1], columns=1)
    edited = d.EditedSampling(steps=2, prompt=words[0], picture=folder / "one.png", progress=False, sampler="ddim")
    edited.draw(by_words, 2), edited.network_calls(by_words)
    d.ResultTable(str(folder / "table.jsonl")).add(a=1), d.ResultTable(str(folder / "table.jsonl")).rows(a=1)
    d.shipped_recipe("digits")

    # 39 options, 40 the command line: every command of it
    from ddpm_lit.cli import SafeStream, main

    run, little = str(folder / "demo"), ["--no-progress", "--steps", "2"]
    assert main(["demo", *little, "--out", run, "--samples", "4", "--sampling-steps", "2"]) == 0
    assert main(["train", *little, "--out", run, "--T", "5"]) == main(["train", "--resume", "--out", run]) == 0
    SafeStream(None).discard(), d.check_unambiguous((100, 8, 8))
    labelled = ["--out", str(folder / "labels")]
    assert main(["train", *little, *labelled, "--classes", "--layers", "1", "--batch-size", "4"]) == 0
    words = ["--labels", "0-1", "--guidance", "3", "-n", "4", "--out", str(folder / "rows.png")]
    assert main(["sample", labelled[1], *little, *words]) == 0
    forms = [[], ["--format", "npz"], ["--format", "png"], ["--every", "1"]]
    for words, name in zip(forms, ("two.png", "two.npz", "two", "two.gif"), strict=True):
        assert main(["sample", run, *little, "-n", "2", "--batch-size", "1", "--out", str(folder / name), *words]) == 0
    assert main(["sample", run, "--steps", "0"]) == 2
    coder = ["train-autoencoder", *little, "--widths", "8", "8", "--batch-size", "4", "--out", str(folder / "ae")]
    assert main([*coder, "--data", "digits"]) == main([coder[0], "--resume", *coder[-2:], "--no-progress"]) == 0
    latent = ["train", *little, "--latent", str(folder / "ae"), "--widths", "8", "--out", str(folder / "ae-run")]
    assert main(latent) == 0
    words = ["-n", "4", "--batch-size", "3", "--bpd-calls", "2", "--reference", str(folder / "real.npz")]
    assert main(["evaluate", run, *little, *words]) == main(["evaluate", run, *little, *words]) == 0


def print_nothing(step, loss) -> None:
    assert step in (1, 2) and loss.ndim == 0


class OneLayer(__import__("torch").nn.Module):
    "A network of one's own."

    def __init__(self):
        import torch

        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x_t, t):
        return self.layer(x_t)


def inception_like(path: Path) -> tuple[str, str]:
    "Write a network with the mouth and the hands of Inception, but no brain; the address it is from, and its checksum."
    import hashlib
    import warnings

    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = torch.nn.Linear(2048, 1008)

        def forward(self, x, return_features: bool = False):
            features = x.float().flatten(1).mean(1, keepdim=True).expand(-1, 2048)
            return features if return_features else self.output(features)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Net()), str(path))
    return "https://example.org/net.pt", hashlib.sha256(path.read_bytes()).hexdigest()


def folder_of_images(folder: Path, d, pixels) -> None:
    "Every function that reads image files and tables, on four images, one in colour, and two broken files."
    import contextlib
    import warnings

    import numpy as np
    from PIL import Image

    root = folder / "pictures"
    for i, array in enumerate(pixels):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([array] * 3, -1) if i == 2 else array).save(root / "ab"[i % 2] / f"{i}.png")
    (root / "a/4.png").write_bytes((root / "a/4.png").read_bytes()[:-40])
    (root / "b/5.png").write_text("no image")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    hf = d.import_datasets()
    features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=["a", "b"]))
    features["text"] = hf.Value("string")
    table = {"image": [Image.fromarray(array) for array in pixels], "label": [0, 1] * 3, "text": list("abcdef")}
    (root / "metadata.jsonl").write_text('{"file_name": "a/0.png", "text": "zero"}')
    d.read_text(root / "metadata.jsonl")
    with d.quiet_datasets(False):
        hf.Dataset.from_dict(table, features).to_parquet(folder / "few.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source, broken in ((root, 2), (folder / "few.parquet", 0)):  # no more: a wrong type would look like one
            few = d.load_images(source, memory=0, max_broken=broken)
            d.load_images(source, n=5, max_broken=broken), d.load_images(source, 4)
            few.read(range(4)), few.source.name_of(0)
        d.load_images(folder / "few.parquet", (4, 3), stream=True, max_broken=0)
    grey = np.full((4, 4), 3, np.int32)
    (
        d.to_uint8(Image.fromarray(grey.astype(np.uint16))),
        d.to_uint8(Image.fromarray(grey.astype(np.uint8)).convert("LA")),
    )
    cache = d.CachedPictures(folder / "cached", dict(n=1, batch_size=1))
    cache.save(0, d.load_images("digits").pixels[:1]), cache.read(0)
    d.load_images("digits", 4), d.parquet_files(folder, "train"), d.split_of("data/train-00000-of-00001.parquet")
    with contextlib.suppress(ValueError):
        d.load_images("digit")


REFUSED = """
    d.q_marginal(s, x0.byte(), 1)
    d.at(s.beta[None], 1, x0)
    d.at(s.beta.float(), 1, x0)
    d.q_sample(s, x0, t.float(), x0)
    d.kl_term(m, x0, x0[:1], 1)
    d.per_image(x0.byte())
    d.per_image(torch.zeros(()))
    d.Schedule(s.beta.float())
    d.sinusoidal(torch.zeros(2, 2, dtype=torch.int64), 8)
    d.TimeEmbedding(8, 16)(torch.zeros(8))
    d.Attention(8, 8, 4, 1e-5)(torch.zeros(2, 8, 4))
    d.matrix_sqrt(torch.zeros(2, 3).double())
    d.RunningStatistics().add(torch.zeros(2, 3, 4))
    d.precision_recall(samples=x0, real=x0)
    d.inception_score(torch.zeros(4, 2).long())
    d.bound_loss(m, x0.byte())
"""


def wrong_shapes_that_were_taken() -> list[str]:
    "The lines of `REFUSED` that the checker let through; each holds one wrong shape or type."
    import torch
    from jaxtyping import TypeCheckError

    import ddpm_lit as package

    d = Names(
        [
            importlib.import_module(f"ddpm_lit.{m.name}")
            for m in pkgutil.iter_modules(package.__path__)
            if m.name[0] != "_"
        ]
    )
    s, t, x0 = d.linear_schedule(6), torch.tensor([1, 5]), torch.zeros(2, 1, 8, 8)
    names = {"d": d, "torch": torch, "s": s, "t": t, "x0": x0, "m": d.DDPM(lambda x, t: x, s)}
    taken = []
    for line in REFUSED.split("\n"):
        try:
            exec(line.strip(), names)
        except TypeCheckError:
            continue
        taken += [line] if line.strip() else []
    return taken


def watch(modules, entered: set[str]) -> set[str]:
    "Make every public function and method of the modules note its full name in `entered`; returns all those names."
    names, functions = set(), {}

    def noting(name, function):
        @functools.wraps(function)
        def noted(*args, **kwargs):
            entered.add(name)
            return function(*args, **kwargs)

        names.add(name)
        return noted

    for module in modules:
        for word, value in list(vars(module).items()):
            name = f"{module.__name__}.{word}"
            if word[0] == "_" or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                functions[value] = noting(name, value)
            elif inspect.isclass(value):
                for key, method in list(vars(value).items()):
                    plain = getattr(method, "__func__", method)
                    if inspect.isfunction(plain) and key[0] != "_" and plain.__module__ == module.__name__:
                        noted = noting(f"{name}.{key}", plain)
                        setattr(value, key, type(method)(noted) if plain is not method else noted)
    for module in modules:
        for word, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in functions:
                setattr(module, word, functions[value])
    return names


def main() -> int:
    from jaxtyping import install_import_hook

    install_import_hook("ddpm_lit", "test_shapes.checker")
    package = importlib.import_module("ddpm_lit")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")
    modules, entered = [importlib.import_module(f"ddpm_lit.{name}") for name in names], set()
    wanted = watch(modules, entered) - NOT_CALLED
    with tempfile.TemporaryDirectory() as folder:
        calls(Names(modules), Path(folder))

    forgotten, taken = sorted(wanted - entered), wrong_shapes_that_were_taken()
    print("\n".join([f"not called: {name}" for name in forgotten] + [f"not refused: {line.strip()}" for line in taken]))
    print("FAILED" if forgotten or taken else f"every annotation held: {len(wanted)} functions")
    return bool(forgotten or taken)


if __name__ == "__main__":
    sys.exit(main())
