"""Train a small CLIP on images with captions (for bundles that bring their own).

    python -m scripts.train_clip runs/scenes.tar --run runs/clip [--steps 4000]

Captions are read from NAME.txt beside each image, one a line; one is drawn at every use.  The
vocabulary keeps the tokens that occur in them, so that the bundle can say which words it never saw.
The loss is CLIP's symmetric cross-entropy (arXiv 2103.00020).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.clip import CLIP, CLIPConfig, vocabulary_of
from scripts.images import ImageSet, read_images
from scripts.runs import (
    Average,
    Run,
    adamw,
    learning_rate,
    save_weights,
    set_learning_rate,
    settings_of,
)


def small_config(vocabulary: tuple[int, ...]) -> CLIPConfig:
    """A convolutional image tower (its feature maps also serve as perceptual loss)."""
    return CLIPConfig(
        model={"embed_dim": 128, "quick_gelu": False,
               "vision_cfg": {"image_size": 64, "layers": [1, 2, 2, 1], "width": 24,
                              "head_width": 64},
               "text_cfg": {"context_length": 32, "vocab_size": len(vocabulary), "width": 128,
                            "heads": 4, "layers": 3}},
        vocabulary=vocabulary)


def shift(pixels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels, edges repeated; captions stay true, left and right
    too."""
    n, _, h, w = pixels.shape
    padded = F.pad(pixels, (most, most, most, most), mode="replicate")
    dy, dx = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
    return torch.stack([p[:, y:y + h, x:x + w] for p, y, x in zip(padded, dy, dx, strict=True)])


@torch.no_grad()
def retrieval(clip: CLIP, images: ImageSet, count: int = 500) -> float:
    """Share of images whose nearest caption of 100 is their own, or that of an equal label."""
    hits = 0
    for start in range(0, count, 100):
        index = torch.arange(start, start + 100)
        embedded = clip.embed_pixels(images.batch(index))
        texts = [images.captions[i][0] for i in index]
        nearest = (embedded @ clip.embed_texts(texts).T).argmax(1).tolist()
        same = images.labels[start:start + 100]
        hits += sum(texts[j] == texts[i] or same[j] == same[i] != {}
                    for i, j in enumerate(nearest))
    return hits / count


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", type=Path)
    p.add_argument("--validation", type=Path, help="images with captions that are not trained on")
    p.add_argument("--run", type=Path, required=True, help="directory of checkpoints and result")
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--steps", type=int, default=4000)
    p.add_argument("--batch", type=int, default=192)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    images = read_images(a.images, a.size)
    if not all(images.captions):
        raise SystemExit(f"{images.captions.count([])} images of {a.images} have no NAME.txt: "
                         "a CLIP learns from captions")
    held = read_images(a.validation, a.size) if a.validation else None
    tokens_of = sorted({line for lines in images.captions for line in lines})
    vocabulary = vocabulary_of(tokens_of)
    clip = CLIP(small_config(vocabulary))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip.to(device, memory_format=torch.channels_last)
    tokens = dict(zip(tokens_of, clip.tokenize(tokens_of), strict=True))
    optimizer = adamw(clip, a.lr, 0.1)
    average = Average(clip, 0.999)
    run = Run(a.run, settings_of(a))
    first = 0
    if state := run.resume():
        clip.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.state = state["average"]
        first = state["step"]
    loss_sum = 0.0
    for step in range(first, a.steps):
        generator = torch.Generator().manual_seed(a.seed * 1_000_003 + step)
        index = torch.randint(len(images), (a.batch,), generator=generator)
        lines = [images.captions[i] for i in index]
        which = torch.rand(a.batch, generator=generator).tolist()
        batch = torch.stack([tokens[c[int(u * len(c))]] for c, u in zip(lines, which, strict=True)])
        pixels = shift(images.batch(index), 3, generator).to(device)
        pixels = clip.preprocess(pixels).contiguous(memory_format=torch.channels_last)
        image = F.normalize(clip.model.encode_image(pixels), dim=-1)
        text = F.normalize(clip.model.encode_text(batch.to(device)), dim=-1)
        logits = clip.model.logit_scale.exp() * image @ text.T
        target = torch.arange(a.batch, device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        set_learning_rate(optimizer, learning_rate(step, a.steps, a.lr, 200))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.model.logit_scale.clamp_(0, 4.6052)  # CLIP's limit: ln 100
        average.update(clip, step)
        loss_sum += loss.item()
        done = step + 1
        if done % 50 == 0:
            run.log(done, a.steps, loss=loss_sum / 50, scale=clip.model.logit_scale.exp())
            loss_sum = 0.0
        if run.due() or done == a.steps:
            run.save(done, model=clip.state_dict(), optimizer=optimizer.state_dict(),
                     average=average.state)
            if held and len(held) >= 500:
                clip.eval()
                run.log(done, a.steps, retrieval=retrieval(clip, held))
                clip.train()
    clip.load_state_dict(average.state)
    clip.eval()
    save_weights(clip.state_dict(), a.run / "clip.safetensors")
    config = {"model": clip.config.model, "vocabulary": list(vocabulary)}
    (a.run / "clip.json").write_text(json.dumps(config))
    result = {"retrieval_r1_of_100": retrieval(clip, held)} if held and len(held) >= 500 else {}
    print(json.dumps({"steps": a.steps, **result}))


if __name__ == "__main__":
    main()
