"""Train a VQGAN on images: no captions, no labels.

    python -m scripts.train_vqgan runs/scenes.tar --run runs/vqgan --clip runs/clip

Loss: L1 + L2 + perceptual (features of the CLIP image tower) + quantiser + hinge GAN from
`--gan-start`.
New models have 8-dimensional l2-normalised codes (ViT-VQGAN, arXiv 2110.04627).

`--decoder-of runs/vqgan` goes on with the decoder alone: codes, and shards made of them, stay
valid, so that this can run beside `train_gpt`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from clipgen.clip import CLIP, CLIPConfig
from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.discriminator import Discriminator, hinge_loss
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


class PerceptualLoss(nn.Module):
    """Distance between feature maps of a convolutional CLIP image tower, unit length at each place.

    The form is that of LPIPS (arXiv 1801.03924) with every channel weighing the same.
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = copy.deepcopy(clip).eval().requires_grad_(False)
        if not hasattr(self.clip.model.visual, "layer1"):
            raise ValueError("the perceptual loss needs a CLIP with a convolutional image tower")

    def features(self, pixels: Tensor) -> list[Tensor]:
        tower = self.clip.model.visual
        x = tower.stem(self.clip.preprocess(pixels).contiguous(memory_format=torch.channels_last))
        maps = [x]
        for layer in (tower.layer1, tower.layer2, tower.layer3):
            x = layer(x)
            maps.append(x)
        return [F.normalize(m, dim=1) for m in maps]

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Mean distance of pixels (N, 3, H, W) from target, both around [0, 1]."""
        with torch.no_grad():
            wanted = self.features(target)
        given = self.features(pixels)
        return sum((a - b).square().sum(1).mean() for a, b in zip(given, wanted, strict=True))


def load_clip_run(directory: Path) -> CLIP:
    """The CLIP that `train_clip` left in its run directory."""
    config = json.loads((directory / "clip.json").read_text())
    clip = CLIP(CLIPConfig(model=config["model"], vocabulary=tuple(config["vocabulary"])))
    clip.load_state_dict(load_file(directory / "clip.safetensors"))
    return clip.eval()


def load_vqgan_run(directory: Path) -> VQGAN:
    """The VQGAN that `train_vqgan` left in its run directory."""
    vqgan = VQGAN(VQGANConfig(**json.loads((directory / "vqgan.json").read_text())))
    vqgan.load_state_dict(load_file(directory / "vqgan.safetensors"))
    return vqgan.eval()


def quantise(vqgan: VQGAN, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D, h, w) to straight-through vectors, codes (N, h, w) and the quantiser's loss.

    Commitment (encoder to code) weighs 0.25, the codebook term 1 (VQ-VAE, arXiv 1711.00937).
    """
    z = vqgan.quantizer.normalise(features)
    with torch.no_grad():
        codes = vqgan.quantizer.nearest(features)
    vectors = vqgan.quantizer.vectors(codes)
    loss = 0.25 * F.mse_loss(z, vectors.detach()) + F.mse_loss(vectors, z.detach())
    return z + (vectors - z).detach(), codes, loss


@torch.no_grad()
def restart_dead_codes(vqgan: VQGAN, used: Tensor, features: Tensor,
                       generator: torch.Generator) -> int:
    """Move codes that were not used lately onto random encoder outputs; returns how many."""
    dead = (used == 0).nonzero().flatten()
    pool = vqgan.quantizer.normalise(features).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = pool[torch.randint(len(pool), (len(dead),), generator=generator).to(pool.device)]
    noise = torch.randn(chosen.shape, generator=generator).to(pool.device)
    vqgan.quantizer.embedding.weight[dead] = chosen + 0.01 * noise
    return len(dead)


@torch.no_grad()
def validate(vqgan: VQGAN, images: ImageSet, device: torch.device, grid: Path | None,
             count: int = 256) -> dict[str, float]:
    """PSNR in dB (mean over images) and share of codes in use; writes originals over copies."""
    copies, codes = [], []
    for start in range(0, min(count, len(images)), 32):
        pixels = images.batch(torch.arange(start, min(start + 32, len(images)))).to(device)
        codes.append(vqgan.encode(pixels))
        copies.append(vqgan.decode(codes[-1]).cpu())
    result = torch.cat(copies)
    original = images.batch(torch.arange(len(result)))
    psnr = -10 * (result - original).square().mean((1, 2, 3)).log10()
    used = torch.cat(codes).unique().numel() / vqgan.config.codebook_size
    if grid:
        pairs = torch.cat([original[:16], result[:16]])  # (32, 3, S, S): 2 rows of 16
        s = pairs.shape[-1]
        sheet = pairs.view(2, 16, 3, s, s).permute(0, 3, 1, 4, 2).reshape(2 * s, 16 * s, 3)
        Image.fromarray((sheet * 255).round().byte().numpy()).save(grid)
    return {"psnr_db": psnr.mean().item(), "codebook_usage": used}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", type=Path)
    p.add_argument("--validation", type=Path, help="images that are not trained on")
    p.add_argument("--run", type=Path, required=True, help="directory of checkpoints and result")
    p.add_argument("--clip", type=Path, help="run directory of train_clip: the perceptual loss")
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--channels", default="32,64,64,128", help="a level each; each halves the size")
    p.add_argument("--codebook-size", type=int, default=1024)
    p.add_argument("--steps", type=int, default=12000)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=1e-3)
    # Weighs a few wild pixels more than L1 does; a coloured spot in every image was the reason.
    p.add_argument("--l2", type=float, default=5.0, help="weight")
    p.add_argument("--perceptual", type=float, default=0.1, help="weight")
    p.add_argument("--gan", type=float, default=0.02, help="weight")
    p.add_argument("--gan-start", type=int, default=6000, help="first step with the discriminator")
    p.add_argument("--decoder-of", type=Path, help="a finished run: train its decoder alone")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if a.decoder_of:
        vqgan = load_vqgan_run(a.decoder_of)
        vqgan.encoder.requires_grad_(False)
        vqgan.quantizer.requires_grad_(False)
    else:
        vqgan = VQGAN(VQGANConfig(
            image_size=a.size, channels=tuple(int(c) for c in a.channels.split(",")),
            attention_sizes=(), blocks_per_level=1, code_dim=8, codebook_size=a.codebook_size,
            l2_normalised=True))
    config = vqgan.config
    images = read_images(a.images, config.image_size)
    held = read_images(a.validation, config.image_size) if a.validation else images
    vqgan.train().to(device)  # not channels_last: there GroupNorm is slow on a CPU
    judge = Discriminator().to(device)
    perceptual = PerceptualLoss(load_clip_run(a.clip)).to(device) if a.clip else None
    optimizer, judge_optimizer = adamw(vqgan, a.lr, 1e-4), adamw(judge, a.lr, 1e-4)
    average = Average(vqgan, 0.999)
    used = torch.zeros(config.codebook_size, device=device)
    run = Run(a.run, settings_of(a))
    first, sums = 0, {}
    if state := run.resume():
        vqgan.load_state_dict(state["model"])
        judge.load_state_dict(state["discriminator"])
        optimizer.load_state_dict(state["optimizer"])
        judge_optimizer.load_state_dict(state["discriminator_optimizer"])
        average.state, used, first = state["average"], state["used"], state["step"]
    evaluated = copy.deepcopy(vqgan)
    for step in range(first, a.steps):
        generator = torch.Generator().manual_seed(a.seed * 1_000_003 + step)
        index = torch.randint(len(images), (a.batch,), generator=generator)
        pixels = images.batch(index)
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(3)
        pixels = pixels.to(device)
        features = vqgan.encoder(pixels * 2 - 1)
        vectors, codes, loss_vq = quantise(vqgan, features)
        result = vqgan.decoder(vectors) * 0.5 + 0.5  # around [0, 1]
        losses = {"l1": F.l1_loss(result, pixels), "l2": F.mse_loss(result, pixels), "vq": loss_vq}
        loss = losses["l1"] + a.l2 * losses["l2"] + losses["vq"]
        if perceptual:
            losses["perceptual"] = perceptual(result, pixels)
            loss = loss + a.perceptual * losses["perceptual"]
        adversarial = step >= a.gan_start and a.gan > 0
        if adversarial:
            losses["gan"] = -judge(result * 2 - 1).mean()
            weight = a.gan * min(1.0, (step - a.gan_start) / 500)  # a fresh judge knows nothing
            loss = loss + weight * losses["gan"]
        rate = learning_rate(step, a.steps, a.lr, 200)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses["gradient"] = nn.utils.clip_grad_norm_(vqgan.parameters(), 1.0)
        optimizer.step()
        average.update(vqgan, step)
        if adversarial:
            set_learning_rate(judge_optimizer, 0.5 * rate)
            losses["judge"] = hinge_loss(judge(pixels * 2 - 1), judge(result.detach() * 2 - 1))
            judge_optimizer.zero_grad(set_to_none=True)
            losses["judge"].backward()
            judge_optimizer.step()
        used += torch.bincount(codes.flatten(), minlength=len(used))
        done = step + 1
        if done % 100 == 0:
            if done < 0.6 * a.steps and not a.decoder_of:
                losses["restarted"] = restart_dead_codes(vqgan, used, features, generator)
            used.zero_()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        if done % 100 == 0:
            run.log(done, a.steps, **{k: v / 100 for k, v in sums.items()})
            sums = {}
        if run.due() or done == a.steps:
            run.save(done, model=vqgan.state_dict(), discriminator=judge.state_dict(),
                     optimizer=optimizer.state_dict(), used=used, average=average.state,
                     discriminator_optimizer=judge_optimizer.state_dict())
            evaluated.load_state_dict(average.state)
            scores = validate(evaluated.eval(), held, device, a.run / "grid.png")
            run.log(done, a.steps, **scores)
    evaluated.load_state_dict(average.state)
    scores = validate(evaluated.eval(), held, device, a.run / "grid.png", count=1000)
    if not math.isfinite(scores["psnr_db"]):
        raise FloatingPointError("the trained VQGAN makes no finite pixels")
    save_weights(average.state, a.run / "vqgan.safetensors")
    (a.run / "vqgan.json").write_text(json.dumps(vars(config)))
    print(json.dumps({"steps": a.steps, **scores}))


if __name__ == "__main__":
    main()
