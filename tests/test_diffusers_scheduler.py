"""`DDPM.p_step` and the schedule against `diffusers.DDPMScheduler`, a second implementation by other people.

The scheduler keeps float32 tables. They are compared as they are first; the formulas are then compared in float64, with
the scheduler's tables replaced by ours, so that agreement is asked to ten digits and not to six.
"""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_lit.checks import rng
from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule, q_sample
from ddpm_lit.posterior import beta_tilde

T = 1000
SHAPE = (5, 3, 4, 4)
PREDICTS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES = {"beta_tilde": "fixed_small", "beta": "fixed_large", "learned": "learned_range"}
CASES = list(itertools.product(PREDICTS, VARIANCES, [True, False]))


def net(x_t, t, channels):
    "A fixed network: bounded, different for each entry and step, and often outside [-1, 1]."
    waves = [torch.sin((3 + k) * x_t + 0.1 * t[:, None, None, None]) * (1.5 - k) for k in range(channels // SHAPE[1])]
    return torch.cat(waves, dim=1)


def both(predicts, variance, clip):
    "Our model and the scheduler set to mean the same; the scheduler in float64."
    s = linear_schedule(T)
    channels = SHAPE[1] * (2 if variance == "learned" else 1)
    m = DDPM(lambda x_t, t: net(x_t, t, channels), s, predicts=predicts, variance=variance)
    theirs = DDPMScheduler(T, prediction_type=PREDICTS[predicts], variance_type=VARIANCES[variance], clip_sample=clip)
    theirs.betas, theirs.alphas, theirs.alphas_cumprod, theirs.one = s.beta, s.alpha, s.alpha_bar, s.beta.new_ones(())
    return m, theirs


def close(ours, theirs, rtol=1e-10, atol=1e-12):
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def their_step(theirs, m, x_t, t, generator):
    "One step of the scheduler, for the network of `m`."
    return theirs.step(m.net(x_t, torch.full((len(x_t),), t)), t, x_t, generator=generator).prev_sample


def test_tables_agree_to_float32():
    s, theirs = linear_schedule(T), DDPMScheduler(T)
    close(s.beta.float(), theirs.betas, rtol=1e-6)
    close(s.alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-5)
    # The tolerance refuses a schedule that is off by one step.
    assert not torch.allclose(s.alpha_bar_prev.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("beta_1, beta_T", [(1e-4, 0.02), (1e-3, 0.3)])
@pytest.mark.parametrize("steps", [2, 50, T])
def test_other_linear_schedules(steps, beta_1, beta_T):
    theirs = DDPMScheduler(steps, beta_start=beta_1, beta_end=beta_T)
    close(linear_schedule(steps, beta_1, beta_T).alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)


def test_adding_noise():
    s, theirs = linear_schedule(T), DDPMScheduler(T)
    x0 = torch.rand(SHAPE, generator=rng(0), dtype=torch.float64) * 2 - 1
    eps = torch.randn(SHAPE, generator=rng(1), dtype=torch.float64)
    t = torch.tensor([0, 1, 2, 500, 999])
    close(q_sample(s, x0.float(), t, eps.float()), theirs.add_noise(x0.float(), eps.float(), t), rtol=1e-4, atol=1e-5)
    theirs.alphas_cumprod = s.alpha_bar
    close(q_sample(s, x0, t, eps), theirs.add_noise(x0, eps, t))


@pytest.mark.parametrize("t", [1, 2, 500, 999])
@pytest.mark.parametrize("predicts, variance, clip", CASES)
def test_step(predicts, variance, clip, t):
    m, theirs = both(predicts, variance, clip)
    x_t = torch.randn(SHAPE, generator=rng(2), dtype=torch.float64)
    ours = m.p_step(x_t, t, clip)

    split = m.net(x_t, torch.full((len(x_t),), t)).chunk(2, dim=1)[1] if variance == "learned" else None
    var = theirs._get_variance(t, predicted_variance=split)
    var = var.exp() if variance == "learned" else var
    close(ours.var.expand(SHAPE), var.expand(SHAPE), atol=0)

    noise = torch.randn(SHAPE, generator=rng(3), dtype=torch.float64)
    close(ours.mean, their_step(theirs, m, x_t, t, rng(3)) - var.sqrt() * noise)
    # One draw from the same seed is the same image.
    close(ours.sample(rng(4)), their_step(theirs, m, x_t, t, rng(4)))


@pytest.mark.parametrize("predicts", PREDICTS)
def test_clipping_matters_where_it_is_tested(predicts):
    m, _ = both(predicts, "beta_tilde", True)
    x_t = torch.randn(SHAPE, generator=rng(2), dtype=torch.float64)
    assert (m.p_step(x_t, 500, clip=True).mean - m.p_step(x_t, 500, clip=False).mean).abs().max() > 1e-4


@pytest.mark.parametrize("predicts, variance, clip", CASES)
def test_the_first_step(predicts, variance, clip):
    """At t = 0 the scheduler adds no noise: it returns the mean. `p_step` has the same mean and keeps a variance.

    The bound needs that variance, for -log p(x_0 | x_1); a sampler must not use it. For "beta_tilde" it is the variance
    of the next step, where the scheduler has 0 raised to 1e-20.
    """
    m, theirs = both(predicts, variance, clip)
    x_t = torch.randn(SHAPE, generator=rng(5), dtype=torch.float64)
    ours = m.p_step(x_t, 0, clip)
    close(ours.mean, their_step(theirs, m, x_t, 0, rng(6)))
    close(ours.mean, m.x0_hat(x_t, 0, m(x_t, 0)[0], clip))

    small, large = beta_tilde(m.s)[1], m.s.beta[0]
    if variance == "learned":
        weight = (m(x_t, 0)[1] + 1) / 2
        close(ours.var, large**weight * small ** (1 - weight), atol=0)
    else:
        close(ours.var.expand(SHAPE), {"beta_tilde": small, "beta": large}[variance].expand(SHAPE), atol=0)
    assert theirs._get_variance(0, variance_type="fixed_small") == 1e-20
