"""Reading images: every kind of source and of file, and what training sees of them."""

import json
import multiprocessing
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from clipgen.images import UnreadableImage, decode_image
from scripts.data import archives
from scripts.data.captions import read_captions
from scripts.data.dataset import open_parts, refuse_inside
from scripts.data.images import ENDINGS, draw, split
from scripts.data.presets import open_images
from scripts.data.transforms import ViewDataset, all_views, batches, centre_view, order, random_view
from tests.made_files import encoded, plain, write, write_tar, write_zip


def colours(images):
    return {images.names[i]: images.image(i).getpixel((0, 0)) for i in range(len(images))}


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FILES = {
    "a/red.png": plain("red"),
    "a/red.txt": b"\xef\xbb\xbfa red one \n\n  another\n",
    "a/red.json": b'{"kind": "red"}',
    "a/b/c/Blue.PNG": plain("blue"),
    "green.png": plain("lime"),
    "green.jpg": plain("red", kind="JPEG"),
    "green.txt": b"two images of one caption",
    "key.part.webp": plain("blue", kind="WEBP"),
    "key.txt": b"by the first dot",
    ".hidden.png": b"x",
    "__MACOSX/a/._red.png": b"x",
    ".folder/x.png": b"x",
    "notes.md": b"x",
}
NAMES = ["a/b/c/Blue.PNG", "a/red.png", "green.jpg", "green.png", "key.part.webp"]


@pytest.fixture(params=["folder", "tar", "dotted tar", "stored zip", "deflated zip"])
def source(request, tmp_path):
    if request.param == "folder":
        return write(tmp_path / "files", FILES)
    if request.param.endswith("tar"):
        prefix = "./" if request.param.startswith("dotted") else ""
        return write_tar(tmp_path / "i.tar", {prefix + k: v for k, v in FILES.items()})
    stored = request.param.startswith("stored")
    return write_zip(tmp_path / "i.zip", FILES,
                     zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)


def test_every_source_holds_the_same_images_captions_and_labels(source):
    images, validation = open_images(source)
    # In a tar green.png and green.jpg are one WebDataset sample, of which one image is used.
    names = [name for name in NAMES if source.suffix != ".tar" or name != "green.jpg"]
    assert validation is None and images.names == names and len(images) == len(names)
    assert colours(images)["a/red.png"] == RED and colours(images)["green.png"] == GREEN
    assert colours(images)["a/b/c/Blue.PNG"] == BLUE
    assert {name: images.captions(i) for i, name in enumerate(names)} == {
        name: {"a/red.png": ["a red one", "another"], "a/b/c/Blue.PNG": [],
               "key.part.webp": ["by the first dot"]}.get(name, ["two images of one caption"])
        for name in names}
    assert [images.labels(i) for i in range(3)] == [{}, {"kind": "red"}, {}]


def test_subset_pickle_and_fingerprint(source):
    images = open_images(source)[0]
    images.image(0)  # an archive is open now
    copy = pickle.loads(pickle.dumps(images))
    assert colours(copy) == colours(images) and copy.fingerprint() == images.fingerprint()
    part = images.subset([images.names.index("green.png"), 1])
    assert part.names == ["green.png", "a/red.png"] and part.labels(1) == {"kind": "red"}
    assert part.image(0).getpixel((0, 0)) == GREEN
    assert part.fingerprint() != images.fingerprint()


def test_fingerprints_see_names_and_sizes(tmp_path):
    write(tmp_path, {"a.png": plain("red"), "b.png": plain("red")})
    first = open_images(tmp_path)[0].fingerprint()
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    second = open_images(tmp_path)[0].fingerprint()
    (tmp_path / "c.png").write_bytes(plain("red") + b" ")
    assert len({first, second, open_images(tmp_path)[0].fingerprint()}) == 3


def read_in_child(images, queue):
    queue.put(colours(images))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_images_travel_to_other_processes(tmp_path, method):
    images = open_images(write_tar(tmp_path / "i.tar", FILES))[0]
    images.image(0)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(images, queue))
    child.start()
    assert queue.get(timeout=60) == colours(images)
    child.join()


def test_more_archives_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_OPEN", 2)
    for i in range(10):
        write_tar(tmp_path / f"{i}.tar", {"x.png": plain((i, 0, 0))})
    images = open_images(f"{tmp_path}/{{0..9}}.tar")[0]  # more than 8: listed by several processes
    for _ in range(2):
        assert [images.image(i).getpixel((0, 0))[0] for i in range(10)] == list(range(10))


# Sources


def test_shards_by_brace_pattern(tmp_path):
    for n in range(3):
        write_tar(tmp_path / f"{n:02d}.tar", {f"{n}.jpg": plain("red"), f"{n}.txt": b"red",
                                              "same.png": plain("red")})
    images = open_images(f"{tmp_path}/{{00..02}}.tar")[0]
    assert images.names == ["00.tar/0.jpg", "00.tar/same.png", "01.tar/1.jpg", "01.tar/same.png",
                            "02.tar/2.jpg", "02.tar/same.png"]
    assert images.captions(4) == ["red"] and images.captions(1) == []
    with pytest.raises(ValueError, match=r"2 of the 5 shards .* do not exist, the first is .*03"):
        open_images(f"{tmp_path}/{{00..04}}.tar")
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "00.tar", {"x.png": plain("red")})
    names = open_images(f"{tmp_path}/{{00,more/00}}.tar")[0].names
    assert names == ["00.tar/0.jpg", "00.tar/same.png", "more/00.tar/x.png"]


def captions_json(*names):
    return json.dumps({
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "caption": f"{name} {k}\n"} for k in range(2)
                        for i, name in enumerate(names)]})


def test_coco(tmp_path):
    files = {"train2017/1.jpg": plain("red"), "val2017/2.jpg": plain("blue"),
             "annotations/captions_train2017.json": captions_json("1.jpg", "9.jpg"),
             "annotations/captions_val2017.json": captions_json("2.jpg")}
    write(tmp_path, files)
    images, validation = open_images(f"coco:{tmp_path}")
    assert (images.names, validation.names) == (["1.jpg"], ["2.jpg"])
    assert images.captions(0) == ["1.jpg 0", "1.jpg 1"] and validation.captions(0)[0] == "2.jpg 0"
    (tmp_path / "annotations/captions_val2017.json").unlink()
    with pytest.raises(ValueError, match=r"captions_val2017.json, which does not exist: .*val2017"):
        open_images(f"coco:{tmp_path}")
    with pytest.raises(ValueError, match="/none, which does not exist"):
        open_images(f"coco:{tmp_path}/none")


def test_imagenet(tmp_path):
    write(tmp_path, {"train/n01/a.JPEG": plain("red"), "val/b.JPEG": plain("red")})
    images, validation = open_images(f"imagenet:{tmp_path}")
    assert (images.names, validation.names) == (["n01/a.JPEG"], ["b.JPEG"])
    (tmp_path / "val/b.JPEG").unlink()
    with pytest.raises(ValueError, match="val holds no image"):
        open_images(f"imagenet:{tmp_path}")
    (tmp_path / "val").rmdir()
    with pytest.raises(ValueError, match=r"needs .*val, which does not exist: .*train/CLASS"):
        open_images(f"imagenet:{tmp_path}")


def test_googlecc(tmp_path):
    pair = {"0.jpg": plain("red"), "0.txt": b"red", "0.json": b'{"url": "x"}'}
    with pytest.raises(ValueError, match="no .tar in"):
        open_images(f"googlecc:{tmp_path}")
    write_tar(tmp_path / "00000.tar", pair)
    images, validation = open_images(f"googlecc:{tmp_path}")
    assert images.names == ["00000.tar/0.jpg"] and validation is None
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        write_tar(tmp_path / part / "00000.tar", pair)
    images, validation = open_images(f"googlecc:{tmp_path}")
    assert images.captions(0) == validation.captions(0) == ["red"]


def test_sources_that_cannot_be_opened(tmp_path):
    write(tmp_path, {"x.png": plain("red"), "empty": b"", "docs/x.md": b"x"})
    write_tar(tmp_path / "shards.tar", {})
    for name, message in (("none", "does not exist"), ("x.png", "no folder, zip or tar"),
                          ("empty", "no folder, zip or tar"), ("docs", "holds no image"),
                          ("shards.tar", "holds no image")):
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / name)
    (tmp_path / "docs" / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds archives: .*\{0000..0099\}.tar"):
        open_images(tmp_path / "docs")
    with tarfile.open(tmp_path / "i.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x.png")
    with pytest.raises(ValueError, match="run `gunzip --keep"):
        open_images(tmp_path / "i.tar.gz")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    write(tmp_path, {"x.png": plain("red"), "in/y.png": plain("red")})

    def scandir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\)"):
        open_images(tmp_path)


def test_links_are_followed_without_loops_or_repeats(tmp_path):
    root = write(tmp_path / "root", {"in/a.png": plain("red")})
    write(tmp_path / "out", {"b.png": plain("red")})
    (root / "in" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "in")
    (root / "out").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(root)
    (root / "c.png").symlink_to(root / "in" / "a.png")
    (root / "dangling.png").symlink_to(root / "none")
    (root / "self.png").symlink_to(root / "self.png")
    os.mkfifo(root / "pipe.png")  # reading it would wait for ever
    images = open_images(root)[0]
    assert images.names == ["c.png", "dangling.png", "in/a.png", "out/b.png", "self.png"]
    with pytest.raises(UnreadableImage, match="dangling.png: No such file"):
        images.image(1)


def test_what_archives_may_hold_is_harmless(tmp_path):
    evil = {"../../evil.png": plain("red"), "/etc/evil.png": plain("blue"),
            "x.png": b"old", "./x.png": plain("lime")}
    with tarfile.open(write_tar(tmp_path / "i.tar", evil), "a") as archive:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE),
                           ("device.png", tarfile.CHRTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    write_zip(tmp_path / "i.zip", evil)
    with zipfile.ZipFile(tmp_path / "i.zip", "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    before = sorted(tmp_path.rglob("*"))
    for name in ("i.tar", "i.zip"):
        assert colours(open_images(tmp_path / name)[0]) == {
            "../../evil.png": RED, "etc/evil.png": BLUE, "x.png": GREEN}
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_archives(tmp_path, capfd):
    files = {f"{i}.png": encoded(Image.effect_noise((64, 64), 50)) for i in range(4)}
    data = write_tar(tmp_path / "whole.tar", files).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        _, second, third, _ = (member.offset for member in archive)
    for cut in (third + 100, third - 1000):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        images = open_images(tmp_path / "cut.tar")[0]
        assert images.names == ["0.png", "1.png"] and images.image(0).size == (64, 64)
        assert "cut.tar is damaged or cut short: only its first 2" in capfd.readouterr().err
    with pytest.raises(UnreadableImage, match="1.png: the archive is cut short"):
        images.image(1)
    (tmp_path / "bad.tar").write_bytes(data[:second] + b"?" * 512 + data[second + 512:])
    assert open_images(tmp_path / "bad.tar")[0].names == ["0.png"]
    assert "only its first 1 files" in capfd.readouterr().err
    images = open_images(tmp_path / "whole.tar")[0]
    (tmp_path / "whole.tar").write_bytes(data[:700])  # after it was opened
    with pytest.raises(UnreadableImage, match="3.png: the archive is cut short"):
        images.image(3)
    zipped = bytearray(write_zip(tmp_path / "i.zip", files).read_bytes())
    images = open_images(tmp_path / "i.zip")[0]
    zipped[40:200] = b"\xff" * 160
    (tmp_path / "i.zip").write_bytes(zipped)
    with pytest.raises(UnreadableImage, match="0.png: "):
        images.image(0)
    (tmp_path / "i.zip").write_bytes(zipped[:-30])
    with pytest.raises(ValueError, match="no folder, zip or tar"):
        open_images(tmp_path / "i.zip")


def test_zips_that_need_unpacking(tmp_path):
    write_zip(tmp_path / "i.zip", {"x.png": plain("red")}, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="x.png and all .* by a rare method: unpack the zip"):
        open_images(tmp_path / "i.zip")


def test_files_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 20)
    write(tmp_path, {"x.png": plain("red")})
    with pytest.raises(UnreadableImage, match="bytes are too many"):
        open_images(tmp_path)[0].image(0)


def test_names_that_are_not_utf8(tmp_path, capfd):
    root = write(tmp_path / "files", {os.fsdecode(b"\xff\xfe.png"): plain("red"), "a.png": b"x"})
    write_tar(tmp_path / "i.tar", {os.fsdecode(b"\xff.png"): plain("red"), "a.png": b"x"})
    for source in (root, tmp_path / "i.tar"):
        images = open_images(source)[0]
        assert len(images) == 2 and len(images.fingerprint()) == 64
        assert images.image(1).getpixel((0, 0)) == RED
        assert len(split(images, 0.5)[0]) == 1
        assert json.loads(json.dumps(images.names)) == images.names
        pickle.loads(pickle.dumps(images)).image(1)


# Captions


def test_captions_by_name(tmp_path, capsys):
    root = write(tmp_path / "i", {"a.png": plain("red"), "b/c.jpg": plain("red"),
                                  "b/c.txt": "not used", "d.png": plain("red")})
    table = tmp_path / "c.tsv"
    table.write_text("a.png\tone\na.png\ttwo\tthree\nb/c\t four \n\nnone.png\tx\n")
    images, _ = open_images(root, table)
    assert [images.captions(i) for i in range(3)] == [["one", "two\tthree"], ["four"], []]
    assert images.subset([1]).captions(0) == ["four"]
    assert "1 of 3 names match no image, such as none.png" in capsys.readouterr().err
    coco = tmp_path / "c.json"
    coco.write_text(captions_json("b/c.jpg"))
    assert open_images(root, coco)[0].captions(1) == ["b/c.jpg 0", "b/c.jpg 1"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, content, message", [
    ("c.tsv", "a.png one\n", r"line 1 is not NAME<TAB>caption: 'a.png one'"),
    ("c.tsv", "", "holds no caption"),
    ("c.tsv", "other.png\tx", "none of the 1 names .* is that of an image such as a.png"),
    ("c.json", "[]", "no COCO captions file"),
    ("c.json", "{", "no COCO captions file"),
    ("c.json", "[" * 100_000, "no COCO captions file"),
    ("c.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "no COCO"),
])
def test_captions_that_cannot_be_used(tmp_path, name, content, message):
    write(tmp_path / "i", {"a.png": plain("red")})
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "i", tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_captions(tmp_path / "none.tsv")


def test_labels_that_are_no_json(tmp_path):
    write(tmp_path, {"a.png": plain("red"), "a.json": "{", "b.png": plain("red"), "b.json": "3"})
    images = open_images(tmp_path)[0]
    with pytest.raises(ValueError, match="the .json beside a.png is not valid"):
        images.labels(0)
    assert images.labels(1) == {"label": 3}


# Decoding


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 128, (128, 128, 128)), ("1", 1, WHITE), ("P", None, RED),
    ("RGBA", (0, 0, 0, 0), WHITE), ("RGBA", (255, 0, 0, 255), RED),
    ("RGBA", (0, 0, 0, 128), (127, 127, 127)), ("LA", (0, 0), WHITE), ("LA", (9, 255), (9, 9, 9)),
])
def test_modes_of_png(mode, colour, expected):
    image = (Image.new("RGB", (5, 5), "red").convert("P") if mode == "P"
             else Image.new(mode, (5, 5), colour))
    result = decode_image(encoded(image))
    assert result.mode == "RGB" and result.getpixel((2, 2)) == expected


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_with_transparency_lie_on_white(kind):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    result = decode_image(encoded(image, kind, transparency=0))
    assert result.getpixel((0, 0)) == WHITE and result.getpixel((3, 3)) == RED


def png(width, height, depth, colour_type, rows):
    """A PNG of one's own making: `rows` are the filtered bytes."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def test_16_bits_are_scaled_not_clipped():
    values = np.array([[0, 128, 1000, 32768, 65535]], ">u2")
    grey = decode_image(png(5, 1, 16, 0, b"\0" + values.tobytes()))
    assert [grey.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 4, 128, 255]
    colour = np.array([[65535, 32768, 0]], ">u2")
    assert decode_image(png(1, 1, 16, 2, b"\0" + colour.tobytes())).getpixel((0, 0)) == (255, 128,
                                                                                        0)
    with pytest.raises(UnreadableImage, match="floating-point"):
        decode_image(encoded(Image.new("F", (2, 2)), "TIFF"))


@pytest.mark.parametrize("kind, options", [("JPEG", {}), ("WEBP", {"lossless": True}), ("BMP", {}),
                                           ("TIFF", {}), ("GIF", {})])
def test_formats(kind, options):
    data = plain("white", (9, 7), kind) if not options else encoded(
        Image.new("RGB", (9, 7), "white"), kind, **options)
    image = decode_image(data)
    assert image.size == (9, 7) and image.getpixel((4, 4)) == WHITE


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert decode_image(data).getpixel((0, 0)) == pytest.approx(RED, abs=2)


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red, in Adobe's inverted form on disk
    assert decode_image(encoded(image, "JPEG", quality=100)).getpixel((8, 8)) == pytest.approx(
        RED, abs=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("least", [None, 8])
def test_exif_rotation(orientation, least):
    upright = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 47, 31), "red")
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose back to what is stored
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded(stored, "JPEG", exif=exif, quality=95), least)
    assert image.width * 2 == image.height * 3 and (image.width < 96) == bool(least)
    w, h = image.size
    for x, y, colour in ((0.2, 0.2, RED), (0.8, 0.2, WHITE), (0.2, 0.8, WHITE), (0.8, 0.8, WHITE)):
        assert image.getpixel((int(x * w), int(y * h))) == pytest.approx(colour, abs=8)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_a_smaller_jpeg_is_not_too_small(width, height, least):
    data = plain("red", (width, height), "JPEG")
    image = decode_image(data, least)
    assert min(image.size) >= min(least, width, height)
    assert decode_image(data).size == (width, height)


def test_unreadable_files_have_a_reason():
    noise = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    for data, reason in ((b"", "the file is empty"), (b"no image", "no image of a known format"),
                         (noise[:len(noise) // 2], "truncated"), (plain("red")[:50], "truncated"),
                         (png(14_000, 12_800, 8, 2, b""), "exceeds limit of 178956970 pixels"),
                         (png(0, 5, 8, 2, b""), "no image of a known format")):
        with pytest.raises(UnreadableImage, match=reason):
            decode_image(data)


def test_large_images_are_read_without_a_warning_or_a_changed_setting():
    limit = Image.MAX_IMAGE_PIXELS
    data = encoded(Image.new("L", (10_000, 10_000), 200), "JPEG")
    with warnings.catch_warnings(action="error"):
        image = decode_image(data, 64)
        assert 64 <= min(image.size) <= 1250
        assert (centre_view(image, 64) == 200).all()
        assert decode_image(encoded(Image.new("1", (10_000, 10_000)))).size == (10_000, 10_000)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_what_is_not_used_is_counted(tmp_path, capsys):
    files = {"a.jfif": plain("red", kind="JPEG"), "a.txt": "red", "b.PNG": plain("blue"),
             "c.heic": b"", "d/e.HEIC": b"", "f.zip": b"", "README": b"", ".hidden": b""}
    assert open_images(write(tmp_path, files))[0].names == ["a.jfif", "b.PNG"]
    assert open_images(tmp_path)[0].names == ["a.jfif", "b.PNG"]
    line, = capsys.readouterr().err.splitlines()  # not twice
    assert line.startswith(f"{tmp_path}: not used")
    assert line.partition(": 2 .heic, ")[2].partition(";")[0] in (
        "1 .zip, 1 without an ending", "1 without an ending, 1 .zip")


def test_captions_can_always_be_written_again(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"a.png\tcaf\xe9\n")
    (tmp_path / "a.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "caption": "caf\udce9"}]}))
    for name in ("a.tsv", "a.json"):
        assert read_captions(tmp_path / name) == {"a.png": ["caf?"]}


@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
       st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_damage_is_unreadable_or_an_image(noise, kind, at):
    data = plain("red", (16, 16), kind)
    try:
        assert decode_image(data[:at] + noise + data[at + len(noise):]).mode == "RGB"
    except UnreadableImage as error:
        assert "0x" not in str(error)


# Splits


@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(1, 30), st.randoms())
@settings(max_examples=50, deadline=None)
def test_a_split_is_a_partition_that_depends_on_names_alone(small_images, count, share, most, rng):
    images = small_images.subset(range(count))
    rest, held = split(images, share, most)
    assert sorted(rest.names + held.names) == images.names
    assert len(held) == max(1, min(round(share * count), most, count - 1))
    indices = list(range(count))
    rng.shuffle(indices)
    assert set(split(images.subset(indices), share, most)[1].names) == set(held.names)


@pytest.fixture(scope="module")
def small_images(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return open_images(write(root, {f"{i:02d}.png": plain((i, 0, 0)) for i in range(60)}))[0]


def test_splits_that_cannot_be(small_images):
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {share}"):
            split(small_images, share)
    with pytest.raises(ValueError, match="1 image cannot be split"):
        split(small_images.subset([0]), 0.5)
    assert draw(small_images, 99).names == small_images.names
    assert len(draw(small_images, 7)) == 7


def test_the_first_of_those_held_out_stand_for_all(tmp_path):
    root = write(tmp_path, {f"{i:02d}/{j}.png": plain("red") for i in range(20) for j in range(9)})
    for validation in (None, root):
        held = open_parts(root, validation, 0.5)[1]
        assert len({name.partition("/")[0] for name in held.names[:40]}) > 10


def test_directories_among_the_images_are_refused(tmp_path):
    refuse_inside(tmp_path, run=tmp_path.parent)
    refuse_inside("scenes:9", run=tmp_path)
    for inside in (tmp_path, tmp_path / "a" / ".." / "b"):
        with pytest.raises(ValueError, match=f"--run {inside} lies in the folder of the images"):
            refuse_inside(tmp_path, run=inside)


# Views


def test_a_centre_view_is_the_centre_square():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 10))
    view = centre_view(image, 10)
    assert view.shape == (3, 10, 10) and view.dtype == torch.uint8
    assert (view == torch.tensor(RED)[:, None, None]).all()
    pixels = torch.randint(256, (6, 6, 3), dtype=torch.uint8)
    assert torch.equal(centre_view(Image.fromarray(pixels.numpy()), 6), pixels.permute(2, 0, 1))


def test_views_of_extreme_sizes():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 5000), (3000, 1), (4000, 3999)):
        image = Image.new("RGB", size, (10, 20, 30))
        for view in (centre_view(image, 16), random_view(image, 16, rng, scale=0.1)):
            assert (view == torch.tensor([10, 20, 30])[:, None, None]).all()
    # A checkerboard becomes grey, not a moiré: the reduction looks at every pixel.
    board = Image.fromarray((np.indices((1000, 1000)).sum(0) % 2 * 255).astype(np.uint8))
    assert (centre_view(board.convert("RGB"), 10).float() - 127.5).abs().max() < 3


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.floats(0.05, 1),
       st.booleans(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_random_views_are_squares_of_the_image(width, height, size, scale, flip, seed):
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    image = Image.fromarray(np.stack([x] * 3, -1).astype(np.uint8))
    views = [random_view(image, size, np.random.default_rng(seed), scale, flip) for _ in range(2)]
    assert torch.equal(*views) and views[0].shape == (3, size, size)
    rises = (views[0][0, 0].int().diff() >= -2).all()
    assert rises or flip


def test_without_scale_and_flip_a_square_image_stays_as_it_is(small_images):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    rng = np.random.default_rng(1)
    view = random_view(image, 8, rng, scale=1.0, flip=False)
    assert torch.equal(view, centre_view(image, 8))
    both = {tuple(random_view(image, 8, rng, scale=1.0).flatten().tolist()) for _ in range(20)}
    assert both == {tuple(v.flatten().tolist()) for v in (view, view.flip(2))}
    with pytest.raises(ValueError, match="got 1.5"):
        ViewDataset(small_images, 8, scale=1.5)


@given(st.integers(1, 50), st.integers(0, 300), st.integers(1, 200), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_order_is_one_permutation_after_another(count, position, length, seed):
    whole = order(count, 0, (position + length) // count * count + count, seed)
    assert torch.equal(order(count, position, length, seed), whole[position:position + length])
    for epoch in whole.view(-1, count):
        assert epoch.sort().values.tolist() == list(range(count))
    if count > 20:
        assert not torch.equal(order(count, 0, count, seed), order(count, 0, count, seed + 1))
        assert not torch.equal(order(count, 0, count, seed), order(count, count, count, seed))


@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 5), st.integers(0, 100),
       st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_what_belongs_together_stays_together_in_order(together, stretches, rest, position, length,
                                                       seed):
    count = stretches * together + rest % together
    used = stretches * together
    whole = order(count, 0, (position + length) // used * used + used, seed, together)
    assert torch.equal(order(count, position, length, seed, together),
                       whole[position:position + length])
    for epoch in whole.view(-1, used):
        assert epoch.sort().values.tolist() == list(range(used))
        for stretch in epoch.view(-1, together).tolist():
            assert stretch == list(range(stretch[0], stretch[0] + together))
            assert stretch[0] % together == 0


def collect(images, batch=4, **options):
    options = {"seed": 3, "first_step": 0, "steps": 6} | options
    return list(batches(images, 8, batch, **options))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True)
                                    for x, y in zip(p, q, strict=True))


@pytest.fixture(scope="module")
def mixed_images(tmp_path_factory):
    """13 noisy images, 3 of which cannot be read."""
    rng = np.random.default_rng(0)
    files = {f"{i:02d}.png": encoded(Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)))
             for i in range(13)}
    root = tmp_path_factory.mktemp("mixed")
    return open_images(write_tar(root / "i.tar", files | {
        "03.png": b"x", "04.png": b"", "12.png": files["12.png"][:99]}))[0]


def test_batches_are_a_function_of_seed_and_step(mixed_images):
    whole = collect(mixed_images)
    assert len(whole) == 6 and whole[0][1].shape == (4, 3, 8, 8)
    assert whole[0][0].dtype == torch.int64
    assert same(collect(mixed_images), whole)
    assert same(collect(mixed_images, first_step=4, steps=2), whole[4:])
    assert not same(collect(mixed_images, seed=4), whole)
    state = torch.random.get_rng_state()
    assert same(collect(mixed_images, workers=2), whole)
    assert torch.equal(state, torch.random.get_rng_state())


def test_two_ranks_see_together_what_one_sees(mixed_images):
    ranks = [collect(mixed_images, batch=2, rank=rank, world=2) for rank in range(2)]
    together = [tuple(torch.cat(parts) for parts in zip(*step, strict=True))
                for step in zip(*ranks, strict=True)]
    assert same(together, collect(mixed_images))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_named_once(mixed_images, capsys, workers):
    used = torch.cat([indices for indices, _ in collect(mixed_images, batch=13, workers=workers)])
    assert set(used.tolist()) == set(range(13)) - {3, 4, 12}
    error = capsys.readouterr().err
    assert [error.count(f"skipped {name}.png: ") for name in ("03", "04", "12")] == [1, 1, 1]
    views = list(all_views(mixed_images, 8, 5, workers))
    indices = torch.cat([i for i, _ in views])
    assert indices.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(torch.cat([p for _, p in views])[3],
                       centre_view(mixed_images.image(5), 8))
    error = capsys.readouterr().err
    assert [error.count(f"skipped {name}.png: ") for name in ("03", "04", "12")] == [1, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_one_sentence(mixed_images, workers):
    images = mixed_images.subset([3, 4])
    for read in (lambda: collect(images, workers=workers),
                 lambda: list(all_views(images, 8, 4, workers))):
        with pytest.raises(ValueError, match=r"^no image can be read: 0[34].png: [^\n]*$"):
            read()


def test_endings_are_those_that_pillow_knows():
    assert set(ENDINGS) <= set(Image.registered_extensions())
