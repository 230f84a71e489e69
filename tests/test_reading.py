"""Pixels by meaning: bit depths, transparency, colour profiles; and which files count as images.

Expected values are worked out by hand: of 16 bits 32768 / 65535 * 255 = 127.5, rounded 128.
"""

import multiprocessing
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from clipgen.depths import SIGNED_NOTE
from clipgen.images import (
    ALPHA_NOTE,
    ONE_COLOUR_NOTE,
    PROFILE_NOTE,
    UnreadableImage,
    decode_image,
)
from scripts.data.presets import open_images
from scripts.data.reading import PLAIN, Reading
from scripts.training.cli import parse_settings
from scripts.training.encoding import EncodeSettings
from tests.made_files import encoded, plain, write, write_tar


def first_row(data, **options):
    """The first row of a decoded image: grey values where all pixels are grey, else colours."""
    row = np.asarray(decode_image(data, **options))[0]
    return row[:, 0].tolist() if (row == row[:, :1]).all() else row.tolist()


# Bit depths in TIFF


def tiff(pixels, width, bits, meaning, order="<", *, sign=None, extra=None, deflated=False):
    """A TIFF of one row of one's own making; `bits` has an entry for each channel."""
    pixels = zlib.compress(pixels) if deflated else pixels
    tags = [(256, "I", [width]), (257, "I", [1]), (258, "H", bits), (259, "H", [8 if deflated else
            1]), (262, "H", [meaning]), (273, "I", [0]), (277, "H", [len(bits)]), (278, "I", [1]),
            (279, "I", [len(pixels)])]
    tags += [(338, "H", extra)] if extra is not None else []
    tags += [(339, "H", [sign] * len(bits))] if sign else []
    rest = 8 + 2 + 12 * len(tags) + 4  # where what does not fit into an entry begins
    strip = rest + sum(2 * len(v) for _, kind, v in tags if kind == "H" and len(v) > 2)
    entries = long = b""
    for tag, kind, values in tags:
        value = struct.pack(f"{order}{len(values)}{kind}", *([strip] if tag == 273 else values))
        if len(value) > 4:
            value, long = struct.pack(f"{order}I", rest + len(long)), long + value
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(values))
        entries += value.ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return (start + struct.pack(f"{order}IH", 8, len(tags)) + entries + struct.pack(f"{order}I", 0)
            + long + pixels)


def numbers(values, kind, order="<"):
    return np.array(values, f"{order}{kind}").tobytes()


WHITE_IS_0, BLACK_IS_0, RGB, CMYK = 0, 1, 2, 5
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("bits, pixels, black_is_0, white_is_0", [
    (1, b"\x50", [0, 255, 0, 255], [255, 0, 255, 0]),
    (2, b"\x1b", [0, 85, 170, 255], [255, 170, 85, 0]),
    (4, b"\x0f\x37", [0, 255, 51, 119], [255, 0, 204, 136]),
    (8, b"\x00\x01\x80\xff", [0, 1, 128, 255], [255, 254, 127, 0]),
    (16, [0, 128, 32768, 65535], [0, 0, 128, 255], [255, 255, 127, 0])])
def test_grey_tiff_of_every_depth_and_meaning(order, deflated, bits, pixels, black_is_0,
                                              white_is_0):
    data = numbers(pixels, "u2", order) if bits == 16 else pixels
    for meaning, expected in ((BLACK_IS_0, black_is_0), (WHITE_IS_0, white_is_0)):
        image = tiff(data, 4, [bits], meaning, order, deflated=deflated)
        assert first_row(image) == expected
        assert decode_image(image).info["notes"] == ()


@pytest.mark.parametrize("data, expected, note", [
    # 12 bits, two values in three bytes: 0, 0x800, 0xfff, 1; 2048 / 4095 * 255 = 127.53
    (tiff(b"\x00\x08\x00\xff\xf0\x01", 4, [12], BLACK_IS_0), [0, 128, 255, 0], ""),
    (tiff(numbers([0, 2**23, 2**31, 2**32 - 1], "u4"), 4, [32], BLACK_IS_0), [0, 0, 128, 255], ""),
    *[(tiff(numbers([-100, 0, 50, 300], "i2", order), 4, [16], BLACK_IS_0, order, sign=SIGNED),
       [0, 64, 96, 255], SIGNED_NOTE) for order in "<>"],  # 100 / 400 * 255 = 63.75
    *[(tiff(numbers([-2**31, 0, 2**30, 2**31 - 1], "i4", order), 4, [32], BLACK_IS_0, order,
            sign=SIGNED), [0, 128, 191, 255], SIGNED_NOTE) for order in "<>"],
    *[(tiff(numbers([-2, 0, 1, 2], "i1"), 4, [8], BLACK_IS_0, order, sign=SIGNED),
       [0, 128, 191, 255], SIGNED_NOTE) for order in "<>"],
    (tiff(numbers([7, 7], "i2"), 2, [16], BLACK_IS_0, sign=SIGNED), [0, 0], SIGNED_NOTE)])
def test_tiff_of_other_ranges(data, expected, note):
    assert first_row(data) == expected
    assert decode_image(data).info["notes"] == ((note,) if note else ())


PIXELS = bytes([10, 20, 30, 0, 200, 100, 50, 255])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra, expected", [
    (None, [[10, 20, 30], [200, 100, 50]]),  # no tag calls the fourth band alpha
    ([0], [[10, 20, 30], [200, 100, 50]]),
    ([1], [[255] * 3, [200, 100, 50]]), ([2], [[255] * 3, [200, 100, 50]])])
def test_an_extra_band_is_alpha_only_where_it_is_called_so(order, bits, extra, expected):
    wide = numbers([257 * value for value in PIXELS], "u2", order)
    data = tiff(PIXELS if bits == 8 else wide, 2, [bits] * 4, RGB, order, extra=extra)
    assert first_row(data) == expected


@pytest.mark.parametrize("extra, expected", [
    ([0], [10, 30, 200, 50]),
    ([1], [245, 255, 255, 50]),  # times alpha already: 10 + 235, 30 + 255, 200 + 155, cut at 255
    ([2], [236, 255, 233, 50])])  # 10 * 20 / 255 + 235, 30 * 0 + 255, 200 * 100 / 255 + 155
def test_grey_with_an_extra_band(extra, expected):
    assert first_row(tiff(PIXELS, 4, [8, 8], BLACK_IS_0, extra=extra)) == pytest.approx(expected,
                                                                                      abs=1)


def test_cmyk_tiff_with_and_without_an_extra_band():
    red = bytes([0, 255, 255, 0])
    assert first_row(tiff(red * 2, 2, [8] * 4, CMYK)) == [[255, 0, 0]] * 2
    assert first_row(tiff((red + b"\x09") * 2, 2, [8] * 5, CMYK, extra=[0])) == [[255, 0, 0]] * 2


def test_alpha_that_varies_like_a_picture_is_noted():
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    assert decode_image(encoded(Image.fromarray(rgba), "TIFF")).info["notes"] == (ALPHA_NOTE,)
    rgba[:, :, 3] = 255 * (rgba[:, :, 3] > 128)
    assert decode_image(encoded(Image.fromarray(rgba), "TIFF")).info["notes"] == ()


@pytest.mark.parametrize("data", [
    tiff(bytes(24), 2, [32] * 3, RGB), tiff(bytes(24), 2, [32] * 3, RGB, sign=FLOAT),
    tiff(bytes(4), 2, [16], WHITE_IS_0, sign=SIGNED), tiff(bytes(8), 2, [32], WHITE_IS_0),
    tiff(bytes(8), 2, [32], BLACK_IS_0, ">"), tiff(bytes(3), 2, [12], WHITE_IS_0),
    tiff(bytes(10), 2, [8] * 5, RGB)])
def test_what_pillow_cannot_read_is_refused_with_a_remedy(data):
    with pytest.raises(UnreadableImage, match="pixels of a kind .* save it with 8 or 16 bits"):
        decode_image(data)
    with pytest.raises(UnreadableImage, match="floating-point pixels have no fixed range"):
        decode_image(tiff(bytes(8), 2, [32], BLACK_IS_0, sign=FLOAT))


@given(st.binary(max_size=12), st.integers(0, 170))
@settings(max_examples=60, deadline=None)
def test_damaged_big_endian_tiffs_are_unreadable_or_an_image(noise, at):
    data = tiff(numbers([0, 1, 2, 3], "u2", ">"), 4, [16], WHITE_IS_0, ">")
    try:
        assert decode_image(data[:at] + noise + data[at + len(noise):]).mode == "RGB"
    except UnreadableImage as error:
        assert str(error)


# Transparent colours of PNG


def png(width, depth, kind, row, key=None):
    """A PNG of one row, with a transparent colour (tRNS) where `key` has its numbers."""
    def chunk(name, data):
        return (struct.pack(">I", len(data)) + name + data
                + struct.pack(">I", zlib.crc32(name + data)))

    trns = b"" if key is None else chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0,
                                                              0, 0))
            + trns + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth, row, key, opaque, expected", [
    (1, b"\x50", 0, [0, 255, 0, 255], [9, 255, 9, 255]),
    (1, b"\x50", 1, [0, 255, 0, 255], [0, 9, 0, 9]),
    (2, b"\x1b", 2, [0, 85, 170, 255], [0, 85, 9, 255]),
    (2, b"\x1b", 4 + 1, [0, 85, 170, 255], [0, 9, 170, 255]),  # the lower bits alone count
    (4, b"\x0f\x37", 3, [0, 255, 51, 119], [0, 255, 9, 119]),
    (8, b"\x00\x01\x80\xff", 128, [0, 1, 128, 255], [0, 1, 9, 255]),
    (16, numbers([0, 128, 32768, 32769], "u2", ">"), 32768, [0, 0, 128, 128], [0, 0, 9, 128])])
def test_a_transparent_grey_of_every_depth(depth, row, key, opaque, expected):
    assert first_row(png(4, depth, 0, row)) == opaque
    assert first_row(png(4, depth, 0, row, [key]), background=(9, 9, 9)) == expected


def test_a_transparent_colour_of_8_and_16_bits():
    row = bytes([1, 2, 3, 1, 2, 4])
    nine = {"background": (9, 8, 7)}
    assert first_row(png(2, 8, 2, row, [1, 2, 3]), **nine) == [[9, 8, 7], [1, 2, 4]]
    # The last pixel differs from the transparent colour in one lower byte alone.  Of 16-bit colours
    # Pillow takes the upper bytes: 1000 is 3 * 256 + 232.
    wide = numbers([257, 1000, 65535, 257, 1000, 65534], "u2", ">")
    assert first_row(png(2, 16, 2, wide, [257, 1000, 65535]), **nine) == [[9, 8, 7], [1, 3, 255]]


# Colour profiles


def s15(value):
    return struct.pack(">i", round(value * 65536))


def profile(space, tags, kind=b"mntr"):
    """An ICC profile, version 2, of one's own making."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(body), b"\0\0\0\0", 0x02400000, kind, space,
                       pcs, b"acsp")
    head += bytes(28) + b"".join(map(s15, D50))
    return head.ljust(128, b"\0") + table + body


D50 = 0.9642, 1.0, 0.8249
XYZ = b"XYZ \0\0\0\0"
# Columns adapted to D50, as the profiles of these spaces have them.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061],
                 [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657],
                       [-0.00105, 0.04189, 0.78407]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322],
                      [0.01947, 0.06087, 0.74457]])
PROPHOTO = np.array([[0.79767, 0.13519, 0.03134], [0.28804, 0.71188, 0.00009],
                     [0.0, 0.0, 0.82491]])


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def rgb_profile(columns, power):
    tags = {name: XYZ + b"".join(map(s15, column)) for name, column in zip(
        (b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ"), [np.array(D50), *columns.T], strict=True)}
    return profile(b"RGB ", tags | {name: gamma(power) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(power):
    return profile(b"GRAY", {b"wtpt": XYZ + b"".join(map(s15, D50)), b"kTRC": gamma(power)})


def cmyk_profile():
    """A printer of one's own: L* = 100 (1 - K) without colour, whatever the other inks are."""
    corners = b"".join(bytes([0 if k else 255, 128, 128]) for _ in range(8) for k in (0, 1))
    table = bytes(range(256))
    lut = (b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(map(s15, np.eye(3).ravel()))
           + table * 4 + corners + table * 3)
    return profile(b"CMYK", {b"wtpt": XYZ + b"".join(map(s15, D50)), b"A2B0": lut}, b"prtr")


def srgb_of(linear):
    """sRGB's transfer function, IEC 61966-2-1, of linear values: 0 to 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


PATCHES = np.array([[[128, 128, 128], [200, 120, 90], [60, 140, 70], [90, 100, 180], [255] * 3,
                     [0] * 3, [230, 210, 40], [30, 30, 200]]], np.uint8)


@pytest.mark.parametrize("columns, power", [(DISPLAY_P3, 2.2), (ADOBE_RGB, 2.19921875),
                                            (PROPHOTO, 1.8)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_of_a_profile_become_srgb(columns, power, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(PATCHES), kind, icc_profile=rgb_profile(columns, power),
                   **options)
    expected = srgb_of((PATCHES / 255.0) ** power @ columns.T @ np.linalg.inv(SRGB).T)
    image = decode_image(data)
    assert np.abs(np.asarray(image) - expected).max() < 2.5
    assert np.abs(np.asarray(image).astype(int) - PATCHES).max() > 10  # it does change them
    assert image.info["notes"] == ()


def test_a_profile_counts_in_jpegs_palettes_and_beside_alpha():
    p3 = rgb_profile(DISPLAY_P3, 2.2)
    wanted = first_row(encoded(Image.new("RGB", (8, 8), (200, 60, 60)), icc_profile=p3))[0]
    assert wanted[0] > 205  # P3's red is stronger than sRGB's
    jpeg = encoded(Image.new("RGB", (64, 64), (200, 60, 60)), "JPEG", quality=100, icc_profile=p3)
    assert first_row(jpeg)[0] == pytest.approx(wanted, abs=3)
    assert first_row(jpeg, least=8)[0] == pytest.approx(wanted, abs=3)
    palette = Image.new("RGB", (8, 8), (200, 60, 60)).quantize(2)
    assert first_row(encoded(palette, icc_profile=p3))[0] == pytest.approx(wanted, abs=1)
    clear = Image.new("RGBA", (8, 8), (200, 60, 60, 0))
    clear.putpixel((0, 0), (200, 60, 60, 255))
    row = first_row(encoded(clear, icc_profile=p3), background=(1, 2, 3))
    assert row[:2] == [wanted, [1, 2, 3]]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile(mode):
    grey = grey_profile(1.0)  # linear: 55 / 255 is sRGB's middle grey, 128
    image = {"L": Image.new("L", (4, 4), 55), "LA": Image.new("LA", (4, 4), (55, 255)),
             "I;16": Image.fromarray(np.full((4, 4), 55 * 257, np.uint16))}[mode]
    assert first_row(encoded(image, icc_profile=grey))[0] == pytest.approx(128, abs=1)


def test_a_cmyk_profile():
    inks = Image.new("CMYK", (8, 8), (200, 10, 90, 0))
    assert first_row(encoded(inks, "TIFF", icc_profile=cmyk_profile()))[0] == pytest.approx(255,
                                                                                          abs=2)
    inks = Image.new("CMYK", (8, 8), (200, 10, 90, 128))  # L* 50 is Y 0.184, sRGB 119
    for kind in ("TIFF", "JPEG"):
        assert first_row(encoded(inks, kind, icc_profile=cmyk_profile()))[0] == pytest.approx(
            119, abs=4)


@pytest.mark.parametrize("own", [
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_srgb_changes_no_value(own):
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(noise),
                                                          icc_profile=own))), noise)


@pytest.mark.parametrize("mode, broken", [
    ("RGB", b"no profile"), ("RGB", rgb_profile(ADOBE_RGB, 2.2)[:200]),
    ("RGB", cmyk_profile()), ("RGB", grey_profile(2.2)), ("CMYK", rgb_profile(ADOBE_RGB, 2.2)),
    ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())])
def test_a_profile_that_cannot_be_used_is_noted(mode, broken):
    image = Image.new(mode, (4, 4), (10, 200, 30, 0)[:len(mode)])
    decoded = decode_image(encoded(image, "TIFF", icc_profile=broken))
    assert decoded.info["notes"] == (PROFILE_NOTE,)
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@given(st.binary(max_size=40), st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_damaged_profiles_still_give_an_image(noise, at):
    whole = rgb_profile(ADOBE_RGB, 2.2)
    data = encoded(Image.new("RGB", (2, 2)), "TIFF",
                   icc_profile=whole[:at] + noise + whole[at + len(noise):])
    assert decode_image(data).size == (2, 2)


# What counts as an image


def red_of(images):
    return {name: images.image(i).getpixel((0, 0))[0] for i, name in enumerate(images.names)}


@pytest.mark.parametrize("kind, name, feature", [("AVIF", "a.avif", "avif"),
                                                 ("JPEG2000", "a.jp2", "jpg_2000"),
                                                 ("JPEG2000", "a.j2k", "jpg_2000")])
def test_newer_formats_where_pillow_has_them(tmp_path, kind, name, feature):
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {kind}")
    data = encoded(Image.new("RGB", (16, 12), (200, 60, 60)), kind)
    write(tmp_path, {name: data, "other.jpg": data})
    for i in range(2):
        image = open_images(tmp_path)[0].image(i)
        assert image.size == (16, 12)
        assert image.getpixel((5, 5)) == pytest.approx((200, 60, 60), abs=4)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_jpeg_2000_of_16_bits():
    grey = Image.fromarray(np.full((16, 16), 32768, np.uint16))
    assert first_row(encoded(grey, "JPEG2000", irreversible=False))[0] == 128


FOREIGN = {"a.png": plain((1, 0, 0)), "b": plain((2, 0, 0)), "c.tmp": plain((3, 0, 0), kind="BMP"),
           "d/e.jpg-large": plain((4, 0, 0), kind="GIF"), "d/notes.md": b"BOM", "f.bin": b"",
           "b.txt": b"two", "g.csv": b"name"}


@pytest.mark.parametrize("kind", ["folder", "tar", "stored", "deflated"])
def test_any_ending_judges_by_content(tmp_path, kind, capsys):
    if kind == "folder":
        source = write(tmp_path / "i", FOREIGN)
    elif kind == "tar":
        source = write_tar(tmp_path / "i.tar", FOREIGN)
    else:
        source = tmp_path / "i.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_STORED if kind == "stored" else
                             zipfile.ZIP_DEFLATED) as archive:
            for name, data in FOREIGN.items():
                archive.writestr(name, data)
    assert open_images(source)[0].names == ["a.png"]
    assert "--any-ending looks into them" in capsys.readouterr().err
    images = open_images(source, reading=Reading(any_ending=True))[0]
    assert red_of(images) == {"a.png": 1, "b": 2, "c.tmp": 3, "d/e.jpg-large": 4}
    assert images.captions(1) == ["two"]
    assert "1 .md" in (told := capsys.readouterr().err) and "--any-ending" not in told


SAMPLES = {f"{key}.{ending}": plain((value, 0, 0)) for key in ("000", "001")
           for ending, value in (("seg.png", 1), ("jpg.png", 2), ("png", 3), ("mask.png", 4))}
DOTTED = {f"at 12.30.{i}.png": plain((i, 0, 0)) for i in range(3)}


def test_of_a_webdataset_sample_one_image_is_used(tmp_path, capsys):
    files = SAMPLES | {"000.txt": b"a text", "two.left.png": plain((7, 0, 0)),
                       "two.right.png": plain((8, 0, 0)), "two.json": b"{}"} | DOTTED
    source = write_tar(tmp_path / "i.tar", files)
    dots = {name: i for i, name in enumerate(DOTTED)}  # they have no file "at 12.png" or the like
    images = open_images(source)[0]
    assert red_of(images) == {"000.png": 3, "001.png": 3, "two.left.png": 7} | dots
    assert images.captions(0) == ["a text"]
    told = capsys.readouterr().err
    assert "as one image of each WebDataset sample is: 7, such as 000.jpg.png" in told
    assert "--sample-image jpg.png" in told
    masks = open_images(source, reading=Reading(sample_image="MASK.png"))[0]
    assert red_of(masks) == {"000.mask.png": 4, "001.mask.png": 4, "two.left.png": 7} | dots
    assert masks.captions(0) == ["a text"]
    assert len(open_images(write(tmp_path / "i", files))[0]) == len(files) - 2  # a folder is none


def test_members_that_are_no_images_never_decide_about_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr("a.png", plain((1, 0, 0)))
        for name in ("readme.md", "b.png", "b.txt"):
            archive.writestr(name, plain((2, 0, 0)), zipfile.ZIP_LZMA)
        for name in ("deep\\c.png", "__MACOSX\\._0.png", "deep\\", ".\\d.png"):
            archive.writestr(name, plain((3, 0, 0)))
    images = open_images(tmp_path / "i.zip")[0]
    assert images.names == ["a.png", "b.png", "d.png", "deep/c.png"]
    with pytest.raises(UnreadableImage, match="^b.png: encrypted or compressed by a rare method"):
        images.image(1)
    assert red_of(images.subset([0, 2, 3])) == {"a.png": 1, "d.png": 3, "deep/c.png": 3}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.zip", "a.tar", "a.tar.xz"])
def test_a_folder_of_archives_gets_a_hint(tmp_path, name):
    write(tmp_path, {name: b"x"})
    with pytest.raises(ValueError, match=r"it holds archives: give one, or several as"):
        open_images(tmp_path)


def test_what_is_deep_or_huge_is_one_sentence(tmp_path):
    write(tmp_path, {"a.png": plain("red"), "a.json": b"[" * 100_000, "a.txt": b"x" * 2**21})
    images = open_images(tmp_path)[0]
    with pytest.raises(ValueError, match="the .json beside a.png is not valid JSON"):
        images.labels(0)
    with pytest.raises(UnreadableImage, match="a.png: its text file has 2,097,152 bytes"):
        images.captions(0)
    write(tmp_path, {"d/" * 101 + "b.png": plain("red")})
    with pytest.raises(ValueError, match="101 folders deep, 100 are allowed"):
        open_images(tmp_path)


# Backgrounds and notes


def icon(colour=(255, 255, 255)):
    image = Image.new("RGBA", (8, 8), (*colour, 0))
    image.paste((*colour, 255), (2, 2, 6, 6))
    return encoded(image)


def test_a_background_shows_white_shapes(tmp_path):
    white = decode_image(icon())
    assert white.info["notes"] == (ONE_COLOUR_NOTE,) and white.getextrema() == ((255, 255),) * 3
    black = decode_image(icon(), background=(0, 0, 0))
    assert black.info["notes"] == () and black.getpixel((0, 0)) == (0, 0, 0)
    assert decode_image(plain("white")).info["notes"] == ()  # no transparency, so as it should be
    write(tmp_path, {"a.png": icon()})
    flags = [str(tmp_path), "out", "--clip", "c", "--vqgan", "v"]
    for added, colour in (([], (255,) * 3), (["--background", "#102030"], (16, 32, 48))):
        reading = parse_settings(EncodeSettings, flags + added, "").reading
        images = open_images(tmp_path, reading=reading)[0]
        assert images.image(0).getpixel((0, 0)) == colour
        assert (images.fingerprint() == open_images(tmp_path)[0].fingerprint()) == (not added)
    assert parse_settings(EncodeSettings, flags, "").reading == PLAIN
    for wrong in (["--background", "no colour"], ["--sample-image", "a/b"]):
        with pytest.raises(SystemExit):
            parse_settings(EncodeSettings, flags + wrong, "")


def read_all(images):
    for i in range(len(images)):
        images.image(i)


def test_notes_are_named_once_and_counted(tmp_path, capfd):
    broken = encoded(Image.new("RGB", (2, 2)), icc_profile=b"broken")
    write(tmp_path, {f"{i:02d}.png": broken for i in range(12)} | {"icon.png": icon()})
    images = open_images(tmp_path)[0]
    part = images.subset(range(1, len(images)))
    for _ in range(2):
        read_all(part)
    read_all(images)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"01.png: {PROFILE_NOTE}", f"10 images so far: {PROFILE_NOTE}",
                     f"icon.png: {ONE_COLOUR_NOTE}"]


def test_forked_workers_count_notes_together(tmp_path, capfd):
    write(tmp_path, {f"{i:02d}.png": icon() for i in range(12)})
    images = open_images(tmp_path)[0]
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        child = context.Process(target=read_all, args=(images,))
        child.start()
        child.join()
    assert capfd.readouterr().err.splitlines() == [
        f"00.png: {ONE_COLOUR_NOTE}", f"10 images so far: {ONE_COLOUR_NOTE}"]
    assert pickle.loads(pickle.dumps(images)).image(0).size == (8, 8)
