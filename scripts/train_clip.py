"""Train a small CLIP on images with captions (for bundles that bring their own).

    python -m scripts.train_clip runs/scenes.tar --run runs/clip [--steps 4000]
    accelerate launch -m scripts.train_clip ...      on several devices

Captions are read from NAME.txt beside each image, one a line; one is drawn at every use.  The
vocabulary keeps the tokens that occur in them, so that the bundle can say which words it never saw.
The loss is CLIP's symmetric cross-entropy (arXiv 2103.00020) over the batches of all processes.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from clipgen.clip import CLIP, CLIPConfig, vocabulary_of
from scripts.data.dataset import Feed, open_parts, refuse_inside, stack_views
from scripts.data.images import Images
from scripts.training import trainer
from scripts.training.cli import positive, scale, share, whole
from scripts.training.optim import Average, adamw, learning_rate, set_learning_rate

RETRIEVED = 100  # texts that an image's own is looked for among


def small_config(vocabulary: tuple[int, ...], a: argparse.Namespace) -> CLIPConfig:
    """A convolutional image tower (its feature maps also serve as perceptual loss)."""
    return CLIPConfig(
        model={"embed_dim": a.embedding_dim, "quick_gelu": False,
               "vision_cfg": {"image_size": a.size, "layers": [1, 2, 2, 1], "width": a.width,
                              "head_width": 64},
               "text_cfg": {"context_length": 32, "vocab_size": len(vocabulary),
                            "width": a.text_width, "heads": a.text_width // 32,
                            "layers": a.text_layers}},
        vocabulary=vocabulary)


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes (torch's own SyncBatchNorm has no CPU form)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        exact = x.float()
        mine = torch.stack(torch.var_mean(exact, (0, 2, 3), correction=0))  # (2, C)
        variances, means = torch.stack(distributed.all_gather(mine), 1)  # (world, C) each
        mean = means.mean(0)
        variance = (variances + (means - mean)**2).mean(0)
        with torch.no_grad():
            n = len(means) * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (exact * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x)


def share_batch_norm(module: nn.Module) -> None:
    for layer in module.modules():
        if type(layer).__name__.startswith("BatchNorm"):
            layer.__class__ = SharedBatchNorm


def shift(pixels: Tensor, moves: Tensor) -> Tensor:
    """Each image of (N, 3, H, W) moved by its (dy, dx) in `moves` (N, 2), -3 to 3 pixels, edges
    repeated; captions stay true, left and right too."""
    h, w = pixels.shape[2:]
    padded = F.pad(pixels, (3, 3, 3, 3), mode="replicate")
    return torch.stack([p[:, 3 + y:3 + y + h, 3 + x:3 + x + w]
                        for p, (y, x) in zip(padded, moves.tolist(), strict=True)])


class Pair(nn.Module):
    """Both towers and the scale in one forward pass, as gradient sync wants it."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.model = clip.model

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (F.normalize(self.model.encode_image(pixels), dim=-1),
                F.normalize(self.model.encode_text(tokens), dim=-1), self.model.logit_scale.exp())


class CLIPTraining:
    """See `trainer.Training`."""

    def __init__(self, a: argparse.Namespace, accelerator: Accelerator, steps: int, clip: CLIP,
                 images: Images, lines: list[list[str]],
                 held: tuple[Tensor, list[str], list[dict]]):
        self.a, self.accelerator, self.steps, self.held = a, accelerator, steps, held
        self.clip = copy.deepcopy(clip).to(accelerator.device).train()
        self.clip.to(memory_format=torch.channels_last)
        if accelerator.num_processes > 1:
            share_batch_norm(self.clip)
        self.lines = lines
        texts = sorted({line for each in lines for line in each})
        self.tokens = dict(zip(texts, clip.tokenize(texts), strict=True))
        self.feed = Feed(images, a.size, a, accelerator, steps)
        self.average = Average(self.clip, a.ema)
        self.evaluated = copy.deepcopy(clip).to(accelerator.device).eval()
        self.wrapped, self.optimizer = accelerator.prepare(Pair(self.clip),
                                                           adamw(self.clip, a.lr, 0.1))

    def step(self, step: int) -> dict[str, Tensor]:
        a, accelerator = self.a, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        mine = slice(rank * a.batch, (rank + 1) * a.batch)
        generator = trainer.generator(a.seed, step)
        index, pixels = self.feed(step)
        which = torch.rand(world * a.batch, generator=generator)[mine].tolist()
        moves = torch.randint(-3, 4, (world * a.batch, 2), generator=generator)[mine]
        lines = [self.lines[i] for i in index]
        tokens = torch.stack([self.tokens[c[int(u * len(c))]]
                              for c, u in zip(lines, which, strict=True)])
        pixels = shift(pixels.to(accelerator.device).float() / 255, moves)
        pixels = self.clip.preprocess(pixels).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            image, text, scale = self.wrapped(pixels, tokens.to(accelerator.device))
        image, text = image.float(), text.float()
        if world > 1:
            image, text = (torch.cat(distributed.all_gather(x)) for x in (image, text))
        logits = scale * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        set_learning_rate(self.optimizer, learning_rate(step, self.steps, a.lr, a.warmup))
        self.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(self.clip.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.clip.model.logit_scale.clamp_(0, 4.6052)  # CLIP's limit: ln 100
        self.average.update(self.clip, step)
        return {"loss": loss, "scale": scale}

    def state(self) -> dict[str, Any]:
        return {"model": self.clip.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state}

    def load(self, state: dict[str, Any]) -> None:
        self.clip.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load(state["average"])

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """`retrieval`: share of held-out images whose nearest caption of 100 is their own, or one
        of an image with equal labels."""
        self.evaluated.load_state_dict(self.average.state)
        pixels, texts, labels = self.held
        hits = 0
        for start in range(0, len(pixels), RETRIEVED):
            part = slice(start, start + RETRIEVED)
            embedded = self.evaluated.embed_pixels(pixels[part].float() / 255)
            nearest = (embedded @ self.evaluated.embed_texts(texts[part]).T).argmax(1).tolist()
            named, same = texts[part], labels[part]
            hits += sum(named[j] == named[i] or same[j] == same[i] != {}
                        for i, j in enumerate(nearest))
        return {"retrieval": hits / len(pixels)}, {}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("images", help="folder, zip, tar, shards, or coco:, googlecc: and a folder")
    add("--captions", type=Path, help="NAME, tab, caption a line; or COCO's captions JSON")
    add("--validation", help="images with captions that are not trained on (default: a share)")
    add("--held-out", type=float, default=0.05, help="share that is not trained on (0.05)")
    add("--size", type=positive, default=64, help="pixels a side (64)")
    add("--embedding-dim", type=positive, default=128)
    add("--width", type=positive, default=24, help="of the image tower (24)")
    add("--text-width", type=positive, default=128)
    add("--text-layers", type=positive, default=3)
    trainer.add_arguments(p, steps=4000, batch=192, lr=1e-3)
    add("--warmup", type=whole, default=200, help="steps (200)")
    add("--ema", type=share, default=0.999, help="decay of the averaged weights (0.999)")
    add("--scale", type=scale, default=1.0, help="least share of the side in a crop (1)")
    add("--flip", action="store_true", help="mirror too; captions may say left and right")
    add("--workers", type=whole, default=0, help="processes that read images (0: none apart)")
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    a = parse(arguments)
    accelerator = trainer.start(a.dtype, a.seed)
    if a.text_width % 32:
        raise SystemExit(f"--text-width {a.text_width} is no multiple of 32")
    try:
        refuse_inside(a.images, run=a.run)
        images, held, data = open_parts(a.images, a.validation, a.held_out, a.captions)
        lines = [images.captions(i) for i in range(len(images))]
        shown, views = stack_views(held, a.size, 1000)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    texts = [held.captions(i) for i in shown]
    for given, source in ((lines, a.images), (texts, a.validation or a.images)):
        if not all(given):
            raise SystemExit(f"{given.count([])} images of {source} have no caption: give NAME.txt "
                             "beside each, or --captions")
    vocabulary = vocabulary_of({line for each in lines for line in each})
    clip = CLIP(small_config(vocabulary, a))
    held_set = (views, [each[0] for each in texts], [held.labels(i) for i in shown])
    training, steps, scores = trainer.run(
        a, accelerator, lambda steps: CLIPTraining(a, accelerator, steps, clip, images, lines,
                                                   held_set),
        data=data, clip=clip.config.model)
    if accelerator.is_main_process:
        trainer.finish(a.run, "clip", training.average.state,
                    {"model": clip.config.model, "vocabulary": list(vocabulary)})
    accelerator.wait_for_everyone()
    return {"steps": steps, "n_images": len(images), "n_held_out": len(shown)} | scores


if __name__ == "__main__":
    trainer.report(main())
