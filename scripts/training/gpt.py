"""Training a GPT on shards of codes and embeddings: settings, the data of a step, the loss."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from clipgen.gpt import GPT, GPTConfig
from clipgen.sampling import Sampler
from clipgen.vqgan import VQGAN
from scripts.data.files import sha256
from scripts.data.shards import Shards, read_shards
from scripts.data.transforms import order
from scripts.evaluation.figures import grid
from scripts.evaluation.metrics import entropy
from scripts.training.cli import amount, answer, positive, said, setting, share, whole
from scripts.training.loading import CODES, fingerprint, load_clip, load_gpt, load_vqgan
from scripts.training.losses import EmbeddingReconstruction, centre
from scripts.training.optim import adamw_alone, muon
from scripts.training.run_directory import finish, logged
from scripts.training.settings import RunSettings
from scripts.training.trainer import Part, generator, train

OPTIMIZERS = {"muon": muon, "adamw": adamw_alone}
# Of a new GPT, how large it is and what it has beyond the published one (docs/speed.md).
NEW = {"layers": 6, "width": 256, "heads": 4, "neighbours": 5, "modulated": True,
       "squared_relu": True, "layouts": 64}
# Dense bf16 operations a second, in units of 1e12, from the makers' data sheets; the first name
# that occurs in the device's counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L4": 121,
               "L40S": 362, "A10G": 70, "RTX 4090": 165}


@dataclass(kw_only=True)
class GPTSettings(RunSettings):
    """Settings of `scripts.train_gpt`."""

    shards: Path = setting(type=Path, positional=True, free=True)
    validation: Path | None = setting(None, "shards of images that are not trained on (default: "
                                      "the held-out part of the same)", type=Path, free=True)
    layers: int | None = setting(None, f"({NEW['layers']}, or that of --from)", type=positive)
    width: int | None = setting(None, f"({NEW['width']}, or that of --from)", type=positive)
    heads: int | None = setting(None, f"({NEW['heads']}, or that of --from)", type=positive)
    neighbours: int | None = setting(None, "how many codes above and beside the one that is "
                                     f"predicted are inputs too ({NEW['neighbours']})", type=whole)
    modulated: bool | None = setting(None, "the condition scales and shifts in every block "
                                     f"({said(NEW['modulated'])})", type=answer)
    squared_relu: bool | None = setting(None, "instead of GELU "
                                        f"({said(NEW['squared_relu'])})", type=answer)
    layouts: int | None = setting(None, "tables of inputs by place that the condition mixes "
                                  f"({NEW['layouts']})", type=whole)
    start_from: str | None = setting(None, "go on from the GPT of a bundle or run", flag="from",
                                     metavar="BUNDLE", free=True)
    batch: int = setting(64, "of each process", type=positive)
    optimizer: str = setting("muon", "a step of adamw is 10 % shorter on a CPU, and learns less",
                             choices=OPTIMIZERS)
    warmup: int = setting(300, "steps", type=whole)
    decay: float = setting(0.05, "weight decay of matrices", type=amount)
    dropout: float = setting(0.0, type=share)
    noise: float = setting(0.5, "ξ: length of the perturbation", type=amount)
    noise_kind: str = setting("fixed", "random: each length is drawn from 0 to --noise",
                              choices=("fixed", "random"))
    corruption: float = setting(0.0, "of the codes that are seen, up to this share are those of "
                                "other images, an even draw for each image", type=share)
    drop_condition: float = setting(0.1, "share of null embeddings", type=share)
    subtract_means: bool = setting(False, "take the mean off images' and texts' embeddings; the "
                                   "shards must have been encoded with captions")
    reconstruction: float = setting(0.0, "weight of the embedding-reconstruction loss; it needs "
                                    "--clip and --vqgan", type=amount)
    clip: str | None = setting(None, "what the shards were encoded with; for --reconstruction",
                               free=True)
    vqgan: str | None = setting(None, "what the shards were encoded with; for grids and "
                                "--reconstruction", free=True)
    compile: bool = setting(False, "torch.compile: faster on CUDA, slower to start")


@dataclass
class GPTBatch:
    """What one process trains on in a step.

    codes int64 (N, L); seen int64 (N, L), the same with some that are wrong; conditions (N, D), of
    length 1, with noise; clean (N, D), the same without; dropped bool (N,): rows whose condition is
    replaced by the null embedding.
    """

    codes: Tensor
    seen: Tensor
    conditions: Tensor
    clean: Tensor
    dropped: Tensor


def perturbation(rows: int, dim: int, length: float, generator: torch.Generator,
                 kind: str = "fixed") -> Tensor:
    """Vectors (rows, dim) of random direction; of that length, or (kind "random") of a length drawn
    evenly from 0 to it."""
    n = length * F.normalize(torch.randn((rows, dim), generator=generator), dim=1)
    return n * torch.rand((rows, 1), generator=generator) if kind == "random" else n


class GPTTask:
    """See `trainer.Task`."""

    def __init__(self, settings: GPTSettings, accelerator: Accelerator, gpt: GPT, data: Shards,
                 held: Shards, means: dict[str, Tensor] | None = None,
                 reconstruction: EmbeddingReconstruction | None = None,
                 vqgan: VQGAN | None = None):
        self.settings, self.accelerator = settings, accelerator
        self.data, self.held, self.vqgan = data, held, vqgan
        self.means = means or {"image": None, "text": None}
        self.model = copy.deepcopy(gpt).to(accelerator.device).train()
        self.model.dropout = settings.dropout
        self.reconstruction = reconstruction.to(accelerator.device) if reconstruction else None

    def parts(self) -> dict[str, Part]:
        settings = self.settings
        optimizers = OPTIMIZERS[settings.optimizer](self.model, settings.lr, settings.decay)
        if settings.compile:
            self.model.compile()
        self.forward, *optimizers = self.accelerator.prepare(self.model, *optimizers)
        return {"model": Part(self.model, optimizers, self.loss)}

    def batch(self, step: int) -> GPTBatch:
        """Everything is drawn for the batches of all processes; each takes its own rows."""
        s, device = self.settings, self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        random = generator(s.seed, step)
        total, mine = world * s.batch, slice(rank * s.batch, (rank + 1) * s.batch)
        rows = torch.as_tensor(order(len(self.data), step * total, total, s.seed))
        crops = torch.randint(self.data.crops, (total,), generator=random)
        codes, clean = (x.to(device) for x in self.data.rows(rows[mine], crops[mine]))
        clean = centre(clean, self.means["image"])
        noise = perturbation(total, clean.shape[1], s.noise, random, s.noise_kind)[mine]
        conditions = F.normalize(clean + noise.to(device), dim=1)
        dropped = torch.zeros(s.batch, dtype=torch.bool)
        if self.model.config.null_embedding:
            dropped = (torch.rand(total, generator=random) < s.drop_condition)[mine]
        seen = codes
        if s.corruption:
            shape = (total, codes.shape[1])
            wrong = (torch.rand(shape, generator=random)
                     < s.corruption * torch.rand((total, 1), generator=random))[mine].to(device)
            others, _ = self.data.rows(rows.roll(1)[mine], crops.roll(1)[mine])
            seen = torch.where(wrong, others.to(device), codes)
        if s.dropout:
            torch.manual_seed(torch.randint(2**62, (world,), generator=random)[rank].item())
        return GPTBatch(codes, seen, conditions, clean, dropped.to(device))

    def loss(self, batch: GPTBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, nats per code, and where asked for the embedding reconstruction."""
        conditions = batch.conditions
        if self.model.config.null_embedding:
            conditions = torch.where(batch.dropped[:, None], self.model.null_embedding, conditions)
        with self.accelerator.autocast():
            logits = self.forward(conditions, batch.seen[:, :-1])  # (N, L, K)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.codes.flatten())
        values = {"loss": loss}
        if self.reconstruction and not batch.dropped.all():
            given = ~batch.dropped
            values["reconstruction"] = self.reconstruction(logits[given], batch.clean[given],
                                                           self.means["image"])
            loss = loss + self.settings.reconstruction * values["reconstruction"]
        return loss, values

    def after(self, step: int) -> dict[str, Tensor]:
        return {}

    def buffers(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def validate(self, model: GPT, count: int = 1000
                 ) -> tuple[dict[str, float], dict[str, Image.Image]]:
        scores = {"token_ce": self.cross_entropy(model, torch.arange(min(count, len(self.held))))}
        texts = self.held.texts()
        if texts:
            embeddings, indices = texts[0][:count], texts[1][:count]
            given = centre(embeddings, self.means["text"])
            scores["token_ce_text"] = self.cross_entropy(model, indices, given)
            scores["text_gap"] = scores["token_ce_text"] - self.cross_entropy(model, indices)
        grids = {}
        if self.vqgan:
            grids["images"] = self.samples(model)
            if texts:
                grids["texts"] = self.samples(model, *texts)
        return scores, grids

    def cross_entropy(self, model: GPT, indices: Tensor,
                      embeddings: Tensor | None = None) -> float:
        """Nats per code of held-out images, given their own embeddings or those given."""
        total = 0.0
        for part in torch.arange(len(indices)).split(64):
            codes, own = self.held.rows(indices[part], torch.zeros(len(part), dtype=torch.int64))
            e = centre(own, self.means["image"]) if embeddings is None else embeddings[part]
            codes = codes.to(self.accelerator.device)
            logits = model(e.to(codes.device), codes[:, :-1])
            total += F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item() * len(part)
        return total / len(indices)

    def unigram(self, count: int = 1000) -> float:
        """Entropy of code frequencies, nats, of the images that `validate` looks at."""
        index = torch.arange(min(count, len(self.held)))
        codes, _ = self.held.rows(index, torch.zeros_like(index))
        return entropy(torch.bincount(codes.flatten()))

    def samples(self, model: GPT, texts: Tensor | None = None,
                indices: Tensor | None = None) -> Image.Image:
        """Held-out images (as the VQGAN copies them) over samples, given their own embeddings or
        those of their captions."""
        chosen = torch.arange(min(8, len(self.held))) if indices is None else indices[:8]
        codes, own = self.held.rows(chosen, torch.zeros(len(chosen), dtype=torch.int64))
        e = (centre(own, self.means["image"]) if texts is None
             else centre(texts[:8], self.means["text"]))
        drawn = Sampler(model).sample(e.to(self.accelerator.device), range(len(e)),
                                               temperature=1.0, top_k=0, top_p=1.0, guidance=1.0)
        side = self.vqgan.config.grid
        both = torch.cat([codes.to(drawn), drawn]).view(-1, side, side)
        both = both.to(self.accelerator.device)
        given = "image" if texts is None else "caption"
        return grid(self.vqgan.to(both.device).decode(both), columns=len(chosen),
                    labels=["copied by the VQGAN", f"sampled from the {given}'s embedding"])


def train_gpt(settings: GPTSettings, accelerator: Accelerator) -> dict[str, float]:
    """Train and leave the GPT in `settings.run`; returns its steps and scores.

    ValueError, one sentence: settings that do not fit the shards or each other; else as
    `trainer.train`.
    """
    data = read_shards(settings.shards)
    held = read_shards(settings.validation or settings.shards, "validation")
    manifest = data.manifest
    for part, name in (("vqgan", "VQGAN"), ("clip", "CLIP")):
        if held.manifest[f"{part}_sha256"] != manifest[f"{part}_sha256"]:
            raise ValueError(f"{settings.validation} was encoded by another {name} than "
                             f"{settings.shards}: encode it again")
    if settings.subtract_means and manifest["centred"]:
        raise ValueError(f"the CLIP that {settings.shards} was encoded with takes means off "
                         "already: leave --subtract-means out")
    vqgan = load_vqgan(settings.vqgan) if settings.vqgan else None
    if vqgan and fingerprint(vqgan, *CODES) != manifest["vqgan_sha256"]:
        raise ValueError(f"{settings.shards} was encoded by another VQGAN than {settings.vqgan}: "
                         "give that one, or encode again")
    reconstruction = make_reconstruction(settings, vqgan, manifest["clip_sha256"])
    means = means_of(data, settings.shards) if settings.subtract_means else None
    gpt = make_gpt(settings, data)
    result = train(
        settings, accelerator, lambda steps: GPTTask(settings, accelerator, gpt, data, held, means,
                                                     reconstruction, vqgan),
        gpt=vars(gpt.config), vqgan_sha256=manifest["vqgan_sha256"],
        clip_sha256=manifest["clip_sha256"], data=sha256(settings.shards / "manifest.json"))
    scores = result.scores | {"unigram_ce": result.task.unigram()}
    if speeds := sorted(logged(settings.run, "steps_per_second")):
        rate = (speeds[len(speeds) // 2] * settings.batch * accelerator.num_processes
                * data.length)
        scores["codes_per_second"] = rate
        if peak := peak_flops(accelerator.device):
            scores["mfu"] = operations_per_code(gpt) * rate / (peak * accelerator.num_processes)
        scores["memory_gb"] = max(logged(settings.run, "memory_gb"), default=0.0)
    if accelerator.is_main_process:
        shards = {"vqgan_sha256": manifest["vqgan_sha256"], "clip_sha256": manifest["clip_sha256"],
                  "image_tower_sha256": manifest.get("image_tower_sha256"),
                  "means": {k: v.tolist() for k, v in means.items()} if means else None}
        finish(settings.run, "gpt", result.model.state_dict(), vars(gpt.config), shards=shards)
    accelerator.wait_for_everyone()
    return {"steps": result.steps} | {k: round(v, 4) for k, v in scores.items()}


def make_reconstruction(settings: GPTSettings, vqgan: VQGAN | None,
                        clip_sha256: str) -> EmbeddingReconstruction | None:
    if not settings.reconstruction:
        return None
    if not (settings.clip and vqgan):
        raise ValueError("--reconstruction decodes codes and embeds the images: give --clip and "
                         "--vqgan, those that the shards were encoded with")
    clip = load_clip(settings.clip)
    if fingerprint(clip) != clip_sha256:
        raise ValueError(f"{settings.shards} was encoded by another CLIP than {settings.clip}: "
                         "give that one")
    return EmbeddingReconstruction(clip, copy.deepcopy(vqgan))


def make_gpt(settings: GPTSettings, data: Shards) -> GPT:
    """A new GPT of the flags' sizes, or the one of --from, that fits the shards."""
    fits = {"codebook_size": data.manifest["codebook_size"], "block_size": data.length,
            "embedding_dim": data.embedding_dim}
    if not settings.start_from:
        try:
            sizes = {name: value if getattr(settings, name) is None else getattr(settings, name)
                     for name, value in NEW.items()}
            gpt = GPT(GPTConfig(**sizes, **fits,
                                null_embedding=settings.drop_condition > 0))
        except ValueError as error:
            remedy = "" if "give" in str(error) else ": give other --width and --heads"
            raise ValueError(f"{error}{remedy}") from None
        gpt.initialise()
        return gpt
    given = load_gpt(settings.start_from)
    for name in NEW:
        if getattr(settings, name) not in (None, getattr(given.config, name)):
            flag = f"--{name.replace('_', '-')}"
            other, own = (said(value) if isinstance(value, bool) else value
                          for value in (getattr(settings, name), getattr(given.config, name)))
            raise ValueError(f"{flag} {other} is not that of {settings.start_from}, {own}: leave "
                             f"{flag} out")
    for name, value in fits.items():
        if getattr(given.config, name) != value:
            raise ValueError(f"the GPT of {settings.start_from} has the {name} "
                             f"{getattr(given.config, name)}, {settings.shards} has {value}: "
                             "encode with the CLIP and VQGAN of the same bundle")
    if not settings.drop_condition or given.config.null_embedding:
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
        raise ValueError(f"--subtract-means needs the mean of texts, and {path} was encoded "
                         "without captions: encode with --captions, or leave the flag out")
    return {"image": data.mean_embedding(), "text": torch.tensor(texts)}


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
