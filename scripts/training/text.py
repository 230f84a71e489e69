"""Fitting the text tower of a CLIP to its image tower: settings, the data of a step, the loss.

A GPT learns from embeddings of images and is then given those of texts.  A contrastive loss only
asks that a text be nearer to its own image than to others; what it leaves between the two is lost
to the GPT.  Here the image tower stays as it is, so that GPTs trained on it stay right, and the
text tower learns to say of a caption what the image tower says of the images, on average.  The
tower that stays is that of LiT (arXiv 2111.07991), the loss is the cosine alone.
"""

from __future__ import annotations

import copy
import hashlib
import io
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from clipgen.clip import CLIP
from scripts.data.dataset import open_parts, refuse_inside, stack_views
from scripts.data.files import write_bytes
from scripts.data.images import Images
from scripts.data.reading import ReadingSettings
from scripts.data.transforms import all_views, order
from scripts.training.cli import positive, setting, whole
from scripts.training.clip import captions_of, retrieval
from scripts.training.loading import fingerprint, load_clip
from scripts.training.losses import centre
from scripts.training.optim import adamw
from scripts.training.run_directory import finish
from scripts.training.settings import RunSettings
from scripts.training.trainer import Part, generator, train

DECAY = 0.1  # weight decay of matrices
HELD = 1000  # images that are validated with, at most


@dataclass(kw_only=True)
class TextSettings(RunSettings, ReadingSettings):
    """Settings of `scripts.train_text`."""

    images: str = setting(help="folder, zip, tar, shards, or coco:, googlecc: and a folder",
                          positional=True, free=True)
    clip: str = setting(help="whose text tower is trained: run of train_clip, bundle, or "
                        "open_clip's name", free=True)
    captions: Path | None = setting(None, "NAME, tab, caption a line; or COCO's captions JSON",
                                    type=Path, free=True)
    validation: str | None = setting(None, "images with captions that are not trained on "
                                     "(default: a share)", free=True)
    held_out: float = setting(0.05, "share that is not trained on", type=float)
    steps: int = setting(1500, type=positive)
    batch: int = setting(512, "of each process", type=positive)
    warmup: int = setting(50, "steps", type=whole)
    workers: int = setting(0, "processes that read images, 0: none apart", type=whole, free=True)


class TextTower(nn.Module):
    """Tokens (N, T) to unit embeddings float32 (N, D), as `CLIP.embed_texts`, with a gradient."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.model, mean = clip.model, clip.config.text_embedding_mean
        self.mean = None if mean is None else torch.tensor(mean)

    def forward(self, tokens: Tensor) -> Tensor:
        return centre(F.normalize(self.model.encode_text(tokens).float(), dim=-1), self.mean)


def train_text_alone(clip: CLIP) -> None:
    """Let gradients reach the text tower and nothing else."""
    clip.requires_grad_(True)
    clip.model.visual.requires_grad_(False)
    clip.model.logit_scale.requires_grad_(False)


@dataclass
class TextBatch:
    """What one process trains on in a step: tokens (N, T) of a caption each, and the unit
    embeddings (N, D) of their images."""

    tokens: Tensor
    embeddings: Tensor


class TextTask:
    """See `trainer.Task`.  embeddings (M, D): of the images whose captions `lines` has."""

    def __init__(self, settings: TextSettings, accelerator: Accelerator, clip: CLIP,
                 embeddings: Tensor, lines: list[list[str]],
                 held: tuple[Tensor, list[str], list[dict]]):
        self.settings, self.accelerator, self.held = settings, accelerator, held
        self.model = copy.deepcopy(clip).to(accelerator.device).train()
        train_text_alone(self.model)
        self.embeddings, self.lines = embeddings, lines
        texts = sorted({line for each in lines for line in each})
        self.tokens = dict(zip(texts, clip.tokenize(texts), strict=True))

    def parts(self) -> dict[str, Part]:
        self.embed, optimizer = self.accelerator.prepare(
            TextTower(self.model), adamw(self.model, self.settings.lr, DECAY))
        return {"model": Part(self.model, [optimizer], self.loss)}

    def batch(self, step: int) -> TextBatch:
        """Images in an order of their own each time round, and one of the captions of each."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        total = world * self.settings.batch
        mine = slice(rank * self.settings.batch, (rank + 1) * self.settings.batch)
        index = order(len(self.lines), step * total, total, self.settings.seed)[mine].tolist()
        which = torch.rand(total, generator=generator(self.settings.seed, step))[mine].tolist()
        captions = [self.lines[i] for i in index]
        tokens = torch.stack([self.tokens[c[int(u * len(c))]]
                              for c, u in zip(captions, which, strict=True)])
        device = self.accelerator.device
        return TextBatch(tokens.to(device), self.embeddings[index].to(device).float())

    def loss(self, batch: TextBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """1 - cosine of each caption with its image, on average."""
        with self.accelerator.autocast():
            embedded = self.embed(batch.tokens)
        cosine = F.cosine_similarity(embedded.float(), batch.embeddings, dim=-1).mean()
        return 1 - cosine, {"loss": 1 - cosine}

    def after(self, step: int) -> dict[str, Tensor]:
        return {}

    def buffers(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def validate(self, model: CLIP) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Of held-out images: `cosine` with their captions, on average, and `retrieval`."""
        images, texts, labels = self.held
        embedded = model.embed_texts(texts).cpu()
        return {"cosine": (images * embedded).sum(1).mean().item(),
                "retrieval": retrieval(images, embedded, texts, labels)}, {}


def lacking(clip: CLIP, lines: list[list[str]]) -> str:
    """What to say of words that the vocabulary of a small CLIP has no token for; else nothing."""
    words = sorted({word for each in lines for line in each for word in line.split()})
    unknown = clip.unknown_words(" ".join(words))
    return (f"{len(unknown)} words of the captions are not in the vocabulary of the CLIP and will "
            f"not be learned: {', '.join(map(repr, unknown[:5]))}"
            + (", ..." if len(unknown) > 5 else "")) if unknown else ""


@torch.no_grad()
def image_embeddings(settings: TextSettings, accelerator: Accelerator, clip: CLIP, images: Images,
                     what: str) -> tuple[list[int], Tensor]:
    """Indices of the images that can be read, and their unit embeddings float16 (M, D).

    Computed once and kept in the run's directory, under a name made of `what` they are.  OSError,
    one sentence: they cannot be.
    """
    path = settings.run / f"embeddings-{hashlib.sha256(what.encode()).hexdigest()[:16]}.npz"
    if accelerator.is_main_process and not path.is_file():
        clip = copy.deepcopy(clip).to(accelerator.device)
        indices, rows = [], []
        with tqdm(total=len(images), desc="embedding", unit=" images") as bar:
            for index, pixels in all_views(images, clip.image_size, 64, settings.workers):
                bar.update(int(index[-1]) + 1 - bar.n)
                indices += index.tolist()
                pixels = pixels.to(accelerator.device).float() / 255
                rows.append(clip.embed_pixels(pixels).half().cpu().numpy())
        buffer = io.BytesIO()
        np.savez(buffer, indices=np.array(indices), embeddings=np.concatenate(rows))
        try:
            settings.run.mkdir(parents=True, exist_ok=True)
            write_bytes(path, buffer.getvalue())
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror}): make room, or give "
                          "another --run directory") from None
    accelerator.wait_for_everyone()
    with np.load(path) as kept:
        return kept["indices"].tolist(), torch.from_numpy(kept["embeddings"])


def train_text(settings: TextSettings, accelerator: Accelerator) -> dict[str, Any]:
    """Train and leave the CLIP with its new text tower in `settings.run`; returns its steps and
    scores.

    ValueError, one sentence: images without captions; else as `trainer.train`.
    """
    refuse_inside(settings.images, run=settings.run)
    clip = load_clip(settings.clip)
    images, held, data = open_parts(settings.images, settings.validation, settings.held_out,
                                    settings.captions, settings.reading)
    made_of = fingerprint(clip)
    lines = captions_of(images, range(len(images)), settings.images)
    if accelerator.is_main_process and (note := lacking(clip, lines)):
        print(note, file=sys.stderr)
    shown, views = stack_views(held, clip.image_size, HELD)
    texts = captions_of(held, shown, settings.validation or settings.images)
    held_set = (clip.embed_pixels(views.float() / 255), [each[0] for each in texts],
                [held.labels(i) for i in shown])
    indices, embeddings = image_embeddings(settings, accelerator, clip, images, data + made_of)
    lines = [lines[i] for i in indices]
    result = train(
        settings, accelerator, lambda steps: TextTask(settings, accelerator, clip, embeddings,
                                                      lines, held_set),
        data=data, clip_sha256=made_of)
    if accelerator.is_main_process:
        finish(settings.run, "clip", result.model.state_dict(), asdict(clip.config))
    accelerator.wait_for_everyone()
    return {"steps": result.steps, "n_images": len(indices), "n_held_out": len(shown)} | {
        name: round(value, 4) for name, value in result.scores.items()}
