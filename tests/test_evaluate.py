"""scripts.evaluate: texts, samples, scores, the line of JSON; and the default bundle."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen import ClipGen, UnknownWords
from clipgen.sheet import sheet, wrap
from scripts import evaluate
from scripts.data.presets import open_images
from scripts.emoji import evaluate as emoji_evaluate
from scripts.emoji import judge, scenes, world
from scripts.emoji import prompts as world_prompts
from scripts.emoji.judge import load_judge
from scripts.evaluation import features, prompts, scores
from tests.micro import micro_bundle
from tests.sprites import drawn_scenes, drawn_sprites
from tests.test_readme import ROOT

TEXTS = ["a cat", "a dog by the sea", "two red apples", "night", "a house on a hill at sunset"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return micro_bundle(tmp_path_factory.mktemp("bundle") / "micro", null_embedding=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images, not square, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for i, (image, _) in enumerate(drawn_scenes(12, 40)):
        image.resize((48, 40)).save(folder / f"{i}.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:100])
    return folder


def run(capsys, *arguments, command=evaluate):
    """(what main returns, stdout without its last line, stderr); the last line is the result."""
    capsys.readouterr()
    result = command.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    *table, last = out.splitlines()
    assert json.loads(last) == result
    return result, table, err


# Texts


def test_prompts_show_what_training_did_not():
    labels = world_prompts.held_out_labels(130, 40, seed=3)
    assert labels == world_prompts.held_out_labels(130, 40, seed=3)
    assert labels != world_prompts.held_out_labels(130, 40, seed=4)
    names = list(world.OBJECTS)[:40]
    pairs = [(each.objects[0], each.place) for each in labels]
    assert set(pairs) == {pair for pair in world.HELD_OUT if pair[0] in names}
    counts = [pairs.count(pair) for pair in set(pairs)]
    assert max(counts) - min(counts) <= 1
    seen = world_prompts.with_seen_places(labels, 3)
    both = world_prompts.with_second_object(labels, 40, 3)
    for one, moved, two in zip(labels, seen, both, strict=True):
        assert moved.objects == one.objects and not world.is_held_out(moved)
        assert len(set(two.objects)) == 2 and set(one.objects) < set(two.objects) <= set(names)
        assert (two.place, two.time) == (one.place, one.time) and world.is_held_out(two)
    assert {two.objects.index(one.objects[0]) for one, two in zip(labels, both, strict=True)} == {
        0, 1}


def test_prompts_of_a_file_are_its_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  \n  ein Bär \n".encode())
    assert prompts.file_prompts(path) == ["a cat", "ein Bär"]


def test_prompts_of_coco_are_one_of_an_image(tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(40)],
        "annotations": [{"image_id": i, "caption": f"image {i}\ncaption {k} "}
                        for k in range(5) for i in range(40)]}))
    texts = prompts.coco_prompts(tmp_path, 40, seed=1)
    assert texts == prompts.coco_prompts(file, 40, seed=1)
    assert texts != prompts.coco_prompts(tmp_path, 40, seed=2)
    assert sorted(int(text.split()[1]) for text in texts) == list(range(40))
    assert len({text.split()[3] for text in texts}) > 1  # not always the first one
    assert prompts.coco_prompts(tmp_path, 7, seed=1) == texts[:7]
    assert capsys.readouterr().err == ""
    assert len(prompts.coco_prompts(tmp_path, 30_000, seed=1)) == 40
    assert "captions of 40 images: one of each" in capsys.readouterr().err


# Samples


@pytest.mark.parametrize("candidates", [1, 3, 70])
def test_samples_are_those_of_generate(bundle, candidates):
    model, texts = ClipGen.load(bundle), TEXTS if candidates < 70 else TEXTS[:2]
    settings = {"guidance": 2.0, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    images, firsts, _ = scores.sample(model, texts, 2**31 - 4, candidates, settings)
    for i, text in enumerate(texts):
        seed = (2**31 - 4 + i * candidates) % 2**31
        expected, = model.generate(text, num_images=1, candidates=candidates, seed=seed, **settings)
        assert (images[i].permute(1, 2, 0).numpy() == np.asarray(expected.image)).all()
        expected, = model.generate(text, num_images=1, candidates=1, seed=seed, **settings)
        assert (firsts[i].permute(1, 2, 0).numpy() == np.asarray(expected.image)).all()


def test_of_the_candidates_for_an_image_the_nearest_is_kept(bundle):
    model = ClipGen.load(bundle)
    originals = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    settings = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    images, _, seconds = scores.sample(model, originals, 5, 4, settings)
    assert images.shape == originals.shape and images.dtype == torch.uint8 and seconds > 0
    embeddings = model.clip.embed_pixels(originals / 255)
    for i in range(3):
        codes = model.sample(embeddings[i:i + 1].expand(4, -1), range(5 + 4 * i, 9 + 4 * i),
                             **settings)
        pixels = model.decode(codes)
        best = (model.clip.embed_pixels(pixels) @ embeddings[i]).argmax()
        assert torch.equal(images[i], (pixels[best] * 255).round().byte())


# The command


def test_a_bad_judge_is_not_passed_over(bundle, tmp_path, monkeypatch, capsys):
    sprites = drawn_sprites()  # shapes that the judge has never seen
    monkeypatch.setattr(scenes, "emoji_sprites", lambda edged=False: sprites)
    monkeypatch.setattr(judge, "emoji_sprites", lambda edged=False: sprites)
    with pytest.raises(SystemExit, match="judge gets fewer than 99 %"):
        emoji_evaluate.main([str(bundle), "--prompts", "5", "--candidates", "4", "--device", "cpu",
                             "--sheet", str(tmp_path / "a" / "sheet.png")])
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["n_prompts"] == 5 and result["n_generated"] == 6 and result["seconds"] > 0
    for name in ("judge_on_renders", "object_right", "object_right_one_candidate", "place_right",
                 "time_right", "both_objects_right", "object_right_unseen_pairs",
                 "object_right_seen_pairs", "codebook_usage"):
        assert 0 <= result[name] <= 1
    assert result["judge_on_renders"] < 0.99 and result["candidates"] == 4
    assert result["text_over_image"] >= 0 and 0 < result["psnr_db"] < 30
    assert result["frechet_ratio"] == pytest.approx(
        result["judge_frechet"] / result["judge_frechet_of_copies"], rel=1e-3)
    assert 0 < result["judge_frechet_one_candidate"] != result["judge_frechet"]
    assert err.count("wrong ") == 6  # a random model gets none right
    with Image.open(tmp_path / "a" / "sheet.png") as page:
        assert page.width > 5 * 128 and np.asarray(page).min() == 0


def test_texts_of_a_file_with_real_images(bundle, photos, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = (bundle, "--prompts", tmp_path / "texts.txt", "--images", photos, "--count", 4,
                 "--candidates", 2, "--features", "clip", "--device", "cpu")
    result, (header, _, row), err = run(capsys, *arguments)
    assert (result["n_prompts"], result["n_generated"], result["n_real"]) == (4, 4, 4)
    assert result["condition"] == "texts" and result["features"].endswith("own CLIP")
    assert result["dimensions"] == 32 and result["independent"] and result["image_size"] == 32
    assert (result["guidance"], result["top_p"], result["seed"]) == (1.0, 1.0, 0)
    assert 0 <= result["clip_score"] <= 100 and result["retrieval_among"] == 4
    distances = [result["frechet_distance"], result["frechet_distance_real"],
                 *(result[f"frechet_distance_blur_{radius}"] for radius in (1, 2, 4, 8))]
    assert min(distances) > 0 and result["mmd"] != result["mmd_real"]
    assert "CLIP score ↑ | R@1 ↑ | FD ↓ | FD real" in header and str(distances[0]) in row
    assert header.count("|") == row.count("|")
    assert "4 images are too few for 32 dimensions" in err and "flatters" in err
    again, _, _ = run(capsys, *arguments)
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in result.items() if "seconds" not in k}


def test_images_alone(bundle, photos, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    result, _, err = run(capsys, bundle, "--images", photos, "--candidates", 1, "--guidance", 3,
                         "--features", "judge", "--sheet", path)
    assert result["condition"] == "images" and result["prompts"] is None
    # 13 files: half of them, so that as many are left to compare with.
    assert (result["n_prompts"], result["n_generated"], result["n_real"]) == (0, 6, 6)
    assert result["independent"] and result["dimensions"] == 160 and result["guidance"] == 3
    assert 0 <= result["clip_i"] <= 100 and "clip_score" not in result
    assert "skipped torn.png: " in err
    with Image.open(path) as page:
        assert page.width > 8 * 128 and np.asarray(page).min() == 0
    result, _, err = run(capsys, bundle, "--images", photos, "--candidates", 1, "--count", 9,
                         "--features", "judge")
    assert result["n_real"] == 9 and not result["independent"]
    assert "frechet_distance_real" not in result
    assert "fewer than 18 readable images, so samples are compared with the very images" in err


def test_fewer_real_images_than_texts(bundle, photos, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 3))
    result, _, _ = run(capsys, bundle, "--prompts", tmp_path / "texts.txt", "--images", photos,
                       "--candidates", 1, "--features", "judge")
    assert (result["n_generated"], result["n_real"], result["independent"]) == (15, 12, False)


def test_another_clip_can_score(bundle, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    other = micro_bundle(tmp_path / "other", seed=1, vocabulary=["a cat"])
    arguments = (bundle, "--prompts", tmp_path / "texts.txt", "--candidates", 1)
    own, _, err = run(capsys, *arguments)
    assert own["score_clip"] == "the bundle's own CLIP" and "flatters" in err
    assert own["n_real"] == 0 and own["features"] is None and own["n_unknown_words"] == 0
    scored, _, err = run(capsys, *arguments, "--score-clip", other)
    assert scored["score_clip"] == f"CLIP {other}" and "flatters" not in err
    assert scored["clip_score"] != own["clip_score"]
    unknown, _, err = run(capsys, other, *arguments[1:])
    assert unknown["n_unknown_words"] > 5 and "'apples', 'at', 'by', 'dog'" in err


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--prompts", "TMP/none.txt"], "none.txt cannot be read (No such file or directory): give a "),
    (["--prompts", "TMP"], "cannot be read (Is a directory): give a file of texts, one a line"),
    (["--prompts", "TMP/empty.txt"], "empty.txt has no text in it: write one a line"),
    (["--prompts", "TMP/latin.txt"], "latin.txt cannot be read (it is not UTF-8)"),
    (["--prompts", "coco:TMP"], "captions_val2017.json cannot be read: No such file"),
    ([], "give --prompts FILE, --prompts coco:PATH or --images SOURCE; the default bundle's own"),
    (["--prompts", "x", "--count", "0"], "argument --count: '0' is not a whole number from 1"),
    (["--prompts", "x", "--candidates", "-1"], "'-1' is not a whole number from 1 to 4096"),
    (["--prompts", "x", "--top-p", "2"], "argument --top-p: '2' is not a number from 0 to 1"),
    (["--prompts", "x", "--device", "tpu"], "'tpu' is not cpu, cuda or cuda:N"),
    (["--prompts", "x", "--device", "cuda:99"], "--device cuda:99 does not exist"),
    (["--prompts", "x", "--features", "clip"], "--features is for distances to real images"),
    (["--prompts", "TMP/one.txt", "--images", "TMP/two", "--features", "nose"],
     "--features nose is no network: give one of inception, clip, judge"),
    (["--prompts", "x", "--sheet", "TMP/sheet.jpg"], "must be a file that ends in .png"),
    (["--prompts", "x", "--sheet", "TMP/empty.txt/s.png"], "name another file"),
    (["--images", "TMP/none"], "none does not exist: give a folder, zip or tar of images"),
    (["--images", "scene:9"], "scene is no source of images; there are coco, googlecc, imagenet, "
     "scenes, folders"),
    (["--images", "TMP/one"], "at least 2 real images and 2 samples, got 1 and 2: give more"),
    (["--prompts", "TMP/one.txt", "--images", "TMP/two"], "2 samples, got 2 and 1"),
    (["--prompts", "TMP/one.txt", "--score-clip", "none"], "none is no bundle"),
    (["--prompts", "TMP/one.txt", "--guidance", "2"], "guidance 2.0 needs a GPT that was trained"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_cannot_be_is_one_sentence(arguments, sentence, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("night")
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    for name, count in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    small = micro_bundle(tmp_path / "small", vocabulary=["night"])
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(small), *(a.replace("TMP", str(tmp_path)) for a in arguments)])
    out, err = capsys.readouterr()
    last = err.splitlines()[-1] if stop.value.code == 2 else str(stop.value)
    assert sentence in last and out == "" and "\n" not in last


@pytest.mark.parametrize("count, sentence", [
    ("1", "argument --prompts: '1' is not a whole number from 2"),
    ("-3", "argument --prompts: '-3' is not a whole number from 2"),
    ("5", "not trained on the world of the default one, its CLIP never saw 'a")])
def test_what_the_world_is_not_asked_for_is_one_sentence(count, sentence, tmp_path, capsys):
    small = micro_bundle(tmp_path / "small", vocabulary=["night"])
    with pytest.raises(SystemExit) as stop:
        emoji_evaluate.main([str(small), "--prompts", count])
    said = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else str(stop.value)
    assert sentence in said


@pytest.mark.parametrize("error, sentence", [
    (FloatingPointError("the GPT's logits are not finite"), "^the GPT's logits are not finite$"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "^out of memory with --candidates 3: try a lower number"),
    (MemoryError(), "^out of memory with --candidates 3")])
def test_what_goes_wrong_in_sampling_is_one_sentence(bundle, tmp_path, monkeypatch, error,
                                                     sentence):
    def fail(*_, **__):
        raise error

    (tmp_path / "texts.txt").write_text("night\nday\n")
    monkeypatch.setattr(ClipGen, "sample", fail)
    with pytest.raises(SystemExit, match=sentence):
        evaluate.main([str(bundle), "--prompts", str(tmp_path / "texts.txt"), "--candidates", "3",
                       "--device", "cpu"])


def test_a_share_of_nothing_is_left_out(bundle, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "emoji_sprites", lambda edged=False: drawn_sprites())
    monkeypatch.setattr(judge, "emoji_sprites", lambda edged=False: drawn_sprites())
    monkeypatch.setattr(emoji_evaluate, "judged_on_renders", lambda *_: 1.0)
    size = len(judge.load_judge().objects)
    # Both texts are about the moon, whose sky tells no time.
    seed = next(seed for seed in range(10**6) if not any(
        each.time for each in world_prompts.held_out_labels(2, size, seed)))
    result, _, _ = run(capsys, bundle, "--prompts", 2, "--seed", seed, "--candidates", 1,
                       command=emoji_evaluate)
    assert "time_right" not in result and 0 <= result["place_right"] <= 1


def test_a_bundle_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "texts.txt").write_text("night")
    with pytest.raises(SystemExit, match="config.json"):
        evaluate.main([str(tmp_path), "--prompts", str(tmp_path / "texts.txt")])


# Features


def test_the_distance_of_real_images_to_themselves_is_zero(bundle, photos):
    model = ClipGen.load(bundle)
    views = scores.read_real(str(photos), 32, 8, seed=0)[1]
    for name in ("clip", "judge"):
        network = features.load_network(name, model.clip, "CLIP")
        found = scores.distances(network, views, views, None, torch.device("cpu"))
        assert set(found) == {"mmd", "frechet_distance",
                               *(f"frechet_distance_blur_{r}" for r in (1, 2, 4, 8))}
        assert found.pop("mmd") < 0  # unbiased: less than the 0 of two draws
        assert max(found.values()) < 1e-3


def test_views_are_drawn_by_seed_and_centred(photos):
    images = open_images(photos)[0]
    names, views, other = scores.read_real(str(photos), 40, 100, seed=0)
    assert other is None
    assert sorted(names) == sorted(set(images.names) - {"torn.png"})
    assert views.shape == (12, 3, 40, 40) and views.dtype == torch.uint8
    with Image.open(photos / names[3]) as image:
        assert (views[3].permute(1, 2, 0).numpy() == np.asarray(image)[:, 4:44]).all()
    assert scores.read_real(str(photos), 40, 5, seed=0)[0] == names[:5]
    assert scores.read_real(str(photos), 40, 5, seed=1)[0] != names[:5]


def test_radii_are_shares_of_the_side():
    seen = []
    network = features.Network("pixels", 1, "none", lambda x: seen.append(x) or x[:, 0, 0, :1])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    result = features.blurred_features(network, images, torch.device("cpu"))
    assert result.shape == (5, 2, 1)
    assert torch.equal(seen[0], images / 255)
    torch.testing.assert_close(seen[4], features.blur(images / 255, 8 * 64 / 256))


def test_without_inception_it_is_clip_and_one_line_says_so(bundle, monkeypatch, tmp_path, capsys):
    clip = ClipGen.load(bundle).clip
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for installed, reason in ((None, "pip install torch-fidelity"), (True, "download https://")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        network = features.load_network(None, clip, "some CLIP")
        assert network.name == "embeddings of some CLIP" and network.classify is None
        error = capsys.readouterr().err
        assert error.startswith("features of CLIP, not of Inception: ") and error.count("\n") == 1
        assert reason in error
        with pytest.raises(ValueError, match="--features inception: "):
            features.load_network("inception", clip, "some CLIP")


# Sheets


def test_scores_outlive_a_sheet_that_cannot_be_written(bundle, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a cat\na dog\n")
    (tmp_path / "full.png").symlink_to("/dev/full")
    err = run(capsys, bundle, "--prompts", tmp_path / "texts.txt", "--candidates", 1,
              "--sheet", tmp_path / "full.png")[2]
    assert f"--sheet {tmp_path / 'full.png'} cannot be written (No space left on device)" in err


def test_texts_on_a_sheet_wrap_and_end_in_an_ellipsis():
    from PIL import ImageFont
    font = ImageFont.load_default(12)
    text = "a very long text about one elephant and three hundred and twelve other animals"
    assert " ".join(wrap(text, 128, font, 9)) == text
    cut = wrap(text, 128, font, 2)
    assert len(cut) == 2 and cut[1].endswith("…") and text.startswith(" ".join(cut)[:-2])
    assert max(font.getlength(line) for line in cut) <= 128
    assert wrap("w" * 99, 128, font, 2)[0].endswith("w…")
    small = sheet([("a", Image.new("RGB", (32, 32)))] * 9, "title")
    assert small.width == 8 * 136 + 8 and small.height > 2 * 128
    assert sheet([("a", Image.new("RGB", (256, 256)))]).width == 256 + 16


# The default bundle


@pytest.fixture(scope="module")
def emoji():
    return ClipGen.load(ROOT / "weights" / "emoji")


def test_the_default_bundle_knows_its_world(emoji):
    size = len(load_judge().objects)
    for i in range(300):
        assert not any(emoji.clip.unknown_words(text)
                       for text in scenes.Scenes(range(300), size, held_out=None).captions(i))
    for text in world_prompts.texts_of(world_prompts.held_out_labels(200, size, 0), 0):
        assert not emoji.clip.unknown_words(text)
    with pytest.warns(UnknownWords, match="'submarine'"):
        image, = emoji.generate("a submarine on the beach", num_images=1, candidates=1, seed=0)
    assert image.image.size == (128, 128)


@pytest.mark.slow
def test_the_default_bundle_draws_what_texts_say(emoji, capsys):
    result, _, _ = run(capsys, ROOT / "weights" / "emoji", "--prompts", 50, "--seed", 1,
                       command=emoji_evaluate)
    # A little below what 200 texts gave: 50 texts are 2 points each.
    assert result["object_right"] >= 0.85 and result["object_right_one_candidate"] >= 0.8
    assert result["place_right"] >= 0.95 and result["time_right"] >= 0.95
