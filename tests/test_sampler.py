"""The samplers, step by step against diffusers' schedulers and against Algorithm 2 written out."""

import inspect
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm_lit.ddpm import DDPM
from ddpm_lit.exact import MixtureData, exact_ddpm
from ddpm_lit.forward import linear_schedule
from ddpm_lit.sampler import (
    ancestral_plan,
    ancestral_sample,
    ddim_coefficients,
    ddim_invert,
    ddim_plan,
    ddim_sample,
    limiter,
    sample_steps,
    sampler_step,
    step_table,
    time_steps,
)
from ddpm_lit.unet import UNet

TINY = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (3, 1, 8, 8)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def model(predicts="eps", variance="beta_tilde", T=1000):
    "A model whose network is cheap, is not linear, mixes the pixels and heeds t."
    weights = torch.randn(64, 64, generator=rng(0), dtype=torch.float64) / 8

    def net(x, t):
        mixed = torch.tanh((x.flatten(1) @ weights.to(x)) + torch.sin(t / 100)[:, None].to(x)).view(x.shape)
        return torch.cat([mixed, -mixed], dim=1) if variance == "learned" else mixed

    return DDPM(net, linear_schedule(T), predicts, variance)


def as_precise(theirs, s):
    "diffusers keeps its tables in float32 (tests/test_diffusers_scheduler.py compares them); give it float64."
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = s.beta, s.alpha, s.alpha_bar
    return theirs


def spy(monkeypatch):
    "Keep every noise that the samplers draw, so that diffusers can be given the same."
    import ddpm_lit.sampler as sampler

    drawn, randn = [], sampler.randn
    monkeypatch.setattr(sampler, "randn", lambda *args: drawn.append(randn(*args)) or drawn[-1])
    return drawn


def expand_timesteps(m, plan):
    x = torch.randn(SHAPE, generator=rng(2), dtype=torch.float64)
    yield None, x, None
    yield from sample_steps(m, plan, x, rng(3))


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_ancestral_steps_are_those_of_diffusers(monkeypatch, predicts, variance):
    kind = {"beta_tilde": "fixed_small", "beta": "fixed_large"}[variance]
    m, compared, drawn = model(predicts, variance), 0, spy(monkeypatch)
    theirs = DDPMScheduler(1000, 1e-4, 0.02, variance_type=kind, prediction_type=PREDICTION[predicts])
    theirs = as_precise(theirs, m.s)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: drawn[-1])
    walk = expand_timesteps(m, ancestral_plan(m.s, variance))
    _, x, _ = next(walk)
    for t, x_next, _ in walk:
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
    walk = expand_timesteps(m, plan)
    _, x, _ = next(walk)
    for t, x_next, _ in walk:
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


def test_dropout_is_off_while_sampling_and_on_again_afterwards():
    net = UNet.from_preset("digits", generator=rng(0), **TINY | dict(dropout=0.5))
    torch.nn.init.normal_(net.conv_out.weight, std=0.2, generator=rng(1))
    for block in net.modules():
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.2, generator=rng(1))
    m = DDPM(net, linear_schedule(5)).train()
    x_T = torch.randn(SHAPE, generator=rng(2))
    assert not torch.equal(m.net(x_T, torch.zeros(3).long()), m.net(x_T, torch.zeros(3).long()))
    assert torch.equal(ancestral_sample(m, SHAPE, x_T, rng(3)), ancestral_sample(m, SHAPE, x_T, rng(3)))
    assert m.training and net.training


@pytest.mark.parametrize("sample", [ancestral_sample, lambda *a, **k: ddim_sample(*a, steps=4, **k)])
def test_a_model_is_sampled_with_the_clipping_it_was_made_for(sample):
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
def test_what_cannot_be_is_refused_by_name(call, word):
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
    beliefs = []
    ddim_sample(m, SHAPE, 10, generator=rng(5), clip=0.8, callback=lambda t, x, x0: beliefs.append(x0))
    free = []
    ddim_sample(m, SHAPE, 10, generator=rng(5), clip=False, callback=lambda t, x, x0: free.append(x0))
    assert all(x0.abs().max() <= 1 for x0 in beliefs) and free[0].abs().max() > 1
    torch.testing.assert_close(beliefs[0], limiter(0.8)(free[0]))


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


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_inversion_and_sampling_return_the_image(predicts, spacing):
    m = exact_ddpm(MixtureData([0.5, 0.5], [[-0.5] * 4, [0.5, 0.2, 0.5, 0.2]], 0.04), linear_schedule(), predicts)
    x0 = 0.5 + 0.1 * torch.randn(8, 1, 2, 2, generator=rng(6), dtype=torch.float64)
    seen = {}
    for passes in (1, 4, 30):
        x_T = ddim_invert(m, x0, 100, passes, spacing=spacing)
        back = ddim_sample(m, x0.shape, 100, x_T=x_T, spacing=spacing)
        seen[passes] = (back - x0).abs().max().item()
    assert seen[30] < 1e-8 and seen[4] < seen[1] / 5 and seen[1] < 0.1
    assert 0.3 < x_T.std() < 3


def test_a_large_request_is_drawn_in_batches():
    x_T, sizes = torch.randn(7, 1, 8, 8, generator=rng(7), dtype=torch.float64), []
    m = model()
    whole = ddim_sample(m, x_T.shape, 5, x_T=x_T)
    net = m.net
    m.net = lambda x, t: sizes.append(len(x)) or net(x, t)
    parts = ddim_sample(m, x_T.shape, 5, x_T=x_T, batch_size=3)
    assert sizes == [3] * 10 + [1] * 5
    torch.testing.assert_close(parts, whole)
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


def test_progress_is_shown_where_asked_and_names_the_batch(capsys):
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


def test_what_is_not_said_is_what_the_docstrings_say():
    taken = {f: {k: p.default for k, p in inspect.signature(f).parameters.items()} for f in (ddim_sample, ddim_invert)}
    assert taken[ddim_sample].items() >= dict(steps=50, eta=0.0, spacing="linear", clip=None, compile=False).items()
    assert taken[ddim_invert].items() >= dict(steps=50, passes=1, spacing="linear").items()
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
def test_more_of_what_cannot_be_is_refused_by_name(call, word):
    with pytest.raises(ValueError, match=f"^{word} must be"):
        call(model())


# The step as a function of tensors, and compiled.


def some_plans(m):
    ancestral = [ancestral_plan(m.s, m.variance), ancestral_plan(m.s, m.variance, 5)]
    return ancestral + [ddim_plan(m.s, 5, eta) for eta in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("clip", [True, False, 0.9])
@pytest.mark.parametrize("variance", ["beta_tilde", "beta", "learned"])
def test_no_value_is_asked_for_in_the_loop(variance, clip):
    "On the device `meta` a tensor has no values, so that asking for one is an error; a GPU one would wait for."
    channels = 2 if variance == "learned" else 1
    net = UNet.from_preset("digits", generator=rng(0), **TINY, out_channels=channels).to("meta")
    m, x = DDPM(net, linear_schedule(12), variance=variance), torch.empty(SHAPE, device="meta")
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
    assert exact.shape == (1000, 6) and exact.dtype == torch.float64
    assert torch.equal(exact[:, 2:5], torch.stack(plan[1:4], 1)) and torch.equal(exact[:, 5], torch.ones(1000).double())
    assert torch.equal(single, exact.float()) and torch.equal(half, single)
    x, z = torch.randn(2, *SHAPE, generator=rng(1)).bfloat16()
    for row in single[::100]:
        coarse, fine = (sampler_step(m, y, torch.tensor(3).expand(3), row, z.to(y), False) for y in (x, x.float()))
        assert coarse[0].dtype == torch.bfloat16
        torch.testing.assert_close(coarse[0].float(), fine[0], rtol=2e-2, atol=1e-2)


@pytest.fixture
def graphs(monkeypatch):
    "Compiled steps are captured and run as they are, without a compiler: the list grows by each graph that is made."
    import ddpm_lit.sampler as sampler

    made = []
    backend = lambda graph, inputs: made.append(graph) or graph  # noqa: E731
    step = torch.compile(sampler_step, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(sampler, "compiled_step", lambda: step)
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


@pytest.mark.parametrize("clip", [True, False, 0.9])
@pytest.mark.parametrize("variance", ["beta_tilde", "learned"])
def test_a_compiled_step_draws_the_same_and_is_made_once(graphs, variance, clip):
    m = model("eps", variance, T=30)
    x_T = torch.randn(8, 1, 8, 8, generator=rng(2), dtype=torch.float64)
    told = dict(x_T=x_T, clip=clip, batch_size=4)
    for sample in (
        lambda **k: ancestral_sample(m, x_T.shape, generator=rng(3), **k),
        lambda **k: ancestral_sample(m, x_T.shape, generator=rng(4), steps=7, **k),
        lambda **k: ddim_sample(m, x_T.shape, 5, generator=rng(5), **k),
        lambda **k: ddim_sample(m, x_T.shape, 7, 0.5, generator=rng(6), **k),
    ):
        torch.testing.assert_close(sample(compile=True, **told), sample(**told), rtol=1e-9, atol=1e-9)
        assert len(graphs) == 1, "with noise and without, whatever the plan, in every batch"
    ddim_sample(m, x_T.shape, 5, compile=True, **told | dict(clip=clip is not True))
    assert len(graphs) == 2, "another limit is another graph"
    ddim_sample(m, x_T.shape, 5, compile=True, **told | dict(batch_size=5))
    assert len(graphs) == 4, "and so is another size of batch: 5, and 3 that are left"
    ddim_sample(m, x_T.shape, 5, compile=True, **told | dict(batch_size=5))
    assert len(graphs) == 4


def test_compiled_steps_leave_a_layout_and_the_model_as_they_were(graphs):
    net = UNet.from_preset("digits", generator=rng(0), **TINY, in_channels=3, out_channels=3)
    m = DDPM(net.to(memory_format=torch.channels_last), linear_schedule(5)).train()
    x_T = torch.randn(2, 3, 8, 8, generator=rng(1)).contiguous(memory_format=torch.channels_last)
    seen = []
    x = ddim_sample(m, x_T.shape, 4, 1.0, x_T, compile=True, callback=lambda t, x, x0: seen.append(x))
    assert len(graphs) == 1 and m.training and not x.requires_grad and not x.is_inference()
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)


def test_what_the_callback_got_stays_as_it_was(monkeypatch):
    "A CUDA graph writes its results to where it wrote the last ones."
    import ddpm_lit.sampler as sampler

    places = []

    def same_place(*args):
        made = sampler_step(*args)
        places.extend(map(torch.empty_like, made) if not places else ())
        return [place.copy_(new) for place, new in zip(places, made, strict=True)]

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


def test_what_cannot_be_compiled_is_refused_in_one_line(graphs):
    asks = DDPM(lambda x, t: x if t[0] > 3 else -x, linear_schedule(5))
    for _ in range(2):
        with pytest.raises(ValueError, match="^compile must be False where .*: .*branching") as refused:
            ddim_sample(asks, SHAPE, 2, compile=True)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ValueError, match="^clip must be"):
        ddim_sample(asks, SHAPE, 2, compile=True, clip=1.5)
    with pytest.raises(ValueError, match="m returned numbers that are not finite"):
        ddim_sample(DDPM(lambda x, t: x * float("nan"), linear_schedule(5)), SHAPE, 2, compile=True)
