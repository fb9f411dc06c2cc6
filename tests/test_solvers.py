"""The second-order solvers, step for step against diffusers' schedulers; the times; the likelihood of the flow."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from doubles import mixing_model as model
from doubles import rng, tiny_model

from ddpm_lit.exact import GaussianData, exact_ddpm
from ddpm_lit.forward import cosine_schedule, linear_schedule
from ddpm_lit.images import to_pixels
from ddpm_lit.sampler import Sampling, ancestral_plan, ddim_plan, run_plan, sample_steps
from ddpm_lit.solvers import (
    SPACINGS,
    dpm_plan,
    dpm_sample,
    euler_plan,
    flow_log_prob,
    half_log_snr,
    heun_sample,
    solver_plan,
    solver_times,
)

PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (3, 1, 8, 8)
SOLVE = {"dpm": dpm_sample, "heun": heun_sample}


def noise(seed=2, shape=SHAPE):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def trajectory(m, plan, x):
    return [x_s for _, x_s, _ in sample_steps(m, plan, x)]


def in_float64(theirs, s, times, repeats):
    "Give a scheduler our times, and its levels of noise in float64; its own are float32."
    theirs.set_timesteps(timesteps=times.flip(0).tolist())
    theirs.alphas_cumprod = s.alpha_bar
    sigma = torch.exp(-half_log_snr(s))[times.flip(0)]
    rest = sigma[1:].repeat_interleave(repeats)
    theirs.sigmas = torch.cat([sigma[:1], rest, torch.zeros(1, dtype=torch.float64)])
    return theirs


# ----------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("predicts", PREDICTION)
@pytest.mark.parametrize(("steps", "spacing"), [(5, "linear"), (20, "log_snr"), (12, "quadratic")])
def test_dpm_steps_are_those_of_diffusers(predicts, steps, spacing):
    m, x = model(predicts, clip=False), noise()
    options = dict(prediction_type=PREDICTION[predicts], solver_order=2, algorithm_type="dpmsolver++")
    theirs = DPMSolverMultistepScheduler(1000, 1e-4, 0.02, **options, final_sigmas_type="zero")
    times = solver_times(m.s, steps, spacing)
    theirs = in_float64(theirs, m.s, times, 1)
    plan = solver_plan(m.s, "dpm", steps, spacing)
    assert plan.t.tolist() == theirs.timesteps.tolist()
    for t, ours in zip(plan.t, trajectory(m, plan, x), strict=True):
        out = m.net(x, t.expand(3))
        x = theirs.step(out, t, x).prev_sample
        torch.testing.assert_close(ours, x.double(), rtol=1e-5, atol=1e-5 if predicts != "eps" else 1e-4)


@pytest.mark.parametrize("predicts", PREDICTION)
@pytest.mark.parametrize(("steps", "spacing"), [(5, "linear"), (20, "log_snr"), (12, "quadratic")])
def test_heun_steps_are_those_of_diffusers(predicts, steps, spacing):
    m, x_T = model(predicts, clip=False), noise()
    times = solver_times(m.s, steps, spacing)
    theirs = HeunDiscreteScheduler(1000, 1e-4, 0.02, prediction_type=PREDICTION[predicts])
    theirs = in_float64(theirs, m.s, times, 2)
    plan = solver_plan(m.s, "heun", steps, spacing)
    assert plan.t.tolist() == theirs.timesteps.int().tolist() and len(plan.t) == 2 * steps - 1
    y = x_T / m.s.alpha_bar[-1].sqrt()  # theirs is scaled as x_0 is
    ends = [*m.s.alpha_bar[torch.cat([plan.t[1::2], plan.t[1::2]]).sort(descending=True).values], torch.ones(())]
    for t, alpha_bar, ours in zip(theirs.timesteps, ends, trajectory(m, plan, x_T), strict=True):
        y = theirs.step(m.net(theirs.scale_model_input(y, t), t.expand(3)), t, y).prev_sample
        torch.testing.assert_close(ours, y * alpha_bar.sqrt(), rtol=1e-9, atol=1e-9)


def test_the_default_times_are_the_trailing_ones_of_diffusers():
    theirs = DPMSolverMultistepScheduler(1000, 1e-4, 0.02, timestep_spacing="trailing")
    for steps in (3, 10, 30):
        theirs.set_timesteps(steps)
        assert solver_plan(linear_schedule(), "dpm", steps).t.tolist() == theirs.timesteps.tolist()


# ----------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
@pytest.mark.parametrize("T", [2, 10, 1000])
def test_times_are_distinct_rise_and_end_with_the_last(make, T):
    s = make(T) if make is cosine_schedule else make(T, 1e-3, 0.02)
    for spacing in SPACINGS:
        for steps in {1, 2, 7, T // 2, T - 1, T} - {0}:
            if steps <= T:
                times = solver_times(s, steps, spacing)
                assert len(times) == steps and times[-1] == T - 1 and times[0] >= 0 and bool((times.diff() > 0).all())
    assert solver_times(s, T).tolist() == list(range(T))


def test_the_cosine_schedule_spends_no_steps_where_nothing_is_to_be_seen():
    level = half_log_snr(cosine_schedule())[solver_times(cosine_schedule(), 20)]
    assert (level < -5.2).sum() == 1, "the last timestep alone"


def test_the_first_order_is_ddim_and_the_second_adds_one_column():
    s, x = linear_schedule(), noise()
    times = solver_times(s, 9, "linear")
    ddim, euler = ddim_plan(s, 9), euler_plan(s, times)
    assert all(torch.equal(a, b) for a, b in zip(ddim[:4], euler[:4], strict=True)) and euler.change_coef is None
    dpm = dpm_plan(s, times)
    assert all(torch.equal(a, b) for a, b in zip(ddim[:4], dpm[:4], strict=True)) and dpm.std_ratio is None
    m = model(clip=False)
    for steps in (1, 2):
        first = run_plan(m, euler_plan(s, solver_times(s, steps)), x, None)
        assert torch.equal(first, dpm_sample(m, SHAPE, steps, x, spacing="log_snr"))
    assert torch.equal(heun_sample(m, SHAPE, 1, x), first) is False
    assert torch.equal(heun_sample(m, SHAPE, 1, x), dpm_sample(m, SHAPE, 1, x))


def test_ancestral_and_ddim_have_no_memory():
    s = linear_schedule()
    assert all(plan.change_coef is None for plan in (ancestral_plan(s), ancestral_plan(s, "learned", 9), ddim_plan(s)))


@pytest.mark.parametrize("solver", SOLVE)
def test_a_solver_clips_and_takes_conditions_batches_and_callbacks(solver):
    m, y = tiny_model(linear_schedule(40), num_class_embeds=4), torch.tensor([0, 3, 1])
    x_T, sample, states = noise().float(), SOLVE[solver], []
    built_in = m.with_net(lambda x, t: m.net(x, t, y[: len(x)]))
    drawn = sample(m, SHAPE, 5, x_T, cond=dict(class_labels=y), callback=lambda t, x, x0: states.append(x0))
    assert torch.equal(drawn, sample(built_in, SHAPE, 5, x_T)) and len(states) == {"dpm": 5, "heun": 9}[solver]
    assert all(x0.abs().max() <= 1 for x0 in states)
    others = sample(m, SHAPE, 5, x_T, cond=dict(class_labels=y.roll(1)))
    assert not torch.allclose(others, drawn, atol=1e-3)
    split = sample(m, SHAPE, 5, x_T, cond=dict(class_labels=y), batch_size=2)
    torch.testing.assert_close(split, drawn, rtol=1e-4, atol=1e-5)
    assert not drawn.requires_grad and not drawn.is_inference()


@pytest.mark.parametrize("solver", SOLVE)
@pytest.mark.parametrize("variance", ["beta_tilde", "learned"])
def test_pixels_by_name(solver, variance):
    m = tiny_model(linear_schedule(40), variance=variance)
    pixels = m.sample(3, 6, solver, generator=rng(1))
    assert torch.equal(pixels, to_pixels(SOLVE[solver](m, SHAPE, 6, generator=rng(1))))
    assert torch.equal(Sampling(solver, 6, seed=1, progress=False).draw(m, 3), pixels)
    calls = {"dpm": (20, 6), "heun": (39, 11)}[solver]
    assert (Sampling(solver).network_calls(m), Sampling(solver, np.int64(6)).network_calls(m)) == calls
    short = tiny_model(linear_schedule(8), variance=variance)
    assert Sampling(solver).network_calls(short) == {"dpm": 8, "heun": 15}[solver], "at most T steps"


def test_the_memory_of_a_solver_runs_through_a_compiled_step(monkeypatch):
    import ddpm_lit.sampler as sampler

    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    step = torch.compile(sampler.sampler_step, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(sampler, "compiled_step", lambda: step)
    torch.compiler.reset()
    m = model("v", T=30)
    for solver, sample in SOLVE.items():
        plain, compiled = (sample(m, SHAPE, 5, noise(), compile=c) for c in (False, True))
        torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-9, msg=solver)
    assert len(graphs) == 1, "one graph for both"
    torch.compiler.reset()


def test_tables_on_another_device_than_the_times():
    "On the device `meta` a tensor has no values; the plan's columns are gathered where the schedule lives."
    m = tiny_model(linear_schedule(12))
    m.net.to("meta")
    for solver in SOLVE:
        plan = solver_plan(m.s, solver, 4)
        seen = [(t, x.shape) for t, x, _ in sample_steps(m, plan, torch.empty(SHAPE, device="meta"))]
        assert seen == [(t, SHAPE) for t in plan.t.tolist()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: dpm_sample(m, SHAPE, 0), "steps must be a whole number from 1 to T = 20, got 0"),
        (lambda m: heun_sample(m, SHAPE, 21), "steps must be a whole number from 1 to T = 20, got 21"),
        (lambda m: dpm_sample(m, SHAPE, 2.0), "steps must be a whole number, got 2.0"),
        (lambda m: dpm_sample(m, SHAPE, 5, spacing="karras"), "spacing must be one of log_snr, linear, quadratic; got"),
        (lambda m: heun_sample(m, SHAPE, 5, clip=2.0), "clip must be True, False or a quantile"),
        (lambda m: solver_plan(m.s, "euler"), "solver must be one of dpm, heun; got 'euler'"),
        (lambda m: heun_sample(m, (0, 1, 8, 8), 5), "shape must begin with the number of images, at least 1, got"),
        (lambda m: m.sample(2, sampler="heun", eta=0.5), "eta is for ddim; with heun it must be 0. Got 0.5"),
        (lambda m: flow_log_prob(m, torch.zeros(SHAPE), 1), "steps must be a whole number from 2 to T = 20, got 1"),
        (lambda m: flow_log_prob(m, torch.zeros(SHAPE).long()), "x must be floating point"),
    ],
)
def test_what_a_solver_cannot_do_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(tiny_model(linear_schedule(20)))


# ------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_flow_of_a_gaussian_has_its_density(predicts):
    spread = torch.randn(4, 4, generator=rng(0), dtype=torch.float64) / 4
    data = GaussianData(torch.tensor([0.3, -0.2, 0.1, 0.0]), spread @ spread.T + 0.05 * torch.eye(4))
    m = exact_ddpm(data, linear_schedule(), predicts)
    first = data.marginal(m.s, 0)
    x = first.sample(6, rng(1))
    by_flow = flow_log_prob(m, x.view(6, 1, 2, 2), 60)
    torch.testing.assert_close(by_flow, first.log_prob(x), rtol=0, atol=0.05)
    assert not by_flow.requires_grad


def test_the_flow_takes_a_condition_and_leaves_the_model_as_it_was():
    m, y = tiny_model(linear_schedule(12), num_class_embeds=4).train(), torch.tensor([0, 3])
    m.net.conv_in.eval()
    x = 0.1 * noise(shape=(2, 1, 8, 8)).float()
    one, other = (flow_log_prob(m, x, 3, dict(class_labels=labels)) for labels in (y, y.roll(1)))
    built_in = m.with_net(lambda x, t: m.net(x, t, y.repeat_interleave(len(x) // 2)))
    torch.testing.assert_close(flow_log_prob(built_in, x, 3), one)
    assert not torch.allclose(one, other) and m.net.training and not m.net.conv_in.training
    assert all(p.grad is None for p in m.net.parameters())
