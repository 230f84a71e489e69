"""scripts.train: one command from a folder of images to a bundle."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from clipgen import ClipGen
from scripts import train
from scripts.data.captions import shown
from scripts.data.images import Images, UnreadableImage
from scripts.data.presets import open_images
from scripts.data.reading import PLAIN, Reading
from scripts.training.cli import duration
from scripts.training.plan import new_sizes
from scripts.training.stages import Stages
from scripts.training.vqgan import VQGANSettings, make_vqgan
from tests import shapes
from tests.micro import micro_bundle
from tests.sprites import drawn_scenes
from tests.test_readme import ROOT


def start(*arguments):
    return subprocess.Popen([sys.executable, "-m", "scripts.train", *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def finish(process, fails=False):
    out, err = process.communicate()
    assert (process.returncode != 0) == fails, err
    assert "Traceback" not in err, err
    return err if fails else json.loads(out.splitlines()[-1])


def refusal(capsys, *arguments):
    """What is said where it cannot begin, in this process, which spares the start of another."""
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, arguments)])
    return f"{stop.value} {capsys.readouterr().err}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """64 scenes without captions."""
    root = tmp_path_factory.mktemp("source")
    for i, (image, _) in enumerate(drawn_scenes(64, 32)):
        image.save(root / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return micro_bundle(tmp_path_factory.mktemp("clip") / "micro")


@pytest.fixture(scope="module")
def trained(source, clip, tmp_path_factory):
    """A bundle of a short run that was killed once; the arguments, and the line it printed."""
    work = tmp_path_factory.mktemp("work")
    arguments = (source, "--out", work / "mine", "--run", work / "run", "--clip", clip,
                 "--time", "12s", "--anyway")
    process = start(*arguments)
    while not list((work / "run").glob("vqgan/log.jsonl")) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (work / "mine").exists()
    return work / "mine", arguments, finish(start(*arguments))


def test_it_ends_in_a_bundle_that_generates(trained):
    bundle, _, result = trained
    for name in ("psnr_db", "codebook_usage", "token_ce", "unigram_ce"):
        assert 0 < result[name] < 60
    assert result["n_images"] == 61 and result["n_held_out"] == 3
    model = ClipGen.load(bundle)
    image, = model.generate("a square", num_images=1, candidates=2, seed=0)
    assert image.image.size == (32, 32)
    assert model.sampling.guidance == 2


def test_the_card_says_how_it_was_made_and_shows_it(trained):
    bundle, arguments, result = trained
    card = (bundle / "README.md").read_text()
    for text in (arguments[0].name, "--clip", f"| psnr_db | {result['psnr_db']} |", "held out",
                 f"* {result['verdict'][:1].upper()}{result['verdict'][1:]}."):
        assert text in card
    assert str(arguments[0].parent) not in card  # nor any folder of this machine
    for picture in ("copies", "samples", "vqgan", "gpt"):
        assert f"card/{picture}.png" in card and (bundle / "card" / f"{picture}.png").is_file()


def test_the_same_command_again_changes_nothing(trained):
    bundle, arguments, result = trained
    before = {p.name: p.read_bytes() for p in bundle.glob("*.safetensors")}
    again = json.loads(json.dumps(train.main([*map(str, arguments)])))
    assert {p.name: p.read_bytes() for p in bundle.glob("*.safetensors")} == before
    assert {k: v for k, v in again.items() if k != "seconds_per_image"} == {
        k: v for k, v in result.items() if k != "seconds_per_image"}


@pytest.mark.parametrize("tune, kept", [("gpt", ["vqgan"]), ("decoder", ["gpt"]), ("both", [])])
def test_fine_tuning_changes_what_it_says(trained, source, tmp_path, tune, kept):
    bundle, _, _ = trained
    out = tmp_path / "tuned"
    steps = [flag for part, other in (("gpt", "decoder"), ("vqgan", "gpt")) if tune != other
             for flag in (f"--{part}.steps", 20, f"--{part}.validations", 1)]
    result = train.main([*map(str, (source, "--out", out, "--run", tmp_path / "run", "--from",
                                    bundle, "--tune", tune, "--time", "5s", "--anyway",
                                    *steps))])
    assert ("token_ce" in result) == (tune != "decoder")
    assert ("psnr_db" in result) == (tune != "gpt")
    for part in ("clip", "vqgan", "gpt"):
        same = ((out / f"{part}.safetensors").read_bytes()
                == (bundle / f"{part}.safetensors").read_bytes())
        assert same == (part in ["clip", *kept]), part
    ClipGen.load(out).generate("a square", num_images=1, candidates=1)


@pytest.mark.parametrize("change, sentence", [
    (("--size", 64), "other settings (size None became 64)"),
    (("--seed", 1), "other settings (seed 0 became 1)"),
    (("--run", "new"), "holds a bundle already"),
    (("--from", "x"), "leave --clip out"),
    (("--tune", "gpt"), "goes with --from"),
    (("--time", "soon"), "write 90s, 20m or 2h30m"),
])
def test_what_it_refuses(trained, tmp_path, capsys, change, sentence):
    change = [tmp_path / c if c == "new" else c for c in change]
    assert sentence in refusal(capsys, *trained[1], *change)


@pytest.mark.parametrize("arguments, sentence", [
    (("--clip", "nothing"), "is no bundle, no run of train_clip"),
    (("--clip", "weights/emoji", "--size", 50), "no multiple of 8"),
    (("--clip", "weights/emoji", "--held-out", 0), "held-out share"),
])
def test_what_cannot_begin(source, tmp_path, capsys, arguments, sentence):
    error = refusal(capsys, source, "--out", tmp_path / "o", "--run", tmp_path / "r", *arguments)
    assert sentence in error and not (tmp_path / "o").exists()


def test_images_that_are_not_there_are_named(tmp_path, capsys):
    error = refusal(capsys, tmp_path / "none", "--out", tmp_path / "o", "--clip", "weights/emoji")
    assert str(tmp_path / "none") in error


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("20m", 1200), ("2h30m", 9000)])
def test_durations(text, seconds):
    assert duration(text) == seconds


def test_dark_images_are_told_of(tmp_path, capsys):
    for bits, bright in ((16, False), (14, True), (12, True), (12, False)):
        pixels = np.linspace(0, 2**bits - 1, 32 * 32).astype(np.uint16).reshape(32, 32)
        if bright:
            pixels[0, 0] = 2**16 - 1  # a stray pixel says nothing of the others
        for i in range(12):
            Image.fromarray(pixels).save(tmp_path / f"x-ray-{i}.png")
        if bright:
            Image.new("L", (32, 32), 255).save(tmp_path / "white.png")  # nor does a stray image
        new_sizes(open_images(tmp_path)[0], None, False, 3600)
        said = capsys.readouterr().err
        assert ("90% of the images looked at have hardly a value above" in said) == (bits < 16)


def test_every_seed_it_takes_the_stages_take():
    most = str(2**31 - 1)
    for stage in stages_of("--seed", most).values():
        assert stage.seed == int(most)


def test_stages_read_images_as_the_whole_does():
    stages = stages_of("--background", "black", "--any-ending", "--sample-image", ".seg.png")
    for stage in ("vqgan", "encode"):
        assert stages[stage].reading == Reading((0, 0, 0), True, "seg.png")
    assert stages_of()["encode"].reading == PLAIN


def stages_of(*flags):
    """The settings of the stages of a command."""
    settings, given = train.parse(["images", "--out", "o", "--clip", "c", *flags])
    train.fill_in(settings)
    stages = Stages(settings, None, None, 0.0, given)
    return {"vqgan": stages.settle("vqgan", run="r"), "gpt": stages.settle("gpt", shards="s",
                                                                           run="r"),
            "encode": stages.settle("encode", out="s", vqgan="v")}


def test_a_stage_takes_what_is_given_for_it():
    stages = stages_of("--gpt.batch", "4", "--vqgan.lr", "1e-4", "--encode.crops", "2",
                       "--gpt.steps", "7", "--no-flip", "--workers", "3")
    assert stages["gpt"].batch == 4 and stages["gpt"].steps == 7
    assert stages["vqgan"].lr == 1e-4 and stages["vqgan"].batch == 16
    assert stages["encode"].crops == 2
    for stage in ("vqgan", "encode"):
        assert not stages[stage].flip and stages[stage].workers == 3


@pytest.mark.parametrize("flag", ["--gpt.run", "--vqgan.size", "--encode.seed", "--gpt.nothing"])
def test_what_follows_from_the_whole_is_not_a_stages_to_say(flag, capsys):
    with pytest.raises(SystemExit):
        train.parse(["images", "--out", "o", flag, "1"])
    assert f"unrecognized arguments: {flag} 1" in capsys.readouterr().err


def test_a_stages_advice_can_be_followed():
    settings, given = train.parse(["images", "--out", "o", "--clip", "c"])
    train.fill_in(settings)
    stages = Stages(settings, None, SimpleNamespace(spent={}), time.time(), given)
    stages.keep_plan = lambda: None
    with pytest.raises(FloatingPointError, match="a lower --gpt.lr than 1 .* another --run"):
        with stages.timed("gpt"):
            raise FloatingPointError("start with a lower --lr than 1 or in another --run")


def test_a_stage_that_fails_is_what_is_told_of(monkeypatch):
    settings, given = train.parse(["images", "--out", "o", "--clip", "c"])
    train.fill_in(settings)
    stages = Stages(settings, None, SimpleNamespace(spent={}), time.time(), given)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "keep_plan", full)
    with pytest.raises(FloatingPointError, match="lower"), stages.timed("gpt"):
        raise FloatingPointError("lower")
    with pytest.raises(OSError), stages.timed("gpt"):
        pass


def test_a_run_that_goes_on_may_have_another_time(source, clip, tmp_path, monkeypatch, capsys):
    """It is that of all starts: what the GPT has had of it is not taken off its own time again."""
    monkeypatch.setattr(Stages, "run", lambda stages, images, held: stages)
    asked = []
    monkeypatch.setattr("scripts.training.stages.train_gpt", lambda given, _: asked.append(given))
    command = [*map(str, (source, "--out", tmp_path / "out", "--run", tmp_path / "run", "--clip",
                          clip, "--time"))]
    for time_, spent in (("10m", {}), ("60m", {}), ("60m", {"vqgan": 900, "gpt": 300})):
        stages = train.main([*command, time_])
        stages.plan.spent |= spent
        stages.train_gpt()
    assert "was begun with 10 minutes, and has 60 now" in capsys.readouterr().err
    assert [each.time for each in asked] == [0.92 * 600, 0.92 * 3600, 0.92 * 3600 - 900]


def test_the_time_of_reading_counts(source, clip, monkeypatch):
    settings, given = train.parse([str(source), "--out", "o", "--clip", str(clip), "--time", "60s"])
    train.fill_in(settings)
    images = open_images(source)[0]
    stages = Stages(settings, Accelerator(cpu=True), SimpleNamespace(
        size=32, seconds=60, n_images=1000, caveats=[]), time.time(), given)
    stages.vqgan = str(clip)
    assert "limit" not in stages.views(images)

    def slow(*_):
        time.sleep(0.5)
        raise UnreadableImage("nothing")

    monkeypatch.setattr(images, "image", slow)
    assert stages.views(images)["limit"] == 64  # the least


def test_names_that_are_no_utf_8_can_be_written():
    assert shown(os.fsdecode(b"ph\xe9")) == "ph?" and shown("phé") == "phé"


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 128, 256, 512])
def test_sizes_make_a_vqgan_of_16_codes_a_side_at_most(source, cuda, size):
    images: Images = open_images(source)[0]
    chosen, vqgan, _ = new_sizes(images, size, cuda, 3600)
    settings = VQGANSettings(images="images", run="run", **vqgan)
    assert chosen == size and 4 <= make_vqgan(settings).config.grid <= 16


@pytest.mark.slow
def test_plain_images_in_four_minutes(tmp_path):
    """400 plain images: the copies are good, codes are forecast, and the colour comes out."""
    shapes.write(tmp_path / "images")
    out = tmp_path / "plain"
    result = finish(start(tmp_path / "images", "--out", out, "--run", tmp_path / "run", "--clip",
                          ROOT / "weights" / "emoji", "--size", 64, "--time", "4m"))
    print(result)
    assert result["psnr_db"] >= 20
    assert result["token_ce"] <= result["unigram_ce"] - 1
    model = ClipGen.load(out)
    for channel, colour in enumerate(("red", "green", "blue")):
        original = np.full((64, 64, 3), shapes.COLOURS[colour], np.uint8)
        pixels = torch.from_numpy(original).permute(2, 0, 1)[None] / 255
        embedding = model.clip.embed_pixels(pixels).expand(8, -1)
        samples = model.decode(model.sample(embedding, range(8)))
        assert (samples.mean((2, 3)).argmax(1) == channel).sum() >= 7, colour
