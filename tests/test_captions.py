"""Captions: from folders and tables, with their pictures wherever these go."""

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from pictures import FASHION, cut, encoded, put, quiet_hub

from ddpm_lit.captions import caption_column, column_captions, read_captions
from ddpm_lit.images import Images, load_array
from ddpm_lit.loading import ImageBatches, StoredImages, data_digest, load_images

NAMES = ("a/x.png", "a/y.png", "b/z.png")
TEXTS = ("an x, and more", "wäre y", "z")


@pytest.fixture
def hf(tmp_path, monkeypatch):
    return quiet_hub(tmp_path, monkeypatch)


def make_folder(tmp_path, kind, names=NAMES, texts=TEXTS):
    "Write a folder of pictures of levels 1, 2, … with captions of one kind; return the folder."
    root = tmp_path / "pets"
    for i, (name, text) in enumerate(zip(names, texts, strict=True), start=1):
        put(root / name, np.random.default_rng(i).integers(256, size=(6, 5), dtype=np.uint8))
        if kind == "txt":
            (root / name).with_suffix(".txt").write_text(f" {text}\n", encoding="utf-8")
    rows = [{"file_name": name, "text": text} for name, text in zip(names, texts, strict=True)][::-1]
    match kind:
        case "jsonl":
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            (root / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        case "csv":  # with the mark that a spreadsheet writes first
            lines = [f'{row["file_name"]},"{row["text"]}",7' for row in rows]
            (root / "metadata.csv").write_text("\n".join(["file_name,caption,id", *lines]), encoding="utf-8-sig")
        case "nested":  # a table in each folder, of paths from there
            for folder in "ab":
                lines = (
                    json.dumps(row | {"file_name": row["file_name"][2:]})
                    for row in rows
                    if row["file_name"][0] == folder
                )
                (root / folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


KINDS = ("jsonl", "csv", "nested", "txt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [None, 0])
def test_a_folder_of_each_kind_gives_every_picture_its_caption(tmp_path, kind, memory):
    root = make_folder(tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that captions were read from is not left out
        images = load_images(root, memory=memory)
    assert isinstance(images, StoredImages if memory == 0 else Images)
    assert images.captions == TEXTS and images.labels.tolist() == [0, 0, 1]
    assert repr(images).endswith("pets: 3 of 6×5, grey, 2 classes, with captions)")
    some = images.select(torch.tensor([2, 0]))
    assert some.captions == ("z", "an x, and more") and images.select(images.labels == 0).captions == TEXTS[:2]
    assert load_images(root, n=2, size=4, memory=memory).captions == TEXTS[:2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [None, 0])
def test_a_broken_picture_takes_its_own_caption_away(tmp_path, kind, memory):
    root = make_folder(tmp_path, kind)
    (root / "a/y.png").write_text("a text")
    with pytest.warns(UserWarning, match="a/y.png"):
        images = load_images(root, memory=memory)
    assert images.captions == ("an x, and more", "z") and images.labels.tolist() == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_replaced_comes_with_the_caption_of_the_other(tmp_path, workers):
    root = make_folder(tmp_path, "jsonl")
    cut(root / "a/y.png")
    stored = load_images(root, memory=0)
    batches = ImageBatches(stored, 3, seed=4, workers=workers, labels=True, captions=True)
    with pytest.warns(UserWarning, match="a/y.png"):
        x, y, texts = next(iter(batches))
    wanted = [1 + (i == 1) * 1 if i == 1 else i for i in batches.indices(0).tolist()]
    assert (
        texts == [TEXTS[i] for i in wanted] and y.tolist() == [int(i == 2) for i in wanted] and x.shape == (3, 1, 6, 5)
    )


@pytest.mark.parametrize("options", [dict(), dict(resident=False, workers=0), dict(resident=False, workers=1)])
def test_batches_hold_captions_in_the_order_of_their_pictures(options):
    images = Images(
        torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 1, 2, 2), captions=tuple("abcdefg")
    )
    batches = ImageBatches(images, 4, seed=2, flip=True, captions=True, **options)
    for k, (x, texts) in enumerate(itertools.islice(batches, 4)):
        assert texts == ["abcdefg"[i] for i in batches.indices(k) % 7] == batches.batch(k)[1]
        assert ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == ["abcdefg".index(text) for text in texts]
    without = ImageBatches(Images(images.pixels), 4, seed=2, flip=True, labels=True, captions=True, **options)
    x, y, texts = next(iter(without))
    assert y is None and texts is None and torch.equal(x, batches.batch(0)[0])
    assert torch.equal(next(iter(ImageBatches(images, 4, seed=2, flip=True, **options))), x)


def test_captions_of_one_split_are_those_of_this_split(tmp_path):
    root = make_folder(tmp_path, "jsonl", ("train/x.png", "train/y.png", "test/x.png"))
    assert load_images(root).captions == TEXTS[:2] and load_images(root, split="test").captions == ("z",)
    lines = (root / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    (root / "metadata.jsonl").write_text(lines[0])  # of test alone
    assert load_images(root).captions is None and load_images(root, split="test").captions == ("z",)


def test_pictures_without_a_caption_have_an_empty_one_and_are_counted(tmp_path):
    root = make_folder(tmp_path, "txt")
    (root / "a/y.txt").unlink()
    (root / "b/notes.txt").write_text("buy milk")
    with pytest.warns(UserWarning, match=r"^pets: left out: 1 .txt file \(b/notes.txt\); 1 of 3 captions are empty$"):
        assert load_images(root).captions == ("an x, and more", "", "z")


def test_tables_come_before_texts_beside_pictures(tmp_path):
    root = make_folder(tmp_path, "txt")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "b/z.png", "text": "a zebra"}))
    with pytest.warns(UserWarning, match="3 .txt files .*; 2 of 3 captions are empty"):
        assert load_images(root).captions == ("", "", "a zebra")


@pytest.mark.parametrize("content", ['{"file_name": "a/x.png", "label": 3}', '{"text": "of nothing"}', ""])
def test_a_table_without_captions_is_left_out_as_ever(tmp_path, content):
    root = make_folder(tmp_path, None)
    (root / "metadata.jsonl").write_text(content)
    with pytest.warns(UserWarning, match="left out: 1 .jsonl file"):
        assert load_images(root).captions is None


ROW = '{"file_name": "a/x.png", "text": "x"}'
LOST = '{"file_name": "a/w.png", "text": "w"}'
FAULTS = {
    "metadata.jsonl, row 2: file_name must be a file of the folder, but 'a/w.png' is not there": ROW + "\n" + LOST,
    "row 2: a/x.png has a caption already": f"{ROW}\n\n{ROW}",
    "row 1: text must be a text, got a int": '{"file_name": "a/x.png", "text": 7}',
    "row 1: text must be a text, got a list": '{"file_name": "a/x.png", "text": ["x", "y"]}',
    "row 1: file_name must be a text, got a int": '{"file_name": 7, "text": "x"}',
    "metadata.jsonl cannot be read after row 1: Expecting": ROW + '\n{"file_name":',
    "row 1 must be a JSON object, got a list": '["a/x.png", "x"]',
    "cannot be read after row 0: 'utf-8' codec": b"\xff\xfe{",
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_what_is_no_caption_is_refused_in_one_line(tmp_path, message):
    root, content = make_folder(tmp_path, None), FAULTS[message]
    (root / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        load_images(root)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_tables_or_an_unreadable_text_are_refused(tmp_path):
    root = make_folder(tmp_path, "jsonl")
    (root / "metadata.csv").write_text("file_name,text\na/x.png,again\n")
    with pytest.raises(ValueError, match="^[^\n]*metadata.jsonl: a/x.png has a caption in another table$"):
        load_images(root)
    root = make_folder(tmp_path / "texts", "txt")
    (root / "a/x.txt").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(ValueError, match="^[^\n]*x.txt cannot be read as a caption: [^\n]*$"):
        load_images(root)


# ---------------------------------------------------------------------------------------------- tables and arrays


def captioned(hf, texts, column="text", kind="string"):
    "Return a table in the Hub's schema of as many pictures, with a column of texts."
    features = hf.Features({"image": hf.Image(), column: hf.Value(kind), "label": hf.Value("int32")})
    rows = {"image": encoded(FASHION[: len(texts)]), column: texts, "label": list(range(len(texts)))}
    return hf.Dataset.from_dict(rows, features)


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize("stream, memory", [(False, None), (False, 0), (True, None)])
def test_a_column_of_texts_in_a_parquet_file(hf, tmp_path, column, stream, memory):
    captioned(hf, ["a boot", "ein Hut", "a shoe"], column).to_parquet(tmp_path / "fashion.parquet")
    images = load_images(tmp_path / "fashion.parquet", stream=stream, memory=memory)
    assert images.captions == ("a boot", "ein Hut", "a shoe") and images.labels.tolist() == [0, 1, 2]
    assert images.select([2, 1]).captions == ("a shoe", "ein Hut")
    assert np.array_equal(images.read([2])[0, 0], FASHION[2])
    assert load_images(tmp_path / "fashion.parquet", stream=stream, memory=memory, n=2).captions == (
        "a boot",
        "ein Hut",
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_row_takes_its_own_caption_away(hf, tmp_path, stream):
    table = captioned(hf, ["a boot", "a hat", "a shoe"]).cast_column("image", hf.Image(decode=False))
    broken = table.map(lambda row, i: {"image": {"bytes": b"no picture"}} if i == 1 else {}, with_indices=True)
    broken.cast_column("image", hf.Image()).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="row 1"):
        assert load_images(tmp_path / "a.parquet", stream=stream).captions == ("a boot", "a shoe")


@pytest.mark.parametrize("stream, memory", [(False, None), (False, 0), (True, None)])
def test_a_column_of_captions_that_are_none_is_said(hf, tmp_path, stream, memory):
    captioned(hf, [3, 1], kind="int32").to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="a: the column text holds no texts: the images have no captions"):
        assert load_images(tmp_path / "a.parquet", stream=stream, memory=memory).captions is None
    captioned(hf, ["x", None, "z"]).to_parquet(tmp_path / "b.parquet")
    with pytest.warns(UserWarning, match="b: 1 of 3 captions are empty"):
        assert load_images(tmp_path / "b.parquet", stream=stream, memory=memory).captions == ("x", "", "z")


def test_columns_are_chosen_by_name_and_type(hf):
    text, number = hf.Value("string"), hf.Value("int64")
    assert caption_column({"caption": text, "text": text}) == "text"
    assert caption_column({"caption": text, "text": number}) == "caption"
    assert caption_column({"caption": number, "words": text}) == "caption" and caption_column({"words": text}) is None
    assert column_captions([]) is None and column_captions(["", None]) is None and column_captions(["a", b"b"]) is None


def test_arrays_may_have_captions(tmp_path):
    np.savez(tmp_path / "a.npz", images=FASHION, captions=np.array([f"picture {i}" for i in range(7)]))
    assert load_images(tmp_path / "a.npz", n=3).captions == ("picture 0", "picture 1", "picture 2")
    for captions, message in (
        (np.array(["one"]), "captions must be a tuple of 7 texts"),
        (np.arange(7), r"\(n,\) of texts"),
    ):
        np.savez(tmp_path / "b.npz", images=FASHION, captions=captions)
        with pytest.raises(ValueError, match=f"b.npz: [^\n]*{message}"):
            load_array(tmp_path / "b.npz")


@pytest.mark.parametrize("captions", [["a", "b"], ("a",), ("a", 3), ("a", None), "ab", np.array(["a", "b"]), {}])
def test_images_take_one_text_each(captions):
    with pytest.raises(ValueError, match="^captions must be [^\n]*$"):
        Images(torch.zeros(2, 1, 2, 2).byte(), captions=captions)


def test_captions_change_neither_the_digest_nor_what_was_there():
    pixels, labels = torch.zeros(2, 1, 2, 2).byte(), torch.arange(2)
    plain, with_words = Images(pixels, labels, "a", ("x", "y")), Images(pixels, labels, "a", ("x", "y"), ("one", "two"))
    assert data_digest(plain) == data_digest(with_words) and plain.captions is None
    assert repr(with_words) == repr(plain)[:-1] + ", with captions)" and plain.select([1]).captions is None


def test_a_large_folder_is_searched_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_lit.captions.read_text", lambda path: path.name)
    names = [f"{i:05}.{suffix}" for i in range(5_000) for suffix in ("png", "txt")]
    captions, used = read_captions(tmp_path, names)
    assert len(captions) == len(used) == 5_000 and captions["00007.png"] == "00007.txt"
