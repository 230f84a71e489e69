"""Ablations and the baseline: micro runs of the very commands, on drawn stand-ins."""

import json

import pytest
import torch

from clipgen import ClipGen
from scripts.emoji import ablations, baseline_vqgan_clip, scenes
from tests.micro import micro_bundle
from tests.sprites import drawn_sprites


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    sprites = drawn_sprites()
    monkeypatch.setattr(scenes, "emoji_sprites", lambda edged=False: sprites)
    monkeypatch.setattr(scenes, "find_font", lambda: None)
    return micro_bundle(tmp_path / "micro", null_embedding=True)


def test_ablations_go_on_and_repeat_themselves(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "GPT", {"layers": 1, "width": 16, "heads": 2, "batch": 4,
                                           "optimizer": "adamw"})
    monkeypatch.setattr(ablations, "VQGAN", {"size": 64, "channels": "4,4,8,8", "gan": 0.0,
                                             "codebook_size": 32, "batch": 4})
    monkeypatch.setattr(ablations, "SAMPLING", [{"guidance": 3}, {"top_p": 0.9, "candidates": 2}])
    first, mean = "paper's recipe: no noise", "means subtracted, noise 0.5"
    arguments = ["--clip", str(bundle), "--run", str(tmp_path / "run"), "--objects", "4",
                 "--scenes", "40", "--steps", "2", "--vqgan-steps", "2", "--prompts", "3",
                 "--variants"]
    copies = [f"copies, {name}" for name in ablations.QUANTIZERS]
    rows = ablations.main([*arguments])["rows"]
    assert list(rows) == copies
    assert all(0 < row["codebook_usage"] <= 1 and row["psnr_db"] > 0 for row in rows.values())
    rows = ablations.main([*arguments, first])["rows"]
    assert list(rows) == [*copies, f"{first}, seed 0"]
    arguments = [*arguments[:-1], "--seeds", "2", "--variants"]
    rows = ablations.main([*arguments, first])["rows"]
    assert list(rows) == [*copies, f"{first}, seed 0", f"{first}, seed 1"]
    assert all(0 <= rows[f"{first}, seed {i}"]["object_right_of_texts"] <= 1 for i in (0, 1))
    monkeypatch.setitem(ablations.VARIANTS, first, {"nonsense": 1})  # is not trained again
    result = ablations.main([*arguments, ablations.BASE, mean,
                             "noise 0.5, embedding reconstruction"])
    rows, other = result["rows"], list(ablations.QUANTIZERS)[1]
    assert f"{first}, seed 1" in rows and f"{mean}, seed 1" in rows
    assert list(rows)[-6:] == [
        f"noise 0.5, {name}, seed {i}"
        for name in ("guidance 3", "top_p 0.9, candidates 2", other) for i in (0, 1)]
    for name in (mean, f"noise 0.5, {other}"):  # a seed is a training of its own
        assert rows[f"{name}, seed 0"]["token_ce"] != rows[f"{name}, seed 1"]["token_ce"]
    distances = [rows[f"noise 0.5, guidance 3, seed {i}"]["frechet_distance"] for i in (0, 1)]
    assert distances[0] != distances[1]
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"| noise 0.5, {other} |")
    again = ablations.summary(rows)[mean]
    assert again["rows"] == 2 and again["token_ce"] == pytest.approx(
        sum(rows[f"{mean}, seed {i}"]["token_ce"] for i in (0, 1)) / 2, rel=1e-3)
    with pytest.raises(SystemExit, match="other settings"):
        ablations.main([*arguments, first, "--steps", "3"])


def test_vqgan_clip_draws_nearer_to_the_text_than_where_it_starts(bundle):
    model = ClipGen.load(bundle)
    for module in (model.clip, model.vqgan):
        module.requires_grad_(False)
    texts = ["a cat", "a dog on the beach"]

    def score(steps):
        images = baseline_vqgan_clip.optimize(model, texts, steps, 4, 0.1, seed=0)
        assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
        embeddings = model.clip.embed_pixels(images.float() / 255)
        return (embeddings * model.clip.embed_texts(texts)).sum(1)

    start, end = score(1), score(60)
    assert (end > start).all()
    assert torch.equal(score(2), score(2))


def test_both_methods_are_scored_in_one_run(bundle, tmp_path, capsys):
    result = baseline_vqgan_clip.main([str(bundle), "--prompts", "3", "--steps", "2", "--cuts", "2",
                                       "--sheet", str(tmp_path / "sheet.png")])
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == result and (tmp_path / "sheet.png").is_file()
    assert list(result["results"]) == ["CLIP-GEN, best of 1", "CLIP-GEN, best of 16",
                                       "VQGAN-CLIP, 2 steps"]
    for scores in result["results"].values():
        assert 0 <= scores["object_right"] <= 1 and scores["seconds_per_image"] > 0
    assert len(out) == 6
    with pytest.raises(SystemExit, match="is not a directory"):
        baseline_vqgan_clip.main([str(tmp_path / "none")])


def test_cut_outs_are_squares_of_the_image():
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[1] = 1
    cut = baseline_vqgan_clip.cut_outs(pixels, 5, 16, torch.Generator().manual_seed(0))
    assert cut.shape == (10, 3, 16, 16)
    assert cut[0::2].mean().abs() < 0.01 and (cut[1::2].mean() - 1).abs() < 0.01
