"""The U-Net: agreement with diffusers' UNet2DModel on the same weights, its parts against their definitions, misuse."""

import inspect

import pytest
import torch
from doubles import lively, rng
from torch import nn

from ddpm_lit.layers import (
    Dropout,
)
from ddpm_lit.unet import PRESETS, UNET_DEFAULTS, UNSUPPORTED, UNet, class_condition

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
NETWORKS = {name: preset.network for name, preset in PRESETS.items()}
CONFIGS = {
    "digits": NETWORKS["digits"],
    "cifar10": NETWORKS["cifar10"],
    "28x28": dict(NETWORKS["mnist"], block_out_channels=(16, 32, 32), norm_num_groups=8),
    "defaults": SMALL,
    "one head": dict(SMALL, attention_head_dim=None),
    "padding 0": dict(SMALL, downsample_padding=0),
    "padding 1": dict(SMALL, downsample_padding=1),
    "cosines first, shift 1": dict(SMALL, flip_sin_to_cos=True, freq_shift=1),
    "sines first, shift 0": dict(SMALL, flip_sin_to_cos=False, freq_shift=0),
    "no attention in the middle": dict(SMALL, add_attention=False),
    "learned variance": dict(SMALL, out_channels=6),
    "one channel, 28x28, four heads": dict(SMALL, in_channels=1, out_channels=1, sample_size=28, attention_head_dim=4),
    "from 16x16 up at once": dict(SMALL, sample_size=32),
    "not square": dict(SMALL, sample_size=(32, 20)),
    "scale-shift": dict(SMALL, resnet_time_scale_shift="scale_shift"),
    "scale-shift, no attention in the middle": dict(
        SMALL, resnet_time_scale_shift="scale_shift", add_attention=False, dropout=0.3
    ),
    "resnet blocks that resize": dict(
        SMALL, down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2
    ),
    "resnet blocks that resize, scale-shift, attention between": dict(
        SMALL,
        block_out_channels=(16, 16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    ),
    "down by convolution, up by blocks": dict(
        SMALL, down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2, upsample_type="resnet"
    ),
    "classes, a table": dict(SMALL, num_class_embeds=10),
    "classes, as steps": dict(SMALL, class_embed_type="timestep"),
    "classes, as vectors": dict(SMALL, class_embed_type="identity"),
    "adm64, narrow": dict(
        NETWORKS["adm64"],
        **dict(
            sample_size=16, block_out_channels=(8, 16, 16, 32), layers_per_block=1, num_class_embeds=10, dropout=0.0
        ),
        **dict(norm_num_groups=4, attn_norm_num_groups=8, attention_head_dim=8, time_embedding_dim=24),
    ),
    "celebahq256, narrow": dict(NETWORKS["celebahq256"], block_out_channels=(8, 8, 16, 16, 32, 32), norm_num_groups=4),
    "three blocks, attention everywhere": dict(
        SMALL,
        layers_per_block=3,
        block_out_channels=(16, 16, 32),
        down_block_types=("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3,
    ),
}


def images(config: dict, n: int = 2):
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, config.get("in_channels", 3), height, width, generator=rng(1))


def labels(config: dict, n: int = 2):
    "Return what a network of this configuration needs to know of classes, as the further arguments of a call."
    kind = config.get("class_embed_type")
    if kind is None and config.get("num_class_embeds") is None:
        return ()
    width = 4 * config["block_out_channels"][0]
    return (torch.randn(n, width, generator=rng(3)) if kind == "identity" else torch.tensor([0, 7])[:n],)


@pytest.fixture(scope="module")
def UNet2DModel():
    return pytest.importorskip("diffusers").UNet2DModel


def compare(theirs, mine, config, atol=1e-5):
    "Output, and gradients by the images and by every parameter, must be the same."
    x, t = images(config).requires_grad_(), torch.tensor([3, 977])
    a, b = theirs(x, t, *labels(config)).sample, mine(x, t, *labels(config))
    assert a.std() > 0.1
    torch.testing.assert_close(b, a, atol=atol, rtol=1e-5)
    probe = torch.randn(a.shape, generator=rng(2))
    names = [name for name, _ in mine.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()] or set(names) == set(theirs.state_dict())
    grads = [
        torch.autograd.grad((out * probe).sum(), [x, *(dict(net.named_parameters())[name] for name in names)])
        for out, net in ((a, theirs), (b, mine))
    ]
    largest = max(g.abs().max().item() for g in grads[0][1:])
    for name, theirs_grad, mine_grad in zip(["x", *names], *grads, strict=True):
        scale = max(theirs_grad.abs().max().item(), 1e-3 * largest)
        assert (mine_grad - theirs_grad).abs().max() <= 1e-4 * scale, name


def test_defaults_are_those_of_diffusers(UNet2DModel):
    theirs = {k: v.default for k, v in inspect.signature(UNet2DModel.__init__).parameters.items() if k != "self"}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in UNET_DEFAULTS.items()} == theirs
    assert set(UNSUPPORTED) < set(UNET_DEFAULTS)


SLOW = pytest.param("cifar10", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [name if name != "cifar10" else SLOW for name in CONFIGS])
def test_weights_of_diffusers_give_the_same_output_and_gradients_here(name, UNet2DModel):
    config = CONFIGS[name]
    theirs, mine = lively(UNet2DModel(**config)), UNet(**config).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    compare(theirs, mine, config)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "cifar10"])
def test_weights_from_here_give_the_same_output_in_diffusers(name, UNet2DModel):
    config = CONFIGS[name]
    mine = lively(UNet(**config), seed=5)
    theirs = UNet2DModel(**mine.config).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x = images(config)
    with torch.no_grad():
        a, b = theirs(x, 500, *labels(config)).sample, mine(x, 500, *labels(config))
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


PUBLISHED = {"celebahq256": 113_673_219, "cifar10-improved": 52_546_438, "adm64": 295_904_454} | {
    "adm512": 558_997_638 - 128 * 1024  # of the sinusoids, see chapter 09
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_large_networks_have_the_keys_and_shapes_of_diffusers(name, UNet2DModel):
    with torch.device("meta"):
        mine, theirs = UNet.from_preset(name), UNet2DModel(**NETWORKS[name])
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (mine, theirs)]
    assert shapes[0] == shapes[1] and sum(p.numel() for p in mine.parameters()) == PUBLISHED[name]


@pytest.mark.slow
def test_the_256_network_gives_the_output_of_diffusers(UNet2DModel):
    "Its weights on smaller images: no weight knows the size."
    theirs, mine = lively(UNet2DModel(**NETWORKS["lsun256"])), UNet.from_preset("lsun256").eval()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 32, generator=rng(1))
    with torch.no_grad():
        torch.testing.assert_close(mine(x, 500), theirs(x, 500).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_of_images_and_weights_does_not_matter(memory_format):
    net, x = lively(UNet(**CONFIGS["from 16x16 up at once"])), images(CONFIGS["from 16x16 up at once"])
    with torch.no_grad():
        plain = net(x, 5)
        net, y = net.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        out = net(y, 5)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    assert plain.is_contiguous() and out.is_contiguous(memory_format=memory_format)


def test_dropout_acts_in_training_where_it_does_in_diffusers(UNet2DModel, monkeypatch):
    "Both networks are given the same masks: they are shapes_seen here, from the shape and the number of the call."
    shapes_seen = []

    def masked(layer, x):
        shapes_seen.append(x.shape)
        keep = torch.rand(x.shape, generator=rng(len(shapes_seen))) >= layer.p
        return x * keep / (1 - layer.p) if layer.training else x

    config = CONFIGS["scale-shift"] | dict(dropout=0.5)
    theirs, mine = lively(UNet2DModel(**config)).train(), UNet(**config).train()
    for layer in theirs.modules():
        if isinstance(layer, nn.Dropout) and layer.p == 0:  # diffusers has one that does nothing in attention
            layer.forward = lambda x: x
    mine.load_state_dict(theirs.state_dict())
    monkeypatch.setattr(nn.Dropout, "forward", masked)
    monkeypatch.setattr(Dropout, "forward", masked)
    a, shapes = theirs(images(config), 10).sample, shapes_seen[:]
    shapes_seen.clear()
    b = mine(images(config), 10)
    assert shapes_seen == shapes != []
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine.eval()(images(config), 10), b, atol=1e-2)


def test_the_papers_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet.from_preset("cifar10").parameters()) == 35_746_307


def test_a_scalar_step_is_the_same_step_for_all():
    net = lively(UNet.from_preset("digits"))
    x = images(NETWORKS["digits"], 3)
    with torch.no_grad():
        each = net(x, torch.full((3,), 7))
        assert torch.equal(net(x, 7), each) and torch.equal(net(x, torch.tensor(7)), each)
        assert not torch.allclose(net(x, 8), each, atol=1e-4)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
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
        (dict(downsample_padding=2), "downsample_padding must be one of 0, 1; got 2"),
        (dict(dropout=1.0), "dropout must lie in"),
        (dict(layers_per_block=0), "layers_per_block must be a whole number above 0, got 0"),
        (dict(norm_num_groups=None), "norm_num_groups must be a whole number above 0, got None"),
        (dict(act_fn="gelu"), "act_fn='gelu' is not implemented"),
        (dict(time_embedding_type="fourier"), "time_embedding_type='fourier' is not implemented"),
        (dict(resnet_time_scale_shift="spatial"), "resnet_time_scale_shift must be one of 'default', 'scale_shift'"),
        (dict(class_embed_type="projection"), "class_embed_type must be one of None, 'timestep', 'identity'; got"),
        (dict(num_class_embeds=0), "num_class_embeds must be a whole number above 0, got 0"),
        (dict(downsample_type="fir"), "downsample_type must be one of 'conv', 'resnet'; got 'fir'"),
        (dict(upsample_type=None), "upsample_type must be one of 'conv', 'resnet'; got None"),
        (dict(attn_norm_num_groups=5), "attn_norm_num_groups must divide the 32 channels of the lowest level, got 5"),
        (dict(mid_block_type=None), "mid_block_type=None is not implemented"),
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
    with pytest.raises(
        ValueError, match="name must be one of digits, mnist, cifar10, celebahq256, lsun256, .*, adm512; got"
    ):
        UNet.from_preset("cifar")


@pytest.mark.parametrize(
    "change, given, named",
    [
        (dict(), torch.tensor([0, 1]), "class_labels must not be given to a network of class_embed_type=None, num_cl"),
        (dict(num_class_embeds=10), None, "class_labels must be given to .* num_class_embeds=10"),
        (dict(class_embed_type="timestep"), None, "class_labels must be given to .*'timestep'"),
        (dict(num_class_embeds=10), torch.tensor([0, 10]), "class_labels must lie in 0 … 9, got 0 … 10"),
        (dict(num_class_embeds=10), torch.tensor([-1, 1]), "class_labels must lie in 0 … 9, got -1 … 1"),
        (dict(num_class_embeds=10), torch.tensor([0.0, 1.0]), r"class_labels must be \(2,\) integers, got \(2,\) of"),
        (dict(num_class_embeds=10), torch.tensor([1]), r"class_labels must be \(2,\) integers, got \(1,\)"),
        (dict(class_embed_type="identity"), torch.zeros(2, 16), r"class_labels must be \(2, 64\) numbers, got"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, given, named):
    with pytest.raises(ValueError, match=named):
        UNet(**(SMALL | change))(torch.zeros(2, 3, 16, 16), 0, given)


def test_classes_matter():
    net, x = lively(UNet(**SMALL, num_class_embeds=10)), images(SMALL)
    with torch.no_grad():
        one, other = (net(x, 5, torch.tensor([0, label])) for label in (1, 2))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1], atol=1e-3)


def test_presets_have_their_training():
    paper = [PRESETS[name].training for name in ("cifar10", "celebahq256", "lsun256")]
    assert [t["lr"] for t in paper] == [2e-4, 2e-5, 2e-5] and [t["batch_size"] for t in paper] == [128, 64, 64]
    assert [t["steps"] for t in paper] == [800_000, 500_000, 2_400_000] and {t["ema"] for t in paper} == {0.9999}
    assert [t["flip"] for t in paper] == [True, True, False]
    assert [NETWORKS[n].get("dropout", 0) for n in ("cifar10", "celebahq256", "lsun256")] == [0.1, 0, 0]
    assert [PRESETS[n].data for n in PRESETS] == ["digits", "mnist", "cifar10", None, None, "cifar10", *[None] * 4]
    assert PRESETS["lsun256"].network == PRESETS["celebahq256"].network
    assert all(PRESETS[n].schedule == "cosine" for n in ("cifar10-improved", "adm64"))
    assert PRESETS["digits"].schedule == "scaled_linear" and PRESETS["lsun256"].size == 256
    assert sum(p.numel() for p in UNet.from_preset("digits").parameters()) == 701_345  # what the demonstration trains


def test_labels_become_a_condition_where_the_network_has_classes():
    y, with_classes = torch.tensor([1, 2]), UNet(**SMALL, num_class_embeds=10)
    assert class_condition(UNet(**SMALL), y) == class_condition(nn.Conv2d(1, 1, 1), None) == {}
    assert list(class_condition(with_classes, y).items()) == [("class_labels", y)]
    with pytest.raises(ValueError, match="labels must be given to a network with num_class_embeds=10, got None"):
        class_condition(with_classes, None)


# Memory and compilation.

WIDE = dict(SMALL, sample_size=256, block_out_channels=(8, 8, 16, 16), norm_num_groups=4, dropout=0.1) | dict(
    down_block_types=("DownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
)


def step(net, x):
    "The output and all gradients of one training step, and the bytes of activations stored for the backward pass."
    stored, own = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

    def store(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = (storage.nbytes(), tensor)  # stored, so that no address is used twice
        return tensor

    net.zero_grad()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        out = net(x, torch.tensor([7]))
    total = sum(size for size, _ in stored.values())
    stored.clear()
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}, total


def test_gradient_checkpointing_halves_the_activations_and_changes_nothing_else():
    net, x = lively(UNet(**WIDE)).train(), images(WIDE, 1)
    out, grads, size = step(net, x)
    net.gradient_checkpointing = True
    again_out, again_grads, fewer = step(net, x)
    assert fewer <= size / 2
    assert torch.equal(out, again_out)
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)
    torch.manual_seed(1)  # the comparison sees another dropout mask
    assert not torch.equal(net(x, torch.tensor([7])), out)


@pytest.mark.slow
@pytest.mark.parametrize("name, mode", [("from 16x16 up at once", "train"), ("classes, a table", "eval")])
def test_the_network_compiles_without_a_graph_break(name, mode):
    net, x = getattr(lively(UNet(**CONFIGS[name] | dict(dropout=0.1))), mode)(), images(CONFIGS[name])
    given = (x, torch.tensor([3, 977]), *labels(CONFIGS[name]))
    torch._dynamo.reset()
    with torch.set_grad_enabled(mode == "train"):
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert compiled(*given).shape == x.shape
        net.eval()  # compiled, dropout draws other numbers
        torch.testing.assert_close(compiled(*given), net(*given), atol=1e-6, rtol=1e-6)
