"""The U-Net: agreement with diffusers' UNet2DModel on the same weights, its parts against their definitions, misuse."""

import inspect

import pytest
import torch
from torch import nn

from ddpm_lit.unet import NEUTRAL, PRESETS, Attention, ResidualBlock, UNet, sinusoidal

SMALL = dict(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
CONFIGS = {
    "digits": PRESETS["digits"],
    "cifar10": PRESETS["cifar10"],
    "28x28": dict(PRESETS["mnist"], block_out_channels=(16, 32, 32), norm_num_groups=8),
    "defaults": SMALL,
    "one head": dict(SMALL, attention_head_dim=None),
    "padding 0": dict(SMALL, downsample_padding=0),
    "padding 1": dict(SMALL, downsample_padding=1),
    "cosines first, shift 1": dict(SMALL, flip_sin_to_cos=True, freq_shift=1),
    "sines first, shift 0": dict(SMALL, flip_sin_to_cos=False, freq_shift=0),
    "no attention in the middle": dict(SMALL, add_attention=False),
    "learned variance": dict(SMALL, out_channels=6),
    "three blocks, attention everywhere": dict(
        SMALL,
        layers_per_block=3,
        block_out_channels=(16, 16, 32),
        down_block_types=("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3,
    ),
}


def rng(seed):
    return torch.Generator().manual_seed(seed)


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    "Random values for all parameters, so that no zero-initialised layer hides what lies before it."
    draw = rng(seed)
    for name, parameter in net.named_parameters():
        middle = float(parameter.ndim == 1 and name.endswith("weight"))
        spread = 0.1 if parameter.ndim == 1 else (1 / parameter[0].numel()) ** 0.5
        parameter.data = middle + spread * torch.randn(parameter.shape, generator=draw)
    return net.eval()


def images(config: dict, n: int = 2):
    size = config["sample_size"]
    return torch.randn(n, config["in_channels"], size, size, generator=rng(1))


@pytest.fixture(scope="module")
def UNet2DModel():
    return pytest.importorskip("diffusers").UNet2DModel


def test_defaults_are_those_of_diffusers(UNet2DModel):
    theirs = {k: v.default for k, v in inspect.signature(UNet2DModel.__init__).parameters.items() if k != "self"}
    mine = {k: v.default for k, v in inspect.signature(UNet.__init__).parameters.items()}
    mine = {k: v for k, v in mine.items() if k not in ("self", "generator", "other")}
    assert mine | NEUTRAL == theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_diffusers_give_the_same_output_and_gradient_here(name, UNet2DModel):
    config = CONFIGS[name]
    theirs, mine = lively(UNet2DModel(**config)), UNet(**config).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x, t = images(config).requires_grad_(), torch.tensor([3, 977])
    a, b = theirs(x, t).sample, mine(x, t)
    assert a.std() > 0.1
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    probe = torch.randn(a.shape, generator=rng(2))
    (grad_a,), (grad_b,) = (torch.autograd.grad((out * probe).sum(), x) for out in (a, b))
    torch.testing.assert_close(grad_b, grad_a, atol=1e-5 * grad_a.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("name", ["digits", "28x28", "defaults"])
def test_weights_from_here_give_the_same_output_in_diffusers(name, UNet2DModel):
    config = CONFIGS[name]
    mine = lively(UNet(**config), seed=5)
    theirs = UNet2DModel(**mine.config).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x = images(config)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, 500).sample, mine(x, 500), atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_as_it_does_in_diffusers(UNet2DModel):
    # Without attention, whose memory layout differs from ours and with it the order in which a mask is drawn.
    plain = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False)
    config = SMALL | plain | dict(dropout=0.5)
    theirs, mine = lively(UNet2DModel(**config)).train(), UNet(**config).train()
    mine.load_state_dict(theirs.state_dict())
    outputs = []
    for net in (theirs, mine):
        torch.manual_seed(0)
        out = net(images(config), 10)
        outputs.append(out if torch.is_tensor(out) else out.sample)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine.eval()(images(config), 10), outputs[1], atol=1e-2)


def test_the_papers_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet.from_preset("cifar10").parameters()) == 35_746_307


def test_a_scalar_step_is_the_same_step_for_all():
    net = lively(UNet.from_preset("digits"))
    x = images(PRESETS["digits"], 3)
    with torch.no_grad():
        each = net(x, torch.full((3,), 7))
        assert torch.equal(net(x, 7), each) and torch.equal(net(x, torch.tensor(7)), each)
        assert not torch.allclose(net(x, 8), each, atol=1e-4)


def test_an_image_is_not_told_about_the_others_of_its_batch():
    net, x = lively(UNet(**SMALL)).double(), images(SMALL, 4).double()
    t = torch.tensor([1, 20, 300, 999])
    with torch.no_grad():
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(net(x, t), alone, atol=1e-12, rtol=1e-10)


def test_same_generator_same_weights_whatever_the_global_seed():
    torch.manual_seed(1)
    a = UNet(**SMALL, generator=rng(3)).state_dict()
    torch.manual_seed(2)
    b, c = UNet(**SMALL, generator=rng(3)).state_dict(), UNet(**SMALL, generator=rng(4)).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv_in.weight"], c["conv_in.weight"])


def test_initialisation_is_the_papers():
    net = UNet(**SMALL, generator=rng(0))
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert (layer.bias == 0).all()
            ends_a_branch = name.endswith(("conv2", "to_out.0")) or name == "conv_out"
            receptive = layer.weight[0, 0].numel() if layer.weight.ndim == 4 else 1
            bound = (6 / (receptive * sum(layer.weight.shape[:2]))) ** 0.5
            largest = layer.weight.abs().max().item()
            assert largest == 0 if ends_a_branch else 0.95 * bound < largest <= bound, name


def test_every_parameter_that_can_matter_gets_a_gradient():
    net, x = lively(UNet(**SMALL)).double(), images(SMALL).double()
    net(x, torch.tensor([5, 600])).square().sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert still == {name for name, _ in net.named_parameters() if name.endswith("to_k.bias")} != set()


def test_sinusoidal_is_its_formula():
    t = torch.tensor([0, 1, 41, 999])
    for shift, flip in ((0, True), (1, False)):
        rate = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / (8 - shift))
        waves = [(t[:, None] * rate).sin(), (t[:, None] * rate).cos()]
        wanted = torch.cat(waves[::-1] if flip else waves, dim=1)
        torch.testing.assert_close(sinusoidal(t, 16, shift, flip).double(), wanted, atol=1e-4, rtol=0)


def test_blocks_start_as_the_identity():
    x, emb = torch.randn(2, 16, 4, 4, generator=rng(0)), torch.randn(2, 8, generator=rng(1))
    assert torch.equal(ResidualBlock(16, 16, 8, 4, 1e-5, 0.0)(x, emb), x)
    assert torch.equal(Attention(16, 8, 4, 1e-5)(x), x)


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(block_out_channels=(16, 36)), "block_out_channels must be divisible by norm_num_groups=8, got 36"),
        (dict(block_out_channels=(16, "32")), "block_out_channels must be even numbers of at least 4, got '32'"),
        (dict(block_out_channels=(16, 0)), "block_out_channels must be even numbers of at least 4, got 0"),
        (dict(attention_head_dim=6), "block_out_channels must be divisible by attention_head_dim=6, got 16"),
        (dict(attention_head_dim=0), "attention_head_dim=0"),
        (dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")), "down_block_types .*'CrossAttnDownBlock2D'"),
        (dict(up_block_types=("UpBlock2D", "DownBlock2D")), "up_block_types .*'DownBlock2D'"),
        (dict(down_block_types=("DownBlock2D",)), "down_block_types must have one entry for each"),
        (dict(block_out_channels=()), "down_block_types must have one entry for each"),
        (dict(downsample_padding=2), "downsample_padding must be 0 or 1, got 2"),
        (dict(dropout=1.0), "dropout must lie in"),
        (dict(layers_per_block=0), "layers_per_block must be a whole number above 0, got 0"),
        (dict(norm_num_groups=None), "norm_num_groups must be a whole number above 0, got None"),
        (dict(act_fn="gelu"), "act_fn='gelu' is not implemented"),
        (dict(time_embedding_type="fourier"), "time_embedding_type='fourier' is not implemented"),
        (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift='scale_shift' is not implemented"),
        (dict(num_class_embeds=10), "num_class_embeds=10 is not implemented"),
        (dict(downsample_type="resnet"), "downsample_type='resnet' is not implemented"),
        (dict(center_input_sample=True), "center_input_sample=True is not implemented"),
        (dict(layer_per_block=2), "UNet has no keyword layer_per_block"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        UNet(**(SMALL | change))


@pytest.mark.parametrize(
    "shape, t, named",
    [
        ((2, 1, 16, 16), 0, r"x_t must be \(b, 3, h, w\), got \(2, 1, 16, 16\)"),
        ((3, 16, 16), 0, r"x_t must be \(b, 3, h, w\)"),
        ((2, 3, 15, 16), 0, r"height and width of x_t must be divisible by 2, got \(15, 16\)"),
        ((2, 3, 16, 17), 0, r"divisible by 2, got \(16, 17\)"),
        ((2, 3, 16, 16), torch.tensor([1, 2, 3]), r"t must be an integer or \(2,\) integers, got shape \(3,\)"),
        ((2, 3, 16, 16), 0.5, "t must be an integer"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, t, named):
    with pytest.raises(ValueError, match=named):
        UNet(**SMALL)(torch.zeros(shape), t)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="name must be one of digits, mnist, cifar10; got 'cifar'"):
        UNet.from_preset("cifar")
