"""Properties of every Gaussian and every schedule, tried on examples that hypothesis picks.

Each of them is reached by a second route (quadrature, precisions, torch.distributions, a composition of single steps),
never by calling the same function twice. The examples are the same in every run.
"""

import pytest
import torch
from doubles import rng
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_lit.bound import discretized_log_prob, vlb_terms
from ddpm_lit.ddpm import DDPM, PREDICTS, VARIANCES
from ddpm_lit.forward import Schedule, linear_schedule, q_marginal, q_sample, q_step
from ddpm_lit.gaussian import Gaussian, bayes
from ddpm_lit.objective import bound_loss, noised, simple_loss, vlb_weight
from ddpm_lit.posterior import (
    beta_tilde,
    eps_from_x0,
    mean_from_x0,
    posterior_coefficients,
    q_posterior,
    v_from_x0,
    x0_from_eps,
    x0_from_mean,
    x0_from_v,
)

many = settings(derandomize=True, max_examples=200, deadline=None, database=None)

numbers = st.floats(-5, 5, allow_nan=False).map(lambda v: round(v, 6))
scales = st.one_of(st.floats(0.05, 4), st.floats(-4, -0.05))
variances = st.floats(0.01, 10)
vector = torch.tensor


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


gaussians = st.builds(lambda mean, var: Gaussian(scalar(mean), scalar(var)), numbers, variances)
betas = st.lists(st.floats(1e-4, 0.6), min_size=2, max_size=12)
schedules = betas.map(Schedule)


@st.composite
def at_a_step(draw, first=0):
    "A schedule, one of its steps, and two images of float64 numbers."
    s = draw(schedules)
    t = draw(st.integers(first, s.T - 1))
    pixels = st.lists(numbers, min_size=6, max_size=6)
    x, y = (torch.tensor(draw(pixels), dtype=torch.float64).reshape(2, 1, 1, 3) for _ in range(2))
    return s, t, x, y


def close(lhs, rhs, rtol=1e-9, atol=1e-12):
    lhs, rhs = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in (lhs, rhs)))
    torch.testing.assert_close(lhs, rhs, rtol=rtol, atol=atol)


def same_distribution(g, h, **tolerance):
    close(g.mean, h.mean, **tolerance)
    close(g.var, h.var, **tolerance)


# ---------------------------------------------------------------------------------------------- Gaussians


@many
@given(gaussians, numbers)
def test_log_prob_and_entropy_are_those_of_torch(g, x):
    theirs = torch.distributions.Normal(g.mean, g.var.sqrt())
    close(g.log_prob(scalar(x)), theirs.log_prob(scalar(x)))
    close(g.entropy(), theirs.entropy(), atol=1e-9)


@many
@given(gaussians, gaussians)
def test_kl_is_that_of_torch_and_never_negative(g, h):
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(g.mean, g.var.sqrt()), normal(h.mean, h.var.sqrt()))
    close(g.kl(h), theirs, atol=1e-9)
    assert g.kl(h) >= 0
    assert g.kl(g) == 0


@many
@given(gaussians, st.floats(1e-3, 1), st.floats(1e-3, 1), st.booleans())
def test_kl_is_zero_only_between_equal_distributions(g, shift, factor, of_mean):
    other = Gaussian(g.mean + shift, g.var) if of_mean else Gaussian(g.mean, g.var * (1 + factor))
    assert g.kl(other) > 1e-9


@many
@given(gaussians, scales, numbers, variances, scales, numbers, variances)
def test_two_affine_images_are_one(g, a, b, noise_1, c, d, noise_2):
    one_by_one = g.affine(a, b, noise_1).affine(c, d, noise_2)
    same_distribution(one_by_one, g.affine(c * a, c * b + d, c**2 * noise_1 + noise_2), atol=1e-9)


@many
@given(gaussians, scales, numbers, st.floats(0.05, 5), numbers)
def test_affine_against_quadrature(g, a, b, noise_var, y):
    "The density of the image is the integral of the noise's density over x."
    x = g.mean + g.var.sqrt() * torch.linspace(-12, 12, 4001, dtype=torch.float64)
    noise = torch.distributions.Normal(a * x + b, noise_var**0.5)
    integral = torch.trapezoid((g.log_prob(x) + noise.log_prob(scalar(y))).exp(), x)
    close(g.affine(a, b, noise_var).log_prob(scalar(y)).exp(), integral, rtol=1e-6, atol=1e-9)


@many
@given(gaussians, numbers, scales, numbers, variances)
def test_bayes_in_precisions(prior, y, scale, shift, noise_var):
    "Precisions add, and the mean is their weighted mean."
    precision = 1 / prior.var + scale**2 / noise_var
    mean = (prior.mean / prior.var + scale * (y - shift) / noise_var) / precision
    same_distribution(bayes(prior, y, scale, shift, noise_var), Gaussian(mean, 1 / precision), rtol=1e-8, atol=1e-9)


@many
@given(gaussians, gaussians, numbers, scales, numbers, variances)
def test_bayes_is_the_ratio_of_the_joint_to_the_evidence(prior, at, y, scale, shift, noise_var):
    x = at.mean
    likelihood = torch.distributions.Normal(scale * x + shift, noise_var**0.5).log_prob(scalar(y))
    evidence = prior.affine(scale, shift, noise_var).log_prob(scalar(y))
    posterior = bayes(prior, y, scale, shift, noise_var)
    close(posterior.log_prob(x), prior.log_prob(x) + likelihood - evidence, rtol=1e-7, atol=1e-7)


@many
@given(gaussians, numbers, scales, variances, numbers, scales, variances)
def test_two_observations_in_either_order_or_at_once(prior, y, a, noise_a, z, c, noise_c):
    one = bayes(bayes(prior, y, a, 0.0, noise_a), z, c, 0.0, noise_c)
    other = bayes(bayes(prior, z, c, 0.0, noise_c), y, a, 0.0, noise_a)
    same_distribution(one, other, rtol=1e-8, atol=1e-9)

    # At once: x conditioned on both, by the inverse of their 2 by 2 covariance.
    scale, noise = vector([a, c], dtype=torch.float64), torch.diag(vector([noise_a, noise_c], dtype=torch.float64))
    gain = prior.var * scale @ torch.linalg.inv(prior.var * torch.outer(scale, scale) + noise)
    mean = prior.mean + gain @ (vector([y, z], dtype=torch.float64) - scale * prior.mean)
    same_distribution(one, Gaussian(mean, prior.var - gain @ scale * prior.var), rtol=1e-6, atol=1e-7)


@many
@given(numbers, numbers, scales, variances)
def test_a_certain_prior_is_not_moved(mean, y, scale, noise_var):
    certain = Gaussian(scalar(mean), scalar(0.0))
    same_distribution(bayes(certain, y, scale, 0.0, noise_var), certain, rtol=0, atol=0)


def test_draws_need_no_generator_and_live_on_the_device_of_the_distribution():
    torch.manual_seed(0)
    first = Gaussian(torch.zeros(3, 1), torch.ones(4)).sample()
    torch.manual_seed(0)
    assert first.shape == (3, 4) and torch.equal(first, torch.randn(3, 4))
    far = Gaussian(torch.zeros(3, device="meta"), torch.ones(3, device="meta"))
    assert far.sample().device.type == far.sample(torch.Generator()).device.type == "meta"


# ---------------------------------------------------------------------------------------------- schedules


@many
@given(betas)
def test_the_tables_of_a_schedule(values):
    s = Schedule(values)
    running = 1.0
    for t, beta in enumerate(values):
        close(s.alpha_bar_prev[t], running)
        running *= 1 - beta
        close(s.alpha_bar[t], running)
    assert (s.alpha_bar.diff() < 0).all() and 0 < s.alpha_bar[-1] and s.alpha_bar[0] < 1 and s.alpha_bar_prev[0] == 1
    assert {x.dtype for x in (s.beta, s.alpha, s.alpha_bar, s.alpha_bar_prev)} == {torch.float64}


@many
@given(at_a_step())
def test_the_marginal_is_the_composition_of_the_steps(case):
    s, t, x0, _ = case
    composed = Gaussian(x0, torch.zeros_like(x0))
    for step in range(t + 1):
        composed = composed.affine(s.alpha[step].sqrt(), 0.0, s.beta[step])
        same_distribution(q_step(s, x0, step), Gaussian(x0 * s.alpha[step].sqrt(), s.beta[step]))
    same_distribution(composed, q_marginal(s, x0, t))


@many
@given(at_a_step(first=1))
def test_posterior_after_marginal_is_the_marginal_one_step_earlier(case):
    s, t, x0, _ = case
    of_x0, of_x_t = posterior_coefficients(s)
    back = q_marginal(s, x0, t).affine(of_x_t[t], of_x0[t] * x0, beta_tilde(s)[t])
    same_distribution(back, q_marginal(s, x0, t - 1))


@many
@given(at_a_step(first=1))
def test_the_posterior_is_bayes_rule_of_marginal_and_step(case):
    s, t, x0, x_t = case
    by_bayes = bayes(q_marginal(s, x0, t - 1), x_t, s.alpha[t].sqrt(), 0.0, s.beta[t])
    same_distribution(q_posterior(s, x0, x_t, t), by_bayes, rtol=1e-8, atol=1e-10)


@many
@given(at_a_step())
def test_the_first_posterior_is_x0_itself(case):
    s, _, x0, x_t = case
    same_distribution(q_posterior(s, x0, x_t, 0), Gaussian(x0, torch.zeros_like(x0)), rtol=1e-12)


@many
@given(at_a_step())
def test_predictions_convert_there_and_back(case):
    s, t, x0, eps = case
    x_t = q_sample(s, x0, t, eps)
    root, noise = s.alpha_bar[t].sqrt(), (1 - s.alpha_bar[t]).sqrt()
    # What each of them means, from its definition.
    v = root * eps - noise * x0
    mean = q_posterior(s, x0, x_t, t).mean
    near = {"rtol": 1e-7, "atol": 1e-7}
    close(eps_from_x0(s, x_t, t, x0), eps, **near)
    close(v_from_x0(s, x_t, t, x0), v, **near)
    close(mean_from_x0(s, x_t, t, x0), mean, **near)
    for back, prediction in ((x0_from_eps, eps), (x0_from_v, v), (x0_from_mean, mean)):
        close(back(s, x_t, t, prediction), x0, **near)


@many
@given(at_a_step(), st.sampled_from(["eps", "x0", "mean", "v"]))
def test_every_prediction_gives_the_same_step(case, predicts):
    s, t, x0, eps = case
    x_t = q_sample(s, x0, t, eps)
    reference = DDPM(lambda x, t: x0, s, predicts="x0")
    truth = DDPM(None, s, predicts=predicts).target(x_t, t, x0)
    same_distribution(
        DDPM(lambda x, t: truth, s, predicts=predicts).p_step(x_t, t, clip=False),
        reference.p_step(x_t, t, clip=False),
        rtol=1e-7,
        atol=1e-7,
    )


@many
@given(schedules, st.data())
def test_a_step_for_each_image_is_the_step_of_each_image(s, data):
    steps = data.draw(st.lists(st.integers(0, s.T - 1), min_size=3, max_size=3))
    x0, eps = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = q_sample(s, x0, torch.tensor(steps), eps)
    for i, t in enumerate(steps):
        assert torch.equal(together[i : i + 1], q_sample(s, x0[i : i + 1], t, eps[i : i + 1]))


# ---------------------------------------------------------------------------------------------- the bound as a loss


def bending(s, predicts, variance):
    "A model with a network that bends, and depends on t; its variance may leave the span between the other two."

    def net(x, t):
        angle = 2 * x + t.to(x).reshape(-1, *[1] * (x.ndim - 1))
        return torch.cat([1.5 * angle.sin(), 1.5 * angle.cos()], 1) if variance == "learned" else 1.5 * angle.sin()

    return DDPM(net, s, predicts, variance)


def at_times(monkeypatch, s, times, eps):
    "Let `bound_loss` look at these t with this noise."
    draws = lambda s_, x0, generator, part: (times, eps, q_sample(s, x0, times, eps))  # noqa: E731
    monkeypatch.setattr("ddpm_lit.objective.noised", draws)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("predicts", PREDICTS)
def test_over_all_t_the_loss_is_the_bound_without_its_prior(monkeypatch, predicts, variance):
    s, b = linear_schedule(8, 0.004, 0.4), 5
    x0 = torch.randint(256, (b, 1, 2, 2), generator=rng(0)).double() / 127.5 - 1
    x0[0, 0, 0], x0[1, 0, 0] = -1, 1
    m, draw = bending(s, predicts, variance), rng(1)
    bits = vlb_terms(m, x0, rng(1), clip=False)
    losses = {}
    for t in [*range(1, 8), 0]:  # the order in which vlb_terms draws
        eps = torch.randn(x0.shape, generator=draw, dtype=x0.dtype)
        at_times(monkeypatch, s, torch.full((b,), t), eps)
        losses[t] = bound_loss(m, x0)
        close(losses[t] / s.T, (bits.kl[:, t - 1] if t else bits.decoder).mean(), rtol=1e-10)
    close(sum(losses.values()) / s.T, (bits.total - bits.prior).mean(), rtol=1e-10)


def test_the_loss_of_many_draws_is_the_bound_on_average():
    s = linear_schedule(6, 0.01, 0.4)
    m, x0 = bending(s, "v", "learned"), torch.rand(1, 1, 1, 3, generator=rng(2)).mul(255).round() / 127.5 - 1
    bits = vlb_terms(m, x0.expand(20_000, -1, -1, -1), rng(3), clip=False)
    expected = bits.total - bits.prior
    draw = rng(4)
    losses = torch.stack([bound_loss(m, x0.expand(500, -1, -1, -1), draw) for _ in range(60)])
    error = (losses.var() / 60 + expected.var() / 20_000).sqrt()
    assert abs(losses.mean() - expected.mean()) < 4.5 * error and error < 0.02 * expected.mean()


@pytest.mark.parametrize("k", [2, 3])
def test_the_losses_of_equal_parts_average_to_that_of_the_batch(k):
    s = linear_schedule(20, 0.01, 0.3)
    x0 = torch.randint(256, (12, 1, 2, 2), generator=rng(5)).double() / 127.5 - 1
    m = bending(s, "eps", "learned")
    for loss in (bound_loss, simple_loss):
        parts = torch.stack([loss(m, part, rng(6), (i, k)) for i, part in enumerate(x0.chunk(k))])
        close(parts.mean(), loss(m, x0, rng(6)))
        assert parts.std() > 1e-3
    batch = noised(s, x0, rng(7), (0, 1))
    parts = [noised(s, part, rng(7), (i, k)) for i, part in enumerate(x0.chunk(k))]
    for name, together, apart in zip(("t", "eps", "x_t"), batch, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart)), name


def test_every_t_is_drawn_as_often():
    t, eps, x_t = noised(linear_schedule(7), torch.zeros(70_000, 1), rng(8), (0, 1))
    counts = t.bincount(minlength=7)
    assert len(counts) == 7 and ((counts - 10_000) ** 2 / 10_000).sum() < 30  # chi-squared with 6 degrees
    close(x_t, (1 - linear_schedule(7).alpha_bar).sqrt()[t, None] * eps.double(), rtol=1e-5)


@pytest.mark.parametrize("schedule", [linear_schedule(), linear_schedule(50, 0.002, 0.2), linear_schedule(2)])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("predicts", PREDICTS)
def test_gradients_of_the_bound_are_finite_at_every_t_for_any_network(monkeypatch, predicts, variance, schedule):
    s, t = schedule, torch.arange(schedule.T)
    x0 = torch.tensor([-1.0, 1.0, 0.0, 3 / 255]).expand(s.T, 4).reshape(s.T, 1, 2, 2)
    at_times(monkeypatch, s, t, torch.randn(x0.shape, generator=rng(9)))
    for size in (0.0, 1.0, -1.0, 50.0, -50.0):
        for v in (0.0, 1.0, -1.0, 5.0, -5.0) if variance == "learned" else (0.0,):
            out = torch.cat([torch.full_like(x0, size), torch.full_like(x0, v)][: 1 + (variance == "learned")], 1)
            out.requires_grad_()
            loss = bound_loss(DDPM(lambda x, t, out=out: out, s, predicts, variance), x0)
            (gradient,) = torch.autograd.grad(loss, out)
            assert loss.isfinite() and gradient.isfinite().all(), (size, v)


@pytest.mark.parametrize("off", [0.01, 0.1, 0.5, 3.0])
def test_gradients_of_the_decoder_have_their_digits_in_float32(off):
    "Against differences of the log-probability in float64; 3 is 300 stds. Beyond 1,000 torch's `log_ndtr` errs."
    x, h = torch.tensor([-1.0, -0.5, 0.0, 3 / 255, 1.0]), 1e-6 * (1 + off)
    mean, var = (x + off).requires_grad_(), torch.full((5,), 1e-4, requires_grad=True)
    of_mean, of_var = torch.autograd.grad(discretized_log_prob(Gaussian(mean, var), x).sum(), (mean, var))

    def log_prob(dm, dv):
        return discretized_log_prob(Gaussian(mean.detach().double() + dm, var.detach().double() * (1 + dv)), x.double())

    close(of_mean, (log_prob(h, 0) - log_prob(-h, 0)) / (2 * h), rtol=1e-3, atol=1e-2)
    close(of_var, (log_prob(0, 1e-6) - log_prob(0, -1e-6)) / 2e-6 / 1e-4, rtol=1e-3, atol=1)


# ---------------------------------------------------------------------------------------------- what is refused


@many
@given(betas, st.one_of(st.floats(max_value=0.0), st.floats(min_value=1.0), st.just(float("nan"))), st.integers(0))
def test_a_beta_outside_0_to_1_is_refused(values, wrong, place):
    values.insert(place % (len(values) + 1), wrong)
    with pytest.raises(ValueError, match=r"beta must lie in \(0, 1\)"):
        Schedule(values)


@many
@given(st.integers(max_value=1))
def test_fewer_than_two_steps_are_refused(T):
    with pytest.raises(ValueError, match=f"T must be at least 2, got {T}"):
        linear_schedule(T)


@many
@given(schedules, st.one_of(st.integers(max_value=-1), st.integers(0)), st.booleans())
def test_a_step_outside_the_schedule_is_refused(s, t, one_for_each):
    t = t if t < 0 else s.T + t
    t = max(min(t, 2**62), -(2**62))
    x = torch.zeros(2, 1, 1, 1)
    step = torch.tensor([0, t]) if one_for_each else t
    for call in (q_step, q_marginal, lambda s, x, t: q_sample(s, x, t, x), lambda s, x, t: q_posterior(s, x, x, t)):
        with pytest.raises(ValueError, match=f"t must lie in 0 … {s.T - 1}, got "):
            call(s, x, step)


def test_images_of_whole_numbers_are_refused():
    s, pixels = linear_schedule(10), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for call in (
        lambda: q_marginal(s, pixels, 1),
        lambda: q_sample(s, pixels, 1, pixels),
        lambda: simple_loss(DDPM(lambda x, t: x, s), pixels),
    ):
        with pytest.raises(ValueError, match=r"floating point in \[-1, 1\], got torch.uint8"):
            call()


@pytest.mark.parametrize("shape", [(2, 1, 4, 1), (1, 1, 4, 4), (4, 4), ()])
def test_noise_and_images_of_another_shape_are_refused(shape):
    "Shapes that would broadcast, which is how such a mistake stays unseen."
    s, x, other = linear_schedule(10), torch.zeros(2, 1, 4, 4), torch.zeros(shape)
    with pytest.raises(ValueError, match="eps must be shaped like x0"):
        q_sample(s, x, 1, other)
    with pytest.raises(ValueError, match="x0 must be shaped like x_t"):
        q_posterior(s, other, x, 1)
    with pytest.raises(ValueError, match="net must return a tensor shaped like x_t"):
        DDPM(lambda x, t: other, s).p_step(x, 1)


def test_a_learned_variance_has_no_weight():
    with pytest.raises(ValueError, match="variance must be one of beta, beta_tilde; got 'learned'"):
        vlb_weight(linear_schedule(10), variance="learned")
