"""The command on micro weights: files, lines, flags, and one sentence for each bad value."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

from clipgen import ClipGen, command, default_bundle, read_recipe, texts
from clipgen.bundle import SamplingDefaults
from clipgen.folder import Folder, free_name, named_by
from clipgen.progress import Progress
from clipgen.recipe import save_image
from clipgen.sheet import sheet
from tests.marks import NEEDS_INT8
from tests.micro import micro_bundle

ROOT = Path(__file__).parent.parent
MAGIC = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "webp": b"RIFF"}
TEXT = "a red apple on the beach"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return micro_bundle(tmp_path_factory.mktemp("weights"), null_embedding=True)


@pytest.fixture
def generate(weights, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; gives its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, text: str | None = TEXT) -> tuple[int, str, str]:
        texts = [] if text is None else [text]
        try:
            command.main(["--weights", str(weights), "--device", "cpu", *arguments, *texts])
            status = 0
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def files(folder: str | Path = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_writes_num_files_and_a_line_for_each(generate):
    status, output, errors = generate("--num", "3", "--candidates", "5", "--seed", "7")
    assert (status, errors) == (0, "")
    lines = [re.fullmatch(r"(out/a-red-apple-on-the-beach-seed-(\d+)\.png)  seed (\d+)  score "
                          r"(-?\d\.\d+)", line) for line in output.splitlines()]
    assert {line[1] for line in lines} == {f"out/{name}" for name in files()}
    assert all(line[2] == line[3] and 7 <= int(line[2]) < 12 for line in lines)
    scores = [float(line[4]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    for name in files():
        with Image.open(f"out/{name}") as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))


def test_four_images_by_default(generate):
    assert generate("--seed", "0")[0] == 0
    assert len(files()) == 4
    generate("--num", "12", "--candidates", "2", "--seed", "100")  # candidates are raised to 12
    assert len(files()) == 16


def test_nothing_that_is_there_is_ever_lost(generate):
    Path("out").mkdir()
    foreign = {"notes.txt": b"mine", "image-0-seed-1.png": b"mine",
               "a-red-apple-on-the-beach-seed-1.png": b"mine"}
    for name, content in foreign.items():
        Path("out", name).write_bytes(content)
    made = ("--num", "1", "--candidates", "1", "--seed", "1")
    assert generate(*made)[1].startswith("out/a-red-apple-on-the-beach-seed-1-2.png  seed 1 ")
    assert generate(*made)[1].startswith("out/a-red-apple-on-the-beach-seed-1-3.png  seed 1 ")
    assert generate(*made, text="another")[0] == 0
    left = files()
    assert {name: left[name] for name in foreign} == foreign and len(left) == 6
    assert generate(*made, "--force")[0] == 0
    assert len(files()) == 6 and files()["a-red-apple-on-the-beach-seed-1.png"] != b"mine"


@pytest.mark.parametrize("text, name", [
    ("A red, red apple!", "a-red-red-apple-seed-3.png"), ("苹果", "image-seed-3.png"),
    ("../../etc/passwd", "etc-passwd-seed-3.png"), ("x" * 500, "x" * 60 + "-seed-3.png"),
    ("a\0b\n", "a-b-seed-3.png")])
def test_names_are_safe(text, name):
    assert free_name(named_by(text, 3), "png", set()) == name


def test_pictures_steer_and_are_said_of(generate):
    Image.effect_noise((40, 40), 90).convert("RGB").save("noise.png")
    Image.new("RGB", (8, 8)).save("black.png")
    one = ("--num", "1", "--candidates", "1", "--seed", "2", "--force")
    assert generate(*one)[0] == 0
    (name, plain), = files().items()
    for arguments in (("--image", "noise.png"), ("--image", "noise.png", "--image-weight", "0.9"),
                      ("--init", "noise.png", "--keep", "0.5"),
                      ("--guidance", "3", "--negative", "a dog")):
        assert generate(*one, *arguments)[0] == 0
        assert files()[name] != plain, arguments
    assert read_recipe(Path("out") / name)["negative_text"] == "a dog"
    assert generate(*one, "--image", "noise.png", text=" ")[0] == 0
    assert read_recipe("out/image-seed-2.png")["text"] == " "
    assert generate(*one, "--no-metadata")[0] == 0
    with pytest.raises(ValueError, match="does not say how"):
        read_recipe(Path("out") / name)
    status, _, errors = generate(*one, "--init", "noise.png", "--mask", "black.png")
    assert status == 0 and errors.startswith("clipgen: nothing is drawn anew")
    status, _, errors = generate(*one, "--init", "noise.png")
    assert status == 2 and "init_image needs either mask" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("suffix", MAGIC)
def test_format(generate, suffix):
    assert generate("--num", "1", "--format", suffix)[0] == 0
    (name, content), = files().items()
    assert name.endswith(f".{suffix}") and content.startswith(MAGIC[suffix])


def test_the_same_seed_makes_the_same_files(generate):
    arguments = ("--num", "2", "--candidates", "4", "--seed", "2147483647")
    first = generate(*arguments, "--out", "a")[1]
    second = generate(*arguments, "--out", "b/c")[1]
    assert files("a") == files("b/c") and first.replace("a/", "b/c/") == second
    assert {int(seed) for seed in re.findall(r"seed (\d+)", first)} <= {2147483647, 0, 1, 2}
    assert generate("--seed", "5", "--num", "2", "--out", "d")[0] == 0
    assert set(files("a").values()) != set(files("d").values())


def test_each_image_is_made_again_from_its_own_seed(generate):
    generate("--num", "3", "--candidates", "6", "--seed", "40", "--out", "all")
    for path in Path("all").iterdir():
        seed = re.search(r"seed-(\d+)", path.name)[1]
        generate("--num", "1", "--candidates", "1", "--seed", seed, "--out", f"one-{seed}")
        assert list(files(f"one-{seed}").values()) == [path.read_bytes()]


def test_without_a_seed_every_run_differs(generate):
    seeds = {generate("--num", "1", "--candidates", "1")[1].split("seed ")[1] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("arguments", [
    ("--temperature", "0"), ("--temperature", "4"), ("--top-k", "1"), ("--top-p", "0.2"),
    ("--guidance", "3"), ("--dtype", "bfloat16"),
    pytest.param(("--dtype", "int8"), marks=NEEDS_INT8),
], ids=" ".join)
def test_each_setting_reaches_the_model(generate, arguments):
    plain = ("--num", "2", "--candidates", "2", "--seed", "1", "--temperature", "1", "--top-k", "0",
             "--top-p", "1", "--guidance", "1", "--dtype", "float32")
    assert generate(*plain)[0] == generate(*plain, *arguments, "--out", "set")[0] == 0
    if arguments[0] != "--dtype":  # which changes codes only now and then
        assert files() != files("set")


def test_settings_left_out_are_those_of_the_bundle(generate, tmp_path):
    own = micro_bundle(tmp_path / "own", null_embedding=True,
                       sampling=SamplingDefaults(temperature=0.7, top_k=9, top_p=0.8, guidance=2.0))
    for arguments in ((), ("--temperature", "0.7", "--top-k", "9", "--top-p", "0.8",
                           "--guidance", "2")):
        assert generate("--weights", str(own), "--seed", "3", *arguments,
                        "--out", f"n{len(arguments)}")[0] == 0
    assert files("n0") == files("n8")


BAD = [
    (("--num", "0"), "'0'"), (("--num", "-1"), "'-1'"), (("--num", "4.5"), "'4.5'"),
    (("--num", "many"), "'many'"), (("--num", ""), "''"), (("--num", "4097"), "4096"),
    (("--candidates", "0"), "'0'"), (("--seed", "-1"), "'-1'"), (("--seed", "1e3"), "'1e3'"),
    (("--seed", "2147483648"), "2147483647"), (("--temperature", "-0.1"), "'-0.1'"),
    (("--temperature", "nan"), "'nan'"), (("--temperature", "inf"), "'inf'"),
    (("--top-k", "-5"), "'-5'"), (("--top-k", "0.5"), "'0.5'"), (("--top-p", "1.01"), "'1.01'"),
    (("--top-p", "-1"), "'-1'"), (("--guidance", "0.5"), "'0.5'"), (("--guidance", "21"), "'21'"),
    (("--format", "gif"), "'gif'"), (("--dtype", "float8"), "'float8'"),
    (("--device", "tpu"), "'tpu'"), (("--device", "cuda:99"), "cuda:99"),
    (("--weights", "nowhere"), "nowhere"), (("--weights", "."), "config.json"),
    (("--out", "file"), "file"), (("--out", "file/below"), "file/below"),
    (("--unknown",), "--unknown"), (("--nu", "3"), "--nu"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_a_bad_value_is_one_sentence(generate, arguments, named):
    Path("file").touch()
    status, output, errors = generate(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("clipgen: ") and errors.count("\n") == 1 and named in errors
    assert "Traceback" not in errors
    assert not files() if Path("out").exists() else True


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_blank_text_is_refused(generate, text):
    status, _, errors = generate(text=text)
    assert status == 2 and "blank" in errors and errors.count("\n") == 1


def test_guidance_that_the_bundle_cannot_do(generate, tmp_path):
    bundle = micro_bundle(tmp_path / "unguided")
    status, _, errors = generate("--weights", str(bundle), "--guidance", "3")
    assert status == 2 and "guidance 3.0" in errors and errors.count("\n") == 1
    assert files() == {}


def test_warnings_are_a_line_each(generate, tmp_path):
    bundle = micro_bundle(tmp_path / "small", vocabulary=["a red apple on the beach"])
    status, output, errors = generate("--weights", str(bundle), text="a zebra " + "red apple " * 40)
    assert status == 0 and len(output.splitlines()) == 4
    lines = errors.splitlines()
    assert len(lines) == 2 and all(line.startswith("clipgen: ") for line in lines)
    assert any("zebra" in line for line in lines) and any("tokens" in line for line in lines)


def test_a_write_that_fails_leaves_the_earlier_images(generate, monkeypatch):
    assert generate("--num", "2", "--seed", "1")[0] == 0
    before, save, calls = files(), Image.Image.save, []

    def full(self, path, **options):
        calls.append(path)
        save(self, path, **options)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    status, _, errors = generate("--num", "3", "--seed", "9")
    assert status == 2 and "No space left on device" in errors and errors.count("\n") == 1
    assert files() == before


def test_two_runs_into_one_folder_take_turns(tmp_path):
    def writes(content, meanwhile=lambda: None):
        def save(path):
            path.write_bytes(content)
            meanwhile()

        return save

    def another():
        second.start()
        second.join(0.5)  # it waits, and must be waited for no longer

    second = threading.Thread(target=Folder(tmp_path).add, args=(
        [("a-2", "png", writes(b"2")), ("a-9", "png", writes(b"9"))],))
    paths = Folder(tmp_path).add([("a-1", "png", writes(b"1")),
                                  ("a-2", "png", writes(b"2", another))])
    second.join()
    assert [path.name for path in paths] == ["a-1.png", "a-2.png"]
    assert files(tmp_path) == {"a-1.png": b"1", "a-2.png": b"2", "a-2-2.png": b"2",
                               "a-9.png": b"9"}


@pytest.mark.parametrize("num, candidates, named", [(64, 16, "--num 64"),
                                                    (2, 32, "--candidates 32")])
def test_out_of_memory_names_the_number_that_counts(generate, monkeypatch, num, candidates, named):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("clipgen.ClipGen.generate", full)
    status, _, errors = generate("--num", f"{num}", "--candidates", f"{candidates}")
    assert status == 1 and f"out of memory with {named}: " in errors


# Several texts


def feed(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def texts_made() -> list[str]:
    """The texts that the files in out/ say."""
    return sorted(read_recipe(path)["text"] for path in Path("out").iterdir())


def test_texts_come_from_arguments_files_and_standard_input(generate, monkeypatch):
    Path("a.txt").write_bytes("\ufefftwo cats\r\n\r\n  a house \r\n".encode())
    feed(monkeypatch, b"on the moon\n\nnight")
    one = ("--num", "1", "--candidates", "1")
    status, output, errors = generate(*one, "-", "--texts", "a.txt", "a dog by the sea")
    assert (status, errors) == (0, "")
    expected = ["on the moon", "night", "a dog by the sea", TEXT, "two cats", "a house"]
    assert texts_made() == sorted(expected)
    names = [line.split("/")[1].split("-seed")[0] for line in output.splitlines()]
    assert names == [text.replace(" ", "-") for text in expected]


def test_each_text_of_several_makes_what_it_makes_alone(generate):
    texts = ("a dog", "two cats", "night")
    arguments = ("--num", "2", "--candidates", "5", "--seed", "3")
    assert generate(*arguments, *texts[:2], "--out", "all", text=texts[2])[0] == 0
    for text in texts:
        assert generate(*arguments, "--out", "alone", text=text)[0] == 0
    assert files("all") == files("alone") and len(files("all")) == 6


def test_the_model_is_loaded_once(generate, monkeypatch):
    calls, load = [], ClipGen.load
    monkeypatch.setattr(ClipGen, "load", lambda *a, **k: calls.append(a) or load(*a, **k))
    assert generate("--num", "1", "--candidates", "1", "a dog", "two cats", "a cow")[0] == 0
    assert len(calls) == 1 and len(files()) == 4


def test_forced_texts_of_one_name_do_not_replace_each_other(generate):
    one = ("--num", "1", "--candidates", "1", "--seed", "3", "--force")
    assert generate(*one, "a dog", text="a dog!")[0] == 0
    assert generate(*one, "a dog", text="a dog!")[0] == 0
    assert set(files()) == {"a-dog-seed-3.png", "a-dog-seed-3-2.png"}
    assert texts_made() == ["a dog", "a dog!"]


def test_a_text_behind_two_dashes_is_no_flag(generate):
    assert generate("--num", "1", "--", "--num", text="-")[0] == 2  # standard input is closed here
    assert generate("--num", "1", "--", "--num", text="-cat")[0] == 0
    assert texts_made() == ["--num", "-cat"]


@pytest.mark.parametrize("data, named", [
    (None, "texts.txt cannot be read (No such file or directory)"), (b"", "has no text in it"),
    (b" \n\t\r\n", "has no text in it"), (b"a\nb\n\xff\xfe", "line 3 of texts.txt is not UTF-8"),
    ("a cat".encode("utf-16"), "line 1 of texts.txt is not UTF-8"),
    (b"a cat\n" + b"\n" * 1_000_000, "has more than 1,000,000 bytes"),
    ("folder", "(Is a directory)"), (b"a cat\n" + b"x" * 1001, "has 1,001 characters"),
], ids=["missing", "empty", "blank", "latin", "utf-16", "large", "folder", "long"])
def test_a_file_of_texts_that_cannot_be_is_one_sentence(generate, data, named):
    if data == "folder":
        Path("texts.txt").mkdir()
    elif data is not None:
        Path("texts.txt").write_bytes(data)
    status, output, errors = generate("--texts", "texts.txt")
    assert (status, output) == (2, "") and named in errors and errors.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("arguments, named", [
    (("a dog", ""), "text 2 of 3 is blank"), (("--texts", "-", "-"), "'-' is given twice"),
    (("a", "red"), "'a' would be a text of its own: put the whole text in quotes"),
    (("x" * 1001,), "text 1 of 2 has 1,001 characters"),
    (("--negative", "x" * 1001, "--guidance", "3"), "the negative text has 1,001 characters")])
def test_texts_that_cannot_be_are_refused_before_anything_is_loaded(generate, arguments, named,
                                                                   monkeypatch):
    monkeypatch.setattr(ClipGen, "load", None)
    text = TEXT if len(arguments) != 2 or arguments[1] != "red" else "apple"
    status, output, errors = generate(*arguments, text=text)
    assert (status, output) == (2, "") and named in errors and errors.count("\n") == 1


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"),
                        max_size=20), max_size=9), st.sampled_from(["\n", "\r\n", "\r"]))
def test_a_file_of_texts_is_its_lines(lines, end):
    data, expected = end.join(lines).encode(), [line.strip() for line in lines if line.strip()]
    if expected and not lines[0].startswith("\ufeff"):
        assert texts.read_texts("-", io.BytesIO(data)) == expected
        assert texts.gather(["a cat", "-"], [], io.BytesIO(data)) == ["a cat", *expected]
    elif not expected:
        with pytest.raises(ValueError, match="standard input has no text in it"):
            texts.read_texts("-", io.BytesIO(data))


def test_words_that_no_text_had_are_said_before_anything_is_drawn(generate, tmp_path, monkeypatch):
    bundle = micro_bundle(tmp_path / "small", vocabulary=["a red apple on the beach"])

    def refuse(*_, **__):
        raise ValueError("drawing")

    monkeypatch.setattr(ClipGen, "generate", refuse)
    errors = generate("--weights", str(bundle), "a zebra", "an apple")[2].splitlines()
    assert errors[0].startswith("clipgen: text 1 of 3: this model never saw 'zebra'")
    assert errors[-1] == "clipgen: drawing"


def test_a_text_that_fails_leaves_the_files_of_those_before(generate, monkeypatch):
    draw = ClipGen.generate

    def fail(self, text, **settings):
        if text == "night":
            raise FloatingPointError("pixels that are not finite")
        return draw(self, text, **settings)

    monkeypatch.setattr(ClipGen, "generate", fail)
    status, output, errors = generate("--num", "2", "a dog", "night")
    assert status == 1 and errors == "clipgen: pixels that are not finite\n"
    assert len(output.splitlines()) == 2 and texts_made() == ["a dog", "a dog"]


# Made again


@pytest.mark.parametrize("suffix", MAGIC)
@pytest.mark.parametrize("settings", [
    (), ("--guidance", "3", "--negative", "a dog", "--top-k", "9", "--top-p", "0.8"),
    ("--temperature", "0.5", "--dtype", "bfloat16")], ids=["plain", "negative", "bfloat16"])
def test_again_makes_the_same_file_beside_the_first(generate, suffix, settings):
    assert generate("--num", "2", "--candidates", "3", "--format", suffix, *settings)[0] == 0
    first = files()
    for name, content in first.items():
        status, output, errors = generate("--again", f"out/{name}", text=None)
        assert (status, errors) == (0, "")
        copy = name.replace(f".{suffix}", f"-2.{suffix}")
        assert output.startswith(f"out/{copy}  seed ") and files()[copy] == content
    assert {name: files()[name] for name in first} == first  # never replaced


def test_again_wants_the_pictures_that_it_was_made_of(generate):
    for name in ("cat", "sea", "other"):
        Image.effect_noise((40, 30), 90).convert("RGB").save(f"{name}.png")
    Image.linear_gradient("L").save("mask.png")
    assert generate("--num", "1", "--image", "cat.png", "--image-weight", "0.7", "--init",
                    "sea.png", "--mask", "mask.png")[0] == 0
    (name, content), = files().items()
    again = ("--again", f"out/{name}")
    pictures = {"--image": "cat.png", "--init": "sea.png", "--mask": "mask.png"}
    for missing in pictures:
        rest = [word for flag, file in pictures.items() if flag != missing
                for word in (flag, file)]
        status, _, errors = generate(*again, *rest, text=None)
        assert status == 2 and errors.count("\n") == 1
        assert f"keeps the sha256 alone: give that picture with {missing}" in errors
        status, _, errors = generate(*again, *rest, missing, "other.png", text=None)
        assert status == 2 and f"{missing} names another picture" in errors
    assert len(files()) == 1
    every = [word for pair in pictures.items() for word in pair]
    assert generate(*again, *every, text=None)[0] == 0
    assert list(files().values()) == [content, content]
    assert generate("--num", "1", "--init", "sea.png", "--keep", "0.5", "--out", "kept")[0] == 0
    (name, content), = files("kept").items()
    kept = ("--again", f"kept/{name}", "--out", "kept")
    assert generate(*kept, "--init", "sea.png", text=None)[0] == 0
    assert list(files("kept").values()) == [content, content]
    status, _, errors = generate(*kept, "--init", "sea.png", "--image", "cat.png", text=None)
    assert status == 2 and "--image contradicts --again" in errors


def test_again_says_what_is_another_here(generate, tmp_path):
    other = micro_bundle(tmp_path / "other", seed=5, null_embedding=True)
    assert generate("--num", "1", "--seed", "4")[0] == 0
    (name, content), = files().items()
    again = ("--again", f"out/{name}")
    status, _, errors = generate(*again, "--weights", str(other), text=None)
    own, here = (read_recipe(path)["bundle"] for path in sorted(Path("out").iterdir())[::-1])
    assert status == 0 and errors.count("\n") == 1
    assert f"with the bundle '{own}' and this is '{here}'" in errors and own != here
    changed = read_recipe(f"out/{name}") | {"version": "0.0.9", "device": "tpu"}
    save_image(Image.new("RGB", (9, 9)), "changed.png", changed)
    status, _, errors = generate("--again", "changed.png", "--no-metadata", text=None)
    lines = errors.splitlines()
    assert status == 0 and len(lines) == 2
    assert "made by clipgen '0.0.9' and this is" in lines[0]
    assert "made on 'tpu' and this is cpu" in lines[1]


CONTRADICTIONS = [
    ("a text",), ("--texts", "x"), ("--num", "4"), ("--candidates", "16"), ("--seed", "4"),
    ("--temperature", "1"), ("--top-k", "0"), ("--top-p", "1"), ("--guidance", "1"),
    ("--dtype", "float32"), ("--image-weight", "0"), ("--negative", "x"), ("--keep", "0"),
    ("--force",)]


@pytest.mark.parametrize("arguments", CONTRADICTIONS, ids=" ".join)
def test_what_contradicts_again_is_refused_by_name(generate, arguments):
    status, output, errors = generate("--again", "x.png", *arguments, text=None)
    assert (status, output) == (2, "") and errors.count("\n") == 1
    assert f"leave {arguments[0]} out" in errors


@pytest.mark.parametrize("change, named", [
    (None, "x.png does not say how it was made"), ({"top_k": "nine"}, "top_k must be a whole"),
    ({"text": 5}, "x.png says 5 for text"), ({"dtype": "int4"}, "x.png says 'int4' for dtype"),
    ({"seed": -1}, "seed must be a whole number"), ({"device": []}, "x.png says [] for device"),
    ({"guidance": None, "temperature": "hot"}, "temperature must be a number"),
    ({"negative_text": 5}, "x.png says 5 for negative_text"),
    ({"text": " "}, "text must not be empty"), ({"keep": 0.5}, "keep needs init_image")])
def test_a_recipe_that_cannot_be_is_one_sentence(generate, change, named):
    recipe = {"text": "a", "seed": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
              "guidance": 1.0, "device": "cpu", "dtype": "float32", "bundle": "b", "version": "0"}
    save_image(Image.new("RGB", (9, 9)), "x.png", None if change is None else recipe | change)
    status, output, errors = generate("--again", "x.png", text=None)
    errors = [line for line in errors.splitlines() if "and this is" not in line]
    assert (status, output) == (2, "") and len(errors) == 1 and named in errors[0]


@pytest.mark.parametrize("name", ["text", "seed", "top_p", "device", "dtype", "version"])
def test_half_a_recipe_is_one_sentence(generate, name):
    assert generate("--num", "1")[0] == 0
    recipe = read_recipe(next(Path("out").iterdir()))
    del recipe[name]
    save_image(Image.new("RGB", (9, 9)), "x.png", recipe)
    status, _, errors = generate("--again", "x.png", text=None)
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("clipgen: x.png does not")


# The sheet of all images


def test_a_grid_holds_every_image_of_the_call_and_replaces_none(generate):
    arguments = ("--num", "2", "--candidates", "2", "--seed", "3", "--grid")
    status, output, _ = generate(*arguments, "a dog", "two cats")
    assert status == 0 and output.splitlines()[-1] == "out/grid.png  6 images"
    with Image.open("out/grid.png") as page:
        assert page.format == "PNG" and page.width == 2 * (128 + 8) + 8  # a row for each text
        assert page.height > 3 * 128
        cell = page.crop((8, 8, 136, 136)).resize((32, 32), Image.Resampling.BOX)
    first = output.split()[0]
    assert len(files()) == 7
    with Image.open(first) as image:
        difference = ImageStat.Stat(ImageChops.difference(cell, image)).mean
    assert max(difference) < 12  # scaled up and down again
    before = files()
    assert generate(*arguments, "--num", "1")[1].splitlines()[-1] == "out/grid-2.png  1 images"
    assert {name: files()[name] for name in before} == before
    assert generate("--grid", "--again", first, text=None)[1].endswith("out/grid-3.png  1 images\n")


@settings(deadline=None)
@given(st.lists(st.lists(st.text(st.characters(), max_size=30), max_size=60).map(" ".join),
                min_size=1, max_size=3))
@example(["many words " * 50])
def test_a_sheet_takes_every_text(labels):
    page = sheet([(label, Image.new("RGB", (8, 8))) for label in labels])
    assert page.width == len(labels) * (128 + 8) + 8 and page.height < 128 + 8 + 5 * 20


def test_a_grid_too_large_is_refused(generate):
    status, _, errors = generate("--grid", "--num", "300", "a dog")
    assert status == 2 and "--grid of 600 images is too large, it holds 500" in errors


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self) -> list[str]:
        """What stays to be read, line by line."""
        lines = []
        for line in self.getvalue().split("\n"):
            cells = []
            for part in line.split("\r"):
                cells[:len(part)] = part
            lines.append("".join(cells).rstrip())
        return lines


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 3), min_size=1, max_size=40))
def test_progress_is_for_what_takes_long_and_goes_away(seconds):
    now, terminal = [0.0], Terminal()
    bar, spent = Progress(terminal, lambda: now[0]), 0
    for i, step in enumerate(seconds):
        now[0] += step
        before = len(terminal.getvalue())
        share, spent = (i + 1) / len(seconds), spent + step
        bar.update(share, "drawing")
        if len(terminal.getvalue()) > before:
            line, = terminal.screen()
            told = re.fullmatch(r"clipgen: drawing, (\d+) %, (?:(\d+) s|(\d+):(\d\d) min) left",
                                line)
            assert int(told[1]) == int(100 * share) and spent / share >= 2
            left = int(told[2]) if told[2] else 60 * int(told[3]) + int(told[4])
            assert abs(left - (spent / share - spent)) < 1
    assert bool(terminal.getvalue()) or max(seconds) < 0.5 or sum(seconds) < 2
    bar.clear()
    assert terminal.screen() == [""]


def test_nothing_is_shown_on_a_pipe_or_for_what_is_quick():
    pipe, terminal, now = io.StringIO(), Terminal(), [0.0]
    bars = [Progress(stream, lambda: now[0]) for stream in (pipe, terminal)]
    now[0] = 60
    bars[0].update(0.1, "drawing")
    bars[1].began = 58.5
    bars[1].update(0.9, "drawing")
    assert pipe.getvalue() == terminal.getvalue() == ""


def test_a_terminal_sees_loading_progress_and_then_the_lines_alone(generate, monkeypatch, weights):
    terminal, clock = Terminal(), itertools.count(step=0.7)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("clipgen.command.Progress",
                        lambda stream: Progress(stream, lambda: next(clock)))
    assert generate("--num", "1", "--candidates", "20", "a dog")[0] == 0
    loading, *lines, last = terminal.screen()
    assert (loading, len(lines), last) == (f"clipgen: loading {weights}", 2, "")
    assert all(re.fullmatch(r"out/\S+  seed \d+  score \S+", line) for line in lines)
    shown = terminal.getvalue()
    shares = [int(share) for share in re.findall(r"text [12] of 2, (\d+) %, \d+ s left", shown)]
    assert len(shares) > 20 and shares == sorted(shares) and shares[-1] == 100
    assert shown.index("text 1 of 2") < shown.index("text 2 of 2")


# Flags


def test_every_flag_is_documented():
    document = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    for flag in command.make_parser().flags():
        assert f"`--{flag}" in document, flag


WORDS = [f"--{flag}" for flag in sorted(command.make_parser().flags())] + [
    "-", "--", "-n", "--num=3", "4", "0.5", "", " ", "a", "a cat", "x.png", "-h5", "\u2014num",
    "cpu", "float32", "png", "--=", "---", "-\u00e9", "--a cat", "=", "-1"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs", "Cc"]),
                                                 max_size=4), max_size=5))
def test_whatever_is_typed_gets_one_sentence(words):
    def load(*_):
        raise ValueError("loading")

    with (pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as errors,
          redirect_stdout(io.StringIO()) as output, tempfile.TemporaryDirectory() as folder):
        patch.setattr(command, "load", load)
        patch.chdir(folder)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a dog")))
        with pytest.raises(SystemExit) as stopped:
            command.main(words)
    if stopped.value.code == 0:  # --help or --version
        assert output.getvalue() and not errors.getvalue()
    else:
        assert stopped.value.code == 2 and not output.getvalue()
        assert re.fullmatch(r"clipgen: [^\n]+\n", errors.getvalue())


@pytest.mark.parametrize("arguments, meant", [
    (("-n", "3"), "--negative, --no-metadata or --num?"), (("-num", "3"), "--num?"),
    (("-s", "3"), "--seed?"), (("--nun=3",), "--num?"), (("--top_k", "3"), "--top-k?"),
    (("--SEED", "3"), "--seed?"), (("---out", "x"), "--out?"), (("-o", "x"), "--out?"),
    (("--number", "3"), "--num?"), (("--guidance-scale", "3"), "--guidance?"), (("-g3",), "--grid"),
    (("--output", "x"), "--out?"), (("--prompt", "x"), "put the text in quotes, without a flag"),
    (("--text", "x"), "put the text in quotes"), (("-p", "x"), "'-p' is no flag (--help lists"),
    (("\u2014num", "3"), "begins with a long dash: write --num"),
    (("\u2013seed=3",), "write --seed=3")], ids=lambda value: " ".join(value).strip())
def test_a_flag_that_is_none_is_answered_with_the_right_one(generate, arguments, meant):
    status, output, errors = generate(*arguments)
    assert (status, output) == (2, "") and meant in errors and errors.count("\n") == 1
    assert not Path("out").exists()


def test_dashes_within_texts_are_texts(generate):
    one = ("--num", "1", "--candidates", "1")
    assert generate(*one, "\u2014 a cat", "-5", text="- a dog -")[0] == 0
    assert texts_made() == ["- a dog -", "-5", "\u2014 a cat"]


# As a process, through the shell script: on a copy of the project's commands, with a .venv that
# is complete, and with a clipgen that needs no torch where torch is not the point.


@pytest.fixture
def project(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("generate", "environment.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    shutil.copytree(ROOT / "clipgen", tmp_path / "clipgen",
                    ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}\n"
    (tmp_path / ".venv" / "clipgen-serve").write_text(
        version + (ROOT / "requirements.txt").read_text())
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def start(project: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([project / "scripts" / "generate", *arguments],
                            cwd=project / "elsewhere", text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | environment)


def test_the_command_finds_its_parts_from_any_folder(project, weights):
    (project / "elsewhere" / "clipgen.py").write_text("raise SystemExit('shadowed')\n")
    (project / "weights").mkdir()
    (project / "weights" / "emoji").symlink_to(weights)
    process = start(project, "--num", "1", "--device", "cpu", TEXT)
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    name, = files(project / "elsewhere" / "out")
    assert output.startswith(f"out/{name}  seed ")


def test_weights_coco_comes_before_weights_emoji(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(default_bundle, "FOLDERS", (tmp_path / "package", tmp_path / "checkout"))
    with pytest.raises(SystemExit) as stopped:
        command.main(["--out", str(tmp_path / "out"), "x"])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1
    assert "no default bundle" in errors and "package or" in errors
    for found in ("checkout/emoji", "checkout/coco", "package/emoji", "package/coco"):
        (tmp_path / found).mkdir(parents=True)
        assert default_bundle.default_bundle() == tmp_path / found


def test_help_and_bad_values_need_no_torch(project):
    (project / "torch.py").write_text("raise SystemExit('imported')\n")
    process = start(project, "--help")
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    flags = ("texts num candidates seed temperature top-k top-p guidance weights device dtype out "
             "format force grid no-metadata again image image-weight negative init mask keep")
    assert all(f"  --{flag} " in output for flag in flags.split())
    process = start(project, "--num", "0", TEXT)
    assert "imported" not in process.communicate(timeout=600)[1] and process.returncode == 2


# In place of the pipeline, whose import takes seconds: images are bytes, made at once.
STUB = """
import pathlib, time
class NothingToDraw(UserWarning): pass
class Image:
    seed, score, image = 7, 0.5, None
    def __init__(self, text): self.text = text
    def save(self, path, metadata):
        path.write_text(self.text[:1])
        if self.text == "slow":
            pathlib.Path("now").touch()
            time.sleep(60)
        path.write_text(self.text)
class ClipGen:
    class bundle: fingerprint = ""
    class clip:
        class device: type = "cpu"
    @classmethod
    def load(cls, weights, *_):
        if weights.name == "slow":
            pathlib.Path("now").touch()
            time.sleep(60)
        return cls()
    def warn_of(self, text): pass
    def generate(self, text, **_): return [Image(text)]
"""


@pytest.fixture
def stubbed(project):
    (project / "torch.py").touch()
    (project / "clipgen" / "pipeline.py").write_text(STUB)
    return project


@pytest.mark.parametrize("arguments, left", [
    (("--weights", "slow", "a cat", "a dog"), {}),
    (("--weights", "w", "a cat", "a dog", "slow", "a cow"),
     {"a-cat-seed-7.png": b"a cat", "a-dog-seed-7.png": b"a dog"})], ids=["loading", "writing"])
def test_ctrl_c_ends_quietly_with_130_and_leaves_whole_files(stubbed, arguments, left):
    process = start(stubbed, *arguments)
    deadline = time.monotonic() + 600
    while not (stubbed / "elsewhere" / "now").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (130, "")
    assert output == "".join(f"out/{name}  seed 7  score 0.500\n" for name in left)
    assert files(stubbed / "elsewhere" / "out") == left


def test_a_reader_that_goes_away_ends_it_quietly(stubbed):
    process = start(stubbed, "--weights", "w", "a cat", "a dog")
    process.stdout.close()
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (141, "")
    assert set(files(stubbed / "elsewhere" / "out")) == {"a-cat-seed-7.png"}


def test_folders_whose_names_are_no_text_are_taken(stubbed):
    process = subprocess.run([stubbed / "scripts" / "generate", "--weights", "w", "--out",
                              b"\xff", "a cat"], cwd=stubbed / "elsewhere", capture_output=True,
                             timeout=600, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert process.stdout == b"\xff/a-cat-seed-7.png  seed 7  score 0.500\n", process.stderr


def test_texts_come_through_a_pipe_and_nothing_but_lines_goes_out(stubbed):
    process = subprocess.run([stubbed / "scripts" / "generate", "--weights", "w", "-"],
                             cwd=stubbed / "elsewhere", input="a cat\n\na dog\n", text=True,
                             capture_output=True, timeout=600)
    assert process.stdout.splitlines() == ["out/a-cat-seed-7.png  seed 7  score 0.500",
                                           "out/a-dog-seed-7.png  seed 7  score 0.500"]
    assert (process.returncode, process.stderr) == (0, "")
