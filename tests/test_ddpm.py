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


def test_the_state_of_a_model_is_that_of_its_network():
    net = OwnNet()
    assert DDPM(net, S).state_dict().keys() == {f"net.{name}" for name in net.state_dict()}


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
