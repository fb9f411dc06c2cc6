"""Captions as conditions: what the chapter need not show of its tokenizer, its network and its ruler."""

import pytest
import torch
from doubles import TINY, rng, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_lit.ddpm import DDPM, caption_rows, find_tokenize, tokenize_texts
from ddpm_lit.forward import linear_schedule
from ddpm_lit.guidance import classifier_free
from ddpm_lit.images import Images
from ddpm_lit.objective import bound_loss, simple_loss
from ddpm_lit.sampler import ancestral_sample, ddim_invert, ddim_sample
from ddpm_lit.solvers import dpm_sample, flow_log_prob, heun_sample
from ddpm_lit.text import Ruler, TextUNet, Tokenizer, describe_cells, moments, parse_captions, split_words
from ddpm_lit.trainer import TrainConfig, Trainer

WORDS = ["a", "bold", "seven", "thin"]
TEXTS = ["a bold seven", ""]


def text_model(predicts="eps", variance="beta_tilde", seed=0, **changes) -> DDPM:
    "Return a DDPM with a tiny network that reads captions, all of whose layers matter."
    changes = (dict(out_channels=2) if variance == "learned" else {}) | changes
    net, draw = TextUNet(WORDS, length=5, width=8, heads=2, generator=rng(seed), **TINY | changes), rng(seed)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return DDPM(net, linear_schedule(20), predicts, variance).eval()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_no_text_is_lost(text):
    tokenizer = Tokenizer(WORDS, 10_000, spell=True)
    normal = " ".join(split_words(text))
    assert tokenizer.decode(tokenizer.encode(text)) == normal
    assert tokenizer.decode(tokenizer([text])[0].tolist()) == normal
    assert max(tokenizer.encode(text)) < len(tokenizer)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=4), st.permutations(range(8)))
def test_padding_may_stand_anywhere(words, places):
    encoder, tokens = text_model().net.encoder, Tokenizer(WORDS, 5)([" ".join(words)])
    there = tokens[0][tokens[0] > 0]
    spread = torch.zeros(1, 8, dtype=torch.int64)
    spread[0, sorted(places[: len(there)])] = there
    torch.testing.assert_close(encoder(spread)[0][spread > 0], encoder(tokens)[0][tokens > 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tokenizer(["A"], 5), "words must be different words in lower case, got ['A']"),
        (lambda: Tokenizer(["a", 7], 5), "words must be different words"),
        (lambda: Tokenizer(WORDS, 0), "length must be"),
        (lambda: Tokenizer(WORDS, 5)(["a sevn"]), "unknown word 'sevn'; known ones are seven"),
        (lambda: text_model().sample(1, cond=dict(caption=["a a a a a"])), "at most 4 tokens, got 5"),
        (lambda: text_model().sample(2, cond=dict(caption=["a"])), "one row per image, 2, got 1"),
        (lambda: text_model().sample(1, cond=dict(caption="a")), "a list with a text for each image"),
        (lambda: text_model().sample(1, cond=dict(caption=["a", 7])), "a list of texts, got one of type int"),
        (lambda: text_model().net(torch.zeros(2, 1, 8, 8), 3, ["a"]), "caption must be 2 texts, or rows of tokens"),
        (lambda: tiny_model().sample(1, cond=dict(caption=["a"])), "numbers for a network that reads no text"),
        (lambda: Ruler(Images(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))), "images must have labels"),
        (lambda: parse_captions(["a six"]), "captions must be such as"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize("variance", ["beta_tilde", "learned"])
def test_texts_and_tokens_are_the_same_condition_everywhere(variance):
    m, x = text_model(variance=variance), torch.rand(2, 1, 8, 8, generator=rng(1)) * 2 - 1
    texts, tokens = dict(caption=TEXTS), dict(caption=m.net.tokenize(TEXTS))
    uses = [
        lambda cond: simple_loss(m, x, rng(2), cond=cond),
        lambda cond: bound_loss(m, x, rng(2), cond=cond),
        lambda cond: m.p_step(x, 3, **cond).mean,
        lambda cond: ancestral_sample(m, x.shape, x, rng(2), cond=cond, steps=4),
        lambda cond: ddim_sample(m, x.shape, 4, x_T=x, cond=cond, batch_size=1),
        lambda cond: dpm_sample(m, x.shape, 4, x_T=x, cond=cond),
        lambda cond: heun_sample(m, x.shape, 4, x_T=x, cond=cond),
        lambda cond: ddim_invert(m, x, 4, cond=cond),
        lambda cond: m.sample(2, 3, cond=cond, generator=rng(2)).float(),
        lambda cond: ddim_sample(classifier_free(m, 2.0, dict(caption="")), x.shape, 4, x_T=x, cond=cond),
    ]
    for use in uses:
        by_texts = use(texts)
        assert torch.equal(by_texts, use(tokens))
        assert not torch.equal(by_texts, use(dict(caption=["", "a thin seven"])))
        swapped = dict(caption=tuple(TEXTS))
        assert torch.equal(by_texts, use(swapped))


def test_likelihoods_by_the_ode_read_texts():
    m, x = text_model(), torch.rand(1, 1, 8, 8, generator=rng(1)) * 2 - 1
    by_texts = flow_log_prob(m, x, 2, cond=dict(caption=["a thin seven"]))
    assert torch.equal(by_texts, flow_log_prob(m, x, 2, cond=dict(caption=m.net.tokenize(["a thin seven"]))))


def test_a_wrapped_network_is_found_by_its_tokenize():
    m = text_model()
    guided = classifier_free(classifier_free(m, 2.0, dict(caption="")), 1.5, dict(caption="a"))
    assert find_tokenize(guided.net) is m.net.tokenize and find_tokenize(None) is None
    assert find_tokenize(lambda x, t: x) is None
    assert tokenize_texts(guided.net, dict(caption=["a"]))["caption"].tolist() == [[1, 2, 0, 0, 0]]
    same = dict(y=torch.ones(2))
    assert tokenize_texts(None, same) is same


def test_training_reads_captions_and_drops_them(tmp_path):
    pixels = torch.randint(256, (12, 1, 8, 8), generator=rng(0)).byte()
    images = Images(pixels, captions=("a thin seven", "a bold seven") * 6)
    seen = []

    class Recording(TextUNet):
        def forward(self, x_t, t, caption=None):
            if self.training:
                seen.append(caption)
            return super().forward(x_t, t, caption)

    net = Recording(WORDS, length=5, width=8, heads=2, generator=rng(0), **TINY)
    config = TrainConfig(
        steps=20, batch_size=6, drop_labels=0.3, warmup=0, out=str(tmp_path), track="none", progress=False
    )
    trainer = Trainer(DDPM(net, linear_schedule(20)), images, config)
    trainer.fit()
    rows, null = caption_rows(net, images)
    tokens = torch.cat(seen)
    dropped = (tokens == null).all(1)
    assert 0.15 < dropped.double().mean() < 0.45
    assert {tuple(row) for row in tokens[~dropped].tolist()} == {tuple(row) for row in rows.tolist()}
    assert net.to_emb.weight.abs().sum() > 0, "the text is trained, too"
    with pytest.raises(ValueError, match="images must have captions for a network that reads text"):
        Trainer(DDPM(net, linear_schedule(20)), Images(pixels), TrainConfig(track="none"))


def test_a_saved_model_builds_its_network_again_and_resumes(tmp_path):
    images = Images(torch.randint(256, (6, 1, 8, 8), generator=rng(0)).byte(), captions=("a seven", "a thin seven") * 3)

    def run(steps, out, **changes):
        net = TextUNet.from_captions(images.captions, generator=rng(0), width=8, heads=2, **TINY)
        config = TrainConfig(
            steps=steps, batch_size=3, out=str(out), track="none", progress=False, save_every=2, **changes
        )
        trainer = Trainer(DDPM(net, linear_schedule(20)), images, config)
        trainer.fit()
        return trainer

    complete, _ = run(4, tmp_path / "a"), run(2, tmp_path / "b")
    resumed = run(4, tmp_path / "b", resume=True)
    for one, two in zip(complete.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(one, two)
    m = DDPM.from_pretrained(tmp_path / "a" / "model")
    assert type(m.net) is TextUNet and m.net.tokenize.words == ["a", "seven", "thin"] and m.image_shape == (1, 8, 8)
    x, cond = torch.zeros(2, 1, 8, 8), dict(caption=["a thin seven", ""])
    assert torch.equal(m(x, 5, **cond)[0], complete.ema(x, 5, **cond)[0])


def test_moments_of_a_shifted_picture_are_the_same():
    pixels = torch.zeros(2, 1, 10, 10, dtype=torch.uint8)
    pixels[0, 0, 1:5, 1:4] = torch.randint(256, (4, 3), generator=rng(0)).byte()
    pixels[1, 0, 4:8, 6:9] = pixels[0, 0, 1:5, 1:4]
    ink, slant = moments(pixels)
    torch.testing.assert_close(ink[0], ink[1])
    torch.testing.assert_close(slant[0], slant[1])
    mirrored = moments(pixels.flip(3))[1]
    torch.testing.assert_close(mirrored, -slant)


def test_every_combination_of_words_occurs(digits):
    ruler = Ruler(digits)
    captions = ruler.captions(digits)
    rows = parse_captions(captions)
    assert describe_cells(rows) == captions
    assert len(set(captions)) == 90
    assert ruler.agreement(digits.pixels[:100], captions[:100]).all()
