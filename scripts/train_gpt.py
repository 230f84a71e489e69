"""Train a GPT on shards of codes and embeddings: no captions, no images.

    python -m scripts.train_gpt runs/shards --run runs/gpt [--steps 12000] [--noise 0.5]

Each step perturbs the embedding, normalise(e + noise * n / |n|) with fresh Gaussian n, because a
text embedding lies beside the image embeddings, not among them (as LAFITE, arXiv 2111.13792).  One
condition in ten is replaced by the learned null embedding (classifier-free guidance, 2207.12598).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.gpt import GPT, GPTConfig
from scripts.runs import (
    Average,
    Run,
    adamw,
    learning_rate,
    save_weights,
    set_learning_rate,
    settings_of,
)


def perturb(embedding: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Unit rows (N, D), each moved by a vector of length `noise`, then of unit length again."""
    n = F.normalize(torch.randn(embedding.shape, generator=generator), dim=1)
    return F.normalize(embedding + noise * n.to(embedding.device), dim=1)


def read_shards(directory: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """codes uint16 (N, crops, L), embeddings float16 (N, crops, D), memory-mapped; manifest."""
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        raise SystemExit(f"{directory} holds no manifest.json: make shards with "
                         "scripts.encode_images")
    codes, embeddings = (np.load(directory / f"{n}.npy", mmap_mode="r")
                         for n in ("codes", "embeddings"))
    return codes, embeddings, json.loads(manifest.read_text())


@torch.no_grad()
def validation_loss(gpt: GPT, codes: np.ndarray, embeddings: np.ndarray,
                    device: torch.device) -> float:
    """Cross-entropy in nats per code, each held-out image given its own embedding."""
    total = 0.0
    for start in range(0, len(codes), 128):
        c = torch.from_numpy(codes[start:start + 128, 0].astype(np.int64)).to(device)
        e = torch.from_numpy(embeddings[start:start + 128, 0].astype(np.float32)).to(device)
        total += F.cross_entropy(gpt(e, c[:, :-1]).flatten(0, 1), c.flatten()).item() * len(c)
    return total / len(codes)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shards", type=Path)
    p.add_argument("--validation", type=Path, help="shards of images that are not trained on")
    p.add_argument("--run", type=Path, required=True, help="directory of checkpoints and result")
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--steps", type=int, default=12000)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--noise", type=float, default=0.5, help="ξ: length of the perturbation")
    p.add_argument("--drop-condition", type=float, default=0.1)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    codes, embeddings, manifest = read_shards(a.shards)
    held = read_shards(a.validation) if a.validation else None
    if held and held[2]["vqgan_sha256"] != manifest["vqgan_sha256"]:
        raise SystemExit(f"{a.validation} was encoded by another VQGAN than {a.shards}: "
                         "encode it again")
    config = GPTConfig(layers=a.layers, width=a.width, heads=a.heads,
                       codebook_size=manifest["codebook_size"], block_size=codes.shape[-1],
                       embedding_dim=embeddings.shape[-1], null_embedding=a.drop_condition > 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt = GPT(config)
    gpt.initialise()
    gpt.to(device).dropout = a.dropout
    optimizer = adamw(gpt, a.lr, 0.05)
    average = Average(gpt, 0.999)
    run = Run(a.run, settings_of(a) | {"vqgan_sha256": manifest["vqgan_sha256"]})
    first, loss_sum = 0, 0.0
    if state := run.resume():
        gpt.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.state, first = state["average"], state["step"]
    evaluated = GPT(config).to(device).eval()
    for step in range(first, a.steps):
        generator = torch.Generator().manual_seed(a.seed * 1_000_003 + step)
        rows = torch.randint(len(codes), (a.batch,), generator=generator).numpy()
        crop = torch.randint(codes.shape[1], (a.batch,), generator=generator).numpy()
        c = torch.from_numpy(codes[rows, crop].astype(np.int64)).to(device)  # (N, L)
        e = torch.from_numpy(embeddings[rows, crop].astype(np.float32)).to(device)  # (N, D)
        e = perturb(e, a.noise, generator)
        if config.null_embedding:
            dropped = torch.rand(a.batch, generator=generator) < a.drop_condition
            e = torch.where(dropped[:, None].to(device), gpt.null_embedding, e)
        loss = F.cross_entropy(gpt(e, c[:, :-1]).flatten(0, 1), c.flatten())
        set_learning_rate(optimizer, learning_rate(step, a.steps, a.lr, 300))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        average.update(gpt, step)
        loss_sum += loss.item()
        done = step + 1
        if done % 100 == 0:
            run.log(done, a.steps, loss=loss_sum / 100)
            loss_sum = 0.0
        if run.due() or done == a.steps:
            run.save(done, model=gpt.state_dict(), optimizer=optimizer.state_dict(),
                     average=average.state)
            if held:
                evaluated.load_state_dict(average.state)
                run.log(done, a.steps, validation=validation_loss(evaluated, *held[:2], device))
    evaluated.load_state_dict(average.state)
    result = {"token_ce": validation_loss(evaluated, *held[:2], device)} if held else {}
    save_weights(average.state, a.run / "gpt.safetensors")
    (a.run / "gpt.json").write_text(json.dumps(vars(config)))
    (a.run / "shards.json").write_text(json.dumps(manifest))
    print(json.dumps({"steps": a.steps, **result}))


if __name__ == "__main__":
    main()
