"""Files: complete or absent, checked before they are used, and continued where a request was interrupted."""

import errno
import hashlib
import json
import logging
import os
import random
import sys
import tracemalloc
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import OwnNet, rng, tiny_model
from PIL import Image

from ddpm_lit import files
from ddpm_lit.ddpm import DDPM
from ddpm_lit.files import (
    CachedPictures,
    CachedSamples,
    CachedSums,
    Checkpoints,
    atomic_folder,
    atomic_write,
    checksum,
    digest,
    download_checked,
    find_damage,
    model_digest,
    model_folder,
    note_cached,
    open_cache,
    read_json,
    save_npz,
    write_json,
)
from ddpm_lit.forward import linear_schedule
from ddpm_lit.loading import load_images

TEN = dict(n=10, batch_size=4, seed=0, steps=3)


def pixels(n, channels=1):
    return torch.randint(256, (n, channels, 4, 6), generator=rng(n), dtype=torch.uint8)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def files_of(*contents, error=None):
    "Return a function that writes a.txt, b/b.txt, … into a folder, and raises `error` after the first of them."

    def write(folder):
        for name, content in zip(("a.txt", "b/b.txt"), contents, strict=False):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
            if error:
                raise error

    return write


class Killed(BaseException):
    "What a kill looks like from inside: no handler may swallow it."


def kill(*_, **__):
    raise Killed


# ------------------------------------------------------------------------------------------------------------ one file


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    for before in (None, "old"):
        if before:
            path.write_text(before)
        with pytest.raises(type(error)), atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise error
        assert names(tmp_path) == (["x"] if before else []) and (not before or path.read_text() == "old")


def test_json_is_written_and_read_alike_and_anything_else_is_refused(tmp_path):
    content = dict(name="Fréchet", beta=[1e-4, 0.1 + 0.2], none=None, clip=True)
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    for broken in ("", "[]", "3", '{"a": 1', "\x00"):
        (tmp_path / "b.json").write_text(broken)
        with pytest.raises(ValueError, match="b.json (cannot be read|must hold a JSON object)"):
            read_json(tmp_path / "b.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="b.json cannot be read"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    "value, plain",
    [(np.float32(0.5), 0.5), (np.int64(3), 3), (torch.tensor(2), 2), (np.bool_(True), True), (Path("a/b"), "a/b")],
)
def test_scalars_of_other_libraries_and_paths_are_written_as_plain_json(tmp_path, value, plain):
    write_json(tmp_path / "a.json", dict(x=value, deep=[dict(y=value)]))
    assert read_json(tmp_path / "a.json") == dict(x=plain, deep=[dict(y=plain)])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", dict(x=torch.zeros(2)))
    assert read_json(tmp_path / "a.json")["x"] == plain and names(tmp_path) == ["a.json"]


NOT_OFFERED = [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS]


@pytest.mark.parametrize("number", [*NOT_OFFERED, errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("last", [None, "a.txt"])
def test_a_flush_that_is_not_offered_is_no_failed_write_and_any_other_is(tmp_path, monkeypatch, number, last):
    def fsync(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if number in NOT_OFFERED:
        atomic_folder(tmp_path / "model", files_of("a", "b"), last)
        assert (tmp_path / "model" / "b" / "b.txt").read_text() == "b"
    else:
        with pytest.raises(OSError) as error:
            atomic_folder(tmp_path / "model", files_of("a", "b"), last)
        assert error.value.errno == number and not (tmp_path / "model").exists()


def test_a_folder_that_may_not_be_opened_is_written_all_the_same(tmp_path, monkeypatch):
    opened = os.open

    def open_files_only(path, *flags):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *flags)

    monkeypatch.setattr(os, "open", open_files_only)
    atomic_folder(tmp_path / "model", files_of("a", "b"))
    assert find_damage(tmp_path / "model") is None


def test_the_home_folder_is_found_wherever_a_path_enters(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.writable_folder("~/run") == tmp_path / "run" and Checkpoints("~/run").folder.parent == tmp_path / "run"
    tiny_model().save_pretrained("~/run/model")
    assert model_folder("~/run") == tmp_path / "run" / "model" and DDPM.from_pretrained("~/run/model").s.T == 20
    with pytest.raises(ValueError, match="out must be a folder"):
        files.writable_folder("~/run/model/model_index.json")


def test_digests_are_sha256(tmp_path):
    content = random.Random(0).randbytes(3_000_000)
    (tmp_path / "x").write_bytes(content)
    assert checksum(tmp_path / "x") == (3_000_000, hashlib.sha256(content).hexdigest())
    assert digest(content[:7], b"", content[7:]) == hashlib.sha256(content).hexdigest()
    assert digest() == hashlib.sha256().hexdigest()


# ------------------------------------------------------------------------------------------------------------- folders


def test_an_older_folder_is_replaced_only_by_a_complete_one(tmp_path):
    model, full = tmp_path / "model", OSError(errno.ENOSPC, "No space left on device")
    atomic_folder(model, files_of("a", "b"))
    with pytest.raises(OSError):
        atomic_folder(model, files_of("c", error=full))
    assert (model / "a.txt").read_text() == "a" and find_damage(model) is None
    atomic_folder(model, files_of("c"))
    assert names(model) == ["a.txt", "manifest.json"] and (model / "a.txt").read_text() == "c"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("moment", ["ddpm_lit.files.fsync_path", "ddpm_lit.files.checksum", "pathlib.Path.rename"])
def test_a_folder_whose_writer_is_killed_is_the_old_one(tmp_path, monkeypatch, moment):
    atomic_folder(tmp_path / "model", files_of("a", "b"))
    monkeypatch.setattr(moment, kill)
    with pytest.raises(Killed):
        atomic_folder(tmp_path / "model", files_of("c", "d"))
    monkeypatch.undo()
    assert (tmp_path / "model" / "b/b.txt").read_text() == "b" and find_damage(tmp_path / "model") is None
    atomic_folder(tmp_path / "model", files_of("c", "d"))
    assert (tmp_path / "model" / "b/b.txt").read_text() == "d" and names(tmp_path) == ["model"]


def test_what_a_killed_process_left_behind_does_not_stand_in_the_way(tmp_path):
    for name in (".model.tmp", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale.txt").write_text("half")
    for word in ("a", "b"):
        atomic_folder(tmp_path / "model", files_of(word))
        assert names(tmp_path / "model") == ["a.txt", "manifest.json"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("survivors", [0, 1])
def test_with_a_last_file_others_stay_and_a_mixture_lacks_the_last(tmp_path, monkeypatch, survivors):
    model, replace, moves = tmp_path / "model", os.replace, []
    atomic_folder(model, files_of("a", "b"), last="a.txt")
    (model / "b" / "notes.txt").write_text("mine")
    assert names(model) == ["a.txt", "b"], "no manifest"

    def dying(source, target):
        if len(moves) == survivors:
            raise Killed
        moves.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", dying)
    with pytest.raises(Killed):
        atomic_folder(model, files_of("c", "d"), last="a.txt")
    monkeypatch.undo()
    assert not (model / "a.txt").exists() and names(tmp_path) == ["model"]
    atomic_folder(model, files_of("c", "d"), last="a.txt")
    contents = [(model / name).read_text() for name in ("a.txt", "b/b.txt", "b/notes.txt")]
    assert contents == ["c", "d", "mine"]


def test_every_cut_and_every_changed_byte_is_found(tmp_path):
    model, draw = tmp_path / "model", random.Random(1)
    atomic_folder(model, files_of("first " * 50, "second " * 50))
    for path in (model / "a.txt", model / "b/b.txt", model / "manifest.json"):
        content, name = path.read_bytes(), path.relative_to(model).as_posix()
        for size in {0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(6))}:
            path.write_bytes(content[:size])
            assert find_damage(model).startswith(name), size
        path.unlink()
        assert find_damage(model).startswith(name)
        path.write_bytes(content)
        assert find_damage(model) is None
        if path.name != "manifest.json":
            i = draw.randrange(len(content))
            path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            assert find_damage(model) == f"{name} has changed"
            path.write_bytes(content)
    for manifest in ("{", "[]", '{"a.txt": 3}', '{"a.txt": [3]}', '{"a.txt": null}'):
        (model / "manifest.json").write_text(manifest)
        assert find_damage(model).startswith("manifest.json: ")


def test_a_manifest_of_before_is_read(tmp_path):
    "Written as the package wrote it until now: pairs in a list, one space of indentation."
    (tmp_path / "a.txt").write_text("abc")
    listing = {"a.txt": [3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]}
    (tmp_path / "manifest.json").write_text(json.dumps(listing, indent=1))
    assert find_damage(tmp_path) is None
    (tmp_path / "a.txt").write_text("abd")
    assert find_damage(tmp_path) == "a.txt has changed"


@pytest.mark.parametrize("keep, every, left", [(1, 0, [9]), (2, 0, [8, 9]), (2, 3, [3, 6, 8, 9]), (1, 4, [4, 8, 9])])
def test_the_last_k_and_every_nth_checkpoint_are_kept(tmp_path, keep, every, left):
    checkpoints = Checkpoints(tmp_path, keep, every)
    for step in range(1, 10):
        checkpoints.write(step, files_of("x"))
    assert checkpoints.steps() == left and not list(checkpoints.folder.glob(".*"))
    (checkpoints.folder / "step-9").mkdir(), (checkpoints.folder / "step-00000010.txt").write_text("")
    assert checkpoints.steps() == left, "other names are no checkpoints"


def test_a_damaged_checkpoint_is_logged_and_the_one_before_it_used(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    for step in (1, 2):
        checkpoints.write(step, files_of("x"))
    (checkpoints.path(2) / "a.txt").write_text("")
    with caplog.at_level(logging.WARNING, "ddpm_lit"):
        assert checkpoints.newest() == checkpoints.path(1)
    assert "step-00000002 is damaged (a.txt has 0 bytes, not 1)" in caplog.text
    (checkpoints.path(1) / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no checkpoint that is whole"):
        checkpoints.newest()


def test_the_model_of_a_run_is_its_newest_checkpoint_then_its_model_then_itself(tmp_path):
    def index(folder):
        write_json(folder / "model_index.json", {})

    with pytest.raises(ValueError, match="run' holds no model|does not exist"):
        model_folder(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        model_folder(tmp_path / "run")
    index(tmp_path / "run")
    assert model_folder(tmp_path / "run") == tmp_path / "run"
    atomic_folder(tmp_path / "run" / "model", index)
    assert model_folder(str(tmp_path / "run")) == tmp_path / "run" / "model"
    Checkpoints(tmp_path / "run").write(3, index)
    assert model_folder(tmp_path / "run").name == "step-00000003"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"out must be a folder that can be written to, got '{path}'"):
            files.writable_folder(path)


# -------------------------------------------------------------------------------------------------------------- caches


def fill(cache, indices, images):
    for i in indices:
        cache.save(i, images[4 * i : 4 * i + 4])
    return cache


@pytest.mark.parametrize("kind", [CachedSamples, CachedPictures])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_read_back_and_only_the_missing_are_missing(tmp_path, kind, channels):
    images = pixels(10, channels)
    cache = kind(tmp_path / "cache", TEN)
    assert cache.sizes == [4, 4, 2] and cache.missing() == [0, 1, 2] and not cache.folder.exists()
    fill(cache, (0, 2), images)
    assert not list(cache.folder.glob(".*"))
    again = kind(tmp_path / "cache", TEN)
    assert again.missing() == [1] and [again.has(i) for i in range(3)] == [True, False, True]
    fill(again, (1,), images)
    read = np.concatenate(list(again))
    assert read.dtype == np.uint8 and np.array_equal(read, images.numpy())
    for length in (None, 0, 40, -1):
        path = sorted(cache.folder.glob(f"*{kind.suffix}"))[5 if kind is CachedPictures else 1]
        path.unlink() if length is None else path.write_bytes(path.read_bytes()[:length])
        assert again.missing() == [1]
        fill(again, (1,), images)


def test_a_larger_n_continues_and_its_last_batch_counts_only_if_full(tmp_path):
    fill(CachedSamples(tmp_path / "cache", TEN), (2,), pixels(10))
    assert CachedSamples(tmp_path / "cache", TEN).missing() == [0, 1]
    assert CachedSamples(tmp_path / "cache", TEN | dict(n=11)).missing() == [0, 1, 2]
    with pytest.raises(ValueError, match="n 10, not 9"):
        CachedSamples(tmp_path / "cache", TEN | dict(n=9))


@pytest.mark.parametrize("kind", [CachedSamples, CachedPictures])
def test_another_request_is_refused_by_what_differs(tmp_path, kind):
    fill(kind(tmp_path / "cache", TEN), (0,), pixels(10))
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    others = {
        "seed 0, not 1": dict(seed=1),
        "steps 3, not 4": dict(steps=4),
        "batch_size 4, not 3": dict(batch_size=3),
        "seed 0, not 1, steps 3, not 4": dict(seed=1, steps=4),
        "precision None, not bf16": dict(precision="bf16"),
    }
    for text, change in others.items():
        message = f"{tmp_path / 'cache'} holds a cache of another request: {text}; delete it or give another --out"
        with pytest.raises(ValueError) as error:
            kind(tmp_path / "cache", TEN | change)
        assert str(error.value) == message
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


@pytest.mark.parametrize("content", ["", "[]", "3", '{"n": "ten"}', "{"])
def test_a_broken_request_json_is_another_request(tmp_path, content):
    cache = fill(CachedSamples(tmp_path / "cache", TEN), (0,), pixels(10))
    cache.request_file.write_text(content)
    with pytest.raises(ValueError, match="holds a cache of another request: n "):
        CachedSamples(tmp_path / "cache", TEN)
    assert open_cache(CachedSamples, tmp_path / "cache", TEN).missing() == [0, 1, 2]
    assert not cache.folder.exists()


def test_files_of_unknown_origin_are_left_alone(tmp_path):
    (tmp_path / "00000.png").write_bytes(b"the sea")
    with pytest.raises(ValueError, match="holds .png files of unknown origin"):
        CachedPictures(tmp_path, TEN)
    assert CachedSamples(tmp_path, TEN).missing() == [0, 1, 2], "of another kind"
    assert (tmp_path / "00000.png").read_bytes() == b"the sea"


def test_a_cache_of_before_is_continued(tmp_path):
    "Names and content of the files, written without this module."
    images = pixels(10)
    (tmp_path / "request.json").write_text(json.dumps(TEN, indent=2) + "\n", encoding="utf-8")
    np.save(tmp_path / "00001.npy", images[4:8].numpy())
    cache = CachedSamples(tmp_path, TEN)
    assert cache.missing() == [0, 2] and np.array_equal(cache.read(1), images[4:8].numpy())


def test_pictures_are_the_images_for_others(tmp_path):
    images = pixels(3, channels=3)
    CachedPictures(tmp_path / "new", dict(n=3, batch_size=3)).save(0, images)
    assert names(tmp_path / "new") == ["00000.png", "00001.png", "00002.png", "request.json"]
    for k in range(3):
        decoded = np.asarray(Image.open(tmp_path / "new" / f"{k:05d}.png"))
        assert np.array_equal(decoded, images[k].permute(1, 2, 0))


def test_joining_needs_the_memory_of_few_batches(tmp_path):
    cache = CachedSamples(tmp_path / "cache", dict(n=20, batch_size=1))
    for i in range(20):
        cache.save(i, torch.full((1, 1, 1000, 1000), i, dtype=torch.uint8))
    tracemalloc.start()
    save_npz(tmp_path / "x.npz", cache)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5e6, "of 20 million bytes"
    assert torch.equal(load_images(tmp_path / "x.npz").pixels[:, 0, 999, 0], torch.arange(20, dtype=torch.uint8))


def sums(n, total=1.0):
    return dict(asked=torch.tensor([float(n), 0.0]), total=torch.tensor(total), terms=rng_terms())


def rng_terms():
    return torch.randn(2, 5, dtype=torch.float64, generator=rng(0)).T  # not contiguous


def test_sums_are_a_mapping_of_what_is_complete_and_finite(tmp_path):
    cache = CachedSums(tmp_path / "sums", TEN)
    assert len(cache) == 0 and 0 not in cache and list(cache) == []
    cache[0], cache[1], cache[2] = sums(4), sums(4, float("nan")), sums(4)  # the last batch has two images
    again = CachedSums(tmp_path / "sums", TEN)
    assert dict(again).keys() == {0} and again.missing() == [1, 2] and again.get(7) is None
    assert torch.equal(again[0]["terms"], rng_terms()) and again.read(0)["total"] == 1
    again[2] = sums(2)
    assert list(again) == [0, 2]
    again.path(0).write_bytes(again.path(0).read_bytes()[:-1])
    assert again.missing() == [0, 1]
    with pytest.raises(KeyError):
        again[0]
    del again[2]
    assert len(again) == 0


def test_an_error_says_what_is_cached_and_how_to_resume(tmp_path):
    cache = CachedSamples(tmp_path / "cache", TEN)
    with pytest.raises(OSError) as error, note_cached(cache):
        raise OSError("the disk is full")
    assert not hasattr(error.value, "__notes__"), "nothing is cached"
    fill(cache, (0, 2), pixels(10))
    for raised, notes in ((KeyboardInterrupt(), 1), (torch.OutOfMemoryError("no memory"), 2)):
        with pytest.raises(type(raised)), note_cached(cache, "the bits/dim of "):
            raise raised
        wanted = f"the bits/dim of 6 of 10 images are cached in {cache.folder}; the same command resumes there"
        assert raised.__notes__[-1] == wanted and len(raised.__notes__) == notes
    assert raised.__notes__[0] == "try a --batch-size below 4"


# ---------------------------------------------------------------------------------------------- which model, which file


def digest_of_before(folder, patterns):
    "What the package computed for a model until now, word for word."
    state = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        state.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()[:12]


def test_the_digest_of_a_model_is_that_of_its_files_and_the_one_of_before(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    before = model_digest(tmp_path / "m")
    old = ("*config.json", "model_index.json", "diffusion_pytorch_model.*", "unet/*", "scheduler/*")
    assert before == digest_of_before(tmp_path / "m", old)
    for beside in ("training.json", "manifest.json", "samples.png", "training.safetensors"):
        (tmp_path / "m" / beside).write_text("x")
    tiny_model().save_pretrained(tmp_path / "m")
    assert model_digest(tmp_path / "m") == before
    seen = {before}
    for m in (tiny_model(seed=1), tiny_model(linear_schedule(21)), tiny_model(variance="beta")):
        m.save_pretrained(tmp_path / "m")
        seen.add(model_digest(tmp_path / "m"))
    assert len(seen) == 4


def test_the_digest_of_a_network_of_ones_own_changes_with_its_weights(tmp_path):
    net = OwnNet()
    DDPM(net, linear_schedule(20)).save_pretrained(tmp_path / "m")
    before = model_digest(tmp_path / "m")
    net.first.bias.data[0] += 1
    DDPM(net, linear_schedule(20)).save_pretrained(tmp_path / "m")
    assert model_digest(tmp_path / "m") != before


URL = "https://example.org/some/net.pt"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty folder of torch.hub, and a function that replaces its download."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return lambda download: monkeypatch.setattr(torch.hub, "download_url_to_file", download)


def test_a_copy_is_used_only_if_it_is_the_published_file(tmp_path):
    path = tmp_path / "copy.pt"
    path.write_bytes(b"weights")
    assert download_checked(path, URL, digest(b"weights")) == path
    with pytest.raises(
        ValueError, match=f"{path} must be the file of {URL}, but its SHA-256 is {digest(b'weights')[:12]}"
    ):
        download_checked(path, URL, digest(b"other"))
    with pytest.raises(ValueError, match="nowhere.pt does not exist"):
        download_checked(tmp_path / "nowhere.pt", URL, digest(b"weights"))


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("timed out"), RuntimeError("invalid hash value")]
)
def test_a_download_that_fails_is_one_line_with_its_address(hub, error):
    def fail(url, path, **_):
        raise error

    hub(fail)
    with pytest.raises(ValueError, match=f"^{URL} could not be fetched.*name the file") as raised:
        download_checked(None, URL, digest(b"weights"))
    assert "\n" not in str(raised.value)


def test_a_download_is_cached_and_checked_each_time(hub, tmp_path):
    requests = []

    def fetch(url, to, hash_prefix, progress):
        requests.append((url, hash_prefix))
        Path(to).write_bytes(b"weights")

    hub(fetch)
    for _ in range(2):
        path = download_checked(None, URL, digest(b"weights"))
    assert requests == [(URL, digest(b"weights"))]
    assert path == tmp_path / "home" / "hub" / "checkpoints" / "net.pt"
    path.write_bytes(b"weight")
    with pytest.raises(ValueError, match=f"{path} must be the file of {URL}"):
        download_checked(None, URL, digest(b"weights"))


@pytest.mark.skipif(sys.platform == "win32", reason="an address of a file there has another form")
def test_torch_itself_refuses_a_download_of_another_content(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "net.pt").write_bytes(b"weights")
    url = (tmp_path / "net.pt").as_uri()
    with pytest.raises(ValueError, match="could not be fetched .invalid hash value"):
        download_checked(None, url, digest(b"other"))
    assert download_checked(None, url, digest(b"weights")).read_bytes() == b"weights"
