"""Schedules: their tables, all four by formula and by diffusers, and what is refused."""

import diffusers
import pytest
import torch

from ddpm_lit.forward import (
    SCHEDULES,
    Schedule,
    cosine_schedule,
    linear_schedule,
    q_marginal,
    scaled_linear_schedule,
    schedule_by_name,
    sigmoid_schedule,
)

THEIRS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "sigmoid": "sigmoid",
    "cosine": "squaredcos_cap_v2",
}


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("beta_1, beta_T", [(1e-4, 0.02), (1e-3, 0.2)])
def test_betas_are_those_of_diffusers(name, T, beta_1, beta_T):
    theirs = diffusers.DDPMScheduler(T, beta_start=beta_1, beta_end=beta_T, beta_schedule=THEIRS[name])
    ours = schedule_by_name(name, T, beta_1, beta_T).beta.float()
    torch.testing.assert_close(ours, theirs.betas, rtol=1e-6 if name == "cosine" else 5e-7, atol=1e-9)
    # The tolerance refuses a schedule that is off by one step, or of another name.
    assert not torch.allclose(ours.roll(1), theirs.betas, rtol=1e-6, atol=1e-9)
    for other in SCHEDULES:
        beta = schedule_by_name(other, T, beta_1, beta_T).beta.float()
        assert torch.allclose(beta, theirs.betas, rtol=1e-6, atol=1e-9) == (other == name)


def test_defaults_are_those_of_the_paper():
    for make in (linear_schedule, scaled_linear_schedule, sigmoid_schedule):
        assert make().T == 1000
        torch.testing.assert_close(make().beta, make(1000, 1e-4, 0.02).beta, rtol=0, atol=0)
    assert cosine_schedule().T == 1000


def test_a_schedule_does_not_change_and_equals_only_itself():
    s = linear_schedule(10)
    with pytest.raises(AttributeError):
        s.beta = s.alpha
    assert s == s and s != linear_schedule(10) and len({s, linear_schedule(10)}) == 2
    assert repr(s) == "Schedule(T=10, beta=0.0001 … 0.02)"


@pytest.mark.parametrize("device, where", [("meta", "meta"), ("mps", "cpu")])  # MPS has no float64
def test_a_schedule_moves_where_float64_lives(device, where):
    s = linear_schedule(10)
    moved = s.to(device)
    assert {x.device.type for x in (moved.beta, moved.alpha, moved.alpha_bar, moved.alpha_bar_prev)} == {where}
    assert s.beta.device.type == "cpu"


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("wrong", [[], [0.1], [[0.1, 0.2]], 0.1])
def test_a_schedule_is_a_sequence_of_two_or_more(wrong):
    with pytest.raises(ValueError, match="beta must be a sequence of T >= 2 numbers"):
        Schedule(wrong)


@pytest.mark.parametrize("name", ["beta_1", "beta_T"])
@pytest.mark.parametrize("wrong", [0, 1, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("make", [linear_schedule, scaled_linear_schedule, sigmoid_schedule])
def test_the_ends_of_a_schedule_lie_in_0_to_1(make, name, wrong):
    with pytest.raises(ValueError, match=rf"{name} must lie in \(0, 1\), got {wrong}"):
        make(10, **{name: wrong})


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_is_no_schedule(name):
    with pytest.raises(ValueError, match="T must be at least 2, got 1"):
        schedule_by_name(name, 1, 0.1, 0.2)


def test_a_name_is_one_of_four():
    with pytest.raises(ValueError, match="schedule must be one of linear, scaled_linear, sigmoid, cosine; got 'cos'"):
        schedule_by_name("cos", 10, 0.1, 0.2)


@pytest.mark.parametrize("t", [torch.tensor([0, 1, 1]), torch.tensor([[0], [1]]), torch.tensor([0.0, 1.0]), 0.5])
def test_a_t_that_does_not_fit_the_images_is_refused(t):
    with pytest.raises(ValueError, match=r"t must be an integer or \(2,\) integers"):
        q_marginal(linear_schedule(10), torch.zeros(2, 1, 1, 1), t)
