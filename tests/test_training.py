"""The training scripts, from a folder of images to a bundle that generates."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from clipgen import ClipGen
from clipgen.vqgan import VQGAN, VQGANConfig
from scripts import train_clip, train_vqgan
from scripts.data.presets import open_images
from scripts.evaluation.metrics import entropy, psnr, ssim
from scripts.training.gpt import perturbation
from scripts.training.loading import CODES, IMAGE_TOWER, fingerprint, load_clip, load_vqgan
from scripts.training.losses import Discriminator, EmbeddingReconstruction, centre
from scripts.training.optim import learning_rate
from scripts.training.trainer import start
from scripts.training.vqgan import restart_dead_codes, whiten
from tests.micro import micro_clip, micro_vqgan
from tests.sprites import drawn_scenes


def as_process(script, *arguments):
    """The line of JSON that a command prints last."""
    result = subprocess.run([sys.executable, "-m", f"scripts.{script}", *map(str, arguments)],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def run(script, *arguments, fails=False):
    """What a command's main returns in this process, or the sentence with which it fails."""
    main = import_module(f"scripts.{script}").main
    if not fails:
        return main([*map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return stop.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 scenes with captions, three folders deep."""
    root = tmp_path_factory.mktemp("images")
    for i, (image, captions) in enumerate(drawn_scenes(64, 32)):
        place = root / "a" / str(i % 3)
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("\n".join(captions))
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
    scores = run("train_clip", folder, "--run", clip, "--size", 32, "--steps", 3, "--batch", 8)
    assert 0 <= scores["retrieval"] <= 1
    scores = run("train_vqgan", folder, "--run", vqgan, "--clip", clip, "--size", 32, "--steps", 6,
                 "--batch", 4, "--channels", "32,32,32,32", "--codebook-size", 32,
                 "--gan-weight", "adaptive")
    assert 0 < scores["psnr_db"] < 60 and 0 < scores["codebook_usage"] <= 1
    assert -1 <= scores["ssim"] <= 1 and 1 <= scores["codebook_perplexity"] <= 32
    assert (vqgan / "grid.png").is_file()
    manifest = as_process("encode_images", folder, shards, "--clip", clip, "--vqgan", vqgan)
    assert manifest["train_images"] == 61 and manifest["codebook_size"] == 32
    # The decoder can be trained further without spoiling the shards.
    decoder = tmp_path / "decoder"
    run("train_vqgan", folder, "--run", decoder, "--clip", clip, "--decoder-of", vqgan, "--steps",
        2, "--batch", 4)
    before, after = load_vqgan(vqgan), load_vqgan(decoder)
    assert fingerprint(after, *CODES) == manifest["vqgan_sha256"]
    assert fingerprint(after, "decoder.") != fingerprint(before, "decoder.")
    size = ("--layers", 1, "--width", 32, "--heads", 2, "--batch", 8)
    result = run("train_gpt", shards, "--run", gpt, "--steps", 4, "--vqgan", vqgan, "--clip", clip,
                 "--subtract-means", "--reconstruction", 0.1, "--noise-kind", "random",
                 "--dropout", 0.1, *size)
    assert 0 < result["token_ce"] < 2 * np.log(32) and 0 < result["unigram_ce"] <= np.log(32)
    assert result["text_gap"] == pytest.approx(result["token_ce_text"] - result["token_ce"],
                                               abs=1e-3)
    made_of = json.loads((gpt / "shards.json").read_text())
    assert made_of["image_tower_sha256"] == fingerprint(load_clip(clip), *IMAGE_TOWER)
    assert (gpt / "images.png").is_file() and (gpt / "texts.png").is_file()
    # Other settings do not continue the run.
    error = run("train_gpt", shards, "--run", gpt, "--steps", 9, *size, fails=True)
    assert "other settings" in error and "steps 4 became 9" in error
    bundle = tmp_path / "bundle"
    as_process("make_bundle", bundle, "--clip", clip, "--vqgan", decoder, "--gpt", gpt,
               "--guidance", 2)
    model = ClipGen.load(bundle)
    text = open_images(folder)[0].captions(0)[0]
    images = model.generate(text, num_images=2, candidates=3, seed=0)
    assert len(images) == 2 and images[0].image.size == (32, 32)
    assert model.sampling.guidance == 2
    assert model.clip.config.image_embedding_mean  # --subtract-means came along
    error = run("make_bundle", bundle, "--clip", clip, "--vqgan", decoder, "--gpt", other_gpt(gpt),
                "--force", fails=True)
    assert "shards of another vqgan" in error
    # A GPT goes on from a bundle, but not on shards of another VQGAN's size.
    result = run("train_gpt", shards, "--run", tmp_path / "tuned", "--from", bundle, "--steps", 2)
    assert result["steps"] == 2
    error = run("train_gpt", shards, "--run", tmp_path / "wide", "--from", bundle, "--width", 64,
                fails=True)
    assert "--width 64 is not that of" in error
    # Shards of another VQGAN are refused.
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    changed = json.loads((shards / "manifest.json").read_text()) | {"vqgan_sha256": "0"}
    (other / "manifest.json").write_text(json.dumps(changed))
    error = run("train_gpt", shards, "--validation", other, "--run", tmp_path / "new", fails=True)
    assert "another VQGAN" in error


@pytest.mark.parametrize("arguments, sentence", [
    (("--clip", "nothing"), "is no bundle"),
    ((), "give --clip"),
    (("--perceptual-loss", "lpips"), "lpips needs"),
    (("--perceptual-loss", "none", "--size", "33"), "no such VQGAN"),
    (("--perceptual-loss", "none", "--held-out", "2"), "held-out share"),
    (("--published",), "lpips needs"),
    (("--perceptual-loss", "none", "--from", "nowhere"), "nowhere is neither a bundle"),
    (("--perceptual-loss", "none", "--from", "weights/emoji", "--code-dim", "4"), "settled by"),
    (("--perceptual-loss", "none", "--from", "weights/emoji", "--size", "32"), "is not that of"),
    (("--perceptual-loss", "none", "--published", "--blocks", "1"), "settled by --published"),
])
def test_what_cannot_be_trained_is_said_in_a_sentence(folder, tmp_path, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        train_vqgan.main([str(folder), "--run", str(tmp_path / "v"), *arguments])


def test_the_text_tower_has_heads_of_32(folder, tmp_path):
    with pytest.raises(SystemExit, match="--text-width 100 is no multiple of 32"):
        train_clip.main([str(folder), "--run", str(tmp_path / "c"), "--text-width", "100"])


@pytest.mark.parametrize("channels", [1, 6, 32])
def test_a_discriminator_may_have_any_width(channels):
    assert Discriminator(channels)(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("kind", ["fixed", "random"])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.5])
def test_noise_moves_an_embedding_by_its_length(noise, kind):
    torch.manual_seed(0)
    e = torch.nn.functional.normalize(torch.randn(2000, 64), dim=1)
    moves = perturbation(2000, 64, noise, torch.Generator().manual_seed(1), kind)
    lengths = moves.norm(dim=1)
    if kind == "fixed":
        torch.testing.assert_close(lengths, torch.full((2000,), noise))
        cosine = (torch.nn.functional.normalize(e + moves, dim=1) * e).sum(1).mean().item()
        assert cosine == pytest.approx(1 / (1 + noise**2) ** 0.5, abs=0.02)
    else:
        assert lengths.max() <= noise + 1e-6
        assert lengths.mean().item() == pytest.approx(noise / 2, rel=0.05)


def test_centring_takes_the_mean_off():
    torch.manual_seed(0)
    e = torch.nn.functional.normalize(torch.randn(500, 16) + 2, dim=1)
    centred = centre(e, e.mean(0))
    torch.testing.assert_close(centred.norm(dim=1), torch.ones(500))
    assert centred.mean(0).norm() < 0.1 * e.mean(0).norm()
    assert centre(e, None) is e


def test_the_learning_rate_never_is_zero():
    rates = [learning_rate(step, 1000, 1.0, 100) for step in range(1000)]
    assert min(rates) > 0 and max(rates) == 1.0 and rates[0] == 0.01
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert max(learning_rate(step, 5, 1.0, 300) for step in range(5)) == 1.0


def test_entropy_of_known_counts():
    assert entropy(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(np.log(4))
    assert entropy(torch.tensor([7.0, 0, 0])) == pytest.approx(0)


@pytest.mark.parametrize("own, mean", [(False, False), (True, False), (False, True)])
def test_right_codes_have_no_reconstruction_loss(own, mean):
    """Whether the CLIP takes a mean off its embeddings, the training does, or neither."""
    torch.manual_seed(0)
    clip, vqgan = micro_clip(), micro_vqgan()
    if own:
        clip.config = replace(clip.config, image_embedding_mean=tuple(0.1 * torch.randn(32)))
    codes = torch.randint(0, 64, (3, 4, 4))
    less = 0.1 * torch.randn(32) if mean else None
    embedding = centre(clip.embed_pixels(vqgan.decode(codes)), less)
    logits = 50.0 * torch.nn.functional.one_hot(codes.flatten(1), 64)
    logits.requires_grad_(True)
    loss = EmbeddingReconstruction(clip, vqgan)(logits, embedding, less)
    assert loss.item() == pytest.approx(0, abs=1e-4)
    loss.backward()
    assert logits.grad.isfinite().all()
    wrong = EmbeddingReconstruction(clip, vqgan)(logits.roll(1, 2), embedding, less)
    assert wrong > loss + 1e-3


def test_psnr_and_ssim_of_known_pairs():
    torch.manual_seed(0)
    a = torch.rand(3, 3, 20, 20)
    assert psnr(a, a).tolist() == [60] * 3
    torch.testing.assert_close(psnr(a * 0, a * 0 + 0.1), torch.full((3,), 20.0))
    torch.testing.assert_close(ssim(a, a), torch.ones(3))
    assert (ssim(a, 1 - a) < 0).all()
    noisy = [ssim(a, a + s * torch.randn_like(a)).mean() for s in (0.05, 0.1, 0.3)]
    assert noisy == sorted(noisy, reverse=True)


def test_restart_moves_dead_codes_alone():
    vqgan = micro_vqgan()
    before = vqgan.quantizer.embedding.weight.detach().clone()
    used = torch.arange(64) % 2
    moved = restart_dead_codes(vqgan, used, torch.randn(2, 8, 4, 4),
                               torch.Generator().manual_seed(0))
    changed = (vqgan.quantizer.embedding.weight != before).any(1)
    assert moved == 32 and torch.equal(changed, used == 0)


def test_whitened_features_spread_over_all_directions():
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(32, (32, 32, 32), (), 1, 8, 64, True, 0))
    vqgan.initialise()
    pixels = torch.rand(8, 3, 32, 32)
    whiten(vqgan, pixels)
    with torch.no_grad():
        rows = vqgan.encoder(pixels * 2 - 1).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(8), atol=0.05, rtol=0)


def test_numbers_too_small_to_be_fast_are_zero_in_training(monkeypatch):
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    torch.set_flush_denormal(False)  # as at the start of a process
    tiny = torch.full((8,), 1e-39)
    try:
        start("float32", 0)
        x = torch.ones(8, requires_grad=True)
        (x * 2).backward(tiny)
        assert not x.grad.any() and not (tiny * 0.5).any()
    finally:
        torch.set_flush_denormal(False)
    assert (tiny * 0.5).all()
