"""A whole model small enough to load, run and damage in a moment; its weights are random.

    python -m tests.micro DIR [--vocabulary TEXT ...] [--null-embedding]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from clipgen.bundle import SamplingDefaults, save_bundle
from clipgen.clip import CLIP, FULL_VOCABULARY, CLIPConfig, vocabulary_of
from clipgen.gpt import GPT, GPTConfig
from clipgen.vqgan import VQGAN, VQGANConfig


def micro_clip(vocabulary: Sequence[str] | None = None, image_size: int = 32,
               context_length: int = 32) -> CLIP:
    """A random CLIP, embeddings of 32; `vocabulary`: texts whose tokens alone get a row."""
    rows = None if vocabulary is None else vocabulary_of(vocabulary)
    return CLIP(CLIPConfig(model={
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": image_size, "layers": 2, "width": 32, "head_width": 16,
                       "patch_size": 8},
        "text_cfg": {"context_length": context_length, "width": 32, "heads": 2, "layers": 2,
                     "vocab_size": FULL_VOCABULARY if rows is None else len(rows)},
    }, vocabulary=rows)).eval()


def micro_vqgan(codebook_size: int = 64, image_size: int = 32, levels: int = 4) -> VQGAN:
    """A random VQGAN: 32x32 pixels to 4x4 codes of a codebook of 64."""
    return VQGAN(VQGANConfig(image_size=image_size, channels=(32,) * levels, attention_sizes=(4,),
                             blocks_per_level=1, code_dim=8, codebook_size=codebook_size,
                             l2_normalised=True)).eval()


def micro_gpt(codebook_size: int = 64, block_size: int = 16, null_embedding: bool = False,
              layers: int = 2, added: dict | None = None) -> GPT:
    """A random GPT of width 32; its forecasts differ by condition, place and code.

    added: what it has beyond the published one, keys of GPTConfig.
    """
    gpt = GPT(GPTConfig(layers=layers, width=32, heads=4, codebook_size=codebook_size,
                        block_size=block_size, embedding_dim=32, null_embedding=null_embedding,
                        **added or {}))
    gpt.initialise()
    with torch.no_grad():  # as initialised all forecasts are near uniform, so faults would hide
        gpt.position.normal_(std=0.5)
        gpt.code_embedding.weight.normal_(std=0.5)
        gpt.head.weight.normal_(std=0.3)
        if gpt.config.neighbours:
            gpt.neighbour_embedding.weight.normal_(std=0.5)
        if gpt.config.layouts:
            gpt.layout_tables.weight.normal_(std=0.3)
        if gpt.config.modulated:
            gpt.modulation.weight.normal_(std=0.1)
        if null_embedding:
            gpt.null_embedding.normal_(std=0.2)
    return gpt.eval()


def micro_bundle(directory: str | Path, seed: int = 0, *, vocabulary: Sequence[str] | None = None,
                 null_embedding: bool = False, codebook_size: int = 64,
                 sampling: SamplingDefaults | None = None,
                 dtype: torch.dtype = torch.float32) -> Path:
    """Write the bundle that (seed, options) name into `directory`; returns it as a Path.

    32x32 pixels, 4x4 codes, embeddings of 32, context of 32 tokens.  `vocabulary`: texts whose
    tokens alone CLIP knows (None: all); `dtype`: of the stored weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, vqgan = micro_clip(vocabulary), micro_vqgan(codebook_size)
        gpt = micro_gpt(codebook_size, null_embedding=null_embedding)
    save_bundle(directory, clip=clip, vqgan=vqgan, gpt=gpt, sampling=sampling or SamplingDefaults(),
                trained_on={"data": f"nothing: random weights, seed {seed}"}, dtype=dtype)
    return Path(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", nargs="+", metavar="TEXT")
    parser.add_argument("--null-embedding", action="store_true")
    args = parser.parse_args()
    print(micro_bundle(args.directory, args.seed, vocabulary=args.vocabulary,
                       null_embedding=args.null_embedding))


if __name__ == "__main__":
    main()
