"""A text tower fitted to an image tower that stays: what it learns, what goes on fitting."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from clipgen import ClipGen
from scripts import make_bundle, train_text
from scripts.data.dataset import stack_views
from scripts.data.presets import open_images
from scripts.training import checkpoints, text, trainer
from scripts.training.loading import (
    CODES,
    IMAGE_TOWER,
    fingerprint,
    load_clip,
    load_gpt,
    load_vqgan,
)
from scripts.training.run_directory import finish
from tests.micro import micro_bundle
from tests.processes import micro_images

MEANS = {"text_embedding_mean": [0.1] * 32, "image_embedding_mean": [0.05] * 32}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return micro_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, images):
    source = open_images(str(images))[0]
    lines = [line for i in range(len(source)) for line in source.captions(i)]
    return micro_bundle(tmp_path_factory.mktemp("bundle"), vocabulary=lines, null_embedding=True,
                        dtype=torch.float16)


def train(images, clip, run, *more, steps=40):
    return train_text.main([str(images), "--clip", str(clip), "--run", str(run), "--steps",
                            str(steps), "--batch", "16", "--warmup", "1", *more])


@pytest.fixture(scope="module")
def fitted(images, bundle, tmp_path_factory):
    run = tmp_path_factory.mktemp("fitted") / "run"
    return run, train(images, bundle, run)


def centred(bundle, directory):
    """The same CLIP with means that it takes off."""
    shutil.copytree(bundle, directory)
    config = json.loads((directory / "config.json").read_text())
    config["clip"] |= MEANS
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def cosine(clip, images):
    """Of all images with their captions, on average."""
    source = open_images(str(images))[0]
    pairs = [(i, line) for i in range(len(source)) for line in source.captions(i)]
    pixels = torch.stack([torch.tensor(list(source.image(i).convert("RGB").tobytes())).view(
        40, 40, 3).permute(2, 0, 1) for i, _ in pairs])
    embedded = clip.embed_pixels(pixels.float() / 255)
    return (embedded * clip.embed_texts([line for _, line in pairs])).sum(1).mean().item()


@pytest.mark.parametrize("means", [False, True])
def test_texts_come_nearer_to_their_images_which_stay(images, bundle, tmp_path, means):
    clip = centred(bundle, tmp_path / "centred") if means else bundle
    printed = train(images, clip, tmp_path / "run")
    before, after = load_clip(clip), load_clip(tmp_path / "run")
    assert fingerprint(after, *IMAGE_TOWER) == fingerprint(before, *IMAGE_TOWER)
    assert after.config == before.config  # its vocabulary and means are kept
    assert cosine(after, images) > max(cosine(before, images) + 0.1, 0.8)
    assert printed["cosine"] > 0.8 and 0 < printed["retrieval"] <= 1
    assert printed["steps"] == 40 and printed["n_images"] + printed["n_held_out"] == 40


@pytest.mark.parametrize("means", [False, True])
def test_the_gradient_is_that_of_embed_texts(bundle, tmp_path, means):
    clip = load_clip(centred(bundle, tmp_path / "centred") if means else bundle)
    texts = ["red", "an image of blue", ""]
    tower = text.TextTower(clip)
    text.train_text_alone(clip)
    embedded = tower(clip.tokenize(texts))
    torch.testing.assert_close(embedded, clip.embed_texts(texts))
    target = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    F.cosine_similarity(embedded, target).sum().backward()
    reached = {name for name, p in clip.model.named_parameters() if p.grad is not None}
    assert "text_projection" in reached and "positional_embedding" in reached
    assert not any(name.startswith("visual.") or name == "logit_scale" for name in reached)


def test_what_was_stopped_ends_in_the_same_bits(images, bundle, fitted, tmp_path, monkeypatch):
    """It embeds the images once."""
    run, printed = fitted
    stopped = trainer.Trainer.agree
    monkeypatch.setattr(trainer.Trainer, "agree", lambda self, done: (
        (True, True) if done == 17 else stopped(self, done)))
    with pytest.raises(SystemExit):
        train(images, bundle, tmp_path / "run")
    assert checkpoints.load(tmp_path / "run")["step"] == 17
    monkeypatch.undo()
    monkeypatch.setattr(text, "all_views", None)
    assert train(images, bundle, tmp_path / "run") == printed
    name = "clip.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()


def test_a_gpt_takes_the_new_texts_without_training(bundle, fitted, tmp_path):
    run, _ = fitted
    parts = ["--vqgan", str(bundle), "--gpt", str(bundle)]
    make_bundle.main([str(tmp_path / "made"), "--clip", str(run), *parts])
    made, before = ClipGen.load(tmp_path / "made"), ClipGen.load(bundle)
    for one, other in zip(made.gpt.parameters(), before.gpt.parameters(), strict=True):
        assert torch.equal(one, other.half().float())
    torch.testing.assert_close(made.clip.embed_texts(["red"]), load_clip(run).embed_texts(["red"]),
                               atol=0.01, rtol=0)
    assert made.generate("red", num_images=1, candidates=2, seed=0)[0].image.size == (32, 32)
    other = micro_bundle(tmp_path / "other", seed=1, vocabulary=["red"])
    with pytest.raises(SystemExit, match="shards of another clip"):
        make_bundle.main([str(tmp_path / "odd"), "--clip", str(other), *parts])


@pytest.mark.parametrize("says, means, fits", [(True, None, True), (True, MEANS, False),
                                               (False, None, False)])
def test_a_run_of_a_gpt_says_what_it_was_trained_on(bundle, fitted, tmp_path, says, means, fits):
    """Where it takes means off, that of texts was measured with the old tower."""
    clip, gpt = load_clip(bundle), load_gpt(bundle)
    made_of = {"clip_sha256": fingerprint(clip), "vqgan_sha256": fingerprint(load_vqgan(bundle),
                                                                            *CODES)}
    made_of["means"] = means and {"text": means["text_embedding_mean"],
                                  "image": means["image_embedding_mean"]}
    if says:
        made_of["image_tower_sha256"] = fingerprint(clip, *IMAGE_TOWER)
    (tmp_path / "gpt").mkdir()
    finish(tmp_path / "gpt", "gpt", gpt.state_dict(), vars(gpt.config), shards=made_of)
    for source, right in ((bundle, True), (fitted[0], fits)):
        arguments = [str(tmp_path / f"made-{right}"), "--clip", str(source), "--vqgan",
                     str(bundle), "--gpt", str(tmp_path / "gpt"), "--force"]
        if right:
            make_bundle.main(arguments)
        else:
            with pytest.raises(SystemExit, match="shards of another clip"):
                make_bundle.main(arguments)


def test_each_caption_goes_with_its_own_image(images, bundle, tmp_path, monkeypatch):
    """Also after one that cannot be read."""
    folder, seen = shutil.copytree(images, tmp_path / "images"), {}
    for path in sorted(folder.glob("*.png"))[3:5]:
        path.write_bytes(b"no image")

    class Seen(text.TextTask):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.update(vars(self))

    monkeypatch.setattr(text, "TextTask", Seen)
    train(folder, bundle, tmp_path / "run", steps=1)
    source, clip = open_images(str(folder))[0], load_clip(bundle)
    own = {}
    for i in range(len(source)):
        if source.names[i] not in [path.name for path in sorted(folder.glob("*.png"))[3:5]]:
            view = stack_views(source.subset([i]), 32, 1)[1].float() / 255
            own.setdefault(tuple(source.captions(i)), []).append(clip.embed_pixels(view)[0])
    assert len(own) > 5 and 30 < len(seen["embeddings"]) == len(seen["lines"]) < 39
    near = {words: [min((e.float() - each).norm().item() for each in own[words])
                    for e in seen["embeddings"]] for words in own}
    for k, words in enumerate(map(tuple, seen["lines"])):
        assert near[words][k] < 2e-3
    assert all(max(distances) > 0.01 for distances in near.values())


def test_words_that_cannot_be_learned_are_named(bundle):
    clip = load_clip(bundle)
    assert text.lacking(clip, [["an image of red"], ["red"]]) == ""
    assert text.lacking(clip, [["zebra", "red"], ["red zebra, xylophone"]]) == (
        "2 words of the captions are not in the vocabulary of the CLIP and will not be learned: "
        "'xylophone', 'zebra'")


def test_a_run_that_cannot_be_written_is_one_sentence(images, bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=r"embeddings-\w+.npz cannot be written .*--run"):
        train(images, bundle, tmp_path / "file" / "run")


def test_other_images_or_another_clip_are_another_run(images, bundle, fitted, tmp_path):
    run = shutil.copytree(fitted[0], tmp_path / "run")
    other = micro_bundle(tmp_path / "other", seed=1, vocabulary=["red"])
    with pytest.raises(SystemExit, match="other settings .clip_sha256"):
        train(images, other, run)
    bare = shutil.copytree(images, tmp_path / "bare")
    next(bare.glob("*.txt")).unlink()
    with pytest.raises(SystemExit, match="1 images of .*bare have no caption: give NAME.txt"):
        train(bare, bundle, tmp_path / "new")
