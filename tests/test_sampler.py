"""The samplers, step by step against diffusers' schedulers and against Algorithm 2 written out; conditions; pixels."""

import inspect
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from doubles import TINY, OwnNet, lively, rng, tiny_model
from doubles import mixing_model as model

import ddpm_lit.sampler as sampler
from ddpm_lit.ddpm import DDPM
from ddpm_lit.exact import MixtureData, exact_ddpm
from ddpm_lit.files import CachedSamples
from ddpm_lit.forward import linear_schedule
from ddpm_lit.images import to_pixels
from ddpm_lit.sampler import (
    Sampling,
    ancestral_plan,
    ancestral_sample,
    batch_labels,
    check_cond,
    ddim_coefficients,
    ddim_invert,
    ddim_plan,
    ddim_sample,
    draw_batches,
    limiter,
    sample_pixels,
    sample_steps,
    sampler_step,
    sampling_request,
    step_table,
    time_steps,
)
from ddpm_lit.unet import UNet

PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (3, 1, 8, 8)


def as_precise(theirs, s):
    "Give a scheduler float64 tables; its own are float32 (tests/test_diffusers_scheduler.py compares them)."
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = s.beta, s.alpha, s.alpha_bar
    return theirs


def spy(monkeypatch):
    "Return a list of all the noise that the samplers draw, so that diffusers can be given the same."
    drawn, randn = [], sampler.randn
    monkeypatch.setattr(sampler, "randn", lambda *args: drawn.append(randn(*args)) or drawn[-1])
    return drawn


def steps_from_noise(m, plan, cond=None):
    "Yield `(None, x_T, None)`, then what `sample_steps` yields."
    x = torch.randn(SHAPE, generator=rng(2), dtype=torch.float64)
    yield None, x, None
    yield from sample_steps(m, plan, x, rng(3), cond=cond)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_ancestral_steps_are_those_of_diffusers(monkeypatch, predicts, variance):
    kind = {"beta_tilde": "fixed_small", "beta": "fixed_large"}[variance]
    m, compared, drawn = model(predicts, variance), 0, spy(monkeypatch)
    theirs = DDPMScheduler(1000, 1e-4, 0.02, variance_type=kind, prediction_type=PREDICTION[predicts])
    theirs = as_precise(theirs, m.s)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: drawn[-1])
    steps = steps_from_noise(m, ancestral_plan(m.s, variance))
    _, x, _ = next(steps)
    for t, x_next, _ in steps:
        expected = theirs.step(m.net(x, torch.full((3,), t)), t, x).prev_sample
        torch.testing.assert_close(x_next, expected, rtol=1e-9, atol=1e-9)
        x, compared = x_next, compared + 1
    assert compared == 1000 and len(drawn) == 999


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_steps_are_those_of_diffusers(monkeypatch, predicts, eta, steps):
    m, drawn = model(predicts), spy(monkeypatch)
    theirs = DDIMScheduler(1000, 1e-4, 0.02, prediction_type=PREDICTION[predicts], timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    theirs = as_precise(theirs, m.s)
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    plan = ddim_plan(m.s, steps, eta)
    assert plan.t.tolist() == theirs.timesteps.tolist()
    ours = steps_from_noise(m, plan)
    _, x, _ = next(ours)
    for t, x_next, _ in ours:
        z = drawn[-1] if eta and t != plan.t[-1] else torch.zeros_like(x)
        out = m.net(x, torch.full((3,), t))
        expected = theirs.step(out, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample
        torch.testing.assert_close(x_next, expected, rtol=1e-9, atol=1e-9)
        x = x_next
    assert len(drawn) == (steps - 1 if eta else 0)


def test_ddim_with_all_steps_is_that_of_diffusers(monkeypatch):
    test_ddim_steps_are_those_of_diffusers(monkeypatch, "eps", 0.5, 1000)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta", "learned"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "mean", "v"])
def test_every_model_is_sampled_as_algorithm_2_says(predicts, variance):
    m = model(predicts, variance, T=12)
    x_T, generator = torch.randn(SHAPE, generator=rng(4), dtype=torch.float64), rng(5)
    x = x_T
    for t in reversed(range(12)):
        g = m.p_step(x, t)
        x = g.sample(generator) if t else g.mean
    torch.testing.assert_close(ancestral_sample(m, SHAPE, x_T, rng(5)), x, rtol=1e-9, atol=1e-9)
    if variance != "learned":
        assert ddim_sample(m, SHAPE, 5, 0.5, x_T, rng(5)).shape == SHAPE


def test_the_learned_variance_matters():
    "Otherwise the test above would pass with a sampler that ignores the second half of the channels."
    m = model("eps", "learned", T=12)
    x_T = torch.randn(SHAPE, generator=rng(4), dtype=torch.float64)
    fixed = [DDPM(lambda x, t: m(x, t)[0], m.s, "eps", v) for v in ("beta", "beta_tilde")]
    drawn = [ancestral_sample(model, SHAPE, x_T, rng(5)) for model in (m, *fixed)]
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3) and not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_same_seed_same_images_bit_for_bit():
    m = model(T=20)
    for sample in (ancestral_sample, lambda *a, **k: ddim_sample(*a, steps=7, eta=0.7, **k)):
        first, second, other = (sample(m, SHAPE, generator=rng(seed)) for seed in (6, 6, 7))
        assert torch.equal(first, second) and not torch.equal(first, other)


def test_eta_0_depends_on_x_T_alone():
    m, x_T = model(T=20), torch.randn(SHAPE, generator=rng(8), dtype=torch.float64)
    assert torch.equal(ddim_sample(m, SHAPE, 5, x_T=x_T, generator=rng(1)), ddim_sample(m, SHAPE, 5, x_T=x_T))


def test_what_comes_back_may_be_edited_and_the_next_step_starts_from_it():
    m, x_T = tiny_model(), torch.randn(SHAPE, generator=rng(2))

    def paint(t, x, x0):
        x[..., :4], states[t] = 0.25, x0.mul_(2)

    for sample in (lambda **k: ancestral_sample(m, SHAPE, x_T, rng(3), **k), lambda **k: ddim_sample(m, SHAPE, 5, **k)):
        states = {}
        drawn = sample(callback=paint)
        assert (drawn[..., :4] == 0.25).all() and not torch.equal(drawn[..., 4:], sample()[..., 4:])
        for tensor in (drawn, *states.values()):
            assert not tensor.is_inference() and not tensor.requires_grad
    plan = ddim_plan(m.s, 5)
    steps = sample_steps(m, plan, x_T)
    x = next(steps)[1].fill_(0.5)
    again = next(steps)[1]
    row = step_table(m, plan, x)[1]
    assert torch.equal(again, sampler_step(m, x, plan.t[1].expand(3), row)[0])
    x0 = torch.zeros(SHAPE)
    assert ddim_invert(m, x0, 3).mul_(0).eq(0).all() and x0.eq(0).all()
    m.sample(2, 3, callback=lambda k, x: x.zero_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_tables_and_images_have_the_dtype_of_the_network(dtype):
    m, x_T = tiny_model(linear_schedule(20)), torch.randn(SHAPE, generator=rng(2))
    expected = ddim_sample(m, SHAPE, 4, x_T=x_T)
    m.net.to(dtype)
    for draw in (x_T, x_T.numpy(), x_T.double()):
        drawn = ddim_sample(m, SHAPE, 4, x_T=draw)
        assert drawn.dtype == dtype
        torch.testing.assert_close(drawn.float(), expected, rtol=0, atol=0.1)
    assert ancestral_sample(m, SHAPE, steps=3).dtype == dtype == ddim_invert(m, expected, 3).dtype
    assert m.sample(2, 3).dtype == torch.uint8


def test_whole_numbers_of_numpy_are_whole_numbers():
    m, three = tiny_model(linear_schedule(20)), np.int64(3)
    shape = (three, 1, 8, 8)
    drawn = ddim_sample(m, shape, three, generator=rng(1), batch_size=np.int32(2))
    assert torch.equal(drawn, ddim_sample(m, SHAPE, 3, generator=rng(1), batch_size=2))
    assert torch.equal(ddim_invert(m, drawn, three, np.uint8(2)), ddim_invert(m, drawn, 3, 2))
    of_numpy, ours = (ancestral_sample(m, SHAPE, generator=rng(1), steps=n) for n in (three, 3))
    assert torch.equal(of_numpy, ours)
    sampling = Sampling(steps=three, seed=np.int64(1), eta=np.float32(0), progress=False)
    assert torch.equal(sampling.draw(m, three), Sampling(steps=3, seed=1, progress=False).draw(m, 3))
    assert torch.equal(time_steps(20, torch.tensor(3)), time_steps(20, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ddim_sample(m, SHAPE, 5.0), "steps must be a whole number, got 5.0"),
        (lambda m: ddim_sample(m, SHAPE, True), "steps must be a whole number, got True"),
        (
            lambda m: ancestral_sample(m, SHAPE, steps=np.int64(1)),
            "steps must be a whole number from 2 to T = 20, got 1",
        ),
        (lambda m: ddim_sample(m, SHAPE, 5, batch_size=2.5), "batch_size must be a whole number, got 2.5"),
        (lambda m: ddim_invert(m, torch.zeros(SHAPE), 5, passes=1.5), "passes must be a whole number, got 1.5"),
        (lambda m: m.sample(2.0), "n must be a whole number, got 2.0"),
        (lambda m: Sampling(seed=0.5).draw(m, 2), "seed must be a whole number, got 0.5"),
        (lambda m: ddim_sample(m, (0, 1, 8, 8), 5), "shape must begin with the number of images, at least 1, got"),
        (lambda m: ancestral_sample(m, ()), "shape must begin with the number of images"),
        (lambda m: ddim_invert(m, torch.zeros(0, 1, 8, 8), 5), "shape must begin with the number of images"),
        (lambda m: ddim_invert(m, torch.zeros(SHAPE).byte(), 5), "x0 must be floating point"),
        (lambda m: ddim_sample(m, SHAPE, 5, x_T=torch.zeros(0, 1, 8, 8)), "x_T must be floating point"),
    ],
)
def test_numbers_that_are_not_whole_and_batches_that_are_empty_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(tiny_model())


def test_each_part_of_the_network_has_its_own_mode_again():
    m = tiny_model(linear_schedule(5), dropout=0.5).train()
    m.net.conv_in.eval()
    before = [part.training for part in m.modules()]
    for run in (
        lambda: ancestral_sample(m, SHAPE),
        lambda: ddim_invert(m, torch.zeros(SHAPE), 3),
        lambda: m.sample(2, 2),
    ):
        run()
        assert [part.training for part in m.modules()] == before
    steps = sample_steps(m, ddim_plan(m.s, 3), torch.zeros(SHAPE))
    next(steps)
    assert not m.net.training
    steps.close()  # a loop that is left before its end
    assert [part.training for part in m.modules()] == before


def test_dropout_is_off_while_sampling_and_on_again_afterwards():
    m = tiny_model(linear_schedule(5), dropout=0.5).train()
    x_T = torch.randn(SHAPE, generator=rng(2))
    assert not torch.equal(m.net(x_T, torch.zeros(3).long()), m.net(x_T, torch.zeros(3).long()))
    assert torch.equal(ancestral_sample(m, SHAPE, x_T, rng(3)), ancestral_sample(m, SHAPE, x_T, rng(3)))
    assert m.training and m.net.training


@pytest.mark.parametrize("sample", [ancestral_sample, lambda *a, **k: ddim_sample(*a, steps=4, **k)])
def test_clip_none_is_the_clipping_of_the_model(sample):
    cut, uncut = (DDPM(lambda x, t: 3 * x, linear_schedule(4, 0.1, 0.2), "x0", clip=clip) for clip in (True, False))
    x_T = torch.randn(SHAPE, generator=rng(2), dtype=torch.float64)
    drawn = {clip: sample(cut, SHAPE, x_T=x_T, generator=rng(3), clip=clip) for clip in (True, False, None)}
    assert torch.equal(drawn[None], drawn[True]) and not torch.allclose(drawn[True], drawn[False])
    assert torch.equal(sample(uncut, SHAPE, x_T=x_T, generator=rng(3)), drawn[False])
    assert torch.equal(sample(uncut, SHAPE, x_T=x_T, generator=rng(3), clip=True), drawn[True])


def test_the_callback_sees_every_step_and_the_last_is_the_result():
    m, seen = model(T=20), []
    x = ddim_sample(m, SHAPE, 5, generator=rng(0), callback=lambda t, x, x0: seen.append((t, x, x0)))
    assert [t for t, _, _ in seen] == [19, 15, 11, 7, 3]
    assert torch.equal(seen[-1][1], x)
    torch.testing.assert_close(seen[-1][2], x)


@pytest.mark.parametrize("T,steps", [(1000, 1), (1000, 50), (1000, 999), (1000, 1000), (10, 7)])
def test_time_steps_are_distinct_rise_and_end_with_the_last(T, steps):
    times = time_steps(T, steps)
    assert len(times) == steps and times[-1] == T - 1 and times[0] >= 0 and bool((times.diff() > 0).all())


@pytest.mark.parametrize(
    "call,word",
    [
        (lambda m: ddim_sample(m, SHAPE, steps=0), "steps"),
        (lambda m: ddim_sample(m, SHAPE, steps=21), "steps"),
        (lambda m: ancestral_sample(m, SHAPE, steps=1), "steps"),
        (lambda m: ancestral_sample(m, SHAPE, steps=21), "steps"),
        (lambda m: ddim_sample(m, SHAPE, eta=-0.1, steps=5), "eta"),
        (lambda m: ddim_sample(m, SHAPE, eta=1.1, steps=5), "eta"),
        (lambda m: ancestral_sample(m, SHAPE, torch.zeros(3, 1, 8, 9)), "x_T"),
        (lambda m: ddim_sample(m, SHAPE, 5, x_T=torch.zeros(SHAPE, dtype=torch.long)), "x_T"),
    ],
)
def test_a_wrong_argument_is_named(call, word):
    with pytest.raises(ValueError, match=f"^{word} must"):
        call(model(T=20))


def test_a_broken_network_is_named():
    m = DDPM(lambda x, t: x * float("nan"), linear_schedule(5))
    with pytest.raises(ValueError, match="not finite"):
        ddim_sample(m, SHAPE, 2)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995])
def test_dynamic_thresholding_is_that_of_diffusers(quantile):
    options = dict(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e9)
    theirs = DDPMScheduler(1000, 1e-4, 0.02, **options)
    x0 = 2 * torch.randn(6, 3, 8, 8, generator=rng(4), dtype=torch.float64)
    x0[0] /= 10  # one that needs no threshold
    expected = theirs._threshold_sample(x0.clone())
    torch.testing.assert_close(limiter(quantile)(x0), expected)
    assert torch.equal(expected[0], x0[0]) and not torch.allclose(limiter(True)(x0), expected)


def test_dynamic_thresholding_is_applied_at_every_step():
    m = model()
    limited = []
    ddim_sample(m, SHAPE, 10, generator=rng(5), clip=0.8, callback=lambda t, x, x0: limited.append(x0))
    free = []
    ddim_sample(m, SHAPE, 10, generator=rng(5), clip=False, callback=lambda t, x, x0: free.append(x0))
    assert all(x0.abs().max() <= 1 for x0 in limited) and free[0].abs().max() > 1
    torch.testing.assert_close(limited[0], limiter(0.8)(free[0]))


@pytest.mark.parametrize("T", [10, 100, 1000])
def test_quadratic_times_are_distinct_rise_end_with_the_last_and_are_dense_at_the_start(T):
    for steps in (1, 2, 3, 7, T // 2, T):
        times = time_steps(T, steps, "quadratic")
        assert len(times) == steps and times[-1] == T - 1 and times[0] >= 0 and (times.diff() > 0).all()
        assert times.double().mean() <= time_steps(T, steps).double().mean()
    assert time_steps(1000, 10, "quadratic").tolist() == [9, 39, 89, 159, 249, 359, 489, 639, 809, 999]
    assert ddim_plan(linear_schedule(), 10, 0.0, "quadratic").t.flip(0).tolist()[:3] == [9, 39, 89]


def test_inversion_clips_nothing():
    m = exact_ddpm(MixtureData([1.0], [[3.0]], 4.0), linear_schedule())
    x0 = torch.linspace(-3, 9, 7, dtype=torch.float64)[:, None]  # images would end at -1 and 1
    back = ddim_sample(m, x0.shape, 100, x_T=ddim_invert(m, x0, 100, passes=30), clip=False)
    torch.testing.assert_close(back, x0, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("predicts", "spacing"), [("eps", "linear"), ("x0", "linear"), ("v", "quadratic")])
def test_inversion_and_sampling_return_the_image(predicts, spacing):
    m = exact_ddpm(MixtureData([0.5, 0.5], [[-0.5] * 4, [0.5, 0.2, 0.5, 0.2]], 0.04), linear_schedule(), predicts)
    x0 = 0.5 + 0.1 * torch.randn(8, 1, 2, 2, generator=rng(6), dtype=torch.float64)
    seen = {}
    for passes in (1, 4, 25):
        x_T = ddim_invert(m, x0, 60, passes, spacing=spacing)
        back = ddim_sample(m, x0.shape, 60, x_T=x_T, spacing=spacing)
        seen[passes] = (back - x0).abs().max().item()
    assert seen[25] < 1e-8 and seen[4] < seen[1] / 5 and seen[1] < 0.1
    assert 0.3 < x_T.std() < 3


def test_many_images_are_drawn_in_batches():
    x_T, sizes = torch.randn(7, 1, 8, 8, generator=rng(7), dtype=torch.float64), []
    m = model()
    at_once = ddim_sample(m, x_T.shape, 5, x_T=x_T)
    net = m.net
    m.net = lambda x, t: sizes.append(len(x)) or net(x, t)
    parts = ddim_sample(m, x_T.shape, 5, x_T=x_T, batch_size=3)
    assert sizes == [3] * 10 + [1] * 5
    torch.testing.assert_close(parts, at_once)
    sizes.clear()
    drawn = ancestral_sample(m, x_T.shape, x_T, rng(8), steps=4, batch_size=2)
    again = ancestral_sample(m, x_T.shape, x_T, rng(8), steps=4, batch_size=2)
    assert torch.equal(drawn, again) and max(sizes) == 2
    sizes.clear()
    wide = DDPM(lambda x, t: sizes.append(len(x)) or 0 * x, linear_schedule())
    ddim_sample(wide, (5, 3, 512, 512), 1)
    assert sizes == [1] * 5, "without batch_size: so many that they have 2^20 numbers"
    sizes.clear()
    ddim_sample(wide, (5, 1, 512, 1024), 1)
    assert sizes == [2, 2, 1]


def test_a_progress_bar_appears_on_request_and_names_the_batch(capsys):
    m, shape = DDPM(lambda x, t: 0 * x, linear_schedule()), (5, 1, 2, 2)
    for sample in (ancestral_sample, ddim_sample):
        sample(m, shape, steps=2)
        assert capsys.readouterr().err == ""
        sample(m, shape, steps=2, progress=True, batch_size=2)
        shown = capsys.readouterr().err
        assert all(f"sampling {i} of 3" in shown for i in (1, 2, 3)) and "sampling 0" not in shown
        sample(m, shape, steps=2, progress=True)
        shown = capsys.readouterr().err
        assert "sampling:" in shown and "2/2" in shown
        sample(m, shape, steps=2, progress=True, batch_size=3)
        assert "sampling 2 of 2" in capsys.readouterr().err


def test_the_defaults_are_those_of_the_docstrings():
    def defaults(f):
        return {name: parameter.default for name, parameter in inspect.signature(f).parameters.items()}

    usual = dict(steps=50, eta=0.0, spacing="linear", clip=None, compile=False, cond=None)
    assert defaults(ddim_sample).items() >= usual.items()
    assert defaults(ddim_invert).items() >= dict(steps=50, passes=1, spacing="linear", cond=None).items()
    pixels = dict(steps=None, sampler="ddim", eta=0.0, progress=False, precision="no", channels_last=False)
    assert defaults(sample_pixels).items() >= (pixels | dict(compile=False, cond=None, callback=None)).items()
    plain = Sampling("ddim", None, 0.0, 0, progress=True, precision="no", channels_last=False, compile=False)
    assert Sampling() == plain
    s = linear_schedule()
    assert all(torch.equal(a, b) for a, b in zip(ddim_plan(s)[:4], ddim_plan(s, 50, 0.0, "linear")[:4], strict=True))
    ends = s.alpha_bar[399], s.alpha_bar[799]
    assert ddim_coefficients(*ends) == ddim_coefficients(*ends, 1.0) != ddim_coefficients(*ends, 0.0)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda m: ddim_sample(m, SHAPE, clip=1.5), "clip"),
        (lambda m: ancestral_sample(m, SHAPE, clip=0.0), "clip"),
        (lambda m: ddim_sample(m, SHAPE, spacing="cubic"), "spacing"),
        (lambda m: ddim_sample(m, SHAPE, batch_size=0), "batch_size"),
        (lambda m: ddim_invert(m, torch.zeros(SHAPE), passes=0), "passes"),
        (lambda m: ddim_invert(m, torch.zeros(SHAPE), steps=1001), "steps"),
    ],
)
def test_more_wrong_arguments_are_named(call, word):
    with pytest.raises(ValueError, match=f"^{word} must be"):
        call(model())


# The step as a function of tensors, and compiled.


def some_plans(m):
    ancestral = [ancestral_plan(m.s, m.variance), ancestral_plan(m.s, m.variance, 5)]
    return ancestral + [ddim_plan(m.s, 5, eta) for eta in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("variance", "clip"),
    [("beta_tilde", True), ("beta", True), ("learned", True), ("learned", False), ("learned", 0.9)],
)
def test_the_loop_reads_no_value_of_a_tensor(variance, clip):
    "On the device `meta` a tensor has no values, so that reading one is an error; on a GPU it would be a wait."
    m, x = tiny_model(linear_schedule(12), variance=variance), torch.empty(SHAPE, device="meta")
    m.net.to("meta")
    for plan in some_plans(m):
        seen = [(t, x.shape, x0.shape) for t, x, x0 in sample_steps(m, plan, x, clip=clip)]
        assert seen == [(t, SHAPE, SHAPE) for t in plan.t.tolist()]
    curious = DDPM(lambda x, t: x if x.mean() > 0 else -x, m.s)
    with pytest.raises(RuntimeError, match="item"):
        list(sample_steps(curious, plan, x, clip=clip))


def test_the_table_is_rounded_once_and_never_below_float32():
    m = model()
    plan = ancestral_plan(m.s)
    kinds = (torch.float64, torch.float32, torch.float16)
    exact, single, half = (step_table(m, plan, torch.zeros(1, dtype=kind)) for kind in kinds)
    assert exact.shape == (1000, 7) and exact.dtype == torch.float64
    assert torch.equal(exact[:, 2:5], torch.stack(plan[1:4], 1)) and exact[:, 5:].unique().tolist() == [0, 1]
    assert torch.equal(single, exact.float()) and torch.equal(half, single)
    x, z = torch.randn(2, *SHAPE, generator=rng(1)).bfloat16()
    for row in single[::100]:
        coarse, fine = (sampler_step(m, y, torch.tensor(3).expand(3), row, z.to(y), False) for y in (x, x.float()))
        assert coarse[0].dtype == torch.bfloat16
        torch.testing.assert_close(coarse[0].float(), fine[0], rtol=2e-2, atol=1e-2)


@pytest.fixture
def graphs(monkeypatch):
    "Capture compiled steps and run them as they are, without a compiler; the list grows by each graph."
    captured = []
    backend = lambda graph, inputs: captured.append(graph) or graph  # noqa: E731
    step = torch.compile(sampler_step, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(sampler, "compiled_step", lambda: step)
    torch.compiler.reset()
    yield captured
    torch.compiler.reset()


@pytest.mark.parametrize("clip", [True, False, 0.9])
@pytest.mark.parametrize("variance", ["beta_tilde", "learned"])
def test_a_compiled_step_draws_the_same_and_is_made_once(graphs, variance, clip):
    m = model("eps", variance, T=30)
    x_T = torch.randn(8, 1, 8, 8, generator=rng(2), dtype=torch.float64)
    options = dict(x_T=x_T, clip=clip, batch_size=4)
    for sample in (
        lambda **k: ancestral_sample(m, x_T.shape, generator=rng(3), **k),
        lambda **k: ancestral_sample(m, x_T.shape, generator=rng(4), steps=7, **k),
        lambda **k: ddim_sample(m, x_T.shape, 5, generator=rng(5), **k),
        lambda **k: ddim_sample(m, x_T.shape, 7, 0.5, generator=rng(6), **k),
    ):
        torch.testing.assert_close(sample(compile=True, **options), sample(**options), rtol=1e-9, atol=1e-9)
        assert len(graphs) == 1, "with noise and without, whatever the plan, in every batch"
    ddim_sample(m, x_T.shape, 5, compile=True, **options | dict(clip=clip is not True))
    assert len(graphs) == 2, "another limit is another graph"
    ddim_sample(m, x_T.shape, 5, compile=True, **options | dict(batch_size=5))
    assert len(graphs) == 4, "and so is another size of batch: 5, and 3 that are left"
    ddim_sample(m, x_T.shape, 5, compile=True, **options | dict(batch_size=5))
    assert len(graphs) == 4


@pytest.mark.slow
def test_compiled_steps_leave_a_layout_and_the_model_as_they_were(graphs):
    m = tiny_model(linear_schedule(5), in_channels=3, out_channels=3).train()
    m.net.to(memory_format=torch.channels_last)
    x_T = torch.randn(2, 3, 8, 8, generator=rng(1)).contiguous(memory_format=torch.channels_last)
    seen = []
    x = ddim_sample(m, x_T.shape, 4, 1.0, x_T, compile=True, callback=lambda t, x, x0: seen.append(x))
    assert len(graphs) == 1 and m.training and not x.requires_grad and not x.is_inference()
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)


def test_tensors_given_to_the_callback_stay_as_they_were(monkeypatch):
    "A CUDA graph writes its results to where it wrote the last ones."
    places = []

    def same_place(*args):
        outputs = sampler_step(*args)
        places.extend(map(torch.empty_like, outputs) if not places else ())
        return [place.copy_(output) for place, output in zip(places, outputs, strict=True)]

    monkeypatch.setattr(sampler, "compiled_step", lambda: same_place)
    m, seen, then = model(T=20), [], []
    keep = lambda t, *images: seen.extend(images) or then.extend(x.clone() for x in images)  # noqa: E731
    x = ancestral_sample(m, SHAPE, generator=rng(1), compile=True, callback=keep)
    assert len(seen) == 40 and torch.equal(x, ancestral_sample(m, SHAPE, generator=rng(1)))
    assert all(torch.equal(now, before) for now, before in zip(seen, then, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_for_the_cpu_it_draws_the_same_to_rounding():
    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    torch.nn.init.normal_(conv.weight, generator=rng(0))
    m = DDPM(lambda x, t: torch.tanh(conv(x) + torch.cos(t / 9)[:, None, None, None]), linear_schedule(20))
    x_T = torch.randn(SHAPE, generator=rng(2))
    for sample in (ancestral_sample, lambda *a, **k: ddim_sample(*a, steps=5, **k)):
        drawn, expected = (sample(m, SHAPE, x_T=x_T, generator=rng(3), compile=c) for c in (True, False))
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


def test_a_network_that_cannot_be_compiled_is_refused_in_one_line(graphs):
    branching = DDPM(lambda x, t: x if t[0] > 3 else -x, linear_schedule(5))
    for _ in range(2):
        with pytest.raises(ValueError, match="^compile must be False where .*: .*branching") as refused:
            ddim_sample(branching, SHAPE, 2, compile=True)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ValueError, match="^clip must be"):
        ddim_sample(branching, SHAPE, 2, compile=True, clip=1.5)
    with pytest.raises(ValueError, match="m returned numbers that are not finite"):
        ddim_sample(DDPM(lambda x, t: x * float("nan"), linear_schedule(5)), SHAPE, 2, compile=True)


# Conditions.


def conditional(classes=4, seed=0, **changes):
    "Return a model whose network has classes, in float64."
    m = tiny_model(linear_schedule(40), seed, num_class_embeds=classes, **changes)
    m.net.double()
    return m


def eight(seed=0):
    "Return x_T and the labels of eight images."
    return torch.randn(8, 1, 8, 8, generator=rng(seed), dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2, 0, 3, 2])


@pytest.fixture(scope="module")
def theirs_and_ours():
    "A network of diffusers with ten classes, and ours with its weights."
    config = dict(TINY, num_class_embeds=10)
    theirs = lively(UNet2DModel(**config)).double()
    ours = UNet(**config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.double().eval()


def test_ancestral_steps_with_class_labels_are_those_of_diffusers(monkeypatch, theirs_and_ours):
    net, ours = theirs_and_ours
    m, y, drawn, compared = DDPM(ours, linear_schedule(100)), torch.tensor([7, 0, 3]), spy(monkeypatch), 0
    theirs = as_precise(DDPMScheduler(100, 1e-4, 0.02, variance_type="fixed_small"), m.s)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: drawn[-1])
    steps = steps_from_noise(m, ancestral_plan(m.s), dict(class_labels=y))
    _, x, _ = next(steps)
    for t, x_next, _ in steps:
        with torch.no_grad():
            outputs = (net(x, t, class_labels=labels).sample for labels in (y, y.roll(1)))
            expected, others = (theirs.step(out, t, x).prev_sample for out in outputs)
        torch.testing.assert_close(x_next, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(x_next, others, rtol=1e-6, atol=1e-6)
        x, compared = x_next, compared + 1
    assert compared == 100


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_class_labels_is_a_loop_of_diffusers(monkeypatch, theirs_and_ours, eta):
    net, ours = theirs_and_ours
    m, y, drawn = DDPM(ours, linear_schedule()), torch.tensor([7, 0, 3]), spy(monkeypatch)
    theirs = as_precise(DDIMScheduler(1000, 1e-4, 0.02, timestep_spacing="trailing"), m.s)
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    theirs.set_timesteps(10)
    x_T = torch.randn(SHAPE, generator=rng(2), dtype=torch.float64)
    options, y_next = dict(eta=eta, x_T=x_T), y.roll(1)
    samples = ddim_sample(m, SHAPE, 10, generator=rng(3), cond=dict(class_labels=y), **options)
    others = ddim_sample(m, SHAPE, 10, generator=rng(3), cond=dict(class_labels=y_next), **options)
    x, noise = x_T, iter(drawn)
    for t in theirs.timesteps.tolist():
        with torch.no_grad():
            out = net(x, t, class_labels=y).sample
        z = next(noise) if eta and t != theirs.timesteps[-1] else torch.zeros_like(x)
        x = theirs.step(out, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample
    torch.testing.assert_close(samples, x, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(others, x, rtol=1e-3, atol=1e-3)


SAMPLERS = {
    "ancestral": lambda m, x_T, **k: ancestral_sample(m, x_T.shape, x_T, rng(3), steps=5, **k),
    "ddim": lambda m, x_T, **k: ddim_sample(m, x_T.shape, 5, x_T=x_T, generator=rng(3), **k),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("changes", [{}, dict(variance="learned")], ids=["fixed", "learned"])
def test_a_condition_is_the_same_as_a_model_with_the_condition_built_in(name, changes):
    m, (x_T, y) = conditional(**changes), eight()
    built_in, paths = m.with_net(lambda x, t: m.net(x, t, y)), {}
    for key, chosen, cond in (("cond", m, dict(class_labels=y)), ("built in", built_in, None)):
        paths[key] = []
        SAMPLERS[name](
            chosen, x_T, cond=cond, callback=lambda t, x, x0, key=key: paths[key].append(torch.stack([x, x0]))
        )
    assert torch.equal(torch.stack(paths["cond"]), torch.stack(paths["built in"]))
    others = SAMPLERS[name](m, x_T, cond=dict(class_labels=y.roll(1)))
    assert ((others - paths["cond"][-1][0]).flatten(1).abs().amax(1) > 1e-3)[y != y.roll(1)].all()


def test_a_condition_is_split_with_the_batch():
    m, (x_T, y) = conditional(), eight()
    cond = dict(class_labels=y)
    at_once = ddim_sample(m, x_T.shape, 5, x_T=x_T, cond=cond)
    torch.testing.assert_close(ddim_sample(m, x_T.shape, 5, x_T=x_T, cond=cond, batch_size=3), at_once)
    parts = [
        ancestral_sample(m, x_T[i : i + 3].shape, x_T[i : i + 3], draw, steps=4, cond=dict(class_labels=y[i : i + 3]))
        for draw in [rng(3)]
        for i in (0, 3, 6)
    ]
    together = ancestral_sample(m, x_T.shape, x_T, rng(3), steps=4, cond=cond, batch_size=3)
    assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_compiled_step_takes_the_condition_as_an_input(graphs, name):
    x_T, y = eight()
    m = DDPM(lambda x, t, y: torch.tanh(x * (y - 1)[:, None, None, None]), linear_schedule(40), "x0")
    for labels in (y, y.roll(1)):
        drawn = [SAMPLERS[name](m, x_T, cond=dict(y=labels), batch_size=4, compile=c) for c in (True, False)]
        torch.testing.assert_close(*drawn, rtol=1e-9, atol=1e-9)
    assert len(graphs) == 1, "one graph for all labels and batches"


def test_inversion_with_a_condition_leads_back_with_that_condition():
    m, (x0, y) = conditional(spread=0.02), eight()
    x0, cond = x0.tanh() / 2, dict(class_labels=y)
    x_T = ddim_invert(m, x0, 20, passes=12, cond=cond)
    back, elsewhere = (
        ddim_sample(m, x0.shape, 20, x_T=x_T, clip=False, cond=c) for c in (cond, dict(class_labels=y.roll(1)))
    )
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-6)
    assert (elsewhere - x0).abs().max() > 1e-3


def test_a_condition_has_one_row_per_image():
    m, (x_T, y) = conditional(), eight()
    message = r"^cond\['class_labels'\] must have one row per image, 8, got "
    calls = (
        lambda cond: ancestral_sample(m, x_T.shape, x_T, cond=cond),
        lambda cond: ddim_sample(m, x_T.shape, 5, x_T=x_T, cond=cond, batch_size=5),
        lambda cond: ddim_invert(m, x_T, 5, cond=cond),
        lambda cond: next(sample_steps(m, ddim_plan(m.s, 5), x_T, cond=cond)),
        lambda cond: m.sample(8, 5, cond=cond),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message + "5$"):
            call(dict(class_labels=y[:5]))
        with pytest.raises(ValueError, match=message + "a single number$"):
            call(dict(class_labels=3))
        with pytest.raises(ValueError, match="^class_labels must be given to"):
            call(None)
    with pytest.raises(ValueError, match="^class_labels must not be given to"):
        ddim_sample(tiny_model(), SHAPE, 5, cond=dict(class_labels=y[:3]))
    assert check_cond(None, x_T) == {} == check_cond({}, x_T)
    assert torch.equal(check_cond(dict(class_labels=y.tolist()), x_T)["class_labels"], y)
    assert check_cond(dict(y=y), torch.zeros(8, 1, device="meta"))["y"].device.type == "meta"


# Pixels, and many of them.


def test_pixels_are_those_of_the_samplers():
    m, cond = tiny_model(linear_schedule(60), num_class_embeds=4), dict(class_labels=torch.tensor([0, 3, 1]))
    ancestral = to_pixels(ancestral_sample(m, SHAPE, generator=rng(3), cond=cond))
    assert torch.equal(m.sample(3, sampler="ancestral", cond=cond, generator=rng(3)), ancestral)
    assert torch.equal(m.sample(3, 60, "ancestral", cond=cond, generator=rng(3)), ancestral)
    ddim = to_pixels(ddim_sample(m, SHAPE, 50, generator=rng(3), cond=cond))
    assert torch.equal(m.sample(3, cond=cond, generator=rng(3)), ddim), "50 steps by default"
    noisy = to_pixels(ddim_sample(m, SHAPE, 7, 1.0, generator=rng(3), cond=cond))
    assert torch.equal(m.sample(3, 7, cond=cond, generator=rng(3), eta=1.0), noisy)
    assert ddim.dtype == torch.uint8 and not torch.equal(ddim, ancestral) and not torch.equal(noisy, ddim)
    short = tiny_model(linear_schedule(6))
    assert torch.equal(short.sample(3, generator=rng(3)), short.sample(3, 6, generator=rng(3))), "all T where T < 50"
    assert m.sample(1, 2, cond=dict(class_labels=[3])).shape == (1, 1, 8, 8)
    assert Sampling().network_calls(short) == 6 and Sampling("ancestral").network_calls(m) == 60


def test_a_network_of_ones_own_needs_its_image_shape():
    m = DDPM(lambda x, t: torch.tanh(x), linear_schedule(20))
    with pytest.raises(ValueError, match="image_shape must be set"):
        m.sample(2)
    m.image_shape = (3, 4, 5)
    assert m.sample(2).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(0), "n must be at least 1, got 0"),
        (lambda m: m.sample(2, sampler="euler"), "sampler must be one of ancestral, ddim, dpm, heun; got 'euler'"),
        (lambda m: m.sample(2, sampler="ancestral", eta=0.5), "eta is for ddim; .* Got 0.5"),
        (lambda m: m.sample(2, 1, "ancestral"), "steps must be a whole number from 2 to T = 20, got 1"),
        (lambda m: m.sample(2, 21), "steps must be a whole number from 1 to T = 20, got 21"),
        (lambda m: m.sample(2, precision="fp8"), "precision must be one of no, bf16, fp16; got 'fp8'"),
        (lambda m: m.sample(2, precision="fp16"), "precision must be no or bf16 on a CPU"),
        (lambda m: Sampling(precision="fp16").network_calls(m), "precision must be no or bf16 on a CPU"),
        (lambda m: Sampling(seed=-1).draw(m, 2), "seed must be at least 0, got -1"),
        (lambda m: Sampling("ancestral", eta=1.0).network_calls(m), "eta is for ddim"),
        (lambda m: batch_labels(torch.zeros(4).long(), [3, 2]), "labels must have one row per image, 5, got 4"),
    ],
)
def test_what_pixels_cannot_be_drawn_with_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(tiny_model())


def test_one_batch_is_drawn_by_the_sampler_with_the_seed_itself():
    m = tiny_model(linear_schedule(100))
    expected = to_pixels(ddim_sample(m, (5, 1, 8, 8), 4, 0.5, generator=rng(3)))
    assert torch.equal(Sampling("ddim", 4, 0.5, seed=3, progress=False).draw(m, 5), expected)
    expected = to_pixels(ancestral_sample(m, (5, 1, 8, 8), generator=rng(3), steps=4))
    sampling = Sampling("ancestral", 4, seed=3, progress=False)
    assert torch.equal(sampling.draw(m, 5), expected)
    assert not torch.equal(sampling.draw(m, 5, batch=1), expected)
    assert not torch.equal(sampling.draw(m, 5, batch=1), replace(sampling, seed=4).draw(m, 5))


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_mixed_precision_is_that_of_the_network_and_the_images_are_nearly_the_same(name):
    m, exact, images, dtypes = tiny_model(linear_schedule()), Sampling(name, 8, seed=3, progress=False), [], []
    m.net.conv_in.register_forward_hook(lambda layer, x, out: dtypes.append((x[0].dtype, out.dtype)))
    expected = exact.draw(m, 4)
    rough = replace(exact, precision="bf16").draw(m, 4, callback=lambda k, x: images.append((k, x.dtype)))
    assert dtypes == 8 * [(torch.float32, torch.float32)] + 8 * [(torch.float32, torch.bfloat16)]
    assert images == [(k, torch.float32) for k in range(9)]
    off = (rough.int() - expected.int()).abs().float()
    assert not torch.equal(rough, expected) and off.mean() < 3 < expected.float().std()
    assert not torch.is_autocast_enabled("cpu")


def test_a_layout_in_memory_and_a_compiled_step_change_the_images_by_rounding(graphs):
    m, plain = DDPM(lively(OwnNet(3)), linear_schedule()), Sampling(steps=5, eta=0.5, progress=False)
    m.image_shape = (3, 8, 8)
    expected = plain.draw(m, 4)
    compiled = replace(plain, compile=True).draw(m, 4)
    assert len(graphs) == 1 and m.net.first.weight.is_contiguous()
    seen = []
    beside = replace(plain, channels_last=True).draw(m, 4, callback=lambda k, x: seen.append(x))
    for x in (m.net.first.weight, *seen):
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    for drawn in (compiled, beside):
        assert (drawn.int() - expected.int()).abs().max() <= 1


def test_batches_have_their_own_numbers_and_labels_and_only_missing_ones_are_drawn(tmp_path, capsys):
    m, y, calls = tiny_model(linear_schedule(), num_class_embeds=4), torch.tensor([0, 3, 1, 1, 2, 0, 3, 2]), []
    sampling = Sampling(steps=3, seed=5, progress=False)
    cache = CachedSamples(tmp_path / "eight", dict(n=8, batch_size=3))
    with pytest.raises(ValueError, match="^labels must have one row per image, 8, got 5"):
        draw_batches(sampling, m, cache, y[:5])
    assert batch_labels(None, cache.sizes) == [None, None, None]
    m.net.register_forward_hook(lambda *_: calls.append(1))
    draw_batches(sampling, m, cache, y)
    assert len(calls) == 9
    for i, first in enumerate((0, 3, 6)):
        labels = y[first : first + 3]
        expected = sampling.draw(m, len(labels), i, cond=dict(class_labels=labels))
        assert torch.equal(torch.from_numpy(cache.read(i)), expected)
    assert capsys.readouterr().err == ""
    calls.clear()
    again = CachedSamples(tmp_path / "eight", dict(n=8, batch_size=3))
    draw_batches(sampling, m, again, y)
    assert not calls
    before = cache.read(1)
    again.path(1).unlink()
    draw_batches(replace(sampling, progress=True), m, again, y)
    assert len(calls) == 3 and (again.read(1) == before).all() and "3/3" in capsys.readouterr().err


def test_a_request_holds_what_changes_the_images_and_nothing_else(tmp_path):
    m, base = tiny_model(), Sampling(steps=4)
    m.save_pretrained(tmp_path / "model")
    request = sampling_request(base, m, tmp_path, 8, 3)
    assert request == request | dict(sampler="ddim", steps=4, eta=0.0, seed=0, precision="no", n=8, batch_size=3)
    assert request["device"] == "cpu" and not {"progress", "channels_last", "compile"} & request.keys()
    for faster in (dict(progress=False), dict(channels_last=True), dict(compile=True)):
        assert sampling_request(replace(base, **faster), m, tmp_path, 8, 3) == request
    for change in (dict(sampler="ancestral"), dict(steps=5), dict(eta=0.5), dict(seed=1), dict(precision="bf16")):
        assert sampling_request(replace(base, **change), m, tmp_path, 8, 3) != request, change
    assert sampling_request(replace(base, steps=None), m, tmp_path, 8, 3)["steps"] == 20
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    assert sampling_request(base, m, tmp_path, 8, 3)["model"] != request["model"]
