"""The training scripts as real processes, from a folder of images to a bundle that generates."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen import ClipGen
from scripts import scenes
from scripts.encode_images import fingerprint
from scripts.images import decode_image, read_images
from scripts.judge import QUESTIONS, WEIGHTS, load_judge
from scripts.train_gpt import perturb
from scripts.train_vqgan import load_vqgan_run
from tests.sprites import drawn_sprites


def run(script, *arguments, fails=False):
    result = subprocess.run([sys.executable, "-m", f"scripts.{script}", *map(str, arguments)],
                            capture_output=True, text=True)
    assert (result.returncode != 0) == fails, result.stderr
    return result.stderr if fails else json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 scenes with captions, three folders deep."""
    root = tmp_path_factory.mktemp("images")
    sprites = drawn_sprites()
    for i in range(64):
        scene = scenes.render(i, 32, sprites=sprites)
        place = root / "a" / str(i % 3)
        place.mkdir(parents=True, exist_ok=True)
        scene.image.save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("\n".join(scene.captions))
    return root


def other_gpt(run_directory):
    """The same run, but of shards of another VQGAN."""
    directory = run_directory.with_name("other_gpt")
    shutil.copytree(run_directory, directory)
    manifest = json.loads((directory / "shards.json").read_text())
    (directory / "shards.json").write_text(json.dumps(manifest | {"vqgan_sha256": "0"}))
    return directory


def test_the_whole_chain_ends_in_a_bundle_that_generates(folder, tmp_path):
    clip, vqgan, shards, gpt = (tmp_path / n for n in ("clip", "vqgan", "shards", "gpt"))
    run("train_clip", folder, "--run", clip, "--size", 32, "--steps", 3, "--batch", 8)
    scores = run("train_vqgan", folder, "--run", vqgan, "--clip", clip, "--size", 32, "--steps", 6,
                 "--batch", 4, "--channels", "32,32,32,32", "--codebook-size", 32, "--gan-start", 3)
    assert 0 < scores["psnr_db"] < 60 and 0 < scores["codebook_usage"] <= 1
    assert (vqgan / "grid.png").is_file()
    manifest = run("encode_images", folder, shards, "--clip", clip, "--vqgan", vqgan)
    assert manifest["images"] == 64 and manifest["codebook_size"] == 32
    # The decoder can be trained further without spoiling the shards.
    decoder = tmp_path / "decoder"
    run("train_vqgan", folder, "--run", decoder, "--decoder-of", vqgan, "--steps", 2, "--batch", 4)
    before, after = load_vqgan_run(vqgan), load_vqgan_run(decoder)
    assert fingerprint(after, "encoder.", "quantizer.") == manifest["vqgan_sha256"]
    assert fingerprint(after, "decoder.") != fingerprint(before, "decoder.")
    size = ("--layers", 1, "--width", 32, "--heads", 2, "--batch", 8)
    result = run("train_gpt", shards, "--validation", shards, "--run", gpt, "--steps", 4, *size)
    assert 0 < result["token_ce"] < 2 * np.log(32)
    # Other settings do not continue the run.
    error = run("train_gpt", shards, "--run", gpt, "--steps", 9, *size, fails=True)
    assert "other settings (steps)" in error
    bundle = tmp_path / "bundle"
    run("make_bundle", bundle, "--clip", clip, "--vqgan", decoder, "--gpt", gpt, "--guidance", 2)
    model = ClipGen.load(bundle)
    text = read_images(folder, 32).captions[0][0]
    images = model.generate(text, num_images=2, candidates=3, seed=0)
    assert len(images) == 2 and images[0].image.size == (32, 32)
    assert model.sampling.guidance == 2
    error = run("make_bundle", bundle, "--clip", clip, "--vqgan", decoder, "--gpt", other_gpt(gpt),
                fails=True)
    assert "shards of another vqgan" in error
    # Shards of another VQGAN are refused.
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    (other / "manifest.json").write_text(json.dumps(manifest | {"vqgan_sha256": "0"}))
    error = run("train_gpt", shards, "--validation", other, "--run", tmp_path / "new", fails=True)
    assert "another VQGAN" in error


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    rng = np.random.default_rng(0)
    shards = tmp_path / "shards"
    shards.mkdir()
    np.save(shards / "codes.npy", rng.integers(0, 16, (40, 2, 9)).astype(np.uint16))
    np.save(shards / "embeddings.npy", rng.standard_normal((40, 2, 8)).astype(np.float16))
    (shards / "manifest.json").write_text(json.dumps({"codebook_size": 16, "vqgan_sha256": "x"}))
    size = ("--layers", 1, "--width", 16, "--heads", 2, "--batch", 4, "--steps", 6)
    run("train_gpt", shards, "--run", tmp_path / "whole", *size)
    broken = tmp_path / "broken"
    code = ("import scripts.runs as r; r.Run.due = lambda self: True; count = [0]\n"
            "log = r.Run.save\n"
            "def save(self, step, **parts):\n"
            "    log(self, step, **parts)\n"
            "    if step == 3: raise SystemExit(9)\n"
            "r.Run.save = save\n"
            "from scripts.train_gpt import main; main()")
    result = subprocess.run([sys.executable, "-c", code, str(shards), "--run", str(broken),
                             *map(str, size)])
    assert result.returncode == 9
    run("train_gpt", shards, "--run", broken, *size)
    assert (broken / "gpt.safetensors").read_bytes() == (
        tmp_path / "whole" / "gpt.safetensors").read_bytes()


def test_folder_zip_and_tar_hold_the_same_images(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as z, tarfile.open(tmp_path / "i.tar", "w") as t:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            z.write(path, path.relative_to(folder))
            t.add(path, path.relative_to(folder))
    sets = [read_images(source, 32) for source in (folder, tmp_path / "i.zip", tmp_path / "i.tar")]
    assert len(sets[0]) == 64 and all(len(c) == 5 for c in sets[0].captions)
    for other in sets[1:]:
        assert torch.equal(other.pixels, sets[0].pixels) and other.captions == sets[0].captions


def test_unreadable_images_are_skipped_and_named(tmp_path, capsys):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert len(read_images(tmp_path, 8)) == 1
    assert "skipped 1 unreadable images: bad.png" in capsys.readouterr().err
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match="no readable image"):
        read_images(tmp_path, 8)
    with pytest.raises(ValueError, match="no folder, zip or tar"):
        read_images(tmp_path / "bad.png", 8)


def test_alpha_is_laid_on_white_and_the_centre_is_cropped():
    data = io.BytesIO()
    image = Image.new("RGBA", (30, 10), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (10, 0, 20, 10))
    image.save(data, "PNG")
    assert (decode_image(data.getvalue(), 10) == (255, 0, 0)).all()
    data = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(data, "PNG")
    assert (decode_image(data.getvalue(), 4) == 255).all()


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.5])
def test_noise_moves_an_embedding_by_its_length(noise):
    torch.manual_seed(0)
    e = torch.nn.functional.normalize(torch.randn(2000, 64), dim=1)
    moved = perturb(e, noise, torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(2000))
    cosine = (moved * e).sum(1).mean().item()
    assert cosine == pytest.approx(1 / (1 + noise**2) ** 0.5, abs=0.02)


def test_the_judge_is_small_and_marks_each_question():
    assert WEIGHTS.stat().st_size <= 2 * 2**20
    judge = load_judge()
    pixels = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        answers = {q: logits.argmax(1).tolist() for q, logits in judge(pixels).items()}
    labels = [tuple(QUESTIONS[q][answers[q][i]] for q in QUESTIONS) for i in range(5)]
    assert judge.right(pixels, labels) == {q: [True] * 5 for q in QUESTIONS}
    wrong = [("no", place, time) for _, place, time in labels]
    assert judge.right(pixels, wrong)["object"] == [False] * 5
    assert judge.right(pixels, wrong)["place"] == [True] * 5
