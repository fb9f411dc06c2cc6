"""Exact distributions: against matrix inverses in NumPy, torch.distributions, autograd, and simulation."""

import functools

import numpy as np
import pytest
import torch
from doubles import rng
from scipy.stats import ks_2samp

from ddpm_lit.bound import vlb_terms
from ddpm_lit.ddpm import DDPM, first_step_patched
from ddpm_lit.evaluation import evaluate_bpd
from ddpm_lit.exact import (
    GaussianData,
    Mixture,
    MixtureData,
    error_floor,
    exact_ddpm,
    expected_bound,
    optimal_variance,
)
from ddpm_lit.forward import linear_schedule, q_sample, q_step
from ddpm_lit.images import Images, to_pixels
from ddpm_lit.sampler import ancestral_sample, ddim_sample

s = linear_schedule()
DIMENSIONS = [1, 2, 3, 7, 16, 64]
TIMES = [0, 1, 40, 500, 999]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@functools.cache
def mixture(d, K=3, rank=None):
    "Weights, means and covariances of K parts, of full rank unless said."
    weights = torch.rand(K, generator=rng(d), dtype=torch.float64) + 0.2
    root = randn(K, d, rank or d, seed=d + 1) / (5 * (rank or d)) ** 0.5
    ridge = 0.0 if rank else 0.01
    return weights / weights.sum(), randn(K, d, seed=d + 2) / 2, root @ root.mT + ridge * torch.eye(d).double()


def torchs(weights, means, covs):
    distributions = torch.distributions
    parts = distributions.MultivariateNormal(means, covs)
    return distributions.MixtureSameFamily(distributions.Categorical(weights), parts)


def conditional(weights, means, covs, y, scale, noise):
    "Mean and covariance of x given y = scale * x + noise, for one y, with matrix inverses, in NumPy."
    weights, means, covs, y = (np.asarray(v) for v in (weights, means, covs, y))
    eye, logs, centres, spreads = np.eye(len(y)), [], [], []
    for w, m, S in zip(weights, means, covs, strict=True):
        C = scale**2 * S + noise * eye
        gap = y - scale * m
        inverse = np.linalg.inv(C)
        logs.append(np.log(w) - 0.5 * gap @ inverse @ gap - 0.5 * np.linalg.slogdet(C)[1])
        centres.append(m + scale * S @ inverse @ gap)
        spreads.append(S - scale**2 * S @ inverse @ S)
    fractions = np.exp(np.array(logs) - max(logs))
    fractions /= fractions.sum()
    mean = sum(r * c for r, c in zip(fractions, centres, strict=True))
    off = [c - mean for c in centres]
    return mean, sum(r * (S + np.outer(o, o)) for r, S, o in zip(fractions, spreads, off, strict=True))


# ------------------------------------------------------------------------------- distributions and their parts


@pytest.mark.parametrize("d", DIMENSIONS)
def test_densities_are_those_of_torch(d):
    weights, means, covs = mixture(d)
    data, x = MixtureData(weights, means, covs), randn(50, d, seed=9)
    torch.testing.assert_close(data.log_prob(x), torchs(weights, means, covs).log_prob(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(data.nll(x), -data.log_prob(x))
    for t in TIMES:
        ab = s.alpha_bar[t]
        noised = torchs(weights, ab.sqrt() * means, ab * covs + (1 - ab) * torch.eye(d).double())
        torch.testing.assert_close(data.marginal(s, t).log_prob(x), noised.log_prob(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("t", TIMES)
def test_posterior_and_reverse_step_are_those_of_matrix_inverses(d, t):
    weights, means, covs = mixture(d)
    data = MixtureData(weights, means, covs)
    x_t = q_sample(s, data.sample(4, rng(1)), t, randn(4, d, seed=2))
    behind, step = data.posterior(s, x_t, t), data.reverse_step(s, x_t, t)
    before, ab_prev = s.alpha_bar_prev[t], s.alpha_bar_prev[t].item()
    noised = weights, before.sqrt() * means, before * covs + (1 - before) * torch.eye(d).double()
    assert 0 <= ab_prev <= 1
    for i in range(4):
        ab, alpha = s.alpha_bar[t].item(), s.alpha[t].item()
        for ours, theirs in (
            (behind, conditional(weights, means, covs, x_t[i], ab**0.5, 1 - ab)),
            (step, conditional(*noised, x_t[i], alpha**0.5, 1 - alpha)),
        ):
            np.testing.assert_allclose(ours.mean()[i], theirs[0], rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(ours.mean_variance()[i], np.trace(theirs[1]) / d, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_score_is_the_gradient_of_the_log_density(d):
    data = MixtureData(*mixture(d))
    for t in TIMES:
        x = randn(20, d, seed=3).requires_grad_()
        (slope,) = torch.autograd.grad(data.marginal(s, t).log_prob(x).sum(), x)
        torch.testing.assert_close(data.marginal(s, t).score(x), slope, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(data.eps(s, x, t), -(1 - s.alpha_bar[t]).sqrt() * slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("d", [1, 5, 64])
def test_a_mixture_of_one_part_is_a_gaussian_and_equal_parts_are_one(d):
    _, means, covs = mixture(d)
    gauss, x = GaussianData(means[0], covs[0]), randn(30, d, seed=4)
    same = MixtureData([0.25, 0.75], means[[0, 0]], covs[[0, 0]])
    for other in (MixtureData([1.0], means[:1], covs[:1]), same):
        for t in TIMES:
            both = [(data.posterior(s, x, t), data.marginal(s, t)) for data in (gauss, other)]
            for a, b in zip(*both, strict=True):
                torch.testing.assert_close(a.mean(), b.mean(), rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(a.mean_variance(), b.mean_variance(), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(gauss.eps(s, x, t), other.eps(s, x, t), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("d", "rank"), [(2, 1), (7, 3), (64, 5)])
def test_flat_data_have_no_density_but_all_else(d, rank):
    weights, means, covs = mixture(d, 1, rank)
    flat = MixtureData(weights, means, covs)
    assert ((flat.parts.var > 0).sum() == rank).all()
    for method in (flat.log_prob, flat.nll, flat.score):
        with pytest.raises(ValueError, match="covs must have full rank"):
            method(means)
    outside = torch.eye(d).double() - covs[0] @ torch.linalg.pinv(covs[0])  # projects the plane away
    draws = flat.sample(100, rng(5)) - means
    assert draws.std() > 0.05 and (draws @ outside).abs().max() < 1e-6
    x_t = q_sample(s, draws + means, 300, randn(100, d, seed=6))
    assert ((flat.posterior(s, x_t, 300).mean() - means) @ outside).abs().max() < 1e-6
    ab = s.alpha_bar[300]
    noised = torchs(weights, ab.sqrt() * means, ab * covs + (1 - ab) * torch.eye(d).double())
    torch.testing.assert_close(flat.marginal(s, 300).log_prob(x_t), noised.log_prob(x_t), rtol=1e-8, atol=1e-8)


def test_points_are_averaged_by_their_probabilities():
    points = torch.rand(100, 12, generator=rng(7), dtype=torch.float64) * 2 - 1
    data, t = MixtureData(torch.full((100,), 0.01), points, 0.0), 200
    x_t = q_sample(s, points[:10], t, randn(10, 12, seed=8))
    ab = s.alpha_bar[t].item()
    distance = ((x_t[:, None] - ab**0.5 * points) ** 2).sum(-1)
    average = (-distance / (2 * (1 - ab))).softmax(1) @ points
    torch.testing.assert_close(data.posterior(s, x_t, t).mean(), average, rtol=1e-9, atol=1e-10)


def test_one_variance_for_all_or_one_each_is_that_many_matrices():
    weights, means, _ = mixture(4)
    eye, x = torch.eye(4).double(), randn(20, 4, seed=10)
    for covs, matrices in ((0.3, [0.3] * 3), ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])):
        full = MixtureData(weights, means, torch.stack([v * eye for v in matrices]))
        short = MixtureData(weights, means, covs)
        torch.testing.assert_close(short.log_prob(x), full.log_prob(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(short.posterior(s, x, 50).mean(), full.posterior(s, x, 50).mean())
    torch.testing.assert_close(GaussianData(means[0], 0.3).log_prob(x), GaussianData(means[0], 0.3 * eye).log_prob(x))


# ----------------------------------------------------------------------------------- shapes, dtypes, devices, seeds


@pytest.mark.parametrize("t", TIMES)
def test_float32_is_float64_rounded_and_images_are_vectors(t):
    data = MixtureData(*mixture(16))
    x0 = data.sample(8, rng(11))
    x_t = q_sample(s, x0, t, randn(8, 16, seed=12)).float()
    as_images = x_t.reshape(8, 1, 4, 4)
    for predicts in ("eps", "x0", "mean", "v"):
        m = exact_ddpm(data, s, predicts)
        wide, narrow = m(x_t.double(), t)[0], m(x_t, t)[0]
        assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
        assert torch.equal(narrow, wide.float())
        assert torch.equal(m(as_images, t)[0], narrow.reshape(as_images.shape))
    assert torch.equal(data.eps(s, as_images, t).flatten(1), data.eps(s, x_t, t))
    as_net = DDPM(functools.partial(data.eps, s), s)(x_t.double(), t)[0]
    torch.testing.assert_close(as_net, exact_ddpm(data, s)(x_t.double(), t)[0], rtol=1e-7, atol=1e-8)


def test_each_image_may_have_its_own_t():
    data, t = MixtureData(*mixture(3)), torch.tensor(TIMES)
    x_t = randn(5, 3, seed=13)
    together = data.posterior(s, x_t, t), data.reverse_step(s, x_t, t)
    for i, one in enumerate(TIMES):
        alone = data.posterior(s, x_t[i : i + 1], one), data.reverse_step(s, x_t[i : i + 1], one)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a.mean()[i : i + 1], b.mean(), rtol=1e-12, atol=1e-12)
        density = data.marginal(s, t).log_prob(x_t)[i : i + 1], data.marginal(s, one).log_prob(x_t[i : i + 1])
        torch.testing.assert_close(*density, rtol=1e-12, atol=1e-12)


def test_draws_have_the_moments_of_the_mixture_and_repeat():
    weights, means, covs = mixture(3)
    data = MixtureData(weights, means, covs)
    x = data.sample(200_000, rng(14))
    mean = (weights[:, None] * means).sum(0)
    second = torch.einsum("k,kij->ij", weights, covs + means[:, :, None] * means[:, None])
    for samples, value in ((x, mean), (x[:, :, None] * x[:, None], second)):
        z = (samples.mean(0) - value) / (samples.std(0) / len(x) ** 0.5)
        assert z.abs().max() < 5
    torch.testing.assert_close(data.mean(), mean)
    torch.testing.assert_close(data.mean_variance(), (second - torch.outer(mean, mean)).trace() / 3)
    assert torch.equal(x, data.sample(200_000, rng(14))) and not torch.equal(x, data.sample(200_000, rng(15)))


def test_a_draw_of_every_reverse_step_follows_the_joint_distribution():
    # Pairs made backwards, x_t first and x_{t-1} by the reverse step, against pairs made forwards.
    data, t, n = MixtureData(*mixture(2)), 150, 100_000
    forwards = q_sample(s, data.sample(n, rng(16)), t - 1, randn(n, 2, seed=17))
    forwards = forwards, q_step(s, forwards, t).sample(rng(18))
    x_t = q_sample(s, data.sample(n, rng(19)), t, randn(n, 2, seed=20))
    backwards = data.reverse_step(s, x_t, t).sample(generator=rng(21)), x_t
    a, b = (torch.cat([x, y, x * y, x**3, (x - y) ** 2], 1) for x, y in (forwards, backwards))
    z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / n).sqrt()
    assert z.abs().max() < 5


devices = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", devices)
def test_all_of_it_runs_on(device):
    data, moved, on_device = MixtureData(*mixture(3)), MixtureData(*mixture(3)).to(device), s.to(device)
    assert isinstance(moved, MixtureData) and moved.axes.device.type == device
    x_t = randn(6, 3, seed=22)
    expected = exact_ddpm(data, s).p_step(x_t, 100, clip=False).mean
    got = exact_ddpm(moved, on_device).p_step(x_t.to(device), 100, clip=False).mean
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.sample(9, rng(23)).cpu(), data.sample(9, rng(23)), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------- the chain


def sliced_p_values(a, b, directions=12):
    "p-values of Kolmogorov and Smirnov's test of two samples, projected on directions at equal angles."
    angles = torch.arange(directions, dtype=torch.float64) * torch.pi / directions
    slices = torch.stack([angles.cos(), angles.sin()])
    pairs = zip((a @ slices).T.numpy(), (b @ slices).T.numpy(), strict=True)
    return np.array([ks_2samp(*pair).pvalue for pair in pairs])


def test_the_chain_returns_the_data():
    data, n = MixtureData(*mixture(2)), 4000
    truth = data.sample(n, rng(24))
    m = exact_ddpm(data, linear_schedule(250, 4e-4, 0.08), variance="beta")
    drawn = ancestral_sample(m, (n, 2), randn(n, 2, seed=25), rng(26), clip=False)
    assert sliced_p_values(truth, drawn).min() > 1e-3
    drawn = ddim_sample(m, (n, 2), 250, x_T=randn(n, 2, seed=25), clip=False)
    assert sliced_p_values(truth, drawn).min() > 1e-3
    drawn = ddim_sample(m, (n, 2), 3, x_T=randn(n, 2, seed=25), clip=False)
    assert sliced_p_values(truth, drawn).min() < 1e-6, "the test sees what three steps do to the data"


@pytest.mark.parametrize("d", [1, 2, 16])
def test_the_bound_is_above_the_exact_nll_by_what_was_predicted(d):
    weights, means, covs = mixture(d)
    data = MixtureData(weights, means / 3, covs / 4)  # inside [-1, 1]
    x0 = to_pixels(data.sample(2000, rng(27)).reshape(-1, 1, 1, d)).double().flatten(1) / 127.5 - 1
    c, bits = linear_schedule(12, 0.02, 0.8), np.log(2)
    floor = error_floor(data, c, 4000, rng(28))
    bin_nats, excess = -np.log(2 / 255), {}
    nll = (data.nll(x0) / d + bin_nats) / bits
    for variance, var in (
        ("beta", c.beta),
        ("beta_tilde", first_step_patched(c)),
        ("learned", optimal_variance(c, floor)),
    ):
        m = exact_ddpm(data, c, variance=variance, floor=floor if variance == "learned" else None)
        total = vlb_terms(m, x0, rng(29), clip=False).total
        predicted = (expected_bound(data, c, floor, var) / d + bin_nats) / bits
        error = (total - nll).std() / len(x0) ** 0.5
        assert abs((total - nll).mean() - (predicted - nll.mean())) < 5 * error + 0.01
        excess[variance] = ((total - nll).mean() / error).item()
    assert min(excess.values()) > 0 and max(excess.values()) > 5, "a bound is a bound, in standard errors"


def test_evaluate_bpd_agrees_with_the_prediction():
    data = GaussianData([0.1, -0.2, 0.0, 0.3], 0.05)
    c = linear_schedule(30, 0.005, 0.5)
    floor = error_floor(data, c, 2)
    images = Images(to_pixels(data.sample(1500, rng(30)).float().reshape(-1, 1, 2, 2)))
    got = evaluate_bpd(exact_ddpm(data, c), images, generator=rng(31))
    predicted = (expected_bound(data, c, floor, first_step_patched(c)) / 4 - np.log(2 / 255)) / np.log(2)
    assert abs(got.total - predicted) < 5 * got.error + 0.02


@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_optimal_variance_of_a_gaussian_is_the_mean_over_its_axes(d):
    _, means, covs = mixture(d)
    lam = torch.linalg.eigvalsh(covs[0])[:, None]
    data = GaussianData(means[0], covs[0])
    floor = error_floor(data, s, 2)
    best = optimal_variance(s, floor)
    before, after = (ab * lam + 1 - ab for ab in (s.alpha_bar_prev, s.alpha_bar))
    torch.testing.assert_close(best, (s.beta * before / after).mean(0), rtol=1e-8, atol=0)
    m = exact_ddpm(data, s, variance="learned", floor=floor)
    for t in TIMES:
        torch.testing.assert_close(m.p_step(randn(2, d), t).var, best[t].expand(2, d), rtol=1e-8, atol=0)


# ------------------------------------------------------------------------------------------------------- bad input

good = mixture(3)
BAD = {
    r"means must be \(K, d\)": lambda: MixtureData([1.0], [0.0, 0.0], 1.0),
    r"weights \(K,\), got": lambda: MixtureData([0.5, 0.5], [[0.0, 0.0]], 1.0),
    "weights must be positive and sum to 1": lambda: MixtureData([0.5, 0.4], [[0.0], [1.0]], 1.0),
    r"got \[1.5, -0.5\]": lambda: MixtureData([1.5, -0.5], [[0.0], [1.0]], 1.0),
    r"got \[1.0, nan\]": lambda: MixtureData([1.0, float("nan")], [[0.0], [1.0]], 1.0),
    "must be finite": lambda: MixtureData([1.0], [[float("inf")]], 1.0),
    r"covs must be \(3, 3, 3\), \(3,\) or a number": lambda: MixtureData(good[0], good[1], good[2][:, :2]),
    "covs must be symmetric": lambda: GaussianData([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]),
    "no negative variance along any axis, got -1": lambda: GaussianData([0.0, 0.0], [[0.0, 1.0], [1.0, 0.0]]),
    "no negative variance along any axis, got -2": lambda: GaussianData([0.0], -2.0),
    "x must have 3 entries": lambda: MixtureData(*good).log_prob(torch.zeros(2, 4)),
    "t must lie in 0 … 999": lambda: MixtureData(*good).marginal(s, 1000),
    "n must be given for one distribution": lambda: MixtureData(*good).sample(),
    "for many it must not, got 4": lambda: MixtureData(*good).reverse_step(s, torch.zeros(2, 3), 5).sample(4),
    "predicts must be one of": lambda: exact_ddpm(MixtureData(*good), s, "epsilon"),
    "floor must be given if and only if variance is 'learned'": lambda: exact_ddpm(
        MixtureData(*good), s, variance="learned"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_many_distributions_are_one_for_each_image():
    step = MixtureData(*good).reverse_step(s, randn(5, 3), 10)
    assert type(step) is Mixture and step.weights.shape == (5, 3)
    assert step.sample(generator=rng(31)).shape == (5, 3)
    torch.testing.assert_close(step.weights.sum(1), torch.ones(5).double())
