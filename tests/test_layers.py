"""The layers of the U-Net against their definitions, in every layout and on every path that the CPU may take."""

import pytest
import torch
from doubles import rng
from torch import nn

from ddpm_lit.layers import (
    Attention,
    Dropout,
    GroupNorm,
    ResidualBlock,
    Upsample,
    avg_pool_2x,
    nearest_2x,
    run_block,
    sinusoidal,
)


def test_up_at_once_is_up_in_two_steps():
    up = Upsample(4).double()
    x = torch.randn(2, 4, 16, 18, generator=rng(0), dtype=torch.float64)
    torch.testing.assert_close(up(x), up.conv(nearest_2x(x)), atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), up.conv.weight)[0] for out in (up(x), up.conv(nearest_2x(x)))]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-12)


def test_resizing():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(nearest_2x(x)[0, 0, :2, :4], torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]))
    assert torch.equal(avg_pool_2x(x)[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_keeps_its_fraction_and_the_mean(p, memory_format):
    x = torch.ones(4, 32, 64, 64).contiguous(memory_format=memory_format).requires_grad_()
    torch.manual_seed(0)
    out = Dropout(p)(x * 1)
    passed, n = out != 0, x.numel()
    assert abs((~passed).double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
    torch.testing.assert_close(out[passed], torch.full_like(out[passed], 1 / (1 - p)))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())
    # Neighbours in any direction are dropped independently of each other: the four draws of one word too.
    for axis in range(4):
        both = (
            ((~passed).narrow(axis, 0, x.shape[axis] - 1) & (~passed).narrow(axis, 1, x.shape[axis] - 1))
            .double()
            .mean()
        )
        assert abs(both - p * p) < 0.002, axis
    torch.manual_seed(0)
    assert torch.equal(Dropout(p)(x * 1), out) and not torch.equal(Dropout(p)(x * 1), out)
    assert torch.equal(Dropout(p).eval()(x), x) and Dropout(p)(torch.ones(3, 1, 1, 1)).shape == (3, 1, 1, 1)


def test_sinusoidal_is_its_formula():
    t = torch.tensor([0, 1, 41, 999])
    for shift, flip in ((0, True), (1, False)):
        rate = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / (8 - shift))
        waves = [(t[:, None] * rate).sin(), (t[:, None] * rate).cos()]
        expected = torch.cat(waves[::-1] if flip else waves, dim=1)
        torch.testing.assert_close(sinusoidal(t, 16, shift, flip).double(), expected, atol=1e-4, rtol=0)


def test_blocks_start_as_the_identity():
    x, emb = torch.randn(2, 16, 4, 4, generator=rng(0)), torch.randn(2, 8, generator=rng(1))
    assert torch.equal(ResidualBlock(16, 16, 8, 4, 1e-5, 0.0)(x, emb), x)
    assert torch.equal(Attention(16, 8, 4, 1e-5)(x), x)


@pytest.mark.parametrize("shape", [(2, 16, 9), (2, 16, 4, 6), (2, 16, 32, 32), (2, 16, 2, 3, 4)])
def test_group_norm_takes_any_layout_in_memory(shape):
    x = torch.randn(*shape[:1], *shape[2:], shape[1], generator=rng(0)).movedim(-1, 1)  # channels side by side
    norm = GroupNorm(8, 16)
    assert not x.is_contiguous()
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x.contiguous(), 8, norm.weight, norm.bias))


def test_gradient_checkpointing_recomputes_the_block():
    calls, x = [], torch.ones(2, requires_grad=True)

    def block(x):
        calls.append(len(calls))
        return x.exp().sin()

    (plain,) = torch.autograd.grad(run_block(block, x).sum(), x)
    assert calls == [0]
    (again,) = torch.autograd.grad(run_block(block, x, gradient_checkpointing=True).sum(), x)
    assert calls == [0, 1, 2] and torch.equal(again, plain)
