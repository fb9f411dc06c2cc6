"""Evaluation against the paper's formulas in NumPy, and distributions known exactly; runs that are interrupted."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import rng, tiny_model
from PIL import Image
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_lit import evaluation, metrics
from ddpm_lit.bound import vlb_terms
from ddpm_lit.cli import scorecard, versions
from ddpm_lit.ddpm import DDPM, PREDICTS, VARIANCES, first_step_patched
from ddpm_lit.evaluation import (
    bound_sums,
    evaluate_bpd,
    evaluate_model,
    evaluate_run,
    means_and_errors,
    rate_distortion,
    sample_terms,
)
from ddpm_lit.exact import GaussianData, MixtureData, error_floor, exact_ddpm, expected_bound, optimal_variance
from ddpm_lit.forward import linear_schedule
from ddpm_lit.images import Images, save_grid, to_network, to_pixels
from ddpm_lit.loading import load_images
from ddpm_lit.metrics import ClassifierFeatures, FeatureStatistics, evaluate_samples, image_statistics
from ddpm_lit.pretrained import load_run
from ddpm_lit.processes import spawn_generators
from ddpm_lit.sampler import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:32 features need")  # most evaluations here are of ten images


def close(got, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=atol)


PATHS = dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]), OMP_NUM_THREADS="1")


def both(lib, x, t):
    "A network that NumPy and torch compute alike: bends, depends on t, leaves [-1, 1]; and a variance in (-1, 1)."
    return 1.3 * lib.sin(2 * x + 0.3 * t) - 0.2 * x, lib.cos(3 * x - t)


def model(s, predicts="eps", variance="beta_tilde", clip=True):
    def net(x, t):
        t = t.to(x).reshape(-1, *[1] * (x.ndim - 1))
        out = both(torch, x, t)
        return torch.cat(out, dim=1) if variance == "learned" else out[0]

    return DDPM(net, s, predicts, variance, clip)


def by_hand(beta, x0, noise, predicts, variance, clip):
    """The bound of images (n, d) by the paper's formulas: prior (n,), terms and squared errors (n, T), in NumPy.

    `noise[i]` (n, d) is that of the i-th term in the order in which they are computed: t = 1 … T-1, then 0.
    """
    T, (n, d) = len(beta), x0.shape
    alpha, ab = 1 - beta, np.cumprod(1 - beta)
    nats, errors, bits = np.zeros((n, T)), np.zeros((n, T)), np.log(2) * d
    mean_T, var_T = np.sqrt(ab[-1]) * x0, 1 - ab[-1]
    prior = 0.5 * (var_T + mean_T**2 - 1 - np.log(var_T)).sum(1) / bits  # KL to N(0, I)
    tilde = [beta[t] * (1 - ab[t - 1]) / (1 - ab[t]) for t in range(1, T)]  # Eq. 7; t = 0 has none
    low = np.array([tilde[0], *tilde])
    for eps, t in zip(noise, [*range(1, T), 0], strict=True):
        before = ab[t - 1] if t else 1.0
        x_t = np.sqrt(ab[t]) * x0 + np.sqrt(1 - ab[t]) * eps  # Eq. 4
        a, b = np.sqrt(before) * beta[t] / (1 - ab[t]), np.sqrt(alpha[t]) * (1 - before) / (1 - ab[t])  # Eq. 7
        out, v = both(np, x_t, float(t))
        guess = {
            "eps": (x_t - np.sqrt(1 - ab[t]) * out) / np.sqrt(ab[t]),  # Eq. 15
            "x0": out,
            "mean": (out - b * x_t) / a,
            "v": np.sqrt(ab[t]) * x_t - np.sqrt(1 - ab[t]) * out,
        }[predicts]
        guess = np.clip(guess, -1, 1) if clip else guess
        v_part = (v + 1) / 2  # Nichol & Dhariwal 2021, Eq. 15
        var = {"beta": beta[t], "beta_tilde": low[t], "learned": beta[t] ** v_part * low[t] ** (1 - v_part)}[variance]
        mean = a * guess + b * x_t
        errors[:, t] = ((guess - x0) ** 2).mean(1)
        if predicts == "eps" and not clip:  # Eq. 11
            close(mean, (x_t - beta[t] / np.sqrt(1 - ab[t]) * out) / np.sqrt(alpha[t]))
        if t:  # Eq. 8, for any variance
            q = a * x0 + b * x_t
            nats[:, t] = 0.5 * (np.log(var / low[t]) + (low[t] + (q - mean) ** 2) / var - 1).sum(1)
        else:  # Eq. 13
            lo, hi = ((x0 + side / 255 - mean) / np.sqrt(var) for side in (-1, 1))
            lo, hi = np.where(x0 < -0.999, -np.inf, lo), np.where(x0 > 0.999, np.inf, hi)
            left = lo + hi < 0  # there the lower tails are small, on the other side the upper ones
            big = np.where(left, norm.logcdf(hi), norm.logsf(lo))
            small = np.where(left, norm.logcdf(lo), norm.logsf(hi))
            nats[:, t] = -(big + np.log1p(-np.exp(small - big))).sum(1)
    return prior, nats / bits, errors


def noise_of(seed, shape, T, dtype=torch.float64):
    draw = rng(seed)
    return [torch.randn(shape, generator=draw, dtype=dtype).double().numpy() for _ in range(T)]


S = linear_schedule(9, 0.003, 0.4)


PIXELS = torch.randint(256, (11, 5), generator=rng(10), dtype=torch.uint8)
PIXELS[0], PIXELS[1] = 0, 255  # the outer bins reach to infinity


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("predicts", PREDICTS)
def test_every_term_is_the_papers(predicts, variance, clip):
    x0 = to_network(PIXELS, torch.float64)
    prior, terms, errors = by_hand(S.beta.numpy(), x0.numpy(), noise_of(1, (11, 5), 9), predicts, variance, clip)
    total = prior + terms.sum(1)
    assert len(np.unique(terms.sum(0).round(6))) == 9, "terms that are alike would hide a wrong order"
    m = model(S, predicts, variance, clip)
    sums = bound_sums(m, x0, None, rng(1))
    close(sums["prior"], prior.sum())
    close(sums["terms"], terms.sum(0), rtol=1e-8)
    close(sums["error"], errors.sum(0), rtol=1e-8)
    bits = means_and_errors(sums, 11, None)
    close(bits.total, total.mean(), rtol=1e-8)
    close(bits.error, total.std(ddof=1) / 11**0.5, rtol=1e-6)
    close(bits.terms_error, terms.std(0, ddof=1) / 11**0.5, rtol=1e-6)
    close(bits.squared_error, errors.mean(0), rtol=1e-8)
    close(bits.prior + bits.kl.sum() + bits.decoder, bits.total)
    assert bits.decoder == bits.terms[0] and len(bits.kl) == 8 and (bits.n, bits.calls) == (11, 9)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_a_data_set_in_batches_of_any_size_has_the_means_and_errors_of_numpy(batch_size):
    images, batches = Images(PIXELS[:, None, None]), torch.arange(11).split(batch_size)
    seeds = torch.randint(2**31, (len(batches),), generator=rng(2)).tolist()  # each batch has numbers of its own
    x0 = to_network(PIXELS).double().numpy()
    parts = [
        by_hand(
            S.beta.numpy(),
            x0[indices.numpy()],
            noise_of(seed, (len(indices), 5), 9, torch.float32),
            "eps",
            "beta",
            True,
        )
        for indices, seed in zip(batches, seeds, strict=True)
    ]
    prior, terms, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
    bits = evaluate_bpd(model(S, variance="beta"), images, batch_size=batch_size, generator=rng(2))
    total = prior + terms.sum(1)
    close(bits.prior, prior.mean(), rtol=1e-4)
    close(bits.terms, terms.mean(0), rtol=1e-4)
    close(bits.terms_error, terms.std(0, ddof=1) / 11**0.5, rtol=1e-3)
    close([bits.total, bits.error], [total.mean(), total.std(ddof=1) / 11**0.5], rtol=1e-4)
    close(bits.squared_error, errors.mean(0), rtol=1e-4)


def test_bits_per_dim_is_the_mean_of_the_bound(digits):
    m = DDPM(lambda x, t: x, linear_schedule(20, 0.01, 0.3))
    bits = evaluate_bpd(m, digits, n=30, batch_size=30, generator=rng(1))
    terms = vlb_terms(m, to_network(digits.pixels[:30]), *spawn_generators(rng(1), 1))
    assert bits.total == pytest.approx(terms.total.double().mean().item(), rel=1e-6)
    assert bits.error == pytest.approx(terms.total.double().std().item() / 30**0.5, rel=1e-4)
    assert bits.decoder == pytest.approx(terms.decoder.mean().item(), rel=1e-5)
    assert bits.prior == pytest.approx(terms.prior.mean().item(), rel=1e-5)
    torch.testing.assert_close(bits.kl.float(), terms.kl.mean(0))
    assert bits.n == 30


def test_bits_per_dim_needs_images_and_terms(digits):
    m = DDPM(lambda x, t: x, linear_schedule(20))
    for n in (1, 1798):
        with pytest.raises(ValueError, match=f"n must be from 2 to the number of images, 1797; got {n}"):
            evaluate_bpd(m, digits, n=n)
    for calls in (-1, 0, 1, 21):
        with pytest.raises(ValueError, match=f"calls must be from 2 to T = 20, got {calls}"):
            evaluate_bpd(m, digits, n=4, calls=calls)


def test_a_bound_that_is_not_finite_names_its_t(digits):
    def net(x, t):
        return x * torch.where((t == 3) | (t == 0), torch.nan, 1.0)[:, None, None, None]

    with pytest.raises(FloatingPointError, match="not finite: first at t = 0, and at 2 t in all"):
        evaluate_bpd(DDPM(net, linear_schedule(6)), digits, n=4)


@pytest.mark.parametrize("calls", [2, 3, 7])
def test_the_times_that_are_drawn_are_weighted_by_their_probability(calls):
    b, T = 20_000, 6
    drawn = list(sample_terms(linear_schedule(T, 0.01, 0.3), calls, b, rng(3)))
    assert len(drawn) == calls and all(t.shape == weight.shape == (b,) for t, weight, _ in drawn)
    assert [last for *_, last in drawn] == [False] * (calls - 1) + [True]
    assert drawn[-1][0].eq(0).all() and drawn[-1][1].eq(1).all()
    assert all(1 <= t.min() and t.max() <= T - 1 for t, *_ in drawn[:-1])
    coefs = torch.zeros(b, T, dtype=torch.float64)
    for t, weight, _ in drawn[:-1]:
        coefs.scatter_add_(1, t[:, None], weight[:, None])
    z = (coefs.mean(0) - 1)[1:] / (coefs.std(0)[1:] / b**0.5)
    assert z.abs().max() < 4.5, "every term counts once, on average"
    every = list(sample_terms(linear_schedule(T), None, 3, None))
    assert [t.tolist() for t, *_ in every] == [[t] * 3 for t in (1, 2, 3, 4, 5, 0)]
    assert all(weight.eq(1).all() for _, weight, _ in every)


ALIKE = Images(torch.tensor([3, 100, 200, 255], dtype=torch.uint8).expand(40, 1, 1, 4))  # no spread between images


SILENT = DDPM(lambda x, t: 0 * x, linear_schedule(15, 0.01, 0.3), "x0", "beta")  # whose terms depend on no noise


@pytest.mark.parametrize("calls", [2, 5, 15])
def test_a_few_calls_give_the_same_on_average_and_their_error_is_honest(calls):
    full = evaluate_bpd(SILENT, ALIKE)
    assert full.error < 1e-6
    draw = rng(4)
    few = [evaluate_bpd(SILENT, ALIKE, calls=calls, generator=draw, batch_size=40) for _ in range(200)]
    z = np.array([(bits.total - full.total) / bits.error for bits in few])
    assert abs(z.mean()) < 4.5 / 200**0.5 and 0.8 < z.std() < 1.25
    terms = torch.stack([bits.terms for bits in few])
    spread = terms.std(0).clamp(min=1e-9) / 200**0.5
    assert ((terms.mean(0) - full.terms).abs() < 5 * spread + 1e-6).all()
    for bits in few:
        assert bits.total == pytest.approx(bits.prior + bits.terms.sum().item(), rel=1e-6)
        assert bits.terms_error.isnan().all() and bits.terms_error.shape == (15,)
        known = bits.squared_error.isfinite()
        assert known[0] and torch.allclose(bits.squared_error[known], full.squared_error[known])


def test_a_few_calls_are_that_many_and_what_was_not_drawn_is_not_known(digits):
    seen = []
    m = DDPM(lambda x, t: seen.append(t) or 0.1 * x, linear_schedule(1000))
    bits = evaluate_bpd(m, digits, n=20, calls=4, generator=rng(5), batch_size=7)
    assert len(seen) == 3 * 4 and bits.calls == 4
    drawn = torch.cat(seen).unique()
    assert torch.equal(bits.squared_error.isfinite().nonzero().flatten(), drawn) and len(drawn) <= 61
    assert bits.terms[bits.squared_error.isnan()].eq(0).all()


def test_a_few_calls_on_real_images_agree_with_all(digits):
    m = model(linear_schedule(40, 0.002, 0.2), variance="learned")
    full = evaluate_bpd(m, digits, n=300, generator=rng(6))
    for calls in (2, 8, 40):
        few = evaluate_bpd(m, digits, n=300, calls=calls, generator=rng(calls))
        assert abs(few.total - full.total) < 5 * (few.error**2 + full.error**2) ** 0.5
        assert few.error > full.error or calls > 2


@pytest.mark.parametrize("calls", [14, 15])
def test_a_curve_over_t_wants_all_terms(calls):
    with pytest.raises(ValueError, match="bits must hold all T = 15 terms"):
        rate_distortion(evaluate_bpd(SILENT, ALIKE, calls=calls))


def test_rate_and_distortion_are_running_sums():
    bits = evaluate_bpd(model(S), Images(PIXELS[:, None, None]), generator=rng(7))
    curve = rate_distortion(bits)
    assert len(curve.rate) == len(curve.distortion) == 10
    for t in range(10):  # what was sent before x_t is known: the prior, and the terms from the last down to t
        close(curve.rate[t], bits.prior + sum(bits.terms[t:].tolist()))
    close(curve.distortion, [0, *(127.5 * e**0.5 for e in bits.squared_error.tolist())])
    assert curve.rate[0] == pytest.approx(bits.total) and curve.rate[9] == pytest.approx(bits.prior)


class Largest(TorchDispatchMode):
    "Notes the entries of the largest tensor of numbers that any operation returns."

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("calls", [None, 3])
def test_memory_depends_on_the_batch_and_not_on_the_number_of_images_or_steps(calls):
    pixels, largest = torch.randint(256, (300, 1, 4, 4), generator=rng(8), dtype=torch.uint8), {}
    for n, T in ((8, 4), (300, 4), (8, 60)):
        with Largest() as seen:
            evaluate_bpd(model(linear_schedule(T), variance="beta"), Images(pixels), n, batch_size=8, calls=calls)
        largest[n, T] = seen.entries
    assert set(largest.values()) == {8 * 16}, "a batch, and nothing larger"


def test_an_evaluation_that_was_interrupted_goes_on_where_it_was(digits):
    calls = []

    def net(x, t, broken=None):
        calls.append(len(x))
        if len(calls) == broken:
            raise RuntimeError("the power is off")
        return 0.2 * x

    def run(broken=None, **kwargs):
        calls.clear()
        m = DDPM(lambda x, t: net(x, t, broken), linear_schedule(10))
        return evaluate_bpd(m, digits, n=23, batch_size=5, generator=rng(9), **kwargs)

    for some in (None, 4):
        complete, T, cache = run(calls=some), some or 10, {}
        with pytest.raises(RuntimeError, match="power"):
            run(2 * T + 2, cache=cache, calls=some)
        assert sorted(cache) == [0, 1]
        resumed = run(cache=cache, calls=some)
        assert len(calls) == 3 * T and sum(calls) == (5 + 5 + 3) * T and sorted(cache) == [0, 1, 2, 3, 4]
        for a, b in zip(resumed, complete, strict=True):
            assert torch.equal(torch.as_tensor(a).nan_to_num(-1), torch.as_tensor(b).nan_to_num(-1))
        again = run(cache={i: {k: v.clone() for k, v in sums.items()} for i, sums in cache.items()}, calls=some)
        assert not calls and again.total == complete.total


def mixture(d):
    "A distribution inside [-1, 1], of two parts with covariances of full rank."
    means, roots = torch.rand(2, d, generator=rng(d)) - 0.5, torch.randn(2, d, d, generator=rng(d + 1)) / (6 * d**0.5)
    return MixtureData([0.3, 0.7], means.double(), (roots @ roots.mT).double() + 0.002 * torch.eye(d).double())


DISTRIBUTIONS = {
    "gauss": lambda d: GaussianData(torch.linspace(-0.4, 0.4, d), torch.diag(torch.linspace(0.005, 0.06, d))),
    "mixture": mixture,
}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_of_a_known_distribution_every_term_is_known(name, variance):
    d, n, c, data = 16, 1500, linear_schedule(25, 0.01, 0.5), DISTRIBUTIONS[name](16)
    floor = error_floor(data, c, 3000, rng(20))
    best = optimal_variance(c, floor)
    m = exact_ddpm(data, c, "v", variance, floor if variance == "learned" else None)
    var = {"beta": c.beta, "beta_tilde": first_step_patched(c), "learned": best}[variance]
    pixels = to_pixels(data.sample(n, rng(21)).reshape(-1, 1, 4, 4))
    bits = evaluate_bpd(m, Images(pixels), generator=rng(22))
    x0, bins = to_network(pixels, torch.float64).flatten(1), -np.log2(2 / 255)
    nll = data.nll(x0) / (d * np.log(2)) + bins
    # the bound: above the truth, by what was foreseen
    predicted = (expected_bound(data, c, floor, var) / d / np.log(2) + bins).item()
    assert abs(bits.total - predicted) < 5 * bits.error + 0.003
    assert bits.total > nll.mean().item() - 5 * bits.error
    assert predicted > nll.mean().item() - 5 * nll.std().item() / n**0.5
    # each divergence: between the two variances, and that of x_0 which is still unknown
    kl = 0.5 * (best / var - 1 + (var / c.beta).log() - (1 - c.alpha_bar_prev).log() + (1 - c.alpha_bar).log())
    assert ((bits.kl - kl[1:] / np.log(2)).abs() < 5 * bits.terms_error[1:] + 2e-4).all()
    # distortion: what is still unknown of x_0, and half a grey level
    distortion = rate_distortion(bits).distortion[1:]
    expected = 127.5 * (floor + (2 / 255) ** 2 / 12).sqrt()
    torch.testing.assert_close(distortion, expected, rtol=5 * (0.5 / (n * d)) ** 0.5 + 0.02, atol=0)
    assert (distortion.diff()[:9] > 0).all() and distortion[-1] > 2 * distortion[0]


def other_cache(change):
    "The cache of another evaluation, given to one with a `change`."
    images, kwargs = Images(PIXELS[:, None, None]), dict(m=model(S), batch_size=5, cache={})
    evaluate_bpd(images=images, **kwargs)
    evaluate_bpd(images=images, **kwargs | change)


PASSED_OVER = {
    "cache must .* batch size": lambda: other_cache(dict(batch_size=11)),
    "cache must .* calls": lambda: other_cache(dict(calls=3)),
    "cache must .* T": lambda: other_cache(dict(m=model(linear_schedule(8)))),
    "batch_size must be at least 1, got 0": lambda: evaluate_bpd(model(S), Images(PIXELS[:, None, None]), batch_size=0),
}


@pytest.mark.parametrize("message", PASSED_OVER)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(ValueError, match="^" + message.split()[0]):
        PASSED_OVER[message]()


# ------------------------------------------------------------------------------------------- a model on a data set


def test_a_model_is_measured_on_random_images(digits):
    m = tiny_model(linear_schedule(6, 0.01, 0.5))
    result = evaluate_model(m, digits, n=23, seed=4, batch_size=10)
    draw = rng(4)
    chosen = Images(digits.pixels[torch.randperm(1797, generator=draw)[:23]])
    bits = evaluate_bpd(m, chosen, batch_size=10, generator=draw)
    assert (result["total"], result["standard_error"], result["prior"]) == (bits.total, bits.error, bits.prior)
    assert (result["kl"], result["decoder"]) == (bits.kl.sum().item(), bits.decoder)
    assert result["total"] == pytest.approx(result["prior"] + result["kl"] + result["decoder"])
    assert (result["n"], result["calls"], result["seed"], result["data"]) == (23, 6, 4, repr(digits))
    assert list(result) == ["total", "standard_error", "prior", "kl", "decoder", "n", "calls", "seed", "data"]
    assert evaluate_model(m, digits.pixels[:9], n=100)["n"] == 9, "all, where there are fewer"
    few = evaluate_model(m, digits.select(torch.arange(40)), calls=3)
    assert (few["n"], few["calls"]) == (40, 3)
    with pytest.raises(ValueError, match="calls must be from 2 to T = 6, got 7"):
        evaluate_model(m, digits, n=4, calls=7)


def class_model(T=5, seed=3):
    return tiny_model(linear_schedule(T, 0.01, 0.5), seed=seed, num_class_embeds=11)


@pytest.mark.parametrize("calls", [None, 3])
def test_a_network_with_classes_gets_the_labels_of_the_images(digits, calls):
    m, seen = class_model(), []
    m.net.register_forward_pre_hook(lambda net, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    result = evaluate_model(m, digits, n=10, batch_size=4, seed=1, calls=calls)
    order, k = torch.randperm(1797, generator=rng(1))[:10], calls or 5
    expected = [labels for labels in digits.labels[order].split(4) for _ in range(k)]
    assert len(seen) == len(expected) and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    others = evaluate_model(m, Images(digits.pixels, (digits.labels + 1) % 10), n=10, batch_size=4, seed=1, calls=calls)
    assert abs(others["total"] - result["total"]) > 1e-4


def test_a_network_with_classes_has_the_bound_of_each_class(digits):
    m, labels = class_model(), digits.labels[:12]
    bits = evaluate_bpd(m, digits, 12, generator=rng(6))
    terms = vlb_terms(m, to_network(digits.pixels[:12]), *spawn_generators(rng(6), 1), cond=dict(class_labels=labels))
    assert bits.total == pytest.approx(terms.total.double().mean().item(), rel=1e-6)


def test_labels_that_are_missing_or_out_of_range_are_refused_by_name(digits):
    m, too_many = class_model(), Images(digits.pixels, digits.labels + 2)
    for images, got in ((Images(digits.pixels), "got none in Images"), (too_many, "got 2 … 11")):
        with pytest.raises(ValueError, match=f"images must have labels in 0 … 10 for this network, {got}"):
            evaluate_model(m, images, n=4)
    with pytest.raises(ValueError, match="^labels must be"):
        evaluate_bpd(m, Images(digits.pixels), 4)
    assert evaluate_model(m, Images(digits.pixels, digits.labels + 1), n=4)["n"] == 4, "0 to 10 are eleven"
    assert evaluate_model(tiny_model(), Images(digits.pixels), n=4)["n"] == 4


# ------------------------------------------------------------------------------------------- a saved model

# A model of five steps, ten images in batches of 4: bits/dim take 15 calls of the network, samples 6.


@dataclass(frozen=True)
class Request:
    "What the command line passes to `evaluate_run`, with its defaults."

    run_folder: Path
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=2, progress=False))
    bpd: bool = False
    fd: bool = False
    data: str = "digits"
    split: str = "train"
    size: int | None = None
    n: int = 10
    bpd_calls: int | None = None
    features: str = "classifier"
    inception_file: Path | None = None
    reference: Path | None = None
    batch_size: int = 4
    out: Path | None = None


@pytest.fixture(scope="module")
def features(digits):
    return ClassifierFeatures(digits)


@pytest.fixture
def same_features(features, digits, monkeypatch):
    "The classifier of digits is trained once for all tests; one of other images is trained."
    real = evaluation.ClassifierFeatures

    def cached(images):
        return features if torch.equal(images.pixels, digits.pixels) else real(images)

    monkeypatch.setattr(evaluation, "ClassifierFeatures", cached)


@pytest.fixture
def measure(run, tmp_path, same_features, monkeypatch):
    "A function that evaluates into a file of this name; it returns how often the network was called, and the error."
    load = evaluation.load_run
    monkeypatch.setattr(evaluation, "plot_bits", lambda path, bits: path.write_text(f"{bits.total} of {bits.n}"))

    def call(name, event=None, at=None, **kwargs):
        calls = 0

        def hook(net, args, out):
            nonlocal calls
            calls += 1
            return event(out) if calls == at else out

        def load_and_count(folder):
            m = load(folder)
            m.net.register_forward_hook(hook)
            return m

        monkeypatch.setattr(evaluation, "load_run", load_and_count)
        config = Request(**dict(run_folder=run, out=tmp_path / f"{name}.json") | kwargs)
        try:
            work = evaluate_run(config)
        except BaseException as error:
            return calls, error
        assert work.results == numbers(work.out) and work.folder == work.out.with_suffix("")
        return calls

    return call


def numbers(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def content(folder):
    "The bytes of all files in a folder, by name; no temporary file is among them."
    files = sorted(folder.iterdir())
    assert not [file for file in files if file.name.startswith(".")]
    return [(file.name, file.read_bytes()) for file in files]


PLOT_BITS = evaluation.plot_bits


def interrupt(out):
    raise KeyboardInterrupt


def broken(out):
    return out * float("nan")


def notes(error):
    return "; ".join(getattr(error, "__notes__", []))


def test_a_run_measures_both(run, tmp_path, digits, features, same_features):
    sampling = Sampling(steps=2, progress=False)
    shutil.copytree(run, tmp_path / "run")
    work = evaluate_run(Request(tmp_path / "run", n=40, batch_size=16))
    assert work.out == tmp_path / "run" / "evaluation.json" and work.results == numbers(work.out)
    bits, samples = work.results["bits_per_dim"], work.results["samples"]
    m = load_run(run)
    assert bits == evaluate_model(m, digits, n=40, batch_size=16)
    drawn = torch.cat([sampling.draw(m, k, i) for i, k in enumerate((16, 16, 8))])
    expected = evaluate_samples(drawn, digits, features=features, batch_size=16)
    for name, value in expected.items():
        assert samples[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    assert samples["frechet_distance"] == pytest.approx(features.distance(drawn, digits.pixels), rel=1e-6)
    settings = dict(sampler="ddim", steps=2, eta=0, seed=0, mixed_precision="no", data=repr(digits))
    assert samples == samples | settings and samples.keys() == expected.keys() | settings.keys()
    save_grid(tmp_path / "grid.png", drawn)
    pictures = dict(content(work.folder))
    assert pictures["samples.png"] == (tmp_path / "grid.png").read_bytes()
    assert sorted(pictures) == ["bits.png", "samples.png"]
    picture = np.asarray(Image.open(work.folder / "bits.png").convert("L"))
    assert picture.shape == (340, 900) and picture.std() > 5


def test_the_picture_shows_the_first_hundred(run, tmp_path, measure):
    assert measure("x", fd=True, n=130, batch_size=30) == 10
    m, sampling = load_run(run), Sampling(steps=2, progress=False)
    drawn = torch.cat([sampling.draw(m, 30, i) for i in range(4)])[:100]
    save_grid(tmp_path / "grid.png", drawn)
    assert (tmp_path / "x" / "samples.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_a_scorecard_has_the_numbers_of_a_run(run, tmp_path, digits, measure):
    assert measure("x", n=12, batch_size=500, bpd_calls=4) == 6
    m = load_run(run)
    pixels = Sampling(steps=2, progress=False).draw(m, 12)
    card, result = scorecard(m, digits, pixels, 0, False), numbers(tmp_path / "x")
    bits = card.pop("bits_per_dim")
    assert bits["calls"] == 5 and bits == evaluate_model(m, digits, n=12, calls=5)
    for name, value in card.items():
        assert result["samples"][name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    assert versions()["torch"] == torch.__version__ and versions().keys() == {"ddpm_lit", "torch", "python"}
    long = DDPM(lambda x, t: 0 * x, linear_schedule(60))
    assert scorecard(long, digits, pixels, 0, False)["bits_per_dim"]["calls"] == 50


def test_an_interrupted_evaluation_resumes_with_the_same_numbers(measure, tmp_path):
    assert measure("undisturbed") == 21
    calls, error = measure("x", interrupt, 7)
    assert calls == 7 and isinstance(error, KeyboardInterrupt)
    assert notes(error).startswith("the bits/dim of 4 of 10 images are ")
    assert not (tmp_path / "x.json").exists()
    calls, error = measure("x", interrupt, 13)
    assert calls == 13 and notes(error).startswith("4 of 10 images are ")
    assert numbers(tmp_path / "x").keys() == {"model", "bits_per_dim"}, "a number that is known is written"
    assert measure("x") == 4
    assert numbers(tmp_path / "x") == numbers(tmp_path / "undisturbed")
    assert content(tmp_path / "x") == content(tmp_path / "undisturbed"), "and nothing else is left"
    assert measure("x") == 21, "what is finished is measured anew when it is requested again"


def test_sums_cut_short_and_sums_not_finite_are_computed_again(measure, tmp_path):
    assert measure("complete", bpd=True) == 15
    calls, error = measure("x", broken, 7, bpd=True)
    assert calls == 15 and isinstance(error, FloatingPointError) and "the bound is not finite" in str(error)
    assert "the bits/dim of 6 of 10 images are " in notes(error)
    part = tmp_path / "x" / "bits.parts" / "00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert measure("x", bpd=True) == 10
    assert numbers(tmp_path / "x") == numbers(tmp_path / "complete")


def seeded(seed):
    return dict(sampling=Sampling(steps=2, seed=seed, progress=False))


def test_the_cache_of_another_request_does_not_stand_in_the_way(measure, tmp_path):
    assert measure("one", **seeded(1)) == 21
    for at in (7, 19):  # in the bits/dim, in the samples
        assert measure("x", interrupt, at)[0] == at
        assert measure("x", **seeded(1)) == 21
        assert numbers(tmp_path / "x") == numbers(tmp_path / "one")
    (tmp_path / "x" / "samples.parts").mkdir()
    (tmp_path / "x" / "samples.parts" / "00000.npy").write_bytes(b"of unknown origin")
    assert measure("x", **seeded(1), fd=True) == 6
    assert numbers(tmp_path / "x") == numbers(tmp_path / "one")


def test_a_larger_n_resumes_in_both(measure, tmp_path):
    assert measure("x", interrupt, 11)[0] == 11
    assert measure("x", n=12) == 5 + 6, "two batches of 4 are there"
    assert measure("y", interrupt, 18)[0] == 18
    assert measure("y", n=12) == 5 + 4, "and one of 2, which is too small now"
    assert measure("once", n=12) == 21
    assert numbers(tmp_path / "x") == numbers(tmp_path / "y") == numbers(tmp_path / "once")


def test_sums_of_other_data_are_not_mixed_in(measure, tmp_path):
    pixels = torch.randint(256, (30, 8, 8), generator=rng(0), dtype=torch.uint8).numpy()
    kwargs = dict(bpd=True, data=tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=pixels)
    assert measure("x", interrupt, 7, **kwargs)[0] == 7
    np.savez(tmp_path / "a.npz", images=255 - pixels)
    assert measure("x", **kwargs) == measure("fresh", **kwargs) == 15
    assert numbers(tmp_path / "x") == numbers(tmp_path / "fresh")


def test_one_measurement_leaves_the_other_of_the_same_model(run, measure, tmp_path):
    assert measure("x", bpd=True) == 15
    bits = numbers(tmp_path / "x")
    assert bits.keys() == {"model", "bits_per_dim"}
    assert measure("x", fd=True) == 6
    both = numbers(tmp_path / "x")
    assert both["bits_per_dim"] == bits["bits_per_dim"] and "samples" in both
    assert measure("both", bpd=True, fd=True) == 21
    assert numbers(tmp_path / "both") == both
    m = load_run(run)
    m.clip = False
    m.save_pretrained(tmp_path / "other")
    assert measure("x", bpd=True, run_folder=tmp_path / "other") == 15
    assert numbers(tmp_path / "x").keys() == {"model", "bits_per_dim"}
    for text in ("{", "[]"):
        (tmp_path / "x.json").write_text(text)
        assert measure("x", bpd=True) == 15
        assert numbers(tmp_path / "x") == bits


def test_samples_drawn_faster_are_measured_as_such(measure, tmp_path):
    fast = Sampling(steps=2, progress=False, precision="bf16", channels_last=True)
    assert measure("plain", fd=True) == measure("fast", fd=True, sampling=fast) == 6
    plain, fast = (numbers(tmp_path / name)["samples"] for name in ("plain", "fast"))
    assert (plain["mixed_precision"], fast["mixed_precision"]) == ("no", "bf16")
    assert fast["frechet_distance"] == pytest.approx(plain["frechet_distance"], rel=0.1)


def test_a_model_without_a_run_is_measured_in_its_own_folder(run, measure, tmp_path):
    folder = tmp_path / "model"
    load_run(run).save_pretrained(folder)
    assert measure("", run_folder=folder, out=None, n=4, bpd=True) == 5
    assert measure("", run_folder=folder, out=None, n=4, fd=True) == 2
    assert numbers(folder / "evaluation").keys() == {"model", "bits_per_dim", "samples"}, "it has not become another"


def test_few_calls_estimate_the_bound(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "plot_bits", PLOT_BITS)
    assert measure("all", bpd=True, n=200) == 250
    assert measure("some", bpd=True, bpd_calls=3, n=200) == 150
    exact, estimate = (numbers(tmp_path / name)["bits_per_dim"] for name in ("all", "some"))
    assert estimate["calls"] == 3
    assert abs(estimate["total"] - exact["total"]) < 4 * (estimate["standard_error"] + exact["standard_error"])
    assert np.asarray(Image.open(tmp_path / "some" / "bits.png")).shape[:2] == (340, 500)


def test_batches_of_bits_are_at_most_128(measure, tmp_path, run, digits):
    assert measure("x", bpd=True, n=150, batch_size=300, bpd_calls=2) == 4
    assert numbers(tmp_path / "x")["bits_per_dim"] == evaluate_model(load_run(run), digits, n=150, calls=2)


def test_statistics_of_the_real_images_are_written_and_read(measure, tmp_path, digits):
    reference = tmp_path / "new" / "real.npz"
    assert measure("first", fd=True, reference=reference) == 6
    written = reference.read_bytes()
    assert measure("second", fd=True, reference=reference) == 6
    first, second = (numbers(tmp_path / name)["samples"] for name in ("first", "second"))
    assert second["frechet_distance"] == pytest.approx(first["frechet_distance"], rel=1e-9)
    assert second["frechet_distance_noise"] == pytest.approx(first["frechet_distance_noise"], rel=1e-9)
    scores = {"precision", "recall", "precision_recall_n", "density", "coverage", "coverage_perfect", "nearest_ratio"}
    scores |= {"kernel_distance", "kernel_distance_std", "kernel_distance_subset"}
    assert set(first) - set(second) == scores | {"frechet_distance_real"}
    assert second["data"] == str(reference) and reference.read_bytes() == written

    other = tmp_path / "other.npz"
    np.savez(other, images=digits.pixels[:1500, 0].numpy(), labels=digits.labels[:1500].numpy())
    named, short, text = (tmp_path / f"{name}.npz" for name in ("inception", "short", "text"))
    FeatureStatistics(torch.zeros(32).double(), torch.eye(32).double(), 100, "inception-2015-12-05").save(named)
    FeatureStatistics(torch.zeros(5).double(), torch.eye(5).double()).save(short)
    text.write_text("no statistics")
    for path, message, kwargs in (
        (reference, "reference must hold statistics of 'classifier", dict(data=other)),  # of other images
        (named, f"{named} holds some of 'inception-2015-12-05'", {}),
        (short, f"must hold statistics of 32 features, {short} holds some of 5", {}),
        (text, f"{text} holds no statistics", {}),
        (other, f"{other} holds no statistics", {}),
    ):
        calls, error = measure("third", fd=True, reference=path, **kwargs)
        assert calls == 0 and isinstance(error, ValueError) and message in str(error)


class TwoPixels:
    "Features with the interface of the network of published FIDs, without a network."

    name = "two pixels"

    def __init__(self, path, device):
        self.path = path

    def __call__(self, pixels):
        return pixels.flatten(1)[:, 35:37].double()

    def probabilities(self, features):
        return torch.nn.functional.one_hot(features[:, 0].long() % 4, 4).double()


@pytest.fixture
def pictures(tmp_path, digits):
    "A folder of twelve grey pictures, of two classes, one after the other."
    for k, image in enumerate(digits.pixels[:12, 0].numpy()):
        (tmp_path / "pictures" / "ab"[k // 6]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pictures" / "ab"[k // 6] / f"{k}.png")
    return tmp_path / "pictures"


@pytest.fixture
def stored(monkeypatch):
    "No images fit into memory."

    def load(data, size, split, stream, progress):
        return load_images(data, size, split=split, memory=0)

    monkeypatch.setattr(evaluation, "load_images_once", load)


def test_features_of_a_network_need_no_labels_no_memory_and_with_statistics_no_images(
    measure, pictures, tmp_path, monkeypatch, stored
):
    monkeypatch.setattr(evaluation, "InceptionFeatures", TwoPixels)
    monkeypatch.setattr(metrics, "MAX_RECORDED", 5)
    kwargs = dict(features="inception", reference=tmp_path / "real.npz")
    assert measure("stored", **kwargs, data=pictures) == 21
    result = numbers(tmp_path / "stored")
    assert result["samples"]["precision_recall_n"] == [5, 4], "every second of 10, every third of 12"
    assert result["samples"]["features"] == "two pixels" and result["samples"]["data"].startswith("StoredImages(")
    assert result["bits_per_dim"]["n"] == 10
    assert measure("again", fd=True, **kwargs, data="/nowhere") == 6
    again = numbers(tmp_path / "again")["samples"]
    assert again["frechet_distance"] == pytest.approx(result["samples"]["frechet_distance"], rel=1e-9)
    calls, error = measure("x", data=pictures)
    assert calls == 0 and "data must fit into memory for the classifier" in str(error)
    assert measure("x", bpd=True, data=pictures, n=100) == 15
    assert numbers(tmp_path / "x")["bits_per_dim"]["n"] == 12, "all, where there are fewer"


def test_a_network_with_classes_is_measured_with_the_labels_of_the_data(measure, tmp_path, digits, features):
    m = class_model()
    m.save_pretrained(tmp_path / "classes" / "model")
    kwargs = dict(run_folder=tmp_path / "classes", **seeded(2))
    assert measure("x", **kwargs) == 21
    result, m = numbers(tmp_path / "x"), load_run(tmp_path / "classes")
    labels = digits.labels[torch.randperm(1797, generator=rng(2))[:10]].split(4)
    drawn = [kwargs["sampling"].draw(m, len(y), i, cond=dict(class_labels=y)) for i, y in enumerate(labels)]
    expected = features.distance(torch.cat(drawn), digits.pixels)
    assert result["samples"]["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert result["bits_per_dim"] == evaluate_model(m, digits, n=10, seed=2, batch_size=4)

    assert measure("y", interrupt, 18, **kwargs)[0] == 18
    assert measure("y", **kwargs, n=12) == 5 + 4, "a larger n resumes"
    assert measure("once", **kwargs, n=12) == 21
    assert numbers(tmp_path / "y") == numbers(tmp_path / "once")


def test_other_labels_are_another_request(measure, tmp_path, digits):
    class_model().save_pretrained(tmp_path / "classes" / "model")
    kwargs, labels = dict(run_folder=tmp_path / "classes", data=tmp_path / "a.npz"), digits.labels[:1000]
    for at, calls in ((7, 21), (18, 21)):
        np.savez(tmp_path / "a.npz", images=digits.pixels[:1000, 0].numpy(), labels=labels.numpy())
        assert measure("x", interrupt, at, **kwargs)[0] == at
        np.savez(tmp_path / "a.npz", images=digits.pixels[:1000, 0].numpy(), labels=labels.flip(0).numpy())
        assert measure("x", **kwargs) == calls


def test_more_samples_than_images_start_over_with_the_labels(digits):
    m, few = class_model(), digits.select(torch.arange(7))
    labels = evaluation.sample_labels(m, few, 17, 5)
    order = few.labels[torch.randperm(7, generator=rng(5))]
    assert torch.equal(labels, torch.cat([order, order, order])[:17])
    assert evaluation.sample_labels(tiny_model(), few, 17, 5) is None


def test_a_network_with_classes_wants_labels(measure, run, tmp_path, pictures, stored, monkeypatch):
    class_model().save_pretrained(tmp_path / "classes" / "model")
    np.savez(tmp_path / "no_labels.npz", images=np.zeros((1200, 8, 8), np.uint8))
    monkeypatch.setattr(evaluation, "InceptionFeatures", TwoPixels)
    classes = dict(run_folder=tmp_path / "classes")
    for kwargs in (dict(bpd=True), dict(fd=True), dict(fd=True, features="inception")):
        calls, error = measure("x", **classes, data=tmp_path / "no_labels.npz", **kwargs)
        assert calls == 0 and str(error).startswith(
            "data must have labels in 0 … 10 for this network, got none in Images("
        )
    kwargs = dict(features="inception", reference=tmp_path / "real.npz", data=pictures)
    assert measure("x", **classes, **kwargs) == 21
    assert measure("y", **classes, **kwargs, fd=True) == 6, "statistics are known, labels are read"


def test_a_learned_variance_is_measured(measure, tmp_path):
    tiny_model(linear_schedule(5, 1e-4, 0.5), variance="learned").save_pretrained(tmp_path / "learned" / "model")
    assert measure("x", run_folder=tmp_path / "learned", n=4) == 5 + 2
    assert numbers(tmp_path / "x")["bits_per_dim"]["total"] > 0


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(n=3), "n must be at least 4, got 3"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(bpd_calls=1), "bpd_calls must be from 2 to T = 5, got 1"),
        (dict(bpd_calls=6), "bpd_calls must be from 2 to T = 5, got 6"),
        (dict(sampling=Sampling(steps=6)), "steps must be a whole number from 1 to T = 5"),
        (seeded(-1), "seed must"),
        (dict(data="mnist5k"), "data must be images like the model's, (1, 8, 8), got Images(mnist5k: 5000 of 28×28"),
        (dict(data="FEW"), "data must be at least 1,000 images for the classifier, got Images(few: 300 of 8×8"),
        (dict(data="NO_LABELS"), "data must have labels for the classifier, got Images(no_labels: 1200 of 8×8"),
        (dict(data="THREE", bpd=True), "data must be at least 4 images, got Images(three: 3 of 8×8"),
        (dict(data="RGB"), "data must be images like the model's, (1, 8, 8), got Images(rgb: 4 of 8×8, RGB"),
        (dict(data="digitz"), "did you mean 'digits'"),
        (dict(features="inception", inception_file="FEW"), "few.npz must be the file of https://"),
        (dict(features="inception", inception_file=Path("none.pt")), "none.pt does not exist"),
        (dict(inception_file="FEW"), "inception_file must come with --features inception"),
        (dict(reference=Path("stats.txt")), "reference must be a file that ends in .npz, got 'stats.txt'"),
        (dict(reference="FEW"), "few.npz holds no statistics"),
        (dict(reference=Path("/dev/null/x/r.npz")), "must be a folder"),
        (dict(out=Path("table.txt")), "out must be a file that ends in .json, got 'table.txt'"),
        (dict(out=Path("/dev/null/x/e.json")), "must be a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_network_is_called(
    kwargs, message, run, digits, tmp_path, tmp_path_factory, monkeypatch, measure
):
    data = tmp_path_factory.mktemp("data")
    pixels, labels = digits.pixels[:, 0].numpy(), digits.labels.numpy()
    np.savez(data / "few.npz", images=pixels[:300], labels=labels[:300])
    np.savez(data / "no_labels.npz", images=pixels[:1200])
    np.savez(data / "three.npz", images=pixels[:3])
    np.savez(data / "rgb.npz", images=np.stack([pixels[:4]] * 3, -1))
    monkeypatch.chdir(tmp_path)
    kwargs = {k: data / f"{v.lower()}.npz" if isinstance(v, str) and v.isupper() else v for k, v in kwargs.items()}
    before = sorted(run.rglob("*"))
    calls, error = measure("", **dict(out=None) | kwargs)
    assert calls == 0 and isinstance(error, ValueError) and message in str(error), error
    assert list(tmp_path.iterdir()) == [] and sorted(run.rglob("*")) == before, "it leaves nothing behind"


SHARED = """
import sys
from test_evaluation import *
from ddpm_lit.processes import this_process
torch.set_num_threads(1)
here, folder = this_process(), Path(sys.argv[1])
bits, statistics, small = shared()
assert small.n == 3 and here.num_processes == 2
if here.is_main_process:
    torch.save([*bits, *statistics[:3]], folder / "found.pt")
evaluate_run(request(folder, "two.json"))
"""


def corners(pixels):
    return pixels.flatten(1)[:, ::9].double()


def shared():
    "What several processes work out together; the last has nothing for the second of them to do."
    pixels = torch.randint(256, (37, 1, 8, 8), generator=rng(50), dtype=torch.uint8)
    bits = evaluate_bpd(model(S, variance="learned"), Images(pixels), batch_size=5, generator=rng(51))
    return bits, image_statistics(corners, pixels, batch_size=5), image_statistics(corners, pixels[:3], batch_size=5)


def request(folder, out):
    return Request(folder / "run", n=50, batch_size=18, reference=folder / "real.npz", out=folder / out)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_share_an_evaluation(tmp_path):
    class_model().save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "shared.py").write_text(SHARED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "shared.py")]
    done = subprocess.run([*torchrun, str(tmp_path)], capture_output=True, text=True, env=os.environ | PATHS)
    assert done.returncode == 0, done.stderr
    bits, statistics, _ = shared()
    found, expected = torch.load(tmp_path / "found.pt", weights_only=False), [*bits, *statistics[:3]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-12)
    (tmp_path / "real.npz").unlink()
    evaluate_run(request(tmp_path, "one.json"))
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    for part in ("bits_per_dim", "samples"):
        assert one[part].keys() == two[part].keys()
        for name in one[part]:
            exact = name in ("features", "sampler", "mixed_precision", "data")
            assert two[part][name] == (one[part][name] if exact else pytest.approx(one[part][name], rel=1e-5)), name
    assert dict(content(tmp_path / "two"))["samples.png"] == dict(content(tmp_path / "one"))["samples.png"]
