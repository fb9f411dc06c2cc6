"""Picture files: what they mean, what their headers say, and what of them cannot be read."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import file_of, level
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm_lit.decoding import as_size, decode_image, read_header
from ddpm_lit.images import Images, save_animation, save_grid


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


def exif(*entries):
    "Return EXIF data of (tag, type, count, four bytes of value)."
    rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)


MALFORMED = {
    "orientation as a text": exif((0x0112, 2, 2, b"6")),
    "orientation 77": exif((0x0112, 3, 1, b"M\0")),
    "a fraction beyond the end": exif((0x0112, 5, 1, b"\xff\xff\0\0")),
    "entries that are not there": b"Exif\0\0II*\0" + struct.pack("<IH", 8, 99),
    "no header": b"Exif\0\0nonsense",
    "nothing": b"Exif\0\0",
    "an IFD in itself": exif((0x8769, 4, 1, b"\x08\0\0\0")),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_exif_never_decides_whether_a_picture_is_broken(kind, format):
    options = dict(lossless=True) if format == "WEBP" else {}
    try:
        file = file_of(Image.fromarray(np.full((16, 8, 3), 200, np.uint8)), format, exif=MALFORMED[kind], **options)
    except Exception:  # Pillow itself does not write it
        pytest.skip("cannot be written")
    assert read_header(file)[:2] == (3, (16, 8)) and (decode_image(file) == 200).all()


def chunk(kind, data, sound=True):
    "Return a chunk of a PNG file."
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ (not sound))


CHUNKS = {
    "a text of two megabytes": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))),
    "a text with a wrong checksum": chunk(b"tEXt", b"a\0b", sound=False),
    "a text in an unknown code": chunk(b"zTXt", b"a\0\7???"),
    "half a resolution": chunk(b"pHYs", b"\0"),
    "a broken profile": chunk(b"iCCP", b"a\0\0???"),
    "an orientation with a wrong checksum": chunk(b"eXIf", exif((0x0112, 3, 1, b"\6\0"))[6:], sound=False),
}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_that_the_pixels_do_not_need_never_decide_whether_a_picture_is_broken(kind, at_the_end):
    content = file_of(Image.fromarray(G)).getvalue()
    place = len(content) - 12 if at_the_end else 33
    file = io.BytesIO(content[:place] + CHUNKS[kind] + content[place:])
    assert read_header(file)[:2] == (1, (5, 4)) and np.array_equal(decode_image(file), G)
    missing = io.BytesIO(content[:33] + CHUNKS[kind] + content[33:-40])
    with pytest.raises(Exception, match="."):  # noqa: B017, PT011 (whatever the decoder says)
        decode_image(missing)


def test_a_text_does_not_cost_the_orientation_or_the_transparency():
    text, turned = PngInfo(), Image.Exif()
    text.add_text("workflow", "x" * 2**21, zip=True)
    turned[0x0112] = 6
    for options in (dict(exif=turned), dict(transparency=int(G[2, 2]))):
        plain, noted = (file_of(Image.fromarray(G), **options, **more) for more in ({}, dict(pnginfo=text)))
        assert np.array_equal(decode_image(noted), decode_image(plain)) and not np.array_equal(decode_image(noted), G)
        assert read_header(noted)[:2] == read_header(plain)[:2]


@pytest.mark.parametrize(
    "format, options", [("TIFF", {}), ("GIF", {}), ("PNG", {}), ("WEBP", dict(lossless=True)), ("MPO", {})]
)
def test_further_pages_are_counted_and_the_first_is_read(format, options):
    first, *others = (Image.fromarray(level(9 * k + 50, 16, 16)) for k in range(5))
    file = file_of(first, format, save_all=True, append_images=others, **options)
    assert read_header(file).pages == 5
    assert np.abs(decode_image(file).astype(int).reshape(16, 16, -1) - 50).max() <= (2 if format == "MPO" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_header_says_whether_there_are_16_bits(mode):
    assert read_header(MODES[mode][0]).deep == (mode[0] == "I")


def test_colours_of_16_bits_are_noticed_too():
    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(5))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert read_header(io.BytesIO(content)) == (3, (5, 4), 1, True)


@pytest.mark.parametrize("name", ["a.png", "a.gif", "strip.png"])
def test_what_this_package_drew_is_no_picture(tmp_path, name):
    images = Images(torch.from_numpy(np.stack([G] * 4)[:, None]))
    save_grid(tmp_path / "a.png", images)
    save_animation(tmp_path / "a.gif", images.pixels[None]), save_animation(tmp_path / "strip.png", images.pixels[None])
    with open(tmp_path / name, "rb") as file, pytest.raises(ValueError, match="is a grid of images drawn by ddpm_lit"):
        read_header(file)


def test_sizes_of_every_kind_of_whole_number():
    assert [as_size(s) for s in (None, 8, np.int64(8), (4, np.uint8(3)), [2, 1], np.array([5, 6]), np.array(7))] == [
        *(None, (8, 8), (8, 8), (4, 3), (2, 1), (5, 6), (7, 7))
    ]


@pytest.mark.parametrize("size", [True, 8.0, np.float32(8), "8", (8,), (8, 8, 8), (8, True), (), 0, (4, -1), {8: 8}])
def test_a_size_that_is_none_is_refused_by_name(size):
    with pytest.raises(ValueError, match="^size must be [^\n]*$"):
        as_size(size)
