"""scripts.evaluate: held-out texts, verdicts, the line of JSON; and the default bundle."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen import ClipGen, UnknownWords
from scripts import evaluate, scenes
from scripts.judge import QUESTIONS, load_judge
from tests.micro import micro_bundle
from tests.sprites import drawn_sprites
from tests.test_readme import ROOT


def test_prompts_are_of_held_out_combinations_and_spread():
    prompts = evaluate.held_out_prompts(130, seed=3)
    assert prompts == evaluate.held_out_prompts(130, seed=3)
    assert prompts != evaluate.held_out_prompts(130, seed=4)
    labels = [label for _, label in prompts]
    assert set(labels) == scenes.HELD_OUT and max(map(labels.count, labels)) == 3


def test_the_last_line_is_json_and_a_bad_judge_is_not_passed_over(tmp_path, monkeypatch, capsys):
    bundle = micro_bundle(tmp_path / "micro", vocabulary=["a cat"])
    sprites = drawn_sprites()  # shapes that the judge has never seen
    monkeypatch.setattr(scenes, "emoji_sprites", lambda: sprites)
    monkeypatch.setattr("sys.argv", ["evaluate", str(bundle), "--prompts", "5", "--candidates", "2",
                                     "--sheet", str(tmp_path / "a" / "sheet.png")])
    with pytest.raises(SystemExit, match="judge gets fewer than 99 %"), pytest.warns(UnknownWords):
        evaluate.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["n_prompts"] == 5 and result["seconds"] > 0
    for name in ("judge_on_renders", "object_right", "place_right", "time_right"):
        assert 0 <= result[name] <= 1
    assert result["judge_on_renders"] < 0.99
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.width > 8 * 128 and np.asarray(sheet).min() == 0


@pytest.fixture(scope="module")
def emoji():
    return ClipGen.load(ROOT / "weights" / "emoji")


def test_the_default_bundle_knows_its_world(emoji):
    rng = np.random.default_rng(0)
    for labels in scenes.COMBINATIONS:
        assert not emoji.clip.unknown_words(scenes.write_caption(rng, *labels))
    with pytest.warns(UnknownWords, match="'submarine'"):
        image, = emoji.generate("a submarine on the beach", num_images=1, candidates=1, seed=0)
    assert image.image.size == (64, 64) and image.codes.shape == (8, 8)


def right(model, count):
    prompts = evaluate.held_out_prompts(count, seed=1)
    images = [model.generate(text, num_images=1, seed=i)[0] for i, (text, _) in enumerate(prompts)]
    pixels = torch.from_numpy(np.stack([np.asarray(i.image) for i in images])).permute(0, 3, 1, 2)
    hits = load_judge().right(pixels / 255, [labels for _, labels in prompts])
    return {question: sum(hits[question]) / count for question in QUESTIONS}


@pytest.mark.slow
def test_the_default_bundle_draws_what_texts_say(emoji):
    shares = right(emoji, 60)
    assert shares["object"] >= 0.7 and shares["place"] >= 0.9 and shares["time"] >= 0.9
