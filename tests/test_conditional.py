"""The conditional U-Net: agreement with diffusers' UNet2DConditionModel, tokens and masks, conditions, misuse."""

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


# Tokens and masks.


def test_a_new_network_ignores_its_tokens():
    net, given = ConditionalUNet(**SMALL, generator=rng(0)), inputs(SMALL)
    nn.init.normal_(net.conv_out.weight, generator=rng(1))
    with torch.no_grad():
        plain = net(**given)
        given["encoder_hidden_states"] *= -3
        assert torch.equal(net(**given), plain) and plain.abs().max() > 0.1


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_and_the_order_of_tokens_change_nothing(kind):
    net, given = lively(ConditionalUNet(**SMALL)).double(), inputs(SMALL)
    x, c, t = given["x_t"].double(), given["encoder_hidden_states"].double(), given["t"]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).to(kind)
    with torch.no_grad():
        masked = net(x, t, c, encoder_attention_mask=mask)
        for i, n in enumerate((3, 1)):
            alone = net(x[i : i + 1], t[i : i + 1], c[i : i + 1, :n])
            torch.testing.assert_close(masked[i : i + 1], alone, atol=1e-12, rtol=1e-10)
        order = torch.tensor([3, 1, 0, 4, 2])
        moved = net(x, t, c[:, order], encoder_attention_mask=mask[:, order])
        torch.testing.assert_close(moved, masked, atol=1e-12, rtol=1e-10)
        assert not torch.allclose(net(x, t, c), masked, atol=1e-3)


def test_masked_tokens_get_no_gradient():
    net, given = lively(ConditionalUNet(**SMALL)), inputs(SMALL)
    tokens = given["encoder_hidden_states"].requires_grad_()
    net(**given, encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]] * 2)).square().sum().backward()
    assert (tokens.grad[:, 3:] == 0).all() and (tokens.grad[:, :3].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_half_precision_and_autocast_stay_near_float32(upcast, with_mask):
    net, given = lively(ConditionalUNet(**SMALL, upcast_attention=upcast)), inputs(SMALL)
    given |= dict(encoder_attention_mask=torch.tensor([[1, 1, 0, 0, 0]] * 2)) if with_mask else {}
    with torch.no_grad():
        exact = net(**given)
        with torch.autocast("cpu", torch.bfloat16):
            auto = net(**given)
        half = net.bfloat16()(**given | dict(x_t=given["x_t"].bfloat16()))  # tokens take the images' dtype
    assert half.dtype == torch.bfloat16
    for out in (auto, half):
        assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_scores_that_overflow_half_precision_need_upcasting():
    layer = lively(CrossAttention(8, 1, 8, upcast=True), seed=1).half()
    x, c = (1000 * torch.randn(1, n, 8, generator=rng(n)).half() for n in (6, 4))
    q, k = layer.to_q(x).float(), layer.to_k(c).float()
    assert (q @ k.mT).abs().max() > torch.finfo(torch.float16).max
    expected = layer.float()(x.float(), c.float())
    torch.testing.assert_close(layer.half()(x, c).float(), expected, rtol=0.01, atol=10.0)


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(addition_embed_type="text_time"), "addition_embed_type='text_time' is not implemented, only None"),
        (dict(dual_cross_attention=True), "dual_cross_attention=True is not implemented"),
        (dict(mid_block_type=None), "mid_block_type=None is not implemented, only 'UNetMidBlock2DCrossAttn'"),
        (dict(num_attention_heads=8), "num_attention_heads=8 is not implemented"),
        (dict(tokens=8), "ConditionalUNet has no keyword tokens; it takes sample_size"),
        (dict(down_block_types=("AttnDownBlock2D", "DownBlock2D")), "down_block_types must be among CrossAttnDownBl"),
        (dict(up_block_types=("UpBlock2D",)), "up_block_types must have one entry for each of block_out_channels"),
        (dict(attention_head_dim=3), "attention_head_dim, the number of heads, must divide the 16 channels, got 3"),
        (dict(attention_head_dim=(4, 4, 4)), "attention_head_dim must be one value, or one for each of 2 levels"),
        (dict(layers_per_block=0), "layers_per_block must be at least 1, got 0"),
        (dict(transformer_layers_per_block=((1, 2), 1)), "transformer_layers_per_block must be a whole number"),
        (dict(cross_attention_dim=None), "cross_attention_dim must be a whole number, got None"),
        (
            dict(class_embed_type="simple_projection"),
            "class_embed_type must be one of None, 'timestep', 'identity', 'p",
        ),
        (dict(class_embed_type="projection"), "projection_class_embeddings_input_dim must be a whole number, got None"),
        (dict(upcast_attention=None), "upcast_attention must be one of False, True; got None"),
        (dict(norm_num_groups=5), "block_out_channels must be divisible by norm_num_groups=5, got 16"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        ConditionalUNet(**(SMALL | change))


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(encoder_hidden_states=None), r"encoder_hidden_states must be \(2, tokens, 24\) numbers, got None"),
        (dict(encoder_hidden_states="a cat"), "encoder_hidden_states must be .* numbers, got 'a cat'"),
        (dict(encoder_hidden_states=torch.ones(2, 5).long()), "encoder_hidden_states must be .*, got torch.int64"),
        (dict(encoder_hidden_states=torch.ones(2, 5, 25)), r"must be \(2, tokens, 24\), got \(2, 5, 25\)"),
        (dict(encoder_hidden_states=torch.ones(3, 5, 24)), r"must be \(2, tokens, 24\), got \(3, 5, 24\)"),
        (dict(encoder_hidden_states=torch.ones(2, 24)), r"must be \(2, tokens, 24\), got \(2, 24\)"),
        (dict(encoder_attention_mask=torch.ones(2, 4)), r"encoder_attention_mask must be \(2, 5\).*, got \(2, 4\)"),
        (dict(encoder_attention_mask=[1] * 5), r"encoder_attention_mask must be \(2, 5\).*, got list"),
        (dict(encoder_attention_mask=torch.tensor([[1] * 5, [0] * 5])), "must be 1 for a token of every image"),
        (dict(x_t=torch.zeros(2, 3, 8, 8)), r"x_t must be \(b, 4, h, w\), got \(2, 3, 8, 8\)"),
        (dict(x_t=torch.zeros(2, 4, 9, 8)), r"height and width of x_t must be divisible by 2, got \(9, 8\)"),
        (dict(class_labels=torch.tensor([0, 1])), "class_labels must not be given"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, named):
    with pytest.raises(ValueError, match=named) as caught:
        ConditionalUNet(**SMALL)(**inputs(SMALL) | change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


# Models.


def small_model(**changes) -> DDPM:
    net = lively(ConditionalUNet(**SMALL | dict(in_channels=1, out_channels=1) | changes))
    return DDPM(net, linear_schedule(20), clip=True).eval()


def test_tokens_are_a_condition_of_steps_samplers_losses_and_guidance():
    m, tokens = small_model(), inputs(SMALL)["encoder_hidden_states"]
    cond, x = dict(encoder_hidden_states=tokens), torch.randn(2, 1, 8, 8, generator=rng(4))
    null = dict(encoder_hidden_states=torch.zeros(5, 24))
    none = dict(encoder_hidden_states=torch.zeros(2, 5, 24))
    assert torch.equal(m(x, 3, **cond)[0], m.net(x, torch.tensor([3, 3]), tokens))
    with torch.no_grad():
        for sample in (ancestral_sample, ddim_sample):
            kwargs = dict(shape=x.shape, steps=5, x_T=x)
            plain = sample(m, generator=rng(0), cond=cond, **kwargs)
            assert torch.equal(sample(classifier_free(m, 1, null), generator=rng(0), cond=cond, **kwargs), plain)
            nothing = sample(m, generator=rng(0), cond=none, **kwargs)
            assert torch.equal(sample(classifier_free(m, 0, null), generator=rng(0), cond=cond, **kwargs), nothing)
            assert not torch.allclose(plain, nothing, atol=1e-3)
        for loss in (simple_loss, bound_loss):
            here, there = (loss(m, x.clamp(-1, 1), rng(1), cond=c) for c in (cond, none))
            assert (here - there).abs() > 1e-5
    pixels = m.sample(2, steps=2, cond=cond, generator=rng(2))
    assert pixels.shape == (2, 1, 8, 8) and pixels.dtype == torch.uint8


class Labelled(nn.Module):
    "A network that reads a label as a caption of two tokens."

    def __init__(self, classes: int):
        super().__init__()
        self.tokens = nn.Embedding(classes, 2 * 24)
        self.net = ConditionalUNet(**SMALL | dict(in_channels=1, out_channels=1), generator=rng(0))
        self.config = self.net.config | dict(num_class_embeds=classes)

    def forward(self, x_t, t, class_labels):
        return self.net(x_t, t, self.tokens(class_labels).unflatten(1, (2, 24)))


def test_the_trainer_trains_a_network_that_reads_tokens(tmp_path):
    pixels = torch.randint(256, (12, 1, 8, 8), generator=rng(0), dtype=torch.uint8)
    images = Images(pixels, torch.arange(12) % 3)
    torch.manual_seed(0)
    m = DDPM(Labelled(3), linear_schedule(20))
    before = {name: p.clone() for name, p in m.net.named_parameters()}
    config = TrainConfig(steps=4, batch_size=4, lr=1e-3, warmup=0, out=tmp_path / "run")
    Trainer(m, images, config).fit()
    moved = {name for name, p in m.net.named_parameters() if not torch.equal(p, before[name])}
    assert "tokens.weight" in moved and any("attn2.to_k" in name for name in moved)


def test_gradient_checkpointing_changes_no_gradient():
    net, given = lively(ConditionalUNet(**SMALL, dropout=0.1)).train(), inputs(SMALL)
    grads = []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        torch.manual_seed(0)
        net(**given).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_the_network_compiles_without_a_graph_break():
    net, given = lively(ConditionalUNet(**SMALL, dropout=0.1)).train(), inputs(SMALL)
    given |= dict(encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]] * 2))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    compiled(**given).square().sum().backward()
    assert net.conv_in.weight.grad.abs().max() > 0
    net.eval()  # compiled, dropout draws other numbers
    torch.testing.assert_close(compiled(**given), net(**given), atol=1e-6, rtol=1e-6)


def test_a_model_is_written_and_read_back_and_diffusers_opens_it(tmp_path, Theirs):
    m, given = small_model(), inputs(SMALL | dict(in_channels=1))
    m.save_pretrained(tmp_path / "m")
    back = DDPM.from_pretrained(tmp_path / "m")
    theirs = Theirs.from_pretrained(tmp_path / "m" / "unet").eval()
    with torch.no_grad():
        out = m.net(**given)
        assert torch.equal(back.net(**given), out) and back.image_shape == (1, 8, 8)
        torch.testing.assert_close(call(theirs, **given), out, atol=1e-5, rtol=1e-5)
    assert type(back.net) is ConditionalUNet and back.net.config == m.net.config
    theirs.save_pretrained(tmp_path / "theirs")
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=20)
    scheduler.save_pretrained(tmp_path / "theirs")
    again = DDPM.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again.net(**given), out)
    filled = DDPM.from_pretrained(tmp_path / "m", net=ConditionalUNet(**m.net.config))
    assert torch.equal(filled.net.conv_in.weight, m.net.conv_in.weight)
    with pytest.raises(ValueError, match="net must have attention_head_dim=4 as"):
        DDPM.from_pretrained(tmp_path / "m", net=ConditionalUNet(**m.net.config | dict(attention_head_dim=2)))
