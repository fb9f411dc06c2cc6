"""The model around a network: settings, devices, shapes, conditions."""

import doubles
import pytest
import torch
from doubles import OwnNet, rng, tiny_model

from ddpm_lit.bound import vlb_terms
from ddpm_lit.ddpm import DDPM, two_points
from ddpm_lit.forward import linear_schedule
from ddpm_lit.objective import bound_loss, simple_loss
from ddpm_lit.unet import UNet

S = linear_schedule(10, 0.01, 0.3)


@pytest.mark.parametrize("words", [{"predicts": "noise"}, {"variance": "fixed_small"}])
def test_other_words_for_a_model_are_refused(words):
    ((name, value),) = words.items()
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got '{value}'"):
        DDPM(None, linear_schedule(10), **words)


def test_the_device_is_that_of_the_parameters_or_of_the_schedule():
    assert DDPM(torch.sin, S).device.type == "cpu"
    assert DDPM(torch.sin, S.to("meta")).device.type == "meta"
    m = DDPM(OwnNet(), S).to("meta")
    assert m.device.type == "meta" and m.s.beta.is_meta and m.s.beta.dtype == torch.float64
    assert not S.beta.is_meta, "the caller's schedule stays where it is"
    assert DDPM(OwnNet(), S).half().s.beta.dtype == torch.float64


def test_the_image_shape_of_a_unet_is_in_its_configuration():
    assert tiny_model(S).image_shape == (1, 8, 8)
    assert DDPM(UNet(**doubles.TINY | dict(sample_size=(8, 16))), S).image_shape == (1, 8, 16)
    m = tiny_model(S)
    m.image_shape = 1, 16, 16
    assert m.image_shape == (1, 16, 16)


def test_another_network_has_a_shape_only_if_it_is_set():
    m = DDPM(OwnNet(3), S)
    with pytest.raises(ValueError, match="image_shape must be set to"):
        m.image_shape  # noqa: B018
    m.image_shape = torch.Size([3, 4, 4])
    assert m.image_shape == (3, 4, 4) and type(m.image_shape) is tuple
    assert m.with_net(OwnNet(3)).image_shape == (3, 4, 4)


@pytest.mark.parametrize("training", [True, False])
def test_with_net_keeps_all_settings(training):
    m = DDPM(OwnNet(), S, "v", "beta", clip=False).train(training)
    other = m.with_net(net := OwnNet())
    assert type(other) is DDPM and other.net is net and m.net is not net and other.training == training
    assert (other.s, other.predicts, other.variance, other.clip) == (m.s, "v", "beta", False)


# -------------------------------------------------------------------------------------------- what a state says


def test_the_state_of_a_model_is_that_of_its_network_and_its_settings():
    net = OwnNet()
    state = DDPM(net, S).state_dict()
    assert state.keys() == {f"net.{name}" for name in net.state_dict()} | {"_extra_state"}
    assert all(torch.is_tensor(value) for value in state.values()), "as safetensors wants it"
    shaped = DDPM(OwnNet(), S)
    shaped.image_shape = (1, 8, 8)
    m = DDPM(OwnNet(), linear_schedule(10, 0.01, 0.3))
    m.load_state_dict(shaped.state_dict())
    assert m.image_shape == (1, 8, 8) and torch.equal(m.net.first.weight, shaped.net.first.weight)


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(predicts="v"), "predicts must be 'v', as in the state_dict; got 'eps'"),
        (dict(variance="beta"), "variance must be 'beta'"),
        (dict(clip=False), "clip must be False"),
        (dict(s=linear_schedule(20, 0.01, 0.3)), "schedule must be that of the state_dict, with T = 20"),
        (dict(s=linear_schedule(10, 0.01, 0.2)), "schedule must be that"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_another_model_is_refused_and_changes_nothing(words, message, strict):
    other, m = DDPM(OwnNet(), **dict(s=S) | words), DDPM(OwnNet(), S)
    before = m.net.first.weight.clone()
    with pytest.raises(ValueError, match=message):
        m.load_state_dict(other.state_dict(), strict=strict)
    assert torch.equal(m.net.first.weight, before)
    inside = torch.nn.ModuleDict({"m": m})  # as in a user's own module
    with pytest.raises(ValueError, match=message):
        inside.load_state_dict(torch.nn.ModuleDict({"m": other}).state_dict(), strict=strict)


def test_an_earlier_state_without_settings_is_read():
    net, m = OwnNet(), DDPM(OwnNet(), S)
    older = {f"net.{name}": value for name, value in net.state_dict().items()}
    assert m.load_state_dict(older).missing_keys == [] and len(older) == len(net.state_dict())
    assert torch.equal(m.net.first.weight, net.first.weight)
    DDPM(OwnNet(), S).to("meta").load_state_dict(m.state_dict(), assign=True)  # tables that hold no numbers


# -------------------------------------------------------------------------------------------- kinds at the edge


@pytest.mark.parametrize("wrong, name", [(dict(s=1000), "s"), (dict(s=torch.ones(3)), "s"), (dict(clip=1), "clip")])
def test_what_is_no_model_is_refused_when_it_is_made(wrong, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        DDPM(OwnNet(), **dict(s=S) | wrong)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8.0), (1, 0, 8), (True, 8, 8)])
def test_an_image_shape_is_three_whole_numbers(shape):
    with pytest.raises(ValueError, match="^image_shape must be"):
        DDPM(OwnNet(), S).image_shape = shape
    m = DDPM(OwnNet(), S)
    m.image_shape = torch.tensor([1, 8, 8])
    assert m.image_shape == (1, 8, 8) and type(m.image_shape[0]) is int


class Output:
    "What networks of other libraries return."

    sample = torch.zeros(1)


@pytest.mark.parametrize("out", [Output(), (torch.zeros(1),), {"sample": torch.zeros(1)}, None])
def test_a_network_that_returns_no_tensor_is_named(out):
    with pytest.raises(ValueError, match=f"^net must return a tensor shaped like x_t, got {type(out).__name__}"):
        DDPM(lambda x_t, t: out, S).p_step(torch.zeros(1, 1, 2, 2), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variance", ["beta", "learned"])
def test_networks_of_every_precision_are_served(dtype, variance):
    m = tiny_model(S, variance=variance)
    x = torch.randn(2, 1, 8, 8, generator=rng(1))
    expected, step = m.p_step(x, 3), DDPM(m.net.to(dtype), S, variance=variance).p_step(x, 3)
    assert step.mean.dtype == step.mean.dtype == torch.float32
    torch.testing.assert_close(step.mean, expected.mean, rtol=0.05, atol=0.05)


def test_tables_and_network_may_lie_apart_and_the_default_device_decides_nothing():
    m = DDPM(OwnNet(), S).to("meta")
    m.s = linear_schedule(10)
    assert m.p_step(torch.zeros(1, 1, 2, 2, device="meta"), 3).mean.is_meta
    torch.set_default_device("meta")
    try:
        assert DDPM(OwnNet().to_empty(device="cpu"), S).double().s.beta.device.type == "cpu"
    finally:
        torch.set_default_device(None)


# -------------------------------------------------------------------------------------------------- conditions


class Conditional(OwnNet):
    "An `OwnNet` that takes one number per image, and remembers what it was given."

    def forward(self, x_t, t, shift):
        self.seen = shift
        return super().forward(x_t + shift[:, None, None, None], t)


def pair(n=6):
    "A model with a condition, its condition, and a model that has it built in."
    torch.manual_seed(0)
    net, shift = Conditional(), torch.randn(n, generator=rng(1))
    return DDPM(net, S), shift, DDPM(lambda x_t, t: net(x_t, t, shift), S)


def test_conditions_reach_the_network_as_they_are():
    m, shift, built_in = pair()
    x, t = torch.randn(6, 1, 4, 4, generator=rng(2)), torch.arange(6)
    for given, expected in (
        (m(x, t, shift=shift)[0], built_in(x, t)[0]),
        (m.p_step(x, t, shift=shift).mean, built_in.p_step(x, t).mean),
        (m.reverse(x, t, False, shift=shift)[1], built_in.reverse(x, t, False)[1]),
    ):
        assert torch.equal(given, expected)
        assert m.net.seen is shift
    assert not torch.allclose(m.p_step(x, t, shift=shift.roll(1)).mean, built_in.p_step(x, t).mean)


def test_conditions_reach_the_network_from_losses_and_bound():
    m, shift, built_in = pair()
    x0 = torch.randint(256, (6, 1, 4, 4), generator=rng(3)) / 127.5 - 1
    cond, wrong = {"shift": shift}, {"shift": shift.roll(1)}
    for loss in (simple_loss, bound_loss):
        expected = loss(built_in, x0, rng(4))
        assert torch.equal(loss(m, x0, rng(4), cond=cond), expected)
        assert not torch.allclose(loss(m, x0, rng(4), cond=wrong), expected, rtol=1e-4)
    bits, other = (vlb_terms(m, x0, rng(5), cond=c) for c in (cond, wrong))
    assert all(torch.equal(a, b) for a, b in zip(bits, vlb_terms(built_in, x0, rng(5)), strict=True))
    assert torch.equal(bits.prior, other.prior)
    assert not torch.allclose(bits.kl, other.kl, rtol=1e-4) and not torch.allclose(bits.decoder, other.decoder)


def test_a_part_of_a_batch_brings_its_own_conditions():
    m, shift, built_in = pair()
    x0 = torch.randint(256, (6, 1, 4, 4), generator=rng(6)) / 127.5 - 1
    for loss in (simple_loss, bound_loss):
        parts = zip(x0.chunk(3), shift.chunk(3), strict=True)
        losses = [loss(m, x, rng(7), (i, 3), {"shift": y}) for i, (x, y) in enumerate(parts)]
        torch.testing.assert_close(sum(losses) / 3, loss(built_in, x0, rng(7)))


def test_a_condition_that_the_network_does_not_know_is_refused():
    with pytest.raises(TypeError, match="shift"):
        DDPM(OwnNet(), S).p_step(torch.zeros(2, 1, 4, 4), 3, shift=torch.zeros(2))


# ------------------------------------------------------------------------------------------------- two points


@pytest.mark.parametrize("a", [0.3, 0.8])
def test_the_exact_network_of_two_points_averages_by_bayes_rule(a):
    x, t = torch.randn(50, 1, 2, 2, generator=rng(8), dtype=torch.float64), torch.arange(50) % 10
    ab = S.alpha_bar[t][:, None, None, None]
    odds = [torch.distributions.Normal(ab.sqrt() * x0, (1 - ab).sqrt()).log_prob(x) for x0 in (-a, a)]
    low, high = torch.stack(odds).softmax(0)
    torch.testing.assert_close(two_points(S, a)(x, t), a * (high - low), rtol=1e-9, atol=1e-12)
