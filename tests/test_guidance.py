"""Guided models in every sampler, against diffusers' guider, and what they cost; misuse, one line each."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doubles import tiny_model, two_points
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lit import sampler
from ddpm_lit.bound import vlb_terms
from ddpm_lit.checks import rng
from ddpm_lit.ddpm import DDPM
from ddpm_lit.exact import MixtureData, exact_ddpm
from ddpm_lit.files import CachedSamples
from ddpm_lit.forward import linear_schedule
from ddpm_lit.guidance import class_log_prob, classifier_free, classifier_guided, conditional_ddpm
from ddpm_lit.metrics import evaluate_samples
from ddpm_lit.objective import simple_loss
from ddpm_lit.sampler import Sampling, ancestral_sample, ddim_sample, draw_batches, sampler_step

SHAPE, NULL, T = (4, 1, 8, 8), dict(class_labels=4), 20
Y = dict(class_labels=torch.tensor([0, 3, 1, 2]))
SAMPLERS = {"ancestral": ancestral_sample, "ddim": ddim_sample}


class Classifier(nn.Module):
    "A small noised classifier of four classes."

    def __init__(self):
        super().__init__()
        self.image, self.time = nn.Linear(64, 4), nn.Embedding(T, 4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=rng(1)) / 3

    def forward(self, x_t, t, class_labels):
        logits = torch.tanh(self.image(x_t.flatten(1)) + self.time(t))
        return logits.log_softmax(1)[torch.arange(len(x_t), device=x_t.device), class_labels]


def free(scale=3.0, **changes):
    return classifier_free(tiny_model(num_class_embeds=5, **changes), scale, NULL)


def by_classifier(scale=3.0, **changes):
    return classifier_guided(tiny_model(**changes), Classifier(), scale)


ROOT = Path(__file__).parents[1]
GUIDED = {"free": free, "classifier": by_classifier}


def noise(shape=SHAPE, seed=2):
    return torch.randn(shape, generator=rng(seed))


# Against another library.


@pytest.mark.parametrize("original", [False, True])
def test_step_for_step_as_the_guider_of_diffusers(original):
    guiders, schedulers = pytest.importorskip("diffusers.guiders"), pytest.importorskip("diffusers")
    m, scale = tiny_model(num_class_embeds=5), 3.0
    guider = guiders.ClassifierFreeGuidance(scale - original, use_original_formulation=original)
    options = dict(clip_sample=True, set_alpha_to_one=True, timestep_spacing="trailing")
    theirs = schedulers.DDIMScheduler(T, trained_betas=m.s.beta.numpy(), **options)
    theirs.set_timesteps(5)
    x, paths = noise(), []
    for i, t in enumerate(theirs.timesteps):
        guider.set_state(step=i, num_inference_steps=5, timestep=t)
        with torch.no_grad():
            of_null, given = (m.net(x, t, label) for label in (torch.full((4,), 4), Y["class_labels"]))
        assert guider.num_conditions == 2
        x = theirs.step(guider.forward(given, of_null).pred, t, x, use_clipped_model_output=True).prev_sample
        paths.append(x)
    seen = []
    ddim_sample(classifier_free(m, scale, NULL), SHAPE, 5, x_T=noise(), cond=Y, callback=lambda t, x, _: seen.append(x))
    torch.testing.assert_close(torch.stack(seen), torch.stack(paths), rtol=1e-4, atol=1e-5)
    other = ddim_sample(classifier_free(m, scale + 1, NULL), SHAPE, 5, x_T=noise(), cond=Y)
    assert not torch.allclose(other, seen[-1], atol=1e-2), "the tolerance refuses the other convention"


# What it costs.


def test_one_call_a_step_with_two_rows_an_image_and_twice_the_operations():
    rows, flops = [], []
    m = tiny_model(num_class_embeds=5)
    m.net.register_forward_hook(lambda net, args, out: rows.append(len(out)))
    for scale in (1, 3.0, 0):
        with FlopCounterMode(display=False) as counter:
            ddim_sample(classifier_free(m, scale, NULL), SHAPE, 2, x_T=noise(), cond=Y)
        flops.append(counter.get_total_flops())
    assert rows == [4, 4, 8, 8, 4, 4] and flops[0] == flops[2]
    assert flops[1] <= 2.05 * flops[0]


# In every sampler.


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("variance", ["beta_tilde", "learned"])
def test_batches_do_not_matter_and_nothing_is_left_changed(kind, name, variance):
    m, sample = GUIDED[kind](variance=variance).train(), SAMPLERS[name]
    before = [p.clone() for p in m.parameters()]
    expected = sample(m, SHAPE, x_T=noise(), generator=rng(3), cond=Y, steps=4, batch_size=4)
    if name == "ddim":
        assert torch.allclose(sample(m, SHAPE, x_T=noise(), cond=Y, steps=4, batch_size=3), expected, atol=1e-5)
    assert m.training and all(p.grad is None for p in m.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, m.parameters(), strict=True))
    unguided = GUIDED[kind](1.0 if kind == "free" else 0.0, variance=variance)
    plain = sample(unguided, SHAPE, x_T=noise(), generator=rng(3), cond=Y, steps=4)
    assert not torch.allclose(plain, expected, atol=1e-2), "guidance matters"


class Labelled(nn.Module):
    "A network with labels and a learned variance that is compiled in no time."

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(5, 2, _weight=torch.randn(5, 2, generator=rng(1)))

    def forward(self, x_t, t, class_labels):
        return torch.tanh(x_t + self.label(class_labels)[:, :, None, None] + t[:, None, None, None] / T)


@pytest.mark.parametrize("kind", GUIDED)
def test_compiled_it_draws_the_same(kind, monkeypatch):
    graphs, m = [], DDPM(Labelled(), linear_schedule(T), variance="learned")
    m = classifier_free(m, 3.0, NULL) if kind == "free" else classifier_guided(m, Classifier(), 3.0, conditional=True)
    step = torch.compile(sampler_step, backend=lambda g, _: graphs.append(g) or g, dynamic=False, fullgraph=True)
    monkeypatch.setattr(sampler, "compiled_step", lambda: step)
    torch.compiler.reset()
    for sample in SAMPLERS.values():
        drawn = [sample(m, SHAPE, x_T=noise(), generator=rng(3), cond=Y, steps=3, compile=c) for c in (True, False)]
        torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("kind", GUIDED)
def test_pixels_by_one_process_and_by_two(kind, tmp_path, monkeypatch):
    m, sampling = GUIDED[kind](), Sampling(steps=3, seed=5, progress=False)
    assert m.image_shape == SHAPE[1:] and m.device.type == "cpu"
    labels = torch.tensor([0, 3, 1, 1, 2, 0, 3])
    one, *two = (CachedSamples(tmp_path / name, dict(n=7, batch_size=3)) for name in ("one", "rank 0", "rank 1"))
    draw_batches(sampling, m, one, labels)
    for rank, cache in enumerate(two):
        process = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: None)
        monkeypatch.setattr(sampler, "this_process", lambda process=process: process)
        draw_batches(sampling, m, cache, labels)
    assert [cache.missing() for cache in two] == [[1], [0, 2]]
    assert all((one.read(i) == two[i % 2].read(i)).all() for i in range(3))
    pixels = torch.cat([torch.from_numpy(batch) for batch in one])
    expected = m.sample(3, 3, cond=dict(class_labels=labels[:3]), generator=sampler.batch_generator(5, 0))
    assert torch.equal(pixels[:3], expected)
    assert evaluate_samples(pixels, pixels, features=lambda p: p.flatten(1)[:, :2].double())["precision"] == 1.0


@pytest.mark.parametrize("kind", GUIDED)
def test_losses_and_bounds_take_a_guided_model(kind):
    m, x0 = GUIDED[kind](), noise().clamp(-1, 1)
    assert vlb_terms(m, x0, rng(4), cond=Y).total.isfinite().all()
    simple_loss(m, x0, rng(4), cond=Y).backward()
    assert m.net.net.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_keeps_the_dtype_and_moves_with_its_tables(kind, dtype):
    m, x = GUIDED[kind](torch.linspace(1, 3, T)).to(dtype), noise().to(dtype)
    assert m(x, 5, **Y)[0].dtype == dtype and m.net.table.dtype == torch.float64
    assert m.to("meta").net.table.is_meta and m.net.net.conv_in.weight.is_meta


# Scales, conditions.


def test_a_scale_for_each_timestep_guides_in_an_interval():
    inside = torch.where(torch.arange(T) < 10, 3.0, 1.0)
    interval, on, off = free(inside), free(3.0), free(1.0)
    for t in (0, 9, 10, 19):
        expected = (on if t < 10 else off)(noise(), t, **Y)[0]
        torch.testing.assert_close(interval(noise(), t, **Y)[0], expected, rtol=1e-4, atol=1e-5)
    each = interval(noise(), torch.tensor([0, 15, 9, 19]), **Y)[0]
    torch.testing.assert_close(each[1], off(noise(), 15, **Y)[0][1], rtol=1e-4, atol=1e-5)


def test_other_conditions_go_to_both_rows_and_null_values_may_be_tensors():
    seen = []

    def net(x, t, text, mask, low):
        seen.append((text, mask, low))
        return x * text.sum(1)[:, None]

    null = dict(text=torch.tensor([7.0, 8.0]), mask=False)
    m = classifier_free(DDPM(net, linear_schedule(T)), 2.0, null)
    text, mask, low = torch.eye(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.arange(3)[:, None]
    out, _ = m(torch.ones(3, 1), 4, text=text, mask=mask, low=low)
    got_text, got_mask, got_low = seen[0]
    assert got_text[:3].eq(null["text"]).all() and got_text[3:].equal(text) and got_low.equal(torch.cat([low, low]))
    assert got_mask.tolist() == [[False] * 2] * 3 + [[True] * 2] * 3
    torch.testing.assert_close(out, 15 + 2 * (text.sum(1)[:, None] - 15))


def test_guidance_of_guidance():
    data = MixtureData([0.3, 0.3, 0.4], [[-0.4, 0.1], [0.5, 0.5], [0.2, -0.6]], [0.05, 0.02, 0.1])
    members, s = torch.cat([torch.eye(3).bool(), torch.ones(1, 3).bool()]), linear_schedule(T)
    m, log_prob = conditional_ddpm(data, s, members), class_log_prob(data, s, members)
    x, y = torch.randn(6, 2, generator=rng(6), dtype=torch.float64), torch.arange(6) % 3
    every = torch.stack([log_prob(x, torch.full((6,), 7), torch.full((6,), k)) for k in range(3)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(6).double())
    assert log_prob(x, torch.full((6,), 7), torch.full((6,), 3)).abs().max() < 1e-12, "the null class is certain"
    twice = classifier_guided(classifier_free(m, 2.0, dict(class_labels=3)), log_prob, 1.5, conditional=True)
    once = classifier_guided(exact_ddpm(data, s), log_prob, 3.5)
    torch.testing.assert_close(twice(x, 7, class_labels=y)[0], once(x, 7, class_labels=y)[0], rtol=1e-9, atol=1e-9)
    from_x0 = classifier_guided(exact_ddpm(data, s, "x0"), log_prob, 3.5)
    means = [g.p_step(x, 7, class_labels=y).mean for g in (once, from_x0)]
    torch.testing.assert_close(*means, rtol=1e-9, atol=1e-9)


# Misuse.


@pytest.mark.parametrize("guide", [lambda m, k: classifier_free(m, k, NULL), lambda m, k: classifier_guided(m, len, k)])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.ones(3), torch.full((T,), torch.nan)])
def test_a_scale_that_is_none_is_refused(guide, scale):
    with pytest.raises(ValueError, match=f"^scale must be a finite number, or {T} of them") as refused:
        guide(tiny_model(num_class_embeds=5), scale)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changes, null, named",
    [
        (dict(num_class_embeds=5), dict(class_labels=5), r"null\['class_labels'\] must be at most 4, got 5"),
        (dict(num_class_embeds=5), dict(class_labels=-1), r"null\['class_labels'\] must be at least 0, got -1"),
        (dict(num_class_embeds=5), dict(class_labels=1.5), r"null\['class_labels'\] must be a whole number, got 1.5"),
        (dict(num_class_embeds=5), {}, "null must be a dict of the conditions' null values"),
        (dict(num_class_embeds=5), 4, "null must be a dict of the conditions' null values, .* got 4"),
        ({}, NULL, "null must not name class_labels for a network without num_class_embeds"),
    ],
)
def test_a_null_that_is_no_label_is_refused(changes, null, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        classifier_free(tiny_model(**changes), 3.0, null)


def test_conditions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="^cond must give class_labels, a row for each image, to a guided model"):
        ddim_sample(free(), SHAPE, 2)
    with pytest.raises(ValueError, match=r"^cond\['class_labels'\] must have one row per image, 4, got 2"):
        ddim_sample(free(), SHAPE, 2, cond=dict(class_labels=[1, 2]))
    with pytest.raises(ValueError, match="^class_labels must lie in 0 … 4, got 1 … 7"):
        ddim_sample(free(), SHAPE, 2, cond=dict(class_labels=[1, 2, 3, 7]))
    m = DDPM(lambda x, t, text: x * text.mean(), linear_schedule(T))
    with pytest.raises(ValueError, match=r"^null\['text'\] must be a number or \(7,\), got \(2,\)"):
        ddim_sample(classifier_free(m, 2.0, dict(text=torch.ones(2))), SHAPE, 2, cond=dict(text=torch.ones(4, 7)))


@pytest.mark.parametrize(
    "log_prob, named",
    [
        (lambda x, t: x.sum(), r"log_prob must return one number per image, \(4,\), got \(\)"),
        (lambda x, t: x.flatten(1), r"log_prob must return one number per image, \(4,\), got \(4, 64\)"),
        (lambda x, t: x.detach().sum((1, 2, 3)), "log_prob must be differentiable by x_t"),
        (lambda x, t: t * torch.ones(4, requires_grad=True), "log_prob must be differentiable by x_t"),
    ],
)
def test_a_log_prob_that_cannot_guide_is_refused(log_prob, named):
    m = DDPM(two_points(linear_schedule(T)), linear_schedule(T))
    with pytest.raises(ValueError, match=f"^{named}"):
        ddim_sample(classifier_guided(m, log_prob, 1.0), SHAPE, 2)


# The table of chapter 32.


def test_the_table_of_the_chapter_has_every_seed_and_scale():
    lines = [json.loads(line) for line in (ROOT / "nbs" / "32_guidance.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = {(r["seed"], r.get("drop"), r["kind"], r.get("scale"), r.get("network")) for r in lines[1:]}
    assert lines[0]["command"] == "make guidance" and len(keys) == len(lines) - 1 == 3 * (7 + 7 + 5 + 6)
