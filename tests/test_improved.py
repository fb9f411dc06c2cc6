"""The hybrid loss and importance sampling against the formulas of the published implementation, written anew; runs."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from doubles import rng, tiny_model

from ddpm_lit.bound import bits_per_dim
from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import cosine_schedule, linear_schedule, q_sample
from ddpm_lit.improved import ImportanceBound, TermHistory, hybrid_loss, make_objective
from ddpm_lit.loading import load_images
from ddpm_lit.objective import bound_loss, bound_term, noised, simple_loss
from ddpm_lit.sampler import ancestral_plan, ancestral_sample
from ddpm_lit.trainer import TrainConfig, Trainer

SHAPE = (6, 1, 8, 8)


def images(n=6, seed=1):
    return torch.randint(256, (n, 1, 8, 8), generator=rng(seed)).float() / 127.5 - 1


def learner(T=20, predicts="eps", **changes):
    return tiny_model(linear_schedule(T, 1e-3, 0.2), predicts=predicts, variance="learned", **changes)


# ------------------------------------------------------------------------- the published implementation, anew


def published_cosine(T):
    "Return the betas of improved-diffusion: ratios of the squared cosine, each at most 0.999."
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    return torch.tensor([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)], dtype=torch.float64)


@pytest.mark.parametrize("T", [20, 1000, 4000])
def test_the_cosine_table(T):
    torch.testing.assert_close(cosine_schedule(T).beta, published_cosine(T), rtol=1e-9, atol=1e-12)
    assert (cosine_schedule(T).beta == 0.999).sum() == 1


def published_terms(m, x0, x_t, t, eps):
    "Return the mean squared error and the term of the bound in bits/dim, as improved-diffusion computes both."
    beta, bar = m.s.beta, m.s.alpha_bar
    prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    tilde = beta * (1 - prev) / (1 - bar)
    log_low = torch.cat([tilde[1:2], tilde[1:]]).log()
    table = lambda values: values[t].float()[:, None, None, None]  # noqa: E731
    out, v = m.net(x_t, t).chunk(2, dim=1)
    fraction = (v + 1) / 2
    log_var = fraction * table(beta.log()) + (1 - fraction) * table(log_low)
    start = table((1 / bar).sqrt()) * x_t - table((1 / bar - 1).sqrt()) * out.detach()
    coefficients = beta * prev.sqrt() / (1 - bar), (1 - prev) * (1 - beta).sqrt() / (1 - bar)
    mean, true_mean = (table(coefficients[0]) * x + table(coefficients[1]) * x_t for x in (start, x0))
    true_log = table(log_low)
    kl = 0.5 * (-1 + log_var - true_log + (true_log - log_var).exp() + (true_mean - mean) ** 2 * (-log_var).exp())
    cdf = lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    inverse = (-0.5 * log_var).exp()
    above, below = cdf(inverse * (x0 - mean + 1 / 255)), cdf(inverse * (x0 - mean - 1 / 255))
    middle = torch.where(x0 > 0.999, 1 - below, above - below)
    log_p = torch.where(x0 < -0.999, above, middle).clamp(min=1e-12).log()
    nats = torch.where((t == 0)[:, None, None, None], -log_p, kl)
    return ((eps - out) ** 2).mean(), nats.flatten(1).mean(1) / math.log(2)


def test_the_terms_are_those_of_the_published_implementation():
    m, x0, compared = learner(20), images(), 0
    for seed in range(3, 9):
        t, eps, x_t = noised(m.s, x0, rng(seed), (0, 1))
        mse, terms = published_terms(m, x0, x_t, t, eps)
        if (t > 0).all():  # the decoder of t = 0 is an approximation there: see below
            ours = hybrid_loss(m, x0, rng(seed))
            torch.testing.assert_close(ours, mse + 0.001 * 20 * terms.mean(), rtol=1e-4, atol=0)
            compared += 1
    assert compared >= 2
    t = torch.zeros(6, dtype=torch.int64)
    x_t = q_sample(m.s, x0, t, eps)
    ours = m.p_step(x_t, t, clip=False)
    _, terms = published_terms(m, x0, x_t, t, eps)
    torch.testing.assert_close(bits_per_dim(bound_term(m.s, ours, x0, x_t, t), x0), terms, rtol=2e-2, atol=2e-2)


def test_the_strided_variance_is_that_of_diffusers():
    "A learned variance rescales by itself: between the bounds of the shorter chain."
    m = learner(20)
    plan = ancestral_plan(m.s, "learned", 5)
    theirs = DDPMScheduler(20, 1e-3, 0.2, variance_type="learned_range", timestep_spacing="trailing")
    theirs.set_timesteps(5)
    assert plan.t.tolist() == theirs.timesteps.tolist()
    v = torch.linspace(-1, 1, 7, dtype=torch.float64)
    times = [*plan.t.tolist(), -1]
    for i, (t, before) in enumerate(zip(times[:-2], times[1:-1], strict=True)):
        beta = 1 - m.s.alpha_bar[t] / m.s.alpha_bar[before]
        low = beta * (1 - m.s.alpha_bar[before]) / (1 - m.s.alpha_bar[t])
        expected = ((v + 1) / 2 * beta.log() + (1 - v) / 2 * low.log()).exp()
        torch.testing.assert_close((plan.std[i] * plan.std_ratio[i] ** ((v + 1) / 2)) ** 2, expected)


def test_a_learned_range_is_read_saved_and_sampled_by_diffusers(tmp_path):
    from diffusers import DDPMPipeline

    m = learner(20)
    m.save_pretrained(tmp_path / "m")
    back = DDPM.from_pretrained(tmp_path / "m")
    assert back.variance == "learned"
    x_T = torch.randn(SHAPE, generator=rng(1))
    assert torch.equal(ancestral_sample(back, SHAPE, x_T, rng(2)), ancestral_sample(m, SHAPE, x_T, rng(2)))
    pipe = DDPMPipeline.from_pretrained(tmp_path / "m")
    assert pipe.scheduler.config.variance_type == "learned_range"
    pipe.set_progress_bar_config(disable=True)
    x, t = x_T, 19
    out = pipe.unet(x, t).sample
    theirs = pipe.scheduler.step(out, t, x, generator=rng(3)).prev_sample
    torch.testing.assert_close(m.p_step(x, t).sample(rng(3)), theirs, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("predicts", ["eps", "x0", "mean", "v"])
def test_each_half_of_the_network_has_its_own_loss(predicts):
    m, x0 = learner(predicts=predicts), images()
    last = m.net.conv_out
    slopes = []
    for loss in (hybrid_loss, simple_loss, bound_loss):
        m.net.zero_grad()
        loss(m, x0, rng(4)).backward()
        slopes.append(last.weight.grad.clone())
    torch.testing.assert_close(slopes[0][:1], slopes[1][:1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(slopes[0][1:], 0.001 * slopes[2][1:], rtol=1e-4, atol=1e-9)
    assert slopes[1][1:].abs().max() == 0 < slopes[2][:1].abs().max()


def test_parts_of_a_batch_are_the_batch():
    m, x0 = learner(), images(6)
    for make in (lambda: hybrid_loss, lambda: ImportanceBound(20)):
        at_once = make()(m, x0, rng(5))
        parts = [make()(m, part, rng(5), (i, 2)) for i, part in enumerate(x0.split(3))]
        torch.testing.assert_close(sum(parts) / 2, at_once)


def test_conditions_reach_the_network():
    m, x0, y = learner(num_class_embeds=4), images(), torch.tensor([0, 1, 2, 3, 0, 1])
    for loss in (hybrid_loss, ImportanceBound(20)):
        values = [loss(m, x0, rng(6), cond=dict(class_labels=labels)) for labels in (y, y.roll(1))]
        assert values[0] != values[1]


@pytest.mark.parametrize(
    ("name", "variance", "expected"),
    [("simple", "learned", hybrid_loss), ("hybrid", "learned", hybrid_loss), ("bound", "learned", bound_loss)]
    + [("simple", "beta", simple_loss), ("bound", "beta_tilde", bound_loss)],
)
def test_objectives_by_name(name, variance, expected):
    assert make_objective(tiny_model(variance=variance), name) is expected
    assert isinstance(make_objective(tiny_model(variance=variance), "importance"), ImportanceBound)


def test_what_does_not_fit_is_named():
    fixed = tiny_model()
    with pytest.raises(ValueError, match="^m must have variance 'learned' for the hybrid loss, got 'beta_tilde'$"):
        hybrid_loss(fixed, images())
    with pytest.raises(ValueError, match="^objective must not be 'hybrid' for a fixed variance"):
        Trainer(fixed, load_images("digits"), TrainConfig(steps=1, objective="hybrid", progress=False))
    with pytest.raises(ValueError, match="^objective must be one of simple, bound, hybrid, importance; got 'best'$"):
        TrainConfig(objective="best")


# ------------------------------------------------------------------------------------------------ importance


def test_the_history_is_that_of_a_loop():
    history, values = TermHistory(4, size=3), [[] for _ in range(4)]
    for seed in range(12):
        t, new = torch.randint(4, (9,), generator=rng(seed)), torch.rand(9, generator=rng(seed)).double()
        history.add(t, new)
        for i, value in zip(t.tolist(), new.tolist(), strict=True):
            values[i].append(value)
    assert [sorted(row) for row in history.terms.tolist()] == [sorted(row[-3:]) for row in values]
    assert history.counts.tolist() == [len(row) for row in values]
    assert history.probabilities().sum() == pytest.approx(1) and history.probabilities().min() > 0


def test_terms_that_are_all_zero_are_drawn_evenly():
    history = TermHistory(3, size=1)
    history.add(torch.arange(3), torch.zeros(3).double())
    assert history.probabilities().tolist() == [1 / 3] * 3


# ------------------------------------------------------------------------------------------------------ runs


def config(**changes):
    return TrainConfig(**dict(steps=6, batch_size=16, warmup=0, save_every=3, progress=False, track="none") | changes)


@pytest.mark.parametrize("objective", ["hybrid", "importance"])
def test_a_run_that_was_stopped_resumes_bit_for_bit(objective, tmp_path):
    digits = load_images("digits")

    def trainer(**changes):
        return Trainer(learner(4), digits, config(objective=objective, **changes))

    unbroken = trainer()
    losses = unbroken.fit()

    class Cut(Exception):
        pass

    def stop(step, loss):
        if step == 4:
            raise Cut

    first = Trainer(learner(4), digits, config(objective=objective, out=str(tmp_path / "run")), on_step=stop)
    with pytest.raises(Cut):
        first.fit()
    resumed = trainer(out=str(tmp_path / "run"), resume=True)
    assert resumed.step == 3
    assert torch.equal(resumed.fit(), losses)
    for a, b in zip(resumed.net.parameters(), unbroken.net.parameters(), strict=True):
        assert torch.equal(a, b)
    if objective == "importance":
        state, expected = (t.objective.state_dict() for t in (resumed, unbroken))
        assert state["counts"].sum() == 96 and state["counts"].min() >= 10, "the draws were by importance"
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_the_default_objective_trains_a_learned_variance():
    t = Trainer(learner(20), load_images("digits"), config(steps=2))
    before = t.net.conv_out.weight.detach().clone()
    t.fit()
    assert t.objective is hybrid_loss and (t.net.conv_out.weight - before).abs().flatten(1).amax(1).gt(0).all()
