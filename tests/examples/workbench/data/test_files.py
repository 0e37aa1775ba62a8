"""Single image files: the contents read from each kind, and the kinds that are refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from examples.workbench.data.files import read_colour_mask, read_image, read_index_mask
from examples.workbench.errors import InputError
from tests.errors import refuses
from tests.examples.workbench.data.formats import photo, save_deep


def write(path, picture, kind, **options):
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(path, kind, **options)
    return path


def turned(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def grey_png(ids, bits):
    """A grey PNG of 1, 2 or 4 bits, which Pillow cannot write."""
    height, width = ids.shape
    rows = b""
    for row in ids:
        ones = np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, 8 - bits :].ravel()
        rows += b"\0" + np.packbits(ones).tobytes()
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2I5B", width, height, bits, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def index_of_brightest(image):
    return np.unravel_index(image.astype(int).sum(-1).argmax(), image.shape[:2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_images_are_upright(tmp_path, tag, kind):
    shown = np.zeros((24, 40, 3), np.uint8)
    shown[:8, :8] = 250
    stored = {
        **{1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1]},
        **{5: shown.transpose(1, 0, 2), 6: np.rot90(shown, 1), 7: np.rot90(shown, 2).transpose(1, 0, 2)},
        8: np.rot90(shown, -1),
    }[tag]
    file = write(tmp_path / "a", np.ascontiguousarray(stored), kind, exif=turned(tag))
    assert np.abs(read_image(file).astype(int) - shown).max() < 60


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("tag", [3, 6, 7])
def test_masks_are_upright(tmp_path, tag, kind, dtype):
    ids = np.arange(12, dtype=dtype).reshape(3, 4)
    file = write(tmp_path / "a", ids, kind, exif=turned(tag))
    picture = Image.fromarray(ids)
    picture.getexif()[0x0112] = tag
    expected = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(read_index_mask(file), expected)
    colours = write(tmp_path / "b", Image.fromarray(ids.astype(np.uint8)).convert("RGB"), kind, exif=turned(tag))
    assert np.array_equal(np.asarray(read_colour_mask(colours))[..., 0], expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [turned(9), b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nothing at all"])
def test_an_orientation_that_says_nothing_is_ignored(tmp_path, exif, kind):
    file = write(tmp_path / "a", photo(), kind, exif=exif)
    assert read_image(file).shape == (40, 64, 3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_means_the_numbers(tmp_path, bits):
    ids = np.arange(5 * 7).reshape(5, 7) % 2**bits
    (tmp_path / "a").write_bytes(grey_png(ids, bits))
    assert np.array_equal(read_index_mask(tmp_path / "a"), ids)
    # As a mask of colours it means what one sees: white is white.
    seen = np.asarray(read_colour_mask(tmp_path / "a"))
    assert np.array_equal(seen[..., 0], ids * (255 // (2**bits - 1)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_mean_their_indices(tmp_path, bits):
    ids = (np.arange(5 * 7).reshape(5, 7) % min(2**bits, 30)).astype(np.uint8)
    picture = Image.fromarray(ids)
    picture.putpalette(bytes(range(250, 250 - 3 * 30, -1)))
    write(tmp_path / "a", picture, "PNG", bits=bits)
    assert np.array_equal(read_index_mask(tmp_path / "a"), ids)
    assert np.array_equal(np.asarray(read_colour_mask(tmp_path / "a"))[..., 0], 250 - 3 * ids)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "group4"])
def test_tiff_masks_mean_the_numbers(tmp_path, compression, white_is_zero):
    ids = np.arange(24).reshape(4, 6) % 2
    one_bit = Image.fromarray(ids.astype(bool))
    file = write(tmp_path / "a", one_bit, "TIFF", compression=compression, tiffinfo={262: int(not white_is_zero)})
    # Pillow stores what it shows as white.
    assert np.array_equal(read_index_mask(file), 1 - ids if white_is_zero else ids)
    if compression != "group4":
        grey = Image.fromarray(ids.astype(np.uint8))
        file = write(tmp_path / "b", grey, "TIFF", compression=compression, tiffinfo={262: int(not white_is_zero)})
        assert np.array_equal(read_index_mask(file), 255 - ids if white_is_zero else ids)


def test_masks_of_more_bits(tmp_path):
    ids = np.arange(12).reshape(3, 4)
    for kind, dtype in (("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)):
        assert np.array_equal(read_index_mask(write(tmp_path / "a", ids.astype(dtype), kind)), ids)
    big_endian = Image.frombytes("I;16B", (4, 3), ids.astype(">u2").tobytes())
    assert np.array_equal(read_index_mask(write(tmp_path / "a", big_endian, "TIFF")), ids)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("MPO", {"save_all": True, "append_images": [Image.new("L", (64, 40))]}),
        ("WEBP", {}),
        ("JPEG2000", {}),
        ("AVIF", {}),
        ("TIFF", {"compression": "jpeg"}),
    ],
)
@pytest.mark.parametrize("read", [read_index_mask, read_colour_mask])
def test_lossy_masks_are_refused_whatever_their_name(tmp_path, kind, options, read):
    file = write(tmp_path / "a.png", Image.new("L" if kind != "WEBP" else "RGB", (64, 40)), kind, **options)
    with refuses(InputError, file, "lossless", kind):
        read(file)
    # An image may be lossy, and have another name.
    assert read_image(file).shape == (40, 64, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_without_a_table_point_to_it(tmp_path, mode):
    with refuses(InputError, tmp_path / "a", mode, "`colours`"):
        read_index_mask(write(tmp_path / "a", Image.new(mode, (4, 3)), "PNG"))


def test_masks_of_floats_are_refused(tmp_path):
    with refuses(InputError, tmp_path / "a", "mode F"):
        read_index_mask(write(tmp_path / "a", Image.new("F", (4, 3)), "TIFF"))


def test_masks_of_colours_are_opaque_and_of_8_bits(tmp_path):
    picture = Image.new("RGBA", (4, 3), (1, 2, 3, 255))
    assert (
        np.asarray(read_colour_mask(write(tmp_path / "a", picture, "PNG"))).reshape(-1, 3).tolist() == [[1, 2, 3]] * 12
    )
    picture.putpixel((0, 0), (1, 2, 3, 254))
    with refuses(InputError, tmp_path / "a", "opaque", "1 pixels"):
        read_colour_mask(write(tmp_path / "a", picture, "PNG"))
    palette = Image.new("P", (4, 3))
    with refuses(InputError, tmp_path / "a", "opaque", "12 pixels"):
        read_colour_mask(write(tmp_path / "a", palette, "PNG", transparency=0))
    save_deep(np.zeros((3, 4, 3), np.uint16), tmp_path / "a")
    with refuses(InputError, tmp_path / "a", "8 bits", 16):
        read_colour_mask(tmp_path / "a")


RED = Image.new("RGB", (12, 8), (200, 30, 30))


@pytest.mark.parametrize(
    ("picture", "kind", "options"),
    [
        (RED.convert("CMYK"), "JPEG", {"quality": 95}),
        (RED, "JPEG", {"progressive": True}),
        (RED.convert("RGBA"), "PNG", {}),
        (RED.convert("P"), "PNG", {"transparency": 0}),
        # Transparency of each palette colour, of which Pillow would warn.
        (RED.convert("P"), "PNG", {"transparency": bytes([0, 128, 255])}),
        (RED.convert("P"), "GIF", {}),
        (RED, "BMP", {}),
        (RED, "WEBP", {"lossless": True}),
        (RED, "TIFF", {"compression": "jpeg"}),
    ],
)
def test_images_of_every_kind(tmp_path, picture, kind, options):
    image = read_image(write(tmp_path / "a", picture, kind, **options))
    assert image.shape == (8, 12, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.reshape(-1, 3).mean(0) - [200, 30, 30]).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_images(tmp_path, mode):
    image = read_image(write(tmp_path / "a", Image.new("L", (12, 8), 255).convert(mode), "PNG"))
    assert np.array_equal(image, np.full((8, 12, 3), 255))


def test_a_bitmap_of_16_bits_a_pixel_has_8_a_channel(tmp_path):
    """Five bits of each colour."""
    rows = np.full((2, 2), 31 << 10, "<u2").tobytes()
    header = struct.pack("<2sIHHI", b"BM", 54 + len(rows), 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 0, len(rows), 0, 0, 0, 0)
    (tmp_path / "a").write_bytes(header + rows)
    assert read_image(tmp_path / "a").tolist() == [[[255, 0, 0]] * 2] * 2


@pytest.mark.parametrize(("mode", "bits"), [("I;16", 16), ("I", 32), ("F", 32)])
def test_images_of_more_bits(tmp_path, mode, bits):
    with refuses(InputError, tmp_path / "a", "8 bits", bits):
        read_image(write(tmp_path / "a", Image.new(mode, (4, 3)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_huge_images(tmp_path, monkeypatch, kind):
    """Pillow warns of one size, and refuses twice that size."""
    file = write(tmp_path / "a", photo(40, 64), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 64 - 1)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert np.array_equal(read_image(file), photo(40, 64))
    assert not shown
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (read_image, read_index_mask):
        with refuses(InputError, file, "too large", 2000, 40 * 64, "tiles", "resize"):
            read(file)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "a").touch()
    with refuses(InputError, tmp_path / "a", "empty"):
        read_image(tmp_path / "a")
    (tmp_path / "a").write_text("version https://git-lfs.github.com/spec/v1")
    with refuses(InputError, tmp_path / "a", "whole", "format"):
        read_image(tmp_path / "a")
    with refuses(InputError, tmp_path / "b", "whole"):
        read_image(tmp_path / "b")
    content = io.BytesIO()
    Image.fromarray(photo()).save(content, "JPEG")
    (tmp_path / "a").write_bytes(content.getvalue()[:-200])
    with refuses(InputError, tmp_path / "a", "whole", "truncated"):
        read_image(tmp_path / "a")
