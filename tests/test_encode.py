"""Shards: that they hold what they should, survive being killed, and are refused when damaged."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from scripts.data import shards
from scripts.data.images import split
from scripts.data.presets import open_images
from scripts.data.shards import read_shards
from scripts.data.transforms import centre_view
from scripts.encode_images import main
from scripts.training import encoding
from scripts.training.encoding import Crops
from scripts.training.loading import CODES, fingerprint, load_clip, load_vqgan
from tests.micro import micro_bundle, micro_vqgan
from tests.processes import ONE_THREAD, TWO_PROCESSES

PER_SHARD, COUNT, CROPS, UNREADABLE = 8, 30, 3, ("04.png", "05.png")


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """8 images a shard, on one thread: sums of more may differ in the last bit."""
    threads, per_shard = torch.get_num_threads(), encoding.IMAGES_PER_SHARD
    torch.set_num_threads(1)
    encoding.IMAGES_PER_SHARD = PER_SHARD
    yield
    torch.set_num_threads(threads)
    encoding.IMAGES_PER_SHARD = per_shard


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return micro_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """30 images in a tar, 2 unreadable, every other one with a caption."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "images.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(COUNT):
            data = io.BytesIO()
            pixels = rng.integers(0, 256, (5, 6, 3), np.uint8)
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(data, "PNG")
            files = {f"{i:02d}.png": data.getvalue()}
            if i % 2:
                files[f"{i:02d}.txt"] = f"caption {i}\nanother".encode()
            if f"{i:02d}.png" in UNREADABLE:
                files[f"{i:02d}.png"] = b"x"
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def flags(bundle, *more):
    return ["--clip", str(bundle), "--vqgan", str(bundle), "--crops", str(CROPS), "--held-out",
            "0.3", "--batch", "9", *map(str, more)]


@pytest.fixture(scope="module")
def encoded(source, bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "shards"
    return out, main([str(source), str(out), *flags(bundle)])


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_the_manifest(encoded, source, bundle):
    out, summary = encoded
    manifest = json.loads((out / "manifest.json").read_text())
    assert summary["train_images"] + summary["validation_images"] == COUNT - 2
    assert summary["skipped"] == 2 and sorted(manifest["skipped"]) == list(UNREADABLE)
    assert summary["clip_sha256"] == fingerprint(load_clip(bundle))
    assert summary["vqgan_sha256"] == fingerprint(load_vqgan(bundle), *CODES)
    train, held = split(open_images(source)[0], 0.3)
    assert manifest["data_sha256"] == {"train": train.fingerprint(),
                                       "validation": held.fingerprint()}
    assert {k: summary[k] for k in ("grid", "codebook_size", "embedding_dim", "size", "crops",
                                    "scale", "flip", "seed")} == {
        "grid": [4, 4], "codebook_size": 64, "embedding_dim": 32, "size": 32, "crops": CROPS,
        "scale": 0.85, "flip": True, "seed": 0}
    assert not [name for name in contents(out) if name.startswith(".")]


@pytest.mark.parametrize("part", ["train", "validation"])
def test_codes_and_embeddings_are_those_of_the_very_same_squares(encoded, source, bundle, part):
    out, summary = encoded
    images = dict(zip(("train", "validation"), split(open_images(source)[0], 0.3),
                      strict=True))[part]
    data = read_shards(out, part, check=True)
    readable = [i for i, name in enumerate(images.names) if name not in UNREADABLE]
    assert len(data) == len(readable) == summary[f"{part}_images"]
    assert (data.crops, data.length, data.embedding_dim) == (CROPS, 16, 32)
    clip, vqgan = load_clip(bundle), load_vqgan(bundle)
    views = [Crops(images, data.manifest)[i] for i in readable]
    rows, counts, every = torch.arange(len(data)), torch.zeros(64, dtype=torch.int64), []
    for crop in range(CROPS):
        codes, embeddings = data.rows(rows, torch.full_like(rows, crop))
        pixels = torch.stack([v[crop] for v in views]).float() / 255
        assert codes.dtype == torch.int64
        assert (codes == vqgan.encode(pixels).flatten(1)).float().mean() > 0.99
        torch.testing.assert_close(embeddings, clip.embed_pixels(pixels), atol=1e-3, rtol=0)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(data)))
        counts += codes.flatten().bincount(minlength=64)
        every.append(embeddings)
    assert torch.equal(data.code_counts(), counts)
    torch.testing.assert_close(data.mean_embedding(), torch.cat(every).mean(0))
    assert torch.equal(views[0][0], centre_view(images.image(readable[0]), 32))
    assert len({v.numpy().tobytes() for v in views[0]}) == CROPS
    # Any rows in any order, from several files.
    index = torch.tensor([len(data) - 1, 0, 3, 0])
    codes, _ = data.rows(index, torch.tensor([0, 1, 2, 0]))
    assert torch.equal(codes[3], data.rows(rows[:1], rows[:1])[0][0])
    assert torch.equal(codes[0], data.rows(rows[-1:], rows[:1])[0][0])


def test_captions_of_validation_images_are_embedded(encoded, source, bundle):
    out, _ = encoded
    held = split(open_images(source)[0], 0.3)[1]
    names = [name for name in held.names if name not in UNREADABLE]
    embeddings, indices = read_shards(out, "validation").texts()
    assert [names[i] for i in indices] == [n for n in names if int(n[:2]) % 2]
    texts = [f"caption {int(names[i][:2])}" for i in indices]
    torch.testing.assert_close(embeddings, load_clip(bundle).embed_texts(texts), atol=1e-3, rtol=0)
    mean = torch.tensor(read_shards(out).manifest["text_mean"])
    torch.testing.assert_close(mean, embeddings.mean(0))
    assert read_shards(out, "train").texts() is None


def test_worker_processes_change_nothing(encoded, source, bundle, tmp_path, capsys):
    main([str(source), str(tmp_path / "out"), *flags(bundle, "--workers", 2)])
    assert contents(tmp_path / "out") == contents(encoded[0])
    error = capsys.readouterr().err
    assert all(error.count(f"skipped {name}: no image") == 1 for name in UNREADABLE)


def in_child(action):
    """Runs `action` in a forked process; returns how that ended."""
    pid = os.fork()
    if not pid:
        try:
            action()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("lives", [0, 1, 4, None])  # files written; None: all but the manifest
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(encoded, source, bundle, tmp_path,
                                                           lives):
    out = tmp_path / "out"
    whole = shards.write_bytes

    def killed_run():
        written = []

        def write_bytes(path, data):
            if len(written) == lives or (lives is None and path.name == "manifest.json"):
                path.with_name(f".{path.name}.part").write_bytes(data[:len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
            whole(path, data)

        shards.write_bytes = write_bytes
        main([str(source), str(out), *flags(bundle)])

    for _ in range(3):
        assert in_child(killed_run) == -signal.SIGKILL
        with pytest.raises(ValueError, match="is unfinished: run the command|it has no manifest"):
            read_shards(out)
    summary = main([str(source), str(out), *flags(bundle)])
    assert summary == encoded[1] and contents(out) == contents(encoded[0])
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([str(source), str(out), *flags(bundle)]) == summary  # nothing left to do
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_shards_keep_no_file_open(encoded):
    """There may be more of them than a process may have open."""
    before = len(os.listdir("/proc/self/fd"))
    data = read_shards(encoded[0])
    assert len(data._arrays["codes"]) > 1 and len(os.listdir("/proc/self/fd")) == before


def test_two_processes_make_the_same_shards(encoded, source, bundle, tmp_path):
    script = tmp_path / "encode.py"
    script.write_text("from accelerate import PartialState\n"
                      "from scripts import encode_images\n"
                      "from scripts.training import encoding, run_directory\n"
                      f"encoding.IMAGES_PER_SHARD = {PER_SHARD}\n"
                      "run_directory.report(encode_images.main())\n"
                      "assert PartialState().num_processes == 2\n")
    result = subprocess.run(
        [sys.executable, "-m", *TWO_PROCESSES, str(script), str(source), str(tmp_path / "out"),
         *flags(bundle)], capture_output=True, text=True, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == encoded[1]
    assert result.stdout.count("codebook_size") == 1
    assert contents(tmp_path / "out") == contents(encoded[0])


# Refusals


def test_other_settings_are_refused(encoded, source, bundle, tmp_path):
    with pytest.raises(SystemExit, match=r"other settings \(seed 0 became 1\): give those again"):
        main([str(source), str(encoded[0]), *flags(bundle, "--seed", 1)])
    with pytest.raises(SystemExit, match=r"clip_sha256 \w+ became \w+, flip True became False"):
        other = micro_bundle(tmp_path / "other", seed=1)
        main([str(source), str(encoded[0]), *flags(other, "--no-flip")])
    with pytest.raises(SystemExit, match="data_sha256.train "):
        main([str(source), str(encoded[0]), *flags(bundle, "--limit", 5)])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SystemExit, match="holds other files: give a directory that is empty"):
        main([str(source), str(tmp_path), *flags(bundle)])


def test_what_cannot_be_encoded(source, bundle, tmp_path, capsys):
    with pytest.raises(SystemExit, match="none does not exist"):
        main([str(tmp_path / "none"), str(tmp_path / "out"), *flags(bundle)])
    with pytest.raises(SystemExit, match="between 0 and 1, got 1.5"):
        main([str(source), str(tmp_path / "out"), *flags(bundle, "--held-out", 1.5)])
    for wrong, message in (("--scale=0", "not a number from 0.01 to 1"),
                           ("--seed=-1", "not a whole number from 0"),
                           ("--crops=0", "not a whole number from 1")):
        with pytest.raises(SystemExit):
            main([str(source), str(tmp_path / "out"), *flags(bundle, wrong)])
        assert message in capsys.readouterr().err
    large = micro_vqgan(codebook_size=65_537)
    (tmp_path / "vqgan").mkdir()
    save_file(large.state_dict(), tmp_path / "vqgan" / "vqgan.safetensors")
    (tmp_path / "vqgan" / "vqgan.json").write_text(json.dumps(vars(large.config)))
    with pytest.raises(SystemExit, match="65,537 codes, and codes are stored in 16 bits"):
        main([str(source), str(tmp_path / "out"), *flags(bundle, "--vqgan", tmp_path / "vqgan")])
    assert not (tmp_path / "out").exists()


def test_nothing_readable_is_one_sentence(bundle, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(SystemExit, match="none of the 14 train images can be read"):
        main([str(tmp_path / "images"), str(tmp_path / "out"), *flags(bundle)])


def test_validation_images_of_their_own_and_a_limit(source, bundle, tmp_path):
    (tmp_path / "held").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "held" / f"{i}.png")
    summary = main([str(source), str(tmp_path / "out"), *flags(
        bundle, "--validation", tmp_path / "held", "--limit", 2, "--crops", 1)])
    assert (summary["train_images"], summary["validation_images"]) == (2, 2)
    assert read_shards(tmp_path / "out", "validation").texts() is None
    assert read_shards(tmp_path / "out").manifest["text_mean"] is None


@pytest.fixture
def copy(encoded, tmp_path):
    for name, data in contents(encoded[0]).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def edit_manifest(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "train-codes-00001.npy").unlink(), "train-codes-00001.npy is missing: copy it"),
    (lambda d: os.truncate(d / "train-codes-00001.npy", 300), "codes-00001.npy is damaged or cut"),
    (lambda d: os.truncate(d / "train-codes-00001.npy", 10), "codes-00001.npy is damaged or cut"),
    (lambda d: (d / "train-codes-00000.npy").replace(d / "train-codes-00001.npy")
     and (d / "train-codes-00000.npy").write_bytes(b""), "is damaged or cut short"),
    (lambda d: edit_manifest(d, version=2), "is of format version 2, this program reads 1"),
    (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    (lambda d: edit_manifest(d, parts={"train": []}), "holds no train images: encode again"),
    (lambda d: (d / "encoding.json").unlink() or (d / "manifest.json").unlink(),
     "is no directory of shards, it has no manifest.json: make some"),
])
def test_damaged_shards_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        read_shards(copy)


def test_altered_bytes_are_found_when_asked(copy):
    path = copy / "train-embeddings-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    read_shards(copy)
    with pytest.raises(ValueError, match="embeddings-00000.npy is not what was written"):
        read_shards(copy, check=True)


def test_embeddings_come_back_normalised_from_half_precision(copy):
    path = copy / "train-embeddings-00000.npy"
    array = np.load(path)
    np.save(path, (array.astype(np.float32) * 3).astype(np.float16))
    index = torch.arange(5)
    rows = read_shards(copy).rows(index, index * 0)[1]
    torch.testing.assert_close(rows, F.normalize(rows, dim=1))
