"""scripts/generate on micro weights: files, lines, flags, and one sentence for each bad value."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from clipgen import read_recipe
from clipgen.bundle import SamplingDefaults
from scripts import generate_images
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

    def run(*arguments: str, text: str = TEXT) -> tuple[int, str, str]:
        try:
            generate_images.main(["--weights", str(weights), "--device", "cpu", *arguments, text])
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
    assert generate_images.free_name(text, 3, "png", set()) == name


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
    (("--unknown",), "--unknown"), (("--nu", "3"), "--nu"), (("second text",), "quotes"),
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
    class Slow:
        """An image; while it is saved another run wants to write."""

        def __init__(self, seed, meanwhile=lambda: None):
            self.seed, self.image, self.meanwhile = seed, self, meanwhile

        def save(self, path, metadata):
            Path(path).write_bytes(b"%d" % self.seed)
            self.meanwhile()

    def another():
        second.start()
        second.join(0.5)  # it waits, and must be waited for no longer

    args = SimpleNamespace(out=tmp_path, force=False, text="a", format="png", no_metadata=True)
    second = threading.Thread(target=generate_images.write, args=([Slow(2), Slow(9)], args))
    paths = generate_images.write([Slow(1), Slow(2, another)], args)
    second.join()
    assert [path.name for path in paths] == ["a-seed-1.png", "a-seed-2.png"]
    assert files(tmp_path) == {"a-seed-1.png": b"1", "a-seed-2.png": b"2", "a-seed-2-2.png": b"2",
                               "a-seed-9.png": b"9"}


@pytest.mark.parametrize("num, candidates, named", [(64, 16, "--num 64"),
                                                    (2, 32, "--candidates 32")])
def test_out_of_memory_names_the_number_that_counts(generate, monkeypatch, num, candidates, named):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("clipgen.ClipGen.generate", full)
    status, _, errors = generate("--num", f"{num}", "--candidates", f"{candidates}")
    assert status == 1 and f"out of memory with {named}: " in errors


# As a process, through the shell script: on a copy of the project's commands, with a .venv that
# is complete, and with a clipgen that needs no torch where torch is not the point.


@pytest.fixture
def project(tmp_path):
    for name in ("__init__.py", "generate", "generate_images.py", "environment.sh",
                 "training/__init__.py", "training/cli.py", "data/__init__.py",
                 "evaluation/__init__.py", "emoji/__init__.py"):
        (tmp_path / "scripts" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
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
    (project / "clipgen").symlink_to(ROOT / "clipgen")
    (project / "elsewhere" / "clipgen.py").write_text("raise SystemExit('shadowed')\n")
    (project / "weights").mkdir()
    (project / "weights" / "emoji").symlink_to(weights)
    process = start(project, "--num", "1", "--device", "cpu", TEXT)
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    name, = files(project / "elsewhere" / "out")
    assert output.startswith(f"out/{name}  seed ")


def test_weights_coco_comes_before_weights_emoji(monkeypatch, tmp_path):
    monkeypatch.setattr(generate_images, "WEIGHTS", tmp_path)
    assert generate_images.parse_arguments(["x"]).weights == tmp_path / "emoji"
    (tmp_path / "coco").mkdir()
    assert generate_images.parse_arguments(["x"]).weights == tmp_path / "coco"


def test_help_and_bad_values_need_no_torch(project):
    for module in ("torch", "clipgen"):
        (project / f"{module}.py").write_text("raise SystemExit('imported')\n")
    process = start(project, "--help")
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    flags = ("num candidates seed temperature top-k top-p guidance weights device dtype out format")
    assert all(f"--{flag} " in output for flag in flags.split())
    process = start(project, "--num", "0", TEXT)
    assert "imported" not in process.communicate(timeout=600)[1] and process.returncode == 2


def test_ctrl_c_ends_quietly_with_130(project):
    (project / "torch.py").touch()
    (project / "clipgen.py").write_text(
        "import pathlib, time\nNothingToDraw = TextTruncated = UnknownWords = UserWarning\n"
        "is_out_of_memory = None\n"
        "class ClipGen:\n    def load(*_, **__):\n"
        "        pathlib.Path('loading').touch()\n        time.sleep(60)\n")
    process = start(project, TEXT)
    deadline = time.monotonic() + 600
    while not (project / "elsewhere" / "loading").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600) == ("", "")
    assert process.returncode == 130
    assert files(project / "elsewhere" / "out") == {}
