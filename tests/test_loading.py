"""`load_images`, images in memory and on disk, and the stream of batches."""

import hashlib
import itertools
import os
import pickle
import re
import signal
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    FASHION,
    cut,
    encoded,
    file_of,
    image_table,
    level,
    make_torn,
    make_zoo,
    numbered,
    numbers,
    put,
    quiet_hub,
)
from PIL import Image

from ddpm_lit import loading
from ddpm_lit.decoding import SUFFIXES, crop_and_resize, decode_image
from ddpm_lit.images import Images, choose_residence, to_pixels
from ddpm_lit.loading import ImageBatches, StoredImages, data_digest, load_images
from ddpm_lit.sources import image_folder

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds that torch waits for a worker which is gone


@pytest.fixture
def zoo(tmp_path):
    return make_zoo(tmp_path)


@pytest.fixture
def torn(tmp_path):
    return make_torn(tmp_path)


@pytest.fixture
def hf(tmp_path, monkeypatch):
    return quiet_hub(tmp_path, monkeypatch)


def first_batches(batches, k):
    "Return the first k batches."
    return list(itertools.islice(batches, k))


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


def test_every_iteration_starts_the_stream_anew():
    images = numbered()
    again = ImageBatches(images, 4, seed=3, flip=True)
    complete = list(itertools.islice(again, 20))
    assert torch.equal(next(iter(again)), complete[0]) and torch.equal(next(iter(again)), complete[0])
    assert torch.equal(again.batch(17), complete[17])


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


@pytest.mark.parametrize("memory", [None, 0])
def test_images_of_several_sizes_need_a_size(tmp_path, memory):
    for i, width in enumerate((8, 8, 9)):
        put(tmp_path / f"{i}.png", level(i, 6, width))
    with pytest.raises(ValueError, match=r"2.png is 6×9, the images before it are 6×8; .* --size crops and resizes"):
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


def test_named_sets_and_arrays_are_resized_and_limited_too(tmp_path):
    images = load_images("digits", size=4, n=7)
    assert images.pixels.shape == (7, 1, 4, 4) and len(images.labels) == 7
    digit = Image.fromarray(load_images("digits").pixels[6, 0].numpy())
    assert np.array_equal(images.pixels[6, 0], np.asarray(digit.resize((4, 4), Image.Resampling.LANCZOS)))
    np.save(tmp_path / "a.npy", np.stack([FASHION] * 3, -1))
    assert load_images(tmp_path / "a.npy", size=(3, 2)).shape == (3, 3, 2)
    assert torch.equal(load_images("digits", size=8).pixels, load_images("digits").pixels)


def test_broken_files_are_left_out_and_named_in_one_warning(torn):
    with pytest.warns(UserWarning) as caught:
        images = load_images(torn)
    (message,) = (str(w.message) for w in caught)
    assert message.startswith("torn: 3 images cannot be used: bs/05.png (cannot identify image file)")
    assert "as/04.png (" in message and "bs/03.png (" in message and message.endswith("; left out")
    assert caught[0].filename == __file__
    assert len(images) == 17 and images.labels.tolist() == [0] * 9 + [1] * 8
    source = image_folder(torn)
    sound = [i for i in range(20) if source.name_of(i) not in ("as/04.png", "bs/03.png", "bs/05.png")]
    for i, pixels in zip(sound, images.pixels, strict=True):
        assert np.array_equal(decode_image(source.open(i)), pixels[0])
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


def test_a_source_without_one_readable_image_is_refused(tmp_path):
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
    assert isinstance(stored, StoredImages) and len(stored) == 19
    at = stored.source.paths.index
    with pytest.warns(UserWarning) as caught:
        result = stored.read([at("as/04.png"), at("as/06.png"), at("bs/03.png"), at("bs/07.png")])
    assert [str(w.message).split(":")[1] for w in caught] == [" as/04.png", " bs/03.png"]
    assert "(3 of at most 10)" in str(caught[1].message)
    assert torch.equal(result[0], result[1]) and torch.equal(result[2], result[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is known is not message again
        assert torch.equal(stored.read([at("as/04.png")])[0], result[0])
    with pytest.warns(UserWarning):
        stored = load_images(torn, memory=0, max_broken=2)
        with pytest.raises(ValueError, match="3 images cannot be used: bs/05.png .* more than max_broken=2"):
            stored.read(range(19))


def test_the_last_image_is_replaced_by_the_first_sound_one(tmp_path):
    for i in range(3):
        put(tmp_path / f"{i}.png", np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8))
    cut(tmp_path / "2.png")
    with pytest.warns(UserWarning, match="2.png"):
        result = load_images(tmp_path, memory=0).read([2, 0])
    assert torch.equal(result[0], result[1])


def test_decompression_bombs_are_broken_images(torn, monkeypatch):
    put(torn / "as/99.png", level(1, 100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match="4 images cannot be used: as/99.png .Image size .10000 pixels. exceeds limit"):
        assert len(load_images(torn, size=8)) == 17


@pytest.mark.parametrize("stream, memory", [(False, None), (False, 0), (True, None)])
@pytest.mark.parametrize("column, label", [("image", "label"), ("img", "fine_label"), ("photo", "kind")])
def test_a_parquet_file_in_the_hubs_schema(hf, tmp_path, column, label, stream, memory):
    image_table(hf, column=column, label=label).to_parquet(tmp_path / "fashion.parquet")
    images = load_images(tmp_path / "fashion.parquet", stream=stream, memory=memory)
    assert isinstance(images, StoredImages if memory == 0 else Images)
    assert np.array_equal(images.read(range(7))[:, 0], FASHION)
    assert (images.labels.tolist(), images.classes) == ([0, 1, 2, 0, 1, 2, 0], ("boot", "hat", "shoe"))
    assert images.name == "fashion" and len(images) == 7 and images.shape == (1, 6, 5)
    small = load_images(tmp_path / "fashion.parquet", size=3, n=4, stream=stream, memory=memory)
    assert len(small) == 4 and small.shape == (1, 3, 3) and small.labels.tolist() == [0, 1, 2, 0]
    assert np.array_equal(small.read([3])[0, 0], crop_and_resize(FASHION[3], (3, 3)))


def test_rows_whose_headers_were_not_sampled(hf, tmp_path):
    arrays = [level(i % 256, 3, 3) for i in range(1200)]
    arrays[601] = np.stack([level(10, 3, 3), level(20, 3, 3), level(30, 3, 3)], -1)
    image_table(hf, arrays).to_parquet(tmp_path / "a.parquet")
    images = load_images(tmp_path / "a.parquet")
    assert images.shape == (3, 3, 3) and images.pixels[601, :, 0, 0].tolist() == [10, 20, 30]
    assert images.pixels[600].unique().tolist() == [600 % 256] and images.pixels[602].unique().tolist() == [602 % 256]
    stored = load_images(tmp_path / "a.parquet", memory=0)
    with pytest.warns(UserWarning, match=r"row 601: is in colour, the others are .*; replaced by .* \(1 of at most 12"):
        assert stored.read([601]).unique().tolist() == [602 % 256]
    arrays[601] = level(1, 4, 3)
    image_table(hf, arrays).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b: row 601 is 4×3, the images before it are 3×3; size"):
        load_images(tmp_path / "b.parquet")
    stored = load_images(tmp_path / "b.parquet", memory=0)
    with pytest.warns(UserWarning, match="row 601: is 4×3, the others are 3×3; --size"):
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
    image_table(hf, FASHION[:0]).to_parquet(tmp_path / "a.parquet")
    for stream in (False, True):
        with pytest.raises(ValueError, match="a.parquet' cannot be read|a holds no image that can be read"):
            load_images(tmp_path / "a.parquet", stream=stream)


def test_streaming_reads_no_more_rows_than_it_must(hf, monkeypatch):
    requested = []

    def rows():
        for i, row in enumerate(encoded(FASHION)):
            requested.append(i)
            yield {"image": row if i != 1 else {"bytes": b"broken", "path": None}, "label": i}

    stream = hf.IterableDataset.from_generator(rows, features=hf.Features(image=hf.Image(), label=hf.Value("int64")))
    monkeypatch.setattr(hf, "load_dataset", lambda *args, **kw: stream)
    load_images("owner/name", stream=True, n=1, max_broken=0)
    assert requested == [0]
    requested.clear()
    with pytest.warns(UserWarning, match="owner/name: 1 image cannot be used: row 1"):
        images = load_images("owner/name", stream=True, n=4)
    assert np.array_equal(images.pixels[:, 0], FASHION[[0, 2, 3, 4]]) and images.labels.tolist() == [0, 2, 3, 4]
    assert requested == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="owner/name: more than 2 images do not fit in memory; give n or size"):
        load_images("owner/name", stream=True, memory=2 * 30)


def test_a_stream_that_breaks_off_says_so(hf, monkeypatch):
    def rows():
        yield {"image": encoded(FASHION)[0]}
        raise ConnectionError("the line is dead")

    for features, message in (
        (hf.Features(image=hf.Image()), "reading its rows failed"),
        (None, "its columns cannot be read"),
    ):
        stream = hf.IterableDataset.from_generator(rows, features=features)
        monkeypatch.setattr(hf, "load_dataset", lambda *args, stream=stream, **kw: stream)
        with pytest.raises(ValueError, match=f"owner/name: {message}.*: the line is dead"):
            load_images("owner/name", stream=True)


def test_what_does_not_fit_into_memory_stays_on_disk_and_is_the_same(zoo, monkeypatch):
    in_memory, stored = load_images(zoo, memory=9 * 30), load_images(zoo, memory=9 * 30 - 1)
    assert isinstance(in_memory, Images) and isinstance(stored, StoredImages)
    assert torch.equal(stored.read(range(9)), in_memory.pixels) and torch.equal(stored.labels, in_memory.labels)
    assert torch.equal(stored.read(torch.tensor([8, 0, 8])), in_memory.read(torch.tensor([8, 0, 8])))
    for name in ("shape", "classes", "name"):
        assert getattr(stored, name) == getattr(in_memory, name)
    assert repr(stored) == "StoredImages(zoo: 9 of 6×5, grey, 2 classes)" and len(stored) == 9
    monkeypatch.setattr(loading, "free_memory", lambda: 2 * 9 * 30)
    assert isinstance(load_images(zoo), Images)
    monkeypatch.setattr(loading, "free_memory", lambda: 2 * 9 * 30 - 1)
    assert isinstance(load_images(zoo), StoredImages)


@pytest.mark.parametrize("processes, size", [(1, 5), (2, 3), (3, 5), (2, 17)])
def test_together_the_processes_see_every_image_once_per_epoch(processes, size):
    n, steps = 15, 15
    parts = [
        first_batches(ImageBatches(numbered(n), size, seed=1, process=(rank, processes)), steps)
        for rank in range(processes)
    ]
    stream = [i for step in zip(*parts, strict=True) for x in step for i in numbers(x)]
    assert len(stream) == steps * size * processes
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    complete = first_batches(ImageBatches(numbered(n), size * processes, seed=1), steps)
    assert stream == [i for x in complete for i in numbers(x)]


@pytest.mark.parametrize("process", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("start", [0, 1, 4, 10, 23])
def test_a_stream_resumes_at_any_entry_with_any_batch_size(start, process):
    images = numbered()
    stream = torch.cat(first_batches(ImageBatches(images, 1, seed=3, flip=True), 60))
    rank, processes = process
    tail = ImageBatches(images, 4, seed=3, flip=True, start=start, process=process)
    for k, x in enumerate(first_batches(tail, 3)):
        first = start + (k * processes + rank) * 4
        assert torch.equal(x, stream[first : first + 4]) and torch.equal(tail.batch(k), x)


@pytest.mark.parametrize("process", [(2, 2), (-1, 1), (0, 0)])
def test_a_process_is_a_rank_below_the_number_of_processes(process):
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
    for k, (a, b) in enumerate(zip(first_batches(here, 8), first_batches(there, 8), strict=True)):
        assert torch.equal(a, b) and a.dtype == b.dtype == torch.float32
        assert torch.equal(there.batch(k), a)
    assert torch.equal(torch.get_rng_state(), state)  # what dropout draws does not depend on who reads
    assert torch.equal(next(iter(there)), next(iter(there)))


def test_two_iterations_of_one_stream_do_not_disturb_each_other():
    batches = ImageBatches(numbered(), 3, workers=1, resident=False)
    for k, (a, b) in enumerate(itertools.islice(zip(batches, batches, strict=False), 5)):
        assert torch.equal(a, b) and torch.equal(a, batches.batch(k))


def test_from_disk_the_batches_are_the_same(zoo):
    in_memory, stored = load_images(zoo), load_images(zoo, memory=0)
    for workers in (0, 2):
        a, b = (ImageBatches(images, 4, seed=1, flip=True, workers=workers) for images in (in_memory, stored))
        assert a.resident and not b.resident
        assert all(torch.equal(x, y) for x, y in zip(first_batches(a, 7), first_batches(b, 7), strict=True))


def test_rows_are_read_by_workers_too(hf, tmp_path):
    image_table(hf).to_parquet(tmp_path / "a.parquet")
    stored = load_images(tmp_path / "a.parquet", memory=0)
    a, b = ImageBatches(Images(torch.from_numpy(FASHION[:, None])), 3), ImageBatches(stored, 3, workers=2)
    assert all(torch.equal(x, y) for x, y in zip(first_batches(a, 7), first_batches(b, 7), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_cannot_read_is_reported_here_and_ends_the_run_beyond_the_limit(torn, workers):
    with pytest.warns(UserWarning, match="1 image"):
        stored = load_images(torn, memory=0)
    with pytest.warns(UserWarning) as caught:
        first_batches(ImageBatches(stored, 5, workers=workers), 20)
    assert sorted(str(w.message).split(":")[1] for w in caught) == [" as/04.png", " bs/03.png"]
    assert sorted(stored.broken.reasons) == ["as/04.png", "bs/03.png", "bs/05.png"]
    with pytest.warns(UserWarning):
        stored = load_images(torn, memory=0, max_broken=2)
        with pytest.raises(ValueError, match="^torn: 3 images cannot be used: bs/05.png .* more than max_broken=2$"):
            first_batches(ImageBatches(stored, 5, workers=workers), 20)


def test_stored_images_reach_a_worker_that_starts_from_nothing(zoo, hf, tmp_path):
    image_table(hf).to_parquet(tmp_path / "a.parquet")
    for source in (zoo, tmp_path / "a.parquet"):
        stored = load_images(source, memory=0)
        again = pickle.loads(pickle.dumps(stored))  # as it goes to a worker under spawn
        assert torch.equal(again.read([4, 2]), stored.read([4, 2]))


def test_describe_says_where_the_pixels_live_and_why(zoo, monkeypatch):
    digits, stored = load_images("digits"), load_images(zoo, memory=0)
    assert ImageBatches(digits, 4).describe() == "1,797 images of 8×8, grey: 0.1 MB, resident on cpu"
    read = "9 images of 6×5, grey: 0.0 MB, read by 3 workers: images are decoded when read"
    assert ImageBatches(stored, 4, workers=3).describe() == read
    assert "read by this process: as requested" in ImageBatches(digits, 4, resident=False, workers=0).describe()
    with pytest.raises(ValueError, match="resident must be False or None for StoredImages.*memory="):
        ImageBatches(stored, 4, resident=True)


def test_a_gpu_holds_what_leaves_half_of_its_memory_free(zoo, monkeypatch):
    digits, gpu = load_images("digits"), torch.device("cuda:0")
    total = digits.pixels.numel()
    for free, fits in ((2 * total, True), (2 * total - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert choose_residence(digits, gpu, None)[0] == fits
        assert choose_residence(digits, gpu, True)[0] and not choose_residence(digits, gpu, False)[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**5, 10**12))
    assert choose_residence(digits, gpu, None)[1] == "0.1 MB are more than half of the 0.1 MB free on cuda:0"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 10**12))
    assert not choose_residence(load_images(zoo, memory=0), gpu, None)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_never_synchronise_and_are_the_same():
    images = load_images("digits")
    wanted = first_batches(ImageBatches(images, 100, seed=1, flip=True), 40)
    batches = ImageBatches(images, 100, "cuda", seed=1, flip=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = first_batches(batches, 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    read = first_batches(ImageBatches(images, 100, "cuda", seed=1, flip=True, resident=False, workers=2), 40)
    for a, b, c in zip(wanted, result, read, strict=True):
        assert b.is_cuda and c.is_cuda and torch.equal(a, b.cpu()) and torch.equal(a, c.cpu())


@pytest.mark.parametrize("name, value", [("batch_size", 0), ("seed", -1), ("start", -1), ("workers", -1)])
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least [01], got {value}"):
        ImageBatches(numbered(), **({"batch_size": 4} | {name: value}))


# Orders and batches are part of what a saved run means: these numbers are those of the first version, and stay.
@pytest.mark.parametrize(
    "options, batches, order",
    [
        (dict(), "043c66da7a56dcdb", "cdc83c836989a829"),
        (dict(seed=3, flip=True), "ce5348cb6a6fa0f3", "092d8d52be6b0274"),
        (dict(seed=2**33, flip=True, start=1000, process=(1, 3)), "6a69fc4eea2c1bed", "bd45e594f9598a34"),
        (dict(seed=5, flip=True, resident=False, workers=0), "85af483f13bee2fb", "a15c175f254bb418"),
    ],
)
def test_batches_are_those_of_every_version_before(options, batches, order):
    stream = ImageBatches(load_images("digits"), 100, **options)
    parts = torch.stack(first_batches(stream, 25)), stream.order(7)
    assert [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in parts] == [batches, order]


def test_the_digest_of_a_data_set_is_one_of_pixels_and_labels_alone(zoo, tmp_path):
    digits, in_memory, stored = load_images("digits"), load_images(zoo), load_images(zoo, memory=0)
    assert data_digest(digits) == "b9f5ad128d9e" and data_digest(in_memory) == data_digest(stored)
    copy = zoo.rename(tmp_path / "elsewhere")
    assert data_digest(load_images(copy)) == data_digest(in_memory)
    assert data_digest(load_images("digits", n=7)) == data_digest(digits.select(range(7))) != data_digest(digits)
    put(copy / "cat/z.png", level(77))
    changed = [load_images(copy), Images(in_memory.pixels, 1 - in_memory.labels), Images(in_memory.pixels)]
    changed += [in_memory.select(range(8, -1, -1)), load_images(copy, size=5)]
    assert len({data_digest(images) for images in (in_memory, *changed)}) == 6


def test_the_digest_of_a_large_set_reads_a_part_of_it(monkeypatch):
    images, read = Images(torch.zeros(1000, 1, 1, 1, dtype=torch.uint8).expand(-1, 1, 512, 512)), []
    monkeypatch.setattr(Images, "read", lambda self, i: read.extend(i) or torch.zeros(1, dtype=torch.uint8))
    data_digest(images)
    assert read == list(range(0, 1000, 4))


@pytest.mark.parametrize("indices", [[7, 0], range(3), torch.tensor([8, 8])])
def test_a_selection_is_the_same_on_disk_and_in_memory(zoo, indices):
    in_memory, stored = load_images(zoo).select(indices), load_images(zoo, memory=0).select(indices)
    assert isinstance(stored, StoredImages) and len(stored) == len(in_memory) == len(indices)
    assert torch.equal(stored.read(range(len(stored))), in_memory.pixels)
    assert torch.equal(stored.labels, in_memory.labels) and stored.classes == in_memory.classes


def test_a_selection_has_a_limit_of_its_own_and_one_record_of_broken_images(torn):
    with pytest.warns(UserWarning, match="1 image cannot be used"):
        stored = load_images(torn, memory=0)
    some = stored.select([stored.source.paths.index(path) for path in ("as/04.png", "as/06.png", "as/08.png")])
    assert (some.broken.limit, stored.broken.limit) == (2, 10)
    with pytest.warns(UserWarning, match="as/04.png: .* replaced by the next usable one"):
        some.read([0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored.read([stored.source.paths.index("as/04.png")])


@pytest.mark.parametrize("options", [dict(), dict(resident=False, workers=0), dict(resident=False, workers=2)])
def test_labels_are_those_of_the_images(options):
    images = load_images("digits", n=100)
    plain = ImageBatches(images, 32, seed=2, flip=True, start=30, process=(1, 2))
    paired = ImageBatches(images, 32, seed=2, flip=True, start=30, process=(1, 2), labels=True, **options)
    for k, (x, y) in enumerate(first_batches(paired, 6)):
        assert torch.equal(x, plain.batch(k)) and y.dtype == torch.int64
        assert torch.equal(y, images.labels[plain.indices(k) % 100]) and torch.equal(paired.batch(k)[1], y)
    unlabelled = ImageBatches(Images(images.pixels), 32, labels=True, **options)
    x, y = next(iter(unlabelled))
    assert y is None and torch.equal(x, ImageBatches(images, 32).batch(0)) and unlabelled.batch(0)[1] is None


@pytest.mark.filterwarnings("ignore:torn")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_replaced_image_comes_with_its_own_label(torn, workers):
    cut(torn / "as/18.png")  # the last of its class: the next one has the other label
    with pytest.warns(UserWarning, match="1 image cannot be used"):
        stored = load_images(torn, memory=0)
    batches = ImageBatches(stored, 19, workers=workers, labels=True)
    with pytest.warns(UserWarning, match="as/18.png"):
        _, y = next(iter(batches))
    broken = batches.indices(0) == stored.source.paths.index("as/18.png")
    assert broken.sum() == 1 and stored.labels[batches.indices(0)][broken].item() == 0 and y[broken].item() == 1
    assert torch.equal(y[~broken], stored.labels[batches.indices(0)][~broken])


@pytest.mark.parametrize("bits, suffix", [(12, "png"), (10, "tif"), (14, "png"), (15, "pgm")])
@pytest.mark.parametrize("memory", [None, 0])
def test_16_bits_of_which_few_are_used_are_said_in_one_word(tmp_path, bits, suffix, memory):
    for i in range(3):
        values = np.random.default_rng(i).integers(2**bits, size=(16, 16)).astype(np.uint16)
        values[0, 0] = 2**bits - 1
        put(tmp_path / f"ct/{i}.{suffix}", values)
    top = round((2**bits - 1) / 257)
    with pytest.warns(
        UserWarning, match=f"^ct: nothing is brighter than {top} of 255: the files have 16 bits"
    ) as caught:
        images = load_images(tmp_path / "ct", memory=memory)
    assert len(caught) == 1 and images.read(range(3)).max() == top


@pytest.mark.parametrize("stream", [False, True])
def test_16_bits_in_a_table_are_noticed(hf, tmp_path, stream):
    image_table(hf, [level(i, 4, 4).astype(np.uint16) * 256 for i in range(4)]).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="a: nothing is brighter than 3 of 255"):
        load_images(tmp_path / "a.parquet", stream=stream)


def test_16_bits_that_are_used_and_dark_pictures_of_8_bits_are_nobodys_business(tmp_path):
    put(tmp_path / "a/0.png", np.full((4, 4), 65535, np.uint16)), put(tmp_path / "a/1.png", np.zeros((4, 4), np.uint16))
    put(tmp_path / "b/0.png", level(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images(tmp_path / "a"), load_images(tmp_path / "b")


@pytest.mark.parametrize("name, value", [("n", 2.0), ("n", True), ("n", 0), ("max_broken", "3"), ("memory", -1)])
def test_numbers_of_load_images_are_whole(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be [^\n]*$"):
        load_images("digits", **{name: value})
    assert len(load_images("digits", np.int64(8), n=np.uint8(3), memory=np.int64(10**9))) == 3


def same(batches, others):
    "Return whether two lists of pairs (x, y) are equal."
    return all(torch.equal(a, b) for x, y in zip(batches, others, strict=True) for a, b in zip(x, y, strict=True))


class Failing(Images):
    "Images that a worker process fails on, in one of several ways; this process reads them as ever."

    how = "exit"

    def try_read(self, indices):
        if torch.utils.data.get_worker_info():
            if self.how == "exit":
                os._exit(1)
            elif self.how == "sleep":
                time.sleep(3)
            elif self.how == "bus error":
                os.kill(os.getpid(), signal.SIGBUS)
            raise {"memory": MemoryError(), "shm": RuntimeError("unable to allocate\nNo space left")}[self.how]
        return super().try_read(indices)


@pytest.mark.parametrize("how", ["exit", "bus error", "memory", "shm", "sleep"])
def test_workers_that_die_or_cannot_allocate_cost_nothing_but_time(monkeypatch, how):
    monkeypatch.setattr(Failing, "how", how), monkeypatch.setattr(loading, "WORKER_SECONDS", 1.0)
    images = load_images("digits", n=50)
    options = dict(seed=2, flip=True, start=30, labels=True)
    wanted = first_batches(ImageBatches(images, 16, **options), 5)
    failing = ImageBatches(Failing(images.pixels, images.labels), 16, **options, workers=1, resident=False)
    with pytest.warns(UserWarning, match="workers failed: [^\n]*; this process reads on.*workers=0") as caught:
        result = first_batches(failing, 5)
    assert len(caught) == 1 and same(result, wanted)


@pytest.mark.parametrize("error", [OSError(11, "Resource temporarily unavailable"), ImportError("no semaphores")])
def test_workers_that_cannot_start_cost_nothing_but_time(monkeypatch, error):
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", lambda self: (_ for _ in ()).throw(error))
    images = load_images("digits", n=50)
    with pytest.warns(UserWarning, match=f"workers failed: .*{str(error)[-10:]}; this process reads on"):
        result = first_batches(ImageBatches(images, 16, workers=2, resident=False), 4)
    assert all(torch.equal(a, b) for a, b in zip(result, first_batches(ImageBatches(images, 16), 4), strict=True))


def test_a_worker_that_dies_later_is_taken_over_where_it_stopped(monkeypatch):
    monkeypatch.setattr(Failing, "how", "late")
    calls = itertools.count()
    monkeypatch.setattr(Failing, "try_read", lambda self, i: os._exit(1) if (
        torch.utils.data.get_worker_info() and next(calls) == 3) else Images.try_read(self, i))  # fmt: skip
    images = load_images("digits", n=50)
    with pytest.warns(UserWarning, match="workers failed"):
        result = first_batches(ImageBatches(Failing(images.pixels), 16, workers=1, resident=False), 8)
    assert all(torch.equal(a, b) for a, b in zip(result, first_batches(ImageBatches(images, 16), 8), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_on_another_default_device_the_batches_are_the_same(zoo, workers):
    wanted = first_batches(ImageBatches(load_images(zoo), 4, labels=True), 3)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="workers failed")
        for memory in (None, 0):
            images = load_images(zoo, memory=memory)
            result = first_batches(ImageBatches(images, 4, workers=workers, resident=False, labels=True), 3)
            assert all(
                torch.equal(a, b) for x, y in zip(result, wanted, strict=True) for a, b in zip(x, y, strict=True)
            )
            assert data_digest(images.select([3, 1])) and images.labels.device.type == "cpu"


@pytest.mark.parametrize("images", [torch.zeros(8, 1, 8, 8).byte(), [1], np.zeros((2, 8, 8)), "digits", None])
def test_images_of_other_libraries_are_refused_by_name(images):
    for call in (lambda: ImageBatches(images, 4), lambda: data_digest(images)):
        with pytest.raises(ValueError, match="^images must be what load_images returns, [^\n]*; got [^\n]*$"):
            call()


# ------------------------------------------------------------------------------------------- trees of odd files


def picture(format, *frames, **options):
    "Return the bytes of a picture of several frames."
    first, *others = (Image.fromarray(np.full((8, 8, *c), 40 + k, t)) for k, (c, t) in enumerate(frames))
    options |= dict(save_all=True, append_images=others) if others else {}
    return file_of(first, format, **options).getvalue()


GREY, RGB, DEEP = ((), np.uint8), ((3,), np.uint8), ((), np.uint16)
GOOD = picture("PNG", GREY)
ORIENTED = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\x006\0\0\0\0\0\0\0"  # as a text
KINDS = {
    **{"grey.png": GOOD, "rgb.png": picture("PNG", RGB), "16.png": picture("PNG", DEEP), "wrong.jpg": GOOD},
    **{"a.jfif": picture("JPEG", GREY), "3.gif": picture("GIF", *[GREY] * 3), "4.tif": picture("TIFF", *[RGB] * 4)},
    **{"cut.png": GOOD[:50], "empty.png": b"", "text.png": b"a text", "noise.webp": bytes(range(256))},
    **{"float.tif": picture("TIFF", ((), np.float32)), "exif.jpg": picture("JPEG", RGB, exif=ORIENTED)},
    **{"x.HEIC": b"ftyp", "x.npy": b"\x93NUMPY garbage", "notes.txt": b"", "no_ending": GOOD, ".hidden.png": GOOD},
    **{"a.json": b"{}", "link.png": "grey.png", "gone.png": "nowhere", "loop.png": "loop.png", "up": "..", "here": "."},
    "pipe.png": None,
}
PICTURES = {name for name in KINDS if name[0] != "." and name.endswith(SUFFIXES)} - {"pipe.png"}
FOLDERS = ["", "a", "b", "a/c", "train", "train/a", "test", "nest/test", "train2", ".hid", "samples", "masks/x"]
trees = st.lists(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(sorted(KINDS))), max_size=14, unique=True)


def plant(root, tree):
    "Write a tree of odd files; return how many entries it has, a hidden folder counting as one."
    root.mkdir()
    for folder, name in tree:
        (root / folder).mkdir(parents=True, exist_ok=True)
        match KINDS[name]:
            case bytes(content):
                (root / folder / name).write_bytes(content)
            case str(target):
                (root / folder / name).symlink_to(target)
            case _:
                os.mkfifo(root / folder / name)
    visible = [entry for entry in tree if entry[0] != ".hid"]
    return visible, len(visible) + (len(visible) < len(tree))


def counted(messages):
    "Return how many entries the warnings count that are not images: broken ones and all others, pages apart."
    text = "; ".join(messages)
    kinds = r"(?:^|[:;,] )([\d,]+) (images? cannot be used|[^(),;]*(?:files?|folders?|links?)\b[^(),;]*) ?[(:]"
    return sum(int(n.replace(",", "")) for n, _ in re.findall(kinds, text))


def check_tree(root, tree, split, memory):
    "Load a tree of odd files: images, all others counted in one warning, or one line that says what is wrong."
    visible, entries = plant(root, tree)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            images = load_images(root, 8, split=split, memory=memory, max_broken=100)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) > 20
            return "refused"
    assert len(caught) <= 1 and isinstance(images, Images | StoredImages)
    message = [str(w.message) for w in caught]
    assert all("\n" not in text for text in message)
    wanted, others = split or "train", 0
    for folder, name in visible:
        splits = [s for part in folder.split("/") for s in ("train", "test") if part.startswith(s)]
        others += name in PICTURES and splits[:1] not in ([], [wanted])
    total = len(images) + counted(message)
    all_read = any("all are read" in text for text in message)
    assert total == entries - (0 if all_read else others), (message, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert images.read(range(len(images))).shape[2:] == (8, 8)
        except ValueError as error:  # broken pixels, all of them
            assert memory == 0 and "cannot be used" in str(error)
    return "all" if not message else "some"


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(trees, st.sampled_from([None, None, "train", "test"]), st.sampled_from([None, 0]))
def test_of_a_tree_of_odd_files_every_one_is_read_or_counted(tree, split, memory):
    with TemporaryDirectory() as folder:
        check_tree(Path(folder) / "tree", tree, split, memory)
