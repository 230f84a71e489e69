"""Train a VQGAN on images: no captions, no labels.

    python -m scripts.train_vqgan IMAGES --run runs/vqgan --clip runs/clip
    accelerate launch -m scripts.train_vqgan ...      on several devices

Loss: L1 + L2 + perceptual + quantiser + hinge GAN from `--gan-start`.  New models have codes of 8
dimensions and unit length (ViT-VQGAN, arXiv 2110.04627); `--published` has the public recipe's.

`--from` fine-tunes the VQGAN of a bundle or run.  `--decoder-of` trains its decoder alone: codes,
and shards made of them, stay valid, so that this can run beside `train_gpt`.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.data.dataset import Feed, open_parts, refuse_inside, stack_views
from scripts.data.images import Images
from scripts.evaluation.scores import copy_scores
from scripts.training import trainer
from scripts.training.cli import amount, positive, scale, share, whole
from scripts.training.loading import load_clip, load_vqgan
from scripts.training.losses import LPIPS, CLIPDistance, Discriminator, hinge_loss
from scripts.training.optim import (
    Average,
    adamw,
    learning_rate,
    muon_vqgan,
    set_learning_rate,
)

# What --published sets where a flag is not given: arXiv 2012.09841's recipe at 16,384 codes, with
# the commitment on the encoder's term and a warm-up that starts above zero.
PUBLISHED = {"perceptual_loss": "lpips", "perceptual": 1.0, "l2": 0.0, "gan": 0.75,
             "gan_weight": "adaptive", "optimizer": "adamw", "lr": 1e-4, "size": 256}


# Sizes of a new model where a flag is not given.
NEW = {"channels": "64,128", "patch": 4, "blocks": 1, "attention": "", "codebook_size": 1024,
       "code_dim": 8, "norm_groups": 0}


class Autoencoder(nn.Module):
    """Pixels (N, 3, S, S) in [0, 1] to their copy, features, codes and the quantiser's loss."""

    def __init__(self, vqgan: VQGAN, commitment: float):
        super().__init__()
        self.vqgan, self.commitment = vqgan, commitment

    def forward(self, pixels: Tensor, quantised: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = self.vqgan.encoder(pixels * 2 - 1).float()
        with torch.autocast(features.device.type, enabled=False):
            vectors, codes, loss = quantise(self.vqgan, features, self.commitment)
            if not quantised:
                vectors, loss = self.vqgan.quantizer.normalise(features), 0 * loss
        return self.vqgan.decoder(vectors).float() * 0.5 + 0.5, features, codes, loss


def quantise(vqgan: VQGAN, features: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D, h, w) to straight-through vectors, codes (N, h, w) and the quantiser's loss.

    `commitment` weighs the encoder's term, the codebook's weighs 1 (VQ-VAE, arXiv 1711.00937).
    """
    z = vqgan.quantizer.normalise(features)
    with torch.no_grad():
        codes = vqgan.quantizer.nearest(features)
    vectors = vqgan.quantizer.vectors(codes)
    loss = commitment * F.mse_loss(z, vectors.detach()) + F.mse_loss(vectors, z.detach())
    return z + (vectors - z).detach(), codes, loss


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


def adaptive_weight(wanted: Tensor, gan: Tensor, weight: Tensor, accelerator: Accelerator
                    ) -> Tensor:
    """|gradient of the other losses| / |gradient of the GAN's| at the decoder's last weight, at
    most 10,000 (arXiv 2012.09841, equation 7); of the batches of all processes together."""
    norms = []
    for loss in (wanted, gan):
        gradient, = torch.autograd.grad(loss, weight, retain_graph=True)
        norms.append(accelerator.reduce(gradient, "mean").norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


class VQGANTraining:
    """See `trainer.Training`."""

    def __init__(self, a: argparse.Namespace, accelerator: Accelerator, steps: int, vqgan: VQGAN,
                 images: Images, held: Tensor, perceptual: nn.Module | None):
        self.a, self.accelerator, self.steps, self.held = a, accelerator, steps, held
        device = accelerator.device
        self.vqgan = copy.deepcopy(vqgan).to(device).train()
        # The faster layout, but for the backward pass of GroupNorm on a CPU.
        if device.type == "cuda" or not vqgan.config.norm_groups:
            self.vqgan.to(memory_format=torch.channels_last)
        self.perceptual = perceptual.to(device) if perceptual else None
        self.discriminator = Discriminator(a.gan_channels).to(device)
        self.feed = Feed(images, vqgan.config.image_size, a, accelerator, steps)
        optimizer = (muon_vqgan if a.optimizer == "muon" else adamw)(self.vqgan, a.lr, 1e-4)
        self.average = Average(self.vqgan, a.ema)
        self.evaluated = copy.deepcopy(self.vqgan).eval()
        self.used = torch.zeros(vqgan.config.codebook_size, device=device)
        self.new = not (a.start_from or a.decoder_of)
        self.quantised_from = round(a.unquantised * steps) if self.new else 0
        self.gan_start = round(a.gan_start * steps) if a.gan else steps
        self.gan_warmup = max(1, min(500, (steps - self.gan_start) // 3))
        self.restart_every = max(10, min(100, steps // 20))
        self.wrapped, self.optimizer = accelerator.prepare(
            Autoencoder(self.vqgan, a.commitment), optimizer)
        self.wrapped_discriminator, self.discriminator_optimizer = accelerator.prepare(
            self.discriminator, adamw(self.discriminator, a.lr, 1e-4))

    def step(self, step: int) -> dict[str, Tensor]:
        a, accelerator = self.a, self.accelerator
        pixels = self.feed(step)[1].to(accelerator.device).float() / 255
        if step == 0 and self.new:
            whiten(self.vqgan, accelerator.gather(pixels))
        if step == self.quantised_from and self.new:
            self.place_codes(pixels, step)
        with accelerator.autocast():
            result, features, codes, quantiser = self.wrapped(pixels, step >= self.quantised_from)
        values = {"l1": F.l1_loss(result, pixels), "l2": F.mse_loss(result, pixels)}
        loss = values["l1"] + a.l2 * values["l2"]
        if self.perceptual:
            with accelerator.autocast():
                values["perceptual"] = self.perceptual(result, pixels).float()
            loss = loss + a.perceptual * values["perceptual"]
        adversarial = step >= self.gan_start
        if adversarial:
            self.discriminator.requires_grad_(False)
            with accelerator.autocast():
                values["gan"] = -self.discriminator(result * 2 - 1).float().mean()
            self.discriminator.requires_grad_(True)
            # A fresh discriminator knows nothing: its word comes to count by and by.
            weight = a.gan * min(1.0, (step - self.gan_start) / self.gan_warmup)
            if a.gan_weight == "adaptive":
                values["adaptive"] = adaptive_weight(
                    loss, values["gan"], self.vqgan.decoder.final[-1].weight, accelerator)
                weight = weight * values["adaptive"]
            loss = loss + weight * values["gan"]
        if not a.decoder_of:
            values["quantiser"] = quantiser
            loss = loss + quantiser
        values = {"loss": loss} | values
        rate = learning_rate(step, self.steps, a.lr, a.warmup)
        self.update(self.optimizer, self.vqgan, loss, rate, values, "gradient")
        if adversarial:
            with accelerator.autocast():
                images = torch.cat([pixels, result.detach()]) * 2 - 1
                both = self.wrapped_discriminator(images).float()
            values["discriminator"] = hinge = hinge_loss(*both.chunk(2))
            self.update(self.discriminator_optimizer, self.discriminator, hinge, 0.5 * rate,
                        values)
        self.average.update(self.vqgan, step)
        counts = torch.bincount(codes.flatten(), minlength=len(self.used)).float()
        self.used += accelerator.reduce(counts, "sum")
        if (step + 1) % self.restart_every == 0:
            # The codes of a finished model have a meaning that its GPT relies on.
            if step + 1 < 0.6 * self.steps and self.new:
                values["restarted"] = self.restart([features.detach()], step + 1)
            self.used.zero_()
        if accelerator.num_processes > 1:
            values = {k: accelerator.reduce(v.detach(), "mean") for k, v in values.items()}
        return values

    def update(self, optimizer: Any, module: nn.Module, loss: Tensor, rate: float,
               values: dict[str, Tensor], gradient: str | None = None) -> None:
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(module.parameters(), 1.0)
        if gradient:
            values[gradient] = norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # the scaler of float16 looks at all optimisers'

    @torch.no_grad()
    def place_codes(self, pixels: Tensor, step: int) -> None:
        """All codes to outputs of the encoder, for this batch and some more."""
        needed = 4 * self.vqgan.config.codebook_size / self.vqgan.config.grid**2
        count = min(64, int(needed / (len(pixels) * self.accelerator.num_processes)))
        views = [pixels, *(v.to(pixels.device).float() / 255
                           for _, v in self.feed.batches(step + 1, count))]
        self.used.zero_()
        self.restart([self.vqgan.encoder(v * 2 - 1).float() for v in views], step)

    def restart(self, features: list[Tensor], step: int) -> Tensor:
        """Dead codes to outputs of the encoder for these batches of all processes."""
        everywhere = torch.cat([self.accelerator.gather(batch) for batch in features])
        count = restart_dead_codes(self.vqgan, self.used, everywhere,
                                   trainer.generator(self.a.seed + 1, step))
        return torch.tensor(float(count), device=everywhere.device)

    def state(self) -> dict[str, Any]:
        return {"model": self.vqgan.state_dict(), "average": self.average.state,
                "discriminator": self.discriminator.state_dict(), "used": self.used,
                "optimizer": self.optimizer.state_dict(),
                "discriminator_optimizer": self.discriminator_optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.vqgan.load_state_dict(state["model"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.average.load(state["average"])
        self.used.copy_(state["used"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def validate(self, count: int = 256) -> tuple[dict[str, float], dict[str, Image.Image]]:
        self.evaluated.load_state_dict(self.average.state)
        scores, picture = copy_scores(self.evaluated, self.held[:count], self.perceptual)
        return scores, {"grid": picture}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("images", help="folder, zip, tar, shards, or coco:, imagenet:, googlecc: and a folder")
    add("--validation", help="images that are not trained on (default: a held-out share)")
    add("--held-out", type=float, default=0.05, help="share that is not trained on (0.05)")
    add("--clip", help="bundle, run or open_clip's ARCHITECTURE:PRETRAINED; perceptual loss")
    add("--size", type=positive, help="pixels a side (64, or that of --from)")
    add("--channels", help="a level each; each but the first halves (64,128)")
    add("--patch", type=positive, help="pixels a side of a place of the first level (4; with "
        "--channels 1)")
    add("--blocks", type=positive, help="residual blocks a level (1)")
    add("--attention", help="sizes in pixels that get self-attention, as in 16,32 (none)")
    add("--codebook-size", type=positive, help="(1024)")
    add("--code-dim", type=positive, help="(8)")
    add("--unnormalised", action="store_true", help="codes of any length, not of unit length")
    add("--norm-groups", type=whole, help="of GroupNorm; 0: no normalisation (0)")
    add("--unquantised", type=share, default=0.2,
        help="share of steps before codes are used (0.2)")
    add("--published", action="store_true", help="the public recipe: 16,384 codes of 256 "
        "dimensions, un-normalised, 256 pixels, lpips, adaptive GAN weight")
    add("--from", dest="start_from", metavar="BUNDLE", help="fine-tune a bundle's or run's VQGAN")
    add("--decoder-of", metavar="BUNDLE", help="the same, but its decoder alone")
    trainer.add_arguments(p, steps=12000, batch=16, lr=1e-3)
    add("--optimizer", choices=("muon", "adamw"), default="muon",
        help="muon: for all but the first and last layers, which get adamw (muon)")
    add("--warmup", type=whole, default=200, help="steps (200)")
    add("--ema", type=share, default=0.999, help="decay of the averaged weights (0.999)")
    add("--scale", type=scale, default=0.85, help="least share of the side in a crop (0.85)")
    add("--no-flip", dest="flip", action="store_false", help="no mirrored images")
    add("--workers", type=whole, default=0, help="processes that read images (0: none apart)")
    # Weighs a few wild pixels more than L1 does; a coloured spot in every image was the reason.
    add("--l2", type=amount, default=5.0, help="weight (5)")
    add("--commitment", type=amount, default=0.25, help="weight (0.25)")
    add("--perceptual-loss", choices=("clip", "lpips", "none"), default="clip",
        help="clip: features of --clip; lpips: VGG16, the package and its weights needed")
    add("--perceptual", type=amount, default=0.1, help="weight (0.1)")
    add("--gan", type=amount, default=0.02, help="weight (0.02); 0: none")
    add("--gan-weight", choices=("fixed", "adaptive"), default="fixed",
        help="adaptive: times the ratio of gradients at the decoder's last layer")
    add("--gan-start", type=share, default=0.6,
        help="share of the steps without a discriminator (0.6)")
    add("--gan-channels", type=positive, default=32, help="of the discriminator (32)")
    if p.parse_known_args(arguments)[0].published:
        p.set_defaults(**PUBLISHED)
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    a = parse(arguments)
    accelerator = trainer.start(a.dtype, a.seed)
    perceptual = perceptual_loss(a)
    vqgan = make_vqgan(a)
    try:
        refuse_inside(a.images, run=a.run)
        images, held, data = open_parts(a.images, a.validation, a.held_out)
        pixels = stack_views(held, vqgan.config.image_size, 1000)[1]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    training, steps, _ = trainer.run(
        a, accelerator, lambda steps: VQGANTraining(a, accelerator, steps, vqgan, images, pixels,
                                                    perceptual),
        data=data, vqgan=vars(vqgan.config),
        begun="--decoder-of" if a.decoder_of else "--from" if a.start_from else "new")
    scores = training.validate(1000)[0]
    if not math.isfinite(scores["l1"]):
        raise SystemExit(f"{a.run}: the VQGAN makes no finite pixels: train with a lower --lr")
    if accelerator.is_main_process:
        trainer.finish(a.run, "vqgan", training.average.state, vars(vqgan.config))
    accelerator.wait_for_everyone()
    return {"steps": steps, "n_images": len(images), "n_held_out": len(pixels)} | {
        k: round(v, 4) for k, v in scores.items()}


def perceptual_loss(a: argparse.Namespace) -> nn.Module | None:
    if a.perceptual_loss == "lpips":
        return LPIPS()
    if a.perceptual_loss == "clip" and a.perceptual:
        if not a.clip:
            raise SystemExit("--perceptual-loss clip compares features of a CLIP: give --clip, as "
                             "in --clip weights/emoji, or take --perceptual-loss none")
        return CLIPDistance(load_clip(a.clip))
    return None


def make_vqgan(a: argparse.Namespace) -> VQGAN:
    """A new VQGAN of the flags' sizes, or that of --from or --decoder-of."""
    settled = a.start_from or a.decoder_of or ("--published" if a.published else None)
    for name in NEW if settled else ():
        if getattr(a, name) is not None:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(a, name)} is settled by "
                             f"{settled}: leave it out")
    if a.start_from or a.decoder_of:
        vqgan = load_vqgan(a.start_from or a.decoder_of).float().train().requires_grad_(True)
        if a.size not in (None, vqgan.config.image_size):
            raise SystemExit(f"--size {a.size} is not that of {a.start_from or a.decoder_of}, "
                             f"{vqgan.config.image_size}: leave --size out")
        if a.decoder_of:
            vqgan.encoder.requires_grad_(False)
            vqgan.quantizer.requires_grad_(False)
        return vqgan
    size = a.size or 64
    try:
        if a.published:
            return VQGAN(VQGANConfig(**vars(VQGANConfig.published()) | {"image_size": size}))
        new = NEW | {"patch": 1} if a.channels else NEW
        given = {name: value if getattr(a, name) is None else getattr(a, name)
                 for name, value in new.items()}
        channels, attention = (tuple(int(c) for c in given.pop(name).split(",") if c)
                               for name in ("channels", "attention"))
        vqgan = VQGAN(VQGANConfig(
            image_size=size, channels=channels, attention_sizes=attention,
            blocks_per_level=given.pop("blocks"), l2_normalised=not a.unnormalised, **given))
        vqgan.initialise()
        return vqgan
    except ValueError as error:
        raise SystemExit(f"no such VQGAN: {error}") from None


if __name__ == "__main__":
    trainer.report(main())
