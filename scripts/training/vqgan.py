"""Training a VQGAN on images: settings, the data of a step, the losses."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.data.dataset import BatchLoader, open_parts, refuse_inside, stack_views
from scripts.data.images import Images
from scripts.data.reading import ReadingSettings
from scripts.evaluation.scores import copy_scores
from scripts.training.cli import amount, positive, scale, setting, share, whole
from scripts.training.loading import load_clip, load_vqgan
from scripts.training.losses import (
    LPIPS,
    CLIPDistance,
    Discriminator,
    adaptive_weight,
    hinge_loss,
    quantize,
)
from scripts.training.optim import adamw, adamw_alone, muon_vqgan
from scripts.training.run_directory import finish
from scripts.training.settings import RunSettings
from scripts.training.trainer import Part, generator, train

# What --published sets where a flag is not given: arXiv 2012.09841's recipe at 16,384 codes, with
# the commitment on the encoder's term and a warm-up that starts above zero.
PUBLISHED = {"perceptual_loss": "lpips", "perceptual": 1.0, "l2": 0.0, "gan": 0.75,
             "gan_weight": "adaptive", "optimizer": "adamw", "lr": 1e-4, "size": 256}
# Sizes of a new model where a flag is not given.
NEW = {"channels": "64,128", "patch": 4, "blocks": 1, "attention": "", "codebook_size": 1024,
       "code_dim": 8, "norm_groups": 0}
DECAY = 1e-4  # weight decay of matrices
OPTIMIZERS = {"muon": muon_vqgan, "adamw": adamw_alone}


@dataclass(kw_only=True)
class VQGANSettings(RunSettings, ReadingSettings):
    """Settings of `scripts.train_vqgan`."""

    images: str = setting(help="folder, zip, tar, shards, or coco:, imagenet:, googlecc: and a "
                          "folder", positional=True, free=True)
    validation: str | None = setting(None, "images that are not trained on (default: a held-out "
                                     "share)", free=True)
    held_out: float = setting(0.05, "share that is not trained on", type=float)
    clip: str | None = setting(None, "bundle, run or open_clip's ARCHITECTURE:PRETRAINED; "
                               "perceptual loss", free=True)
    size: int | None = setting(None, "pixels a side (64, or that of --from)", type=positive)
    channels: str | None = setting(None, "a level each; each but the first halves "
                                   f"({NEW['channels']})")
    patch: int | None = setting(None, "pixels a side of a place of the first level "
                                f"({NEW['patch']}; with --channels 1)", type=positive)
    blocks: int | None = setting(None, f"residual blocks a level ({NEW['blocks']})", type=positive)
    attention: str | None = setting(None, "sizes in pixels that get self-attention, as in 16,32 "
                                    "(none)")
    middle_attention: bool = setting(False, "self-attention where the resolution is least")
    codebook_size: int | None = setting(None, f"({NEW['codebook_size']})", type=positive)
    code_dim: int | None = setting(None, f"({NEW['code_dim']})", type=positive)
    unnormalised: bool = setting(False, "codes of any length, not of unit length")
    norm_groups: int | None = setting(None, "of GroupNorm; 0: no normalisation "
                                      f"({NEW['norm_groups']})", type=whole)
    unquantized: float = setting(0.2, "share of steps before codes are used", type=share)
    published: bool = setting(False, "the public recipe: 16,384 codes of 256 dimensions, "
                              "un-normalised, 256 pixels, lpips, adaptive GAN weight")
    start_from: str | None = setting(None, "fine-tune a bundle's or run's VQGAN", flag="from",
                                     metavar="BUNDLE", free=True)
    decoder_of: str | None = setting(None, "the same, but its decoder alone", metavar="BUNDLE",
                                     free=True)
    optimizer: str = setting("muon", "muon: of all but the first and last layers, which take adamw",
                             choices=OPTIMIZERS)
    scale: float = setting(0.85, "least share of the side in a crop", type=scale)
    flip: bool = setting(True, "no mirrored images")
    workers: int = setting(0, "processes that read images, 0: none apart", type=whole, free=True)
    # Weighs a few wild pixels more than L1 does; a coloured spot in every image was the reason.
    l2: float = setting(5.0, "weight", type=amount)
    commitment: float = setting(0.25, "weight", type=amount)
    perceptual_loss: str = setting("clip", "clip: features of --clip; lpips: VGG16, the package "
                                   "and its weights needed", choices=("clip", "lpips", "none"))
    perceptual: float = setting(0.1, "weight", type=amount)
    gan: float = setting(0.02, "weight, 0: none", type=amount)
    gan_weight: str = setting("fixed", "adaptive: times the ratio of gradients at the decoder's "
                              "last layer", choices=("fixed", "adaptive"))
    gan_start: float = setting(0.6, "share of the steps without a discriminator", type=share)
    gan_channels: int = setting(32, "of the discriminator", type=positive)


class Autoencoder(nn.Module):
    """Pixels (N, 3, S, S) in [0, 1] to their copy, features, codes and the quantizer's loss."""

    def __init__(self, vqgan: VQGAN, commitment: float):
        super().__init__()
        self.vqgan, self.commitment = vqgan, commitment

    def forward(self, pixels: Tensor, quantized: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = self.vqgan.encoder(pixels * 2 - 1).float()
        with torch.autocast(features.device.type, enabled=False):
            vectors, codes, loss = quantize(self.vqgan, features, self.commitment)
            if not quantized:
                vectors, loss = self.vqgan.quantizer.normalise(features), 0 * loss
        return self.vqgan.decoder(vectors).float() * 0.5 + 0.5, features, codes, loss


@dataclass
class VQGANBatch:
    """What one process trains on in a step: pixels (N, 3, S, S) in [0, 1]."""

    step: int
    pixels: Tensor


class VQGANTask:
    """See `trainer.Task`."""

    def __init__(self, settings: VQGANSettings, accelerator: Accelerator, steps: int, vqgan: VQGAN,
                 images: Images, held: Tensor, perceptual: nn.Module | None):
        self.settings, self.accelerator, self.held = settings, accelerator, held
        self.steps, device = steps, accelerator.device
        self.model = copy.deepcopy(vqgan).to(device).train()
        # The faster layout; GroupNorm's backward pass on a CPU does not support it.
        if device.type == "cuda" or not vqgan.config.norm_groups:
            self.model.to(memory_format=torch.channels_last)
        self.perceptual = perceptual.to(device) if perceptual else None
        self.discriminator = Discriminator(settings.gan_channels).to(device)
        self.loader = BatchLoader(
            images, vqgan.config.image_size, accelerator, steps, batch=settings.batch,
            seed=settings.seed, scale=settings.scale, flip=settings.flip, workers=settings.workers)
        self.used = torch.zeros(vqgan.config.codebook_size, device=device)  # codes, lately
        self.new = not (settings.start_from or settings.decoder_of)
        self.quantized_from = round(settings.unquantized * steps) if self.new else 0
        self.restart_every = max(10, min(100, steps // 20))

    @property
    def gan_start(self) -> int:
        """The first step with a discriminator."""
        return round(self.settings.gan_start * self.steps) if self.settings.gan else self.steps

    @property
    def gan_warmup(self) -> int:
        return max(1, min(500, (self.steps - self.gan_start) // 3))

    def parts(self) -> dict[str, Part]:
        lr, prepare = self.settings.lr, self.accelerator.prepare
        optimizers = OPTIMIZERS[self.settings.optimizer](self.model, lr, DECAY)
        self.autoencode, *optimizers = prepare(
            Autoencoder(self.model, self.settings.commitment), *optimizers)
        self.discriminate, discriminator_optimizer = prepare(
            self.discriminator, adamw(self.discriminator, lr, DECAY))
        begins = self.settings.gan_start if self.settings.gan else 1.0
        return {"model": Part(self.model, optimizers, self.loss),
                "discriminator": Part(self.discriminator, [discriminator_optimizer],
                                      self.discriminator_loss, begins=begins, rate=0.5)}

    def batch(self, step: int) -> VQGANBatch:
        pixels = self.loader(step)[1].to(self.accelerator.device).float() / 255
        if step == 0 and self.new:
            whiten(self.model, self.accelerator.gather(pixels))
        if step == self.quantized_from and self.new:
            self.place_codes(pixels, step)
        return VQGANBatch(step, pixels)

    def loss(self, batch: VQGANBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 + L2 + perceptual + GAN + quantizer, each by its weight."""
        s, accelerator, pixels = self.settings, self.accelerator, batch.pixels
        quantized = batch.step >= self.quantized_from
        with accelerator.autocast():
            copies, features, codes, quantizer = self.autoencode(pixels, quantized)
        self.copies, self.features, self.codes = copies.detach(), features.detach(), codes
        values = {"l1": F.l1_loss(copies, pixels), "l2": F.mse_loss(copies, pixels)}
        loss = values["l1"] + s.l2 * values["l2"]
        if self.perceptual:
            with accelerator.autocast():
                values["perceptual"] = self.perceptual(copies, pixels).float()
            loss = loss + s.perceptual * values["perceptual"]
        if batch.step >= self.gan_start:
            values["gan"] = self.generator_loss(copies)
            # A fresh discriminator knows nothing: it comes to count by and by.
            weight = s.gan * min(1.0, (batch.step - self.gan_start) / self.gan_warmup)
            if s.gan_weight == "adaptive":
                values["adaptive"] = adaptive_weight(
                    loss, values["gan"], self.model.decoder.final[-1].weight, accelerator)
                weight = weight * values["adaptive"]
            loss = loss + weight * values["gan"]
        if not s.decoder_of:
            values["quantizer"] = quantizer
            loss = loss + quantizer
        return loss, {"loss": loss} | values

    def generator_loss(self, copies: Tensor) -> Tensor:
        """Hinge: the less real the copies look, the higher; no gradient for the discriminator."""
        self.discriminator.requires_grad_(False)
        with self.accelerator.autocast():
            loss = -self.discriminator(copies * 2 - 1).float().mean()
        self.discriminator.requires_grad_(True)
        return loss

    def discriminator_loss(self, batch: VQGANBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge on the images and on the copies that `loss` has just made of them."""
        with self.accelerator.autocast():
            images = torch.cat([batch.pixels, self.copies]) * 2 - 1
            real, fake = self.discriminate(images).float().chunk(2)
        loss = hinge_loss(real, fake)
        return loss, {"discriminator": loss}

    def after(self, step: int) -> dict[str, Tensor]:
        """Count the codes in use; restart those that are dead."""
        counts = torch.bincount(self.codes.flatten(), minlength=len(self.used)).float()
        self.used += self.accelerator.reduce(counts, "sum")
        values = {}
        if (step + 1) % self.restart_every == 0:
            # The codes of a finished model have a meaning that its GPT relies on.
            if step + 1 < 0.6 * self.steps and self.new:
                values["restarted"] = self.restart([self.features], step + 1)
            self.used.zero_()
        return values

    @torch.no_grad()
    def place_codes(self, pixels: Tensor, step: int) -> None:
        """All codes to outputs of the encoder, for this batch and some more."""
        needed = 4 * self.model.config.codebook_size / self.model.config.grid**2
        count = min(64, int(needed / (len(pixels) * self.accelerator.num_processes)))
        views = [pixels, *(v.to(pixels.device).float() / 255
                           for _, v in self.loader.batches(step + 1, count))]
        self.used.zero_()
        self.restart([self.model.encoder(v * 2 - 1).float() for v in views], step)

    def restart(self, features: list[Tensor], step: int) -> Tensor:
        """Dead codes to outputs of the encoder for these batches of all processes."""
        everywhere = torch.cat([self.accelerator.gather(batch) for batch in features])
        count = restart_dead_codes(self.model, self.used, everywhere,
                                   generator(self.settings.seed + 1, step))
        return torch.tensor(float(count), device=everywhere.device)

    def buffers(self) -> dict[str, Tensor]:
        return {"used": self.used}

    def validate(self, model: VQGAN, count: int = 256
                 ) -> tuple[dict[str, float], dict[str, Image.Image]]:
        scores, picture = copy_scores(model, self.held[:count], self.perceptual)
        return scores, {"grid": picture}


@torch.no_grad()
def restart_dead_codes(vqgan: VQGAN, used: Tensor, features: Tensor,
                       generator: torch.Generator) -> int:
    """Move codes that were not used lately (`used` (K,) is 0) onto random encoder outputs.

    Features (N, D, h, w); returns how many were moved.
    """
    dead = (used == 0).nonzero().flatten()
    pool = vqgan.quantizer.normalise(features).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = pool[torch.randint(len(pool), (len(dead),), generator=generator).to(pool.device)]
    spread = chosen.std(0).mean() if len(dead) > 1 else 1.0
    noise = torch.randn(chosen.shape, generator=generator).to(pool.device)
    vqgan.quantizer.embedding.weight[dead] = chosen + 0.03 * spread * noise
    return len(dead)


@torch.no_grad()
def whiten(vqgan: VQGAN, pixels: Tensor) -> None:
    """Scale the encoder's last layer so that features of these pixels (N, 3, S, S) have mean 0 and
    covariance 1: a fresh encoder's all but agree, of unit length they would be one single code."""
    last = vqgan.encoder.final[-1]
    rows = vqgan.encoder(pixels * 2 - 1).float().permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    scale = values.clamp(min=1e-4 * values[-1].clamp(min=1e-12)).rsqrt()
    white = vectors * scale @ vectors.T  # (D, D)
    last.weight.copy_((white @ last.weight.flatten(1)).view_as(last.weight))
    last.bias.copy_(white @ (last.bias - mean))


def train_vqgan(settings: VQGANSettings, accelerator: Accelerator) -> dict[str, Any]:
    """Train and leave the VQGAN in `settings.run`; returns its steps and scores.

    ValueError, one sentence: settings that do not fit each other or the images; else as
    `trainer.train`.
    """
    perceptual = perceptual_loss(settings)
    vqgan = make_vqgan(settings)
    refuse_inside(settings.images, run=settings.run)
    images, held, data = open_parts(settings.images, settings.validation, settings.held_out,
                                    reading=settings.reading)
    pixels = stack_views(held, vqgan.config.image_size, 1000)[1]
    result = train(
        settings, accelerator, lambda steps: VQGANTask(settings, accelerator, steps, vqgan, images,
                                                       pixels, perceptual),
        data=data, vqgan=vars(vqgan.config), begun="--decoder-of" if settings.decoder_of else
        "--from" if settings.start_from else "new")
    scores = result.task.validate(result.model, 1000)[0]
    if not math.isfinite(scores["l1"]):
        raise FloatingPointError(f"{settings.run}: the VQGAN makes no finite pixels: train with a "
                                 "lower --lr")
    if accelerator.is_main_process:
        finish(settings.run, "vqgan", result.model.state_dict(), vars(vqgan.config))
    accelerator.wait_for_everyone()
    return {"steps": result.steps, "n_images": len(images), "n_held_out": len(pixels)} | {
        k: round(v, 4) for k, v in scores.items()}


def perceptual_loss(settings: VQGANSettings) -> nn.Module | None:
    if settings.perceptual_loss == "lpips":
        return LPIPS()
    if settings.perceptual_loss == "clip" and settings.perceptual:
        if not settings.clip:
            raise ValueError("--perceptual-loss clip compares features of a CLIP: give --clip, as "
                             "in --clip weights/emoji, or take --perceptual-loss none")
        return CLIPDistance(load_clip(settings.clip))
    return None


def make_vqgan(settings: VQGANSettings) -> VQGAN:
    """A new VQGAN of the settings' sizes, or that of --from or --decoder-of."""
    source = settings.start_from or settings.decoder_of
    settled = source or ("--published" if settings.published else None)
    for name in NEW if settled else ():
        if getattr(settings, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(settings, name)} is settled by "
                             f"{settled}: leave it out")
    if source:
        vqgan = load_vqgan(source).float().train().requires_grad_(True)
        if settings.size not in (None, vqgan.config.image_size):
            raise ValueError(f"--size {settings.size} is not that of {source}, "
                             f"{vqgan.config.image_size}: leave --size out")
        if settings.decoder_of:
            vqgan.encoder.requires_grad_(False)
            vqgan.quantizer.requires_grad_(False)
        return vqgan
    size = settings.size or 64
    try:
        if settings.published:
            return VQGAN(VQGANConfig(**vars(VQGANConfig.published()) | {"image_size": size}))
        new = NEW | {"patch": 1} if settings.channels else NEW
        given = {name: value if getattr(settings, name) is None else getattr(settings, name)
                 for name, value in new.items()}
        channels, attention = (tuple(int(c) for c in given.pop(name).split(",") if c)
                               for name in ("channels", "attention"))
        vqgan = VQGAN(VQGANConfig(
            image_size=size, channels=channels, attention_sizes=attention,
            middle_attention=settings.middle_attention, l2_normalised=not settings.unnormalised,
            blocks_per_level=given.pop("blocks"), **given))
        vqgan.initialise()
        return vqgan
    except ValueError as error:
        raise ValueError(f"no such VQGAN: {error}") from None
