"""The published checkpoints: what the public implementation returned on them is what we return.

Stand-in checkpoints (tests/published/seeded.py) go through the real converter, as a process; all
numbers are compared with golden.npz, recorded in float32 on a CPU.  Takes a few minutes, 5 GB of
disk and 4 GB of memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clipgen import ClipGen
from clipgen.sampling import filter_logits
from tests.published import seeded

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(3600)  # a busy machine is no fault of the numbers
MARGIN = 1e-3  # where the best two lie closer than this, rounding may choose
SHARE = 0.995  # of places, however close


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "published" / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory):
    """The bundle that the converter makes of the stand-ins, and its line of JSON."""
    directory = tmp_path_factory.mktemp("published")
    paths = seeded.write(directory / "pt")
    command = [sys.executable, "-m", "scripts.convert_weights", str(directory / "coco"),
               "--dtype", "float32"]
    for part, path in paths.items():
        command += [f"--{part}", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(directory / "pt")
    yield directory / "coco", json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def model(converted) -> ClipGen:
    return ClipGen.load(converted[0], device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def text_embedding(model: ClipGen, golden: dict) -> Tensor:
    return model.clip.embed_texts(list(golden["texts"]))


def pixels(size: int) -> Tensor:
    return torch.from_numpy(seeded.image(0, size)).permute(2, 0, 1)[None].float() / 255


def integers(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def margins(scores: Tensor) -> Tensor:
    """How far the best of the last dimension is above the second best."""
    best = scores.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def same_where_clear(ours: Tensor, theirs: Tensor, margin: Tensor) -> None:
    assert ours.shape == theirs.shape == margin.shape
    same = ours == theirs
    assert same[margin > MARGIN].all()
    assert same.float().mean() >= SHARE


def test_the_converter_says_what_it_made(converted) -> None:
    directory, line = converted
    assert line["directory"] == str(directory) and line["dtype"] == "float32"
    assert {p.name for p in directory.iterdir()} == {*line["files"], "config.json", "README.md"}
    assert line["bytes"] == sum((directory / name).stat().st_size for name in line["files"])
    assert not [p for p in directory.parent.iterdir() if p != directory]  # nothing left beside it


def test_sampling_defaults_are_those_of_the_public_demo(converted) -> None:
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["sampling"] == {"temperature": 1.0, "top_k": 500, "top_p": 0.95, "guidance": 1.0}


def test_text_tokens(model: ClipGen, golden: dict) -> None:
    assert torch.equal(model.clip.tokenize(list(golden["texts"])), integers(golden["text_tokens"]))


def test_text_embedding(text_embedding: Tensor, golden: dict) -> None:
    np.testing.assert_allclose(text_embedding.numpy(), golden["text_embedding"], rtol=0, atol=1e-5)


def test_image_embedding(model: ClipGen, golden: dict) -> None:
    ours = model.clip.embed_pixels(pixels(224))
    np.testing.assert_allclose(ours.numpy(), golden["image_embedding"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_vqgan_indices(model: ClipGen, golden: dict) -> None:
    features = model.vqgan.encoder(pixels(256) * 2 - 1).permute(0, 2, 3, 1).double()
    book = model.vqgan.quantizer.embedding.weight.double()
    distance = torch.cdist(features.flatten(0, 2), book).square().view(1, 16, 16, -1)
    same_where_clear(model.vqgan.encode(pixels(256)), integers(golden["vqgan_indices"]),
                     margins(-distance))


@torch.no_grad()
def test_decoded(model: ClipGen, golden: dict) -> None:
    codes, theirs = integers(golden["codes"]), golden["decoded"].astype(np.float32)
    ours = model.vqgan.decode_raw(codes)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=2e-3)
    np.testing.assert_allclose(model.vqgan.decode(codes).numpy(),
                               np.clip(theirs * 0.5 + 0.5, 0, 1), rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def logits(model: ClipGen, text_embedding: Tensor, golden: dict) -> Tensor:
    with torch.no_grad():
        return model.gpt(text_embedding[:2], integers(golden["gpt_tokens"]))


def test_gpt_logits(logits: Tensor, golden: dict) -> None:
    assert logits.shape == (2, 256, 16384)
    ours = logits[:, golden["gpt_logits_positions"], :2048]
    np.testing.assert_allclose(ours.numpy(), golden["gpt_logits"], rtol=0, atol=1e-3)


def test_gpt_argmax(logits: Tensor, golden: dict) -> None:
    same_where_clear(logits.argmax(-1), integers(golden["gpt_argmax"]), margins(logits))


@pytest.mark.parametrize(("array", "scale", "top_k", "top_p"), [
    ("filtered_logits_top_k_500_top_p_0.95", 1, 500, 0.95),
    ("filtered_logits_x8_top_k_100_top_p_0.5", 8, 100, 0.5),
])
def test_filtered_sets(logits: Tensor, golden: dict, array: str, scale: float, top_k: int,
                       top_p: float) -> None:
    row_logits = logits[:, 17] * scale
    probabilities, codes = filter_logits(row_logits, 1.0, top_k, top_p)
    kept = torch.zeros_like(row_logits).scatter(1, codes, probabilities) > 0
    theirs = torch.from_numpy(np.isfinite(golden[array]))
    # A code is clear when its logit is not within MARGIN of the last one the recording kept.
    last = row_logits.masked_fill(~theirs, float("inf")).min(1, keepdim=True).values
    clear = (row_logits - last).abs() > MARGIN
    assert (~clear).sum() < 20, "the comparison has too few places left"
    assert torch.equal(kept[clear], theirs[clear])
    assert (kept[kept | theirs] == theirs[kept | theirs]).float().mean() >= SHARE
    # What is kept is as likely as in the recording.
    expected = torch.from_numpy(golden[array]).softmax(1)
    ours = torch.zeros_like(row_logits).scatter(1, codes, probabilities)
    both = kept & theirs
    np.testing.assert_allclose((ours / ours.sum(1, keepdim=True))[both].numpy(),
                               expected[both].numpy(), rtol=0, atol=1e-3)


@torch.no_grad()
def test_greedy_sequences(model: ClipGen, text_embedding: Tensor, golden: dict,
                          capsys: pytest.CaptureFixture) -> None:
    started, worked = time.monotonic(), time.process_time()
    ours = model.sample(text_embedding[:2], [0, 1], top_k=1).reshape(2, 256).cpu()
    seconds, worked = time.monotonic() - started, time.process_time() - worked
    with capsys.disabled():
        print(f"\n  two greedy rows of 256 codes: {seconds:.0f} s on {torch.get_num_threads()} "
              f"thread(s), {worked:.0f} s of processor time "
              "(public implementation: 362 s on two cores)")
    theirs = integers(golden["greedy_tokens"])
    margin = margins(model.gpt(text_embedding[:2], theirs[:, :-1]))
    for row in range(2):
        close = (margin[row] < MARGIN).nonzero()
        end = int(close[0]) if len(close) else 256
        assert end > 64, "the comparison has too few places left"
        assert torch.equal(ours[row, :end], theirs[row, :end])
