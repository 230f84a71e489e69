"""Train a GPT on shards of codes and embeddings: no captions, no images.

    python -m scripts.train_gpt runs/shards --run runs/gpt [--steps 12000] [--noise 0.5]
    accelerate launch -m scripts.train_gpt ...      on several devices

Each step perturbs the embedding, normalise(e + noise * n / |n|) with fresh Gaussian n, because a
text embedding lies beside the image embeddings, not among them (as LAFITE, arXiv 2111.13792).  One
condition in ten is replaced by the learned null embedding (classifier-free guidance, 2207.12598).
The last line of stdout is JSON: `token_ce`, nats per code on held-out images; `unigram_ce`, the
entropy of those images' code frequencies; where captions were encoded `token_ce_text`, the same
codes given the embedding of a caption, and `text_gap`, the difference.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from clipgen.clip import CLIP
from clipgen.gpt import GPT, GPTConfig
from clipgen.sampling import Sampler
from clipgen.vqgan import VQGAN
from scripts.data.files import sha256
from scripts.data.shards import Shards, read_shards
from scripts.data.transforms import order
from scripts.evaluation.figures import grid
from scripts.evaluation.scores import entropy
from scripts.training import trainer
from scripts.training.cli import amount, positive, share, whole
from scripts.training.loading import CODES, fingerprint, load_clip, load_gpt, load_vqgan
from scripts.training.optim import Average, adamw, learning_rate, muon, set_learning_rate

OPTIMIZERS = {"muon": muon, "adamw": adamw}
# Of a new GPT, how large it is and what it has beyond the published one (docs/speed.md).
NEW = {"layers": 6, "width": 256, "heads": 4, "neighbours": 3, "modulated": True,
       "squared_relu": False, "normalised_qk": False}
# Dense bf16 operations a second, in units of 1e12, from the makers' data sheets; the first name
# that occurs in the device's counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L4": 121,
               "L40S": 362, "A10G": 70, "RTX 4090": 165}


def perturbation(rows: int, dim: int, length: float, generator: torch.Generator,
                 kind: str = "fixed") -> Tensor:
    """Vectors (rows, dim) of random direction; of that length, or (kind "random") of a length drawn
    evenly from 0 to it."""
    n = length * F.normalize(torch.randn((rows, dim), generator=generator), dim=1)
    return n * torch.rand((rows, 1), generator=generator) if kind == "random" else n


def centre(embedding: Tensor, mean: Tensor | None) -> Tensor:
    """Unit rows (N, D) less the mean of their kind, of unit length again; unchanged without one."""
    return embedding if mean is None else F.normalize(embedding - mean.to(embedding), dim=1)


def operations_per_code(gpt: GPT) -> float:
    """Training operations for one code, forward and backward: 6 N + 6 layers width context.

    N: the weights that every code is multiplied with, so neither tables nor biases (6 N is of arXiv
    2001.08361, section 2.1).  Attention is half of the 12 layers width context of 2204.02311,
    appendix B, since a code attends on average to half of its context.
    """
    config = gpt.config
    linear = [*(m for m in gpt.blocks.modules() if isinstance(m, nn.Linear)), gpt.head]
    weights = sum(m.weight.numel() for m in linear)
    return 6 * weights + 6 * config.layers * config.width * config.block_size


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, operations a second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * v for k, v in PEAK_TFLOPS.items() if re.search(rf"\b{k}\b", name)), None)


class Reconstruction(nn.Module):
    """The paper's embedding-reconstruction loss: 1 - cosine of the condition and of what CLIP sees
    in the forecast codes, decoded; the argmax passes gradients straight through (1308.3432)."""

    def __init__(self, clip: CLIP, vqgan: VQGAN):
        super().__init__()
        self.clip, self.vqgan = clip.requires_grad_(False), vqgan.requires_grad_(False)

    def forward(self, logits: Tensor, embedding: Tensor, mean: Tensor | None) -> Tensor:
        """Logits (N, L, K) and the embeddings (N, D) they should lead to, less `mean` if given."""
        soft = logits.float().softmax(-1)  # (N, L, K)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        vectors = (hard + soft - soft.detach()) @ self.vqgan.quantizer.codebook()  # (N, L, d)
        side = self.vqgan.config.grid
        pixels = self.vqgan.decoder(vectors.transpose(1, 2).unflatten(2, (side, side)))
        seen = self.clip.model.encode_image(self.clip.preprocess((pixels * 0.5 + 0.5).clamp(0, 1)))
        seen = F.normalize(seen.float(), dim=1)
        if (own := self.clip.config.image_embedding_mean) is not None:
            seen = centre(seen, seen.new_tensor(own))
        return 1 - (centre(seen, mean) * embedding).sum(1).mean()


class GPTTraining:
    """See `trainer.Training`."""

    def __init__(self, a: argparse.Namespace, accelerator: Accelerator, steps: int, gpt: GPT,
                 data: Shards, held: Shards, means: dict[str, Tensor] | None,
                 reconstruction: Reconstruction | None, vqgan: VQGAN | None):
        self.a, self.accelerator, self.steps = a, accelerator, steps
        self.data, self.held, self.vqgan = data, held, vqgan
        self.means = means or {"image": None, "text": None}
        self.gpt = copy.deepcopy(gpt).to(accelerator.device).train()
        self.gpt.dropout = a.dropout
        self.optimizer = OPTIMIZERS[a.optimizer](self.gpt, a.lr, a.decay)
        self.average = Average(self.gpt, a.ema)
        self.evaluated = copy.deepcopy(self.gpt).eval()
        self.reconstruction = reconstruction.to(accelerator.device) if reconstruction else None
        if a.compile:
            self.gpt.compile()
        self.wrapped, self.optimizer = accelerator.prepare(self.gpt, self.optimizer)

    def step(self, step: int) -> dict[str, Tensor]:
        a, device = self.a, self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        generator = trainer.generator(a.seed, step)
        # Everything is drawn for the batches of all processes; each takes its own part.
        total, mine = world * a.batch, slice(rank * a.batch, (rank + 1) * a.batch)
        rows = torch.as_tensor(order(len(self.data), step * total, total, a.seed))
        crops = torch.randint(self.data.crops, (total,), generator=generator)
        codes, clean = (x.to(device) for x in self.data.rows(rows[mine], crops[mine]))
        clean = centre(clean, self.means["image"])
        noise = perturbation(total, clean.shape[1], a.noise, generator, a.noise_kind)[mine]
        e = F.normalize(clean + noise.to(device), dim=1)
        dropped = torch.zeros(a.batch, dtype=torch.bool)
        if self.gpt.config.null_embedding:
            dropped = (torch.rand(total, generator=generator) < a.drop_condition)[mine]
            e = torch.where(dropped[:, None].to(device), self.gpt.null_embedding, e)
        if a.dropout:
            torch.manual_seed(torch.randint(2**62, (world,), generator=generator)[rank].item())
        with self.accelerator.autocast():
            logits = self.wrapped(e, codes[:, :-1])  # (N, L, K)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        values = {"loss": loss}
        if self.reconstruction and not dropped.all():
            given = ~dropped.to(device)
            values["reconstruction"] = self.reconstruction(logits[given], clean[given],
                                                           self.means["image"])
            loss = loss + a.reconstruction * values["reconstruction"]
        set_learning_rate(self.optimizer, learning_rate(step, self.steps, a.lr, a.warmup))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        values["gradient"] = self.accelerator.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.gpt, step)
        if world > 1:
            values = {k: self.accelerator.reduce(v.detach(), "mean") for k, v in values.items()}
        return values

    def state(self) -> dict[str, Any]:
        return {"model": self.gpt.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state}

    def load(self, state: dict[str, Any]) -> None:
        self.gpt.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load(state["average"])

    @torch.no_grad()
    def validate(self, count: int = 1000) -> tuple[dict[str, float], dict[str, Image.Image]]:
        self.evaluated.load_state_dict(self.average.state)
        scores = {"token_ce": self.cross_entropy(torch.arange(min(count, len(self.held))))}
        texts = self.held.texts()
        if texts:
            embeddings, indices = texts[0][:count], texts[1][:count]
            given = centre(embeddings, self.means["text"])
            scores["token_ce_text"] = self.cross_entropy(indices, given)
            scores["text_gap"] = scores["token_ce_text"] - self.cross_entropy(indices)
        grids = {}
        if self.vqgan:
            grids["images"] = self.samples()
            if texts:
                grids["texts"] = self.samples(*texts)
        return scores, grids

    def cross_entropy(self, indices: Tensor, embeddings: Tensor | None = None) -> float:
        """Nats per code of held-out images, given their own embeddings or those given."""
        total = 0.0
        for part in torch.arange(len(indices)).split(64):
            codes, own = self.held.rows(indices[part], torch.zeros(len(part), dtype=torch.int64))
            e = centre(own, self.means["image"]) if embeddings is None else embeddings[part]
            codes = codes.to(self.accelerator.device)
            logits = self.evaluated(e.to(codes.device), codes[:, :-1])
            total += F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item() * len(part)
        return total / len(indices)

    def unigram(self, count: int = 1000) -> float:
        """Entropy of code frequencies, nats, of the images that `validate` looks at."""
        index = torch.arange(min(count, len(self.held)))
        codes, _ = self.held.rows(index, torch.zeros_like(index))
        return entropy(torch.bincount(codes.flatten()))

    def samples(self, texts: Tensor | None = None, indices: Tensor | None = None) -> Image.Image:
        """Held-out images (as the VQGAN copies them) over samples, given their own embeddings or
        those of their captions."""
        chosen = torch.arange(min(8, len(self.held))) if indices is None else indices[:8]
        codes, own = self.held.rows(chosen, torch.zeros(len(chosen), dtype=torch.int64))
        e = (centre(own, self.means["image"]) if texts is None
             else centre(texts[:8], self.means["text"]))
        drawn = Sampler(self.evaluated).sample(e.to(self.accelerator.device), range(len(e)),
                                               temperature=1.0, top_k=0, top_p=1.0, guidance=1.0)
        side = self.vqgan.config.grid
        both = torch.cat([codes.to(drawn), drawn]).view(-1, side, side)
        both = both.to(self.accelerator.device)
        given = "image" if texts is None else "caption"
        return grid(self.vqgan.to(both.device).decode(both), columns=len(chosen),
                    labels=["copied by the VQGAN", f"sampled from the {given}'s embedding"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("shards", type=Path)
    add("--validation", type=Path, help="shards of images that are not trained on (default: the "
        "held-out part of the same)")
    for name, value in NEW.items():
        flag, given = f"--{name.replace('_', '-')}", f"({value}, or that of --from)"
        if isinstance(value, bool):
            add(flag, action=argparse.BooleanOptionalAction, help=f"see clipgen/gpt.py {given}")
        else:
            add(flag, type=whole if name == "neighbours" else positive, help=given)
    add("--from", dest="start_from", metavar="BUNDLE", help="go on from the GPT of a bundle or run")
    trainer.add_arguments(p, steps=12000, batch=64, lr=1e-3)
    add("--optimizer", choices=OPTIMIZERS, default="muon", help="(muon); a step of adamw is a "
        "tenth shorter on a CPU, and worth less")
    add("--warmup", type=whole, default=300, help="steps (300)")
    add("--decay", type=amount, default=0.05, help="weight decay of matrices (0.05)")
    add("--ema", type=share, default=0.999, help="decay of the averaged weights (0.999)")
    add("--dropout", type=share, default=0.0)
    add("--noise", type=amount, default=0.5, help="ξ: length of the perturbation (0.5)")
    add("--noise-kind", choices=("fixed", "random"), default="fixed",
        help="random: each length is drawn from 0 to --noise")
    add("--drop-condition", type=share, default=0.1, help="share of null embeddings (0.1)")
    add("--subtract-means", action="store_true", help="take the mean off images' and texts' "
        "embeddings; the shards must have been encoded with captions")
    add("--reconstruction", type=amount, default=0.0, help="weight of the "
        "embedding-reconstruction loss; it needs --clip and --vqgan (0: off)")
    add("--clip", help="what the shards were encoded with; for --reconstruction")
    add("--vqgan", help="what the shards were encoded with; for grids and --reconstruction")
    add("--compile", action="store_true", help="torch.compile: faster on CUDA, slower to start")
    return p.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    a = parse(arguments)
    accelerator = trainer.start(a.dtype, a.seed)
    try:
        data = read_shards(a.shards)
        held = read_shards(a.validation or a.shards, "validation")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    manifest = data.manifest
    for part, name in (("vqgan", "VQGAN"), ("clip", "CLIP")):
        if held.manifest[f"{part}_sha256"] != manifest[f"{part}_sha256"]:
            raise SystemExit(f"{a.validation} was encoded by another {name} than {a.shards}: "
                             "encode it again")
    if a.subtract_means and manifest["centred"]:
        raise SystemExit(f"the CLIP that {a.shards} was encoded with takes means off already: "
                         "leave --subtract-means out")
    vqgan = load_vqgan(a.vqgan) if a.vqgan else None
    if vqgan and fingerprint(vqgan, *CODES) != manifest["vqgan_sha256"]:
        raise SystemExit(f"{a.shards} was encoded by another VQGAN than {a.vqgan}: give that one, "
                         "or encode again")
    reconstruction = None
    if a.reconstruction:
        if not (a.clip and a.vqgan):
            raise SystemExit("--reconstruction decodes codes and embeds the images: give --clip "
                             "and --vqgan, those that the shards were encoded with")
        clip = load_clip(a.clip)
        if fingerprint(clip) != manifest["clip_sha256"]:
            raise SystemExit(f"{a.shards} was encoded by another CLIP than {a.clip}: give that one")
        reconstruction = Reconstruction(clip, copy.deepcopy(vqgan))
    means = means_of(data, a.shards) if a.subtract_means else None
    gpt = make_gpt(a, data)
    training, steps, scores = trainer.run(
        a, accelerator, lambda steps: GPTTraining(a, accelerator, steps, gpt, data, held, means,
                                                  reconstruction, vqgan),
        gpt=vars(gpt.config), vqgan_sha256=manifest["vqgan_sha256"],
        clip_sha256=manifest["clip_sha256"], data=sha256(a.shards / "manifest.json"))
    scores["unigram_ce"] = training.unigram()
    if speeds := sorted(trainer.logged(a.run, "steps_per_second")):
        rate = speeds[len(speeds) // 2] * a.batch * accelerator.num_processes * data.length
        scores["codes_per_second"] = rate
        if peak := peak_flops(accelerator.device):
            scores["mfu"] = operations_per_code(gpt) * rate / (peak * accelerator.num_processes)
        scores["memory_gb"] = max(trainer.logged(a.run, "memory_gb"), default=0.0)
    if accelerator.is_main_process:
        shards = {"vqgan_sha256": manifest["vqgan_sha256"], "clip_sha256": manifest["clip_sha256"],
                  "means": {k: v.tolist() for k, v in means.items()} if means else None}
        trainer.finish(a.run, "gpt", training.average.state, vars(gpt.config), shards=shards)
    accelerator.wait_for_everyone()
    return {"steps": steps} | {k: round(v, 4) for k, v in scores.items()}


def make_gpt(a: argparse.Namespace, data: Shards) -> GPT:
    """A new GPT of the flags' sizes, or the one of --from, that fits the shards."""
    fits = {"codebook_size": data.manifest["codebook_size"], "block_size": data.length,
            "embedding_dim": data.embedding_dim}
    if not a.start_from:
        try:
            sizes = {name: value if getattr(a, name) is None else getattr(a, name)
                     for name, value in NEW.items()}
            gpt = GPT(GPTConfig(**sizes, **fits,
                                null_embedding=a.drop_condition > 0))
        except ValueError as error:
            remedy = "" if "give" in str(error) else ": give other --width and --heads"
            raise SystemExit(f"{error}{remedy}") from None
        gpt.initialise()
        return gpt
    given = load_gpt(a.start_from)
    for name in NEW:
        if getattr(a, name) not in (None, getattr(given.config, name)):
            raise SystemExit(f"--{name} {getattr(a, name)} is not that of {a.start_from}, "
                             f"{getattr(given.config, name)}: leave --{name} out")
    for name, value in fits.items():
        if getattr(given.config, name) != value:
            raise SystemExit(f"the GPT of {a.start_from} has the {name} "
                             f"{getattr(given.config, name)}, {a.shards} has {value}: encode with "
                             "the CLIP and VQGAN of the same bundle")
    if not a.drop_condition or given.config.null_embedding:
        return given.requires_grad_(True)
    # A null embedding is learned on top, so that the result can be guided.
    gpt = GPT(GPTConfig(**vars(given.config) | {"null_embedding": True}))
    gpt.initialise()
    gpt.load_state_dict(given.state_dict() | {"null_embedding": gpt.null_embedding.detach()})
    return gpt


def means_of(data: Shards, path: Path) -> dict[str, Tensor]:
    """The mean embedding of training images and that of captions."""
    texts = data.manifest.get("text_mean")
    if texts is None:
        raise SystemExit(f"--subtract-means needs the mean of texts, and {path} was encoded "
                         "without captions: encode with --captions, or leave the flag out")
    return {"image": data.mean_embedding(), "text": torch.tensor(texts)}


if __name__ == "__main__":
    trainer.report(main())
