"""`Images`, the network's range and back, grids and animations."""

import matplotlib
import numpy as np
import pytest
import torch
from pictures import numbered
from PIL import Image

from ddpm_lit.images import (
    GRID,
    Images,
    as_indices,
    describe_images,
    image_grid,
    save_animation,
    save_grid,
    show,
    to_network,
    to_pixels,
)

matplotlib.use("agg")


@pytest.mark.parametrize(
    "pixels", [torch.zeros(2, 1, 3, 3), torch.zeros(2, 2, 3, 3).byte(), torch.zeros(0, 1, 3, 3).byte()]
)
def test_images_are_eight_bit_grey_or_rgb(pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, 1 or 3, h, w\)"):
        Images(pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_all_levels_come_back_from_the_network(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_network(levels, dtype)
    assert x.dtype == dtype and x[0] == -1 and x[255] == 1 and (x.diff() > 0).all()
    assert torch.equal(to_pixels(x), levels)
    torch.testing.assert_close(x.double(), levels.double() / 127.5 - 1, atol=torch.finfo(dtype).eps, rtol=0)


def test_to_pixels_takes_the_nearest_and_clamps():
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
    result = np.asarray(Image.open(tmp_path / "deep/grid.png"))
    assert result.shape[:2] == (2 * 64 + 8, 3 * 64 + 2 * 8)
    assert np.array_equal(result[::8, ::8], image_grid(images, 3)) and np.array_equal(
        result[7::8, 7::8], result[::8, ::8]
    )


def test_show_draws_the_grid():
    ax = show(numbered(4), title="four")
    assert np.array_equal(ax.images[0].get_array(), image_grid(numbered(4))) and ax.get_title() == "four"


@pytest.mark.parametrize("indices", [[2, 0, 2], range(3), torch.tensor([4])])
def test_select_takes_pixels_and_labels_in_the_given_order(indices):
    images = Images(numbered(5).pixels, torch.arange(5) + 10, "five", ("a", "b"))
    some, wanted = images.select(indices), torch.as_tensor(indices)
    assert torch.equal(some.pixels, images.pixels[wanted]) and torch.equal(some.labels, wanted + 10)
    assert (some.name, some.classes) == ("five", ("a", "b")) and torch.equal(some.pixels, images.read(indices))
    assert numbered(5).select(indices).labels is None
    pixels, used, errors = images.try_read(wanted)
    assert torch.equal(pixels, some.pixels) and torch.equal(used, wanted) and errors == {}


def test_a_collection_is_described_in_one_line():
    assert describe_images("cats", 2, (3, 4, 5)) == "cats: 2 of 4×5, RGB"
    assert repr(Images(numbered(2).pixels, name="x", classes=("a", "b"))) == "Images(x: 2 of 2×3, grey, 2 classes)"


@pytest.mark.parametrize("suffix", [".gif", ".GIF"])
def test_an_animation_shows_the_grids_one_after_the_other(tmp_path, suffix):
    frames = torch.randint(256, (4, 5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_animation(tmp_path / f"a{suffix}", frames)
    durations = []
    with Image.open(tmp_path / f"a{suffix}") as animation:
        assert animation.format == "GIF" and animation.n_frames == 4 and animation.info["loop"] == 0
        for k in range(4):
            animation.seek(k)
            save_grid(tmp_path / "grid.png", frames[k])
            assert np.array_equal(np.asarray(animation.convert("L")), np.asarray(Image.open(tmp_path / "grid.png")))
            durations.append(animation.info["duration"])
    assert durations == [100, 100, 100, 2000]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"a{suffix}", "grid.png"])


def test_a_strip_has_a_row_for_each_image(tmp_path):
    frames = torch.randint(256, (4, 2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_animation(str(tmp_path / "a.png"), frames)
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    assert strip.shape == (2 * 64 + 1, 4 * 64 + 3, 3)
    assert np.array_equal(strip[65:, 130:194], frames[2, 1].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("frames", [torch.zeros(0, 2, 1, 8, 8), torch.zeros(2, 1, 8, 8)])
def test_an_animation_needs_frames(tmp_path, frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(k, n, c, h, w\) with k at least 1, got"):
        save_animation(tmp_path / "a.gif", frames.byte())
    assert not any(tmp_path.iterdir())


PIXELS = numbered(4).pixels
STRANGE = [
    PIXELS.numpy(),
    PIXELS.tolist(),
    Image.new("L", (4, 4)),
    "digits",
    None,
    torch.utils.data.TensorDataset(PIXELS),
]


@pytest.mark.parametrize("pixels", [*STRANGE, PIXELS.long(), PIXELS.bool(), PIXELS[0], PIXELS[:0]])
def test_images_of_another_kind_are_refused_by_name(pixels):
    for call in (Images, image_grid, show, lambda x: save_grid("never.png", x)):
        with pytest.raises(ValueError, match="^pixels must be uint8 [^\n]*, got [^\n]*$"):
            call(pixels)


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3], np.arange(4), torch.arange(4).int(), torch.arange(3), torch.zeros(4, 1)]
)
def test_labels_of_another_kind_are_refused_by_name(labels):
    with pytest.raises(ValueError, match=r"^labels must be int64 \(4,\), got [^\n]*$"):
        Images(PIXELS, labels)


@pytest.mark.parametrize("x", [*STRANGE, to_network(PIXELS), PIXELS.long(), PIXELS.bool(), PIXELS.float() / 255])
def test_to_network_takes_bytes_and_nothing_else(x):
    with pytest.raises(ValueError, match="^pixels must be uint8, 0 … 255, got [^\n]*$"):
        to_network(x)


@pytest.mark.parametrize("x", [*STRANGE, PIXELS, PIXELS.long(), PIXELS.bool(), PIXELS.to(torch.complex64)])
def test_to_pixels_takes_floats_and_nothing_else(x):
    with pytest.raises(ValueError, match=r"^x must be floating point in \[-1, 1\], got [^\n]*$"):
        to_pixels(x)


@pytest.mark.parametrize(
    "indices",
    [[2, 0], (2, 0), np.array([2, 0], np.int16), torch.tensor([2, 0], dtype=torch.uint8), [np.int64(2), 0], [-2, -4]],
)
def test_indices_of_every_kind_of_whole_number(indices):
    assert as_indices(indices, 4).tolist() == [2, 0] and Images(PIXELS).select(indices).pixels[:, 0, 0, 1].tolist() == [
        2,
        0,
    ]


def test_a_mask_selects_where_it_is_true():
    for mask in ([False, True, True, False], np.array([0, 1, 1, 0], bool), torch.tensor([0, 1, 1, 0]).bool()):
        assert torch.equal(Images(PIXELS).select(mask).pixels, PIXELS[1:3])
    assert Images(PIXELS).read([]).shape == (0, 1, 2, 3)


@pytest.mark.parametrize("indices", [[4], [-5], [0.0], ["0"], [True], [[0]], 0, None, torch.zeros(2)])
def test_other_indices_are_refused_by_name(indices):
    for call in (Images(PIXELS).select, Images(PIXELS).read):
        with pytest.raises(ValueError, match="^indices must be whole numbers from 0 to 3[^\n]*; got [^\n]*$"):
            call(indices)
    with pytest.raises(ValueError, match="at least 1 of them"):
        Images(PIXELS).select([])


@pytest.mark.parametrize("kw", [dict(columns=2.0), dict(columns=True), dict(side="64"), dict(side=0)])
def test_numbers_of_a_grid_are_whole(tmp_path, kw):
    with pytest.raises(ValueError, match=f"^{next(iter(kw))} must be "):
        save_grid(tmp_path / "a.png", PIXELS, **kw)
    save_grid(tmp_path / "a.png", PIXELS, np.int64(2), np.int32(8))


def test_a_grid_goes_where_the_tilde_points_and_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_grid("~/a.png", PIXELS), save_animation("~/a.gif", PIXELS[None])
    assert Image.open(tmp_path / "a.png").info["Software"] == GRID
    assert Image.open(tmp_path / "a.gif").info["comment"].decode() == GRID


@pytest.mark.parametrize("frames", [PIXELS.numpy()[None], to_network(PIXELS)[None], [PIXELS]])
def test_frames_of_another_kind_are_refused_by_name(tmp_path, frames):
    with pytest.raises(ValueError, match="^frames must be uint8"):
        save_animation(tmp_path / "a.gif", frames)


def test_where_the_default_device_is_another_images_stay_where_they_are():
    with torch.device("meta"):
        images = Images(PIXELS, torch.arange(4, device="cpu"))
        assert torch.equal(images.select([1]).pixels, PIXELS[1:2]) and images.read(range(2)).device.type == "cpu"
        assert image_grid(images, gap=0).shape == (4, 6)
