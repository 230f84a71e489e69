"""Training a small CLIP on images with captions: settings, the data of a step, the loss."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from clipgen.clip import CLIP, CLIPConfig, vocabulary_of
from scripts.data.dataset import BatchLoader, open_parts, refuse_inside, stack_views
from scripts.data.images import Images
from scripts.data.reading import ReadingSettings
from scripts.training.cli import positive, scale, setting, whole
from scripts.training.optim import adamw
from scripts.training.run_directory import finish
from scripts.training.settings import RunSettings
from scripts.training.trainer import Part, generator, train

RETRIEVED = 100  # texts that an image's own is looked for among
DECAY = 0.1  # weight decay of matrices


@dataclass(kw_only=True)
class CLIPSettings(RunSettings, ReadingSettings):
    """Settings of `scripts.train_clip`."""

    images: str = setting(help="folder, zip, tar, shards, or coco:, googlecc: and a folder",
                          positional=True, free=True)
    captions: Path | None = setting(None, "NAME, tab, caption a line; or COCO's captions JSON",
                                    type=Path, free=True)
    validation: str | None = setting(None, "images with captions that are not trained on "
                                     "(default: a share)", free=True)
    held_out: float = setting(0.05, "share that is not trained on", type=float)
    size: int = setting(64, "pixels a side", type=positive)
    embedding_dim: int = setting(128, type=positive)
    width: int = setting(24, "of the image tower", type=positive)
    text_width: int = setting(128, type=positive)
    text_layers: int = setting(3, type=positive)
    steps: int = setting(4000, type=positive)
    batch: int = setting(192, "of each process", type=positive)
    scale: float = setting(1.0, "least share of the side in a crop", type=scale)
    flip: bool = setting(False, "mirror too; captions may say left and right")
    together: int = setting(1, "so many images that follow each other share a batch: where they "
                            "are alike, their captions are hard negatives", type=positive)
    workers: int = setting(0, "processes that read images, 0: none apart", type=whole, free=True)


def small_config(vocabulary: tuple[int, ...], settings: CLIPSettings) -> CLIPConfig:
    """A convolutional image tower (its feature maps also serve as perceptual loss)."""
    return CLIPConfig(
        model={"embed_dim": settings.embedding_dim, "quick_gelu": False,
               "vision_cfg": {"image_size": settings.size, "layers": [1, 2, 2, 1],
                              "width": settings.width, "head_width": 64},
               "text_cfg": {"context_length": 32, "vocab_size": len(vocabulary),
                            "width": settings.text_width, "heads": settings.text_width // 32,
                            "layers": settings.text_layers}},
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
    """Put `SharedBatchNorm` in the place of each BatchNorm, with its weights and statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            shared = SharedBatchNorm(child.num_features, child.eps, child.momentum)
            shared.load_state_dict(child.state_dict())
            setattr(module, name, shared.to(child.weight.device).train(child.training))
        else:
            share_batch_norm(child)


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


@dataclass
class CLIPBatch:
    """What one process trains on in a step: pixels (N, 3, S, S) as the image tower takes them,
    tokens (N, T) of a caption each."""

    pixels: Tensor
    tokens: Tensor


class CLIPTask:
    """See `trainer.Task`."""

    def __init__(self, settings: CLIPSettings, accelerator: Accelerator, steps: int, clip: CLIP,
                 images: Images, lines: list[list[str]],
                 held: tuple[Tensor, list[str], list[dict]]):
        self.settings, self.accelerator, self.held = settings, accelerator, held
        self.model = copy.deepcopy(clip).to(accelerator.device).train()
        self.model.to(memory_format=torch.channels_last)
        if accelerator.num_processes > 1:
            share_batch_norm(self.model)
        self.lines = lines
        texts = sorted({line for each in lines for line in each})
        self.tokens = dict(zip(texts, clip.tokenize(texts), strict=True))
        self.loader = BatchLoader(
            images, settings.size, accelerator, steps, batch=settings.batch, seed=settings.seed,
            scale=settings.scale, flip=settings.flip, workers=settings.workers,
            together=settings.together)

    def parts(self) -> dict[str, Part]:
        self.embed, optimizer = self.accelerator.prepare(
            Pair(self.model), adamw(self.model, self.settings.lr, DECAY))
        return {"model": Part(self.model, [optimizer], self.loss)}

    def batch(self, step: int) -> CLIPBatch:
        """Images moved a little, and one of the captions of each."""
        size = self.settings.batch
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = slice(rank * size, (rank + 1) * size)
        random = generator(self.settings.seed, step)
        index, pixels = self.loader(step)
        which = torch.rand(world * size, generator=random)[mine].tolist()
        moves = torch.randint(-3, 4, (world * size, 2), generator=random)[mine]
        lines = [self.lines[i] for i in index]
        tokens = torch.stack([self.tokens[c[int(u * len(c))]]
                              for c, u in zip(lines, which, strict=True)])
        pixels = shift(pixels.to(self.accelerator.device).float() / 255, moves)
        pixels = self.model.preprocess(pixels).contiguous(memory_format=torch.channels_last)
        return CLIPBatch(pixels, tokens.to(self.accelerator.device))

    def loss(self, batch: CLIPBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """CLIP's symmetric cross-entropy (arXiv 2103.00020) over the batches of all processes."""
        with self.accelerator.autocast():
            image, text, scale = self.embed(batch.pixels, batch.tokens)
        image, text = image.float(), text.float()
        if self.accelerator.num_processes > 1:
            image, text = (torch.cat(distributed.all_gather(x)) for x in (image, text))
        logits = scale * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"loss": loss, "scale": scale}

    @torch.no_grad()
    def after(self, step: int) -> dict[str, Tensor]:
        self.model.model.logit_scale.clamp_(0, 4.6052)  # CLIP's limit: ln 100
        return {}

    def buffers(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def validate(self, model: CLIP) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """`retrieval` among held-out images."""
        pixels, texts, labels = self.held
        images = torch.cat([model.embed_pixels(part.float() / 255)
                            for part in pixels.split(RETRIEVED)])
        return {"retrieval": retrieval(images, model.embed_texts(texts), texts, labels)}, {}


def retrieval(images: Tensor, embedded: Tensor, texts: list[str], labels: list[dict]) -> float:
    """Share of images (N, D) whose nearest text of 100 (N, D) is their own: the same words, or that
    of an image with equal labels."""
    hits = 0
    for start in range(0, len(images), RETRIEVED):
        part = slice(start, start + RETRIEVED)
        nearest = (images[part] @ embedded[part].T).argmax(1).tolist()
        named, same = texts[part], labels[part]
        hits += sum(named[j] == named[i] or same[j] == same[i] != {}
                    for i, j in enumerate(nearest))
    return hits / len(images)


def captions_of(images: Images, indices: Iterable[int], source: str) -> list[list[str]]:
    """The captions of those images.  ValueError: some have none."""
    lines = [images.captions(i) for i in indices]
    if not all(lines):
        raise ValueError(f"{lines.count([])} images of {source} have no caption: give NAME.txt "
                         "beside each, or --captions")
    return lines


def train_clip(settings: CLIPSettings, accelerator: Accelerator) -> dict[str, Any]:
    """Train and leave the CLIP in `settings.run`; returns its steps and scores.

    ValueError, one sentence: images without captions, impossible sizes; else as `trainer.train`.
    """
    if settings.text_width % 32:
        raise ValueError(f"--text-width {settings.text_width} is no multiple of 32: give one, as "
                         "in --text-width 128")
    if settings.batch % settings.together:
        raise ValueError(f"--batch {settings.batch} is no multiple of --together "
                         f"{settings.together}: images that belong together share a batch")
    refuse_inside(settings.images, run=settings.run)
    images, held, data = open_parts(settings.images, settings.validation, settings.held_out,
                                    settings.captions, settings.reading)
    lines = captions_of(images, range(len(images)), settings.images)
    shown, views = stack_views(held, settings.size, 1000)
    texts = captions_of(held, shown, settings.validation or settings.images)
    vocabulary = vocabulary_of({line for each in lines for line in each})
    clip = CLIP(small_config(vocabulary, settings))
    held_set = (views, [each[0] for each in texts], [held.labels(i) for i in shown])
    result = train(
        settings, accelerator, lambda steps: CLIPTask(settings, accelerator, steps, clip, images,
                                                      lines, held_set),
        data=data, clip=clip.config.model)
    if accelerator.is_main_process:
        finish(settings.run, "clip", result.model.state_dict(),
               {"model": clip.config.model, "vocabulary": list(vocabulary)})
    accelerator.wait_for_everyone()
    return {"steps": result.steps, "n_images": len(images), "n_held_out": len(shown)} | (
        result.scores)
