"""The conditional U-Net: agreement with diffusers' UNet2DConditionModel on the same weights, tokens and masks, misuse."""

import inspect

import pytest
import torch
from doubles import lively, rng
from torch import nn

from ddpm_lit.conditional import CONDITIONAL_DEFAULTS, ConditionalUNet, CrossAttention
from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import linear_schedule
from ddpm_lit.guidance import classifier_free
from ddpm_lit.images import Images
from ddpm_lit.objective import bound_loss, simple_loss
from ddpm_lit.sampler import ancestral_sample, ddim_sample
from ddpm_lit.trainer import TrainConfig, Trainer

SMALL = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=24,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
CROSS = dict(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
PUBLISHED = {  # what the config.json of each says beside the defaults of its class
    "sd1": dict(cross_attention_dim=768, sample_size=64),
    "sd2": dict(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True, sample_size=96,
        upcast_attention=True,
    ),
    "sd2 upscaler": dict(
        block_out_channels=[256, 512, 512, 1024], cross_attention_dim=1024, in_channels=7, num_class_embeds=1000,
        only_cross_attention=[True, True, True, False], use_linear_projection=True, sample_size=128,
        down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        up_block_types=["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    ),
    "sd2 unclip": dict(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True, sample_size=96,
        class_embed_type="projection", projection_class_embeddings_input_dim=2048,
    ),
}  # fmt: skip
COUNTS = {"sd1": 859_520_964, "sd2": 865_910_724}
NARROW = dict(sample_size=16, block_out_channels=(8, 16, 16, 16), norm_num_groups=4, cross_attention_dim=12)
CONFIGS = {
    "small": SMALL,
    "linear projections, heads by level": dict(SMALL, use_linear_projection=True, attention_head_dim=(2, 8)),
    "one head, attention everywhere": dict(SMALL, **CROSS, attention_head_dim=1),
    "two transformer blocks": dict(SMALL, **CROSS, transformer_layers_per_block=2),
    "levels that differ": dict(SMALL, **CROSS, layers_per_block=(2, 1), transformer_layers_per_block=(1, 2)),
    "tokens alone": dict(SMALL, **CROSS, only_cross_attention=(True, False)),
    "scale-shift, padding 0": dict(SMALL, resnet_time_scale_shift="scale_shift", downsample_padding=0),
    "sines first, shift 1": dict(SMALL, flip_sin_to_cos=False, freq_shift=1, time_embedding_dim=40),
    "classes, a table": dict(SMALL, num_class_embeds=10),
    "classes, as steps": dict(SMALL, class_embed_type="timestep"),
    "classes, as vectors": dict(SMALL, class_embed_type="identity"),
    "classes, projected": dict(SMALL, class_embed_type="projection", projection_class_embeddings_input_dim=6),
    "not square, learned variance": dict(SMALL, sample_size=(8, 6), out_channels=8),
    "sd1, narrow": dict(PUBLISHED["sd1"], **NARROW),
    "sd2, narrow": dict(PUBLISHED["sd2"], **NARROW) | dict(attention_head_dim=[2, 4, 8, 8]),
    "sd2 upscaler, narrow": dict(PUBLISHED["sd2 upscaler"], **NARROW),
}


def inputs(config: dict, n: int = 2, tokens: int = 5) -> dict:
    "Return the arguments of a call, by our names."
    size, width = config["sample_size"], 4 * config["block_out_channels"][0]
    height, wide = (size, size) if isinstance(size, int) else size
    given = dict(
        x_t=torch.randn(n, config.get("in_channels", 4), height, wide, generator=rng(1)),
        t=torch.tensor([3, 977])[:n],
        encoder_hidden_states=torch.randn(n, tokens, config["cross_attention_dim"], generator=rng(2)),
    )
    kind = config.get("class_embed_type")
    widths = {"identity": width, "projection": config.get("projection_class_embeddings_input_dim")}
    if kind in widths:
        given["class_labels"] = torch.randn(n, widths[kind], generator=rng(3))
    elif kind is not None or config.get("num_class_embeds"):
        given["class_labels"] = torch.tensor([0, 7])[:n]
    return given


def call(theirs: nn.Module, x_t, t, encoder_hidden_states, **rest):
    return theirs(x_t, t, encoder_hidden_states, **rest).sample


@pytest.fixture(scope="module")
def Theirs():
    return pytest.importorskip("diffusers").UNet2DConditionModel


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_diffusers_give_the_same_output_and_gradients_here(name, Theirs):
    config = CONFIGS[name]
    theirs, mine = lively(Theirs(**config)), ConditionalUNet(**config).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    given = inputs(config)
    a, b = call(theirs, **given), mine(**given)
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    for out in (a, b):
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = dict(theirs.named_parameters())
    for parameter, p in mine.named_parameters():
        scale = grads[parameter].grad.abs().max()
        torch.testing.assert_close(p.grad / scale, grads[parameter].grad / scale, atol=1e-4, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_from_here_give_the_same_output_in_diffusers(name, Theirs):
    config = CONFIGS[name]
    mine = lively(ConditionalUNet(**config), seed=5)
    theirs = Theirs(**mine.config).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    given = inputs(config) | ({} if config.get("only_cross_attention") else dict(encoder_attention_mask=mask))
    with torch.no_grad():
        torch.testing.assert_close(mine(**given), call(theirs, **given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_the_keys_and_shapes_of_diffusers(name, Theirs):
    with torch.device("meta"):
        mine, theirs = ConditionalUNet(**PUBLISHED[name]), Theirs(**PUBLISHED[name])
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (mine, theirs)]
    assert shapes[0] == shapes[1]
    if name in COUNTS:
        assert sum(p.numel() for p in mine.parameters()) == COUNTS[name]


def test_the_keywords_and_their_defaults_are_those_of_diffusers(Theirs):
    theirs = {k: p.default for k, p in inspect.signature(Theirs.__init__).parameters.items() if k != "self"}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in CONDITIONAL_DEFAULTS.items()} == theirs
