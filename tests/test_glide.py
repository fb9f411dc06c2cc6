"""Editing and CLIP guidance: the edges of `inpaint`, and the options of the command line."""

import numpy as np
import pytest
import torch
from doubles import mixing_model, rng, tiny_model
from PIL import Image

from ddpm_lit.exact import GaussianData, MixtureData, exact_ddpm
from ddpm_lit.forward import linear_schedule, q_sample
from ddpm_lit.glide import (
    EditOptions,
    InpaintNet,
    NoisedClip,
    given_known,
    info_nce,
    inpaint,
    random_masks,
    read_pictures,
    reads_mask,
    renoise,
)
from ddpm_lit.guidance import classifier_free, classifier_guided
from ddpm_lit.sampler import Sampling, ancestral_sample, ddim_sample

PICTURE = torch.rand(2, 1, 8, 8, generator=rng(0)) * 2 - 1
MASK = torch.arange(8) > 3  # the right half is to be drawn


@pytest.mark.parametrize("options", [{}, dict(sampler="ddim", steps=4), dict(steps=5, resample=3), dict(strength=0.5)])
def test_known_pixels_stay_and_others_are_drawn(options):
    x = inpaint(mixing_model(T=20), PICTURE, MASK, generator=rng(1), **options)
    assert torch.equal(x[..., :4], PICTURE[..., :4])
    assert (x[..., 4:] != PICTURE[..., 4:]).all()
    assert torch.equal(x, inpaint(mixing_model(T=20), PICTURE, MASK, generator=rng(1), **options))


def test_a_mask_of_nothing_and_of_everything():
    m = mixing_model(T=20)
    assert torch.equal(inpaint(m, PICTURE, torch.zeros(8, 8), generator=rng(0)), PICTURE)
    for options in (dict(sampler="ddim", steps=4), dict(steps=6), dict(sampler="ddim", steps=5, eta=1.0)):
        draw = ancestral_sample if "sampler" not in options else ddim_sample
        kwargs = {name: value for name, value in options.items() if name != "sampler"}
        without = draw(m, PICTURE.shape, generator=rng(1), **kwargs)
        assert torch.equal(inpaint(m, PICTURE, generator=rng(1), **options), without)


def test_the_mean_of_a_strided_chain_without_a_mask():
    data = GaussianData([0.5, -0.5], [[0.5, 0.3], [0.3, 0.4]])
    m, image = exact_ddpm(data, linear_schedule(100, 1e-3, 0.2)), torch.zeros(2000, 2).double()
    x, y = inpaint(m, image, steps=20, generator=rng(0)), ancestral_sample(m, image.shape, generator=rng(1), steps=20)
    assert (x.mean(0) - y.mean(0)).abs().max() < 0.1 and (x.T.cov() - y.T.cov()).abs().max() < 0.1


def test_renoising_composes_to_the_forward_process():
    s, n = linear_schedule(10, 1e-2, 0.4), 20_000
    x = torch.full((n,), 0.7).double()
    low, high = (q_sample(s, x, t, torch.randn(n, generator=rng(t)).double()) for t in (2, 7))
    up = renoise(low, s.alpha_bar[2], s.alpha_bar[7], rng(20))
    assert abs(up.mean() - high.mean()) < 0.05 and abs(up.var() - high.var()) < 0.05


@pytest.mark.parametrize("parts", [1, 3])
def test_conditioning_in_two_steps_is_conditioning_at_once(parts):
    draw, d = rng(parts), 4
    roots = torch.randn(parts, d, d, generator=draw).double()
    means = torch.randn(parts, d, generator=draw).double()
    data = MixtureData(torch.full((parts,), 1 / parts), means, roots @ roots.mT + 0.1 * torch.eye(d))
    x = torch.randn(d, generator=draw).double()
    once = given_known(data, torch.tensor([True, True, False, False]), x)
    first = given_known(data, torch.tensor([True, False, False, False]), x)
    twice = given_known(first, torch.tensor([True, False, False]), x[1:])
    points = torch.randn(5, 2, generator=draw).double()
    torch.testing.assert_close(once.log_prob(points), twice.log_prob(points))


def test_networks_that_see_are_found_under_guidance():
    m = tiny_model(num_class_embeds=3)
    seeing = m.with_net(InpaintNet(m.net)).eval()
    guided = classifier_free(seeing, 2.0, dict(class_labels=2))
    assert reads_mask(guided.net) and not reads_mask(m.net) and not reads_mask(lambda x, t: x)
    seen = []
    seeing.net.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cond = dict(class_labels=torch.tensor([0, 1]))
    x = inpaint(guided, PICTURE, MASK, steps=3, generator=rng(0), cond=cond)
    assert torch.equal(x[..., :4], PICTURE[..., :4])
    for batch in seen:
        known, mask = batch[:, 1:2], batch[:, 2:]
        assert torch.equal(known[:2], torch.where(MASK, 0.0, PICTURE)) and torch.equal(mask[0, 0, 0], MASK.float())


def test_masks_are_rectangles():
    for mask in random_masks(60, 7, 9, rng(0)):
        rows, columns = mask[0].any(1), mask[0].any(0)
        assert torch.equal(mask[0], (rows[:, None] & columns).float())


def test_info_nce_is_two_cross_entropies():
    f, g = torch.randn(5, 3, generator=rng(0)), torch.randn(5, 3, generator=rng(1))
    odds = (f @ g.T).exp()
    by_hand = -(odds.diag() / odds.sum(1)).log().mean() / 2 - (odds.diag() / odds.sum(0)).log().mean() / 2
    torch.testing.assert_close(info_nce(f, g), by_hand)
    torch.testing.assert_close(info_nce(f, g), info_nce(g, f))


def test_a_clip_guides_a_model_without_text():
    clip = NoisedClip(["a", "six"], 4, 64, width=8, hidden=16, generator=rng(0)).eval()
    m, start = mixing_model(T=20), torch.randn(2, 1, 8, 8, generator=rng(1))
    tokens = clip.tokenize(["a six", ""])
    guided = classifier_guided(m, clip, 3.0)
    x = ddim_sample(guided, start.shape, 4, x_T=start, cond=dict(caption=tokens))
    assert not torch.equal(x, ddim_sample(m, start.shape, 4, x_T=start))
    with pytest.raises(ValueError, match="unknown word 'sx'; known ones are six"):
        clip(start, torch.tensor([1, 2]), ["a sx", ""])


@pytest.fixture
def files(tmp_path):
    "Paths of a picture, its mask, and a mask of another size."
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(256, size=(16, 16), dtype=np.uint8)).save(tmp_path / "picture.png")
    Image.fromarray(np.repeat(np.repeat(np.eye(2, dtype=np.uint8) * 255, 8, 0), 8, 1)).save(tmp_path / "mask.png")
    Image.new("L", (9, 16)).save(tmp_path / "narrow.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def test_pictures_are_fitted_to_the_model(files):
    image, mask = read_pictures(files / "picture.png", files / "mask.png", (1, 8, 8))
    assert image.shape == (1, 1, 8, 8) and image.abs().max() <= 1
    assert torch.equal(mask[0, 0], torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool())
    assert read_pictures(files / "picture.png", None, (3, 16, 16))[0].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("picture", "mask", "message"),
    [
        ("picture.png", "narrow.png", "mask must have the size of the picture, 16×16, got 16×9"),
        ("text.png", None, "cannot be read as a picture"),
        ("none.png", None, "cannot be read as a picture"),
        ("red.png", None, "must be grey for this model"),
    ],
)
def test_pictures_that_do_not_fit(files, picture, mask, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        read_pictures(files / picture, mask and files / mask, (1, 8, 8))
    assert message in str(caught.value)


def test_options_make_another_sampling(files):
    plain, m = Sampling(steps=4, progress=False), tiny_model()
    edits = EditOptions(inpaint=files / "picture.png", mask=files / "mask.png")
    sampling = edits.sampling(plain)
    steps = []
    drawn = sampling.draw(m, 2, callback=lambda k, x: steps.append(k))
    assert steps == list(range(sampling.network_calls(m) + 1)) and drawn.shape == (2, 1, 8, 8)
    assert torch.equal(drawn, sampling.draw(m, 2)) and not torch.equal(drawn, sampling.draw(m, 2, batch=1))
    before = edits.request()
    Image.new("L", (16, 16)).save(files / "picture.png")
    assert edits.request() != before, "another picture is another request"
    assert EditOptions().request() == {} and EditOptions(prompt="").request() == {"prompt": ""}
