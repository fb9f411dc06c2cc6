"""Pictures, folders and tables that the tests of sources and of loading read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lit.images import Images, to_pixels

FASHION = np.random.default_rng(8).integers(256, size=(7, 6, 5), dtype=np.uint8)


def numbered(n=10, c=1, h=2, w=3) -> Images:
    "Return images that carry their own number in every pixel; in the first column, their number plus 100."
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, c, h, w).clone()
    pixels[..., 0] += 100
    return Images(pixels)


def numbers(x):
    "Return which of the `numbered` images are in a batch."
    return to_pixels(x)[:, 0, 0, 1].tolist()


def file_of(image, format="PNG", **options):
    "Return the picture as a file, open for reading."
    image.save(file := io.BytesIO(), format, **options)
    return file


def put(path, array, **options):
    "Write an array as a picture file."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def level(i, h=6, w=5):
    "Return a grey picture of one level."
    return np.full((h, w), i, np.uint8)


def cut(path):
    "Cut a file so that its header is complete and its pixels are not."
    path.write_bytes(path.read_bytes()[:-40])


def make_zoo(tmp_path):
    "Write a folder of nine grey images in two classes, with levels 1 … 9 in their order, and what is no image between."
    root = tmp_path / "zoo"
    names = ["cat-big/1.png", "cat-big/10.PNG", "cat-big/2.png", "cat/old/7.bmp", "cat/old/8.tif", "cat/z.png"]
    for i, name in enumerate(sorted([*names, "cat/a.gif", "cat/b.pgm", "cat-big/x/y/z.png"]), start=1):
        put(root / name, level(i))
    for name in ("cat/.hidden.png", ".cache/1.png", "cat/._1.png"):
        put(root / name, level(99))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "README.md").write_text("no image")
    return root


def make_torn(tmp_path):
    "Write twenty noisy images, of which 3 and 4 are cut short, and 5 is a text; return the folder."
    root = tmp_path / "torn"
    for i in range(20):
        noise = np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8)
        put(root / ("ab"[i % 2] + "s") / f"{i:02}.png", noise)
    cut(root / "bs/03.png"), cut(root / "as/04.png")
    (root / "bs/05.png").write_text("a text")
    return root


def quiet_hub(tmp_path, monkeypatch):
    "Return the package datasets, quiet, with its cache in the folder of the test."
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def encoded(arrays):
    "Return the cells of a column of images."
    return [{"bytes": file_of(Image.fromarray(array)).getvalue(), "path": None} for array in arrays]


def image_table(hf, arrays=FASHION, column="image", label="label", names=("boot", "hat", "shoe")):
    "Return a table in the Hub's schema with labels 0, 1, 2, 0, …"
    labels = [i % 3 for i in range(len(arrays))]
    kind = hf.ClassLabel(names=list(names)) if names else hf.Value("int32")
    features = hf.Features({"id": hf.Value("string"), column: hf.Image(), label: kind})
    return hf.Dataset.from_dict({"id": ["x"] * len(arrays), column: encoded(arrays), label: labels}, features)
